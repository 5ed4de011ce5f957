"""What a drop cost against a control, or what the figures cannot tell without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from layershed.formatting import printable
from layershed.performance.degradation import AROUND_THE_DROP, Degradation, degradation
from layershed.reporting.record import Control, RunRecord, drop_steps

LABEL = "Cost of the drop"
UNKNOWN = (
    "not known: the figures at the end include the training since the drop. Compare "
    "with a run without the drop: --control true, or Report(control=RUN)"
)
FAILED = "not known: the control was stopped or failed before its end"
PENDING = "not known yet: the control has not ended"


def cost_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Rows of the summary: the control's quality, what the drop cost against it, and the SDR against it.

    Without a control, one row says what the loss at the end cannot tell. Nothing if nothing was trained since the drop.
    """
    control, steps = record.control, drop_steps(record.plan)
    if control is not None:
        yield from _control_rows(record, control)
    elif not steps or record.steps == steps[-1] or "end" not in record.quality:
        return
    elif record.control_pending or record.control_failed:
        yield LABEL, PENDING if record.control_pending else FAILED
    else:
        yield LABEL, UNKNOWN


def compared_qualities(record: RunRecord, control: Control) -> tuple[int, dict[str, tuple[float, float]]]:
    """The last step at which both have a quality, and each quality of the control and of this run there, by name.

    At the end, a control of ``train.py fit --control true`` measures the same batches as SublayerDrop. Otherwise it is
    the loss of the last validation that both have. One before the drop tells nothing. Empty if there is none.
    """
    end = record.quality.get("end")
    if end is not None and control.end == record.steps:
        both = {name: (control.quality[name], value) for name, value in end.values.items() if name in control.quality}
        if both:
            return control.end, both
    theirs = {point.step: point.loss for point in control.losses if point.split == "val"}
    since = max(drop_steps(record.plan), default=0)
    own = {step: loss for step, loss in record.validations if step in theirs and step >= since}
    step = max(own, default=0)
    return step, ({"loss": (theirs[step], own[step])} if own else {})


def _control_rows(record: RunRecord, control: Control) -> Iterator[tuple[str, str]]:
    step, found = compared_qualities(record, control)
    if not found:
        yield LABEL, "not known: the control and this run have no validation at the same step after the drop"
        return
    theirs, own = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
    when = "" if step == record.steps else f" at step {step:,}"
    yield "Control, without the drop", ", ".join(_quality(name, value) for name, value in theirs.items()) + when
    which = f"after the same {step - (control.start or 0):,} steps"
    doubts = f" (but {'; '.join(map(printable, control.doubts))})" if control.doubts else ""
    yield LABEL, f"{', '.join(_change(name, *pair) for name, pair in found.items())} {which}{doubts}"
    if (sdr := _sdr(record, theirs, own)) is not None:
        yield "SDR against the control", str(sdr)


def _sdr(record: RunRecord, theirs: Mapping[str, float], own: Mapping[str, float]) -> Degradation | None:
    """By the quality and the phase of the SDR that SpeedMonitor logged."""
    logged = next(iter(record.sdr.values()), None)
    if record.speed is None or logged is None or logged.quality not in AROUND_THE_DROP:
        return None
    return degradation(theirs, own, record.speed, quality=logged.quality, phase=logged.phase)


def _quality(name: str, value: float) -> str:
    if name == "accuracy":
        return f"next-token accuracy {100 * value:.1f} %"
    return f"{'validation loss' if name == 'loss' else printable(name)} {value:.4f}"


def _change(name: str, control: float, own: float) -> str:
    if name == "accuracy":
        return f"{round(100 * (own - control), 1) + 0.0:+.1f} points of next-token accuracy"
    return f"{round(own - control, 4) + 0.0:+.4f} {'loss' if name == 'loss' else printable(name)}"
