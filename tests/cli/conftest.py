"""Fixtures of the command line: a temporary folder, cached parsers, the folder of the bad inputs."""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import layershed as ls
from layershed.cli.lightning_cli import LayershedCLI
from layershed.performance import benchmark as benchmarking
from tests.support.bad_input.trial import make_world
from tests.support.command_line import FILES
from tests.support.models import build_model
from tests.support.small_world import TINY
from tests.support.ticking import MADE_UP

PARSERS = {}


@pytest.fixture
def own_seed(monkeypatch):
    """Restores the seed after a run."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def own_world(monkeypatch, tmp_path, own_seed):
    """A temporary working folder with the files that the command lines name."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("afolder").mkdir()


@pytest.fixture
def one_parser(monkeypatch):
    """Builds each parser once: building one takes a tenth of a second."""
    build = LayershedCLI.setup_parser

    def reuse(self, *args, **kwargs):
        built = tuple(self.subcommands())
        if built not in PARSERS:
            build(self, *args, **kwargs)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            PARSERS[built] = {name: getattr(self, name) for name in names}
        self.__dict__.update(PARSERS[built])
        self.parser._instantiators = None

    monkeypatch.setattr(LayershedCLI, "setup_parser", reuse)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a small model whose branches matter, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    build_model("llama", **{**fields, "head_dim": 8, "num_hidden_layers": 4}).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def without_two(saved, tmp_path_factory):
    """The same folder without two of its sublayers."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.name in ("attention.1", "mlp.2")])
    folder = tmp_path_factory.mktemp("model") / "dropped"
    return ls.save_pretrained(model, folder, tokenizer=ByT5Tokenizer.from_pretrained(saved))


@pytest.fixture
def parsed(monkeypatch):
    """The parsed configs; nothing is built from them."""
    seen = []
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: seen.append(self.config[self.subcommand]))
    monkeypatch.setattr(LayershedCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "_run_subcommand", lambda self, subcommand: None)
    return seen


@pytest.fixture
def made_up(monkeypatch):
    """Made-up ceilings: measuring them takes a third of a second."""
    monkeypatch.setattr(benchmarking, "measure_ceilings", lambda *_: MADE_UP)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The undamaged folder of the bad inputs."""
    folder = tmp_path_factory.mktemp("bad") / "world"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        with torch.random.fork_rng(devices=[]):
            make_world(folder)
    return folder


@pytest.fixture
def place(tmp_path, world):
    """A copy of that folder as working folder."""
    folder = tmp_path / "inner" / "place"
    shutil.copytree(world, folder)
    with chdir(folder):
        yield folder
    assert not list(tmp_path.rglob("marker*")), "something was run"
