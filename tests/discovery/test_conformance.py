"""The checks of benchmarks/conformance.py on representative architectures; on all of them with -m conformance.

By default one architecture takes every check, and every representative takes the strongest one; the rest is slow.
"""

import functools

import pytest
import torch

from layershed.discovery.find import find_left_alone, find_sublayers
from layershed.errors import LayershedError
from tests.support.architectures import UNBUILDABLE, causal_architectures, tiny_model
from tests.support.conformance import CHECKS, Case, compiled
from tests.support.conformance_trial import try_architecture

# what each represents
REPRESENTATIVE = {
    "llama": "sequential, pre-norm",
    "gpt2": "convolutions for matrix products",
    "phi": "parallel, one norm for both",
    "falcon": "parallel, adding in place",
    "gemma3_text": "sandwich norms, sliding windows",
    "bert": "post-LN, an MLP in two modules",
    "bart": "post-LN in the block itself",
    "opt": "an MLP without a module, flattened tokens",
    "bloom": "modules that add to the stream themselves",
    "granitemoeshared": "scaled branches, experts beside a shared expert",
    "jamba": "a hybrid of Mamba and attention",
    "gemma4_text": "blocks that share keys and values",
    "longcat_flash": "two attentions in a block",
    "hy_v4": "several streams, an indexer that blocks share",
    "deepseek_v3": "latent attention: keys and values of different sizes",
    "prophetnet": "several hidden states a token",
}

# and what the sentence names
REFUSED = {
    "deepseek_v4": r"model\.layers\.0: Y = X \+ f\(norm\(X\)\) does not hold",  # streams mixed by a matrix
    "gemma3n_text": r"model\.layers\.0: Y = X \+ f\(norm\(X\)\) does not hold",  # predicted and corrected streams
    "hrm_text": r"model\.L_module\.layers\.0.*it ran 6 times",
    "mamba": "no list of blocks with attention",
    "rwkv": "no list of blocks with attention",
    "xlm": r"transformer\.attentions\.0: Y = X",  # its blocks are no modules
    "zamba": r"model\.layers\.0\.mamba",  # its attention feeds a mixer, not the stream
}

# transformers' own dense model cannot generate
FAILING = {"blt", "musicgen", "xlnet"}


STRONGEST = "single"  # every sublayer against a copy whose branch has zero weights
EVERY_CHECK = "llama"


@functools.cache
def case_of(model_type):
    """One model for all checks of an architecture; each check undoes its changes."""
    return Case(tiny_model(model_type))


def marks(model_type, check):
    return () if check == STRONGEST or model_type == EVERY_CHECK else pytest.mark.slow


@pytest.mark.parametrize(
    ("model_type", "check"),
    [pytest.param(m, check, marks=marks(m, check)) for m in REPRESENTATIVE for check in CHECKS],
)
def test_architecture_passes_conformance_check(model_type, check):
    CHECKS[check](case_of(model_type))


@pytest.mark.parametrize(
    "model_type", ["gpt2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("llama", "bert", "gemma3_text"))]
)
def test_dropped_model_compiles_to_the_same_logits(model_type):
    compiled(Case(tiny_model(model_type)))


@pytest.mark.parametrize("model_type", REFUSED)
def test_unprovable_architecture_is_refused_in_one_sentence(model_type):
    with pytest.raises(LayershedError, match=REFUSED[model_type]) as caught:
        find_sublayers(tiny_model(model_type))
    assert "\n" not in str(caught.value)


def test_mixers_of_a_hybrid_model_are_left_alone_by_name():
    model = tiny_model("jamba")
    assert [s.name for s in find_sublayers(model)] == ["mlp.0", "attention.1", "mlp.1", "mlp.2"]
    assert {entry.path: entry.reason for entry in find_left_alone(model)} == {
        "model.layers.0.mamba": "it mixes tokens without attention",
        "model.layers.2.mamba": "it mixes tokens without attention",
    }


def test_attention_whose_keys_other_blocks_read_is_left_alone():
    model = tiny_model("gemma4_text")
    assert [s.name for s in find_sublayers(model) if s.kind == "attention"] == ["attention.0", "attention.2"]
    assert "model.layers.1.self_attn" in {entry.path for entry in find_left_alone(model)}


@pytest.mark.conformance
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(set(causal_architectures()) - set(REPRESENTATIVE)))
def test_architecture_passes_every_check_or_is_refused(model_type):
    torch.set_num_threads(1)
    if model_type in UNBUILDABLE:
        pytest.skip(UNBUILDABLE[model_type])
    row = try_architecture(model_type)
    assert "\n" not in row.refusal
    assert row.refusal or row.passes or model_type in FAILING, row.results
