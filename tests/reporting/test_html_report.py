import ast
import csv
import html
import io
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from rich.console import Console

from layershed.errors import DataError, ExportError
from layershed.performance.degradation import Degradation, degradation
from layershed.performance.speed import Interval, PhaseSpeed, SpeedReport
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.quality import Quality, RoundQuality
from layershed.reporting import bars, control, curves, figures, importance_file, summary, svg
from layershed.reporting import html_report as report
from layershed.reporting.curves import course_figure
from layershed.reporting.figures import importance_heatmap
from layershed.reporting.html_report import write_report
from layershed.reporting.importance_file import measured_steps, read_importance
from layershed.reporting.record import DropRound, ImportancePoint, LossPoint, MetricPoint, RunRecord
from layershed.reporting.summary import summary_rows, summary_table

STEPS = range(40, 201, 40)
UNKNOWN_COST = (
    "Cost of the drop",
    "not known: the figures at the end include the training since the drop. Compare with a run without the drop: "
    "--control true, or Report(control=RUN)",
)
DROPPED = {("attention", 1): 120, ("attention", 2): 120, ("mlp", 2): 120}
HOSTILE = "/models/<script>document.title='pwned'</script>\"><img src=x onerror=\"document.title='pwned'\">&amp;"


def make_plan(dropped=DROPPED):
    drops = [Drop(Sublayer(block, kind, f"h.{block}.{kind}"), 0.012, step) for (kind, block), step in dropped.items()]
    return DropPlan(tuple(drops), scope="joint", metric="cosine")


def make_points(dropped=DROPPED, kinds=("attention", "mlp"), scale=1.0):
    return tuple(
        ImportancePoint(step, block, kind, "cosine", scale**block * (0.1 + 0.01 * block + step / 1000 + 0.3 * column))
        for step in STEPS
        for column, kind in enumerate(kinds)
        for block in range(4)
        if step <= dropped.get((kind, block), math.inf)
    )


@pytest.fixture(scope="module")
def speed():
    return SpeedReport(
        phases={
            "prefill": PhaseSpeed(8412.3, Interval(1.0104, 0.98, 1.04)),
            "decode": PhaseSpeed(412.2, Interval(1.26, 1.22, 1.30), predicted=1.334),
        },
        parameters_dense=134_515_008,
        parameters_dropped=116_300_000,
        kv_bytes_dense=23_040.0,
        kv_bytes_dropped=15_360.0,
        file_bytes_dense=538_060_032,
        file_bytes_dropped=465_200_000,
        peak_memory_dense=700_000_000,
        peak_memory_dropped=610_000_000,
        runs=30,
        batch_size=1,
        prompt_tokens=512,
        new_tokens=64,
        device="NVIDIA H100",
    )


@pytest.fixture(scope="module")
def record(speed):
    losses = [LossPoint(step, "train", 4 - step / 100) for step in range(1, 201)]
    losses += [LossPoint(step, "val", 4.1 - step / 100) for step in STEPS]
    quality = {
        "before": Quality(2.87341, 0.4312, 99),
        "after": Quality(3.4, 0.3714, 99),
        "end": Quality(2.91, 0.44, 99),
    }
    sdr = {moment: degradation(quality["before"].values, quality[moment].values, speed) for moment in ("after", "end")}
    return RunRecord("gpt2", make_points(), tuple(losses), make_plan(), quality, speed, sdr=sdr)


@pytest.fixture(scope="module")
def page(record, tmp_path_factory):
    return write_report(record, tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, *tags):
        return [attributes for tag, attributes in self.found if tag in tags]


# The summary


