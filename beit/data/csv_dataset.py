"""Reads CSV files that list images with one label or several (--train_csv, --val_csv).

Rows go one by one into a few arrays, to save memory; only one process checks that the files exist.
"""

import array
import collections
import contextlib
import csv
import io
import itertools
import os
import re
import unicodedata
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from beit.config import SPLITS
from beit.data.class_folders import normalize
from beit.data.decode import is_image_name
from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError, escape_text, nearest
from beit.files import archives
from beit.log import log_main, pluralize

PATHS = ('path', 'file', 'filename', 'file_name', 'filepath', 'image', 'image_path')
LABELS = ('label', 'labels', 'class', 'classes', 'category')
DOUBTFUL = ('na', 'n/a', 'none', 'null', 'nat', '-nan')  # classes or missing values
MISSING = ('nan', '<na>', '#n/a')  # missing values of pandas and spreadsheets
SEVERAL = re.compile(r'(?<!\\);')  # between the labels of an image; \; is a semicolon in a name
FORM = 'write path,label (with several labels: path,label;label), and quote a value that holds a comma'


def read(flag: str, path: str, root: str, loss: str, classes: Optional[List[str]] = None,
         multi_label: Optional[bool] = None, device: Optional[torch.device] = None, missing: str = 'error'
         ) -> Tuple[SampleList, List[str]]:
    """(images, class names) of a CSV file of `path,label` or `path,label;label` rows, UTF-8, with or without a header.

    Args:
        flag, loss: the flag that named the file, and --loss.
        root: the base of relative paths; '' for the file's folder.
        classes: the allowed labels; None for the file's labels, sorted.
        multi_label: whether images have several labels; None: whether any row has.
        device: this process's, if all processes of a job call this: only the first checks the files. None: each does.
        missing: the treatment of a missing image: 'error', 'unreadable' (kept), or 'ignored' (not checked).

    Raises:
        UserError: the file, its form, a label or an image is invalid; the message names the line.
    """
    file, root = CsvFile(flag, path), root or os.path.dirname(path)
    file.check_first_row(root)
    labels = _Labels(file, classes, multi_label)
    names, ends, lines = bytearray(), array.array('q', [0]), array.array('q')
    for line, name, cell in file.rows():
        if not name:
            raise file.error(line, 'the path is empty; %s' % FORM)
        names += os.fsencode(name)
        ends.append(len(names))
        lines.append(line)
        labels.add(line, cell)
    if labels.is_multi and loss == 'ce':
        raise UserError('--loss ce: %s has images with several labels; use --loss bce' % file.name)
    flat, label_ends, known = labels.finish()
    samples = SampleList(root, bytes(names), ends, flat, label_ends, len(known))
    file.data = b''
    _check_duplicates(file, samples, lines, labels.is_multi)
    if missing != 'ignored':
        renamed = collectives.broadcast_from_main(
            lambda keep_alive: _find_files(file, samples, lines, missing == 'error', keep_alive), device)
        if renamed:
            stored = samples.relative_names(0, len(samples))
            for index, name in renamed:
                stored[index] = os.fsencode(name)
            samples = SampleList.from_names(root, stored, flat, label_ends, len(known))
    return samples, known


