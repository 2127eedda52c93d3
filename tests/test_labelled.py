"""Sets in every layout, labels from wherever they stand, subsets that are even, and what is said of a known set."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from damaged import encoded

import micl_zoo
from micl_zoo.errors import SourceError
from micl_zoo.sources.listing import index_source
from micl_zoo.training.corpora import CORPORA, Corpus
from micl_zoo.training.evaluation import labelled
from micl_zoo.training.evaluation.features import embed_labelled
from micl_zoo.training.evaluation.labelled import LabelledSet, balanced_rows, labels_of, number_classes, read_label_file


def png(seed: int) -> bytes:
    return encoded(picture(seed), "PNG")


def write_parquet(file: Path, labels: Any, *, names: list[str] | None = None, broken: int = -1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": b"broken" if n == broken else png(n), "path": ""} for n in range(len(labels))]
    table = pa.table({"image": cells, "label": labels})
    if names:
        feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    pq.write_table(table, file)


def write_folders(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(number).save(folder / name / f"{number}.png")


def test_parquet_with_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-0.parquet", [2, 0, 1], names=["ant", "bee", "cat"])
    write_parquet(tmp_path / "data" / "validation-0.parquet", [1, 1], names=["ant", "bee", "cat"])
    found = LabelledSet.open(tmp_path)
    assert found.classes == ("ant", "bee", "cat")
    assert found.train.labels.tolist() == [2, 0, 1]
    assert found.test.labels.tolist() == [1, 1]
    assert found.facts["train_images"] == 3
    assert set(found.facts["sha256"]) == {"train-0.parquet", "validation-0.parquet"}
    assert found.facts["known"].startswith("not a known set")


def test_folders_as_imagenet_has_them(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"n01": 3, "n02": 2})
    write_folders(tmp_path / "val", {"n01": 1, "n02": 1})
    (tmp_path / "test").mkdir()
    picture(0).save(tmp_path / "test" / "unlabelled.png")  # as ImageNet's own test part
    found = LabelledSet.open(tmp_path)
    assert found.classes == ("n01", "n02")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert found.test.labels.tolist() == [0, 1]


def test_a_test_part_without_labels_gives_way_to_the_validation_part(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]  # as ImageNet-1k lies on the hub: -1 must not be taken for the last class
    write_parquet(tmp_path / "data" / "train-0.parquet", [2, 0, 1], names=names)
    write_parquet(tmp_path / "data" / "test-0.parquet", [-1, -1], names=names)
    with pytest.raises(SourceError, match=r"no label for 2 of 2 images: its column 'label' is empty or -1"):
        LabelledSet.open(tmp_path)
    write_parquet(tmp_path / "data" / "validation-0.parquet", [1], names=names)
    assert LabelledSet.open(tmp_path).test.labels.tolist() == [1]


def test_labels_from_a_csv(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        (tmp_path / "set" / part).mkdir(parents=True)
        for number in range(count):
            picture(number).save(tmp_path / "set" / part / f"{number}.png")
    file = tmp_path / "labels.csv"
    file.write_text("id,label\n0.png,b\n1.png,a\n2.png,b\n3.png,a\n", encoding="utf-8")
    found = LabelledSet.open(tmp_path / "set", labels=file)
    assert found.classes == ("a", "b")
    assert found.train.labels.tolist() == [1, 0, 1, 0]
    file.write_text("id,label\n0.png,b\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"3 of 4 images have no label, '1.png' the first"):
        LabelledSet.open(tmp_path / "set", labels=file)
    for header in ("id,kind,x", "id,label,label", "id,id,label"):
        file.write_text(f"{header}\n0.png,b,a\n", encoding="utf-8")
        with pytest.raises(SourceError, match="one of labels"):
            LabelledSet.open(tmp_path / "set", labels=file)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no data set at 'nowhere': give a folder"):
        LabelledSet.open("nowhere")
    with pytest.raises(SourceError, match=r"no train part with labels .* expected train\*\.parquet"):
        LabelledSet.open(tmp_path)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match="put images into a folder per class"):
        labels_of(index_source(tmp_path))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "train.parquet")
    with pytest.raises(SourceError, match="no column of labels"):
        LabelledSet.open(tmp_path)
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 2])
    with pytest.raises(SourceError, match="classes that no training image has: 2"):
        LabelledSet.open(tmp_path)


def test_subsets_are_even_and_the_same_each_time() -> None:
    labels = np.repeat(np.arange(4), [100, 50, 5, 200])
    rows = balanced_rows(labels, 40)
    assert np.bincount(labels[rows]).tolist() in ([12, 12, 5, 11], [12, 11, 5, 12], [11, 12, 5, 12])
    assert rows.tolist() == sorted(rows.tolist())
    np.testing.assert_array_equal(rows, balanced_rows(labels, 40))
    assert rows.tolist() != balanced_rows(labels, 40, seed=1).tolist()


def test_a_part_of_a_set_keeps_labels_with_their_images(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": 6, "b": 6})
    write_folders(tmp_path / "test", {"a": 2, "b": 2})
    found = LabelledSet.open(tmp_path, train_images=4, test_images=2)
    ids = [entry.id for entry in found.train.index.entries()]
    assert [name[0] for name in ids] == ["ab"[label] for label in found.train.labels]
    assert np.bincount(found.train.labels).tolist() == [2, 2]
    assert (found.facts["train_images"], found.facts["train_images_there"]) == (4, 12)


def test_a_known_set_is_recognised_and_another_one_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar10"
    write_parquet(folder / "train.parquet", [0, 1])
    write_parquet(folder / "test.parquet", [1])
    known = LabelledSet.open(folder).facts["known"]
    assert known.startswith("other than the known set: classes 2, not 10; train 2, not 5000")
    assert "other bytes in train.parquet" in known
    mine = Corpus("cifar10", 2, 2, 1, "mine", LabelledSet.open(folder).facts["sha256"])
    monkeypatch.setitem(CORPORA, "cifar10", mine)
    assert LabelledSet.open(folder).facts["known"] == "the known set of this name"


def test_features_stay_with_their_labels(tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micl_zoo.encoders.device.bf16_is_fast", lambda device: False)  # the same in fp32 everywhere
    write_parquet(tmp_path / "train.parquet", [4, 3, 2, 1, 0], broken=2)
    write_parquet(tmp_path / "test.parquet", [0, 1])
    images = LabelledSet.open(tmp_path).train
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    found = embed_labelled(encoder, images, pools=("cls", "cls+mean"), batch_size=2, workers=0)
    assert found.labels.tolist() == [4, 3, 1, 0]
    assert len(found.refused) == 1
    assert {pool: rows.shape for pool, rows in found.rows.items()} == {"cls": (4, 32), "cls+mean": (4, 64)}
    alone = encoder.embed([png(3)], normalize=False)
    np.testing.assert_allclose(found.rows["cls"][2], alone[0], atol=1e-5)


NAN = float("nan")


@pytest.mark.parametrize(
    "labels",
    [[0.0, 1.0, NAN], [0, 1, -1], [0.0, 1.0, -1.0], ["a", "b", ""], ["a", "b", "  "], ["a", None, "b"], [NAN] * 3],
)
def test_a_cell_without_a_label_is_no_class(labels: list[Any], tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", labels)
    write_parquet(tmp_path / "test.parquet", labels[:1])
    with pytest.raises(SourceError, match=r"has no label for [13] of 3 images"):
        LabelledSet.open(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [[[0, 1], [1]], [["a"], ["b"]], [{"x": 1}, {"x": 2}], [0.5, 1.5], [b"\xff", b"a"], [[], []]],
)
def test_what_is_no_single_class_is_said(labels: list[Any], tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(SourceError, match=r"has no labels in its column 'label'"):
        LabelledSet.open(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        ([0.0, 1.0], [1, 0], ("0", "1")),  # pandas writes whole numbers as floats where one is missing
        (["0", "1"], [0, 1], ("0", "1")),
        ([True, False], [True], ("False", "True")),
        ([b"ant", b"bee"], ["bee"], ("ant", "bee")),
        ([10, 9], [9], ("9", "10")),
    ],
)
def test_labels_written_in_two_ways_are_the_same(train: Any, test: Any, classes: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", train)
    write_parquet(tmp_path / "test.parquet", test)
    found = LabelledSet.open(tmp_path)
    assert found.classes == classes
    assert found.train.labels.tolist() in ([0, 1], [1, 0])


@pytest.mark.parametrize("told", [b"{", b"\xff", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": 3}}}'])
def test_strange_metadata_name_no_classes(told: bytes, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [0, 1])
        table = pq.read_table(tmp_path / f"{part}.parquet").replace_schema_metadata({"huggingface": told})
        pq.write_table(table, tmp_path / f"{part}.parquet")
    if len(told) > 1:
        assert LabelledSet.open(tmp_path).classes == ("0", "1")
    else:
        with pytest.raises(SourceError, match=r"metadata of .* damaged"):
            LabelledSet.open(tmp_path)


def test_a_number_without_a_name_is_said(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 3], names=["ant", "bee"])
    with pytest.raises(SourceError, match=r"has the label 3, and its metadata name 2 classes"):
        LabelledSet.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"0.png,a\n1.png,b\n2.png,\n3.png,b\n", "1 of 4 images have no label, '2.png'"),
        (b"0.png,a\n1.png,b\n2.png\n3.png,b\n", "1 of 4 images have no label, '2.png'"),
        (b"0.png,a\n1.png,b\n2.png,a\n3.png,b\n0.png,b\n", "two for '0.png', 'a' and, in line 6, 'b'"),
        (b"0.png,a\n,b\n", "no id in line 3"),
        (b"\xff,a\n", "cannot read the labels"),
        (b'0.png,"' + b"a" * 200_000, "line 2 of the labels"),
    ],
)
def test_a_csv_with_holes_is_said(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    for number in range(4):
        picture(number).save(tmp_path / "set" / "train" / f"{number}.png")
    (tmp_path / "labels.csv").write_bytes(b"id,label\n" + text)
    with pytest.raises(SourceError, match=said):
        LabelledSet.open(tmp_path / "set", labels=tmp_path / "labels.csv")


def test_a_test_part_without_rows_is_said(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1])
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 0), tmp_path / "test.parquet")
    with pytest.raises(SourceError, match="no test or val"):
        LabelledSet.open(tmp_path)
    with pytest.raises(SourceError, match="has no test image"):
        number_classes([0, 1], [], "here")


@pytest.mark.parametrize("name", ["set[1]", "q?x", "st*r", "b{a,b}", "n{1..2}", "[", "a[]b", "[!a]", "{,}"])
@pytest.mark.parametrize("folder", ["", "data/"])
def test_a_folder_is_meant_by_its_very_name(name: str, folder: str, tmp_path: Path) -> None:
    for twin in (name, "set1", "qax", "star", "ba", "bb", "n1", "n2", "b"):
        labels = [0, 1, 0] if twin == name else [7, 8]
        for part in ("train", "test"):
            write_parquet(tmp_path / twin / f"{folder}{part}-0.parquet", labels)
    assert LabelledSet.open((tmp_path / name).as_uri()).classes == ("0", "1")
    found = LabelledSet.open(tmp_path / name)
    assert (found.name, found.classes, found.train.labels.tolist()) == (name, ("0", "1"), [0, 1, 0])
    assert found.train.index.ids[0] == "train-0.parquet#0"
    assert {Path(uri).parents[1 if folder else 0].name for uri in found.test.index.table["uri"].to_pylist()} == {name}


def write_tar(file: Path, members: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for number, name in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))


def test_a_member_of_an_archive_has_the_class_of_its_folder(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for shard in range(2):
            write_tar(tmp_path / "shards" / part / f"s-{shard}.tar", [f"./cat/{shard}.png", f"dog/a/{shard}.png"])
        for name in ("ant", "bee"):
            write_tar(tmp_path / "classes" / part / name / "x.TAR", ["0.png", "batch/1.png"])
            (tmp_path / "zips" / part).mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(tmp_path / "zips" / part / f"{name}.zip", "w") as archive:
                archive.writestr(f"{name}#1.tar/0.png", png(1))
    assert LabelledSet.open(tmp_path / "shards").classes == ("cat", "dog")
    found = LabelledSet.open(tmp_path / "classes")
    assert (found.classes, found.train.labels.tolist()) == (("ant", "bee"), [0, 0, 1, 1])
    assert LabelledSet.open(tmp_path / "zips").classes == ("ant#1.tar", "bee#1.tar")
    write_tar(tmp_path / "none" / "train" / "x.tar", ["0.png"])
    with pytest.raises(SourceError, match=r"'x\.tar#0\.png' has no label"):
        LabelledSet.open(tmp_path / "none")


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 10**8], pa.date32()),
        pa.array([0, 86_400_000 * 10**8], pa.date64()),
        pa.array([1, 2], pa.timestamp("us", "Mars/X")),
        pa.array([1, 2**62], pa.duration("s")),
        pa.array([1, 10**18], pa.time64("us")),
        pa.array([[10**8], [1]], pa.list_(pa.date32())),
        pa.array([{"a": 1}, {"a": 2}], pa.struct([("a", pa.timestamp("s", "Mars/X"))])),
        pa.array(["a" * 2000, "b"]),
        pa.array([b"\xff", b"b"]),
        pa.array([b"a" * 2000, b"b"]).dictionary_encode(),
    ],
)
def test_cells_that_are_no_label_are_told(labels: pa.Array, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", labels)
    with pytest.raises(SourceError, match=r"has no labels in its column 'label': "):
        LabelledSet.open(tmp_path)


def test_two_columns_of_labels_are_none(tmp_path: Path) -> None:
    cells = pa.array([png(0), png(1)])
    for more, found in (("label", None), ("class", ("x", "y"))):
        table = pa.table([cells, [0, 1], [1, 0], ["x", "y"]], names=["image", "label", "label", more])
        for part in ("train", "test"):
            pq.write_table(table, tmp_path / f"{part}.parquet")
        if found:
            assert LabelledSet.open(tmp_path).classes == found
        else:
            with pytest.raises(SourceError, match="each once, found image, label, label, label"):
                LabelledSet.open(tmp_path)


def test_a_label_that_unpacks_without_end_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 500_000]))
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([png(0)])).cast(pa.binary())
    pq.write_table(
        pa.table({"image": image, "label": one}), tmp_path / "train.parquet", compression="zstd", store_schema=False
    )
    sizes: list[int] = []
    values = labelled._values
    monkeypatch.setattr(labelled, "_values", lambda cells: sizes.append(cells.nbytes) or values(cells))
    with pytest.raises(SourceError, match="has 500,000 letters, 1,000 at most are a name"):
        LabelledSet.open(tmp_path)
    assert max(sizes) < 100 << 20


def test_a_pipe_of_labels_is_not_waited_for(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", {"a": 1, "b": 1})
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(SourceError, match=r"cannot read the labels '.*labels\.csv': .*no regular file"):
        LabelledSet.open(tmp_path, labels=tmp_path / "labels.csv")
    (tmp_path / "quote.csv").write_text('id,label\n"a/0.png,x\nb/0.png,y\n')
    with pytest.raises(SourceError, match=r"line 2 of the labels '.*quote\.csv' is no row \(unexpected end of data"):
        LabelledSet.open(tmp_path, labels=tmp_path / "quote.csv")
    (tmp_path / "quote.csv").write_text('id,label,said\na,x,"he \\"said\\" no"\n\nb,y\n')
    assert read_label_file(tmp_path / "quote.csv") == {"a": "x", "b": "y"}


def test_a_set_that_is_named_by_nothing_is_none() -> None:
    with pytest.raises(SourceError, match="no data set at ''"):
        LabelledSet.open("")


def test_a_folder_of_classes_without_parts_is_split(tmp_path: Path) -> None:
    for kind, count in (("cat", 10), ("dog", 7), ("owl", 1)):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for number in range(count):
            picture(number).save(tmp_path / "mine" / kind / f"{number}.png")
    found = LabelledSet.open(tmp_path / "mine")
    assert found.classes == ("cat", "dog", "owl")
    assert np.bincount(found.train.labels).tolist() == [8, 5, 1]
    assert np.bincount(found.test.labels, minlength=3).tolist() == [2, 2, 0]
    assert not set(found.train.index.ids) & set(found.test.index.ids)
    assert all(
        found.classes[label] == name.partition("/")[0]
        for part in (found.train, found.test)
        for name, label in zip(part.index.ids, part.labels, strict=True)
    )
    assert found.facts["split"] == "20% of each class for testing, by chance with seed 0"
    again = LabelledSet.open(tmp_path / "mine")
    assert again.facts == found.facts
    (tmp_path / "mine" / "test").mkdir()  # a part, if an empty one
    with pytest.raises(SourceError, match="no train part with labels"):
        LabelledSet.open(tmp_path / "mine")


def test_a_table_of_labels_is_split_too(tmp_path: Path) -> None:
    lines = ["id,label"]
    for number in range(10):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number % 2}")
    (tmp_path.parent / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    found = LabelledSet.open(tmp_path, labels=tmp_path.parent / "labels.csv")
    assert (len(found.train.labels), len(found.test.labels)) == (8, 2)


def test_one_image_a_class_is_too_few_to_test_with(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "two" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "two" / name / "1.png")
    with pytest.raises(SourceError, match="has one image of each class, none to test with"):
        LabelledSet.open(tmp_path / "two")


def test_a_folder_that_is_missing_is_not_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no data set at 'here/gone'"):
        LabelledSet.open("here/gone")
