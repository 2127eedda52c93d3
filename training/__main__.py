"""One rank of a run, for torchrun: `torchrun --nproc-per-node 4 -m micl_zoo.training RECIPE --data … --out …`.

It is `micl-zoo train`; `train`, or `eval` for `micl-zoo eval …`, may stand before the words.
"""

import sys

from micl_zoo.__main__ import main

if __name__ == "__main__":
    words = sys.argv[1:]
    main(words if words[:1] in (["eval"], ["train"]) else ["train", *words], prog_name="python -m micl_zoo.training")
