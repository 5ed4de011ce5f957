"""Quantization in a run, against bitsandbytes' own rounding of the weights of a run without it."""

import copy
import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForCausalLM

import layershed as ls
from layershed.callbacks import Export, LoRARecovery, Quantization
from layershed.discovery.bnb_layers import Linear4bit, Linear8bitLt, dequantized_weight
from layershed.errors import (
    LayershedError,
    QuantizationError,
    ScheduleError,
    UnknownNameError,
)
from layershed.formatting import short_bytes
from layershed.integration.gathered import changes_of
from layershed.quantization import quantization_of
from layershed.surgery import dropped_sublayers
from tests.support.lora import maps
from tests.support.lora_runs import Stop, dropping, recovery, refused_at_start
from tests.support.rounding import EVEN, rounded
from tests.support.runs import (
    BATCH,
    Foreign,
    Save,
    Watch,
    causal_lm,
    fit_foreign,
    logits_of,
    same,
    sequences,
    state_of,
    unmarked,
    val_loader,
)
from tests.support.thinned import crossed, one_of, some_of

MODES = ["nf4", "fp4", "int8"]
LINEAR = maps("llama", range(4), range(4))


def adapters(**kwargs):
    return LoRARecovery(**{"rank": 4, "finish": "adapter", **kwargs})


def quantized(module):
    """Paths of quantized linear maps, as they are called without adapters."""
    found = {path for path, own in module.named_modules() if isinstance(own, Linear4bit | Linear8bitLt)}
    return {path.removesuffix(".base_layer") for path in found}


def weight_of(module, path):
    own = module.get_submodule(path)
    return dequantized_weight(getattr(own, "base_layer", own))


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize(("mode", "when"), crossed(tuple(MODES), ((6, 6), (None, 4), (4, 4))))
def test_quantization_rounds_the_trained_weights_as_bitsandbytes(make_trainer, mode, when):
    """At the drop, at a step; LoRA comes with it or later."""
    start, at = when
    watch = Watch(lambda _, module: quantized(module.net))
    later = adapters(start=None if start is None else 6)
    module = fit_foreign(make_trainer(dropping(), Quantization(mode, start=start), later, watch, max_steps=8))
    assert watch.seen == [(step, LINEAR if step >= at else set()) for step in range(1, 9)]
    weights = Watch(lambda _, module: copy.deepcopy(dict(module.net.named_parameters())))
    fit_foreign(make_trainer(dropping(), weights, max_steps=8, name="plain"))
    for path in LINEAR:
        expected = rounded(weights.seen[at - 1][1][f"{path}.weight"].detach(), mode)
        torch.testing.assert_close(
            weight_of(module.net, path), expected, rtol=1e-6 if mode == "int8" else 0, atol=0, msg=path
        )
    assert quantization_of(module).mode == mode


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", some_of(MODES, 2))
def test_quantization_at_the_end_rounds_the_merged_weights(make_trainer, mode):
    found = fit_foreign(
        make_trainer(dropping(), adapters(finish="merge"), Quantization(mode, start="end"), max_steps=8)
    )
    plain = fit_foreign(make_trainer(dropping(), adapters(finish="merge"), max_steps=8, name="plain"))
    assert quantized(found.net) == LINEAR
    untouched = dict(plain.net.named_parameters())
    for path in LINEAR:
        expected = rounded(untouched.pop(f"{path}.weight").detach(), mode)
        torch.testing.assert_close(
            weight_of(found.net, path), expected, rtol=1e-6 if mode == "int8" else 0, atol=0, msg=path
        )
    assert all(torch.equal(found.net.get_parameter(name), value) for name, value in untouched.items())
    assert dropped_sublayers(found) == dropped_sublayers(plain)


def test_quantization_options_reach_the_layers(make_trainer):
    own = Quantization("fp4", start="end", double_quant=False, compute_dtype="bfloat16", skip_modules=["down_proj"])
    module = fit_foreign(make_trainer(own, max_steps=2))
    assert quantized(module.net) == {path for path in LINEAR if not path.endswith("down_proj")}
    for path in quantized(module.net):
        layer = module.net.get_submodule(path)
        assert layer.compute_dtype == torch.bfloat16
        assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("fp4", False)


