"""What is written is the encoder, or nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders.device import ONNX_PRECISIONS
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import ExportError, UsageError
from micl_zoo.images.transform import Transform

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from micl_zoo.export import to_onnx  # noqa: E402
from micl_zoo.export import write as writing  # noqa: E402
from micl_zoo.export.check import nearest, photographs, quarters, same_size  # noqa: E402
from micl_zoo.export.graph import encoder_graph, preprocess_text  # noqa: E402
from micl_zoo.export.quantize import CONVERSIONS, FLOAT32_OPS, store_in_half, to_fp16, to_int8  # noqa: E402


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(weights=encoder_folder, device="cpu")


@pytest.fixture(scope="module")
def graph(encoder: Encoder) -> bytes:
    """Traced once: to trace takes seconds."""
    text: bytes = encoder_graph(encoder, ("cls", "mean", "patches"), 18).SerializeToString()
    return text


@pytest.fixture
def traced(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of all outputs take the graph that was traced before."""
    monkeypatch.setattr("micl_zoo.export.graph.encoder_graph", lambda *_: onnx.load_from_string(graph))


ALL = ("cls", "mean", "patches")


def run(file: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.99999), ("fp16", 0.999), ("int8", 0.98)])
def test_each_precision_keeps_its_bounds_and_says_what_it_is(
    encoder: Encoder, tmp_path: Path, precision: Any, cosine: float
) -> None:
    made = to_onnx(encoder, tmp_path, precision=precision, outputs=ALL)
    assert [file.suffix for file in sorted(tmp_path.iterdir())] == [".json", ".onnx"]  # one file, and what was measured
    assert made.drift.cosine_min >= cosine
    for batch in (1, 2, 7):
        pixels = np.stack([encoder.transform(picture(number)) for number in range(batch)])
        found = run(made.path, pixel_values=pixels)
        assert list(found) == ["embedding", "patches"]
        with torch.no_grad():
            expected = encoder(torch.from_numpy(pixels), "cls+mean").numpy()
        assert found["embedding"].shape == (batch, 64)
        assert found["patches"].shape == (batch, 4, 4, 32)
        norms = np.linalg.norm(found["embedding"], axis=1) * np.linalg.norm(expected, axis=1)
        assert ((found["embedding"] * expected).sum(1) / norms).min() >= cosine
    said = {entry.key: entry.value for entry in onnx.load(made.path).metadata_props}
    assert said["name"] == encoder.name
    assert said["weights_sha256"] == encoder.weights_sha256
    assert said["precision"] == precision
    assert said["pooling"] == "cls+mean"
    assert said["license"] == encoder.config.license
    assert said["transform"].startswith('{"size": 32, "resize": 32, "interpolation": "bicubic", "mean": [0.485, ')
    assert {"torch", "onnx", "micl-zoo"} <= set(json.loads(said["versions"]))
    beside = json.loads(made.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert beside["drift"]["cosine_min"] == made.drift.cosine_min
    assert beside["card"]["config"]["transform"] == json.loads(said["transform"])
    assert b"site-packages" not in made.path.read_bytes()  # no traces of the machine it was made on


def test_a_frozen_batch_is_noticed(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, dynamic_shapes, **options: export(*args, **options))
    with pytest.raises(ExportError, match=r"its graph has .*'tensor\(float\)', 2, 3, 32, 32"):
        to_onnx(encoder, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced")
def test_a_drifted_weight_is_noticed_and_an_older_file_stays(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = to_onnx(encoder, tmp_path, outputs=ALL)
    before = good.path.read_bytes()

    def drift(graph: Any) -> Any:
        tensor = next(one for one in graph.graph.initializer if one.name.endswith("pos_embed"))
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
        return graph

    monkeypatch.setitem(CONVERSIONS, "fp32", dataclasses.replace(CONVERSIONS["fp32"], convert=drift))
    with pytest.raises(ExportError, match=r"is not the encoder any more: a difference of .* where 1e-04 is allowed"):
        to_onnx(encoder, tmp_path, outputs=ALL, overwrite=True)
    assert good.path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("with_preprocess", [False, True])
def test_a_wrong_mean_is_noticed(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_preprocess: bool
) -> None:
    card = writing.make_card

    def wrong(*args: Any) -> Any:
        made = card(*args)
        transform = dataclasses.replace(made.config.transform, mean=(0.5, 0.5, 0.5))
        return dataclasses.replace(made, config=dataclasses.replace(made.config, transform=transform))

    monkeypatch.setattr(writing, "make_card", wrong)
    with pytest.raises(ExportError, match="is not the encoder any more"):
        to_onnx(encoder, tmp_path, outputs=ALL, with_preprocess=with_preprocess)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced")
def test_images_of_any_size_go_in_where_the_transform_is_inside(encoder: Encoder, tmp_path: Path) -> None:
    made = to_onnx(encoder, tmp_path, outputs=ALL, with_preprocess=True)
    assert made.path.name == "model_with_preprocess.onnx"
    for seed, size in enumerate([(48, 40), (301, 200), (33, 500), (1000, 90)]):
        image = picture(seed, *size)
        found = run(made.path, images=np.asarray(image)[None])["embedding"][:, :32]
        expected = encoder.embed(image)
        assert found[0] @ expected[0] / np.linalg.norm(found) > 0.9999


SIDES = [(224, 224), (299, 224), (500, 375), (375, 500), (640, 427), (40, 1000), (3000, 200)]
INSIDE = [
    Transform.square(224, 256),
    Transform.square(224, 256, "bilinear"),
    Transform((192, 160), (219, 182)),
    Transform((192, 160), (166, 139), interpolation="bilinear"),  # larger than the picture
    Transform((224, 160), (256, 182), "squash"),
    Transform.square(224, 224, "bilinear", mode="squash"),
    Transform.square(224, 224, mode="border", mean=(0.5, 0.51, 0.1)),
    Transform((160, 191), (177, 212), "border"),
    Transform((97, 98), (84, 85), "border"),
]


@pytest.mark.parametrize("transform", INSIDE, ids=lambda transform: transform.id.partition("-0")[0])
def test_the_graph_s_transform_is_pillow_s(transform: Transform) -> None:
    model = onnx.parser.parse_model(preprocess_text(transform, 18, 8))
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    mean, std = (np.array(values, np.float32) for values in (transform.mean, transform.std))
    share, most = (0.001, 1) if transform.is_plain else (0.002, 3)  # at the very edges ONNX Runtime is less exact
    for size in SIDES:
        if transform.mode == "squash" and size == (40, 1000):
            continue  # which side comes first matters here, and differs from one Pillow to the next
        image = picture(size[0], *size)
        normalised = session.run(None, {"images": np.asarray(image)[None]})[0][0]
        pixels = (normalised.transpose(1, 2, 0) * std + mean) * 255
        assert np.abs(pixels - np.rint(pixels)).max() < 1e-3
        apart = np.abs(np.rint(pixels) - transform.pixels(image).astype(np.float32))
        assert (apart > 0).mean() < share, size
        assert apart.max() <= most


def test_a_filter_that_onnx_lacks_is_refused_before_anything_is_written(encoder: Encoder, tmp_path: Path) -> None:
    transform = dataclasses.replace(encoder.transform, interpolation="lanczos")
    config = dataclasses.replace(encoder.config, transform=transform)
    other = Encoder(encoder.runtime, config, record=None, weights_sha256=None)
    with pytest.raises(ExportError, match="resizes by lanczos, and ONNX has bicubic and bilinear only: export it"):
        to_onnx(other, tmp_path / "new", with_preprocess=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "transform", [Transform((32, 24), (36, 27), "border"), Transform.square(32, 32, mode="squash")]
)
def test_the_card_says_any_transform(encoder: Encoder, transform: Transform) -> None:
    card = writing.make_card(encoder, "fp32", ALL, True)
    card = dataclasses.replace(card, config=dataclasses.replace(card.config, transform=transform))
    assert type(card).from_metadata(card.to_metadata(), where="it").config.transform == transform


def test_int8_rows_do_not_depend_on_their_batch(encoder: Encoder, graph: bytes) -> None:
    model = to_int8(onnx.load_from_string(graph))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bright = np.stack([encoder.transform(picture(number)) for number in range(4)]) * 3
    alone = session.run(["embedding"], {"pixel_values": bright[:1] / 3})[0]
    beside = session.run(["embedding"], {"pixel_values": np.concatenate([bright[:1] / 3, bright[1:]])})[0]
    np.testing.assert_allclose(alone[0], beside[0], rtol=0, atol=1e-5)
    blocks = {node.op_type for node in model.graph.node}
    assert "MatMulInteger" in blocks
    constant = {tensor.name for tensor in model.graph.initializer}
    assert not [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constant]


def test_int8_of_a_network_without_matrix_products_is_refused() -> None:
    model = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["" : 18]>
network (float[batch, 3, 8, 8] pixel_values) => (float[batch, 3, 8, 8] embedding) { embedding = Relu(pixel_values) }
""")
    with pytest.raises(ExportError, match="int8 is for the matrix products of transformers, and this encoder has none"):
        to_int8(model)


def test_norms_and_softmax_of_fp16_compute_in_float32(graph: bytes) -> None:
    model = to_fp16(onnx.load_from_string(graph))
    casts = {node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    exact = [node for node in model.graph.node if node.op_type in FLOAT32_OPS]
    assert {node.op_type for node in exact} == set(FLOAT32_OPS)
    assert all(casts[node.input[0]] == onnx.TensorProto.FLOAT for node in exact)
    assert all(types[name] != onnx.TensorProto.FLOAT16 for node in exact for name in node.input[1:])
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in types]
    assert all(types[node.input[1]] == onnx.TensorProto.FLOAT16 for node in products)
    assert len(products) == 8  # four in each of the two blocks


def test_what_is_exported_is_what_the_table_says() -> None:
    assert tuple(CONVERSIONS) == ONNX_PRECISIONS


def test_half_precision_is_stored_only_where_nothing_is_lost(graph: bytes) -> None:
    model = onnx.load_from_string(graph)
    first = next(one for one in model.graph.initializer if len(one.dims) == 2 and np.prod(one.dims) >= 1024)
    values = onnx.numpy_helper.to_array(first).astype(np.float16).astype(np.float32)
    first.CopyFrom(onnx.numpy_helper.from_array(values, first.name))
    kept = {one.name: one.data_type for one in store_in_half(model).graph.initializer}
    assert kept[f"{first.name}_half"] == onnx.TensorProto.FLOAT16
    others = [name for name in kept if name.endswith("_half")]
    assert others == [f"{first.name}_half"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(["embedding"], {"pixel_values": np.zeros((3, 3, 32, 32), np.float32)})[0].shape == (3, 64)


def test_another_size_of_image(encoder: Encoder, tmp_path: Path) -> None:
    made = to_onnx(encoder, tmp_path, image_size=48)
    assert run(made.path, pixel_values=np.zeros((3, 3, 48, 48), np.float32))["embedding"].shape == (3, 32)
    opened = micl_zoo.load(weights=made.path, backend="onnx")
    assert opened.transform.size == (48, 48)
    assert opened.embed([picture(1)]).shape == (1, 32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'. Valid: fp16, fp32, int8"),
        ({"outputs": ("cls", "token")}, "unknown output 'token'. Valid: cls, mean, native, patches, projection"),
        ({"outputs": ("projection",)}, r"has no output 'projection': take some of native, mean, patches, cls"),
        ({"outputs": ()}, "an export needs an output: native, "),
        ({"opset": 17}, "opset must be 18 or later, got 17"),
        ({"opset": 10**20}, "and the newest that the installed onnx knows is"),
        ({"image_size": 50}, "image_size must be a multiple of the patch size, 8; got 50"),
    ],
)
def test_what_cannot_be_exported(encoder: Encoder, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises((UsageError, ExportError), match=text):
        to_onnx(encoder, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("traced")
def test_files_are_not_replaced_nor_made_larger_than_one_may_be(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(UsageError, match="exists: take another folder, or overwrite"):
        to_onnx(encoder, tmp_path)
    monkeypatch.setattr(writing, "LARGEST", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds 1,000: take precision fp16 or int8"):
        to_onnx(encoder, tmp_path, outputs=ALL, overwrite=True)
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_photographs_of_your_own(image_folder: Callable[..., Path]) -> None:
    assert len(photographs(image_folder(12))) == 12
    with pytest.raises(UsageError, match="comparing takes 10 images or more and 4 could be read"):
        photographs(image_folder(4, "few"))
    assert len(photographs()) == 50


def test_parts_of_the_comparison() -> None:
    image = picture(0, 41, 30)
    assert [part.size for part in quarters(image)] == [(20, 15)] * 4
    assert [one.size for one in same_size([image, picture(1, 30, 40)])] == [(30, 30)] * 2
    rows = np.eye(3)[[0, 0, 1, 2]] + 0.1 * np.arange(12).reshape(4, 3)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    expected = [max((b for b in range(4) if b != a), key=lambda b, a=a: cosines[a, b]) for a in range(4)]
    assert nearest(rows).tolist() == expected


@pytest.mark.usefixtures("traced")
def test_the_command(encoder_folder: Path, tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    shutil.copytree(encoder_folder, tmp_path / "run" / "encoder")
    words = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "onnx"), "--outputs", "cls, mean,patches"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Compared with PyTorch on 10 photographs: cosine 1.000000" in done.output
    assert f"micl_zoo.load({str(tmp_path / 'onnx' / 'model.onnx')!r}" in done.output
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1
    more = [*words, "--overwrite", "--json", "--images", str(image_folder(11)), "--precision", "fp16"]
    done = CliRunner().invoke(main, more, catch_exceptions=False)
    assert json.loads(done.output)["drift"]["images"] == 11
    unknown = CliRunner().invoke(main, ["export", "vit_tii16", "-o", str(tmp_path)])
    assert "Did you mean vit_ti16" in unknown.output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["vit_ti16.tin200", "vit_b16.tin200"])
def test_whole_encoders(name: str, precision: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = micl_zoo.load(name, pretrained=name == "vit_ti16.tin200", device="cpu")
    to_onnx(encoder, tmp_path, precision=precision)
