"""Wherever a pair of speeds stands beside a speedup, the pair gives the speedup, to the rounding shown."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from layershed.cli.console import benchmark_tables
from layershed.integration.speed_measuring import figures
from layershed.performance.benchmark import Benchmark, Measurement
from layershed.performance.pairs import phase_speed
from layershed.performance.roofline import Ceilings
from layershed.performance.speed_report import ForwardReport, PhaseSpeed, SpeedReport, report_from
from layershed.planning.plan import DropPlan
from layershed.quality import Quality
from layershed.reporting.html_report import write_report
from layershed.reporting.record import RunRecord
from layershed.reporting.summary import summary_rows

# Medians 6 and 5 of the two sides, whose ratio is 1.2; the median of the ratios is 1.5.
PAIRS = [(6.0, 4.0), (8.0, 5.0), (9.0, 6.0), (5.0, 4.9), (7.5, 5.0), (5.5, 5.2), (4.0, 5.1)]
SIZES = {f"{what}_{side}": 1 for what in ("parameters", "file_bytes", "peak_memory") for side in ("dense", "dropped")}
SPEED = SpeedReport(
    phases={"prefill": phase_speed(PAIRS, 4321), "decode": phase_speed(PAIRS, 113)},
    **SIZES, runs=7, batch_size=1, device="cpu",
    kv_bytes_dense=1, kv_bytes_dropped=1, prompt_tokens=4321, new_tokens=113,
)  # fmt: skip
FORWARD = ForwardReport(
    phases={"forward": phase_speed(PAIRS, 17, "images"), "encoder": phase_speed(PAIRS, 17, "images")},
    **SIZES, runs=7, batch_size=17, device="cpu", units=17,
)  # fmt: skip
NUMBER = r"([0-9][0-9,]*(?:\.[0-9]+)?)"


def rounded(text):
    """The lowest and highest number that is shown so."""
    digits = text.replace(",", "")
    half = 0.5 * 10 ** -len(digits.partition(".")[2])
    return float(digits) - half, float(digits) + half


def agree(dense, dropped, ratio):
    """Whether the shown speeds can give the shown ratio."""
    (a, b), (c, d), (low, high) = map(rounded, (dense, dropped, ratio))
    return c / b <= high and d / a >= low


def test_the_pairs_contradict_the_medians_of_the_two_sides():
    assert phase_speed(PAIRS, 1).speedup.median == pytest.approx(1.5)
    assert not agree("100", "120", "1.50")


@pytest.mark.parametrize("report", [SPEED, FORWARD], ids=["generation", "forward pass"])
def test_terminal_and_table_of_a_run(report):
    lines = [*str(report).splitlines(), *(value for _, value in summary_rows(RunRecord("m", speed=report)))]
    found = [match for line in lines if (match := re.search(rf"{NUMBER} -> {NUMBER} \w+/s.*x{NUMBER}", line))]
    assert len(found) == 2 * len(report.phases)
    assert all(agree(*match.groups()) for match in found)


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1].append(data)
            self.inside = False


@pytest.mark.parametrize("report", [SPEED, FORWARD], ids=["generation", "forward pass"])
def test_page(report, tmp_path):
    text = write_report(RunRecord("m", speed=report), tmp_path / "r.html").read_text(encoding="utf-8")
    rows = [row for row in Cells(text).rows if row[0].lower() in report.phases]
    assert len(rows) == len(report.phases)
    assert all(
        agree(dense, dropped, ratio.removeprefix("\N{MULTIPLICATION SIGN}")) for _, dense, dropped, ratio, _ in rows
    )


@pytest.mark.parametrize("report", [SPEED, FORWARD], ids=["generation", "forward pass"])
def test_json_and_loggers(report):
    for name, phase in report.to_dict()["phases"].items():
        assert phase["dropped"] / phase["dense"] == pytest.approx(phase["speedup"]["median"])
        dense, dropped = report.milliseconds[name]
        assert dense / dropped == pytest.approx(phase["speedup"]["median"])
    logged = {name.removeprefix("speed/"): value for name, value in figures(report).items()}
    for name, phase in report.phases.items():
        of_both = logged[f"{name}_{phase.unit}_per_s"] / logged[f"{name}_{phase.unit}_per_s_dense"]
        assert of_both == pytest.approx(logged[f"{name}_speedup"])
        assert report.milliseconds[name][0] / logged[f"{name}_ms"] == pytest.approx(logged[f"{name}_speedup"])


def test_tables_and_json_of_a_sweep():
    """Each measurement has its own dense speed; the table has one dense row."""
    other = replace(SPEED, phases={name: replace(phase, dense=2 * phase.dense) for name, phase in SPEED.phases.items()})
    quality = Quality(2.0, 0.5, 9)
    measured = [Measurement("joint", n, DropPlan(), one, quality) for n, one in enumerate((SPEED, other), start=1)]
    ceilings = Ceilings("a machine", 1e12, 1e10, "measured")
    result = Benchmark("m", "b", quality, tuple(measured), "loss", ceilings, {}, {})
    for one in result.to_dict()["measurements"]:
        for phase in one["speed"]["phases"].values():
            assert phase["dense_ms"] / phase["dropped_ms"] == pytest.approx(phase["speedup"]["median"])
    _, *tables = benchmark_tables(result)
    for table in tables:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(table)
        rows = [line.split() for line in console.export_text().splitlines() if re.match(r" *(dense|joint)", line)]
        (_, dense, dense_ms), *shown = rows
        assert len(shown) == 2
        for _, _, speed, ms, ratio, *_ in shown:
            assert agree(dense, speed, ratio.removeprefix("x"))
            assert agree(ms, dense_ms, ratio.removeprefix("x"))


def test_reports_of_earlier_versions_are_read_with_the_new_denominator():
    """Their dropped speeds were medians of their own."""
    content = SPEED.to_dict()
    phases = content.pop("phases")
    old = {**content, **{name: {**phase, "dropped": 1.0, "dropped_spread": None} for name, phase in phases.items()}}
    assert report_from(old) == SPEED
    assert report_from(FORWARD.to_dict()) == FORWARD
    assert PhaseSpeed.from_dict(phases["decode"]).dropped == pytest.approx(1.5 * SPEED.decode.dense)
