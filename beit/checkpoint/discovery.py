"""Finds the checkpoint to resume or evaluate: the newest or the best of a folder."""

import contextlib
import glob
import itertools
import os
import re
from typing import Any, Dict, List, Optional, Tuple

import torch

from beit import weights
from beit.checkpoint import exported, sources
from beit.checkpoint.sources import BEST, BEST_EMA, candidates, list_checkpoints, position_in_name
from beit.config import OutputConfig
from beit.distributed import collectives, process_group
from beit.errors import UserError, escape_text
from beit.files import weights_file
from beit.files.weights_file import load_weights_file
from beit.log import log_main


def saved_progress(content: Any) -> Dict[str, Any]:
    """A checkpoint's `progress`; {} if it holds none."""
    progress = content.get('progress')
    return progress if isinstance(progress, dict) else {}


def position_in_content(content: Dict[str, Any]) -> Tuple[int, int]:
    """(finished epochs, finished updates of the next) of a checkpoint; (-1, 0) if it holds no epoch."""
    epoch, steps = content.get('epoch'), saved_progress(content).get('steps', 0)
    return (epoch + 1, steps) if isinstance(epoch, int) and isinstance(steps, int) else (-1, 0)


def last_epoch(content: Any) -> int:
    """The index of a checkpoint's last finished epoch; 0 if it holds none."""
    return min(max(0, position_in_content(content)[0] - 1), 2 ** 31 - 1)


def later_checkpoints(source: str, position: Tuple[int, int]) -> List[str]:
    """Paths of other checkpoints in the folder of `source` that are later than a position, as `position_in_content`."""
    folder = os.path.dirname(source)
    later = [path for reached, path in list_checkpoints(folder or '.') if reached > position]
    for path in (os.path.join(folder, name) for name in (BEST, BEST_EMA)):
        with contextlib.suppress(UserError):  # missing, or damaged and therefore never resumed
            content = load_weights_file(path)
            later += [path] if isinstance(content, dict) and position_in_content(content) > position else []
    return [path for path in later if not os.path.samefile(path, source)]


def load_best_or_latest(source: str, prefer_best: bool = False, use_ema: bool = False) -> Tuple[str, Any]:
    """(path, content) of a file or URL; of a folder, the furthest checkpoint, or with `prefer_best` the best.

    Damaged files of a folder are skipped, with a log line each. The best checkpoint can be further than the newest
    numbered one. With `use_ema`, the best is that of the averaged weights. Raises a `UserError` if the file, or every
    file of the folder, is damaged or missing.
    """
    if prefer_best and sources.is_hugging_face(source):
        source = sources.hf_weights_path(source, '--resume')
    paths = candidates(source)
    if sources.program_kind(source):
        return source, exported.load(source)
    if not os.path.isdir(source):
        path = weights.resolve(source, '--resume')
        if os.path.isdir(path):
            source = path = sources.hf_weights_path(path, '--resume')
        return source, load_weights_file(path, '--resume')
    reasons: List[str] = []
    if prefer_best:
        first = [os.path.join(source, name) for name in ((BEST_EMA, BEST) if use_ema else (BEST,))]
        paths.sort(key=lambda path: first.index(path) if path in first else len(first))
        chosen = next(_whole(paths, reasons), None)
    else:
        newest = itertools.islice(_whole(filter(position_in_name, paths), reasons), 1)
        bests = _whole(itertools.filterfalse(position_in_name, paths), reasons)
        chosen = max(itertools.chain(newest, bests), key=lambda found: position_in_content(found[1]), default=None)
    if chosen is None:
        raise UserError('--resume %s: all %d checkpoints are damaged: %s; move them away to start again'
                        % (escape_text(source), len(paths), reasons[0]))
    return chosen


def _whole(paths, reasons):
    """Yield (path, content) of each readable file; why the others fail is logged, and added to `reasons`."""
    for path in paths:
        try:
            content = load_weights_file(path)
            if isinstance(content, dict):
                yield path, content
                continue
            reasons.append('%s: holds no weights' % escape_text(path))
        except UserError as error:
            if 'refused, because' in str(error):
                raise  # not damaged but untrusted
            reasons.append(str(error).rpartition('; ')[0])  # without the remedy, which is for a single file
        log_main('%s; skipped' % reasons[-1])


