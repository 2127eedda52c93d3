"""The model's side: pools, tensors on the device, compiled blocks, and OpenVINO against torch."""

from __future__ import annotations

import ast
import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import picture
from damaged import encoded
from PIL import Image
from safetensors.torch import load_file

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders import device as device_module
from micl_zoo.encoders.device import (
    BACKENDS,
    ONNX_PRECISIONS,
    PRECISIONS,
    Backend,
    Precision,
    autocast_dtype,
    backend_again,
    bf16_is_fast,
    choose_backend,
    precision_advice,
    resolve_precision,
)
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import UsageError
from micl_zoo.zoo.pools import Pool

SHAPES: dict[Pool, tuple[int, ...]] = {"cls": (32,), "mean": (32,), "cls+mean": (64,), "patches": (4, 4, 32)}
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(weights=encoder_folder, device="cpu")


def made_up_pixels(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_pools_are_cut_from_timm_s_tokens(encoder: Encoder, encoder_folder: Path) -> None:
    oracle = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ).eval()
    oracle.load_state_dict(load_file(encoder_folder / "model.safetensors"))
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        tokens = oracle.forward_features(pixel_values)
        expected = {
            "cls": tokens[:, 0],
            "mean": tokens[:, 1:].mean(1),
            "cls+mean": torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
            "patches": tokens[:, 1:].reshape(3, 4, 4, 32),
        }
        for pool, shape in SHAPES.items():
            assert encoder.row_shape(pool) == shape
            torch.testing.assert_close(encoder(pixel_values, pool), expected[pool], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", SHAPES)
def test_unit_length_is_over_the_last_axis(encoder: Encoder, pool: Pool) -> None:
    rows = encoder.embed([picture(0), picture(1), picture(2)], batch_size=2, pool=pool)
    raw = encoder.embed([picture(0), picture(1), picture(2)], batch_size=2, pool=pool, normalize=False)
    assert rows.shape == raw.shape == (3, *SHAPES[pool])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(rows, raw / np.linalg.norm(raw, axis=-1, keepdims=True), atol=1e-6)
    assert encoder.embed([], pool=pool).shape == (0, *SHAPES[pool])


def opened(data: bytes, at: int = 0) -> io.BytesIO:
    file = io.BytesIO(data)
    file.seek(at)
    return file


class Given(NamedTuple):
    """A file of which read() gives, or raises, anything."""

    data: Any

    def read(self) -> Any:
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


class BytePath:
    """A path in bytes."""

    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self.path


def test_an_image_is_given_as_whatever_it_is_without_a_doubt(encoder: Encoder, tmp_path: Path) -> None:
    image = picture(3)
    pixels = np.asarray(image)
    data = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    tensor = torch.from_numpy(pixels.copy())
    expected = encoder.embed(image)
    ways: list[Any] = [data, bytearray(data), memoryview(data), opened(data), opened(data, len(data)), pixels, tensor]
    ways += [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": "a.png"},
    ]
    ways[-1]["path"] = str(tmp_path / "a.png")
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    ways += [opaque, torch.from_numpy(opaque), pixels[::-1][::-1], BytePath(tmp_path / "a.png"), Given(bytearray(data))]
    ways += [torch._neg_view(torch.from_numpy(-pixels))]
    for one in ways:
        np.testing.assert_allclose(encoder.embed(one), expected, atol=1e-6)
        np.testing.assert_allclose(encoder.embed([image, one])[1:], expected, atol=1e-6)
    with (tmp_path / "a.png").open("rb") as file:
        np.testing.assert_allclose(encoder.embed(file), expected, atol=1e-6)
    for many in (pixels[None].repeat(2, 0), tensor[None].repeat(2, 1, 1, 1), iter([data, image]), (data, data)):
        np.testing.assert_allclose(encoder.embed(many), expected.repeat(2, 0), atol=1e-6)
    grey = np.asarray(image.convert("L"))
    for one in (grey, grey[..., None], torch.from_numpy(grey.copy())):
        np.testing.assert_allclose(encoder.embed(one), encoder.embed(image.convert("L")), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([None], r"image 0 \(NoneType\): give paths, encoded bytes"),
        ([3.5], "give paths, encoded bytes"),
        (7, "images: give paths, encoded bytes.*got int"),
        ([[1, 2]], "give paths, encoded bytes"),
        (np.array(7), "images: give paths"),
        (np.zeros((3, 8, 8), np.uint8), "got \\(3, 8, 8\\): move its first axis to the end"),
        (np.zeros((8, 8, 2), np.uint8), "of \\(1, 3, 4\\) channels; got"),
        (np.zeros((0, 8, 3), np.uint8), "got \\(0, 8, 3\\)"),
        (np.zeros((1, 8, 3), np.uint8), "too_small"),
        (["https://example.org/a.jpg"], "an address is not fetched here"),
        ("no-such-file.jpg", "no-such-file"),
        (["a\0b"], "image 0"),
        ([{"bytes": None, "path": None}], "give paths"),
        ([{"picture": b"", 7: None}], r'image 0 \(dict\): give paths.*dictionary of \["picture", 7\]'),
        ([{"image": b""}], "empty"),
        (io.StringIO("text"), "open it in mode 'rb'"),
        ([b""], "empty"),
        ([io.BytesIO()], "empty"),
        (torch.zeros(8, 8, dtype=torch.uint8).to_sparse(), "must be dense.*sparse"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8).to_sparse(), "images: a tensor must be dense.*sparse"),
        (
            torch.zeros(8, 8, 3, dtype=torch.uint8, device="meta"),
            "must be dense, with its pixels in memory; got a meta",
        ),
        ([torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device="meta")], "got a meta one"),
        (np.void(b"abc"), "images: give paths.*got void"),
        (Given(None), r"image 0 \(Given\): its read\(\) gives NoneType, not bytes"),
        (Given(5), r"its read\(\) gives int, not bytes"),
        (Given(MemoryError()), r"image 0 \(Given\): not enough memory"),
        (Given(KeyError()), r"image 0 \(Given\): KeyError"),
        (Given(EOFError("it ends early")), "it ends early"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "from 0 to 70,000, which have no defined black"),
        (Image.fromarray(np.full((8, 8), -1, np.int32)), "from -1 to 0, which have no defined black"),
    ],
)
def test_what_is_no_image_without_a_doubt_is_refused_by_a_sentence(encoder: Encoder, images: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        encoder.embed(images)


@pytest.mark.parametrize("error", [RuntimeError("a"), SyntaxError("a"), KeyError("a"), EOFError("a"), MemoryError()])
def test_an_image_that_another_opened_may_be_damaged(
    encoder: Encoder, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.open(io.BytesIO(encoded(picture(0), "PNG")))

    def load() -> None:
        raise error

    monkeypatch.setattr(image, "load", load)
    with pytest.raises(UsageError, match=r"image 1 \(PngImageFile\): (not enough memory|'?a)"):
        encoder.embed([picture(0), image])


def test_batch_sizes_are_whole_numbers_of_any_type(encoder: Encoder) -> None:
    expected = encoder.embed([picture(0)] * 3)
    for size in (np.int64(2), torch.tensor(2), 10**30):
        np.testing.assert_allclose(encoder.embed([picture(0)] * 3, batch_size=size), expected, atol=1e-6)
    for wrong in (1.5, None, "8", np.array([1, 2]), torch.tensor(1.5)):
        with pytest.raises(UsageError, match="batch_size must be a whole number, got"):
            encoder.embed([picture(0)], batch_size=wrong)
    with pytest.raises(UsageError, match="batch_size must be at least 1, got -1"):
        encoder.embed([picture(0)], batch_size=np.int32(-1))


def test_an_unknown_pool_lists_the_valid_ones(encoder: Encoder) -> None:
    valid = r"unknown pool 'cls\+men'\. Did you mean cls\+mean.*Valid: cls, cls\+mean, mean, native, patches"
    for call in (lambda pool: encoder.row_shape(pool), lambda pool: encoder(torch.zeros(1, 3, 32, 32), pool)):
        with pytest.raises(UsageError, match=valid):
            call("cls+men")


def test_tensors_are_embedded_as_the_transform_says(encoder: Encoder) -> None:
    pixels = made_up_pixels(5)
    with torch.inference_mode():
        expected = F.normalize(encoder(encoder.transform.normalise(pixels)), dim=-1)
    rows = encoder.embed_tensor(pixels)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    np.testing.assert_array_equal(encoder.embed_pixels(pixels.numpy()), expected.numpy())
    in_bf16 = encoder.embed_tensor(pixels, autocast=torch.bfloat16)
    assert in_bf16.dtype == torch.float32
    assert F.cosine_similarity(in_bf16, rows).min() > 0.999


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings
def test_compiled_blocks_agree_and_a_short_batch_compiles_nothing(encoder: Encoder) -> None:
    pixels = made_up_pixels(4)
    expected = {pool: encoder.embed_tensor(pixels, pool=pool) for pool in SHAPES}
    seen: list[int] = []
    encoder.compile_blocks(4)
    for block in encoder.vit.blocks:
        block.compile(backend=counting(seen), dynamic=False)  # the same calls, without a C++ compiler's minute
    for pool in SHAPES:
        for count in (4, 3, 1):
            rows = encoder.embed_tensor(pixels[:count], pool=pool)
            torch.testing.assert_close(rows, expected[pool][:count], rtol=1e-5, atol=1e-5)
    assert set(seen) == {4}
    assert len(seen) <= len(encoder.vit.blocks)
    encoder.compile_blocks(2)  # after memory ran out
    torch.testing.assert_close(encoder.embed_tensor(pixels[:2]), expected["cls"][:2], rtol=1e-5, atol=1e-5)
    assert set(seen) == {4, 2}


def counting(seen: list[int]):  # type: ignore[no-untyped-def]
    def backend(graph, examples):  # type: ignore[no-untyped-def]
        seen.extend(x.shape[0] for x in examples if x.ndim == 3 and x.shape[1:] == (17, 32))
        return graph.forward

    return backend


@pytest.mark.slow
def test_really_compiled_blocks_agree(encoder: Encoder) -> None:
    pixels = made_up_pixels(4)
    expected = encoder.embed_tensor(pixels)
    encoder.compile_blocks(4)
    torch.testing.assert_close(encoder.embed_tensor(pixels), expected, rtol=1e-4, atol=1e-4)


def test_compiling_without_a_compiler_says_what_to_do(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match=r"C\+\+ compiler.* none was found: install one"):
        encoder.compile_blocks(4)


def test_advice_on_slow_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "several times slower than fp32" in (precision_advice("fp16", CPU) or "")
    assert precision_advice("fp32", CPU) is None
    assert (precision_advice("bf16", CPU) is None) == bf16_is_fast(CPU)
    monkeypatch.setattr(device_module, "bf16_is_fast", lambda _: False)
    assert "Take precision auto, which takes fp32 here" in (precision_advice("bf16", CPU) or "")
    assert "Take precision fp16" in (precision_advice("bf16", torch.device("cuda")) or "")
    assert precision_advice("fp16", torch.device("cuda")) is None


def test_backends_that_cannot_be(encoder_folder: Path) -> None:
    with pytest.raises(UsageError, match="backend must be one of torch, openvino, onnx, it is 'openvin'"):
        micl_zoo.load(weights=encoder_folder, backend="openvin")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="openvino runs on cpu, not on 'cuda'"):
        micl_zoo.load(weights=encoder_folder, backend="openvino", device="cuda")
    with pytest.raises(UsageError, match="keeps weights in float32, not in 'bfloat16'"):
        micl_zoo.load(weights=encoder_folder, backend="openvino", dtype="bfloat16")


def test_a_missing_openvino_gives_the_line_that_installs_it(
    encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'micl-zoo\[openvino\]'"):
        micl_zoo.load(weights=encoder_folder, backend="openvino")


def test_openvino_agrees_with_torch(encoder: Encoder, encoder_folder: Path) -> None:
    pytest.importorskip("openvino")
    fast = micl_zoo.load(weights=encoder_folder, backend="openvino")
    assert (fast.backend, encoder.backend, fast.device) == ("openvino", "torch", CPU)
    for count in (1, 3, 8):
        pixels = made_up_pixels(count)
        for pool in SHAPES:
            rows = fast.embed_tensor(pixels, pool=pool)
            expected = encoder.embed_tensor(pixels, pool=pool)
            assert rows.shape == expected.shape
            assert F.cosine_similarity(rows, expected, dim=-1).min() >= 0.99999
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    kept = fast.embed_pixels(made_up_pixels(2).numpy())
    before = kept.copy()
    fast.embed_pixels(made_up_pixels(3).numpy())
    np.testing.assert_array_equal(kept, before)  # rows do not lie in memory that the next batch overwrites
    with torch.no_grad():
        features = fast.features(torch.randn(2, 3, 32, 32))
    assert (features.cls.shape, features.patches.shape) == ((2, 32), (2, 4, 4, 32))
    np.testing.assert_allclose(fast.embed(picture(3)), encoder.embed(picture(3)), atol=1e-5)


def test_an_openvino_encoder_is_copied_and_pickled(encoder_folder: Path) -> None:
    pytest.importorskip("openvino")
    fast, pixels = micl_zoo.load(weights=encoder_folder, backend="openvino"), made_up_pixels(2)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.vit is twin.runtime.model is not fast.vit
        torch.testing.assert_close(twin.embed_tensor(pixels), fast.embed_tensor(pixels), rtol=1e-5, atol=1e-5)


def test_openvino_says_what_it_cannot_do(encoder_folder: Path) -> None:
    openvino = pytest.importorskip("openvino")
    fast = micl_zoo.load(weights=encoder_folder, backend="openvino")
    with pytest.raises(UsageError, match=r"computes no gradients: call it under torch\.no_grad"):
        fast(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UsageError, match="compiles by itself"):
        fast.compile_blocks(4)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="no bf16 arithmetic on this CPU"):
            fast.embed_tensor(made_up_pixels(1), autocast=torch.bfloat16)
    else:
        rows = [fast.embed_tensor(made_up_pixels(4), autocast=kind) for kind in (None, torch.bfloat16)]
        assert F.cosine_similarity(*rows).min() > 0.999


def test_a_torch_encoder_is_a_module(encoder: Encoder) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    assert next(iter(encoder.state_dict())) == "model.cls_token"
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert twin.vit is not encoder.vit
        assert torch.equal(twin(pixels), encoder(pixels))
        twin.load_state_dict({key: value * 0 for key, value in encoder.state_dict().items()})
        assert not twin(pixels).any()
    encoder(pixels)[:, 0].sum().backward()
    assert encoder.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    assert half(pixels).dtype == torch.bfloat16
    half.vit = encoder.vit
    assert torch.equal(half(pixels), encoder(pixels))  # a model put in the place of the first is what computes


def test_precisions_and_backends_stand_in_one_table() -> None:
    assert get_args(Precision) == ("auto", *PRECISIONS)
    assert get_args(Backend) == tuple(BACKENDS)
    for command, option, valid in [
        ("extract", "pool", get_args(Pool)),
        ("extract", "precision", get_args(Precision)),
        ("extract", "backend", ("auto", *BACKENDS)),
        ("export", "precision", ONNX_PRECISIONS),
    ]:
        choice = next(one.type for one in main.get_command(None, command).params if one.name == option)  # type: ignore[arg-type,union-attr]
        assert sorted(choice.choices) == sorted(valid)  # type: ignore[attr-defined]


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="only in a checkout")
def test_nowhere_is_a_second_list_of_precisions() -> None:
    files = {file for room in ("micl_zoo", "training", "export") for file in (ROOT / room).rglob("*.py")}
    files -= {ROOT / "micl_zoo" / "encoders" / "device.py", ROOT / "export" / "quantize.py"}
    files -= {ROOT / "training" / "recipes.py"}  # training computes in two of them, which is a choice of its own
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = {text for text in _texts(node) if text != "auto"}
            assert len(words) < 2 or not words <= set(PRECISIONS), f"{file}:{getattr(node, 'lineno', 0)} lists {words}"


