"""What transformers does beside training: saving, loading, resizing, casting, generating."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

import layershed as ls
from tests.support.by_others.action import CAUSAL, Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


@action(ACTIONS, "transformers saves, layershed loads", moments=(0,))
def saved(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers saves in shards, layershed loads", ("llama", "bart"), moments=(0,))
def saved_in_shards(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved", max_shard_size="20KB")
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers saves a given state dict, layershed loads", ("llama", "opt"), moments=(0,))
def saved_state(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved", state_dict=world.model.state_dict())
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers saves and loads", moments=(0,))
def loaded(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    yield type(world.model).from_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers saves and loads with a device map", ("llama", "opt"), moments=(0,))
def loaded_on_map(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    yield type(world.model).from_pretrained(world.folder / "saved", device_map={"": "cpu"})


@action(ACTIONS, "transformers saves the base, layershed loads", ("llama", "gpt2", "opt"), moments=(0,), follows=True)
def base_saved(world: World) -> Iterator[Model]:
    world.model.base_model.save_pretrained(world.folder / "saved")
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers saves and loads the base (AutoModel)", CAUSAL, moments=(0,), follows=True)
def loaded_base(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    yield AutoModel.from_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers loads as a classifier", ("llama", "gpt2", "opt"), moments=(0,), follows=True)
def loaded_classifier(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    set_seed(0)
    yield AutoModelForSequenceClassification.from_pretrained(world.folder / "saved")


@action(ACTIONS, "a model is built from the config, the state dict loaded", moments=(0,))
def from_config(world: World) -> Iterator[Model]:
    other = type(world.model)(world.model.config)
    other.load_state_dict(world.model.state_dict())
    yield other.eval()


@action(ACTIONS, "a model is built from the config, weights copied", ("llama", "opt"), moments=(0,), named=False)
def config_without_marks(world: World) -> Iterator[Model]:
    other = type(world.model)(world.model.config)
    world.told += [str(other.load_state_dict(world.model.state_dict(), strict=False))]
    yield other.eval()


@action(ACTIONS, "transformers resizes the embeddings", follows=True)
def resize(world: World) -> Iterator[Model]:
    world.model.resize_token_embeddings(104, mean_resizing=False)
    yield world.model


@action(ACTIONS, "transformers resizes the embeddings, saves, layershed loads", ("llama", "opt"), moments=(0,))
def resize_and_save(world: World) -> Iterator[Model]:
    world.model.resize_token_embeddings(104, mean_resizing=False)
    world.model.save_pretrained(world.folder / "saved")
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "transformers ties the weights", ("llama", "gpt2", "opt", "bart"))
def tie(world: World) -> Iterator[Model]:
    world.model.tie_weights()
    yield world.model


@action(ACTIONS, "transformers initialises the weights again", CAUSAL, follows=True)
def init_weights(world: World) -> Iterator[Model]:
    world.model.init_weights()
    yield world.model


@action(ACTIONS, "gradient checkpointing is enabled, a backward pass", steps=1)
def checkpointing(world: World) -> Iterator[Model]:
    world.model.gradient_checkpointing_enable()
    world.model.train()(**world.batch).loss.backward()
    yield world.model


@action(ACTIONS, "inputs require gradients", ("llama", "opt", "bert"))
def input_grads(world: World) -> Iterator[Model]:
    world.model.enable_input_require_grads()
    yield world.model


@action(ACTIONS, "another attention implementation is set")
def attention(world: World) -> Iterator[Model]:
    world.model.set_attn_implementation("eager")
    yield world.model


@action(ACTIONS, "half()", follows=True, tolerance=0.02)
def half(world: World) -> Iterator[Model]:
    yield world.model.half()


# transformers' own loading of Mixtral in bfloat16 rounds otherwise, too: by where its experts lie in memory
@action(ACTIONS, "to(bfloat16)", follows=True, tolerance=0.1)
def bfloat16(world: World) -> Iterator[Model]:
    yield world.model.to(torch.bfloat16)


@action(ACTIONS, "double()", ("llama", "gpt2", "opt", "bert", "bart"))
def double(world: World) -> Iterator[Model]:
    yield world.model.double()


class _Decoded:
    """Logits of five greedy steps, with the cache."""

    def __init__(self, model: Model, **options: object) -> None:
        self.model, self.options = model, options

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        steps = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        given = {"attention_mask": attention_mask, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(self.model.generate(input_ids, **given, **steps, **self.options).logits)


@action(ACTIONS, "generate", CAUSAL, follows=True, named=False, moments=(0, 1), steps=2)
def generate(world: World) -> Iterator[Model]:
    yield world.model
    yield _Decoded(world.model)


@action(
    ACTIONS, "generate with a static cache", ("llama", "mixtral"), follows=True, named=False, moments=(0, 1), steps=2
)
def generate_static(world: World) -> Iterator[Model]:
    yield world.model
    yield _Decoded(world.model, cache_implementation="static")


@action(ACTIONS, "the encoder is moved into another model", ("llama", "opt", "bert"), moments=(0,))
def moved(world: World) -> Iterator[Model]:
    other = world.fresh()
    setattr(other, other.base_model_prefix, world.model.base_model)
    other.set_output_embeddings(world.model.get_output_embeddings())
    if hasattr(world.model, "cls"):
        other.cls = world.model.cls
    yield other


@action(ACTIONS, "float32 modules are cast while loading (dtype)", ("llama", "opt"), moments=(0,), tolerance=0.05)
def loaded_dtype(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    yield type(world.model).from_pretrained(world.folder / "saved", dtype=torch.bfloat16)


@action(ACTIONS, "the model is pruned to fewer blocks, then saved", ("llama", "gpt2"), follows=True)
def fewer_blocks(world: World) -> Iterator[Model]:
    base = world.model.base_model
    name = "layers" if hasattr(base, "layers") else "h"
    setattr(base, name, getattr(base, name)[:3])
    world.model.config.num_hidden_layers = 3
    yield world.model
