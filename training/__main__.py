"""One rank of a run, for torchrun: `torchrun --nproc-per-node 4 -m micl_zoo.training RECIPE --data … --out …`.

It is `micl-zoo train`; `train`, `adapt`, or `eval` for `micl-zoo eval …`, may stand before the words.
"""

import sys

import click

from micl_zoo.__main__ import main
from micl_zoo.cli import main as command
from micl_zoo.errors import Interrupted, MiclZooError
from micl_zoo.limits import refused_by_system
from micl_zoo.printing import safe_output
from micl_zoo.stop import Program

NAME = "python -m micl_zoo.training"


def rank() -> None:
    """Run one of the ranks that `launch` starts; why it ends is left to `launch`, which says it once for all ranks."""
    from micl_zoo.training.run.launch import leave_error

    with Program(), safe_output():
        try:
            sys.exit(command.main(sys.argv[1:], prog_name=NAME, standalone_mode=False))
        except Interrupted as error:  # told to stop, `launch` asks for no reasons
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except (click.ClickException, MiclZooError) as error:
            leave_error(str(error))
            sys.exit(error.exit_code)
        except Exception as error:
            if (said := refused_by_system(error)) is None:
                raise
            leave_error(said)
            sys.exit(1)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words if words[:1] in (["adapt"], ["eval"], ["train"]) else ["train", *words], prog_name=NAME)
