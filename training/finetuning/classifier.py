"""An encoder with a linear head: built from an encoder, trained a step at a time, tested, saved as a timm model.

Shapes: B images a batch, b of this process's share of it, S side in pixels, C classes, D width, L branches that can be
dropped: two a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from micl_zoo.encoders.device import autocasting
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import SourceError, UsageError
from micl_zoo.images.transform import Transform
from micl_zoo.zoo.weights import EncoderConfig, save_weights

from ..evaluation.tables import score
from ..recipes import FineTuneRecipe
from ..run.optim import make_layered_optimizer
from ..run.order import RefusedImage, seeded
from ..run.ranks import Ranks
from ..run.step import Step
from .augment import Pictures, Resized, drawing

TOP = 5  # guesses per image of the second accuracy, told where there are more classes than twice as many
TIMM_POOL = {"mean": "avg", "cls": "token"}


def make_classifier(encoder: Encoder, recipe: FineTuneRecipe, classes: int) -> VisionTransformer:
    """Put a linear head on the encoder's ViT, on the CPU, in train mode; the encoder keeps its own weights.

    With pool "mean" the final norm comes after the mean and is new, as in MAE: the encoder's own, which is of single
    tokens, is left out. The position table is trained along with the rest.
    """
    args = {**encoder.config.model_args, "global_pool": TIMM_POOL[recipe.pool], "drop_path_rate": recipe.drop_path}
    model: VisionTransformer = timm.create_model(encoder.config.architecture, num_classes=classes, **args)
    state, new = encoder.vit.state_dict(), {"head.weight", "head.bias"}
    if recipe.pool == "mean":
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
        new |= {"fc_norm.weight", "fc_norm.bias"}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == (new, []), (missing, unexpected)
    generator = seeded(recipe.seed, 2)  # on the CPU: the same weights for every device
    nn.init.trunc_normal_(model.head.weight, std=recipe.head_std, generator=generator)
    nn.init.zeros_(model.head.bias)
    for block in model.blocks:
        for name, module in block.named_children():
            if isinstance(module, DropPath):
                setattr(block, name, GivenDropPath(module.drop_prob))
    return model.train()


class GivenDropPath(nn.Module):
    """timm's DropPath, but the random numbers are handed in: they do not depend on how a batch is shared or cut."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob  # chance that a branch's output is set to 0; the others are scaled to keep the mean
        self.draws = torch.empty(0)  # (b,) uniform, one per image that comes next

    def forward(self, tokens: Tensor) -> Tensor:
        """Drop whole branches: (b, N, D), the same shape back."""
        if not self.training:
            return tokens
        kept = (self.draws >= self.drop_prob).to(tokens) / (1 - self.drop_prob)
        return tokens * kept[:, None, None]


