"""A run folder as one HTML page: charts of its metrics, what the network saw, and every fact of its record.

Shapes: B images, V views, K/V patches a view, P = 3 * p * p numbers a patch of side p, G patches along a side of the
crop.
"""

from __future__ import annotations

import base64
import io
import json
import math
import warnings
from array import array
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from micl_zoo._version import __version__
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.files import atomic_path, write_text

from ..evaluation.tables import need_matplotlib
from ..micl import kept_patches
from ..recipes import Recipe, recorded_recipe

CHART_POINTS = 2000  # of a curve, each the mean of its bin
SMOOTH_PART = 40  # a smoothed curve is the mean over this fraction of the run
FINAL_STEPS = 100  # final numbers are means over the last steps
EVENTS_MARKED = 40  # in the charts; the table has them all
REFUSED_SHOWN = 100
CURVE_COLORS = ("#3f83d8", "#d9782d", "#2f9e77", "#b25aa6", "#b8952b", "#c9504f", "#5aa7b8", "#8a7a6a")
NUMBER = (int, float)
COLUMNS = ("step", "epoch", "loss", "accuracy", "lr", "images_per_second", "data_wait", "seconds")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and its pictures as PNG files into `pictures_folder`.

    Args:
        run: the folder that a training run wrote.
        out: the page, a name that ends in .html; RUN/report.html by default.

    Returns:
        The page.

    Raises:
        TrainingError: a folder that holds no run.
        UsageError: matplotlib is not installed, or a name that does not end in .html.
    """
    page = run / "report.html" if out is None else out
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"the report is one HTML page: {str(page)!r} must end in .html")
    need_matplotlib("the charts of a report need")
    record, recipe = _read_record(run)
    history = _read_history(run / "metrics.jsonl")
    charts = _charts(history, recipe)
    pictures = {chart.name: (_draw(chart, history, LIGHT), _draw(chart, history, DARK)) for chart in charts}
    views = run / "views.png"
    seen = views.read_bytes() if views.exists() else None
    files = {name: light for name, (light, _) in pictures.items() if light} | ({"views": seen} if seen else {})
    for name, png in files.items():
        with atomic_path(pictures_folder(page) / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    write_text(page, _page(run, record, recipe, history, charts, pictures, seen))
    return page


def pictures_folder(page: Path) -> Path:
    """Beside the page: report/ for report.html, first-report/ for first.html, which may stand beside a run `first`."""
    return page.with_name("report" if page.stem == "report" else f"{page.stem}-report")


# Reading a run.


class History(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
        columns: (S,) float64 each, one entry a step in the order of steps, NaN where a line lacks the number.
        knn: per data set, (step, share) pairs.
        events: (step, what, detail).
        unread: lines that are damaged, a last one that was cut off not counted.
    """

    columns: dict[str, np.ndarray]
    knn: dict[str, list[tuple[int, float]]]
    events: list[tuple[int, str, str]]
    unread: int

    @property
    def span(self) -> tuple[float, float]:
        """What all the charts show of the steps, with a little room on both sides."""
        marked = [step for pairs in self.knn.values() for step, _ in pairs] + [step for step, *_ in self.events]
        newest = max([*self.columns["step"][-1:], *marked, 1])
        return -0.02 * newest, 1.02 * newest

    def last(self, column: str) -> float:
        """The newest value of a column; NaN without one."""
        values = self.columns[column]
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else math.nan

    def final(self, column: str) -> float:
        """Mean over the last steps; NaN without one."""
        values = self.columns[column][-FINAL_STEPS:]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else math.nan


def _read_record(run: Path) -> tuple[dict[str, Any], Recipe]:
    file = run / "run.json"
    if not file.is_file():
        runs = [str(found.parent) for found in sorted(run.glob("*/run.json"))[:5]] if run.is_dir() else []
        found = "has no run.json" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        hint = f"It holds these runs: {', '.join(runs)}." if runs else "Give the folder that `train --out` wrote."
        raise TrainingError(f"no run to report on: {str(run)!r} {found}. {hint}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record, recorded_recipe(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"no run to report on: {str(file)!r} is not what a run of this package writes "
            f"({type(error).__name__}: {error}). Give the folder that `train --out` wrote."
        ) from None


