"""Who may import whom, what is public, and that the documents tell the truth about the tree."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import micl_zoo
from micl_zoo.encoders.zoo import DEFAULT, RECORDS
from micl_zoo.training.evaluation.tables import RUNS_TO_PREDICT, foretold, merge
from micl_zoo.training.recipes import RECIPES
from micl_zoo.training.release.card import check_card, repeated, repository_card
from micl_zoo.training.release.trained import published

ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "training" / "records"
in_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="only in a checkout")
ROOMS = {"micl_zoo": "micl_zoo", "training": "micl_zoo.training", "export": "micl_zoo.export"}


def imports(file: Path, package: str) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it stands inside a function) of every import of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}".lstrip("."), id(node) in inside) for alias in node.names)


@in_checkout
def test_who_imports_whom() -> None:
    for room, package in ROOMS.items():
        for file in (ROOT / room).rglob("*.py"):
            for name, inside in imports(file, package):
                where = f"{file.relative_to(ROOT)} imports {name}"
                assert name.split(".")[0] not in ("training", "export", "tests"), where
                target = next((p for p in ("micl_zoo.training", "micl_zoo.export") if name.startswith(p)), None)
                if room == "micl_zoo" and target:
                    assert file.parent.name == "cli", where
                    assert inside, where
                elif target:
                    assert target == package, where


@in_checkout
def test_the_command_line_imports_lightly() -> None:
    light = {"__future__", "collections", "dataclasses", "json", "shlex", "sys", "pathlib", "typing", "click"}
    outside = {name for name, inside in imports(ROOT / "micl_zoo" / "cli" / "__init__.py", "micl_zoo.cli") if not inside}
    own = ("micl_zoo._version.", "micl_zoo.errors.", "micl_zoo.encoders.zoo.", "micl_zoo.encoders.device.")
    assert not [name for name in outside if not name.startswith(own) and name.split(".")[0] not in light]


def test_public_names_are_sorted_and_all_there() -> None:
    assert list(micl_zoo.__all__) == sorted(micl_zoo.__all__)
    assert all(getattr(micl_zoo, name) is not None for name in micl_zoo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'; it has Encoder"):
        _ = micl_zoo.lod


@in_checkout
def test_the_readme_s_tree_is_the_repository() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    files = {name for name in listed.splitlines() if name.endswith(".py") and not name.endswith("__init__.py")}
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree is not None
    folder, named = "", set()
    for line in tree.group(1).splitlines():
        if match := re.match(r"^(\w+)/", line):
            folder = match.group(1)
        elif match := re.match(r"^  ([\w./-]+)", line):
            named.add(f"{folder}/{match.group(1)}")
    missing, gone = files - named, {name for name in named if not (ROOT / name).exists()}
    assert not missing, f"not in the README's tree: {sorted(missing)}"
    assert not gone, f"in the README's tree but not there: {sorted(gone)}"


def knn(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the encoder and its baselines, accuracy of 20 neighbours by set."""
    results = merge(evaluations)["results"]
    return {who: {data: row["knn"]["20"]["accuracy"] for data, row in sets.items()} for who, sets in results.items()}


@in_checkout
def test_every_number_of_the_table_is_in_its_record() -> None:
    for record in RECORDS.values():
        if record.training_record is None:
            assert not record.metrics
            continue
        kept = json.loads((TRAINING / record.training_record).read_text(encoding="utf-8"))
        assert kept["weights"] == {"sha256": record.sha256, "bytes": record.bytes}
        figures = knn(published(record.name).evaluations)
        assert record.metrics == figures[record.name]
        baselines = [figures[subject] for subject in figures if subject != record.name]
        assert all(record.metrics[data] > row[data] for row in baselines for data in record.metrics)
        says = " ".join(str(RECIPES[record.recipe].__doc__).split())
        assert all(f"{accuracy:.1f} % on {data}" in says for data, accuracy in record.metrics.items()), says


@in_checkout
def test_the_default_encoder_is_worth_loading() -> None:
    found = published(DEFAULT)
    baselines = knn(found.evaluations)
    assert len(found.repeats) >= RUNS_TO_PREDICT, "one seed shows nothing"
    for evaluations in (found.evaluations, *({one.evaluation_file: one.evaluation} for one in found.repeats)):
        ours = knn(evaluations)[DEFAULT]
        assert all(ours[data] >= baselines["random"][data] + 15 for data in ("caltech101", "cifar10"))
        assert all(ours[data] > baselines["pixels"][data] for data in ("tin200", "caltech101", "flowers5", "cifar10"))


@in_checkout
def test_the_default_encoder_can_be_trained_again() -> None:
    figures = list(repeated(published(DEFAULT)))
    assert {heading for heading, *_ in figures} == {"k-NN 20", "linear", "logreg"}
    for *_, (ours, *theirs) in figures:
        assert all(one["accuracy"] >= ours["low"] for one in theirs), "a repetition gives less than was said"
    held = [one for *_, runs in figures for one in foretold([run["accuracy"] for run in runs])]
    assert held
    assert sum(held) >= 0.9 * len(held)


@in_checkout
def test_the_model_card_is_what_the_records_say() -> None:
    check_card(ROOT / "MODEL_CARD.md", repository_card(), "micl-zoo card -o MODEL_CARD.md")


EXPORTS = {
    "vit_ti16": TRAINING / "vit_ti16.tin200.export.json",
    "vit_b16": ROOT / "benchmarks" / "records" / "2026-11-24-export-vit_b16.json",
    "vit_l16": ROOT / "benchmarks" / "records" / "2026-11-24-export-vit_l16.json",
}


def export_rows(name: str) -> Iterator[str]:
    """The lines of docs/onnx.md for one encoder."""
    record = json.loads(EXPORTS[name].read_text(encoding="utf-8"))
    for precision, row in record["drift"].items():
        speed = record["images_per_second"][f"onnx {precision}"]
        cells = [precision, f"{row['bytes'] / 1e6:.1f}", f"{row['cosine_mean']:.6f}", f"{row['cosine_min']:.6f}"]
        cells += [f"{row['neighbour_agreement']:.1%}".replace("%", " %"), f"{row['alone_and_in_a_batch']:.0e}"]
        yield "| " + " | ".join([*cells, f"{speed['median']:.2f}", f"{speed['ratio_to_torch_fp32']:.2f}"]) + " |"


@in_checkout
def test_the_tables_of_exports_are_their_records() -> None:
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    for name in EXPORTS:
        for line in export_rows(name):
            assert line in text, line


@in_checkout
def test_tracked_files_are_small_and_hold_no_pickles() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    weights = [ROOT / name for name in listed.splitlines() if name.endswith((".safetensors", ".onnx"))]
    sizes = [file.stat().st_size for file in weights]
    assert max(sizes) <= 48_000_000
    assert sum(sizes) <= 64_000_000
    assert not [name for name in listed.splitlines() if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))]
