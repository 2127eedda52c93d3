"""SimCLR, MAE, DINO and supervised training for the comparisons of methods, from the parts of the library `lightly`.

Losses, heads, decoder and transforms are lightly's (1.6 or later), with the settings of its benchmarks: ImageNet's, and
CIFAR-10's for what depends on the size of the images (no blur) or of the run (the teacher's momentum).

Shapes: B images, V views, N patches, K of them visible, D width, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from contest import FOREVER
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from lightly.models.modules.masked_vision_transformer_timm import init_weights as init_lightly
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from micl_zoo.encoders.device import autocasting
from micl_zoo.training.micl import position_table
from micl_zoo.training.pretraining.data import MemoryCorpus, batch_rows
from micl_zoo.training.pretraining.pretrain import make_model
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.optim import make_layered_optimizer, make_optimizer
from micl_zoo.training.run.step import resolve_autocast

SIMCLR = {"temperature": 0.1, "hidden_dim": 2048, "output_dim": 128}  # lightly's ImageNet benchmark
SMALL_IMAGES: dict[str, Any] = {"cj_strength": 0.5}  # what SimCLRTransform recommends for them
DINO = {
    "hidden_dim": 2048,
    "bottleneck_dim": 256,
    "output_dim": 2048,  # lightly's CIFAR-10 benchmark; ImageNet's 65,536 would be most of the network here
    "teacher_temperature": 0.04,  # constant, as in lightly's benchmarks: DINO's warm-up to it or 0.07 takes 30 epochs
    "center_momentum": 0.9,
    "momentum": 0.99,  # constant, lightly's CIFAR-10 benchmark; after a few hundred steps 0.996 is still the start
    "frozen_share": 0.05,  # of the run without gradients for the last layer: its first epoch, in a run of many
    "local_views": 4,
}
MAE_MASK_RATIO = 0.75
MAE_DECODER_DEPTH, MAE_HEAD_WIDTH = 2, 32  # the paper's decoder has 8 blocks 512 wide, in heads of 32


class SimCLR:
    """Two colour-changed crops of an image against those of all others (arXiv 2002.05709), over the class token."""

    def __init__(self, recipe: Recipe, device: torch.device, start: Start | None = None) -> None:
        self._frame = _Frame(recipe, device, start)
        self.vit = self._frame.make_vit()
        size = {key: int(SIMCLR[key]) for key in ("hidden_dim", "output_dim")}
        self._head = SimCLRProjectionHead(recipe.embed_dim, **size).to(device)
        self._criterion = NTXentLoss(temperature=SIMCLR["temperature"])
        self.optimizer = self._frame.make_optimizer(self.vit, self._head)
        self.settings: dict[str, Any] = {**SIMCLR, "gaussian_blur": 0.0, **SMALL_IMAGES}
        self.extras: dict[str, VisionTransformer] = {}

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """Two views of each image."""
        transform = SimCLRTransform(input_size=self._frame.recipe.crop_size, gaussian_blur=0.0, **SMALL_IMAGES)
        return self._frame.batches(corpus, labels, transform, workers)

    def gradients(self, batch: Any, used: float) -> Tensor:
        """See `Method`."""
        views, _ = batch
        with self._frame.autocast():
            projections = self._head(self.vit(self._frame.move(torch.cat(views))))  # (2B, C)
        return _backward(self._criterion(*projections.float().chunk(2)))


class MAE:
    """Reconstruct the normalised pixels of the hidden three quarters (arXiv 2111.06377)."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._frame = _Frame(recipe, device)
        self.vit, width = self._frame.make_vit(fused=False), 2 * recipe.embed_dim // 3
        self._encoder = MaskedVisionTransformerTIMM(self.vit, None, "skip", pos_embed_initialization="skip").to(device)
        embed, predict = nn.Linear(recipe.embed_dim, width), nn.Linear(width, 3 * recipe.patch_size**2)
        decoder = MaskedVisionTransformerDecoderTIMM(
            recipe.num_patches, width, MAE_DECODER_DEPTH, width // MAE_HEAD_WIDTH
        )
        for layer in (embed, predict):
            layer.apply(init_lightly)
        self._embed, self._decoder, self._predict = embed.to(device), decoder.to(device), predict.to(device)
        self.optimizer = make_optimizer(nn.ModuleList([self.vit, self._embed, self._decoder, self._predict]), recipe)
        self.settings: dict[str, Any] = {
            "mask_ratio": MAE_MASK_RATIO,
            "decoder_width": width,
            "decoder_depth": MAE_DECODER_DEPTH,
            "decoder_heads": width // MAE_HEAD_WIDTH,
            "normalised_pixels": True,
        }
        self.extras: dict[str, VisionTransformer] = {}

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """One crop of each image."""
        return self._frame.batches(corpus, labels, MAETransform(self._frame.recipe.crop_size), workers)

    def gradients(self, batch: Any, used: float) -> Tensor:
        """See `Method`."""
        (images,), _ = batch
        images, recipe = self._frame.move(images), self._frame.recipe
        size = (len(images), 1 + recipe.num_patches)
        keep, hidden = utils.random_token_mask(size, MAE_MASK_RATIO, device=images.device)  # (B, 1 + K), (B, N - K)
        with self._frame.autocast():
            visible = self._embed(self._encoder.encode(images, idx_keep=keep))  # (B, 1 + K, width)
            tokens = utils.repeat_token(self._decoder.mask_token, size).type_as(visible)  # (B, 1 + N, width)
            decoded = self._decoder(utils.set_at_index(tokens, keep, visible))
            predicted = self._predict(utils.get_at_index(decoded, hidden))  # (B, N - K, P)
        patches = utils.patchify(images, recipe.patch_size)  # (B, N, P)
        target = utils.normalize_mean_var(utils.get_at_index(patches, hidden - 1))  # row 0 is the class token
        return _backward(F.mse_loss(predicted.float(), target))


