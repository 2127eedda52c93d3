"""Several processes, groups and pieces give the gradients of one process with the whole batch."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import small_vit
from torch import Tensor
from torch.distributed.elastic.rendezvous.api import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend
from torch.distributed.tensor import DTensor

from micl_zoo.errors import UsageError
from micl_zoo.training.micl import MiCL, contrastive_loss
from micl_zoo.training.pretraining.data import WHOLE, Share
from micl_zoo.training.pretraining.pretrain import initial_model
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.pretraining.step import TrainStep
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.launch import SECRET, Signed, launch
from micl_zoo.training.run.ranks import Ranks, joined
from micl_zoo.training.run.step import fsdp_works_on

BATCH = 16
FSDP = fsdp_works_on(torch.device("cpu"))
Gradients = dict[str, Tensor]


@pytest.fixture
def recipe(twin: Recipe) -> Recipe:
    return dataclasses.replace(twin, batch_size=BATCH)


def seen(count: int) -> tuple[Tensor, Tensor]:
    """Patches (B, V, 4, P) float64 and views (B, V, 4) of a whole batch."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(BATCH, count, 4, 3 * 8 * 8, generator=generator, dtype=torch.float64)
    return patches, torch.rand(BATCH, 16, generator=generator).argsort(1)[:, : 4 * count].unflatten(1, (count, 4))


def make_step(
    recipe: Recipe, ranks: Ranks | None = None, micro_batch: int | None = None, init: Path | None = None
) -> TrainStep:
    if init:
        model = initial_model(recipe, Start.open(init)).double()
    else:
        names = ("mask_ratio", "kappa", "temperature", "views", "pooled_token", "class_position", "positions")
        model = MiCL(small_vit().double(), **{name: getattr(recipe, name) for name in names})
    model.vit.set_grad_checkpointing(recipe.activation_checkpointing)
    return TrainStep(model, recipe, ranks, micro_batch=micro_batch)


def result(step: TrainStep, share: Share = WHOLE) -> tuple[float, float, Gradients]:
    patches, views = seen(step.model.views)
    loss, accuracy = step.accumulate(share.of(patches), share.of(views))
    gradients = {}
    for name, parameter in step.model.vit.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss.item(), accuracy.item(), gradients


Case = tuple[Recipe, int | None, Path | None]  # with the most images per forward pass, and what the run starts from


def one_rank(rank: int, world: int, port: int, cases: list[Case], out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = []
    with joined("cpu") as (ranks, _):
        for recipe, micro_batch, init in cases:
            step = make_step(recipe, ranks, micro_batch, init)
            loss, accuracy, gradients = result(step, Share(ranks.rank, ranks.world))
            parts = ranks.gather((loss, accuracy))
            found.append(
                (*(sum(p[i] for p in parts) / world for i in (0, 1)), {n: g.clone() for n, g in gradients.items()})
            )
    if rank == 0:
        torch.save(found, out)


def on_ranks(world: int, cases: list[Case], out: Path) -> list[tuple[float, float, Gradients]]:
    """Loss, accuracy and gradients of each case, all in one start of the ranks, which costs seconds."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    # Forked from a server: torch is imported once and not by each of them, which takes longer than all they compute.
    multiprocessing.set_forkserver_preload(["micl_zoo.training.pretraining.pretrain"])
    mp.start_processes(one_rank, (world, port, cases, str(out)), nprocs=world, start_method="forkserver")
    return torch.load(out, weights_only=True)


def assert_same(
    found: tuple[float, float, Gradients], wanted: tuple[float, float, Gradients], least: float = 1e-5
) -> None:
    assert found[:2] == pytest.approx(wanted[:2], abs=1e-6)
    assert set(found[2]) == set(wanted[2])
    assert len(wanted[2]) > 10
    for name, gradient in wanted[2].items():
        assert gradient.abs().max() > least, name  # so that equal is not both nothing
        torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=1e-6, msg=name)


def by_groups(recipe: Recipe, init: Path | None = None) -> tuple[float, float, Gradients]:
    """The oracle: the mean of the groups' losses, one graph, one process, no step."""
    patches, views = seen(recipe.views)
    model = make_step(recipe, init=init).model
    losses, accuracies = zip(
        *(
            contrastive_loss(model.pool_views(p, v, (4, 4)), kappa=recipe.kappa, temperature=recipe.temperature)
            for p, v in zip(patches.split(recipe.contrast_size), views.split(recipe.contrast_size), strict=True)
        ),
        strict=True,
    )
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.vit.named_parameters() if p.grad is not None}
    return loss.item(), torch.stack(accuracies).mean().item(), gradients


