"""Padded tokens do not count, in whatever shape a model passes its tokens on: 1 - cos over the others, by hand."""

import pytest
import torch
from torch import nn

import layershed as ls
from tests.support.architectures import tiny_model
from tests.support.conformance import Case
from tests.support.thinned import crossed

# how X comes by: (batch, tokens, hidden), flattened in the MLP, tokens first, several streams, experts flattened
# of hy_v4 the first attention cannot be dropped, the others can
pytestmark = pytest.mark.filterwarnings("ignore:HYV4ForCausalLM. attention of block 0 is left alone:UserWarning")
MODEL_TYPES = ("llama", "bert", "opt", "xlnet", "hy_v4", "mixtral", "granitemoeshared", "minimax")


@pytest.mark.default_cases(4)
@pytest.mark.parametrize(("model_type", "side"), crossed(MODEL_TYPES, ("left", "right")))
def test_importance_of_padded_sequences_leaves_padding_out(model_type, side):
    case = Case(tiny_model(model_type))
    if model_type == "xlnet":
        case.model.transformer.attn_type = "bi"  # transformers 5.23 cannot mask the padding of the other one
    mask = torch.ones_like(case.tokens)
    mask[0, slice(0, 4) if side == "left" else slice(6, None)] = 0
    inputs = {"input_ids": case.tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    seen = {}
    for index, tap in enumerate(case.anatomy.blocks):

        def note(_module, args, kwargs, output, index=index, key=tap.key):
            x = args[key] if isinstance(key, int) else kwargs[key]
            seen[index] = x, output[0] if isinstance(output, tuple | list) else output

        case.model.get_submodule(tap.path).register_forward_hook(note, with_kwargs=True)
    scores = ls.estimate_importance(case.model, [inputs])
    for index, (x, y) in seen.items():
        counts = mask.bool().T if model_type == "xlnet" else mask.bool()
        plain = 1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)[counts].mean().item()
        assert scores.blocks[index] == pytest.approx(plain, abs=2e-6), index
    assert scores.tokens == mask.sum().item() * (4 if model_type == "hy_v4" else 1)


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_importance_of_a_sublayer_compares_its_input_with_its_output(model_type):
    """From the two places where a branch says that X and Y, or b, can be read."""
    case = Case(tiny_model(model_type))
    seen = {}

    def take(name, tap):
        module = case.model.get_submodule(tap.path)
        if tap.key is None:
            module.register_forward_hook(
                lambda _m, _a, out: seen.update({name: (out[0] if isinstance(out, tuple) else out).clone()})
            )
        else:
            module.register_forward_pre_hook(
                lambda _m, args, kwargs: seen.update(
                    {name: (args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key]).clone()}
                ),
                with_kwargs=True,
            )

    for branch in case.anatomy.branches:
        take((branch.sublayer, "x"), branch.entry)
        take((branch.sublayer, "out"), branch.exit)
    scores = ls.estimate_importance(case.model, [{"input_ids": case.tokens}])
    for branch in case.anatomy.branches:
        x = seen[branch.sublayer, "x"].double()
        out = seen[branch.sublayer, "out"].double().view_as(x)
        y = out if branch.scale is None else x + branch.scale * out
        plain = 1 - nn.functional.cosine_similarity(x, y, dim=-1).mean().item()
        assert scores[branch.sublayer] == pytest.approx(plain, abs=2e-6), branch.sublayer


def test_importance_of_packed_sequences_leaves_the_padding_at_their_ends_out():
    case = Case(tiny_model("llama"))
    lengths = (3, 5)  # of two conversations, then two tokens of padding
    ids = case.tokens[:1, :8]
    packed = torch.cat([ids, ids.new_zeros(1, 2)], 1)
    places = torch.tensor([[*range(lengths[0]), *range(lengths[1]), 0, 0]])
    scores = ls.estimate_importance(case.model, [{"input_ids": packed, "position_ids": places}])
    alone = [{"input_ids": part} for part in ids.split(lengths, 1)]
    expected = ls.estimate_importance(case.model, alone)
    assert scores.tokens == expected.tokens == sum(lengths)
    assert scores == pytest.approx(expected, rel=1e-4)
