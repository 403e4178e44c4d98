"""The list of a class-folder tree's files, kept in a file between runs and believed only while the tree is the same.

A second start asks for the state of each folder (`image_files.stamp`) instead of listing it. Whatever else a scan hangs
on is compared too: where links lead, and who asks. A folder that changed shortly before it was listed is not believed,
since it may change again within one tick of the file system's clock; an index of such a tree is not written.

The file, .beit-index-<hash of the tree's real path>, lies beside the tree, not in it, which would change it; where that
can't be written, in output_dir. It is one line (MAGIC and a CRC-32 of the rest), one of JSON, then arrays and names:

    stamps     uint64 (folders, 3)
    counts     uint32 (folders,)      images of each folder
    lengths    uint16 (images,)       bytes of each image's name and its NUL
    folders    paths relative to the tree, a NUL behind each; '' is the tree itself, and first
    names      the images' names, folder after folder, a NUL behind each

It is a cache: one that is damaged is passed over, one that can't be written is not missed.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import time
import zlib

import numpy as np

import distributed
import safe_files
from errors import UserError, escape_text
from image_files import EXTENSIONS, ImageList, Tree, check_link, open_file, scan_classes, stamp

MAGIC = b'BEiT index 1'  # another number whenever the format changes, or what `scan_classes` finds
MAX_BYTES = 1 << 32
RACY_NS = 2 * 10 ** 9  # the ticks of a file system's clock are this long, at most
ABANDONED_SECONDS = 3600


class Index:
    """Finds the files of a tree: in its index, or by a scan, which writes the index.

    Args:
        output_dir (str): second choice for the index; '' for none.
        device (torch.device or None): of this process, where all of a job call `find`: the first one looks, and tells
            the others, which look at no file. None looks in each.
    """

    def __init__(self, output_dir='', device=None):
        self.output_dir, self.device, self.name, self.unwritten = output_dir, device, '', b''

    def find(self, root):
        """The `Tree` in `root`, as `scan_classes` would find it now. Raises its `UserError`."""
        found = []
        packed = distributed.from_first(lambda alive: self._find(root, alive, found), self.device)
        return found[0] if found else _unpack(packed, root)

    def _find(self, root, alive, found):
        """The packed `Tree`, which itself is added to `found`."""
        real = os.path.realpath(root)
        self.name = '.beit-index-' + hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
        reasons = []
        for folder in self._places(real):
            packed, tree, reason = _read(os.path.join(folder, self.name), root)
            if tree is not None:
                found.append(tree)
                return packed
            reasons += [reason] if reason else []
        if reasons:
            distributed.say('%s: looking for its images again, %s' % (escape_text(root), reasons[0]))
        started = time.time_ns()
        tree = scan_classes(root, alive)
        found.append(tree)
        packed = _pack(tree)
        if distributed.is_main_process() and all(0 < changed < started - RACY_NS for _, changed, _ in tree.stamps):
            written = any(_write(os.path.join(folder, self.name), packed) for folder in self._places(real))
            self.unwritten = b'' if written else packed
        return packed

    def _places(self, real):
        """The folders that may hold the index; output_dir may not be there yet, and isn't made for this."""
        return [os.path.dirname(real)] + ([self.output_dir] if os.path.isdir(self.output_dir or '') else [])

    def write_late(self):
        """Write what could not be written when the files were found, where output_dir was made since."""
        if self.unwritten and os.path.isdir(self.output_dir or ''):
            _write(os.path.join(self.output_dir, self.name), self.unwritten)
        self.unwritten = b''


def write_late(*parts):
    """`Index.write_late` of those data sets that have an index."""
    for part in parts:
        if isinstance(getattr(part, 'index', None), Index):  # lists have something else of that name
            part.index.write_late()


# ---- the file

def _write(path, packed):
    """Whether the index was written; half ones of killed processes go."""
    for half in glob.glob(glob.escape(path) + '.tmp-*'):
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(half).st_mtime > ABANDONED_SECONDS:
                os.remove(half)
    try:
        safe_files.write_bytes(path, packed)
    except UserError:
        return False
    return True


def _read(path, root):
    """(bytes, `Tree`, '') of an index that is true of the tree; else (b'', None, why not, or '' for no word)."""
    try:
        with open_file(path) as file:
            if os.pread(file.fileno(), len(MAGIC) + 1, 0) != MAGIC + b' ':
                return b'', None, ''  # of another version
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ValueError('too large')
            packed = file.raw.readall()  # at once: to touch new memory takes longer than to read what is in it
        tree, user = _unpack(packed, root), _header(packed)[0]['user']
    except OSError:  # most often there is none
        return b'', None, ''
    except Exception:  # what a file made for it can raise
        return b'', None, 'since %s is damaged' % escape_text(path)
    changed = _changed(tree, user == _user(), root)
    return (packed, tree, '') if changed is None else (b'', None, 'since %s changed' % escape_text(
        os.path.join(root, changed) if changed else root))


