"""The confusion matrix, and the hardest and most confident images, of an evaluation."""

import collections
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from beit.training import losses, metrics

KEPT = 24  # images of each kind
LARGEST_IMAGE = 2048  # classes; a larger picture is unreadable


class EvaluatedImage(NamedTuple):
    index: int  # type: ignore[assignment]  # in the data set; hides tuple.index
    target: int
    predicted: int
    probability: float  # of the predicted class
    target_probability: float
    loss: float


class ConfusionMatrix(metrics.Metric):
    """A metric without a figure, for images with one class each. It keeps six numbers per image on the device.

    The results are complete after `compute`; at most `KEPT` images of each kind.
    """

    def __init__(self, nb_classes: int, activation: str = 'softmax') -> None:
        self.nb_classes, self.activation = nb_classes, activation
        self.batches: List[Tuple[torch.Tensor, ...]] = []
        self.counts: Dict[Tuple[int, int], int] = collections.Counter()  # {(target, predicted class): images}
        self.hardest: List[EvaluatedImage] = []  # wrong, by decreasing loss
        self.most_confident: List[EvaluatedImage] = []  # right, by decreasing probability
        self.figures: Dict[str, Any] = {}  # all of the evaluation, which its caller sets

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        targets = batch[1].to(output.device)
        predicted = metrics.top_classes(output, 1)
        shares = torch.sigmoid(output) if self.activation == 'sigmoid' else torch.softmax(output, dim=1)
        self.batches.append((batch[2], targets, predicted[:, 0], shares.gather(1, predicted)[:, 0],
                             shares.gather(1, targets[:, None])[:, 0],
                             losses.image_losses(output, targets, self.activation)))

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """Sort and count the images of all processes, on each. Returns {}, since it adds no figure."""
        columns = metrics.gather_batches(list(zip(*self.batches)) or [()] * 6, sharded, device)
        _, targets, predicted, probability, _, values = columns
        pairs, counts = np.unique(targets * self.nb_classes + predicted, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist()):
            self.counts[divmod(pair, self.nb_classes)] = count
        is_wrong = predicted != targets
        self.hardest = _first(columns, is_wrong, -np.where(np.isfinite(values), values, np.inf))
        self.most_confident = _first(columns, ~is_wrong, -probability)
        self.batches = []
        return {}

    def state(self) -> Dict[str, Any]:
        """The results as JSON values, for `load_state`."""
        return {'counts': [list(pair) + [count] for pair, count in self.counts.items()],
                'hardest': self.hardest, 'most_confident': self.most_confident, 'figures': self.figures}

    def load_state(self, state: Dict[str, Any]) -> None:
        self.counts = collections.Counter({(target, predicted): count for target, predicted, count in state['counts']})
        self.figures = state.get('figures', {})  # an earlier version wrote none
        self.hardest, self.most_confident = (
            [EvaluatedImage._make(math.nan if value is None else value for value in each) for each in state[kind]]
            for kind in ('hardest', 'most_confident'))

    def per_class(self) -> Tuple[np.ndarray, np.ndarray]:
        """(right images, images) of each class: two int64 (classes,)."""
        right, images = np.zeros((2, self.nb_classes), np.int64)
        for (target, predicted), count in self.counts.items():
            images[target] += count
            right[target] += count * (target == predicted)
        return right, images

    def matrix(self) -> np.ndarray:
        """int64 (classes, classes): rows are targets, columns predicted classes."""
        matrix = np.zeros((self.nb_classes, self.nb_classes), np.int64)
        for pair, count in self.counts.items():
            matrix[pair] = count
        return matrix

    def most_confused(self, most: int = 20) -> List[Tuple[int, int, int]]:
        """[(target, predicted, images)] of wrong predictions, the most frequent first."""
        wrong = [pair + (count,) for pair, count in self.counts.items() if pair[0] != pair[1]]
        return sorted(wrong, key=lambda each: (-each[2],) + each[:2])[:most]

    def image(self, pixels: int = 480) -> Optional[np.ndarray]:
        """The matrix as a picture, uint8 (H, W, 3), darker for a larger share of the row; None for too many classes."""
        if self.nb_classes > LARGEST_IMAGE or not self.counts:
            return None
        matrix = self.matrix()
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shade = 255. - np.sqrt(shares)[..., None] * (255. - np.array([23., 62., 122.]))  # the root shows rare ones
        side = max(pixels // self.nb_classes, 1)
        return np.rint(shade).astype(np.uint8).repeat(side, axis=0).repeat(side, axis=1)


def _first(columns: List[np.ndarray], mask: np.ndarray, order: np.ndarray) -> List[EvaluatedImage]:
    """The first `KEPT` masked images by `order`, then by their index in the data set."""
    rows = np.flatnonzero(mask)
    rows = rows[np.lexsort((columns[0][rows], order[rows]))][:KEPT]
    return [EvaluatedImage(*(column[row].item() for column in columns)) for row in rows]
