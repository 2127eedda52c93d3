"""Who may import whom, what is public, and that the documents tell the truth about the tree."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import micl_zoo
from micl_zoo.training.evaluation.tables import RUNS_TO_PREDICT, foretold, merge
from micl_zoo.training.release.card import ablations_page, check_card, repeated, repository_card
from micl_zoo.training.release.trained import published
from micl_zoo.zoo.ours import DEFAULT, RECORDS

ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "training" / "records"
in_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="only in a checkout")

# Who may import whom: a module may import its own room and those before it. training and export may import micl_zoo,
# never each other, and only the command line names them.
BOTTOM = ("errors", "files", "limits", "printing", "progress", "schema", "stop", "telemetry", "_version")
ORDER = {
    "micl_zoo": [
        BOTTOM,
        ("images",),
        ("sources",),
        ("zoo",),
        ("encoders",),
        ("stores",),
        ("extraction",),
        ("cli", "doctor"),
    ],
    "micl_zoo.training": [
        ("micl", "recipes", "corpora", "records"),
        ("run",),
        ("evaluation",),
        ("pretraining", "finetuning"),
        ("release",),
    ],
    "micl_zoo.export": [("write", "graph", "check", "quantize", "photographs")],
}
BELOW_EXPORT = 4  # export takes encoders and what they stand on
HOMES = {"micl_zoo": ROOT / "micl_zoo", "micl_zoo.training": ROOT / "training", "micl_zoo.export": ROOT / "export"}
WITHOUT_TORCH = (
    "micl_zoo.images",
    "micl_zoo.sources",
    "micl_zoo.zoo",
    "micl_zoo.extraction.decoders",
    "micl_zoo.extraction.processes",
)


class Import(NamedTuple):
    """One name that a module imports, and where the statement stands."""

    module: str
    name: str
    inside: bool  # of a function
    typing: bool  # under TYPE_CHECKING

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package, home in HOMES.items():
        for file in home.rglob("*.py"):
            parts = file.relative_to(home).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


@functools.cache
def imports(module: str, file: Path) -> list[Import]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import("", alias.name, inside, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from (Import(base, alias.name, inside, typing) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing = typing or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, typing)

    return list(walk(ast.parse(file.read_text(encoding="utf-8")), False, False))


def room(module: str) -> tuple[str, int]:
    """(Package, floor) of a module; the package's own `__init__` and `__main__` stand above all floors."""
    package = next(name for name in sorted(ORDER, key=len, reverse=True) if f"{module}.".startswith(f"{name}."))
    first = module.removeprefix(package).lstrip(".").partition(".")[0]
    floors = [floor for floor, names in enumerate(ORDER[package]) if first in names]
    assert floors or first in ("", "__main__"), f"{module} is in no room: add it to ORDER"
    return package, floors[0] if floors else len(ORDER[package])


@pytest.fixture(scope="module")
def tree() -> dict[str, list[tuple[str, Import]]]:
    """For each module the modules that it imports, and the statements."""
    known = modules()
    found: dict[str, list[tuple[str, Import]]] = {}
    for module, file in known.items():
        for one in imports(module, file):
            target = one.full if one.full in known else one.module if one.module in known else ""
            if target and target != module:
                found.setdefault(module, []).append((target, one))
    return found


@in_checkout
def test_who_imports_whom(tree: dict[str, list[tuple[str, Import]]]) -> None:
    for module, targets in tree.items():
        package, floor = room(module)
        for target, one in targets:
            where = f"{module} imports {one.full}"
            if target == "micl_zoo" or module == "micl_zoo":
                continue  # the lazy names at the top
            to_package, to_floor = room(target)
            if to_package == package:
                assert to_floor <= floor, f"{where}, which stands above it"
            elif package == "micl_zoo":
                assert module.startswith("micl_zoo.cli"), where
                assert one.inside, f"{where} outside a function"
            else:
                assert to_package == "micl_zoo", where
                assert package == "micl_zoo.training" or to_floor <= BELOW_EXPORT, where


