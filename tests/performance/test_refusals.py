"""Invalid arguments and models are refused before any forward pass, timing or measurement of ceilings."""

import pytest
import torch

from layershed.discovery.find import find_sublayers
from layershed.errors import LayershedError
from layershed.importance.tracker import estimate_importance
from layershed.performance.benchmark import Bench
from layershed.performance.latency import measure_latency
from layershed.performance.prediction import ceilings_of, plan_of, predict
from layershed.performance.speed import measure_speed
from layershed.performance.speedup_target import check_reachable, drop_to_speedup
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Sublayer
from layershed.planning.selection import equal_scores
from layershed.quality import evaluate_quality
from layershed.surgery import bypass
from tests.support.models import build_model
from tests.support.ticking import MADE_UP

LONG = {"prompt_tokens": 100, "new_tokens": 29}
LETHAL = ("stopwatch.clock_for", "speed.measure_ceilings", "benchmark.measure_ceilings", "prediction.measure_ceilings")


@pytest.fixture(scope="module")
def known():
    """Sublayers and equal scores of the model."""
    sublayers = find_sublayers(build_model())
    return sublayers, equal_scores(sublayers)


def stream():
    pytest.fail("a batch was read")
    yield


def dropped(model, known):
    bypass(model, known[0][:1])
    return model


def to_speedup(model, known, target=1.2, scope="joint", **options):
    return drop_to_speedup(model, known[1], target, scope, **options)


def swept(model, known, **options):
    given = {"scores": known[1], "scopes": ["mlp"], "counts": [1], **options}
    return list(Bench(model, lambda _: pytest.fail("quality was measured"), SpeedSettings(8, 2)).sweep(**given))


# name: (call, True if discovery or the trial of the cache may run the model)
REFUSALS = {
    "measure_speed: dense": (lambda m, k: measure_speed(m, prompt_tokens=8), False),
    "measure_speed: no runs": (lambda m, k: measure_speed(m, runs=0), False),
    "measure_speed: too long": (lambda m, k: measure_speed(dropped(m, k), **LONG), True),
    "measure_speed: base too short": (
        lambda m, k: measure_speed(m, base=build_model(max_position_embeddings=9), prompt_tokens=8, new_tokens=2),
        False,
    ),
    "measure_speed: compiled wrapper": (
        lambda m, k: measure_speed(torch.compile(dropped(m, k), backend="eager"), prompt_tokens=8),
        True,
    ),
    "measure_latency: phase": (lambda m, k: measure_latency(m, phase="training"), False),
    "measure_latency: too long": (lambda m, k: measure_latency(m, **LONG), False),
    "drop_to_speedup: target": (lambda m, k: to_speedup(m, k, 0.9), False),
    "drop_to_speedup: scope": (lambda m, k: to_speedup(m, k, scope="layer"), False),
    "drop_to_speedup: phase": (lambda m, k: to_speedup(m, k, phase="training"), False),
    "drop_to_speedup: objective": (lambda m, k: to_speedup(m, k, objective="cost"), False),
    "drop_to_speedup: block out of range": (lambda m, k: to_speedup(m, k, protect=[4]), False),
    "drop_to_speedup: all protected": (lambda m, k: to_speedup(m, k, protect=range(4)), False),
    "drop_to_speedup: none of the scope": (lambda m, k: to_speedup(m, k, scope="cross_attention"), False),
    "drop_to_speedup: too long": (lambda m, k: to_speedup(m, k, settings=SpeedSettings(**LONG)), False),
    "drop_to_speedup: NaN": (lambda m, k: drop_to_speedup(m, {k[0][0]: float("nan")}, 1.2), False),
    "check_reachable: phase": (lambda m, k: check_reachable(m, k[0], 1.2, phase="training"), False),
    "check_reachable: too long": (lambda m, k: check_reachable(m, k[0], 1.2, settings=SpeedSettings(**LONG)), False),
    "Bench: too long": (lambda m, k: Bench(m, None, SpeedSettings(**LONG)), False),
    "Bench: base too short": (
        lambda m, k: Bench(m, None, SpeedSettings(8, 2), build_model(max_position_embeddings=9)),
        False,
    ),
    "Bench.sweep: too many": (lambda m, k: swept(m, k, counts=[1, 5], objective="speed"), True),
    "Bench.sweep: objective": (lambda m, k: swept(m, k, objective="cost"), True),
    "predict: too long": (lambda m, k: predict(m, None, MADE_UP, SpeedSettings(**LONG)), False),
    "predict: another model's plan": (
        lambda m, k: predict(m, plan_of([Sublayer(4, "mlp", "layers.4")]), MADE_UP, SpeedSettings(8, 2)),
        True,
    ),
    "ceilings_of: no such device": (lambda m, k: ceilings_of("abacus", m.device, m.dtype), False),
    "estimate_importance: metric": (lambda m, k: estimate_importance(m, stream(), "cosin"), False),
    "estimate_importance: no batches": (lambda m, k: estimate_importance(m, stream(), max_batches=0), False),
    "estimate_importance: name": (lambda m, k: estimate_importance(m, stream(), name="student"), False),
    "evaluate_quality: no batches": (lambda m, k: evaluate_quality(m, stream(), max_batches=0), False),
    "evaluate_quality: no head": (lambda m, k: evaluate_quality(m.model, stream()), False),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_invalid_call_is_refused_before_measuring(name, known, monkeypatch):
    call, probed = REFUSALS[name]
    model, passes = build_model(), []
    model.model.register_forward_pre_hook(lambda _module, _args, kwargs: passes.append(kwargs), with_kwargs=True)
    for function in LETHAL:
        monkeypatch.setattr(f"layershed.performance.{function}", lambda *_, **__: pytest.fail("it was measured"))
    if probed:  # the trial of a cache needs a clock of its own
        monkeypatch.undo()
        for function in LETHAL[1:]:
            monkeypatch.setattr(f"layershed.performance.{function}", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(LayershedError):
        call(model, known)
    # discovery and the trial of a cache read at most four tokens
    assert all(given["input_ids"].shape[1] <= 4 for given in passes)
    assert probed or not passes
