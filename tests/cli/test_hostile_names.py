"""Names from a stranger in tables and pictures; those in the report are in tests/test_report.py, in a real browser."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from layershed.cli import console
from layershed.cli.main import main
from layershed.planning.plan import ImportanceScores, Sublayer
from layershed.reporting.record import RunRecord
from layershed.reporting.summary import summary_table
from tests.support.bad_input.damage import ON, SPEED
from tests.support.thinned import one_of

pytestmark = pytest.mark.usefixtures("own_seed")

# a folder, and in it another one; matplotlib would read a formula between dollars, and fail
NAMED = "./[red]m$\\frac$[/red]"
TOLD = {
    "score": ["--batches=1"],
    "plan": ["--prompt_tokens=4", "--new_tokens=2", "--device=a100"],
    "benchmark": ["--counts=[1]", "--scopes=[mlp]", "--batches=1", "--quality_batches=1", *SPEED],
    "prune": ["--count=1", "--batches=1", "--quality_batches=1", *SPEED],
}


@pytest.mark.parametrize("command", one_of(TOLD))
@pytest.mark.usefixtures("one_parser")
def test_markup_in_a_model_name_is_printed_literally(command, place, capsys):
    shutil.copytree("model", NAMED)
    on = ["--trainer.accelerator=cpu"] if command == "plan" else ON
    assert main([command, f"--model.pretrained={NAMED}", *on, *TOLD[command]]) == 0
    told = capsys.readouterr().out
    if command != "score":  # which names the model in its picture
        assert NAMED in told.replace("\n", "")


@pytest.mark.parametrize(
    "text",
    ["[red]x[/red]", "[link=x:y]y[/link]", "[/]", "a\x1b[31mb"],
    ids=["color", "link", "closing tag", "control code"],
)
def test_markup_and_control_codes_in_a_table_are_inert(text):
    page = io.StringIO()
    terminal = Console(file=page, force_terminal=True, color_system="truecolor", width=200)
    scores = ImportanceScores({Sublayer(0, "mlp", text): 0.5}, blocks={0: 0.5}, metric=text)
    console.tell_files(terminal, Model=Path(text))
    for part in (console.importance_table(scores), console._table_of(text, 60 * "a"), summary_table(RunRecord(text))):
        terminal.print(part)
    shown = page.getvalue()
    assert shown.count(text.replace("\x1b", "?")) == 4
    assert "\x1b[31m" not in shown
    assert "\x1b]8" not in shown, "a link"
