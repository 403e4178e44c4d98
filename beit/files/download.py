"""Weights from https addresses, kept in the cache that torch.hub uses, or under a path of the caller's."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import urllib.request
from typing import Any, BinaryIO, Callable, Iterator, Optional

from beit.distributed import preemption, process_group
from beit.errors import UserError, escape_text
from beit.files.atomic_write import atomic_write
from beit.log import current_display, log_main

MAX_DOWNLOAD = 16 << 30  # bytes
TIMEOUT = 60  # seconds to wait for a server's next bytes


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, response: Any, code: int, message: str, headers: Any, address: str) -> Any:
        if not address.lower().startswith('https://'):
            raise ValueError('the server redirects to %s, not to an https:// address' % address)
        return super().redirect_request(request, response, code, message, headers, address)


def resolve_url(source: str, flag: str = '') -> str:
    """The local path of a file or an https URL; the first process downloads a URL once.

    The file must match #sha256=<64 hex digits> at the end of the URL or, without it and as in PyTorch, a hash in its
    name such as weights-8a3f5b21.pth. Raises a `UserError`, which names `flag`, for another address, a failed download
    or another hash.
    """
    if not re.match(r'[a-z]+://', source):
        return source
    shown = ('%s %s' % (flag, escape_text(source))).strip()
    address, _, fragment = source.partition('#')
    if not address.startswith('https://'):
        raise UserError('%s: only https:// addresses are downloaded; fetch the file yourself and give its path' % shown)
    if not re.match(r'(sha256=[0-9a-fA-F]{64})?\Z', fragment):
        raise UserError('%s: write #sha256= and 64 hex digits, or no #' % shown)
    wanted = fragment[len('sha256='):].lower()
    home = os.environ.get('TORCH_HOME') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache'), 'torch')
    name = address.partition('?')[0].rpartition('/')[2].strip('.') or 'weights'
    folder = 'beit-' + hashlib.sha256(address.encode('utf-8', 'surrogateescape')).hexdigest()[:12]
    path = os.path.join(home, 'hub', 'checkpoints', folder, name)  # two addresses may end in the same name
    in_name = re.search(r'-([0-9a-f]{8,})\.', name)
    fetch(address, path, shown, wanted or (in_name.group(1) if in_name else ''))
    if wanted:
        with open(path, 'rb') as file:
            found = _digest(file).hexdigest()
        if found != wanted:
            raise UserError('%s: %s has another sha256, %s; delete it and try again' % (shown, path, found))
    return path


def _digest(file):
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b''):
        digest.update(block)
    return digest


def fetch(address: str, path: str, shown: str, wanted: str = '', check: Optional[Callable[[str], None]] = None,
          remedy: str = 'set TORCH_HOME to a folder that all machines share') -> None:
    """Download an https address to `path`, on the first process and once.

    Args:
        shown: what errors begin with.
        wanted: the beginning of its sha256.
        check: called with the path of the whole file, before it takes its name, or of the file that was there.
        remedy: for a machine that does not see the first process's file.
    """
    if check is not None and process_group.is_main_process() and os.path.isfile(path):
        check(path)
    while process_group.is_main_process() and not os.path.isfile(path):  # again, after another program's download
        log_main('Downloading %s to %s' % (escape_text(address), path))
        _download(address, path, wanted, shown, check)
    process_group.barrier()
    if not os.path.isfile(path):
        raise UserError('%s: the first process downloaded it to %s, which this machine does not have; %s'
                        % (shown, path, remedy))


def _download(address: str, path: str, wanted: str, shown: str, check: Optional[Callable[[str], None]] = None) -> None:
    """Download an address to `path`, which appears only when the file is complete and passes its checks.

    If the server can send the rest of a file (a strong ETag, Accept-Ranges), a broken download stays in `path`.part-…,
    and the next one resumes it. Where another program downloads it, this waits for that, and then returns.
    """
    part, folder, length = '', os.path.dirname(path), 0  # bytes; 0: unknown
    try:
        os.makedirs(folder, exist_ok=True)
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(_open(address))
            length, tag = int(response.headers.get('Content-Length') or 0), response.headers.get('ETag', '')
            if not length and not response.chunked and not wanted:
                raise ValueError('the server does not say how long it is' + '; add its #sha256=' * (check is None))
            _check_size(length, shown)
            if length and tag.startswith('"') and response.headers.get('Accept-Ranges') == 'bytes':
                part = '%s.part-%s' % (path, hashlib.sha256(('%s %d' % (tag, length)).encode()).hexdigest()[:8])
            file = stack.enter_context(_open_part(part, path) if part else atomic_write(path))
            digest = _digest(file) if part else hashlib.sha256()
            received = file.tell()
            if length - received > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, '')
            if 0 < received < length:
                log_main('Resuming after %d of %d bytes' % (received, length))
                response.close()
                response = stack.enter_context(_open(address, received))
                if response.headers.get('ETag') != tag or not response.headers.get(
                        'Content-Range', '').startswith('bytes %d-' % received):
                    raise ValueError('the server does not send the rest of %s; remove that file' % part)
            if received != length or not length:
                received = _receive(response, file, digest, received, length, shown)
            if length and received != length:
                raise ValueError('it broke off after %d of %d bytes' % (received, length))
            file.flush()
            try:
                if not digest.hexdigest().startswith(wanted):
                    raise UserError('%s: the server sent a file with another sha256, %s; check the address and the '
                                    'hash' % (shown, digest.hexdigest()))
                if check is not None:
                    check(file.name)
            except UserError:
                if part:
                    os.remove(part)
                raise
    except BlockingIOError:
        return
    except preemption.Stopped as stop:
        raise preemption.Stopped(stop.number, 'interrupted by %s; %s keeps the downloaded part, and the same command '
                                 'resumes it' % (preemption.name(stop.number), part) if part else '') from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason, remedy = escape_text(str(error)) or type(error).__name__, 'try again to resume it, or ' if part else ''
        if getattr(error, 'code', 0) == 429 or getattr(error, 'code', 0) >= 500:  # of HTTP: the server is busy
            remedy = 'try again later, or '
        if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
            missing = (length - (os.path.getsize(part) if os.path.isfile(part) else 0)) / 1e6
            reason = '%s: no space for %s; %.1f MB are free' % (
                escape_text(folder), '%.1f MB' % missing if length else 'it', shutil.disk_usage(folder).free / 1e6)
            remedy = 'make room, then %s' % (remedy or 'try again, or ')
        elif isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError)) or 'Read-only' in reason:
            reason = '%s: cannot be written to: %s' % (escape_text(folder), reason)
            remedy = 'set %s to another folder, or ' % ('XDG_CACHE_HOME' if check else 'TORCH_HOME')
        raise UserError('%s: download failed (%s); %sfetch the file yourself and give its path' % (
            shown, reason, remedy)) from None


def _open(address: str, start: int = 0) -> Any:
    """The response of a server, from byte `start` on."""
    headers = {'User-Agent': 'torch.hub'}  # some servers shun urllib
    if start:
        headers['Range'] = 'bytes=%d-' % start
    return urllib.request.build_opener(_HttpsOnly).open(urllib.request.Request(address, headers=headers),
                                                        timeout=TIMEOUT)


def _receive(response: Any, file: BinaryIO, digest: Any, received: int, length: int, shown: str) -> int:
    """Write a response to a file, with a bar on a terminal; gives how many bytes the file has now."""
    display = current_display()
    display.begin('Download (MiB)', length >> 20, received >> 20)
    try:
        for block in iter(lambda: response.read(1 << 16), b''):
            for _ in range((received + len(block) >> 20) - (received >> 20)):
                display.step()
            received += len(block)
            _check_size(received, shown)
            digest.update(block)
            file.write(block)
    finally:
        display.end()
    return received


def _check_size(size, shown):
    if size > MAX_DOWNLOAD:
        raise UserError('%s: larger than %d GiB, and so no weights of these models' % (shown, MAX_DOWNLOAD >> 30))


@contextlib.contextmanager
def _open_part(part: str, path: str) -> Iterator[BinaryIO]:
    """A file to append to, read from its beginning; where nothing is raised, it takes the name `path`."""
    with open(part, 'ab+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log_main('Another program is downloading it; waiting for that to end')
            fcntl.flock(file, fcntl.LOCK_EX)
            raise
        if not (os.path.isfile(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part))):
            raise BlockingIOError  # the other program ended in between
        file.seek(0)
        yield file
        os.fsync(file.fileno())
        os.replace(part, path)
