"""Every shipped config parses, instantiates and runs; every line has a comment with the true default."""

import copy
import csv
import functools
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

import layershed as ls
from layershed.callbacks import (
    Export,
    LoRARecovery,
    Quantization,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.main import main
from layershed.cli.trainer import Trainer
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, count_by_kind
from layershed.recovery.distillation import Distillation
from layershed.recovery.lora import adapted_modules
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData
from layershed.training.tokenizer import BYTE_CHAT_TEMPLATE
from tests.support.ticking import Ticking, install

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
TWINS = {"chat_dense": "chat_recovery"}  # the same runs without a drop
CONFIGS = [path for path in FILES if path.stem not in TWINS]
# What each config is there to show: its drop, and what a short run of it takes away from 6 blocks.
SHOWS = {
    "quickstart": ({"scope": "joint", "ratio": 0.25}, 3),
    "attention_drop": ({"scope": "attention", "ratio": 0.5}, 3),
    "mlp_drop": ({"scope": "mlp", "count": 2}, 2),
    "block_drop": ({"scope": "block", "count": 2}, 4),
    "joint_drop": ({"scope": "joint", "count": 6, "protect": [0, -1]}, 6),
    "iterative": ({"scope": "joint", "count": 2, "rounds": 3, "every_n_steps": 50, "calibrate_on": "train"}, 6),
    "target_speedup": (
        {
            "scope": "joint",
            "target_speedup": 1.15,
            "phase": "decode",
            "objective": "speed",
            "speed": {"prompt_tokens": 128, "new_tokens": 32, "batch_size": 1, "runs": 9, "warmup": 1},
        },
        2,
    ),
    "lora_recovery": ({"scope": "attention", "count": 6}, 4),
    "distill_recovery": ({"scope": "attention", "count": 6}, 4),
    "qlora": ({"scope": "attention", "count": 6}, 4),
    "full_recovery": ({"scope": "attention", "count": 6}, 4),
    "chat_recovery": ({"scope": "attention", "count": 6}, 4),
    "smollm2_recovery": ({"scope": "attention", "count": 8, "start": 1, "calibrate_on": "train"}, 4),
}
# How the recovering ones do it: arguments of LoRARecovery, of Quantization, of the distillation.
RECOVERS = {
    "lora_recovery": ({"mode": "lora", "rank": 8, "warmup_steps": 10, "finish": "merge"}, None, None),
    "chat_recovery": ({"mode": "lora", "rank": 8, "warmup_steps": 10, "finish": "merge"}, None, None),
    "distill_recovery": (
        {"mode": "lora", "rank": 8, "warmup_steps": 10, "finish": "merge"},
        None,
        {"weight": 0.5, "temperature": 1.0, "kind": "kl"},
    ),
    "qlora": ({"mode": "lora", "finish": "adapter"}, {"mode": "nf4", "start": None}, None),
    "full_recovery": ({"mode": "full", "lr_factor": 0.5, "warmup_steps": 10}, None, None),
    "smollm2_recovery": (
        {"mode": "lora", "rank": 16, "alpha": 32, "finish": "adapter"},
        None,
        {"weight": 0.5, "temperature": 1.0, "kind": "kl"},
    ),
}
HUB = {"smollm2_recovery": "HuggingFaceTB/SmolLM2-135M"}  # what they download
TINY = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
}
DATA = {"block_size": 16, "batch_size": 2, "max_tokens": 1024}
TRAINER = {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 2, "log_every_n_steps": 1}
SPEED = {"prompt_tokens": 8, "new_tokens": 2, "runs": 2}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def data_of_configs(own_world):
    """The configs name their data from the root of the repository."""
    Path("configs").symlink_to(FOLDER)


class AtTheDrop(pl.Callback):
    """Keeps a copy of the weights right before the drop."""

    weights: ClassVar = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.weights.update({n: p.detach().clone() for n, p in pl_module.model.named_parameters()})


class Watched(pl.Callback):
    """Sets a made-up clock: a sublayer takes twice as long as the rest of the model."""

    clock = Ticking(decode=lambda _block, _kind: 16.0, prefill=lambda _block, _kind: 16.0, rest=8.0)

    def setup(self, trainer, pl_module, stage):
        self.clock.watch(pl_module.model)


