"""Sublayers that are left alone while their neighbours are found deserve one warning wherever a plan is made."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import layershed as ls
from layershed.callbacks import SublayerDrop
from layershed.discovery.uneven import Part, uneven, warn_left_alone
from layershed.importance.tracker import ImportanceTracker
from tests.support.models import build_model
from tests.support.runs import Foreign, loader

IDS = torch.arange(1, 9)[None]
MIXES = "it mixes tokens without attention"


def mixing(self, hidden):
    """An MLP with a token shift."""
    return LlamaMLP.forward(self, hidden) + hidden.roll(1, 1)


def odd(*blocks):
    """A model whose MLPs of some blocks mix tokens."""
    model = build_model()
    for block in blocks:
        mlp = model.model.layers[block].mlp
        mlp.forward = mixing.__get__(mlp)
    return model


USES = {
    "drop_sublayers": lambda model: ls.drop_sublayers(model, [IDS], count=1),
    "estimate_importance": lambda model: ls.estimate_importance(model, [IDS]),
    "tracker": ImportanceTracker,
    "by hand": warn_left_alone,
}


@pytest.mark.parametrize("use", USES)
def test_making_a_plan_warns_of_sublayers_that_are_left_alone_unlike_their_neighbours(use):
    with pytest.warns(UserWarning, match=rf"MLPs of blocks 1 and 3 are left alone \({MIXES}\), while those of other"):
        USES[use](odd(1, 3))


def test_warning_comes_once_for_a_model_and_a_state():
    model = odd(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            ls.estimate_importance(model, [IDS])
        assert [str(each.message).count("MLPs of block 1 are") for each in seen] == [1]
        mlp = model.model.layers[2].mlp
        mlp.forward = mixing.__get__(mlp)
        ls.estimate_importance(model, [IDS])
    assert "MLPs of blocks 1 and 2 are" in str(seen[-1].message)
    assert len(seen) == 2


@pytest.mark.parametrize("blocks", [(), (0, 1, 2, 3)], ids=["none", "all"])
def test_equal_blocks_are_no_reason_to_warn(blocks):
    ls.estimate_importance(odd(*blocks), [IDS])  # every warning is an error here


HYBRIDS = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mixtral": {},
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_hybrids_are_no_reason_to_warn(model_type):
    model = build_model(model_type, **HYBRIDS[model_type])
    warn_left_alone(model)
    assert bool(ls.find_left_alone(model)) == (model_type != "mixtral")


def test_callback_warns_before_the_first_step(make_trainer):
    module = Foreign()
    for mlp in [module.net.model.layers[1].mlp]:
        mlp.forward = mixing.__get__(mlp)
    seen = []

    class First(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(str(each.message) for each in told)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        drop = SublayerDrop(2, count=1, calibrate_on="train", quality_batches=0)
        make_trainer(drop, First(), max_steps=3).fit(module, loader())
    assert sum("MLPs of block 1 are left alone" in each for each in seen) == 1


def test_comparison_needs_the_same_make_in_another_block():
    found = [Part(0, "a", "attention"), Part(0, "m", "mlp"), Part(2, "m", "mlp")]
    assert uneven(found, [Part(1, "m", "r")]) == [
        "MLPs of block 1 are left alone (r), while those of other blocks can be dropped"
    ]
    assert uneven(found, [Part(1, "other", "r"), Part(0, "a", "r")]) == []
    assert uneven(found, [Part(3, "m", "r"), Part(1, "a", "q"), Part(1, "m", "r")]) == [
        "MLPs of blocks 1 and 3 are left alone (r), while those of other blocks can be dropped",
        "attention of block 1 is left alone (q), while that of other blocks can be dropped",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("use", ["tracker", "by hand"])
def test_mlps_that_torch_quantized_dynamically_are_left_alone_with_a_warning(use):
    model = torch.ao.quantization.quantize_dynamic(build_model(), {torch.nn.Linear})
    assert {sublayer.kind for sublayer in ls.find_sublayers(model)} == {"attention"}
    with pytest.warns(UserWarning, match="4 parts are left alone, such as .* because torch.s dynamic quantization"):
        USES[use](model)


def test_dynamically_quantized_head_is_no_reason_to_warn():
    model = build_model()
    model.lm_head = torch.nn.Linear(32, 97)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {"lm_head"})
    assert "dynamic" in type(model.lm_head).__module__
    warn_left_alone(model)
