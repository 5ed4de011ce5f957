"""Tasks by lm-evaluation-harness against plain log-likelihoods; calibration against its formula; refusals."""

import dataclasses
import gzip
import json

import pytest
import torch
from transformers import ByT5Tokenizer

import layershed as ls
from layershed.errors import MeasurementError, TaskError
from layershed.evaluation.results import TaskResults, TaskScore, expected_calibration_error
from layershed.evaluation.tasks import PRESETS, expand, name_of_task
from layershed.integration.task_rows import described
from tests.support.models import build_model


class Bytes(ByT5Tokenizer):
    """Bytes without an end of the text, which the harness would take for a part of it."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0


QUESTIONS = [
    ("Two and two are", [" four", " five", " a cow"], 0),
    ("The sky is", [" green", " blue"], 1),
    ("Snow is", [" white", " black", " hot", " a number"], 0),
    ("Fish can", [" read books", " swim"], 1),
]


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "sums" / "rc_0shot"
    folder.mkdir(parents=True)
    lines = [
        {"request": {"context": text, "continuation": answer}, "doc_id": number, "idx": place, "label": label}
        for number, (text, answers, label) in enumerate(QUESTIONS)
        for place, answer in enumerate(answers)
    ]
    file = folder / "requests.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return str(file)


@pytest.fixture(scope="module")
def model():
    return build_model("llama", vocab_size=300)


def plain_likelihoods(model, tokenizer):
    """By question, the log-likelihood of each answer: one pass each, no batch."""
    found = []
    for text, answers, _ in QUESTIONS:
        own = []
        for answer in answers:
            before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
            with torch.no_grad():
                log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            own.append(sum(float(log_p[len(before) - 1 + i, token]) for i, token in enumerate(after)))
        found.append(own)
    return found


@pytest.mark.parametrize("dropped", [False, True])
def test_multiple_choice_scores_what_plain_likelihoods_choose(model, requests, dropped):
    tokenizer = Bytes(extra_ids=0)
    if dropped:
        ls.bypass(model, ls.find_sublayers(model)[1:4])
    found = ls.evaluate_tasks(model, tokenizer, [requests], batch_size=3)
    likelihoods = plain_likelihoods(model, tokenizer)
    ls.restore(model) if dropped else None
    normalised = [
        max(range(len(own)), key=lambda i, own=own, answers=answers: own[i] / len(answers[i]))
        for own, (_, answers, _) in zip(likelihoods, QUESTIONS, strict=True)
    ]
    (score,) = found.scores
    hits = [choice == label for choice, (_, _, label) in zip(normalised, QUESTIONS, strict=True)]
    assert score.value == pytest.approx(sum(hits) / len(hits))
    assert (score.task, score.metric, score.questions) == ("sums_rc_0shot", "acc_norm", 4)
    shares = [torch.tensor(own, dtype=torch.float64).softmax(0) for own in likelihoods]
    right = [int(s.argmax()) == label for s, (_, _, label) in zip(shares, QUESTIONS, strict=True)]
    expected = expected_calibration_error([float(s.max()) for s in shares], right)
    assert score.calibration_error == pytest.approx(expected, rel=1e-3)


def test_a_limit_takes_the_first_questions(model, requests):
    (score,) = ls.evaluate_tasks(model, Bytes(extra_ids=0), requests, limit=2).scores
    assert score.questions == 2


def test_single_requests_are_continuations_to_be_predicted(model, tmp_path):
    lines = [
        {"request": {"context": text, "continuation": answers[0]}, "doc_id": n, "idx": 0, "label": answers[0]}
        for n, (text, answers, _) in enumerate(QUESTIONS)
    ]
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    (score,) = ls.evaluate_tasks(model, Bytes(extra_ids=0), str(file)).scores
    assert (score.task, score.metric, score.calibration_error) == ("words", "acc", None)


def test_calibration_error_is_that_of_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(200, generator=generator)
    hits = torch.rand(200, generator=generator) < confidences.sqrt()
    found = expected_calibration_error(confidences.tolist(), hits.tolist())
    assert found == pytest.approx(float(binary_calibration_error(confidences, hits.int(), n_bins=15)), rel=1e-5)


def test_results_average_and_go_through_primitives():
    results = TaskResults((TaskScore("a", "acc", 0.5, 0.1), TaskScore("b", "acc", 0.7, 0.2)))
    assert results.average == pytest.approx(0.6)
    assert results.stderr == pytest.approx((0.01 + 0.04) ** 0.5 / 2)
    assert TaskResults.from_dict(json.loads(json.dumps(results.to_dict()))) == results


def test_a_task_that_fails_is_left_out_with_a_warning(model, requests, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\noutput_type: nothing\n")
    with pytest.warns(UserWarning, match=r"broken\.yaml' .*left out"):
        found = ls.evaluate_tasks(model, Bytes(extra_ids=0), [str(broken), requests])
    assert [score.task for score in found.scores] == ["sums_rc_0shot"]
    with pytest.raises(TaskError, match=r"broken\.yaml"):
        ls.evaluate_tasks(model, Bytes(extra_ids=0), [str(broken)])


def test_a_task_of_ones_own_yaml_is_that_of_its_requests(model, requests, tmp_path):
    rows = [{"text": text, "answers": answers, "label": label} for text, answers, label in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = tmp_path / "own.yaml"
    own.write_text(
        f"""
task: own
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: answers
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    )
    (first,) = ls.evaluate_tasks(model, Bytes(extra_ids=0), [str(own)]).scores
    (second,) = ls.evaluate_tasks(model, Bytes(extra_ids=0), [requests]).scores
    assert first == dataclasses.replace(second, task="own")


def test_perplexities_are_no_part_of_the_average():
    results = TaskResults((TaskScore("a", "acc", 0.5, 0.1), TaskScore("b", "perplexity", 30.0, None)))
    assert (results.average, results.stderr) == (0.5, 0.1)
    assert described(results) == "50.0 % +- 10.0 % (a 50.0 %, b perplexity 30.000)"


def test_tasks_that_run_generated_code_need_permission(model):
    for tasks in ("generative", ["humaneval"]):
        with pytest.raises(TaskError, match="Set run_generated_code"):
            ls.evaluate_tasks(model, Bytes(extra_ids=0), tasks)


@pytest.mark.slow  # the harness reads thousands of files
def test_presets_name_tasks_of_the_harness():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert {task for preset in PRESETS.values() for task in preset} <= known
    assert expand("paper")[0] == ("arc_challenge", 25)
    assert name_of_task("a/sciq/rc_0shot/requests.jsonl.gz") == "sciq_rc_0shot"


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ([], "there is none"),
        (["sciq", "sciq"], "appears twice"),
        (["no.jsonl"], "no file 'no.jsonl'"),
        pytest.param(["no_such_task_at_all"], "has no task", marks=pytest.mark.slow),
    ],
)
def test_tasks_that_cannot_be_are_refused(model, tasks, says):
    with pytest.raises(TaskError, match=says):
        ls.evaluate_tasks(model, Bytes(extra_ids=0), tasks)


def test_a_file_that_holds_no_requests_is_refused(model, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(TaskError, match="is no file of requests"):
        ls.evaluate_tasks(model, Bytes(extra_ids=0), str(file))


def test_a_model_without_a_head_is_refused(model, requests):
    with pytest.raises(MeasurementError, match="does not predict the next token"):
        ls.evaluate_tasks(model.model, Bytes(extra_ids=0), requests)
