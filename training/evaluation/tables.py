"""Turns records of figures into what people read: one record, tables, a picture, a document from a template."""

from __future__ import annotations

import base64
import contextlib
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from micl_zoo.errors import UsageError
from micl_zoo.printing import printable

from .protocols import METHODS, Method

RESAMPLES = 10_000  # of the test images, for an interval
WIDTH = 120  # characters of a line of a document

# Okabe and Ito's, told apart by the colour-blind, and two more
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F")

Results = Mapping[str, Any]  # of one subject on one set, by method
Outcomes = dict[
    str, dict[str, np.ndarray]
]  # by method and key: (draws, N) bool, which test images were classified right


class Column(NamedTuple):
    """A column of figures: of one key of a method, or of the pool that the validation images chose."""

    heading: str
    method: Method
    key: str

    def find(self, found: Results) -> dict[str, Any] | None:
        """Take its figure out of the results of a subject on a set."""
        figure: dict[str, Any] = found.get(self.method.name, {}).get(self.place(found), {})
        return figure if "accuracy" in figure else None

    def place(self, found: Results) -> str:
        """Take the key of its figure in the results of a subject on a set."""
        figures = found.get(self.method.name, {})
        if self.method.by_key:
            return self.key
        return max(figures, key=lambda pool: figures[pool]["validation"], default="")


def columns(record: Mapping[str, Any], *, glance: bool = False) -> list[Column]:
    """List the columns that some results of a record have, in the order of METHODS; at a glance, one per method."""
    every = [found for sets in record["results"].values() for found in sets.values()]
    shown = []
    for method in METHODS.values():
        keys = {key for found in every for key in found.get(method.name, {})} if method.by_key else {method.glance}
        chosen = keys & {method.glance} if glance else keys
        shown += [Column(method.heading.format(key), method, key) for key in sorted(chosen, key=lambda k: (len(k), k))]
    return [one for one in shown if any(map(one.find, every))]


def rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Results]]:
    """List set, subject and results, sets first."""
    for name in record["data"]:
        for subject, sets in record["results"].items():
            if name in sets:
                yield name, subject, sets[name]


def cell(found: Mapping[str, Any] | None) -> str:
    """Write a figure with half its interval, or with its spread over draws."""
    if found is None:
        return "-"
    margin = found["spread"] if "spread" in found else (found["high"] - found["low"]) / 2
    return f"{found['accuracy']:.1f} ± {margin:.1f}"


def table(record: Mapping[str, Any]) -> str:
    """Write a record as a Markdown table, one line per set and subject that has a figure."""
    shown = columns(record)
    lines = [(name, subject, [one.find(found) for one in shown]) for name, subject, found in rows(record)]
    texts = [[name, subject, *map(cell, line)] for name, subject, line in lines if any(line)]
    return markdown(["data", "features of", *[one.heading for one in shown]], texts)


class Markdown(str):
    """Text that is Markdown on purpose, with all from outside in it escaped; any other `str` is text to show."""


def plain(text: str) -> Markdown:
    """Escape text so that Markdown shows it as it is, on one line."""
    return text if isinstance(text, Markdown) else Markdown(re.sub(r"[\\`*\[\]<>&|]", r"\\\g<0>", printable(text)))


