"""What the record of several encoders says: which differences are more than chance, a table, a plot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from statistics import NormalDist
from typing import Any

import numpy as np

from micl_zoo.printing import printable

from .protocols import METHODS
from .record import Bits, Speed
from .tables import COLORS, Column, Markdown, cell, check_plot, columns, markdown, own_style, plain

Json = Mapping[str, Any]
CONFIDENCE = 0.95


# Which differences are more than chance.


def compared(record: Json) -> dict[str, Any]:
    """Compare the encoders of a record on every set, in every column that several of them have a figure in.

    Returns:
        By set and column: the `best`; how far it is `ahead` of each other, in points, with an interval of the paired
        difference; and the others that are `level` with it, because that interval does not lie above 0. The intervals
        hold together for all others in 95 of 100 cases, by Bonferroni. Few-shot has the encoders' `intervals`, too.
    """
    found: dict[str, Any] = {}
    for name in _sets(record):
        for column in columns(_merged(record)):
            figures = {text: figure for text in record["encoders"] if (figure := _figure(record, text, name, column))}
            if figures:
                found.setdefault(name, {})[column.heading] = _column(record, name, column, figures)
    return found


def _column(record: Json, name: str, column: Column, figures: Mapping[str, Json]) -> dict[str, Any]:
    best = max(figures, key=lambda text: figures[text]["accuracy"])
    outcomes = {text: found for text in figures if (found := _outcomes(record, text, name, column))}
    ahead = {
        text: difference(outcomes[best], outcomes[text], others=len(figures) - 1)
        if best in outcomes and text in outcomes
        else _apart(figures[best], figures[text])
        for text in figures
        if text != best
    }
    spread = {text: mean_interval(found[0]) for text, found in outcomes.items() if "spread" in figures[text]}
    level = [text for text, (low, _) in ahead.items() if low <= 0]
    return {"best": best, "ahead": ahead, "level": level, **({"intervals": spread} if spread else {})}


Outcome = tuple[
    np.ndarray, np.ndarray
]  # (draws, n) bool, which images are right; (N,) bool, which n of the N those are


def difference(mine: Outcome, other: Outcome, *, others: int = 1) -> tuple[float, float]:
    """Compute the interval of the difference of two accuracies in points, paired by test image, and by draw.

    A normal approximation, wider by one image to either side (McNemar's correction); `others` differences hold
    together. Draws of training images vary as well: their variance is added to that of the test images.
    """
    both = mine[1] & other[1]
    apart = mine[0][:, both[mine[1]]].astype(float) - other[0][:, both[other[1]]]  # (draws, n)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / others)
    half = z * _error(apart) + 1 / max(1, apart.shape[1])
    return _points(apart.mean() - half), _points(apart.mean() + half)


def mean_interval(right: np.ndarray) -> tuple[float, float]:
    """Compute the interval of the mean accuracy, in percent, of several draws (draws, n), over images and draws."""
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * _error(right.astype(float))
    return _points(max(0, right.mean() - half)), _points(min(1, right.mean() + half))


def _error(found: np.ndarray) -> float:
    """Standard error of the mean of (draws, n)."""
    variances = [over.var(ddof=1) / len(over) for over in (found.mean(0), found.mean(1)) if len(over) > 1]
    return math.sqrt(sum(variances))


def _points(share: float) -> float:
    return round(100 * float(share), 2)


def _apart(best: Json, other: Json) -> tuple[float, float]:
    """Compare two figures of a method that does not say which images were right: by their own intervals."""
    ends = [(one.get("low", math.nan), one.get("high", math.nan)) for one in (best, other)]
    low, high = ends[0][0] - ends[1][1], ends[0][1] - ends[1][0]
    return (round(low, 2), round(high, 2)) if low == low else (-100.0, 100.0)


# What a record holds, by the texts that name its encoders.


def _merged(record: Json) -> dict[str, Any]:
    """Put the results of all encoders, and of baselines, into one record."""
    results = dict[str, Any]()
    for text, one in record["encoders"].items():
        for subject, sets in one["record"]["results"].items():
            results[text if subject == one["record"]["encoder"]["name"] else subject] = sets
    return {"results": results, "data": dict.fromkeys(_sets(record))}


def _sets(record: Json) -> list[str]:
    return list(dict.fromkeys(name for one in record["encoders"].values() for name in one["record"]["data"]))


def _found(record: Json, text: str, name: str) -> Json:
    one = record["encoders"][text]["record"]
    found: Json = one["results"][one["encoder"]["name"]].get(name, {})
    return found


def _figure(record: Json, text: str, name: str, column: Column) -> Json | None:
    return column.find(_found(record, text, name))


def _outcomes(record: Json, text: str, name: str, column: Column) -> Outcome | None:
    one, key = record["encoders"][text], column.place(_found(record, text, name))
    right = one["right"].get(name, {}).get(column.method.name, {}).get(key)
    return None if right is None else (Bits(**right).array(), Bits(**one["embedded"][name]).array()[0])


def _shown(record: Json, name: str, column: Column, text: str) -> Json | None:
    """Take a figure with its interval; few-shot has that from the comparison."""
    figure = _figure(record, text, name, column)
    ends = record["compared"].get(name, {}).get(column.heading, {}).get("intervals", {}).get(text)
    if figure and ends:
        return {"accuracy": figure["accuracy"], "low": ends[0], "high": ends[1]}
    return figure


def _glance(record: Json) -> list[Column]:
    """List a column per method; all of a method that is alone, or has none for a summary."""
    every, shown = columns(_merged(record)), columns(_merged(record), glance=True)
    alone, summed = len({one.method.name for one in every}) == 1, {one.method.name for one in shown}
    return [one for one in every if alone or one in shown or one.method.name not in summed]


def labels(texts: Sequence[str]) -> dict[str, str]:
    """Shorten names and paths to as many of their last parts as tell them apart."""

    def tail(text: str, count: int) -> str:
        return "/".join(PurePath(text).parts[-count:]) or text

    found = {}
    for text in texts:
        counts = range(1, len(PurePath(text).parts) + 1)
        alone = (tail(text, n) for n in counts if [tail(one, n) for one in texts].count(tail(text, n)) == 1)
        found[text] = next(alone, text)
    return found


# The table.


def table(record: Json) -> str:
    """Write a record as a Markdown table, one line per encoder, with what has to be said of it below."""
    names = _sets(record)
    shown = [(name, column) for name in names for column in _glance(record)]
    heads = [f"{name}: {column.heading}" if len(names) > 1 else column.heading for name, column in shown]
    texts = list(dict.fromkeys((*record["asked"], *record["encoders"])))
    said = labels(texts)
    lines = [
        [said[text], *_accuracies(record, text, shown), *_facts(record, text)]
        if text in record["encoders"]
        else [said[text], *["failed" if number == 0 else "-" for number in range(len(shown) + 4)]]
        for text in texts
    ]
    for subject, sets in _merged(record)["results"].items():
        if subject not in record["encoders"]:
            figures = [cell(column.find(sets.get(name, {}))) for name, column in shown]
            lines.append([subject, *figures, *["-"] * 4])
    head = ["encoder", *heads, "images/s", "width", "parameters", "licence"]
    return "\n\n".join(filter(None, [markdown(head, lines), "\n".join(_notes(record, said))]))


def _accuracies(record: Json, text: str, shown: Sequence[tuple[str, Column]]) -> list[str]:
    """Write an encoder's figures; in bold where it is the best, or not told apart from that while others are."""
    found = list[str]()
    for name, column in shown:
        figure = cell(_shown(record, name, column, text))
        there = record["compared"].get(name, {}).get(column.heading, {"best": None, "level": [], "ahead": {}})
        best = {there["best"], *there["level"]} if len(there["level"]) < len(there["ahead"]) else set()
        found.append(Markdown(f"**{figure}**") if text in best else figure)
    return found


def _facts(record: Json, text: str) -> list[str]:
    one, speed = record["encoders"][text], _speed(record, text)
    rate = "-" if speed is None else f"{speed.images_per_second:,.{0 if speed.images_per_second >= 10 else 1}f}"
    if speed and len({other.how for other in _speeds(record).values()}) > 1:
        rate += f" ({speed.device}, {speed.precision})"
    return [rate, f"{one['width']:,}", f"{one['parameters'] / 1e6:.1f} M", _short(one["license"], LICENSE_LETTERS)]


def _speed(record: Json, text: str) -> Speed | None:
    found = record["encoders"][text]["speed"]
    return Speed(**found) if found else None


def _speeds(record: Json) -> dict[str, Speed]:
    return {text: speed for text in record["encoders"] if (speed := _speed(record, text))}


def _notes(record: Json, said: Mapping[str, str]) -> Iterator[str]:
    """Say in one line each what the figures are, how fast was measured where, and which encoders failed."""
    data = {name: facts for one in record["encoders"].values() for name, facts in one["record"]["data"].items()}
    for name, facts in data.items():
        images = f"{facts['train_images']:,} train and {facts['test_images']:,} test images of {facts['classes']:,}"
        split = f" {facts['split']}." if "split" in facts else ""
        yield f"{plain(name)}: {images} classes.{split}"
    if data:
        yield "±: half the 95 % interval of the accuracy, over test images, with few-shot over draws as well."
    if len(record["encoders"]) > 1:
        yield (
            "Bold: best of its column, or not told apart from the best by 95 % intervals of the difference on the same "
            "images. A column without bold tells none of them apart."
        )
    if len(record["encoders"]) == 2:
        yield from _gains(record, said)
    hows = dict[Any, list[str]]()
    for text, speed in _speeds(record).items():
        hows.setdefault(speed.how, []).append(text)
    for texts in hows.values():
        one, whose = (
            _speeds(record)[texts[0]],
            f" of {', '.join(plain(said[text]) for text in texts)}" * (len(hows) > 1),
        )
        yield (
            f"images/s{whose}: from image file to embedding, on {one.device} ({plain(one.chip)}) in {one.precision}, "
            f"batches of {one.batch_size}, {one.workers} decoding processes."
        )
    pools = {text: one["record"]["protocol"]["pools"] for text, one in record["encoders"].items()}
    if len({tuple(found) for found in pools.values()}) > 1:
        by_encoder = "; ".join(f"{plain(said[text])} {', '.join(found)}" for text, found in pools.items())
        yield f"Pools, of which k-NN and few-shot take the first: {by_encoder}."
    for text, reason in record["failed"].items():
        yield f"{plain(said[text])} failed: {plain(' '.join(reason.split()))}"


def _gains(record: Json, said: Mapping[str, str]) -> Iterator[str]:
    """Say of two encoders, set by set, what the second gains, and whether that is more than chance."""
    first, second = record["encoders"]
    for name, compared in record["compared"].items():
        parts, verdicts = list[str](), dict[str, list[str]]()
        for column in _glance(record):
            was, now = (_figure(record, text, name, column) for text in (first, second))
            if not was or not now:
                continue
            heading, there = column.heading, compared[column.heading]
            ends = there["ahead"][second if there["best"] == first else first]
            low, high = ends if there["best"] == second else (-ends[1], -ends[0])
            parts.append(f"{heading} {now['accuracy'] - was['accuracy']:+.1f} ({low:+.1f} to {high:+.1f})")
            verdicts.setdefault("better" if low > 0 else "worse" if high < 0 else "", []).append(heading)
        told = [f"{word} by {', '.join(found)}" for word, found in verdicts.items() if word]
        verdict = "; ".join(told) or "neither better nor worse, as far as these images tell"
        whose = f"{plain(name)}: what {plain(said[second])} gains over {plain(said[first])}"
        yield f"{whose}, in points with 95 % intervals: {', '.join(parts)}. So it is {verdict}."


# The plot.

NAME_LETTERS, LICENSE_LETTERS = 44, 24  # of a name in a plot, of a licence in a table


def plot(record: Json, file: Path) -> None:
    """Draw accuracy against images/s: one panel per set, one named dot with its interval per encoder."""
    check_plot(file)
    with own_style():
        figure = draw(record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name in a script that the font lacks
            figure.savefig(file)


def _headline(record: Json) -> Column:
    """Choose the column to draw: a linear probe's if there is one, which is what classifiers are built on."""
    shown = _glance(record)
    return next((one for one in shown if one.method is METHODS["linear"]), shown[0])


def draw(record: Json) -> Any:
    """Make the figure that `plot` writes."""
    from matplotlib.figure import Figure

    column, names, speeds = _headline(record), _sets(record), _speeds(record)
    colours = {text: COLORS[number % len(COLORS)] for number, text in enumerate(record["encoders"])}
    height = max(3.2, 1.2 + 0.24 * len(speeds))
    figure = Figure(figsize=(6.4 * len(names), height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    said = labels(list(record["encoders"]))
    for panel, name in zip(panels, names, strict=True):
        dots = {
            text: (speed.images_per_second, found)
            for text, speed in speeds.items()
            if (found := _shown(record, name, column, text))
        }
        if dots:
            _panel(panel, dots, said, colours)
        else:
            panel.text(0.5, 0.5, "no images/s are known", ha="center", transform=panel.transAxes)
        panel.set_title(printable(f"{name}, {column.heading}"), fontsize=10, loc="left")
    return figure


def _panel(
    panel: Any, dots: Mapping[str, tuple[float, Json]], said: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """Draw dots, and their names in a column to the right, each with a line to its dot: none covers another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for text, (rate, found) in dots.items():
        accuracy, spread = found["accuracy"], found.get("spread", 0)
        ends = [[accuracy - found.get("low", accuracy - spread)], [found.get("high", accuracy + spread) - accuracy]]
        panel.errorbar([rate], [accuracy], yerr=ends, fmt="o", markersize=5, linewidth=1.2, color=colours[text])
    panel.set_xscale("log")
    rates = [rate for rate, _ in dots.values()]
    panel.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.10g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("images/s", fontsize=9)
    panel.set_ylabel("accuracy, %", fontsize=9)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    low, high = panel.get_ylim()
    order = sorted(dots, key=lambda text: dots[text][1]["accuracy"])
    heights = _spread([(dots[text][1]["accuracy"] - low) / (high - low) for text in order])
    for text, height in zip(order, heights, strict=True):
        rate, found = dots[text]
        panel.annotate(
            _short(printable(said[text])), (rate, found["accuracy"]), (1.06, height), textcoords="axes fraction",
            fontsize=8, color=colours[text], va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[text], "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def _short(name: str, letters: int = NAME_LETTERS) -> str:
    half = letters // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[1 - half :]}"


def _spread(heights: Sequence[float]) -> list[float]:
    """Move rising heights, 0 to 1, as little as it takes for names to have room, and all to stay inside.

    Heights that rise by at least `room` are those that do not fall without it: an isotonic regression.
    """
    room = min(0.07, 1 / max(1, len(heights) - 1))
    groups = list[tuple[float, int]]()  # sum and count of heights that become one
    for number, height in enumerate(heights):
        total, count = height - number * room, 1
        while groups and groups[-1][0] / groups[-1][1] > total / count:
            total, count = total + groups[-1][0], count + groups.pop()[1]
        groups.append((total, count))
    most = 1 - (len(heights) - 1) * room
    flat = [min(max(total / count, 0), most) for total, count in groups for _ in range(count)]
    return [height + number * room for number, height in enumerate(flat)]
