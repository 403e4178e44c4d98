"""`--data_backend fast`: decodes JPEG with torchvision's libjpeg-turbo and resizes bytes with PyTorch's kernels."""

import io
import random
from typing import Any, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from beit.data.decode import AS_REFERENCE, Reading, load_image
from beit.errors import UserError
from beit.files.archives import open_file

try:
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

RESIZES = ('bilinear', 'bicubic', 'random')  # PyTorch has no lanczos


def check_available(flag: str = '--data_backend') -> None:
    """Raise a `UserError` where this torchvision or PyTorch lacks the functions for --data_backend fast."""
    missing = 'torchvision cannot decode JPEG files' if decode_jpeg is None else None
    try:
        resize(torch.zeros(3, 4, 4, dtype=torch.uint8), (2, 2), 'bicubic')
    except (RuntimeError, TypeError):  # of bytes, of an unknown `antialias`
        missing = missing or 'PyTorch cannot resize bytes like Pillow'
    if missing:
        raise UserError('%s fast: this %s; use a newer one, or %s exact' % (flag, missing, flag))


def load_tensor(path: str, reading: Reading = AS_REFERENCE) -> torch.Tensor:
    """The image as a uint8 tensor (3, H, W), channels last in memory; see `load_image` for errors.

    That function reads other files than upright RGB JPEG. The size is checked before decoding.
    """
    try:
        with open_file(path) as file:
            content = bytearray(file.read())
        image = Image.open(io.BytesIO(content))  # reads the header only, and refuses decompression bombs
        if image.format == 'JPEG' and image.mode == 'RGB' and 0 not in image.size \
                and reading.orientation(image) == 1:
            return decode_jpeg(torch.from_numpy(np.frombuffer(content, dtype=np.uint8)))
    except Exception:  # any, as in load_image, which raises the final error
        pass
    return to_tensor(load_image(path, reading))


def to_tensor(image: Union[Image.Image, torch.Tensor]) -> torch.Tensor:
    """A Pillow image as a uint8 tensor (3, H, W), channels last in memory; a tensor unchanged."""
    return image if torch.is_tensor(image) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: torch.Tensor, size: Tuple[int, int], interpolation: str) -> torch.Tensor:
    """uint8 (3, H, W) resized to (height, width), in channels-last memory, where the kernels are fastest."""
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode=interpolation, antialias=True)[0]


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, with the same boxes for the same random numbers.

    Returns a Pillow image or, with `as_tensor`, uint8 (3, H, W).
    """

    def __init__(self, size: int, interpolation: str, as_tensor: bool = False) -> None:
        super().__init__(size, interpolation=interpolation)
        self.as_tensor = as_tensor

    def __call__(self, image: Union[Image.Image, torch.Tensor]) -> Union[Image.Image, torch.Tensor]:
        image = to_tensor(image)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        interpolation = self.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        crop = resize(image[:, top:top + height, left:left + width], self.size, interpolation.value)
        return crop if self.as_tensor else Image.fromarray(crop.permute(1, 2, 0).numpy())


def resize_to_square(evaluation: Any, image: Union[Image.Image, torch.Tensor]) -> Image.Image:
    """The resizing of a `transforms.EvalTransform`, and its crop or padding."""
    image, size = to_tensor(image), evaluation.input_size
    width, height = evaluation.resized(image.shape[2], image.shape[1])
    square = resize(image, (height, width), evaluation.interpolation)
    if evaluation.crop_mode == 'center':
        square = transforms.functional.center_crop(square, [size, size])
    else:
        small, square = square, torch.tensor(evaluation.padding, dtype=torch.uint8).view(-1, 1, 1).repeat(1, size, size)
        top, left = (size - height) // 2, (size - width) // 2
        square[:, top:top + height, left:left + width] = small
    return Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())
