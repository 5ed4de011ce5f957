"""How a run ran: command, seed, versions, processor, date, configuration, and how to load what it left."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from layershed.integration.namespaces import LightningModule, Trainer
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import Exports
from layershed.performance.stopwatch import describe_device
from layershed.saving.standalone import MODULE, auto_class_of

_PACKAGES = ("layershed", "torch", "lightning", "pytorch-lightning", "transformers", "peft", "bitsandbytes")
_LONGEST = 500


def facts_of(trainer: Trainer, pl_module: LightningModule, seconds: float) -> tuple[tuple[str, str], ...]:
    """Rows about how the run ran.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        seconds: How long the run took, with its former parts.
    """
    rows = [("Command", command())] if command() else []
    seed = os.environ.get("PL_GLOBAL_SEED")  # Lightning's seed_everything sets it
    rows += [] if seed is None else [("Seed", seed)]
    rows.append(("Versions", ", ".join(versions())))
    ranks = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    rows.append(("Processor", f"{processor(pl_module)}{ranks}, precision {trainer.precision}"))
    rows.append(("Ended", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())))
    rows.append(("Duration", f"{duration(seconds)} for {trainer.global_step:,} optimizer steps"))
    return tuple(rows)


def command() -> str:
    """The command line of this process; empty if it is no script."""
    script = sys.argv[0] if sys.argv else ""
    return shlex.join(["python", *sys.argv]) if script.endswith(".py") else ""


def versions() -> Iterator[str]:
    """Python and the packages that matter, with their versions."""
    yield f"Python {platform.python_version()}"
    for name in _PACKAGES:
        if name == "layershed" or name.replace("-", "_") in sys.modules:
            try:
                yield f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue


def processor(pl_module: LightningModule) -> str:
    """Name of the device, and of the processor where that is the device."""
    device = describe_device(pl_module.device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {device}" if pl_module.device.type == "cpu" and name else device


def duration(seconds: float) -> str:
    """Such as ``2 h 5 min`` or ``41 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def config_of(trainer: Trainer, pl_module: LightningModule, directory: Path) -> str:
    """The configuration: what LightningCLI saved for this run, or else the hyperparameters of the module."""
    for other in callbacks_of(trainer):
        name = getattr(other, "config_filename", None)  # LightningCLI's SaveConfigCallback
        if isinstance(name, str) and (directory / name).is_file():
            return (directory / name).read_text(encoding="utf-8")
    found: dict[str, Any] = dict(getattr(pl_module, "hparams", {}))
    return "\n".join(f"{name}: {_short(value)}" for name, value in found.items())


def usage_of(trainer: Trainer, directory: Path) -> tuple[tuple[str, str], ...]:
    """How to load the exported folder, or else the last checkpoint."""
    folders = [directory / other.folder for other in callbacks_of(trainer) if isinstance(other, Exports)]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        code = f"import layershed as ls\n\nls.load_checkpoint(module, {str(path)!r})  # your own LightningModule"
        return (("Bring a module to the state of the checkpoint:", code),) if path else ()
    if not (folder / "config.json").is_file():
        code = f"import layershed as ls\n\nls.load_weights(model, {str(folder)!r})  # the dense model, newly built"
        return (("In Python:", code),)
    lines = ["import layershed as ls", "", f"model = ls.load_pretrained({str(folder)!r})"]
    if (folder / "tokenizer_config.json").is_file():
        lines[1:1] = ["from transformers import AutoTokenizer"]
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})",
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))",
        ]
    return (("In Python, with layershed:", "\n".join(lines)), _without_layershed(folder))


def _without_layershed(folder: Path) -> tuple[str, str]:
    auto = auto_class_of(folder)
    name, path = auto or "AutoModelForCausalLM", str(folder) if auto else "standalone"
    load = f"from transformers import {name}\n\nmodel = {name}.from_pretrained({path!r}, trust_remote_code=True)"
    if auto:
        return f"By transformers alone, which runs {MODULE}.py of the folder:", load
    save = 'ls.save_pretrained(model, "standalone", standalone=True)'
    label = "For programs that have transformers but not layershed, save it with its modelling code:"
    return label, f"{save}\n\n{load}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
