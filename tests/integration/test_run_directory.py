"""Where the files of a run go, with and without a logger."""

import logging

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from layershed.callbacks import RedundancyMonitor, SublayerDrop
from layershed.integration.run import run_directory
from tests.support.runs import fit_foreign


def trainer_in(monkeypatch, place, *callbacks, **options):
    monkeypatch.chdir(place)
    settings = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(max_steps=4, accelerator="cpu", callbacks=list(callbacks), **{**settings, **options})


def test_run_without_a_logger_writes_nothing_into_the_current_directory_and_says_so_once(monkeypatch, tmp_path, caplog):
    trainer = trainer_in(monkeypatch, tmp_path, RedundancyMonitor(1), SublayerDrop(2, count=1), logger=False)
    with caplog.at_level(logging.INFO):
        fit_foreign(trainer)
    assert list(tmp_path.iterdir()) == []
    folder = run_directory(trainer)
    assert {path.name for path in folder.iterdir()} == {"importance.csv", "drop_plan.json"}
    said = [record.message for record in caplog.records if "no logger" in record.message]
    assert len(said) == 1
    assert str(folder) in said[0]
    assert "default_root_dir" in said[0]


@pytest.mark.parametrize("place", ["elsewhere", "below"])
def test_run_without_a_logger_writes_into_a_given_default_root_dir(monkeypatch, tmp_path, caplog, place):
    here = tmp_path / "here"
    here.mkdir()
    root = here / "below" if place == "below" else tmp_path / "elsewhere"
    given = "below" if place == "below" else root
    trainer = trainer_in(monkeypatch, here, SublayerDrop(2, count=1), logger=False, default_root_dir=given)
    with caplog.at_level(logging.INFO):
        fit_foreign(trainer)
    assert (root / "drop_plan.json").is_file()
    assert not [record for record in caplog.records if "no logger" in record.message]


def test_run_with_a_logger_writes_into_its_directory(monkeypatch, tmp_path):
    logger = CSVLogger(".", name="", version="")
    trainer = trainer_in(monkeypatch, tmp_path, SublayerDrop(2, count=1), logger=logger)
    fit_foreign(trainer)
    assert (tmp_path / "drop_plan.json").is_file()


class Named(Logger):
    """As WandbLogger: it keeps its files in the current directory, and knows its version only once it is used."""

    save_dir = "."
    name = "project"

    def __init__(self, version):
        super().__init__()
        self._known = version

    @property
    def version(self):
        return self._known

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("version", "folder"), [("a1b2", "a1b2"), (3, "version_3"), (None, None)])
def test_logger_in_the_current_directory_gets_a_folder_for_each_run(monkeypatch, tmp_path, caplog, version, folder):
    logger = Named(version)
    trainer = trainer_in(monkeypatch, tmp_path, RedundancyMonitor(1), SublayerDrop(2, count=1), logger=logger)
    with caplog.at_level(logging.INFO):
        fit_foreign(trainer)
    place = run_directory(trainer)
    assert {path.name for path in place.iterdir()} == {"importance.csv", "drop_plan.json"}
    assert place == (tmp_path / "project" / folder if folder else place)
    assert [path.name for path in tmp_path.iterdir()] == (["project"] if folder else [])
    said = [record.message for record in caplog.records if "logger's directory is the current one" in record.message]
    assert len(said) == 1
    assert str(place) in said[0]
    logger._known = "later"
    assert run_directory(trainer) == place