class CsvFile:
    """The rows of a CSV file, separated by commas, semicolons or tabs; errors name the flag, the file and the line."""

    def __init__(self, flag: str, path: str) -> None:
        self.flag, self.name = flag, '%s %s' % (flag, escape_text(path))
        try:
            with archives.open_file(path) as file:
                self.data = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise UserError('%s: cannot be read (%s)' % (self.name, reason)) from None
        problem, position = 'holds a NUL character; save the file as CSV, in UTF-8', self.data.find(b'\0')
        if position < 0:
            try:
                self.data.decode()
            except UnicodeDecodeError as error:
                problem, position = 'is not UTF-8; save the file in that encoding', error.start
        if position >= 0:
            raise self.error(self.data.count(b'\n', 0, position) + 1, problem)
        self.path, self.label, self.split, self.columns, self.has_header = 0, 1, -1, 2, False
        self.delimiter = self._find_delimiter()

    def error(self, line: int, text: str) -> UserError:
        return UserError('%s, line %d: %s' % (self.name, line, text))

    def _reader(self, delimiter: str) -> Any:
        text = io.TextIOWrapper(io.BytesIO(self.data), encoding='utf-8-sig', newline='')
        return csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)

    def _find_delimiter(self) -> str:
        """The header's; else the one that gives two columns in every row, or several in the first."""
        first_rows: Dict[str, List[List[str]]] = {}
        for delimiter in ',\t;':
            rows = first_rows[delimiter] = []
            with contextlib.suppress(csv.Error):
                for row in itertools.islice(self._reader(delimiter), 100):
                    rows += [row] if row else []
            if rows and self._find_columns(rows[0]):
                return delimiter
        splits = [delimiter for delimiter, rows in first_rows.items() if {len(row) for row in rows} == {2}]
        splits += [delimiter for delimiter, rows in first_rows.items() if rows and len(rows[0]) > 1]
        return splits[0] if splits else ','

    def _find_columns(self, row: Sequence[str]) -> bool:
        """Whether the row is a header; then set the columns."""
        titles = [cell.strip().lower() for cell in row]
        found = [next((column for column, title in enumerate(titles) if title in known), -1)
                 for known in (PATHS, LABELS, ('split',))]
        if -1 in found[:2]:
            return False
        self.path, self.label, self.split = found
        self.columns, self.has_header = len(row), True
        return True

    def cells(self) -> Iterator[Tuple[int, List[str]]]:
        """Yield (line, row), without the header."""
        reader, is_header = self._reader(self.delimiter), self.has_header
        try:
            for row in reader:
                if any(map(str.strip, row)):
                    if not is_header:
                        yield reader.line_num, row
                    is_header = False
        except csv.Error as error:
            raise self.error(reader.line_num, 'is not CSV (%s)' % error) from None

    def check_first_row(self, root: str) -> None:
        """Raise a `UserError` where the first row is an unknown header, or the columns are swapped."""
        line, row = next(self.cells(), (0, []))
        if not line:
            raise UserError('%s: lists no image; write one path,label per line' % self.name)
        if self.has_header or len(row) < 2:
            return
        is_path = [is_image_name(cell) or os.path.lexists(os.path.join(root, cell)) for cell in map(str.strip, row)]
        if not is_path[0]:
            problem = 'the label comes before the path; add a header label,path' if is_path[1] else \
                'neither an image nor a header with a column path (or %s) and a column label (or %s); %s' % (
                    ', '.join(PATHS[1:]), ', '.join(LABELS[1:]), FORM)
            raise self.error(line, '%s: %s' % (escape_text(self.delimiter.join(row)), problem))

    def rows(self) -> Iterator[Tuple[int, str, str]]:
        """Yield (line, path, label cell) of the rows whose column `split`, if there is one, fits this flag."""
        split = '' if self.split < 0 else self._choose_split()
        for line, row in self.cells():
            self._check_columns(line, row)
            if not split or SPLITS[row[self.split].strip().lower()] == split:
                yield line, row[self.path].strip(), row[self.label]

    def _check_columns(self, line: int, row: Sequence[str]) -> None:
        if len(row) != self.columns:
            raise self.error(line, 'has %s, not %d; %s' % (pluralize(len(row), 'column'), self.columns, FORM))

    def _choose_split(self) -> str:
        counts: collections.Counter = collections.Counter()
        for line, row in self.cells():
            self._check_columns(line, row)
            split = row[self.split].strip().lower()
            if split not in SPLITS:
                raise self.error(line, 'the column split holds %r; write train, val or test, or rename the column'
                                 % escape_text(split))
            counts[SPLITS[split]] += 1
        wanted = 'train' if self.flag == '--train_csv' else 'val' if counts['val'] else 'test'
        if not counts[wanted]:
            raise UserError('%s: no row has the split %s; add some, or rename the column split'
                            % (self.name, wanted.replace('test', 'val')))
        log_main('%s: using %d of its %d images, whose split is %s'
                 % (self.name, counts[wanted], sum(counts.values()), wanted))
        return wanted


