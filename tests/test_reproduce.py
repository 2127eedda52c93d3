"""docs/reproduce.md: its commands run in small, in its order."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing as mp
from click.testing import CliRunner
from conftest import picture
from damaged import encoded

from micl_zoo.cli import main
from micl_zoo.training.corpora import CORPORA
from micl_zoo.training.evaluation.labelled import LabelledSet

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "reproduce.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="only in a checkout")

RECIPE = "vit_l16.in1k"
IMAGENET = CORPORA["imagenet-1k"]

# Commands that are not run, by how they begin, and why. All others are.
SKIPPED = {
    "nvidia-smi": "asks the driver of a GPU",
    "cc --version": "nothing is compiled in the tests",
    "python3 -m venv": "the tests run in an environment that is there",
    ". .venv/bin/activate": "the same",
    "pip install": "the same",
    "hf auth login": "needs a network and an account; the test writes parquet files of that form",
    "hf download": "the same",
    "tmux": "needs a terminal",
    "DATA=imagenet-1k/train OUT=runs/vit_l16 sbatch": "needs SLURM",
}

# How the document's commands are changed, by the words that they begin with: (pattern, replacement), in this order.
CPU = [(r"--workers \d+", ""), (r"$", " --device cpu --workers 0")]
TWO = (r"(--smoke) --gpus 4", r"\1 --gpus 2")  # of the dry run; the same lines without --smoke run in one process
SMALL = {
    "python PATH_TO_THIS_REPOSITORY": [(r"PATH_TO_THIS_REPOSITORY", str(ROOT)), (r"$", " --no-md5")],
    "micl-zoo doctor": [(r"$", " --offline")],
    "micl-zoo bench data": [(r"--workers 60", "--workers 1"), (r"$", " --seconds 1")],
    "micl-zoo bench step": [(r"$", " --seconds 1 --device cpu --batch-size 2 --set depth=1 --set compile=false")],
    "micl-zoo train vit_l16.in1k --plan --gpus 4 --data": [(r"$", " --smoke")],  # the whole batch is 7,200 images
    "micl-zoo train vit_l16.in1k --plan": [],
    "micl-zoo train": [
        (r"--max-steps 100", "--max-steps 2"),
        (r"--max-steps 110", "--max-steps 3"),
        TWO,
        (r" --gpus 4", ""),
        (r"^((?!.*--smoke).*)$", r"\1 --smoke"),
        *CPU,
    ],
    "micl-zoo eval finetune": [
        TWO,
        (r" --gpus 4", ""),
        (r"^((?!.*--smoke).*)$", r"\1 --smoke"),
        *CPU,
    ],
    "micl-zoo eval": [(r"--train-images 10000", "--train-images 16"), *CPU],
}


class Command(NamedTuple):
    """One command of the document, and whether it belongs to the other way to get the data."""

    text: str
    instead: bool

    @property
    def flat(self) -> str:
        """On one line, without a comment."""
        return (
            re.sub(r"\s+#.*$", "", re.sub(r"\s*\\\n\s*", " ", self.text)) if self.text.startswith("micl") else self.text
        )


def commands() -> Iterator[Command]:
    text = DOCUMENT.read_text(encoding="utf-8")
    for mark, block in re.findall(r"(<!-- instead -->\n)?```sh\n(.*?)```", text, re.DOTALL):
        lines: list[str] = []
        for line in block.splitlines():
            lines.append(line)
            if is_whole(whole := "\n".join(lines)):
                yield Command(whole, bool(mark))
                lines = []
        assert not lines, f"a block that ends in the middle of a command: {lines}"


def is_whole(text: str) -> bool:
    """For a shell, this is not the beginning of something longer."""
    if text.endswith("\\"):
        return False
    if text.startswith("micl-zoo") and "\n" not in text:
        return True
    checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, check=False)
    return checked.returncode == 0 and not checked.stderr


def in_small(command: str) -> str:
    """The command as it is run here."""
    begins = next((words for words in SMALL if command.startswith(words)), "")
    for pattern, replacement in SMALL.get(begins, []):
        command = re.sub(pattern, replacement, command)
    return command


def run(command: Command, folder: Path, environment: dict[str, str], patch: pytest.MonkeyPatch) -> str:
    """What it says; fails when it fails."""
    text = in_small(command.flat)
    if text.startswith("micl-zoo"):
        patch.setattr(sys, "argv", shlex.split(text))
        result = CliRunner().invoke(main, sys.argv[1:])
        assert result.exit_code == 0, f"{text}\n{result.output}\n{result.exception!r}"
        return result.output
    shell = ["bash", "-e", "-o", "pipefail", "-c", text]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def launch(words: Sequence[str], *, gpus: int, **_: object) -> None:
    """In the place of torchrun's agent: the same words in as many processes, forked, so that torch is imported once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(
        ["micl_zoo.training.finetuning.finetune", "micl_zoo.training.pretraining.pretrain"]
    )
    mp.start_processes(one_rank, (gpus, port, list(words)), nprocs=gpus, start_method="forkserver")