def is_inside(path: str, folder: str) -> bool:
    return bool(path and folder) and os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)


def load_agreed(resume: str, output: OutputConfig, device: torch.device,
                for_evaluation: bool = False) -> Tuple[str, Optional[Dict[str, Any]]]:
    """(path, content) of the checkpoint for --auto_resume or --resume, the same on every process; ('', None) if none.

    If a process finds the newest file damaged or missing, all load the older one that it found. An evaluation loads
    the best checkpoint of a folder.
    """
    own = None if for_evaluation else _load_own(resume, output)
    source, path, content = output.output_dir if own is not None else resume, '', None
    if source:
        path, content = own or load_best_or_latest(source, prefer_best=for_evaluation)
    mine = _name_and_position(path, content)
    oldest = min(collectives.all_gather_json(mine, device), key=lambda found: found[1:])
    if mine != oldest and oldest[0] and os.path.isfile(os.path.join(source, oldest[0])):
        path = os.path.join(source, oldest[0])
        content = load_weights_file(path, '--resume')
        mine = _name_and_position(path, content)
    if any(found != mine for found in collectives.all_gather_json(mine, device)):
        raise UserError('--%s: the processes found different checkpoints (this one: %s); give every machine the same '
                        'files there' % ('resume ' + resume if resume else 'output_dir '
                                              + output.output_dir, path or 'none'))
    if is_inside(path, output.output_dir) and output.save_ckpt and not for_evaluation \
            and process_group.is_main_process():
        finish_save(path, content)
    return path, content


def _load_own(resume, output):
    """(path, content) of the checkpoint in output_dir that --auto_resume loads; None for none.

    With --resume, only if that run started with the same --resume: then the same command resumes when it is repeated.
    """
    if not (output.auto_resume and output.output_dir
            and glob.glob(os.path.join(glob.escape(output.output_dir), 'checkpoint-*.pth'))):
        return None
    if not resume:
        return load_best_or_latest(output.output_dir)
    if os.path.realpath(resume) == os.path.realpath(output.output_dir):
        return None
    try:
        path, content = load_best_or_latest(output.output_dir)
    except UserError:  # all are damaged
        return None
    origin = saved_progress(content).get('origin')
    if not (isinstance(origin, str) and origin and os.path.realpath(origin) == os.path.realpath(resume)):
        return None
    log_main('--auto_resume: loading %s, which continues --resume %s; leave --auto_resume out to start from that again'
             % (escape_text(path), escape_text(resume)))
    return path, content


def finish_save(path: str, content: Any) -> None:
    """Write the files that were due after a best checkpoint, if a kill interrupted that save."""
    files, name = saved_progress(content).get('files'), os.path.basename(path)
    if name in (BEST, BEST_EMA) and isinstance(files, list) and name in files:
        for later in files[files.index(name) + 1:]:
            if re.match(r'checkpoint-(best|best-ema|\d+)\.pth$', str(later)):
                weights_file.save(os.path.join(os.path.dirname(path), later), content)


def best_text(best: Dict[str, float]) -> str:
    """The figures of the best checkpoints, as a text."""
    return ', '.join('%s %.3f%s' % (name, value, '' if name.endswith('loss') else '%')
                     for name, value in sorted(best.items()))


def copy_best(source: str, folder: str, best: Dict[str, float]) -> Dict[str, float]:
    """Copy the checkpoints of the best figures from the folder of `source`. Returns the figures that have one."""
    copied = {}
    for figure, value in best.items():
        name, content = BEST_EMA if figure.startswith('ema_') else BEST, None
        with contextlib.suppress(UserError):  # missing or damaged
            content = load_weights_file(os.path.join(os.path.dirname(source), name))
        if isinstance(content, dict) and (content.get('accuracy') or {}).get(figure) == value:
            weights_file.save(os.path.join(folder, name), content)
            copied[figure] = value
    return copied


def _name_and_position(path, content):
    return [os.path.basename(path)] + list(position_in_content(content) if isinstance(content, dict) else (-1, -1))
