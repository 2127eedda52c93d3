"""Checkpoints of the authors' code become encoders; wrong, broken and hostile files are refused and say why."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import small_vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.files import file_sha256
from micl_zoo.training.micl import init_weights, position_table
from micl_zoo.training.release.import_checkpoint import import_checkpoint
from micl_zoo.zoo.weights import header

REFERENCE = Path(__file__).parent / "reference"
State = dict[str, Any]


def pixels(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))


def checkpoint(path: Path, state: State, *, model: str = "mae_vit_small_test", **more: object) -> Path:
    """As that code writes one: the optimiser has two moments a tensor, the arguments are a Namespace."""
    moments = {n: {"step": 3, "exp_avg": v * 0, "exp_avg_sq": v * 0} for n, v in enumerate(state.values())}
    args = argparse.Namespace(model=model, blr=5e-5, epochs=200, resume="", dist_on_itp=False, betas=(0.9, 0.95))
    body = {
        "model": state,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]},
        "epoch": 199,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "args": args,
    }
    torch.save(body | more, path)
    return path


@pytest.fixture
def vit() -> VisionTransformer:
    return small_vit().eval()


@pytest.fixture
def file(vit: VisionTransformer, tmp_path: Path) -> Path:
    leftovers = {"mask_token": torch.zeros(1, 1, 16), "decoder_pos_embed": torch.zeros(1, 17, 16)}
    leftovers |= {"decoder_blocks.0.norm1.weight": torch.zeros(16), "head.weight": torch.zeros(10, 32)}
    return checkpoint(tmp_path / "checkpoint-199.pth", {**vit.state_dict(), **leftovers})


def test_a_checkpoint_becomes_an_encoder(vit: VisionTransformer, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    weights = import_checkpoint(file, out, name="vit_small.theirs", license="CC BY-NC 4.0", num_heads=2)
    assert weights == out / "model.safetensors"
    encoder = micl_zoo.load(weights=out, device="cpu")
    assert (encoder.name, encoder.transform) == ("vit_small.theirs", micl_zoo.Transform.square(32, 36))
    with torch.inference_mode():
        tokens = vit.forward_features(pixels(32))
        features = encoder.features(pixels(32))
    torch.testing.assert_close(features.cls, tokens[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(features.patches.flatten(1, 2), tokens[:, 1:], rtol=0, atol=1e-6)
    found = header(weights)["provenance"]
    assert found["imported_from"] == {"file": file.name, "sha256": file_sha256(file), "key": "model"}
    assert (found["epoch"], found["license"]) == (199, "CC BY-NC 4.0")
    assert found["args"] == {
        "model": "mae_vit_small_test",
        "blr": 5e-5,
        "epochs": 200,
        "resume": "",
        "dist_on_itp": False,
        "betas": [0.9, 0.95],
    }
    assert found["left_out"] == ["mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "head.weight"]
    assert header(weights)["config"]["pretrained_cfg"]["license"] == "CC BY-NC 4.0"


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 26),
    reason="timm reads safetensors in a local folder from 1.0.26 on",
)
def test_timm_loads_the_folder_too(vit: VisionTransformer, file: Path, tmp_path: Path) -> None:
    import_checkpoint(file, tmp_path / "encoder", num_heads=2)
    oracle = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(oracle(pixels(32)), vit(pixels(32)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bare", "module", "legacy", "float16", "safetensors"])
def test_other_ways_to_keep_the_same_weights(vit: VisionTransformer, tmp_path: Path, kind: str) -> None:
    state: State = dict(vit.state_dict())
    path, atol = tmp_path / f"{kind}.pth", 0.0
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif kind == "module":
        checkpoint(path, {f"module.{key}": value for key, value in state.items()})
    elif kind == "float16":
        atol = 1e-3
        torch.save({k: v if k == "pos_embed" else v.half() for k, v in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    made = load_file(import_checkpoint(path, tmp_path / "encoder", num_heads=2))
    assert made.keys() == state.keys()
    for key, value in made.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[key], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["parity_a", "parity_b"])
def test_the_reference_weights_of_the_authors_code(name: str, tmp_path: Path) -> None:
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as opened:
        meta = opened.metadata()
        state = {k.removeprefix("state."): opened.get_tensor(k) for k in opened.keys() if k.startswith("state.")}  # noqa: SIM118
    file = checkpoint(tmp_path / "c.pth", state)
    import_checkpoint(file, tmp_path / "encoder", num_heads=int(meta["num_heads"]))
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    oracle = VisionTransformer(
        **{key: int(meta[key]) for key in names}, mlp_ratio=float(meta["mlp_ratio"]), num_classes=0
    ).eval()
    oracle.load_state_dict(state)
    encoder, images = micl_zoo.load(weights=tmp_path / "encoder", device="cpu"), pixels(int(meta["img_size"]))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), oracle(images), rtol=0, atol=1e-6)


def test_known_shapes_need_no_heads(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    init_weights(vit)
    vit.pos_embed.data.copy_(position_table(192, (14, 14), (14, 14)))
    file = checkpoint(tmp_path / "c.pth", vit.state_dict(), model="")
    with pytest.raises(UsageError, match=r"'vit_b16\.x' was asked for, but the weights are those of vit_ti16"):
        import_checkpoint(file, tmp_path / "encoder", name="vit_b16.x")
    made = header(import_checkpoint(file, tmp_path / "encoder"))
    assert made["config"]["micl_zoo"]["name"] == "vit_ti16.imported"
    assert (made["config"]["architecture"], made["config"]["model_args"]) == ("vit_tiny_patch16_224", {})
    assert made["provenance"]["shape"]["num_heads"] == 3
    encoder = micl_zoo.load("vit_ti16", weights=tmp_path / "encoder", device="cpu")
    assert encoder.transform.id == micl_zoo.Transform.square(224, 256).id
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels(224)), vit(pixels(224)), rtol=0, atol=1e-6)


def test_the_model_s_name_tells_the_heads_of_its_width(tmp_path: Path) -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0)
    vit.pos_embed.data.copy_(position_table(192, (4, 4), (4, 4)))
    for model, tells in (("ocl_vit_tiny_patch8", True), ("ocl_vit_base_patch8", False)):
        file = checkpoint(tmp_path / "c.pth", vit.state_dict(), model=model)
        if tells:
            shape = header(import_checkpoint(file, tmp_path / "encoder"))["provenance"]["shape"]
            assert (shape["num_heads"], shape["num_heads_from"]) == (3, model)
        else:
            with pytest.raises(UsageError, match="no known encoder is 192 wide and 1 blocks deep: give --num-heads N"):
                import_checkpoint(file, tmp_path / "other")


def test_an_mlp_ratio_that_division_rounds_down(tmp_path: Path) -> None:
    ratio = 60 / 44
    assert int(44 * ratio) == 59
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=44, depth=1, num_heads=2, mlp_ratio=1.364, num_classes=0
    )
    vit.pos_embed.data.copy_(position_table(44, (2, 2), (2, 2)))
    assert vit.blocks[0].mlp.fc1.weight.shape == (60, 44)
    import_checkpoint(checkpoint(tmp_path / "c.pth", vit.state_dict()), tmp_path / "encoder", num_heads=2)
    assert micl_zoo.load(weights=tmp_path / "encoder", device="cpu").embed_dim == 44


class Hostile:
    """A pickle that touches a file where it is loaded the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, int], int], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