def test_summary_rows_against_values_computed_by_hand(record):
    # (43.12 - 37.14) / 26 = 0.23 and (43.12 - 44.00) / 26 = -0.034; 116.3 / 134.515 = 0.8646.
    assert summary_rows(record) == [
        ("Validation loss before the drop", "2.8734 (next-token accuracy 43.1 %)"),
        ("Validation loss right after the drop", "3.4000 (next-token accuracy 37.1 %)"),
        ("Validation loss at the end", "2.9100 (next-token accuracy 44.0 %)"),
        UNKNOWN_COST,
        ("Sublayers dropped", "2 attention, 1 mlp"),
        ("Parameters", "134.5 M -> 116.3 M (-13.5 %)"),
        ("Prefill speed", "8,412 -> 8,500 tokens/s, no measurable speedup, x1.01 [0.98, 1.04]"),
        ("Decode speed", "412 -> 519 tokens/s, x1.26 [1.22, 1.30], x1.33 in theory"),
        ("File size", "538.1 MB -> 465.2 MB (-13.5 %)"),
        ("Peak memory", "700.0 MB -> 610.0 MB (-12.9 %)"),
        ("KV cache per token", "23,040 -> 15,360 bytes (-33.3 %)"),
        ("SDR right after the drop", "0.23 points of next-token accuracy per % of decode speed"),
        ("SDR at the end", "-0.03 points of next-token accuracy per % of decode speed"),
    ]


def test_summary_rows_are_ascii_for_any_terminal(record):
    assert all(text.isascii() for row in summary_rows(record) for text in row)


def in_rounds(record):
    """The same run in two rounds, of which the second was not measurable."""
    first, second = record.quality["before"], Quality(2.95, 0.42, 99)
    attention, mlp = (Sublayer(1, kind, f"h.1.{kind}") for kind in ("attention", "mlp"))
    rounds = (
        DropRound((attention,), RoundQuality(120, first, Quality(3.0, 0.4, 99)), Degradation(0.5, "loss", "decode")),
        DropRound(
            (attention, mlp),
            RoundQuality(160, second, record.quality["after"]),
            Degradation(math.nan, "loss", "decode", "no measurable speedup"),
        ),
    )
    return replace(record, rounds=rounds, sdr={"end": record.sdr["end"]})


def test_summary_has_a_row_for_each_round(record):
    rows = summary_rows(in_rounds(record))
    assert rows[:6] == [
        ("Validation loss before the first round", "2.8734 (next-token accuracy 43.1 %)"),
        (
            "Round 1, step 120",
            "1 attention; loss 2.8734 -> 3.0000; accuracy 0.4312 -> 0.4000; SDR 0.50 hundredths of the loss per % of "
            "decode speed",
        ),
        (
            "Round 2, step 160",
            "1 attention, 1 mlp; loss 2.9500 -> 3.4000; accuracy 0.4200 -> 0.3714; SDR undefined (no measurable "
            "speedup)",
        ),
        ("Validation loss at the end", "2.9100 (next-token accuracy 44.0 %)"),
        UNKNOWN_COST,
        ("Sublayers dropped", "2 attention, 1 mlp"),
    ]
    assert [label for label, _ in rows if label.startswith("SDR")] == ["SDR at the end"]


def test_page_has_a_table_of_rounds(unpainted, record, tmp_path):
    text = write_report(in_rounds(record), tmp_path / "r.html").read_text(encoding="utf-8")
    table = text[text.index('id="rounds"') : text.index('id="course"')]
    cells = [re.sub("<[^>]*>", "", row).split("\n") for row in re.findall("<t[hd][^>]*>.*?</t[hd]>", table)]
    assert [cell for (cell,) in cells] == [
        *("Round", "Step", "Dropped", "Loss", "Accuracy", "SDR"),
        *("Round 1", "120", "1 attention", "2.8734 → 3.0000", "0.4312 → 0.4000"),
        "0.50 hundredths of the loss per % of decode speed",
        *("Round 2", "160", "1 attention, 1 mlp", "2.9500 → 3.4000", "0.4200 → 0.3714"),
        "undefined (no measurable speedup)",
    ]


