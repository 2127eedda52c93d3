"""ONNX files from anywhere: what is not of the kind that is exported is refused before ONNX Runtime sees it."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture

import micl_zoo
from micl_zoo.encoders import onnx_file
from micl_zoo.encoders.onnx_file import OPERATORS, check_file
from micl_zoo.errors import MiclZooError, WeightsError
from micl_zoo.zoo.hub import embedded_file
from micl_zoo.zoo.ours import DEFAULT, RECORDS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from micl_zoo.export import to_onnx  # noqa: E402
from micl_zoo.export.quantize import CONVERSIONS  # noqa: E402

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def exported(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = micl_zoo.load(encoder_folder, device="cpu")
    return to_onnx(encoder, tmp_path_factory.mktemp("onnx"), outputs=("cls", "patches")).path


@pytest.fixture(autouse=True)
def only_what_was_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are refused for what they hold never reach ONNX Runtime."""
    session = onnxruntime.InferenceSession
    refused: set[str] = set()
    look = onnx_file.check_file

    def check(file: Path) -> dict[str, str]:
        refused.add(str(file))
        found = look(file)
        refused.remove(str(file))
        return found

    def opened(file: str, *words: Any, **options: Any) -> Any:
        assert file not in refused
        return session(file, *words, **options)

    monkeypatch.setattr("micl_zoo.encoders.onnx_session.check_file", check)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def changed(exported: Path, folder: Path, change: Change) -> Path:
    model = onnx.load(exported)
    change(model)
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def refused(file: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        micl_zoo.load(file, backend="onnx", device="cpu")
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_what_is_exported_is_what_is_opened(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RECORDS[DEFAULT]
    assert record.onnx is not None
    for file in (exported, embedded_file(record.onnx.file)):
        metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        assert check_file(file) == metadata
    for conversion in CONVERSIONS.values():
        graph = conversion.convert(onnx.load(exported)).graph
        assert {node.op_type for node in graph.node} <= OPERATORS


def loop(model: Any) -> None:
    """A loop whose condition stays true."""
    flag, number = (helper.make_tensor_value_info(*words) for words in (("c", 9, []), ("s", 1, [1])))
    turn, out = helper.make_tensor_value_info("i", 7, []), [helper.make_tensor_value_info("c2", 9, [])]
    out.append(helper.make_tensor_value_info("s2", 1, [1]))
    nodes = [helper.make_node("Identity", [name], [f"{name}2"]) for name in ("c", "s")]
    body = helper.make_graph(nodes, "body", [turn, flag, number], out)
    constants = {"always": np.array(True), "zero": np.zeros(1, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.insert(0, helper.make_node("Loop", ["", "always", "zero"], ["endless"], body=body))


def node(kind: str, **settings: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(kind, ["pixel_values"], ["more"], **settings))


def function(model: Any) -> None:
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(
        helper.make_function("own", "f", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], opset)
    )


def sparse(model: Any) -> None:
    values, places = numpy_helper.from_array(np.ones(1, np.float32), "v"), np.array([5], np.int64)
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "p"), [10**12])
    model.graph.sparse_initializer.append(tensor)


def sized(*dims: int) -> Change:
    return lambda model: model.graph.initializer[0].dims.__setitem__(slice(None), dims)


def constant(model: Any) -> None:
    tensor = TensorProto(dims=[10**6, 10**6], data_type=1, raw_data=b"1234")
    model.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (loop, "graphs or sparse tensors within operators"),
        (node("Loop"), "the operator 'Loop'"),
        (node("If"), "the operator 'If'"),
        (node("Scan"), "the operator 'Scan'"),
        (node("SequenceMap"), "the operator 'SequenceMap'"),
        (node("ConstantOfShape"), "the operator 'ConstantOfShape'"),
        (node("Identity", domain="evil"), "the operator 'evil.Identity'"),
        (node("EPContext", domain="com.microsoft"), "the operator 'com.microsoft.EPContext'"),
        (node("PyOp", domain="ai.onnx.contrib"), "the operator 'ai.onnx.contrib.PyOp'"),
        (lambda model: model.opset_import.append(helper.make_opsetid("evil", 1)), "it needs operators of 'evil'"),
        (function, "functions or a training"),
        (lambda model: model.training_info.add(), "functions or a training"),
        (sparse, "sparse tensors"),
        (sized(10**6, 10**6), "a tensor of 1000000 x 1000000 numbers with data of"),
        (sized(-1), "a tensor of 18446744073709551615 numbers"),
        (sized(*[1] * 1000), "a tensor of more than 16 dimensions"),
        (constant, "a tensor of 1000000 x 1000000 numbers"),
        (lambda model: model.ClearField("graph"), "it holds no graph"),
        (lambda model: model.ClearField("metadata_props"), "does not say which encoder it holds"),
        (lambda model: setattr(model.graph, "doc_string", "x" * (9 << 20)), "are no numbers of tensors"),
        (lambda model: model.graph.input.append(helper.make_tensor_value_info("more", 1, [1])), "its graph has"),
        (lambda model: model.graph.output.pop(), "its graph has"),
        (lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), "its graph has"),
        (lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 11), "ONNX Runtime cannot open"),
    ],
)
def test_a_graph_that_no_export_writes(exported: Path, tmp_path: Path, change: Change, text: str) -> None:
    assert text in refused(changed(exported, tmp_path, change))


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "a/../secret", "..", "", "gone", "link", "*/_ORT_MEM_ADDR_/*", "C:\\x", "a\0"],
)
def test_data_from_elsewhere(exported: Path, tmp_path: Path, location: str) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")

    def outside(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "beside"), ("location", location)):  # the last one counts
            tensor.external_data.add(key=key, value=value)

    assert "which is no file beside it" in refused(changed(exported, tmp_path, outside))


