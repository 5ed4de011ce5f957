"""What runs in the place of a dropped module: what it returns, and what the KV cache sees of it."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

from layershed.planning.plan import Sublayer
from layershed.stand_ins.stand_in import RemovedModule, StandIn, advance_cache, first_tensor
from tests.support.versions import needs

SUBLAYER = Sublayer(0, "attention", "model.layers.0.self_attn")


def zeros(**kwargs):
    return StandIn(SUBLAYER, zero=True, **kwargs)


def pass_through(**kwargs):
    return StandIn(SUBLAYER, zero=False, **kwargs)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_first_tensor_is_taken_by_position_before_keyword():
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor((None, a, b), {"c": b}) is a
    assert first_tensor((), {"mask": None, "hidden_states": a, "other": b}) is a
    assert first_tensor((3,), {"hidden_states": b}) is b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stand_in_returns_zeros_of_the_shape_and_dtype_of_the_hidden_states(hidden, dtype):
    given = zeros()(hidden.to(dtype))
    assert given.dtype == dtype
    assert torch.equal(given, torch.zeros(2, 5, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("argument", "args", "names"),
    [(0, "xy", ""), (1, "yx", ""), ("x", "y", "x"), ("x", "", "yx"), (0, "x", "y")],
)
def test_stand_in_takes_the_hidden_states_from_their_argument(hidden, argument, args, names):
    tensors = {"x": hidden, "y": torch.ones(2, 5, 3)}
    call = [tensors[name] for name in args], {name: tensors[name] for name in names}
    assert pass_through(argument=argument)(*call[0], **call[1]) is hidden
    assert zeros(argument=argument)(*call[0], **call[1]).shape == hidden.shape


@pytest.mark.parametrize("argument", [0, 2, "hidden_states"])
def test_stand_in_takes_the_first_tensor_if_its_argument_is_absent(hidden, argument):
    """A block that gives by name at training time what it gave by position when it was looked at."""
    assert pass_through(argument=argument)(None, x=hidden, y=torch.ones(1)) is hidden


def test_stand_in_returns_a_tensor_or_a_tuple_as_its_module_does(hidden):
    assert isinstance(zeros()(hidden), torch.Tensor)
    first, *rest = zeros(echoes=(None, None))(hidden, attention_mask=None)
    assert torch.equal(first, torch.zeros_like(hidden))
    assert rest == [None, None]
    assert zeros(echoes=())(hidden)[1:] == ()
    assert type(zeros(echoes=())(hidden)) is tuple


def test_stand_in_echoes_return_their_arguments_unchanged(hidden):
    bias, extra = torch.ones(3), torch.ones(4)
    returned = pass_through(echoes=("bias", None, 1, 7, "absent"))(hidden, extra, bias=bias)
    assert returned[0] is hidden
    assert returned[1] is bias
    assert returned[3] is extra
    assert [returned[place] for place in (2, 4, 5)] == [None, None, None]


def test_stand_in_of_a_module_that_returns_a_list_returns_a_list(hidden):
    returned = pass_through(echoes=(None,), as_list=True)(hidden)
    assert type(returned) is list
    assert returned[0] is hidden
    assert returned[1:] == [None]


def test_zero_stand_in_allocates_one_element_unless_its_output_is_written_to(hidden):
    assert zeros()(hidden).untyped_storage().nbytes() == hidden.element_size()
    own = zeros(materialize=True)(hidden)
    own += hidden  # Falcon adds in place
    assert torch.equal(own, hidden)


@pytest.mark.parametrize("keyword", ["past_key_values", "layer_past", None])
def test_dropped_attention_advances_the_cache_from_any_argument(hidden, keyword):
    cache = DynamicCache()
    for part, length in ((hidden, 5), (hidden[:, :1], 6)):
        given = ((cache,), {}) if keyword is None else ((), {keyword: cache})
        zeros(echoes=(None,), layer_idx=0)(part, *given[0], **given[1])
        assert cache.get_seq_length() == length


def test_dropped_attention_counts_tokens_of_hidden_states_and_not_of_the_mask(hidden):
    cache = DynamicCache()
    zeros(argument="hidden_states", layer_idx=0)(torch.ones(2, 1, 5, 5), cache, hidden_states=hidden)
    assert cache.get_seq_length() == 5
    assert cache.layers[0].keys.shape[0] == 2


def test_dropped_mlp_does_not_change_the_cache(hidden):
    cache = DynamicCache()
    zeros(layer_idx=None)(hidden, past_key_values=cache)
    zeros(layer_idx=0)(hidden, past_key_values=None)
    assert cache.get_seq_length() == 0


def test_advancing_the_cache_moves_only_the_given_layer(hidden):
    cache = DynamicCache()
    keys = torch.randn(2, 4, 3, 6)
    cache.update(keys, keys, 0)
    advance_cache(cache, 1, hidden, 5)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (3, 5)
    assert torch.equal(cache.layers[0].keys, keys)


def test_advanced_dynamic_cache_allocates_one_element_for_all_tokens(hidden):
    cache = DynamicCache()
    for _ in range(3):
        advance_cache(cache, 0, hidden, 5)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 15
    assert [t.untyped_storage().nbytes() for t in (layer.keys, layer.values)] == [hidden.element_size()] * 2


def test_dropped_attention_advances_only_the_self_attention_part_of_an_encoder_decoder_cache(hidden):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    zeros(layer_idx=0)(hidden, past_key_values=cache)
    assert cache.self_attention_cache.get_seq_length() == 5
    assert cache.cross_attention_cache.get_seq_length() == 0


def static_cache():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=9
    )
    return StaticCache(config=config, max_cache_len=16)


def test_dropped_attention_advances_a_static_cache_as_real_keys_do(hidden):
    cache, reference = static_cache(), static_cache()
    for part, at in ((hidden, torch.arange(5)), (hidden[:, :1], torch.tensor([5]))):
        zeros(layer_idx=0)(part, past_key_values=cache)
        keys = torch.ones(2, 2, part.shape[1], 8)
        reference.update(keys, keys, 0, {"cache_position": at})  # transformers 4.57 asks for the position
        assert int(cache.get_seq_length()) == int(reference.get_seq_length())
    assert int(cache.get_seq_length()) == 6


@needs("transformers", "5.0", "a static cache has one size for both")
def test_advanced_static_cache_keeps_different_sizes_of_keys_and_values(hidden):
    """Multi-head latent attention: keys of size 12, values of size 8."""
    cache = static_cache()
    cache.update(torch.ones(2, 4, 3, 12), torch.ones(2, 4, 3, 8), 0)
    advance_cache(cache, 0, hidden, 5)
    layer = cache.layers[0]
    assert int(cache.get_seq_length()) == 8
    assert (layer.keys.shape, layer.values.shape) == ((2, 4, 16, 12), (2, 4, 16, 8))
    assert torch.equal(layer.keys[:, :, :3], torch.ones(2, 4, 3, 12))
    assert not layer.values[:, :, 3:].any()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.ones(3))
        self.is_causal, self.layer_idx, self.scaling, self.name = True, 3, 0.5, "own"
        self.config = object()
        self._private = 1


def test_removed_module_keeps_plain_attributes_and_no_weights(hidden):
    module = Attention().eval()
    removed = RemovedModule(zeros(), module)
    assert (removed.is_causal, removed.layer_idx, removed.scaling, removed.name) == (True, 3, 0.5, "own")
    assert removed._private == 1  # torch's encoder layer asks its attention for one
    assert not any(hasattr(removed, name) for name in ("projection", "frequencies", "config"))
    assert removed.state_dict() == {}
    assert torch.equal(removed(hidden), torch.zeros_like(hidden))


def test_removed_module_returns_what_its_stand_in_returns(hidden):
    removed = RemovedModule(pass_through(argument="x", echoes=("bias",)), Attention())
    bias = torch.ones(1)
    first, second = removed(torch.zeros(1), x=hidden, bias=bias)
    assert first is hidden
    assert second is bias
    assert RemovedModule(zeros())(hidden).shape == hidden.shape


def test_repr_of_a_removed_module_names_its_sublayer():
    assert repr(RemovedModule(zeros(), Attention())) == "RemovedModule(attention.0, removed)"
    # of a folder that loads without layershed
    assert repr(RemovedModule(StandIn("mlp.2", zero=True))) == "RemovedModule(mlp.2, removed)"
