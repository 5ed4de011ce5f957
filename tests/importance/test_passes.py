"""A pass begins where the blocks run: in the model's forward, in a part of it, or in somebody else's loop."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, set_seed
from transformers.models.auto.configuration_auto import AutoConfig

import layershed as ls
from layershed.importance.tracker import ImportanceTracker
from tests.support.models import build_model
from tests.support.seq2seq import batch, by_hand, seq2seq


def tracked(model, run, *batches, **options):
    with torch.no_grad(), ImportanceTracker(model, **options) as tracker, tracker.measuring():
        for inputs in batches:
            run(model, inputs)
    return tracker


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_and_decoder_called_by_hand_give_the_scores_of_the_model(family):
    model, batches = seq2seq(family), [batch(0), batch(1, padding=(0, 4)), batch(2, rows=4, padding=(5, 0))]
    expected = tracked(model, lambda model, inputs: model(**inputs), *batches).compute()
    tracker = tracked(model, by_hand, *batches)
    scores = tracker.compute()
    assert dict(scores) == pytest.approx(dict(expected), rel=1e-5)
    assert scores.blocks == pytest.approx(expected.blocks, rel=1e-5)
    assert (scores.tokens, tracker.left_out) == (expected.tokens, None)
    assert tracker.state_dict()["passes"][-1] == 3, "encoder and decoder are one pass"


def test_nan_in_an_encoder_called_by_hand_leaves_its_decoder_out_too():
    model = seq2seq()
    expected = tracked(model, by_hand, batch(0)).compute()
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = math.nan
    good, bad = batch(0), batch(1)
    for inputs in (good, bad):
        for name in ("input_ids", "decoder_input_ids"):
            inputs[name] = inputs[name].masked_fill(inputs[name] == 95, 5)
    expected = tracked(model, by_hand, good).compute()
    bad["input_ids"][1, 4] = 95
    tracker = tracked(model, by_hand, bad, good, bad)
    assert tracker.compute() == expected
    assert (tracker.skipped.count, tracker.skipped.passes) == (2, 3)


def test_inner_model_called_by_hand_gives_the_scores_of_the_model():
    model = build_model("llama")
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    expected = ls.estimate_importance(model, [{"input_ids": ids, "attention_mask": mask}])
    positional = tracked(model, lambda model, _: model.model(ids, mask), None)
    named = tracked(model, lambda model, _: model.model(attention_mask=mask, input_ids=ids), None)
    for tracker in (positional, named):
        assert dict(tracker.compute()) == pytest.approx(dict(expected), rel=1e-6)
        assert tracker.compute().tokens == expected.tokens == mask.sum()


def test_blocks_called_by_hand_twice_are_two_passes_under_their_own_mask():
    model = build_model("llama")
    ids, real = batch()["input_ids"], batch()["attention_mask"].bool()
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & real[:, None, None, :]

    def loop(model, ids):
        states = model.model.embed_tokens(ids)
        positions = torch.arange(9)[None]
        rotary = model.model.rotary_emb(states, positions)
        for block in model.model.layers:
            states = block(hidden_states=states, attention_mask=causal, position_embeddings=rotary)
        return states

    batches = [{"input_ids": each, "attention_mask": causal} for each in (ids, ids.flip(0))]
    expected = ls.estimate_importance(model, batches)
    tracker = tracked(model, loop, ids, ids.flip(0))
    assert dict(tracker.compute()) == pytest.approx(dict(expected), rel=1e-5)
    assert tracker.compute().tokens == expected.tokens == 2 * real.sum()
    assert tracker.state_dict()["passes"][-1] == 2


class Skipping(nn.Module):
    """Somebody's block that runs only in every second pass."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, states, **kwargs):
        self.calls += 1
        return self.block(states, **kwargs) if self.calls % 2 else states


