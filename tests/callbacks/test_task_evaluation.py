"""TaskEvaluation around a drop: the scores of the function, a file, metrics, rows of the report; refusals."""

import copy
import json

import pytest
import torch
from transformers import ByT5Tokenizer

import layershed as ls
from layershed.callbacks import SublayerDrop, TaskEvaluation
from layershed.errors import TaskError, UnknownNameError
from layershed.evaluation.results import TaskResults, TaskScore
from layershed.integration.task_rows import task_rows
from tests.support.runs import Foreign, Watch, fit_foreign


class Bytes(ByT5Tokenizer):
    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0


class Asked(Foreign):
    """A module with a tokenizer, whose model has an id for every byte."""

    def __init__(self, **overrides):
        super().__init__(vocab_size=300, **overrides)
        self.tokenizer = Bytes(extra_ids=0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    lines = [
        {"request": {"context": f"{n} and", "continuation": f" {answer}"}, "doc_id": n, "idx": answer, "label": n % 3}
        for n in range(6)
        for answer in range(3)
    ]
    file = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_scores_around_a_drop_are_those_of_the_dense_and_of_the_dropped_model(make_trainer, questions, tmp_path):
    seen = {}

    class Keep(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                seen["net"] = copy.deepcopy(pl_module.net)

    drop = SublayerDrop(3, count=3, calibration_batches=2, quality_batches=1)
    tasks = TaskEvaluation([questions], limit=5)
    trainer = make_trainer(drop, tasks, Keep(None), csv=True, max_steps=5)
    module = fit_foreign(trainer, Asked())
    after = ls.evaluate_tasks(seen["net"], module.tokenizer, [questions], limit=5)
    with ls.dense(seen["net"]):
        before = ls.evaluate_tasks(seen["net"], module.tokenizer, [questions], limit=5)
    end = ls.evaluate_tasks(module, module.tokenizer, [questions], limit=5)
    assert tasks.task_results == {"before": before, "after": after, "end": end}
    written = json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert {when: TaskResults.from_dict(own) for when, own in written.items()} == tasks.task_results
    assert trainer.callback_metrics["tasks/tasks_end"].item() == pytest.approx(end.average)
    assert trainer.callback_metrics["tasks/sums_before"].item() == pytest.approx(before.average)


def test_scoring_leaves_the_run_as_it_is(make_trainer, questions):
    def run(name, *extra):
        module = fit_foreign(make_trainer(*extra, name=name, max_steps=5), Asked())
        return {key: value.clone() for key, value in module.state_dict().items() if value.is_floating_point()}

    plain = run("plain", SublayerDrop(3, count=2, quality_batches=0))
    scored = run("scored", SublayerDrop(3, count=2, quality_batches=0), TaskEvaluation([questions], limit=2))
    assert all(torch.equal(plain[key], scored[key]) for key in plain)


def test_results_survive_a_checkpoint(questions):
    tasks, fresh = TaskEvaluation([questions]), TaskEvaluation([questions])
    tasks.task_results["before"] = TaskResults((TaskScore("a", "acc", 0.5, 0.1),))
    fresh.load_state_dict(json.loads(json.dumps(tasks.state_dict())))
    assert fresh.task_results == tasks.task_results


def test_the_report_gets_rows_of_every_moment(tmp_path):
    found = {
        when: TaskResults((TaskScore("a", "acc", value, 0.1),)) for when, value in (("before", 0.5), ("end", 0.25))
    }
    assert task_rows(found, tmp_path / "speed.json") == [
        ("Tasks before the drop", "50.0 % +- 10.0 % (a 50.0 %)"),
        ("Tasks at the end", "25.0 % +- 10.0 % (a 25.0 %)"),
    ]


def test_what_cannot_be_scored_is_refused_before_training(make_trainer, questions):
    with pytest.raises(UnknownNameError, match="drop"):
        TaskEvaluation([questions], when=["drops"])
    with pytest.raises(TaskError, match="there is none"):
        TaskEvaluation([])
    with pytest.raises(TaskError, match="no file"):
        TaskEvaluation(["elsewhere.jsonl"])
    trainer = make_trainer(TaskEvaluation([questions]))
    with pytest.raises(TaskError, match="there is no tokenizer"):
        fit_foreign(trainer)
    assert trainer.global_step == 0