def one_rank(rank: int, world: int, port: int, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(words, standalone_mode=False)


# ImageNet-1k as it is given out, with 4 classes.

CLASSES = {"n01440764": 3, "n01443537": 1, "n02119789": 4, "n03000684": 2}  # and their numbers in the development kit
TRAIN, VAL = 16, 3  # images a class; the small twin's batch is 16


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 80 + seed % 16, 72), "JPEG", quality=90)


def train_images() -> dict[str, dict[str, bytes]]:
    return {
        wnid: {f"{wnid}_{7 * n}.JPEG": jpeg(100 * place + n) for n in range(TRAIN)}
        for place, wnid in enumerate(CLASSES)
    }


def val_images() -> list[tuple[str, str, bytes]]:
    """(Name, class, bytes), the classes in no order."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, VAL * len(CLASSES) + 1)]
    return [(name, list(CLASSES)[3 * n % 4], jpeg(1000 + n)) for n, name in enumerate(names)]


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]  # a mode that is not known when it is checked
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def packed(members: dict[str, bytes], folder: Path) -> bytes:
    write_tar(folder / "one.tar", members)
    return (folder / "one.tar").read_bytes()


BOX = """<annotation>
\t<folder>val</folder>
\t<filename>{name}</filename>
\t<size>\n\t\t<width>500</width>\n\t</size>
\t<object>\n\t\t<name>{wnid}</name>\n\t\t<bndbox>\n\t\t\t<xmin>1</xmin>\n\t\t</bndbox>\n\t</object>
\t<object>\n\t\t<name>{wnid}</name>\n\t</object>
</annotation>
"""


def write_archives(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    classes = {f"{wnid}.tar": packed(images, folder) for wnid, images in train_images().items()}
    (folder / "one.tar").unlink()
    write_tar(folder / "ILSVRC2012_img_train.tar", classes)
    val = val_images()
    write_tar(folder / "ILSVRC2012_img_val.tar", {name: content for name, _, content in val})
    stems = {Path(name).stem: wnid for name, wnid, _ in val}
    boxes = {f"val/{stem}.xml": BOX.format(name=stem, wnid=wnid).encode() for stem, wnid in stems.items()}
    write_tar(folder / "ILSVRC2012_bbox_val_v3.tgz", boxes, "w:gz")
    numbers = "".join(f"{CLASSES[wnid]}\n" for _, wnid, _ in val).encode()
    kit = {"readme.txt": b"", "data/ILSVRC2012_validation_ground_truth.txt": numbers, "data/meta.mat": b"\0"}
    kit = {f"ILSVRC2012_devkit_t12/{name}": content for name, content in kit.items()}
    write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", kit, "w:gz")


def write_parquet(folder: Path) -> None:
    """As the Hugging Face hub has it: names with the class behind them, and a test part without labels."""
    train = [(name, wnid, content) for wnid, images in train_images().items() for name, content in images.items()]
    test = [("ILSVRC2012_test_00000001.JPEG", "", jpeg(1))]
    info = {"info": {"features": {"label": {"names": [f"name {wnid}" for wnid in CLASSES], "_type": "ClassLabel"}}}}
    folder.mkdir(parents=True)
    for part, images in (("train", train), ("validation", val_images()), ("test", test)):
        cells = [{"bytes": content, "path": f"{Path(name).stem}_{wnid}.JPEG"} for name, wnid, content in images]
        labels = [list(CLASSES).index(wnid) if wnid else -1 for _, wnid, _ in images]
        table = pa.table({"image": cells, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


class Played(NamedTuple):
    """The document, played from top to bottom: the folder, the folder of the other way, and what each command said."""

    folder: Path
    other: Path
    said: dict[str, str]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder, other, programs = (tmp_path_factory.mktemp(name) for name in ("node", "other", "programs"))
    write_archives(folder / "downloads")
    write_parquet(other / "parquet" / "data")
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    (programs / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("micl_zoo.training.run.launch.launch", launch)
        for command in commands():
            if not skipped(command):
                said[command.flat] = run(command, other if command.instead else folder, environment, patch)
        yield Played(folder, other, said)


def skipped(command: Command) -> bool:
    """By the list, and `publish` without --dry-run: that uploads."""
    if command.text.startswith("micl-zoo publish"):
        return "--dry-run" not in command.text
    return any(command.text.startswith(words) for words in SKIPPED)


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.JPEG")}


def test_every_command_runs_but_those_that_need_the_node(played: Played) -> None:
    every = list(commands())
    assert len(played.said) == len({command.flat for command in every if not skipped(command)}) > 30
    for words in SKIPPED:
        assert any(command.text.startswith(words) for command in every), f"no command begins with {words!r} any more"


def test_the_images_are_unpacked_into_folders_and_counted(played: Played) -> None:
    wanted = {
        f"train/{wnid}/{name}": content for wnid, images in train_images().items() for name, content in images.items()
    }
    wanted |= {f"val/{wnid}/{name}": content for name, wnid, content in val_images()}
    assert tree(played.folder / "imagenet-1k") == wanted
    assert tree(played.other / "imagenet-1k") == wanted
    assert LabelledSet.open(played.other / "parquet").facts["test_images"] == VAL * len(CLASSES)

    counted = f"{TRAIN * len(CLASSES)} training images, {VAL * len(CLASSES)} validation images, {len(CLASSES)} classes"
    assert sum(counted in text for text in played.said.values()) == 2
    assert sum("classes are those of the development kit" in text for text in played.said.values()) == 1
    assert any(f"classes {len(CLASSES)}, not {IMAGENET.classes}" in text for text in played.said.values())


def test_wrong_archives_are_refused(tmp_path: Path) -> None:
    write_archives(tmp_path)
    command = [sys.executable, ROOT / "docs" / "imagenet.py", "archives", tmp_path, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ILSVRC2012_img_train.tar has md5" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_runs_leave_what_the_document_reads(played: Played) -> None:
    lines = [json.loads(line) for line in (played.folder / "runs/vit_l16/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "images_per_second", "data_wait"} <= set(lines[0])
    assert any("imagenet-1k" in line.get("knn", {}) for line in lines)
    rehearsal = [json.loads(line) for line in (played.folder / "runs/rehearsal/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in rehearsal if "loss" in line] == [0, 1, 2]
    assert [line["event"] for line in rehearsal if "event" in line] == ["resumed"]
    assert json.loads((played.folder / "runs/smoke/run.json").read_text())["processes"] == 2
    result = json.loads((played.folder / "runs/vit_l16-ft/result.json").read_text())
    assert {"top1", "test_refused", "recipe", "encoder"} <= set(result)
    card = (played.folder / "card.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("imagenet-1k", "Fine-tun", "inear"))
    with tarfile.open(played.folder / "vit_l16-kept.tar") as tar:
        assert "runs/vit_l16/encoder/model.safetensors" in tar.getnames()


def test_options_that_are_named_in_passing_exist() -> None:
    groups = [command for command in main.commands.values() if isinstance(command, click.Group)]
    every = [*main.commands.values(), *(command for group in groups for command in group.commands.values())]
    known = {option for command in every for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`(--[a-z-]+)", DOCUMENT.read_text(encoding="utf-8")))
    assert len(named) > 5
    assert named <= known