def test_data_beside_the_file(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=300)
    assert (tmp_path / "data").stat().st_size > 10_000
    opened, expected = (micl_zoo.load(one, backend="onnx", device="cpu") for one in (tmp_path, exported))
    np.testing.assert_array_equal(opened.embed(picture(1)), expected.embed(picture(1)))


@pytest.mark.parametrize(
    "value", [None, "{", "[]", "5", "null", "[" * 100_000, '{"a": 1}', "cls,cls", "[-1, 4]", "x" * 100]
)
@pytest.mark.parametrize(
    "key", ["micl_zoo", "config", "transform", "grid", "preprocess", "versions", "outputs", "precision"]
)
def test_metadata_that_are_none(exported: Path, tmp_path: Path, key: str, value: str | None) -> None:
    if (key, value) == ("versions", '{"a": 1}'):
        value = '{"a": "1", "b": 2}'

    def change(model: Any) -> None:
        kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
        onnx.helper.set_model_props(model, kept | ({} if value is None else {key: value}))

    refused(changed(exported, tmp_path, change))


def test_a_transform_or_a_grid_that_is_another(exported: Path, tmp_path: Path) -> None:
    said = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    transform = json.loads(said["transform"])
    for key, value in [
        ("transform", json.dumps(transform | {"std": [0, 0, 0]})),
        ("transform", json.dumps(transform | {"size": 10**9})),
        ("transform", json.dumps(transform | {"resize": 10**9})),
        ("transform", json.dumps(transform | {"size": 48, "resize": 48})),
        ("grid", "[2, 8]"),
        ("outputs", "cls,mean,patches"),
        ("outputs", "patches,cls"),
        ("precision", "bf16"),
        ("weights_sha256", "mine"),
        ("widths", "{}"),
        ("widths", '{"cls": 32}'),
        ("widths", '{"cls": 16, "patches": 32}'),
        ("widths", '{"cls": 32, "patches": 0}'),
        ("widths", '{"cls": 32, "patches": 1e99}'),
        ("widths", '{"cls": 32, "patches": 32, "mean": 32}'),
        ("config", said["config"].replace('"model_args": {', '"model_args": {"checkpoint_path": "x", ')),
        ("config", said["config"].replace('"architecture": "', '"architecture": "hf-hub:')),
    ]:
        refused(
            changed(exported, tmp_path, lambda model, said=said | {key: value}: helper.set_model_props(model, said))
        )


