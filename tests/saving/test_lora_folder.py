"""Adapters on disk, read back by peft's own loader, and onto bases that they do not belong to."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import layershed as ls
from layershed.errors import ExportError, PlanError, RecoveryError
from layershed.recovery.lora import adapted_modules
from tests.support.lora import learn, logits
from tests.support.models import build_model
from tests.support.thinned import crossed
from tests.support.trainable import trainable

ARCHITECTURES = ("llama", "opt", "gpt2", "mixtral")
NAMES = {"attention.1", "mlp.2"}


# peft 0.21 asks what transformers 5.23 deprecates
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def dropped(model, names):
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.name in names])
    return model


def adapted(architecture="llama", names=NAMES, **options):
    """A dropped model with adapters that do something."""
    model = dropped(build_model(architecture), names)
    ls.inject_lora(model, rank=4, **options)
    learn(model)
    return model


VARIANTS = [*((name, {}) for name in ARCHITECTURES), ("llama", {"rslora": True}), ("llama", {"dora": True})]


@pytest.mark.default_cases(2)
@of_peft
@pytest.mark.parametrize(("architecture", "options"), VARIANTS, ids=str)
def test_peft_loads_a_saved_adapter_to_the_same_logits(architecture, options, tokens, tmp_path):
    model = adapted(architecture, **options)
    ls.save_adapter(model, tmp_path / "adapter")
    base = dropped(build_model(architecture), NAMES)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_adapter_gives_the_same_logits(architecture, tokens, tmp_path):
    model = adapted(architecture)
    ls.save_adapter(model, tmp_path / "adapter")
    base = dropped(build_model(architecture), NAMES)
    ls.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base, tokens), logits(model, tokens))


@of_peft
def test_adapters_of_sublayers_dropped_after_injection_are_not_saved(tokens, tmp_path):
    model = adapted(names={"attention.1"})
    dropped(model, {"mlp.2"})
    ls.save_adapter(model, tmp_path / "adapter")
    assert not [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "layers.2.mlp" in key]
    base = build_model()
    ls.remove(base, [s for s in ls.find_sublayers(base) if s.name in {"attention.1", "mlp.2"}])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("names", [set(), {"attention.1"}, {"attention.1", "mlp.3"}], ids=["none", "one", "other"])
def test_adapter_is_refused_on_a_base_with_another_plan(names, tmp_path):
    ls.save_adapter(adapted(), tmp_path / "adapter")
    base = build_model()
    if names:
        dropped(base, names)
    with pytest.raises(PlanError, match=r"without attention\.1, mlp\.2"):
        ls.load_adapter(base, tmp_path / "adapter")
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_adapter_of_a_dense_base_is_refused_on_a_dropped_one(tmp_path):
    model = build_model()
    ls.inject_lora(model)
    ls.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(PlanError, match="without nothing"):
        ls.load_adapter(dropped(build_model(), NAMES), tmp_path / "adapter")


def test_plan_saved_beside_an_adapter_keeps_its_scores(tokens, tmp_path):
    model = build_model()
    plan = ls.drop_sublayers(model, [tokens], "attention", count=2)
    ls.inject_lora(model)
    ls.save_adapter(model, tmp_path / "adapter", plan=plan)
    assert ls.load_plan(tmp_path / "adapter") == plan
    ls.restore(model, [next(iter(plan))])
    with pytest.raises(PlanError, match="drops 2 sublayers, but the model lacks 1"):
        ls.save_adapter(model, tmp_path / "other", plan=plan)


def test_saving_or_loading_an_adapter_that_is_missing_is_refused(llama, tmp_path):
    with pytest.raises(RecoveryError, match="carries no LoRA adapters"):
        ls.save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(ExportError, match="holds no readable LoRA adapter"):
        ls.load_adapter(llama, tmp_path)


def test_adapter_is_not_saved_over_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds no saved adapter"):
        ls.save_adapter(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("what", ["truncated", "missing", "another shape", "another model"])
def test_damaged_or_foreign_adapter_is_refused(what, tmp_path):
    ls.save_adapter(adapted(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(iter(weights))
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "another model":
        save_file({name.replace("layers.3", "layers.9"): tensor for name, tensor in weights.items()}, file)
    else:
        changed = {} if what == "missing" else {key: weights[key][:, :-1].contiguous()}
        save_file({**{name: tensor for name, tensor in weights.items() if name != key}, **changed}, file)
    with pytest.raises((ExportError, RecoveryError), match="load_adapter"):
        ls.load_adapter(dropped(build_model(), NAMES), tmp_path / "adapter")


def test_adapter_config_has_the_fields_of_peft_and_no_local_path(tmp_path):
    ls.save_adapter(adapted(), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert config["base_model_name_or_path"] is None


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    ("architecture", "gone", "adapters", "mode"),
    crossed(ARCHITECTURES, ["bypass", "remove", "dense"], [True, False], ["nf4", "fp4", "int8", None]),
)
def test_saved_folder_restores_drops_quantization_and_lora_exactly(
    architecture, gone, adapters, mode, tokens, tmp_path
):
    model = build_model(architecture)
    if gone != "dense":
        getattr(ls, gone)(model, [s for s in ls.find_sublayers(model) if s.name in NAMES])
    if mode is not None:
        ls.quantize(model, mode)
    if adapters:
        ls.inject_lora(model, rank=2)
        learn(model)
    ls.save_pretrained(model, tmp_path / "saved")
    loaded = ls.load_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert ls.quantization_of(loaded) == ls.quantization_of(model)
    assert ls.dropped_sublayers(loaded) == ls.dropped_sublayers(model)
    assert (tmp_path / "saved" / "adapter").is_dir() == adapters
    base = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [key for key in base if "lora_" in key or "base_layer" in key]


def test_standalone_saving_refuses_unmerged_lora(tmp_path):
    with pytest.raises(ExportError, match="merge them first"):
        ls.save_pretrained(adapted(), tmp_path / "saved", standalone=True)


def test_loading_an_adapter_over_lora_is_refused(llama, tmp_path):
    ls.inject_lora(llama)
    ls.save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(RecoveryError, match="LoRA adapters already"):
        ls.load_adapter(llama, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapter_with_an_alpha_pattern_is_refused_by_name(llama, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 64})
    peft.get_peft_model(build_model(), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    before = trainable(llama)
    with pytest.raises(RecoveryError, match="alpha_pattern"):
        ls.load_adapter(llama, tmp_path)
    assert not adapted_modules(llama)
    assert trainable(llama) == before