def _texts(node: ast.AST) -> list[str | None]:
    """The elements of a literal list, tuple, set or dict, or the words of a text."""
    if isinstance(node, ast.Constant):
        return [*node.value.split()] if isinstance(node.value, str) else []
    elements = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return [element.value if isinstance(element, ast.Constant) else None for element in elements]


def test_auto_is_the_fastest_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "bf16_is_fast", lambda device: device.type == "cuda")
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert (autocast_dtype("fp32"), autocast_dtype("bf16")) == (None, torch.bfloat16)
    for installed in (True, False):
        monkeypatch.setattr(device_module, "find_spec", lambda name, found=installed: object() if found else None)
        fast = "openvino" if installed else "torch"
        assert choose_backend("auto", device=CPU) == fast
        assert backend_again("openvino", "auto") == backend_again("openvino", "cpu") == fast
    monkeypatch.setattr(device_module, "find_spec", lambda name: object())
    assert choose_backend("auto", device=CPU, precision="bf16") == "torch"  # emulated: torch does it no worse
    assert choose_backend("auto", device=CPU, compile=True) == choose_backend("auto") == "torch"
    assert choose_backend("auto", device=torch.device("cuda")) == backend_again("openvino", "cuda:1") == "torch"
    assert choose_backend("auto", weights="x/model.onnx", device=CPU) == backend_again("onnx", "cuda") == "onnx"
    assert choose_backend("openvino", device=torch.device("cuda")) == "openvino"
    assert backend_again("torch compiled", "cuda") == "torch"
    with pytest.raises(UsageError, match="Did you mean onnx"):
        choose_backend("onxn")


