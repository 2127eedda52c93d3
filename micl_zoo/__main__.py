"""`python -m micl_zoo` is `micl-zoo`."""

from .cli import main

main(prog_name="micl-zoo")
