"""The command line: a shell over the library. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

from typing import Any

import click

from .._version import __version__
from ..errors import MiclZooError
from . import evaluate, extract, release, stores, train, zoo
from ._options import Group


class _Said(click.ClickException):
    """An error of the package, which click shows before it ends the process with the error's exit code."""

    def __init__(self, error: MiclZooError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


class _Main(Group):
    """Turns the package's own errors into one line and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MiclZooError as error:
            raise _Said(error) from error
        except OSError as error:  # a folder that cannot be written, a full disk
            raise click.ClickException(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")) from error


@click.group(
    cls=_Main,
    commands=[
        *(extract.extract, stores.search, stores.verify, stores.convert),
        *(zoo.models, zoo.info, zoo.download, zoo.export, zoo.doctor),
        *(train.train, train.bench, train.report, evaluate.eval_),
        *(release.card, release.publish, release.import_),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="micl-zoo")
def main() -> None:
    """Image embeddings from encoders pre-trained with masked image contrastive learning (MiCL, also called OCL).

    Examples:
      micl-zoo extract ~/Pictures -o embeddings
      micl-zoo models
      micl-zoo train vit_ti16.tin200 --data images/ --out runs/first
    """
