"""Pictures of the page: what a reader sees on hovering is what is drawn, and colours follow the page."""

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.colors import LogNorm, to_hex

from layershed import reporting
from layershed.errors import DataError
from layershed.performance.speed import Interval, PhaseSpeed
from layershed.planning.notation import short_importance
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.reporting.bars import importance_bars, speed_figure
from layershed.reporting.curves import course_figure
from layershed.reporting.figures import importance_heatmap
from layershed.reporting.plot_style import ADAPTIVE, COLOURS
from layershed.reporting.record import Control, ImportancePoint, LossPoint, RunRecord
from layershed.reporting.svg import inline_svg
from tests.support.measured import SPEED

POINTS = [
    ImportancePoint(step, block, kind, "cosine", 0.001 * 10 ** (block + 0.3 * (kind == "mlp")) * step)
    for step in (1, 2)
    for kind in ("attention", "mlp")
    for block in range(3)
]
PLAN = DropPlan((Drop(Sublayer(1, "mlp", "h.1.mlp"), 0.02, 2),), scope="mlp", metric="cosine")
STYLE = "".join(
    (Path(reporting.__file__).parent / "templates" / name).read_text() for name in ("page.css", "report.css")
)


def hovering(figure):
    """Title and mark of everything that tells its value."""
    root = ElementTree.fromstring(inline_svg(figure, "x"))
    return [(child.text, mark) for mark in root.iter() for child in mark if child.tag.endswith("title")]


def test_cell_of_the_heat_map_has_the_colour_of_the_value_that_it_tells():
    found = hovering(importance_heatmap(POINTS))
    values = {f"block {p.block}, {'MLP' if p.kind == 'mlp' else 'Attention'}, step {p.step}": p.value for p in POINTS}
    norm = LogNorm(min(values.values()), max(values.values()))
    assert len(found) == len(values) == 12
    for title, mark in found:
        name, _, shown = title.partition(": ")
        assert shown == short_importance(values[name])
        assert re.search("fill: (#[0-9a-f]+)", mark.get("style"))[1] == to_hex(COLOURS(norm(values[name])))


def test_pictures_have_only_colours_of_the_page_or_of_data():
    record = RunRecord("m", losses=(LossPoint(1, "train", 2.0), LossPoint(2, "val", 1.0)), plan=PLAN)
    data = {to_hex(COLOURS(i)) for i in range(256)} | {"#fefefe", "#000000"}
    figures = [importance_heatmap(POINTS, PLAN), importance_bars(POINTS, {("mlp", 1)}), course_figure(record)]
    for figure in [*figures, speed_figure(SPEED)]:
        text = inline_svg(figure, "x")
        assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) - data
        for name in set(re.findall(r"var\(--([a-z-]+)\)", text)):
            assert STYLE.count(f"--{name}: #") == 3, f"{name} has a light, a dark and a printed colour"
    assert set(ADAPTIVE.values()) <= set(re.findall(r"--([a-z-]+):", STYLE))


def test_texts_of_a_picture_stay_text_and_are_escaped():
    record = RunRecord("m", losses=(LossPoint(1, "val", 0.0012345),), loss_label="<script>1.23456</script>")
    text = inline_svg(course_figure(record), "x")
    assert "&lt;script&gt;1.23456&lt;/script&gt;" in text
    assert "<script" not in text
    assert not re.search(r' d="[^"]*\d\.\d{3}', text), "coordinates are short"


def test_picture_is_the_same_for_the_same_name_and_shares_no_ids():
    first, again, other = (inline_svg(importance_bars(POINTS), name) for name in ("a1", "a1", "b1"))
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]+)', text)) for text in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("stacked", [False, True])
def test_bars_have_the_length_of_the_values_and_mark_what_was_dropped(stacked):
    even = [replace(point, value=0.1 + 0.05 * point.block) for point in POINTS if point.step == 1]
    for points, scale in ((POINTS, math.log10), (even, float)):
        figure = importance_bars(points, {("mlp", 1)}, stacked=stacked)
        latest = {(p.kind, p.block): p.value for p in points}
        for axes, kind in zip(figure.axes, ("attention", "mlp"), strict=True):
            ends = {round(bar.get_y() + bar.get_height() / 2): bar.get_x() + bar.get_width() for bar in axes.patches}
            assert {block: scale(end) for block, end in ends.items()} == {
                block: pytest.approx(scale(latest[kind, block])) for block in range(3)
            }
            low, high = axes.get_ylim()
            assert low > high, "block 0 is at the top"
            assert [bool(bar.get_hatch()) for bar in axes.patches] == [kind == "mlp" and b == 1 for b in range(3)]
            assert [text.get_text() for text in axes.texts] == [short_importance(latest[kind, b]) for b in range(3)]
    assert "block 1, MLP: 0.150, dropped" in [title for title, _ in hovering(figure)]


