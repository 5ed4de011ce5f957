"""Where a linear map can run in place of a branch: what it reads, and which modules stop running.

The map reads h, the output of the branch's own norm, and gives the branch b. So norms keep running, the one before the
branch and, in a post-LN block, the one after it; everything between h and the stream stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from layershed.discovery.recording import Call, Key
from layershed.discovery.replacement import Modules, Replaced, Replacement, Unfit
from layershed.discovery.residual_stream import BranchFlow
from layershed.planning.plan import Kind


@dataclass(frozen=True)
class LinearReplacement:
    """The modules to replace so that a linear map of h computes a branch.

    Args:
        core: The module whose stand-in holds the map.
        source: The core's argument that holds h once the modules around it return what they are given.
        around: The other modules that stop running. They return their input.
        reads: The call, and the argument, by which h can be read while the branch runs.

    Example:
        An OPT block computes ``x + fc2(relu(fc1(final_layer_norm(x))))``. h is the argument of ``fc1``; ``fc1`` and the
        activation return h unchanged, and the map runs in place of ``fc2``.
    """

    core: Replaced
    source: Key
    around: tuple[Replaced, ...]
    reads: tuple[Call, Key]


def find_linear(modules: Modules, kind: Kind, branch: BranchFlow, known: Replacement) -> LinearReplacement | Unfit:
    """Where a linear map can run in place of one branch.

    Args:
        modules: The modules of its block.
        kind: Its kind.
        branch: Its data flow.
        known: What replaces it if it contributes nothing.

    Returns:
        The modules to replace. They are only a proposal: a trial has to show that the map's result is what joins.
    """
    calls = sorted(modules.own_calls(branch), key=lambda call: call.opened)
    heavy = [call for call in calls if modules.is_heavy(kind, branch, call)]
    first = next((place for place, call in enumerate(calls) if modules.is_heavy("mlp", branch, call)), None)
    if not heavy or first is None:
        return _inside_core(modules, branch, known)
    core = heavy[-1]
    stopping = [call for call in calls[first:] if call is not core]
    around = tuple(each for each in modules.support(branch, stopping) if each.call is not branch.norm)
    if len(around) < len(stopping):
        return Unfit("modules beside its own ones compute it, too")
    key, begin = modules.hidden_key(branch, core), modules.moving_key(branch, calls[first])
    if isinstance(key, Unfit) or begin is None:
        return Unfit(f"{core.path} takes nothing of the stream")
    source = begin if core is calls[first] else modules.moving_key(branch, core)
    replaced = Replaced(core, key, zero=True)
    return LinearReplacement(replaced, key if source is None else source, around, (calls[first], begin))


def _inside_core(modules: Modules, branch: BranchFlow, known: Replacement) -> LinearReplacement | Unfit:
    """If the core adds the branch to the stream itself, and no module of the branch is apart from the stream."""
    core = known.core
    if core.zero or branch.norm is not None:
        return Unfit(f"{core.call.path} computes more than it")
    keys = [key for key in core.call.arguments if key != core.key and modules.moves(core.call.arguments[key], branch)]
    if len(keys) != 1:
        return Unfit(f"{core.call.path} takes X and h as one")
    return LinearReplacement(core, keys[0], (), (core.call, keys[0]))
