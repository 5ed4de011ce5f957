"""Files from a stranger: no pickle runs, no code is imported, and nothing outside a folder is read or written."""

import io
import json
import pickle
import sys
from contextlib import chdir, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import layershed as ls
from layershed.errors import CheckpointError, DataError, ExportError, LayershedError, RecoveryError
from layershed.planning.plan import DropPlan
from layershed.saving.checkpoint import load_checkpoint
from layershed.saving.load_model import build_model as build
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData
from tests.support.bad_input.damage import MODEL, ON, SCORE, SPEED, UP, WEIGHTS, fields, gone, written
from tests.support.bad_input.trial import _run
from tests.support.models import build_model
from tests.support.thinned import crossed

pytestmark = pytest.mark.usefixtures("own_seed")


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("marker"),)


def legacy(path):
    path.write_bytes(pickle.dumps({"state_dict": Evil(), "weight": Evil()}))


def zipped(path):
    torch.save({"state_dict": {"weight": Evil()}}, path)


def tarred(path):
    torch.save({"state_dict": {"weight": Evil()}}, path, _use_new_zipfile_serialization=False)


PICKLES = pytest.mark.parametrize("pickled", [legacy, zipped, tarred])


def refused(words):
    """The error line of a refused command."""
    code, told = _run(words)
    lines = [line for line in told.splitlines() if line and "%|" not in line]
    assert code in (1, 2)
    assert len(lines) == 1, told
    assert lines[0].startswith("error: ")
    return lines[0]


@PICKLES
def test_hostile_pickles_do_run_code_in_plain_torch(pickled, tmp_path):
    """Without this, the tests below would prove nothing."""
    with chdir(tmp_path):
        pickled(Path("evil.ckpt"))
        with suppress(RuntimeError):  # torch runs the bare pickle, and only then misses its own header
            torch.load("evil.ckpt", weights_only=False)
        assert Path("marker").exists()


# ---- pickles ----

COMMANDS = {
    "fit": ["fit", MODEL, *ON],
    "validate": ["validate", MODEL, *ON],
    "test": ["test", MODEL, *ON],
    "predict": ["predict", MODEL, *ON],
    "benchmark": ["benchmark", MODEL, *ON, *SPEED],
}


@pytest.mark.parametrize(("command", "pickled", "url"), crossed(COMMANDS, (legacy, zipped, tarred), ("", "file://")))
@pytest.mark.usefixtures("one_parser")
def test_pickled_checkpoint_is_refused_and_runs_nothing(command, pickled, url, place):
    pickled(place / "evil.ckpt")
    path = f"{url}{place}/evil.ckpt" if url else "evil.ckpt"
    assert "evil.ckpt" in refused([*COMMANDS[command], f"--ckpt_path={path}"])


@PICKLES
def test_load_checkpoint_runs_no_pickled_code(pickled, place):
    pickled(place / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
        load_checkpoint(torch.nn.Linear(2, 2), "evil.ckpt")


@PICKLES
@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS, "model.bin"])
@pytest.mark.parametrize("load", [build, ls.load_pretrained])
def test_pickled_weights_run_no_code(load, name, pickled, place):
    gone(f"model/{WEIGHTS}")(place)
    pickled(place / "model" / name)
    with pytest.raises(LayershedError, match="model"):
        load("./model")


@PICKLES
def test_pickled_weight_shards_run_no_code(pickled, place):
    gone(f"model/{WEIGHTS}")(place)
    pickled(place / "model" / "a.bin")
    written("model/pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": {UP: "a.bin"}}))(place)
    with pytest.raises(LayershedError, match="model"):
        build("./model")


