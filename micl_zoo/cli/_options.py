"""What the commands share: options, help with examples, and the words that start the same call again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
LARGEST = 1e9  # of a number; as seconds, 30 years


class Number(click.FloatRange):
    """A number in a range, which neither `nan` nor an endless one is in."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Refuse what no comparison finds."""
        if not abs(number := super().convert(value, param, context)) <= LARGEST:
            self.fail(f"{value} is no number of at most {LARGEST:,.0f}", param, context)
        return number


POSITIVE = Number(0, min_open=True)


class Command(click.Command):
    """A command that shows the "Examples:" of its docstring below the options, line by line."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any) -> None:
        text, _, examples = inspect.cleandoc(help or "").partition("Examples:\n")
        super().__init__(name, help=text, epilog=f"\b\nExamples:\n{examples}", **settings)


class Group(Command, click.Group):
    """A group of commands with examples."""

    command_class = Command


class LocalPath(click.Path):
    """A path on this machine; an address is refused, of which pathlib would make a folder `s3:`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """Refuse what is an address, or nothing."""
        from ..files import local_path  # it imports pyarrow, which help does without

        try:
            return super().convert(local_path(value), param, context)
        except UsageError as error:
            self.fail(str(error), param, context)


def value(*words: str, **settings: Any) -> Callable[[F], F]:
    """An option from its names and, last, its help."""
    *names, text = words
    return click.option(*names, help=text + " May be repeated." * ("multiple" in settings), **settings)


def count(*words: str, least: int = 1, **settings: Any) -> Callable[[F], F]:
    """An option with a whole number."""
    return value(*words, type=click.IntRange(least), **settings)


def choice(*words: Any, **settings: Any) -> Callable[[F], F]:
    """An option from its names, its possible values, the default first, and its help."""
    *names, values, text = words
    default = {} if "multiple" in settings else {"default": values[0]}
    return value(*names, text, **{"type": click.Choice(values), **default, **settings})


def workers(text: str = "Number of decoding processes.", default: str = "one per core, at most 16") -> Callable[[F], F]:
    """The option --workers; `default` says what is taken without it."""
    return count("--workers", text, least=0, show_default=default)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; help shows them in this order."""
    return lambda command: functools.reduce(lambda made, one: one(made), reversed(options), command)


flag = functools.partial(value, is_flag=True)
path = functools.partial(value, type=LocalPath())
AS_JSON = flag("--json", "as_json", "Print one JSON object.")
DEVICE = value("--device", "Device of the model: auto, cpu, cuda, cuda:N or mps.", default="auto")
TRAINING_DEVICE = value("--device", "Device of the model: auto, cpu, cuda or cuda:N.", default="auto")
MODEL = "a name of `micl-zoo models`, OWNER/NAME on the hub, a name of timm, a file or a folder"
STORE_MODEL = value(
    *("--model", "--weights", "weights"),
    "Encoder of the store, where its own is not found by itself.",
    metavar="ENCODER",
)
IMAGE_SIZE = value(
    *("--image-size", "Side of the images in pixels."), type=click.IntRange(1, 4096), show_default="the encoder's own"
)
REMOTE = flag("--remote", "Read images from all servers that the store names, not only from its own.")
UNCHECKED = value("--check/--no-check", "Compare the checksum of each part that is read.", default=True)
SOURCE = "any source that extract takes."
OVERRIDES = value("--set", "overrides", "Change to one number of the recipe.", multiple=True, metavar="KEY=VALUE")
KNN = together(
    path("--knn", "Labelled images for k-NN: a folder with a folder per class, or with parts.", multiple=True),
    value("--knn-minutes", "Minutes between k-NN evaluations.", type=Number(0), default=30),
    count("--knn-images", "Number of images to search in each k-NN set.", least=20, default=10_000),
    value("--wandb", "Project of Weights & Biases to send the run to.", metavar="PROJECT"),
)
RANKS = together(
    count("--gpus", "Number of processes on this machine, one per GPU (or CPU processes)."),
    count("--nodes", "Number of machines; run the same command on each of them.", default=1),
    value("--rdzv", "Rendezvous endpoint: HOST:PORT of one of the machines.", metavar="HOST:PORT"),
    count("--restarts", "How often to restart after a process fails.", least=0, default=0),
    count("--micro-batch", "Images per forward pass: fewer take less memory and give the same gradients."),
    count("--max-steps", "Number of steps after which the run stops with a checkpoint."),
    TRAINING_DEVICE,
)


def call_words(leave_out: Collection[str] = ()) -> list[str]:
    """The words behind `micl-zoo` that make the running call again: its parsed parameters, but those in `leave_out`."""
    context, arguments, options = click.get_current_context(), list[str](), list[str]()
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in leave_out or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = [str(one) for one in (value if isinstance(value, tuple) else [value])]
        if isinstance(parameter, click.Argument):
            arguments += values
        elif isinstance(value, bool):
            options += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            options += [word for one in values for word in (parameter.opts[0], one)]
    names = context.command_path.removeprefix(context.find_root().command_path).split()
    dashed = any(one.startswith("-") for one in arguments)
    return [*names, *options, "--", *arguments] if dashed else [*names, *arguments, *options]


def start_ranks(options: dict[str, Any]) -> bool:
    """Run this command in several processes and return True if its options ask for them; take these options out."""
    how = {name: options.pop(name) for name in ("gpus", "nodes", "rdzv", "restarts")}
    if not how["gpus"] and how["nodes"] == 1:
        return False
    from micl_zoo.training.run.launch import launch

    launch(call_words(leave_out=how), **{**how, "gpus": how["gpus"] or 1})
    return True