@pytest.mark.parametrize("contrast_batch", [16, 8, 4])
@pytest.mark.parametrize("micro_batch", [None, 4, 3])
def test_groups_and_pieces_give_the_gradients_of_one_graph(
    recipe: Recipe, contrast_batch: int, micro_batch: int | None
) -> None:
    recipe = dataclasses.replace(recipe, contrast_batch=contrast_batch)
    assert_same(result(make_step(recipe, micro_batch=micro_batch)), by_groups(recipe))


def test_recomputed_blocks_give_the_same_gradients(recipe: Recipe) -> None:
    again = dataclasses.replace(recipe, activation_checkpointing=True)
    assert_same(result(make_step(again)), by_groups(recipe))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradients_of_one_process(recipe: Recipe, tmp_path: Path, world: int) -> None:
    changes: list[dict[str, Any]] = [{"negatives": "global"}, {"contrast_batch": BATCH // world}]
    if world == 2:
        changes += [{"negatives": "global", "views": 3, "pooled_token": "mean", "positions": "learned"}]
        changes += [{"contrast_batch": 4}, *({**change, "parallel": "fsdp"} for change in changes if FSDP)]
    cases = [(dataclasses.replace(recipe, **change), size, None) for change in changes for size in (None, 3)]
    for (case, *_), found in zip(cases, on_ranks(world, cases, tmp_path / "found.pt"), strict=True):
        assert_same(found, by_groups(case))


def test_other_negatives_are_another_loss(recipe: Recipe) -> None:
    losses = [by_groups(dataclasses.replace(recipe, contrast_batch=size))[0] for size in (4, 8, 16)]
    assert losses[0] < losses[1] < losses[2]


def test_groups_that_do_not_divide_among_the_processes_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="contrast"):
        make_step(dataclasses.replace(recipe, contrast_batch=8), Ranks(0, 4))


def test_several_nodes_need_a_meeting_point() -> None:
    with pytest.raises(UsageError, match="--rdzv HOST:PORT"):
        launch([], gpus=1, nodes=2)


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_several_nodes_need_a_secret(secret: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    if secret is not None:
        monkeypatch.setenv(SECRET, secret)
    with pytest.raises(UsageError, match=SECRET):
        launch([], nodes=2, rdzv="localhost:29500")


@pytest.mark.parametrize("endpoint", ["a:b", "a b:1", "a:99999", "[::1]:x"])
def test_a_meeting_point_that_is_none_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "0123456789abcdef")
    with pytest.raises(UsageError, match="--rdzv takes HOST:PORT"):
        launch([], nodes=2, rdzv=endpoint)


class Place(RendezvousBackend):
    """What anybody who reaches the port may read and write."""

    name = "place"
    there: bytes | None = None

    def get_state(self) -> Any:
        return None if self.there is None else (self.there, b"token")

    def set_state(self, state: bytes, token: Any = None) -> Any:
        self.there = state
        return state, b"token", True


def test_of_a_meeting_point_only_what_is_signed_is_read() -> None:
    place = Place()
    mine, other = Signed(place, b"0123456789abcdef"), Signed(place, b"another secret of them")
    assert mine.get_state() is None
    assert mine.set_state(b"state") == (b"state", b"token", True)
    assert mine.get_state() == (b"state", b"token")
    with pytest.raises(RendezvousStateError):
        other.get_state()
    assert place.there is not None
    for forged in (b"", b"state", pickle.dumps(print), place.there + b"more", b"0" * 32 + b"state"):
        place.there = forged
        with pytest.raises(RendezvousStateError):
            mine.get_state()


def test_what_the_ranks_tell_each_other_is_no_pickle() -> None:
    thing = ([[0.1, float("nan")]], ["a", "\udc80"], None, True)
    assert str(Ranks().gather(thing)) == str([[[[0.1, float("nan")]], ["a", "\udc80"], None, True]])
    with pytest.raises(TypeError, match="not JSON"):
        Ranks().gather(print)
