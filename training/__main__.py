"""One rank of a run, for torchrun: `torchrun --nproc-per-node 4 -m micl_zoo.training RECIPE --data … --out …`.

It is `micl-zoo train`; `train`, or `eval` for `micl-zoo eval …`, may stand before the words.
"""

import sys

import click

from micl_zoo.cli import main
from micl_zoo.errors import Interrupted, MiclZooError

NAME = "python -m micl_zoo.training"


def rank() -> None:
    """Run one of the ranks that `launch` starts; why it ends is left to `launch`, which says it once for all ranks."""
    from micl_zoo.training.run.launch import leave_error

    try:
        sys.exit(main(sys.argv[1:], prog_name=NAME, standalone_mode=False))
    except (click.ClickException, MiclZooError) as error:
        if isinstance(error.__cause__ or error, Interrupted):
            click.echo(f"Error: {error}", err=True)  # told to stop, `launch` asks for no reasons
        else:
            leave_error(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words if words[:1] in (["eval"], ["train"]) else ["train", *words], prog_name=NAME)
