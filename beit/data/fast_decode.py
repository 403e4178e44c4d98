"""`--data_backend fast`: JPEG files by torchvision's libjpeg-turbo, resized as bytes by PyTorch's kernels."""

import inspect
import io
import random
from typing import Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from beit.data.decode import load_image
from beit.errors import UserError
from beit.files.regular_file import open_file

try:
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

RESIZES = ('bilinear', 'bicubic', 'random')  # that there are kernels for; lanczos is Pillow's alone


def check_available(flag: str = '--data_backend') -> None:
    """Raise a `UserError` where this torchvision or PyTorch can't do what the flag asks for."""
    missing = 'torchvision cannot decode JPEG files' if decode_jpeg is None else \
        'PyTorch cannot resize bytes as Pillow does' if not _resizes_bytes() else None
    if missing:
        raise UserError('%s fast: this %s; use a newer one, or %s exact' % (flag, missing, flag))


def _resizes_bytes() -> bool:
    if 'antialias' not in inspect.signature(F.interpolate).parameters:
        return False
    try:
        resize(torch.zeros(3, 4, 4, dtype=torch.uint8), (2, 2), 'bicubic')
    except RuntimeError:
        return False
    return True


def load_bytes(path: str) -> torch.Tensor:
    """The image as a uint8 tensor (3, H, W) whose channels lie together; `load_image` reads what is no plain JPEG.

    Errors are those of `load_image`. The size is checked before decoding.

    Raises:
        UnreadableImage: the file can't be read as an image.
    """
    try:
        with open_file(path) as file:
            content = bytearray(file.read())
        image = Image.open(io.BytesIO(content))  # reads the head alone, and refuses bombs
        if image.format == 'JPEG' and image.mode == 'RGB' and 0 not in image.size:
            return decode_jpeg(torch.from_numpy(np.frombuffer(content, dtype=np.uint8)))
    except Exception:  # as in load_image; that is asked next, and has the last word
        pass
    return as_bytes(load_image(path))


def as_bytes(image: Union[Image.Image, torch.Tensor]) -> torch.Tensor:
    """A Pillow image as a uint8 tensor (3, H, W) whose channels lie together; such a tensor as it is."""
    return image if torch.is_tensor(image) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: torch.Tensor, size: Tuple[int, int], interpolation: str) -> torch.Tensor:
    """uint8 (3, H, W) resized to (height, width), channels together: there the kernels are quickest."""
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode=interpolation, antialias=True)[0]


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, the same boxes from the same random numbers.

    Gives a Pillow image or, where `as_tensor`, uint8 (3, H, W).
    """

    def __init__(self, size: int, interpolation: str, as_tensor: bool = False) -> None:
        super().__init__(size, interpolation=interpolation)
        self.as_tensor = as_tensor

    def __call__(self, image: Union[Image.Image, torch.Tensor]) -> Union[Image.Image, torch.Tensor]:
        image = as_bytes(image)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        interpolation = self.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        crop = resize(image[:, top:top + height, left:left + width], self.size, interpolation.value)
        return crop if self.as_tensor else Image.fromarray(crop.permute(1, 2, 0).numpy())


class CentreCrop:
    """The evaluation's resizing of the shorter side, and its crop of the centre; gives a Pillow image.

    Args:
        resized (int): the shorter side before the crop.
        size (int): a side of the crop.
    """

    def __init__(self, resized: int, size: int, interpolation: str = 'bicubic') -> None:
        self.resized, self.crop, self.interpolation = resized, transforms.CenterCrop(size), interpolation

    def __call__(self, image: Union[Image.Image, torch.Tensor]) -> Image.Image:
        image = as_bytes(image)
        height, width = image.shape[1:]
        shorter = min(height, width)
        new = (int(self.resized * height / shorter), int(self.resized * width / shorter))
        return Image.fromarray(self.crop(resize(image, new, self.interpolation)).permute(1, 2, 0).contiguous().numpy())