def _read_history(file: Path) -> History:
    numbers, knn, events, unread, whole = array("d"), dict[str, list[tuple[int, float]]](), [], 0, True
    lines = file.open(encoding="utf-8", errors="replace") if file.exists() else io.StringIO()
    with lines:
        for text in lines:
            unread += not whole  # the line before was damaged, and was not the last
            line = _parse(text)
            whole = line is not None
            if line is None:
                continue
            if isinstance(line.get("knn"), dict):
                for name, share in line["knn"].items():
                    if isinstance(share, NUMBER) and math.isfinite(share):
                        knn.setdefault(name, []).append((line["step"], share))
            elif "event" in line:
                events.append((line["step"], str(line["event"]), str(line.get("detail", ""))))
            else:
                found = map(line.get, COLUMNS)
                numbers.extend(value if isinstance(value, NUMBER) else math.nan for value in found)
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(COLUMNS))
    _, newest = np.unique(table[::-1, 0], return_index=True)  # a step that was taken again counts once
    table = table[::-1][newest]
    return History(dict(zip(COLUMNS, table.T, strict=True)), knn, events, unread)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


# Charts.


class Curve(NamedTuple):
    """A line of a chart; `label` is empty where the chart has one line only."""

    label: str
    steps: np.ndarray
    values: np.ndarray


class Chart(NamedTuple):
    """One chart.

    Attributes:
        name: of its PNG file.
        unit: beside the vertical axis.
        curves: with at least one point each; none when nothing was measured.
        caption: under the chart.
        missing: said instead of a chart without curves.
        level: a value to mark, and what it means.
        from_zero: the vertical axis starts at 0.
        noisy: a smoothed curve is drawn over the measured one.
    """

    name: str
    title: str
    unit: str
    curves: list[Curve]
    caption: str
    missing: str
    level: tuple[float, str] | None = None
    from_zero: bool = True
    noisy: bool = True


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
        Curve(f"{100 * pairs[-1][1]:.1f} % {name}", *(np.array(axis, dtype=float) for axis in zip(*pairs, strict=True)))
        for name, pairs in history.knn.items()
    ]
    knn = [curve._replace(values=100 * curve.values) for curve in knn]
    loss, accuracy, rate = _curve(history, "loss"), _curve(history, "accuracy", 100), "images_per_second"
    lr, speed, wait = _curve(history, "lr"), _curve(history, rate), _curve(history, "data_wait", 100)
    smooth = "Faint: as measured. Strong: smoothed."
    other = "an image's other view is" if recipe.views == 2 else "each other view of an image is"
    pairs = f"How often {other} the most similar of {recipe.contrast_size:,}. {smooth}"
    waiting = f"Share of the time in which the next batch was not ready. {smooth}"
    frozen = "Accuracy of the frozen encoder, by the nearest neighbours of what it contrasts. Named: the last value."
    return [
        Chart("loss", "Loss", "nats", loss, smooth, "no loss was measured", (chance, blind), from_zero=False),
        Chart("accuracy", "Contrastive accuracy", "percent", accuracy, pairs, "no accuracy was measured"),
        Chart("knn", "k-NN accuracy", "percent", knn, frozen, "no k-NN was measured", noisy=False),
        Chart("lr", "Learning rate", "", lr, "As set at each step.", "no learning rate was recorded", noisy=False),
        Chart("rate", "Speed", "images a second", speed, smooth, "no speed was measured"),
        Chart("wait", "Waiting for data", "percent of the time", wait, waiting, "no waiting for data was measured"),
    ]


def _curve(history: History, column: str, scale: float = 1) -> list[Curve]:
    steps, values = history.columns["step"], history.columns[column]
    there = np.isfinite(values)
    return [Curve("", steps[there], scale * values[there])] if there.any() else []


