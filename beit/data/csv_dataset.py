"""CSV files that list images with their classes (--train_csv, --val_csv), one class an image or several."""

import csv
import io
import os
from typing import Dict, List, Optional, Tuple

import torch

from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError, escape_text, nearest
from beit.files.regular_file import open_file

PATHS = {'path', 'file', 'filename', 'file_name', 'filepath', 'image', 'image_path'}
LABELS = {'label', 'labels', 'class', 'classes', 'category'}
BETWEEN = ';'  # between the classes of an image


def read(flag: str, path: str, root: str, loss: str, classes: Optional[List[str]] = None,
         multi_label: Optional[bool] = None, device: Optional[torch.device] = None, must_exist: bool = True
         ) -> Tuple[SampleList, List[str]]:
    """Read a CSV file of `path,label` or `path,label;label` rows, UTF-8, with or without a header.

    Args:
        flag (str): the flag that named it. loss (str): --loss.
        root (str): the folder that relative paths begin at; '' is the file's own.
        classes (list of str): the class names that labels may be; None takes those of the file, sorted.
        multi_label (bool): whether images have several classes; None finds out.
        device (torch.device): where all processes of a job call this, so that one looks for the images; or None.
        must_exist (bool): whether an image that isn't there is an error.

    Returns:
        (images, class names).

    Raises:
        UserError: the file, its form, a label or an image is not what it must be; it names the line.
    """
    file = _File(flag, path)
    rows = _rows(file)
    several = any(BETWEEN in label for _, _, label in rows)
    if multi_label is None:
        multi_label = several
    if multi_label and loss == 'ce':
        raise UserError('--loss ce: %s gives images several classes; use --loss bce' % file.name)
    names, labels = [], []
    lines: Dict[str, int] = {}  # the first line of each path
    for line, name, cell in rows:
        if not name:
            raise file.error(line, 'there is no path before the comma')
        if name in lines:
            raise file.error(line, '%s stands in line %d already; list each image once%s' % (
                escape_text(name), lines[name], ', with all of its labels: label;label' if not multi_label else ''))
        lines[name] = line
        names.append(name)
        labels.append((line, _split(file, line, cell, multi_label)))
    known = sorted({label for _, each in labels for label in each}) if classes is None else classes
    if not known:
        raise UserError('%s: none of its images has a label' % file.name)
    numbers = {label: number for number, label in enumerate(known)}
    for line, each in labels:
        for label in each:
            if label not in numbers:
                near = ' or '.join(map(escape_text, nearest(label, known)))
                raise file.error(line, 'the label %r is none of the %d classes of the training images; %s' % (
                    escape_text(label), len(known), 'did you mean %s?' % near if near else
                    'list training images of it, or mend it'))
    root = root or os.path.dirname(path)
    if must_exist:
        collectives.broadcast_from_main(lambda keep_alive: _check_images(file, root, lines, keep_alive), device)
    indices = [[numbers[label] for label in each] for _, each in labels]
    encoded = [os.fsencode(name) for name in names]
    if multi_label:
        return SampleList(root, encoded, indices, len(known)), list(known)
    return SampleList(root, encoded, [index for index, in indices]), list(known)


class _File:
    """The text of a CSV file, and how its errors are worded."""

    def __init__(self, flag, path):
        self.name = '%s %s' % (flag, escape_text(path))
        try:
            with open_file(path) as file:
                data = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise UserError('%s: cannot be read (%s)' % (self.name, reason)) from None
        if b'\0' in data:
            raise self.error(_line(data, data.index(b'\0')), 'holds a NUL character; save the file as CSV, in UTF-8')
        try:
            self.text = data.decode('utf-8-sig')
        except UnicodeDecodeError as error:
            raise self.error(_line(data, error.start), 'is not UTF-8; save the file in that encoding') from None

    def error(self, line, text):
        return UserError('%s, line %d: %s' % (self.name, line, text))


def _line(data, position):
    return data.count(b'\n', 0, position) + 1


def _rows(file):
    """[(line, path, label)] without the header. With one, other columns may stand between."""
    reader, rows = csv.reader(io.StringIO(file.text, newline=''), strict=True), []
    columns, path, label, is_first = 2, 0, 1, True
    try:
        for row in reader:
            if not row:
                continue
            titles = [cell.strip().lower() for cell in row] if is_first else ()
            is_first = False
            if PATHS & set(titles) and LABELS & set(titles):
                path, label = (next(column for column, title in enumerate(titles) if title in names)
                               for names in (PATHS, LABELS))
                columns = len(row)
                continue
            if len(row) != columns:
                raise file.error(reader.line_num, 'has %d column%s, not %d; it must be path,label (with several '
                                 'labels: path,label;label), and what holds a comma stands in double quotes'
                                 % (len(row), 's' if len(row) != 1 else '', columns))
            rows.append((reader.line_num, row[path].strip(), row[label]))
    except csv.Error as error:
        raise file.error(reader.line_num, 'is not CSV (%s)' % error) from None
    if not rows:
        raise UserError('%s: lists no image; give one path,label a line' % file.name)
    return rows


def _split(file, line, cell, multi_label):
    """The labels in a cell."""
    if multi_label and not cell.strip():
        return []  # of none of the classes
    labels = [label.strip() for label in cell.split(BETWEEN)] if multi_label or BETWEEN in cell else [cell.strip()]
    if not all(labels):
        raise file.error(line, 'there is an empty label; write path,label%s' % (
            ', or path,label;label' if BETWEEN in cell else ''))
    if len(labels) > 1 and not multi_label:
        raise file.error(line, '%s are several labels, and the training images have one each' % escape_text(cell))
    for label in labels:
        if not label.isprintable():
            raise file.error(line, 'the label %s holds characters that cannot be printed' % escape_text(label))
        if labels.count(label) > 1:
            raise file.error(line, 'the label %s stands there twice' % label)
    return labels


def _check_images(file, root, lines, keep_alive):
    """Raise a `UserError` where a listed image isn't there. Folders are listed, each once: files are not looked at."""
    there, missing = {}, []
    for name in lines:
        folder, base = os.path.split(os.path.join(root, name))
        if folder not in there:
            keep_alive()
            try:
                there[folder] = set(os.listdir(folder or '.'))
            except OSError:
                there[folder] = set()
        if base not in there[folder] and not os.path.lexists(os.path.join(root, name)):
            missing.append(name)
    if missing:
        raise file.error(lines[missing[0]], 'there is no file %s%s; paths begin at %s (--data_path names another '
                         'folder)' % (escape_text(os.path.join(root, missing[0])), '' if len(missing) == 1 else
                                      ', and %d more are missing' % (len(missing) - 1), escape_text(root) or '.'))
    return b''
