"""Texts that find images: tiny random towers of open_clip's code, and what its own encode_text gives."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from stores import make_store

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.encoders import text as module
from micl_zoo.encoders.text import EXAMPLES, TextEncoder, Tower, check_pair, find_tower, load_text, towers
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.files import file_sha256
from micl_zoo.stores.search import search, text_encoder
from micl_zoo.zoo.pins import OPEN_CLIP, Pin, PinnedFile

open_clip = pytest.importorskip("open_clip")

IMAGE = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
SIGLIP = {"hf_tokenizer_name": "timm/tiny", "tokenizer_kwargs": {"clean": "canonicalize"}, "vocab_size": 20}
SIGLIP |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "context_length": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-clip": {"embed_dim": 32, "quick_gelu": True, "text_cfg": TEXT},
    "tiny-pe": {"embed_dim": 32, "custom_text": True, "text_cfg": TEXT | {"context_length": 16}},
    "tiny-siglip": {"embed_dim": 32, "custom_text": True, "init_logit_bias": -10, "text_cfg": TEXT | SIGLIP},
}
WORDS = ["</s>", "<unk>", "a", "red", "dress", "dog", "on", "the", "beach"]
TEXTS = ["a red dress", "a dog on the beach", "A Dog, on the beach!"]
COMMIT = "c" * 40


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets open_clip know the tiny models."""
    folder, before = tmp_path_factory.mktemp("configs"), list(open_clip.factory._MODEL_CONFIG_PATHS)
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config | {"vision_cfg": IMAGE}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS[:] = before
    open_clip.factory._rescan_model_configs()


