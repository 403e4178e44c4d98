"""The folder that a run writes into: its lock, which files are a run's, moving an earlier run aside, and log.txt.

Whoever writes a file registers its name here (`register_output`), so that there is no list of them to keep up to date.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Pattern, Sequence

import torch

from beit.distributed import collectives, process_group
from beit.errors import UserError, escape_text
from beit.files.atomic_write import write_bytes
from beit.log import log_main

LOG, LOCK = 'log.txt', '.beit.lock'


class Output(NamedTuple):
    """A kind of file that a run writes into its folder; see `register_output`."""
    pattern: Pattern[str]
    proves_run: bool
    is_ours: Optional[Callable[[str], bool]]
    is_moved: bool
    at_end: bool


_outputs: List[Output] = []


def register_output(pattern: str, proves_run: bool = False, is_ours: Optional[Callable[[str], bool]] = None,
                    is_moved: bool = True, at_end: bool = False) -> None:
    """Register a file that a run writes into its folder.

    Args:
        pattern (str): a regular expression for the whole name.
        proves_run (bool): a folder with such a file holds a run. The other files are moved aside only beside one.
        is_ours (function): says of a path whether a run wrote it, where anybody may have a file of that name.
        is_moved (bool): moved aside with an earlier run; else only what a killed process left half written is removed.
        at_end (bool): it tells how the run ended; it's moved aside too when a run goes back to an earlier checkpoint.
    """
    _outputs.append(Output(re.compile(pattern + r'\Z'), proves_run, is_ours, is_moved, at_end))


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


# ---- one run at a time

@contextlib.contextmanager
def locked(folder: str, device: Optional[torch.device] = None) -> Iterator[None]:
    """Make the output folder and hold its lock, by the first process; the others learn how that went. '' locks nothing.

    The kernel frees the lock when the process ends, however that ends, and no child inherits it. On NFS it holds
    between machines, too. Where the file system has no locks, a line says so.

    Args:
        device (torch.device or None): of the collective; None where only one process calls this.

    Raises:
        UserError: another run holds it; the line names that one.
    """
    made: List[str] = []
    handles: List[int] = []

    def acquire(_):
        try:
            made.extend(_make_folders(folder))
            handles.append(_lock(folder))
        except OSError as error:
            raise UserError('--output_dir %s cannot be written to (%s: %s); choose another' % (
                escape_text(folder), escape_text(error.filename or folder), error.strerror or error)) from None
        return b''

    if folder:
        collectives.broadcast_from_main(acquire, device)
    try:
        yield
    finally:
        for handle in handles:
            path = os.path.join(folder, LOCK)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.lstat(path)):  # else another folder has the name now
                    os.remove(path)  # before the lock is free: afterwards the file may be the next run's
            os.close(handle)
        for path in reversed(made):
            with contextlib.suppress(OSError):  # of a run that wrote nothing
                os.rmdir(path)


def _make_folders(folder):
    """Make a folder and those above it; the paths of those that were not there, the outermost first."""
    missing, path = [], os.path.abspath(folder)
    while not os.path.isdir(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return missing


def _lock(folder):
    """The open file that holds the lock. A `UserError` names the run that has it."""
    path = os.path.join(folder, LOCK)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            # Not flock: a loader process would inherit that, and may outlive the run that started it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = escape_text(os.read(handle, 200)) or 'another run'
                os.close(handle)
                raise UserError('--output_dir %s: %s writes there; wait for its end, stop it, or choose another folder'
                                % (escape_text(folder), holder)) from None
            log_main('%s cannot be locked (%s); see to it that no other run writes there'
                     % (escape_text(folder), error.strerror or error))
            return handle
        mine = os.fstat(handle)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(mine, os.lstat(path)):
                break
        os.close(handle)  # the run that had it ended just now, and has removed the file
    if not stat.S_ISREG(mine.st_mode) or mine.st_nlink > 1:
        os.close(handle)
        raise UserError('--output_dir %s: %s is not a file of this program; remove it' % (escape_text(folder), LOCK))
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(handle, 0)
        os.write(handle, ('process %d on %s, since %s,' % (
            os.getpid(), socket.gethostname(), time.strftime('%Y-%m-%d %H:%M:%S'))).encode())
    return handle


# ---- what an earlier run left

def prepare_folder(folder: str, keep: bool = False, later: Sequence[str] = ()) -> None:
    """Make the output folder, by the first process. What an earlier run left there is moved aside, not overwritten.

    Only a run's own files are moved, into <folder>-<date of the newest>; whatever else lies there stays.

    Args:
        keep (bool): this run goes on with what is there.
        later (sequence of str): with `keep`, the checkpoints of later than where this run goes on. They are moved aside
            with what tells of that run's end and a copy of its log.txt.

    Raises:
        UserError: they can't be moved.
    """
    if folder and process_group.is_main_process():
        for path in leftover_temp_files(folder):
            with contextlib.suppress(OSError):
                os.remove(path)
        try:
            if not keep:
                files, what = run_outputs(folder), 'the earlier run'
                advice = '--auto_resume would have gone on with it'
            else:
                files = [*later, *run_outputs(folder, at_end=True)] if later else []
                what, advice = 'what the earlier run saved later', 'this run goes on from before'
            if files:
                backup = backup_name(folder, files)
                os.mkdir(backup)
                if keep and os.path.isfile(os.path.join(folder, LOG)):
                    shutil.copy2(os.path.join(folder, LOG), backup)
                for path in files:
                    os.rename(path, os.path.join(backup, os.path.basename(path)))
                log_main('Moved %s in %s aside, to %s (%s)' % (what, escape_text(folder), escape_text(backup), advice))
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
        if process.isdigit() and any(output.pattern.match(final) for output in _outputs):
            found.append(os.path.join(folder, name))
    return found


def run_outputs(folder: str, at_end: bool = False) -> List[str]:
    """Paths of the checkpoints, log.txt and what else a run left in a folder; [] where none did.

    Args:
        at_end (bool): only what was written when it ended.
    """
    found, is_run = [], False
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        for output in _outputs:
            if output.is_moved and output.pattern.match(name) and (
                    output.is_ours is None or os.path.isfile(path) and output.is_ours(path)):
                is_run = is_run or output.proves_run
                found += [path] if output.at_end or not at_end else []
                break
    return found if is_run else []


def backup_name(folder: str, files: Sequence[str]) -> str:
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
