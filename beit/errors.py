"""The failures that a user can cause and mend: one exception type and how its one line is worded."""

import contextlib
import difflib
import os
import re
import sys
from typing import Iterable, List, Optional, Union


class UserError(Exception):
    """A wrong flag, file or machine. Its text is one line: the flag or file, the value, the cure.

    `run_class_finetuning.py` prints that line and exits with status 2.

    Attributes:
        rank (int or None): where all processes raise it together, the one that it is about; it speaks for all.
    """

    def __init__(self, text: str, rank: Optional[int] = None) -> None:
        super().__init__(text)
        self.rank = rank


def print_error(text: str) -> None:
    """Print a line on standard error, if anybody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print a line at once. Where standard output cannot be written to any more, say so once and go on without it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            # Or Python would try again at its end, and fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print_error('standard output is gone (%s); the program goes on without it' % error)


def one_line(error: BaseException) -> str:
    """The error's own line, without the traceback text that a DataLoader worker wraps around it."""
    text = str(error)
    if 'Original Traceback' in text:
        text = re.split(r'\w*UserError: ', text)[-1]
    return ' '.join(text.split())


def worker_death_message(error: BaseException) -> str:
    """One line, where a RuntimeError says that a loader process was killed, else ''."""
    found = re.search(r'DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (exited unexpectedly|is killed by signal: [^.]*)',
                      str(error))
    return '' if not found else 'a loader process (%s) %s: most often for want of memory, see dmesg; lower ' \
        '--num_workers' % found.groups()


def escape_text(path: Union[str, bytes, 'os.PathLike[str]']) -> str:
    """A path as it can be shown in one line: control characters and bytes that aren't text become escapes."""
    try:
        text = os.fsencode(path).decode('utf-8', 'backslashreplace')
    except UnicodeEncodeError:  # a text that the locale has no name for
        text = str(path)
    return ''.join(each if each.isprintable() else each.encode('unicode_escape').decode() for each in text)


def guard_cell(value: object) -> object:
    """A value of a CSV file, which a spreadsheet does not take for a formula; numbers stay as they are."""
    is_formula = isinstance(value, str) and value[:1] in ('=', '+', '-', '@') and not re.match(
        r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z', value, re.IGNORECASE)
    return "'%s" % value if is_formula else value


def nearest(name: str, known: Iterable[str]) -> List[str]:
    """Up to three of `known` that look like `name`, the likeliest first."""
    by_lower = {each.lower(): each for each in sorted(known)}
    return [by_lower[each] for each in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]


def unknown_value_error(flag: str, name: str, known: Iterable[str]) -> UserError:
    """A `UserError` for a name that is none of `known`; it says which known ones come near.

    Args:
        flag (str): the command-line flag, with its dashes.
        name (str): what the user gave.
        known (iterable of str): the names that would have been right.
    """
    near = nearest(name, known)
    cure = 'did you mean %s?' % ' or '.join(near) if near else 'it must be one of %s' % ', '.join(sorted(known))
    return UserError('%s: unknown value %r; %s' % (flag, name, cure))
