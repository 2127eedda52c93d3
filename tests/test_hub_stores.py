"""Encoders of the hub from end to end: every form of a name, in every command; stores that are pinned; refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from conftest import picture
from hub import TOKEN, Hub, environment_for, hub_on_loopback
from test_pins import ask, no_network, set_hub
from timm.models import save_for_hf

import micl_zoo
from micl_zoo import doctor
from micl_zoo.cli import main
from micl_zoo.encoders.golden import NUMBERS, golden_file
from micl_zoo.errors import WeightsError
from micl_zoo.files import file_sha256
from micl_zoo.stores.manifest import Manifest, fields_sha256
from micl_zoo.zoo.hub import download
from micl_zoo.zoo.names import pinned_again
from micl_zoo.zoo.public import PUBLIC

FIRST, SECOND = "1" * 40, "2" * 40
MINE, TAG = "micl/mine", "test_vit.r160_in1k"
DINO, CLIP = "vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch32_clip_quickgelu_224.openai"
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
EMBED = ("--workers", "0", "--devices", "cpu", "--precision", "fp32", "--quiet")
Layout = dict[str, bytes]


def write_layout(folder: Path, arch: str, seed: int = 0, crop_pct: float = 0.9, **args: Any) -> Layout:
    """The files that timm writes for its hub: random weights, the classifier left on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(arch, pretrained_cfg_overlay={"crop_pct": crop_pct}, **args)
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    """Of a plain ViT, of others under the same name, of an encoder of the curated table, and of a CLIP's tower."""
    at = tmp_path_factory.mktemp("layouts")
    return {
        "plain": write_layout(at / "plain", "test_vit", img_size=32, depth=1, num_classes=10),
        "moved": write_layout(at / "moved", "test_vit", 1, 0.5, img_size=32, depth=1, num_classes=10),
        "convnet": write_layout(at / "convnet", "test_resnet", num_classes=10),
        "dino": write_layout(at / "dino", DINO.partition(".")[0], num_classes=0, **SMALL),
        "clip": write_layout(at / "clip", "vit_base_patch32_clip_224", num_classes=512, **SMALL),
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layouts: dict[str, Layout]) -> Iterator[Hub]:
    """With these; this process and its children ask it alone, and keep what they get in a folder of the test."""
    cache = tmp_path / "cache"
    set_hub(monkeypatch, HF_HOME=str(cache), HF_HUB_CACHE=str(cache / "hub"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of huggingface_hub, between its tries
    with hub_on_loopback() as hub:
        ask(monkeypatch, hub.url)
        for name, value in environment_for(hub, cache).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for repo in (MINE, f"timm/{TAG}"):
            hub.put(repo, FIRST, dict(layouts["plain"]))
        for name, layout in ((DINO, "dino"), ("vit_base_patch32_clip_224.openai", "clip")):
            hub.put(f"timm/{name}", FIRST, dict(layouts[layout]))
            hub.cards[f"timm/{name}"] = {"license": "mit"}  # timm's config.json says apache-2.0
        yield hub


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (folder := tmp_path / "images").mkdir()
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
    return folder


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """What a command says that ends with exit code 1: one sentence on one line, and no traceback."""
    result = invoke(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1, result.output
    return result.output


def rows(store: Path) -> np.ndarray:
    return micl_zoo.open_store(store).embeddings


def parts(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(store.glob("part-*.parquet"))}


def plain_timm(layout: Layout, folder: Path, **args: Any) -> torch.nn.Module:
    """The oracle: timm's own model of the files."""
    folder.mkdir()
    for name, content in layout.items():
        (folder / name).write_bytes(content)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()


def test_every_form_of_a_name_is_the_same_encoder(
    hub: Hub, layouts: dict[str, Layout], images: Path, tmp_path: Path
) -> None:
    oracle = plain_timm(layouts["plain"], folder := tmp_path / "theirs", num_classes=0)
    shutil.copytree(folder, tmp_path / "run" / "encoder")
    pinned = f"hf-hub:{MINE}@{FIRST}"
    sources: dict[str | Path, str | None] = {
        **dict.fromkeys((MINE, f"hf_hub:{MINE}", f"hf-hub:{MINE}@main", f"{MINE}@{FIRST}"), pinned),
        **dict.fromkeys((TAG, "test_vit", f"{TAG}@{FIRST[:8]}", f"timm/{TAG}"), f"hf-hub:timm/{TAG}@{FIRST}"),
        **dict.fromkeys((f"local-dir:{folder}", str(folder), folder, tmp_path / "run", folder / "model.safetensors")),
    }
    sha256 = hashlib.sha256(layouts["plain"]["model.safetensors"]).hexdigest()
    files = sorted(images.iterdir())
    expected = None
    for number, (name, source) in enumerate(sources.items()):
        encoder = micl_zoo.load(name, device="cpu")
        assert (encoder.source, encoder.weights_sha256, encoder.pool) == (source, sha256, "cls"), name
        if expected is None:
            with torch.inference_mode():
                expected = oracle(torch.stack([encoder.transform(picture(number)) for number in range(6)])).numpy()
        np.testing.assert_allclose(encoder.embed(files, normalize=False), expected, rtol=1e-5, atol=1e-5)
        said = json.loads(done("info", name, "--json"))
        assert (said["sha256"], said["parameters"]) == (sha256, sum(one.numel() for one in oracle.parameters()))
        if number % 3:
            continue
        store = tmp_path / f"store{number}"
        done("extract", images, "-o", store, "--model", name, "--no-normalize", *EMBED)
        np.testing.assert_allclose(rows(store), expected, rtol=1e-5, atol=1e-5)
        manifest = micl_zoo.open_store(store).manifest
        assert (manifest.source, manifest.license, manifest.image_size) == (source, "apache-2.0", None)
        way = () if source else ("--model", name)
        done("verify", store, "--device", "cpu", *way)
        hits = done("search", store, files[2], "--device", "cpu", "-k", 1, "--json", *way)
        assert json.loads(hits)["id"] == "2.png"


def test_the_other_commands_take_names_of_the_hub(hub: Hub, images: Path, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(images.iterdir())):
        (below := images / ("train" if number < 4 else "test") / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        file.rename(below / file.name)
    words = ("--data", images, "--device", "cpu", "--workers", 0, "--json")
    measured = json.loads(done("eval", "knn", f"hf-hub:{MINE}@main", "-k", 1, *words))
    assert FIRST in json.dumps(measured)
    old = done("extract", images, "-o", tmp_path / "old", "--weights", _place(MINE, tmp_path / "d"), *EMBED, "--json")
    assert json.loads(old)["embedded"] == 6


def _place(name: str, folder: Path) -> Path:
    download(name, folder)
    return folder


@pytest.mark.slow
def test_export_of_an_encoder_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done("export", MINE, "-o", tmp_path / "onnx", "--json")
    exported = micl_zoo.load(tmp_path / "onnx", backend="onnx", device="cpu")
    here = micl_zoo.load(MINE, device="cpu")
    np.testing.assert_allclose(exported.embed(picture(0)), here.embed(picture(0)), atol=1e-4)


def test_manifests_of_before_have_the_same_digest() -> None:
    fields: dict[str, Any] = {
        "model": "vit_ti16.tin200",
        "weights_sha256": "0" * 64,
        "transform": "pillow-bicubic-112-center112-0.485-0.456-0.406-0.229-0.224-0.225",
        "decoding": "exact-exif",
        "precision": "fp32",
        "pool": "cls",
        "normalized": True,
        "dtype": "float32",
        "shape": [192],
        "shard_rows": 10_000,
        "format_version": 2,
    }
    made = Manifest(**fields, runtime="torch", command="", versions={})
    assert made.digest == fields_sha256(fields | {"runtime": "torch or openvino"})
    on_hub = dataclasses.replace(made, source=f"hf-hub:{MINE}@{FIRST}", license="mit")
    assert made.differences(on_hub) == on_hub.differences(made) == []  # the same file
    moved = dataclasses.replace(on_hub, source=f"hf-hub:{MINE}@{SECOND}")
    assert [one.partition(":")[0] for one in on_hub.differences(moved)] == ["source"]


def test_names_of_one_encoder_go_on_with_the_same_commit() -> None:
    """And timm's name of the same weights with another activation does not: its rows are others."""
    repo, gelu = PUBLIC[CLIP].repository, "vit_base_patch32_clip_224.openai"
    source = f"hf-hub:{repo}@{FIRST}"
    for name in (CLIP, repo, f"hf-hub:{repo}"):
        assert pinned_again(name, source) == source
    assert pinned_again(gelu, f"{gelu}@{FIRST}") == f"{gelu}@{FIRST}"
    for name, other in ((gelu, source), (CLIP, f"{gelu}@{FIRST}"), (f"{repo}@main", source), ("runs/first", source)):
        assert pinned_again(name, other) == name
    assert pinned_again(CLIP, None) == CLIP


def test_the_curated_table_decides_what_timm_leaves_open(
    hub: Hub, layouts: dict[str, Layout], images: Path, tmp_path: Path
) -> None:
    """Positions for 518 pixels, images of 224; a projection, and another activation than the file says."""
    oracle: Any = plain_timm(layouts["dino"], tmp_path / "dino")
    oracle.set_input_size(img_size=224)
    clip: Any = plain_timm(layouts["clip"], tmp_path / "clip", act_layer="quick_gelu")
    for name, model, size, pool in ((DINO, oracle, 224, "cls"), (CLIP, clip, 224, "projection")):
        row = PUBLIC[name]
        by_repo, by_tag = (micl_zoo.load(one, device="cpu") for one in (row.repository, name))
        pixels = torch.stack([by_repo.transform(picture(number)) for number in range(2)])
        with torch.inference_mode():
            torch.testing.assert_close(by_repo(pixels), model(pixels), rtol=1e-5, atol=1e-5)
            assert torch.equal(by_repo(pixels), by_tag(pixels))
        for one in (by_repo, by_tag):
            assert (one.name, one.pool, one.transform, one.config.license) == (name, pool, row.transform, "mit")
            assert one.transform.size == (size, size)
    store = tmp_path / "store"
    done("extract", images, "-o", store, "--model", DINO, "--image-size", 56, *EMBED)
    manifest = micl_zoo.open_store(store).manifest
    assert (manifest.source, manifest.image_size, manifest.license) == (f"hf-hub:timm/{DINO}@{FIRST}", 56, "mit")
    done("verify", store, "--device", "cpu")


@pytest.mark.parametrize("name", [DINO, CLIP, f"timm/{DINO}", MINE])
def test_a_downloaded_folder_is_the_encoder_without_a_network(hub: Hub, name: str, tmp_path: Path) -> None:
    online = micl_zoo.load(name, device="cpu")
    words = ("download", name, "--to", tmp_path / "folder")
    assert "was there already" not in done(*words)
    assert done(*words).count("was there already") == 2
    shutil.rmtree(tmp_path / "cache")
    with no_network():
        here = micl_zoo.load(tmp_path / "folder", device="cpu")
    assert (here.embed([picture(0), picture(1)]) == online.embed([picture(0), picture(1)])).all()
    for what in ("name", "pool", "pools", "transform", "weights_sha256"):
        assert getattr(here, what) == getattr(online, what), what
    assert (here.config.license, here.config.size) == (online.config.license, online.config.size)
    (tmp_path / "folder" / "config.json").write_text("mine")
    assert "is there with other bytes" in refused(*words)
    assert (tmp_path / "folder" / "config.json").read_text() == "mine"


def test_weights_whose_sha256_the_hub_does_not_tell(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.LARGE", ())  # small files stand in git itself
    placed = download(MINE, tmp_path / "folder")
    assert [one.kept for one in placed] == [False, False]
    assert [one.kept for one in download(MINE, tmp_path / "folder")] == [True, True]
    assert micl_zoo.load(MINE, device="cpu").weights_sha256 == file_sha256(tmp_path / "folder" / "model.safetensors")


def move(hub: Hub, layouts: dict[str, Layout], name: str = "moved") -> None:
    hub.put(MINE, SECOND, dict(layouts[name]))


@pytest.mark.parametrize("name", [MINE, f"hf-hub:{MINE}"])
def test_a_store_goes_on_with_its_commit_after_the_branch_moved(
    hub: Hub, layouts: dict[str, Layout], images: Path, tmp_path: Path, name: str
) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    words = ("extract", images, "--model", name, "--shard-rows", 2, *EMBED, "-o")
    done(*words, whole)
    done(*words, store)
    (store / "part-00001.parquet").unlink()
    (store / "errors.jsonl").unlink()
    move(hub, layouts)
    done(*words, store)
    assert parts(store) == parts(whole)
    manifest = micl_zoo.open_store(store).manifest
    assert manifest.source == f"hf-hub:{MINE}@{FIRST}"
    assert f"--model hf-hub:{MINE}@{FIRST}" in manifest.command
    said = refused("extract", images, "--model", f"{MINE}@main", "-o", store, *EMBED)
    for what in ("weights_sha256", "transform", "source"):
        assert f"{what}: " in said
    assert f"'hf-hub:{MINE}@{FIRST}' in the store, 'hf-hub:{MINE}@{SECOND}' asked for" in said
    before = len(hub.requests)
    with no_network():
        done("verify", store, "--device", "cpu")
        for way in ((), ("--model", name)):
            done("search", store, images / "1.png", "--device", "cpu", *way)
        done(*words, store)
        folder = _place(f"hf-hub:{MINE}@{FIRST}", tmp_path / "folder")
        shutil.rmtree(tmp_path / "cache")
        for again in (("verify", store), ("search", store, images / "1.png"), (*words, tmp_path / "new")):
            assert "on the hub: HF_HUB_OFFLINE is set. Without a network, run micl-zoo download" in refused(*again)
        assert not (tmp_path / "new").exists()
        (store / "part-00001.parquet").unlink()
        done("extract", images, "--model", folder, "--shard-rows", 2, *EMBED, "-o", store)  # as the sentence says
        done("verify", store, "--model", folder, "--device", "cpu")
        assert parts(store) == parts(whole)
    assert len(hub.requests) == before
    done(*words, store, "--overwrite")
    assert micl_zoo.open_store(store).manifest.source == f"hf-hub:{MINE}@{SECOND}"
    assert not np.allclose(rows(store), rows(whole))


def test_a_loaded_encoder_is_found_again_by_its_store(hub: Hub, images: Path, tmp_path: Path) -> None:
    encoder, store = micl_zoo.load(MINE, image_size=48, device="cpu"), tmp_path / "store"
    made = micl_zoo.extract(images, store, encoder=encoder, workers=0, precision="fp32", show=False).store.manifest
    assert (made.source, made.image_size) == (f"hf-hub:{MINE}@{FIRST}", 48)
    assert f"--model hf-hub:{MINE}@{FIRST} --image-size 48" in made.command
    done("verify", store, "--device", "cpu")
    done(*shlex.split(made.command)[1:], "-o", tmp_path / "again", "--workers", 0, "--devices", "cpu", "--quiet")
    np.testing.assert_allclose(rows(tmp_path / "again"), rows(store), atol=1e-6)


def test_processes_load_the_pinned_commit_and_ask_nothing(hub: Hub, images: Path, tmp_path: Path) -> None:
    words = ("--model", MINE, "--shard-rows", 2, *EMBED)
    done("extract", images, "-o", tmp_path / "one", *words)
    hub.requests.clear()
    done("extract", images, "-o", tmp_path / "two", *words, "--processes", 2)
    assert [one.split("?")[0].lower() for one in hub.requests] == [f"get /api/models/{MINE}/revision/main"]
    assert micl_zoo.open_store(tmp_path / "two").manifest.source == f"hf-hub:{MINE}@{FIRST}"
    np.testing.assert_allclose(rows(tmp_path / "two"), rows(tmp_path / "one"), atol=1e-6)


def test_a_wrong_path_is_told_as_one_and_sent_nowhere(
    hub: Hub, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for command in (("info",), ("extract", images, "-o", "store", "--model"), ("export", "-o", "onnx")):
        said = refused(*command, "runs/frist")
        assert (
            "no weights at 'runs/frist': folder 'runs' is here and has no such entry; if OWNER/NAME on the hub" in said
        )
        assert "give hf-hub:runs/frist" in said
    assert not hub.requests
    (tmp_path / "runs").rmdir()
    said = refused("info", "runs/frist")
    assert "there is no file or folder 'runs/frist' here; cannot find runs/frist on the hub: there is no" in said
    assert len(hub.requests) == 1
    said = refused("info", "hf-hub:runs/frist")
    assert "Error: cannot find runs/frist on the hub" in said
    for path in ("./runs/frist", "runs/frist/encoder", "local-dir:runs/frist", "frist.safetensors"):
        assert "there is no such file or folder" in refused("info", path)
    assert len(hub.requests) == 2
    assert "Did you mean vit_base_patch16_224.augreg_in21k" in refused("info", "vit_base_patch16_224.augreg_in21")


def test_the_licence_is_shown_once_and_the_card_s_word_counts(
    hub: Hub, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert json.loads(done("info", DINO, "--json"))["licence"] == "mit"
    assert "licence        mit" in done("info", f"timm/{DINO}")
    assert not caplog.messages  # nothing but the configuration was fetched
    for name in (DINO, f"timm/{DINO}"):
        done("extract", images, "-o", tmp_path / "store", "--model", name, "--overwrite", "--limit", 1, *EMBED)
    assert caplog.messages == [f"licence of timm/{DINO}: mit, see {hub.url}/timm/{DINO}"]
    micl_zoo.load(MINE, device="cpu")  # whose card says nothing
    assert caplog.messages[1:] == [f"licence of {MINE}: apache-2.0, see {hub.url}/{MINE}"]


@pytest.fixture
def trouble(hub: Hub, layouts: dict[str, Layout], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the hub, or what is in it, as it should not be."""
    files = hub.commits[MINE, FIRST]
    config: dict[str, Any] = json.loads(files["config.json"])

    def changed(**changes: Any) -> bytes:
        return json.dumps(config | changes).encode()

    def make(kind: str) -> None:
        if kind == "tampered":
            hub.instead["model.safetensors"] = files["model.safetensors"][:-7] + b"garbage"
        elif kind == "gated":
            hub.gated.add(MINE)
        elif kind == "missing":
            del hub.heads[MINE]
        elif kind == "rate-limited":
            hub.trouble = 429
        elif kind == "transformers":
            files["config.json"] = json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}).encode()
        elif kind == "pickles":
            files["pytorch_model.bin"] = files.pop("model.safetensors")
        elif kind == "sharded":
            files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
            files["model.safetensors.index.json"] = b"{}"
        elif kind == "no configuration":
            del files["config.json"]
        elif kind == "newer timm":
            files["config.json"] = changed(architecture="test_vit5")
        elif kind == "other weights":
            files["model.safetensors"] = layouts["convnet"]["model.safetensors"]
        elif kind == "other size":
            files["config.json"] = changed(model_args={"img_size": 64, "depth": 3})
        else:
            raise AssertionError(kind)

    return make


REFUSALS = {
    "tampered": f"are not those of hf-hub:{MINE}@{FIRST}: sha256",
    "gated": "it is gated: accept its terms at http",
    "missing": f"there is no {MINE}, or it is private: look the name up",
    "rate-limited": "the hub takes no more requests for now (status 429): wait some minutes",
    "transformers": "is of the transformers library: `micl-zoo models` names many such encoders",
    "pickles": "has pickles alone (pytorch_model.bin)",
    "sharded": "are in several files (model.safetensors.index.json): write them into one",
    "no configuration": f"hf-hub:{MINE}@{FIRST} has no config.json, so it does not say how to build its encoder: take",
    "newer timm": f"hf-hub:{MINE}@{FIRST} asks for 'test_vit5', and timm {timm.__version__} has no model of that name, "
    "it has test_vit",
    "other weights": f"hf-hub:{MINE}@{FIRST} does not fit its configuration: it lacks",
    "other size": f"hf-hub:{MINE}@{FIRST} does not fit its configuration: it",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_one_sentence_and_leaves_nothing(
    trouble: Callable[[str], None], kind: str, images: Path, tmp_path: Path
) -> None:
    trouble(kind)
    said = refused("extract", images, "-o", tmp_path / "store", "--model", MINE, *EMBED)
    assert REFUSALS[kind] in said
    assert not (tmp_path / "store").exists()
    if kind == "newer timm":
        assert "upgrade timm" in said
    if kind not in ("newer timm", "other weights", "other size"):  # which only shows when it is built
        assert REFUSALS[kind] in refused("download", MINE, "--to", tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_a_configuration_that_contradicts_the_weights_header(hub: Hub, encoder_folder: Path) -> None:
    files = {file.name: file.read_bytes() for file in encoder_folder.iterdir()}
    hub.put("micl/ours", FIRST, files)
    assert micl_zoo.load("micl/ours", device="cpu").pool == "cls"
    config = json.loads(files["config.json"])
    config["pretrained_cfg"]["license"] = "mit"
    hub.put("micl/ours", SECOND, {**files, "config.json": json.dumps(config).encode()})
    assert micl_zoo.load("micl/ours", device="cpu").config.license == "mit"
    config["pretrained_cfg"]["crop_pct"] = 0.5
    hub.put("micl/ours", "3" * 40, {**files, "config.json": json.dumps(config).encode()})
    assert "contradicts itself, config.json and the header of model.safetensors" in refused("golden", "micl/ours")


def test_other_bytes_in_the_cache_are_never_embedded_with(
    hub: Hub, layouts: dict[str, Layout], images: Path, tmp_path: Path
) -> None:
    words = ("extract", images, "--model", MINE, *EMBED, "-o")
    done(*words, tmp_path / "one")
    file = next((tmp_path / "cache").glob("hub/models--*/snapshots/*/model.safetensors")).resolve()
    good = file.read_bytes()
    file.write_bytes(layouts["moved"]["model.safetensors"])  # an encoder, and another
    with no_network():
        assert "are not those of" in refused(*words, tmp_path / "two")
        assert "are not those of" in refused("verify", tmp_path / "one")
    assert not (tmp_path / "two").exists()
    done(*words, tmp_path / "two")
    assert file.read_bytes() == good
    assert parts(tmp_path / "one") == parts(tmp_path / "two")


def test_a_renamed_and_a_private_repository(hub: Hub, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hub.renamed["old/name"] = MINE
    done("extract", images, "-o", tmp_path / "store", "--model", "old/name", *EMBED)
    assert micl_zoo.open_store(tmp_path / "store").manifest.source == f"hf-hub:{MINE}@{FIRST}"
    done("extract", images, "-o", tmp_path / "store", "--model", "old/name", *EMBED)
    hub.private.add(MINE)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "hf-hub:" in done("info", MINE)


def test_golden_files_of_public_encoders(
    hub: Hub, layouts: dict[str, Layout], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> doctor.Finding:
        (one,) = doctor.public_embeddings()
        assert one.name == f"embeddings of {CLIP}"
        return one

    assert not list(doctor.public_embeddings())  # none is in the cache
    file = tmp_path / f"{CLIP}.golden.json"
    monkeypatch.chdir(tmp_path)
    assert f"are in {CLIP}.golden.json" in done("golden", CLIP)
    golden = json.loads(file.read_text())
    assert {name: value for name, value in golden.items() if name != "embeddings"} == {
        "encoder": CLIP,
        "weights_sha256": hashlib.sha256(layouts["clip"]["model.safetensors"]).hexdigest(),
        "source": f"hf-hub:{PUBLIC[CLIP].repository}@{FIRST}",
        "pool": "projection",
        "timm": timm.__version__,
    }
    assert {len(row) for row in golden["embeddings"].values()} == {NUMBERS}
    done("golden", CLIP, "--check")
    with pytest.raises(WeightsError):
        golden_file(PUBLIC[CLIP])
    assert (found().state, "`micl-zoo golden" in found().text) == ("note", True)
    monkeypatch.setattr("micl_zoo.encoders.golden.embedded_file", lambda name: tmp_path / name)
    hub.requests.clear()
    assert found().state == "ok"
    golden["embeddings"]["rings"][3] += 0.01
    file.write_text(json.dumps(golden))
    assert (found().state, found().commands) == ("problem", doctor.torch_again())
    assert invoke("golden", CLIP, "--check").exit_code == 1
    hub.requests.clear()
    file.write_text(json.dumps(golden | {"source": f"hf-hub:{PUBLIC[CLIP].repository}@{SECOND}"}))
    assert (found().state, SECOND in found().text) == ("note", True)
    assert not hub.requests
