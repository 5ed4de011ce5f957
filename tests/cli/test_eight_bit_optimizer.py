"""8-bit optimizers of bitsandbytes in CausalLM: named by their full path, with states of 8 bits, resumed exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from layershed.cli.main import main
from tests.support.thinned import one_of

pytestmark = [
    pytest.mark.usefixtures("own_seed", "one_parser"),
    pytest.mark.filterwarnings("ignore"),  # of Lightning and jsonargparse, as on any command line
]

CONFIG = {
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        "schedule": "constant",
    },
    "data": {"block_size": 16, "batch_size": 2, "max_tokens": 1024},
    "trainer": {
        "max_steps": 6,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 2, "save_top_k": -1},
            }
        ],
    },
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def fit(folder, *words):
    assert main(["fit", "--config", "config.yaml", "--trainer.default_root_dir", folder, *words]) == 0
    found = sorted(Path(folder).rglob("*step=6.ckpt"))
    return torch.load(found[-1], weights_only=True)


@pytest.mark.parametrize("name", one_of(["AdamW8bit", "Lion8bit"]))
def test_8_bit_optimizer_resumes_exactly(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = {"class_path": f"bitsandbytes.optim.{name}", "init_args": {"lr": 1e-3}}
    config = {**CONFIG, "model": {**CONFIG["model"], "optimizer": optimizer}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    whole = fit("whole")
    assert torch.uint8 in {tensor.dtype for tensor in tensors(whole["optimizer_states"])}
    middle = next(Path("whole").rglob("*step=2.ckpt"))
    resumed = fit("resumed", "--ckpt_path", str(middle))
    for part in ("state_dict", "optimizer_states"):
        ours, theirs = tensors(whole[part]), tensors(resumed[part])
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


CHECK = """
import runpy, sys
sys.argv = ["train.py", "fit", "--model.optimizer=AdamW8bit"]
try:
    runpy.run_path("{train}", run_name="__main__")
except SystemExit as stop:
    print(stop.code, {{"bitsandbytes", "peft", "datasets"}} & set(sys.modules))
""".format(train=Path(__file__).parents[2] / "train.py")


def test_short_8_bit_name_error_gives_the_full_path_without_heavy_imports():
    """As a process of its own. bitsandbytes' AdamW would make plain AdamW ambiguous, and it prints of kernels."""
    done = subprocess.run([sys.executable, "-c", CHECK], timeout=120, capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"
    (told,) = done.stderr.splitlines()
    assert told.startswith("error: ")
    assert "model.optimizer: Expected a dot import path string: AdamW8bit" in told
    assert "give the full path of a class, such as bitsandbytes.optim.AdamW8bit" in told
