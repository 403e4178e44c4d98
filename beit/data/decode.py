"""Decodes one untrusted image file."""

import functools
import os
import re
import warnings
from typing import Any, Callable, FrozenSet, List

import numpy as np
from PIL import Image, PngImagePlugin

from beit.errors import UserError, escape_text
from beit.files.regular_file import open_file

# Pillow refuses images of more than 179 million pixels. From half of that on it warns, in each worker and without the
# file's name.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # bytes of text, which is not used; Pillow refuses more than 1 MiB

# Formats that Pillow recognizes but decodes only through other libraries or, EPS, through Ghostscript.
NOT_DECODED = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')
BITS_PER_SAMPLE, PHOTOMETRIC, RANGE_TAGS = 258, 262, (340, 341)  # of TIFF; SMinSampleValue and SMaxSampleValue
_first_page_only: List[str] = []  # for `take_first_page_only`; at most one path


class UnreadableImage(UserError):
    """A file that can't be read as an image; `path` and `reason` are printable and have one line each."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = escape_text(path), escape_text(' '.join(reason.split()))
        super().__init__('%s: cannot be read as an image (%s); repair or remove it, or leave such files out with '
                         '--bad_images skip' % (self.path, self.reason))


@functools.lru_cache(maxsize=None)
def image_extensions() -> FrozenSet[str]:
    """The endings, in lower case and with their dot, of the formats that this Pillow decodes."""
    Image.init()
    return frozenset(extension for extension, name in Image.EXTENSION.items()
                     if name == 'MPO' or name in Image.OPEN and name not in NOT_DECODED)


def is_image_file(path: str) -> bool:
    """Whether the file's first bytes mark an image."""
    try:
        with open_file(path) as file, Image.open(file) as image:
            return image.format not in NOT_DECODED
    except Exception:  # see `load_image`
        return False


def load_image(path: str) -> Image.Image:
    """The image as RGB, 8 bits per channel. Transparency is dropped, as in the reference.

    Of several pages or frames only the first is read; see `take_first_page_only`.

    Raises:
        UnreadableImage: the file can't be read as an image, or its values have no known range.
    """
    try:
        with open_file(path) as file:
            image: Image.Image = Image.open(file)
            if 0 in image.size:
                raise ValueError('it has no pixels')
            if image.format in NOT_DECODED:
                raise ValueError('%s files are not decoded' % image.format)
            if getattr(image, 'is_animated', False) and image.format not in ('MPO', 'PSD'):  # frames of one image
                _first_page_only[:] = [escape_text(path)]
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = getattr(error, 'strerror', None) or re.sub(r' <_io\.[^>]*>', '', str(error)) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason += ' --max_image_pixels raises the limit'
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = 'it is a broken link to %s' % escape_text(os.readlink(path))
        raise UnreadableImage(path, reason) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as RGB, 8 bits a channel. Transparency is dropped.

    Raises:
        ValueError: its numbers have no known range.
    """
    if image.mode[0] in 'IF':
        image = _scale_to_bytes(image)
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    image.load()
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy it


def read_up_to(max_pixels: int, read: Callable, path: str) -> Any:
    """`read(path)` with a limit of `max_pixels`."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels // 2  # Pillow refuses twice that
    try:
        return read(path)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 or 32 bits, or floats, to 0 … 255, where Pillow would clip them."""
    tags = getattr(image, 'tag_v2', {})
    if image.format in ('PNG', 'PPM', 'JPEG2000') or image.format == 'TIFF' and image.mode.startswith('I;16'):
        low, high = 0., 2. ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    else:
        low, high = (float(np.ravel(tags[tag])[0]) if tag in tags else np.nan for tag in RANGE_TAGS)
        if not -np.inf < low < high < np.inf:
            kind = 'floats' if image.mode == 'F' else 'integers'
            raise ValueError('its values are %s of unknown range; save it with 8 or 16 bits, or as TIFF with the tags '
                             'SMinSampleValue and SMaxSampleValue' % kind)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts only 8 bits and less
        low, high = high, low
    pixels = (np.asarray(image).astype(np.float64) - low) * (255. / (high - low))
    return Image.fromarray(np.uint8(np.clip(np.nan_to_num(pixels) + 0.5, 0, 255)))


def take_first_page_only() -> List[str]:
    """[the printable path of a file with several pages or frames that this process read since the last call], or []."""
    paths = _first_page_only[:]
    _first_page_only.clear()
    return paths