@pytest.mark.parametrize("skipped", [(1,), (0, 3), (0, 1, 2, 3)])
def test_block_that_a_wrapper_skips_in_some_passes_is_measured_in_the_others(skipped, monkeypatch):
    model = build_model("llama")
    batches = [{"input_ids": batch(seed)["input_ids"]} for seed in range(4)]
    with ImportanceTracker(model) as tracker:
        layers = nn.ModuleList(
            Skipping(block) if place in skipped else block for place, block in enumerate(model.model.layers)
        )
        monkeypatch.setattr(model.model, "layers", layers)
        seen = {}
        for place, block in enumerate(model.model.layers):
            inner = block.block if place in skipped else block
            inner.register_forward_hook(
                lambda _m, args, out, place=place: seen.setdefault(place, []).append((args[0], out))
            )
        tracker.start()
        with torch.no_grad():
            for inputs in batches:
                model(**inputs, use_cache=False)
        scores = tracker.compute()
    for place, calls in seen.items():
        assert len(calls) == (2 if place in skipped else 4)
        values = [1 - cosine_similarity(x.double(), y.double(), dim=-1) for x, y in calls]
        assert scores.blocks[place] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4), place
    assert tracker.left_out is None
    assert len(scores) == 8


@pytest.mark.parametrize("seed", [0, 1, 4, 5])
def test_layerdrop_leaves_out_the_blocks_that_did_not_run(seed):
    model = seq2seq(encoder_layerdrop=0.5, decoder_layerdrop=0.5).train()
    set_seed(seed)
    ran = {}
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    for place, block in enumerate(layers):
        block.register_forward_hook(lambda _m, args, out, place=place: ran.update({place: (args, out)}))
    tracker = tracked(model, lambda model, inputs: model(**inputs), batch())
    ran = {place: seen for place, seen in ran.items() if seen[1].shape[1] > 4}  # the probe has four tokens
    assert 0 < len(ran) < 6
    scores = tracker.compute()
    assert {sublayer.block for sublayer in scores} == set(ran) == set(scores.blocks)
    missing = {name.split(".")[1] for name in tracker.left_out.names}
    assert missing == {str(place) for place in range(6)} - {str(place) for place in ran}


def test_layerdrop_of_every_block_is_no_pass_and_the_next_one_has_its_own_mask():
    model = seq2seq(encoder_layerdrop=1.0, decoder_layerdrop=0.0).train()
    tracker = tracked(model, lambda model, inputs: model(**inputs), batch(0), batch(1, rows=4, padding=(0, 5)))
    assert {sublayer.block for sublayer in tracker.compute()} == {3, 4, 5}
    assert tracker.compute().tokens == 14 - 2 + 28 - 5


def test_speech_model_reads_the_mask_of_its_frames():
    """160 samples make one frame: the mask of samples fits no frame, that of the encoder does."""
    config = AutoConfig.for_model(
        "wav2vec2",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        layerdrop=0.5,
    )
    set_seed(0)
    model = AutoModel.from_config(config).eval()
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[0, 250:] = 0
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(kwargs.get("attention_mask", args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    scores = ls.estimate_importance(model, [{"input_values": sound, "attention_mask": mask}])
    frames = seen[-1]
    assert frames.ndim == 2
    assert scores.tokens == frames.sum() < frames.numel()
    again = ls.estimate_importance(copy.deepcopy(model), [{"input_values": sound}])
    assert again.tokens == frames.numel()
    model.train()
    set_seed(2)
    tracker = tracked(model, lambda model, inputs: model(**inputs), {"input_values": sound, "attention_mask": mask})
    assert tracker.compute().tokens == frames.sum()


def test_tracker_that_is_not_strict_leaves_out_an_unreadable_mask():
    model, inputs = build_model("llama"), {"input_ids": batch()["input_ids"]}
    mask = torch.ones(2, 1, 9, 9).tril()
    expected = tracked(model, lambda model, inputs: model(**inputs), inputs).compute()
    tracker = tracked(
        model, lambda model, inputs: model(**inputs), {**inputs, "attention_mask": mask}, inputs, strict=False
    )
    assert tracker.compute() == expected
    assert "floats of 0 and 1" in str(tracker.left_out)
