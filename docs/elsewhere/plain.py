"""Embeddings from an exported file with onnxruntime, numpy and Pillow alone.

python plain.py model_with_preprocess.onnx a.jpg b.jpg

Prints a JSON object a line: {"image": ..., "embedding": [...]}, of unit length. Takes model.onnx too: its pixels are
then resized, cropped and normalised here, as the file's metadata say.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *files: str) -> None:
    """Embed one image after the other."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for file in files:
        image = open_image(file)
        if name == "images":
            batch = np.asarray(image)[None]  # (1, H, W, 3) uint8
        else:
            batch = pixel_values(image, json.loads(session.get_modelmeta().custom_metadata_map["transform"]))[None]
        row = session.run(["embedding"], {name: batch})[0][0]  # (D,)
        print(json.dumps({"image": file, "embedding": (row / np.linalg.norm(row)).tolist()}))


def open_image(file: str) -> Image.Image:
    """RGB, upright by EXIF, transparency on white."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pixel_values(image: Image.Image, transform: dict[str, Any]) -> np.ndarray:
    """What model_with_preprocess.onnx does inside, but for strips longer than 8 to 1: -> (3, size, size) float32.

    It cuts squares from the centre: sizes of two sides, and modes that squash or pad, are left to the other file.
    """
    if "mode" in transform or transform["size"] > transform["resize"]:
        sys.exit("this program has no such transform: export the model with --with-preprocess, and take that file")
    width, height = image.size
    sides = [int(transform["resize"] * side / min(width, height)) for side in (width, height)]
    image = image.resize((sides[0], sides[1]), Image.Resampling[transform["interpolation"].upper()])
    left, top = (round((side - transform["size"]) / 2) for side in sides)
    square = np.asarray(image.crop((left, top, left + transform["size"], top + transform["size"])))
    normal = (square / np.float32(255) - np.float32(transform["mean"])) / np.float32(transform["std"])
    return normal.transpose(2, 0, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
