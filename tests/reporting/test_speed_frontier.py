"""The picture of a sweep, read back from the artists that draw it."""

import io

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color, to_hex
from matplotlib.image import imread
from matplotlib.text import Annotation

from layershed.performance.intervals import Interval
from layershed.planning.plan import SCOPES
from layershed.reporting.speed_frontier import FrontierPoint, frontier_figure

DENSE = 60.0


def point(scope, count, quality, prefill, decode):
    """A point whose intervals reach a twentieth down and a tenth up."""
    spread = [Interval(speedup, speedup * 0.95, speedup * 1.1) for speedup in (prefill, decode)]
    return FrontierPoint(scope, count, quality, *spread)


# as a sweep gives them, but for the counts of attention, which are out of order
POINTS = [
    point("attention", 8, 58.0, 1.2, 1.5),
    point("attention", 2, 59.5, 0.98, 1.1),
    point("attention", 4, 59.0, 1.1, 1.25),
    point("block", 1, 55.0, 1.05, 1.04),
    point("block", 2, 40.0, 1.15, 1.12),
]
LINES = {
    "prefill": {
        "Attention Drop": ([1, 0.98, 1.1, 1.2], [60, 59.5, 59, 58]),
        "Block Drop": ([1, 1.05, 1.15], [60, 55, 40]),
    },
    "decode": {
        "Attention Drop": ([1, 1.1, 1.25, 1.5], [60, 59.5, 59, 58]),
        "Block Drop": ([1, 1.04, 1.12], [60, 55, 40]),
    },
}


def panels(figure):
    """The two panels by their titles."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes):
    """The drawn lines of the scopes, by their names."""
    return {line.get_label(): line for line in axes.lines if line.get_label().endswith("Drop")}


@pytest.fixture
def figure():
    return frontier_figure(POINTS, DENSE, "accuracy (%)", title="a model on a machine")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_frontier_has_a_line_per_scope_from_the_dense_model_on(figure, phase):
    found = lines(panels(figure)[phase])
    assert list(found) == list(LINES[phase])
    for name, (x, y) in LINES[phase].items():
        assert (list(found[name].get_xdata()), list(found[name].get_ydata())) == (x, y)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_frontier_bars_are_the_intervals_of_the_speedup(figure, phase):
    bars = [c for c in panels(figure)[phase].collections if isinstance(c, LineCollection)]
    for bar, (name, (x, y)) in zip(bars, LINES[phase].items(), strict=True):
        assert same_color(bar.get_color()[0][:3], lines(panels(figure)[phase])[name].get_color())
        for segment, at, quality in zip(bar.get_segments(), x[1:], y[1:], strict=True):
            assert segment.tolist() == [pytest.approx([at * 0.95, quality]), pytest.approx([at * 1.1, quality])]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_frontier_points_show_how_many_were_dropped(figure, phase):
    axes = panels(figure)[phase]
    texts = {(text.xy, text.get_text()) for text in axes.texts if isinstance(text, Annotation)}
    assert texts == {((getattr(p, phase).median, p.quality), str(p.count)) for p in POINTS}
    for line in lines(axes).values():
        assert line.get_markevery() == slice(1, None), "the dense model has a mark of its own"
        assert line.get_marker() not in ("", "None", None)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_frontier_shows_the_dense_model_as_a_star_at_speedup_one(figure, phase):
    axes = panels(figure)[phase]
    (star,) = (line for line in axes.lines if line.get_label() == "dense")
    assert (list(star.get_xdata()), list(star.get_ydata()), star.get_marker()) == ([1], [DENSE], "*")
    upright = [line for line in axes.lines if list(line.get_xdata()) == [1, 1]]
    assert [list(line.get_ydata()) for line in upright] == [[0, 1]], "from the bottom to the top of the panel"


def test_frontier_panels_are_labelled(figure):
    assert list(panels(figure)) == ["prefill", "decode"]
    for phase, axes in panels(figure).items():
        assert axes.get_xlabel() == f"measured {phase} speedup (dropped / dense), 95 % interval"
        assert axes.get_yscale() == "linear"
    assert figure.axes[0].get_ylabel() == "accuracy (%)"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.get_suptitle() == "a model on a machine"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Attention Drop", "Block Drop", "dense"]


def test_frontier_panels_share_a_logarithmic_axis():
    points = [point("mlp", 1, 12.0, 1.1, 1.1), point("mlp", 2, 4000.0, 1.2, 1.3)]
    figure = frontier_figure(points, 11.0, "perplexity", log_scale=True)
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    assert figure.axes[0].get_ylim()[0] > 0
    assert figure.get_suptitle() == ""


def test_frontier_scopes_differ_in_colour_and_in_marker():
    points = [point(scope, 1, 50.0 + i, 1.1, 1.1 + i / 10) for i, scope in enumerate(SCOPES)]
    found = lines(frontier_figure(points, DENSE, "accuracy (%)").axes[0]).values()
    assert len(found) == len({line.get_label() for line in found}) == len(SCOPES)
    assert len({line.get_marker() for line in found}) == len({to_hex(line.get_color()) for line in found}) == 5


def test_frontier_of_one_drop_is_a_line_with_one_mark():
    figure = frontier_figure([point("joint", 3, 58.0, 1.25, 1.5)], DENSE, "accuracy (%)")
    for axes, speedup in zip(figure.axes, (1.25, 1.5), strict=True):
        (line,) = lines(axes).values()
        assert line.get_xydata().tolist() == [[1, DENSE], [speedup, 58.0]]


def test_frontier_cuts_no_text_off(figure):
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)]
    texts += [figure._suptitle, *figure.legends[0].get_texts(), *figure.axes[1].get_yticklabels()]
    for text in texts:
        if text.get_text():
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width, text
            assert 0 <= box.y0 < box.y1 <= height, text


def test_frontier_shows_joint_and_attention_points_at_the_same_place():
    points = [point(scope, count, 60.0 - count, 1 + count / 10, 1 + count / 9) for scope in SCOPES for count in (1, 2)]
    figure = frontier_figure([p for p in points if p.scope in ("attention", "joint")], DENSE, "accuracy (%)")
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        joint, attention = (lines(axes)[name] for name in ("Joint Layer Drop", "Attention Drop"))
        assert joint.get_markersize() > attention.get_markersize()
        assert joint.get_markerfacecolor() == "none"


def test_frontier_is_written_as_a_picture():
    file = io.BytesIO()
    frontier_figure(POINTS, DENSE, "accuracy (%)").savefig(file, format="png")
    file.seek(0)
    pixels = imread(file)
    assert pixels.shape == (880, 2000, 4)
    assert pixels.std() > 0.05, "not an empty sheet"
