"""The output folder of a run: its lock, its files, the backup of an earlier run, and log.txt.

Each module that writes a file registers the name here (`register_output`).
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Pattern, Sequence

import torch

from beit.distributed import collectives, process_group
from beit.errors import UserError, escape_text
from beit.files.atomic_write import write_bytes
from beit.log import log_main

LOG, LOCK = 'log.txt', '.beit.lock'


class Output(NamedTuple):
    """A kind of file that a run writes into its folder."""
    pattern: Pattern[str]  # of the whole name
    proves_run: bool = False  # a folder with such a file holds a run; without one, no file moves to a backup folder
    is_ours: Optional[Callable[[str], bool]] = None  # whether a run wrote a path; for names that others may give, too
    at_end: bool = False  # written at the end of a run; also moves when a run returns to an earlier checkpoint


_outputs: List[Output] = []


def register_output(pattern: str, **kind: Any) -> None:
    """Register a file that a run writes into its folder. `kind`: see `Output`."""
    _outputs.append(Output(re.compile(pattern + r'\Z'), **kind))


def _begins_as_append_log_writes(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read(9) == '{"train_l'


register_output(r'log\.txt', proves_run=True, is_ours=_begins_as_append_log_writes)


# ---- one run at a time

@contextlib.contextmanager
def locked(folder: str, device: Optional[torch.device] = None, flag: str = '--output_dir') -> Iterator[None]:
    """Make the output folder and hold its lock, on the first process; the others get its error. '' locks nothing.

    The kernel frees the lock at any end of the process, and child processes do not inherit it. On NFS the lock works
    between machines. On a file system without locks, it logs a line. Raises a `UserError` with the name of the run that
    holds the lock. `device` is that of the collective; None if only one process calls this. Errors begin with `flag`.
    """
    made: List[pathlib.Path] = []  # the innermost first
    handles: List[int] = []

    def acquire(_):
        path = pathlib.Path(os.path.abspath(folder))
        try:
            made.extend(each for each in (path, *path.parents) if not os.path.isdir(each))
            os.makedirs(folder, exist_ok=True)
            handles.append(_lock(folder, flag))
        except OSError as error:
            raise UserError('%s %s cannot be written to (%s: %s); choose another' % (
                flag, escape_text(folder), escape_text(error.filename or folder), error.strerror or error)) from None

    if folder:
        collectives.broadcast_from_main(acquire, device)
    try:
        yield
    finally:
        for handle in handles:
            path = os.path.join(folder, LOCK)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.lstat(path)):  # else the folder was replaced
                    os.remove(path)  # before the lock is free: later the file may belong to the next run
            os.close(handle)
        for each in made:
            with contextlib.suppress(OSError):  # empty, if the run wrote nothing
                os.rmdir(each)


def _lock(folder, flag):
    """Lock the folder; returns the open lock file. Raises `UserError` with the name of the run that has the lock."""
    path = os.path.join(folder, LOCK)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            # Not flock: loader processes inherit it, and may outlive their run.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = escape_text(os.read(handle, 200)) or 'another run'
                os.close(handle)
                raise UserError('%s %s: %s writes there; wait for its end, stop it, or choose another folder'
                                % (flag, escape_text(folder), holder)) from None
            log_main('%s cannot be locked (%s); make sure that no other run writes there'
                     % (escape_text(folder), error.strerror or error))
            return handle
        mine = os.fstat(handle)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(mine, os.lstat(path)):
                break
        os.close(handle)  # the other run has just ended, and removed the file
    if not stat.S_ISREG(mine.st_mode) or mine.st_nlink > 1:
        os.close(handle)
        raise UserError('%s %s: %s is not a file of this program; remove it' % (flag, escape_text(folder), LOCK))
    with contextlib.suppress(OSError):  # a full disk; the lock holds nevertheless
        os.ftruncate(handle, 0)
        os.write(handle, ('process %d on %s, since %s,' % (
            os.getpid(), socket.gethostname(), time.strftime('%Y-%m-%d %H:%M:%S'))).encode())
    return handle


# ---- what an earlier run left

def prepare_folder(folder: str, keep: bool = False, later: Sequence[str] = ()) -> None:
    """Make the output folder, on the first process, and move the files of an earlier run to a backup folder.

    The backup folder is <folder>-<date of the newest file>. Files that no run wrote stay. With `keep`, this run
    continues the earlier one: the checkpoints after that place, `later`, move with the files of that run's end and a
    copy of its log.txt.
    """
    if folder and process_group.is_main_process():
        _remove_temp_files(folder)
        try:
            if not keep:
                files, what = run_outputs(folder), 'the earlier run'
                advice = '--auto_resume would have continued it'
            else:
                files = [*later, *run_outputs(folder, at_end=True)] if later else []
                what, advice = 'later files of the earlier run', 'this run continues from before them'
            if files:
                backup = backup_name(folder, files)
                os.mkdir(backup)
                if keep and os.path.isfile(os.path.join(folder, LOG)):
                    shutil.copy2(os.path.join(folder, LOG), backup)
                for path in files:
                    os.rename(path, os.path.join(backup, os.path.basename(path)))
                log_main('Moved %s in %s to %s (%s)' % (what, escape_text(folder), escape_text(backup), advice))
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError('--output_dir %s holds an earlier run and it cannot be moved (%s); choose another, or '
                            'continue it with --auto_resume' % (folder, error)) from None
    process_group.barrier()


def _remove_temp_files(folder):
    """Remove the temporary files that killed processes left in a folder."""
    for path in glob.glob(os.path.join(glob.escape(folder), '*.tmp-*')):
        final, _, process = os.path.basename(path).rpartition('.tmp-')
        if process.isdigit() and any(output.pattern.match(final) for output in _outputs):
            with contextlib.suppress(OSError):
                os.remove(path)


def run_outputs(folder: str, at_end: bool = False) -> List[str]:
    """Paths of a run's files in a folder, or only of the files that it writes at its end; [] without a run."""
    found, is_run = [], False
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        for output in _outputs:
            if output.pattern.match(name) and (
                    output.is_ours is None or os.path.isfile(path) and output.is_ours(path)):
                is_run = is_run or output.proves_run
                found += [path] if output.at_end or not at_end else []
                break
    return found if is_run else []


def backup_name(folder: str, files: Sequence[str]) -> str:
    """<folder>-<date and time of the newest file>, with a number if that exists; beside the target of a link."""
    newest = time.localtime(max(os.lstat(path).st_mtime for path in files))
    base = '%s-%s' % (os.path.realpath(folder), time.strftime('%Y%m%d-%H%M%S', newest))
    names = [base] + ['%s-%d' % (base, number) for number in range(2, 1000)]
    return next(name for name in names if not os.path.lexists(name))


# ---- log.txt

def append_log(output_dir: str, stats: Dict[str, Any]) -> None:
    """Add a JSON line to output_dir/log.txt. The file is replaced, so a kill leaves no partial line.

    Drops partial lines, and lines of the same or a later epoch, from before a resume.
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
    """The lines of output_dir/log.txt, dicts with an epoch, in order; [] without any."""
    try:
        with open(os.path.join(output_dir, LOG), encoding='utf-8', errors='replace') as file:
            return [stats for stats in map(_parse_line, file) if stats is not None]
    except OSError:
        return []


def _parse_line(line):
    """The statistics of a line, a dict with an int under epoch; None for another line."""
    try:
        stats = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return stats if isinstance(stats, dict) and isinstance(stats.get('epoch'), int) else None