class SelfDistillation:
    """DINO (arXiv 2104.14294): a student follows the running mean of itself, the teacher, over large and small crops.

    The teacher is what DINO is used with; the student is kept beside it, as the teacher of a short run lags behind.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._frame = _Frame(recipe, device)
        size = {key: int(DINO[key]) for key in ("hidden_dim", "bottleneck_dim", "output_dim")}
        self._student, self._head = (
            self._frame.make_vit(),
            DINOProjectionHead(recipe.embed_dim, freeze_last_layer=1, norm_last_layer=False, **size).to(device),
        )
        self.vit, self._teacher_head = (
            self._frame.make_vit(),
            DINOProjectionHead(recipe.embed_dim, norm_last_layer=False, **size).to(device),
        )
        self._teacher_head.load_state_dict(self._head.state_dict())
        utils.deactivate_requires_grad(self.vit)
        utils.deactivate_requires_grad(self._teacher_head)
        temperature = DINO["teacher_temperature"]
        self._criterion = DINOLoss(
            size["output_dim"], temperature, temperature, center_momentum=DINO["center_momentum"]
        ).to(device)
        self.optimizer = make_optimizer(nn.ModuleList([self._student, self._head]), recipe)
        self.local_size = recipe.crop_size // 2 // recipe.patch_size * recipe.patch_size
        self.settings: dict[str, Any] = {**DINO, "local_size": self.local_size, "gaussian_blur": 0.0, **SMALL_IMAGES}
        self.extras = {"student": self._student}

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """Two large views and the small ones of each image."""
        transform = DINOTransform(
            global_crop_size=self._frame.recipe.crop_size,
            local_crop_size=self.local_size,
            n_local_views=int(DINO["local_views"]),
            gaussian_blur=(0.0, 0.0, 0.0),
            **SMALL_IMAGES,
        )
        return self._frame.batches(corpus, labels, transform, workers)

    def gradients(self, batch: Any, used: float) -> Tensor:
        """See `Method`."""
        views, _ = batch
        utils.update_momentum(self._student, self.vit, m=DINO["momentum"])
        utils.update_momentum(self._head, self._teacher_head, m=DINO["momentum"])
        large, small = (self._frame.move(torch.cat(part)) for part in (views[:2], views[2:]))
        with self._frame.autocast():
            with torch.no_grad():
                wanted = self._teacher_head(self.vit(large))  # (2B, C)
            given = self._head(torch.cat([self._student(large), class_token(self._student, small)]))  # (VB, C)
        parts = list(wanted.float().chunk(2)), list(given.float().chunk(len(views)))
        loss = _backward(self._criterion(*parts, teacher_temp=DINO["teacher_temperature"]))
        self._head.cancel_last_layer_gradients(0 if used < DINO["frozen_share"] else 1)
        return loss


class Supervised:
    """Cross-entropy over the corpus's labels, which no other method sees: the ceiling."""

    def __init__(self, recipe: Recipe, device: torch.device, classes: int) -> None:
        self._frame = _Frame(recipe, device)
        self.vit, self._head = self._frame.make_vit(), nn.Linear(recipe.embed_dim, classes)
        self._head.apply(init_lightly)
        self._head.to(device)
        self.optimizer = make_optimizer(nn.ModuleList([self.vit, self._head]), recipe)
        self.settings: dict[str, Any] = {"classes": classes}
        self.extras: dict[str, VisionTransformer] = {}

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """One crop of each image, and its label."""
        return self._frame.batches(corpus, labels, MAETransform(self._frame.recipe.crop_size), workers)

    def gradients(self, batch: Any, used: float) -> Tensor:
        """See `Method`."""
        (images,), labels = batch
        with self._frame.autocast():
            logits = self._head(self.vit(self._frame.move(images)))  # (B, classes)
        return _backward(F.cross_entropy(logits.float(), self._frame.move(labels)))


