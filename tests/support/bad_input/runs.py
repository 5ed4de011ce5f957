"""The other half of the table of benchmarks/bad_input.py: checkpoints, data, configs, options and output places."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.support.bad_input.damage import (
    DROPPED,
    FIT,
    MODEL,
    ON,
    SCORE,
    SPEED,
    Case,
    both,
    checkpoint,
    config_of,
    cut,
    written,
    zipped,
)

VALIDATE = ["validate", MODEL, *ON, "--ckpt_path=run.ckpt"]
RESUME = [*FIT, "--config=resume.yaml", "--trainer.max_steps=5", "--ckpt_path=run.ckpt"]
MEASURE = ["benchmark", MODEL, *ON, *SPEED, "--ckpt_path=run.ckpt"]
ENTRY = {"block": 1, "kind": "attention", "path": "model.layers.1.self_attn", "score": None, "step": None}


def _noted(content: Any) -> Any:
    return checkpoint(lambda c: c.update(layershed=content))


def _dropping(**changes: Any) -> Any:
    plan = {"format": "layershed.drop_plan.v1", "scope": "joint", "metric": None, "drops": [{**ENTRY, **changes}]}
    return _noted({"dropped": plan, "quantized": None, "adapters": None})


def _cut_embedding(content: dict[str, Any]) -> None:
    content["state_dict"]["model.model.embed_tokens.weight"] = torch.zeros(3, 3)


CHECKPOINTS: Mapping[str, Case] = {
    "checkpoint missing": Case([*VALIDATE[:-1], "--ckpt_path=nope.ckpt"], ("nope.ckpt", "no such file")),
    "checkpoint a folder": Case([*VALIDATE[:-1], "--ckpt_path=model"], ("'model'", "it is a folder")),
    "checkpoint empty": Case(VALIDATE, ("run.ckpt",), written("run.ckpt", "")),
    "checkpoint empty, to resume": Case(RESUME, ("run.ckpt",), written("run.ckpt", "")),
    "checkpoint cut": Case(VALIDATE, ("run.ckpt",), cut("run.ckpt")),
    "checkpoint cut, to measure": Case(MEASURE, ("run.ckpt",), cut("run.ckpt")),
    "checkpoint of text": Case(VALIDATE, ("run.ckpt",), written("run.ckpt", "weights\n")),
    "checkpoint a zip of something else": Case(VALIDATE, ("run.ckpt",), zipped),
    "checkpoint a pickle": Case(VALIDATE, ("run.ckpt",), written("run.ckpt", pickle.dumps({"state_dict": Path("x")}))),
    "checkpoint a tensor": Case(VALIDATE, ("run.ckpt",), lambda f: torch.save(torch.ones(3), f / "run.ckpt")),
    "checkpoint without weights": Case(VALIDATE, ("run.ckpt",), checkpoint(lambda c: {"epoch": 1})),
    "checkpoint whose weights are a list": Case(VALIDATE, ("run.ckpt",), checkpoint(lambda c: c.update(state_dict=[]))),
    "checkpoint of other shapes": Case(VALIDATE, ("weights do not fit",), checkpoint(_cut_embedding)),
    "checkpoint of other shapes, to measure": Case(MEASURE, ("weights do not fit",), checkpoint(_cut_embedding)),
    "checkpoint of other names": Case(
        VALIDATE, ("weights do not fit",), checkpoint(lambda c: c.update(state_dict={"a": torch.ones(1)}))
    ),
    "checkpoint of the weights alone, to resume": Case(
        RESUME,
        ("run.ckpt", "weights alone"),
        checkpoint(lambda c: [c.pop(k) for k in ("optimizer_states", "lr_schedulers", "loops")] and None),
    ),
    "checkpoint whose structure is a word": Case(VALIDATE, ("'layershed'", "version"), _noted("attention.1")),
    "checkpoint whose structure lacks parts": Case(VALIDATE, ("'layershed'", "version"), _noted({"dropped": None})),
    "checkpoint whose plan is a word": Case(
        VALIDATE, ("dropped sublayers", "dict"), _noted({"dropped": "attention.1", "quantized": None, "adapters": None})
    ),
    "checkpoint that drops what is not there": Case(VALIDATE, ("attention.9",), _dropping(block=9)),
    "checkpoint that drops an attribute": Case(VALIDATE, ("config.__class__",), _dropping(path="config.__class__")),
    "checkpoint quantized in a way there is not": Case(
        VALIDATE,
        ("quantiz", "int3"),
        _noted(
            {
                "dropped": None,
                "quantized": {"mode": "int3", "double_quant": True, "compute_dtype": "float32", "skip_modules": []},
                "adapters": None,
            }
        ),
    ),
    "checkpoint with adapters for what is not there": Case(
        VALIDATE,
        ("adapters", "nowhere"),
        _noted(
            {
                "dropped": None,
                "quantized": None,
                "adapters": {
                    "targets": ["nowhere"],
                    "settings": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False},
                },
            }
        ),
    ),
    "checkpoint with an unknown option": Case(
        VALIDATE, ("evil",), checkpoint(lambda c: c["hyper_parameters"].update(evil=1))
    ),
    "checkpoint whose options are a list": Case(
        VALIDATE, ("run.ckpt", "hyper_parameters"), checkpoint(lambda c: c.update(hyper_parameters=[1]))
    ),
    "checkpoint whose option has a wrong type": Case(
        VALIDATE, ("warmup_steps",), checkpoint(lambda c: c["hyper_parameters"].update(warmup_steps="many"))
    ),
}


def _data(says: str, *more: str, name: str = "a.jsonl", content: str | bytes = "") -> Case:
    return Case([*SCORE, f"--data.source={name}"], (name, says, *more), written(name, content))


def _rows(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DATA: Mapping[str, Case] = {
    "text empty": _data("empty", name="a.txt"),
    "text of spaces": _data("no text", name="a.txt", content="  \n\n \n"),
    "text too short": _data("training tokens", name="a.txt", content="Two.\n\nWords."),
    "text in another encoding": _data(
        "could not be read", name="a.txt", content="naïve café\n".encode("latin-1") * 200
    ),
    "text binary": _data("could not be read", name="a.txt", content=bytes(range(256)) * 40),
    "jsonl broken": _data("could not be read", content='{"text": "a"}\n{"text": \n'),
    "jsonl of numbers": _data("could not be read", content="1\n2\n3\n"),
    "jsonl without text": _data("'text'", "body", content=_rows(*({"body": "words"} for _ in range(9)))),
    "jsonl whose text is a number": _data("'text'", "int64", content=_rows(*({"text": 7} for _ in range(9)))),
    "jsonl whose text is a list": _data("'text'", content=_rows(*({"text": ["a"]} for _ in range(9)))),
    "jsonl of empty texts": _data("no text", content=_rows(*({"text": ""} for _ in range(9)))),
    "jsonl of nulls": _data("a.jsonl", content=_rows(*({"text": None} for _ in range(9)))),
    "json damaged": _data("could not be read", name="a.json", content="[{]"),
    "parquet damaged": _data("could not be read", name="a.parquet", content=b"PAR1" + bytes(50)),
    "parquet of text": _data("could not be read", name="a.parquet", content="not at all"),
    "no such ending": _data("end", name="a.csv", content="text\nwords\n"),
    "folder without files": Case(
        [*SCORE, "--data.source=nothing"], ("nothing", "no file"), lambda f: (f / "nothing").mkdir()
    ),
    "folder of several types": Case(
        [*SCORE, "--data.source=data"],
        ("data", ".jsonl, .txt"),
        both(written("data/a.txt", "x"), written("data/a.jsonl", "x")),
    ),
    "no such source": Case([*SCORE, "--data.source=nope"], ("nope", "no such file")),
    "hub without a name": Case([*SCORE, "--data.source=hub:"], ("hub:<name>",)),
    "no such column": Case(
        [*SCORE, "--data.source=a.jsonl", "--data.text_column=body"],
        ("'body'", "text"),
        written("a.jsonl", _rows({"text": "a"})),
    ),
    "block_size 1": Case([*SCORE, "--data.block_size=1"], ("block_size=1",)),
    "batch_size 0": Case([*SCORE, "--data.batch_size=0"], ("batch_size=0",)),
    "num_workers negative": Case([*SCORE, "--data.num_workers=-1"], ("num_workers=-1",)),
    "val_fraction 1": Case([*SCORE, "--data.val_fraction=1.0"], ("val_fraction=1.0",)),
    "val_fraction no number": Case([*SCORE, "--data.val_fraction=.nan"], ("val_fraction=nan",)),
    "max_tokens below a batch": Case([*SCORE, "--data.max_tokens=31"], ("max_tokens=31", "32")),
    "block longer than the model": Case([*SCORE, "--data.block_size=128"], ("block_size=128", "64 positions")),
}

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 10)
)
YAML: Mapping[str, Case] = {
    "yaml with tabs": Case(
        [*FIT, "--config=run.yaml"], ("config", "line 2"), written("run.yaml", "model:\n\tpretrained: x\n")
    ),
    "yaml a bomb": Case([*FIT, "--config=run.yaml"], ("run.yaml", "aliases"), written("run.yaml", BOMB)),
    "yaml a bomb in an option": Case(
        [*FIT, "--config=run.yaml"],
        ("run.yaml", "aliases"),
        written("run.yaml", f"{BOMB}model:\n  config: {{model_type: llama, bomb: *a9}}\n"),
    ),
    "yaml that holds itself": Case(
        [*FIT, "--config=run.yaml"], ("run.yaml", "aliases"), written("run.yaml", "model:\n  config: &a {self: *a}\n")
    ),
    "yaml binary": Case([*FIT, "--config=run.yaml"], ("run.yaml",), written("run.yaml", bytes(range(256)))),
    "yaml in another encoding": Case(
        [*FIT, "--config=run.yaml"], ("run.yaml",), written("run.yaml", "# caf\u00e9\n".encode("latin-1"))
    ),
    "yaml a list": Case([*FIT, "--config=run.yaml"], ("config",), written("run.yaml", "- a\n- b\n")),
    "yaml that makes objects": Case(
        [*FIT, "--config=run.yaml"],
        ("config",),
        written("run.yaml", "model: !!python/object/apply:os.system ['touch marker']\n"),
    ),
    "yaml with an unknown key": Case(
        [*FIT, "--config=run.yaml"], ("trainer.max_stepz",), written("run.yaml", "trainer:\n  max_stepz: 3\n")
    ),
    "yaml with a section that is a word": Case(
        [*FIT, "--config=run.yaml"], ("trainer",), written("run.yaml", "trainer: fast\n")
    ),
    "yaml with callbacks that are a word": Case(
        [*FIT, "--config=run.yaml"], ("trainer.callbacks",), written("run.yaml", "trainer:\n  callbacks: SublayerDrp\n")
    ),
    "yaml with a callback that is a number": Case(
        [*FIT, "--config=run.yaml"], ("trainer.callbacks",), written("run.yaml", "trainer:\n  callbacks: [5]\n")
    ),
    "yaml with a class that is none": Case(
        [*FIT, "--config=run.yaml"],
        ("trainer.callbacks",),
        written("run.yaml", "trainer:\n  callbacks: [{class_path: os.system, init_args: {command: touch marker}}]\n"),
    ),
}


def _trainer(says: str, option: str) -> Case:
    return Case([*FIT, f"--trainer.{option}"], (says,))


OPTIONS: Mapping[str, Case] = {
    "max_steps negative": _trainer("max_steps", "max_steps=-5"),
    "max_epochs negative": _trainer("max_epochs", "max_epochs=-5"),
    "max_time no time": _trainer("'soon'", "max_time=soon"),
    "devices too many": _trainer("devices", "devices=99"),
    "devices negative": _trainer("devices", "devices=-3"),
    "devices 0": _trainer("devices", "devices=0"),
    "no such device": _trainer("CUDAAccelerator", "accelerator=cuda"),
    "precision unknown": _trainer("precision", "precision=7-bit"),
    "strategy unknown": _trainer("strategy", "strategy=teleport"),
    "strategy that needs another package": _trainer("deepspeed", "strategy=deepspeed"),
    "accumulate 0": _trainer("accumulate_grad_batches", "accumulate_grad_batches=0"),
    "limit above 1": _trainer("limit_train_batches", "limit_train_batches=1.5"),
    "limit negative": _trainer("limit_val_batches", "limit_val_batches=-1"),
    "validation at no step": _trainer("val_check_interval", "val_check_interval=1.5"),
    "profiler unknown": _trainer("profiler", "profiler=eyes"),
    "clip algorithm unknown": _trainer("gradient_clip_algorithm", "gradient_clip_algorithm=scissors"),
    "nodes 0": _trainer("num_nodes", "num_nodes=0"),
    "logger unknown": _trainer("logger", "logger=Papyrus"),
    "learning rate negative": Case(
        [*FIT, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1.0"], ("-1.0",)
    ),
    "schedule unknown": Case([*FIT, "--model.schedule=sawtooth"], ("model.schedule", "sawtooth")),
    "warmup negative": Case([*FIT, "--model.warmup_steps=-1"], ("warmup_steps=-1",)),
    "dtype unknown": Case([*FIT, "--model.dtype=int7"], ("model.dtype", "int7")),
    "endless cosine": Case([*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=-1"], ("schedule='cosine'",)),
    "distillation out of range": Case([*FIT, "--model.distillation.weight=1.5"], ("weight=1.5",)),
    "seed negative": Case([*FIT, "--seed_everything=-1"], ("seed",)),
    "seed too large": Case([*FIT, f"--seed_everything={2**64}"], ("seed",)),
}


def _callback(*says: str, **callback: Any) -> Case:
    return Case([*FIT, "--config=run.yaml"], says, config_of(**callback))


CALLBACKS: Mapping[str, Case] = {
    "drop at step 0": _callback("start=0", SublayerDrop={"start": 0, "count": 1}),
    "drop in the past": _callback("start=-4", SublayerDrop={"start": -4, "count": 1}),
    "drop none": _callback("count=0", SublayerDrop={"start": 1, "count": 0}),
    "drop a negative share": _callback("ratio=-0.5", SublayerDrop={"start": 1, "ratio": -0.5}),
    "drop a share of nan": _callback("ratio=nan", SublayerDrop={"start": 1, "ratio": float("nan")}),
    "drop in no rounds": _callback("rounds=0", SublayerDrop={"start": 1, "count": 1, "rounds": 0}),
    "drop every 0 steps": _callback(
        "every_n_steps=0", SublayerDrop={"start": 1, "count": 1, "rounds": 2, "every_n_steps": 0}
    ),
    "drop by no batches": _callback(
        "calibration_batches=0", SublayerDrop={"start": 1, "count": 1, "calibration_batches": 0}
    ),
    "drop and measure less than nothing": _callback(
        "quality_batches=-1", SublayerDrop={"start": 1, "count": 1, "quality_batches": -1}
    ),
    "drop for no speedup": _callback("target_speedup=1.0", SublayerDrop={"start": 1, "target_speedup": 1.0}),
    "drop for a speedup of nan": _callback(
        "target_speedup=nan", SublayerDrop={"start": 1, "target_speedup": float("nan")}
    ),
    "drop for an infinite speedup": _callback(
        "target_speedup=inf",
        SublayerDrop={"start": 1, "target_speedup": float("inf"), "speed": {"prompt_tokens": 4, "new_tokens": 2}},
    ),
    "drop with a block that is not there": _callback(
        "protect", "9", SublayerDrop={"start": 1, "count": 1, "protect": [9]}
    ),
    "drop in another transformer": _callback(
        "teacher", SublayerDrop={"start": 1, "count": 1, "transformer": "teacher"}
    ),
    "drop and measure by no runs": _callback(
        "runs=0", SublayerDrop={"start": 1, "target_speedup": 1.1, "speed": {"runs": 0}}
    ),
    "monitor at no step": _callback("every_n_steps=0", RedundancyMonitor={"every_n_steps": 0}),
    "monitor of another metric": _callback("'sine'", RedundancyMonitor={"metric": "sine"}),
    "speed of no prompt": _callback("prompt_tokens=0", SpeedMonitor={"prompt_tokens": 0}),
    "speed of a prompt that does not fit": _callback(
        "prompt_tokens=999", "64 positions", SpeedMonitor={"prompt_tokens": 999}
    ),
    "speed without a mode": _callback("quality_mode", SpeedMonitor={"quality": "bleu"}),
    "quantized in the past": _callback("start=-1", Quantization={"start": -1}),
    "quantized to 3 bits": _callback("nf3", Quantization={"mode": "nf3"}),
    "quantized and left as it is": _callback("start=1", Quantization={"start": 1}),
    "adapters of rank 0": _callback("rank=0", LoRARecovery={"start": 1, "rank": 0}),
    "adapters that drop everything out": _callback("dropout=1.0", LoRARecovery={"start": 1, "dropout": 1.0}),
    "adapters for nothing": _callback("target_modules", LoRARecovery={"start": 1, "target_modules": []}),
    "adapters for what is not there": _callback("nowhere", LoRARecovery={"start": 1, "target_modules": ["nowhere"]}),
    "adapters that learn nothing": _callback("lr_factor=0", LoRARecovery={"start": 1, "lr_factor": 0.0}),
    "adapters after the end": _callback("start=30", LoRARecovery={"start": 30}),
    "export into another model's folder": _callback("holds no saved model", Export={"folder": "../../data"}),
    "export over the model": _callback("being dropped from", Export={"folder": "../../model"}),
    "export over the run directory": _callback("run directory", Export={"folder": "."}),
    "export into a file": _callback("text.txt' is a file", Export={"folder": "../../text.txt/pruned"}),
    "adapters saved over the model": _callback(
        "holds no saved adapter", LoRARecovery={"start": 1, "finish": "adapter", "folder": "../../model"}
    ),
    "report of no step": _callback("every_n_steps=0", Report={"every_n_steps": 0}),
}

PRUNE = ["prune", MODEL, *ON, *SPEED, "--count=1"]
PLACES: Mapping[str, Case] = {
    "output a file": Case([*PRUNE, "--output=../../text.txt"], ("text.txt", "holds no saved model")),
    "output inside a file": Case([*PRUNE, "--output=../../text.txt/pruned"], ("text.txt'", "is a file")),
    "output of something else": Case([*PRUNE, "--output=../../data"], ("data", "holds no saved model")),
    "output the model itself": Case([*PRUNE, "--output=../../model"], ("being dropped from",)),
    "output the run directory": Case([*PRUNE, "--output=."], ("run directory",)),
    "output above the run directory": Case([*PRUNE, "--output=.."], ("run directory",)),
    "root a file": Case([*PRUNE, "--trainer.default_root_dir=text.txt"], ("text.txt", "is a file")),
    "root inside a file": Case([*FIT, "--trainer.default_root_dir=text.txt/runs"], ("text.txt/runs", "is a file")),
    "root in a place that takes no files": Case(
        [*SCORE, "--trainer.default_root_dir=/proc/layershed"], ("/proc/layershed",)
    ),
    "root with a byte that no name has": Case([*SCORE, "--trainer.default_root_dir=a\0b"], ("default_root_dir",)),
    "root with a name too long": Case([*SCORE, f"--trainer.default_root_dir={300 * 'a'}"], ("default_root_dir",)),
    "dropped model to plan for": Case(
        ["plan", DROPPED, "--count=1", "--prompt_tokens=4", "--new_tokens=2", "--trainer.accelerator=cpu"],
        ("already lacks",),
    ),
    "speed of more than fits": Case(
        [*PRUNE, "--prompt_tokens=60", "--new_tokens=60"], ("prompt_tokens=60", "64 positions")
    ),
    "batches none": Case([*SCORE[:-1], "--batches=0"], ("batches=0",)),
}
