"""Every script of benchmarks/ runs, with each contender that is installed here; those that are not are named."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import TWIN, picture

import micl_zoo
from micl_zoo.errors import UsageError
from micl_zoo.extraction.extract import extract
from micl_zoo.training.evaluation.ranking import compared
from micl_zoo.training.evaluation.record import Bits, read_comparison
from micl_zoo.training.pretraining.adapt import choose
from micl_zoo.zoo.ours import DEFAULT, RECORDS
from micl_zoo.zoo.public import IMAGES_PER_SECOND, SPEED_RECORD

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the installed package has no benchmarks")
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Import a script by name. In this process, because each new one takes seconds to import torch."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # the other tests' threads are not its own
    assert torch.get_num_threads() == threads
    return importlib.import_module


def run(module: ModuleType, *words: object) -> str:
    """Call a script's command line and return what it printed."""
    result = CliRunner().invoke(module.main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def record_of(file: Path) -> dict[str, Any]:
    """A record, which says where it was made."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert {"date", "commit", "versions", "command"} <= set(found)
    return found


def parquet(file: Path, images: int, classes: int = 2, first: int = 0) -> None:
    """Write images in the columns that tin200 has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + images):
        path = file.with_suffix(".webp")
        picture(number, 64, 64).save(path)
        rows.append({"bytes": path.read_bytes(), "path": f"{number}.webp"})
        path.unlink()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([number % classes for number in range(images)], pa.int32())
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": labels}), file)


