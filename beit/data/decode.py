"""Decodes one untrusted image file."""

import contextlib
import functools
import importlib
import os
import re
import warnings
from typing import Any, Callable, FrozenSet, List, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from beit.config import parse_colour
from beit.errors import UserError, escape_text
from beit.files.archives import open_file

# Pillow refuses images of more than 179 million pixels. From half of that on it warns, in each worker and without the
# file's name.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', module='PIL.TiffImagePlugin')  # of damaged EXIF
TEXT_BYTES = PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # of text, which is not used; Pillow refuses more than 1 MiB
# Packages that add formats to Pillow: the endings, the module and the function that registers them.
for _module, _register in (('pillow_heif', 'register_heif_opener'), ('pillow_avif', ''), ('pillow_jxl', '')):
    with contextlib.suppress(ImportError, OSError):
        getattr(importlib.import_module(_module), _register, lambda: None)()
PLUGINS = {'.heic': 'pillow-heif', '.heif': 'pillow-heif', '.hif': 'pillow-heif', '.avif': 'pillow-avif-plugin',
           '.jxl': 'pillow-jxl-plugin'}

# Formats that Pillow recognizes but decodes only through other libraries or, EPS, through Ghostscript.
NOT_DECODED = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')
BITS_PER_SAMPLE, PHOTOMETRIC, RANGE_TAGS = 258, 262, (340, 341)  # of TIFF; SMinSampleValue and SMaxSampleValue
EXIF = {'ignore': 'ignored', 'follow': 'followed'}  # --exif, and its name in checkpoints
ORIENTATION = 0x0112  # of EXIF
TRANSPOSES = {orientation: getattr(Image, name) for orientation, name in enumerate((  # as in ImageOps.exif_transpose
    'FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_270', 'TRANSVERSE', 'ROTATE_90'), 2)}
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # by --in_chans
ALPHA_MODES = ('RGBA', 'RGBa', 'LA', 'La', 'PA')
_first_page_only: List[str] = []  # for `take_first_page_only`; at most one path


class Reading(NamedTuple):
    """How the pixels of a file become an image."""
    exif: str = 'ignored'  # or 'followed': the rotation in EXIF
    transparency: str = 'dropped'  # or the colour of the background, see `parse_colour`
    channels: int = 3

    def orientation(self, image: Image.Image) -> int:
        """EXIF's orientation to follow, 1 (upright) to 8; 1 if it is missing, damaged, or already followed."""
        try:
            found = image.getexif().get(ORIENTATION) if self.exif == 'followed' else 1
            return int(found) if found in TRANSPOSES else 1
        except Exception:  # any, from a damaged block
            return 1


AS_REFERENCE = Reading()


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


def is_image_name(name: str, path: str = '') -> bool:
    """Whether a name's ending or, without one, the content of `path` is an image's."""
    extension = os.path.splitext(name)[1].lower()
    return extension in image_extensions() if extension else bool(path) and is_image_file(path)


def load_image(path: str, reading: Reading = AS_REFERENCE) -> Image.Image:
    """The image as RGB, 8 bits per channel.

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
            return to_rgb(image, reading)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = getattr(error, 'strerror', None) or re.sub(r' <_io\.[^>]*>', '', str(error)) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError) or re.search('(?i)text chunks|decompressed data', reason):
            reason += ' --max_pixels raises the limit'
        package = PLUGINS.get(os.path.splitext(path)[1].lower())
        if package and 'cannot identify' in reason:
            reason = 'Pillow reads such files with the package %s; install it' % package
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = 'it is a broken link to %s' % escape_text(os.readlink(path))
        raise UnreadableImage(path, reason) from None


def to_rgb(image: Image.Image, reading: Reading = AS_REFERENCE) -> Image.Image:
    """A Pillow image as RGB, or in the mode of other `reading.channels`, 8 bits a channel.

    Raises ValueError if its numbers have no known range.
    """
    image.load()
    orientation = reading.orientation(image)
    if image.mode[0] in 'IF':
        image = _scale_to_bytes(image)
    elif reading.transparency != 'dropped' and has_alpha(image):
        below = Image.new('RGBA', image.size, parse_colour(reading.transparency) + (255,))
        image = Image.alpha_composite(below, image.convert('RGBA'))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    mode = MODES[reading.channels]
    image = image if image.mode == mode else image.convert(mode)  # which would copy it
    return image.transpose(TRANSPOSES[orientation]) if orientation > 1 else image


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels can be transparent."""
    return 'transparency' in image.info or image.mode in ALPHA_MODES


def read_up_to(max_pixels: int, read: Callable, path: str) -> Any:
    """`read(path)` with a limit of `max_pixels`, and of as many bytes of text if that is above the usual limit."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses twice that
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = max(TEXT_BYTES, max_pixels)
        return read(path)
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


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
