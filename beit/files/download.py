"""Downloads weights from https addresses into torch.hub's cache."""

import hashlib
import http.client
import os
import re
import urllib.request
from typing import Any

from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.files.atomic_write import atomic_write
from beit.log import log_main

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
    name such as weights-8a3f5b21.pth. Errors name `flag`.

    Raises:
        UserError: the address isn't https, the download fails, or the file doesn't match its hash.
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
    path = os.path.join(home, 'hub', 'checkpoints', folder, name)  # two addresses can end in the same name
    if process_group.is_main_process() and not os.path.isfile(path):
        log_main('Downloading %s to %s' % (escape_text(address), path))
        in_name = re.search(r'-([0-9a-f]{8,})\.', name)
        _download(address, path, wanted or (in_name.group(1) if in_name else ''), shown)
    process_group.barrier()
    if not os.path.isfile(path):
        raise UserError('%s: the first process downloaded it to %s, which this machine does not have; set TORCH_HOME '
                        'to a folder that all machines share' % (shown, path))
    if wanted:
        digest = hashlib.sha256()
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise UserError('%s: %s has another sha256, %s; delete it and try again'
                            % (shown, path, digest.hexdigest()))
    return path


def _download(address: str, path: str, wanted: str, shown: str) -> None:
    """Download an address to `path`, which appears only when it is complete and its sha256 begins with `wanted`."""
    too_large = UserError('%s: larger than %d GiB, too large for these models; give another address'
                          % (shown, MAX_DOWNLOAD >> 30))
    digest, received = hashlib.sha256(), 0
    try:
        request = urllib.request.Request(address, headers={'User-Agent': 'torch.hub'})  # some servers refuse urllib
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.build_opener(_HttpsOnly).open(request, timeout=TIMEOUT) as response, \
                atomic_write(path) as file:
            length = response.headers.get('Content-Length')
            if length is None and not response.chunked and not wanted:
                raise ValueError('the server sends no Content-Length; add #sha256=')
            if length is not None and int(length) > MAX_DOWNLOAD:
                raise too_large
            for block in iter(lambda: response.read(1 << 16), b''):
                received += len(block)
                if received > MAX_DOWNLOAD:
                    raise too_large
                digest.update(block)
                file.write(block)
            if length is not None and received != int(length):
                raise ValueError('the connection ended after %d of %d bytes' % (received, int(length)))
            if not digest.hexdigest().startswith(wanted):
                raise UserError('%s: the server sent a file with another sha256, %s; check the address and the hash'
                                % (shown, digest.hexdigest()))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = escape_text(str(error)) or type(error).__name__
        raise UserError('%s: download failed (%s); fetch the file yourself and give its path'
                        % (shown, reason)) from None
