"""What a program does first, before it imports anything that is not Python's own."""

import importlib.util
import os
import shlex
import signal
import sys

from beit.errors import UserError, closed_streams, print_error

PACKAGES = ('torch', 'torchvision', 'timm', 'einops', 'numpy', 'PIL')  # without which no program can start
MIN_FILES = 256  # a run with two loader processes takes about 100
MANY_FILES = 65536  # many loader processes take some for each of their batches


def prepare() -> None:
    """Call this at the head of a program. What is missing ends it with one line and status 2."""
    open_standard_streams()
    # Ctrl-C without a traceback while PyTorch is imported, which takes seconds.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        check_packages()
        raise_file_limit()
    except UserError as error:
        print_error('%s: error: %s' % (os.path.basename(sys.argv[0]), error))
        sys.exit(2)


def open_standard_streams() -> None:
    """Where a standard stream is closed, open /dev/null as such: else the next file would take its number and lines."""
    for number, name, mode in ((0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w')):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, closefd=False))
            closed_streams.append(name)


def check_packages() -> None:
    """Raise a `UserError` that names the packages which this Python lacks, and how it gets them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        file = 'requirements.txt' if sys.version_info >= (3, 9) else '1.8_requirements.txt'
        raise UserError('%s has no %s; run: %s -m pip install -r %s' % (
            sys.executable, ', '.join(missing).replace('PIL', 'Pillow'), shlex.quote(sys.executable),
            shlex.quote(os.path.join(root, file))))


def raise_file_limit() -> None:
    """Let this process open as many files as it may; a `UserError` where a run would hang for want of them."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < MANY_FILES:  # infinity is -1
        limit = MANY_FILES if most < 0 else min(most, MANY_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if 0 <= limit < MIN_FILES:
        raise UserError('a process may open only %d files here, and a run needs %d; raise the limit with ulimit -n %d, '
                        'or where the job is started' % (limit, MIN_FILES, 4 * MIN_FILES))
