"""Arguments from Python that cannot be are one sentence, before anything is read, written or computed."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from stores import make_store

import micl_zoo
from micl_zoo import Store, UsageError
from micl_zoo.encoders.device import resolve_device
from micl_zoo.schema import Between, checked


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("made"), encoder_folder, count=4)


NOT_PATHS: list[Any] = [None, 5, b"x", "", "a\0b", "\ud800", Path("a\0b"), ["a"], True]
CALLS: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (
        micl_zoo.load,
        {
            "name": NOT_PATHS,
            "weights": NOT_PATHS[1:],
            "pretrained": ["no", None, 0],
            "dtype": [torch.float16, None],
            "backend": ["tf", None, []],
            "providers": [[5], [], "cpu", 5, {"cpu": 1}],
        },
    ),
    (micl_zoo.open_store, {"path": NOT_PATHS, "check": ["no", None, 1]}),
    (
        micl_zoo.verify,
        {"store": NOT_PATHS, "sample": ["x", 2.5, -1, None, True], "seed": [[1], 1.5, "a"], "weights": NOT_PATHS[1:]},
    ),
    (
        micl_zoo.search,
        {
            "store": NOT_PATHS,
            "k": ["3", 2.5, float("nan"), 0, -1, True, None],
            "ids": [None, "03.png", b"x", 5],
            "picture": NOT_PATHS[1:],
            "weights": NOT_PATHS[1:],
        },
    ),
    (
        micl_zoo.convert,
        {
            "store": NOT_PATHS,
            "out": NOT_PATHS,
            "dtype": ["int8", "S", object, "complex64", "float64", "bfloat16", "foo", np.int8, 5, ("float16",)],
            "overwrite": ["no", None],
            "incomplete": [1],
        },
    ),
    (
        micl_zoo.extract,
        {"source": [None, 5, b"x", "", [5], "a\0b"], "out": NOT_PATHS, "options": [5, {}], "show": [None], "say": [5]},
    ),
]
GOOD = {"name": "vit_ti16", "path": "none", "store": "none", "source": "none", "out": "none.npy"}
WRONG = [(call, name, value) for call, names in CALLS for name, values in names.items() for value in values]


@pytest.mark.parametrize(("call", "name", "value"), WRONG)
def test_an_argument_that_cannot_be(call: Callable[..., Any], name: str, value: Any) -> None:
    needed = {one: GOOD[one] for one in ("name", "path", "store", "source", "out") if one in call.__annotations__}
    with pytest.raises(UsageError, match=rf"^{call.__name__}: {name}(\[0\])? (must be|is|has) [^\0]*$"):
        call(**{**needed, name: value})


OPTIONS: dict[str, list[Any]] = {
    "workers": [-1, "1", 1.0],
    "limit": ["1", 0, 2.5],
    "exclude": [[5], "*.png", None],
    "model": [5, None, b"x", ["vit_ti16"]],
    "weights": [5, b"x", "a\0b"],
    "image_timeout": [float("nan"), 0, -1, "x"],
    "max_pixels": [0, -1, 1.5],
    "pool": ["x", 5],
    "image_size": ["x", 0, 10**9],
    "precision": ["x"],
    "backend": ["tf"],
    "providers": ["cpu", [5]],
    "exif": ["x"],
    "devices": [None, 0],
    "normalize": ["no"],
    "retry": [5, [5]],
    "shard_rows": [0, 10**20],
    "batch_size": [0, 10**12, 10**20],
    "only_missing": [None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_an_option_that_cannot_be(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{name}(\[0\])? (must be|is|has) "):
        micl_zoo.extract(tmp_path, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        micl_zoo.extract(tmp_path, tmp_path / "out", only_missing=True, overwrite=True)


def test_numbers_of_numpy_are_numbers(made: Store, encoder_folder: Path, tmp_path: Path) -> None:
    assert len(micl_zoo.search(made, ids=made.ids[:1], k=np.int64(2))[0]) == 2  # type: ignore[arg-type]
    options: dict[str, Any] = {"limit": np.int32(3), "shard_rows": np.int64(2), "image_timeout": np.float32(60)}
    options |= {"workers": np.uint8(0), "weights": encoder_folder, "devices": "cpu"}
    assert micl_zoo.extract(made.path.parent / "images", tmp_path / "out", **options).images == 3
    assert micl_zoo.load(weights=encoder_folder, device=torch.device("cpu")).device.type == "cpu"


def test_what_people_have_at_hand_is_taken(made: Store, encoder_folder: Path, tmp_path: Path) -> None:
    images = sorted((made.path.parent / "images").glob("0*.jpg"))
    options: dict[str, Any] = {"weights": encoder_folder, "workers": 0, "devices": "cpu"}
    sources: list[Any] = [
        set(images),
        (one for one in images),
        np.array(list(map(str, images))),
        dict.fromkeys(images).keys(),
    ]
    for number, source in enumerate(sources):
        found = micl_zoo.extract(source, tmp_path / str(number), retry={"empty"}, exclude=(x for x in ["z"]), **options)
        assert found.images == len(images)
    device = torch.device("cpu")
    assert micl_zoo.search(made, images[:1], k=1, weights=encoder_folder, device=device)[0][0].id == images[0].name
    assert micl_zoo.verify(made, weights=encoder_folder, device=device, seed=None).problems == []
    for number, dtype in enumerate([np.float16, np.dtype("float16"), "f2", made.embeddings.dtype]):
        micl_zoo.convert(made, tmp_path / f"{number}.npy", dtype=dtype)
    with pytest.raises(UsageError, match="is inside the store"):
        micl_zoo.convert(made, made.path / "part-00000.npy")


def test_a_folder_whose_name_ends_in_a_colon_is_one(
    made: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.path, tmp_path / "ab:" / "s")
    monkeypatch.chdir(tmp_path)
    assert micl_zoo.open_store("ab:/s").ids == made.ids
    micl_zoo.convert("ab:/s", "ab:/rows.npy")
    with pytest.raises(micl_zoo.StoreError, match="has lost a slash of its address"):
        micl_zoo.open_store("s3:/s")


def test_a_choice_that_is_nearly_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it is 'torhc' \(Did you mean torch\?\)"):
        micl_zoo.extract(tmp_path, tmp_path / "out", backend="torhc")


def test_an_option_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown option 'pooling'\. Did you mean pool\?"):
        micl_zoo.extract(tmp_path, tmp_path / "out", pooling="mean")


@pytest.mark.parametrize("device", ["meta", "None", "0", "cuda:-1", "cuda:", "", "CPU", "cpu ", "cuda:1:2"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device .* Valid: auto, cpu, cuda, cuda:N, mps"):
        resolve_device(device)


def test_devices() -> None:
    assert [resolve_device(name).type for name in ("cpu", "cpu:0")] == ["cpu", "cpu"]


@pytest.mark.parametrize("out", ["s3://bucket/rows.npy", Path("s3://bucket/rows.npy"), "file:///a/rows.npy"])
def test_what_is_written_here_is_no_address(made: Store, monkeypatch: pytest.MonkeyPatch, out: Any) -> None:
    monkeypatch.chdir(made.path.parent)
    before = sorted(made.path.parent.iterdir())
    with pytest.raises(UsageError, match="is an address, and this must be a path on this machine"):
        micl_zoo.convert(made, out)
    with pytest.raises(UsageError, match="is an address, and this must be a path on this machine"):
        micl_zoo.search(made, ids=made.ids[:1], picture=str(out).replace("npy", "png"))
    assert sorted(made.path.parent.iterdir()) == before


def test_a_folder_in_the_place_of_a_file(made: Store, tmp_path: Path) -> None:
    for name in ("a.png", "a.npy", "b.npy.ids.json", "c.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / "d.lance").write_text("precious")
    with pytest.raises(UsageError, match="is a folder"):
        micl_zoo.search(made, ids=made.ids[:1], picture=tmp_path / "a.png")
    for name in ("a.npy", "b.npy", "c.safetensors", "d.lance"):
        with pytest.raises(UsageError, match=r"is a (folder|file): give another name"):
            micl_zoo.convert(made, tmp_path / name, overwrite=True)
    assert (tmp_path / "d.lance").read_text() == "precious"


def test_ids_that_are_there_are_not_replaced_unasked(made: Store, tmp_path: Path) -> None:
    (tmp_path / "x.npy.ids.json").write_text("precious")
    with pytest.raises(UsageError, match=r"x\.npy\.ids\.json' exists: give another name, or --overwrite"):
        micl_zoo.convert(made, tmp_path / "x.npy")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.npy.ids.json", "precious")]
    micl_zoo.convert(made, tmp_path / "x.npy", overwrite=True)
    assert "precious" not in (tmp_path / "x.npy.ids.json").read_text()


def test_search_takes_what_embed_takes(made: Store, encoder_folder: Path, tmp_path: Path) -> None:
    file = made.path.parent / "images" / "002.jpg"
    data, image = file.read_bytes(), Image.open(file)
    pixels = np.asarray(image)
    images: list[Any] = [file, str(file), data, bytearray(data), memoryview(data), io.BytesIO(data), image, pixels]
    images += [torch.from_numpy(pixels.copy()), {"bytes": data, "path": None}, {"bytes": None, "path": str(file)}]
    options: Any = {"k": 2, "weights": encoder_folder, "device": "cpu"}
    together = micl_zoo.search(made, (one for one in images), picture=tmp_path / "x.png", **options)
    assert [hits[0].id for hits in together] == ["002.jpg"] * len(images)
    for one in images:
        assert micl_zoo.search(made, one, **options) == [together[0]]
    assert len(micl_zoo.search(made, np.stack([pixels] * 3), **options)) == 3


class Broken:
    """A file that raises what it wants."""

    def read(self) -> bytes:
        raise KeyError("broken")


@pytest.mark.parametrize(
    "images", [Broken(), None, 5, [5], [None], [{}], [np.zeros((3, 3), int)], [io.StringIO("x")], ["a\0b"]]
)
def test_what_is_no_image_to_search_for(made: Store, encoder_folder: Path, images: Any) -> None:
    with pytest.raises(UsageError, match="image"):
        micl_zoo.search(made, images, weights=encoder_folder, device="cpu")


def test_ids_may_come_from_anywhere(made: Store) -> None:
    ids = made.ids[:2]
    expected = micl_zoo.search(made, ids=ids)
    given: list[Iterable[str]] = [iter(ids), tuple(ids), np.array(ids), dict.fromkeys(ids)]
    for one in given:
        assert micl_zoo.search(made, ids=one) == expected
    with pytest.raises(UsageError, match="ids must be texts, got 3"):
        micl_zoo.search(made, ids=[3])  # type: ignore[list-item]


def test_a_function_is_checked_by_its_annotations() -> None:
    @checked
    def call(
        number: Annotated[int, Between(1, 3)] = 1, kind: Literal["a", "b"] | None = None, *, share: float = 1.0
    ) -> tuple[Any, ...]:
        """Say what it got."""
        return number, kind, share

    assert call(2, "a", share=1) == (2, "a", 1)
    assert call.__doc__ == "Say what it got."
    for given, says in (({"number": 4}, "is 4, and must be 1 to 3"), ({"kind": "c"}, "must be one of a, b, it is 'c'")):
        with pytest.raises(UsageError, match=rf"^call: {next(iter(given))} {says}$"):
            call(**given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(numbre=1)  # type: ignore[call-arg]
