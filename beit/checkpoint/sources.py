"""The files that --resume, --finetune and --inputs can name. Imports no PyTorch."""

import glob
import json
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

from beit import weights
from beit.config import PROGRAM_ENDINGS
from beit.errors import EXPORTED_PROGRAM, UserError, escape_text, nearest

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
    """Raise a `UserError` where --finetune names no file, an export, or a folder without BEiT's weights. Cheap."""
    refuse_programs('--finetune', source)
    if source and not weights.is_remote(source) and not os.path.exists(source):
        raise UserError('--finetune %s: no such file%s' % (escape_text(source), _suggestion(source) or (
            '; put the pretrained weights there, give a name that checkpoints/README.md lists' +
            ', or train from scratch with --finetune=' * (not is_required))))
    if os.path.isdir(source):
        hf_weights_path(source, '--finetune')


def find_inputs(inputs: Sequence[str]) -> List[str]:
    """The files of --inputs; a folder stands for its checkpoints of whole epochs, oldest first."""
    found = []
    for source in inputs:
        check_exists('--inputs', source)
        if os.path.isdir(source):
            paths = [path for (_, steps), path in list_checkpoints(source) if not steps]
            if not paths:
                raise UserError('--inputs %s: the folder holds no checkpoint-<epoch>.pth' % escape_text(source))
            found += paths
        else:
            found.append(source)
    real = [os.path.realpath(path) for path in found]
    twice = [path for path, where in zip(found, real) if real.count(where) > 1]
    if twice:
        raise UserError('--inputs %s: given more than once; name it once' % escape_text(twice[0]))
    return found


# ---- exported programs and Hugging Face's folders

def program_kind(source: str) -> str:
    """The format of an exported program, by the ending of its name; '' for another file."""
    return next((kind for kind, ending in PROGRAM_ENDINGS.items()
                 if source.endswith(ending) and not os.path.isdir(source)), '')


def refuse_programs(flag: str, source: str) -> None:
    """Raise a `UserError` for an exported program, where weights are needed."""
    kind = program_kind(source)
    if kind:
        raise UserError('%s %s: %s is %s' % (flag, escape_text(source), PROGRAM_ENDINGS[kind], EXPORTED_PROGRAM))


def is_hugging_face(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, weights.HUB_FILES[0]))


def hf_weights_path(folder: str, flag: str) -> str:
    """The weights file of a Hugging Face folder. Raises a `UserError` without one, or for another kind of model."""
    name = '%s %s' % (flag, escape_text(folder))
    found = [os.path.join(folder, each) for each in weights.HUB_FILES[2:] if os.path.isfile(os.path.join(folder, each))]
    if not found or not os.path.isfile(os.path.join(folder, weights.HUB_FILES[0])):
        raise UserError('%s: not a Hugging Face folder: it has no %s; give a weights file' % (
            name, weights.HUB_FILES[0] if found else ' or '.join(weights.HUB_FILES[2:])))
    content = hf_config(found[0])
    kind = content.get('model_type', content.get('architecture'))  # the second is timm's
    if kind is None:
        raise UserError('%s: its %s cannot be read; fetch or copy it again' % (name, weights.HUB_FILES[0]))
    if kind != 'beit' and not re.match(r'beit(v2)?_(base|large)_', str(kind)):
        raise UserError('%s: its %s has model_type %s; give a folder with model_type beit'
                        % (name, weights.HUB_FILES[0], escape_text(str(kind))[:40]))
    return found[0]


def hf_config(path: str) -> Dict[str, Any]:
    """The config.json beside Hugging Face's weights; {} without a whole one."""
    try:
        return read_beside(path, weights.HUB_FILES[0])
    except (OSError, ValueError, RecursionError):
        return {}


def read_beside(path: str, name: str) -> Dict[str, Any]:
    """The JSON object in the file `name` beside Hugging Face's weights. Raises ValueError or OSError."""
    if os.path.basename(path) not in weights.HUB_FILES[2:]:
        return {}
    with open(os.path.join(os.path.dirname(path), name), encoding='utf-8') as file:
        content = json.loads(file.read(1 << 24))
    if not isinstance(content, dict):
        raise ValueError('%s is no object' % name)
    return content
