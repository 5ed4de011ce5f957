"""Options of LoRA, checked without a model, and as peft's LoraConfig and checkpoints have them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from layershed.arguments import as_names, check_number, plain_number
from layershed.errors import RecoveryError, UnknownNameError
from layershed.recovery.lora_targets import Placement

if TYPE_CHECKING:  # peft imports bitsandbytes, which is slow
    from peft import LoraConfig

# fields of peft's LoraConfig that must agree for two sets of adapters to be of one kind
SETTINGS = {"r": int, "lora_alpha": int, "lora_dropout": float, "use_rslora": bool, "use_dora": bool}


def lora_arguments(*, rank: int, alpha: int, dropout: float, rslora: bool, dora: bool, **_: Any) -> dict[str, Any]:
    """Options of :func:`~layershed.inject_lora` under peft's names, without those that only choose the modules."""
    return dict(zip(SETTINGS, (int(rank), plain_number(alpha), float(dropout), rslora, dora), strict=True))


def as_targets(target_modules: str | Iterable[str]) -> str | tuple[str, ...]:
    """Targets that can be read more than once.

    Raises:
        RecoveryError: If they are no names.
    """
    return (
        target_modules if isinstance(target_modules, str) else as_names(target_modules, "target_modules", RecoveryError)
    )


def check_lora(*, rank: int, alpha: int, dropout: float, target_modules: str | Sequence[str], placement: str) -> None:
    """Refuse invalid options of :func:`~layershed.inject_lora`; no model is needed.

    Raises:
        RecoveryError: If a number is out of range or no target is given.
        UnknownNameError: If there is no such placement.
    """
    for name, number in (("rank", rank), ("alpha", alpha), ("dropout", dropout)):
        check_number(number, f"LoRA: {name}", RecoveryError, whole=name == "rank")
    if rank < 1 or not 1 <= alpha < math.inf:
        raise RecoveryError(f"rank={rank}, alpha={alpha}: both must be at least 1, and finite.")
    if not 0 <= dropout < 1:
        raise RecoveryError(f"dropout={dropout}: it must be in [0, 1).")
    if placement not in get_args(Placement):
        raise UnknownNameError("placement of adapters", placement, get_args(Placement))
    if not isinstance(target_modules, str):
        as_names(target_modules, "target_modules", RecoveryError)
    if target_modules != "all-linear" and (isinstance(target_modules, str) or not target_modules):
        raise RecoveryError(
            f"target_modules={target_modules!r}: give 'all-linear', or a list of ends of module paths, such as "
            "['q_proj', 'v_proj']."
        )


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """The fields of peft's config that must agree between two sets of adapters."""
    return {field: getattr(config, field) for field in SETTINGS}


def checked_settings(content: Any) -> tuple[set[str], dict[str, Any]]:
    """Check targets and settings from :func:`~layershed.recovery.lora.lora_settings`: they may be untrusted.

    Raises:
        RecoveryError: If they are of another form.
    """
    try:
        targets, settings = set(content["targets"]), dict(content["settings"])
    except (TypeError, KeyError, ValueError) as error:
        raise RecoveryError(f"This does not describe adapters: {error}.") from None
    fit = settings.keys() == SETTINGS.keys() and all(type(settings[f]) is kind for f, kind in SETTINGS.items())
    if not fit or not targets or not all(isinstance(path, str) for path in targets):
        raise RecoveryError(f"This does not describe adapters: {settings}.")
    return targets, settings