def class_token(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Class tokens (B, D) of images smaller than the ViT's own, at positions stretched over its grid as in MiCL."""
    patches = vit.patch_embed.proj(images)  # (B, D, down, across)
    positions = position_table(vit.embed_dim, (patches.shape[2], patches.shape[3]), vit.patch_embed.grid_size)
    tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)  # (B, 1 + N, D)
    return vit.norm(vit.blocks(tokens + positions.to(tokens)))[:, 0]


@dataclass(frozen=True)
class _Frame:
    """What the methods of others have in common with MiCL."""

    recipe: Recipe
    device: torch.device
    start: Start | None = None

    def make_optimizer(self, vit: VisionTransformer, head: nn.Module) -> torch.optim.AdamW:
        """MiCL's, with a head; from a start, layers learn as they do in MiCL and the head at the full rate."""
        if self.start is None:
            return make_optimizer(nn.ModuleList([vit, head]), self.recipe)
        optimizer = make_layered_optimizer(vit, self.recipe)
        for group in param_groups_weight_decay(head, self.recipe.weight_decay):
            optimizer.add_param_group(group)
        return optimizer

    def make_vit(self, *, fused: bool = True) -> VisionTransformer:
        """The ViT that MiCL starts from: same weights, same fixed positions.

        On a CPU, torch's fused attention is the faster one for whole images, the other for the few patches of MiCL and
        MAE; each method has its own.
        """
        vit = cast(VisionTransformer, make_model(self.recipe, self.device, self.start).vit)
        for block in vit.blocks:
            block.attn.fused_attn |= fused
        return vit

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the dtype that MiCL's have."""
        return autocasting(self.device, resolve_autocast(self.recipe, self.device))

    def move(self, numbers: Tensor) -> Tensor:
        """To the device."""
        return numbers.to(self.device, non_blocking=True)

    def batches(
        self, corpus: MemoryCorpus, labels: Tensor, transform: Callable[[Image.Image], list[Tensor]], workers: int
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """V views (B, 3, S, S) each and labels (B,) of the batches that MiCL takes, in its order."""
        loader = DataLoader(
            _Views(corpus, labels, transform, self.recipe),
            sampler=range(FOREVER),
            batch_size=self.recipe.batch_size,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.recipe.seed),
        )
        return iter(loader)


@dataclass(frozen=True)
class _Views(Dataset[tuple[list[Tensor], Tensor]]):
    """Place in the run -> the views of the image that stands there, and its label."""

    corpus: MemoryCorpus
    labels: Tensor
    transform: Callable[[Image.Image], list[Tensor]]
    recipe: Recipe

    def __getitem__(self, place: int) -> tuple[list[Tensor], Tensor]:
        step, at = divmod(place, self.recipe.batch_size)
        row = batch_rows(self.recipe, len(self.corpus), step)[at]
        image = Image.fromarray(self.corpus.images[row].permute(1, 2, 0).numpy())
        return self.transform(image), self.labels[row]


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


METHODS: dict[str, Callable[..., Any]] = {"simclr": SimCLR, "mae": MAE, "dino": SelfDistillation}
