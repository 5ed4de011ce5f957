"""LoRARecovery against a loop by hand with peft's own adapters and a fresh optimizer; resumed, merged, saved."""

import copy
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed as ls
from layershed.callbacks import Export, LoRARecovery, Quantization
from layershed.discovery.bnb_layers import Linear4bit, dequantized_weight
from layershed.errors import (
    CheckpointError,
    ExportError,
    LayershedError,
    PlanError,
    QuantizationError,
    RecoveryError,
    ScheduleError,
    UnknownNameError,
)
from layershed.quantization import quantization_of
from layershed.recovery.distillation import Distillation
from layershed.recovery.lora import adapted_modules
from layershed.surgery import bypassed_sublayers
from layershed.training.causal_lm import CausalLM
from tests.support.lora_runs import ALPHA, RANK, Headed, dropping, recovery, refused_at_start
from tests.support.runs import (
    BATCH,
    Foreign,
    Interrupt,
    Interrupted,
    Manual,
    Save,
    Watch,
    _zero,
    causal_lm,
    fit_foreign,
    loader,
    logits_of,
    same,
    sequences,
    state_of,
    unmarked,
    val_loader,
)
from tests.support.thinned import crossed, one_of
from tests.support.trainable import frozen_with_gradient, trainable

LINEAR = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
PART = {"attention": "self_attn", "mlp": "mlp"}
ALL = [(block, kind) for block in range(4) for kind in ("attention", "mlp")]


def keys(sublayers):
    return [(sublayer.block, sublayer.kind) for sublayer in sublayers]


def linear_paths(kept):
    """Paths of the linear maps of sublayers of a llama, written down by hand."""
    return {f"model.layers.{block}.{PART[kind]}.{end}" for block, kind in kept for end in LINEAR[kind]}


def parts_of(net, dropped):
    """Branch and norm of every dropped sublayer."""
    for block, kind in dropped:
        layer = net.model.layers[block]
        norm = layer.input_layernorm if kind == "attention" else layer.post_attention_layernorm
        yield getattr(layer, PART[kind]), norm


def by_hand(dropped, drop_at, begin, steps, mode="lora", factor=lambda done: 1.0, seed=0):
    """The loop without Lightning and layershed; gives the module, both optimizers and the rates of the schedule."""
    module = Headed()
    module.log = lambda *_, **__: None
    outside = torch.optim.AdamW(module.head.parameters(), lr=1e-2, weight_decay=0.1)
    inside = torch.optim.AdamW(module.net.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outside, T_max=12)
    frozen, rates = [], []
    for step, batch in enumerate(itertools.islice(itertools.cycle(list(loader())), steps), 1):
        module.loss(batch).backward()
        for parameter in frozen:
            parameter.grad = None
        rate = outside.param_groups[0]["lr"]
        for optimizer in (inside, outside):
            optimizer.param_groups[0]["lr"] = rate * (factor(step - begin) if step > begin else 1.0)
            optimizer.step()
        outside.param_groups[0]["lr"] = rate
        schedule.step()
        module.zero_grad()
        rates.append(outside.param_groups[0]["lr"])
        if step == drop_at:
            for branch, norm in parts_of(module.net, dropped):
                branch.register_forward_hook(_zero)
                frozen += [*branch.parameters(), *norm.parameters()]
        if step == begin and mode == "lora":
            module.net.requires_grad_(False)
            kept = [key for key in ALL if key not in dropped]
            config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(linear_paths(kept)))
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, module.net, "recovery")
            adapters = [p for p in module.net.parameters() if p.requires_grad]
            inside = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.1)
    return module, inside, outside, rates


def rates_of(trainer, _module):
    return trainer.optimizers[0].param_groups[0]["lr"]


def held_by(optimizers):
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


class Begun(pl.Callback):
    """Notes the state at the end of the batch in which recovery began."""

    def __init__(self, step, note):
        self.step, self.note, self.found = step, note, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and self.found is None:
            self.found = self.note(trainer, pl_module)


