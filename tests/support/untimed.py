"""The state of callbacks without what was measured: two equal runs take different times."""

from typing import Any


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    """The state of a Report without the duration and the throughput of its run."""
    kept = {key: value for key, value in report.items() if key != "seconds"}
    return {**kept, "losses": {key: value for key, value in kept["losses"].items() if key != "throughput"}}
