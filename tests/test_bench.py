"""`micl-zoo bench`: the numbers it prints fit together."""

from __future__ import annotations

import json
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
