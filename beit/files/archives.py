"""Opens untrusted files, also in zip and tar archives, whose paths continue: DIR/data.zip/train/cat/1.png.

Each process indexes an archive once, before it forks its loader processes. A file is then read at its offset with
`os.pread`, which has no position to share.
"""

import array
import collections
import contextlib
import functools
import io
import os
import re
import stat
import struct
import tarfile
import types
import zipfile
import zlib
from typing import Any, BinaryIO, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

import numpy as np

from beit.errors import UserError, escape_text

KINDS = {stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a pipe', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device'}
LARGEST = 1 << 30  # bytes of one file; an archive can claim any size
Row = Tuple[str, int, int, int, int, int]  # name, with / for a folder; offset, bytes stored, bytes, deflated, CRC or -1


class ZipReader:
    """Files that are stored or deflated; the offset is that of the local header."""

    @staticmethod
    def rows(path: str) -> Iterator[Row]:
        with zipfile.ZipFile(path) as archive:
            if min([info.header_offset for info in archive.infolist()] or [0]):
                raise EOFError('it is joined of several or begins with other data; pack one archive')
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise ValueError('%s is encrypted' % info.filename)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError('%s is neither stored nor deflated' % info.filename)
                name = info.filename
                if not info.flag_bits & 0x800 and name == info.orig_filename:  # Info-ZIP writes UTF-8 without the flag
                    with contextlib.suppress(UnicodeDecodeError):
                        name = name.encode('cp437').decode('utf-8')
                yield (name, info.header_offset, info.compress_size, info.file_size,
                       info.compress_type == zipfile.ZIP_DEFLATED, info.CRC)

    @staticmethod
    def content(read: Callable, offset: int, stored: int, size: int, deflated: int, crc: int) -> bytes:
        header = read(30, offset)
        data = read(stored, offset + 30 + sum(struct.unpack('<HH', header[26:])))
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1) if deflated else data
        if header[:4] != b'PK\3\4' or len(data) != size or zlib.crc32(data) != crc:
            raise ValueError('it is damaged in the archive: its checksum differs')
        return data


class TarReader:
    """Files of an uncompressed tar."""

    @staticmethod
    def rows(path: str) -> Iterator[Row]:
        with open(path, 'rb') as file, tarfile.open(None, 'r:', file, encoding='utf-8') as archive:
            for info in iter(archive.next, None):
                if not (info.isdir() or info.isreg()) or info.issparse():
                    raise ValueError(info.name + ' is a link or special; use tar --dereference --hard-dereference')
                yield info.name + '/' * info.isdir(), info.offset_data, info.size, info.size, 0, -1
                archive.members.clear()  # type: ignore[attr-defined]  # saves memory
            file.seek(archive.offset)
            rest = iter(functools.partial(file.read, 1 << 20), b'')  # packers fill up with zeros
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or any(each.strip(b'\0') for each in rest):
                raise EOFError('it is damaged, truncated or joined of several at byte %d; tar --ignore-zeros unpacks '
                               'joined ones' % archive.offset)

    @staticmethod
    def content(read: Callable, offset: int, stored: int, size: int, deflated: int, crc: int) -> bytes:
        return read(size, offset)


READERS: Dict[str, Any] = {'.zip': ZipReader, '.tar': TarReader}  # by the ending
_archives: Dict[str, 'Archive'] = {}


