"""The command line on two processes that Lightning starts, and the end of one when the other is killed."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
CONFIG = """\
seed_everything: 0
model:
  config: {model_type: llama, vocab_size: 259, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3,
           num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}
data: {source: pydoc, tokenizer: bytes, block_size: 32, batch_size: 2, max_tokens: 20000}
trainer:
  default_root_dir: FOLDER
  accelerator: cpu
  strategy: ddp
  devices: 2
  max_steps: STEPS
  limit_val_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true, every_n_train_steps: 5}}
    - {class_path: layershed.callbacks.RedundancyMonitor, init_args: {every_n_steps: 2}}
    - {class_path: layershed.callbacks.SublayerDrop,
       init_args: {start: 6, count: 2, calibration_batches: 2, quality_batches: 1}}
    - {class_path: layershed.callbacks.Export}
"""


def write_config(folder, steps):
    path = folder / "ranks.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(folder / "runs")).replace("STEPS", str(steps)))
    return path


@contextmanager
def fitting(folder, steps, *words):
    """The command, running; nothing that it starts outlives the context."""
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "train.py", "fit", "--config", str(write_config(folder, steps)), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    children = []
    try:
        yield process, children
    finally:
        with_them = children + (psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])
        process.kill()
        process.wait()
        for child in with_them:
            if child.is_running():
                child.kill()


def fit(folder, *words):
    """Run to the end; returns the exit code and the output."""
    with fitting(folder, 12, *words) as (process, _):
        code = process.wait(timeout=300)
    return code, (folder / "output.txt").read_text()


def seconds_to_follow(folder, dies):
    """Kill a rank once both train; whether the other ended with an error, and after how many seconds."""
    with fitting(folder, 10**6) as (process, children):
        rows = _wait(lambda: next((p for p in folder.rglob("importance.csv") if len(p.read_bytes()) > 2000), None), 300)
        assert rows, (folder / "output.txt").read_text()
        children += psutil.Process(process.pid).children()
        (child,) = children
        (process if dies == 0 else child).kill()
        start = time.monotonic()
        if dies == 0:
            process.wait()
            ended = _wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 60)
        else:
            ended = _wait(lambda: process.poll() is not None, 60) and process.returncode != 0
    return bool(ended), time.monotonic() - start


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    return None
