"""Saved folders against what must be in them: names and formats written down by hand, and the model that was saved."""

import copy
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoTokenizer, ByT5Tokenizer

from layershed.discovery.find import find_sublayers
from layershed.discovery.model_record import model_record
from layershed.errors import AmbiguousModelError, ExportError, PlanError
from layershed.planning.plan import Drop, DropPlan
from layershed.saving.pretrained import load_plan, load_pretrained, save_pretrained
from layershed.spellings import layer_overrides
from layershed.surgery import bypass, bypassed_sublayers, dropped_sublayers, remove, restore
from tests.support.models import build_model, some
from tests.support.versions import needs

# what goes with block 0's attention, with block 1's MLP, and with both of block 2
PRE_NORM = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))
MODULES = {
    "llama": ("model.layers", *PRE_NORM),
    "mistral": ("model.layers", *PRE_NORM),
    "qwen3": ("model.layers", *PRE_NORM),
    "gpt2": ("transformer.h", ("attn", "ln_1"), ("mlp", "ln_2")),
    "gpt_neox": ("gpt_neox.layers", ("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")),
    "phi": ("model.layers", ("self_attn",), ("mlp",)),  # one norm for both: it stays in blocks 0 and 1
    "olmo2": ("model.layers", ("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    "gemma3_text": (
        "model.layers",
        ("self_attn", "input_layernorm", "post_attention_layernorm"),
        ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
ON_DISK = {("gpt_neox", "lm_head.weight"): "embed_out.weight"}  # upstream's name for it in files
SKIP = {"0": {"skip": ["attention"]}, "1": {"skip": ["mlp"]}, "2": {"skip": ["attention", "mlp"]}}


def gone(model_type):
    """Prefixes of the parameter names that must not be saved."""
    blocks, attention, mlp = MODULES[model_type]
    return (
        *(f"{blocks}.0.{module}." for module in attention),
        *(f"{blocks}.1.{module}." for module in mlp),
        f"{blocks}.2.",
    )


def dropped_model(model_type="llama", **overrides):
    model = build_model(model_type, **overrides)
    bypass(model, some(model))
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def generate(model, tokens):
    mask = torch.ones_like(tokens)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    return model.generate(tokens, use_cache=True, **settings)


def weights_in(folder):
    return load_file(Path(folder) / "model.safetensors")


def contents(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.default_cases(4)
@pytest.mark.parametrize(
    ("model_type", "tied"),
    [*((name, None) for name in MODULES), ("llama", True), ("gpt2", False)],
    ids=lambda value: str(value),
)
def test_saved_model_loads_exactly_after_bypass_and_after_remove(model_type, tied, tokens, tmp_path):
    model = build_model(model_type, **({} if tied is None else {"tie_word_embeddings": tied}))
    kept = {
        ON_DISK.get((model_type, name), name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not name.startswith(gone(model_type))
    }
    bypass(model, some(model))
    expected, continuation = logits(model, tokens), generate(model, tokens)
    save_pretrained(model, tmp_path / "bypassed")
    saved = weights_in(tmp_path / "bypassed")
    assert set(saved) == set(kept)
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    loaded = load_pretrained(tmp_path / "bypassed")
    assert torch.equal(logits(loaded, tokens), expected)
    assert torch.equal(generate(loaded, tokens), continuation)
    remove(model)
    save_pretrained(model, tmp_path / "removed")
    assert contents(tmp_path / "removed") == contents(tmp_path / "bypassed")


def test_bypassed_beside_removed_saves_both_as_dropped(tokens, tmp_path):
    model = build_model()
    chosen = some(model)
    remove(model, chosen[:2])
    bypass(model, chosen[2:])
    save_pretrained(model, tmp_path / "out")
    assert not any(name.startswith(gone("llama")) for name in weights_in(tmp_path / "out"))
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), logits(model, tokens))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_saved_dense_model_loads_whole(model_type, tokens, tmp_path):
    model = build_model(model_type)
    save_pretrained(model, tmp_path / "out")
    assert not json.loads((tmp_path / "out/config.json").read_text()).get("per_layer_config")
    assert set(weights_in(tmp_path / "out")) == {name for name, _ in model.named_parameters()}
    loaded = load_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert dropped_sublayers(loaded) == ()


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [("llama", "attention"), ("llama", "mlp"), ("gpt2", "attention"), ("phi", "attention and mlp")],
)
def test_model_without_any_sublayer_of_a_kind_is_saved_and_loaded(model_type, kinds, tokens, tmp_path):
    model = build_model(model_type)
    bypass(model, [s for s in find_sublayers(model) if s.kind in kinds])
    save_pretrained(model, tmp_path / "out")
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), logits(model, tokens))


