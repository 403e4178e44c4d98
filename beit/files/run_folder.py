"""The folder that a run writes into: which files are a run's, moving an earlier run aside, and log.txt.

Whoever writes a file registers its name here (`register_output`), so that there is no list of them to keep up to date.
"""

import contextlib
import json
import os
import re
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional

from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.files.atomic_write import write_bytes
from beit.log import log_main

LOG = 'log.txt'

# (compiled pattern, whether such a file proves a run or a function that says so, whether it is moved)
_outputs: List[Any] = []


def register_output(pattern: str, proves_run: bool = False, is_ours: Optional[Callable[[str], bool]] = None,
                    is_moved: bool = True) -> None:
    """Register a file that a run writes into its folder.

    Args:
        pattern (str): a regular expression for the whole name.
        proves_run (bool): a folder with such a file holds a run. The other files are moved aside only beside one.
        is_ours (function): says of a path whether a run wrote it, where anybody may have a file of that name.
        is_moved (bool): moved aside with an earlier run; else only what a killed process left half written is removed.
    """
    _outputs.append((re.compile(pattern + r'\Z'), proves_run, is_ours, is_moved))


def _begins_as_append_log_writes(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read(9) == '{"train_l'


register_output(r'log\.txt', proves_run=True, is_ours=_begins_as_append_log_writes)


def check_writable(flag: str, folder: str) -> None:
    """Raise a `UserError` where a folder can't be made or written to. Leaves no new folder behind."""
    if not folder:
        return
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError('%s %s: %s is a file, not a folder; choose another' % (flag, folder, existing))
    try:
        with tempfile.TemporaryFile(prefix='.write-test-', dir=existing):  # nameless where the system can do so
            pass
    except OSError as error:
        raise UserError('%s %s: %s cannot be written to (%s); choose another'
                        % (flag, folder, existing, error.strerror or error)) from None


def prepare_folder(folder: str, keep: bool = False) -> None:
    """Make the output folder, by the first process. What an earlier run left there is moved aside, not overwritten.

    Only a run's own files are moved, into <folder>-<date of the newest>; whatever else lies there stays.

    Args:
        keep (bool): this run goes on with what is there.

    Raises:
        UserError: they can't be moved.
    """
    if folder and process_group.is_main_process():
        files = [] if keep else run_outputs(folder)
        for path in leftover_temp_files(folder):
            with contextlib.suppress(OSError):
                os.remove(path)
        try:
            if files:
                aside = backup_name(folder, files)
                os.mkdir(aside)
                for path in files:
                    os.rename(path, os.path.join(aside, os.path.basename(path)))
                log_main('Moved the earlier run in %s aside, to %s (--auto_resume would have gone on with it)'
                         % (escape_text(folder), escape_text(aside)))
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError('--output_dir %s holds an earlier run and it cannot be moved aside (%s); choose another, '
                            'or go on with --auto_resume' % (folder, error)) from None
    process_group.barrier()


def leftover_temp_files(folder: str) -> List[str]:
    """Paths of what a killed process was about to write there; nothing ever reads them."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        final, _, process = name.rpartition('.tmp-')
        if process.isdigit() and any(pattern.match(final) for pattern, _, _, _ in _outputs):
            found.append(os.path.join(folder, name))
    return found


def run_outputs(folder: str) -> List[str]:
    """Paths of the checkpoints, log.txt and what else a run left in a folder; [] where none did."""
    found, is_run = [], False
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        for pattern, proves_run, is_ours, is_moved in _outputs:
            if is_moved and pattern.match(name) and (is_ours is None or os.path.isfile(path) and is_ours(path)):
                found.append(path)
                is_run = is_run or proves_run
                break
    return found if is_run else []


def backup_name(folder: str, files: List[str]) -> str:
    """<folder>-<date and time of the newest file>, with a number where that name is taken; beside a link's target."""
    newest = time.localtime(max(os.lstat(path).st_mtime for path in files))
    base = '%s-%s' % (os.path.realpath(folder), time.strftime('%Y%m%d-%H%M%S', newest))
    names = [base] + ['%s-%d' % (base, number) for number in range(2, 1000)]
    return next(name for name in names if not os.path.lexists(name))


# ---- log.txt

def append_log(output_dir: str, stats: Dict[str, Any]) -> None:
    """Add one JSON line to output_dir/log.txt, which is rewritten whole: a kill leaves no half line.

    Lines of the same or a later epoch are dropped: they are of a run that was resumed from before them. So are half
    lines.
    """
    path, kept = os.path.join(output_dir, LOG), []
    if os.path.isfile(path):
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            for line in file:
                earlier = _parse_line(line)
                if line.endswith('\n') and (earlier is None or earlier['epoch'] < stats['epoch']):
                    kept.append(line)
    text = ''.join(kept) + json.dumps(stats) + '\n'
    write_bytes(path, text.encode('utf-8', 'surrogateescape'))


def read_log(output_dir: str) -> List[Dict[str, Any]]:
    """The lines of output_dir/log.txt, dicts with an epoch, in order; [] where there are none."""
    try:
        with open(os.path.join(output_dir, LOG), encoding='utf-8', errors='replace') as file:
            return [stats for stats in map(_parse_line, file) if stats is not None]
    except OSError:
        return []


def _parse_line(line):
    """The statistics of a line, a dict with an int under epoch; None where it is something else."""
    try:
        stats = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return stats if isinstance(stats, dict) and isinstance(stats.get('epoch'), int) else None
