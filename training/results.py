"""A record of figures as people want it: a table and a picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .report import need_matplotlib

# Okabe and Ito's, told apart by the colour-blind, and two more
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F")

Results = Mapping[str, Any]  # of one subject on one set, by method
Column = tuple[str, Callable[[Results], dict[str, Any] | None]]


def columns(record: Mapping[str, Any]) -> list[Column]:
    """Heading and figure of each column that some results of a record have."""
    every = [found for sets in record["results"].values() for found in sets.values()]

    def at(*keys: str) -> Callable[[Results], dict[str, Any] | None]:
        def find(found: Results) -> dict[str, Any] | None:
            value: Any = found
            for key in keys:
                value = value.get(key, {})
            return value if "accuracy" in value else None

        return find

    def best(method: str) -> Callable[[Results], dict[str, Any] | None]:
        def find(found: Results) -> dict[str, Any] | None:
            pools = found.get(method, {}).values()
            return max(pools, key=lambda one: one["validation"], default=None)

        return find

    ks = record["protocol"]["ks"]
    shots = record["protocol"]["shots"]
    candidates = [
        *[(f"k-NN {k}", at("knn", str(k))) for k in ks],
        ("linear", best("linear")),
        ("logreg", best("logreg")),
        *[(f"{n}-shot", at("few-shot", str(n))) for n in shots],
    ]
    return [(name, find) for name, find in candidates if any(find(found) for found in every)]


def rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Results]]:
    """Set, subject and results, sets first."""
    for name in record["data"]:
        for subject, sets in record["results"].items():
            if name in sets:
                yield name, subject, sets[name]


def cell(found: Mapping[str, Any] | None) -> str:
    """A figure as people read it: with half its interval, or with its spread over draws."""
    if found is None:
        return "-"
    margin = found["spread"] if "spread" in found else (found["high"] - found["low"]) / 2
    return f"{found['accuracy']:.1f} ± {margin:.1f}"


def table(record: Mapping[str, Any]) -> str:
    """A record as a Markdown table: a line a set and subject."""
    shown = columns(record)
    lines = [["data", "features of", *[name for name, _ in shown]]]
    lines += [[name, subject, *[cell(find(found)) for _, find in shown]] for name, subject, found in rows(record)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])


def plot(record: Mapping[str, Any], file: Path) -> None:
    """A record as a picture: a panel a set, a line a method, a dot with its interval a subject.

    Raises:
        UsageError: matplotlib is not installed.
    """
    need_matplotlib("the plot of an evaluation needs")
    from matplotlib.figure import Figure

    shown, names = columns(record), list(record["data"])
    subjects = list(record["results"])
    height = 1.4 + len(shown) * max(0.3, 0.16 * len(subjects))
    figure = Figure(figsize=(max(4.5, 3.2 * len(names)), height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for number, subject in enumerate(subjects):
            _draw(panel, record["results"][subject].get(name, {}), shown, number, len(subjects), subject)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("accuracy, %", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_xlim(left=0)
    panels[0].set_yticks(range(len(shown)), [heading for heading, _ in shown], fontsize=9)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(subjects)), fontsize=9, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure.savefig(file)


def _draw(panel: Any, found: Results, shown: list[Column], number: int, of: int, subject: str) -> None:
    """The dots of one subject in one panel, a little above or below the line so that none hides another."""
    offset = (number - (of - 1) / 2) * 0.7 / max(of, 1)
    dots = [(place + offset, one) for place, (_, find) in enumerate(shown) if (one := find(found))]
    lows = [one["accuracy"] - one.get("low", one["accuracy"] - one.get("spread", 0)) for _, one in dots]
    highs = [one.get("high", one["accuracy"] + one.get("spread", 0)) - one["accuracy"] for _, one in dots]
    panel.errorbar(
        [one["accuracy"] for _, one in dots], [place for place, _ in dots], xerr=[lows, highs], fmt="o", markersize=4,
        linewidth=1.2, color=COLORS[number % len(COLORS)], label=subject,
    )  # fmt: skip
