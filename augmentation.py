"""What is done to an image before the model sees it, and to a batch of them: the transforms, mixup and cutmix.

Where this runs, and with which random numbers, is `datasets`' affair.
"""

import functools
import inspect

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import mixup_target
from torchvision import transforms

import fast_images
import rand_augment
from errors import UserError, unknown_value_error
from modeling_finetune import INPUT_MEAN, INPUT_STD

try:
    from torchvision.transforms import InterpolationMode
except ImportError:  # torchvision before 0.9 takes Pillow's constants
    InterpolationMode = Image

INTERPOLATIONS = ('random', 'bilinear', 'bicubic', 'lanczos')
BACKENDS = ('exact', 'fast')
SMALL_INPUT = 32  # up to this size images are taken as they are: no resizing, random crops with padding
PADDING = 4


# ---- an image

def build_transform(is_train, args, device=None):
    """The worker's part of the reference's transform: a Pillow image to uint8 (input_size, input_size, 3).

    Training is timm's `create_transform`; inputs of 32 pixels and less use random crops with 4 pixels of padding.
    Evaluation resizes the shorter side to input_size / crop_pct and crops the centre. What follows, normalising and
    random erasing, is `DeviceLoader`'s. Where `is_fast`, it takes what `fast_images.load_bytes` gives too, and leaves
    flips and RandAugment to a `device` that is not the CPU, where the loop has better to do.
    """
    resizes, fast = args.input_size > SMALL_INPUT, is_fast(is_train, args)
    if is_train:
        mean, std = mean_and_std(args)
        # RandAugment turns and shears with the same interpolation; in Pillow's hands bilinear takes half the time.
        interpolation = 'bilinear' if fast and args.train_interpolation != 'random' else args.train_interpolation
        transform = create_transform(
            input_size=args.input_size, is_training=True, color_jitter=args.color_jitter,
            auto_augment=policy_or_none(args.aa), interpolation=interpolation, hflip=getattr(args, 'hflip', 0.5),
            re_prob=0., mean=mean, std=std, use_prefetcher=True)
        if fast:
            draws = device is not None and device.type != 'cpu' and rand_augment.can_draw(transform.transforms[1:-1])
            transform.transforms[0] = fast_images.RandomCrop(args.input_size, interpolation=args.train_interpolation,
                                                             as_tensor=draws)
            if draws:  # the rest is the device's
                transform.transforms[1:] = [rand_augment.Draw(*transform.transforms[1:-1])]
                return transform
        elif not resizes:
            transform.transforms[0] = transforms.RandomCrop(args.input_size, padding=PADDING)
        transform.transforms[-1] = as_it_lies
        return transform
    steps = []
    if resizes:
        resized = int(args.input_size / crop_share(args))
        steps = [fast_images.CentreCrop(resized, args.input_size) if fast else centre_crop(resized, args.input_size)]
    return transforms.Compose(steps + [as_it_lies])


def centre_crop(resized, size):
    """Takes a Pillow image: the shorter side becomes `resized` pixels, and the centre is cropped to size x size."""
    return transforms.Compose([transforms.Resize(resized, interpolation=InterpolationMode.BICUBIC),
                               transforms.CenterCrop(size)])


def crop_share(args):
    """--crop_pct, or what the reference takes for this input size."""
    return args.crop_pct or (224 / 256 if args.input_size < 384 else 1.0)


def preprocessing(args):
    """How evaluation prepares an image, in timm's words: input_size (3, H, W), crop_pct, interpolation, mean and std.

    Inputs of `SMALL_INPUT` and less are not resized in training: there crop_pct is 1.
    """
    mean, std = mean_and_std(args)
    return {'input_size': (3, args.input_size, args.input_size), 'interpolation': 'bicubic', 'mean': tuple(mean),
            'std': tuple(std), 'crop_pct': crop_share(args) if args.input_size > SMALL_INPUT else 1.0}


