"""Layers written by hand can take out each branch themselves: a bypass must give the same."""

import pytest
import torch

from layershed.discovery.branches import LeftAlone
from layershed.discovery.find import dissect, find_left_alone, find_sublayers
from layershed.errors import NoSublayersFoundError, UnprovenStructureError
from layershed.surgery import bypass, restore
from tests.support.thinned import some_of
from tests.support.tricky_layers import (
    ActivationInPlace,
    AddsAndScalesInside,
    AddsToALaterX,
    Chained,
    Concatenated,
    DivisorOfZero,
    Doubled,
    Flattened,
    GatedLinearUnit,
    Interpolated,
    NormInPlace,
    Transposed,
    WithoutResidual,
    XFromElsewhere,
)
from tests.support.written_layers import (
    BLOCKS,
    AddsInside,
    Exponential,
    Faithful,
    Gated,
    InnerSum,
    InPlace,
    Mixer,
    MlpFirst,
    MlpTwice,
    NormTwice,
    Parallel,
    PostNorm,
    PostNormForTwo,
    ScaledByTensor,
    ScaledMlp,
    ScaledX,
    SecondMlp,
    SideBySide,
    Subtracted,
    TwoModules,
    WithoutMlp,
    logits,
    written,
)

# what each must be found to have: kind to (module, scale)
ATTENTION, MLP = ("self_attn", 1.0), ("mlp", 1.0)
WRITTEN = {
    Faithful: {"attention": ATTENTION, "mlp": MLP},
    ScaledMlp: {"attention": ATTENTION, "mlp": ("mlp", 0.9)},
    ScaledX: {"attention": ATTENTION, "mlp": MLP},
    Subtracted: {"attention": ("self_attn", -1.0), "mlp": ("mlp", -1.0)},
    InPlace: {"attention": ATTENTION, "mlp": MLP},
    ScaledByTensor: {"attention": ATTENTION, "mlp": ("mlp", None)},
    Gated: {"attention": ATTENTION, "mlp": ("mlp", None)},
    Parallel: {"attention": ("self_attn", 0.5), "mlp": ("mlp", 0.5)},
    MlpFirst: {"mlp": MLP, "attention": ATTENTION},
    WithoutMlp: {"attention": ATTENTION},
    MlpTwice: {"attention": ATTENTION},
    NormTwice: {"attention": ATTENTION},
    Exponential: {"attention": ATTENTION},
    SecondMlp: {"attention": ATTENTION, "mlp": MLP},
    SideBySide: {"attention": ATTENTION, "mlp": ("mlp", None)},
    TwoModules: {"attention": ATTENTION, "mlp": ("fc2", 1.0)},
    Mixer: {"attention": ATTENTION},
    InnerSum: {"attention": ATTENTION},
    AddsInside: {"attention": ATTENTION, "mlp": ("out", 1.0)},
    PostNorm: {"attention": ("self_attn", None), "mlp": ("mlp", None)},
    PostNormForTwo: {"attention": ATTENTION, "mlp": MLP},
}
by_hand = pytest.mark.parametrize("layer_class", WRITTEN)


@by_hand
def test_exactly_the_droppable_branches_of_a_written_layer_are_found(layer_class):
    found = [
        (b.sublayer.block, b.sublayer.kind, b.sublayer.path, b.scale) for b in dissect(written(layer_class)).branches
    ]
    assert [entry[:3] for entry in found] == [
        (i, kind, f"model.layers.{i}.{module}")
        for i in range(BLOCKS)
        for kind, (module, _) in WRITTEN[layer_class].items()
    ]
    assert [entry[3] for entry in found] == [
        scale and pytest.approx(scale) for _ in range(BLOCKS) for _, scale in WRITTEN[layer_class].values()
    ]