@PICKLES
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_pickled_adapter_weights_run_no_code(name, pickled, place):
    model = build_model("llama")
    ls.inject_lora(model, rank=2)
    ls.save_adapter(model, "adapter")
    gone("adapter/adapter_model.safetensors")(place)
    pickled(place / "adapter" / name)
    with pytest.raises(ExportError, match="no readable LoRA adapter"):
        ls.load_adapter(build_model("llama"), "adapter")


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".parquet"])
def test_hostile_text_file_runs_no_code(ending, place):
    legacy(place / f"evil{ending}")
    with pytest.raises(DataError, match="evil"):
        TextData(f"evil{ending}", block_size=8, batch_size=1, val_fraction=0.5).setup()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_hostile_tokenizer_file_runs_no_code(name, place):
    if name == "tokenizer.json":  # bytes need none
        fields("model/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(place)
    legacy(place / "model" / name)
    with pytest.raises(DataError, match="tokenizer") if name != "special_tokens_map.json" else suppress(DataError):
        _ = TextData("text.txt", tokenizer="./model").tokenizer


# ---- places outside ----


@pytest.fixture
def secret(place):
    """Weights of the model outside its folder, reachable by a name that leads out of it."""
    (place / "model" / WEIGHTS).rename(place / "secret.safetensors")
    return place / "secret.safetensors"


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE", "a/../../secret.safetensors", "..", "..\\x"])
@pytest.mark.parametrize("load", [build, ls.load_pretrained])
def test_weight_index_that_names_an_outside_file_is_refused(load, name, secret, place):
    name = str(secret) if name == "ABSOLUTE" else name
    (place / "model" / "a").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(secret), name)}
    written(f"model/{WEIGHTS}.index.json", json.dumps(index))(place)
    with pytest.raises(ExportError, match="not a file of its own folder"):
        load("./model")


def test_weight_index_of_files_inside_the_folder_loads(secret, place):
    secret.rename(place / "model" / "part-1.safetensors")
    names = load_file(place / "model" / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part-1.safetensors")}
    written(f"model/{WEIGHTS}.index.json", json.dumps(index))(place)
    assert ls.find_sublayers(build("./model")) == ls.find_sublayers(ls.load_pretrained("./model"))


def test_tokenizer_reads_no_file_outside_its_folder(place):
    secret = place / "secret.json"
    secret.write_text(json.dumps({"outside": 0, "<unk>": 1}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_file": str(secret),
        "merges_file": str(place / "merges.txt"),
        "tokenizer_file": str(secret),
    }
    for name in (place / "model").glob("*token*"):
        name.unlink()
    written("model/tokenizer_config.json", json.dumps(tokenizer))(place)
    try:
        vocabulary = TextData("text.txt", tokenizer="./model").tokenizer.get_vocab()
    except DataError:
        return
    assert "outside" not in vocabulary


STAND_IN = {"sublayer": {"block": 1, "kind": "attention", "path": "model.layers.1.self_attn"}, "zero": True}
PATHS = [
    "",
    ".",
    "..",
    "../../x",
    "model",
    "model.layers",
    "config",
    "config.__class__",
    "__class__",
    "forward",
    "lm_head",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path or "empty")
def test_config_that_drops_anything_but_a_sublayer_is_refused(path, place):
    fields("dropped/config.json", per_layer_config=None, dropped_modules={path: STAND_IN})(place)
    with pytest.raises(ExportError):
        ls.load_pretrained("./dropped")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path or "empty")
def test_plan_that_drops_anything_but_a_sublayer_is_refused(path, place):
    model = build("./model")
    entry = {"block": 1, "kind": "attention", "path": path, "score": None, "step": None}
    fields("plan.json", drops=[entry])(place)
    plan = DropPlan.load("plan.json")
    for drop in (ls.bypass, ls.remove):
        with pytest.raises(ls.errors.PlanError, match="no sublayer"):
            drop(model, plan)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path or "empty")
def test_checkpoint_adapters_outside_linear_maps_are_refused(path, place):
    if path == "lm_head":
        pytest.skip("it is one")
    content = torch.load("run.ckpt", weights_only=True)
    content["layershed"] = {
        "dropped": None,
        "quantized": None,
        "adapters": {
            "targets": [path],
            "settings": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False},
        },
    }
    torch.save(content, "run.ckpt")
    with pytest.raises(CheckpointError, match="no linear map"):
        load_checkpoint(CausalLM(pretrained="./model"), "run.ckpt")


ADAPTERS = {
    "peft_type": ("PROMPT_TUNING", None),
    "megatron_core": ("evil_module", "megatron_config"),
    "auto_mapping": ({"base_model_class": "Evil", "parent_library": "evil_module"}, None),
    "base_model_name_or_path": ("../../outside", None),
    "target_modules": (["..", "../x", "__class__"], None),
    "r": (10**9, None),
    "corda_config": ({"cache_file": "../../marker"}, None),
}
# of the others nothing is read, and the adapter is as it was
REFUSED_ADAPTERS = {"peft_type": ExportError, "megatron_core": RecoveryError, "r": RecoveryError}