class Archive:
    """The index of an archive. Raises a `UserError` if it can't be read, or holds names that no folder can hold.

    Attributes:
        folders: {folder: names of the files and folders in it, joined by /; folders end with a NUL}.
    """

    def __init__(self, path: str) -> None:
        self.path, self.reader, self.handles = path, READERS[path[-4:].lower()], {}  # type: str, Any, Dict[int, int]
        found: Dict[str, List[str]] = {'': []}
        keys, rows, head = array.array('q'), array.array('q'), b' '
        try:
            status = os.stat(path)
            self.stamp = status.st_size, status.st_mtime_ns
            head = np.fromfile(path, np.uint8, tarfile.BLOCKSIZE).tobytes()
            for name, *row in self.reader.rows(path):
                is_folder = name.endswith('/')
                parts = [part for part in name[:len(name) - is_folder].split('/') if part != '.']
                if '..' in parts or '' in parts or re.search(r'[\\\0]', name):
                    raise ValueError('%s is no name in a folder' % name)
                if not 0 <= row[0] <= row[0] + row[1] <= status.st_size:
                    raise EOFError('%s is not all in it; it is truncated' % name)
                for depth in range(1, len(parts) + is_folder):
                    if '/'.join(parts[:depth]) not in found:
                        found['/'.join(parts[:depth])] = []
                        found['/'.join(parts[:depth - 1])].append(parts[depth - 1] + '\0')
                if not is_folder:
                    found['/'.join(parts[:-1])].append(parts[-1])
                    keys.append(hash('/'.join(parts)))
                    rows.extend(row)
            for folder, names in found.items():
                for name, count in collections.Counter(each.rstrip('\0') for each in names).most_common(1):
                    if count > 1:
                        raise ValueError('%s is in it %d times%s' % (os.path.join(folder, name), count, (
                            ', as a file and as a folder' if name + '\0' in names else '')))
        except Exception as error:  # the libraries raise nearly anything on a damaged file
            kind = '.zip' if head[:4] == b'PK\3\4' else '.tar' if head[257:262] == b'ustar' else ''
            is_damaged = kind and not isinstance(error, (ValueError, NotImplementedError))
            remedy = ('allow this user to read it' if isinstance(error, PermissionError) else
                      'its content is a %s; rename it' % kind if kind not in ('', path[-4:].lower()) else
                      '%sfetch or copy it again' % ('' if head else 'it is empty; ') if is_damaged or not head else
                      'unpack it, or pack a .zip or a .tar that is not compressed')
            raise UserError('%s: cannot be read as an archive (%s); %s' % (
                escape_text(path), escape_text(str(error)[:200]), remedy)) from None
        order = np.argsort(np.asarray(keys), kind='stable')
        self.keys, self.rows = np.asarray(keys)[order], np.asarray(rows).reshape(-1, 5)[order]
        self.folders = {folder: '/'.join(names) for folder, names in found.items()}

    def row(self, name: str) -> List[int]:
        """Offset, bytes stored, bytes, whether deflated, CRC of a file. Raises FileNotFoundError."""
        index = np.searchsorted(self.keys, hash(name))
        if index == len(self.keys) or self.keys[index] != hash(name):
            raise FileNotFoundError(2, 'no such file in the archive', name)
        return self.rows[index].tolist()

    def content(self, name: str) -> bytes:
        row = self.row(name)
        if not row[2] or max(row[1:3]) > LARGEST:
            raise ValueError('it has %.1f GiB; the limit in an archive is 1' % (max(row[1:3]) / LARGEST) if row[2] else
                             'it is empty')
        return self.reader.content(self.read, *row)

    def read(self, count: int, offset: int) -> bytes:
        """The bytes at an offset. Each process opens the archive for itself."""
        if os.getpid() not in self.handles:
            self.handles[os.getpid()] = os.open(self.path, os.O_RDONLY)
        handle = self.handles[os.getpid()]
        status, data = os.fstat(handle), os.pread(handle, count, offset)
        if len(data) != count or (status.st_size, status.st_mtime_ns) != self.stamp:
            raise ValueError('the archive has changed since the start')
        return data


# ---- paths that may lead into an archive

def find(path: str) -> Optional[Tuple[Archive, str]]:
    """(the archive that a path leads to, the name in it), or None."""
    for match in re.finditer(r'\.(?:zip|tar)(?=/|$)', path, re.IGNORECASE):
        archive = path[:match.end()]
        if archive not in _archives and os.path.isfile(archive):
            _archives[archive] = Archive(archive)
        if archive in _archives:
            return _archives[archive], os.path.normpath('/' + path[match.end():])[1:].lstrip('/')
    return None


def open_file(path: str) -> BinaryIO:
    """Open a regular, non-empty file for reading. Raises ValueError for others, such as a pipe, which could block."""
    found = find(path)
    if found and found[1]:
        return io.BytesIO(found[0].content(found[1]))
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('it is ' + KINDS.get(stat.S_IFMT(status.st_mode), 'no file'))
        if status.st_size == 0:
            raise ValueError('it is empty')
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def isdir(path: str) -> bool:
    found = find(path)
    return found[1] in found[0].folders if found else os.path.isdir(path)


def size(path: str) -> int:
    found = find(path)
    return found[0].row(found[1])[2] if found else os.stat(path).st_size


def scandir(path: str) -> ContextManager[Any]:
    """`os.scandir`, also of folders in an archive. Raises OSError."""
    found = find(path)
    if not found:
        return os.scandir(path)
    if found[1] not in found[0].folders:
        raise FileNotFoundError(2, 'no such folder in the archive', path)
    names = filter(None, found[0].folders[found[1]].split('/'))
    return contextlib.closing(  # type: ignore[return-value]
        types.SimpleNamespace(name=name.rstrip('\0'), path=os.path.join(path, name.rstrip('\0')), is_symlink=bool,
                              is_dir=functools.partial(bool, name.endswith('\0'))) for name in names)
