"""Long work tells a listener how far it is; without one it is silent."""

import pytest
import torch

import layershed as ls
from layershed.importance.tracker import estimate_importance
from layershed.performance.latency import Latency, measure_latency
from layershed.performance.speedup_target import _Search
from layershed.planning.plan import Drop, Sublayer
from layershed.progress import least, listening, track
from layershed.quality import evaluate_quality
from layershed.training.causal_lm import CausalLM
from tests.support.small_world import TINY

SPEED = {"prompt_tokens": 4, "new_tokens": 2, "runs": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalLM(config=TINY).model.eval()


@pytest.fixture
def told():
    calls = []
    with listening(lambda *call: calls.append(call)):
        yield calls


def measured(model):
    ls.bypass(model, ls.find_sublayers(model)[:1])
    try:
        ls.measure_speed(model, **SPEED)
    finally:
        ls.restore(model)


BATCHES = [{"input_ids": torch.full((1, 8), 5)}] * 3
WORKS = {
    "Scoring": (lambda model: estimate_importance(model, BATCHES, max_batches=2), 2),
    "Measuring quality": (lambda model: evaluate_quality(model, BATCHES), 3),
    "Measuring speed": (lambda model: measured(model), 3),
    "Measuring latency": (lambda model: measure_latency(model, **SPEED), 3),
}


@pytest.mark.parametrize("what", list(WORKS))
def test_listener_is_told_every_step_of_long_work_and_its_end(what, model, told):
    work, total = WORKS[what]
    work(model)
    assert told == [(what, done, total) for done in [*range(total + 1), None]]


def test_search_for_a_speedup_tells_its_tries(model, told):
    scores = dict.fromkeys(ls.find_sublayers(model), 0.1)
    try:
        ls.drop_to_speedup(model, scores, 1.0001, settings=ls.SpeedSettings(**SPEED))
    except ls.SpeedupError:
        pass  # the machine may be busy
    finally:
        ls.restore(model)
    tries = [(done, total) for what, done, total in told if what == "Searching a speedup of 1.0001"]
    total = tries[0][1]
    assert {each for _, each in tries} == {total}
    assert total is not None
    assert [tries[0][0], tries[-1][0]] == [0, None]
    assert [done for done, _ in tries[:-1]] == list(range(len(tries) - 1))
    speeds = [done for what, done, _ in told if what == "Measuring speed" and done == 0]
    assert len(speeds) >= len(tries) - 2 >= 1


@pytest.mark.parametrize("count", [1, 2, 5, 30, 160])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99, 1.5])
@pytest.mark.parametrize("honest", [0.2, 1.0, 3.0])
def test_search_takes_at_most_as_many_tries_as_it_says(count, share, honest):
    ranked = [(Drop(Sublayer(block, "mlp", f"{block}")),) for block in range(count)]
    latency = Latency({group[0].sublayer: 0.5 / count for group in ranked}, 1.0)
    # each group really saves another share of the time than was predicted
    speedups = [1 / (1 - min(0.9, 0.5 * honest * number / count)) for number in range(count + 1)]
    search = _Search(latency, (), ranked, 1 + share * (speedups[-1] - 1))
    tries = 0
    while (number := search.next_number()) is not None:
        tries += 1
        search.learn(number, speedups[number])
    assert 1 <= tries <= search.most


def test_innermost_listener_is_told_and_none_after_it():
    outer, inner = [], []
    with listening(lambda *call: outer.append(call)):
        with listening(lambda *call: inner.append(call)):
            assert list(track("ab", "inside", 2)) == ["a", "b"]
        assert list(track("c", "outside")) == ["c"]
    assert list(track("d", "alone")) == ["d"]
    assert [call[0] for call in inner] == ["inside"] * 4
    assert outer == [("outside", 0, None), ("outside", 1, None), ("outside", None, None)]


def test_error_within_the_work_ends_it(told):
    def work():
        for item in track(range(9), "work", 9):
            if item == 1:
                raise KeyError

    with pytest.raises(KeyError):
        work()
    assert told[-1] == ("work", None, 9)


@pytest.mark.parametrize(
    ("batches", "most", "expected"),
    [([1, 2, 3], None, 3), ([1, 2, 3], 2, 2), ([1], 5, 1), (iter([1]), 5, 5), (iter([1]), None, None)],
)
def test_number_of_batches_is_known_where_it_can_be(batches, most, expected):
    assert least(batches, most) == expected


def test_number_of_batches_of_a_stream_is_unknown():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([1])

    assert least(torch.utils.data.DataLoader(Stream()), None) is None