class Foreign:
    """A class that is no part of torch."""


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "class"])
def test_a_pickle_that_could_run_code_is_refused_and_not_run(vit: VisionTransformer, tmp_path: Path, kind: str) -> None:
    touched, path = tmp_path / "touched", tmp_path / "c.pth"
    payload: object = Foreign() if kind == "class" else Hostile(touched)
    body = {"model": dict(vit.state_dict()), "args": payload}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(body, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(WeightsError, match=r"asks for \S*(open|Foreign), .* refused; nothing in it was run") as caught:
        import_checkpoint(path, tmp_path / "encoder", num_heads=2)
    assert "weights_only" not in str(caught.value)
    assert not touched.exists()
    assert not (tmp_path / "encoder").exists()
    if kind in ("zip", "legacy"):
        os.close(torch.load(path, weights_only=False)["args"])
        assert touched.exists()  # so the test's pickle is a hostile one


def change(**changes: Any) -> Callable[[State], object]:
    return lambda state: state.update(changes)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s.pop("norm.bias"), r"no ViT of this method, 2 blocks deep: it lacks norm\.bias$"),
        (change(extra=torch.ones(1)), r"it has extra besides$"),
        (lambda s: s.update({"fc_norm.weight": s.pop("norm.weight")}), r"lacks norm.weight; it has fc_norm.weight bes"),
        (lambda s: s.pop("pos_embed"), r"no ViT of this method: it lacks pos_embed; it has cls_token"),
        (change(**{"blocks.7.norm1.bias": torch.ones(32)}), r"3 blocks deep: it lacks blocks\.2\.norm1.* and 6 more"),
        (change(**{"norm.bias": torch.ones(31)}), r"norm\.bias must be \(32,\) floats, got \(31,\) torch\.float32"),
        (change(**{"norm.bias": torch.ones(32, dtype=torch.int64)}), r"norm\.bias must be .* got \(32,\) torch\.int64"),
        (change(pos_embed=torch.zeros(1, 16, 32)), r"on square images: it has cls_token \(1, 1, 32\), pos_embed \(1,"),
        (change(cls_token=torch.zeros(1, 1, 0)), r"on square images: it has cls_token \(1, 1, 0\)"),
        (
            lambda s: s["pos_embed"].mul_(1.1),
            r"not the fixed sin-cos table .* \(it is off by 0\.1, 1e-05 is",
        ),
        (lambda s: s.update({k: v.half() for k, v in s.items()}), r"pos_embed is not the fixed sin-cos table"),
        (lambda s: s["norm.bias"].fill_(float("nan")), r"not finite: norm\.bias\. The run had failed"),
        (lambda s: s.clear(), r"has no state dict, as 'model': it is a dict with model, optim"),
        (change(extra="text"), r"has no state dict"),
    ],
)
def test_a_wrong_checkpoint_says_what_is_wrong(
    vit: VisionTransformer, tmp_path: Path, spoil: Callable[[State], object], text: str
) -> None:
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    spoil(state)
    path = tmp_path / "c.pth"
    torch.save({"model": state, "optimizer": {}, "epoch": 1}, path)
    with pytest.raises(WeightsError, match=text):
        import_checkpoint(path, tmp_path / "encoder", num_heads=2)
    assert not (tmp_path / "encoder").exists()