def _changed(tree, same_user, root):
    """A folder or link that isn't as it was when the tree was scanned, or None."""
    folders = tree.samples.folders
    start = os.path.join(os.fsencode(root), b'')
    paths = [start + folder for folder in os.fsencode('\0'.join(folders)).split(b'\0')]
    if not same_user or list(map(_stamp_of, paths)) != tree.stamps:
        for folder, path, before in zip(folders, paths, tree.stamps):
            if _stamp_of(path) != before or not _may_list(path):
                return folder
    for folder, real in tree.real.items():
        if os.path.realpath(os.path.join(root, folder) if folder else root) != real:
            return folder
    for link in tree.links:
        path = os.path.join(root, link)
        try:
            check_link(path)
        except OSError:
            return link
        if os.path.isdir(path):
            return link
    return None


def _user():
    """Who may list other folders than another user. What happens to a folder's own permissions is in its stamp."""
    return [os.geteuid(), os.getegid()] + sorted(os.getgroups())


def _stamp_of(path):
    try:
        return stamp(os.stat(path))
    except OSError:
        return None


def _may_list(path):
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


# ---- its bytes

def _pack(tree):
    folders = os.fsencode(''.join(folder + '\0' for folder in tree.samples.folders))
    samples = tree.samples
    header = dict(user=_user(), extensions=EXTENSIONS, folders=len(tree.stamps), images=len(samples),
                  bytes=len(folders), real=tree.real, links=tree.links)
    rest = b''.join([json.dumps(header).encode(), b'\n', np.array(tree.stamps, dtype='<u8').tobytes(),
                     samples.counts.astype('<u4').tobytes(),
                     np.diff(samples.ends, prepend=-1).astype('<u2').tobytes(), folders, samples.names])
    return MAGIC + b' %08x\n' % zlib.crc32(rest) + rest


def _header(packed):
    """(the line of JSON, where what follows it begins)."""
    start = len(MAGIC) + 10
    end = packed.index(b'\n', start) + 1
    return json.loads(packed[start:end].decode()), end


def _unpack(packed, root):
    """The `Tree` of an index. Nothing is believed that would lead out of the tree, or to a wrong class.

    Raises:
        ValueError, or anything else: the bytes are none that `_pack` gives.
    """
    start = len(MAGIC) + 10
    if packed[:start] != MAGIC + b' %08x\n' % zlib.crc32(memoryview(packed)[start:]):
        raise ValueError('damaged')
    header, start = _header(packed)
    count, images, length, real, links = (header[name] for name in ('folders', 'images', 'bytes', 'real', 'links'))
    if header['extensions'] != list(EXTENSIONS) or not (0 < count <= len(packed) // 28 and 0 <= images <= len(packed)
                                                      and 0 < length <= len(packed)):
        raise ValueError('other rules, or wrong lengths')
    stamps = np.frombuffer(packed, '<u8', 3 * count, start).reshape(-1, 3)
    counts = np.frombuffer(packed, '<u4', count, start + 24 * count).astype(np.int64)
    start += 28 * count
    lengths = np.frombuffer(packed, '<u2', images, start)
    start += 2 * images
    begin = start + length
    folders, ends = packed[start:begin], np.cumsum(lengths, dtype=np.int64) + (begin - 1)
    _check_paths(folders[1:])
    _check_paths(os.fsencode(''.join(link + '\0' for link in links)))
    folders = os.fsdecode(folders).split('\0')
    classes, labels = [], [0]
    for folder in folders[1:-1]:
        if '/' not in folder:
            classes.append(folder)
        elif not classes or not folder.startswith(classes[-1] + '/'):
            raise ValueError('a folder in no class')
        labels.append(len(classes) - 1)
    _check_names(packed, begin, lengths, ends)
    samples = ImageList(root, folders[:-1], labels, counts, packed, begin, ends)
    if folders[0] or folders[-1] or len(labels) != count or counts[0] or counts.sum() != len(samples) \
            or classes != sorted(set(classes)) or '' not in real or not set(real) <= set(folders) \
            or not all(isinstance(each, str) for each in real.values()):
        raise ValueError('wrong contents')
    return Tree(classes, samples, list(map(tuple, stamps.tolist())), real, links)


def _check_paths(paths):
    """Each part of each path is a name that isn't hidden; so none is .. or empty."""
    if paths and (re.search(rb'[\0/][./\0]', b'\0' + paths[:-1]) or paths[-1:] != b'\0' or b'/\0' in paths):
        raise ValueError('no paths of a tree')


def _check_names(packed, begin, lengths, ends):
    """Each name is one that isn't hidden, and not empty."""
    if (ends[-1] if len(ends) else begin - 1) != len(packed) - 1:
        raise ValueError('names of another length')
    text = np.frombuffer(packed, dtype=np.uint8)
    if len(ends) and (packed.find(b'/', begin) >= 0 or lengths.min() < 2 or text[ends].any() or packed[begin] in b'.\0'
                      or np.isin(text[ends[:-1] + 1], (0, ord('.'))).any()):
        raise ValueError('no names of images')
