"""Image paths and their labels in a few arrays, which loader processes share: there is no object for each image."""

import collections.abc
import copy
import os
from typing import Any, Iterable, Optional, Sequence

import numpy as np
import torch


class SampleList(collections.abc.Sequence):
    """(path, class index) of every image; with several labels (path, float32 (classes,) of ones and zeros).

    Args:
        root: what names begin at, unless they are absolute.
        names: of the images, in the file system's encoding.
        labels: the class index of each image; with several labels the class indices of each.
        classes: how many there are; None where each image has one label.
    """

    def __init__(self, root: str, names: Sequence[bytes], labels: Sequence, classes: Optional[int] = None) -> None:
        self.root, self.classes, self.names, self.spans = root, classes, b''.join(names), _spans(map(len, names))
        self.label_spans = None if classes is None else _spans(map(len, labels))
        flat = labels if classes is None else [label for each in labels for label in each]
        self.labels = np.asarray(flat, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end, and there is an IndexError
        start, end = self.spans[index].tolist()
        path = os.path.join(self.root, os.fsdecode(self.names[start:end]))
        if self.classes is None:
            return path, int(self.labels[index])
        target = torch.zeros(self.classes)
        target[torch.from_numpy(self.labels_of(index))] = 1.
        return path, target

    def select(self, indices: Any) -> 'SampleList':
        """Those images only, in the order of `indices` (int array)."""
        selected = copy.copy(self)
        selected.spans = self.spans[indices]
        if self.label_spans is None:
            selected.labels = self.labels[indices]
        else:
            selected.label_spans = self.label_spans[indices]
        return selected

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.label_spans is not None

    @property
    def targets(self) -> np.ndarray:
        """int64 (images,): the class of each, where every image has one."""
        return self.labels

    def labels_of(self, index: int) -> np.ndarray:
        """int64 array: the class indices of an image that may have several."""
        start, end = self.label_spans[index].tolist()  # type: ignore[index]
        return self.labels[start:end]


def _spans(lengths: Iterable[int]) -> np.ndarray:
    """int64 (items, 2): start and end of each."""
    ends = np.cumsum(np.fromiter(lengths, dtype=np.int64))
    return np.stack([np.concatenate([[0], ends[:-1]]) if len(ends) else ends, ends], axis=1)
