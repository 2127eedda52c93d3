"""Encoders and stores measured alike, intervals, the record, the table and the picture; the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import picture
from PIL import Image

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.errors import SourceError, StoreError, UsageError
from micl_zoo.extraction.extract import extract
from micl_zoo.stores.store import open_store
from micl_zoo.training.evaluation.evaluate import evaluate, evaluate_stores, random_encoder
from micl_zoo.training.evaluation.features import Features, store_features
from micl_zoo.training.evaluation.knn import knn_accuracy
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.training.evaluation.protocols import METHODS, Method, Protocol
from micl_zoo.training.evaluation.tables import interval, plot, score, table

QUICK = Protocol(ks=(1, 3), epochs=2, inverse_penalties=(0.01, 1.0), shots=(1, 2, 30), draws=2)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are red or blue, in folders as ImageNet has them."""
    folder = tmp_path_factory.mktemp("sets") / "colours"
    for part, count in (("train", 10), ("test", 6)):
        for name, tint in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.blend(picture(number), Image.new("RGB", (48, 40), tint), 0.7)
                image.save(folder / part / name / f"{part}-{number}.png")
    return folder


@pytest.fixture(scope="module")
def record(colours: Path, encoder_folder: Path) -> dict[str, Any]:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    return evaluate(encoder, [LabelledSet.open(colours)], QUICK, baselines=("random", "pixels"), workers=0, show=False)


def test_a_record_has_every_method_for_every_subject(record: dict[str, Any]) -> None:
    assert list(record["results"]) == ["vit_ti16.tin200", "random", "pixels"]
    for subject, sets in record["results"].items():
        found = sets["colours"]
        assert found["knn"]["3"]["accuracy"] == 100.0, subject  # red and blue
        assert found["knn"]["3"]["low"] == 100.0
        if subject == "pixels":
            assert list(found) == ["knn"]
            continue
        assert list(found["linear"]) == list(found["logreg"]) == ["cls", "mean", "cls+mean"]
        assert found["logreg"]["cls"]["C"] in QUICK.inverse_penalties
        assert len(found["few-shot"]["2"]["draws"]) == 2
        assert found["few-shot"]["30"] == {
            "left_out": "30 images per class asked for, but a class has 10 training images"
        }
    assert record["data"]["colours"]["train_images"] == 20
    assert record["protocol"]["ks"] == [1, 3]
    assert {"commit", "date", "machine", "versions", "minutes"} <= set(record)
    assert record["results"]["random"] == record["results"]["vit_ti16.tin200"]  # it is one: random weights, seed 0


def test_pixels_have_a_classifier_where_that_is_what_is_asked_for(colours: Path, encoder_folder: Path) -> None:
    encoder, asked = micl_zoo.load(weights=encoder_folder, device="cpu"), replace(QUICK, methods=("logreg",))
    found = evaluate(encoder, [LabelledSet.open(colours)], asked, baselines=("pixels",), workers=0, show=False)
    assert found["results"]["pixels"]["colours"]["logreg"]["pixels"]["accuracy"] == 100.0


def test_accuracies_are_those_of_the_features(colours: Path, encoder_folder: Path, record: dict[str, Any]) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    parts = [sorted((colours / part).rglob("*.png")) for part in ("train", "test")]
    train, test = (encoder.embed(files) for files in parts)
    labels = [np.array([file.parent.name == "red" for file in files], int) for files in parts]
    expected = 100 * knn_accuracy(train, labels[0], test, labels[1], k=1)
    assert record["results"]["vit_ti16.tin200"]["colours"]["knn"]["1"]["accuracy"] == round(expected, 2)


def test_stores_give_what_their_images_give(colours: Path, encoder_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "weights": encoder_folder, "devices": "cpu", "precision": "fp32", "workers": 0, "shard_rows": 7,
        "pool": "cls+mean", "normalize": False,
    }  # fmt: skip
    stores = [extract(colours / part, tmp_path / part, **settings).store for part in ("train", "test")]
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    mine = evaluate(encoder, [LabelledSet.open(colours)], QUICK, workers=0, show=False)["results"]["vit_ti16.tin200"][
        "colours"
    ]
    theirs = evaluate_stores(*stores, QUICK)
    assert theirs["results"]["vit_ti16.tin200"]["stores"] == mine
    streamed = evaluate_stores(*stores, Protocol(methods=("knn",), ks=(1, 3)))
    assert streamed["results"]["vit_ti16.tin200"]["stores"]["knn"] == mine["knn"]
    with pytest.raises(SourceError, match="7 of 7 images have no label"):
        evaluate_stores(*stores, QUICK, labels={"elsewhere.png": "a"})
    other = extract(colours / "test", tmp_path / "mean", **{**settings, "pool": "mean"}).store
    with pytest.raises(StoreError, match="the stores differ in pool: 'cls\\+mean' in the training store, 'mean'"):
        evaluate_stores(stores[0], other, QUICK)
    alone = evaluate_stores(other, other, QUICK)["results"]["vit_ti16.tin200"]["stores"]
    assert list(alone["linear"]) == ["mean"]
    with pytest.raises(UsageError, match="holds the pool 'mean', asked for cls"):
        store_features(other, {}, ("cls",))
    (tmp_path / "test" / "index" / "part-00000.parquet").unlink()
    lost = r"images of '.*test' are not in its index, of which a part is missing: 'blue.*' first"
    with pytest.raises(StoreError, match=lost):
        evaluate_stores(stores[0], open_store(tmp_path / "test"), QUICK)