def test_decode(script: Script, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = image_folder(3), tmp_path / "record.json"
    run(script("decode"), folder, "--rounds", 1, "--trial", "-o", file)
    found = record_of(file)
    ways = {"exact", "fast, margin 1.0", "fast, margin 1.5", "fast, margin 2.0"}
    assert set(found["rates"]["photographs"]) == set(found["rates"]["drawings"]) == ways
    for cosines in found["cosines"].values():
        assert set(cosines) == ways - {"exact"}
        worst = [one["worst"] for one in cosines.values()]
        assert min(worst) > 0.9


def test_step(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    sets = [word for change in TWIN for word in ("--set", change)]
    run(
        script("step"),
        "vit_ti16.tin200",
        *sets,
        "--batch-size",
        8,
        "--rounds",
        2,
        "--device",
        "cpu",
        "--start",
        "-o",
        file,
    )
    found = record_of(file)
    assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["straightforward"], abs=1e-5)
    rates = found["images_per_second"]
    assert found["ratio"] == pytest.approx(rates["ours"] / rates["straightforward"], rel=0.01)


def test_upright(script: Script, image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    extract(image_folder(6), tmp_path / "store", weights=encoder_folder, devices="cpu", workers=0)
    run(script("upright"), tmp_path / "store", "--prefix", "below/", "-o", tmp_path / "record.json")
    found = record_of(tmp_path / "record.json")
    assert (found["images_of_the_scene"], found["other_images"]) == (3, 3)
    rows = micl_zoo.open_store(tmp_path / "store")
    unit = rows.embeddings / np.linalg.norm(rows.embeddings, axis=1, keepdims=True)
    scene = unit[[name.startswith("below/") for name in rows.ids]]
    assert found["lowest_pairwise_cosine"] == pytest.approx(float((scene @ scene.T).min()), abs=1e-4)


@pytest.mark.slow
def test_export(script: Script, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "record.json"
    said = run(script("export"), image_folder(10), "--trial", "--out", file)
    found = record_of(file)
    rates = set(found["images_per_second"])
    assert {"torch fp32", "torch bf16", *(f"onnx {name}" for name in found["drift"])} <= rates
    assert len(found["drift"]) == 6
    assert all(row["cosine_min"] > 0.9 for row in found["drift"].values())
    assert ("openvino fp32" in rates) == ("openvino fp32: left out" not in said) == bool(find_spec("openvino"))


def test_encoders(script: Script, tmp_path: Path) -> None:
    said = run(script("encoders"), "--trial", "-o", tmp_path / "record.json")
    found = record_of(tmp_path / "record.json")
    assert set(found["encoders"]) == set(script("encoders").shown(found)) == {"test_vit.trial", "test_resnet.trial"}
    for one in found["encoders"].values():
        assert one["by_itself"] in one["images_per_second"], "what extract takes was not measured"
        assert one["difference_from_timm"] < 1e-5
        backends = {name.split()[0] for name in one["images_per_second"]}
        assert ("openvino" in backends) == ("openvino: left out" not in said) == bool(find_spec("openvino"))


def test_the_speeds_of_the_table_are_those_of_its_record(script: Script) -> None:
    record = record_of(BENCHMARKS.parent / SPEED_RECORD)
    assert script("encoders").shown(record) == IMAGES_PER_SECOND
    assert {one["by_itself"] for one in record["encoders"].values()} == {"openvino bf16"}, "see SPEED_ON"


def test_the_record_of_encoders_compared_is_what_its_images_say() -> None:
    file = BENCHMARKS / "records" / "2026-11-28-encoders-compared.json"
    record = read_comparison(file, UsageError, "make it again")
    for one in record["encoders"].values():
        (results,) = one["record"]["results"].values()
        assert set(results) == {"caltech101", "flowers5", "cifar10"}
        for data, method, key in ((d, m, k) for d, some in results.items() for m, keys in some.items() for k in keys):
            right = Bits(**one["right"][data][method][key]).array()
            assert results[data][method][key]["accuracy"] == pytest.approx(100 * right.mean(), abs=0.01)
    assert record["encoders"][DEFAULT]["record"]["encoder"]["weights_sha256"] == RECORDS[DEFAULT].sha256
    assert json.loads(json.dumps(compared(record))) == record["compared"]


def test_loops(script: Script, image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    loops, folder, onnx = script("loops"), image_folder(9), tmp_path / "model.onnx"
    given = ["--weights", encoder_folder, "--batch-size", 4]
    told = [run(loops, "plain", folder, *given, "--precision", precision) for precision in ("fp32", "bf16")]
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        run(loops, "export", "--weights", encoder_folder, "--onnx", onnx)
        told.append(run(loops, "onnx", folder, *given, "--onnx", onnx))
    backends = ["torch", *["openvino"] * bool(find_spec("openvino"))]
    alone = [run(loops, "model", *given, "--seconds", 0, "--backend", backend) for backend in backends]
    for text in told:
        found = json.loads(text)
        assert found["images"] == 5, "all but the first batch"
        assert found["seconds"] > 0
    assert all(json.loads(text)["matrix_tflops"] > 0 for text in alone)


def test_lightly_embed_says_what_it_needs() -> None:
    if find_spec("lightly_train"):
        pytest.skip("lightly-train is installed: benchmarks/extract.py --lightly-python runs it")
    command = [sys.executable, "-S", str(BENCHMARKS / "lightly_embed.py"), "embed"]  # without any package: at once
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "an environment that has lightly-train" in said.stderr


@pytest.mark.slow
def test_extract_beside_a_plain_loop(script: Script, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    found, table = extract_trial(script, image_folder(4), tmp_path, "extract auto", "plain fp32", "lightly-train fp32")
    assert set(found["figures"]) == {"extract auto", "plain fp32"}
    plain, ours = found["figures"]["plain fp32"], found["figures"]["extract auto"]
    assert plain["ratio_to_plain_fp32"] == 1
    assert ours["ratio_to_plain_fp32"] == pytest.approx(
        ours["images_per_second"] / plain["images_per_second"], rel=0.01, abs=0.001
    )
    assert 0 < plain["start_up_seconds"] < plain["wall_seconds"]
    assert "--lightly-python" in found["skipped"]["lightly-train fp32"]
    assert "lightly-train fp32: left out" in table
    assert "extract auto over its model alone: None, at least 0.9 not measured" in table


@pytest.mark.slow  # a process for each contender, and each imports torch: a minute
def test_extract_beside_all_that_is_installed(
    script: Script, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    found, table = extract_trial(script, image_folder(4), tmp_path)
    figures, skipped = set(found["figures"]), found["skipped"]
    assert {"extract auto", "plain fp32", "model fp32"} <= figures
    assert len(figures) + len(skipped) == 10
    assert not figures & set(skipped)
    assert ("onnxruntime fp32" in figures) == bool(find_spec("onnxruntime") and find_spec("onnxscript"))
    assert ("extract openvino" in figures) == ("model openvino" in figures) == bool(find_spec("openvino"))
    assert not [why for why in skipped.values() if "exit code" in why]
    assert all(f"{name}: left out, {why}" in table for name, why in skipped.items())


def extract_trial(script: Script, photos: Path, tmp_path: Path, *only: str) -> tuple[dict[str, Any], str]:
    """Record and table of benchmarks/extract.py --trial."""
    words = [word for name in only for word in ("--only", name)]
    table = run(script("extract"), photos, "--trial", "--device", "cpu", *words, "--out", tmp_path / "record.json")
    return record_of(tmp_path / "record.json"), table


def test_the_encoder_that_extract_measures_takes_the_usual_images(script: Script, tmp_path: Path) -> None:
    folder = script("toys").random_encoder(tmp_path / "encoder", "vit_b16.in1k", ("depth=1",))
    encoder = micl_zoo.load(weights=folder, device="cpu")
    assert (encoder.name, encoder.transform.size, encoder.vit.patch_embed.num_patches) == (
        "vit_b16.random",
        (224, 224),
        196,
    )


def test_the_goals_of_extract_are_judged_by_their_figures(script: Script) -> None:
    found = script("extract")
    row = {"ratio_to_plain_fp32": None, "share_of_matrix_rate": None, "share_of_model_only": None}
    ours = {"precision": "bf16", "ratio_to_plain_fp32": 1.9, "share_of_matrix_rate": 0.7, "share_of_model_only": 0.95}
    figures = {
        "extract auto": {**ours, "images_per_second": 9.5},
        "plain fp32": {**row, "precision": "fp32", "images_per_second": 5.0, "ratio_to_plain_fp32": 1.0},
        "plain bf16": {**row, "precision": "bf16", "images_per_second": 9.0},
        "model bf16": {**row, "precision": "bf16", "images_per_second": 10.0},  # no peer: nobody's end to end
    }
    judged = [(goal["figure"], goal["met"]) for goal in found.goals(figures, torch.device("cpu"))]
    assert judged == [(1.9, True), (0.7, False), (1.9, False), (1.056, True), (0.95, True)]
    assert {goal["met"] for goal in found.goals({}, torch.device("cpu"))} == {None}
    assert found.last_json('a bar\n{"images": 3}') == {"images": 3}
    assert found.last_json("12 images embedded") == {}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_memory_counts_what_a_process_has_started(script: Script) -> None:
    memory = script("memory")
    alone = memory.tree_bytes(os.getpid())
    assert 50e6 < alone < 50e9
    hold = "block = b'x' * 10**8; print('there', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert memory.own_bytes(child.pid) > 1e8
        assert memory.tree(os.getpid())[-1] == child.pid
        child.kill()


def test_contenders_take_turns(script: Script) -> None:
    calls: list[str] = []
    found = script("contest").in_turn("", ["a", "b"], 2, lambda name: calls.append(name) or len(calls))
    assert (calls, found) == (["a", "b", "a", "b"], {"a": [1, 3], "b": [2, 4]})
    assert script("contest").ratio(1.0, 3.0) == 0.333
    assert script("contest").ratio(None, 3.0) is script("contest").ratio(1.0, None) is None


def rivals_data(folder: Path) -> Path:
    """The four labelled sets, tiny."""
    parquet(folder / "tin200" / "train-000.parquet", 16)
    parquet(folder / "tin200" / "val.parquet", 6, first=100)
    for number, name in enumerate(("caltech101", "flowers5", "cifar10"), 2):
        parquet(folder / name / "train.parquet", 16, first=100 * number)
        parquet(folder / name / "test.parquet", 6, first=100 * number + 50)
    return folder


def places(folder: Path) -> tuple[Path, Path, Path]:
    """The data, the work folder and the record of a benchmark that trains."""
    return rivals_data(folder / "data"), folder / "work", folder / "record.json"


@pytest.mark.slow
def test_rivals(script: Script, tmp_path: Path) -> None:
    rivals, (data, work, file) = script("rivals"), places(tmp_path)
    budget = ["--images", 16, "--size", "toy", "--device", "cpu"]
    said = run(rivals, "train", "--data", data, "--work", work, "--arms", "micl-paper,simclr", *budget)
    there = bool(find_spec("lightly"))
    assert ("left out, lightly not installed: simclr" in said) == (not there)
    arms = ["sharp-last", *["mae", "dino", "supervised"] * there]
    for name in arms:  # in this process: `train` starts one for each
        run(rivals, "arm", name, "--work", work, *budget)
    table = run(rivals, "evaluate", "--data", data, "--work", work, "-o", file)
    found = record_of(file)
    trained = {"micl-paper", *arms, *["simclr"] * there}
    assert set(found["arms"]) == trained
    assert set(found["results"]) == trained | {"random", "pixels", "sharp-last (mean)"} | set(
        ["dino (student)"] * there
    )
    assert {arm["images_seen"] for arm in found["arms"].values()} == {16}
    assert all(name in table for name in trained)
    assert file.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_adapt(script: Script, tmp_path: Path) -> None:
    adapt, (data, work, file) = script("adapt"), places(tmp_path)
    given = ["--corpus", "flowers5", "--minutes", 0.001, "--seed", 1, "--trial"]  # two steps or so
    said = run(adapt, "train", "--data", data, "--work", work, "--arms", "base,simclr", *given)
    there = bool(find_spec("lightly"))
    assert ("left out, lightly not installed: simclr" in said) == (not there)
    for name in ("adapt-frozen-6", "random"):  # in this process: `train` starts one for each
        run(adapt, "arm", name, "--work", work, *given)
    assert "is there already" in run(adapt, "arm", "random", "--work", work, *given)
    evaluate = ["evaluate", "--data", data, "--work", work, "-o", file]
    table = run(adapt, *evaluate)
    found = record_of(file)
    ((name, one),) = found["runs"].items()
    trained = {"base", "adapt-frozen-6", "random", *["simclr"] * there}
    assert name == "flowers5-0.001-1"
    assert set(one["arms"]) == trained
    assert set(one["results"]) == trained | {"base (ema)", "base (share-0.25)", "base (share-0.5)"}
    assert set(one["results"]["random"]) == set(found["start"]["results"]) == {"caltech101", "flowers5", "cifar10"}
    assert set(one["results"]["base"]) == {"flowers5"}
    assert set(one["results"]["adapt-frozen-6"]) == {"flowers5"}
    cosines = {name: sets["flowers5"]["cosine"] for name, sets in one["results"].items()}
    assert cosines["random"] < cosines["base"] <= cosines["base (share-0.5)"] <= 1
    assert found["start"]["results"]["flowers5"]["cosine"] == 1
    assert all(name in table for name in one["results"])
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/*/encoder-*.json")}
    assert table.endswith(run(adapt, *evaluate))
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/*/encoder-*.json")} == before, "measured again"


def test_the_arms_of_adapt_change_what_they_say(script: Script) -> None:
    adapt = script("adapt")
    start = adapt.Start.open(DEFAULT)
    recipes = {name: adapt.recipe_of(name, "cifar10", 0, start, trial=False) for name in adapt.ARMS}
    base = vars(recipes["base"])
    for name, recipe in recipes.items():
        changed = {key for key, value in vars(recipe).items() if value != base[key]}
        changes = adapt.ARMS[name].changes
        assert changed - {"name"} == {key for key, value in changes.items() if value != base[key]}, name
        assert all(getattr(recipe, key) == value for key, value in changes.items()), name
    assert (recipes["base"].kept, recipes["mask-0.5"].kept, recipes["mask-0.8"].kept) == (15, 24, 9)
    defaults = choose(start, 5_000).recipe  # what an arm that is called adapt must be
    for key in adapt.ARMS["adapt"].changes:
        assert getattr(recipes["adapt"], key) == getattr(defaults, key), key
    begun = start.encoder.model.state_dict()
    moved = {key: value + 1 for key, value in begun.items()}
    mixed = start.mixed(moved, 0.25)
    assert all(torch.allclose(value, begun[key] + 0.75, atol=1e-5) for key, value in mixed.items())


@pytest.mark.slow  # eight runs of extract, a Ray cluster for one of them: two minutes
def test_same_parts(script: Script, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--images", 40, "--shard-rows", 4, "--kills", 1, "--longest", 3]
    said = run(script("same_parts"), image_folder(40), *options, "--out", tmp_path / "record.json")
    same = record_of(tmp_path / "record.json")["same_bytes_as_one_process"]
    assert all(same.values()), same
    assert ("ray, two actors" in same) == ("ray, two actors: left out" not in said) == bool(find_spec("ray"))
    assert {"one process", "two processes", "killed"} <= set(same)


def gpu_session(script: Script, tmp_path: Path, seconds: float) -> Any:
    """A session of benchmarks/gpu.py, before its first job."""
    return script("gpu").Session(tmp_path / "out", tmp_path / "work", seconds, True, {"seconds": {}})


def test_a_gpu_job_that_fails_or_is_late_is_noted_and_the_next_runs(script: Script, tmp_path: Path) -> None:
    session = gpu_session(script, tmp_path, 60)
    session.job("wrong", 20, lambda limit: session.run(["-c", "raise SystemExit('no such card')"], limit))
    session.job("late", 6, lambda limit: session.run(["-c", "import time; time.sleep(60)"], 0.2))
    session.job("right", 20, lambda limit: session.run(["-c", "print(3)"], limit))
    session.job("none", 1, lambda limit: "never")
    told = json.loads((tmp_path / "out" / "session.json").read_text())
    assert "no such card" in told["wrong"]
    assert "Stopped" in told["late"]
    assert told["right"] == "3\n"
    assert "no time" in told["none"]


def test_gpu_jobs_need_no_install(script: Script, tmp_path: Path) -> None:
    session = gpu_session(script, tmp_path, 60)
    code = "import micl_zoo.training, micl_zoo.export; print(micl_zoo.training.__file__)"
    home = session.run(["-S", "-c", code], 30)
    assert Path(home.strip()).resolve() == BENCHMARKS.parent / "training" / "__init__.py"
    assert home.startswith(str(tmp_path))


def test_pieces_of_an_encoder_are_joined(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder_folder: Path
) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "PIECE_BYTES", 40_000)
    session = gpu_session(script, tmp_path, 60)
    run_folder = tmp_path / "work" / "run"
    run_folder.mkdir()
    (run_folder / "run.json").write_text("{}")
    (run_folder / "encoder").symlink_to(encoder_folder)
    session.job("encoder", 30, lambda limit: gpu.hand_over(session, limit))
    run(gpu, "join", tmp_path / "out", tmp_path / "joined" / "model.safetensors")
    whole = (encoder_folder / "model.safetensors").read_bytes()
    assert session.results["encoder"]["pieces"] == -(-len(whole) // 40_000) > 2
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == whole
    assert micl_zoo.load(weights=tmp_path / "joined").embed_dim == 32
    (tmp_path / "out" / "weights.01").unlink()
    result = CliRunner().invoke(gpu.main, ["join", str(tmp_path / "out"), str(tmp_path / "again")])
    assert result.exit_code == 1
    assert "fetch all" in result.output


@pytest.mark.slow  # eight processes that import torch, and the compiler: two minutes
def test_gpu_first_rehearsed(tmp_path: Path) -> None:
    told = rehearsed(tmp_path, "first", 600)
    assert told["card"]["commit"] == "0" * 40
    assert told["attention"]["toy: default"] > 0
    assert "skipped" in told["tests"] or "passed" in told["tests"]
    for recipe in ("vit_b16.in1k", "vit_l16.in1k", "vit_s16.tin200"):
        assert told[f"step {recipe}"]["ratio"] > 0
    assert set(told["extract"]) == {"extract auto", "model fp32"}


@pytest.mark.slow  # two runs, of which the second lasts for as long as it is given
@pytest.mark.parametrize("stopped", [False, True])
def test_gpu_train_rehearsed(script: Script, tmp_path: Path, stopped: bool) -> None:
    for number in range(2):
        parquet(tmp_path / "data" / f"train-{number:03d}.parquet", 64, 4, first=64 * number)
    told = rehearsed(tmp_path, "train", 120, *["--set", "epochs=100000"] * stopped, "--data", str(tmp_path / "data"))
    assert told["train"].get("finished", False) != stopped
    run(script("gpu"), "join", tmp_path / "out", tmp_path / "encoder" / "model.safetensors")
    assert micl_zoo.load(weights=tmp_path / "encoder").embed([picture(0)]).shape == (1, 32)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["commit"] == "0" * 40
    assert len(list((tmp_path / "out").iterdir())) <= 8


def rehearsed(tmp_path: Path, what: str, seconds: int, *more: str) -> dict[str, Any]:
    """session.json of a command of benchmarks/gpu.py with --trial."""
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--commit", "0" * 40]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), what, *folders, "--seconds", str(seconds), "--trial", *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told: dict[str, Any] = json.loads((tmp_path / "out" / "session.json").read_text())
    return told