def as_it_lies(image):
    """A Pillow image as uint8 (H, W, 3). Turned to (3, H, W), as timm's own last step does, takes longer to collate."""
    return torch.from_numpy(np.array(image))


def is_fast(is_train, args):
    """Whether --data_backend fast, or --eval_data_backend, asks for other pixels; what isn't resized stays exact."""
    return (args.data_backend if is_train else args.eval_data_backend) == 'fast' and args.input_size > SMALL_INPUT


def check_backend(args):
    """Raise a `UserError` where --data_backend fast isn't to be had."""
    for flag, backend_name in (('--data_backend', args.data_backend), ('--eval_data_backend', args.eval_data_backend)):
        if backend_name == 'fast':
            fast_images.check_available(flag)
    if args.data_backend == 'fast' and args.train_interpolation not in fast_images.RESIZES:
        raise UserError('--train_interpolation %s needs --data_backend exact; fast has %s'
                        % (args.train_interpolation, ', '.join(fast_images.RESIZES)))


def mean_and_std(args):
    if args.imagenet_default_mean_and_std:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return INPUT_MEAN, INPUT_STD


def small_input_rule(is_train, input_size):
    """Which images (width, height) the transform of a small input can take, or None where it resizes them."""
    if input_size > SMALL_INPUT:
        return None
    return functools.partial(_fits, is_train, input_size)  # and no lambda: workers may get it pickled


def _fits(is_train, input_size, width, height):
    if is_train:
        return min(width, height) + 2 * PADDING >= input_size
    return (width, height) == (input_size, input_size)


def policy_or_none(policy):
    """An AutoAugment policy, or None for 'none' and the empty string."""
    return None if policy in (None, '', 'none', 'None') else policy


def check_policy(policy):
    """Raise a `UserError` for a --aa that timm doesn't know."""
    policy = policy_or_none(policy)
    if policy is None:
        return
    try:
        if policy.startswith('rand'):
            rand_augment_transform(policy, {})
        elif policy.startswith('augmix'):
            from timm.data.auto_augment import augment_and_mix_transform
            augment_and_mix_transform(policy, {})
        else:
            auto_augment_transform(policy, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError):
        raise unknown_value_error('--aa', policy, ['rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', 'originalr',
                                                   'v0', 'v0r', 'none']) from None


# ---- a batch

class DeviceMixup(Mixup):
    """timm's Mixup for batches of any size, with the targets where the images are.

    The last image of an odd batch is not mixed; timm refuses such a batch. timm 0.4 puts the targets on CUDA whatever
    the device.
    """

    def __call__(self, images, targets):
        mix = {'elem': self._mix_elem, 'pair': self._mix_pair, 'batch': self._mix_batch}[self.mode]
        even = len(images) // 2 * 2
        parts = [(targets[:even], mix(images[:even]))] if even else []
        parts += [(targets[even:], 1.)] if even < len(images) else []
        place = {'device': images.device} if 'device' in inspect.signature(mixup_target).parameters else {}
        soft = [_mix_dense(part, share, self.label_smoothing) if part.dim() > 1 else
                mixup_target(part, self.num_classes, share, self.label_smoothing, **place) for part, share in parts]
        return images, torch.cat(soft) if soft else images.new_zeros(0, self.num_classes)


def _mix_dense(targets, share, smoothing):
    """Ones and zeros (B, classes) mixed with those of the batch turned round, each moved towards 0.5 by `smoothing`."""
    targets = targets * (1. - smoothing) + 0.5 * smoothing
    return targets * share + targets.flip(0) * (1. - share)


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args, nb_classes):
    """What mixes a batch in place, (images, targets) to (images, soft targets (B, classes)); or None.

    Targets are class indices (B,), or ones and zeros (B, classes) where images have several classes.
    """
    if not mixes(args):
        return None
    return DeviceMixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                       prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                       label_smoothing=args.smoothing, num_classes=nb_classes)
