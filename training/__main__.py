"""One rank of a run, for torchrun: `torchrun --nproc-per-node 4 -m micl_zoo.training RECIPE --data … --out …`."""

import sys

from micl_zoo.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], prog_name="python -m micl_zoo.training")
