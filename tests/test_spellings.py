"""The names of transformers that differ between versions."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from layershed.callbacks import SpeedMonitor, SublayerDrop
from layershed.discovery.find import find_sublayers
from layershed.errors import MeasurementError, StandInError, UnprovenStructureError
from layershed.performance.forward import ForwardReport
from layershed.performance.speed import measure_speed
from layershed.spellings import cache_in, cache_name, layer_overrides
from layershed.surgery import bypass
from tests.support.models import SIZES, build_model
from tests.support.runs import Foreign, fit_foreign


def takes_cache(input_ids, cache=None, use_cache=None): ...
def takes_past(input_ids, past_key_values=None, use_cache=None): ...
def takes_params(input_ids, cache_params=None, use_cache=None): ...
def takes_unknown(input_ids, kv_store=None, use_cache=None, **kwargs): ...
def takes_none(pixel_values): ...


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (takes_cache, "cache"),
        (takes_past, "past_key_values"),
        (takes_params, "cache_params"),
        (takes_unknown, None),
        (takes_none, None),
    ],
)
def test_cache_argument_is_known_under_every_spelling(function, name):
    assert cache_name(function) == name


def test_function_of_any_keyword_takes_the_cache_as_this_version_spells_it():
    own = next(name for name in ("cache", "past_key_values") if name in BaseModelOutputWithPast.__dataclass_fields__)
    assert cache_name(lambda **kwargs: None) == cache_name(build_model().forward) == own


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_cache_in_an_output_is_found_under_every_spelling(name):
    cache = DynamicCache()
    assert cache_in({"logits": 1, name: cache}) is cache
    assert cache_in(type("Output", (), {name: cache})()) is cache
    assert cache_in({name: None}) is None


def test_cache_of_a_real_output_is_found_without_a_warning(llama, tokens):
    assert cache_in(llama(input_ids=tokens, use_cache=True)).get_seq_length() == tokens.shape[1]
    assert cache_in(llama(input_ids=tokens, use_cache=False)) is None


class Renamed(LlamaForCausalLM):
    """As of a later transformers, or of a model of one's own, that calls the cache something else."""

    def forward(self, input_ids, attention_mask=None, kv_store=None, use_cache=None):
        given = {cache_name(super().forward): kv_store, "attention_mask": attention_mask}
        return super().forward(input_ids=input_ids, use_cache=use_cache, **given)


class Hidden(Renamed):
    """Its cache is no Cache of transformers, and nothing shows it."""

    def forward(self, input_ids, kv_store=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=False)


def test_cache_under_an_unknown_name_is_decoded_exactly_if_it_is_one_of_transformers(tokens):
    torch.manual_seed(0)
    model = Renamed(LlamaConfig(**SIZES)).eval()
    bypass(model, find_sublayers(model)[:1])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :6], kv_store=cache, use_cache=True)
        cached = model(tokens[:, 6:], kv_store=cache, use_cache=True).logits
        torch.testing.assert_close(cached, model(tokens, use_cache=False).logits[:, 6:])


class HiddenBackbone(LlamaModel):
    """The same in a model that does not generate; only one value more shows its cache."""

    def forward(self, input_ids, kv_store=None, use_cache=None):
        states = super().forward(input_ids=input_ids, use_cache=False).last_hidden_state
        return (states, (torch.ones(1),)) if use_cache else (states,)


@pytest.mark.parametrize("kind", [Hidden, HiddenBackbone])
def test_hidden_cache_under_an_unknown_name_is_a_typed_error(kind):
    with pytest.raises(UnprovenStructureError, match=r"takes use_cache, but no KV cache under a known name \(cache, "):
        find_sublayers(kind(LlamaConfig(**SIZES)).eval())


def test_decoding_from_a_cache_under_an_unknown_name_is_a_typed_error():
    model = Renamed(LlamaConfig(**SIZES)).eval()
    bypass(model, find_sublayers(model)[:1])
    with pytest.raises(MeasurementError, match=r"takes no KV cache under a known name \(cache, past_key_values, "):
        measure_speed(model, prompt_tokens=4, new_tokens=2, runs=2)


@pytest.mark.filterwarnings("ignore:.*eval mode at the start of training")
def test_fit_with_a_cache_under_an_unknown_name_measures_without_it_and_warns_once(make_trainer):
    module, speed = Foreign(), SpeedMonitor(runs=6)
    module.net = Renamed(LlamaConfig(**SIZES))
    drop = SublayerDrop(2, count=2, calibration_batches=1, quality_batches=1)
    with pytest.warns(
        UserWarning, match=r"the forward pass instead of decoding.*no KV cache under a known name"
    ) as told:
        fit_foreign(make_trainer(drop, speed, max_steps=4), module)
    assert sum("instead of decoding" in str(warning.message) for warning in told) == 1
    assert isinstance(speed.report, ForwardReport)


def test_cache_that_is_not_of_transformers_is_refused_when_it_is_used(tokens):
    class Own(LlamaForCausalLM):
        """Its cache is a tuple."""

        def forward(self, input_ids, past_key_values=None, use_cache=None):
            result = LlamaForCausalLM.forward(self, input_ids=input_ids, use_cache=False)
            return {"logits": result.logits, "past_key_values": ((torch.ones(1),),) if use_cache else None}

    model = Own(LlamaConfig(**SIZES)).eval()
    bypass(model, find_sublayers(model)[:1])
    attention = model.model.layers[0].self_attn
    hidden = torch.zeros(1, 2, SIZES["hidden_size"])
    with pytest.raises(StandInError, match=r"its slot is unknown\. Use use_cache=False"):
        attention(hidden_states=hidden, past_key_values=((torch.ones(1),),))
    assert not attention(hidden_states=hidden)[0].any()


def test_fields_of_single_layers_are_read_alike_from_every_config():
    config = LlamaConfig(**SIZES, per_layer_config={"1": {"skip": ["mlp"]}, "2": {"skip": []}})
    assert layer_overrides(config) == {1: {"skip": ["mlp"]}}
    plain = type("Config", (), {})()  # as transformers before 5.14 keeps the field
    plain.per_layer_config = {"1": {"skip": ["mlp"]}}
    assert layer_overrides(plain) == {1: {"skip": ["mlp"]}}
    for broken in ([1], {"x": {}}, {"0": {"skip": "mlp"}}, {"0": 5}):
        plain.per_layer_config = broken
        with pytest.raises((TypeError, ValueError)):
            layer_overrides(plain)
