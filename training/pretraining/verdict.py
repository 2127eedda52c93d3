"""Says in words what the record of an adapted encoder holds: was it worth it, on whose terms is it. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..recipes import Recipe

# in licences' names, with blanks for all that is no letter and no digit
BARRED = (
    r"\bnon ?commercial|\b(no|not for) commercial|\bnc\b|\b(research|academic|education\w*) (use )?only|\bapple amlr\b"
)


def told(run: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Say in plain words what a finished run's run.json tells of it: was it worth it, and on whose terms it is.

    A sentence or two per line; none for a run that started from random weights.
    """
    if not (change := run.get("change")):
        return []
    lines = list[str]()
    knn, start = change["knn"], run.get("encoder") or {}
    for name, one in knn.items():
        low, high = one["low"], one["high"]
        verdict = "better" if low > 0 else "worse, it forgot" if high < 0 else "no difference can be told"
        lost = f" ({one['left_out']:,} labelled images could not be embedded)" if one.get("left_out") else ""
        lines.append(
            f"k-NN on {name}, {one['images']:,} test images{lost}: {100 * one['before']:.1f} % before, "
            f"{100 * one['after']:.1f} % after ({100 * (one['after'] - one['before']):+.1f} points, 95 % interval "
            f"{low:+.1f} to {high:+.1f}): {verdict}."
        )
    if not knn:
        lines.append(
            "No labelled images were given, so nothing here says whether it is better. With some, even a few hundred, "
            f"micl-zoo eval all {start.get('encoder')} RUN --data LABELLED does."
        )
    elif any(one["high"] < 0 for one in knn.values()):
        lines.append(
            f"Keep the start, or try a lower rate (--set base_lr={recipe.base_lr / 4:.2g}), fewer epochs (--set "
            f"epochs={recipe.epochs / 4:.2g}) or a mean of both (--set start_share=0.5) in a new --out."
        )
    elif all(one["low"] <= 0 for one in knn.values()):
        lines.append(
            "The start is as good as far as these sets can tell: nothing was gained. A longer run (--set epochs="
            f"{recipe.epochs * 4:.2g}) or more images, in a new --out, may tell more."
        )
    what = "not trained on" if change["held_out"] else "looked at, all of them trained on"
    lost = f" ({change['left_out']:,} more could not be embedded)" if change.get("left_out") else ""
    lines.append(
        f"Images {what}: {change['images']:,}{lost}. Their embeddings before and after have a mean cosine of "
        f"{change['cosine']:.2f}, and of the {change['of_neighbours']} nearest among {change['among']:,} images "
        f"{change['neighbours']:.1f} are the same. That is how far it moved, not whether it is better."
    )
    if terms := start.get("license"):
        lines.append(f"Licence of the start, {start.get('encoder')}, and so of this encoder: {terms_text(terms)}")
    return lines


def terms_text(terms: str) -> str:
    """Write the name of a licence as a sentence, and say where it does not allow commercial use."""
    barred = "Commercial use is not allowed."
    return f"{terms}. {barred}" if is_non_commercial(terms) else f"{terms}."


def is_non_commercial(terms: str) -> bool:
    """Whether the name of a licence says that commercial use is not allowed."""
    text = re.sub(r"[\W_]+", " ", terms.lower())
    return bool(re.search(BARRED, text)) and "commercial use is allowed" not in text