def test_summary_tells_own_metrics_and_other_changes(record):
    more = replace(
        record,
        metrics={
            "val_f1": (MetricPoint(100, 0.8), MetricPoint(190, 0.75)),
            "val_\x07auc": (None, MetricPoint(200, 0.9)),
        },
        steps=200,
        changes=(("Quantized weights", "nf4, 4 bits, 9.6 MB -> 3.1 MB"),),
    )
    rows = dict(summary_rows(more))
    assert rows["val_f1 in validation"] == "0.8000 before the drop (step 100), 0.7500 at step 190"
    assert rows["val_?auc in validation"] == "0.9000 at the end"
    assert rows["Quantized weights"] == "nf4, 4 bits, 9.6 MB -> 3.1 MB"


def test_too_few_pairs_are_said(record, speed):
    few = replace(speed, phases={"decode": PhaseSpeed(100.0, Interval(1.11, 1.10, 1.11, 5))}, runs=5)
    assert dict(summary_rows(replace(record, speed=few)))["Decode speed"] == (
        "100 -> 111 tokens/s, x1.11 (5 pairs; an interval needs 6)"
    )
    once = PhaseSpeed(100.0, Interval(1.11, 1.10, 1.11, 1))
    assert str(once).endswith("x1.11 (1 pair; an interval needs 6)")


def test_summary_has_rows_only_for_known_values(record, speed):
    def labels(record):
        return [label for label, _ in summary_rows(record)]

    assert summary_rows(RunRecord("gpt2")) == [("Sublayers dropped", "nothing was dropped")]
    assert summary_rows(RunRecord("gpt2", plan=DropPlan())) == [("Sublayers dropped", "nothing was dropped")]
    assert not [label for label in labels(replace(record, speed=None)) if "speed" in label]
    assert not [label for label in labels(replace(record, sdr={})) if "SDR" in label]
    # Fewer parameters without a plan: something was dropped, and what is not known.
    assert "Sublayers dropped" not in labels(RunRecord("gpt2", speed=speed))
    same = replace(speed, parameters_dropped=speed.parameters_dense)
    assert ("Sublayers dropped", "nothing was dropped") in summary_rows(RunRecord("gpt2", speed=same))


def test_summary_shortens_numbers_of_small_and_large_models(speed):
    small = replace(speed, parameters_dense=12_345, parameters_dropped=10_000, kv_bytes_dense=0, kv_bytes_dropped=0)
    rows = dict(
        summary_rows(
            RunRecord("m", speed=replace(small, phases={"decode": PhaseSpeed(4.125, Interval(1.3, 1.2, 1.4))}))
        )
    )
    assert rows["Parameters"] == "12,345 -> 10,000 (-19.0 %)"
    assert rows["KV cache per token"] == "0 -> 0 bytes"
    assert rows["Decode speed"] == "4.12 -> 5.36 tokens/s, x1.30 [1.20, 1.40]"
    large = replace(speed, parameters_dense=7_241_732_096, parameters_dropped=6_500_000_000)
    assert dict(summary_rows(RunRecord("m", speed=large)))["Parameters"] == "7.242 B -> 6.5 B (-10.2 %)"


def test_terminal_table_shows_names_as_they_are(record):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="truecolor")
    console.print(summary_table(replace(record, model="[red]m[/red]\x1b[31m\x07\u202e")))
    shown = console.file.getvalue()
    assert "[red]m[/red]?[31m??" in shown
    assert "\x1b[31m" not in shown
    assert "x1.26 [1.22, 1.30]" in shown


# importance.csv


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_importance_csv_is_read_as_written(tmp_path):
    points = (*make_points(kinds=("attention", "mlp", "block")), ImportancePoint(1, 0, "mlp", 'a "b", c', math.inf))
    rows = [(p.step, p.block, p.kind, p.metric, p.value) for p in points]
    assert (
        read_importance(write_csv(tmp_path / "i.csv", [("step", "block", "kind", "metric", "value"), *rows])) == points
    )


