"""Encoders, vision, speech, encoder-decoders, language towers, plain torch: the same checks as for decoders."""

import functools
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import layershed as ls
from layershed.discovery import registry as adapter
from layershed.discovery.find import dissect
from layershed.errors import CalibrationError, ExportError, MeasurementError
from layershed.spellings import cache_in, cache_name
from tests.support.architectures import tiny_model
from tests.support.conformance import CHECKS, Case

TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {**TEXT, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    **WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
IDS = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
BOTH = {"attention": 3, "mlp": 3}

# class, config class, its fields, inputs, what is found
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", {**TEXT, **WORDS}, {"input_ids": IDS}, BOTH),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**TEXT, **WORDS}, {"input_ids": IDS}, BOTH),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**TEXT, **WORDS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        {"input_ids": IDS},
        BOTH,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURE, {"pixel_values": PIXELS}, BOTH),
    "dinov2": ("Dinov2Model", "Dinov2Config", PICTURE, {"pixel_values": PIXELS}, BOTH),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", PICTURE, {"pixel_values": PIXELS}, BOTH),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]},
        # the first attention of each stack makes the position bias that the others read, and is left alone
        {"attention": 2, "cross_attention": 1, "mlp": 4},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ,
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]},
        {"attention": 4, "cross_attention": 2, "mlp": 4},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8},
        {"input_features": SOUND, "decoder_input_ids": IDS[:, :7]},
        {"attention": 4, "cross_attention": 2, "mlp": 4},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {**PICTURE, "num_hidden_layers": 5, "model_type": "clip_vision_model"},
            "text_config": {**TEXT, **WORDS, "model_type": "llama"},
        },
        {"input_ids": IDS},
        BOTH,
    ),
}


def build(name):
    class_name, config_class, fields, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_class)(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Case(model, inputs)


@functools.cache
def shared(name):
    """One model for all its checks; each check undoes its changes."""
    return build(name)


@pytest.mark.parametrize("name", MODELS)
def test_sublayers_are_found_by_kind(name):
    found = Counter(branch.sublayer.kind for branch in shared(name).anatomy.branches)
    assert found == MODELS[name][-1]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, marks=() if check == "single" or name == "bart" else pytest.mark.slow)
        for name in MODELS
        for check in ("identity", "single", "restore", "several", "training", "reload", "importance")
    ],
)
def test_model_passes_conformance_check(name, check):
    CHECKS[check](shared(name))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cached_generation_of_an_encoder_decoder_equals_uncached(name):
    case = build(name)
    ls.bypass(case.model, [branch.sublayer for branch in case.anatomy.branches[::2]])
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (
        torch.stack(case.model.generate(IDS, attention_mask=mask, use_cache=use, **options).logits)
        for use in (True, False)
    )
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)


def test_decoder_blocks_are_numbered_after_encoder_blocks():
    case = build("bart")
    blocks = {branch.sublayer.path.rsplit(".", 1)[0]: branch.sublayer.block for branch in case.anatomy.branches}
    assert blocks == {
        **{f"model.encoder.layers.{i}": i for i in range(2)},
        **{f"model.decoder.layers.{i}": 2 + i for i in range(2)},
    }


def test_importance_leaves_out_padding_of_encoder_and_decoder():
    """Importances from padded sequences, against 1 - cos over the other tokens alone."""
    case = build("bart")
    masks = {"attention_mask": torch.ones_like(IDS), "decoder_attention_mask": torch.ones_like(IDS[:, :7])}
    masks["attention_mask"][0, 6:] = 0
    masks["decoder_attention_mask"][1, 4:] = 0
    seen = {}
    for stack in ("encoder", "decoder"):
        for i, layer in enumerate(case.model.model.get_submodule(stack).layers):

            def note(_module, args, kwargs, output, key=(stack, i)):
                x = args[0] if args else kwargs["hidden_states"]
                seen[key] = x, output[0] if isinstance(output, tuple) else output

            layer.register_forward_hook(note, with_kwargs=True)
    scores = ls.estimate_importance(case.model, [{**case.inputs, **masks}])
    for (stack, i), (x, y) in seen.items():
        mask = masks["attention_mask" if stack == "encoder" else "decoder_attention_mask"].bool()
        plain = 1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)[mask].mean().item()
        assert scores.blocks[i + 2 * (stack == "decoder")] == pytest.approx(plain, abs=1e-5)


