"""Confusion matrix, hardest and most confident images of an evaluation."""

import collections
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from beit.distributed import collectives
from beit.training.metrics import Metric

KEPT = 24  # images of each kind
LARGEST_IMAGE = 2048  # classes; a picture of more confusions nobody can look at


class Prediction(NamedTuple):
    """One image of the data set."""
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    true: int  # its class
    predicted: int
    probability: float  # of the predicted class
    loss: float  # cross entropy, so that exp(-loss) is the true class's probability


class Predictions(Metric):
    """A metric without a figure; five numbers an image stay on the device until the end.

    Attributes, once finished:
        counts (Counter): {(true class, predicted class): images}.
        hardest, most_confident (list of Prediction): wrong ones by falling loss, right ones by falling probability;
            `KEPT` at most.
    """

    def __init__(self, nb_classes):
        self.nb_classes, self._batches = nb_classes, []
        self.counts, self.hardest, self.most_confident = collections.Counter(), [], []

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        """Take a `loader.Batch` and what the network gave for it, float32 (B, classes)."""
        targets = batch[1].to(output.device)
        if targets.dim() != 1:  # several classes an image: no confusion of one with another
            return
        probability, predicted = torch.softmax(output, dim=1).max(dim=1)
        losses = F.cross_entropy(output, targets, reduction='none')
        self._batches.append((batch[2], targets, predicted, probability, losses))

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """Sort and count; {}, for it adds no figure. Where the set is shared out, every process calls this, and all get
        the whole.

        Args:
            sharded (bool): each process has seen another part; else all have seen the same.
        """
        columns = [torch.cat([each.cpu() for each in column]).numpy() for column in zip(*self._batches)]
        self._batches = []
        found = _sort(self.nb_classes, *columns) if columns else ([], [], [])
        parts = collectives.all_gather_json(found, device) if sharded else [found]
        for pairs, _, _ in parts:
            for code, count in pairs:
                self.counts[divmod(code, self.nb_classes)] += count
        self.hardest, self.most_confident = ([Prediction(*each) for each in kept] for kept in (
            sorted((each for part in parts for each in part[1]), key=_by_loss)[:KEPT],
            sorted((each for part in parts for each in part[2]), key=_by_probability)[:KEPT]))
        return {}

    def per_class(self) -> Tuple[np.ndarray, np.ndarray]:
        """(right, images) of each class: two int64 (classes,)."""
        right, images = (np.zeros(self.nb_classes, np.int64) for _ in range(2))
        for (true, predicted), count in self.counts.items():
            images[true] += count
            right[true] += count * (true == predicted)
        return right, images

    def matrix(self) -> np.ndarray:
        """int64 (classes, classes): rows are true classes, columns predicted ones."""
        matrix = np.zeros((self.nb_classes, self.nb_classes), np.int64)
        for pair, count in self.counts.items():
            matrix[pair] = count
        return matrix

    def most_confused(self, most: int = 20) -> List[Tuple[int, int, int]]:
        """[(true, predicted, images)] of the wrong ones, the most frequent first."""
        wrong = [pair + (count,) for pair, count in self.counts.items() if pair[0] != pair[1]]
        return sorted(wrong, key=lambda each: (-each[2],) + each[:2])[:most]

    def image(self, pixels: int = 480) -> Optional[np.ndarray]:
        """The matrix as a picture, uint8 (H, W, 3), dark where more of a true class (row) went; None for too many."""
        if self.nb_classes > LARGEST_IMAGE or not self.counts:
            return None
        matrix = self.matrix()
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shade = 255. - np.sqrt(shares)[..., None] * (255. - np.array([23., 62., 122.]))  # a root, to see rare ones
        side = max(pixels // self.nb_classes, 1)
        return np.rint(shade).astype(np.uint8).repeat(side, axis=0).repeat(side, axis=1)


def _by_loss(each):
    return -(each[4] if math.isfinite(each[4]) else math.inf), each[0]


def _by_probability(each):
    return -each[3], each[0]


def _sort(nb_classes, indices, targets, predicted, probability, losses):
    """([code of (true, predicted), images], hardest, most_confident) of one process's images, as JSON can hold them."""
    codes, counts = np.unique(targets.astype(np.int64) * nb_classes + predicted, return_counts=True)

    def chosen(rows, order):
        rows = rows[np.lexsort((indices[rows], order[rows]))][:KEPT]
        return [[int(indices[row]), int(targets[row]), int(predicted[row]), float(probability[row]),
                 float(losses[row])] for row in rows]

    wrong, right = np.flatnonzero(predicted != targets), np.flatnonzero(predicted == targets)
    return ([[int(code), int(count)] for code, count in zip(codes, counts)],
            chosen(wrong, -np.where(np.isfinite(losses), losses, np.inf)), chosen(right, -probability))
