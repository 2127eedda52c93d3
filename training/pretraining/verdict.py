"""Says in words what the record of an adapted encoder holds: was it worth it, on whose terms is it. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..recipes import Recipe


def told(run: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Say in plain words what a finished run's run.json tells of it: was it worth it, and on whose terms it is.

    A sentence or two per line; none for a run that started from random weights.
    """
    if not (change := run.get("change")):
        return []
    lines = list[str]()
    knn = change["knn"]
    for name, one in knn.items():
        low, high = one["low"], one["high"]
        verdict = "better" if low > 0 else "worse, it forgot" if high < 0 else "no difference can be told"
        lines.append(
            f"k-NN on {name}, {one['images']:,} test images: {100 * one['before']:.1f} % before, "
            f"{100 * one['after']:.1f} % after ({100 * (one['after'] - one['before']):+.1f} points, 95 % interval "
            f"{low:+.1f} to {high:+.1f}): {verdict}."
        )
    if not knn:
        lines.append("No labelled images were given, so nothing here says whether it is better: give some by --knn.")
    elif any(one["high"] < 0 for one in knn.values()):
        lines.append(
            f"Keep the start, or try a lower rate (--set base_lr={recipe.base_lr / 4:.2g}), fewer epochs (--set "
            f"epochs={recipe.epochs / 4:.2g}) or a mean of both (--set start_share=0.5) in a new --out."
        )
    elif all(one["low"] <= 0 for one in knn.values()):
        lines.append("The start is as good as far as these sets can tell: nothing was gained.")
    what = "images that were not trained on" if change["held_out"] else "images"
    lines.append(
        f"{change['images']:,} {what}: embeddings before and after have a mean cosine of {change['cosine']:.2f}, and "
        f"of the {change['of_neighbours']} nearest among {change['among']:,} images {change['neighbours']:.1f} are the "
        "same."
    )
    start = run.get("encoder") or {}
    if terms := start.get("license"):
        lines.append(f"Licence of the start, {start.get('encoder')}, and so of this encoder: {terms_text(terms)}")
    return lines


def terms_text(terms: str) -> str:
    """Write the name of a licence as a sentence, and say where it does not allow commercial use."""
    barred = "Commercial use is not allowed."
    return f"{terms}. {barred}" if is_non_commercial(terms) else f"{terms}."


def is_non_commercial(terms: str) -> bool:
    """Whether the name of a licence says that commercial use is not allowed."""
    return bool(re.search(r"non-?commercial|\bnc\b|-nc-|-nc$|research[- ]only", terms, re.IGNORECASE))
