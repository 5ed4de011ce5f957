"""Tiny models built from configs: seconds for the whole suite, no download."""

import os
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import AutoConfig

# One thread each, here and in the processes that tests start: tensors this small gain nothing from a second one, and
# lose seconds to its waiting where the machine is shared.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODEL_TYPES = ("llama", "mistral", "qwen3", "gpt2")


def build_model(model_type: str = "llama", **overrides: object) -> PreTrainedModel:
    """A random model whose branches are large enough to matter, in eval mode."""
    set_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture(params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture
def model(model_type: str) -> PreTrainedModel:
    return build_model(model_type)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build_model("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
