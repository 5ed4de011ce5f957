"""Every public name on the simulated device: no mixing with the CPU, and the CPU's result."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import layershed as ls
from tests.support.hand_written import GPT
from tests.support.models import build_model, some
from tests.support.runs import Foreign
from tests.support.simulated.alike import alike
from tests.support.simulated.tensors import SIM
from tests.support.thinned import one_of
from tests.support.ticking import Ticking, install

SETTINGS = {"prompt_tokens": 8, "new_tokens": 2, "batch_size": 1, "runs": 1, "warmup": 0}
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([10, 11]), 0)


@dataclass
class World:
    """A model, batches and a folder on one device.

    Args:
        device: The device of the model.
        folder: Where to write.
        batches_on: The device of the batches; None for the model's.
    """

    device: str
    folder: Path
    batches_on: str | None = None

    def __post_init__(self):
        self.model = build_model(attn_implementation="eager", num_hidden_layers=3).to(self.device)
        place = self.batches_on or self.device
        self.batches = [{"input_ids": ids.to(place), "attention_mask": MASK.to(place)} for ids in (IDS, IDS.flip(0))]

    def tensors(self):
        """X, b and a mask."""
        generator = torch.Generator().manual_seed(1)
        x, b = (torch.randn(2, 12, 8, generator=generator).to(self.device) for _ in range(2))
        return x, b, MASK.bool().to(self.device)

    @property
    def logits(self):
        with torch.no_grad():
            return self.model(IDS.to(self.device), use_cache=False).logits

    def dropped(self):
        ls.bypass(self.model, some(self.model))
        return self.model

    def adapted(self):
        ls.inject_lora(self.dropped(), rank=2)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        return self.model


def metric(kind):
    def act(world):
        own = kind(2).to(world.device)
        own.update(*world.tensors(), index=1)
        return own.compute()

    return act


def by_function(function):
    def act(world):
        x, b, mask = world.tensors()
        return function(x, b, mask), function(x, b, reduction="none")

    return act


def quality(world):
    return asdict(ls.evaluate_quality(world.model, world.batches))


def importance(world):
    scores = ls.estimate_importance(world.model, world.batches)
    return dict(scores), dict(scores.blocks)


def tracked(world):
    tracker = ls.ImportanceTracker(world.model)
    with tracker, tracker.measuring():
        for batch in world.batches:
            world.model(**{name: value.to(world.device) for name, value in batch.items()})
    again = ls.ImportanceTracker(world.model)
    again.load_state_dict(tracker.state_dict())
    return dict(tracker.compute()), dict(again.compute())


def surgery(world):
    dense, sublayers = world.logits, some(world.model)
    ls.bypass(world.model, sublayers)
    bypassed, gone = world.logits, (ls.bypassed_sublayers(world.model), ls.dropped_sublayers(world.model))
    with ls.dense(world.model):
        assert torch.equal(world.logits, dense)
    cached = world.model.generate(IDS.to(world.device), max_new_tokens=4, do_sample=False)
    ls.restore(world.model)
    assert torch.equal(world.logits, dense)
    ls.remove(world.model, sublayers)
    return bypassed, world.logits, cached, gone, ls.removed_sublayers(world.model)


def dropped(world):
    plan = ls.drop_sublayers(world.model, world.batches, count=2)
    return tuple(plan), ls.bypassed_sublayers(world.model), world.logits


def distilled(world):
    losses = []
    for kind in ("kl", "both"):
        loss = ls.self_distillation_loss(world.adapted() if not losses else world.model, world.batches[0], kind=kind)
        losses.append(loss.detach())
    loss.backward()
    return losses, [p.grad for p in world.model.parameters() if p.grad is not None]


def lora(world):
    world.adapted()
    on = world.logits
    with ls.adapters_off(world.model):
        off = world.logits
    twin = copy.deepcopy(world.model)
    ls.merge_lora(twin)
    ls.remove_lora(world.model)
    with torch.no_grad():
        return on, off, twin(IDS.to(world.device), use_cache=False).logits, world.logits


def adapter_folder(world):
    world.adapted()
    expected = world.logits
    ls.save_adapter(world.model, world.folder / "adapter")
    ls.remove_lora(world.model)
    ls.load_adapter(world.model, world.folder / "adapter")
    assert torch.equal(world.logits, expected)
    return expected


def folder(world):
    plan = ls.DropPlan(tuple(map(ls.Drop, some(world.model))))
    ls.save_pretrained(world.dropped(), world.folder / "model", plan=plan)
    loaded = ls.load_pretrained(world.folder / "model", attn_implementation="eager").to(world.device)
    with torch.no_grad():
        assert torch.equal(loaded(IDS.to(world.device), use_cache=False).logits, world.logits)
    return world.logits, tuple(ls.load_plan(world.folder / "model"))


def checkpoint(world):
    world.dropped()
    module = Foreign(num_hidden_layers=3)
    module.net = world.model
    structure = {}
    ls.saving.checkpoint.write_structure(structure, module)
    torch.save({**structure, "state_dict": module.state_dict()}, world.folder / "run.ckpt")
    fresh = Foreign(attn_implementation="eager", num_hidden_layers=3).eval().to(world.device)
    ls.load_checkpoint(fresh, world.folder / "run.ckpt")
    assert {p.device.type for p in fresh.parameters()} == {world.device}
    world.model = fresh.net
    return world.logits, ls.bypassed_sublayers(fresh)


def speed(world):
    report = ls.measure_speed(world.dropped(), ceilings=ls.accelerator("h100"), **SETTINGS)
    assert min(report.decode.dense, report.decode.dropped, report.prefill.dense) > 0
    return {name: value for name, value in asdict(report).items() if "bytes" in name or "memory" in name}


def latency(world):
    found = ls.measure_latency(world.model, phase="prefill", **SETTINGS)
    assert found.total > 0
    assert all(seconds > 0 for seconds in found.sublayers.values())
    return list(found.sublayers)


def target(world):
    scores = ls.estimate_importance(world.model, world.batches)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, Ticking()).watch(world.model)
        plan, report = ls.drop_to_speedup(world.model, scores, 1.5, settings=ls.SpeedSettings(**SETTINGS))
    return tuple(plan), report.decode.speedup, report.kv_bytes_dropped


def ceilings(world):
    found = ls.measure_ceilings(torch.device(world.device), torch.float32, anew=True)
    return found.flops > 0, found.bandwidth > 0


def costs(world):
    model = ls.CostModel(world.dropped())
    settings = ls.SpeedSettings(**SETTINGS)
    return model.passes(settings), model.seconds(ls.accelerator("h100"), settings)


def by_adapter(world):
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    torch.manual_seed(0)
    model = GPT().to(world.device)
    ids = torch.tensor([[1, 2, 3, 4]], device=world.device)
    found = ls.find_sublayers(model)
    scores = dict(ls.estimate_importance(model, [{"idx": ids}])) if world.batches_on is None else {}
    ls.bypass(model, found[:1])
    ls.save_weights(model, world.folder / "own")
    again = GPT().to(world.device)
    ls.load_weights(again, world.folder / "own")
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])
        return found, scores, model(ids)[0]


def forward_speed(world):
    report = ls.measure_forward(world.dropped(), tokens=4, batch_size=2, runs=2, warmup=0)
    assert isinstance(report, ls.ForwardReport)
    return sorted(report.to_dict())


def replaced(world):
    sublayers = some(world.model)
    maps = ls.fit_linear_maps(world.model, world.batches, sublayers, ridge=1.0)
    ls.bypass(world.model, sublayers, maps=maps)
    assert {p.device.type for each in ls.linear_maps(world.model).values() for p in each.parameters()} == {world.device}
    cached = world.model.generate(IDS.to(world.device), max_new_tokens=4, do_sample=False)
    return world.logits, list(maps.residual.values()), cached


def folded(world):
    world.dropped()
    folds = ls.compensate(world.model, [*world.batches, *world.batches])
    return [fold.sublayer for fold in folds], world.logits


def damage(world):
    scores = ls.leave_one_out(world.model, world.batches, "kl")
    losses = ls.leave_one_out(world.model, world.batches, "loss")
    return list(scores.values()), list(losses.values())


def searched(world):
    plan = ls.greedy_search(world.model, world.batches, count=2, shortlist=2)
    return tuple(plan), [drop.score for drop in plan.drops]


def long_context(world):
    return list(ls.loss_by_position(world.model, world.batches, buckets=2).values())


CASES = {
    "LinearMap LinearMaps fit_linear_maps linear_maps": replaced,
    "Fold compensate": folded,
    "leave_one_out": damage,
    "greedy_search": searched,
    "loss_by_position": long_context,
    "Angular": metric(ls.Angular),
    "CosineImportance": metric(ls.CosineImportance),
    "CostModel PassCosts Cost": costs,
    "ImportanceTracker": tracked,
    "METRICS ImportanceMetric RelativeMagnitude": metric(ls.METRICS["relative_magnitude"]),
    "SublayerAdapter register_adapter save_weights load_weights": by_adapter,
    "ForwardReport measure_forward": forward_speed,
    "Distillation self_distillation_loss": distilled,
    "adapters_off inject_lora merge_lora remove_lora": lora,
    "angular": by_function(ls.angular),
    "bypass bypassed_sublayers dense dropped_sublayers remove removed_sublayers restore": surgery,
    "cosine_importance": by_function(ls.cosine_importance),
    "drop_sublayers": dropped,
    "Latency measure_latency": latency,
    "SpeedSettings drop_to_speedup": target,
    "ImportanceScores estimate_importance": importance,
    "Quality evaluate_quality": quality,
    "LeftAlone find_left_alone": lambda world: ls.find_left_alone(world.model),
    "Sublayer find_sublayers": lambda world: ls.find_sublayers(world.model),
    "find_transformer": lambda world: ls.find_transformer(torch.nn.ModuleList([world.model])) is world.model,
    "load_adapter save_adapter": adapter_folder,
    "load_checkpoint": checkpoint,
    "load_plan load_pretrained save_pretrained": folder,
    "Ceilings measure_ceilings": ceilings,
    "PhaseSpeed SpeedReport Interval measure_speed ACCELERATORS accelerator": speed,
    "quantization_of": lambda world: ls.quantization_of(world.model),
    "relative_magnitude": by_function(ls.relative_magnitude),
}
# they see no tensor and no model
WITHOUT_TENSORS = {
    "Drop",
    "DropMethod",
    "DropPlan",
    "DropSchedule",
    "LayershedError",
    "ModelRecord",
    "TaskResults",
    "TaskScore",
    "select_sublayers",
    "speedup_degradation_ratio",
}
# bitsandbytes has no kernels for a device made in Python; the harness and tokenizers bring batches of their own
NOT_SIMULATED = {"quantize", "dequantize", "evaluate_tasks", "passkey_retrieval"}
SLOW = {
    "leave_one_out",
    "SpeedSettings drop_to_speedup",
    "PhaseSpeed SpeedReport Interval measure_speed ACCELERATORS accelerator",  # also in test_machine.py
    "Ceilings measure_ceilings",
    "CostModel PassCosts Cost",
    "drop_sublayers",
    "Distillation self_distillation_loss",
    "ImportanceTracker",
    "load_adapter save_adapter",
}
READ_BATCHES = [quality, importance, dropped, distilled]


def worlds(folder, **kwargs):
    """The simulated world and that of the CPU."""
    for name in (SIM, "cpu"):
        (folder / name).mkdir()
    return World(SIM, folder / SIM, **kwargs), World("cpu", folder / "cpu")


def test_every_public_name_is_a_case_or_left_out_for_a_reason():
    named = [name for names in CASES for name in names.split()]
    assert len(named) == len(set(named))
    assert {*named, *WITHOUT_TENSORS, *NOT_SIMULATED} == set(ls.__all__)


@pytest.mark.default_cases(13)
@pytest.mark.parametrize(
    "names", [pytest.param(names, marks=pytest.mark.slow if names in SLOW else ()) for names in CASES]
)
def test_public_function_gives_on_the_device_what_it_gives_on_the_cpu(names, tmp_path):
    simulated, plain = worlds(tmp_path)
    alike(CASES[names](simulated), CASES[names](plain))


@pytest.mark.parametrize("act", one_of(READ_BATCHES))
def test_batches_left_on_the_cpu_give_the_same(act, tmp_path):
    simulated, plain = worlds(tmp_path, batches_on="cpu")
    alike(act(simulated), act(plain))
