"""Data sets of images with their classes, and subsets of them."""

import copy
import io
import os
from typing import Any, BinaryIO, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from beit.config import SMALL_INPUT
from beit.data.class_folders import describe_unused, scan_classes
from beit.data.decode import load_image
from beit.data.sample_list import SampleList
from beit.errors import UserError, escape_text
from beit.files import archives
from beit.log import log_main


class ImageDataset(torch.utils.data.Dataset):
    """Image files with their classes.

    Args:
        samples (SampleList): the paths and labels.
        classes (list of str): their names.
        fits (function): whether an image's (width, height) is allowed; see `EvalTransform.fits`.
        read (function): from a path to the transform's input.

    Raises:
        UserError: on reading: an image can't be read (`UnreadableImage`) or has a size that is not allowed.
    """

    def __init__(self, samples: Any, classes: List[str], transform: Optional[Callable] = None,
                 fits: Optional[Callable[[int, int], bool]] = None, read: Callable = load_image) -> None:
        self.samples, self.classes, self.transform, self.fits, self.read = samples, classes, transform, fits, read
        self.held_out: Optional[np.ndarray] = None  # `subsets.name_keys` of the images of --val_split

    def subset(self, indices: Any, **changes: Any) -> 'ImageDataset':
        """A copy with only the samples `indices`, an array or slice; `changes` replace its transform, fits or read."""
        subset = copy.copy(self)
        subset.samples = self.samples.select(indices)
        vars(subset).update(changes)
        return subset

    def relabel(self, new_labels: Sequence[int], classes: List[str]) -> 'ImageDataset':
        """A copy in which label k is `new_labels[k]`, an index of `classes`."""
        changed = copy.copy(self)
        changed.samples, changed.classes = self.samples.relabel(new_labels, len(classes)), classes
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
            raise UserError('%s is %dx%d; with --input_size of %d and less images are not resized; set it to the '
                            'size of the images, or larger' % ((escape_text(path),) + image.size + (SMALL_INPUT,)))
        return image

    def open(self, path: str) -> BinaryIO:
        """The bytes of an image."""
        return archives.open_file(path)

    def size(self, path: str) -> int:
        """Their number."""
        return archives.size(path)


class ArrayDataset(ImageDataset):
    """Images without files (CIFAR), pixels uint8 (images, H, W, 3); their names are their numbers."""

    def __init__(self, pixels: np.ndarray, targets: Sequence[int], classes: List[str], transform: Callable) -> None:
        names = [b'%d' % number for number in range(len(pixels))]
        super().__init__(SampleList.from_names('', names, targets), classes, transform)
        self.pixels = pixels

    def load(self, path: str) -> Image.Image:
        return Image.fromarray(self.pixels[int(path)])

    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self.pixels[int(path)].tobytes())

    def size(self, path: str) -> int:
        return self.pixels[int(path)].nbytes


class ImageFolder(ImageDataset):
    """Class folders of images; the classes are the folders' names in sorted order.

    Args:
        device, depth, reading: see `class_folders.scan_classes` and `ImageDataset`.
        allow_empty: for --check_data; `empty` lists the class folders without an image.

    Raises:
        UserError: the folder is missing, has no class folders, or a class folder has no image.
    """

    def __init__(self, root: str, flag: str = '--data_path', device: Optional[torch.device] = None,
                 allow_empty: bool = False, depth: int = 1, **reading: Any) -> None:
        shown = escape_text(root)
        if not archives.isdir(root):
            raise UserError('%s: there is no folder %s; it must hold one folder of images per class' % (flag, shown))
        classes, samples, self.unused = scan_classes(root, device, depth)
        super().__init__(samples, classes, **reading)
        if not classes:
            raise UserError('%s: %s has no class folders%s; put the images of each class in a separate folder'
                            % (flag, shown, ' at --class_depth %d' % depth if depth > 1 else ''))
        counts = np.bincount(samples.targets, minlength=len(classes)).tolist()
        self.empty = [escape_text(os.path.join(root, name)) for name, count in zip(classes, counts) if not count]
        unused = describe_unused(reason for _, reason in self.unused) if self.unused else ''
        if self.empty and not allow_empty:
            raise UserError('%s: no image in the class folder%s %s%s; add images or remove the folder' % (
                flag, 's' if len(self.empty) > 1 else '', ', '.join(self.empty[:3]), unused and '; ' + unused))
        if unused:
            log_main('%s: %s; --check_data lists them' % (shown, unused))


def image_name(dataset: Any, index: int) -> str:
    """The name of a sample for messages: its escaped path, or its index if it has no separate file."""
    has_files = isinstance(dataset, ImageDataset) and not isinstance(dataset, ArrayDataset)
    return escape_text(dataset.samples[index][0]) if has_files else 'image %d' % index
