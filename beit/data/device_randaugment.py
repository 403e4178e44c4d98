"""RandAugment for `--data_backend fast`: drawn in a loader's worker, applied on the device.

It is for accelerators only; a CPU is slower than Pillow in the worker. timm's own code draws the operations, from the
same random numbers, on a stand-in for the image that records them. The pixels match Pillow's except for rounding;
rotation, shear and translation are bilinear.
"""

import functools
import itertools
import math
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.data.auto_augment import RandAugment
from torchvision.transforms import RandomHorizontalFlip

# Operations recorded as the table or affine matrix that timm computes; others are recorded by name.
RECORDED = {'Invert', 'Posterize', 'PosterizeIncreasing', 'PosterizeOriginal', 'Solarize', 'SolarizeIncreasing',
            'SolarizeAdd', 'Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'TranslateXRel', 'TranslateYRel'}


# ---- in the worker

class DeferredImage(NamedTuple):
    """An image with the operations to apply to it on the device."""
    image: torch.Tensor  # uint8 (H, W, 3)
    operations: list  # of (kind, arguments), in order; the first is the flip, None for no flip


class DeferredRandAugment:
    """Draws torchvision's flip and timm's RandAugment: a uint8 tensor (3, H, W) to a `DeferredImage`."""

    def __init__(self, flip: RandomHorizontalFlip, policy: RandAugment) -> None:
        self.mirrors, self.policy = flip.p, policy
        for operation in policy.ops:
            if operation.name not in RECORDED:
                operation.aug_fn = functools.partial(_record, operation.name.replace('Increasing', ''))

    def __call__(self, image: torch.Tensor) -> DeferredImage:
        operations: List = [('mirror', []) if torch.rand(1) < self.mirrors else None]
        recorded = self.policy(_RecordingImage(image.shape[2], image.shape[1]))
        return DeferredImage(image.permute(1, 2, 0).contiguous(), operations + recorded.operations)


def can_defer(steps: Sequence) -> bool:
    """Whether these steps of a transform are a flip and a RandAugment whose operations the device has."""
    return len(steps) == 2 and isinstance(steps[0], RandomHorizontalFlip) and isinstance(steps[1], RandAugment) \
        and all(each.name in RECORDED or each.name.replace('Increasing', '') in KINDS for each in steps[1].ops)


def _record(name: str, image: '_RecordingImage', *arguments: float, **_: Any) -> '_RecordingImage':
    """Replaces timm's function of an operation."""
    image.operations.append((name, list(map(float, arguments))))
    return image


class _RecordingImage:
    """Stands for an image and records the operations of timm and Pillow."""

    mode = 'RGB'

    def __init__(self, width: int, height: int) -> None:
        self.size, self.operations = (width, height), []  # type: Tuple[int, int], List[Tuple[str, List]]

    def point(self, table: Sequence[int]) -> '_RecordingImage':
        self.operations.append(('table', list(map(int, table))))
        return self

    def transform(self, size: Any, method: Any, matrix: Sequence[float], resample: Any = None, fillcolor: Any = None
                  ) -> '_RecordingImage':
        colour = fillcolor if isinstance(fillcolor, (tuple, list)) else (fillcolor or 0,) * 3
        self.operations.append(('affine', list(map(float, (*matrix, *colour)))))
        return self

    def rotate(self, degrees: float, resample: Any = None, fillcolor: Any = None) -> '_RecordingImage':
        """Around the centre, counter-clockwise, like Pillow."""
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        x, y = self.size[0] / 2, self.size[1] / 2
        return self.transform(self.size, None, (cosine, -sine, x - cosine * x + sine * y,
                                                sine, cosine, y - sine * x - cosine * y), resample, fillcolor)


def collate_ops(operations: Sequence[Sequence]) -> List[Tuple]:
    """[(kind, indices in the batch int64 (n,), arguments (n, ...))]: the operations for a batch, in order.

    Groups images with the same kind of first operation, then of second operation, and so on.

    Args:
        operations: of each image, see `DeferredImage`.
    """
    packed = []
    for turn in itertools.zip_longest(*operations):
        for kind in sorted({operation[0] for operation in turn if operation}):
            indices = [index for index, operation in enumerate(turn) if operation and operation[0] == kind]
            packed.append((kind, torch.tensor(indices), torch.tensor(
                [turn[index][1] for index in indices], dtype=torch.uint8 if kind == 'table' else torch.float32)))
    return packed


# ---- on the device

def apply(images: torch.Tensor, packed: Sequence[Tuple]) -> None:
    """Apply the result of `collate_ops` to uint8 images (B, 3, H, W), in place."""
    for kind, indices, arguments in packed:
        indices = indices.to(images.device, non_blocking=True)
        arguments = arguments.to(images.device, non_blocking=True)
        images.index_copy_(0, indices, KINDS[kind](images.index_select(0, indices), arguments))


def apply_lut(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Look up each channel's values in its table. images: uint8 (n, 3, H, W); tables: uint8 (n, 768)."""
    return tables.view(len(images) * 3, 256).gather(1, images.reshape(len(images) * 3, -1).long()).view_as(images)


def affine(images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
    """out(x, y) = in(a x + b y + c, d x + e y + f), bilinear, the colour outside; arguments (n, 9): a to f, colour.

    Coordinates refer to pixel centres, the first at 0.5, as in Pillow.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = (value.view(-1, 1, 1) for value in arguments[:, :6].unbind(1))
    x = torch.arange(width, device=images.device, dtype=torch.float32).add_(0.5).view(1, 1, -1)
    y = torch.arange(height, device=images.device, dtype=torch.float32).add_(0.5).view(1, -1, 1)
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    grid = torch.stack((from_x * (2. / width) - 1, from_y * (2. / height) - 1), dim=3)
    sampled = F.grid_sample(images.float(), grid, padding_mode='border', align_corners=False).add_(1e-3)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return torch.where(inside[:, None], sampled, arguments[:, 6:, None, None]).to(torch.uint8)


def blend(degenerate: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """degenerate + factor * (images - degenerate), truncated to whole numbers; factors (n, 1)."""
    images = images.float()
    return (degenerate + factors.view(-1, 1, 1, 1) * (images - degenerate)).clamp_(0, 255).to(torch.uint8)


def grey(images: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma with Pillow's rounding, float32 (n, 1, H, W) of whole numbers."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).float()[:, None]


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return blend(grey(images).mean((1, 2, 3), keepdim=True).add_(0.5).floor_(), images, factors)


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Blend with a 3 x 3 smoothing: the centre has weight 5, its neighbours 1; the border is unchanged."""
    smooth = images.float()
    rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor_()
    return blend(smooth, images, factors)


def autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel stretched over 0 to 255; one of a single value stays."""
    flat = images.view(len(images) * 3, -1)
    low, high = flat.min(1, keepdim=True).values.float(), flat.max(1, keepdim=True).values.float()
    values = torch.arange(256, device=images.device, dtype=torch.float32)
    stretched = ((values - low) * 255 / (high - low).clamp(min=1)).add_(1e-3).clamp_(0, 255).floor_()  # no 254.9999
    return apply_lut(images, torch.where(high > low, stretched, values).to(torch.uint8))


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Equalize each channel's histogram with Pillow's integer arithmetic."""
    flat = images.view(len(images) * 3, -1).long()
    counts = torch.zeros(len(flat), 256, device=images.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    newest = flat.max(1, keepdim=True).values
    step = ((flat.shape[1] - counts.gather(1, newest)) / 255).floor_()
    below = counts.cumsum(1) - counts
    table = ((below + (step / 2).floor_()) / step.clamp(min=1)).floor_().clamp_(0, 255)
    values = torch.arange(256, device=images.device, dtype=torch.float32)
    return apply_lut(images, torch.where(step > 0, table, values).to(torch.uint8))


KINDS = {'mirror': lambda images, _: images.flip(3), 'table': apply_lut, 'affine': affine,
         'AutoContrast': autocontrast, 'Equalize': equalize, 'Contrast': contrast, 'Sharpness': sharpness,
         'Color': lambda images, factors: blend(grey(images), images, factors),
         'Brightness': lambda images, factors: blend(torch.zeros((), device=images.device), images, factors)}