def test_a_record_goes_on_where_it_was(
    colours: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, out = micl_zoo.load(weights=encoder_folder, device="cpu"), tmp_path / "record.json"
    settings: dict[str, Any] = {"workers": 0, "show": False, "out": out}
    knn, sets = Protocol(methods=("knn",), ks=(1,)), [LabelledSet.open(colours)]
    first = evaluate(encoder, sets, knn, **settings)
    assert json.loads(out.read_text(encoding="utf-8")) == first
    with monkeypatch.context() as patch:
        patch.setattr("micl_zoo.training.evaluation.evaluate.embed_labelled", None)  # nothing is embedded again
        whole = evaluate(encoder, sets, knn, baselines=("pixels",), command="again", **settings)
    assert list(whole["results"]) == ["vit_ti16.tin200", "pixels"]
    assert whole["results"]["vit_ti16.tin200"] == first["results"]["vit_ti16.tin200"]
    assert whole["resumed"][0]["command"] == "again"
    with pytest.raises(UsageError, match=r"another evaluation: ks is \[1\] there, \[3\] asked for. Give another file"):
        evaluate(encoder, sets, Protocol(methods=("knn",), ks=(3,)), **settings)
    with pytest.raises(UsageError, match="colours, test_fingerprint is"):
        evaluate(encoder, [LabelledSet.open(colours, test_images=4)], knn, **settings)
    with pytest.raises(UsageError, match="two sets are called colours"):
        evaluate(encoder, sets * 2, knn, **settings)
    out.write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="not an evaluation record"):
        evaluate(encoder, sets, knn, **settings)


def test_the_interval_is_that_of_a_bootstrap_over_images() -> None:
    hits = np.arange(400) < 120
    random = np.random.default_rng(3)
    means = np.sort([random.choice(hits, 400).mean() for _ in range(4000)])
    low, high = interval(0.3, 400)
    assert abs(low - means[100]) < 0.006
    assert abs(high - means[3900]) < 0.006
    assert interval(1.0, 50) == (1.0, 1.0)


def test_random_is_the_network_before_its_first_step(encoder_folder: Path) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    other = random_encoder(encoder, seed=1)
    assert not (other.vit.cls_token == encoder.vit.cls_token).all()
    assert (other.vit.pos_embed == encoder.vit.pos_embed).all()


def test_the_table_and_the_picture(record: dict[str, Any], tmp_path: Path) -> None:
    lines = table(record).splitlines()
    assert len(lines) == 5
    assert "1-shot" in lines[0]
    assert "30-shot" not in lines[0]
    assert "100.0 ± 0.0" in lines[2]
    plot(record, tmp_path / "record.png")
    with Image.open(tmp_path / "record.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


def test_a_protocol_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown pool 'patch'"):
        Protocol(pools=("patch",))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="k must be at least 1, got 0"):
        Protocol(ks=(0,))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def test_a_plot_that_cannot_be_drawn_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    for name in ("x.txt", "x", "x.png.zip"):
        made = run("knn", "vit_ti16.tin200", "--data", tmp_path / "nothing", "--plot", tmp_path / name)
        assert made.exit_code == 1
        assert "a plot's name ends in .png, .svg, .pdf; got" in made.output


def test_the_commands(colours: Path, encoder_folder: Path, tmp_path: Path) -> None:
    result = run(
        "knn", encoder_folder, "--data", colours, "-k", 1, "--test-images", 4, "-o", tmp_path / "r.json",
        "--plot", tmp_path / "r.png", "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "| colours | vit_ti16.tin200 | 100.0 ± 0.0 |" in result.output
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written["data"]["colours"]["test_images"] == 4
    assert written["command"].startswith(f"micl-zoo eval knn {encoder_folder} --data {colours} --test-images 4 ")
    assert (tmp_path / "r.png").exists()
    printed = run(
        "few-shot",
        encoder_folder,
        "--data",
        colours,
        "--shots",
        2,
        "--draws",
        2,
        "--json",
        "--device",
        "cpu",
        "--workers",
        0,
    )
    assert list(json.loads(printed.stdout)["results"]["vit_ti16.tin200"]["colours"]) == ["few-shot"]
    assert "give an ENCODER and --data" in run("linear").output
    assert run("logreg", "--train", "somewhere").exit_code == 2


def measure_centroids(train: Features, test: Features, protocol: Protocol, classes: int, device: Any) -> dict[str, Any]:
    """A method that is made here: the nearest mean of a class, by the first pool."""
    rows, asked = (next(iter(part.rows.values())) for part in (train, test))
    centres = np.stack([rows[train.labels == label].mean(0) for label in range(classes)])
    far = np.linalg.norm(asked[:, None] - centres, axis=2)
    return {"all": score(far.argmin(1) == test.labels)}


CENTROIDS = Method(
    "centroid", f"{__name__}:measure_centroids", "centroid, {}", ("pools",), "The nearest mean of a class.",
    ("vit_ti16.tin200 --data caltech101",), "Centroid: of class tokens.", glance="all",
)  # fmt: skip


def test_a_new_method_is_a_function_and_a_row(
    colours: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "centroid", CENTROIDS)
    assert "The nearest mean of a class." in run("--help").output
    assert "micl-zoo eval centroid vit_ti16.tin200 --data caltech101" in run("centroid", "--help").output
    words = (encoder_folder, "--data", colours, "--device", "cpu", "--workers", 0, "--json")
    picture = tmp_path / "r.png"
    for name in ("centroid", "all"):
        made = run(name, *words, "--plot", picture)
        assert made.exit_code == 0, made.output
        record = json.loads(made.stdout)
        found = record["results"]["vit_ti16.tin200"]["colours"]
        assert list(found) == ([name] if name == "centroid" else list(METHODS))
        assert found["centroid"]["all"]["accuracy"] == 100.0
        assert "centroid, all" in table(record).splitlines()[0]
    assert picture.exists()
    assert run("centroids", *words).exit_code == 2
