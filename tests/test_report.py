"""The page of a run, the picture of the views, and the trackers: all of a run folder made up here."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture
from damaged import complaint, wrecks
from PIL import Image

from micl_zoo.cli import main
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.training.micl import draw_views, gather_patches
from micl_zoo.training.pretraining import report
from micl_zoo.training.pretraining.report import CHART_POINTS, _read_history, _smooth, _thin, write_report
from micl_zoo.training.pretraining.views import GROUND, HIDDEN, PICTURE_GAP, views_picture
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.trackers import open_trackers, scalars, wandb_id

CHARTS = ("loss", "accuracy", "knn", "lr", "rate", "wait")


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    numbers = {"epoch": step / 10, "loss": 2 - step / 100, "accuracy": step / 200, "lr": 1e-3 * step}
    return {"step": step, **numbers, "images_per_second": 1000.0, "data_wait": 0.25, "seconds": step * 36.0, **changes}


def record(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(recipe),
        "data": {"source": "photos/ & <more>", "images": 83, "fingerprint": "f" * 64},
        "command": "micl-zoo train vit_ti16.tin200 --data photos/",
        "commit": "0123456789",
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "machine": {"device": "cuda", "card": "a card"},
        "started": "2026-11-24T10:22:01+00:00",
        **changes,
    }


def write_run(folder: Path, made: dict[str, Any], lines: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(made))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def finished_run(folder: Path, recipe: Recipe) -> Path:
    made = record(recipe, result={"steps": 40, "images_seen": 320, "hours": 0.39, "precision": "bf16"})
    made["data"]["refused"] = [["a<b>.jpg", "damaged", "cut off"]]
    lines: list[dict[str, Any]] = [step_line(step) for step in range(40)]
    lines[20:20] = [{"step": 20, "event": "resumed", "detail": "from a checkpoint"}]
    for step, share in ((9, 0.10), (19, 0.30), (39, 0.20)):
        lines.append({"step": step, "epoch": step / 10, "knn": {"caltech101": share, "$x$": 0.5}, "seconds": 1.0})
    run = write_run(folder, made, lines, end='{"step": 40, "lo')
    Image.new("RGB", (20, 10), (1, 2, 3)).save(run / "views.png")
    return run


def words(page: Path) -> str:
    """What a person reads: no tags, no embedded pictures."""
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def test_the_page_holds_the_run(tmp_path: Path, twin: Recipe) -> None:
    run = finished_run(tmp_path / "run", twin)
    page = write_report(run)
    assert page == run / "report.html"
    text = words(page)
    for said in (
        "A finished run of 40 steps of pre-training.",
        "photos/ &amp; &lt;more&gt;, 83 images",
        "0123456789",
        "device cuda, card a card",
        "2026-11-24 10:22:01 UTC",
        "images seen 320",
        "epochs 4 of 4",
        "0.390",
        "loss, last 100 steps 1.8050",  # the mean of 2 - step / 100 over 0..39
        "accuracy, last 100 steps 9.75 %",
        "waiting for data, mean 25.0 %",
        "caltech101 3 30.0 % at step 19 20.0 % at step 39",
        "resumed at step 20",
        "20 resumed from a checkpoint",
        "a&lt;b&gt;.jpg damaged cut off",
        "mask_ratio 0.5",
        "4 of its 16 patches each",
    ):
        assert said in text, said
    assert "damaged lines" not in text
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|srcset|href)=\"(?!data:image/png;base64,)", html)  # nothing is fetched
    assert "http" not in html


def test_every_picture_is_in_the_page_and_a_file(tmp_path: Path, twin: Recipe) -> None:
    page = write_report(finished_run(tmp_path / "run", twin))
    embedded = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text(encoding="utf-8"))
    pictures = [base64.b64decode(text) for text in embedded]
    assert len(pictures) == 2 * len(CHARTS) + 1  # each chart for a light and a dark page
    for name in (*CHARTS, "views"):
        file = tmp_path / "run" / "report" / f"{name}.png"
        assert file.read_bytes() in pictures, name
        with Image.open(file) as opened:
            opened.load()
            assert opened.width > 10
    corners = [Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0)) for png in pictures[:-1]]
    assert corners == [(27, 30, 35), (255, 255, 255)] * len(CHARTS)  # the dark one is named first


def test_only_a_picture_of_the_run_itself_gets_into_the_page(tmp_path: Path, twin: Recipe) -> None:
    run, secret = finished_run(tmp_path / "run", twin), tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    made = [lambda file: file.symlink_to(secret), lambda file: file.write_bytes(b"root:x:0:0"), os.mkfifo, Path.mkdir]
    for make in made:
        (run / "views.png").unlink(missing_ok=True)
        make(run / "views.png")  # type: ignore[operator]
        assert "has no views.png that is a PNG" in words(write_report(run))
    assert not (run / "report" / "views.png").exists()


def test_k_nn_of_more_sets_than_a_run_has_is_counted_as_damage(tmp_path: Path, twin: Recipe) -> None:
    run = write_run(tmp_path / "run", record(twin), [step_line(0)])
    lines = [
        {"step": 1, "knn": dict.fromkeys(map(str, range(3000)), 0.5)},
        {"step": 2, "knn": {"a": 0.5}},
        step_line(3),
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    found = _read_history(run / "metrics.jsonl")
    assert (list(found.knn), found.unread) == (["a"], 1)


@pytest.mark.parametrize("settings", ["savefig.format: \xff", "backend: nonsense"])
def test_a_damaged_setting_of_matplotlib_is_said(tmp_path: Path, twin: Recipe, settings: str) -> None:
    (tmp_path / "matplotlibrc").write_bytes(settings.encode("latin-1"))
    run = finished_run(tmp_path / "run", twin)
    made = subprocess.run(
        [sys.executable, "-m", "micl_zoo", "report", run], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in made.stderr
    assert made.returncode == 0 or "is there a matplotlibrc, or MPLBACKEND?" in made.stderr


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path, twin: Recipe) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(record(twin)))
    text = words(write_report(run))
    for said in (
        "not finished: 0 of about 40 steps",
        "no loss was measured",
        "no accuracy was measured",
        "no k-NN was measured",
        "no learning rate was recorded",
        "no speed was measured",
        "no waiting for data was measured",
        "no picture of the views was saved",
        "none: no resume",
        "resumed never",
        "not known yet",
        "hours not measured",
    ):
        assert said in text, said
    assert not (run / "report").exists()


def test_an_old_record_and_old_lines(tmp_path: Path, twin: Recipe) -> None:
    made = record(twin, resumed=[{"started": "2026-11-25T00:00:00+00:00", "commit": None, "machine": {}}])
    del made["recipe"]["contrast_batch"], made["versions"]
    made["recipe"]["gone"] = 1
    line = step_line(0)
    del line["data_wait"]
    text = words(write_report(write_run(tmp_path / "run", made, [line])))
    assert "not finished: 1 of about 40 steps" in text
    assert "no waiting for data was measured" in text
    assert "versions not recorded" in text
    assert "resumed 2026-11-25 00:00:00 UTC with commit None" in text
    assert (tmp_path / "run" / "report" / "loss.png").exists()


def test_damaged_lines_are_counted_and_a_cut_off_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps(step_line(step)) for step in range(3)]
    file.write_text("\n".join([good[0], "{broken", "[]", '{"loss": 1}', good[1], good[2], '{"step": 3, "loss": 2']))
    history = _read_history(file)
    assert history.columns["step"].tolist() == [0, 1, 2]
    assert history.unread == 3
    assert math.isnan(_read_history(tmp_path / "none").last("loss"))


def test_a_step_taken_again_counts_once_and_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [step_line(0), step_line(1, loss=9.0), step_line(2, loss=math.nan), step_line(1, loss=1.0, lr=None)]
    lines.append({"step": 2, "knn": {"a": None, "b": 0.5, "c": math.nan}})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = _read_history(file)
    assert history.columns["step"].tolist() == [0, 1, 2]
    assert history.last("loss") == 1.0
    assert history.final("loss") == 1.5
    assert history.knn == {"b": [(2, 0.5)]}


def test_curves_are_thinned_by_means_and_smoothed_without_a_shift() -> None:
    values = np.arange(10 * CHART_POINTS, dtype=float)
    np.testing.assert_allclose(_thin(values), values.reshape(-1, 10).mean(1))
    odd = np.random.default_rng(0).random(CHART_POINTS + 7)
    edges = [len(odd) * part // CHART_POINTS for part in range(CHART_POINTS + 1)]
    np.testing.assert_allclose(_thin(odd), [odd[a:b].mean() for a, b in pairwise(edges)])
    smooth = _smooth(odd[:200])  # 200 // 40 = 5 points around each
    np.testing.assert_allclose(smooth, [odd[max(0, i - 2) : min(200, i + 3)].mean() for i in range(200)])
    assert _smooth(odd[:3]).tolist() == odd[:3].tolist()


@pytest.mark.parametrize("lines", [60_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_long_run_has_a_small_page(tmp_path: Path, twin: Recipe, lines: int) -> None:
    run = write_run(tmp_path / "run", record(twin), [])
    block = [json.dumps(step_line(step % 100)).partition(",")[2] for step in range(100)]
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step},{block[step % 100]}\n' for step in range(lines))
    assert (run / "metrics.jsonl").stat().st_size > 4_000_000
    page = write_report(run)
    assert page.stat().st_size < 4_000_000
    assert f"{lines:,} of about" in words(page)


def test_what_is_no_run_is_said(tmp_path: Path, twin: Recipe) -> None:
    run = finished_run(tmp_path / "runs" / "first", twin)
    with pytest.raises(TrainingError, match=r"nowhere' does not exist\. Give the folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=r"has no run\.json\. It holds these runs: .*first"):
        write_report(tmp_path / "runs")
    with pytest.raises(TrainingError, match="is a file"):
        write_report(run / "run.json")
    with pytest.raises(UsageError, match=r"must end in \.html"):
        write_report(run, tmp_path / "page.pdf")
    for text in ("{", "[]", '{"recipe": {}}'):
        (run / "run.json").write_text(text)
        with pytest.raises(TrainingError, match=r"run\.json.*(damaged|is not what a run)"):
            write_report(run)


def test_without_matplotlib_the_line_to_install_it(
    tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=re.escape('pip install "micl-zoo[train]"')):
        write_report(finished_run(tmp_path / "run", twin))


def test_the_command_says_where_the_page_is(tmp_path: Path, twin: Recipe) -> None:
    run = finished_run(tmp_path / "first", twin)
    result = CliRunner().invoke(main, ["report", str(run), "-o", str(tmp_path / "first.html")])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'first.html'}, its pictures are in {tmp_path / 'first-report'}." in result.output
    assert (tmp_path / "first-report" / "loss.png").exists()
    assert not (run / "loss.png").exists()
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: no run to report on")


@pytest.mark.parametrize(("count", "rows"), [(1, 2), (3, 3), (10, 2)])
def test_the_picture_has_every_patch_in_its_place(twin: Recipe, count: int, rows: int) -> None:
    twin = dataclasses.replace(twin, views=rows)
    side, grid = twin.patch_size, twin.crop_size // twin.patch_size
    images = [np.array(picture(seed, twin.crop_size, twin.crop_size)) for seed in range(count)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (twin.pixel_mean, twin.pixel_std))
    noise = torch.rand(count, grid * grid, generator=torch.Generator().manual_seed(1))
    views = draw_views(noise, twin.mask_ratio, rows)
    sheet = np.array(views_picture(gather_patches((pixels - mean) / std, views, side), views, twin))

    enlarge = 112 // twin.crop_size
    tile, gap, shown = enlarge * twin.crop_size, PICTURE_GAP, min(count, 8)
    assert sheet.shape == (rows * (tile + gap) + gap, shown * (tile + gap) + gap, 3)
    expected = np.full_like(sheet, GROUND)
    for number in range(shown):
        for view in range(rows):
            whole = np.full_like(images[number], HIDDEN)
            for cell in views[number, view].tolist():
                down, across = cell // grid * side, cell % grid * side
                here = np.s_[down : down + side, across : across + side]
                whole[here] = images[number][here]
            top, left = gap + view * (tile + gap), gap + number * (tile + gap)
            expected[top : top + tile, left : left + tile] = whole.repeat(enlarge, 0).repeat(enlarge, 1)
    np.testing.assert_array_equal(sheet, expected)


def test_the_picture_clips_colours_and_takes_half_precision(twin: Recipe) -> None:
    views = torch.tensor([[[0], [15]]])
    numbers = 3 * twin.patch_size**2
    patches = torch.stack([torch.full((1, numbers), 9.0), torch.full((1, numbers), -9.0)])[None]
    sheet = np.array(views_picture(patches.bfloat16().requires_grad_(), views, twin))
    assert sheet[PICTURE_GAP, PICTURE_GAP].tolist() == [255] * 3
    assert sheet[-PICTURE_GAP - 1, -PICTURE_GAP - 1].tolist() == [0] * 3


def test_scalars_have_plain_names() -> None:
    assert scalars({"step": 3, "loss": 1.5, "lr": None, "name": "x"}) == {"train/loss": 1.5}
    assert scalars({"step": 3, "epoch": 1.0, "knn": {"a": 0.5}, "seconds": 2.0}) == {"knn/a": 0.5}
    assert scalars({"step": 3, "event": "resumed", "detail": "x"}) == {}


def test_tensorboard_can_be_read_back_and_a_resume_replaces_what_came_later(tmp_path: Path, twin: Recipe) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = open_trackers(tmp_path, record(twin), 0)
    assert len(first) == 1
    first[0].log([step_line(step) for step in range(10)])
    first[0].close()
    (second,) = open_trackers(tmp_path, record(twin), 6)
    second.log([{"step": 6, "event": "resumed", "detail": "from a checkpoint"}])
    second.log([step_line(step, loss=5.0) for step in range(6, 8)])
    second.log([{"step": 7, "epoch": 1.0, "knn": {"caltech101": 0.25}, "seconds": 1.0}])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # before close: already on disk
    loss = [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]
    assert loss == [(step, 2 - step / 100) for step in range(6)] + [(6, 5.0), (7, 5.0)]
    assert [event.value for event in events.Scalars("knn/caltech101")] == [0.25]
    assert {"train/accuracy", "train/lr", "train/data_wait"} <= set(events.Tags()["scalars"])
    assert b"resumed: from a checkpoint" in events.Tensors("events/text_summary")[0].tensor_proto.string_val[0]
    second.close()


def test_without_tensorboard_nothing_is_tracked(tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_trackers(tmp_path, record(twin), 0) == []
    assert not (tmp_path / "tensorboard").exists()


def test_without_wandb_the_line_to_install_it(tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="'zoo': pip install wandb"):
        open_trackers(tmp_path, record(twin), 0, wandb_project="zoo")
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_gets_the_run_by_one_id(tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    asked: dict[str, Any] = {}
    there = SimpleNamespace(log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: logged.append({}))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **words: asked.update(words) or there))
    made = record(twin)
    (tracker,) = open_trackers(tmp_path, made, 0, wandb_project="zoo")
    tracker.log([{"step": 1, "loss": 2.0}, {"step": 1, "event": "resumed", "detail": ""}, {"step": 2, "knn": {"a": 1}}])
    tracker.close()
    assert asked["project"] == "zoo"
    assert asked["resume"] == "allow"
    assert asked["id"] == wandb_id(json.loads(json.dumps(made)))
    assert len(asked["id"]) == 16
    assert wandb_id({**made, "started": "another time"}) != asked["id"]
    assert logged == [{"step": 1, "train/loss": 2.0}, {"step": 2, "knn/a": 1}, {}]


def test_a_strange_record_or_line_is_an_error_of_our_own(
    tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_draw", lambda *_: None)
    run = finished_run(tmp_path / "run", twin)
    made = json.loads((run / "run.json").read_text()) | {"resumed": [{"started": "x", "machine": {"device": "cpu"}}]}
    for what, other in list(wrecks(made, spare="recipe"))[::3]:
        (run / "run.json").write_text(json.dumps(other))
        said = complaint(what, lambda: write_report(run))
        assert not said or "run.json" in said, what
    (run / "run.json").write_text(json.dumps(made))
    lines = [json.dumps(other) for line in (step_line(3), {"step": 3, "knn": {"a": 0.5}}) for _, other in wrecks(line)]
    lines += [json.dumps(other) for _, other in wrecks({"step": 3, "event": "resumed", "detail": "x"})]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    write_report(run)
