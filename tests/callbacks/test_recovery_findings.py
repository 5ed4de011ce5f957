"""What reviewers found in recovery and quantization: each once more, so that it stays away."""

import copy
import re

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed as ls
from layershed.callbacks import LoRARecovery, Quantization
from layershed.cli.main import _names_8bit_optimizer
from layershed.errors import CheckpointError, QuantizationError, RecoveryError, ScheduleError, UnknownNameError
from layershed.recovery.distillation import Distillation, self_distillation_loss
from layershed.recovery.lora import adapted_modules, lora_settings
from tests.callbacks.test_lora_recovery import dropping, recovery
from tests.support.models import build_model
from tests.support.runs import (
    BATCH,
    Foreign,
    Save,
    Watch,
    causal_lm,
    fit_foreign,
    same,
    sequences,
    state_of,
    val_loader,
)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_with_gradient(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None}


def backward(model, tokens):
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def refused(trainer, module, error, match):
    """It raises, and no step was taken."""
    seen = Watch(lambda *_: None)
    trainer.callbacks.append(seen)
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.raises(error, match=match):
        fit_foreign(trainer, module)
    assert trainer.global_step == 0
    assert seen.seen == []
    assert same(dict(module.state_dict()), before)


class Stop(pl.Callback):
    """Ends the run after two steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 2


class Grouped(Foreign):
    """Blocks 2 and 3 hardly learn."""

    def configure_optimizers(self):
        late = [p for name, p in self.named_parameters() if block_of(name) in (2, 3)]
        early = [p for name, p in self.named_parameters() if block_of(name) not in (2, 3)]
        return torch.optim.AdamW([{"params": early, "lr": 1e-3}, {"params": late, "lr": 1e-6}])


def block_of(name):
    found = re.search(r"layers\.(\d+)\.", name)
    return found and int(found[1])


def test_injection_leaves_no_gradient_on_what_it_freezes(llama, tokens):
    backward(llama, tokens)
    assert all(parameter.grad is not None for parameter in llama.parameters())
    ls.inject_lora(llama)
    assert trainable(llama)
    assert frozen_with_gradient(llama) == set()


def test_no_frozen_parameter_has_a_gradient_once_recovery_began(make_trainer):
    watch = Watch(lambda _, module: (frozen_with_gradient(module), any(".lora_" in n for n in trainable(module))))
    fit_foreign(make_trainer(dropping(2), recovery(start=4), watch, max_steps=6))
    assert [adapted for _, (_, adapted) in watch.seen] == [False, False, False, True, True, True]
    assert all(not found for step, (found, _) in watch.seen if step >= 4)


def test_recovery_at_the_drop_does_not_come_before_a_later_quantization(make_trainer):
    trainer = make_trainer(dropping(3), Quantization(start=5), recovery(finish="adapter"))
    refused(trainer, Foreign(), ScheduleError, "LoRARecovery acts at step 3, before Quantization at step 5")


@pytest.mark.parametrize("lift", [ls.remove, ls.bypass])
def test_recovery_at_once_does_not_come_before_a_later_quantization(make_trainer, lift):
    module = Foreign()
    lift(module, ls.find_sublayers(module)[2:4])
    trainer = make_trainer(Quantization(start=3), recovery(finish="adapter"))
    refused(trainer, module, ScheduleError, "LoRARecovery acts at step 0, before Quantization at step 3")


def test_adapters_that_stay_are_not_quantized_under_at_the_end(make_trainer):
    trainer = make_trainer(dropping(), recovery(finish="adapter"), Quantization(start="end"))
    refused(trainer, Foreign(), QuantizationError, "finish='adapter'")


def test_a_misspelt_target_is_refused_before_training(make_trainer):
    trainer = make_trainer(dropping(), recovery(target_modules=["q_prj"]))
    refused(trainer, Foreign(), RecoveryError, "q_prj")


def test_adapters_of_another_origin_are_refused_before_training(make_trainer):
    module = Foreign()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), module.net, "mine")
    refused(make_trainer(dropping(), recovery()), module, RecoveryError, "mine")


def test_a_skipped_module_that_is_not_there_is_refused_before_training(make_trainer):
    trainer = make_trainer(dropping(), Quantization(skip_modules=["no_such"]), recovery(finish="adapter"))
    refused(trainer, Foreign(), QuantizationError, "no_such")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Quantization(compute_dtype="bf16"), UnknownNameError, "bf16"),
        (lambda: Quantization("int8", compute_dtype="float16"), QuantizationError, "float16"),
        (lambda: LoRARecovery(mode="full", finish="adapter"), RecoveryError, "finish='adapter'"),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("undo", [ls.merge_lora, ls.remove_lora])
@pytest.mark.parametrize("bypassed", ["never", "before", "after"])
def test_what_was_trainable_before_the_adapters_is_so_again_and_nothing_more(undo, bypassed):
    model, plain = build_model(), build_model()
    for own in (model, plain):
        own.model.embed_tokens.requires_grad_(False)
        own.model.layers[1].mlp.up_proj.requires_grad_(False)
    before = trainable(model)
    some = ls.find_sublayers(model)[2:4]  # block 1, part of which is frozen anyway
    if bypassed == "before":
        ls.bypass(model, some)
    ls.inject_lora(model)
    if bypassed == "after":
        ls.bypass(model, some)
    assert all(".lora_" in name for name in trainable(model))
    undo(model)
    if bypassed != "never":
        ls.bypass(plain, ls.find_sublayers(plain)[2:4])
        assert not any(name.startswith("model.layers.1.") for name in trainable(model))
    assert trainable(model) == trainable(plain)
    if bypassed != "never":
        ls.restore(model)
    assert trainable(model) == before


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


@pytest.mark.parametrize("options", [{"alpha": 32}, {"rank": 2}])
def test_injecting_again_with_other_options_is_refused_and_changes_nothing(llama, options):
    ls.inject_lora(llama, target_modules=["q_proj"])
    before = copy.deepcopy(dict(llama.state_dict())), lora_settings(llama), trainable(llama)
    with pytest.raises(RecoveryError, match="other settings"):
        ls.inject_lora(llama, **options)
    assert same(dict(llama.state_dict()), before[0])
    assert (lora_settings(llama), trainable(llama)) == before[1:]


def test_an_adapter_is_not_loaded_onto_adapters(llama, tmp_path):
    ls.inject_lora(llama)
    ls.save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(RecoveryError, match="recovery adapters already"):
        ls.load_adapter(llama, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_with_an_alpha_of_its_own_for_a_module_is_refused_by_name(llama, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 64})
    peft.get_peft_model(build_model(), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    before = trainable(llama)
    with pytest.raises(RecoveryError, match="alpha_pattern"):
        ls.load_adapter(llama, tmp_path)
    assert not adapted_modules(llama)
    assert trainable(llama) == before


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


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_that_callbacks_contradict_is_not_resumed(make_trainer, tmp_path, case):
    first, second, error, match = RESUMED[case]
    path, seen = tmp_path / "a.ckpt", Watch(lambda *_: None)
    fit_stateful(make_trainer(dropping(2), *first(), Save(path, 4), max_steps=5))
    with pytest.raises(error, match=match):
        fit_stateful(make_trainer(dropping(2), *second(), seen, max_steps=8, name="resumed"), ckpt_path=path)
    assert seen.seen == []


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_run_that_ended_where_recovery_would_begin_takes_no_further_step_when_resumed(make_trainer, tmp_path):
    path, seen = tmp_path / "a.ckpt", Watch(lambda *_: None)
    whole = make_trainer(dropping(3), recovery(mode="none"), Save(path, 3))
    ended = fit_stateful(whole)
    assert whole.global_step == 3
    resumed = make_trainer(dropping(3), recovery(mode="none"), seen, name="resumed")
    module = fit_stateful(resumed, ckpt_path=path)
    assert (resumed.global_step, seen.seen) == (3, [])
    assert same(dict(module.state_dict()), dict(ended.state_dict()))


@pytest.mark.filterwarnings("ignore:LoRARecovery never began:UserWarning")
def test_quantization_warns_if_it_never_happened(make_trainer):
    with pytest.warns(UserWarning, match="Quantization never happened"):
        fit_foreign(make_trainer(Quantization(start=5), recovery(start=5, finish="adapter"), Stop()))


def test_a_model_that_is_quantized_in_another_mode_is_refused(make_trainer):
    module = Foreign()
    ls.quantize(module, "int8")
    trainer = make_trainer(dropping(), Quantization("nf4"), recovery(finish="adapter"))
    refused(trainer, module, QuantizationError, "int8")


def test_distillation_without_anything_to_drop_is_refused_before_training(make_trainer):
    refused(make_trainer(), causal_lm(distillation=Distillation()), RecoveryError, "begins with a drop")


def test_the_same_recovery_serves_a_second_fit(make_trainer):
    own = recovery(warmup_steps=2)
    states = []
    for name, used in (("first", own), ("again", own), ("fresh", recovery(warmup_steps=2))):
        trainer = make_trainer(dropping(2), used, max_steps=5, name=name)
        states.append(state_of(trainer, fit_foreign(trainer)))
    assert own.began == 2
    assert same(states[1], states[0])
    assert same(states[1], states[2])


def test_token_types_reach_the_model_in_distillation(tokens):
    model = build_model("gpt2")
    batch = {"input_ids": tokens, "labels": tokens, "token_type_ids": tokens % 2}
    with torch.no_grad():
        found, wanted = self_distillation_loss(model, batch), model(**batch).loss
        assert not torch.allclose(wanted, model(input_ids=tokens, labels=tokens).loss)
    torch.testing.assert_close(found, wanted)


def test_averaged_weights_and_recovery_exclude_each_other(make_trainer):
    refused(make_trainer(dropping(), EMAWeightAveraging(), recovery()), Foreign(), ScheduleError, "WeightAveraging")


def test_the_factor_is_logged_while_it_warms_up(make_trainer):
    watch = Watch(lambda trainer, _: trainer.callback_metrics.get("recovery/lr_factor"))
    fit_foreign(make_trainer(dropping(2), recovery(lr_factor=0.5, warmup_steps=4), watch, max_steps=7))
    found = [None if factor is None else factor.item() for _, factor in watch.seen]
    assert found == [None, None, *(pytest.approx(factor) for factor in (0.125, 0.25, 0.375, 0.5, 0.5))]


@pytest.mark.parametrize("change", [ls.quantize, ls.inject_lora])
def test_a_backward_hook_on_a_linear_map_is_still_called(llama, tokens, change):
    calls = []
    llama.model.layers[1].mlp.down_proj.register_full_backward_hook(lambda *_: calls.append(1))
    change(llama)
    backward(llama.train(), tokens)
    assert calls == [1]


@pytest.mark.parametrize("name", ["AdamW8bit", "bitsandbytes.optim.AdamW8bit", "AdamW", "load_in_8bit"])
def test_an_8_bit_optimizer_is_recognised_on_the_command_line_and_in_a_config(tmp_path, name):
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  optimizer:\n    class_path: {name}\n", encoding="utf-8")
    wanted = name.endswith("AdamW8bit")
    for words in (
        ["fit", "--model.optimizer", name],
        ["fit", f"--model.optimizer={name}"],
        ["fit", "--config", str(config)],
        ["fit", f"--config={config}"],
    ):
        assert _names_8bit_optimizer(words) == wanted
    assert not _names_8bit_optimizer(["fit", "--config", str(tmp_path / "missing.yaml")])