class ClassifierStep(Step):
    """Takes steps of a classifier: `step(pictures)` changes the weights in place, see `Step`."""

    recipe: FineTuneRecipe

    def __init__(
        self,
        model: VisionTransformer,  # made by `make_classifier`, on its device
        recipe: FineTuneRecipe,
        ranks: Ranks | None = None,
        *,
        autocast: torch.dtype | None = None,  # dtype of the matrix products, None for that of the weights
        micro_batch: int | None = None,  # most images per forward pass, None for all; the gradients are the same
    ) -> None:
        ranks = ranks or Ranks()
        check_share(recipe, ranks.world)
        super().__init__(model, model, recipe, ranks, autocast)
        self.micro_batch = micro_batch or recipe.batch_size
        self.optimizer = make_layered_optimizer(model, recipe)
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self._drops = [module for module in model.modules() if isinstance(module, GivenDropPath)]
        chance = recipe.mix_probability if recipe.mixup or recipe.cutmix else 0.0
        smoothing, classes = recipe.label_smoothing, model.num_classes
        self._mixup = Mixup(recipe.mixup, recipe.cutmix, prob=chance, label_smoothing=smoothing, num_classes=classes)

    def accumulate(self, pictures: Pictures) -> Tensor:
        """Compute the gradients of one step, without taking it: loss () of this share."""
        with drawing(self.recipe.seed, 5, pictures.step):  # the same shares and boxes on every rank
            pixels, targets = self._mixup(pictures.pixels, pictures.labels)  # (b, 3, S, S), (b, C)
        generator = seeded(self.recipe.seed, 6, pictures.step)
        draws = torch.rand(len(self._drops), self.recipe.batch_size, generator=generator)
        draws = draws[:, pictures.places].to(pixels.device, non_blocking=True)  # (L, b)
        count = -(-len(pixels) // self.micro_batch)
        pieces = list(zip(pixels.chunk(count), targets.chunk(count), draws.chunk(count, dim=1), strict=True))
        losses = []
        for piece in pieces:
            with self._synchronise(piece is pieces[-1]):
                loss = self._piece_loss(*piece) * (len(piece[0]) / len(pixels))
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _piece_loss(self, pixels: Tensor, targets: Tensor, draws: Tensor) -> Tensor:
        for drop, drawn in zip(self._drops, draws, strict=True):
            drop.draws = drawn
        return SoftTargetCrossEntropy()(self._compute(pixels).float(), targets)  # of logits (b, C)


def check_share(recipe: FineTuneRecipe, world: int) -> None:
    """Check that a batch falls into equal shares, and each of them into pairs."""
    if recipe.batch_size % (2 * world):
        near = max(1, round(recipe.batch_size / (2 * world))) * 2 * world
        raise UsageError(
            f"batch_size={recipe.batch_size} does not fall into pairs that {world} processes can share alike: "
            f"--set batch_size={near}, or another number of GPUs"
        )


class Tested(NamedTuple):
    """What a classifier makes of a test part."""

    top1: np.ndarray  # (n,) bool, one per image that can be decoded: the best guess is right
    top5: np.ndarray  # (n,) bool: one of the five best guesses is
    refused: list[RefusedImage]  # the images that cannot be decoded; they are not counted

    def scores(self, classes: int) -> dict[str, dict[str, float]]:
        """Give the accuracy and its interval in percent: top1, and top5 where there are more than ten classes."""
        return {"top1": score(self.top1)} | ({"top5": score(self.top5)} if classes > 2 * TOP else {})


@torch.inference_mode()
def measure_classifier(
    model: VisionTransformer,
    batches: Iterator[Resized],  # this rank's share of the test part, on the device of the model
    transform: Transform,  # of the encoder, to normalise
    ranks: Ranks,
    *,
    autocast: torch.dtype | None = None,
) -> Tested:
    """Test on the shares of all ranks together; each image counts once."""
    before, right, refused = model.training, list[list[bool]](), list[RefusedImage]()
    model.eval()
    for pixels, labels, bad in batches:
        refused += bad
        if len(pixels):
            with autocasting(pixels.device, autocast):
                logits = model(transform.normalise(pixels)).float()  # (n, C)
            guesses = logits.topk(min(TOP, model.num_classes)).indices  # (n, 5)
            hit = guesses == labels[:, None]
            right += torch.stack([hit[:, 0], hit.any(1)], dim=1).tolist()
    model.train(before)
    told = ranks.gather((right, refused))
    pairs = np.array([pair for pairs, _ in told for pair in pairs], dtype=bool).reshape(-1, 2)
    if not len(pairs):
        raise SourceError("no image of the test part can be decoded: look whether the data are still there, and whole")
    return Tested(pairs[:, 0], pairs[:, 1], [RefusedImage(*image) for _, bad in told for image in bad])


def save_classifier(
    folder: Path,
    state: dict[str, Tensor],  # of `make_classifier`'s model
    config: EncoderConfig,  # of the encoder
    recipe: FineTuneRecipe,
    classes: Sequence[str],  # names, by number
    provenance: dict[str, Any],
) -> Path:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` takes; returns the weights file."""
    body, pool = config.to_dict(), TIMM_POOL[recipe.pool]
    body |= {"num_classes": len(classes), "global_pool": pool, "label_names": list(classes)}
    body["model_args"] = {**config.model_args, "global_pool": pool}
    body["pretrained_cfg"] |= {"num_classes": len(classes), "label_names": list(classes)}
    return save_weights(folder, state, body, provenance, "float32")
