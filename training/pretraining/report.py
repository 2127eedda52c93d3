"""Shows a run folder on one HTML page: charts of its metrics, what the network saw, and every fact of its record."""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micl_zoo._version import __version__
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.files import atomic_path, read_regular, write_text

from ..corpora import corpus_text
from ..evaluation.tables import need_matplotlib, own_style, render
from ..recipes import Recipe, recorded_recipe
from ..run.record import METRICS_FILE, RESTORED, RUN_FILE, VIEWS_FILE, metric_lines, number, read_run
from .change import PICTURE
from .verdict import told

CHART_POINTS = 2000  # of a curve, each the mean of its bin
SMOOTH_PART = 40  # a smoothed curve is the mean over this fraction of the run
FINAL_STEPS = 100  # final numbers are means over the last steps
EVENTS_MARKED = 40  # in the charts; the table has them all
REFUSED_SHOWN = 100
KNN_SETS = 20  # data sets that get a curve; a run has some
MOST_VIEWS, PNG = 64 << 20, b"\x89PNG\r\n\x1a\n"
CURVE_COLORS = ("#3f83d8", "#d9782d", "#2f9e77", "#b25aa6", "#b8952b", "#c9504f", "#5aa7b8", "#8a7a6a")
COLUMNS = ("step", "epoch", "loss", "accuracy", "lr", "images_per_second", "data_wait", "seconds")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, by default its report.html, and the pictures as PNG into `pictures_folder`."""
    page = run / "report.html" if out is None else out
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"the report is one HTML page: {str(page)!r} must end in .html")
    need_matplotlib("the charts of a report need")
    record, recipe = _read_record(run)
    history = _read_history(run / METRICS_FILE)
    pictures = {
        chart.name: tuple(_draw(chart, history, theme) for theme in (LIGHT, DARK)) for chart in _charts(history, recipe)
    }
    seen, neighbours = _seen(run / VIEWS_FILE), _seen(run / PICTURE)
    for name, png in {
        "views": seen,
        "neighbours": neighbours,
        **{name: light for name, (light, _) in pictures.items()},
    }.items():
        if png:
            with atomic_path(pictures_folder(page) / f"{name}.png") as temporary:
                temporary.write_bytes(png)
    shown = {"pictures": pictures, "seen": seen, "neighbours": neighbours}
    write_text(page, _page(record, recipe, history, folder=run, **shown))
    return page


def _seen(file: Path) -> bytes | None:
    """Read a picture of the run; None where there is nothing, or what is no picture of training and gets no place."""
    if file.is_symlink() or not file.is_file():
        return None
    png = read_regular(file, MOST_VIEWS + 1)
    return png if png.startswith(PNG) and len(png) <= MOST_VIEWS else None


def pictures_folder(page: Path) -> Path:
    """Name the folder beside a page: report/ for report.html, first-report/ for first.html, as `first` may be a run."""
    return page.with_name("report" if page.stem == "report" else f"{page.stem}-report")


class History(NamedTuple):
    """What metrics.jsonl holds."""

    # (S,) float64 each, one entry per step in the order of steps, NaN where a line lacks the number
    columns: dict[str, np.ndarray]
    knn: dict[str, list[tuple[int, float]]]  # (step, share) pairs by data set
    kept: list[tuple[int, float]]  # (step, mean cosine of embeddings before and after)
    events: list[tuple[int, str, str]]  # (step, what, detail)
    unread: int  # number of damaged lines, without a last one that was cut off

    @property
    def span(self) -> tuple[float, float]:
        """Range of steps that all charts show, with a little room on both sides."""
        marked = [step for pairs in (*self.knn.values(), self.kept) for step, _ in pairs]
        marked += [step for step, *_ in self.events]
        newest = max([*self.columns["step"][-1:], *marked, 1])
        return -0.02 * newest, 1.02 * newest

    def finite(self, column: str, steps: int = 0) -> np.ndarray:
        """Take the numbers of a column, over the last steps or all, without those that are missing."""
        values = self.columns[column][-steps:]
        return values[np.isfinite(values)]

    def last(self, column: str) -> float:
        """Take the newest value of a column; NaN without one."""
        return float(values[-1]) if len(values := self.finite(column)) else math.nan

    def final(self, column: str) -> float:
        """Average a column over the last steps; NaN without one."""
        return float(values.mean()) if len(values := self.finite(column, FINAL_STEPS)) else math.nan


def _read_record(run: Path) -> tuple[dict[str, Any], Recipe]:
    wrote = "Give the folder that `train --out` wrote."
    if (record := read_run(run, RESTORED)) is not None:
        return record, recorded_recipe(record, repr(str(run / RUN_FILE)))
    runs = [str(found.parent) for found in sorted(run.glob("*/run.json"))[:5]]
    found = "has no run.json" if run.is_dir() else "is a file" if run.exists() else "does not exist"
    hint = f"It holds these runs: {', '.join(runs)}." if runs else wrote
    raise TrainingError(f"no run to report on: {str(run)!r} {found}. {hint}")


def _read_history(file: Path) -> History:
    numbers, knn, events, unread, whole = array("d"), dict[str, list[tuple[int, float]]](), [], 0, True
    kept = list[tuple[int, float]]()
    for _, line in metric_lines(file):
        unread += not whole  # the line before was damaged, and was not the last
        whole = line is not None
        if line is None:
            continue
        if isinstance(line.get("knn"), dict):
            shares = {name: share for name, share in line["knn"].items() if math.isfinite(number(share))}
            whole = len(knn.keys() | shares.keys()) <= KNN_SETS
            for name, share in shares.items() if whole else ():
                knn.setdefault(name, []).append((line["step"], share))
        elif isinstance(line.get("kept"), dict):
            cosine = number(line["kept"].get("cosine"))
            kept += [(line["step"], cosine)] if math.isfinite(cosine) else []
        elif "event" in line:
            events.append((line["step"], str(line["event"]), str(line.get("detail", ""))))
        else:
            numbers.extend(number(line.get(name)) for name in COLUMNS)
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(COLUMNS))[::-1]
    _, newest = np.unique(table[:, 0], return_index=True)  # a step that was taken again counts once
    return History(dict(zip(COLUMNS, table[newest].T, strict=True)), knn, kept, events, unread)


class Curve(NamedTuple):
    """A line of a chart; `label` is empty where the chart has one line only."""

    label: str
    steps: np.ndarray
    values: np.ndarray


class Chart(NamedTuple):
    """One chart."""

    name: str  # name of its PNG file
    unit: str  # text beside the vertical axis
    curves: list[Curve]  # curves of at least one point each; none when nothing was measured
    level: tuple[float, str] | None = None  # a value to mark, and what it means
    from_zero: bool = True  # whether the vertical axis starts at 0
    noisy: bool = True  # whether a smoothed curve is drawn over the measured one


class Theme(NamedTuple):
    """Colours of a chart, for a light or a dark page."""

    ground: str
    ink: str
    grid: str


LIGHT = Theme("#ffffff", "#3a4048", "#e3e6ea")
DARK = Theme("#1b1e23", "#c4cad2", "#343a42")


def _charts(history: History, recipe: Recipe) -> list[Chart]:
    chance = math.log(recipe.contrast_size)
    blind = f"ln {recipe.contrast_size:,} = {chance:.2f}, no two images told apart"
    knn = [
        Curve(f"{100 * pairs[-1][1]:.1f} % {name}", *(np.array(pairs, dtype=float) * (1, 100)).T)
        for name, pairs in history.knn.items()
    ]
    kept = [Curve("", *np.array(history.kept, dtype=float).T)] if history.kept else []
    return [
        Chart("loss", "nats", _curve(history, "loss"), (chance, blind), from_zero=False),
        Chart("accuracy", "percent", _curve(history, "accuracy", 100)),
        Chart("knn", "percent", knn, noisy=False),
        *([Chart("kept", "cosine", kept, noisy=False, from_zero=False)] if kept else []),
        Chart("lr", "", _curve(history, "lr"), noisy=False),
        Chart("rate", "images per second", _curve(history, "images_per_second")),
        Chart("wait", "percent of the time", _curve(history, "data_wait", 100)),
    ]


def _curve(history: History, column: str, scale: float = 1) -> list[Curve]:
    steps, values = history.columns["step"], history.columns[column]
    there = np.isfinite(values)
    return [Curve("", steps[there], scale * values[there])] if there.any() else []


def _thin(values: np.ndarray) -> np.ndarray:
    """Reduce to at most CHART_POINTS numbers, each the mean of its bin."""
    if len(values) <= CHART_POINTS:
        return values
    edges = np.linspace(0, len(values), CHART_POINTS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take a moving mean; near the ends over the part of the window that is there."""
    window = np.ones(2 * (len(values) // SMOOTH_PART // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw(chart: Chart, history: History, theme: Theme) -> bytes | None:
    """Draw the chart as PNG; None without a curve."""
    from matplotlib.figure import Figure

    if not chart.curves:
        return None
    with own_style():
        named = sum(bool(curve.label) for curve in chart.curves)
        figure = Figure(figsize=(5.6, 2.9 + 0.1 * named), dpi=200, layout="constrained", facecolor=theme.ground)
        axes = figure.add_subplot()
        for curve, color in zip(chart.curves, CURVE_COLORS * len(chart.curves), strict=False):
            _draw_curve(axes, curve, color, noisy=chart.noisy)
        for step, *_ in history.events[:EVENTS_MARKED]:
            axes.axvline(step, color=theme.ink, linewidth=0.9, linestyle=":", alpha=0.7)
        if chart.level:
            axes.axhline(chart.level[0], color=theme.ink, linewidth=1, linestyle="--")
            axes.annotate(
                chart.level[1], (1, chart.level[0]), xycoords=("axes fraction", "data"), xytext=(-4, -4),
                textcoords="offset points", ha="right", va="top", fontsize=9, color=theme.ink,
            )  # fmt: skip
        _dress(axes, chart, theme)
        axes.set_xlim(*history.span)
        if named:
            look = {"ncols": 2, "frameon": False, "fontsize": 9, "labelcolor": theme.ink, "handlelength": 1.2}
            figure.legend(loc="outside upper left", **look)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw_curve(axes: Any, curve: Curve, color: str, *, noisy: bool) -> None:
    steps, values = _thin(curve.steps), _thin(curve.values)
    marker = "o" if len(values) < SMOOTH_PART else ""
    if noisy:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = _smooth(values)
    axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=curve.label or None)


def _dress(axes: Any, chart: Chart, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_facecolor(theme.ground)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0)
    axes.yaxis.get_offset_text().set_color(theme.ink)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("step", color=theme.ink, fontsize=9)
    axes.set_ylabel(chart.unit, color=theme.ink, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.from_zero:
        axes.set_ylim(0, 1.08 * max(curve.values.max() for curve in chart.curves) or 1)
    if max(curve.values.max() for curve in chart.curves) >= 1000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _page(record: dict[str, Any], recipe: Recipe, history: History, **more: object) -> str:
    data, result, steps = record.get("data", {}), record.get("result", {}), history.columns["step"]
    rates, waits = history.finite("images_per_second"), history.finite("data_wait")
    return render(
        Path(__file__).with_name("report.html.jinja"),
        record=record, data=data, result=result, recipe=recipe, history=history, **more,
        corpus=corpus_text(recipe.corpus), told=told(record, recipe), reasons=record.get("reasons") or {},
        taken=int(result.get("steps") or (steps[-1] + 1 if len(steps) else 0)),
        total=round(recipe.epochs * ((data.get("images") or 0) // recipe.batch_size)),
        epochs=recipe.epochs if result else history.last("epoch"),
        hours=float(result.get("hours") or history.last("seconds") / 3600),
        loss=history.final("loss"), accuracy=100 * history.final("accuracy"),
        rate=float(np.median(rates)) if len(rates) else math.nan,
        wait=100 * float(waits.mean()) if len(waits) else math.nan,
        knn={name: (pairs, max(pairs, key=lambda pair: pair[1]), pairs[-1]) for name, pairs in history.knn.items()},
        view_patches=recipe.kept // recipe.views,
        events=[(f"{step:,}", what, detail) for step, what, detail in history.events],
        resumed=_resumed(record, history),
        final_steps=FINAL_STEPS, events_marked=EVENTS_MARKED, refused_shown=REFUSED_SHOWN, version=__version__,
        shown=_shown, joined=_joined, time=_time,
    )  # fmt: skip


def _shown(value: float, spec: str, unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if math.isfinite(value) else "not measured"


def _time(iso: object) -> str:
    return str(iso or "not recorded").replace("T", " ").replace("+00:00", " UTC")


def _resumed(record: dict[str, Any], history: History) -> str:
    changed = [
        f"{_time(again.get('started'))} with commit {again.get('commit')} on {_joined(again.get('machine', {}))}"
        for again in record.get("resumed", [])
    ]
    steps = [f"{step:,}" for step, what, _ in history.events if what == "resumed"]
    return "; ".join(changed + ([f"at step {', '.join(steps)}"] if steps else [])) or "never"


def _joined(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()) or "not recorded"