def test_saved_config_has_upstreams_format_and_survives_a_round_trip(tmp_path):
    save_pretrained(dropped_model(), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["per_layer_config"] == SKIP
    AutoConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["per_layer_config"] == SKIP


def test_skip_field_written_by_hand_is_honoured(tokens, tmp_path):
    model = dropped_model()
    expected = logits(model, tokens)
    restore(model)
    (tmp_path / "out").mkdir()
    model.config.to_json_file(tmp_path / "out/config.json")
    rewrite_config(tmp_path / "out", architectures=["LlamaForCausalLM"], per_layer_config=SKIP)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(gone("llama"))}
    save_file(kept, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), expected)


def test_loaded_model_trains_like_any_other(tokens, tmp_path):
    model = dropped_model()
    save_pretrained(model, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert [s.name for s in dropped_sublayers(loaded)] == ["attention.0", "mlp.1", "attention.2", "mlp.2"]
    loaded(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_saving_does_not_change_the_model(model_type, tokens, tmp_path):
    model = build_model(model_type)
    bypass(model, some(model))
    model.train()
    next(model.parameters()).requires_grad_(False)
    state, config, own = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict()), model.config
    trainable = [p.requires_grad for p in model.parameters()]
    save_pretrained(model, tmp_path / "out")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.config is own
    assert model.config.to_dict() == config
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(module.training for module in model.modules())
    assert bypassed_sublayers(model) == tuple(sorted(some(model)))
    restore(model)
    assert torch.equal(logits(model.eval(), tokens), logits(build_model(model_type), tokens))


def test_saving_a_loaded_model_writes_the_same_folder(tmp_path):
    save_pretrained(dropped_model(), tmp_path / "one")
    save_pretrained(load_pretrained(tmp_path / "one"), tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_loaded_model_can_be_dropped_from_again(tokens, tmp_path):
    save_pretrained(dropped_model(), tmp_path / "one")
    loaded = load_pretrained(tmp_path / "one")
    bypass(loaded, [s for s in find_sublayers(loaded) if s.name == "mlp.3"])
    save_pretrained(loaded, tmp_path / "two")
    written = json.loads((tmp_path / "two/config.json").read_text())["per_layer_config"]
    assert written == {**SKIP, "3": {"skip": ["mlp"]}}
    assert torch.equal(logits(load_pretrained(tmp_path / "two"), tokens), logits(loaded, tokens))


def test_saving_over_a_saved_model_replaces_all_of_it(tokens, tmp_path):
    model = dropped_model()
    save_pretrained(model, tmp_path / "out", plan=DropPlan(tuple(map(Drop, some(model)))))
    restore(model)
    save_pretrained(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_plan(tmp_path / "out") is None
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), logits(model, tokens))


def test_saving_fills_an_empty_folder_and_creates_parents(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a/b/c"):
        assert save_pretrained(llama, str(folder)) == folder
        assert set(weights_in(folder)) == set(llama.state_dict())


@pytest.mark.parametrize("files", [["thesis.tex"], ["config.json", "thesis.tex"]], ids="+".join)
def test_saving_over_a_foreign_folder_is_refused_and_keeps_it(llama, tmp_path, files):
    (tmp_path / "work").mkdir()
    for file in files:
        (tmp_path / "work" / file).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ExportError, match="holds no saved model"):
        save_pretrained(llama, tmp_path / "work")
    assert contents(tmp_path) == before


def test_saving_over_a_file_is_refused_and_keeps_it(llama, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="out"):
        save_pretrained(llama, tmp_path / "out")
    assert contents(tmp_path) == {Path("out"): b"mine"}


@pytest.mark.parametrize("before", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("late", [True, False], ids=["tokenizer", "weights"])
def test_failed_save_leaves_only_the_former_folder(tmp_path, monkeypatch, before, late):
    model = dropped_model()
    config = model.config
    if before:
        save_pretrained(model, tmp_path / "out")
    there = contents(tmp_path)

    def fail(_self, folder, **_kwargs):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text("half")
        raise OSError("No space left on device")

    tokenizer = ByT5Tokenizer(extra_ids=0)
    monkeypatch.setattr(type(tokenizer) if late else type(model), "save_pretrained", fail)
    with pytest.raises(ExportError, match="No space left"):
        save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    assert contents(tmp_path) == there
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if before else [])
    assert model.config is config
    assert not layer_overrides(config)


class Allocations(TorchDispatchMode):
    """Notes the sizes of every tensor with memory of its own that any operation returns."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if type(leaf) in (torch.Tensor, nn.Parameter) and not leaf.is_meta:
                self.sizes.update(leaf.shape)
        return returned


@needs("transformers", "5.0", "every weight is allocated for a moment before it moves to the meta device")
@pytest.mark.parametrize("drop", [True, False], ids=["dropped", "dense"])
def test_dropped_weights_are_never_allocated_while_loading(tmp_path, monkeypatch, drop):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads would escape the dispatch mode
    model = build_model(intermediate_size=1237)
    if drop:
        bypass(model, [s for s in find_sublayers(model) if s.kind == "mlp"])
    save_pretrained(model, tmp_path / "out")
    del model
    with Allocations() as seen:
        load_pretrained(tmp_path / "out")
    assert 97 in seen.sizes  # the vocabulary: weights are seen
    assert (1237 in seen.sizes) == (not drop)


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_weights(folder, change):
    weights = weights_in(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    """Split the weights as upstream does, into two files and an index."""
    weights = weights_in(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


UP, QUERY = "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"

SELF = "model.layers.0.self_attn"
FIELDS = {"sublayer": {"block": 0, "kind": "attention", "path": SELF}, "zero": True}


def rewrite_modules(folder, change):
    modules = json.loads((folder / "config.json").read_text())["dropped_modules"]
    change(modules)
    rewrite_config(folder, dropped_modules=modules)


BREAKS = {
    "missing weight": (lambda f: rewrite_weights(f, lambda w: w.pop(UP)), UP),
    "weight of a dropped sublayer": (
        lambda f: rewrite_weights(f, lambda w: w.update({QUERY: torch.ones(32, 32)})),
        QUERY,
    ),
    "mismatched shape": (lambda f: rewrite_weights(f, lambda w: w.update({UP: torch.ones(5, 32)})), UP),
    "block out of range": (
        lambda f: rewrite_config(f, dropped_modules=None, per_layer_config={"9": {"skip": ["mlp"]}}),
        "9",
    ),
    "unknown kind": (
        lambda f: rewrite_config(f, dropped_modules=None, per_layer_config={"0": {"skip": ["conv"]}}),
        "conv",
    ),
    "two fields that contradict": (
        lambda f: rewrite_config(f, per_layer_config={"3": {"skip": ["mlp"]}}),
        "contradicts",
    ),
    "stand-in for no module": (lambda f: rewrite_modules(f, lambda m: m.update({"model.layers.7": FIELDS})), "layers"),
    "stand-in with a stranger's field": (lambda f: rewrite_modules(f, lambda m: m[SELF].update(run="rm")), "run='rm'"),
    "stand-in with a wrong type": (lambda f: rewrite_modules(f, lambda m: m[SELF].update(zero="no")), "zero='no'"),
    "stand-in of no kind": (lambda f: rewrite_modules(f, lambda m: m[SELF]["sublayer"].update(kind="x")), "'x'"),
    "stand-ins that are no mapping": (lambda f: rewrite_config(f, dropped_modules=[1]), "dropped_modules"),
    "skip is no list": (lambda f: rewrite_config(f, per_layer_config={"0": {"skip": "mlp"}}), "skip"),
    "per_layer_config is no mapping": (lambda f: rewrite_config(f, per_layer_config=[1]), "out"),
    "unknown architecture": (lambda f: rewrite_config(f, architectures=["LamaForCausalLM"]), "LamaForCausalLM"),
    "architecture is no model": (lambda f: rewrite_config(f, architectures=["pipeline"]), "pipeline"),
    "architecture of another family": (lambda f: rewrite_config(f, architectures=["BertModel"]), "BertModel"),
    "unknown model type": (lambda f: rewrite_config(f, model_type="lama", architectures=["Lama"]), "lama"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights are not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"mine"), "out"),
    "no such shard": (lose_a_shard, "model-00002-of-00002.safetensors"),
    "no folder": (shutil.rmtree, "out"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pretrained(dropped_model(), tmp_path_factory.mktemp("saved") / "out")


@pytest.mark.parametrize("what", BREAKS)
def test_broken_model_folder_is_refused_in_one_sentence(what, saved, tmp_path):
    break_it, named = BREAKS[what]
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    break_it(folder)
    with pytest.raises(ExportError) as caught:
        load_pretrained(folder)
    text = str(caught.value)
    assert named in text
    assert "\n" not in text


def test_invalid_model_config_is_not_reported_as_missing(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    rewrite_config(folder, per_layer_config={"9": {"skip": ["mlp"]}})
    with pytest.raises(ExportError) as caught:
        load_pretrained(folder)
    assert "neither a folder with a config.json" not in str(caught.value)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_and_never_unpickled(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ExportError, match="safetensors"):
        load_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_sharded_safetensors_are_loaded(saved, tokens, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    shard(folder)
    assert torch.equal(logits(load_pretrained(folder), tokens), logits(dropped_model(), tokens))


def test_bfloat16_weights_stay_unless_another_dtype_is_given(tokens, tmp_path):
    model = dropped_model()
    for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    save_pretrained(model, tmp_path / "out")
    assert {tensor.dtype for tensor in weights_in(tmp_path / "out").values()} == {torch.bfloat16}
    loaded = load_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    wide = load_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_plan_is_saved_beside_the_weights(tmp_path):
    model = dropped_model()
    drops = tuple(Drop(s, score=i / 8, step=10 * i) for i, s in enumerate(reversed(some(model))))
    plan = DropPlan(drops, scope="joint", metric="cosine")
    save_pretrained(model, tmp_path / "out", plan=plan)
    assert load_plan(tmp_path / "out") == replace(plan, model=model_record(model))
    assert load_plan(tmp_path) is None


def test_plan_that_differs_from_the_drop_is_refused_on_saving(tmp_path):
    model = dropped_model()
    for wrong in (
        some(model)[1:],
        [*some(model), find_sublayers(model)[1]],
        [*some(model)[1:], find_sublayers(model)[1]],
    ):
        with pytest.raises(PlanError, match=r"attention\.0, mlp\.1, attention\.2, mlp\.2"):
            save_pretrained(model, tmp_path / "out", plan=DropPlan(tuple(map(Drop, wrong))))
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_saved_beside_the_weights(llama, tmp_path):
    save_pretrained(llama, tmp_path / "out", tokenizer=ByT5Tokenizer(extra_ids=0))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    # bytes after three special tokens, then </s>
    assert loaded("hé").input_ids == [byte + 3 for byte in "hé".encode()] + [1]


class Holder(LightningModule):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


def test_lightning_module_is_saved_as_the_transformer_that_it_holds(tokens, tmp_path):
    model = dropped_model()
    save_pretrained(Holder(net=model), tmp_path / "out")
    assert "model.norm.weight" in weights_in(tmp_path / "out")
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), logits(model, tokens))


def test_saving_takes_one_of_two_transformers_by_name(tokens, tmp_path):
    student, teacher = dropped_model(), build_model("gpt2")
    both = Holder(student=student, teacher=teacher)
    with pytest.raises(AmbiguousModelError, match="student, teacher"):
        save_pretrained(both, tmp_path / "out")
    save_pretrained(both, tmp_path / "out", name="student")
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), tokens), logits(student, tokens))


def test_model_without_a_head_is_saved_and_loaded_without_one(llama, tokens, tmp_path):
    model = AutoModel.from_config(llama.config).eval()
    bypass(model, some(model))
    save_pretrained(model, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_foreign_adapters_are_refused_on_saving_until_merged(tokens, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    bypass(adapted, find_sublayers(adapted)[2:4])
    with pytest.raises(ExportError, match="merge_and_unload"):
        save_pretrained(adapted, tmp_path / "out")
    merged = adapted.merge_and_unload()
    save_pretrained(merged, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "out")(tokens).logits, merged(tokens).logits)


def test_dynamically_quantized_model_is_refused_in_a_sentence(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        model = torch.ao.quantization.quantize_dynamic(dropped_model(), {torch.nn.Linear})
    with pytest.raises(ExportError, match="is no tensor, as after torch's dynamic quantization"):
        save_pretrained(model, tmp_path / "out")
