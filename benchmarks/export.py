"""Measure what an export costs and gives: drift from PyTorch, size and images/s of each precision; writes a record.

    python benchmarks/export.py photos/ --knn caltech101 --out training/records/vit_ti16.tin200.export.json
    python benchmarks/export.py photos/ --encoder vit_b16.tin200 --random --out benchmarks/records/export-vit_b16.json

Rates are those of the model alone, on pixels in memory, all contenders in turn. Beside the int8 of micl-zoo stand ONNX
Runtime's own dynamic and static quantisation, and the same with all 8 bits of the weights: why it is done as it is.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from contest import in_turn, rate, ratio, spread
from extract import IMAGE_SUFFIXES
from PIL import Image
from record import cpu_flags, made_on, missing, options_text
from record import write as write_record
from toys import SMALL, random_encoder

import micl_zoo
from micl_zoo import Encoder
from micl_zoo.export import quantize, write
from micl_zoo.export.check import measure, photographs
from micl_zoo.export.graph import encoder_graph
from micl_zoo.images.decode import decode
from micl_zoo.progress import progress
from micl_zoo.training.evaluation.knn import measure_knn
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.weights import save_weights

OPSET = write.OPSET
KNN_IMAGES = 10_000  # to search, of each set
CALIBRATION_BATCH = 10
OURS = {precision: row.convert for precision, row in quantize.CONVERSIONS.items()}
THEIRS = ("int8, 8 bits of weights", "int8, onnxruntime dynamic", "int8, onnxruntime static")


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--encoder", "name", default=DEFAULT, show_default=True, help="Name of `micl-zoo models`.")
@click.option("--random", is_flag=True, help="Random weights, for differences and rates only.")
@click.option("--images", type=click.IntRange(10), default=102, show_default=True, help="Use the first N photographs.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Batch size for the rates.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds of all, for the rates.")
@click.option("--seconds", type=click.FloatRange(0), default=6, show_default=True, help="Least time of one contender.")
@click.option("--knn", multiple=True, type=click.Path(exists=True, path_type=Path), help="Folder of a labelled set.")
@click.option("--trial", is_flag=True, help="Ten images and a small random encoder: does all of it run?")
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.")
def main(photos: Path, name: str, random: bool, trial: bool, out: Path | None, **options: Any) -> None:
    """Export an encoder in every precision, and measure it on PHOTOS."""
    torch.manual_seed(0)
    if trial:
        options |= {"images": 10, "batch_size": 2, "rounds": 1, "seconds": 0}
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[: options["images"]]
    with tempfile.TemporaryDirectory() as folder:
        if trial:
            weights = random_encoder(Path(folder) / "encoder", "vit_ti16.tin200", SMALL)
            encoder = micl_zoo.load(weights=weights, device="cpu")
        else:
            encoder = micl_zoo.load(name, pretrained=not random, device="cpu")
        record = compare(encoder, [decode(file.read_bytes()) for file in files], Path(folder), **options)
    given = options_text(options, "images", "batch_size", "rounds", "seconds")
    words = ["python benchmarks/export.py PHOTOS --encoder", name, *["--random"] * random, given]
    record["command"] = " ".join([*words, *(f"--knn {folder.name}" for folder in options["knn"])])
    click.echo(table(record))
    write_record(record, out)


def compare(
    encoder: Encoder,
    pictures: list[Image.Image],
    scratch: Path,
    *,
    images: int,
    batch_size: int,
    rounds: int,
    seconds: float,
    knn: tuple[Path, ...],
) -> dict[str, Any]:
    """The record of one encoder, with temporary files in `scratch`."""
    traced = encoder_graph(encoder, ("cls",), OPSET).SerializeToString()
    rows: dict[str, dict[str, Any]] = {}
    opened: dict[str, Encoder] = {}
    with progress("comparing", (len(OURS) + len(THEIRS)) * len(pictures)) as tick:
        for variant in (*OURS, *THEIRS):
            file = scratch / f"{len(rows)}.onnx"
            write.save(made(variant, traced, encoder, scratch), card(encoder, variant), file)
            drift = measure(file, encoder, pictures, tick)
            opened[variant] = micl_zoo.load(weights=file, backend="onnx", device="cpu")
            rows[variant] = {"bytes": file.stat().st_size, **dataclasses.asdict(drift)}
            rows[variant]["alone_and_in_a_batch"] = batch_dependence(opened[variant], pictures[:8])
            if variant in OURS:
                rows[variant]["within_bounds"] = not quantize.CONVERSIONS[variant].bounds.broken_by(drift)
    every = contenders(encoder, scratch) | {f"onnx {name}": one.embed_pixels for name, one in opened.items()}
    pixels = np.stack([encoder.transform.pixels(picture) for picture in pictures])

    def once(name: str) -> float:
        every[name](pixels[:1])
        return rate(every[name], batches(pixels, batch_size), seconds)

    figures = summarised(in_turn("rates", every, rounds, once))
    return {
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256 or "random weights",
        "photographs": len(pictures),
        "drift": rows,
        "images_per_second": figures,
        "int8_over_onnx_fp32": ratio(figures["onnx int8"]["median"], figures["onnx fp32"]["median"]),
        "int8_note": int8_note(),
        "knn_percent": {folder.name: accuracies(folder, encoder, opened) for folder in knn},
        "batch_size": batch_size,
        "rounds": rounds,
        **made_on(encoder.device),
    }


def made(variant: str, traced: bytes, encoder: Encoder, scratch: Path) -> onnx.ModelProto:
    """Export one way."""
    graph = onnx.load_from_string(traced)
    if variant in OURS:
        return OURS[variant](graph)
    if variant == "int8, 8 bits of weights":
        quantize.WEIGHT_MAX, kept = 127, quantize.WEIGHT_MAX
        try:
            return quantize.to_int8(graph)
        finally:
            quantize.WEIGHT_MAX = kept
    return by_onnxruntime(variant, graph, encoder, scratch)


def by_onnxruntime(variant: str, graph: onnx.ModelProto, encoder: Encoder, scratch: Path) -> onnx.ModelProto:
    """Quantise the same products with ONNX Runtime, with a scale per column and 7 bits."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    constant = {tensor.name for tensor in graph.graph.initializer}
    products = [node.name for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in constant]
    options: dict[str, Any] = {"nodes_to_quantize": products, "per_channel": True, "reduce_range": True}
    options |= {"op_types_to_quantize": ["MatMul"], "weight_type": QuantType.QInt8}
    source, target = scratch / "source.onnx", scratch / "target.onnx"
    onnx.save(graph, source)
    if variant == "int8, onnxruntime dynamic":
        quantize_dynamic(source, target, **options)
    else:
        options |= {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
        quantize_static(source, target, calibration(encoder), **options)
    return onnx.load(target)


def calibration(encoder: Encoder) -> Any:
    """What static quantisation sees: the photographs that come with the package."""
    from onnxruntime.quantization import CalibrationDataReader

    pixels = np.stack([encoder.transform.pixels(image) for image in photographs()])
    normalised = encoder.transform.normalise(torch.from_numpy(pixels)).numpy()
    batches = iter(np.split(normalised, len(normalised) // CALIBRATION_BATCH))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"pixel_values": batch}

    return Reader()


def card(encoder: Encoder, variant: str) -> Any:
    """The card of a variant: every variant of int8 says int8."""
    precision: Any = variant.partition(",")[0]
    return write.make_card(encoder, precision, ("cls",), False)


def batch_dependence(encoder: Encoder, pictures: list[Image.Image]) -> float:
    """Largest difference between an image's embedding alone and in a batch with others."""
    together = encoder.embed(pictures)
    alone = np.concatenate([encoder.embed(picture) for picture in pictures])
    return float(np.abs(together - alone).max())


def contenders(encoder: Encoder, scratch: Path) -> dict[str, Callable[[np.ndarray], object]]:
    """What is not ONNX, from pixels to embeddings."""
    found: dict[str, Callable[[np.ndarray], object]] = {
        "torch fp32": encoder.embed_pixels,
        "torch bf16": lambda pixels: encoder.embed_pixels(pixels, autocast=torch.bfloat16),
    }
    if why := missing("openvino"):
        click.echo(f"openvino fp32: left out, {why}")
    else:
        twin = scratch / "twin"
        save_weights(twin, encoder.vit.state_dict(), encoder.config, {}, "float32")
        found["openvino fp32"] = micl_zoo.load(weights=twin, backend="openvino", device="cpu").embed_pixels
    return found


def summarised(rates: dict[str, list[float]]) -> dict[str, dict[str, float | None]]:
    """Median and extremes of each contender's images/s, and the ratio to torch in float32."""
    base = spread(rates["torch fp32"])[0]
    found: dict[str, dict[str, float | None]] = {}
    for name, every in rates.items():
        median, lowest, highest = (round(value, 3) for value in spread(every))
        found[name] = {"median": median, "lowest": lowest, "highest": highest}
        found[name]["ratio_to_torch_fp32"] = ratio(spread(every)[0], base)
    return found


def batches(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Whole batches of the same photographs, over and over."""
    place = 0
    while True:
        yield np.take(pixels, range(place, place + size), axis=0, mode="wrap")
        place += size


def accuracies(folder: Path, encoder: Encoder, opened: dict[str, Encoder]) -> dict[str, float]:
    """K-NN accuracy in percent on a labelled set, of torch and of each precision."""
    labelled = LabelledSet.open(folder, train_images=KNN_IMAGES)
    every = {"torch fp32": encoder} | {f"onnx {name}": opened[name] for name in OURS}
    return {name: round(100 * measure_knn(one, labelled), 2) for name, one in every.items()}


def int8_note() -> str:
    """What the rate of int8 has to do with here."""
    flags = [flag for flag in cpu_flags() if "vnni" in flag or flag == "amx_int8"]
    if flags:
        return f"this processor multiplies bytes by {', '.join(flags)}"
    return (
        "this processor has no VNNI: it multiplies bytes in steps that take as long as float32, and quantising "
        "activations comes on top, so that int8 saves memory here and no time"
    )


def table(record: dict[str, Any]) -> str:
    """For a person."""
    lines = [f"{'':28}{'MB':>8}{'mean cos':>10}{'min cos':>10}{'neighbours':>11}{'in a batch':>11}"]
    for name, row in record["drift"].items():
        numbers = f"{row['bytes'] / 1e6:8.1f}{row['cosine_mean']:10.6f}{row['cosine_min']:10.6f}"
        lines.append(f"{name:28}{numbers}{row['neighbour_agreement']:11.1%}{row['alone_and_in_a_batch']:11.1e}")
    lines += [f"{name:34}{row['median']:8.2f} images/s" for name, row in record["images_per_second"].items()]
    lines += [f"k-NN {name}: {found}" for name, found in record["knn_percent"].items()]
    return "\n".join([*lines, record["int8_note"]])


if __name__ == "__main__":
    main()
