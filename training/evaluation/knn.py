"""Weighted k-nearest-neighbour classification of frozen embeddings, with DINO's settings: cosine, T = 0.07."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import UsageError
from micl_zoo.zoo.pools import Pool

from .features import Device, Features, Figures, embed_labelled
from .labelled import LabelledSet
from .protocols import Protocol
from .tables import scored

KS, TEMPERATURE = Protocol.ks, Protocol.temperature
QUERY_ROWS, BANK_ROWS = 1024, 65_536  # of one matrix of cosines: 268 MB in float32

Bank = Iterable[tuple[np.ndarray, np.ndarray]]  # pieces: rows (n, D) and their class numbers (n,)


def knn_predict(
    bank: Bank, queries: np.ndarray, *, classes: int, ks: Sequence[int] = KS, temperature: float = TEMPERATURE,
    device: Device = "cpu",
) -> dict[int, np.ndarray]:  # fmt: skip
    """Classify queries (N, D) by the votes of the k nearest rows of the bank: classes (N,) int64 by k, of one search.

    A neighbour votes exp(cosine / temperature) for its class; all rows of a bank smaller than k vote. Rows of any scale
    are L2-normalised here. The bank may be larger than memory: it is read once, and only the nearest rows of each piece
    stay.
    """
    asked = F.normalize(torch.from_numpy(queries).to(device).float(), dim=1)  # (N, D)
    cosines = torch.empty(len(asked), 0, device=device)
    labels = torch.empty(len(asked), 0, dtype=torch.long, device=device)
    for rows, numbers in bank:
        if rows.shape[1] != asked.shape[1]:
            raise UsageError(f"the bank has rows of {rows.shape[1]} numbers, the queries of {asked.shape[1]}")
        for start in range(0, len(rows), BANK_ROWS):
            part = slice(start, start + BANK_ROWS)
            piece = F.normalize(torch.from_numpy(rows[part]).to(device).float(), dim=1)
            named = torch.from_numpy(numbers[part]).to(device).long()
            cosines, labels = _nearest(asked, piece, named, cosines, labels, max(ks))
    if not cosines.shape[1]:
        raise UsageError("the bank has no rows: nothing to look for neighbours among")
    votes = ((cosines - cosines[:, :1]).double() / temperature).exp()  # from the nearest on: none is endless
    found = {}
    for k in ks:
        ballot = torch.zeros(len(asked), classes, dtype=votes.dtype, device=device)
        found[k] = ballot.scatter_add_(1, labels[:, :k], votes[:, :k]).argmax(1).cpu().numpy()
    return found


def _nearest(
    asked: Tensor, piece: Tensor, numbers: Tensor, cosines: Tensor, labels: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The nearest so far, (N, <= most) cosines in falling order and labels, with a piece of the bank added."""
    best = []
    for start in range(0, len(asked), QUERY_ROWS):
        part = slice(start, start + QUERY_ROWS)
        cosine, place = (asked[part] @ piece.T).topk(min(most, len(piece)))  # (n, <= most)
        together = torch.cat([cosines[part], cosine], dim=1)
        named = torch.cat([labels[part], numbers[place]], dim=1)
        kept, order = together.topk(min(most, together.shape[1]))
        best.append((kept, named.gather(1, order)))
    return torch.cat([kept for kept, _ in best]), torch.cat([named for _, named in best])


def measure(train: Features, test: Features, protocol: Protocol, classes: int, device: Device) -> Figures:
    """Measure the first pool of the features; figures by number of neighbours."""
    rows = next(iter(train.rows.values()))
    return measure_bank([(rows, train.labels)], test, protocol, classes, device)


def measure_bank(bank: Bank, test: Features, protocol: Protocol, classes: int, device: Device) -> Figures:
    """Measure as `measure` does, with the training features in pieces that need not fit into memory."""
    queries, how = next(iter(test.rows.values())), protocol
    found = knn_predict(bank, queries, classes=classes, ks=how.ks, temperature=how.temperature, device=device)
    return {str(k): scored(predictions == test.labels) for k, predictions in found.items()}


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:  # fmt: skip
    """Compute the share of test rows (N, D) whose k nearest training rows (M, D), any scale, vote for their label."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    found = knn_predict([(train, train_labels)], test, classes=classes, ks=(k,), temperature=temperature)
    return float((found[k] == test_labels).mean())


class Right(NamedTuple):
    """Which test images of a set get the right class."""

    found: dict[str, bool]  # by id
    left_out: int  # images, of training as well, that could not be embedded

    @property
    def accuracy(self) -> float:
        """The share of them, 0 to 1."""
        return round(sum(self.found.values()) / len(self.found), 4)


def measure_right(encoder: Encoder, labelled: LabelledSet, pool: Pool) -> Right:
    """Find which test images of a set k-NN gives the right class, by one pool's features, k = 20."""
    train, test = (embed_labelled(encoder, part, pools=(pool,)) for part in (labelled.train, labelled.test))
    bank = [(train.rows[pool], train.labels)]
    right = knn_predict(bank, test.rows[pool], classes=len(labelled.classes), ks=(20,))[20] == test.labels
    lost = set(test.refused)
    ids = [name for name in labelled.test.index.ids if name not in lost]
    return Right(dict(zip(ids, right.tolist(), strict=True)), len(train.refused) + len(test.refused))


def measure_knn(encoder: Encoder, labelled: LabelledSet, pool: Pool = "cls") -> float:
    """Measure the k-NN accuracy of one pool's features on a set, k = 20, 0 to 1."""
    return measure_right(encoder, labelled, pool).accuracy
