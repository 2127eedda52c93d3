"""What a configuration or a header may say: nothing else reaches timm, and every refusal is one sentence of ours."""

from __future__ import annotations

import copy
import inspect
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import picture
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.repvit import RepVit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import micl_zoo
from micl_zoo.encoders import build
from micl_zoo.encoders.golden import golden_difference
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.zoo.config import ModelArgs, read_config
from micl_zoo.zoo.hub import download
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.weights import EncoderConfig

NAN, INF = float("nan"), float("inf")
TIMM = {  # as timm's hub repositories have it
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "num_features": 192,
    "global_pool": "token",
    "pretrained_cfg": {
        "tag": "augreg_in21k",
        "custom_load": False,
        "input_size": [3, 64, 64],
        "min_input_size": [3, 32, 32],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "url": "https://192.0.2.1/weights.npz",
        "file": "/etc/passwd",
        "hf_hub_id": "timm/",
    },
    "model_args": {"img_size": 64, "depth": 2},
}

Written = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2)


@pytest.fixture
def written(tmp_path: Path, vit: Any) -> Written:
    """Writes a folder in timm's layout with a changed configuration."""

    def write(changes: dict[str, Any]) -> Path:
        body = copy.deepcopy(TIMM)
        for place, value in changes.items():
            *above, last = place.split(".")
            at: Any = body
            for key in above:
                at = at.setdefault(key, {})
            at[last] = value
        save_file(vit.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(body))
        return tmp_path

    return write


