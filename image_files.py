"""Image files of strangers: reading one, and finding those of class folders."""

import os
import re
import stat
import warnings

import numpy as np
from PIL import Image

from errors import UserError, printable

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.ppm', '.pgm', '.tif', '.tiff')

# Pillow refuses images of more than twice MAX_IMAGE_PIXELS (179 million). Between once and twice they are read, without
# its warning, which each worker would print and which doesn't name the file.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)

KINDS = ((stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a pipe'), (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device'))


class UnreadableImage(UserError):
    """A file that can't be read as an image: `path`, printable, and `reason`, both of one line."""

    def __init__(self, path, reason):
        self.path, self.reason = printable(path), printable(' '.join(reason.split()))
        super().__init__('%s: cannot be read as an image (%s); mend or remove it, or leave such files out with '
                         '--bad_images skip' % (self.path, self.reason))


def load_image(path):
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
            reason = 'it is a link to %s, which is not there' % printable(os.readlink(path))
        raise UnreadableImage(path, reason) from None


def open_file(path):
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


# ---- class folders

def scan_classes(root):
    """(class names, [(path, class index)]): torchvision's `DatasetFolder` without hidden names, in its order.

    Every folder in `root` is a class, with the image files in it at any depth; links are followed. A file counts by its
    name's ending alone. Names are as the operating system gives them, with surrogates for bytes that aren't text.

    Raises:
        UserError: a folder can't be listed, a link leads nowhere or to a folder that it lies in. Each would take images
            away, or add some twice, without a word. (A link named like an image is a file that can't be read.)
    """
    _, classes = _list_folder(root)
    samples = []
    for label, name in enumerate(sorted(classes)):
        found, waiting = [], [(os.path.join(root, name), (os.path.realpath(root),))]
        while waiting:
            folder, led_here = waiting.pop()
            led_here = _follow(folder, led_here)
            files, folders = _list_folder(folder)
            found.append((folder, sorted(each for each in files if each.lower().endswith(EXTENSIONS))))
            waiting += [(os.path.join(folder, each), led_here) for each in folders]
        samples += [(os.path.join(folder, each), label) for folder, files in sorted(found) for each in files]
    return sorted(classes), samples


def _list_folder(folder):
    """(names of files, names of folders) in a folder, those that links lead to among them, hidden ones not."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.append(entry.name)
                    continue
                files.append(entry.name)
                if entry.is_symlink() and not entry.name.lower().endswith(EXTENSIONS):
                    os.stat(entry.path)  # for its error: what can't be reached may be a folder of images
    except OSError as error:
        raise UserError('%s: cannot look for images there (%s); mend or remove it, or let this user read it'
                        % (printable(error.filename or folder), error.strerror)) from None
    return files, folders


def _follow(folder, led_here):
    """The real folders on the way to `folder` and it: the last before each link, and where it is now."""
    if not os.path.islink(folder):
        return led_here[:-1] + (os.path.join(led_here[-1], os.path.basename(folder)),)
    target = os.path.realpath(folder)
    if any(os.path.join(each, '').startswith(os.path.join(target, '')) for each in led_here):
        raise UserError('%s: this link leads to %s, a folder that it lies in, round and round; remove it'
                        % (printable(folder), printable(target)))
    return led_here + (target,)


def _is_hidden(name):
    """.ipynb_checkpoints, ._photo.jpg, __MACOSX: never meant as data."""
    return name.startswith('.') or name == '__MACOSX'
