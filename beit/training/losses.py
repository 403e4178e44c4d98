"""The training losses, cross entropy and binary cross entropy, and the weights of classes."""

from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from beit.errors import UserError, escape_text, nearest
from beit.files.class_files import read_weights

LOSSES = ('auto', 'ce', 'bce')


def activation(loss: str, multi_label: bool = False) -> str:
    """The function from logits to probabilities that fits the loss of `build_criterion`."""
    return 'sigmoid' if loss == 'bce' or multi_label else 'softmax'


def sum_over_layers(criterion: Callable) -> Callable:
    """A criterion of all heads of a linear probe, from their logits (B, layers, classes): the sum of their losses."""
    return lambda output, targets: torch.stack([criterion(logits, targets) for logits in output.unbind(1)]).sum()


def build_criterion(loss: str, smoothing: float, mixup: Any, weights: Optional[torch.Tensor] = None,
                    multi_label: bool = False) -> torch.nn.Module:
    """The loss of logits (B, classes) and targets: class indices (B,), or float (B, classes) for mixup or multi-label.

    Args:
        mixup: None, or the function that mixes and smooths the targets.
        weights (float32 (classes,)): see `class_weights`; None for equal weights.
    """
    if activation(loss, multi_label) == 'sigmoid':
        return BinaryCrossEntropy(smoothing, weights, smooths_dense=mixup is None)
    if weights is not None:
        return WeightedCrossEntropy(smoothing, weights)
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else torch.nn.CrossEntropyLoss()


def one_hot(targets: torch.Tensor, logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Class indices (B,) as float (B, classes): 1 - smoothing for the class, plus smoothing / classes for each."""
    share = smoothing / logits.shape[-1]
    return torch.full_like(logits, share).scatter_(1, targets[:, None], 1. - smoothing + share)


def image_losses(output: torch.Tensor, targets: torch.Tensor, activation: str) -> torch.Tensor:
    """(B,): the loss of each image for this activation, without smoothing, mixing and weights."""
    if targets.dim() == 1 and activation == 'softmax':
        return F.cross_entropy(output, targets, reduction='none')
    ones = one_hot(targets, output, 0.) if targets.dim() == 1 else targets
    return F.binary_cross_entropy_with_logits(output, ones, reduction='none').mean(dim=1)


class BinaryCrossEntropy(torch.nn.Module):
    """A binary cross entropy for each class, averaged over classes and images, with timm's smoothing.

    Args:
        pos_weight (float32 (classes,)): the weight of positive examples of each class; None is 1.
        smooths_dense (bool): whether to move targets (B, classes) towards 0.5; false if mixup does it.
    """

    pos_weight: Optional[torch.Tensor]

    def __init__(self, smoothing: float = 0., pos_weight: Optional[torch.Tensor] = None,
                 smooths_dense: bool = True) -> None:
        super().__init__()
        self.smoothing, self.smooths_dense = smoothing, smooths_dense
        self.register_buffer('pos_weight', pos_weight)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.dim() == 1:
            targets = one_hot(targets, logits, self.smoothing)
        elif self.smooths_dense:
            targets = targets * (1. - self.smoothing) + 0.5 * self.smoothing
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), pos_weight=self.pos_weight)


class WeightedCrossEntropy(torch.nn.Module):
    """Cross entropy with each class's term times its weight, averaged over the images, like PyTorch's for soft targets.

    PyTorch's for class indices divides by the weights of the batch, so a gradient would depend on the distribution of
    images among micro-steps and processes.
    """

    weight: torch.Tensor

    def __init__(self, smoothing: float, weight: torch.Tensor) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer('weight', weight)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft = one_hot(targets, logits, self.smoothing) if targets.dim() == 1 else targets
        return -(self.weight * soft * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


# ---- class weights

def class_weights(source: str, classes: Sequence[str], counts: np.ndarray) -> torch.Tensor:
    """float32 (classes,): the weights of --class_weights.

    'balanced' is scikit-learn's: all labels / (classes * labels of this class), with an average of 1 over the labels.

    Args:
        source (str): 'balanced', or a CSV file of `class,weight` rows or a JSON object.
        counts (array of int): the number of training images of each class.

    Raises:
        UserError: a class has no training image, or the file is invalid.
    """
    flag = '--class_weights %s: ' % escape_text(source)
    if source == 'balanced':
        missing = [name for name, count in zip(classes, counts) if not count]
        if missing:
            raise UserError(flag + 'no training image of class %s; add some, or give the weights in a file'
                            % ', '.join(map(escape_text, missing[:5])))
        return torch.tensor(np.sum(counts) / (len(classes) * np.asarray(counts, dtype=np.float64)), dtype=torch.float32)
    by_class, known = read_weights(source), set(classes)
    for name in by_class:
        if name in known:
            continue
        near = [] if name.isdigit() else nearest(name, classes)  # 12 is no misspelling of 1 or 2
        raise UserError(flag + 'there is no class %s; %s' % (
            escape_text(name), 'did you mean %s?' % ' or '.join(map(escape_text, near)) if near else
            'the first is %s, the last %s' % (escape_text(classes[0]), escape_text(classes[-1]))))
    missing = [name for name in classes if name not in by_class]
    if missing:
        raise UserError(flag + 'no weight for class %s%s; give every class one' % (
            ', '.join(map(escape_text, missing[:5])),
            ' and %d more' % (len(missing) - 5) if len(missing) > 5 else ''))
    weights = torch.tensor([by_class[name] for name in classes], dtype=torch.float32)
    if not weights.sum() > 0 or not torch.isfinite(weights).all():
        raise UserError(flag + 'all weights are 0, or one is too large; give one above 0')
    return weights


def describe_weights(weights: torch.Tensor, classes: Sequence[str]) -> str:
    """One log line: every class's weight, or of many the smallest and largest."""
    shown = ['%s %.4g' % (escape_text(name), weight) for weight, name in sorted(zip(weights.tolist(), classes))]
    return 'Class weights: ' + ', '.join(shown if len(shown) <= 12 else shown[:4] + ['…'] + shown[-4:])
