"""What benchmarks/bad_input.py tries: a case, and how files get damaged."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]

TEXT = ["--data.source=text.txt", "--data.block_size=16", "--data.batch_size=2", "--data.max_tokens=512"]
TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
]
ON = [*TEXT, *TRAINER]
MODEL, DROPPED = "--model.pretrained=./model", "--model.pretrained=./dropped"
SPEED = ["--prompt_tokens=4", "--new_tokens=2", "--runs=2"]
SCORE, FIT = ["score", MODEL, *ON, "--batches=1"], ["fit", MODEL, *ON]
WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        words: Of the command line.
        says: What the sentence must contain.
        damage: Done to the files first.
    """

    words: list[str]
    says: tuple[str, ...]
    damage: Damage = lambda _: None


def written(name: str, content: str | bytes) -> Damage:
    """A file with that content."""

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def fields(name: str, **changes: Any) -> Damage:
    """A JSON file with other fields; without those that are None."""

    def damage(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text(encoding="utf-8")), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return damage


def cut(name: str, share: float = 0.5) -> Damage:
    """The beginning of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def gone(name: str) -> Damage:
    """No such file."""
    return lambda folder: (folder / name).unlink()


def weights(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Other weights."""

    def damage(root: Path) -> None:
        tensors = load_file(root / folder / WEIGHTS)
        change(tensors)
        save_file(tensors, root / folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Another checkpoint."""

    def damage(root: Path) -> None:
        content = torch.load(root / "run.ckpt", weights_only=True)
        torch.save(change(content) or content, root / "run.ckpt")

    return damage


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def zipped(folder: Path) -> None:
    """A zip of something else."""
    with zipfile.ZipFile(folder / "run.ckpt", "w") as archive:
        archive.writestr("letter.txt", "dear reader")


def config_of(**callback: Any) -> Damage:
    """``run.yaml`` with one callback."""
    (name, options), *_ = callback.items()
    content = {"trainer": {"callbacks": [{"class_path": f"layershed.callbacks.{name}", "init_args": options}]}}
    return written("run.yaml", yaml.safe_dump(content))


def plan_with(**changes: Any) -> Damage:
    """``plan.json`` whose only entry has other fields."""
    entry = {"block": 1, "kind": "attention", "path": "model.layers.1.self_attn", "score": 0.1, "step": 3, **changes}
    return fields("plan.json", drops=[entry])


def dropped_with(**changes: Any) -> Damage:
    """A dropped folder whose config says something else of the module that it drops."""

    def damage(folder: Path) -> None:
        path = folder / "dropped" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for entry in config["dropped_modules"].values():
            entry |= changes
        path.write_text(json.dumps(config), encoding="utf-8")

    return damage