@pytest.fixture(scope="module")
def folders(configs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model a folder as its repository on the hub."""
    found = {}
    for name in CONFIGS:
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        save_file(open_clip.create_model(name).state_dict(), found[name] / OPEN_CLIP)
    write_tokenizer(found["tiny-siglip"])
    return found


def write_tokenizer(folder: Path, *, end: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "</s>", "eos_token": {"content": "</s>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tower(model: str, image: str = "vit_ti16.tin200", pool: str = "cls", quick: str | None = None) -> Tower:
    tokenizer = "timm/tiny" if model == "tiny-siglip" else None
    return Tower(image, "timm/image", model, "timm/both", tokenizer, pool, 32, quick)


def expected(name: str, folder: Path, texts: list[str]) -> np.ndarray:
    """The oracle: open_clip's both towers, its tokenizer or the words by hand."""
    both = open_clip.create_model(name)
    both.load_state_dict(load_file(folder / OPEN_CLIP))
    if name == "tiny-siglip":
        ids = [[WORDS.index(word) for word in text.lower().replace(",", "").replace("!", "").split()] for text in texts]
        tokens = torch.tensor([(one + [0] * 8)[:8] for one in ids])
    else:
        tokens = open_clip.get_tokenizer(name)(texts)
    with torch.inference_mode():
        return both.eval().encode_text(tokens, normalize=True).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_those_of_open_clip(name: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text(tower(name), folders[name])
    rows = encoder.rows(TEXTS)
    np.testing.assert_allclose(rows, expected(name, folders[name], TEXTS), atol=1e-6)
    caplog.clear()  # of what open_clip says
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.array_equal(rows[:1], encoder.rows(TEXTS[:1]))
    assert {str(folders[name] / OPEN_CLIP), encoder.sha256} <= set(str(encoder).replace(",", "").split())
    assert not caplog.messages
    encoder.rows([" ".join(["beach"] * 99)])
    width = CONFIGS[name]["text_cfg"].get("context_length", 77)
    assert f"longer than the {width} tokens that {name} reads" in caplog.text
    exact = " ".join(["beach"] * (width - (1 if name == "tiny-siglip" else 2)))
    caplog.clear()
    encoder.rows([exact])
    assert not caplog.messages


@pytest.mark.parametrize("name", [*EXAMPLES, "vit_base_patch16_siglip_256.webli", "vit_large_patch14_clip_224.openai"])
def test_pairs_are_of_one_image_tower(name: str) -> None:
    import timm

    found = towers()[name]
    config = open_clip.get_model_config(found.model)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        image, theirs = timm.create_model(name, pretrained=False), kind(**config).visual
    if hasattr(theirs, "trunk"):
        shapes = {key: one.shape for key, one in image.state_dict().items()}
        assert shapes == {key.removeprefix("trunk."): one.shape for key, one in theirs.state_dict().items()}
    else:  # timm's projection has a bias
        sizes = [sum(one.numel() for one in model.parameters()) for model in (image, theirs)]
        assert sizes[0] == sizes[1] + found.dim
        assert (found.quick is None) == ("_quickgelu_" in name)
    assert found.dim == (image.num_classes or image.num_features)
    assert found.pool == ("projection" if image.num_classes else "native")


def test_rows_of_a_pool_are_those_of_open_clip(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    name = "vit_pe_core_tiny_patch16_384.fb"
    found, image = towers()[name], timm.create_model(name, pretrained=False)
    config = {**open_clip.get_model_config(found.model), "text_cfg": TEXT}
    del config["custom_text"]
    both = open_clip.CLIP(**config).eval()
    image.load_state_dict(both.visual.trunk.state_dict())
    save_for_hf(image, str(tmp_path), safe_serialization=True)
    pixel_values = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        ours = micl_zoo.load(tmp_path, device="cpu")(pixel_values, pool=found.pool)
        torch.testing.assert_close(ours, both.encode_image(pixel_values), atol=1e-5, rtol=0)


def test_what_has_no_text_tower() -> None:
    siglip = EXAMPLES[1]
    assert find_tower(siglip) == find_tower("vit_base_patch16_siglip_224.local", siglip) == towers()[siglip]
    for asked, said in (
        (("vit_base_patch16_224.mae",), "no text tower of open_clip is known .* extract anew .* such as vit_base"),
        (("vit_base_patch16_siglip_224.v3_webli",), "Did you mean vit_base_patch16_siglip_224.v2_webli"),
        (("vit_base_patch16_siglip_224.local",), "files of this machine.* --text-tower .*4.v2_webli or .*4.webli"),
        (("vit_base_patch16_siglip_224.local", "vit_ti16.tin200"), "no text tower .* is known for 'vit_ti16.tin200'"),
    ):
        with pytest.raises(UsageError, match=said):
            find_tower(*asked)


def test_rows_that_are_not_in_the_space_of_a_tower() -> None:
    clip, repo = EXAMPLES[0], "hf-hub:timm/vit_base_patch32_clip_224.openai@" + COMMIT
    found = find_tower(clip)
    check_pair(found, clip, "projection", [512], repo)
    check_pair(found, "vit_base_patch32_clip_quickgelu_224.local", "projection", [512])
    for rows, said in (
        ((clip, "cls", [768]), "with pool 'cls' are not in the space .* extract anew with --pool projection"),
        ((clip, "projection", [640]), "have 640 numbers, and those of its text tower ViT-B-32-quickgelu have 512"),
        ((clip, "projection", [512], f"hf-hub:me/mine@{COMMIT}"), "were made by me/mine, and the text tower of"),
        (("vit_base_patch32_clip_224.local", "projection", [512]), "and the text tower is that of vit_base_patch32_c"),
    ):
        with pytest.raises(UsageError, match=said):
            check_pair(found, *rows)  # type: ignore[arg-type]


def test_without_the_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"package tokenizers .*: pip install 'micl-zoo\[text\]'"):
        load_text(tower("tiny-siglip"), folders["tiny-siglip"])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UsageError, match=r"open_clip's text towers .*: pip install 'micl-zoo\[text\]'"):
        find_tower(EXAMPLES[0])


def test_texts_that_are_refused(folders: dict[str, Path]) -> None:
    encoder = load_text(tower("tiny-siglip"), folders["tiny-siglip"])
    for given, said in (
        ("", "is empty"),
        (" \n", "is empty"),
        ("!?", "leaves nothing of"),
        ("a\udcff", "halves of"),
        ("a" * 2001, "2,001 letters"),
    ):
        with pytest.raises(UsageError, match=said):
            encoder.rows(["a dog", given])
    with pytest.raises(UsageError, match="texts must be texts, got a int"):
        encoder.rows([1])  # type: ignore[list-item]
    assert encoder.rows([]).shape == (0, 32)


def test_files_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / OPEN_CLIP
    state = load_file(folders["tiny-clip"] / OPEN_CLIP)
    some = "transformer.resblocks.0.ln_1.weight"
    for changes, said in (
        ({some: None}, f"it lacks {some}; take"),
        ({"transformer.more": torch.zeros(2)}, "it has also transformer.more"),
        ({some: torch.zeros(3)}, f"it has another shape of {some}"),
        ({some: state[some] * torch.nan}, "holds NaN"),
    ):
        save_file({key: one for key, one in (state | changes).items() if one is not None}, file)
        with pytest.raises(WeightsError, match=said):
            load_text(tower("tiny-clip"), file)
    with pytest.raises(
        WeightsError, match=r"does not hold the text tower of tiny-pe .* it has another shape of positional_embedding"
    ):
        load_text(tower("tiny-pe"), folders["tiny-clip"])
    with pytest.raises(WeightsError, match=r"no text tower of tiny-clip at .*nowhere'.* --text-weights takes"):
        load_text(tower("tiny-clip"), tmp_path / "nowhere")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"is not a \.safetensors file"):
        load_text(tower("tiny-clip"), tmp_path / "x.bin")
    shutil.copy(folders["tiny-siglip"] / OPEN_CLIP, file)
    with pytest.raises(WeightsError, match=r"no tokenizer of tiny-siglip at .*tokenizer.json"):
        load_text(tower("tiny-siglip"), tmp_path)
    write_tokenizer(tmp_path, end=False)
    with pytest.raises(WeightsError, match="is not the tokenizer of a text tower"):
        load_text(tower("tiny-siglip"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        load_text(tower("tiny-siglip"), tmp_path)


def fake_hub(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Pins that fetch from the folder of tiny-siglip; returns what is asked for."""
    asked, folder = list[tuple[str, str | None]](), folders["tiny-siglip"]
    files = {one.name: PinnedFile(one.stat().st_size, file_sha256(one)) for one in folder.iterdir()}

    class Here(Pin):
        def fetch(self, name: str) -> Path:
            return folder / name

    def pin(repo: str, revision: str | None = None) -> Pin:
        asked.append((repo, revision))
        return Here(repo, revision or COMMIT, None, files)

    monkeypatch.setattr(module, "pin", pin)
    return asked


def test_a_tower_from_the_hub_is_pinned(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(folders, monkeypatch)
    encoder = load_text(tower("tiny-siglip"), source=f"hf-hub:timm/image@{'d' * 40}")
    assert asked == [("timm/both", None), ("timm/tiny", None)]
    digest = file_sha256(folders["tiny-siglip"] / OPEN_CLIP)
    place = f"{OPEN_CLIP} of hf-hub:timm/both@{COMMIT}, tokenizer of hf-hub:timm/tiny@{COMMIT}"
    assert str(encoder) == f"tiny-siglip of open_clip, {place}, sha256 {digest}"
    load_text(tower("tiny-siglip"), source=f"hf-hub:timm/both@{'d' * 40}")  # both towers are in one repository
    assert asked[2:] == [("timm/both", "d" * 40), ("timm/tiny", None)]

    def gone(*_: object) -> Pin:
        raise WeightsError("it is gated")

    monkeypatch.setattr(module, "pin", gone)
    with pytest.raises(WeightsError, match=r"it is gated. For texts, put .* and tokenizer.json .* give --text-weights"):
        load_text(tower("tiny-siglip"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("made"), encoder_folder)


@pytest.fixture
def paired(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of an encoder that the table pairs with tiny-clip."""
    name = store.manifest.model
    monkeypatch.setattr(module, "_towers", lambda: {name: tower("tiny-clip", name, store.manifest.pool, "quick.one")})
    return store


def test_texts_find_images(
    paired: Store, folders: dict[str, Path], encoder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, folder = TEXTS[:2], folders["tiny-clip"]
    rows, ids = paired.embeddings.astype(np.float64), paired.ids
    cosines = expected("tiny-clip", folder, texts) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    own = {"weights": encoder_folder, "device": "cpu"}
    image = paired.path.parent / "images" / "002.jpg"
    found = search(paired, [image], 3, ids=ids[:1], texts=texts, text_weights=folder, picture=tmp_path / "x.png", **own)  # type: ignore[arg-type]
    assert "weights were trained with QuickGELU, which quick.one computes" in caplog.text
    assert "its rows are taken for those of timm/image" in caplog.text
    assert [line[0].id for line in (found[0], found[3])] == ["002.jpg", search(paired, ids=ids[:1])[0][0].id]
    for line, near in zip(found[1:3], cosines, strict=True):
        assert [hit.id for hit in line] == [ids[at] for at in np.argsort(-near)[:3]]
        assert [hit.cosine for hit in line] == pytest.approx(sorted(near)[:-4:-1], abs=1e-6)
    encoder = text_encoder(paired, folder)
    assert search(paired, texts=texts[0], k=3, text_weights=encoder) == [found[1]]
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.height > 4 * 224
    other = TextEncoder(tower("tiny-pe", "another.one"), encoder.model, encoder.tokenizer, "here", encoder.sha256)
    with pytest.raises(UsageError, match=r"the store was made by .*, and the text tower is that of another.one"):
        search(paired, texts=texts, text_weights=other)


def test_the_command(paired: Store, folders: dict[str, Path]) -> None:
    words = ["search", str(paired.path), "-k", "2", "--text-weights", str(folders["tiny-clip"] / OPEN_CLIP)]
    result = CliRunner().invoke(main, [*words, "--text", "a\tdog", "--text", "a cat", "--id", "002.jpg"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[::3] == [r"a\x09dog", "a cat", "002.jpg"]
    assert f"Text tower: tiny-clip of open_clip, {folders['tiny-clip'] / OPEN_CLIP}, sha256 " in result.stderr
    result = CliRunner().invoke(main, [*words, "--text", "a cat", "--json"])
    hits = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(hit["query"], hit["rank"]) for hit in hits] == [("a cat", 1), ("a cat", 2)]
    result = CliRunner().invoke(main, [*words, "--text", ""])
    assert (result.exit_code, "is empty" in result.stderr) == (1, True)
