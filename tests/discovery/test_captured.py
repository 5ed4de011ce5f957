"""A config that requests extra outputs changes neither what is found nor what is proven."""

import copy
import pickle

import pytest
import torch
from transformers import BertConfig, BertModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from layershed.discovery.find import dissect, find_left_alone, find_sublayers
from layershed.surgery import bypass
from tests.support.models import build_model
from tests.support.thinned import crossed

EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_requested_router_logits_hide_no_sublayer(family):
    model = build_model(family, **EXPERTS[family])
    plain = dissect(copy.deepcopy(model))
    model.config.output_router_logits = True
    assert dissect(model) == plain
    assert {s.kind for s in find_sublayers(model)} >= {"mlp"}
    assert model.config.output_router_logits is True


def test_requested_router_logits_hide_no_sublayer_of_an_encoder_decoder():
    config = SwitchTransformersConfig(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    plain = dissect(copy.deepcopy(model))
    for module in (model, model.encoder, model.decoder):
        module.config.output_router_logits = True
    assert dissect(model) == plain


FLAGS = (
    ("output_attentions", True),
    ("output_hidden_states", True),
    ("output_hidden_states", [1, -1]),
    ("return_dict", False),
    ("use_cache", False),
)


@pytest.mark.parametrize(("family", "setting"), crossed(("llama", "bart", "gpt2"), FLAGS))
def test_flag_of_a_config_changes_neither_the_sublayers_nor_the_config(family, setting):
    flag, value = setting
    model = build_model(family, attn_implementation="eager") if family != "bart" else build_model(family, d_model=32)
    model.set_attn_implementation("eager")
    plain = dissect(copy.deepcopy(model))
    setattr(model.config, flag, value)
    before = copy.deepcopy(vars(model.config))
    assert dissect(model) == plain
    assert vars(model.config) == before


def test_flag_in_the_config_of_an_encoder_changes_nothing():
    model = BertModel(BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()
    plain = find_sublayers(copy.deepcopy(model)), find_left_alone(copy.deepcopy(model))
    model.config.return_dict, model.config.output_hidden_states = False, True
    assert (find_sublayers(model), find_left_alone(model)) == plain


def test_dropped_mixture_of_experts_trains_with_a_requested_router_loss():
    model = build_model("mixtral", **EXPERTS["mixtral"], output_router_logits=True, router_aux_loss_coef=0.5)
    dropped = [sublayer for sublayer in find_sublayers(model) if sublayer.kind == "mlp"][1:3]
    tokens = torch.arange(1, 9)[None]
    bypass(model, dropped)
    output = model.train()(tokens, labels=tokens)
    output.loss.backward()
    plain = model(tokens, labels=tokens, output_router_logits=False).loss
    assert torch.allclose(output.loss, plain + 0.5 * output.aux_loss)
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    assert model.model.layers[1].mlp.gate.weight.grad is None


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_model_can_still_be_pickled_and_asked_for_attention_weights(family):
    """transformers' hooks for extra outputs cannot be pickled, and come at the first request."""
    model = build_model(family, attn_implementation="eager").eval()
    ids = torch.arange(4)[None] + 3
    dissect(model)
    again = pickle.loads(pickle.dumps(model))
    entries = again(ids, output_attentions=True).attentions
    wanted = build_model(family, attn_implementation="eager").eval()(ids, output_attentions=True).attentions
    torch.testing.assert_close(entries, wanted)
