"""Loading: the table, files, the hub on loopback, and what is said when there is nothing to load."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import TWIN, picture
from hub import Hub, environment_for, hub_on_loopback
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders import build
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.files import file_sha256
from micl_zoo.training.pretraining.pretrain import pretrain
from micl_zoo.training.recipes import Recipe
from micl_zoo.zoo import hub as hub_module
from micl_zoo.zoo.hub import download, embedded_file
from micl_zoo.zoo.ours import ARCHS, DEFAULT, RECORDS, find_record, timm_architecture
from micl_zoo.zoo.public import PUBLIC
from micl_zoo.zoo.weights import header

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names() -> None:
    assert micl_zoo.list_models() == sorted(RECORDS)
    assert set(micl_zoo.list_models(published_only=True)) == {n for n, r in RECORDS.items() if r.published}
    assert find_record("vit_l16").name == "vit_l16.in1k"
    with pytest.raises(UsageError, match=r"unknown model 'vit_l61': .*Did you mean vit_l16"):
        micl_zoo.load("vit_l61")


def test_public_names_are_what_they_say() -> None:
    tree = ast.parse(Path(micl_zoo.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    homes = {alias.name: f"micl_zoo.{node.module}" for node in imports for alias in node.names}
    assert sorted(homes) == micl_zoo.__all__ == dir(micl_zoo)
    for name in set(homes) - {"__version__"}:
        found = getattr(micl_zoo, name)
        assert callable(found), name
        assert (found.__module__, found.__name__) == (homes[name], name)
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has .*load"):
        _ = micl_zoo.lod


def test_to_import_is_cheap() -> None:
    heavy = "{'torch', 'timm', 'PIL', 'numpy', 'pyarrow', 'click'}"
    code = f"import sys, micl_zoo; micl_zoo.list_models(), micl_zoo.UsageError; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_record_is_whole() -> None:
    for name, record in RECORDS.items():
        assert record.name == name
        assert record.arch in ARCHS
        if record.published:
            assert len(record.sha256 or "") == 64
            assert record.bytes
            assert record.embedded or len(record.hub_commit or "") == 40
            assert record.metrics
        else:
            assert record.bytes is None


def test_the_shapes_are_timm_s() -> None:
    for arch in ARCHS.values():
        vit = timm.create_model(arch.timm_name, num_classes=0)
        assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (
            arch.embed_dim,
            arch.depth,
            arch.num_heads,
        )
        shape = {key: value for key, value in vars(arch).items() if key != "timm_name"}
        assert timm_architecture(**shape) == (arch.timm_name, {})


@pytest.mark.parametrize("name", ["vit_b16.in1k", "vit_l16"])
def test_unpublished_weights_give_the_three_ways_on(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        micl_zoo.load(name)
    text = str(caught.value)
    assert "no weights of" in text
    for way in ("micl-zoo train vit_", 'micl_zoo.load("RUN")', "pretrained=False"):
        assert way in text


def test_the_embedded_default_loads_and_its_bytes_are_the_table_s() -> None:
    record = RECORDS[DEFAULT]
    encoder = micl_zoo.load(device="cpu")
    assert encoder.record is record
    assert encoder.weights_sha256 == record.sha256
    file = Path(micl_zoo.__file__).parent / "embedded" / str(record.embedded)
    assert file.stat().st_size == record.bytes
    provenance = header(file)["provenance"]
    assert provenance["recipe"]["name"] == record.recipe
    assert provenance["data"]["images"] == 100_000
    rows = encoder.embed([picture(0, 300, 200), picture(0, 300, 200), picture(1, 300, 200)])
    assert rows.shape == (3, 192)
    assert rows[0] @ rows[1] == pytest.approx(1, abs=1e-5)
    assert rows[0] @ rows[2] < 0.99


def test_changed_embedded_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = RECORDS[DEFAULT]
    source = Path(micl_zoo.__file__).parent / "embedded" / str(record.embedded)
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / source.name).write_bytes(data)
    monkeypatch.setattr(hub_module, "__file__", str(tmp_path / "encoders" / "hub.py"))
    with pytest.raises(WeightsError, match="are not the published ones: sha256"):
        micl_zoo.load()


def test_a_folder_or_a_file_of_your_own(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    assert (encoder.record, encoder.embed_dim, encoder.transform.size) == (None, 32, (32, 32))
    assert encoder.weights_sha256 == file_sha256(encoder_folder / "model.safetensors")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(encoder_folder / "model.safetensors", alone)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(encoder(pixels), micl_zoo.load(weights=alone, device="cpu")(pixels))


def test_a_path_in_the_place_of_a_name(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = file_sha256(encoder_folder / "model.safetensors")
    for path in (encoder_folder, str(encoder_folder), encoder_folder / "model.safetensors"):
        assert micl_zoo.load(path, device="cpu").weights_sha256 == sha256
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder_folder, "vit_l16")
    with pytest.raises(WeightsError, match="no weights of vit_l16"):
        micl_zoo.load("vit_l16")  # a name is a name, whatever lies around
    assert micl_zoo.load(Path("vit_l16"), device="cpu").weights_sha256 == sha256
    assert micl_zoo.load("./vit_l16", device="cpu").weights_sha256 == sha256
    with pytest.raises(UsageError, match=r"unknown model 'vit_l61': .*Did you mean vit_l16"):
        micl_zoo.load("vit_l61")
    with pytest.raises(UsageError, match="load: name must be a name or a path, it is ''"):
        micl_zoo.load("")
    with pytest.raises(WeightsError, match="no weights at 'nowhere'"):
        micl_zoo.load(Path("nowhere"))
    with pytest.raises(UsageError, match=r"weights of two places were asked for, './vit_l16' and 'other': give one"):
        micl_zoo.load("./vit_l16", weights="other")
    with pytest.raises(UsageError, match="goes with a name of the table or of timm alone"):
        micl_zoo.load("./vit_l16", pretrained=False)
    with pytest.raises(WeightsError, match='load it with backend="onnx"'):
        micl_zoo.load(embedded_file(str(getattr(RECORDS[DEFAULT].onnx, "file", ""))))


def test_a_published_encoder_in_a_folder(tmp_path: Path) -> None:
    record, folder = RECORDS[DEFAULT], tmp_path / "encoder"
    placed = download(DEFAULT, folder)
    assert {one.path.name: one.kept for one in placed} == {"model.safetensors": False, "config.json": False}
    assert {one.path.name for one in placed} == {file.name for file in folder.iterdir()}
    assert placed[0].sha256 == file_sha256(folder / "model.safetensors") == record.sha256
    encoder = micl_zoo.load(folder, device="cpu")
    assert encoder.record is record
    config = json.loads((folder / "config.json").read_text())
    assert config == header(folder / "model.safetensors")["config"]
    images = [picture(0, 300, 200), picture(1, 200, 300)]
    rows = encoder.embed(images, normalize=False)
    oracle = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    oracle.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        pixels = torch.stack([encoder.transform(image) for image in images])
        np.testing.assert_allclose(rows, oracle(pixels).numpy(), rtol=1e-5, atol=1e-5)


def test_a_download_goes_on_and_replaces_nothing_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(DEFAULT, tmp_path)
    (tmp_path / "config.json").unlink()
    monkeypatch.setattr("micl_zoo.zoo.hub.record_weights", lambda record: pytest.fail("it is there already"))
    assert [one.kept for one in download(DEFAULT, tmp_path)] == [True, False]
    assert [one.kept for one in download(DEFAULT, tmp_path)] == [True, True]
    monkeypatch.undo()
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match=rf"is there with other bytes: sha256 .* published {RECORDS[DEFAULT].sha256}"):
        download(DEFAULT, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert [one.kept for one in download(DEFAULT, tmp_path, overwrite=True)] == [False, True]
    with pytest.raises(WeightsError, match=r"no weights of vit_l16.in1k are published yet. Three ways on"):
        download("vit_l16", tmp_path / "other")
    with pytest.raises(UsageError, match="Did you mean vit_ti16"):
        download("vit_tii16", tmp_path / "other")
    monkeypatch.setitem(RECORDS, DEFAULT, dataclasses.replace(RECORDS[DEFAULT], onnx=None))
    with pytest.raises(WeightsError, match=r"no ONNX file of vit_ti16.tin200 is published"):
        download(DEFAULT, tmp_path / "other", onnx=True)
    assert not (tmp_path / "other").exists()


def test_the_download_command(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    words = ["download", DEFAULT, "--to", str(folder)]
    said = CliRunner().invoke(main, [*words, "--onnx"], catch_exceptions=False).output
    assert (
        f"{folder / 'model.safetensors'}: {RECORDS[DEFAULT].bytes:,} bytes, sha256 {RECORDS[DEFAULT].sha256}\n" in said
    )
    assert f"micl_zoo.load({str(folder)!r})." in said
    assert f'micl_zoo.load({str(folder)!r}, backend="onnx")' in said
    assert file_sha256(folder / "model.onnx") == getattr(RECORDS[DEFAULT].onnx, "sha256", None)
    assert CliRunner().invoke(main, words).output.count("was there already") == 2


def test_equal_to_timm_on_the_same_weights(encoder_folder: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    config = json.loads((encoder_folder / "config.json").read_text())
    oracle = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    oracle.load_state_dict(load_file(encoder_folder / "model.safetensors"))
    pixels = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), oracle(pixels), rtol=1e-5, atol=1e-5)
        tokens = oracle.forward_features(pixels)
        features = encoder.features(pixels)
        torch.testing.assert_close(features.cls, tokens[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.patches[:, 1, 2], tokens[:, 1 + 4 + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(pixels, "mean"), tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-5)


def test_embed_takes_what_people_have(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    image = picture(4)
    file = tmp_path / "a.png"
    image.save(file)
    rows = encoder.embed([file, str(file), file.read_bytes(), image, np.asarray(image)], batch_size=2)
    assert rows.shape == (5, 32)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, rows[:1].repeat(5, 0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.embed(image)[0], rows[0], atol=1e-6)
    raw = encoder.embed(image, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), rows[:1], atol=1e-6)
    assert encoder.embed([]).shape == (0, 32)


def test_embed_takes_batches_of_at_least_one() -> None:
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        micl_zoo.load(device="cpu").embed([picture(0, 64, 48)], batch_size=0)


def test_embed_names_the_image_it_cannot_read(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    (tmp_path / "b.jpg").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"image 1 \(.*b\.jpg\): .*\[not_an_image\]"):
        encoder.embed([picture(0), tmp_path / "b.jpg"])
    with pytest.raises(UsageError, match=r"image 0 \(ndarray\): numbers of int32 have no defined black"):
        encoder.embed(np.zeros((8, 8, 3), np.int32))
    with pytest.raises(UsageError, match=r"pixel_values must be \(B, 3, 32, 32\)"):
        encoder(torch.zeros(1, 3, 64, 64))


def a_run(folder: Path, header: dict[str, str], tensors: dict[str, torch.Tensor], step: int = 7) -> Path:
    """A run's folder with one checkpoint, as `training.run.rundir` writes them; returns the checkpoint."""
    file = folder / "checkpoints" / f"step-{step:08d}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"format": "pt", "step": str(step), "seconds": "1.5", **header})
    file.with_name(f"{file.name}.sha256").write_text(f"{file_sha256(file)}  {file.name}\n")
    return file


