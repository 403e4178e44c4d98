"""Writes files and folders atomically: completely or not at all."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import typing

from beit.errors import UserError, escape_text


@contextlib.contextmanager
def atomic_write(path: str, is_given: bool = False) -> typing.Iterator[typing.BinaryIO]:
    """A file to write bytes to, which gets the name `path` only when it is complete and on the disk.

    After a kill at any moment, `path` is the old file or the new one; a temporary <path>.tmp-<process> can remain. If
    the name `is_given` by the user, a link stays and its target is replaced; a pipe or a device receives the bytes.
    """
    if is_given:
        path = os.path.realpath(path) if os.path.islink(path) else path
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            with open(path, 'wb') as file:
                yield file
            return
    temporary = '%s.tmp-%d' % (path, os.getpid())
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISREG(os.lstat(temporary).st_mode):
            os.remove(temporary)  # of a killed process with the same number
    file = open(temporary, 'xb')  # O_EXCL: an error if anything has the name, even a broken link
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(os.path.dirname(path) or '.')
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # it exists only after a failure or an interrupt


def link_atomic(original: str, path: str) -> None:
    """Give a file the further name `path`, as `atomic_write` gives it. Raises OSError where the disk has no links."""
    temporary = '%s.tmp-%d' % (path, os.getpid())
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    os.link(original, temporary)
    try:
        os.replace(temporary, path)  # nothing happens where both are the same file already
        _fsync_folder(os.path.dirname(path) or '.')
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def atomic_directory(path: str) -> typing.Iterator[str]:
    """A new folder to write files to, which gets the name `path` only when all of them are complete and on the disk.

    It replaces an earlier folder; a kill between the two renames leaves that as <path>.old-<process>.
    """
    path = path.rstrip(os.sep)
    temporary, old = '%s.tmp-%d' % (path, os.getpid()), '%s.old-%d' % (path, os.getpid())
    try:
        os.mkdir(temporary)
        yield temporary
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), 'rb+') as file:
                os.fsync(file.fileno())
        _fsync_folder(temporary)
        if os.path.isdir(path):
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if os.path.isdir(old):
                os.replace(old, path)
            raise
        _fsync_folder(os.path.dirname(path) or '.')
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some network file systems
            raise
    finally:
        os.close(handle)


def write_bytes(path: str, data: bytes, is_given: bool = False) -> None:
    """Write a small file with `atomic_write`. Raises `UserError` on failure."""
    try:
        with atomic_write(path, is_given) as file:
            file.write(data)
    except OSError as error:
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?'
                        % (escape_text(path), error.strerror or error)) from None


def check_writable(flag: str, path: str, is_file: bool = False) -> None:
    """Raise `UserError` if a folder, or a file's folder, can't be made or written to. Makes no folder."""
    if not path:
        return
    existing = os.path.dirname(os.path.abspath(path)) if is_file else os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError('%s %s: %s is a file, not a folder; choose another' % (flag, path, existing))
    try:
        tempfile.TemporaryFile(prefix='.write-test-', dir=existing).close()  # has no name, if the system supports that
    except OSError as error:
        raise UserError('%s %s: %s cannot be written to (%s); choose another'
                        % (flag, escape_text(path), existing, error.strerror or error)) from None
