"""Killed by SIGKILL and resumed equals left alone, bit for bit; ``benchmarks/chaos.py`` counts over many kills."""

import csv
import random
import shutil
from itertools import cycle

import pytest
import torch

from tests.support import chaos
from tests.support.chaos_runs import KINDS, MODULES, RESULT, Kill

# While a checkpoint is written, at each place once; the first by default, whose uninterrupted run serves the comparison
# below, too. More with -m chaos.
QUICK = {
    "one-shot": Kill("after", 8),  # the end of an epoch: its validation and its row are still to come
    "iterative": Kill("middle", 8),
    "lora": Kill("replace", 11),
    "nf4": Kill("fsync", 5),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were left alone, each made once."""
    made = {}

    def get(module, kind):
        if (module, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{module}-{kind}") / "whole"
            made[module, kind] = folder, chaos.run_segment(module, kind, folder)[1]
        return made[module, kind]

    return get


def check(whole, tmp_path, module, kind, kills):
    folder, _ = whole(module, kind)
    chain = chaos.run_chain(module, kind, tmp_path / "killed", iter(kills), len(kills))
    assert chain.kills == list(kills)
    assert chain.segments == len(kills) + 1
    assert chaos.compare(folder, tmp_path / "killed") == []


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_run_killed_once_and_resumed_ends_as_the_uninterrupted_one(whole, tmp_path, kind):
    check(whole, tmp_path, "foreign", kind, [QUICK[kind]])


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", MODULES)
def test_run_killed_twice_at_every_place_ends_as_the_uninterrupted_one(whole, tmp_path, module, kind):
    rng = random.Random(f"{module} {kind}")
    for number, place in enumerate(chaos.PLACES):
        kills = [Kill(place, rng.randint(1, 10)), Kill("time", rng.uniform(0, 0.3))]
        check(whole, tmp_path / str(number), module, kind, kills)


def test_chaos_comparison_sees_every_difference(whole, tmp_path):
    """Or the harness would call everything identical."""
    folder, _ = whole("foreign", "one-shot")

    def changed(what):
        copy = tmp_path / what
        shutil.copytree(folder, copy)
        result = torch.load(copy / RESULT)
        logs = copy / "version_0"
        result["logs"] = str(logs)
        if what == "weight":
            weight = next(iter(result["weights"].values()))
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
        elif what == "optimizer":
            result["optimizers"][0]["state"][0]["exp_avg"].view(-1)[0] += 1e-3
        elif what == "schedule":
            result["schedules"][0]["last_epoch"] += 1
        elif what == "plan":
            result["callbacks"]["SublayerDrop"]["plan"]["drops"].reverse()
        elif what == "importance":
            (logs / "importance.csv").write_text((logs / "importance.csv").read_text().replace("9", "8", 1))
        elif what in ("row", "value"):
            with (logs / "metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            if what == "row":
                del rows[5]
            else:
                row = next(row for row in rows if row["train_loss"])
                row["train_loss"] = str(float(row["train_loss"]) + 1e-6)
            with (logs / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        torch.save(result, copy / RESULT)
        return chaos.compare(folder, copy)

    assert changed("nothing") == []
    for what in ("weight", "optimizer", "schedule", "plan", "importance", "row", "value"):
        assert changed(what), what


def test_chaos_kills_come_at_times_and_in_writes_by_turns():
    kills = chaos.random_kills(random.Random(0), 2.0, cycle(chaos.PLACES))
    found = [next(kills) for _ in range(8)]
    assert [kill.where for kill in found] == ["middle", "time", "fsync", "time", "replace", "time", "after", "time"]
    assert all(1 <= kill.number <= chaos.WRITES for kill in found[::2])
    assert all(0 <= kill.number <= 2 for kill in found[1::2])
