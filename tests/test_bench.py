"""The measuring commands measure: their numbers fit together, and both ways of a step compute the same loss."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TWIN

from micl_zoo.cli import main
from micl_zoo.training.pretraining.bench import bench_data, bench_step, matrix_rate
from micl_zoo.training.pretraining.plan import step_flops
from micl_zoo.training.recipes import get_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECIPE = "vit_ti16.tin200"


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_step_rates_fit_together(cache: str) -> None:
    found = bench_step(RECIPE, overrides=[*TWIN, f"cache={cache}"], seconds=1, device="cpu")
    flops = step_flops(get_recipe(RECIPE, TWIN)).total
    assert found.batch_size == 8
    assert found.images_per_second > 0
    assert found.model_tflops == pytest.approx(found.images_per_second * flops / 1e12, rel=0.02, abs=1e-4)
    assert 0 < found.share < 1
    assert 0 <= found.data_wait < 1
    assert found.peak_memory_gib > 0.05
    assert "images/s" in found.text()


def test_data_rates_fit_together(image_folder: Callable[..., Path]) -> None:
    options = [*TWIN, "cache=none"]
    found = bench_data(RECIPE, [str(image_folder(16))], overrides=options, workers=1, seconds=1, wanted=10_000)
    assert (found.images, found.workers) == (16, 1)
    assert found.alone > 0
    assert found.cores_wanted == pytest.approx(10_000 / found.together, rel=0.1, abs=1)
    assert "10,000 images/s" in found.text()


def test_the_matrix_rate_is_that_of_a_plain_product() -> None:
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32, seconds=0.5) < 1e14


def test_the_commands_print_json(image_folder: Callable[..., Path]) -> None:
    sets = [word for change in TWIN for word in ("--set", change)]
    step = ["bench", "step", RECIPE, *sets, "--seconds", "1", "--device", "cpu", "--json"]
    data = [
        "bench",
        "data",
        RECIPE,
        *sets,
        "--data",
        str(image_folder(8)),
        "--seconds",
        "1",
        "--workers",
        "1",
        "--json",
    ]
    for command, key in ((step, "share"), (data, "cores_wanted")):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)[key] > 0


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the installed package has no benchmarks beside its tests")
def test_both_ways_of_a_step_have_the_same_loss(tmp_path: Path) -> None:
    sets = [word for change in TWIN for word in ("--set", change)]
    record = tmp_path / "step.json"
    options = [RECIPE, *sets, "--batch-size", "8", "--rounds", "2", "--device", "cpu", "-o", str(record)]
    subprocess.run([sys.executable, str(BENCHMARKS / "step.py"), *options], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(record.read_text())
    assert found["first_loss"]["ours"] == pytest.approx(found["first_loss"]["straightforward"], abs=1e-5)
    rates = found["images_per_second"]
    assert found["ratio"] == pytest.approx(rates["ours"] / rates["straightforward"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the installed package has no benchmarks beside its tests")
def test_extract_beside_a_plain_loop(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "extract.json"
    options = ["--images", "9", "--batch-size", "2", "--weights", str(encoder_folder), "--device", "cpu"]
    options += ["--only", "extract fp32", "--only", "plain fp32", "--only", "lightly-train fp32", "--out", str(record)]
    command = [sys.executable, str(BENCHMARKS / "extract.py"), str(image_folder(4)), *options]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(record.read_text())
    assert set(found["figures"]) == {"extract fp32", "plain fp32"}
    plain, ours = found["figures"]["plain fp32"], found["figures"]["extract fp32"]
    assert plain["ratio_to_plain_fp32"] == 1
    assert ours["ratio_to_plain_fp32"] == pytest.approx(
        ours["images_per_second"] / plain["images_per_second"], rel=0.01, abs=0.001
    )
    assert 0 < plain["start_up_seconds"] < plain["wall_seconds"]
    assert found["skipped"] == {"lightly-train fp32": "no environment with lightly-train was given: --lightly-python"}
    assert "lightly-train fp32: left out" in table
    assert "extract fp32 over its model alone: None, at least 0.9 not measured" in table


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the installed package has no benchmarks beside its tests")
def test_the_goals_of_extract_are_judged_by_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("extract")
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
    if Path("/proc/self/smaps_rollup").exists():
        assert 50e6 < found.tree_bytes(os.getpid()) < 50e9
    assert found.last_json('a bar\n{"images": 3}') == {"images": 3}
    assert found.last_json("12 images embedded") == {}