def offline(path):
    """The config, with a tiny model instead of a downloaded one."""
    config = yaml.safe_load(path.read_text())
    assert config["model"]["pretrained"] == HUB.get(path.stem)
    if path.stem in HUB:
        config["model"].update(pretrained=None, config={**TINY, "max_position_embeddings": 512})
    return config


def callback_of(config, name):
    entries = config["trainer"]["callbacks"].values()
    return next(entry for entry in entries if entry["class_path"].endswith(f".{name}"))["init_args"]


def shortened(path):
    """The same config over six steps of a tiny model.

    All but the quickstart go without the report and read a small file, which saves two thirds of their time.
    """
    config = offline(path)
    config["model"].update(config=TINY, warmup_steps=1)
    config["data"].update(DATA)
    config["trainer"].update(TRAINER)
    callback_of(config, "RedundancyMonitor")["every_n_steps"] = 1
    drop = callback_of(config, "SublayerDrop")
    drop.update(start=2, calibration_batches=2, quality_batches=2)
    if path.stem in RECOVERS:
        drop["count"] = SHOWS[path.stem][1]
    if "every_n_steps" in drop:
        drop["every_n_steps"] = 1
    callback_of(config, "SpeedMonitor").update(SPEED)
    callback_of(config, "Report")["every_n_steps"] = 1
    if path.stem == "chat_recovery":
        del config["data"]["max_tokens"]
        config["data"]["block_size"] = TINY["max_position_embeddings"]
    elif path.stem != "quickstart":
        Path("small.txt").write_text(
            "\n\n".join(f"{number} is not {number + 1}, nor will it be." for number in range(99))
        )
        config["data"]["source"] = "small.txt"
    if path.stem != "quickstart":
        del config["trainer"]["callbacks"]["report"]
    if "target_speedup" in drop:
        drop["speed"].update(SPEED)
        config["trainer"]["callbacks"]["watched"] = {"class_path": f"{__name__}.Watched"}
    if path.stem in RECOVERS:
        before = {"at_the_drop": {"class_path": f"{__name__}.AtTheDrop"}}
        config["trainer"]["callbacks"] = {**before, **config["trainer"]["callbacks"]}
    return config


def test_every_config_has_an_entry_in_this_test():
    assert {path.stem for path in CONFIGS} == set(SHOWS)


@every_config
def test_each_config_parses_and_instantiates(path, monkeypatch):
    seen = {}
    # LightningCLI calls a method of its own in the place of the Trainer's, where there is one
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **kwargs: seen.update(kwargs, trainer=self.trainer), False)
    config = path
    if path.stem in HUB:
        config = Path("offline.yaml")
        config.write_text(yaml.safe_dump(offline(path), sort_keys=False))
    assert main(["fit", "--config", str(config)]) == 0

    assert isinstance(seen["model"], CausalLM)
    assert isinstance(seen["datamodule"], TextData)
    if path.stem not in HUB:
        assert seen["model"].model.num_parameters() == pytest.approx(2.4e6, rel=0.02), "what the comment promises"
    kinds = [type(callback) for callback in seen["trainer"].callbacks]
    for kind in (ModelCheckpoint, RedundancyMonitor, SublayerDrop, SpeedMonitor, Export, Report):
        assert kinds.count(kind) == 1
    recovers, quantizes, distills = RECOVERS.get(path.stem, (None, None, None))
    assert kinds.count(LoRARecovery) == (recovers is not None)
    assert kinds.count(Quantization) == (quantizes is not None)
    steps = [SublayerDrop, SpeedMonitor, Quantization, LoRARecovery, Export]
    order = [kinds.index(kind) for kind in steps if kind in kinds]
    assert order == sorted(order), "the speed is that of the dropped model, without adapters and unquantized"
    assert seen["model"].distillation == (distills and Distillation(**distills))
    drop = next(callback for callback in seen["trainer"].callbacks if isinstance(callback, SublayerDrop))
    asked, _ = SHOWS[path.stem]
    written = yaml.safe_load(path.read_text())
    for kind, wanted in (("SublayerDrop", asked), ("LoRARecovery", recovers), ("Quantization", quantizes)):
        if wanted is not None:
            assert wanted.items() <= callback_of(written, kind).items()
    assert written["model"].get("distillation") == distills
    assert drop.rule.speed == SpeedSettings(**asked.get("speed", {}))
    assert drop.schedule.steps[-1] < seen["trainer"].max_steps
    assert not Path("runs").exists(), "nothing is written before training"