def test_heat_map_and_bars_have_block_zero_at_the_same_end():
    for figure in (importance_heatmap(POINTS), importance_bars(POINTS)):
        bottom, top = figure.axes[0].get_ylim()
        assert top < 0 < bottom


def test_bars_of_nothing_of_two_metrics_or_without_finite_values():
    with pytest.raises(DataError, match="got 0"):
        importance_bars([])
    with pytest.raises(DataError, match="got 2"):
        importance_bars([*POINTS, replace(POINTS[0], metric="angular")])
    for values in ((math.nan, math.inf), (0.0, 0.0), (-1e-9, 0.5)):
        points = [ImportancePoint(0, block, "mlp", "cosine", value) for block, value in enumerate(values)]
        inline_svg(importance_bars(points), "x")


def test_course_shows_the_control_learning_rate_throughput_and_events():
    losses = tuple(LossPoint(step, split, 3.0 - step / 10) for split in ("train", "val") for step in (1, 2, 3))
    control = Control("c", 3, losses=(LossPoint(2, "val", 2.5), LossPoint(3, "val", 2.25), LossPoint(3, "train", 9.0)))
    curves = {"learning rate": ((1, 0.1), (3, 0.2)), "throughput (tokens/s)": ((1, 900.0), (3, 1200.0))}
    record = RunRecord(
        "m", losses=losses, plan=PLAN, control=control, curves=curves, events=((2, "LoRA"), (3, "quantized"))
    )
    figure = course_figure(record)
    top, rate, speed = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in top.lines}
    assert lines["validation of the control, without the drop"] == [[2, 2.5], [3, 2.25]]
    assert rate.lines[0].get_xydata().tolist() == [[1, 0.1], [3, 0.2]]
    assert speed.lines[0].get_xydata().tolist() == [[1, 900], [3, 1200]]
    assert {text.get_text() for text in top.texts} == {"1 dropped, LoRA at 2", "quantized at 3"}
    titles = [title for title, _ in hovering(figure)]
    assert "validation of the control loss, step 3: 2.2500" in titles
    assert "throughput (tokens/s), step 3: 1,200" in titles


def test_course_from_scratch_begins_its_axis_where_it_is_interesting():
    losses = [LossPoint(step, "train", 3 + 5 / step) for step in range(1, 101)]
    axes = course_figure(RunRecord("m", losses=tuple(losses))).axes[0]
    assert axes.get_ylim()[1] < 4
    assert "the first losses are above" in [text.get_text() for text in axes.texts]
    flat = [replace(point, loss=3 + 0.1 * (point.step % 2)) for point in losses]
    assert not course_figure(RunRecord("m", losses=tuple(flat))).axes[0].texts


@pytest.mark.parametrize("narrow", [False, True])
def test_speed_figure_shows_interval_theory_and_too_few_pairs(narrow):
    few = PhaseSpeed(10.0, Interval(1.5, 1.4, 1.6, 5))
    known = PhaseSpeed(10.0, Interval(1.2, 1.1, 1.3), predicted=1.4)
    figure = speed_figure(replace(SPEED, phases={"prefill": few, "decode": known}), narrow=narrow)
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines[1:]]
    assert drawn == [[[1.5, 0]], [[1.1, 1], [1.3, 1]], [[1.2, 1]], [[1.4, 1]]]
    titles = [title for title, _ in hovering(figure)]
    times = "\N{MULTIPLICATION SIGN}"
    assert titles == [
        f"prefill: {times}1.50, 5 pairs; an interval needs 6",
        f"decode: {times}1.20 [1.10, 1.30]",
        f"decode, in theory: {times}1.40",
    ]