def test_quantized_weights_leave_the_optimizer_and_do_not_move(make_trainer):
    def note(trainer, module):
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        names = {name for name, p in module.named_parameters() if id(p) in held}
        codes = {name: p.detach().clone() for name, p in module.named_parameters() if not p.is_floating_point()}
        return names, len(held), codes

    watch = Watch(note)
    fit_foreign(make_trainer(dropping(2), Quantization(start=4), adapters(start=7), watch, max_steps=9))
    dense = {name for name, _ in Foreign().named_parameters()}
    for step, (names, count, codes) in watch.seen:
        assert len(names) == count  # nothing that is no parameter of the model any more
        if 4 <= step < 7:
            assert {f"net.{path}.weight" for path in LINEAR} == codes.keys()
            assert names < dense - codes.keys()
            assert "net.model.norm.weight" in names
            assert same(codes, watch.seen[3][1][2])
        elif step >= 7:
            assert all(".lora_" in name for name in names)
    assert {name.replace(".base_layer", "") for name in watch.seen[-1][1][2]} == watch.seen[3][1][2].keys()
    for name, code in watch.seen[-1][1][2].items():
        assert torch.equal(code, watch.seen[3][1][2][name.replace(".base_layer", "")])


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_logged_bytes_equal_those_of_the_saved_weights(make_trainer, tmp_path, mode):
    saved = [Save(tmp_path / f"{step}.ckpt", step) for step in (3, 4)]
    own = [dropping(), Quantization(mode), *saved]
    trainer = make_trainer(*own, adapters(start=5), max_steps=6, csv=True)
    module = fit_foreign(trainer)
    sizes = [
        sum(
            value.numel() * value.element_size()
            for value in unmarked(torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["state_dict"]).values()
        )
        for step in (3, 4)
    ]
    assert sizes[0] == 4 * sum(p.numel() for p in Foreign().parameters())
    assert sizes[1] < 0.7 * sizes[0]
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantization/bytes"]]
    assert [(int(row["step"]), float(row["quantization/bytes"])) for row in rows] == [(4, sizes[1])]
    assert float(rows[0]["quantization/bytes_before"]) == sizes[0]
    assert trainer.callback_metrics["quantization/bytes"].item() == sizes[1]
    before, after = map(short_bytes, sizes)
    assert changes_of(trainer, module, tmp_path) == (
        ("Quantized weights", f"{mode}, {8 if mode == 'int8' else 4} bits, {before} -> {after}"),
        ("LoRA", "rank 4, alpha 16, from step 5, left in the model"),
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize(
    ("mode", "cuts"), one_of([(next(iter(MODES)), (4, 6)), *((mode, (3, 4, 5, 6, 7)) for mode in MODES)])
)
def test_quantization_resumed_between_any_two_stages_equals_uninterrupted(make_trainer, tmp_path, mode, cuts):
    def run(name, ckpt_path=None):
        every = ModelCheckpoint(tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=1)
        own = [dropping(2), Quantization(mode, start=4), adapters(start=6)]
        trainer = make_trainer(*own, every, name=name, enable_checkpointing=True, max_steps=8)
        module = Foreign()
        data = StatefulDataLoader(sequences(BATCH * 6), batch_size=BATCH)
        trainer.fit(module, data, val_loader(), ckpt_path=ckpt_path)
        return state_of(trainer, module)

    whole = run("whole")
    for at in cuts:
        path = tmp_path / "whole-ckpt" / f"step={at}.ckpt"
        noted = torch.load(path, weights_only=True).get("layershed", {})
        assert (noted["quantized"] is not None, noted["adapters"] is not None) == (at >= 4, at >= 6)
        assert same(run(f"resumed-{at}", path), whole), at


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_quantized_checkpoint_loads_strictly_into_a_fresh_model(make_trainer, tmp_path, text_data):
    trainer = make_trainer(dropping(), Quantization(), adapters(start=7), Save(tmp_path / "a.ckpt", 5), max_steps=8)
    trainer.fit(causal_lm(), datamodule=text_data())
    fresh = causal_lm()
    make_trainer(name="val").validate(fresh, datamodule=text_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    (mark,) = saved.keys() - fresh.state_dict().keys()
    assert mark.startswith("layershed: ")  # it makes a strict load without layershed fail
    del saved[mark]
    assert same(dict(fresh.state_dict()), dict(saved))
    assert quantized(fresh.model) == LINEAR


class Around(pl.Callback):
    """The state dict on both sides of every validation pass."""

    def __init__(self):
        self.pairs = []

    def on_validation_start(self, trainer, pl_module):
        self.before = copy.deepcopy(dict(pl_module.state_dict()))

    def on_validation_end(self, trainer, pl_module):
        self.pairs.append((trainer.global_step, self.before, copy.deepcopy(dict(pl_module.state_dict()))))


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("mode", some_of(MODES, 2))
def test_validation_after_quantization_does_not_change_training(make_trainer, mode):
    """Sides that are multiples of 64: those bitsandbytes would repack in eval mode."""
    around = Around()

    def run(name, *callbacks, **kwargs):
        trainer = make_trainer(
            dropping(2), Quantization(mode), adapters(), *callbacks, name=name, max_steps=5, **kwargs
        )
        return state_of(trainer, fit_foreign(trainer, **EVEN))

    with_pass = run("with", around, val_check_interval=1)
    assert [step for step, _, _ in around.pairs] == [1, 2, 3, 4, 5]
    assert all(same(before, after) for _, before, after in around.pairs)
    assert any(value.dtype in (torch.uint8, torch.int8) for value in around.pairs[-1][1].values())
    assert same(with_pass, run("without", limit_val_batches=0))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("mode", "drops"), crossed(MODES, (True, False)))
def test_exported_folder_equals_the_quantized_model_bit_for_bit(make_trainer, tmp_path, mode, drops):
    before = [dropping(), adapters(finish="merge")] if drops else []
    trainer = make_trainer(*before, Quantization(mode, start="end"), Export(), max_steps=6)
    module = fit_foreign(trainer, **EVEN)
    folder = tmp_path / "run" / "pruned"
    assert torch.equal(logits_of(ls.load_pretrained(folder)), logits_of(module.net))
    if not drops:
        # with gradients, as without them stock layers of bitsandbytes may compute in bfloat16 on a CPU
        theirs, batch = AutoModelForCausalLM.from_pretrained(folder), next(iter(val_loader()))
        found, wanted = (net(input_ids=batch["input_ids"]).logits for net in (theirs, module.net))
        assert torch.equal(found, wanted)


def test_recovery_on_quantized_weights_exports_base_and_adapter(make_trainer, tmp_path):
    module = fit_foreign(make_trainer(dropping(), Quantization(), adapters(), Export(), max_steps=8))
    loaded = ls.load_pretrained(tmp_path / "run" / "pruned")
    assert torch.equal(logits_of(loaded), logits_of(module.net))
    assert quantization_of(loaded) == quantization_of(module)


REFUSED = {
    "too late": (lambda: [Quantization(start=6), adapters(start=6)], ScheduleError, r"start=6.*ends after 6 steps"),
    "nothing to wait for": (lambda: [Quantization(), adapters(start=2)], ScheduleError, "but nothing is dropped"),
    "nothing to train": (lambda: [dropping(), Quantization()], QuantizationError, "List LoRARecovery after it"),
    "full": (
        lambda: [dropping(), Quantization(), LoRARecovery(mode="full")],
        LayershedError,
        "quantized weights",
    ),
    "before the drop": (
        lambda: [dropping(4), Quantization(start=3), adapters()],
        ScheduleError,
        "Quantization acts at step 3, before SublayerDrop at step 4",
    ),
    "listed before the drop": (
        lambda: [Quantization(), dropping(), adapters()],
        ScheduleError,
        "List SublayerDrop before Quantization",
    ),
    "at the end, listed before LoRA": (
        lambda: [dropping(), Quantization(start="end"), adapters()],
        ScheduleError,
        "List LoRARecovery before Quantization",
    ),
    "at the end, listed after Export": (
        lambda: [dropping(), Export(), Quantization(start="end")],
        ScheduleError,
        "List Quantization before Export",
    ),
}


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("case", REFUSED)
def test_quantization_refuses_impossible_runs_before_training(make_trainer, case):
    callbacks, error, match = REFUSED[case]
    module, seen = Foreign(), Watch(lambda *_: None)
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.raises(error, match=match):
        fit_foreign(make_trainer(*callbacks(), seen, max_steps=6), module)
    assert seen.seen == []
    assert same(dict(module.state_dict()), before)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mode": "nf3"}, UnknownNameError, "nf3"),
        ({"start": "ende"}, ScheduleError, "start='ende'"),
        ({"start": -1}, ScheduleError, "start=-1"),
        ({"start": 2.5}, ScheduleError, r"start=2\.5"),
    ],
)
def test_quantization_refuses_invalid_options_at_once(arguments, error, match):
    with pytest.raises(error, match=match):
        Quantization(**arguments)


@pytest.mark.filterwarnings("ignore:LoRARecovery never began:UserWarning")
def test_quantization_warns_if_it_never_happened(make_trainer):
    with pytest.warns(UserWarning, match="Quantization never happened"):
        fit_foreign(make_trainer(Quantization(start=5), recovery(start=5, finish="adapter"), Stop()))


def test_quantization_refuses_a_model_quantized_in_another_mode(make_trainer):
    module = Foreign()
    ls.quantize(module, "int8")
    trainer = make_trainer(dropping(), Quantization("nf4"), recovery(finish="adapter"))
    refused_at_start(trainer, module, QuantizationError, "int8")
