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
    elif record.control_pending:
        yield LABEL, PENDING
    else:
        yield LABEL, UNKNOWN


def qualities_at_the_end(record: RunRecord) -> dict[str, tuple[float, float]]:
    """Each quality at the end, of the control and of this run, by name.

    A control of ``train.py fit --control true`` measures the same batches as SublayerDrop. Of another run it is the
    loss of the last validation that both have.
    """
    control = record.control
    if control is None or control.end != record.steps:
        return {}
    end = record.quality.get("end")
    if end is not None and control.quality:
        return {name: (control.quality[name], value) for name, value in end.values.items() if name in control.quality}
    theirs = {point.step: point.loss for point in control.losses if point.split == "val"}
    own = {step: loss for step, loss in record.validations if step in theirs}
    return {"loss": (theirs[max(own)], own[max(own)])} if own else {}


def _control_rows(record: RunRecord, control: Control) -> Iterator[tuple[str, str]]:
    found = qualities_at_the_end(record)
    if not found:
        reason = f"the control ended at step {control.end:,}, this run at step {record.steps or 0:,}"
        if control.end == record.steps:
            reason = "the control and this run have no validation at the same step"
        yield LABEL, f"not known: {reason}"
        return
    theirs, own = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
    yield "Control, without the drop", ", ".join(_quality(name, value) for name, value in theirs.items())
    which = f"after the same {control.end - (control.start or 0):,} steps"
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
