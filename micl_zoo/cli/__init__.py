"""The command line: a shell over the library. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from .._version import __version__
from ..errors import MiclZooError
from ..limits import refused_by_system
from ..printing import safe_output
from ..stop import Program
from . import evaluate, extract, release, stores, train, zoo
from ._options import Group


class _Main(Group):
    """Turns all that a user can meet into a sentence and an exit code, and prints it safely."""

    def __call__(self, *words: Any, **settings: Any) -> Any:
        """Be a program."""
        with Program():
            return self.main(*words, **settings)

    def main(self, args: Any = None, prog_name: Any = None, *_: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run a command; unless `standalone_mode` is False, leave by SystemExit."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **more)
        with safe_output():
            sys.exit(self._run(args, prog_name, **more))

    def _run(self, args: Any, prog_name: Any, **more: Any) -> int:
        """Run a command: its exit code."""
        try:
            return super().main(args, prog_name, standalone_mode=False, **more) or 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort as abort:
            if not isinstance(abort.__cause__, KeyboardInterrupt):
                raise abort.__cause__ or abort from None
            return _failed("stopped by SIGINT", 128 + signal.SIGINT)
        except MiclZooError as error:
            return _failed(str(error), error.exit_code)
        except Exception as error:
            if said := refused_by_system(error):
                return _failed(said, 1)
            raise


def _failed(text: str, code: int) -> int:
    click.echo(f"Error: {text}", err=True)
    return code


@click.group(
    cls=_Main,
    commands=[
        *(extract.extract, stores.search, stores.verify, stores.convert),
        *(zoo.models, zoo.info, zoo.download, zoo.golden, zoo.export, zoo.doctor),
        *(train.adapt, train.train, train.bench, train.report, evaluate.eval_),
        *(release.card, release.publish, release.import_),
    ],
    # color: colours in texts from outside would else be taken out of what goes to no terminal, and not be escaped
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "color": True},
)
@click.version_option(__version__, prog_name="micl-zoo")
def main() -> None:
    """Image embeddings from any encoder of timm, and encoders of one's own by masked image contrastive learning (MiCL).

    Examples:
      micl-zoo extract ~/Pictures -o embeddings
      micl-zoo extract ~/Pictures -o dinov2 --model vit_small_patch14_reg4_dinov2.lvd142m
      micl-zoo models
      micl-zoo adapt vit_small_patch14_reg4_dinov2.lvd142m --data photos/ --out runs/mine
      micl-zoo train vit_ti16.tin200 --data images/ --out runs/first
    """
    from ..telemetry import no_telemetry

    no_telemetry()  # before any import that asks, and for all processes that a command starts
