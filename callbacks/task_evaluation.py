"""Scores the model on real tasks around the drop, in validation and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from layershed.arguments import check_most
from layershed.discovery.find import find_transformer
from layershed.errors import TaskError, UnknownNameError
from layershed.evaluation.results import TaskResults
from layershed.evaluation.tasks import check_code, check_harness, evaluate_tasks, expand
from layershed.integration.module_hooks import leave_structure, watch_for_bypass
from layershed.integration.namespaces import Callback, LightningModule, Trainer
from layershed.integration.run import current_drop, publish, run_directory
from layershed.integration.task_rows import described, task_metrics, write_tasks
from layershed.integration.telling import say
from layershed.integration.watching import Watcher
from layershed.planning.plan import Sublayer
from layershed.quality import check_head
from layershed.surgery import dense

When = Literal["drop", "validation", "end"]


class TaskEvaluation(Callback):
    """Scores a causal language model on tasks of EleutherAI's lm-evaluation-harness, in memory, during the run.

    At a drop it scores the dense model, by lifting the bypass, and then the dropped one. List it after SublayerDrop.

    Hooks: scores in ``on_train_batch_end`` after a drop, in ``on_validation_end``, and in ``on_train_end``.
    Logs: ``tasks/NAME_before``, ``tasks/NAME_after``, ``tasks/NAME_validation``, ``tasks/NAME_end``; the averages are
    ``tasks/tasks_after`` and so on.
    Prints: one line for each evaluation.
    Writes: ``tasks.json`` in the run directory. The report shows it, with the SDR of the average.
    Checkpoint: the results so far.
    An error of an evaluation becomes one warning; it does not end the run.

    Args:
        tasks: As of :func:`evaluate_tasks`: names of tasks, YAML files, files of requests, or the presets ``paper`` and
            ``generative``.
        limit: At most so many questions of each task; None takes all.
        shots: Examples before each question; None takes the task's own.
        batch_size: Sequences in a forward pass.
        when: ``drop``, ``validation`` and ``end``, or some of them.
        run_generated_code: Allow tasks that run the code that the model writes (HumanEval), on this machine.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.

    Raises:
        TaskError: If an argument is out of range; before training, if there is no tokenizer. The datamodule or the
            module must have one as its attribute ``tokenizer``.
        UnknownNameError: If a moment is unknown.
        MeasurementError: Before training, if the model does not predict the next token.
        MissingExtraError: Before training, if lm-evaluation-harness is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        limit: int | None = 200,
        shots: int | None = None,
        batch_size: int = 8,
        when: Sequence[When] = ("drop", "end"),
        run_generated_code: bool = False,
        transformer: str | None = None,
    ) -> None:
        check_code(expand(tasks), run_generated_code)
        for what, value in (("limit", limit), ("batch_size", batch_size)):
            check_most(value, what, TaskError)
        for moment in when:
            if moment not in get_args(When):
                raise UnknownNameError("moment of TaskEvaluation", moment, get_args(When))
        self.tasks, self.limit, self.shots, self.batch_size = tuple(tasks), limit, shots, batch_size
        self.when, self.transformer = tuple(when), transformer
        self.run_generated_code = run_generated_code
        self.task_results: dict[str, TaskResults] = {}
        self._watcher = Watcher("TaskEvaluation")
        self._dropped: tuple[Sublayer, ...] = ()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be evaluated."""
        check_harness()
        check_head(find_transformer(pl_module, name=self.transformer))
        _tokenizer_of(trainer, pl_module)
        self._dropped = current_drop(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score around a drop that this step brought."""
        watch_for_bypass(pl_module, self.transformer)
        dropped = current_drop(pl_module)
        if dropped and dropped != self._dropped and "drop" in self.when:
            if "before" not in self.task_results:
                with dense(pl_module):
                    self._score(trainer, pl_module, "before")
            self._score(trainer, pl_module, "after")
        self._dropped = dropped

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score after a validation of the fit."""
        if "validation" in self.when and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._score(trainer, pl_module, "validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score at the end."""
        if "end" in self.when:
            self._score(trainer, pl_module, "end")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The results so far, as primitives."""
        return {"results": {when: results.to_dict() for when, results in self.task_results.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.task_results = {when: TaskResults.from_dict(own) for when, own in state_dict["results"].items()}

    def _score(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        found = self._evaluate(trainer, pl_module)
        if found is None:
            return
        self.task_results[when] = found
        publish(trainer, task_metrics(when, found))
        directory = run_directory(trainer)
        if trainer.is_global_zero:
            write_tasks(directory, self.task_results)
        say(trainer, f"step {trainer.global_step}: tasks {when}: {described(found)}")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> TaskResults | None:
        """The results in the run's precision; None after an error."""
        options: dict[str, Any] = {"limit": self.limit, "shots": self.shots, "batch_size": self.batch_size}
        options |= {"run_generated_code": self.run_generated_code, "name": self.transformer}
        found: list[TaskResults] = []
        with self._watcher.leaving_out("the tasks"), trainer.precision_plugin.forward_context():
            found.append(evaluate_tasks(pl_module, _tokenizer_of(trainer, pl_module), self.tasks, **options))
        return found[0] if found else None


def _tokenizer_of(trainer: Trainer, pl_module: LightningModule) -> Any:
    holders = (getattr(trainer, "datamodule", None), pl_module)
    found = next((own for holder in holders if (own := getattr(holder, "tokenizer", None)) is not None), None)
    if found is None or isinstance(found, str):
        raise TaskError(
            "TaskEvaluation: there is no tokenizer. Set it as the attribute tokenizer of the datamodule or of the "
            "LightningModule."
        )
    return found
