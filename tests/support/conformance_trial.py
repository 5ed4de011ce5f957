"""Every check of conformance on one architecture."""

from collections import Counter
from dataclasses import dataclass, field

import layershed as ls
from tests.support.architectures import tiny_model
from tests.support.conformance import CHECKS, Case, CheckError


@dataclass
class Row:
    """What came out for one architecture.

    Args:
        model_type: Its name.
        found: Numbers of sublayers by kind.
        results: By check, an empty text if it holds, or the reason why not.
        notes: By check, what else there is to say.
        refusal: Why no sublayer was found at all, or the model not built.
        left_alone: What else its blocks hold, and why it stays.
    """

    model_type: str
    found: dict[str, int] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    left_alone: tuple[ls.LeftAlone, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether every check holds."""
        return not self.refusal and not any(self.results.values())


def try_architecture(model_type: str) -> Row:
    """Build it and run every check.

    Raises:
        BuildError: If it cannot be built.
    """
    model = tiny_model(model_type)
    try:
        case = Case(model)
    except ls.LayershedError as error:
        return Row(model_type, refusal=str(error))
    found = Counter[str](branch.sublayer.kind for branch in case.anatomy.branches)
    row = Row(model_type, dict(found), left_alone=case.anatomy.left_alone)
    for name, check in CHECKS.items():
        try:
            note = check(case)
            row.results[name] = ""
            if note:
                row.notes[name] = note
        except CheckError as error:
            row.results[name] = str(error)
        except Exception as error:  # whatever an architecture raises is its result
            row.results[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:100]}"
    return row
