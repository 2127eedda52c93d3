"""All that a run leaves on disk: run.json, metrics.jsonl, checkpoints, the exported encoder."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.errors import TrainingError
from micl_zoo.store import atomic_path, package_versions, write_text
from micl_zoo.transforms import Transform
from micl_zoo.weights import WEIGHTS_FILE, EncoderConfig, save_weights
from micl_zoo.zoo import RECORDS, timm_architecture

from .recipes import Recipe

KEEP_CHECKPOINTS = 2


class RunDir:
    """The folder of one run.

    Attributes:
        path: the folder.
        record: what run.json holds.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @classmethod
    def open(cls, path: Path, record: dict[str, Any]) -> RunDir:
        """Start a run folder, or go on with the one that is there.

        Raises:
            TrainingError: the folder holds a run of another recipe or other data, or other files.
        """
        file = path / "run.json"
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            if differences := _differences(there, record):
                raise TrainingError(f"{str(path)!r} holds another run: {'; '.join(differences)}. Give another --out.")
            where = {key: record[key] for key in ("commit", "versions", "machine")}
            if where != {key: there[key] for key in where}:
                there.setdefault("resumed", []).append({**where, "started": record["started"]})
            return cls(path, there)
        if path.exists() and any(not child.name.endswith(".tmp") for child in path.iterdir()):
            raise TrainingError(f"{str(path)!r} exists and is no run folder: give a new or empty one")
        run = cls(path, record)
        run.save_record()
        return run

    @property
    def finished_encoder(self) -> Path | None:
        """The weights file of a run that has come to its end."""
        file = self.path / "encoder" / WEIGHTS_FILE
        return file if "result" in self.record and file.exists() else None

    def save_record(self) -> None:
        """Write run.json."""
        write_text(self.path / "run.json", json.dumps(self.record, indent=2) + "\n")

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append to metrics.jsonl, a line a step."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be taken again, and a line that was cut off."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        write_text(file, "".join(line for line in kept if json.loads(line)["step"] < step))

    def save_checkpoint(
        self, step: int, seconds: float, vit: VisionTransformer, optimizer: torch.optim.Optimizer
    ) -> None:
        """Write weights and optimiser state after `step` steps; keep the last two checkpoints.

        Raises:
            TrainingError: weights that are not finite; nothing is written.
        """
        tensors = {f"model.{name}": value for name, value in vit.state_dict().items()}
        if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise TrainingError(
                f"after step {step} {broken[0]} is not finite: stopped, the checkpoints before are sound. "
                "Try a lower base_lr or precision=fp32 in a new --out."
            )
        for name, parameter in _trained(vit):
            state = optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        header = {"format": "pt", "step": str(step), "seconds": repr(seconds)}
        with atomic_path(self.path / "checkpoints" / f"step-{step:08d}.safetensors") as temporary:
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, header)
        for old in self.checkpoints()[:-KEEP_CHECKPOINTS]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def load_checkpoint(self, vit: VisionTransformer, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Restore the newest checkpoint in place.

        Returns:
            Steps taken and seconds spent so far; (0, 0.0) when there is no checkpoint.

        Raises:
            TrainingError: the checkpoint cannot be read.
        """
        files = self.checkpoints()
        if not files:
            return 0, 0.0
        try:
            with safe_open(files[-1], framework="pt") as opened:
                header = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"{str(files[-1])!r} is damaged ({error}): delete it to go on from the checkpoint before"
            ) from None
        step = int(header["step"])
        vit.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in _trained(vit):
            moments = {m: tensors[f"{m}.{name}"].clone().to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
        return step, float(header["seconds"])

    def save_encoder(self, vit: VisionTransformer, recipe: Recipe) -> Path:
        """Write `encoder/`, which `micl_zoo.load(weights=…)` and timm's hub loader take; returns the weights file."""
        # Without times and interruptions: two runs that compute the same numbers write the same bytes.
        provenance = {key: self.record[key] for key in ("recipe", "command", "commit", "versions", "machine")}
        provenance["data"] = {key: self.record["data"][key] for key in ("source", "images", "fingerprint")}
        return save_weights(
            self.path / "encoder", vit.state_dict(), encoder_config(recipe), provenance, recipe.save_dtype
        )


def encoder_config(recipe: Recipe) -> EncoderConfig:
    """How to build what a recipe trains."""
    architecture, model_args = timm_architecture(
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        embed_dim=recipe.embed_dim,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        mlp_ratio=recipe.mlp_ratio,
    )
    transform = Transform(recipe.image_size, recipe.image_size, "bicubic", recipe.pixel_mean, recipe.pixel_std)
    record = RECORDS.get(recipe.name)
    if record and record.shape.image_size == recipe.image_size:
        transform = record.transform
    return EncoderConfig(recipe.name, architecture, model_args, recipe.embed_dim, transform)


def run_record(recipe: Recipe, data: dict[str, Any], command: str, device: torch.device) -> dict[str, Any]:
    """What run.json says before the first step."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "data": data,
        "command": command,
        "commit": code_commit(),
        "versions": package_versions(),
        "machine": machine(device),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def code_commit() -> str | None:
    """The commit this code was run from, "-dirty" added where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if tracked.returncode == 0 else None


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, or the card, in words and numbers."""
    facts: dict[str, Any] = {"device": device.type, "processor": _processor(), "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "card_memory_gib": round(card.total_memory / 2**30, 1)}
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Fields of recipe and data that keep the two from being one run."""
    free = {"checkpoint_minutes", "source"}
    there, asked = ({**record["recipe"], **record["data"]} for record in (there, asked))
    asked = json.loads(json.dumps(asked))  # tuples as JSON gives them back
    keys = [key for key in asked if key not in free]
    return [f"{k}: {there.get(k)!r} there, {asked[k]!r} asked for" for k in keys if there.get(k) != asked[k]]


def _trained(vit: VisionTransformer) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in vit.named_parameters() if parameter.requires_grad]