@in_checkout
def test_no_import_goes_round_in_a_circle(tree: dict[str, list[tuple[str, Import]]]) -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target, _ in tree.get(module, []):
                if "micl_zoo" not in (module, target):
                    visit(target, (*path, module))
            done.add(module)

    for module in tree:
        visit(module, ())


@in_checkout
def test_decoding_needs_no_torch(tree: dict[str, list[tuple[str, Import]]]) -> None:
    known = modules()

    def reach(module: str, seen: set[str]) -> set[str]:
        seen.add(module)
        for target, one in tree.get(module, []):
            if not one.inside and not one.typing and target not in seen:
                reach(target, seen)
        return seen

    for module in (name for name in known if f"{name}.".startswith(tuple(f"{one}." for one in WITHOUT_TORCH))):
        for one in reach(module, set()) - {"micl_zoo"}:
            heavy = [i.full for i in imports(one, known[one]) if not i.inside and not i.typing]
            assert not [name for name in heavy if name.split(".")[0] in ("torch", "timm")], f"{one}, for {module}"


@in_checkout
def test_nobody_imports_by_another_name() -> None:
    for module, file in modules().items():
        assert not [i for i in imports(module, file) if i.full.split(".")[0] in ("training", "export", "tests")], module


@in_checkout
def test_packages_are_the_folders_and_their_inits_are_empty() -> None:
    names = {name for name, file in modules().items() if file.name == "__init__.py"}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    resources = {"micl_zoo.training.records", "micl_zoo.export.photographs"}  # data without an __init__
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == names | resources
    for name in names - set(HOMES) - {"micl_zoo.cli"}:
        tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
        assert all(isinstance(node, ast.Expr) for node in tree.body), f"{name} has more than a docstring"


@in_checkout
def test_the_command_line_imports_lightly() -> None:
    light = {
        "__future__",
        "click",
        "collections",
        "dataclasses",
        "functools",
        "inspect",
        "json",
        "pathlib",
        "shlex",
        "signal",
        "sys",
    }
    light |= {"typing"}
    own = (
        "micl_zoo._version",
        "micl_zoo.cli",
        "micl_zoo.errors",
        "micl_zoo.zoo.ours",
        "micl_zoo.zoo.pools",
        "micl_zoo.encoders.device",
    )
    own += ("micl_zoo.limits", "micl_zoo.printing", "micl_zoo.sources.names", "micl_zoo.stop")
    for module, file in modules().items():
        if module.startswith("micl_zoo.cli"):
            outside = {one.full for one in imports(module, file) if not one.inside and not one.typing}
            heavy = {name for name in outside if not name.startswith(own) and name.split(".")[0] not in light}
            assert not heavy, module


def test_public_names_are_sorted_and_all_there() -> None:
    assert list(micl_zoo.__all__) == sorted(micl_zoo.__all__)
    assert all(getattr(micl_zoo, name) is not None for name in micl_zoo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'; it has Embedded, Encoder"):
        _ = micl_zoo.lod


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings."""
    prose = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_checkout
def test_every_link_in_the_documents_leads_somewhere() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "*.md"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for file in map(ROOT.joinpath, listed.split()):
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            place, _, anchor = link.partition("#")
            if not re.match(r"\w+:", link):
                target = (file.parent / place) if place else file
                assert target.exists(), f"{file.relative_to(ROOT)}: {link}"
                assert not anchor or anchor in anchors(target), f"{file.relative_to(ROOT)}: {link}"


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
    check_card(ROOT / "docs" / "ablations.md", ablations_page(), "micl-zoo card --ablations -o docs/ablations.md")


@in_checkout
def test_tracked_files_are_small_and_hold_no_pickles() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    weights = [ROOT / name for name in listed.splitlines() if name.endswith((".safetensors", ".onnx"))]
    sizes = [file.stat().st_size for file in weights]
    assert max(sizes) <= 48_000_000
    assert sum(sizes) <= 64_000_000
    assert not [name for name in listed.splitlines() if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))]