def test_timm_s_own_layout_loads_and_embeds_as_timm_does(written: Written, vit: Any) -> None:
    encoder = micl_zoo.load(written({}), device="cpu")
    assert (encoder.name, encoder.config.license) == ("vit_tiny_patch16_224.local", "apache-2.0")
    assert encoder.transform == micl_zoo.Transform.square(64, 71, mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.inference_mode():
        expected = vit.eval()(encoder.transform(picture(1))[None])[0].numpy()
    np.testing.assert_allclose(encoder.embed(picture(1), normalize=False)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_args.checkpoint_path": "evil.pth"}, "'checkpoint_path' is no field of it"),
        ({"model_args.pretrained": True}, "'pretrained' is no field"),
        ({"model_args.pretrained_cfg": {"url": "http://192.0.2.1"}}, "'pretrained_cfg' is no field"),
        ({"model_args.pretrained_cfg_overlay": {"file": "x"}}, "'pretrained_cfg_overlay' is no field"),
        ({"model_args.cache_dir": "/tmp"}, "'cache_dir' is no field"),
        ({"model_args.features_only": True}, "'features_only' is no field"),
        ({"model_args.scriptable": True}, "'scriptable' is no field"),
        ({"model_args.block_fn": "os.system"}, "'block_fn' is no field"),
        ({"model_args.device": "cuda"}, "'device' is no field"),
        ({"model_args.use_naflex": True}, "'use_naflex' is no field"),
        (
            {"model_args.norm_layer": "os.system"},
            "norm_layer must be one of layernorm, layernorm2d, rmsnorm, batchnorm2d, it is 'os.system'",
        ),
        ({"model_args.act_layer": ["x"]}, "act_layer must be one of"),
        ({"model_args.in_chans": 4}, "in_chans must be one of 3, it is 4"),
        ({"model_args.img_size": 0}, "img_size is 0, and must be 1 to 4,096"),
        ({"model_args.img_size": [64, -1]}, "img_size must be a whole number"),
        ({"model_args.patch_size": 0}, "patch_size is 0"),
        ({"model_args.patch_size": True}, "patch_size must be a whole number, it is true"),
        ({"model_args.patch_size": 65}, "images have 0 x 0 patches"),
        ({"model_args.patch_size": 1, "model_args.img_size": 512, "pretrained_cfg.input_size": [3, 512, 512]}, "512 x"),
        ({"model_args.depth": 100_000}, "depth is 100,?000, and must be 1 to 128"),
        ({"model_args.embed_dim": 1 << 40}, "embed_dim is 1,?099"),
        (
            {"model_args.embed_dim": 8192, "model_args.depth": 99, "model_args.num_heads": 64, "num_features": 8192},
            "par",
        ),
        ({"model_args.num_heads": 7}, "timm cannot build 'vit_tiny_patch16_224' with .*'num_heads': 7"),
        ({"model_args.mlp_ratio": 1e308}, "mlp_ratio is 1e"),
        ({"model_args.drop_rate": -1}, "drop_rate is -1"),
        ({"model_args.depth": 3}, "does not fit its configuration: it lacks blocks.2.norm1.weight and 11 more"),
        ({"model_args.depth": 1}, "does not fit its configuration: it has also blocks.1.+ and 11 more"),
        ({"model_args.mlp_ratio": 2}, r"has blocks.0.mlp.fc1.weight of shape \(768, 192\), not \(384, 192\)"),
        ({"model_args.class_token": False, "model_args.global_pool": "avg"}, "has also cls_token"),
        ({"model_args": [1]}, r"model_args must be an object, it is \[1\]"),
        ({"model_args": None}, "model_args must be an object, it is null"),
        ({"architecture": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"}, "must be the plain name of a model"),
        ({"architecture": "local-dir:/tmp"}, "must be the plain name"),
        ({"architecture": "vit_tiny_patch16_224.augreg_in21k"}, "must be the plain name"),
        ({"architecture": "../vit_tiny_patch16_224"}, "must be the plain name"),
        ({"architecture": "vit_tiny_patch16_224\n"}, "must be the plain name"),
        ({"architecture": "v" * 101}, "must be the plain name"),
        ({"architecture": "resnet18"}, "timm cannot build 'resnet18' with .*img_size"),
        ({"architecture": "vit_tiny_patch16_225"}, "has no model of that name, it has vit_tiny_patch16_224"),
        ({"architecture": 5}, "architecture must be a text, it is 5"),
        ({"num_features": 7}, "num_features is 7, and its tokens have 192 numbers"),
        ({"num_features": "192"}, "num_features must be a whole number"),
        ({"pretrained_cfg": []}, "pretrained_cfg must be an object"),
        ({"pretrained_cfg.input_size": [3, 10**9, 10**9]}, r"input_size\[1\] is 1,?000"),
        ({"pretrained_cfg.input_size": [1, 64, 64]}, r"input_size\[0\] must be one of 3, it is 1"),
        (
            {"pretrained_cfg.input_size": [3, 64, 96], "pretrained_cfg.fixed_input_size": False},
            "cannot take images of 64 x 96 pixels",
        ),
        ({"pretrained_cfg.crop_pct": 0}, "crop_pct is 0.0, and must be 0.05 to 4"),
        ({"pretrained_cfg.crop_pct": 1e-6}, "crop_pct is 1e-06"),
        ({"pretrained_cfg.crop_pct": NAN}, "crop_pct must be a finite number"),
        ({"pretrained_cfg.crop_mode": "zoom"}, "crop_mode must be one of center, squash, border, it is 'zoom'"),
        ({"pretrained_cfg.interpolation": "random"}, "interpolation must be one of bicubic, bilinear.*is 'random'"),
        (
            {"pretrained_cfg": {"input_size": [3, 9, 3], "crop_pct": 4}},
            r"crop_pct 4 leaves nothing of images of \[9, 3",
        ),
        ({"pretrained_cfg.mean": [0.5]}, "mean must have 3 values, it has 1"),
        ({"pretrained_cfg.mean": "abc"}, "mean must be a list"),
        ({"pretrained_cfg.mean": [0, INF, 0]}, r"mean\[1\] must be a finite number"),
        ({"pretrained_cfg.std": [0, 0, 0]}, r"std\[0\] is 0.0, and must be 0.0001"),
        ({"pretrained_cfg.std": [1, 1, -1]}, r"std\[2\] is -1"),
        ({"pretrained_cfg.license": 5}, "license must be a text"),
        ({"micl_zoo": "x"}, "micl_zoo must be an object"),
        ({"micl_zoo.name": ["x"]}, "name must be a text"),
        ({"micl_zoo.name": "../../x"}, "name must be of letters, digits and"),
        ({"micl_zoo.name": "vit\x1b[31m.x\n"}, "name must be of letters, digits and"),
    ],
)
def test_a_configuration_that_is_not_one(
    written: Written, changes: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(changes)
    monkeypatch.setattr(build, "read_tensors", lambda _: pytest.fail("nothing is read before it is known to fit"))
    with pytest.raises(WeightsError, match=text) as caught:
        micl_zoo.load(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value).replace("\n'", "'").replace("x\n", "x")


def refusals() -> list[tuple[str, int, int, dict[str, Any], str]]:
    """Architecture, num_features, side, model_args that ask for too much or do not go together, and what is said."""
    beit, swin, convnext, resnet = "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet18"
    return [
        (beit, 768, 1536, {}, "the model has tables of 1,019,446,284 numbers, and at most 268,435,456 are allowed"),
        (beit, 768, 128, {"patch_size": 1}, "the model has tables of"),
        (beit, 768, 4096, {}, "of 4096 x 4096 pixels, at most 1536 are allowed"),
        ("vit_relpos_base_patch16_224", 768, 256, {"patch_size": 2}, "the model has tables of"),
        (swin, 768, 1536, {"window_size": 64}, "images have 384 x 384 patches, and must have 1 to 16,384"),
        (swin, 768, 224, {"window_size": 65}, "window_size"),
        (swin, 768, 224, {"num_heads": [1]}, "timm cannot build"),
        (swin, 768, 224, {"depths": [0]}, r"depths\[0\] is 0|depths must"),
        (swin, 768, 224, {"depths": [2] * 9}, "depths"),
        (convnext, 768, 224, {"depths": [1, 1]}, "timm cannot build"),
        (convnext, 768, 224, {"dims": [3, 3, 3]}, "timm cannot build"),
        (convnext, 768, 224, {"dims": [8192] * 4, "depths": [9] * 4}, "num_features is 768, and its tokens have 8192"),
        (convnext, 8192, 224, {"dims": [8192] * 4, "depths": [9] * 4}, "parameters, and at most 8,000,000,000"),
        (convnext, 768, 224, {"kernel_sizes": 64}, "the model cannot take images of 224 x 224 pixels"),
        (resnet, 512, 224, {"channels": [1]}, "num_features is 512, and its tokens have 1 numbers"),
        (resnet, 512, 224, {"base_width": 8192}, "timm cannot build"),
        (resnet, 512, 224, {"num_classes": 1 << 21}, "num_classes is 2,?097,?152"),
        (resnet, 512, 224, {"global_pool": "__class__"}, "global_pool must be one of"),
        (resnet, 512, 4096, {}, "of 4096 x 4096 pixels"),
        ("pvt_v2_b0", 256, 224, {"sr_ratios": [64] * 4, "embed_dims": [8192] * 4}, "timm cannot build"),
        ("eva02_tiny_patch14_224", 192, 224, {"rope_type": "dinov4"}, "rope_type must be one of"),
        ("eva02_tiny_patch14_224", 192, 224, {"ref_feat_shape": [0, 1]}, "ref_feat_shape"),
    ]


@pytest.mark.parametrize(("architecture", "width", "side", "asked", "text"), refusals())
def test_other_architectures_ask_for_too_much(
    tmp_path: Path, architecture: str, width: int, side: int, asked: dict[str, Any], text: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    image = {"img_size": side} if architecture[:3] in ("bei", "vit", "swi") and side != 224 else {}
    entry = {"input_size": [3, side, side]}
    body = {"architecture": architecture, "num_features": width, "pretrained_cfg": entry, "model_args": image | asked}
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(WeightsError, match=text) as caught:
        micl_zoo.load(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"NaN", b"[]", b"null", b'"x"', b"1" * 9999, b"{}"])
def test_a_config_json_that_is_none(written: Written, data: bytes) -> None:
    folder = written({})
    (folder / "config.json").write_bytes(data)
    with pytest.raises(WeightsError, match=r"config\.json' (is damaged|cannot be used)"):
        micl_zoo.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"says nothing of its architecture: put timm's config\.json beside it"):
        micl_zoo.load(folder)


def test_every_argument_that_is_allowed_is_one_of_timm_s(written: Written) -> None:
    allowed = {"qk_norm": False, "proj_bias": True, "init_values": None, "reg_tokens": 0, "dynamic_img_size": True}
    allowed |= {
        "norm_layer": "layernorm",
        "act_layer": "gelu",
        "pre_norm": False,
        "drop_path_rate": 0.1,
        "img_size": [64, 64],
    }
    encoder = micl_zoo.load(written({f"model_args.{name}": value for name, value in allowed.items()}), device="cpu")
    assert encoder.embed(picture(1), pool="patches").shape == (1, 4, 4, 192)
    classes = (VisionTransformer, Eva, Beit, ConvNeXt, ResNet, SwinTransformer, PyramidVisionTransformerV2)
    classes += (DenseNet, RepVit)
    names = {name for one in classes for name in inspect.signature(one.__init__).parameters}
    assert not [name for name in vars(ModelArgs()) if name not in names]


def test_registers_are_no_patches(written: Written, tmp_path: Path) -> None:
    folder = written({"model_args.reg_tokens": 2})
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2, reg_tokens=2).eval()
    save_file(vit.state_dict(), folder / "model.safetensors")
    encoder = micl_zoo.load(folder, device="cpu")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        tokens = vit.forward_features(pixels)
        assert torch.equal(encoder(pixels, "patches"), tokens[:, 3:].reshape(2, 4, 4, 192))
        assert torch.equal(encoder(pixels, "cls+mean"), torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite(written: Written, vit: Any, value: float) -> None:
    folder = written({})
    state = {name: one.clone() for name, one in vit.state_dict().items()}
    state["blocks.1.mlp.fc2.bias"][3] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"blocks.1.mlp.fc2.bias holds NaN or infinite numbers: take other weights"):
        micl_zoo.load(folder)


def own_file(encoder_folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (encoder_folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def save(file: Path, head: dict[str, Any] | bytes, body: bytes, sparse: int = 0) -> Path:
    """Write a safetensors file by hand; with `sparse` bytes behind it that take no place on disk."""
    said = head if isinstance(head, bytes) else json.dumps(head).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(said)) + said + body)
        opened.truncate(8 + len(said) + len(body) + sparse)
    return file


def headers(head: dict[str, Any], size: int) -> dict[str, dict[str, Any] | bytes]:
    """Headers that are wrong, by what is wrong with them."""
    said, token = json.loads(head["__metadata__"]["micl_zoo"]), head["cls_token"]
    tensors = {name: one for name, one in head.items() if name != "__metadata__"}

    def saying(text: Any) -> dict[str, Any]:
        return {**tensors, "__metadata__": {"micl_zoo": text if isinstance(text, str) else json.dumps(text)}}

    def changed(**fields: Any) -> dict[str, Any]:
        return {**head, "cls_token": {**token, **fields}}

    twice = json.dumps(head)[:-1] + f', "cls_token": {json.dumps({**token, "shape": [1, 1, 1]})}}}'
    return {
        "nested": b"[" * 100_000,
        "nested in metadata": saying('{"config": ' + "[" * 100_000),
        "no text": b'{"\xff": 1}',
        "metadata of numbers": {**head, "__metadata__": {"micl_zoo": 5}},
        "no JSON in it": saying("{"),
        "a list in it": saying("[1]"),
        "a number of 10,000 digits": saying('{"config": 1' + "0" * 10_000 + "}"),
        "config of another type": saying({"config": [1]}),
        "config with a pickle": saying({"config": said["config"] | {"model_args": {"checkpoint_path": "x"}}}),
        "unknown dtype": changed(dtype="F99"),
        "whole numbers": changed(dtype="I32"),
        "no numbers": changed(shape=[0], data_offsets=[0, 0]),
        "too many numbers": changed(shape=[1 << 40, 1 << 40]),
        "a negative size": changed(shape=[-1, 1, 32]),
        "one byte too far": changed(data_offsets=[token["data_offsets"][0], size + 1]),
        "overlapping": changed(data_offsets=[0, token["data_offsets"][1] - token["data_offsets"][0]]),
        "the same name twice": twice.encode(),
        "nothing": {},
        "a checkpoint of nothing": {**tensors, "__metadata__": {"step": "1", "seconds": "1"}},
    }


def test_headers_that_are_none(encoder_folder: Path, tmp_path: Path) -> None:
    head, body = own_file(encoder_folder)
    for name, wrong in headers(head, len(body)).items():
        file = save(tmp_path / "model.safetensors", wrong, body)
        with pytest.raises(WeightsError) as caught:
            micl_zoo.load(file, device="cpu")
        assert str(tmp_path) in str(caught.value), name
    for data in (b"", b"abc", b"\xff" * 100, struct.pack("<Q", 1 << 62) + b"{}"):
        file.write_bytes(data)
        with pytest.raises(WeightsError, match="damaged or no safetensors file"):
            micl_zoo.load(file)


def test_files_that_claim_to_be_huge_are_refused_before_they_are_read(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, body = own_file(encoder_folder)
    monkeypatch.setattr("micl_zoo.zoo.weights.file_sha256", lambda _: pytest.fail("hashing it takes minutes"))
    tail = {"dtype": "F32", "shape": [10**10], "data_offsets": [len(body), len(body) + 4 * 10**10]}
    file = save(tmp_path / "tail.safetensors", {**head, "tail": tail}, body, sparse=4 * 10**10)
    with pytest.raises(WeightsError, match="it has also tail"):
        micl_zoo.load(file)
    said = json.loads(head["__metadata__"]["micl_zoo"])  # all of it fits together, and is 323 GB
    said["config"]["model_args"] |= {"embed_dim": 8192, "depth": 100, "num_heads": 64}
    said["config"]["num_features"] = 8192
    with build._Shapes():
        vit = build._create(EncoderConfig.from_dict(said["config"], where="here"), "here", head=False)
    large: dict[str, Any] = {"__metadata__": {"micl_zoo": json.dumps(said)}}
    end = 0
    for name, one in vit.state_dict().items():
        large[name] = {"dtype": "F32", "shape": [*one.shape], "data_offsets": [end, end + 4 * one.numel()]}
        end += 4 * one.numel()
    with pytest.raises(WeightsError, match=r"the model has 80,.* parameters, and at most 8,000,000,000 are allowed"):
        micl_zoo.load(save(tmp_path / "large.safetensors", large, b"", sparse=end))


@pytest.mark.parametrize("path", ["./runs/nope", "nope.safetensors", "./nope", "x" * 5000, "a/" + "x" * 300, "a/\0"])
def test_a_path_that_is_not_there_is_told_as_such(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: micl_zoo.load(path), lambda: micl_zoo.load(weights=path), lambda: micl_zoo.load(Path(path))):
        with pytest.raises(
            (WeightsError, UsageError), match=r"no such file or folder|File name too long|must be a name"
        ):
            call()
    with pytest.raises((WeightsError, UsageError), match=r"needs an .onnx file|File name too long|must be a name"):
        micl_zoo.load(weights=path, backend="onnx")


def test_a_name_is_still_a_name() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'vit_l61': no encoder has it, .*\. Did you mean vit_l16"):
        micl_zoo.load("vit_l61")


def test_a_configuration_of_ours_is_read_as_it_was_written(tmp_path: Path) -> None:
    download(DEFAULT, tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    config = EncoderConfig.from_dict(body, where="here")
    assert config.to_dict() == body
    assert read_config(body, "here")[1] == body["model_args"]


def test_a_golden_file_that_is_none(tmp_path: Path) -> None:
    encoder = micl_zoo.load(device="cpu")
    for text in ("", "[]", "{}", '{"embeddings": {"noise": ["x"]}}', '{"embeddings": {"cat": [1.0]}}'):
        (tmp_path / "golden.json").write_text(text)
        with pytest.raises(WeightsError, match=r"golden\.json' is damaged"):
            golden_difference(encoder, tmp_path / "golden.json")


def test_bounded_random_numbers_are_drawn_while_a_model_is_built_for_a_file() -> None:
    with build._Unset():  # torch draws until all are within bounds: it must not be left with what memory holds
        drawn = torch.nn.init.trunc_normal_(torch.full((4096,), 9.0), std=0.02)
    assert 0.01 < drawn.std() < 0.03