def test_lora_recovery_adds_adapters_freezes_the_transformer_and_trains_the_head(make_trainer):
    def note(trainer, module):
        optimizer = trainer.optimizers[0]
        head = list(module.head.parameters())
        return {
            "adapted": set(adapted_modules(module.net)),
            "trainable": {name for name, p in module.named_parameters() if p.requires_grad},
            "held": {id(p) for p in held_by([optimizer])} == {id(p) for p in module.parameters() if p.requires_grad},
            "steps": [optimizer.state[p]["step"].item() for p in head],
            "states": len(optimizer.state),
            "head": module.head.weight.detach().clone(),
            "logged": trainer.callback_metrics["recovery/trainable_parameters"].item(),
            "count": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }

    drop, own = dropping(), recovery()
    before, begun, after = Begun(3, lambda _, m: set(adapted_modules(m.net))), Begun(4, note), Begun(7, note)
    trainer = make_trainer(drop, own, before, begun, after, max_steps=8)
    fit_foreign(trainer, Headed())
    kept = [key for key in ALL if key not in keys(drop.plan)]
    paths = linear_paths(kept)
    assert before.found == set()
    for found in (begun.found, after.found):
        assert found["adapted"] == paths
        assert found["trainable"] == {
            *(f"net.{path}.lora_{side}.recovery.weight" for path in paths for side in "AB"),
            "head.weight",
            "head.bias",
        }
        assert found["held"]
        assert found["logged"] == found["count"]
    assert (begun.found["steps"], begun.found["states"]) == ([4.0, 4.0], 2)
    assert (after.found["steps"], after.found["states"]) == ([7.0, 7.0], 2 + 2 * len(paths))
    assert not torch.equal(begun.found["head"], after.found["head"])
    assert own.began == 4


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("start", "arguments", "factor"),
    [
        (None, {}, lambda done: 1.0),
        (None, {"lr_factor": 0.5, "warmup_steps": 3}, lambda done: 0.5 * min(1.0, done / 3)),
        (6, {"seed": 5, "warmup_steps": 4}, lambda done: min(1.0, done / 4)),
    ],
    ids=["at the drop", "at the drop with a scaled rate", "at a step with warm-up"],
)
def test_lora_recovery_equals_a_loop_by_hand_with_peft(make_trainer, start, arguments, factor):
    drop, watch = dropping(), Watch(rates_of)
    own = recovery(start=start, finish="adapter", **arguments)
    trainer = make_trainer(drop, own, watch, max_steps=10)
    module = fit_foreign(trainer, Headed())
    seed = arguments.get("seed", 0)
    hand, inside, outside, rates = by_hand(keys(drop.plan), 4, start or 4, 10, factor=factor, seed=seed)
    wanted = hand.state_dict()
    assert unmarked(module.state_dict()).keys() == wanted.keys()
    for name, value in unmarked(module.state_dict()).items():
        assert torch.equal(value, wanted[name]), name
    assert [rate for _, rate in watch.seen] == rates
    optimizer = trainer.optimizers[0]
    reference = {
        **{name: inside.state[p] for name, p in hand.named_parameters() if p in inside.state},
        **{name: outside.state[p] for name, p in hand.named_parameters() if p in outside.state},
    }
    found = {name: optimizer.state[p] for name, p in module.named_parameters() if p in optimizer.state}
    assert same(found, reference)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("lr_factor", [1.0, 0.3])
def test_full_recovery_trains_the_rest_with_its_optimizer_state(make_trainer, lr_factor):
    drop = dropping()
    trainer = make_trainer(drop, recovery(mode="full", lr_factor=lr_factor), max_steps=9)
    module = fit_foreign(trainer, Headed())
    hand, *_ = by_hand(keys(drop.plan), 4, 4, 9, mode="full", factor=lambda done: lr_factor)
    assert same(dict(module.state_dict()), dict(hand.state_dict()))
    assert not adapted_modules(module)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("start", [None, 5])
def test_mode_none_ends_the_run_where_recovery_would_begin(make_trainer, start):
    drop, watch = dropping(), Watch(lambda _, module: len(bypassed_sublayers(module)))
    trainer = make_trainer(drop, recovery(mode="none", start=start), watch)
    module = fit_foreign(trainer, Headed())
    assert trainer.global_step == (start or 4)
    assert [count for _, count in watch.seen][-2:] == ([0, 3] if start is None else [3, 3])
    hand, *_ = by_hand(keys(drop.plan), 4, 99, start or 4)
    assert same(dict(module.state_dict()), dict(hand.state_dict()))


def test_lora_recovery_keeps_the_scheduled_learning_rates(make_trainer):
    def every_rate(trainer, _module):
        return [group["lr"] for group in trainer.optimizers[0].param_groups]

    with_recovery, without = Watch(every_rate), Watch(every_rate)
    fit_foreign(make_trainer(dropping(), recovery(lr_factor=0.1, warmup_steps=2), with_recovery), Headed())
    fit_foreign(make_trainer(without), Headed())
    assert with_recovery.seen == without.seen
    assert [rate for _, (rate,) in without.seen] == pytest.approx(
        [1e-2 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(1, 13)]
    )


