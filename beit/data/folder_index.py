"""The list of a class-folder tree's files, kept between runs and used only while the tree is the same.

A second start asks for the state of each folder (`class_folders.fingerprint`) and where links lead, instead of listing.
A folder that changed shortly before it was listed may change again within one tick of the file system's clock, without
a trace: no index of such a tree is written.

Each tree has a file in the user's cache folder, writable by that user only: an .npz archive followed by its CRC-32. A
file that is damaged or another user's is ignored; one that can't be written is left out.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import time
import zlib
from typing import Callable, List, Optional

import numpy as np
import torch

from beit.data.class_folders import EXTENSIONS, FolderScan, ImageList, check_link, fingerprint, scan_classes
from beit.distributed import collectives, process_group
from beit.errors import UserError, escape_text
from beit.files import atomic_write
from beit.log import log_main

VERSION = 2  # increase it whenever the format changes, or what `scan_classes` finds
RACY_NS = 2 * 10 ** 9  # the ticks of a file system's clock are this long, at most


def load_or_scan(root: str, device: Optional[torch.device] = None) -> FolderScan:
    """The `FolderScan` of `root`: from its index, or by `scan_classes` (and its errors), which writes the index.

    Args:
        device: of this process, if all of a job call this: the main process broadcasts what it found. None: each looks.
    """
    scans: List[FolderScan] = []  # the main process need not unpack its own
    packed = collectives.broadcast_from_main(lambda keep_alive: _find(root, keep_alive, scans), device)
    return scans[0] if scans else _unpack(packed, root)


def index_path(root: str) -> str:
    """The index of a tree. Each version, and each set of groups that the user is in, has its own."""
    cache = os.environ.get('XDG_CACHE_HOME', '')
    cache = cache if os.path.isabs(cache) else os.path.join(os.path.expanduser('~'), '.cache')
    key = json.dumps([VERSION, EXTENSIONS, os.path.realpath(root), os.getegid(), sorted(os.getgroups())])
    return os.path.join(cache, 'beit-pytorch', 'folder_index', hashlib.sha256(key.encode()).hexdigest()[:32] + '.npz')


def _find(root: str, keep_alive: Callable[[], None], scans: List[FolderScan]) -> bytes:
    """The packed `FolderScan`, which itself is appended to `scans`."""
    path, changed = index_path(root), None
    with contextlib.suppress(Exception):  # most often there is none; NumPy and zipfile raise anything on damaged data
        if _is_own(os.path.dirname(path), stat.S_ISDIR) and _is_own(path, stat.S_ISREG):
            with open(path, 'rb') as file:
                packed = file.read()
            scan = _unpack(packed, root)
            changed = _first_change(scan, root)
            if changed is None:
                scans.append(scan)
                return packed
    if changed is not None:
        log_main('%s: looking for its images again, since %s changed'
                 % (escape_text(root), escape_text(os.path.join(root, changed) if changed else root)))
    started = time.time_ns()
    scans.append(scan_classes(root, keep_alive))
    packed = _pack(scans[0])
    if process_group.is_main_process() and all(0 < mtime < started - RACY_NS for _, mtime, _ in scans[0].fingerprints):
        _write(path, packed)
    return packed


def _first_change(scan, root):
    """A folder or link, relative to root, that isn't as it was when the tree was scanned, or None."""
    try:
        for name, before in zip(scan.samples.folders, scan.fingerprints):
            if fingerprint(os.stat(os.path.join(root, name))) != before:
                return name
        for name, real_path in scan.real_paths.items():
            if os.path.realpath(os.path.join(root, name)) != real_path:
                return name
        for name in scan.links:
            check_link(os.path.join(root, name))
            if os.path.isdir(os.path.join(root, name)):
                return name
    except OSError:
        return name
    return None


def _is_own(path, is_kind):
    """Whether it is of this kind, no link, and this user's; others may not write to a folder."""
    status = os.lstat(path)
    is_shared = stat.S_ISDIR(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_kind(status.st_mode) and status.st_uid == os.geteuid() and not is_shared


def _write(path, packed):
    """Write an index if the cache folder is this user's and can be written."""
    folder = os.path.dirname(path)
    with contextlib.suppress(OSError, UserError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if _is_own(folder, stat.S_ISDIR):
            atomic_write.write_bytes(path, packed)


def _pack(scan):
    paths = json.dumps([scan.classes, scan.samples.folders, scan.real_paths, scan.links]).encode()
    buffer = io.BytesIO()
    np.savez(buffer, paths=np.frombuffer(paths, np.uint8), labels=scan.samples.labels, counts=scan.samples.counts,
             names=scan.samples.names, fingerprints=np.array(scan.fingerprints, dtype=np.uint64))
    return buffer.getvalue() + zlib.crc32(buffer.getbuffer()).to_bytes(4, 'big')


def _unpack(packed, root):
    if zlib.crc32(memoryview(packed)[:-4]).to_bytes(4, 'big') != packed[-4:]:
        raise ValueError('damaged')
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        classes, folders, real_paths, links = json.loads(arrays['paths'].tobytes().decode())
        samples = ImageList(root, folders, arrays['labels'], arrays['counts'], arrays['names'])
        return FolderScan(classes, samples, list(map(tuple, arrays['fingerprints'].tolist())), real_paths, links)