@pytest.mark.parametrize("layer_class", some_of(WRITTEN, 2))
def test_bypassed_branch_of_a_written_layer_equals_the_branch_times_zero(layer_class, tokens):
    """The layer takes its branch out itself, so the reference is independent of discovery."""
    model, reference = written(layer_class), written(layer_class)
    before = logits(model, tokens)
    for sublayer in find_sublayers(model):
        layer = reference.model.layers[sublayer.block]
        layer.off = {sublayer.kind}
        expected = logits(reference, tokens)
        layer.off = frozenset()
        bypass(model, [sublayer])
        assert torch.allclose(logits(model, tokens), expected, atol=1e-5), sublayer
        assert not torch.allclose(before, expected, atol=1e-2), sublayer
        restore(model)
        assert torch.equal(logits(model, tokens), before)
    for layer in reference.model.layers:
        layer.off = {sublayer.kind for sublayer in find_sublayers(model)}
    bypass(model, find_sublayers(model))
    assert torch.allclose(logits(model, tokens), logits(reference, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("layer_class", "plain"),
    [
        *((layer_class, True) for layer_class in (Faithful, ScaledMlp, InPlace, Parallel)),
        *((layer_class, False) for layer_class in (ScaledX, PostNorm, SecondMlp, Mixer, MlpTwice)),
    ],
)
def test_block_is_plain_if_dropping_all_of_it_leaves_x(layer_class, plain):
    assert dissect(written(layer_class)).plain == (frozenset(range(BLOCKS)) if plain else frozenset())


@pytest.mark.parametrize(
    ("layer_class", "path", "reason"),
    [
        (SecondMlp, "adapter", "its block has another mlp before it"),
        (Mixer, "mlp", "it mixes tokens without attention"),
        (MlpTwice, "mlp", "model.layers.0.mlp ran more than once in a forward pass"),
        (NormTwice, "mlp", "no module takes its X"),
        (Exponential, "mlp", "exp comes between it and the stream"),
        (InnerSum, "mlp", "add comes between it and the stream"),
    ],
)
def test_undroppable_branch_is_left_alone_with_its_reason(layer_class, path, reason):
    left_alone = find_left_alone(written(layer_class))
    assert list(dict.fromkeys(left_alone)) == [
        LeftAlone(f"model.layers.{i}.{path}", reason.replace("layers.0", f"layers.{i}")) for i in range(BLOCKS)
    ]


@pytest.mark.parametrize("layer_class", [XFromElsewhere, Chained])
def test_branches_that_need_each_other_cannot_be_dropped(layer_class):
    with pytest.raises(NoSublayersFoundError, match=r"no sublayer to drop\. For example, model\.layers\.0\.\w+: "):
        find_sublayers(written(layer_class))


@pytest.mark.parametrize("layer_class", [Interpolated, Concatenated, WithoutResidual, Doubled])
def test_block_whose_output_is_no_sum_is_refused_by_name(layer_class):
    with pytest.raises(UnprovenStructureError, match=r"^model\.layers\.0: Y = X \+ f\(norm\(X\)\) does not hold \("):
        find_sublayers(written(layer_class))


# what would go wrong with each if it were not tried before it is handed out
TRICKY = {
    NormInPlace: "the stream is handed on to an in-place operation",
    ActivationInPlace: "the stream is handed on to an in-place operation",
    GatedLinearUnit: "RuntimeError: zeros of another width",
    AddsAndScalesInside: "hands on X, not what the module makes of it",
    AddsToALaterX: "hands on the X that the branch reads, not the one that it is added to",
    Flattened: "RuntimeError: zeros of the shape of what came in",
    Transposed: "RuntimeError: zeros of the shape of what came in",
    DivisorOfZero: "divides by zero",
}


@pytest.mark.parametrize(
    "layer_class",
    [pytest.param(c, id=f"{c.__name__}: {why}") for c, why in TRICKY.items()],
)
def test_tricky_branch_equals_the_branch_times_zero_or_is_not_found(layer_class, tokens):
    model, reference = written(layer_class), written(layer_class)
    found = [sublayer for sublayer in find_sublayers(model) if sublayer.kind == "mlp"]
    for layer in reference.model.layers[: len(found)]:
        layer.off = {"mlp"}
    if found:
        bypass(model, found)
    assert torch.allclose(logits(model, tokens), logits(reference, tokens), atol=1e-5)