class _Labels:
    """Collects the labels of one row after another."""

    def __init__(self, file: CsvFile, classes: Optional[List[str]], multi_label: Optional[bool]) -> None:
        self.file, self.classes, self.multi_label = file, classes, multi_label
        self.index_of = {name: index for index, name in enumerate(map(normalize, classes or ()))}
        self.flat, self.ends = array.array('q'), array.array('q', [0])
        self.of_cell: Dict[str, List[int]] = {}
        self.empty_line = self.several_rows = 0

    @property
    def is_multi(self) -> bool:
        return bool(self.several_rows) if self.multi_label is None else self.multi_label

    def add(self, line: int, cell: str) -> None:
        if cell not in self.of_cell:
            self.of_cell[cell] = self._parse(line, cell)
        indices = self.of_cell[cell]
        self.flat.extend(indices)
        self.ends.append(len(self.flat))
        self.several_rows += len(indices) > 1
        if not indices:
            self.empty_line = self.empty_line or line

    def _parse(self, line: int, cell: str) -> List[int]:
        """The class indices of a cell; [] if it's empty."""
        cell = normalize(cell.strip())
        if not cell:
            return []
        names = [cell] if cell in self.index_of else [
            each.strip().replace('\\;', ';') for each in SEVERAL.split(cell)]
        if not all(names):
            raise self.file.error(line, 'a label is empty; write path,label, or path,label;label')
        if len(names) > 1 and self.multi_label is False:
            raise self.file.error(line, '%s are several labels, and the training images have one each (write a '
                                  'semicolon in a name as \\;)' % escape_text(cell))
        for name in names:
            if not name.isprintable():
                raise self.file.error(line, 'the label %s has unprintable characters; rename it' % escape_text(name))
            if names.count(name) > 1:
                raise self.file.error(line, 'the label %s is there twice' % name)
            if name not in self.index_of:
                self._add_class(line, name)
        return [self.index_of[name] for name in names]

    def _add_class(self, line: int, name: str) -> None:
        if name.lower() in MISSING:
            raise self.file.error(line, 'the label %s stands for a missing value; remove the line, or give one' % name)
        if self.classes is not None:
            near = ' or '.join(map(escape_text, nearest(name, self.classes)))
            raise self.file.error(line, 'the label %r is none of the %d classes of the training images or the '
                                  'checkpoint; %s' % (
                                      escape_text(name), len(self.classes), 'did you mean %s?' % near if near else
                                      'list training images of it, or correct it'))
        self.index_of[name] = len(self.index_of)

    def finish(self) -> Tuple[np.ndarray, Optional[np.ndarray], List[str]]:
        """(class indices of all images, the end of each image's indices or None if each has one, class names)."""
        if self.empty_line and not self.is_multi:
            raise self.file.error(self.empty_line, 'the label is empty; write path,label')
        known = sorted(self.index_of) if self.classes is None else list(self.classes)
        if not known:
            raise UserError('%s: no image has a label; write path,label' % self.file.name)
        doubtful = [name for name in known if name.lower() in DOUBTFUL]
        if doubtful and self.classes is None:
            log_main('%s: %s counts as a class; remove such lines if it stands for a missing label'
                     % (self.file.name, ', '.join(doubtful)))
        flat = np.array(self.flat)
        if self.classes is None:  # names were numbered in the order of the rows
            flat = np.argsort([self.index_of[name] for name in known])[flat]
        if self.several_rows:
            log_main('%s: %d images have several labels, separated by ; (write a semicolon in a name as \\;)'
                     % (self.file.name, self.several_rows))
        return flat, np.array(self.ends) if self.is_multi else None, known


def _check_duplicates(file: CsvFile, samples: SampleList, lines: Sequence[int], is_multi: bool) -> None:
    hashes = np.fromiter((hash(samples.name(index)) for index in range(len(samples))), np.int64, len(samples))
    order = np.argsort(hashes, kind='stable')
    for position in np.flatnonzero(np.diff(hashes[order]) == 0).tolist():
        first, second = order[position:position + 2].tolist()
        if samples.name(first) == samples.name(second):
            raise file.error(lines[second], '%s is in line %d already; list each image once%s' % (
                escape_text(samples.name(first)), lines[first],
                '' if is_multi else ', with all of its labels: label;label'))


def _find_files(file: CsvFile, samples: SampleList, lines: Sequence[int], must_exist: bool,
                keep_alive: Callable[[], None]) -> List[Tuple[int, str]]:
    """(index, name): the file system's names of files that the CSV file spells differently.

    Each folder is listed once, instead of a look-up for each file. Raises a `UserError` if one is missing that
    `must_exist`.
    """
    folders: Dict[str, array.array] = {}
    for index in range(len(samples)):
        folders.setdefault(os.path.dirname(samples.path(index)), array.array('q')).append(index)
    renamed, absent = [], []
    for folder, indices in folders.items():
        keep_alive()
        listed = np.zeros(0, dtype=np.int64)
        with contextlib.suppress(OSError), archives.scandir(folder or '.') as entries:
            listed = np.fromiter((hash(entry.name) for entry in entries), np.int64)
        hashes = np.fromiter((hash(os.path.basename(samples.path(index))) for index in indices), np.int64, len(indices))
        for index in np.array(indices)[~np.isin(hashes, listed)].tolist():
            name = os.fsdecode(samples.name(index))
            spelling = next((each for each in _spellings(name)
                             if os.path.lexists(os.path.join(samples.root, each))), None)
            if spelling is None:
                absent.append(index)
            elif spelling != name:
                renamed.append((index, spelling))
    if absent and must_exist:
        others = ', and %d more are missing' % (len(absent) - 1) if len(absent) > 1 else ''
        raise file.error(lines[absent[0]], 'there is no file %s%s; paths are relative to %s (--data_path names another '
                         'folder)' % (escape_text(samples.path(absent[0])), others, escape_text(samples.root) or '.'))
    if renamed:
        log_main('%s: %d paths were found under another spelling (\\ for /, or accents)' % (file.name, len(renamed)))
    return renamed


def _spellings(name: str) -> List[str]:
    """A path, the path with slashes for backslashes, and both in the Unicode forms NFC and NFD; each once."""
    slashed = [name, name.replace('\\', '/')]
    return list(dict.fromkeys(slashed + [unicodedata.normalize(form, each) for each in slashed
                                         for form in ('NFC', 'NFD')]))