def test_lora_recovery_of_an_already_dropped_model_begins_at_once(make_trainer):
    gone = [(1, "mlp"), (2, "attention")]
    for start in (0, None):
        module = Foreign()
        ls.remove(module, [s for s in ls.find_sublayers(module) if (s.block, s.kind) in gone])
        before = copy.deepcopy(dict(module.named_parameters()))
        own, begun = recovery(start=start, finish="adapter"), Begun(1, lambda _, m: set(adapted_modules(m.net)))
        trainer = make_trainer(own, begun, max_steps=3, name=str(start))
        fit_foreign(trainer, module)
        assert own.began == 0
        assert begun.found == linear_paths(set(ALL) - set(gone))
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                assert trainer.optimizers[0].state[parameter]["step"].item() == 3
            else:
                assert torch.equal(parameter, before[name.replace(".base_layer", "")])
        written = json.loads((Path(trainer.default_root_dir) / "adapter" / "drop_plan.json").read_text())
        assert {(drop["block"], drop["kind"]) for drop in written["drops"]} == set(gone)


def neighbours_of(dropped):
    """Nearest kept sublayer on either side of each dropped one."""
    found = set()
    for key in dropped:
        place = ALL.index(key)
        for side in (ALL[:place][::-1], ALL[place + 1 :]):
            found |= {next((other for other in side if other not in dropped), None)}
    return found - {None}


def test_placement_neighbours_adds_adapters_beside_a_second_drop(make_trainer):
    drop = dropping(3, count=1, every_n_steps=3, rounds=2)
    seen = [Begun(step, lambda _, m: (set(adapted_modules(m.net)), state(m))) for step in (6, 3, 5, 6)]

    def state(module):
        return {name: p.detach().clone() for name, p in module.named_parameters() if ".lora_" in name}

    own = recovery(placement="neighbours", finish="adapter")
    trainer = make_trainer(drop, seen[0], own, *seen[1:], max_steps=9)
    module = fit_foreign(trainer)
    first, second = ([(e.sublayer.block, e.sublayer.kind) for e in drop.plan.drops if e.step == at] for at in (3, 6))
    once, twice = linear_paths(neighbours_of(first)), linear_paths(neighbours_of([*first, *second]))
    assert [s.found[0] for s in seen] == [once, once, once, once | twice]
    # what the first round's adapters had learned is not touched by the second round
    learned, after = seen[0].found[1], seen[3].found[1]
    assert all(value.abs().sum() > 0 for value in learned.values())
    assert all(torch.equal(after[name], value) for name, value in learned.items())
    held = {id(p) for p in held_by(trainer.optimizers)}
    names = {name for name, p in module.named_parameters() if id(p) in held}
    trained = (once | twice) - linear_paths(second)
    assert names == {f"net.{path}.lora_{side}.recovery.weight" for path in trained for side in "AB"}
    assert names == {name for name, p in module.named_parameters() if p.requires_grad}


def dense_from(state, dropped, scale=ALPHA / RANK):
    """A plain llama whose weights are W + s B A, multiplied out by hand, with its dropped branches at zero."""
    state = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    plain = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    for name, low in state.items():
        if ".lora_A." in name:
            path = name.partition(".lora_A.")[0]
            plain[f"{path}.weight"] = plain[f"{path}.weight"] + scale * state[name.replace("lora_A", "lora_B")] @ low
    net = Foreign().net.eval()
    net.load_state_dict(unmarked(plain))
    for branch, _ in parts_of(net, dropped):
        branch.register_forward_hook(_zero)
    return net


def test_merge_leaves_no_adapters_and_keeps_the_logits(make_trainer, tmp_path):
    drop = dropping()
    trainer = make_trainer(drop, recovery(lr_factor=3.0), Save(tmp_path / "last.ckpt", 9), max_steps=9)
    module = fit_foreign(trainer)
    assert not adapted_modules(module)
    assert not hasattr(module.net, "peft_config")
    assert unmarked(module.net.state_dict()).keys() == Foreign().net.state_dict().keys()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_" in name for name in state)
    wanted = logits_of(dense_from(state, keys(drop.plan)))
    torch.testing.assert_close(logits_of(module.net), wanted, rtol=0, atol=1e-4)
    without = {name: value * 0 if ".lora_B." in name else value for name, value in state.items()}
    assert (logits_of(dense_from(without, keys(drop.plan))) - wanted).abs().max() > 1e-2


