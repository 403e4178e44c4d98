"""Decoding one image file, which may hold anything."""

import os
import re
import warnings

import numpy as np
from PIL import Image

from beit.errors import UserError, escape_text
from beit.files.regular_file import open_file

# Pillow refuses images of more than 179 million pixels. From half as many on it warns, in each worker and without the
# file's name.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)



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
            image: Image.Image = Image.open(file)
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
