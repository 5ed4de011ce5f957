"""Fixtures of the command line: a folder of its own, parsers built once, and the world of the bad inputs."""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from layershed.cli.lightning_cli import LayershedCLI
from tests.support.bad_input.trial import make_world
from tests.support.command_line import FILES

PARSERS = {}


@pytest.fixture
def own_seed(monkeypatch):
    """No run leaves a seed behind."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def own_world(monkeypatch, tmp_path, own_seed):
    """No run writes outside; the files that the words name are there."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("afolder").mkdir()


@pytest.fixture
def one_parser(monkeypatch):
    """A parser with all options of Lightning's Trainer takes a tenth of a second to build: build each once."""
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
def world(tmp_path_factory):
    """The folder that every bad input finds before the damage."""
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
    """A copy of the small world to be in."""
    folder = tmp_path / "inner" / "place"
    shutil.copytree(world, folder)
    with chdir(folder):
        yield folder
    assert not list(tmp_path.rglob("marker*")), "something was run"