@pytest.mark.parametrize("field", ADAPTERS)
def test_hostile_adapter_config_imports_and_writes_nothing(field, place, monkeypatch):
    written("evil_module.py", "from pathlib import Path\nPath('marker').touch()\n")(place)
    monkeypatch.syspath_prepend(str(place))
    model = build_model("llama")
    ls.inject_lora(model, rank=2)
    ls.save_adapter(model, "adapter")
    value, more = ADAPTERS[field]
    fields("adapter/adapter_config.json", **{field: value}, **({more: {"a": 1}} if more else {}))(place)
    with pytest.raises(REFUSED_ADAPTERS[field]) if field in REFUSED_ADAPTERS else nullcontext():
        ls.load_adapter(build_model("llama"), "adapter")
    assert "evil_module" not in sys.modules


def test_adapter_is_not_searched_outside_its_folder(place, monkeypatch):
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: pytest.fail("it asked the hub"))
    with pytest.raises(ExportError, match="adapter"):
        ls.load_adapter(build_model("llama"), "user/adapter")


def test_adapter_files_in_a_model_folder_are_refused(place):
    written("evil_module.py", "from pathlib import Path\nPath('marker').touch()\n")(place)
    evil = {
        "peft_type": "LORA",
        "base_model_name_or_path": "../../x",
        "megatron_config": {"a": 1},
        "megatron_core": "evil_module",
    }
    written("model/adapter_config.json", json.dumps(evil))(place)
    for load in (build, ls.load_pretrained):
        with pytest.raises(ExportError, match="adapter of peft"):
            load("./model")


@pytest.mark.parametrize("option", ["optimizer", "evil", "forward"])
@pytest.mark.usefixtures("one_parser")
def test_checkpoint_that_names_a_class_imports_nothing(option, place, monkeypatch):
    written("evil_module.py", "from pathlib import Path\nPath('marker').touch()\n\nclass Evil: pass\n")(place)
    monkeypatch.syspath_prepend(str(place))
    content = torch.load("run.ckpt", weights_only=True)
    content["hyper_parameters"][option] = {"class_path": "evil_module.Evil"}
    torch.save(content, "run.ckpt")
    assert repr(option) in refused([*COMMANDS["validate"], "--ckpt_path=run.ckpt"])
    assert "evil_module" not in sys.modules


# ---- code ----

REMOTE = {
    "AutoConfig": "modeling_evil.EvilConfig",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["modeling_evil.EvilTokenizer", None],
    "AutoModel": "modeling_evil.Evil",
}
CODE = "from pathlib import Path\nPath('marker').touch()\n" + "".join(
    f"class {name}: pass\n" for name in ("Evil", "EvilConfig", "EvilTokenizer")
)
EVERY = {
    **COMMANDS,
    "score": SCORE,
    "prune": ["prune", MODEL, *ON, *SPEED, "--count=1"],
    "plan": ["plan", MODEL, "--prompt_tokens=4", "--new_tokens=2", "--device=a100"],
    "base": ["benchmark", "--model.pretrained=./dropped", "--base=./model", "--data.tokenizer=bytes", *ON, *SPEED],
}


@pytest.fixture
def asked(monkeypatch):
    """A terminal that answers yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.usefixtures("asked", "one_parser")
def test_model_that_needs_its_own_code_is_refused(command, place):
    written("model/modeling_evil.py", CODE)(place)
    fields("model/config.json", auto_map=REMOTE, model_type="evil", architectures=["Evil"])(place)
    assert "'model'" in refused(EVERY[command]).replace("./model", "model")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("load", [build, ls.load_pretrained])
def test_code_beside_a_known_model_type_is_not_run(load, place):
    written("model/modeling_evil.py", CODE)(place)
    fields("model/config.json", auto_map=REMOTE)(place)
    assert type(load("./model")).__module__.startswith("transformers.")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("known", [True, False], ids=["known type", "unknown type"])
def test_code_beside_a_tokenizer_is_not_run(known, place):
    written("model/modeling_evil.py", CODE)(place)
    changes = {} if known else {"tokenizer_class": "EvilTokenizer"}
    fields("model/tokenizer_config.json", auto_map=REMOTE, **changes)(place)
    if known:
        assert type(TextData("text.txt", tokenizer="./model").tokenizer).__module__.startswith("transformers.")
    else:
        with pytest.raises(DataError, match="tokenizer"):
            _ = TextData("text.txt", tokenizer="./model").tokenizer


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_config_that_names_a_kernel_fetches_nothing(name, place):
    fields("model/config.json", **{name: "somebody/evil-attention"})(place)
    for load in (build, ls.load_pretrained):
        with pytest.raises(ExportError, match="code from the hub"):
            load("./model")
