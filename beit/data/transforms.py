"""The transforms of an image, and mixup and cutmix of a batch. `loader` seeds their random numbers."""

import dataclasses
import functools
import inspect
import math
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torchvision import transforms

from beit.config import (
    EVAL_FITS, MAX_INPUT_SIZE, SMALL_INPUT, MixupConfig, TransformConfig, parse_colour, policy_or_none)
from beit.data import device_randaugment, fast_decode
from beit.data.decode import EXIF, MODES, Reading, load_image, read_up_to
from beit.errors import UserError, unknown_value_error
from modeling_finetune import INPUT_MEAN, INPUT_STD

try:
    from torchvision.transforms import InterpolationMode
except ImportError:  # torchvision before 0.9 takes Pillow's constants
    InterpolationMode = Image

INTERPOLATIONS = ('random', 'bilinear', 'bicubic', 'lanczos')
BACKENDS = ('exact', 'fast')
PADDING = 4


# ---- evaluation

@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The transform of evaluation, prediction, the report and every export: resize the shorter side, crop the centre,
    normalise. Images for inputs of `SMALL_INPUT` and less are not resized: they must have that size, see `fits`.
    Training reads files in the same way.
    """
    input_size: int = 224  # pixels a side of the crop
    crop_pct: float = 224 / 256  # input_size / the shorter side
    interpolation: str = 'bicubic'
    mean: Tuple[float, ...] = INPUT_MEAN  # of pixels between 0 and 1
    std: Tuple[float, ...] = INPUT_STD
    crop_mode: str = 'center'  # timm's name; 'squash' resizes any shape to the square, 'border' pads with the mean
    exif: str = 'ignored'  # see `decode.Reading`
    transparency: str = 'dropped'

    @classmethod
    def from_config(cls, config: TransformConfig) -> 'EvalTransform':
        """From the flags; without --crop_pct, the reference's crop for this input size."""
        if getattr(config, 'evaluation', None) is not None:
            return config.evaluation
        rgb = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if config.imagenet_default_mean_and_std else (
            INPUT_MEAN, INPUT_STD)
        mean, std = (values[:config.in_chans // 3 * 3] + (sum(values) / 3,) * (config.in_chans % 3)
                     for values in map(tuple, rgb))
        return cls(mean=mean, std=std).with_flags(vars(config)).at_size(
            config.input_size, config.crop_pct)

    def with_flags(self, flags: Mapping[str, Any]) -> 'EvalTransform':
        """A copy with the --exif, --background and --eval_fit in `flags`; see `check`."""
        return dataclasses.replace(
            self, exif=EXIF.get(flags['exif'], flags['exif']) if 'exif' in flags else self.exif,
            transparency=(flags['background'] or 'dropped') if 'background' in flags else self.transparency,
            crop_mode=EVAL_FITS.get(flags['eval_fit'], '') if 'eval_fit' in flags else self.crop_mode)

    @property
    def flags(self) -> Dict[str, Any]:
        """The flags of `with_flags` that give this transform's values."""
        return {'exif': next(flag for flag, value in EXIF.items() if value == self.exif),
                'background': '' if self.transparency == 'dropped' else self.transparency,
                'eval_fit': next(flag for flag, value in EVAL_FITS.items() if value == self.crop_mode)}

    def at_size(self, input_size: int, crop_pct: Optional[float] = None) -> 'EvalTransform':
        """A copy for another input size; without `crop_pct`, the reference's crop for that size."""
        crop_pct = crop_pct or (224 / 256 if input_size < 384 else 1.0)
        crops = self.crop_mode == 'center' and input_size > SMALL_INPUT
        return dataclasses.replace(self, input_size=input_size, crop_pct=crop_pct if crops else 1.0)

    @classmethod
    def from_timm(cls, settings: Dict[str, Any]) -> 'EvalTransform':
        """The inverse of `to_timm`. Raises ValueError, TypeError or LookupError for other content."""
        _, height, width = settings['input_size']
        if height != width:
            raise ValueError('not the preprocessing of a square input')
        mean, std = (tuple(map(float, settings[name])) for name in ('mean', 'std'))
        transform = cls(height, float(settings['crop_pct']), settings['interpolation'], mean, std,
                        settings.get('crop_mode', 'center'))
        transform.check()
        return transform

    def check(self) -> None:
        """Raise a ValueError for values that this program does not support."""
        if type(self.input_size) is not int or not 1 <= self.input_size <= MAX_INPUT_SIZE or not 0 < self.crop_pct <= 1:
            raise ValueError('input size %.20r, crop_pct %.20r' % (self.input_size, self.crop_pct))
        if self.interpolation not in INTERPOLATIONS[1:] or self.crop_mode not in EVAL_FITS.values():
            raise ValueError('interpolation %.20r, crop mode %.20r' % (self.interpolation, self.crop_mode))
        if not len(self.mean) == len(self.std) in MODES or not all(map(math.isfinite, self.mean + self.std)) \
                or min(self.std) <= 0:
            raise ValueError('mean %.60r, std %.60r' % (self.mean, self.std))
        if self.exif not in EXIF.values():
            raise ValueError('exif is %.20r' % self.exif)
        if self.transparency != 'dropped':
            parse_colour(self.transparency)

    def to_timm(self) -> Dict[str, Any]:
        """timm's data config: input_size (C, H, W), interpolation, mean, std, crop_pct and crop_mode."""
        return {'input_size': (len(self.mean), self.input_size, self.input_size), 'interpolation': self.interpolation,
                'mean': self.mean, 'std': self.std, 'crop_pct': self.crop_pct, 'crop_mode': self.crop_mode}

    @property
    def reading(self) -> Reading:
        return Reading(self.exif, self.transparency, len(self.mean))

    def preparation(self, before: str) -> str:
        """`before` and what no other program's preprocessing holds; '' for nothing."""
        parts = ['images are turned as EXIF says'] * (self.exif != 'ignored') + [
            'transparent images get the background %s' % self.transparency] * (self.transparency != 'dropped')
        return before + ', '.join(parts) if parts else ''

    @property
    def resizes(self) -> bool:
        return self.input_size > SMALL_INPUT

    @property
    def shorter_side(self) -> int:
        """The resized image's shorter side, in pixels."""
        return int(self.input_size / self.crop_pct) if self.resizes else self.input_size

    def fits(self, width: int, height: int) -> bool:
        """Whether an image of this size is allowed."""
        return self.resizes or (width, height) == (self.input_size, self.input_size)

    def fits_in_training(self, width: int, height: int) -> bool:
        """The same for training's crops, which have padding for small inputs."""
        return self.resizes or min(width, height) + 2 * PADDING >= self.input_size

    def is_fast(self, data_backend: str) -> bool:
        """Whether `data_backend` changes the pixels; images that are not resized, and other than RGB, stay exact."""
        return data_backend == 'fast' and self.resizes and len(self.mean) == 3

    def resized(self, width: int, height: int) -> Tuple[int, int]:
        """(width, height) of an image after resizing, before the crop or the padding."""
        if self.crop_mode == 'squash':
            return self.input_size, self.input_size
        if self.crop_mode == 'border':
            ratio = max(width, height) / self.input_size
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        shorter = min(width, height)
        return int(self.shorter_side * width / shorter), int(self.shorter_side * height / shorter)

    @property
    def padding(self) -> Tuple[int, ...]:
        """The colour around a letterbox: the mean, as timm has it."""
        return tuple(round(255 * value) for value in self.mean)

    def resize_and_crop(self, fast: bool = False) -> Callable:
        """The transform from a Pillow image, or with `fast` also a `fast_decode.load_tensor`, to a Pillow image."""
        if fast:
            return functools.partial(fast_decode.resize_to_square, self)
        if self.crop_mode != 'center':
            return self._resize_to_square
        mode = getattr(InterpolationMode, self.interpolation.upper())
        return transforms.Compose([transforms.Resize(self.shorter_side, interpolation=mode),
                                   transforms.CenterCrop(self.input_size)])

    def _resize_to_square(self, image: Image.Image) -> Image.Image:
        small = image.resize(self.resized(*image.size), getattr(Image, self.interpolation.upper()))
        square = Image.new(image.mode, (self.input_size, self.input_size), self.padding)
        square.paste(small, ((square.width - small.width) // 2, (square.height - small.height) // 2))
        return square

    def build(self, data_backend: str = 'exact') -> Callable:
        """The worker's part: a function from an image to uint8 (input_size, input_size, C)."""
        steps = [self.resize_and_crop(self.is_fast(data_backend))] if self.resizes else []
        return transforms.Compose(steps + [to_uint8])

    def reader(self, data_backend: str = 'exact', max_pixels: int = 0) -> Callable:
        """The function that reads an image from a path for this transform, or for training's; see `read_up_to`."""
        read = functools.partial(fast_decode.load_tensor if self.is_fast(data_backend) else load_image,
                                 reading=self.reading)
        return functools.partial(read_up_to, max_pixels, read) if max_pixels else read


# ---- an image

def build_transform(is_train: bool, config: TransformConfig, device: Optional[torch.device] = None) -> Callable:
    """The worker's part of the reference's transform: a Pillow image to uint8 (input_size, input_size, 3).

    Training uses timm's `create_transform`; inputs of 32 pixels and less use random crops with 4 pixels of padding.
    Evaluation uses `EvalTransform`. `PrefetchLoader` normalises and erases afterwards. If `is_fast`, the transform also
    takes a `fast_decode.load_tensor`, and leaves flips and RandAugment to a `device` other than the CPU.
    """
    evaluation = EvalTransform.from_config(config)
    if not is_train:
        return evaluation.build(config.eval_data_backend)
    fast = evaluation.is_fast(config.data_backend)
    # RandAugment rotates and shears with the same interpolation; Pillow's bilinear takes half the time of bicubic.
    interpolation = 'bilinear' if fast and config.train_interpolation != 'random' else config.train_interpolation
    transform = create_transform(
        input_size=config.input_size, is_training=True, color_jitter=config.color_jitter,
        auto_augment=policy_or_none(config.aa), interpolation=interpolation, hflip=getattr(config, 'hflip', 0.5),
        re_prob=0., mean=evaluation.mean, std=evaluation.std, use_prefetcher=True)
    if fast:
        deferred = device is not None and device.type != 'cpu' \
            and device_randaugment.can_defer(transform.transforms[1:-1])
        transform.transforms[0] = fast_decode.RandomCrop(config.input_size, interpolation=config.train_interpolation,
                                                         as_tensor=deferred)
        if deferred:
            transform.transforms[1:] = [device_randaugment.DeferredRandAugment(*transform.transforms[1:-1])]
            return transform
    elif not evaluation.resizes:
        transform.transforms[0] = transforms.RandomCrop(config.input_size, padding=PADDING)
    transform.transforms[-1] = to_uint8
    return transform


def to_uint8(image: Image.Image) -> torch.Tensor:
    """A Pillow image as uint8 (H, W, C), which collates faster than (C, H, W), the result of timm's last step."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1)


def check_backend(config: TransformConfig) -> None:
    """Raise a `UserError` where --data_backend fast is not available."""
    for flag in ('data_backend', 'eval_data_backend'):
        if getattr(config, flag) == 'fast':
            fast_decode.check_available('--' + flag)


def check_policy(policy: Optional[str], channels: int = 3) -> None:
    """Raise a `UserError` for a --aa that timm doesn't know, or cannot apply to grey images."""
    policy = policy_or_none(policy)
    if policy is None:
        return
    build = rand_augment_transform if policy.startswith('rand') else \
        augment_and_mix_transform if policy.startswith('augmix') else auto_augment_transform
    try:
        build(policy, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError):
        raise unknown_value_error('--aa', policy, ['rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', 'originalr',
                                                   'v0', 'v0r', 'none']) from None
    try:
        if channels == 1:
            build(policy, {'translate_const': 9, 'img_mean': (128,)})(Image.new('L', (32, 32)))
    except ValueError:
        raise UserError('--aa %s: this timm cannot apply it to images of --in_chans 1; give --aa none'
                        % policy) from None


# ---- a batch

class DeviceMixup(Mixup):
    """timm's Mixup for batches of any size, with the targets on the images' device.

    The last image of an odd batch is not mixed; timm refuses such batches. timm 0.4 always puts the targets on CUDA.
    """

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        mix = {'elem': self._mix_elem, 'pair': self._mix_pair, 'batch': self._mix_batch}[self.mode]
        even = len(images) // 2 * 2
        parts = [(targets[:even], mix(images[:even]))] if even else []
        parts += [(targets[even:], 1.)] if even < len(images) else []
        options = {'device': images.device} if 'device' in inspect.signature(mixup_target).parameters else {}
        soft = [_mix_dense(part, share, self.label_smoothing) if part.dim() > 1 else
                mixup_target(part, self.num_classes, share, self.label_smoothing, **options) for part, share in parts]
        return images, torch.cat(soft) if soft else images.new_zeros(0, self.num_classes)


def _mix_dense(targets: torch.Tensor, share: float, smoothing: float) -> torch.Tensor:
    """Targets (B, classes) of ones and zeros, moved towards 0.5 by `smoothing`, mixed with the reversed batch."""
    targets = targets * (1. - smoothing) + 0.5 * smoothing
    return targets * share + targets.flip(0) * (1. - share)


def build_mixup(config: MixupConfig, nb_classes: int) -> Optional[DeviceMixup]:
    """A function that mixes a batch in place, (images, targets) to (images, soft targets (B, classes)); or None.

    Targets are class indices (B,), or ones and zeros (B, classes) if images have several classes.
    """
    if not config.mixes:
        return None
    return DeviceMixup(mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, cutmix_minmax=config.cutmix_minmax,
                       prob=config.mixup_prob, switch_prob=config.mixup_switch_prob, mode=config.mixup_mode,
                       label_smoothing=config.smoothing, num_classes=nb_classes)
