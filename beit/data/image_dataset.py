"""Data sets of image files with their classes, and parts of them."""

import collections.abc
import copy
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch

from beit.data import subsets
from beit.data.class_folders import EXTENSIONS, scan_classes
from beit.data.decode import load_image
from beit.data.transforms import SMALL_INPUT
from beit.errors import UserError, escape_text


class ImageDataset(torch.utils.data.Dataset):
    """Image files with their classes.

    Args:
        samples (sequence): (path, class index), or with several classes (path, float32 (classes,)), of each.
        classes (list of str): their names.
        fits (function): of an image's (width, height), where images aren't resized; see
            `transforms.small_input_rule`.
        read (function): of a path; gives what the transform takes.

    Raises:
        UserError: on reading, an image that can't be read (`UnreadableImage`) or doesn't fit.
    """

    def __init__(self, samples: Sequence, classes: List[str], transform: Optional[Callable] = None,
                 fits: Optional[Callable[[int, int], bool]] = None, read: Callable = load_image) -> None:
        self.samples, self.classes, self.transform, self.fits, self.read = samples, classes, transform, fits, read
        self.held_out: Optional[np.ndarray] = None  # what --val_split took: `subsets.name_keys`

    def subset(self, indices: Any, **changes: Any) -> 'ImageDataset':
        """A copy with those samples only; `changes` replace its transform, fits or read."""
        subset = copy.copy(self)
        subset.samples = Subset(self.samples, indices)
        vars(subset).update(changes)
        return subset

    def relabel(self, places: Sequence[int], classes: List[str]) -> 'ImageDataset':
        """A copy whose class k is class `places[k]` of `classes`."""
        changed = copy.copy(self)
        changed.samples, changed.classes = Relabelled(self.samples, places, len(classes)), classes
        return changed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        path, label = self.samples[index]
        image = self.load(path)
        return image if self.transform is None else self.transform(image), label

    def load(self, path: str) -> Any:
        image = self.read(path)
        if self.fits is not None and not self.fits(*image.size):
            raise UserError('%s is %dx%d; with --input_size of %d and less images are not resized, so give their own '
                            'size, or a larger --input_size' % ((escape_text(path),) + image.size + (SMALL_INPUT,)))
        return image


class ImageFolder(ImageDataset):
    """Class folders of images; the classes are the folders' names in sorted order.

    Args:
        scan (function): gives the `class_folders.FolderScan` of root.

    Raises:
        UserError: the folder is missing, has no class folders, or one of them has no image.
    """

    def __init__(self, root: str, transform: Optional[Callable] = None, flag: str = '--data_path',
                 fits: Optional[Callable[[int, int], bool]] = None, read: Callable = load_image,
                 scan: Callable = scan_classes) -> None:
        shown = escape_text(root)
        if not os.path.isdir(root):
            raise UserError('%s: there is no folder %s; it must hold one folder of images per class' % (flag, shown))
        found = scan(root)
        super().__init__(found.samples, found.classes, transform, fits, read)
        if not self.classes:
            raise UserError('%s: %s has no class folders; put the images of each class in a folder of its own'
                            % (flag, shown))
        filled = np.bincount(found.samples.labels, found.samples.counts, len(self.classes)).tolist()
        empty = [name for name, images in zip(self.classes, filled) if not images]
        if empty:
            raise UserError('%s: no image (%s) in the class folder%s %s; add images or remove the folder'
                            % (flag, ' '.join(EXTENSIONS), 's' if len(empty) > 1 else '',
                               ', '.join(escape_text(os.path.join(root, name)) for name in empty[:3])))


def image_name(dataset: Any, index: int) -> str:
    """The name of a sample in messages: its printable path, or its number if it has no separate file."""
    samples = getattr(dataset, 'samples', None)
    return 'image %d' % index if samples is None else escape_text(samples[index][0])


def label_source(dataset: Any) -> Any:
    """The object with a data set's labels: its samples, or CIFAR itself."""
    return getattr(dataset, 'samples', dataset)


class Subset(collections.abc.Sequence):
    """Some of a data set's samples, in order.

    Args:
        samples: `class_folders.ImageList` or `csv_dataset.Manifest`.
        indices (array of int): into `samples`.
    """

    def __init__(self, samples: Any, indices: Any) -> None:
        self.samples, self.indices = samples, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.samples[int(each)] for each in self.indices[index]]
        return self.samples[int(self.indices[index])]

    @property
    def targets(self) -> np.ndarray:
        return self.samples.targets[self.indices]

    def relative_names(self, start: int, stop: int) -> List[bytes]:
        indices = self.indices[start:stop]
        if not len(indices):
            return []
        first = int(indices.min())
        names = self.samples.relative_names(first, int(indices.max()) + 1)
        return [names[index] for index in (indices - first).tolist()]

    def labels_of(self, index: int) -> np.ndarray:
        return self.samples.labels_of(int(self.indices[index]))

    @property
    def root(self) -> str:
        return self.samples.root

    @property
    def multi_label(self) -> bool:
        return subsets.is_multi_label(self.samples)


class Relabelled(collections.abc.Sequence):
    """A data set's samples, in which class k is `places[k]` of `classes` others."""

    def __init__(self, samples: Any, places: Sequence[int], classes: int) -> None:
        self.samples, self.places, self.classes = samples, np.asarray(places, dtype=np.int64), classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        path, label = self.samples[index]
        if not subsets.is_multi_label(self.samples):
            return path, int(self.places[label])
        target = torch.zeros(self.classes)
        target[self.places] = label
        return path, target

    @property
    def targets(self) -> np.ndarray:
        return self.places[np.asarray(self.samples.targets)]

    def labels_of(self, index: int) -> np.ndarray:
        return self.places[self.samples.labels_of(index)]

    def __getattr__(self, name: str) -> Any:  # names, folders: those of the samples
        if name == 'samples':  # not unpickled yet
            raise AttributeError(name)
        return getattr(self.samples, name)