def test_cross_attention_is_a_scope_of_its_own_and_part_of_joint():
    case = build("bart")
    scores = ls.estimate_importance(case.model, [case.inputs])
    crossed = ls.select_sublayers(scores, "cross_attention", count=2)
    assert {sublayer.kind for sublayer in crossed} == {"cross_attention"}
    assert {s.kind for s in ls.select_sublayers(scores, "joint", count=len(scores))} == {
        "attention",
        "cross_attention",
        "mlp",
    }
    assert {s.kind for s in ls.select_sublayers(scores, "attention", count=4)} == {"attention"}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer_encoder_is_dropped_through_an_adapter(norm_first, monkeypatch):
    """In eval mode torch would fuse a whole layer, reading the weights of modules that a bypass replaces."""
    monkeypatch.setattr(adapter, "_REGISTERED", {})
    ls.register_adapter(nn.TransformerEncoder, ls.SublayerAdapter(lambda model: {"src": torch.randn(1, 4, 32)}))
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first), 3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    case = Case(model.eval(), {"src": torch.randn(2, 10, 32)})
    assert Counter(branch.sublayer.kind for branch in case.anatomy.branches) == BOTH
    for check in ("identity", "single", "restore", "several", "importance"):
        CHECKS[check](case)
    ls.bypass(model, [branch.sublayer for branch in case.several])
    bypassed = case.logits()
    ls.remove(model)
    torch.testing.assert_close(case.logits(), bypassed)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_models_without_decoding_refuse_next_token_quality_and_decode_speed(name):
    """A masked language model would give some loss without an error."""
    model = build(name).model
    with pytest.raises(MeasurementError, match="does not predict the next token"):
        ls.evaluate_quality(model, [IDS])
    ls.bypass(model, ls.find_sublayers(model)[:1])
    with pytest.raises(MeasurementError, match="does not predict the next token"):
        ls.measure_speed(model, prompt_tokens=4, new_tokens=2, runs=1)


def test_saving_a_model_outside_hugging_face_as_a_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter, "_REGISTERED", {})
    ls.register_adapter(nn.TransformerEncoder, ls.SublayerAdapter(lambda model: {"src": torch.randn(1, 4, 32)}))
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    with pytest.raises(ExportError, match=r"TransformerEncoder is no Hugging Face model\. Use layershed\.save_weights"):
        ls.save_pretrained(model, tmp_path / "out")


def test_model_with_shared_blocks_is_refused_by_name():
    config = transformers.AlbertConfig(**TEXT, **WORDS, embedding_size=16)
    with pytest.raises(ls.LayershedError, match=r"For example, .*albert_layer_groups\.0: it ran 3 times"):
        dissect(transformers.AlbertForMaskedLM(config).eval())


def test_mask_of_a_speech_model_is_applied_to_frames(monkeypatch):
    """Whisper makes one token of two frames; the last 12 of 32 frames of the first sound are padding."""
    case = build("whisper")
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, 20:] = 0
    seen = {}
    layer = case.model.model.encoder.layers[0]
    layer.register_forward_hook(
        lambda _m, args, kwargs, y: seen.update(x=args[0] if args else kwargs["hidden_states"], y=y), with_kwargs=True
    )
    scores = ls.estimate_importance(case.model, [{**case.inputs, "attention_mask": mask}])
    y = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
    cosine = nn.functional.cosine_similarity(seen["x"], y, dim=-1)
    assert scores.blocks[0] == pytest.approx(1 - torch.cat([cosine[0, :10], cosine[1]]).mean().item(), abs=1e-6)


def test_mask_of_a_wrong_length_is_refused():
    case = build("whisper")
    mask = torch.ones(2, 30, dtype=torch.long)
    with pytest.raises(CalibrationError, match=r"\(2, 30\).*Leave the mask out"):
        ls.estimate_importance(case.model, [{**case.inputs, "attention_mask": mask}])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder_takes_labels_as_decoder_input(name):
    case = build(name)
    labels = IDS[:, :7].clone()
    labels[0, 5:] = -100
    shifted = case.model.prepare_decoder_input_ids_from_labels(labels=labels)
    asked = {"input_ids": IDS, "decoder_input_ids": shifted, "decoder_attention_mask": labels != -100}
    found = ls.estimate_importance(case.model, [{"input_ids": IDS, "labels": labels}])
    assert found == ls.estimate_importance(case.model, [asked])
    with pytest.raises(CalibrationError, match="decoder_input_ids, or labels"):
        ls.estimate_importance(case.model, [{"input_ids": IDS}])


def test_estimating_importance_runs_the_head_model_if_the_body_takes_other_inputs():
    config = transformers.DINOv3ViTConfig(**PICTURE)
    model = transformers.DINOv3ViTModel(config).eval()
    scores = ls.estimate_importance(model, [{"pixel_values": PIXELS}])
    assert len(scores) == len(ls.find_sublayers(model)) == 6


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "jamba", "opt", "mixtral", "bloom", "hy_v4"])
def test_sublayers_found_do_not_depend_on_the_precision(model_type):
    model = tiny_model(model_type)
    assert ls.find_sublayers(model.to(torch.bfloat16)) == ls.find_sublayers(tiny_model(model_type))


def test_cached_decoding_of_switch_transformers_without_attention_is_exact():
    """Its encoder refuses use_cache=True, which a decoder's own config sets."""
    sizes = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_experts=4, **sizes)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ls.bypass(model, [sublayer for sublayer in ls.find_sublayers(model) if sublayer.kind == "attention"])
    tokens = torch.arange(1, 9)[None]
    given = {"encoder_outputs": model.get_encoder()(tokens)}
    expected = model(decoder_input_ids=tokens, use_cache=False, **given).logits
    first = model(decoder_input_ids=tokens[:, :5], **given)
    cached = {cache_name(model.forward): cache_in(first)}
    rest = model(decoder_input_ids=tokens[:, 5:], **cached, **given)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-5)
