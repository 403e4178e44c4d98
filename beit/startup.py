"""The start of a program, before it imports anything outside of Python's standard library."""

import importlib.util
import os
import resource
import shlex
import signal
import sys

from beit.errors import UserError, closed_streams, print_error

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ('torch', 'torchvision', 'timm', 'einops', 'numpy', 'PIL')  # every program imports them
MIN_FILES = 256  # a run with two loader processes takes about 100
MANY_FILES = 65536  # each batch of a loader process takes a few


def prepare() -> None:
    """Call this first in a program. A missing package or a low limit ends it with one line and status 2."""
    open_standard_streams()
    # Ctrl-C ends the program without a traceback during the import of PyTorch, which takes seconds.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        check_packages()
        raise_file_limit()
    except UserError as error:
        print_error('%s: error: %s' % (os.path.basename(sys.argv[0]), error))
        sys.exit(2)


def open_standard_streams() -> None:
    """Open /dev/null for a closed standard stream: else the next file takes its number, and its lines."""
    for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, closefd=False))
            closed_streams.append(name)


def pip_install(*packages: str, file: str = '') -> str:
    """The command that installs packages, or a requirements file of this project, into this Python."""
    what = ['-r', os.path.join(ROOT, file)] if file else list(packages)
    return 'run: ' + ' '.join(map(shlex.quote, [sys.executable, '-m', 'pip', 'install', *what]))


def check_packages() -> None:
    """Raise a `UserError` that names the missing packages, and a Python that has them or the command to install."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        made = os.path.join(ROOT, '.venv', 'bin', 'python')  # by the scripts in test/
        file = 'requirements.txt' if sys.version_info >= (3, 9) else '1.8_requirements.txt'  # as their wheels require
        is_other = os.path.isfile(made) and os.path.abspath(sys.executable) != made
        raise UserError('%s has no %s; %s' % (
            sys.executable, ', '.join(missing).replace('PIL', 'Pillow'),
            'the scripts in test/ made a Python that has them; use it: %s %s' % (shlex.quote(made), ' '.join(
                map(shlex.quote, sys.argv))) if is_other else pip_install(file=file)))


def raise_file_limit() -> None:
    """Raise the soft limit of open files. Raises `UserError` if the hard limit is too low: a run would hang."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < MANY_FILES:  # infinity is -1
        limit = MANY_FILES if most < 0 else min(most, MANY_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if 0 <= limit < MIN_FILES:
        raise UserError('a process may open only %d files here, and a run needs %d; raise the limit with ulimit -n %d, '
                        'or where the job is started' % (limit, MIN_FILES, 4 * MIN_FILES))