@pytest.mark.parametrize(("twin", "name"), TWINS.items())
def test_dense_twin_is_its_config_without_the_drop(twin, name):
    dense, dropping = (yaml.safe_load((FOLDER / f"{stem}.yaml").read_text()) for stem in (twin, name))
    kept = {
        name: entry
        for name, entry in dropping["trainer"]["callbacks"].items()
        if not entry["class_path"].endswith(("SublayerDrop", "SpeedMonitor", "LoRARecovery", "BestCheckpoint"))
    }
    callback_of({"trainer": {"callbacks": kept}}, "Export")["folder"] = "dense"
    dropping["trainer"].update(callbacks=kept, default_root_dir=f"runs/{twin}")
    assert dense == dropping


def test_short_dense_run_writes_a_report_and_the_whole_model(tmp_path, capsys):
    config = yaml.safe_load((FOLDER / "chat_dense.yaml").read_text())
    config["model"].update(config={**TINY, "max_position_embeddings": 256}, warmup_steps=1)
    config["trainer"].update(TRAINER)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "short.yaml"]) == 0
    run = Path("runs/chat_dense/version_0")
    assert not ls.dropped_sublayers(ls.load_pretrained(run / "dense"))
    assert (run / "report.html").is_file()
    assert AutoTokenizer.from_pretrained(run / "dense").chat_template == BYTE_CHAT_TEMPLATE
    assert "warning" not in capsys.readouterr().err.lower()


def test_chat_data_of_the_repository_is_small_and_in_order():
    path = FOLDER / "data" / "conversations.jsonl"
    assert path.stat().st_size < 60_000
    TextData(str(path)).check()


@every_file
def test_each_config_head_says_how_to_run_it(path):
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"python train.py fit --config configs/{path.name}" in head
    words = head.replace("\n#", "").split()
    if path.stem in HUB:
        assert "--model.pretrained FOLDER" in head
    elif path.stem != "quickstart":
        assert words[words.index("--model.pretrained") + 1].removesuffix("-Instruct") == "HuggingFaceTB/SmolLM2-135M"
    if path.stem != "quickstart":
        assert ".gguf" in head


def test_omitted_speed_settings_keep_their_defaults(monkeypatch):
    seen = {}
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **kwargs: seen.update(trainer=self.trainer), False)
    config = yaml.safe_load((FOLDER / "target_speedup.yaml").read_text())
    callback_of(config, "SublayerDrop")["speed"] = {"runs": 3}
    Path("few.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["fit", "--config", "few.yaml"]) == 0
    drop = next(callback for callback in seen["trainer"].callbacks if isinstance(callback, SublayerDrop))
    assert drop.rule.speed == SpeedSettings(runs=3)


def test_options_in_config_heads_for_a_real_model_parse(monkeypatch):
    parsed = {}
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: parsed.update(config=self.config.fit))
    monkeypatch.setattr(LayershedCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "_run_subcommand", lambda self, subcommand: None)
    words = [
        "--model.pretrained",
        "HuggingFaceTB/SmolLM2-135M",
        "--model.optimizer.lr",
        "2e-5",
        "--data.source",
        "x.txt",
        "--trainer.max_epochs",
        "-1",
    ]
    assert main(["fit", "--config", str(FOLDER / "joint_drop.yaml"), *words]) == 0
    data, model = parsed["config"].data, parsed["config"].model
    assert data.tokenizer == model.pretrained == "HuggingFaceTB/SmolLM2-135M"
    assert parsed["config"].trainer.max_epochs == -1
    assert model.optimizer.init_args.lr == 2e-5
    assert model.optimizer.init_args.betas == (0.9, 0.95), "the rest of the optimizer stays"


# ---- comments ----


def settings(path):
    """Dotted key, class that owns the argument (or None), value and comment of every line with a setting."""
    lines = path.read_text().splitlines()

    def walk(node, key, owner):
        if isinstance(node, yaml.MappingNode):
            fields = {name.value: value for name, value in node.value}
            inner = fields["class_path"].value if "class_path" in fields else owner
            for name, value in node.value:
                line = lines[name.start_mark.line]
                comment = line.partition(" # ")[2]
                if not isinstance(value, yaml.MappingNode) and name.value != "callbacks":
                    yield f"{key}{name.value}", owner, yaml.safe_load(yaml.serialize(value)), comment
                if name.value == "init_args":
                    yield from walk(value, f"{inner}.", inner)
                else:
                    yield from walk(value, f"{key}{name.value}.", owner)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from walk(item, key, owner)

    return list(walk(yaml.compose(path.read_text()), "", None))


@functools.cache
def fresh_trainer():
    return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def real_defaults(key, owner):
    """Values that a comment may call the default: the one in the signature and the resulting one."""
    name = key.rpartition(".")[2]
    if owner is not None and ".speed." in key:
        return [inspect.signature(SpeedSettings).parameters[name].default]
    if owner is not None:
        module, _, class_name = owner.rpartition(".")
        default = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters[name].default
        return [list(default) if isinstance(default, tuple) else default]
    section = key.partition(".")[0]
    if section in ("seed_everything", "control"):
        return [{"seed_everything": 0, "control": False}[section]]
    if section == "trainer":
        lightning, ours = (inspect.signature(kind.__init__).parameters for kind in (pl.Trainer, Trainer))
        return [{**lightning, **ours}[name].default, getattr(fresh_trainer(), name, ...)]
    kind = {"model": CausalLM, "data": TextData}[section]
    if key.startswith("model.distillation."):
        kind = Distillation
    return [inspect.signature(kind).parameters[name].default]


@every_file
def test_config_comments_state_the_true_defaults(path):
    found = settings(path)
    assert len(found) > 30
    for key, owner, _, comment in found:
        assert comment.strip(), f"{path.name}: {key} has no comment"
        if key.endswith("class_path"):
            continue
        stated = re.search(r"\b(no default|default (\[.*?\]|[^\s;,:)]+))", comment)
        assert stated, f"{path.name}: the comment of {key} states no default"
        known = real_defaults(key, owner)
        if stated[1] == "no default":
            # one of the three must be given, so that none has a default that works
            one_of = (".count", ".ratio", ".target_speedup")
            assert known == [inspect.Parameter.empty] or key.endswith(one_of), key
        else:
            assert yaml.safe_load(stated[2]) in known, f"{path.name}: {key}: {stated[2]!r} is not among {known}"


@every_file
def test_config_comment_states_the_default_optimizer(path):
    line = next(line for line in path.read_text().splitlines() if line.startswith("  optimizer:"))
    default = inspect.signature(CausalLM).parameters["optimizer"].default
    assert default is torch.optim.AdamW
    assert "default torch.optim.AdamW" in line


@pytest.mark.parametrize("name", [name for name, (_, _, distills) in RECOVERS.items() if distills])
def test_config_comment_states_the_default_distillation(name):
    line = next(line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("  distilla"))
    assert inspect.signature(CausalLM).parameters["distillation"].default is None
    assert "default null" in line


def test_smollm2_weights_are_unchanged_before_the_drop():
    config = yaml.safe_load((FOLDER / "smollm2_recovery.yaml").read_text())
    assert callback_of(config, "SublayerDrop")["start"] == 1
    assert config["model"]["warmup_steps"] > 0, "so that the learning rate of the step before the drop is 0"
    model = CausalLM(config=TINY, warmup_steps=config["model"]["warmup_steps"], schedule=config["model"]["schedule"])
    before = copy.deepcopy(model.model.state_dict())
    # by the very pieces that the Trainer steps with
    model.trainer = SimpleNamespace(estimated_stepping_batches=101, max_epochs=-1)
    made = model.configure_optimizers()
    ids = torch.randint(3, 259, (2, 16))
    model.model(input_ids=ids, labels=ids).loss.backward()
    for moves in (False, True):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        same = [torch.equal(weights, before[name]) for name, weights in model.model.state_dict().items()]
        assert all(same) != moves


