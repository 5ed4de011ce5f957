"""print(scores) and print(plan) are tables with a bar for each sublayer; notebooks get HTML; repr evaluates back."""

import html
import math
import re

import pytest

from layershed.planning.bar_table import Bar, BarTable
from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Sublayer

SCORES = ImportanceScores(
    {
        Sublayer(0, "attention", "a.0"): 0.4,
        Sublayer(1, "attention", "a.1"): 0.1,
        Sublayer(1, "mlp", "m.1"): 0.8,
        Sublayer(10, "mlp", "m.10"): 0.2,
    },
    tokens=2048,
)
PLAN = DropPlan(
    (Drop(Sublayer(10, "mlp", "m"), 0.02, 200), Drop(Sublayer(0, "attention", "a"), 0.04, 300)), "joint", "cosine"
)


def test_printed_scores_have_a_row_for_each_block_and_a_bar_for_each_sublayer(capsys):
    print(SCORES)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "importance (cosine) of 4 sublayers, over 2,048 tokens; #1 would be dropped first"
    assert head.split() == ["block", "attention", "mlp"]
    assert [row.split() for row in rows] == [
        ["0", "=" * 12, "0.400", "#3"],
        ["1", "=" * 3, "0.100", "#1", "=" * 12, "0.800", "#4"],
        ["10", "=" * 3, "0.200", "#2"],
    ]
    assert rows[2].index("=") == head.index("mlp"), "columns line up"


def test_printed_plan_has_a_row_for_each_drop_in_order(capsys):
    print(PLAN)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "drop plan (joint, by cosine): 1 attention, 1 mlp"
    assert head.split() == ["order", "sublayer", "importance", "step"]
    assert [row.split() for row in rows] == [
        ["1", "mlp.10", "=" * 6, "0.0200", "200"],
        ["2", "attention.0", "=" * 12, "0.0400", "300"],
    ]


def test_printed_plan_without_scores_leaves_their_columns_out():
    plan = DropPlan((Drop(Sublayer(3, "mlp", "m")),), "mlp")
    assert str(plan).splitlines()[1:] == ["order  sublayer", "    1  mlp.3"]
    assert str(DropPlan()).splitlines()[0] == "drop plan (joint): nothing"
    assert str(ImportanceScores({})).splitlines()[1] == "block"


@pytest.mark.parametrize("shown", [SCORES, PLAN], ids=["scores", "plan"])
def test_repr_still_evaluates_back(shown):
    again = eval(repr(shown))
    assert again == shown
    assert type(again) is type(shown)
    assert vars(again) == vars(shown)


@pytest.mark.parametrize("shown", [SCORES, PLAN], ids=["scores", "plan"])
def test_notebooks_show_what_is_printed(shown):
    page = shown._repr_html_()
    told = html.unescape(re.sub(r"<[^>]*>", " ", page)).split()
    assert told == [word for word in str(shown).split() if set(word) != {"="}]
    widths = [float(width) for width in re.findall(r"height:0.7em;width:([\d.]+)em", page)]
    bars = [len(word) for word in str(shown).split() if set(word) == {"="}]
    assert widths == [pytest.approx(length / 2) for length in bars]
    assert "<script" not in page


def test_html_escapes_what_it_shows():
    page = BarTable("<b>", ["<i>"], [["<script>"], [Bar(1, 1, "<u>")]]).html()
    assert all(f"&lt;{name}&gt;" in page for name in ("b", "i", "script", "u"))


@pytest.mark.parametrize(
    ("value", "longest", "letters"),
    [
        (1, 4, 3),
        (4, 4, 12),
        (0, 4, 0),
        (-1e-9, 4, 0),
        (1e-9, 4, 1),
        (math.nan, 4, 0),
        (1, math.nan, 0),
        (0, 0, 0),
        (math.inf, 4, 0),
    ],
)
def test_bar_has_the_length_of_its_share(value, longest, letters):
    assert str(Bar(value, longest, "x")).count("=") == letters
