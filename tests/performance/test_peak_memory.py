"""Peak memory against allocations counted by hand."""

import pytest
import torch
from torch import nn

from layershed.performance.peak_memory import watching_memory
from layershed.performance.stopwatch import SpeedSettings, Stopwatch, cache_bytes
from layershed.spellings import cache_in

CPU = torch.device("cpu")


def nothing(_before):
    pass


def one_tensor(_before):
    return torch.empty(1000)


def views_of_one(_before):
    made = torch.empty(1000)
    return made, made[::2], made.view(10, 100).t(), made.expand(50, 1000), made.detach()


def written_over(_before):
    made = torch.empty(1000)
    made.add_(1).mul_(2)
    torch.add(made, 1, out=made)
    made[3:5] = 7
    return made


def of_what_was_there(before):
    before.add_(1)
    return before.view(10, 25), before[3:]


def one_after_the_other(_before):
    for _ in range(5):
        made = torch.empty(1000)
        del made


def all_at_once(_before):
    return [torch.empty(1000) for _ in range(5)]


def freed_in_between(_before):
    first = torch.empty(1000)
    second = first + 1
    del first
    third = torch.empty(500)  # 6000 now, after 8000
    return second, third


def kept_by_a_view(_before):
    part = torch.empty(1000)[:1]  # the view keeps all 1000 numbers
    return part, torch.empty(1000)


def an_intermediate(_before):
    made = torch.empty(1000)
    return (made + 1).sum()


def several_results(_before):
    return torch.empty(1000).split(100), torch.empty(20, 50).max(dim=0)  # 50 float32 and 50 int64


@pytest.mark.parametrize(
    ("work", "peak"),
    [
        (nothing, 0),
        (one_tensor, 4000),
        (views_of_one, 4000),
        (written_over, 4000),
        (of_what_was_there, 0),
        (one_after_the_other, 4000),
        (all_at_once, 20000),
        (freed_in_between, 8000),
        (kept_by_a_view, 8000),
        (an_intermediate, 8004),
        (several_results, 8000 + 50 * 4 + 50 * 8),
    ],
)
def test_peak_equals_the_largest_sum_of_allocations(work, peak):
    before = torch.zeros(250)
    with watching_memory(CPU) as told:
        kept = work(before)
        assert told() == peak
    del kept


def test_peak_excludes_memory_held_before_the_context():
    before = torch.zeros(5000)
    with watching_memory(CPU) as told:
        del before
        made = torch.empty(10)
        assert told() == 40
        more = made + 1
        assert told() == 80  # it can be called again
        del made, more
        assert told() == 80


def test_peak_excludes_allocations_after_the_context():
    with watching_memory(CPU) as told:
        inside = torch.empty(10)
    outside = torch.empty(1000)
    assert told() == 40
    del inside, outside
    assert told() == 40


@torch.no_grad()
def test_peak_of_two_layers_equals_the_hand_calculation():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    rows = torch.ones(10, 4)
    with watching_memory(CPU) as told:
        model(rows)
    # both sides of the ReLU, 10 x 8 float32 each; after it one of them and 10 x 2
    assert told() == 2 * 320


@torch.no_grad()
def test_generation_peak_is_repeatable_and_includes_the_cache(llama):
    def peak(new_tokens):
        stopwatch = Stopwatch(llama, SpeedSettings(prompt_tokens=8, new_tokens=new_tokens))
        with watching_memory(CPU) as told:
            held = cache_bytes(cache_in(stopwatch.decode(stopwatch.prefill())))
        return told(), held

    few, many = peak(30), peak(90)  # enough of them that a step takes more than the prefill
    assert peak(30) == few
    assert few[0] > few[1]
    assert many[0] - few[0] >= many[1] - few[1] > 0


def test_gpu_peak_comes_from_the_allocator(monkeypatch):
    log, figures = [], {"memory_allocated": 1000, "max_memory_allocated": 1700}

    def fake(name):
        def call(device):
            log.append((name, str(device)))
            return figures.get(name)

        return call

    for name in ("synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, fake(name))
    with watching_memory(torch.device("cuda", 1)) as told:
        log.append("work")
        assert told() == 700
    device = "cuda:1"
    # order: empty the queue, read the allocated bytes, reset the peak
    assert log == [
        ("synchronize", device),
        ("memory_allocated", device),
        ("reset_peak_memory_stats", device),
        "work",
        ("max_memory_allocated", device),
    ]
