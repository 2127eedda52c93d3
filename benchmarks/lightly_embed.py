"""Run `lightly-train embed` with the same weights and a clock; a contender of benchmarks/extract.py.

Runs in an environment that has lightly-train, and needs nothing of micl-zoo:

    python benchmarks/lightly_embed.py checkpoint --weights ENCODER_FOLDER --checkpoint FILE
    python benchmarks/lightly_embed.py embed PHOTOS --checkpoint FILE --out FILE --batch-size 64 --workers 2
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # before the import: it reports its use by default

try:
    import lightly_train
    import timm
    import torch
    from lightly_train._checkpoint import Checkpoint, CheckpointLightlyTrain, CheckpointLightlyTrainModels
    from lightly_train._embedding.embedding_predictor import EmbeddingPredictor
    from lightly_train._models import package_helpers
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._transforms.transform import NormalizeArgs
    from safetensors.torch import load_file
except ImportError as error:
    raise SystemExit(f"{error}: run this with the Python of an environment that has lightly-train") from None


def main() -> None:
    """Write a checkpoint, or embed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["checkpoint", "embed"])
    parser.add_argument("photos", nargs="?")
    for option in ("--weights", "--checkpoint", "--out"):
        parser.add_argument(option)
    parser.add_argument("--device", default="cpu")
    for option in ("--batch-size", "--workers"):
        parser.add_argument(option, type=int)
    options = parser.parse_args()
    if options.what == "checkpoint":
        write_checkpoint(Path(options.weights), options.checkpoint)
    else:
        embed(options)


def write_checkpoint(weights: Path, file: str) -> None:
    """The weights of an encoder folder as lightly-train keeps them."""
    config = json.loads((weights / "config.json").read_text())
    vit = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    vit.load_state_dict(load_file(weights / "model.safetensors"))
    wrapped = package_helpers.get_wrapped_model(vit, num_input_channels=3)
    models = CheckpointLightlyTrainModels(vit, wrapped, EmbeddingModel(wrapped))
    made = CheckpointLightlyTrain.from_now(models, NormalizeArgs())
    torch.save(Checkpoint(models.embedding_model.state_dict(), made).to_dict(), file)


def embed(options: argparse.Namespace) -> None:
    """Embed, and print images and seconds from the first finished batch to the end."""
    ends: list[float] = []
    sizes: list[int] = []
    step = EmbeddingPredictor.predict_step

    def clocked(self: Any, batch: Any, *rest: Any) -> Any:
        found = step(self, batch, *rest)
        ends.append(time.perf_counter())
        sizes.append(len(found[0]))
        return found

    EmbeddingPredictor.predict_step = clocked
    lightly_train.embed(
        out=options.out,
        data=options.photos,
        checkpoint=options.checkpoint,
        batch_size=options.batch_size,
        num_workers=options.workers,
        accelerator="gpu" if options.device.startswith("cuda") else "cpu",
        precision="32-true",
    )
    print(json.dumps({"images": sum(sizes[1:]), "seconds": time.perf_counter() - ends[0]}))


if __name__ == "__main__":
    main()