def test_every_checkpoint_of_a_run_loads(twin: Recipe, encoder_folder: Path, tmp_path: Path) -> None:
    state, pixels = load_file(encoder_folder / "model.safetensors"), torch.randn(2, 3, 32, 32)
    moments = {f"exp_avg.{key}": value + 1 for key, value in state.items()}
    file = a_run(tmp_path, {}, {f"model.{key}": value for key, value in state.items()} | moments)
    with pytest.raises(WeightsError, match=r"does not say what was trained, nor does .*run\.json"):
        micl_zoo.load(file)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": dataclasses.asdict(twin)}))
    older = a_run(tmp_path, {}, {f"model.{key}": value * 2 for key, value in state.items()}, step=3)
    expected = micl_zoo.load(encoder_folder, device="cpu")
    for found in (micl_zoo.load(file, device="cpu"), micl_zoo.load(str(tmp_path), device="cpu")):
        assert found.name == "vit_ti16.tin200-step-00000007"
        assert (found.record, found.transform) == (None, expected.transform)
        assert found.weights_sha256 == file_sha256(file)
        with torch.inference_mode():
            assert torch.equal(found(pixels), expected(pixels))
            assert not torch.equal(found(pixels), micl_zoo.load(older, device="cpu")(pixels))
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    assert micl_zoo.load(tmp_path, device="cpu").name == expected.name  # a finished encoder comes first
    shutil.rmtree(tmp_path / "encoder")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="is damaged, it has sha256"):
        micl_zoo.load(tmp_path)


