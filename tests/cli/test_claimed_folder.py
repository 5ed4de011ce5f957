"""Runs that start together get folders of their own."""

import copy
import pickle
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier, Thread

import pytest
from lightning.pytorch.utilities import rank_zero_only

from layershed.cli import claimed_folder
from layershed.cli.claimed_folder import ClaimedFolder, claim_version
from layershed.cli.trainer import Trainer
from tests.support.command_line import BENCHMARK, FIT, PLAN, PRUNE, SCORE, SMALL, run
from tests.support.thinned import some_of

TOGETHER = 8


def claim_at(barrier, root, found):
    barrier.wait(60)
    found.put(claim_version(root))


def test_processes_at_a_barrier_claim_different_numbers(tmp_path):
    context = get_context("fork")
    root, found, barrier = tmp_path / "new" / "runs", context.Queue(), context.Barrier(TOGETHER)
    processes = [context.Process(target=claim_at, args=(barrier, root, found)) for _ in range(TOGETHER)]
    for process in processes:
        process.start()
    numbers = sorted(found.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert numbers == list(range(TOGETHER))
    assert sorted(path.name for path in root.iterdir()) == [f"version_{number}" for number in range(TOGETHER)]


def test_trainers_in_threads_at_a_barrier_write_to_different_folders(tmp_path):
    trainers = [Trainer(accelerator="cpu", default_root_dir=tmp_path) for _ in range(TOGETHER)]
    barrier, found = Barrier(TOGETHER), []

    def start(trainer):
        barrier.wait(60)
        found.append({trainer.log_dir, *(logger.log_dir for logger in trainer.loggers)})

    threads = [Thread(target=start, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(folders) == 1 for folders in found), "both loggers of a run share its folder"
    assert {folder for folders in found for folder in folders} == {
        str(tmp_path / f"version_{number}") for number in range(TOGETHER)
    }


COMMANDS = {
    "fit": FIT,
    "validate": ["validate", *SMALL],
    "test": ["test", *SMALL],
    "predict": ["predict", *SMALL],
    "score": [*SCORE, "--batches=1"],
    "prune": [*PRUNE, "--count=1", "--batches=1", "--quality_batches=1"],
    "benchmark": [*BENCHMARK, "--counts=[1]", "--scopes=[mlp]", "--batches=1"],
    "plan": [*PLAN, "--device=a100"],
}


@pytest.mark.default_cases(1)
@pytest.mark.usefixtures("own_world", "one_parser")
@pytest.mark.parametrize("command", some_of(COMMANDS, 3))
def test_command_overtaken_by_another_takes_the_next_number(command, monkeypatch):
    """The other command creates version_0 after this one has looked."""
    taken = Path("runs/version_0")

    def overtaken(root):
        taken.mkdir(parents=True)
        (taken / "config.yaml").write_text("of the other command")
        return 0

    monkeypatch.setattr(claimed_folder, "next_version", overtaken)
    assert run(COMMANDS[command]) == 0
    assert [path.name for path in taken.iterdir()] == ["config.yaml"]
    assert (taken / "config.yaml").read_text() == "of the other command"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0", "version_1"]
    assert "seed_everything" in Path("runs/version_1/config.yaml").read_text()


@pytest.mark.usefixtures("own_world", "one_parser")
def test_refused_prune_leaves_no_folder(capsys):
    assert run([*PRUNE, "--count=1", "--output=../../afolder/../text.txt"]) == 1
    assert "text.txt" in capsys.readouterr().err
    assert not list(Path("runs").glob("version_*"))


def test_reading_the_number_claims_once(tmp_path):
    folder = ClaimedFolder(tmp_path)
    assert not list(tmp_path.iterdir())
    assert [folder.number, folder.number, ClaimedFolder(tmp_path).number] == [0, 0, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda folder: pickle.loads(pickle.dumps(folder))])
def test_copied_folder_keeps_its_number(tmp_path, copied):
    folder = ClaimedFolder(tmp_path)
    assert copied(folder).number == folder.number == 0
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_other_ranks_claim_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    folder = ClaimedFolder(tmp_path)
    assert folder.number == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert folder.number == 0
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_name_taken_by_a_file_is_passed_over(tmp_path):
    (tmp_path / "version_0").write_text("")
    assert claim_version(tmp_path) == 1
