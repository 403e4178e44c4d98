"""User errors: the exception type, and functions for its one-line messages."""

import contextlib
import difflib
import os
import re
import sys
from typing import Any, Iterable, Iterator, List, Optional, Union

EXPORTED_PROGRAM = 'an exported program, not weights; give the checkpoint that it was exported from, a .safetensors ' \
    'file or a Hugging Face folder'


class UserError(Exception):
    """A wrong flag, file or machine. Its text is one line: the flag or file, the value, the remedy.

    The programs print that line and exit with status 2. If all processes raise the error, `rank` is the one to print.
    """

    def __init__(self, text: str, rank: Optional[int] = None) -> None:
        super().__init__(text)
        self.rank = rank


def print_error(text: str) -> None:
    """Print a line on standard error; ignore a closed stream."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


closed_streams: List[str] = []  # standard streams that were closed at the start
_required: List[str] = []  # see `required_output`


def check_output_is_open(what: str) -> None:
    """Raise a `UserError` if standard output was closed at the start."""
    if 'stdout' in closed_streams:
        raise UserError('%s cannot be printed: standard output is closed; open it, or redirect it to a file' % what)


@contextlib.contextmanager
def required_output(what: str) -> Iterator[None]:
    """A context in which a failure of standard output is a `UserError`, unless `what` is ''; `what` would be lost."""
    if what:
        check_output_is_open(what)
    _required.append(what)
    try:
        yield
    finally:
        _required.pop()


def print_line(text: str) -> None:
    """Print a line and flush. If standard output fails, report that once and discard later output."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        is_required = any(_required) and not isinstance(error, BrokenPipeError)  # a reader may stop early
        with contextlib.suppress(OSError, ValueError):
            # Otherwise Python would flush again at exit, and fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not is_required:
                print_error('standard output is gone (%s); the program continues without it' % error)
        if is_required:
            raise UserError('%s cannot be printed: standard output fails (%s); redirect it to another file' % (
                _required[-1], getattr(error, 'strerror', None) or error)) from None


def one_line(error: BaseException) -> str:
    """The error's message as one line, without the traceback that a DataLoader worker adds."""
    text = str(error)
    if 'Original Traceback' in text:
        text = re.split(r'\w*UserError: ', text)[-1]
    return ' '.join(text.split())


def loader_limit_message(error: BaseException) -> str:
    """One line for an error of loader processes that exceed a limit of the machine; '' for other errors."""
    if re.search('Too many open files|items of ancdata', str(error)):
        return 'the loader processes need more open files than are allowed; lower --num_workers, or raise ulimit -n'
    if re.search('</torch_|out of shared memory', str(error)):  # PyTorch names its files so
        return '/dev/shm has no room for the batches; lower --num_workers, or enlarge it (docker run --shm-size=8g)'
    return ''


def worker_death_message(error: BaseException) -> str:
    """One line for PyTorch's error about a killed loader process; '' for other errors."""
    found = re.search(r'DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (exited unexpectedly|is killed by signal: [^.]*)',
                      str(error))
    return '' if not found else 'a loader process (%s) %s, probably by lack of memory (see dmesg); lower ' \
        '--num_workers' % found.groups()


def escape_text(path: Union[str, bytes, 'os.PathLike[str]']) -> str:
    """A path or text as one printable line: control characters and bytes that aren't text become escapes."""
    try:
        text = os.fsencode(path).decode('utf-8', 'backslashreplace')
    except UnicodeEncodeError:  # characters that the file system's encoding lacks
        text = str(path)
    return ''.join(each if each.isprintable() else each.encode('unicode_escape').decode() for each in text)


def guard_cell(value: object) -> object:
    """A value for a CSV file, quoted if a spreadsheet would evaluate it as a formula; numbers stay unchanged."""
    is_formula = isinstance(value, str) and value[:1] in ('=', '+', '-', '@') and not re.match(
        r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z', value, re.IGNORECASE)
    return "'%s" % value if is_formula else value


def nearest(name: str, known: Iterable[str]) -> List[str]:
    """Up to three names of `known` that are similar to `name`, the closest first."""
    by_lower = {each.lower(): each for each in sorted(known)}
    return [by_lower[each] for each in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]


def unknown_value_error(flag: str, name: str, known: Iterable[str]) -> UserError:
    """A `UserError` for a flag's value that is not in `known`; it suggests similar values."""
    near = nearest(name, known)
    remedy = 'did you mean %s?' % ' or '.join(near) if near else 'it must be one of %s' % ', '.join(sorted(known))
    return UserError('%s: unknown value %r; %s' % (flag, name, remedy))


def refuse(wrong: Any, config: Any, flag: str, reason: str) -> None:
    """Raise a `UserError`, '--flag value' and the reason, if something is `wrong`."""
    if wrong:
        value = getattr(config, flag)
        words = ['%g' % each if isinstance(each, float) else escape_text(str(each))
                 for each in (value if isinstance(value, list) else [value]) if each is not True and each != '']
        raise UserError(' '.join(['--' + flag, *words]) + reason)
