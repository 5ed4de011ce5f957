"""On a full disk, existing files stay and the error is one sentence. Uses a real file system of 128 KB."""

import json
import os
import subprocess
from contextlib import chdir

import pytest
from transformers import ByT5Tokenizer

import layershed as ls
from layershed.callbacks import Export, RedundancyMonitor, SpeedMonitor, SublayerDrop
from layershed.errors import ExportError
from layershed.files import atomic as folders
from layershed.integration.importance_csv import append
from layershed.planning.plan import Drop, DropPlan
from layershed.reporting.html_report import write_report
from layershed.reporting.record import RunRecord
from tests.support.bad_input.damage import ON, SPEED
from tests.support.bad_input.trial import _run
from tests.support.models import build_model
from tests.support.runs import fit_foreign
from tests.support.thinned import crossed

pytestmark = pytest.mark.usefixtures("own_seed")

SIZE = 128 * 1024


@pytest.fixture
def disk(tmp_path):
    """A folder on its own small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        if os.environ.get("CI"):
            pytest.fail("CI must be able to mount a small file system")
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, left=0):
    """Fill a disk up to some bytes."""
    with (folder / "filler").open("wb") as file:
        free = os.statvfs(folder)
        file.write(bytes(free.f_bavail * free.f_frsize - left))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small():
    return build_model("llama", num_hidden_layers=2, vocab_size=29, hidden_size=16, intermediate_size=8, head_dim=4)


def dropped(model):
    plan = DropPlan(tuple(Drop(sublayer) for sublayer in ls.find_sublayers(model)[:1]))
    ls.bypass(model, plan)
    return plan


# bytes that are left, from none for anything up to all but what the last file needs
ROOM = [0, 4096, 8192, 12288, 16384, 20480]


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("left", ROOM)
def test_saving_a_model_on_a_full_disk_keeps_the_former_one(left, disk, small):
    plan = dropped(small)
    folder = disk / "saved"
    ls.save_pretrained(small, folder, plan=plan, tokenizer=ByT5Tokenizer(extra_ids=0), standalone=True)
    before = contents(folder)
    assert sum(map(len, before.values())) > 20480, "it takes more than is left"
    fill(disk, left)
    with pytest.raises(ExportError) as caught:
        ls.save_pretrained(small, folder, plan=plan, tokenizer=ByT5Tokenizer(extra_ids=0), standalone=True)
    assert str(caught.value).startswith(
        f"{str(folder)!r} could not be written (No space left on device), and it is as it was;"
    )
    assert contents(folder) == before
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "saved"], "nothing is left beside it"
    (disk / "filler").unlink()
    assert ls.dropped_sublayers(ls.load_pretrained(folder)) == tuple(plan)


def test_first_model_on_a_full_disk_leaves_no_partial_files(disk, small):
    fill(disk)
    with pytest.raises(ExportError, match=r"No space left on device.*nothing is left of it"):
        ls.save_pretrained(small, disk / "saved")
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("left", [0, 4096])
def test_saving_an_adapter_on_a_full_disk_keeps_the_former_one(left, disk, small):
    plan = dropped(small)
    ls.inject_lora(small, rank=2)
    ls.save_adapter(small, disk / "adapter", plan=plan)
    before = contents(disk / "adapter")
    fill(disk, left)
    with pytest.raises(ExportError, match=r"No space left on device.*it is as it was"):
        ls.save_adapter(small, disk / "adapter", plan=plan)
    assert contents(disk / "adapter") == before


WRITERS = {
    "drop_plan.json": lambda path: DropPlan().save(path),
    "speed.json": lambda path: folders.write_text(path, json.dumps({"runs": 5})),
    "report.html": lambda path: write_report(RunRecord("gpt2"), path),
    "importance.csv": lambda path: append(path, ["3,0,mlp,cosine,0.1"]),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False], ids=["existing", "new"])
def test_writing_a_file_on_a_full_disk_keeps_the_former_one(name, there, disk):
    path = disk / name
    if there:
        path.write_text("step,block,kind,metric,value\n" + 255 * "1,0,mlp,cosine,0\n"[:16], encoding="utf-8")
        path.write_bytes(path.read_bytes()[:4095] + b"\n")  # a whole page, so that not even a row more fits in
    before = contents(disk)
    fill(disk)
    with pytest.raises(ExportError) as caught:
        WRITERS[name](path)
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    (disk / "filler").unlink()
    assert contents(disk) == before


@pytest.mark.usefixtures("small")
def test_fit_on_a_full_disk_keeps_the_former_export(disk, make_trainer, small):
    model = build_model("llama", num_hidden_layers=2, vocab_size=29, hidden_size=16, intermediate_size=8, head_dim=4)
    ls.save_pretrained(model, disk / "out")
    before = contents(disk / "out")
    drop = SublayerDrop(start=2, count=1, scope="mlp", quality_batches=0)
    trainer = make_trainer(
        RedundancyMonitor(every_n_steps=1),
        drop,
        SpeedMonitor(4, 2, runs=2, quality=None),
        Export(str(disk / "out")),
        max_steps=3,
    )
    fill(disk)
    with pytest.raises(ExportError, match=r"No space left on device.*it is as it was"):
        fit_foreign(trainer)
    assert contents(disk / "out") == before


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("command", "left"), crossed(("fit", "score", "prune"), (0, 12288, 24576)))
def test_full_disk_gives_a_one_sentence_error_on_the_command_line(command, left, disk, world, one_parser):
    fill(disk, left)
    words = [command, *ON, f"--trainer.default_root_dir={disk}", f"--model.pretrained={world / 'model'}"]
    extra = {"fit": [], "score": ["--batches=1"], "prune": ["--count=1", *SPEED]}[command]
    with chdir(world):
        code, told = _run([*words, *extra])
    lines = [line for line in told.splitlines() if line and "%|" not in line]
    assert (code, len(lines)) == (1, 1), told
    assert lines[0].startswith("error: ")
    assert "No space left on device" in lines[0]