def code(text: str, *, table: bool = True) -> Markdown:
    """Show text in the type of code; in a table, a bar stands for itself only behind a backslash."""
    shown = printable(text).replace("|", "\\|" if table else "|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " * (shown.startswith("`") or shown.endswith("`") or not shown)
    return Markdown(f"{fence}{room}{shown}{room}{fence}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """Write a Markdown table whose columns line up in plain text, too."""
    lines = [[plain(text) for text in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return Markdown("\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]))


def with_interval(found: Mapping[str, Any] | None) -> str:
    """Write a figure with the whole of its 95 % interval, or with its spread over draws."""
    if found is None or "spread" in found:
        return cell(found)
    return f"{found['accuracy']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def pool_table(record: Mapping[str, Any], subject: str) -> str:
    """Write one subject's figures of every pool, with what the validation images chose; empty where there are none."""
    shown = [one.method for one in columns(record) if not one.method.by_key]
    found = [(name, one, sets.get(one.name, {})) for name, sets in record["results"][subject].items() for one in shown]
    pools = dict.fromkeys(pool for *_, figures in found for pool in figures)
    lines = [
        [name, method.heading, *(text for pool in pools for text in _choice(figures.get(pool), method.chosen))]
        for name, method, figures in found
    ]
    setting = " or ".join(one.chosen for one in shown)
    head = ["data", "method", *(text for pool in pools for text in (pool, setting, "validation"))]
    return markdown(head, lines) if lines else ""


def _choice(found: Mapping[str, Any] | None, setting: str) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    return with_interval(found), f"{found[setting]:.2g}", f"{found['validation']:.1f}"


def render(template: Path, **values: Any) -> Markdown:
    """Fill a Jinja template, of HTML or Markdown, with values that are escaped for it unless they are `Markdown`.

    See below for the filters besides Jinja's own. Whatever could act on a terminal or hide text is escaped as well.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html = ".html" in template.name
    environment = Environment(
        loader=FileSystemLoader(template.parent), autoescape=html, undefined=StrictUndefined,
        finalize=None if html else lambda value: plain(value) if isinstance(value, str) else value,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "png": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),  # an address with the picture
        "n": lambda value: f"{value:,}",
        "g": lambda value: f"{value:g}",
        "code": code,
        "markdown": Markdown,  # for what is it already
        "wrap": _filled,  # a block of Markdown, as a paragraph
        "paragraph": lambda text: _filled(plain(text)),
        "item": lambda text: _filled(plain(text), initial_indent="- ", subsequent_indent="  "),
    }
    return Markdown(printable(environment.get_template(template.name).render(values), keep="\n"))


def _filled(text: str, **indents: str) -> Markdown:
    filled = textwrap.fill(str(text), WIDTH, break_long_words=False, break_on_hyphens=False, **indents)  # type: ignore[arg-type]
    return Markdown(filled)


# Several trainings by one recipe.

PLOT_ENDINGS = (".png", ".svg", ".pdf")
RUNS_TO_PREDICT = 3  # of two runs the interval is so wide that it says nothing
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t, by runs


def further_run(accuracies: Sequence[float]) -> tuple[float, float] | None:
    """Predict where the figure of one more run lies in 95 of 100 cases, if runs are spread as a normal distribution.

    The prediction interval of a single observation: mean ± t s sqrt(1 + 1/n), s the deviation of n runs that differ in
    their seed, on the same test images. None for fewer than three runs.
    """
    runs = len(accuracies)
    if runs < RUNS_TO_PREDICT:
        return None
    half = T_95[min(runs, max(T_95))] * stdev(accuracies) * math.sqrt(1 + 1 / runs)
    return mean(accuracies) - half, mean(accuracies) + half


def foretold(accuracies: Sequence[float]) -> list[bool]:
    """Say of each run whether it lies where the others predict a further run; of fewer than four runs, nothing."""
    others = [further_run([*accuracies[:at], *accuracies[at + 1 :]]) for at in range(len(accuracies))]
    return [where[0] <= one <= where[1] for one, where in zip(accuracies, others, strict=True) if where]


# Many records as one.

CHOICES = ("methods", "pools", "ks", "shots")  # of a protocol: which figures there are, and not how they were made


def merge(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the results, data and protocol of several records of the same encoder, by the names of their files."""
    whole: dict[str, Any] = {"results": {}, "data": {}, "protocol": {}}
    for file, record in records.items():
        how = {key: value for key, value in record["protocol"].items() if key not in CHOICES}
        images = {name: {**facts, "source": name} for name, facts in record["data"].items()}  # wherever they lay
        for part, found in (("protocol", how), ("data", images), ("results", record["results"])):
            _join(whole[part], found, f"{file}: {part}")
    return whole


def _join(there: dict[str, Any], found: Mapping[str, Any], where: str) -> None:
    for key, value in found.items():
        if isinstance(value, Mapping):
            _join(there.setdefault(key, {}), value, f"{where}, {key}")
        elif there.setdefault(key, value) != value:
            raise UsageError(
                f"{where}, {key} is {value!r}, and {there[key]!r} in another record: figures side by side must be of "
                "the same images, settings and weights. Measure them together, in one command."
            )


def check_plot(file: Path) -> None:
    """Raise a UsageError, before anything is measured, where `plot` could not draw there."""
    if file.suffix.lower() not in PLOT_ENDINGS:
        raise UsageError(f"a plot's name ends in {', '.join(PLOT_ENDINGS)}; got {str(file)!r}")
    need_matplotlib("the plot of an evaluation needs")


def plot(record: Mapping[str, Any], file: Path) -> None:
    """Draw a record: one panel per set, one line per method, one dot with its interval per subject."""
    check_plot(file)
    with own_style():
        _plot(record, file)


def _plot(record: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    shown, names, subjects = columns(record), list(record["data"]), list(record["results"])
    height = 1.4 + len(shown) * max(0.3, 0.16 * len(subjects))
    figure = Figure(figsize=(max(4.5, 3.2 * len(names)), height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for number, subject in enumerate(subjects):
            _draw(panel, record["results"][subject].get(name, {}), shown, number, len(subjects), subject)
        panel.set_title(printable(name), fontsize=10)
        panel.set_xlabel("accuracy, %", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_xlim(left=0)
    panels[0].set_yticks(range(len(shown)), [one.heading for one in shown], fontsize=9)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(subjects)), fontsize=9, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure.savefig(file)


def _draw(panel: Any, found: Results, shown: list[Column], number: int, of: int, subject: str) -> None:
    """Draw the dots of one subject in one panel, a little above or below the line so that none hides another."""
    offset = (number - (of - 1) / 2) * 0.7 / max(of, 1)
    dots = [(place + offset, one) for place, column in enumerate(shown) if (one := column.find(found))]
    lows = [one["accuracy"] - one.get("low", one["accuracy"] - one.get("spread", 0)) for _, one in dots]
    highs = [one.get("high", one["accuracy"] + one.get("spread", 0)) - one["accuracy"] for _, one in dots]
    panel.errorbar(
        [one["accuracy"] for _, one in dots], [place for place, _ in dots], xerr=[lows, highs], fmt="o", markersize=4,
        linewidth=1.2, color=COLORS[number % len(COLORS)], label=printable(subject),
    )  # fmt: skip


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of an accuracy, both 0 to 1.

    Drawing n outcomes of 0 and 1 with replacement gives a binomial count, so that is what is drawn.
    """
    counts = np.random.default_rng(0).binomial(images, accuracy, RESAMPLES)
    low, high = np.percentile(counts / images, [2.5, 97.5])
    return float(low), float(high)


def score(right: np.ndarray) -> dict[str, float]:
    """Compute accuracy and its 95 % interval, in percent, of outcomes (N,) that are right or wrong."""
    accuracy = float(right.mean())
    return dict(
        zip(("accuracy", "low", "high"), map(percent, (accuracy, *interval(accuracy, len(right)))), strict=True)
    )


def scored(right: np.ndarray) -> dict[str, Any]:
    """Compute `score`, and keep the outcomes for `take_outcomes`."""
    return {**score(right), "right": right}


def take_outcomes(found: Results) -> tuple[dict[str, Any], Outcomes]:
    """Split what methods found into figures, as records have them, and the outcomes of those that say `right`."""
    figures, outcomes = dict[str, Any](), Outcomes()
    for method, by_key in found.items():
        figures[method], outcomes[method] = {}, {}
        for key, figure in by_key.items():
            kept = dict(figure)
            if (right := kept.pop("right", None)) is not None:
                outcomes[method][key] = np.atleast_2d(right)
            figures[method][key] = kept
    return figures, outcomes


def need_matplotlib(what: str) -> None:
    """Raise a UsageError that begins with `what`, such as "the charts need", where matplotlib is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports may be newer than itself
            import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(f'{what} matplotlib: pip install "micl-zoo[train]"') from None
    except Exception as error:  # it reads a matplotlibrc, of the current folder first
        raise UsageError(f"{what} matplotlib, which fails ({error}): is there a matplotlibrc, or MPLBACKEND?") from None


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Draw figures of matplotlib alike on all machines, whatever a person has set for their own."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
        yield


def percent(share: float) -> float:
    """Turn a share into percent with two digits, as records hold them."""
    return round(100 * share, 2)