def test_a_checkpoint_of_fine_tuning_loads_without_its_head(encoder_folder: Path, tmp_path: Path) -> None:
    state, weights = load_file(encoder_folder / "model.safetensors"), encoder_folder / "model.safetensors"
    classifier = {
        key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value for key, value in state.items()
    }
    classifier["head.weight"] = torch.zeros(3, 32)
    tensors = {f"model.{key}": value * 0 for key, value in classifier.items()}
    tensors |= {f"ema.{key}": value for key, value in classifier.items()}
    a_run(tmp_path, {"micl_zoo": json.dumps({"config": header(weights)["config"]})}, tensors)
    found, expected = (micl_zoo.load(folder, device="cpu") for folder in (tmp_path, encoder_folder))
    assert all(torch.equal(found.vit.state_dict()[key], value) for key, value in expected.vit.state_dict().items())


def test_a_run_that_was_stopped_embeds_exports_and_goes_on(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images, run = image_folder(16), tmp_path / "run"
    pretrain("vit_ti16.tin200", images, run, overrides=TWIN, device="cpu", max_steps=2)
    store = micl_zoo.extract(images, tmp_path / "store", weights=run, devices="cpu", workers=0, show=False).store
    assert (store.manifest.model, len(store)) == ("vit_ti16.tin200-step-00000002", 16)
    pytest.importorskip("onnxscript")
    from micl_zoo.export import to_onnx

    made = to_onnx(weights=run, out=tmp_path / "onnx", show=False)
    assert made.card.weights_sha256 == store.manifest.weights_sha256


def test_random_weights_only_when_asked_for() -> None:
    encoder = micl_zoo.load("vit_ti16", pretrained=False, device="cpu")
    assert encoder.weights_sha256 is None
    with pytest.raises(UsageError, match="goes with a name of the table or of timm alone"):
        micl_zoo.load("vit_ti16", weights="x", pretrained=False)


SMALL = ("vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch32_clip_quickgelu_224.openai", "resnet50.a1_in1k")


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in SMALL)) for one in PUBLIC])
def test_the_costs_of_the_curated_table_are_those_of_timm_s_models(name: str) -> None:
    """Parameters and width exactly; multiplications as torch counts them, by twos, with shapes alone."""
    row, config = PUBLIC[name], build.timm_config(name)
    parameters, outputs, pool = build.outline(config)
    assert (parameters, outputs[row.pool], pool) == (row.parameters, (row.width,), row.pool)
    with build._Shapes():
        model = build._create(config, name, head=row.pool == "projection")
        model = build._sized(model, config, row.pool == "projection").model.to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, row.pixels, row.pixels, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(row.gmacs, abs=0.0051)


