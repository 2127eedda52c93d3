"""Several encoders side by side: the record and what resumes it, stores that are used again, table and plot."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import picture
from matplotlib.text import Text
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.errors import UsageError
from micl_zoo.extraction.runner import Model
from micl_zoo.training.evaluation import ranking
from micl_zoo.training.evaluation.compare import compare
from micl_zoo.training.evaluation.evaluate import evaluate
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.training.evaluation.protocols import Protocol
from micl_zoo.training.evaluation.record import Bits, Speed, read_evaluation, read_measured
from micl_zoo.training.evaluation.tables import own_style
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.zoo.weights import save_weights

QUICK = Protocol(ks=(1, 3), epochs=2, inverse_penalties=(0.01, 1.0), shots=(1, 2, 30), draws=2)
KNN = Protocol(methods=("knn",), ks=(1, 3))
HOW: dict[str, Any] = {"device": "cpu", "workers": 0, "show": False}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are red, green or blue, some of them hardly."""
    folder = tmp_path_factory.mktemp("sets") / "colours"
    for part, count in (("train", 8), ("test", 6)):
        for name, tint in (("red", (220, 30, 30)), ("green", (30, 220, 30)), ("blue", (30, 30, 220))):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.blend(picture(number), Image.new("RGB", (48, 40), tint), 0.1 * (number % 6))
                image.save(folder / part / name / f"{number}.png")
    (folder / "test" / "red" / "broken.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, twin: Recipe) -> Path:
    """An encoder half as wide, for smaller images."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    shape = {"image_size": 16, "crop_size": 16, "embed_dim": 16, "depth": 1, "name": "vit_ti8.other"}
    save_weights(folder, vit.state_dict(), encoder_config(dataclasses.replace(twin, **shape)), {}, "float32")
    return folder


@pytest.fixture(scope="module")
def sets(colours: Path) -> list[LabelledSet]:
    return [LabelledSet.open(colours)]


@pytest.fixture(scope="module")
def compared(
    sets: list[LabelledSet], encoder_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A record of two encoders and of an empty folder, and its file."""
    out = tmp_path_factory.mktemp("compared") / "record.json"
    (empty := out.with_name("nowhere")).mkdir()
    names = [str(other_folder), str(empty), str(encoder_folder)]
    return compare(names, sets, QUICK, out=out, baselines=("pixels",), command="it", **HOW), out


def unspoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on whatever is embedded is an error."""
    monkeypatch.setattr(Model, "launch", None)
    monkeypatch.setattr("micl_zoo.training.evaluation.evaluate.embed_labelled", None)


def test_each_part_is_what_its_encoder_gives_alone(
    compared: tuple[dict[str, Any], Path], sets: list[LabelledSet], encoder_folder: Path, other_folder: Path
) -> None:
    record, out = compared
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert list(record["encoders"]) == [str(other_folder), str(encoder_folder)]
    for folder, width in ((other_folder, 16), (encoder_folder, 32)):
        one, encoder = record["encoders"][str(folder)], micl_zoo.load(folder, device="cpu")
        alone = evaluate(encoder, sets, QUICK, workers=0, show=False)
        assert one["record"]["results"][encoder.name] == alone["results"][encoder.name]
        changing = {"minutes", "command", "results"}
        assert {key: one["record"][key] for key in alone if key not in changing} == {
            key: alone[key] for key in alone if key not in changing
        }
        assert one["record"]["data"]["colours"]["refused"] == 1
        assert (one["width"], one["license"]) == (width, encoder.config.license)
        assert one["parameters"] == sum(value.numel() for value in encoder.vit.parameters())
        assert one["speed"]["images"] == 24 + 19
        for method, keys in one["right"]["colours"].items():
            for key, bits in keys.items():
                right = Bits(**bits).array()
                assert right.shape == (2 if method == "few-shot" else 1, 18)
                accuracy = one["record"]["results"][encoder.name]["colours"][method][key]["accuracy"]
                assert accuracy == pytest.approx(100 * right.mean(), abs=0.01)
        own = one["record"]["encoder"]["weights_sha256"]
        assert read_measured(out, own)["encoder"]["name"] == encoder.name
    assert list(record["failed"]) == [empty := str(out.with_name("nowhere"))]
    assert "no weights at" in record["failed"][empty]
    with pytest.raises(UsageError, match="has no encoder with these weights, sha256 abc"):
        read_measured(out, "abc")


def test_stores_serve_other_methods_and_further_encoders(
    compared: tuple[dict[str, Any], Path], sets: list[LabelledSet], encoder_folder: Path, other_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    record, out = compared
    stores, names = out.with_suffix(".stores"), [str(encoder_folder), str(other_folder)]
    with monkeypatch.context() as patch:
        unspoilt(patch)
        again = compare(names, sets, KNN, stores=stores, out=tmp_path / "knn.json", **HOW)
        encoder = micl_zoo.load(encoder_folder, device="cpu")
        single = evaluate(encoder, sets, KNN, stores=stores, workers=0, show=False)
    for name in names:
        (found,) = again["encoders"][name]["record"]["results"].values()
        ours = record["encoders"][name]["record"]
        assert found["colours"]["knn"] == ours["results"][ours["encoder"]["name"]]["colours"]["knn"]
        assert again["encoders"][name]["speed"] == record["encoders"][name]["speed"]
    assert single["results"] == again["encoders"][str(encoder_folder)]["record"]["results"]
    assert [path.name for path in tmp_path.iterdir()] == ["knn.json"]


def test_a_killed_run_goes_on_and_one_encoder_more_is_added(
    sets: list[LabelledSet], encoder_folder: Path, other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, out = str(encoder_folder), str(other_folder), tmp_path / "record.json"
    with monkeypatch.context() as patch:
        launch = Model.launch

        def killed(model: Model, pixels: np.ndarray) -> Any:
            if model.encoder.name == "vit_ti8.other":
                raise KeyboardInterrupt
            return launch(model, pixels)

        patch.setattr(Model, "launch", killed)
        with pytest.raises(KeyboardInterrupt):
            compare([first, second], sets, KNN, out=out, **HOW)
    before = json.loads(out.read_text(encoding="utf-8"))
    assert list(before["encoders"]) == [first]
    after = compare([second], sets, KNN, out=out, **HOW)
    assert list(after["encoders"]) == [second, first]
    assert after["encoders"][first] == before["encoders"][first]
    with monkeypatch.context() as patch:
        unspoilt(patch)
        patch.setattr("micl_zoo.training.evaluation.evaluate._probed", None)  # nor is anything measured again
        assert compare([second, first], sets, KNN, out=out, **HOW)["compared"] == after["compared"]


def test_what_fails_loses_nothing(
    sets: list[LabelledSet], encoder_folder: Path, other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, out = tmp_path / "moving", tmp_path / "record.json"
    moving.mkdir()
    for file in encoder_folder.iterdir():
        (moving / file.name).write_bytes(file.read_bytes())
    names = [str(moving), str(other_folder)]
    before = compare(names, sets, KNN, out=out, **HOW)
    for file in other_folder.iterdir():
        (moving / file.name).write_bytes(file.read_bytes())
    after = compare(names, sets, KNN, out=out, **HOW)
    assert "holds another evaluation: name is 'vit_ti16.tin200' there" in after["failed"][names[0]]
    assert after["encoders"][names[0]]["record"]["results"] == before["encoders"][names[0]]["record"]["results"]

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(Model, "_embed", no_memory)
        assert "not even one image" in compare([names[1]], sets, KNN, **HOW)["failed"][names[1]]
        patch.setattr("micl_zoo.training.evaluation.compare.load", no_memory)
        found = compare([names[1]], sets, KNN, **HOW)
    assert found["failed"][names[1]].startswith("it does not fit on the device (CUDA out of memory.")
    assert "failed" in ranking.table(found)


def test_what_cannot_be_compared_is_said(
    compared: tuple[dict[str, Any], Path], sets: list[LabelledSet], colours: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    names, out = [str(encoder_folder), "vit_ti16.tin200"], tmp_path / "record.json"
    out.write_bytes(compared[1].read_bytes())
    with pytest.raises(UsageError, match=r"vit_ti16.tin200 was given twice: name each encoder once"):
        compare([*names, "vit_ti16.tin200"], sets, KNN, **HOW)
    with pytest.raises(UsageError, match="the untrained twin of one encoder"):
        compare(names, sets, KNN, baselines=("random",), **HOW)
    with pytest.raises(UsageError, match="another evaluation: methods is"):
        compare(names, sets, KNN, out=out, **HOW)
    with pytest.raises(UsageError, match="colours, test_fingerprint is"):
        compare(names, [LabelledSet.open(colours, test_images=4)], QUICK, out=out, **HOW)
    with pytest.raises(UsageError, match="a record of several encoders, and that of one is needed"):
        read_evaluation(out, UsageError, "")
    spoilt = json.loads(out.read_text(encoding="utf-8"))
    alone = spoilt["encoders"][names[0]]["record"]
    spoilt["encoders"][names[0]]["right"]["colours"]["knn"]["1"]["packed"] = "AAA="
    out.write_text(json.dumps(alone), encoding="utf-8")
    with pytest.raises(UsageError, match="is the record of one encoder, and several were asked for"):
        compare(names, sets, QUICK, out=out, **HOW)
    for text in ("{}", "[]", json.dumps(spoilt)):
        out.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="is damaged"):
            compare(names, sets, QUICK, out=out, **HOW)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, words)])


def test_the_command(colours: Path, encoder_folder: Path, other_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    words = ("--data", colours, "-k", 1, "--device", "cpu", "--workers", 0)
    (tmp_path / "none.safetensors").write_bytes(b"")
    for wrong in ("vit_ti17", tmp_path / "nowhere"):
        refused = run("knn", other_folder, wrong, *words)
        assert (refused.exit_code, refused.stdout) == (1, ""), "before anything is measured"
    made = run("knn", other_folder, tmp_path / "none.safetensors", encoder_folder, *words, "--plot", tmp_path / "r.png")
    assert made.exit_code == 1
    assert "1 of 3 encoders could not be measured" in made.output
    assert "none.safetensors failed: " in made.output
    lines = [line.split("|") for line in made.stdout.splitlines() if line.startswith("|")]
    assert [line[1].strip() for line in lines[2:]] == ["other0", "none.safetensors", "encoder0"]
    assert lines[3][2].strip() == "failed"
    assert (tmp_path / "r.png").exists()
    assert not list((tmp_path / "temporary").iterdir())  # without -o nothing is kept
    kept = run("knn", encoder_folder, *words, "--stores", tmp_path / "kept", "--json")
    assert "encoders" not in json.loads(kept.stdout)
    assert len(list((tmp_path / "kept").glob("vit_ti16.tin200-*/colours-*"))) == 4
    (tmp_path / "b").mkdir()
    none = run("knn", tmp_path / "none.safetensors", tmp_path / "b", *words, "--plot", tmp_path / "none.png")
    assert "2 of 2 encoders could not be measured" in none.output
    assert not (tmp_path / "none.png").exists()


# What is more than chance.


def outcomes(shares: tuple[float, ...], images: int, draws: int = 1, seed: int = 0) -> list[ranking.Outcome]:
    """Classifiers that find the same images hard."""
    random = np.random.default_rng(seed)
    hard = random.random(images)
    return [(hard + random.normal(0, 0.1, (draws, images)) < share, np.ones(images, bool)) for share in shares]


def test_a_difference_is_that_of_a_paired_bootstrap() -> None:
    mine, other = outcomes((0.7, 0.6), 600)
    random, apart = np.random.default_rng(1), mine[0][0].astype(float) - other[0][0]
    means = 100 * np.array([random.choice(apart, 600).mean() for _ in range(4000)])
    low, high = ranking.difference(mine, other)
    assert low + 100 / 600 == pytest.approx(np.percentile(means, 2.5), abs=0.3)
    assert high - 100 / 600 == pytest.approx(np.percentile(means, 97.5), abs=0.3)
    one, many = ranking.difference(mine, other), ranking.difference(mine, other, others=7)
    assert many[0] < one[0] < one[1] < many[1]
    assert ranking.difference(mine, mine) == (-0.17, 0.17)


def test_five_images_are_no_difference_and_only_common_ones_count() -> None:
    right = np.ones((1, 50), bool)
    wrong = right.copy()
    wrong[:, :5] = False  # a sign test says p = 0.06
    everywhere = np.ones(50, bool)
    assert ranking.difference((right, everywhere), (wrong, everywhere))[0] < 0
    wrong[:, :7] = False  # 0.016
    assert ranking.difference((right, everywhere), (wrong, everywhere))[0] > 0
    kept = np.arange(50) >= 7
    assert ranking.difference((right, everywhere), (wrong[:, kept], kept)) == (-2.33, 2.33)


def test_draws_vary_the_mean_of_few_shots() -> None:
    right = np.repeat([[True], [False]], 1000, axis=1)  # two draws that agree on nothing
    assert ranking.mean_interval(right) == (0.0, 100.0)
    alike = outcomes((0.5,), 400, draws=5)[0][0]
    low, high = ranking.mean_interval(alike)
    assert low < 100 * alike.mean() < high


def made_up(accuracies: dict[str, tuple[float, ...]], images: int = 400) -> dict[str, Any]:
    """A record of encoders with a share of right images per set."""
    shares = np.array(list(accuracies.values())).T
    right = [outcomes(tuple(of_set), images, seed=number) for number, of_set in enumerate(shares)]
    record: dict[str, Any] = {"encoders": {}, "failed": {}, "asked": list(accuracies), "compared": {}}
    for place, text in enumerate(accuracies):
        figures = {}
        for number, found in enumerate(right):
            share = 100 * float(found[place][0].mean())
            figures[f"set{number}"] = {"knn": {"20": {"accuracy": share, "low": share - 4, "high": share + 4}}}
        facts = {"train_images": 9, "test_images": images, "classes": 2}
        record["encoders"][text] = {
            "record": {
                "encoder": {"name": text}, "results": {text: figures}, "data": dict.fromkeys(figures, facts),
                "protocol": {"pools": ["cls"]},
            },
            "speed": dataclasses.asdict(Speed(100, 1.0, "cpu", "Abacus", "fp32", 64, 2)),
            "width": 8, "parameters": 10, "license": "x",
            "embedded": {name: dataclasses.asdict(Bits.of(np.ones((1, images), bool))) for name in figures},
            "right": {
                f"set{number}": {"knn": {"20": dataclasses.asdict(Bits.of(found[place][0]))}}
                for number, found in enumerate(right)
            },
        }  # fmt: skip
    return record | {"compared": ranking.compared(record)}


def test_bold_is_what_is_better_than_another_beyond_chance() -> None:
    record = made_up({"a": (0.9, 0.5), "b": (0.895, 0.5), "c": (0.3, 0.495)})
    found = record["compared"]["set0"]["k-NN 20"]
    assert {found["best"], *found["level"]} == {"a", "b"}
    lines = ranking.table(record).splitlines()
    bold = [[cell.strip().startswith("**") for cell in line.split("|")[2:4]] for line in lines[2:5]]
    assert bold == [[True, False], [True, False], [False, False]]
    silent = copy.deepcopy(record)  # methods that do not say which images were right
    for one in silent["encoders"].values():
        one["right"] = {}
    assert ranking.compared(silent)["set0"]["k-NN 20"]["level"] == found["level"]
    alone = made_up({"a": (0.9,), "b": (0.1,)})
    for one in alone["encoders"].values():
        one["speed"] = None
    assert ranking.table(alone).splitlines()[2].split("|")[3].strip() == "-"
    assert ranking.draw(alone).axes[0].texts[0].get_text() == "no images/s are known"
    alone = made_up({"a": (0.9,)})
    assert "**" not in ranking.table(alone)


def test_of_two_encoders_the_gain_is_said_in_words() -> None:
    words = r"set0: what {} gains over {}, .*: k-NN 20 ([+-]\S+) \(([+-]\S+) to ([+-]\S+)\)\. So it is {} by k-NN 20\."
    record = made_up({"a": (0.5, 0.5), "b": (0.9, 0.505)})

    def said(first: str, second: str, verdict: str) -> list[float]:
        encoders = {name: record["encoders"][name] for name in (first, second)}
        text = ranking.table({**record, "encoders": encoders})
        assert re.search(r"set1: what .*\([+-]\S+ to [+-]\S+\)\. So it is neither better nor worse", text)
        found = re.search(words.format(second, first, verdict), text)
        assert found
        return [float(one) for one in found.groups()]

    gain, low, high = said("a", "b", "better")
    assert 30 < low < gain < high < 50
    assert said("b", "a", "worse") == [-gain, -high, -low]
    assert "gains over" not in ranking.table(made_up({"a": (0.5,), "b": (0.9,), "c": (0.1,)}))


def test_speeds_of_two_machines_are_told_apart() -> None:
    record = made_up({"a": (0.9,), "b": (0.8,)})
    assert "| 100      |" in (text := ranking.table(record))
    assert "images/s: from image file to embedding, on cpu (Abacus) in fp32, batches of 64, 2 decoding" in text
    record["encoders"]["b"]["speed"] |= {"device": "cuda", "chip": "X9", "precision": "bf16", "seconds": 1e-3}
    text = ranking.table(record)
    assert "100,000 (cuda, bf16)" in text
    assert "images/s of b: from image file to embedding, on cuda (X9) in bf16" in text


def test_names_are_as_long_as_it_takes() -> None:
    texts = ["timm/vit_s.x", "runs/a/encoder", "runs/b/encoder", "vit_ti16.tin200", "hf-hub:me/mine@abc"]
    assert list(ranking.labels(texts).values()) == ["vit_s.x", "a/encoder", "b/encoder", "vit_ti16.tin200", "mine@abc"]
    assert ranking.labels(["a", "x/a"]) == {"a": "a", "x/a": "x/a"}


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_no_name_in_the_plot_covers_another(count: int, tmp_path: Path) -> None:
    names = {f"{'vit_so400m_patch14_siglip_378.v2_webli' * 2}{number:02d}": (0.8, 0.1) for number in range(count)}
    record = made_up(names)  # all at one place
    ranking.plot(record, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as image:
        assert image.width < 4000
    with own_style():
        drawn = ranking.draw(record)
        drawn.draw_without_rendering()
    for panel in drawn.axes:  # of the names, without the lines to them
        boxes = sorted((Text.get_window_extent(text) for text in panel.texts), key=lambda box: box.y0)
        assert len(boxes) == count
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
        assert all(box.x1 <= drawn.bbox.x1 and box.y0 >= 0 and box.y1 <= drawn.bbox.y1 for box in boxes)
