"""The command line as tests run it: small models, short words, and the files that they name."""

import json

import yaml

from layershed.cli.main import main
from layershed.planning.plan import Drop, DropPlan, Sublayer
from tests.support.small_world import TEXT, TINY

MAMBA = {"model_type": "mamba", "vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
DATA = ["--data.source=text.txt", "--data.block_size=16", "--data.batch_size=2", "--data.max_tokens=512"]
TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_model_summary=false",
]
SPEED = ["--prompt_tokens=4", "--new_tokens=2", "--runs=2"]


def model_of(**fields):
    return f"--model.config={json.dumps(fields)}"


SMALL = [model_of(**TINY), *DATA, *TRAINER]
FIT, SCORE, PRUNE = ["fit", *SMALL], ["score", *SMALL], ["prune", *SMALL, *SPEED]
BENCHMARK = ["benchmark", *SMALL, *SPEED, "--quality_batches=2"]
PLAN = ["plan", model_of(**TINY), "--prompt_tokens=4", "--new_tokens=2"]


def drop(**settings):
    return callbacks({"class_path": "layershed.callbacks.SublayerDrop", "init_args": settings})


def callbacks(*entries):
    return yaml.safe_dump({"trainer": {"callbacks": list(entries)}})


FILES = {
    "text.txt": TEXT,
    "empty.txt": "",
    "afile": "x",
    "damaged.ckpt": b"not a checkpoint",
    "damaged_plan.json": "{",
    "other_plan.json": DropPlan((Drop(Sublayer(9, "mlp", "model.layers.9.mlp")),)).to_json(),
    "typo.yaml": "model:\n  pretraind: null\n",
    "section.yaml": "modle:\n  pretrained: null\n",
    "argument.yaml": drop(start=1, count=1, calib_on="val"),
    "ratoi.yaml": drop(start=1, ratoi=0.5),
    "forgotten.yaml": drop(count=1),
    "metric.yaml": drop(start=1, count=1, metric="cosin"),
    "ratio.yaml": drop(start=1, ratio=1.2),
    "both.yaml": drop(start=1, ratio=0.2, count=1),
    "neither.yaml": drop(start=1),
    "many.yaml": drop(start=1, count=99),
    "late.yaml": drop(start=5, count=1),
    "drop.yaml": drop(start=1, count=1),
    "class.yaml": callbacks({"class_path": "layershed.callbacks.SublayerDorp"}),
    "short.yaml": callbacks({"class_path": "SublayerDorp"}),
    "module.yaml": callbacks({"class_path": "nopackage.Nope"}),
    "nocallback.yaml": callbacks({"class_path": "collections.OrderedDict"}),
    "steps.yaml": "trainer:\n  max_steps: many\n",
    "broken.yaml": "model:\n  pretrained: [1,\n data: {\n",
    "scalar.yaml": "hello\n",
}

KEEP = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True}}
DROPPING = {
    "class_path": "SublayerDrop",
    "init_args": {"start": 3, "count": 1, "calibration_batches": 2, "quality_batches": 1},
}


def run(words, **kwargs):
    """Exit code, as a shell would see it."""
    try:
        return main(words, **kwargs)
    except SystemExit as stop:
        return stop.code