def test_importance_csv_without_measurements_has_no_points(tmp_path):
    path = tmp_path / "i.csv"
    path.write_text("step,block,kind,metric,value\n")
    assert read_importance(str(path)) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be step,block,kind,metric,value, got None"),
        ("step,block\n", "line 1: the header"),
        ("step,block,kind,metric,value\n1,2,mlp,cosine,0.5\n3,2,ml", "line 3: expected 5 fields, got 3"),
        ("step,block,kind,metric,value\n1,2,mlp,cosine,much\n", "line 2: could not convert string to float: 'much'"),
        ("step,block,kind,metric,value\n\n1.5,2,mlp,cosine,0.5\n", "line 3: invalid literal"),
        ("step,block,kind,metric,value\n1,-2,mlp,cosine,0.5\n", "line 2: step and block must not be negative"),
        (
            "step,block,kind,metric,value\n1,2,ffn,cosine,0.5\n",
            "line 2: kind must be one of attention, cross_attention, mlp, block",
        ),
        ('step,block,kind,metric,value\n1,2,mlp,"cosine,0.5\n', "line 2: unexpected end of data"),
    ],
)
def test_malformed_importance_csv_names_the_line(tmp_path, text, message):
    path = tmp_path / "i.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{path}, {message}")):
        read_importance(path)


def test_measured_steps_and_chosen_steps_of_an_importance_csv(tmp_path):
    header = ("step", "block", "kind", "metric", "value")
    rows = [(step, block, "mlp", "cosine", step / 10) for step in (7, 3, 5) for block in (0, 1)]
    rows += [(step, 0, "mlp", "angular", 0.5) for step in (4, 3)]
    path = write_csv(tmp_path / "i.csv", [header, *rows])
    assert measured_steps(path) == {"cosine": [3, 5, 7], "angular": [3, 4]}
    found = read_importance(path, {"cosine": {7, 3}, "angular": [4]})
    assert [(p.step, p.metric, p.block) for p in found] == [
        (7, "cosine", 0),
        (7, "cosine", 1),
        (3, "cosine", 0),
        (3, "cosine", 1),
        (4, "angular", 0),
    ]
    path.write_text(path.read_text() + "1,2,mlp,cosine,much\n")
    with pytest.raises(DataError, match="line 10: could not convert"):
        measured_steps(path)