def _thin(values: np.ndarray) -> np.ndarray:
    """At most CHART_POINTS numbers, each the mean of its bin."""
    if len(values) <= CHART_POINTS:
        return values
    edges = np.linspace(0, len(values), CHART_POINTS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A moving mean; near the ends over the part of the window that is there."""
    window = np.ones(2 * (len(values) // SMOOTH_PART // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw(chart: Chart, history: History, theme: Theme) -> bytes | None:
    """The chart as PNG, or None without a curve."""
    import matplotlib
    from matplotlib.figure import Figure

    if not chart.curves:
        return None
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        matplotlib.rcdefaults()  # whatever a person set for their own figures
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
        _name_curves(figure, chart, theme)
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


def _name_curves(figure: Any, chart: Chart, theme: Theme) -> None:
    if chart.curves[0].label:
        legend = figure.legend(
            loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=theme.ink, handlelength=1.2
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar


# The page.

STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1f2328; --soft: #5b636d; --line: #e1e4e8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #121417; --card: #1b1e23; --ink: #e4e7eb; --soft: #9aa3ad; --line: #31363d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.05rem; }
p { margin: .3rem 0; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  min-width: 0; }
main > section { margin-top: 1rem; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin-top: 1rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; }
.wide { overflow-x: auto; }
.views img { min-width: 40rem; border-radius: 6px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.2rem .35rem 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.facts { width: 100%; }
.facts td { width: 100%; overflow-wrap: anywhere; }
.wide td:not(:last-child) { white-space: nowrap; }
.wide td:last-child { min-width: 16rem; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: .5rem; }
@media (max-width: 30rem) { .facts th, .facts td { display: block; padding-right: 0; } .facts td { border-top: 0;
  padding-top: 0; } }
"""


def _page(
    run: Path,
    record: dict[str, Any],
    recipe: Recipe,
    history: History,
    charts: list[Chart],
    pictures: Mapping[str, tuple[bytes | None, bytes | None]],
    seen: bytes | None,
) -> str:
    drawn = "".join(_chart_html(chart, *pictures[chart.name]) for chart in charts)
    title = escape(recipe.name)
    parts = [
        f"<h1>{title}</h1><p>{escape(_state(record, recipe, history))}</p>",
        _tiles_html(record, recipe, history),
        f'<div class="charts">{drawn}</div>',
        _views_html(seen, recipe),
        _section("The run", _rows_html(_facts(run, record, recipe, history))),
        _knn_html(history),
        _events_html(history),
        _refused_html(record),
        _section("The recipe", f"<details><summary>All its fields</summary>{_rows_html(record['recipe'])}</details>"),
        f'<p class="soft">Written by micl-zoo {__version__} from run.json, metrics.jsonl and views.png.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: training report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _state(record: dict[str, Any], recipe: Recipe, history: History) -> str:
    taken = _steps_taken(record, history)
    if "result" in record:
        return f"A finished pre-training run of {taken:,} steps."
    images = record.get("data", {}).get("images") or 0
    total = round(recipe.epochs * (images // recipe.batch_size))
    return f"A pre-training run that is not finished: {taken:,} of about {total:,} steps are recorded."


def _steps_taken(record: dict[str, Any], history: History) -> int:
    steps = history.columns["step"]
    return int(record.get("result", {}).get("steps") or (steps[-1] + 1 if len(steps) else 0))


def _tiles_html(record: dict[str, Any], recipe: Recipe, history: History) -> str:
    tiles = {
        "epochs": _shown(_epochs(record, recipe, history), ".4g"),
        "hours": _shown(_hours(record, history), ".2f"),
        "loss": _shown(history.final("loss"), ".3f"),
        "contrastive accuracy": _shown(100 * history.final("accuracy"), ".1f", " %"),
        "images a second": _shown(_median_rate(history), ",.0f"),
    }
    tiles |= {f"k-NN, {name}": f"{100 * pairs[-1][1]:.1f} %" for name, pairs in history.knn.items()}
    shown = (f'<div class="tile"><b>{escape(text)}</b><span class="soft">{escape(name)}</span></div>'
             for name, text in tiles.items())  # fmt: skip
    return f'<div class="tiles">{"".join(shown)}</div>'


def _shown(value: float, spec: str, unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if math.isfinite(value) else "not measured"


def _hours(record: dict[str, Any], history: History) -> float:
    return float(record.get("result", {}).get("hours") or history.last("seconds") / 3600)


def _epochs(record: dict[str, Any], recipe: Recipe, history: History) -> float:
    return recipe.epochs if "result" in record else history.last("epoch")


def _median_rate(history: History) -> float:
    rates = history.columns["images_per_second"]
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if len(rates) else math.nan


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _chart_html(chart: Chart, light: bytes | None, dark: bytes | None) -> str:
    if light is None or dark is None:
        return _section(chart.title, _soft(chart.missing))
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_embedded(dark)}">'
        f'<img src="{_embedded(light)}" alt="{chart.title} by step"></picture>'
    )
    return _section(chart.title, f"<figure>{picture}<figcaption>{escape(chart.caption)}</figcaption></figure>")


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _views_html(png: bytes | None, recipe: Recipe) -> str:
    title = "What the network sees"
    if png is None:
        return _section(title, _soft("no picture of the views was saved: the run folder has no views.png"))
    count = recipe.views
    each = kept_patches(recipe.num_patches, recipe.mask_ratio, count) // count
    order = "view 1 above, view 2 below" if count == 2 else f"views 1 to {count} from top to bottom"
    caption = (
        f"A column is one training image: {order}, {each} of its {recipe.num_patches} patches each. "
        "They share no patch; what is grey is hidden."
    )
    picture = f'<div class="wide views"><img src="{_embedded(png)}" alt="{count} views of each of some images"></div>'
    return _section(title, f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")


def _facts(run: Path, record: dict[str, Any], recipe: Recipe, history: History) -> dict[str, object]:
    """Name and text of each row of the table of the run."""
    data, result, taken = record.get("data", {}), record.get("result", {}), _steps_taken(record, history)
    facts: dict[str, object] = {
        "recipe": f"{recipe.name}, meant for {recipe.corpus}",
        "folder": run,
        "data": f"{data.get('source', 'not recorded')}, {data.get('images', 0):,} images",
        "command": record.get("command"),
        "commit": record.get("commit"),
        "machine": _joined(record.get("machine", {})),
        "versions": _joined(record.get("versions", {})),
        "precision": result.get("precision", recipe.precision),
        "started": _time(record.get("started")),
        "resumed": _resumed(record, history),
        "finished": "yes" if result else "no",
        "steps": f"{taken:,}",
        "epochs": f"{_shown(_epochs(record, recipe, history), '.4g')} of {recipe.epochs:g}",
        "images seen": f"{result.get('images_seen', taken * recipe.batch_size):,}",
        "hours": _shown(_hours(record, history), ".3f"),
        f"loss, last {FINAL_STEPS} steps": _shown(history.final("loss"), ".4f"),
        f"accuracy, last {FINAL_STEPS} steps": _shown(100 * history.final("accuracy"), ".2f", " %"),
        "images a second, median": _shown(_median_rate(history), ",.0f"),
        "waiting for data, mean": _shown(100 * _mean(history.columns["data_wait"]), ".1f", " %"),
    }
    if history.unread:
        facts["metrics.jsonl"] = f"{history.unread:,} damaged lines were left out"
    return facts


def _time(iso: object) -> str:
    return str(iso or "not recorded").replace("T", " ").replace("+00:00", " UTC")


def _resumed(record: dict[str, Any], history: History) -> str:
    changed = [
        f"{_time(again.get('started'))} with commit {again.get('commit')} on {_joined(again.get('machine', {}))}"
        for again in record.get("resumed", [])
    ]
    steps = [f"{step:,}" for step, what, _ in history.events if what == "resumed"]
    return "; ".join(changed + ([f"at step {', '.join(steps)}"] if steps else [])) or "never"


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _joined(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()) or "not recorded"


def _rows_html(rows: Mapping[str, object]) -> str:
    shown = (
        f"<tr><th>{escape(name)}</th><td>{escape('not recorded' if value is None else str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f'<table class="facts">{"".join(shown)}</table>'


def _table_html(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _knn_html(history: History) -> str:
    if not history.knn:
        return ""  # said where the chart would be
    rows = []
    for name, pairs in history.knn.items():
        best, last = max(pairs, key=lambda pair: pair[1]), pairs[-1]
        rows.append([name, len(pairs), *(f"{100 * share:.1f} % at step {step:,}" for step, share in (best, last))])
    return _section("k-NN accuracy", _table_html(["data", "times", "best", "last"], rows))


def _events_html(history: History) -> str:
    if not history.events:
        return _section("Events", _soft("none: no resume, nothing out of the ordinary"))
    rows = [(f"{step:,}", what, detail) for step, what, detail in history.events]
    marked = (
        "Dotted lines in the charts." if len(rows) <= EVENTS_MARKED else f"Dotted lines: the first {EVENTS_MARKED}."
    )
    return _section("Events", _soft(marked) + _table_html(["step", "what", "detail"], rows))


def _refused_html(record: dict[str, Any]) -> str:
    title, refused = "Images that could not be read", record.get("data", {}).get("refused")
    if refused is None:
        return _section(title, _soft("not known yet: a run records them at its end"))
    if not refused:
        return _section(title, _soft("none"))
    more = _soft(f"{REFUSED_SHOWN} of {len(refused):,}; run.json has them all.") if refused[REFUSED_SHOWN:] else ""
    return _section(title, _table_html(["image", "reason", "detail"], refused[:REFUSED_SHOWN]) + more)