def test_a_name_of_timm_has_its_shape_without_weights_and_a_network() -> None:
    """A curated one with the choices of the table: positions for 37 x 37 patches become 16 x 16."""
    encoder = micl_zoo.load("vit_small_patch14_reg4_dinov2.lvd142m", pretrained=False, device="cpu")
    assert (encoder.transform.size, encoder.pool, encoder.row_shape("patches")) == ((224, 224), "cls", (16, 16, 384))
    other = micl_zoo.load("test_convnext", pretrained=False, image_size=64, device="cpu")
    assert (other.name, other.pools, other.embed([picture(0)]).shape) == (
        "test_convnext.r160_in1k", ("native", "mean", "patches"), (1, 64),
    )  # fmt: skip


def test_wrong_files_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        micl_zoo.load(weights=tmp_path)
    pickle = tmp_path / "model.pth"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(WeightsError, match=r"not a \.safetensors file. Other formats can run code"):
        micl_zoo.load(weights=pickle)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((encoder_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        micl_zoo.load(weights=cut)
    with pytest.raises(UsageError, match="'vit_l16' was asked for, but the weights are those of vit_ti16"):
        micl_zoo.load("vit_l16", weights=encoder_folder)
    with pytest.raises(UsageError, match="unknown dtype 'int3'"):
        micl_zoo.load(weights=encoder_folder, dtype="int3")
    with pytest.raises(UsageError, match="device 'cuda:99' cannot be used here"):
        micl_zoo.load(weights=encoder_folder, device="cuda:99")


@pytest.fixture
def hub(encoder_folder: Path) -> Iterator[Hub]:
    """With an encoder in it."""
    with hub_on_loopback() as hub:
        hub.put("micl/tiny", COMMIT, {"model.safetensors": (encoder_folder / "model.safetensors").read_bytes()})
        yield hub


LOAD_FROM_HUB = """
import dataclasses, json, sys
import micl_zoo
from micl_zoo.zoo.ours import RECORDS
for line in sys.stdin:
    RECORDS["vit_ti16.hub"] = dataclasses.replace(
        RECORDS["vit_ti16.tin200"],
        name="vit_ti16.hub", embedded=None, hub_repo="micl/tiny", hub_commit=sys.argv[1], sha256=line.strip(),
        transform=micl_zoo.Transform.square(32, 32),
    )
    try:
        encoder = micl_zoo.load("vit_ti16.hub", device="cpu")
        print(json.dumps({"dim": encoder.embed_dim, "sha256": encoder.weights_sha256}), flush=True)
    except micl_zoo.WeightsError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


@contextmanager
def loads_from_hub(hub: Hub, cache: Path, **environment: str) -> Iterator[Callable[[str], dict[str, object]]]:
    """A process with hub settings of its own, which hold from its import on: loads what should have a sha256."""
    with subprocess.Popen(
        [sys.executable, "-c", LOAD_FROM_HUB, COMMIT],
        env={**environment_for(hub, cache), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def loaded(sha256: str) -> dict[str, object]:
            print(sha256, file=process.stdin, flush=True)
            return dict(json.loads(process.stdout.readline()))  # type: ignore[union-attr]

        yield loaded


def test_the_hub_by_commit_offline_damaged_wrong_and_nowhere(hub: Hub, tmp_path: Path) -> None:
    content = hub.commits["micl/tiny", COMMIT]["model.safetensors"]
    right, wrong = hashlib.sha256(content).hexdigest(), hashlib.sha256(b"something else").hexdigest()
    good = {"dim": 32, "sha256": right}
    with (
        loads_from_hub(hub, tmp_path) as online,
        loads_from_hub(hub, tmp_path, HF_HUB_OFFLINE="1") as offline,
        loads_from_hub(hub, tmp_path / "other", HF_HUB_OFFLINE="1") as nowhere,
    ):
        assert online(right) == good
        assert all(COMMIT in request for request in hub.requests)
        before = len(hub.requests)
        assert offline(right) == good
        assert len(hub.requests) == before
        blob = next(path for path in tmp_path.rglob("model.safetensors")).resolve()
        blob.write_bytes(content[:-7] + b"garbage")
        assert f"are not those of hf-hub:micl/tiny@{COMMIT}: sha256" in str(offline(right)["error"])
        assert online(right) == good
        assert f"sha256 {right}, expected {wrong}" in str(online(wrong)["error"])
        error = str(nowhere(right)["error"])
    assert f"cannot fetch model.safetensors of hf-hub:micl/tiny@{COMMIT}: HF_HUB_OFFLINE is set" in error
    assert f"micl-zoo download hf-hub:micl/tiny@{COMMIT} --to FOLDER" in error


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS[DEFAULT].sha256 = "0"  # type: ignore[misc]