def test_unreadable_importance_csv_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_importance(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bytes\.csv"):
        read_importance(tmp_path / "bytes.csv")


# The pictures


def meshes(figure):
    """Panel title -> (mesh, its values, NaN where there is none)."""
    panels = {}
    for axes in figure.axes:
        found = [artist for artist in axes.collections if isinstance(artist, QuadMesh)]
        if found and axes.get_title(loc="left"):
            panels[axes.get_title(loc="left")] = (found[0], np.ma.filled(found[0].get_array(), np.nan))
    return panels


def expected_grid(points, kind):
    grid = np.full((4, len(STEPS)), np.nan)
    for point in points:
        if point.kind == kind:
            grid[point.block, STEPS.index(point.step)] = point.value
    return grid


@pytest.mark.parametrize("stacked", [False, True])
def test_heatmap_holds_the_points_and_nothing_where_dropped(stacked):
    points = make_points(kinds=("attention", "mlp", "block"), dropped={**DROPPED, ("block", 2): 120})
    figure = importance_heatmap(points, make_plan(), stacked=stacked)
    panels = meshes(figure)
    assert list(panels) == ["Attention", "MLP", "Whole block"]
    for title, kind in zip(panels, ("attention", "mlp", "block"), strict=True):
        np.testing.assert_array_equal(panels[title][1], expected_grid(points, kind))
    assert np.isnan(panels["Attention"][1][1:3, 3:]).all()
    assert np.isfinite(panels["Attention"][1][1:3, :3]).all()
    assert len({id(mesh.norm) for mesh, _ in panels.values()}) == 1, "the panels share one colour scale"


def test_heatmap_of_a_long_run_keeps_the_columns_next_to_a_drop():
    """5,001 measurements; what is drawn is what was measured at that step, and the hatching begins at the drop."""
    points = [
        ImportancePoint(step, block, "mlp", "cosine", 0.1 + step / 1e5 + block)
        for step in range(0, 50_001, 10)
        for block in range(2)
        if not (block == 1 and step > 33_330)
    ]
    figure = importance_heatmap(points, make_plan({("mlp", 1): 33_330}))
    mesh, values = meshes(figure)["MLP"]
    edges = mesh.get_coordinates()[0, :, 0]
    assert 50 < values.shape[1] < 70
    steps = np.round((values[0] - 0.1) * 1e5).astype(int)
    assert {0, 33_320, 33_330, 33_340, 50_000} <= set(steps)
    assert max(np.diff(steps)) <= 850
    np.testing.assert_array_equal(np.isnan(values[1]), steps > 33_330)
    assert (edges[:-1] <= steps).all()
    assert (steps <= edges[1:]).all()
    (hatched,) = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert hatched.get_x() == 33_330
    whole = dict(zip(range(0, 50_001, 10), (p.value for p in points if p.block == 0), strict=True))
    assert [whole[step] for step in steps] == values[0].tolist()


def test_page_gives_the_number_of_measurements_and_not_of_columns(unpainted, tmp_path):
    record = RunRecord("m", importance=make_points(), measured={"cosine": 20_000})
    page = write_report(record, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "measured 20000 times from step 40 to step 200" in page


def test_heatmap_hatches_from_the_drop_and_marks_it():
    axes = importance_heatmap(make_points(), make_plan()).axes[0]
    hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [(patch.get_x(), patch.get_y(), patch.get_x() + patch.get_width()) for patch in hatched] == [
        (120, 0.5, 220),
        (120, 1.5, 220),
    ]
    assert all(patch.get_hatch() for patch in hatched)
    assert {tuple(line.get_xdata()) for line in axes.lines} == {(120, 120)}
    assert [text.get_text() for text in axes.texts] == ["drop at 120"]


def test_heatmap_scale_is_logarithmic_over_two_decades():
    narrow = importance_heatmap(make_points())
    wide = importance_heatmap((*make_points(scale=0.1), ImportancePoint(40, 0, "mlp", "cosine", -1e-9)))
    labels = [figure.axes[-1].get_ylabel() for figure in (narrow, wide)]
    assert labels == ["importance (low = redundant)", "importance, log scale (low = redundant)"]
    assert not isinstance(meshes(narrow)["MLP"][0].norm, LogNorm)
    mesh, values = meshes(wide)["MLP"]
    assert isinstance(mesh.norm, LogNorm)
    assert values[0, 0] == -1e-9, "what is drawn stays what was measured"
    assert mesh.norm(-1e-9) == 0, "at or below zero is as redundant as the scale goes"


@pytest.mark.parametrize(
    ("points", "dropped", "edges"),
    [
        # measured at the drop's step, before it: its column ends there
        ([(10, 0), (20, 0)], {("mlp", 0): 20}, [5, 15, 20]),
        # measured there after it: its column begins there
        ([(10, 0), (10, 1), (20, 1), (30, 1)], {("mlp", 0): 20}, [5, 20, 25, 35]),
        # between two measurements
        ([(10, 0), (10, 1), (20, 1)], {("mlp", 0): 13}, [5, 13, 25]),
        # outside training; one measurement
        ([(10, 1)], {("mlp", 0): None}, [9.5, 10.5]),
        # before the first measurement, and long after the last one
        ([(10, 1), (20, 1)], {("mlp", 0): 8, ("mlp", 1): 90}, [8, 15, 25]),
    ],
)
def test_heatmap_columns_end_where_a_drop_is(points, dropped, edges):
    points = [ImportancePoint(step, block, "mlp", "cosine", 0.1) for step, block in points]
    figure = importance_heatmap(points, make_plan(dropped))
    mesh, _ = meshes(figure)["MLP"]
    assert mesh.get_coordinates()[0, :, 0].tolist() == edges
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    assert all(low <= step <= high for step in dropped.values() if step is not None)


def test_heatmap_of_nothing_or_of_two_metrics_is_refused():
    with pytest.raises(DataError, match=r"one metric, got 0"):
        importance_heatmap([])
    with pytest.raises(DataError, match=r"one metric, got 2: \['angular', 'cosine'\]"):
        importance_heatmap([*make_points(), ImportancePoint(1, 0, "mlp", "angular", 0.1)])


def test_pictures_of_a_diverged_run_are_drawn():
    points = [ImportancePoint(1, 0, "mlp", "cosine", value) for value in (math.inf, math.nan)]
    importance_heatmap(points).draw_without_rendering()
    losses = (LossPoint(1, "train", math.nan), LossPoint(2, "train", math.inf))
    course_figure(RunRecord("m", losses=losses)).draw_without_rendering()
    course_figure(RunRecord("m")).draw_without_rendering()


def test_loss_figure_draws_both_splits_and_each_drop(record):
    axes = course_figure(record).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["training"].get_xydata().tolist() == [[step, 4 - step / 100] for step in range(1, 201)]
    assert lines["validation"].get_xydata().tolist() == [[step, 4.1 - step / 100] for step in STEPS]
    assert lines["validation"].get_marker() == "o"
    assert [line.get_linestyle() for line in axes.lines if list(line.get_xdata()) == [120, 120]] == ["--"]
    assert [text.get_text() for text in axes.texts] == ["3 dropped at 120"]


def test_losses_before_and_after_a_drop_at_the_same_step_keep_their_order():
    losses = (LossPoint(20, "val", 3.0), LossPoint(10, "val", 2.9), LossPoint(10, "val", 2.0))
    line = course_figure(RunRecord("m", losses=losses)).axes[0].lines[0]
    assert line.get_xydata().tolist() == [[10, 2.9], [10, 2.0], [20, 3.0]]


def test_labels_of_many_drops_do_not_overlap():
    plan = make_plan({("mlp", block): 10 * block for block in range(1, 41)})
    axes = course_figure(RunRecord("m", losses=(LossPoint(0, "val", 3.0),), plan=plan)).axes[0]
    assert len(axes.texts) == 14, "every third of 40 is labelled"
    assert all(text.get_rotation() == 90 and text.get_text().isdigit() for text in axes.texts)


def test_heatmap_of_a_single_measurement_has_no_axis_of_steps():
    points = [ImportancePoint(0, block, kind, "cosine", 0.1) for block in range(2) for kind in ("attention", "mlp")]
    plan = DropPlan((Drop(Sublayer(1, "mlp", "layers.1.mlp"), score=0.1),), scope="mlp", metric="cosine")
    figure = importance_heatmap(points, plan)
    panels = figure.axes[:2]
    assert all(axes.get_xlabel() == "" and not axes.get_xticks().size for axes in panels)
    # what was dropped afterwards keeps its colour under the hatch
    assert [[(patch.get_y(), patch.get_hatch()) for patch in axes.patches] for axes in panels] == [[], [(0.5, "////")]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dropped"]
    assert not importance_heatmap(points).legends
    later = importance_heatmap([*points, *(replace(p, step=5) for p in points)], plan)
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_xticks().size for axes in later.axes[:2])


def test_loss_axis_is_named_by_the_record(record):
    for label in ("loss (nats per token)", "loss"):
        assert course_figure(replace(record, loss_label=label)).axes[0].get_ylabel() == label


def test_page_of_a_single_measurement_has_no_training_in_its_heading(unpainted, tmp_path):
    points = (ImportancePoint(0, 0, "mlp", "cosine", 0.1),)
    page = write_report(RunRecord("m", importance=points), tmp_path / "report.html").read_text(encoding="utf-8")
    assert headings(page)[1] == "Importance"
    assert "measured once" in page


# The page

HEADINGS = {
    "losses": "Course of the run",
    "speed": "Speed",
    "plan": "What was dropped, and why",
    "importance": "Importance over training",
}
SUPPLIERS = {
    "importance": "the RedundancyMonitor callback",
    "losses": "the LightningModule logs it",
    "speed": "the SpeedMonitor callback",
    "plan": "the SublayerDrop callback",
}


def headings(text):
    return [html.unescape(heading) for heading in re.findall(r"<h2[^>]*>(.*?)</h2>", text)]


def test_page_has_every_section(page, record):
    assert headings(page) == ["Summary", *HEADINGS.values()]
    assert "<h1>gpt2</h1>" in page
    for label, _ in summary_rows(record):
        assert f'<th scope="row">{label}</th>' in page
    assert "412 → 519 tokens/s, \N{MULTIPLICATION SIGN}1.26 [1.22, 1.30]" in page
    assert "NVIDIA H100" in page


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("missing", HEADINGS)
def test_missing_section_of_the_page_is_one_sentence(unpainted, record, tmp_path, missing):
    importance = tuple(point for point in record.importance if point.block == 0)  # fewer points draw faster
    kept = {"importance": importance, "losses": record.losses[:1]}
    nothing = {"importance": (), "losses": (), "speed": None, "plan": None}
    text = write_report(replace(record, **{**kept, missing: nothing[missing]}), tmp_path / "r.html").read_text()
    assert headings(text) == ["Summary", *(h for key, h in HEADINGS.items() if key != missing), "Not in this report"]
    assert [key for key, words in SUPPLIERS.items() if words in text] == [missing]


def test_page_of_an_empty_record_lists_what_is_missing(tmp_path):
    text = write_report(RunRecord("gpt2"), tmp_path / "new" / "folder" / "r.html").read_text()
    assert headings(text) == ["Summary", "Not in this report"]
    assert "nothing was dropped" in text
    assert all(words in text for words in SUPPLIERS.values())


def test_page_needs_nothing_outside_itself_and_runs_no_script(page):
    elements = Elements(page)
    links = [value for _, own in elements.found for key, value in own.items() if key in ("src", "srcset", "href")]
    assert not links
    inner = [value for _, own in elements.found for key, value in own.items() if key == "xlink:href"]
    assert inner
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in inner), "the colour scale is an image"
    assert not elements.of("script", "link", "iframe", "object", "embed", "base")
    assert not [key for _, attributes in elements.found for key in attributes if key.startswith("on")]
    assert set(re.findall(r"https?:[^\"]*", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page


def test_page_is_accessible(page):
    elements = Elements(page)
    assert elements.of("html") == [{"lang": "en"}]
    assert "<title>gpt2 - layershed report</title>" in page
    assert all(header.get("scope") in ("row", "col") for header in elements.of("th"))
    loss, _, heat = (figure["aria-label"] for figure in elements.of("figure"))
    assert "importance (cosine) of 4 blocks" in heat
    assert "3 sublayers dropped at step 120: 2 attention, 1 mlp." in heat
    assert "Validation loss: 3.7000 at step 40, 2.1000 at step 200." in loss
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(attributes.get("aria-labelledby") in ids for attributes in elements.of("section"))


def test_plan_table_keeps_the_order_and_marks_unknown_fields(unpainted, tmp_path):
    drops = (Drop(Sublayer(7, "mlp", "h.7.mlp"), 0.01234, 1200), Drop(Sublayer(3, "attention", "h.3.attn")))
    text = write_report(RunRecord("m", plan=DropPlan(drops)), tmp_path / "r.html").read_text()
    body = text[text.index('id="plan"') :]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    assert rows[1:] == [["1", "7", "MLP", "0.0123", "1,200"], ["2", "3", "Attention", "-", "not in training"]]
    assert "Chosen by hand." in body


@pytest.mark.parametrize(
    ("scope", "dropped", "panels"),
    [
        ("joint", [("attention", 0), ("mlp", 1)], {"Attention", "MLP"}),
        ("mlp", [("mlp", 1)], {"MLP"}),
        ("block", [("attention", 1), ("mlp", 1)], {"Whole block"}),
    ],
)
def test_page_shows_dropped_sublayers_beside_those_that_stayed(tmp_path, scope, dropped, panels):
    """Of an earlier round the plan has the score; the rest is from the last round."""
    kinds = ("attention", "mlp", "block")
    scores = tuple(
        ImportancePoint(9, b, k, "cosine", 0.1 + b) for k in kinds for b in range(3) if (k, b) not in dropped
    )
    drops = tuple(Drop(Sublayer(block, kind, f"h.{block}.{kind}"), 0.0625, 9) for kind, block in dropped)
    record = RunRecord("m", plan=DropPlan(drops, scope=scope, metric="cosine"), scores=scores)
    text = write_report(record, tmp_path / "r.html").read_text(encoding="utf-8")
    titles = set(re.findall(r"<title>(block \d, [^<]*)</title>", text))
    shown = {"attention": "Attention", "mlp": "MLP", "block": "Whole block"}
    gone = {("block", block) for _, block in dropped} if scope == "block" else set(dropped)
    assert {title.split(": ")[0].split(", ")[1] for title in titles} == panels
    assert {title for title in titles if title.endswith(", dropped")} == {
        f"block {block}, {shown[kind]}: 0.0625, dropped" for kind, block in gone
    }
    assert f"block 2, {max(panels)}: 2.10" in titles


def test_page_has_one_heatmap_for_each_metric(unpainted, tmp_path):
    points = [ImportancePoint(1, 0, "mlp", metric, 0.1) for metric in ("cosine", "angular")]
    text = write_report(RunRecord("m", tuple(points)), tmp_path / "r.html").read_text()
    assert re.findall(r"Metric: (\w+)\.", text) == ["cosine", "angular"]
    assert len(Elements(text).of("figure")) == 2


def test_page_of_the_same_record_has_the_same_bytes(tmp_path):
    record = RunRecord("m", losses=(LossPoint(1, "train", 2.0),))
    assert (
        write_report(record, tmp_path / "a.html").read_bytes() == write_report(record, tmp_path / "b.html").read_bytes()
    )


def test_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_report(RunRecord("old"), tmp_path / "r.html")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExportError, match="disk full"):
        write_report(RunRecord("new"), path)
    assert "<h1>old</h1>" in path.read_text()
    assert os.listdir(tmp_path) == ["r.html"]


def test_hostile_names_stay_text_in_a_real_browser(record, speed, tmp_path):
    plan = DropPlan((Drop(Sublayer(0, "mlp", HOSTILE), 0.1, 1),), metric=HOSTILE)
    hostile = RunRecord(
        HOSTILE + "\udcff\x1b",
        (ImportancePoint(1, 0, "mlp", HOSTILE, 0.1),),
        plan=plan,
        speed=replace(speed, device=HOSTILE),
    )
    path = write_report(hostile, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert text.count(html.escape(HOSTILE).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) == 6

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium or google-chrome on the PATH; CI must install one")
        pytest.skip("no chromium or google-chrome on the PATH")
    # Without the policy, so that it is the escaping that holds; and with a script of ours, to know that scripts run.
    text, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert removed == 1
    path.write_text(
        text.replace("</body>", "<script>document.body.dataset.ran = 'yes'</script></body>"), encoding="utf-8"
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([browser, *options, path.as_uri()], capture_output=True, timeout=120, check=True)
    dom = done.stdout.decode()
    assert 'data-ran="yes"' in dom
    title = html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])
    assert title == f"{HOSTILE}?? - layershed report"


@pytest.mark.parametrize("module", [report, figures, bars, curves, svg, control, importance_file, summary])
def test_reporting_imports_no_model_library_and_no_pyplot(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in imported}
    assert not roots & {"torch", "lightning", "transformers"}
    assert "matplotlib.pyplot" not in imported
