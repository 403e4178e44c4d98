"""Flags in a file: writes a run's args.yaml, and reads --config. Each line is `flag: value`, in JSON."""

import json
import os
import re
from typing import Any, Dict, List, Union

from beit import startup
from beit.errors import UserError, escape_text
from beit.files.atomic_write import write_bytes
from beit.log import log_main

MARK = '# The flags of this run, all of them. '
HEAD = MARK + 'To start another with them, give the program --config THIS_FILE\n'
LARGEST = 1 << 20  # bytes; far more than all flags take
NULLS = ('', '~', 'null', 'Null', 'NULL')
ESCAPED = '[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]'  # not in YAML


def write(path: str, flags: Dict[str, Any]) -> None:
    """Write {flag: value (bool, number, str, list or None)}. Does not replace a file that no run wrote."""
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            if file.read(len(MARK)) != MARK.encode():  # the user's, for --config
                log_main('%s was not written by a run, and is kept' % escape_text(path))
                return
    lines = ['%s: %s' % (name, json.dumps(flags[name], ensure_ascii=False)) for name in sorted(flags)]
    lines = [re.sub(ESCAPED, lambda found: '\\u%04x' % ord(found.group()), line) + '\n' for line in lines]
    write_bytes(path, (HEAD + ''.join(lines)).encode())


def read(path: str) -> Dict[str, Union[str, List[str], None]]:
    """Read a flat YAML file: {flag: str, list of str, or None for null}, without converting values."""
    shown = '--config %s' % escape_text(path)
    try:
        with open(path, 'rb') as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError('%s: larger than 1 MiB, so not a file of flags' % shown)
        text = data.decode('utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        reason = 'cannot be read (%s)' % (error.strerror or error) if isinstance(error, OSError) else 'not a text file'
        raise UserError('%s: %s; give a file such as the args.yaml of a run' % (shown, reason)) from None
    try:
        import yaml  # slow to import
    except ImportError:
        raise UserError('%s needs PyYAML; %s' % (shown, startup.pip_install('PyYAML'))) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        raise UserError('%s: not YAML%s (%s)' % (shown, '' if mark is None else ', line %d' % (mark.line + 1),
                                                 escape_text(getattr(error, 'problem', None) or type(error).__name__))
                        ) from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError('%s: it must hold lines of the form flag: value' % shown)
    flags: Dict[str, Union[str, List[str], None]] = {}
    for key, value in root.value if root is not None else ():
        is_list = isinstance(value, yaml.SequenceNode)
        if not all(isinstance(each, yaml.ScalarNode) for each in [key] + (value.value if is_list else [value])):
            raise UserError('%s, line %d: a flag has one value, or a list of values' % (shown, key.start_mark.line + 1))
        if key.value in flags:
            raise UserError('%s: %s occurs twice; remove one' % (shown, escape_text(key.value)))
        is_null = not is_list and value.style is None and value.value in NULLS
        flags[key.value] = None if is_null else [each.value for each in value.value] if is_list else value.value
    return flags