def test_wrong_files_and_arguments(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    with pytest.raises(WeightsError, match=r"no checkpoint at '.*nowhere\.pth'"):
        import_checkpoint(tmp_path / "nowhere.pth", out)
    for name, data in (("a.pth", b"text " * 99), ("b.pth", b""), ("c.pth", file.read_bytes()[:9000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=r"is damaged or was not written by torch\.save"):
            import_checkpoint(tmp_path / name, out)
    (tmp_path / "d.safetensors").write_bytes(b"text" * 99)
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        import_checkpoint(tmp_path / "d.safetensors", out)
    torch.save([1, 2], tmp_path / "e.pth")
    with pytest.raises(WeightsError, match="it is a list"):
        import_checkpoint(tmp_path / "e.pth", out)
    with pytest.raises(UsageError, match="no known encoder is 32 wide and 2 blocks deep: give --num-heads N"):
        import_checkpoint(file, out)
    with pytest.raises(UsageError, match="num_heads=5 does not divide the width of the weights, 32"):
        import_checkpoint(file, out, num_heads=5)
    with pytest.raises(UsageError, match=r"a name is arch\.tag, as vit_b16\.imported, got 'small'"):
        import_checkpoint(file, out, name="small", num_heads=2)
    import_checkpoint(file, out, num_heads=2)
    with pytest.raises(UsageError, match=r"holds model\.safetensors already: give a new folder"):
        import_checkpoint(file, out, num_heads=2)


@pytest.mark.parametrize("architecture", ["test_resnet.r160_in1k", "test_vit"])
def test_checkpoints_of_timm_become_encoders(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, untrained = (timm.create_model(architecture.partition(".")[0], num_classes=7).eval() for _ in range(2))
    body = {"epoch": 3, "state_dict": {f"module.model.{key}": one for key, one in model.state_dict().items()}}
    torch.save(body | {"state_dict_ema": untrained.state_dict(), "optimizer": {}}, tmp_path / "best.pth.tar")
    for key, meant in ((None, model), ("state_dict_ema", untrained)):
        out = tmp_path / f"encoder-{key}"
        made = header(
            import_checkpoint(tmp_path / "best.pth.tar", out, architecture=architecture, key=key, license="mit")
        )
        encoder = micl_zoo.load(out, device="cpu")
        assert encoder.name == f"{architecture.partition('.')[0]}.imported"
        assert encoder.transform == micl_zoo.load(architecture, pretrained=False).transform
        assert made["provenance"]["imported_from"]["key"] == (key or "state_dict")
        assert made["provenance"]["epoch"] == 3
        assert {one.split(".")[-2] for one in made["provenance"]["left_out"]} <= {"head", "fc"}
        with torch.inference_mode():
            expected = meant.forward_head(meant.forward_features(pixels(160)), pre_logits=True)
            torch.testing.assert_close(encoder(pixels(160)), expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match=r"has no entry 'ema': it has epoch, state_dict, state_dict_ema, optimizer"):
        import_checkpoint(tmp_path / "best.pth.tar", tmp_path / "x", architecture=architecture, key="ema")
    with pytest.raises(WeightsError, match=r"best.pth.tar' does not fit timm's test_convnext: it lacks "):
        import_checkpoint(tmp_path / "best.pth.tar", tmp_path / "x", architecture="test_convnext")
    with pytest.raises(UsageError, match=r"has no 'test_vitt'\. Did you mean test_vit"):
        import_checkpoint(tmp_path / "best.pth.tar", tmp_path / "x", architecture="test_vitt")
    with pytest.raises(UsageError, match=r"has no 'test_resnet\.in21k'"):
        import_checkpoint(tmp_path / "best.pth.tar", tmp_path / "x", architecture="test_resnet.in21k")
    assert not (tmp_path / "x").exists()


# The layout of DINOv2's authors, which timm converts; further tensors, as of MAE; two classifiers; an old BatchNorm;
# running means of torch; tensors under two names.
TIMM: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = [
    (
        "vit_small_patch14_reg4_dinov2",
        lambda s: {
            **{("register_tokens" if key == "reg_token" else key): one for key, one in s.items()},
            "mask_token": torch.zeros(1, 384),
            "pos_embed": torch.cat([torch.zeros(1, 1, 384), s["pos_embed"]], 1),  # with the class token's
        },
    ),
    ("vit_tiny_patch16_224", lambda s: {**s, "mask_token": s["cls_token"], "decoder_x": torch.ones(9)}),
    ("levit_128s", dict),
    ("resnet18", lambda s: {key: one for key, one in s.items() if not key.endswith("num_batches_tracked")}),
    ("resnet18", lambda s: {**{f"module.{key}": one for key, one in s.items()}, "n_averaged": torch.tensor(3)}),
    ("coat_tiny", dict),
]


@pytest.mark.parametrize(("architecture", "change"), TIMM)
def test_what_is_not_timm_s_own_layout(architecture: str, change: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    torch.save(change(dict(model.state_dict())), tmp_path / "theirs.pth")
    import_checkpoint(tmp_path / "theirs.pth", tmp_path / "mine", architecture=architecture)
    encoder = micl_zoo.load(tmp_path / "mine", device="cpu")
    side = encoder.transform.size[0]
    images = pixels(side)[:1]
    if getattr(model, "patch_embed", None) and model.patch_embed.img_size != (side, side):  # DINOv2's: 518 to 224
        model.set_input_size(img_size=(side, side))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images, "native"), expected, rtol=0, atol=1e-5)


def test_names_and_folders_that_are_taken(tmp_path: Path) -> None:
    file, out = tmp_path / "theirs.pth", tmp_path / "mine"
    torch.save({"ckpt": {"model": timm.create_model("test_resnet").state_dict()}}, file)
    with pytest.raises(UsageError, match=r"vit_ti16\.tin200 is the name of an encoder of ours"):
        import_checkpoint(file, out, architecture="test_resnet", key="ckpt.model", name="vit_ti16.tin200")
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"mine' holds config\.json already"):
        import_checkpoint(file, out, architecture="test_resnet", key="ckpt.model")
    import_checkpoint(file, tmp_path / "other", architecture="test_resnet", key="ckpt.model")


def test_what_a_file_says_is_printed_on_one_line(tmp_path: Path) -> None:
    body = {"model": small_vit().state_dict() | {"decoder_\nforged: line.w": torch.zeros(1)}}
    torch.save(body, tmp_path / "c.pth")
    made = CliRunner().invoke(
        main, ["import", str(tmp_path / "c.pth"), "-o", str(tmp_path / "e"), "--num-heads", "2", "--license", "a\nb: c"]
    )
    assert made.exit_code == 0, made.output
    assert not [line for line in made.output.splitlines() if line.startswith(("forged", "b:"))]


def test_odd_arguments_of_a_run_become_json(vit: VisionTransformer, tmp_path: Path) -> None:
    args = argparse.Namespace(weights=torch.ones(2), inf=float("inf"), none=None, nested={1: (2, [3.5])})
    file = checkpoint(tmp_path / "c.pth", vit.state_dict(), args=args, epoch="last")
    found = header(import_checkpoint(file, tmp_path / "encoder", num_heads=2))["provenance"]
    assert found["args"] == {"weights": "<Tensor>", "inf": "inf", "none": None, "nested": {"1": [2, [3.5]]}}
    assert found["epoch"] is None


def test_the_command_says_what_it_found(file: Path, tmp_path: Path) -> None:
    words = ["import", str(file), "-o", str(tmp_path / "encoder")]
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1)
    assert "give --num-heads N" in refused.output
    result = CliRunner().invoke(main, [*words, "--num-heads", "2", "--name", "vit_small.theirs"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "vit_small.theirs: 32 wide, 2 blocks, 2 heads (given), patches of 8, images of 32",
        "epoch: 199; licence: unknown",
        "left out: mask_token, decoder_pos_embed, decoder_blocks, head (4 tensors)",
        f"The encoder is in {tmp_path / 'encoder'}: micl_zoo.load({str(tmp_path / 'encoder')!r}).",
    ]


def nested(levels: int) -> list[Any]:
    """Two to the power of `levels` values in a few bytes: each list has the same one twice."""
    made: list[Any] = [1]
    for _ in range(levels):
        made = [made, made]
    return made


def hostile(vit: VisionTransformer, folder: Path, kind: str) -> Path:
    """A file that costs its reader more than it costs its writer, or that is no checkpoint in another way."""
    file, state = folder / f"{kind}.pth", dict[Any, Any](vit.state_dict())
    if kind == "stride 0":
        state["pos_embed"] = torch.zeros(1, 1, 1).expand(1, 17, 10**9)
    elif kind == "one storage for many":
        state |= {f"decoder_{number}": torch.zeros(1).expand(64, 1000) for number in range(9)}
    elif kind == "wide":
        state["cls_token"] = torch.zeros(1, 1, 100_000)
    elif kind == "deep":
        state |= {f"blocks.{number}.x": torch.zeros(1) for number in range(2000)}
    elif kind == "keys":
        state[("a", 1)] = torch.zeros(1)
    elif kind == "sparse":
        state["norm.weight"] = state["norm.weight"].to_sparse()
    elif kind == "integers":
        state["norm.weight"] = state["norm.weight"].long()
    elif kind == "float8":
        state["norm.weight"] = state["norm.weight"].to(torch.float8_e4m3fn)
    elif kind == "meta":
        state["norm.weight"] = torch.empty(32, device="meta")
    elif kind == "bytearray":  # a pickle of 30 bytes can ask for one of gigabytes
        state["x"] = bytearray(9)
    torch.save(state, file)
    if kind == "compressed":
        with (
            zipfile.ZipFile(file) as plain,
            zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        return folder / "packed.pth"
    return file


@pytest.mark.parametrize(
    "kind",
    [
        "stride 0",
        "one storage for many",
        "wide",
        "deep",
        "keys",
        "sparse",
        "integers",
        "float8",
        "meta",
        "compressed",
        "bytearray",
    ],
)
def test_a_hostile_checkpoint_costs_nothing(vit: VisionTransformer, tmp_path: Path, kind: str) -> None:
    with pytest.raises(WeightsError):
        import_checkpoint(hostile(vit, tmp_path, kind), tmp_path / "encoder", num_heads=2)
    assert not (tmp_path / "encoder").exists()


def test_arguments_are_taken_as_far_as_a_command_line_goes(vit: VisionTransformer, tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    args = {
        "many": nested(60),
        "long": "x" * 10**6,
        "number": 10**400,
        "inf": float("inf"),
        ("no", "name"): 1,
        "on": 1,
    }
    file = checkpoint(tmp_path / "c.pth", vit.state_dict(), epoch=10**400, args=argparse.Namespace(a=1, args=2))
    found = header(import_checkpoint(file, tmp_path / "plain", num_heads=2))["provenance"]
    assert (found["epoch"], found["args"]) == (None, {"a": 1, "args": 2})
    torch.save({"model": vit.state_dict(), "args": args | {"loop": loop}}, file)
    weights = import_checkpoint(file, tmp_path / "encoder", num_heads=2)
    assert len(json.dumps(header(weights)["provenance"]["args"])) < 100_000
    assert header(weights)["provenance"]["args"]["long"] == "x" * 1000


@pytest.mark.parametrize("name", ["../../x.y", "a/b.c", ".a.b", "a.", "ä.b", "a.b\n", f"a.{'b' * 101}"])
def test_a_name_is_no_path(file: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"a name is arch\.tag"):
        import_checkpoint(file, tmp_path / "encoder", name=name, num_heads=2)