# ---- runs ----


QUICK = {"quickstart", "chat_recovery"}  # the others differ in a scope or in how they recover


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in CONFIGS],
)
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:.*conversations are longer than block_size")
def test_short_run_of_each_config_writes_every_file(path, tmp_path, capsys, monkeypatch):
    config = shortened(path)
    if path.stem == "target_speedup":
        install(monkeypatch, Watched.clock)
    root = Path(config["trainer"]["default_root_dir"])
    assert root == Path("runs") / path.stem
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["fit", "--config", "short.yaml"]) == 0

    run = root / "version_0"
    assert [entry.name for entry in root.iterdir()] == ["version_0"]
    names = {entry.name for entry in run.iterdir()}
    assert {"metrics.csv", "importance.csv", "drop_plan.json", "speed.json", "pruned", "config.yaml"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names), "TensorBoard beside the CSV"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "importance.csv").read_text().splitlines()[0] == "step,block,kind,metric,value"
    logged = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "drop/loss_before", "drop/loss_end", "speed/decode_speedup"} <= set(logged)
    assert ("drop/speedup" in logged) == (path.stem == "target_speedup")

    plan = DropPlan.load(run / "drop_plan.json")
    check_plan(plan, *SHOWS[path.stem])
    model = ls.load_pretrained(run / "pruned")
    assert set(ls.dropped_sublayers(model)) == set(plan)
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()
    if path.stem in RECOVERS:
        check_recovery(path.stem, run, model, logged)

    if path.stem == "quickstart":
        told = capsys.readouterr().out
        for line in (
            "before the drop",
            "right after the drop",
            "at the end",
            "Decode speed",
            f"Report: {run}/report.html",
        ):
            assert line in told
        assert "Sublayers dropped" in (run / "report.html").read_text()


def check_plan(plan, asked, number):
    counts = count_by_kind(plan)
    assert len(plan) == number
    assert plan.scope == asked["scope"]
    match plan.scope:
        case "attention":
            assert counts["mlp"] == 0
        case "mlp":
            assert counts["attention"] == 0
        case "block":
            assert counts["mlp"] == counts["attention"]
    if "protect" in asked:
        assert {0, 5}.isdisjoint(sublayer.block for sublayer in plan)
    assert len({drop.step for drop in plan.drops}) == asked.get("rounds", 1)


def check_recovery(name, run, model, logged):
    """Check the exported model and the logs of a recovery."""
    recovers, quantizes, distills = RECOVERS[name]
    assert "recovery/trainable_parameters" in logged
    assert {"train_divergence", "train_lm_loss", "teacher_seconds"} <= set(logged) or not distills
    if distills:
        with (run / "metrics.csv").open() as file:
            divergences = [float(row["train_divergence"]) for row in csv.DictReader(file) if row["train_divergence"]]
        assert divergences[:2] == [0, 0], "nothing to learn from before the drop"
        assert min(divergences[2:]) > 0
        assert len(divergences) == TRAINER["max_steps"]
    settings = ls.quantization_of(model)
    assert (settings is not None) == (quantizes is not None)
    assert quantizes is None or settings.mode == quantizes["mode"]
    kept = recovers.get("finish") == "adapter"
    assert bool(adapted_modules(model)) == kept
    for folder in (run / "adapter", run / "pruned" / "adapter"):
        assert folder.exists() == kept
        assert not kept or (folder / "adapter_model.safetensors").is_file()
    if kept:
        return
    trained = {key for key, weights in model.named_parameters() if not torch.equal(weights, AtTheDrop.weights[key])}
    everything = dict(model.named_parameters())
    if recovers["mode"] == "full":
        assert trained == everything.keys()
        with (run / "metrics.csv").open() as file:
            counts = [row["recovery/trainable_parameters"] for row in csv.DictReader(file)]
        assert [float(count) for count in counts if count] == [model.num_parameters()]
    else:
        assert trained == {key for key in everything if key.endswith("_proj.weight")}, "the linear maps, and no more"