def test_regained_is_the_share_of_the_loss_that_came_back(make_trainer):
    drop = dropping(quality_batches=2)
    trainer = make_trainer(drop, recovery())
    fit_foreign(trainer)
    # Lightning logs in float32
    before, after, end = (torch.tensor(drop.quality[when].loss).item() for when in ("before", "after", "end"))
    assert after > before
    found = trainer.callback_metrics["recovery/regained"].item()
    assert found == pytest.approx((after - end) / (after - before), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_saved_adapter_in_peft_on_the_exported_base_gives_the_trained_model(make_trainer, tmp_path):
    drop = dropping()
    trainer = make_trainer(drop, recovery(finish="adapter", lr_factor=3.0), Export(), max_steps=9)
    module = fit_foreign(trainer)
    run, wanted = tmp_path / "run", logits_of(module.net)
    assert adapted_modules(module)
    plan = json.loads((run / "adapter" / "drop_plan.json").read_text())
    assert plan == drop.plan.to_dict()
    assert {path.name for path in (run / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    shutil.copytree(run / "pruned", tmp_path / "base", ignore=shutil.ignore_patterns("adapter"))
    base = ls.load_pretrained(tmp_path / "base")
    assert not torch.allclose(logits_of(base), wanted, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    assert torch.equal(logits_of(theirs), wanted)
    ours = ls.load_pretrained(tmp_path / "base")
    ls.load_adapter(ours, run / "adapter")
    assert torch.equal(logits_of(ours), wanted)
    assert torch.equal(logits_of(ls.load_pretrained(run / "pruned")), wanted)
    other = Foreign().net
    ls.bypass(other, [s for s in ls.find_sublayers(other) if (s.block, s.kind) not in keys(drop.plan)][:3])
    for stranger in (Foreign().net, other):
        with pytest.raises(PlanError, match="trained on a base without"):
            ls.load_adapter(stranger, run / "adapter")


def test_saved_adapter_lacks_sublayers_of_a_later_drop(make_trainer, tmp_path):
    """The second round drops sublayers that carry adapters by then; the folder holds no module for those."""
    drop = dropping(3, count=2, every_n_steps=3, rounds=2)
    trainer = make_trainer(drop, recovery(finish="adapter", lr_factor=3.0), Export(), max_steps=9)
    module = fit_foreign(trainer)
    assert len(drop.plan) == 4
    loaded = ls.load_pretrained(tmp_path / "run" / "pruned")
    assert torch.equal(logits_of(loaded), logits_of(module.net))
    assert set(adapted_modules(loaded)) == linear_paths(set(ALL) - set(keys(drop.plan)))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("placement", ["all", "neighbours"])
def test_logged_trainable_parameters_are_those_after_the_last_round(make_trainer, placement):
    drop = dropping(3, count=1, every_n_steps=3, rounds=2)
    trainer = make_trainer(drop, recovery(placement=placement, finish="adapter"), max_steps=9)
    fit_foreign(trainer)
    held = sum(parameter.numel() for parameter in held_by(trainer.optimizers))
    assert trainer.callback_metrics["recovery/trainable_parameters"].item() == held


def outcome(trainer, module, drop):
    return {
        "state": state_of(trainer, module),
        "plan": drop.plan,
        "trainable": [name for name, p in module.named_parameters() if p.requires_grad],
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "metrics": {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("recovery/regained", "drop/"))
        },
    }


OWN = {
    "lora": ({}, {"rslora": True, "warmup_steps": 4, "lr_factor": 2.0}, ()),
    "adapter": ({}, {"finish": "adapter", "start": 5, "dora": True}, ()),
    "full": ({}, {"mode": "full", "lr_factor": 0.5}, ()),
    "rounds": ({"count": 2, "every_n_steps": 3, "rounds": 2}, {"finish": "adapter"}, ()),
    "neighbours": ({"count": 1, "every_n_steps": 3, "rounds": 2}, {"placement": "neighbours", "finish": "adapter"}, ()),
    "qlora": ({}, {"finish": "dequantize"}, ("nf4",)),
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(
    ("own", "cuts"),
    one_of([("rounds", ("step=4", "last")), *((own, ("step=2", "step=4", "step=8", "last")) for own in OWN)]),
)
def test_lora_recovery_resumed_equals_uninterrupted(make_trainer, tmp_path, text_data, own, cuts):
    """Cut before the drop, at it, after it, and at the very end, in mid-epoch."""
    dropped, recovered, quantized = OWN[own]

    def run(name, *callbacks, ckpt_path=None):
        drop = dropping(**{"quality_batches": 1, **dropped})
        every = ModelCheckpoint(
            tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, save_last=True, every_n_train_steps=1
        )
        between = [Quantization(mode) for mode in quantized]
        trainer = make_trainer(
            drop, *between, recovery(**recovered), every, *callbacks, name=name, enable_checkpointing=True, max_steps=10
        )
        module = causal_lm()
        torch.manual_seed(7)
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("killed", Interrupt(6))
    for name in cuts[own == "full" :]:
        folder = "killed" if name == "last" else "whole"
        checkpoint = tmp_path / f"{folder}-ckpt" / f"{name}.ckpt"
        content = torch.load(checkpoint, weights_only=True)
        began = content["callbacks"]["LoRARecovery"]["began"]
        begin = recovered.get("start", 4)
        assert began == (begin if content["global_step"] >= begin else None)
        resumed = run(f"resumed-{name}", ckpt_path=checkpoint)
        assert same(resumed["state"], whole["state"]), name
        assert {**resumed, "state": 0} == {**whole, "state": 0}, name


def stateful():
    return StatefulDataLoader(sequences(BATCH * 6), batch_size=BATCH)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("finish", one_of(["merge", "dequantize"]))
def test_lora_recovery_of_a_foreign_module_resumed_equals_uninterrupted(make_trainer, tmp_path, finish):
    """Its configure_optimizers takes every parameter, trainable or not."""

    def run(name, ckpt_path=None):
        drop = dropping()
        every = ModelCheckpoint(tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=1)
        between = [Quantization()] if finish == "dequantize" else []
        own = recovery(finish=finish, warmup_steps=3)
        trainer = make_trainer(drop, *between, own, every, name=name, enable_checkpointing=True, max_steps=10)
        module = Headed()
        trainer.fit(module, stateful(), val_loader(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    whole = run("whole")
    for at in (3, 4, 7):
        resumed = run(f"resumed-{at}", ckpt_path=tmp_path / "whole-ckpt" / f"step={at}.ckpt")
        assert same(resumed["state"], whole["state"]), at
        assert {**resumed, "state": 0} == {**whole, "state": 0}, at


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.parametrize(("weights_only", "quantized"), crossed((False, True), (False, True)))
def test_causal_lm_checkpoint_is_the_adapted_model_without_callbacks(
    make_trainer, tmp_path, text_data, weights_only, quantized
):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=weights_only, every_n_train_steps=8)
    between = [Quantization()] if quantized else []
    own = recovery(finish="adapter", lr_factor=3.0)
    trainer = make_trainer(
        dropping(quality_batches=99), *between, own, checkpoint, max_steps=8, enable_checkpointing=True
    )
    module = causal_lm()
    trainer.fit(module, datamodule=text_data())
    wanted = trainer.callback_metrics["drop/loss_end"].item()
    assert abs(wanted - trainer.callback_metrics["drop/loss_after"].item()) > 1e-2
    for how in ("validate", "test"):
        (found,) = getattr(make_trainer(name=how), how)(
            causal_lm(), datamodule=text_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )
        assert found[f"{how[:3] if how == 'validate' else how}_loss"] == pytest.approx(wanted, rel=1e-5)
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(logits_of(loaded.model), logits_of(module.model))
    assert (quantization_of(loaded) is not None) == quantized


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("weights_only", [False, True])
def test_adapted_foreign_checkpoint_is_evaluated_adapted(make_trainer, tmp_path, weights_only):
    """Also in the trainer whose run has merged the adapters since."""
    drop = dropping()
    trainer = make_trainer(drop, recovery(lr_factor=3.0), Save(tmp_path / "before.ckpt", 3), max_steps=8)
    kept = Save(tmp_path / "a.ckpt", 8)
    trainer.callbacks.append(kept)
    module = fit_foreign(trainer)
    path = tmp_path / "a.ckpt"
    if weights_only:
        content = torch.load(path, weights_only=True)
        adapted = make_trainer(dropping(), recovery(), name="again", max_steps=8)
        fresh = Foreign()
        adapted.validate(fresh, val_loader(), ckpt_path=path, verbose=False)
        path = tmp_path / "weights.ckpt"
        adapted.save_checkpoint(path, weights_only=True)
        assert same(torch.load(path, weights_only=True)["state_dict"], content["state_dict"])
    state = torch.load(path, weights_only=True)["state_dict"]
    hand = Foreign()
    hand.net = dense_from(state, keys(drop.plan))
    with torch.no_grad():
        wanted = sum(hand.loss(batch).item() for batch in val_loader()) / 3
    for again, model in ((make_trainer(dropping(), recovery(), name="fresh"), Foreign()), (trainer, module)):
        (found,) = again.validate(model, val_loader(), ckpt_path=path, verbose=False)
        assert found["val_loss"] == pytest.approx(wanted, rel=1e-5)
        assert set(adapted_modules(model.net)) == linear_paths(set(ALL) - set(keys(drop.plan)))
    trainer.validate(module, val_loader(), ckpt_path=tmp_path / "before.ckpt", verbose=False)
    assert not adapted_modules(module)
    assert bypassed_sublayers(module) == ()


def test_qlora_trains_adapters_on_rounded_weights_and_merges_into_full_precision(make_trainer, tmp_path):
    drop = dropping()
    own = recovery(finish="dequantize", lr_factor=3.0)
    begun = Begun(4, lambda _, module: {n: dequantized_weight(m) for n, m in module.named_modules() if rounded(m)})

    def rounded(module):
        return isinstance(module, Linear4bit)

    trainer = make_trainer(drop, Quantization(), own, begun, Save(tmp_path / "last.ckpt", 9), max_steps=9)
    module = fit_foreign(trainer)
    assert quantization_of(module) is None
    assert not adapted_modules(module)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    compared = 0
    for name, base in begun.found.items():
        path = name.removesuffix(".base_layer")
        weight = base
        if f"{path}.lora_A.recovery.weight" in state:
            low, high = (state[f"{path}.lora_{side}.recovery.weight"] for side in "AB")
            weight = base + ALPHA / RANK * high @ low
            assert (weight - base).abs().max() > 1e-3
            compared += 1
        torch.testing.assert_close(module.get_submodule(path).weight, weight, rtol=0, atol=1e-6)
    assert compared == len(linear_paths(set(ALL) - set(keys(drop.plan))))


def test_lr_factor_scales_both_manual_optimizers_and_the_second_keeps_its_parameters(make_trainer):
    """global_step moves by two with every batch."""
    drop = dropping(4)
    trainer = make_trainer(drop, recovery(finish="adapter"), max_steps=12)
    module = fit_foreign(trainer, Manual())
    first, second = trainer.optimizers
    assert [id(p) for p in held_by([second])] == [id(module.scale)]
    names = {name for name, p in module.named_parameters() if any(p is own for own in held_by([first]))}
    paths = linear_paths(set(ALL) - set(keys(drop.plan)))
    assert names == {f"net.{path}.lora_{side}.recovery.weight" for path in paths for side in "AB"}
    assert {state["step"].item() for state in first.state.values()} == {(12 - 4) / 2}


def test_lora_recovery_restores_learning_rates_after_an_error(make_trainer):
    class Failing(Foreign):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 6:
                raise Interrupted
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(dropping(), recovery(lr_factor=0.5))
    with pytest.raises(Interrupted):
        fit_foreign(trainer, Failing())
    assert rates_of(trainer, None) == pytest.approx(1e-2 * (1 + math.cos(math.pi * 6 / 12)) / 2)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def dropped_module():
    module = Foreign()
    ls.bypass(module, ls.find_sublayers(module)[:2])
    return module


def foreign_folder(folder):
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("mine")


REFUSED = {
    "LoRA before drop": (lambda: [recovery(), dropping()], ScheduleError, "List SublayerDrop before LoRARecovery"),
    "LoRA before quantization": (
        lambda: [dropping(), recovery(finish="adapter"), Quantization()],
        ScheduleError,
        "List Quantization before LoRARecovery",
    ),
    "merge after quantization at the end": (
        lambda: [dropping(), Quantization(start="end"), recovery()],
        ScheduleError,
        "List LoRARecovery before Quantization",
    ),
    "export first": (lambda: [dropping(), Export(), recovery()], ScheduleError, "List LoRARecovery before Export"),
    "steps": (lambda: [dropping(4), recovery(start=3)], ScheduleError, "LoRARecovery acts at step 3.*SublayerDrop"),
    "steps of quantization": (
        lambda: [dropping(2), Quantization(start=4), recovery(start=3, finish="adapter")],
        ScheduleError,
        "LoRARecovery acts at step 3, before Quantization at step 4",
    ),
    "too late": (lambda: [dropping(), recovery(start=6)], ScheduleError, r"start=6.*ends after 6 steps"),
    "nothing to wait for": (lambda: [recovery()], ScheduleError, "starts at the drop, but nothing is dropped"),
    "merge into quantized": (lambda: [dropping(), Quantization(), recovery()], QuantizationError, "finish='merge'"),
    "full on quantized": (
        lambda: [dropping(), Quantization(), recovery(mode="full")],
        LayershedError,
        "mode='full'|List LoRARecovery",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lora_recovery_refuses_impossible_runs_before_training(make_trainer, case):
    callbacks, error, match = REFUSED[case]
    module, seen = Foreign(), Watch(lambda *_: None)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=match):
        fit_foreign(make_trainer(*callbacks(), seen, max_steps=6), module)
    assert seen.seen == []
    assert same(dict(module.state_dict()), dict(before))
    assert not adapted_modules(module)


@pytest.mark.parametrize(
    ("mode", "finish", "error", "match"),
    [("full", "merge", RecoveryError, "mode='full'"), ("lora", "merge", QuantizationError, "finish='merge'")],
)
def test_lora_recovery_refuses_an_already_quantized_model(make_trainer, mode, finish, error, match):
    module = dropped_module()
    ls.quantize(module)
    with pytest.raises(error, match=match):
        fit_foreign(make_trainer(recovery(mode=mode, finish=finish)), module)


def test_adapter_folder_with_other_files_is_refused_and_unchanged(make_trainer, tmp_path):
    foreign_folder(tmp_path / "run" / "adapter")
    module, seen = Foreign(), Watch(lambda *_: None)
    with pytest.raises(ExportError, match="holds no saved adapter"):
        fit_foreign(make_trainer(dropping(), recovery(finish="adapter"), seen), module)
    assert seen.seen == []
    assert (tmp_path / "run" / "adapter" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mode": "lorra"}, UnknownNameError, "Did you mean 'lora'"),
        ({"finish": "merged"}, UnknownNameError, "Did you mean 'merge'"),
        ({"placement": "neighbors"}, UnknownNameError, "Did you mean 'neighbours'"),
        ({"rank": 0}, RecoveryError, "rank=0"),
        ({"dropout": 1.0}, RecoveryError, r"dropout=1\.0"),
        ({"target_modules": "q_proj"}, RecoveryError, "target_modules='q_proj'"),
        ({"start": -1}, ScheduleError, "start=-1"),
        ({"lr_factor": 0.0}, RecoveryError, r"lr_factor=0\.0"),
        ({"warmup_steps": -1}, RecoveryError, "warmup_steps=-1"),
    ],
)
def test_lora_recovery_refuses_invalid_options_at_once(arguments, error, match):
    with pytest.raises(error, match=match):
        LoRARecovery(**arguments)


# Two ranks. Everything below runs in two processes of its own.


class Grouped(Foreign):
    """Blocks 2 and 3 hardly learn."""

    def configure_optimizers(self):
        late = [p for name, p in self.named_parameters() if block_of(name) in (2, 3)]
        early = [p for name, p in self.named_parameters() if block_of(name) not in (2, 3)]
        return torch.optim.AdamW([{"params": early, "lr": 1e-3}, {"params": late, "lr": 1e-6}])


def block_of(name):
    found = re.search(r"layers\.(\d+)\.", name)
    return found and int(found[1])


def test_frozen_parameters_have_no_gradient_once_recovery_began(make_trainer):
    watch = Watch(lambda _, module: (frozen_with_gradient(module), any(".lora_" in n for n in trainable(module))))
    fit_foreign(make_trainer(dropping(2), recovery(start=4), watch, max_steps=6))
    assert [adapted for _, (_, adapted) in watch.seen] == [False, False, False, True, True, True]
    assert all(not found for step, (found, _) in watch.seen if step >= 4)


def test_lora_recovery_at_the_drop_refuses_a_later_quantization(make_trainer):
    trainer = make_trainer(dropping(3), Quantization(start=5), recovery(finish="adapter"))
    refused_at_start(trainer, Foreign(), ScheduleError, "LoRARecovery acts at step 3, before Quantization at step 5")


@pytest.mark.parametrize("lift", [ls.remove, ls.bypass])
def test_lora_recovery_at_once_refuses_a_later_quantization(make_trainer, lift):
    module = Foreign()
    lift(module, ls.find_sublayers(module)[2:4])
    trainer = make_trainer(Quantization(start=3), recovery(finish="adapter"))
    refused_at_start(trainer, module, ScheduleError, "LoRARecovery acts at step 0, before Quantization at step 3")


def test_quantization_at_the_end_refuses_adapters_that_stay(make_trainer):
    trainer = make_trainer(dropping(), recovery(finish="adapter"), Quantization(start="end"))
    refused_at_start(trainer, Foreign(), QuantizationError, "finish='adapter'")


def test_lora_recovery_refuses_a_misspelt_target_before_training(make_trainer):
    trainer = make_trainer(dropping(), recovery(target_modules=["q_prj"]))
    refused_at_start(trainer, Foreign(), RecoveryError, "q_prj")


def test_lora_recovery_refuses_foreign_adapters_before_training(make_trainer):
    module = Foreign()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), module.net, "mine")
    refused_at_start(make_trainer(dropping(), recovery()), module, RecoveryError, "mine")


def test_quantization_refuses_a_missing_skip_module_before_training(make_trainer):
    trainer = make_trainer(dropping(), Quantization(skip_modules=["no_such"]), recovery(finish="adapter"))
    refused_at_start(trainer, Foreign(), QuantizationError, "no_such")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        pytest.param(lambda: Quantization(compute_dtype="bf16"), UnknownNameError, "bf16", id="unknown dtype"),
        pytest.param(
            lambda: Quantization("int8", compute_dtype="float16"), QuantizationError, "float16", id="int8 with a dtype"
        ),
        pytest.param(
            lambda: LoRARecovery(mode="full", finish="adapter"), RecoveryError, "finish='adapter'", id="full adapter"
        ),
    ],
)
def test_contradicting_options_are_refused_at_once(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_of_a_second_round_join_the_group_of_their_block(make_trainer, quantized):
    def groups(trainer, module):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return [{names[id(p)] for p in group["params"]} for group in trainer.optimizers[0].param_groups]

    watch = Watch(groups)
    between = [Quantization("nf4")] if quantized else []
    own = recovery(placement="neighbours", finish="adapter")
    drop = dropping(2, count=1, scope="attention", every_n_steps=2, rounds=2)
    module = fit_foreign(make_trainer(drop, *between, own, watch, max_steps=5), Grouped())
    assert [done.step for done in drop.plan.drops] == [2, 4]
    (first_early, first_late), (early, late) = watch.seen[1][1], watch.seen[-1][1]
    assert (bool(first_early), bool(first_late), bool(early)) == (False, True, True)  # the second brought others
    assert {block_of(name) for name in early} <= {0, 1}
    assert {block_of(name) for name in late} <= {2, 3}
    assert early | late == trainable(module)
    assert all(".lora_" in name for name in early | late)


def fit_stateful(trainer, **kwargs):
    module = Foreign()
    trainer.fit(module, StatefulDataLoader(sequences(BATCH * 6), batch_size=BATCH), val_loader(), **kwargs)
    return module


RESUMED = {
    "other rank": (lambda: [recovery()], lambda: [recovery(rank=8)], CheckpointError, "'r': 4.*'r': 8"),
    "recovery passed": (lambda: [], lambda: [recovery(start=2)], ScheduleError, r"LoRARecovery\(start=2\).*step 4"),
    "quantization passed": (
        lambda: [],
        lambda: [Quantization(start=2), recovery(start=6, finish="adapter")],
        ScheduleError,
        r"Quantization\(start=2\).*step 4",
    ),
}


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("case", RESUMED)
def test_resume_refuses_a_checkpoint_that_contradicts_the_callbacks(make_trainer, tmp_path, case):
    first, second, error, match = RESUMED[case]
    path, seen = tmp_path / "a.ckpt", Watch(lambda *_: None)
    fit_stateful(make_trainer(dropping(2), *first(), Save(path, 4), max_steps=5))
    with pytest.raises(error, match=match):
        fit_stateful(make_trainer(dropping(2), *second(), seen, max_steps=8, name="resumed"), ckpt_path=path)
    assert seen.seen == []


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_mode_none_takes_no_further_step_when_resumed(make_trainer, tmp_path):
    path, seen = tmp_path / "a.ckpt", Watch(lambda *_: None)
    whole = make_trainer(dropping(3), recovery(mode="none"), Save(path, 3))
    ended = fit_stateful(whole)
    assert whole.global_step == 3
    resumed = make_trainer(dropping(3), recovery(mode="none"), seen, name="resumed")
    module = fit_stateful(resumed, ckpt_path=path)
    assert (resumed.global_step, seen.seen) == (3, [])
    assert same(dict(module.state_dict()), dict(ended.state_dict()))


def test_distillation_without_a_drop_is_refused_before_training(make_trainer):
    refused_at_start(make_trainer(), causal_lm(distillation=Distillation()), RecoveryError, "starts at the drop")


def test_lora_recovery_serves_a_second_fit(make_trainer):
    own = recovery(warmup_steps=2)
    states = []
    for name, used in (("first", own), ("again", own), ("fresh", recovery(warmup_steps=2))):
        trainer = make_trainer(dropping(2), used, max_steps=5, name=name)
        states.append(state_of(trainer, fit_foreign(trainer)))
    assert own.began == 2
    assert same(states[1], states[0])
    assert same(states[1], states[2])


def test_lora_recovery_refuses_averaged_weights(make_trainer):
    refused_at_start(
        make_trainer(dropping(), EMAWeightAveraging(), recovery()), Foreign(), ScheduleError, "WeightAveraging"
    )


def test_lr_factor_is_logged_while_it_warms_up(make_trainer):
    watch = Watch(lambda trainer, _: trainer.callback_metrics.get("recovery/lr_factor"))
    fit_foreign(make_trainer(dropping(2), recovery(lr_factor=0.5, warmup_steps=4), watch, max_steps=7))
    found = [None if factor is None else factor.item() for _, factor in watch.seen]
    assert found == [None, None, *(pytest.approx(factor) for factor in (0.125, 0.25, 0.375, 0.5, 0.5))]
