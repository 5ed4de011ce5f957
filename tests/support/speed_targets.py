"""Speedup targets on a made-up clock, and the drops that reach them, by hand."""

from layershed.performance.stopwatch import SpeedSettings
from tests.support.runs import (
    Foreign,
    ranked,
)
from tests.support.ticking import attentions_take_more

FAST = SpeedSettings(prompt_tokens=4, new_tokens=2, runs=1, warmup=0)


def watched(clock, **overrides):
    module = Foreign(**overrides)
    clock.watch(module.net)
    return module


def queue(scores, scope, objective="importance", cost=attentions_take_more):
    """The order of dropping, by hand: importance, or importance over the seconds saved."""
    if objective == "importance":
        order = ranked(scores, scope, len(scores))
        return [order[i : i + 2] for i in range(0, len(order), 2)] if scope == "block" else [[key] for key in order]
    groups = [
        [(block, own) for own in ("attention", "mlp")] if kind == "block" else [(block, kind)]
        for block, kind in scores
        if kind in {"joint": ("attention", "mlp")}.get(scope, (scope,))
    ]

    def price(group):
        block, kind = group[0]
        return scores[block, "block" if scope == "block" else kind] / sum(cost(*key) for key in group)

    return sorted(groups, key=price)


def enough(clock, order, target, gone=(), phase="decode"):
    """The fewest first ones that reach the target with the earlier drops, by hand."""
    for number in range(len(order) + 1):
        chosen = [key for group in order[:number] for key in group]
        if clock.speedup([*gone, *chosen], phase=phase) >= target:
            return chosen
    raise AssertionError("out of reach")
