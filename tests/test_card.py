"""A model card says what its records say, and nothing where there is none."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from damaged import complaint, wrecks

from micl_zoo.cli import main
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.files import file_sha256
from micl_zoo.training.corpora import CORPORA
from micl_zoo.training.evaluation.protocols import METHODS, Method
from micl_zoo.training.evaluation.tables import merge
from micl_zoo.training.recipes import Recipe, vit_ti16_tin200
from micl_zoo.training.release import card, trained
from micl_zoo.zoo.ours import RECORDS

NAME = "vit_ti16.tin200"
MADE = {
    "date": "2031-02-03",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "machine": {"device": "cpu", "processor": "Abacus", "cores": 3},
    "versions": {"torch": "9.8.7"},
}


def run_json(recipe: Recipe, images: int = 100_000) -> dict[str, Any]:
    """As a finished run leaves it."""
    return {
        "recipe": dataclasses.asdict(recipe) | {"a_newer_setting": 17},
        "data": {"source": "there/*.parquet", "images": images, "fingerprint": "f" * 64, "refused": [["x", "y", "z"]]},
        "command": "micl-zoo train it",
        **{key: MADE[key] for key in ("commit", "versions", "machine")},
        "started": "2031-01-02T03:04:05+00:00",
        "result": {"steps": 700, "images_seen": 358_400, "hours": 2.5, "precision": "bf16"},
    }


def line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "loss": 5 - step / 100, "accuracy": 0.125, "lr": 0.1, "seconds": step}


def figures(base: float, pools: tuple[str, ...] = ("cls", "mean")) -> dict[str, Any]:
    """Of one subject on one set; every number of its own."""
    spread = {"low": base - 1.5, "high": base + 2.5}
    return {
        "knn": {str(k): {"accuracy": base + k / 100, **spread} for k in (10, 20, 100, 200)},
        "linear": {
            pool: {"accuracy": base + 3 + n, **spread, "lr": 0.02, "validation": 50 - n} for n, pool in enumerate(pools)
        },
        "logreg": {pool: {"accuracy": base + 5, **spread, "C": 0.0316, "validation": 44.0} for pool in pools},
        "few-shot": {
            "5": {"accuracy": base - 9, "spread": 1.23, "draws": [1.0, 2.0]},
            "10": {"left_out": "a class has 7 training images"},
        },
    }


def evaluation(sha256: str, name: str = NAME, sets: tuple[str, ...] = ("tin200", "caltech101")) -> dict[str, Any]:
    """As `micl-zoo eval all --baseline random --baseline pixels` writes it."""
    known = {"tin200": "other than the known set: test 9, not 5000", "caltech101": "the known set of this name"}
    subjects = {name: (60.0, ("cls", "mean")), "random": (20.0, ("cls", "mean")), "pixels": (30.0, ("pixels",))}
    return {
        "encoder": {"name": name, "weights_sha256": sha256, "precision": "fp32"},
        "results": {
            subject: {one: figures(base + 2 * n, pools) for n, one in enumerate(sets)}
            for subject, (base, pools) in subjects.items()
        },
        "protocol": {
            "methods": ["knn", "linear", "logreg", "few-shot"], "pools": ["cls", "mean"], "ks": [10, 20, 100, 200],
            "temperature": 0.07, "learning_rates": [0.1, 0.02], "epochs": 21, "inverse_penalties": [1.0, 2.0, 3.0],
            "shots": [5, 10], "draws": 2, "few_shot_c": 0.1, "seed": 0,
        },
        "data": {
            one: {
                "source": one, "classes": 11, "train_images": 1_234, "train_images_there": 3_000,
                "test_images": 567, "test_images_there": 567, "train_fingerprint": f"a{one}",
                "test_fingerprint": f"b{one}", "known": known[one], "refused": 4,
            }
            for one in sets
        },
        "command": "micl-zoo eval all it",
        **MADE,
    }  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of records: that of the training, and any others by their names."""

    def make(**others: dict[str, Any]) -> Path:
        folder, entry = tmp_path / "records", RECORDS[NAME]
        folder.mkdir(exist_ok=True)
        weights = {"sha256": entry.sha256, "bytes": entry.bytes}
        recipe = dataclasses.replace(vit_ti16_tin200(), epochs=12)
        training = {"weights": weights, "run": run_json(recipe), "curve": [line(0), line(101)]}
        for name, record in {NAME: training, **others}.items():
            (folder / f"{name.replace('__', '.').replace('NAME', NAME)}.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture
def run(tmp_path: Path, twin: Recipe, encoder_folder: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "run"
    shutil.copytree(encoder_folder, folder / "encoder")
    (folder / "run.json").write_text(json.dumps(run_json(twin, images=77)))
    lines = [*map(line, range(120)), {"step": 120, "knn": {"flowers5": 0.5}}, {"step": 3, "event": "saved"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def published(folder: Path, *, hub: bool = False) -> str:
    return card.one_card(trained.published(NAME, folder), hub=hub)


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def table_cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, ["card", *map(str, words)])


def test_what_no_record_says_is_not_measured(records: Callable[..., Path]) -> None:
    text = published(records())
    for title in ("Evaluation", "Fine-tuning"):
        assert section(text, title).strip().startswith("Not measured."), title
    assert "What precisions lose: not measured." in section(text, "As ONNX")
    assert "other methods" not in text
    assert f"`micl-zoo eval all {NAME} --data SET --baseline random --baseline pixels -o FILE`" in text


def test_details_and_training_are_the_run_s(records: Callable[..., Path]) -> None:
    text = published(records())
    entry = RECORDS[NAME]
    assert f"`{entry.sha256}`" in section(text, "Details")
    assert f"{entry.bytes:,} bytes" in section(text, "Details")
    assert "192 wide, 12 blocks, 3 heads" in section(text, "Details")
    training = section(text, "Training")
    said = (
        "700 steps of 512 images = 358,400 images seen, 12 epochs", "0.001 x 512 / 256 = 0.002",
        "3 of 5 patches each, disjoint, out of 49", "bf16 autocast", "a_newer_setting=17",
        "one of the machine's two cores", "loss was 3.99", "accuracy 12.5 % among 512",
    )  # fmt: skip
    assert not [words for words in said if words not in training]
    assert "100,000 images were used; 1 of them could not be decoded" in section(text, "Data and terms").replace(
        "\n", " "
    )


def test_a_card_needs_no_torch() -> None:
    run = "main(['card'], standalone_mode=False); assert 'torch' not in sys.modules"
    code = f"import sys; from micl_zoo.cli import main; {run}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_energy_shows_its_arithmetic(records: Callable[..., Path]) -> None:
    whole = trained.published(NAME, records())
    watts = card.CORE_WATTS
    assert f"2.5 h x 3 cores x {watts} W = {2.5 * 3 * watts:.0f} Wh; the watts are assumed" in card.one_card(whole)
    run = copy.deepcopy(whole.record)
    run["run"]["machine"] |= {"threads": 1}
    assert "2.5 h x 1 core = 2.5 core hours" in card.one_card(dataclasses.replace(whole, record=run))
    run["run"]["machine"] |= {"card": "NVIDIA H100 80GB HBM3", "card_memory_gib": 79.1}
    run["run"]["processes"] = 4
    text = card.one_card(dataclasses.replace(whole, record=run))
    assert "2.5 h x 4 GPUs = 10 GPU hours" in text
    assert f"2.5 h x 4 GPUs x 700 W = {2.5 * 4 * 700 / 1000:.1f} kWh" in text
    run["run"]["machine"]["card"] = "Another"
    assert "no watts to assume for Another" in card.one_card(dataclasses.replace(whole, record=run))


def test_figures_are_those_of_the_record(records: Callable[..., Path]) -> None:
    sha256 = RECORDS[NAME].sha256 or ""
    text = section(published(records(NAME__eval=evaluation(sha256))), "Evaluation")
    cells = table_cells(text)
    neighbours = [f"{60 + k / 100:.1f} ± 2.0" for k in (10, 20, 100, 200)]
    assert ["tin200", NAME, *neighbours, "63.0 ± 2.0", "65.0 ± 2.0", "51.0 ± 1.2"] in cells  # pool cls was chosen
    assert [
        "caltech101",
        "linear",
        "65.0 (60.5 to 64.5)",
        "0.02",
        "50.0",
        "66.0 (60.5 to 64.5)",
        "0.02",
        "49.0",
    ] in cells
    assert ["caltech101", "logreg", *["67.0 (60.5 to 64.5)", "0.032", "44.0"] * 2] in cells
    neighbours = [f"{32 + k / 100:.1f} ± 2.0" for k in (10, 20, 100, 200)]
    assert ["caltech101", "pixels", *neighbours, "35.0 ± 2.0", "37.0 ± 2.0", "23.0 ± 1.2"] in cells
    sets = ["1,234 of 3,000", "567", "4", "other than the known set: test 9, not 5000"]
    assert ["tin200", "11", *sets, CORPORA["tin200"].terms] in cells
    assert "- tin200, 10-shot: a class has 7 training images." in text
    assert "21 epochs at each of 2 learning rates" in text.replace("\n", " ")
    assert "tin200 is the validation part" in text.replace("\n", " ")


def test_a_new_method_has_its_rows(records: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("mine", "nowhere:mine", "mine, {}", (), "", (), "Mine: with seed {seed}.", glance="a")
    monkeypatch.setitem(METHODS, "mine", method)
    record = evaluation(RECORDS[NAME].sha256 or "")
    found = record["results"][NAME]["tin200"]
    found["mine"] = {key: {"accuracy": 5.0, "low": 4.0, "high": 6.0} for key in ("a", "b")}
    text = published(records(NAME__eval=record), hub=True)
    assert "Mine: with seed 0." in section(text, "Evaluation").replace("\n", " ")
    rows = [row for row in table_cells(text) if row[:2] == ["tin200", NAME]]
    assert [row[-2:] for row in rows] == [["5.0 ± 1.0", "5.0 ± 1.0"]]
    assert "mine, a, accuracy in percent" in text


def test_records_of_one_encoder_become_one(records: Callable[..., Path]) -> None:
    sha256 = RECORDS[NAME].sha256 or ""
    whole = evaluation(sha256)
    alone, beside = copy.deepcopy(whole), copy.deepcopy(whole)
    alone["results"] = {NAME: whole["results"][NAME]}
    beside["protocol"]["methods"], beside["protocol"]["ks"] = ["knn"], [20]
    for sets in beside["results"].values():
        for name, found in sets.items():
            sets[name] = {"knn": {"20": found["knn"]["20"]}}
    split = section(published(records(NAME__eval=alone, **{"NAME__eval-baselines": beside})), "Evaluation")
    assert split.count("| random ") == split.count("| pixels ") == 2  # sets
    beside["results"][NAME]["tin200"]["knn"]["20"]["accuracy"] += 0.1
    with pytest.raises(
        UsageError, match=r"b: results, vit_ti16.tin200, tin200, knn, 20, accuracy is 60.3.*60.2 in anot"
    ):
        merge({"a": alone, "b": beside})
    beside["data"]["tin200"]["test_fingerprint"] = "c"
    with pytest.raises(UsageError, match=r"b: data, tin200, test_fingerprint is 'c'.*must be of the same images"):
        merge({"a": alone, "b": beside})


def test_records_of_other_weights_are_refused(records: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=rf"is of other weights \(sha256 abc\) than {NAME} \({RECORDS[NAME].sha256}"):
        published(records(NAME__eval=evaluation("abc")))


def repetitions(**k_nn: float) -> dict[str, dict[str, Any]]:
    """Records of the recipe trained with other seeds, by the k-NN accuracy on tin200 that each is to have."""
    made: dict[str, dict[str, Any]] = {}
    for number, (seed, accuracy) in enumerate(k_nn.items(), start=1):
        recipe, weights = dataclasses.replace(vit_ti16_tin200(), epochs=12, seed=number), {"sha256": str(number) * 64}
        made[f"NAME__{seed}"] = {"weights": {**weights, "bytes": 7}, "run": run_json(recipe), "curve": [line(0)]}
        measured = evaluation(weights["sha256"])
        measured["results"][NAME]["tin200"]["knn"]["20"] = {"accuracy": accuracy, "low": 55.0, "high": 59.0}
        made[f"NAME__{seed}__eval"] = measured
    return made


def test_the_recipe_with_another_seed(records: Callable[..., Path]) -> None:
    ours = evaluation(RECORDS[NAME].sha256 or "")
    assert "With other seeds" not in published(records(NAME__eval=ours))
    text = published(records(NAME__eval=ours, **repetitions(seed1=57.0)))
    found = section(text, "With other seeds").replace("\n", " ")
    # all but k-NN on caltech101: the classifiers' figures here have odd intervals
    assert "5 of 6 figures of the repetitions lie outside" in found
    assert "a further run" not in found
    assert ["k-NN 20", "tin200", "60.2 (58.5 to 62.5)", "57.0, outside"] in table_cells(text)
    assert "one seed: for others, see below" in section(text, "Evaluation").replace("\n", " ")
    assert f"{NAME}.seed1.json" in section(text, "Reproduce")


def test_what_a_further_seed_may_give(records: Callable[..., Path]) -> None:
    ours = evaluation(RECORDS[NAME].sha256 or "")
    three = section(published(records(NAME__eval=ours, **repetitions(seed1=58.2, seed2=62.2))), "With other seeds")
    # deviation 2, Student's t of two degrees of freedom 4.303: 60.2 ± 4.303 * 2 * sqrt(4 / 3)
    whole = ["k-NN 20", "tin200", "60.2 (58.5 to 62.5)", "58.2, outside", "62.2", "60.2 ± 2.0", "50.3 to 70.1"]
    assert whole in table_cells(three)
    assert "of each run in turn" not in three  # of two others nothing is foretold
    seeds = repetitions(seed1=60.1, seed2=60.3, seed3=90.0)
    four = section(published(records(NAME__eval=ours, **seeds)), "With other seeds").replace("\n", " ")
    assert "holds for 23 of 24 figures" in four  # not for the fourth on tin200, which 60.1, 60.2, 60.3 do not foretell


def test_what_is_no_repetition_is_refused(records: Callable[..., Path]) -> None:
    ours = evaluation(RECORDS[NAME].sha256 or "")

    def refuse(match: str, **changed: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=match):
            published(records(NAME__eval=ours, **{**repetitions(seed1=57.0), **changed}))

    refuse(
        r"seed1.eval.json is of other weights \(sha256 abc\) than .*seed1.json \(1111",
        NAME__seed1__eval=evaluation("abc"),
    )
    recipe = dataclasses.replace(vit_ti16_tin200(), epochs=3, seed=1)
    other = repetitions(seed1=57.0)["NAME__seed1"] | {"run": run_json(recipe)}
    refuse(r"seed1.json is no repetition with another seed .epochs: 3 there", NAME__seed1=other)
    elsewhere = repetitions(seed1=57.0)["NAME__seed1__eval"]
    elsewhere["data"]["tin200"]["test_fingerprint"] = "other"
    refuse(
        r"seed1.eval.json: data, tin200, test_fingerprint is 'other'.*must be of the same", NAME__seed1__eval=elsewhere
    )


def test_fine_tuning_and_other_methods(records: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = RECORDS[NAME].sha256 or ""
    whole = evaluation(sha256)
    tuned = {
        "top1": {"accuracy": 71.25, "low": 68.0, "high": 74.11}, "test_images": 800,
        "data": whole["data"]["caltech101"],
        "encoder": {"encoder": NAME, "encoder_sha256": sha256}, "steps": 465, "hours": 0.31, **MADE,
        "recipe": {"name": "small", "epochs": 15, "batch_size": 64}, "command": "micl-zoo eval finetune it",
    }  # fmt: skip
    rivals = {
        "results": {"mae": whole["results"][NAME], "simclr": whole["results"]["random"]}, "data": whole["data"],
        "arms": {"mae": {
            "minutes": 60.04, "images_seen": 12_345, "images_per_second": 99.9, "clock": "processor",
            "settings": {
                "budget": {"minutes": 60.0, "images": None},
                "recipe": {"seed": 3, "crop_size": 64, "patch_size": 8, "depth": 4, "embed_dim": 192},
            },
            "trained": "masked pixels",
        }},
        "command": "python benchmarks/rivals.py it", **MADE,
    }  # fmt: skip
    mae = rivals["arms"]["mae"]
    ablations = rivals | {"arms": {"no-color": mae | {"clock": "wall", "machine": {"card": "a GPU"}}}}
    folder = records(**{"NAME__finetune-caltech101": tuned, "rivals": rivals, "ablations-seed3": ablations})
    text = published(folder)
    assert "| caltech101 | 71.2 (68.0 to 74.1) | -       | 1,234 of 3,000" in section(text, "Fine-tuning")
    assert "micl-zoo eval finetune it" in section(text, "Reproduce")
    page = card.ablations_page(folder)

    beside, changed = section(page, "MiCL beside other methods"), section(page, "MiCL with one thing changed")
    rows = {row[1]: [row[0], *row[2:8]] for row in table_cells(beside)}
    assert "`mae`: masked pixels. Networks: 4 blocks 192 wide on 64 patches." in beside
    assert "| 60 min of a GPU, 4 blocks, seed 3 | mae " in changed
    assert "`no-color`: masked pixels." in changed
    training = "60 min, 4 blocks, seed 3"
    assert rows["mae"] == [training, "60.0", "12,345", "100", "60.2 ± 2.0", "62.2 ± 2.0", "61.2"]
    assert rows["simclr"] == [training, "-", "-", "-", "20.2 ± 2.0", "22.2 ± 2.0", "21.2"]
    assert "`python benchmarks/rivals.py it`" in section(page, "Reproduce")
    file = folder / "page.md"
    file.write_text(page.replace("12,345", "12,346"), encoding="utf-8")
    monkeypatch.setattr(trained, "RECORDS_FOLDER", folder)
    assert f"micl-zoo card --ablations -o {file}" in invoke("--ablations", "--check", file).output
    waiting = card.repository_card(folder).partition("## Not published yet")[2]
    assert all((f"`{name}`" in waiting) != entry.published for name, entry in RECORDS.items())


def test_a_changed_number_is_found(
    records: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trained, "RECORDS_FOLDER", records())
    file = tmp_path / "CARD.md"
    mend = f"micl-zoo card -o {file}"
    missing = invoke("--check", file)
    assert missing.exit_code == 1
    assert f"does not exist. Write it by: {mend}" in missing.output
    assert invoke("-o", file).exit_code == 0
    assert file.read_text(encoding="utf-8") == invoke().output == card.repository_card()
    assert invoke("--check", file).output == f"{file} is what the records say.\n"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("358,400 images seen", "358,401 images seen"), encoding="utf-8")
    found = invoke("--check", file)
    number = next(n for n, words in enumerate(text.splitlines(), 1) if "358,400 images seen" in words)
    assert found.exit_code == 1
    assert f"is not what the records say, from line {number} on" in found.output
    assert found.output.strip().endswith(f"Write it anew by: {mend}")
    file.write_text(text + "more\n", encoding="utf-8")
    assert "'more'" in invoke("--check", file).output
    assert "no records of benchmarks/rivals.py" in invoke("--ablations").output
    assert invoke(NAME, "--ablations").exit_code == 2


def test_front_matter_is_what_the_hub_reads(records: Callable[..., Path]) -> None:
    text = published(records(NAME__eval=evaluation(RECORDS[NAME].sha256 or "")), hub=True)
    empty, head, body = text.split("---\n", 2)
    said = yaml.safe_load(head)
    assert (empty, said["license"], said["library_name"]) == ("", "apache-2.0", "timm")
    assert said["pipeline_tag"] == "image-feature-extraction"
    assert said["datasets"] == ["zh-plus/tiny-imagenet"]
    (model,) = said["model-index"]
    found = {(one["dataset"]["name"], m["name"]): m["value"] for one in model["results"] for m in one["metrics"]}
    assert found["tin200", "k-NN 20, accuracy in percent"] == 60.2
    assert found["caltech101", "linear, accuracy in percent"] == 65.0
    assert 'timm.create_model("hf-hub:OWNER/NAME", pretrained=True)' in body


def test_a_run_of_one_s_own(run: Path, tmp_path: Path) -> None:
    weights = run / "encoder" / "model.safetensors"
    record, out = tmp_path / "eval.json", tmp_path / "hub" / "README.md"
    record.write_text(json.dumps(evaluation(file_sha256(weights))))
    words = (run, "--eval", record, "--hub")
    assert invoke(*words, "-o", out).exit_code == 0
    text = out.read_text(encoding="utf-8")
    said = yaml.safe_load(text.split("---\n", 2)[1])
    assert said["license"] == "unknown"
    assert "datasets" not in said
    assert f"`{file_sha256(weights)}`" in section(text, "Details")
    assert section(text, "Intended uses").strip().startswith("To be said by whoever trained it")
    assert "77 images were used" in text
    assert "| 60.2 ± 2.0 |" in section(text, "Evaluation")
    plain = invoke(run).output
    assert f'micl_zoo.load(weights="{run.as_posix()}/encoder")' in plain
    assert section(plain, "Evaluation").strip().startswith("Not measured.")
    assert invoke(*words, "--check", out).exit_code == 0
    changed = invoke(run, "--check", out)
    assert changed.exit_code == 1
    assert f"micl-zoo card {run} -o {out}" in changed.output


def test_the_record_of_a_run(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert invoke(run, "--record", file).exit_code == 0
    record, weights = json.loads(file.read_text()), run / "encoder" / "model.safetensors"
    assert record["weights"] == {"sha256": file_sha256(weights), "bytes": weights.stat().st_size}
    assert record["run"] == json.loads((run / "run.json").read_text())
    assert [one["step"] for one in record["curve"]] == [0, 50, 100, 119]
    assert record["knn"] == [{"step": 120, "knn": {"flowers5": 0.5}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(51)))
    assert [one["step"] for one in trained.run_record(run)["curve"]] == [0, 50]


def test_facts_of_a_machine_that_are_null_are_not_recorded(run: Path) -> None:
    made = json.loads((run / "run.json").read_text())
    made["machine"] |= {"threads": None, "card": None, "card_memory_gib": None}
    (run / "run.json").write_text(json.dumps(made))
    assert "Abacus, 3 cores" in card.card(run)


def test_what_cannot_be_described(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"no run to describe: .* does not exist. Give the folder that `train --out` wrote"
    ):
        trained.of_run(tmp_path)
    made_by = json.loads((run / "run.json").read_text())
    result = made_by.pop("result")
    (run / "run.json").write_text(json.dumps(made_by))
    with pytest.raises(TrainingError, match="is not finished"):
        trained.of_run(run)
    (run / "metrics.jsonl").write_text('{"step": 0, "lo')
    (run / "run.json").write_text(json.dumps(made_by | {"result": result}))
    with pytest.raises(TrainingError, match=r"metrics.jsonl' has no whole line of a step"):
        trained.of_run(run)
    with pytest.raises(UsageError, match=r"no weights of vit_l16.in1k are published yet"):
        card.card("vit_l16")
    with pytest.raises(UsageError, match="--eval is for a run's folder"):
        card.card(NAME, [tmp_path / "x.json"])
    assert invoke("--hub").exit_code == invoke(NAME, "-o", "x", "--check", "y").exit_code == 2
    assert invoke(NAME, "--record", "x").exit_code == 1


def tuned(sha256: str) -> dict[str, Any]:
    """As `micl-zoo eval finetune` writes it, cut to what a card reads."""
    return {
        "top1": {"accuracy": 50.0, "low": 40.0, "high": 60.0},
        "test_images": 10, "test_refused": [["x", "y", "z"]], "train_refused": [], "classes": ["a", "b"],
        "data": {"source": "flowers5", "classes": 2, "train_images": 20, "train_images_there": 20, "test_images": 10},
        "encoder": {"encoder": NAME, "encoder_sha256": sha256},
        "recipe": {"name": "small", "epochs": 1, "batch_size": 4},
        "steps": 5, "hours": 0.1, **MADE,
    }  # fmt: skip


def test_a_strange_record_is_an_error_of_our_own(run: Path, tmp_path: Path) -> None:
    whole = json.loads((run / "run.json").read_text())
    for what, other in list(wrecks(whole, spare="recipe"))[::3]:
        (run / "run.json").write_text(json.dumps(other))
        said = complaint(what, lambda: card.card(str(run)))
        assert not said or "run.json" in said or "not finished" in said, what
    (run / "run.json").write_text(json.dumps(whole))
    sha256 = trained.of_run(run).weights["sha256"]
    measured = evaluation(sha256, sets=("tin200",))
    figure = {key: dict(list(found.items())[:1]) for key, found in measured["results"][NAME]["tin200"].items()}
    for number, record in enumerate((measured | {"results": {NAME: {"tin200": figure}}}, tuned(sha256))):
        file = tmp_path / f"{number}.json"
        for what, other in list(wrecks(record))[::3]:
            file.write_text(json.dumps(other))
            said = complaint(what, lambda file=file: card.card(str(run), [file]))  # type: ignore[misc]
            assert not said or file.name in said, what


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0\0", "null", "3", '{"a": 1e999}', '"\\ud800"'])
def test_what_is_no_record_at_all(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UsageError, match=r"record\.json"):
        card.card(str(run), [tmp_path / "record.json"])
    (run / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl"):
        card.card(str(run))
    (run / "run.json").write_text(text)
    with pytest.raises(TrainingError, match=r"run\.json"):
        card.card(str(run))


def test_a_name_that_is_neither_a_run_nor_published() -> None:
    for measured in ([], [Path("x.json")]):
        with pytest.raises(UsageError, match="no folder of a training run at 'nope', and unknown model 'nope'"):
            card.card("nope", measured)
