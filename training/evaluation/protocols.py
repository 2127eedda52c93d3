"""THE table of evaluation methods, and every choice of a measurement; imports no torch, for cards and help texts."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from micl_zoo.errors import UsageError, unknown
from micl_zoo.zoo.pools import Pool

POOLS: tuple[Pool, ...] = ("cls", "mean", "cls+mean")  # of one pass over the images
ROW_POOLS: tuple[Pool, ...] = ("native", "projection", *POOLS)  # that give one row per image
PIXELS = 32  # side of the images whose pixels are a baseline's features


@dataclass(frozen=True)
class Method:
    """One way to measure frozen features: its command, its figures in records, its columns in tables and plots.

    A new one takes a module with its function, a row in METHODS, and a field in `Protocol` for each new setting.
    """

    name: str  # its command, and its key in records
    # "module:function", called as function(train, test, protocol, classes, device) with the `Features` of both parts.
    # Its figures, by key or by pool, have an accuracy in percent, and `low` and `high` or a `spread`; those by pool
    # have the `validation` accuracy, too.
    function: str
    heading: str  # of its columns: with {} each key of its figures has one, else the pool that validation chooses
    settings: tuple[str, ...]  # names of the fields of `Protocol` that its command has as options
    help: str  # of the command
    examples: tuple[str, ...]
    about: str = ""  # what a card says of it, with fields of `Protocol` in braces: a number, or the length of a tuple
    glance: str = ""  # key of the column that summaries show; empty for the chosen pool
    chosen: str = ""  # key in its figures of the setting that the validation images chose

    @property
    def by_key(self) -> bool:
        """Whether each key of its figures has a column."""
        return "{}" in self.heading

    def measure(self, *arguments: Any) -> dict[str, Any]:
        """Call its function."""
        return pkgutil.resolve_name(self.function)(*arguments)


# DINOv2's grid, for a batch of 256, and two more: small sets took its largest.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
_HERE = __name__.rpartition(".")[0]
_METHODS = (
    Method(
        name="knn",
        function=f"{_HERE}.knn:measure",
        heading="k-NN {}",
        glance="20",
        settings=("pools", "ks", "temperature"),
        help="Weighted k-nearest neighbours: nothing is trained, nothing is chosen.\n\n"
        "With two stores, the one with the training embeddings may be larger than memory.",
        examples=(
            "vit_ti16.tin200 --data caltech101",
            "vit_ti16.tin200 runs/first --data mine/ --stores embeddings",
            "--train embeddings-train --test embeddings-val -o knn.json",
        ),
        about="k-NN: cosine of class tokens, votes weighted with temperature {temperature:g}.",
    ),
    Method(
        name="linear",
        function=f"{_HERE}.linear:measure_linear",
        heading="linear",
        settings=("pools", "seed", "epochs"),
        help="A linear probe on frozen features, fifteen learning rates at once.\n\n"
        "A fifth of the training part chooses the learning rate; the test part is classified once.",
        examples=(
            "vit_ti16.tin200 --data caltech101 --pool cls --pool cls+mean",
            "--train embeddings-train --test embeddings-val --epochs 20",
        ),
        about="Linear: a linear layer, {epochs} epochs at each of {learning_rates} learning rates.",
        chosen="lr",
    ),
    Method(
        name="logreg",
        function=f"{_HERE}.linear:measure_logreg",
        heading="logreg",
        settings=("pools", "seed"),
        help="Logistic regression on frozen features, by L-BFGS over a grid of C.\n\n"
        "A fifth of the training part chooses C; the test part is classified once.",
        examples=("vit_ti16.tin200 --data caltech101", "--train embeddings-train --test embeddings-val"),
        about="Logreg: logistic regression at each of {inverse_penalties} values of C.",
        chosen="C",
    ),
    Method(
        name="few-shot",
        function=f"{_HERE}.linear:measure_few_shot",
        heading="{}-shot",
        glance="5",
        settings=("pools", "shots", "draws"),
        help="Logistic regression on a few images per class: mean and spread over several draws of them.",
        examples=(
            "vit_ti16.tin200 --data caltech101",
            "vit_ti16.tin200 --data caltech101 --shots 2 --shots 20 --draws 10",
        ),
        about="Few-shot: logistic regression (C {few_shot_c:g}) on class tokens, {draws} draws.",
    ),
)
METHODS = {method.name: method for method in _METHODS}
ALL = Method(
    name="all",
    function="",
    heading="",
    settings=("pools", "seed"),
    help="All methods, with one pass over the images.",
    examples=(
        "vit_ti16.tin200 --data caltech101 --data flowers5 -o record.json --plot record.png",
        "vit_ti16.tin200 runs/first runs/second --data mine/ -o record.json --plot record.png",
        "runs/first --data imagenet --baseline random --baseline pixels",
    ),
)


def _option(default: Any, flag: str, help: str, least: int = 1, choices: Sequence[str] = ()) -> Any:
    """A field of `Protocol` that commands have as an option; numbers begin at `least`, texts are among `choices`."""
    return field(default=default, metadata={"flag": flag, "help": help, "least": least, "choices": choices})


@dataclass(frozen=True)
class Protocol:
    """Every choice of a measurement."""

    methods: tuple[str, ...] = tuple(METHODS)
    # k-NN and few-shot take the first
    pools: tuple[Pool, ...] = _option(
        POOLS, "--pool",
        "Features: class token, mean of the patch tokens, both; or alone the row that timm pools, or a CLIP's "
        "projection. Without a choice an encoder that has another pool of its own is measured by that.",
        choices=ROW_POOLS,
    )  # fmt: skip
    ks: tuple[int, ...] = _option((10, 20, 100, 200), "-k", "Number of neighbours.")
    temperature: float = _option(0.07, "--temperature", "Temperature of the votes.", least=0)
    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: int = _option(50, "--epochs", "Epochs over the training part.")
    inverse_penalties: tuple[float, ...] = tuple(10.0 ** (power / 2) for power in range(-10, 3))  # C, 1e-5 to 10
    shots: tuple[int, ...] = _option((1, 5, 10), "--shots", "Number of images per class.")
    draws: int = _option(5, "--draws", "Number of draws of those images.")
    few_shot_c: float = 0.1
    seed: int = _option(0, "--seed", "Seed of the validation split and of the order.", least=0)

    def __post_init__(self) -> None:
        check_names("method", self.methods, METHODS)
        check_names("pool", self.pools, ROW_POOLS)
        if len(self.pools) > 1 and (alone := [pool for pool in self.pools if pool not in POOLS]):
            raise UsageError(f"the pool {alone[0]!r} is measured alone: leave the others out")
        for one in option_fields():
            value, least, flag = getattr(self, one.name), one.metadata["least"], one.metadata["flag"].strip("-")
            numbers = [number for number in (value if isinstance(value, tuple) else [value]) if isinstance(number, int)]
            lowest = min(numbers, default=0 if value == () else least)
            if lowest < least:
                raise UsageError(f"{flag} must be at least {least}, got {lowest}")


def pools_of(asked: Sequence[Pool], own: Pool, has: Sequence[Pool]) -> tuple[Pool, ...]:
    """Take the pools asked for; where none was chosen the encoder's `own` first, with the class token and the mean."""
    if tuple(asked) != POOLS:
        return tuple(asked)
    return tuple(dict.fromkeys((own, *POOLS))) if own in POOLS and set(POOLS) <= set(has) else (own,)


def option_fields(settings: Sequence[str] | None = None) -> list[Field[Any]]:
    """List the fields of `Protocol` that are options, or those of some names; each has `_option`'s metadata."""
    options = {one.name: one for one in fields(Protocol) if one.metadata}
    return [options[name] for name in settings or options]


def check_names(kind: str, names: Sequence[str], valid: Any) -> None:
    """Raise a UsageError unless there are names and all of them are valid."""
    if not names:
        raise UsageError(f"no {kind} given. Valid: {', '.join(valid)}.")
    for name in names:
        if name not in valid:
            raise UsageError(unknown(kind, name, valid))
