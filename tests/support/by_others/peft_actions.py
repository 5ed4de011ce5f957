"""What peft does. The values of adapters are as after training, and zero where the reference's branch is zero."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from packaging.version import parse
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

import layershed as ls
from tests.support.by_others.action import CAUSAL, Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


def _adapted(world: World, **options: object) -> PeftModel:
    """The model with LoRA whose matrices B are not zero."""
    targets = {"target_modules": list(world.architecture.linear)} | options
    adapted = get_peft_model(world.model, LoraConfig(r=4, **targets))
    world.stir(adapted, "lora_B")
    return adapted.eval()


@action(ACTIONS, "peft injects LoRA", follows=True)
def lora(world: World) -> Iterator[Model]:
    yield _adapted(world)


@action(ACTIONS, "peft injects LoRA into all-linear", follows=True)
def all_linear(world: World) -> Iterator[Model]:
    yield _adapted(world, target_modules="all-linear")


@action(ACTIONS, "peft injects DoRA", ("llama", "gpt2", "opt"), follows=True)
def dora(world: World) -> Iterator[Model]:
    # not into the last maps: DoRA divides by the norm of a weight, and the reference's are zero
    yield _adapted(world, use_dora=True, target_modules=[world.architecture.linear[0]])


@action(ACTIONS, "peft merges LoRA and unloads", follows=True, steps=2)
def merge_and_unload(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    yield adapted.merge_and_unload()


@action(ACTIONS, "peft merges all-linear LoRA and unloads", follows=True, steps=2)
def merge_all_and_unload(world: World) -> Iterator[Model]:
    adapted = _adapted(world, target_modules="all-linear")
    yield adapted
    yield adapted.merge_and_unload()


@action(ACTIONS, "peft unloads LoRA", steps=2)
def unload(world: World) -> Iterator[Model]:
    adapted = _adapted(world, target_modules="all-linear")
    yield adapted
    yield adapted.unload()


@action(ACTIONS, "peft merges LoRA in place", ("llama", "opt", "bart"), follows=True, steps=2)
def merge_in_place(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    adapted.merge_adapter()
    yield adapted


@action(ACTIONS, "peft adds a second adapter", ("llama", "gpt2", "opt", "bart"), follows=True, steps=2)
def second_adapter(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=list(world.architecture.linear)))
    adapted.set_adapter("second")
    world.stir(adapted, "lora_B.second")
    yield adapted.eval()


@action(ACTIONS, "peft deletes an adapter", ("llama", "opt"), steps=2)
def delete_adapter(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=list(world.architecture.linear)))
    yield adapted
    adapted.set_adapter("second")
    adapted.delete_adapter("default")
    yield adapted


@action(ACTIONS, "peft disables its adapters", ("llama", "opt", "bert", "bart"), steps=2)
def disable_adapter(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    with adapted.disable_adapter():
        yield adapted


# transformers 5.24 refuses every peft that there is, up to 0.21
_OWN = ("llama", "opt", "bert") if parse(version("peft")) >= parse(MIN_PEFT_VERSION) else ()


@action(ACTIONS, "transformers adds an adapter to the model itself", _OWN, follows=True)
def own_adapter(world: World) -> Iterator[Model]:
    world.model.add_adapter(LoraConfig(r=4, target_modules=list(world.architecture.linear)))
    world.stir(world.model, "lora_B")
    yield world.model.eval()


@action(ACTIONS, "peft saves, unloads and loads an adapter again", ("llama", "opt"), follows=True, steps=2)
def saved_adapter(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    adapted.save_pretrained(world.folder / "adapter")
    yield PeftModel.from_pretrained(adapted.unload(), world.folder / "adapter").eval()


@action(ACTIONS, "peft saves copies of attentions (modules_to_save)", ("llama", "opt"), steps=2)
def modules_to_save(world: World) -> Iterator[Model]:
    options = {"target_modules": [world.architecture.linear[-1]], "modules_to_save": ["self_attn"]}
    adapted = get_peft_model(world.model, LoraConfig(r=4, **options)).eval()
    yield adapted
    yield adapted.merge_and_unload()


@action(ACTIONS, "peft injects IA3 and merges it", ("llama", "opt"), follows=True, steps=2)
def ia3(world: World) -> Iterator[Model]:
    names = list(world.architecture.linear[-2:])
    adapted = get_peft_model(world.model, IA3Config(target_modules=names, feedforward_modules=names[-1:]))
    world.stir(adapted, "ia3_l")
    yield adapted.eval()
    yield adapted.merge_and_unload()


@action(ACTIONS, "peft injects LoHa", ("llama", "opt"), follows=True)
def loha(world: World) -> Iterator[Model]:
    adapted = get_peft_model(world.model, LoHaConfig(r=2, target_modules=list(world.architecture.linear)))
    world.stir(adapted, "hada_w2_a")
    yield adapted.eval()


@action(ACTIONS, "peft adds trained prefixes", ("llama", "mixtral"), follows=True)
def prefixes(world: World) -> Iterator[Model]:
    adapted = get_peft_model(world.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    world.stir(adapted, "prompt_encoder")
    yield adapted.eval()


@action(ACTIONS, "peft injects LoRA into experts", ("mixtral",), follows=True, steps=2)
def experts(world: World) -> Iterator[Model]:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(world.model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names))
    world.stir(adapted, "lora_B")
    yield adapted.eval()
    yield adapted.merge_and_unload()


@action(
    ACTIONS, "peft injects LoRA, transformers saves, layershed loads", CAUSAL, moments=(0, 1), steps=2, follows=True
)
def saved_with_lora(world: World) -> Iterator[Model]:
    adapted = _adapted(world)
    yield adapted
    merged = adapted.merge_and_unload()
    merged.save_pretrained(world.folder / "saved")
    yield ls.load_pretrained(world.folder / "saved")
