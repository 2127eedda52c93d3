"""docs/reproduce.md: its commands run in small, in its order, and its numbers are those of the plan and the records."""

from __future__ import annotations

import hashlib
import io
import json
import math
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

from micl_zoo.cli import main
from micl_zoo.training.corpora import CORPORA
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.training.evaluation.tables import interval
from micl_zoo.training.pretraining.plan import GIB, PAPER_HOURS, Plan, make_plan, memory_estimate
from micl_zoo.training.pretraining.pretrain import COLLAPSE, COLLAPSE_STEPS
from micl_zoo.training.recipes import KEPT_CHECKPOINTS, get_finetune_recipe, get_recipe
from micl_zoo.training.run.gpus import gpu_watts

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
    "python -c 'from huggingface_hub import snapshot_download": "the same",
    "tmux": "needs a terminal",
    "DATA=imagenet-1k/train OUT=runs/vit_l16 sbatch": "needs SLURM",
}

# How the document's commands are changed, by the words that they begin with: (pattern, replacement), in this order.
CPU = [(r"--workers \d+", ""), (r"$", " --device cpu --workers 0")]
TWO = (r"(--smoke) --gpus 4", r"\1 --gpus 2")  # of the dry run; the same lines without --smoke run in one process
SMALL = {
    "md5sum": [(r"[0-9a-f]{32}", "MD5")],  # of the archives that the test made
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


def in_small(command: str, folder: Path) -> str:
    """The command as it is run here."""
    begins = next((words for words in SMALL if command.startswith(words)), "")
    for pattern, replacement in SMALL.get(begins, []):
        command = re.sub(pattern, replacement, command)
    return re.sub(r"MD5  (\S+)", lambda m: f"{hashlib.md5((folder / m[1]).read_bytes()).hexdigest()}  {m[1]}", command)


def run(command: Command, folder: Path, environment: dict[str, str], patch: pytest.MonkeyPatch) -> str:
    """What it says; fails when it fails."""
    text = in_small(command.flat, folder)
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
    words = list(words) if words[0] == "eval" else ["train", *words]
    mp.start_processes(one_rank, (gpus, port, words), nprocs=gpus, start_method="forkserver")


def one_rank(rank: int, world: int, port: int, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(words, standalone_mode=False)


# ImageNet-1k as it is given out, with 4 classes.

CLASSES = {"n01440764": 3, "n01443537": 1, "n02119789": 4, "n03000684": 2}  # and their numbers in the development kit
TRAIN, VAL = 16, 3  # images a class; the small twin's batch is 16


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 80 + seed % 16, 72).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


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
    write_archives(folder)
    write_parquet(other / "parquet" / "data")
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    (programs / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("micl_zoo.training.run.ranks.launch", launch)
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
    assert len(played.said) == len({command.flat for command in every if not skipped(command)}) > 35
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

    here = {
        IMAGENET.images: TRAIN * len(CLASSES),
        IMAGENET.test_images: VAL * len(CLASSES),
        IMAGENET.classes: len(CLASSES),
        0: 0,
    }
    counted = {command: int(found[1]) for command in played.said if (found := re.search(r"  # (\d+)$", command))}
    assert sorted(counted.values()) == sorted([*here, IMAGENET.classes])
    for command, real in counted.items():
        assert int(played.said[command]) == here[real], command
    assert any("the same classes" in text for text in played.said.values())
    assert any(f"classes {len(CLASSES)}, not {IMAGENET.classes}" in text for text in played.said.values())
    text = DOCUMENT.read_text(encoding="utf-8")
    for archive, total in re.findall(r"^([0-9a-f]{32})  (\S+)$", text, re.MULTILINE):
        assert f"| `{archive}` |" in text, total  # the table and the check have the same sums


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


# Numbers.


def planned(*changes: str, micro_batch: int | None = None) -> Plan:
    return make_plan(get_recipe(RECIPE, changes), images=IMAGENET.images, gpus=4, micro_batch=micro_batch)


def on_card(plan: Plan, name: str = "A100 80GB") -> tuple[float, float, int]:
    """Hours, images/s, and the images a forward pass."""
    card = next(card for card in plan.cards if card.card.name == name)
    return card.hours, card.images_per_second, card.micro_batch


def text() -> str:
    """The document with single blanks."""
    return " ".join(DOCUMENT.read_text(encoding="utf-8").split())


def held(*phrases: str) -> None:
    there = text()
    for phrase in phrases:
        assert " ".join(phrase.split()) in there, phrase


def test_the_choices_cost_what_the_plan_says() -> None:
    whole = planned().total_flops
    rows = re.findall(
        r"^\| \d? ?\|.*`?(?:fits|micro-batch \d+`) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 7
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        changes = [change for change in re.findall(r"`([^`]+)`", cells[2]) if change]
        plan = planned(*changes)
        hours, _, micro_batch = on_card(plan)
        fits = "fits" if micro_batch == plan.share else f"`--micro-batch {micro_batch}`"
        tokens = plan.recipe.views * plan.view_tokens
        computed = planned(*changes, micro_batch=micro_batch).total_flops
        pace = f"{PAPER_HOURS * computed / whole:.1f} h"
        assert cells[3:] == [str(tokens), f"{hours:.1f} h", pace, fits], row
        assert any(all(f"--set {change}" in command.text for change in changes) for command in commands())
    held(f"{planned('base_lr=1.5e-4').recipe.lr * 1e3:.2f}e-3", f"{planned().recipe.lr * 1e3:.2f}e-3 at the peak")


def test_machine_and_disk_are_what_the_plan_says() -> None:
    plan, small = planned(), planned(micro_batch=900)
    train_tar, val_tar = 147_897_477_120, 6_744_924_160
    archives, run = (train_tar + val_tar) / 1e9, plan.disk_bytes / 1e9
    tuned = ((KEPT_CHECKPOINTS + 1) * plan.checkpoint_bytes + 2 * plan.encoder_bytes) / 1e9
    hours, rate, _ = on_card(plan)
    pace = plan.paper.images_per_second if plan.paper else 0
    image = train_tar / IMAGENET.images
    record = json.loads(
        (ROOT / "benchmarks/records/2026-11-24-bench-data-vit_l16.in1k.json").read_text(encoding="utf-8")
    )
    core = record["together"] / record["cores"]
    assert 1.05 * (2 * archives + run + tuned) < 400
    held(
        f"about {plan.memory.total / GIB:.1f} GiB a GPU at {plan.share:,} images a forward pass",
        f"`--micro-batch 900`: about {small.memory.total / GIB:.1f} GiB",
        f"archives {archives:.0f} GB + images {archives:.0f} GB + pre-training {run:.0f} GB + "
        f"fine-tuning {tuned:.0f} GB = {2 * archives + run + tuned:.0f} GB",
        f"unpacked and gone, {archives + run + tuned:.0f} GB",
        f"{IMAGENET.images + IMAGENET.test_images:,} | {IMAGENET.images:,} + {IMAGENET.test_images:,} images",
        f"| {rate * image / 1e6:.0f} MB/s | {rate:,.0f} images/s x {image / 1e3:.0f} kB an image, at 50 % MFU; "
        f"{pace * image / 1e6:.0f} MB/s at the paper's pace of {pace:,.0f} images/s",
        f"| {math.ceil(rate / core)}, or {math.ceil(pace / core)} | {rate:,.0f}, or {pace:,.0f}, images/s at "
        f"{core:.0f} a core",
        f"of {record['cores']} cores and {record['images']} photographs",
        f"{train_tar:,} and {val_tar:,} bytes (138 and 6.3",
        f"room for {train_tar / 1e9:.0f} GB of file cache",
        f"not {plan.recipe.epochs:g} times",
        f"3 checkpoints of {plan.checkpoint_bytes / 1e9:.1f} GB, and classifier and encoder of "
        f"{plan.encoder_bytes / 1e9:.1f} GB",
        f"in {2 * plan.encoder_bytes / 1e9:.1f} GB",
        f"The {plan.lasting_checkpoints} checkpoints that stay for good, one every {plan.recipe.keep_epochs:g} epochs, "
        f"are {plan.lasting_checkpoints * plan.checkpoint_bytes / 1e9:.1f} GB",
        f"{(IMAGENET.images + IMAGENET.test_images):,} images on one GPU and holds {IMAGENET.images:,} x 1,024 x 4 "
        "bytes = "
        f"{IMAGENET.images * 4096 / 1e9:.1f} GB",
        f"or {rate / 4:,.0f} images/s a GPU",
    )
    assert round(train_tar / GIB) == 138
    assert round(val_tar / GIB, 1) == 6.3
    assert hours > 0


def test_hours_energy_and_fine_tuning_are_arithmetic() -> None:
    plan, tuning = planned(), get_finetune_recipe("mae_l")
    width, depth, tokens = plan.recipe.embed_dim, plan.recipe.depth, 197
    blocks = 3 * 2 * depth * 12 * width**2 * tokens / 1e9
    attention = 3 * 2 * depth * 2 * tokens**2 * width / 1e9
    patches = 2 * 2 * 196 * 768 * width / 1e9
    an_image, steps = blocks + attention + patches, round(tuning.epochs * (IMAGENET.images // tuning.batch_size))
    rate = 0.5 * 4 * 312e3 / an_image
    tuning_hours = steps * tuning.batch_size / rate / 3600
    costs = {
        "pre-training at 50 % MFU, by `--plan`": on_card(plan)[0],
        "the same on 40 GB, with `--micro-batch 900`": on_card(planned(micro_batch=900), "A100 40GB")[0],
        "pre-training as the paper has it": PAPER_HOURS,
        "fine-tuning at 50 % MFU": tuning_hours,
    }
    watts = gpu_watts("NVIDIA A100-SXM4-80GB") or 0
    for name, hours in costs.items():
        energy = hours * 4 * watts / 1e3
        held(f"| {name} | {hours:.1f} | {4 * hours:.0f} | {energy:.0f} kWh |")
    kept = memory_estimate(get_recipe(RECIPE, ["mask_ratio=0"]), images_per_gpu=1, gpus=4)  # two views of 98 patches
    activations = 256 * kept.activations * tokens / 198 / GIB
    fixed = (kept.weights + kept.gradients + kept.adamw + kept.casts) / GIB
    held(
        f"hours x 4 x {watts} W",
        f"{depth} blocks x 12 x {width:,}^2 weights x 2 x {tokens} tokens x 3 = {blocks:.1f} GFLOP an image, "
        f"attention {attention:.1f}, patches {patches:.1f}: {an_image:.1f}.",
        f"{IMAGENET.images:,} // {tuning.batch_size:,} = {IMAGENET.images // tuning.batch_size:,} steps an epoch, "
        f"x {tuning.epochs:g} = {steps:,}, x {tuning.batch_size:,} = {steps * tuning.batch_size / 1e6:.1f} M images",
        f"{rate:,.0f} images/s, which the cores must decode",
        f"is {tuning.batch_size // 4} images a GPU, of {tokens} tokens each: about {activations + fixed:.0f} GiB by "
        f"the plan's way to count, {activations:.0f} of them",
        f"`--micro-batch 128`: about {activations / 2 + fixed:.0f} GiB",
        f"batch {tuning.batch_size:,}, base_lr {tuning.base_lr} ({tuning.lr * 1e3:g}e-3 at the peak), "
        f"layer decay {tuning.layer_decay:g}, drop path {tuning.drop_path:g}, "
        f"{tuning.epochs:g} epochs of which {tuning.warmup_epochs:g} warm-up, "
        f"mixup {tuning.mixup:g}, cutmix {tuning.cutmix:.1f}, erasing {tuning.erase_probability:g}, "
        f"pool `{tuning.pool}`",
    )


def test_what_to_expect_follows_from_the_recipe_and_from_records() -> None:
    plan = planned()
    hours, rate, _ = on_card(plan)
    pace = plan.paper.images_per_second if plan.paper else 0
    warm_up = plan.recipe.warmup_epochs / plan.recipe.epochs
    worst = math.log(plan.recipe.contrast_size)
    low, high = (f"{100 * edge:.1f}" for edge in interval(0.858, IMAGENET.test_images))
    days = [
        f"{plan.recipe.epochs * 24 / PAPER_HOURS:.0f} at the paper's pace",
        f"{plan.recipe.epochs * 24 / hours:.0f} |",
    ]
    held(
        f"ln {plan.recipe.contrast_size:,} = {worst:.2f}",
        f"above {COLLAPSE:.0%} of it, {COLLAPSE * worst:.2f}, for {COLLAPSE_STEPS} steps".replace("99%", "99 %"),
        f"{plan.warmup_steps:,} steps: {warm_up * hours:.1f} h at 50 % MFU, {warm_up * PAPER_HOURS:.1f} h at",
        f"100 steps are {100 * plan.recipe.batch_size / rate:.0f} s at 50 % MFU and "
        f"{100 * plan.recipe.batch_size / pace:.0f} s at the paper's pace",
        f"{rate:,.0f} at 50 % MFU, {pace:,.0f} at the paper's pace",
        f"{low} to {high} around 85.8 %",
        f"| fine-tuning, top-1 | {low} to {high} |",
        f"{pace:,.0f} over the four, {plan.paper.mfu if plan.paper else 0:.1%} MFU".replace("%", " %"),
        f"{pace:,.0f} images/s if they are 800 epochs and {pace / 4:.0f} if they are 200",
        f"below {worst:.2f} and falling",
        *days,
    )
    curve = json.loads((ROOT / "training/records/superseded/vit_ti16.tin200.json").read_text(encoding="utf-8"))["curve"]
    first, middle, last = (curve[place]["accuracy"] for place in (0, len(curve) // 2, -1))
    assert middle - first > (last - first) / 2
    assert curve[0]["loss"] < math.log(512)
