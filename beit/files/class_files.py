"""Reads the small files that list classes: --class_names and --class_weights. Imports no PyTorch."""

import csv
import io
import json
import math
import os
from typing import Dict, List

from beit.errors import UserError, escape_text
from beit.files.archives import open_file

LARGEST_NAMES_FILE = 1 << 26  # bytes


def read_class_names(path: str, flag: str = '--class_names') -> List[str]:
    """The names in a file such as --class_names, in order: one a line; or JSON, a list or an object with keys from "0".

    If JSON has a list of words for a class, as ImageNet's index does, the first is its name. Raises `UserError`.
    """
    shown = '%s %s' % (flag, escape_text(path))
    try:
        with open_file(path) as file:
            text = file.read(LARGEST_NAMES_FILE).decode('utf-8-sig')
        if text.lstrip()[:1] in ('[', '{'):
            content = json.loads(text)
            if isinstance(content, dict):
                content = [content[str(number)] for number in range(len(content))]
            names = [each[0] if isinstance(each, list) else each for each in content]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError('%s: %s; give a readable file, one name a line' % (shown, error.strerror or error)) from None
    except (ValueError, LookupError, RecursionError):
        raise UserError('%s: not a list of names; write one per line, or JSON (a list, or an object with keys "0", '
                        '"1", …)' % shown) from None
    twice = sorted(name for name in set(names) if names.count(name) > 1) if len(set(names)) < len(names) else []
    if twice or not names:
        raise UserError('%s: %s' % (shown, 'it holds %s twice' % escape_text(twice[0]) if twice else 'it is empty'))
    return [escape_text(name) for name in names]


def read_weights(path: str) -> Dict[str, float]:
    """{class: weight} of a file, each at least 0. Raises a `UserError` where it can't be read."""
    flag = '--class_weights %s' % escape_text(path)
    if not os.path.isfile(path):
        raise UserError('%s: no such file; give balanced, or a CSV or JSON file of class and weight' % flag)
    try:
        with open_file(path) as file:
            text = file.read().decode('utf-8-sig')
        rows = list(json.loads(text).items()) if text.lstrip()[:1] == '{' else list(
            csv.reader(io.StringIO(text, newline=''), strict=True))
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError('%s: is neither CSV nor JSON (%s)' % (flag, ' '.join(str(error).split())[:100])) from None
    weights: Dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and [str(cell).strip().lower() for cell in row] == ['class', 'weight']):
            continue
        try:
            name, weight = row[0].strip(), float(row[1])
            is_valid = len(row) == 2 and 0 <= weight < math.inf and name not in weights
        except (TypeError, ValueError, OverflowError, IndexError):
            is_valid = False
        if not is_valid:
            raise UserError('%s, entry %d: write a new class and its weight, a number of at least 0; got %s'
                            % (flag, number, escape_text(str(row)[:100])))
        weights[name] = weight
    return weights