def test_openvino_follows_the_weights_of_its_model(encoder: Encoder, encoder_folder: Path) -> None:
    pytest.importorskip("openvino")
    fast = micl_zoo.load(weights=encoder_folder, backend="openvino")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    before = fast.embed_pixels(pixels)
    for one in (fast, encoder):
        with torch.no_grad():
            one.vit.blocks[0].mlp.fc1.weight.mul_(3)
    expected = encoder.embed_pixels(pixels)
    assert np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(fast.embed_pixels(pixels), expected, rtol=0, atol=1e-5)
    for one in (fast, encoder):
        one.vit.blocks[0].mlp.fc1.weight.data.mul_(3)  # which torch does not count
    assert fast.identity() == encoder.identity()
    np.testing.assert_allclose(fast.embed_pixels(pixels), encoder.embed_pixels(pixels), rtol=0, atol=1e-5)
    fast.model = micl_zoo.load(weights=encoder_folder, device="cpu").model
    np.testing.assert_allclose(fast.embed_pixels(pixels), before, rtol=0, atol=1e-6)


def test_what_a_model_keeps_for_eval_mode_is_forgotten_between_training_steps() -> None:
    encoder = micl_zoo.load("levit_128s", pretrained=False, device="cpu")  # which keeps its tables of attention
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    encoder.model.train()
    encoder.model.stages[0].eval()
    before = encoder.embed_pixels(pixels)
    with torch.no_grad():
        for name, one in encoder.model.named_parameters():
            if "attention_biases" in name:
                one.add_(3 * torch.randn_like(one))
    assert np.abs(encoder.embed_pixels(pixels) - before).max() > 1e-4
    assert encoder.model.training
    assert not any(one.training for one in encoder.model.stages[0].modules())
