"""The files that --resume and --finetune can name. Imports no PyTorch."""

import glob
import os
import re
from typing import List, Optional, Tuple

from beit import weights
from beit.errors import UserError, escape_text, nearest

BEST, BEST_EMA = 'checkpoint-best.pth', 'checkpoint-best-ema.pth'


def list_checkpoints(folder: str) -> List[Tuple[Tuple[int, int], str]]:
    """((finished epochs, finished updates of the next), path) of a folder's numbered checkpoints, oldest first."""
    found = [(position_in_name(path), path)
             for path in glob.glob(os.path.join(glob.escape(folder), 'checkpoint-*.pth'))]
    return sorted((position, path) for position, path in found if position is not None)


def position_in_name(path: str) -> Optional[Tuple[int, int]]:
    """(finished epochs, finished updates of the next) from a checkpoint's name, or None."""
    found = re.search(r'checkpoint-(\d+)(?:-step(\d+))?\.pth$', path)
    if not found:
        return None
    return (int(found.group(1)), int(found.group(2))) if found.group(2) else (int(found.group(1)) + 1, 0)


def candidates(source: str) -> List[str]:
    """The files that --resume can refer to: a file, URL or name itself; a folder's checkpoints, the newest first.

    Raises a `UserError` if there is none.
    """
    if weights.is_remote(source) or os.path.isfile(source):
        return [source]
    check_exists('--resume', source)
    found = [path for _, path in reversed(list_checkpoints(source))]
    found += [os.path.join(source, name) for name in (BEST, BEST_EMA) if os.path.isfile(os.path.join(source, name))]
    if not found:
        raise UserError('--resume %s: the folder holds no checkpoint-<epoch>.pth or %s; give %s' % (
            escape_text(source), BEST, 'a Hugging Face folder to --finetune, with --eval as well' if os.path.isfile(
                os.path.join(source, 'config.json')) else 'the --output_dir of a run, or a file'))
    return found


def check_exists(flag: str, source: str) -> None:
    if not os.path.exists(source):
        raise UserError('%s %s: no such file or folder%s' % (flag, escape_text(source), _suggestion(source)))


def _suggestion(source: str) -> str:
    near = ['%sowner/name' % weights.HUB] if source.startswith(weights.HUB) else nearest(source, weights.PUBLISHED)
    return '; did you mean %s?' % ' or '.join(near) if near and '/' not in source else ''


def check_finetune(source: str, is_required: bool = False) -> None:
    """Raise a `UserError` where --finetune names a missing file."""
    if source and not weights.is_remote(source) and not os.path.exists(source):
        raise UserError('--finetune %s: no such file%s' % (escape_text(source), _suggestion(source) or (
            '; put the pretrained weights there, give a name that checkpoints/README.md lists' +
            ', or train from scratch with --finetune=' * (not is_required))))
