"""control.json, which says what a control of ``train.py fit --control true`` measured. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONTROL_FILE = "control.json"


@dataclass(frozen=True)
class ControlResult:
    """What a control of ``train.py fit --control true`` measures at its end.

    Args:
        start: The step of the checkpoint that it began from.
        end: Its last step.
        quality: The quality on SublayerDrop's batches, by name.
        without: The callbacks that it left out.
    """

    start: int
    end: int
    quality: Mapping[str, float] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def read_result(file: Path) -> ControlResult:
    """Read ``control.json``.

    Raises:
        OSError: If it cannot be read.
        ValueError, KeyError, TypeError: If it is damaged.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    quality = {str(name): float(value) for name, value in content["quality"].items()}
    return ControlResult(int(content["start"]), int(content["end"]), quality, tuple(map(str, content["without"])))
