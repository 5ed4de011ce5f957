"""Latencies on a fake clock that only chosen modules move, so that every figure is known by hand."""

import random

import pytest
import torch
from torch import nn

from layershed.discovery.find import find_sublayers
from layershed.discovery.probe import probing
from layershed.errors import MeasurementError
from layershed.performance.latency import Latency, measure_latency
from layershed.recovery.lora import inject_lora
from layershed.surgery import bypass, bypassed_sublayers, remove
from tests.support.models import build_model, hooks_of

# modules of a block that do not run once a sublayer is dropped, by architecture
LLAMA = {"attention": ["input_layernorm", "self_attn"], "mlp": ["post_attention_layernorm", "mlp"]}
OPT = {
    "attention": ["self_attn_layer_norm", "self_attn"],
    "mlp": ["final_layer_norm", "fc1", "activation_fn", "fc2"],  # OPT has no MLP module
}
GPT2 = {"attention": ["ln_1", "attn"], "mlp": ["ln_2", "mlp"]}
PHI = {"attention": ["self_attn"], "mlp": ["mlp"]}  # the shared norm stops with neither
CASES = {
    "llama": ("model.layers", LLAMA, ["model.norm", "lm_head"]),
    "opt": ("model.decoder.layers", OPT, ["model.decoder.final_layer_norm"]),
    "gpt2": ("transformer.h", GPT2, ["transformer.ln_f"]),
    "phi": ("model.layers", PHI, [f"model.layers.{i}.input_layernorm" for i in range(4)]),
}


class Clock:
    """Fake clock that each running module moves by its seconds, which differ between prompt and token."""

    def __init__(self, model, paths):
        self.now, self.factor, self.decoding = 0.0, 1.0, False
        self.costs = {path: (2.0**i, 3.0 + i) for i, path in enumerate(paths)}
        model.register_forward_pre_hook(self.begun, with_kwargs=True)
        for path in paths:
            model.get_submodule(path).register_forward_hook(self.passed(path))

    def begun(self, _module, _args, kwargs):
        self.decoding = kwargs["input_ids"].shape[1] == 1

    def passed(self, path):
        def hook(*_):
            self.now += self.factor * self.costs[path][self.decoding]

        return hook

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def of(self, paths, phase):
        return sum(self.costs[path][phase == "decode"] for path in paths)


def clocked(model_type, model=None):
    blocks, parts, others = CASES[model_type]
    model = model or build_model(model_type)
    own = {
        (block, kind): [f"{blocks}.{block}.{path}" for path in paths]
        for block in range(4)
        for kind, paths in parts.items()
    }
    return model, Clock(model, [path for paths in own.values() for path in paths] + others), own


def measured(model, **settings):
    return measure_latency(model, **{"prompt_tokens": 5, "new_tokens": 3, "runs": 1, "warmup": 0, **settings})


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("model_type", CASES)
def test_sublayer_latency_is_the_time_of_its_modules(model_type, phase):
    model, clock, own = clocked(model_type)
    found = measured(model, phase=phase, clock=clock)
    assert {(s.block, s.kind): seconds for s, seconds in found.sublayers.items()} == {
        key: clock.of(paths, phase) for key, paths in own.items()
    }
    assert tuple(found.sublayers) == find_sublayers(model)
    assert found.total == clock.of(clock.costs, phase)


def test_latency_is_the_median_without_warmup_runs():
    model, clock, own = clocked("llama")
    factors = iter([100.0, 100.0, 1.0, 7.0, 2.0])

    def begin(_module, _args, kwargs):
        if kwargs["input_ids"].shape[1] > 1 and not probing():
            clock.factor = next(factors)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    found = measured(model, runs=3, warmup=2, clock=clock)
    assert found.total == 2 * clock.of(clock.costs, "decode")
    assert next(iter(found.sublayers.values())) == 2 * clock.of(own[0, "attention"], "decode")


def test_latency_times_the_dense_model_despite_a_bypass():
    model, clock, _ = clocked("llama")
    dense = measured(model, clock=clock)
    bypass(model, find_sublayers(model)[2:5])
    assert measured(model, clock=clock) == dense


def test_removed_sublayers_have_no_latency():
    model = build_model()
    gone = find_sublayers(model)[:1]
    remove(model, gone)
    assert set(measured(model).sublayers) == set(find_sublayers(model))
    assert gone[0] not in measured(model).sublayers


def state_of(model):
    return {
        "bypassed": bypassed_sublayers(model),
        "training": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks_of(model),
        "forwards": {path: m.__dict__.get("forward") for path, m in model.named_modules()},
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_latency_measurement_leaves_the_model_unchanged(fails):
    model = build_model().train()
    model.model.layers[1].eval()
    bypass(model, find_sublayers(model)[1:4])

    down = model.model.layers[3].mlp.down_proj

    def check(_module, _args):
        if probing():
            return
        assert not torch.is_grad_enabled()
        assert not model.training
        assert not bypassed_sublayers(model)
        if fails:
            raise KeyError("out of memory")

    down.register_forward_pre_hook(check)
    before = state_of(model)
    if fails:
        with pytest.raises(KeyError, match="out of memory"):
            measured(model)
    else:
        measured(model)
    assert state_of(model) == before


def test_latency_measurement_turns_adapters_off_and_on_again():
    model = build_model()
    inject_lora(model)
    adapters = [module for path, module in model.named_modules() if path.endswith("lora_A.recovery")]
    ran = []
    for module in adapters:
        module.register_forward_hook(lambda *_: None if probing() else ran.append(1))
    measured(model)
    assert not ran
    model(torch.ones(1, 3, dtype=torch.long))
    assert len(ran) == len(adapters) > 0


def test_latency_measurement_runs_a_compiled_model_eagerly():
    model, clock, _ = clocked("llama")
    dense = measured(model, clock=clock)
    model.compile(backend=lambda *_: pytest.fail("it was compiled"))
    assert measured(model, clock=clock) == dense
    assert model._compiled_call_impl is not None


def test_real_sublayer_latencies_are_parts_of_the_total():
    found = measured(build_model(), runs=3)
    assert len(found.sublayers) == 8
    assert all(seconds > 0 for seconds in found.sublayers.values())
    assert isinstance(found, Latency)


def test_latency_measurement_finds_a_transformer_by_name():
    model, clock, _ = clocked("llama")
    holder = nn.ModuleDict({"student": model, "teacher": build_model("gpt2")})
    assert measured(holder, name="student", clock=clock) == measured(model, clock=clock)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"runs": 0}, "runs=0"), ({"new_tokens": 0}, "new_tokens=0"), ({"prompt_tokens": 126}, "128 positions")],
    ids=["runs", "new tokens", "positions"],
)
def test_latency_measurement_refuses_invalid_settings_before_running(llama, settings, message):
    llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(MeasurementError, match=message):
        measured(llama, **settings)
