"""One rank of a run, for torchrun: `torchrun --nproc-per-node 4 -m micl_zoo.training RECIPE --data … --out …`.

It is `micl-zoo train`, or `micl-zoo eval …` with the words from `eval` on.
"""

import sys

from micl_zoo.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    main(words if words[:1] == ["eval"] else ["train", *words], prog_name="python -m micl_zoo.training")