def test_bytes_that_are_no_file(exported: Path, tmp_path: Path) -> None:
    file, raw = tmp_path / "model.onnx", exported.read_bytes()
    graph = onnx.ModelProto(graph=onnx.load(exported).graph).SerializeToString()
    parts = {  # of a protobuf: a varint is seven bits per byte
        "empty": b"",
        "text": b"no graph",
        "endless number": b"\xff" * 100,
        "a group": b"\x0b" * 100,
        "longer than the file": b"\x3a\xff\xff\xff\x7f" + raw,
        "a number for a graph": raw + b"\x38\x05",
        "two graphs": raw + graph,
        "many nodes": b"\x3a\x80\x89\x7a" + b"\x22\x00" * 1_000_000,
        "metadata of bytes": raw + b"\x72\x04\x0a\x02\xff\xfe",
        "ONNX Runtime's own format": b"\x18\x00\x00\x00ORTM" + bytes(500),
    }
    for data in parts.values():
        file.write_bytes(data)
        refused(file)


def test_changed_bytes_give_an_encoder_or_an_error_of_ours(exported: Path, tmp_path: Path) -> None:
    file, raw, seeded = tmp_path / "model.onnx", exported.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(raw)
        for _ in range(seeded.choice([1, 2, 8])):
            data[seeded.randrange(len(data))] = seeded.randrange(256)
        file.write_bytes(data[: seeded.choice([len(data), len(data), seeded.randrange(len(data))])])
        with contextlib.suppress(MiclZooError):
            micl_zoo.load(file, backend="onnx", device="cpu").embed(picture(1))


def test_a_graph_that_gives_other_shapes_than_it_says(exported: Path, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        for node in model.graph.node:  # each image twice
            node.output[:] = ["once" if name == "embedding" else name for name in node.output]
        model.graph.node.append(helper.make_node("Concat", ["once", "once"], ["embedding"], axis=0))

    opened = micl_zoo.load(changed(exported, tmp_path, change), backend="onnx", device="cpu")
    with pytest.raises(MiclZooError, match=r"gives embedding of \(2, 32\), where it says \(1, 32\)"):
        opened.embed(picture(1))


def test_onnx_runtime_prints_no_names_of_a_file(exported: Path, tmp_path: Path, capfd: Any) -> None:
    def change(model: Any) -> None:
        for node in model.graph.node:
            node.output[:] = ["once" if name == "embedding" else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.full(32, 10**6), "far"))
        model.graph.node.append(helper.make_node("Gather", ["once", "far"], ["embedding"], name="\x1b[31m", axis=1))

    opened = micl_zoo.load(changed(exported, tmp_path, change), backend="onnx", device="cpu")
    with pytest.raises(MiclZooError, match="ONNX Runtime failed"):
        opened.embed(picture(1))
    assert capfd.readouterr() == ("", "")


def test_an_encoder_of_a_file_is_copied_and_pickled(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(exported.read_bytes())
    opened = micl_zoo.load(file, backend="onnx", device="cpu")
    sent = pickle.dumps(opened)
    for twin in (copy.deepcopy(opened), pickle.loads(sent)):
        assert twin is not opened
        assert (twin.name, twin.weights_sha256, twin.card) == (opened.name, opened.weights_sha256, opened.card)
        np.testing.assert_array_equal(twin.embed(picture(1)), opened.embed(picture(1)))
    model = onnx.load(file)
    model.graph.doc_string = "another"
    onnx.save(model, file)
    with pytest.raises(WeightsError, match="has changed, it has sha256"):
        pickle.loads(sent)
