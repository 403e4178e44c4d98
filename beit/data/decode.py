"""Decoding one image file, which may hold anything."""

import os
import re
import stat
import typing
import warnings

import numpy as np
from PIL import Image

from beit.errors import UserError, escape_text

# Pillow refuses images of more than twice MAX_IMAGE_PIXELS (179 million). Between once and twice they are read, without
# its warning, which each worker would print and which doesn't name the file.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)

KINDS = ((stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a pipe'), (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device'))


class UnreadableImage(UserError):
    """A file that can't be read as an image: `path`, printable, and `reason`, both of one line."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = escape_text(path), escape_text(' '.join(reason.split()))
        super().__init__('%s: cannot be read as an image (%s); mend or remove it, or leave such files out with '
                         '--bad_images skip' % (self.path, self.reason))


def load_image(path: str) -> Image.Image:
    """The image as RGB, 8 bits a channel, whatever the file holds. Transparency is dropped, as the reference does.

    Raises:
        UnreadableImage: the file can't be read as an image.
    """
    try:
        with open_file(path) as file:
            image = Image.open(file)
            if 0 in image.size:
                raise ValueError('it has no pixels')
            if image.mode.startswith('I'):  # 16 bits: Pillow would cut at 255 instead of scaling
                pixels = np.asarray(image).astype(np.float64)
                image = Image.fromarray(np.uint8(np.clip(pixels / 257. + 0.5, 0, 255)))
            elif image.mode == 'P' and 'transparency' in image.info:
                image = image.convert('RGBA')
            image.load()
            return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy it
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = getattr(error, 'strerror', None) or re.sub(r' <_io\.[^>]*>', '', str(error)) or type(error).__name__
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            reason = 'it is a link to %s, which is not there' % escape_text(os.readlink(path))
        raise UnreadableImage(path, reason) from None


def open_file(path: str) -> typing.BinaryIO:
    """Open a regular file that isn't empty for reading. A pipe doesn't make it wait, nor a device fill the memory."""
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('it is %s' % next((name for is_kind, name in KINDS if is_kind(status.st_mode)), 'no file'))
        if status.st_size == 0:
            raise ValueError('it is empty')
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise
