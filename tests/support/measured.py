"""A measured speed, as tests of reports need one."""

from layershed.performance.speed import Interval, PhaseSpeed, SpeedReport

_SIZES = ("parameters", "kv_bytes", "file_bytes", "peak_memory")
SPEED = SpeedReport(
    phases={"decode": PhaseSpeed(100.0, Interval(1.2, 1.1, 1.3))},
    **{f"{what}_{side}": 1 for what in _SIZES for side in ("dense", "dropped")},
    **{"runs": 9, "batch_size": 1, "prompt_tokens": 1, "new_tokens": 1, "device": "cpu"},
)
