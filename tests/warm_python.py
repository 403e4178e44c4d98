"""A Python that starts at once, for tests that start the program: PyTorch, torchvision and timm are imported already.

Importing takes four seconds, and the tests start the program many hundred times. A server imports the packages once and
forks a process for each start. The forked process has the command's arguments, environment, folder, standard streams
and ignored signals, and imports the project's modules itself.

`start` returns a program that takes Python's command line. It forwards signals to the forked process and exits with its
status. It starts an ordinary Python for settings that a fork can't apply or inherit: limits, user, namespaces.

Differences from an ordinary Python: the process is the server's child in a new session, so a signal to the command's
group reaches it only once; /proc/PID/environ is the server's (`environment_of` reads the right one); settings that must
precede PyTorch's import have no effect. Tests of these differences, of signals and of killed processes use
sys.executable.
"""

import array
import atexit
import builtins
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types

# Not torch.distributed.run: the launcher changes subprocess before that is imported.
PACKAGES = ('torch', 'torch.utils.data.distributed', 'torch._dynamo', 'torch.profiler', 'torchvision', 'torchvision.io',
            'timm', 'timm.data', 'timm.layers', 'timm.loss', 'timm.models', 'timm.optim', 'timm.scheduler',
            'timm.utils', 'numpy', 'scipy', 'PIL.Image', 'tensorboardX', 'tqdm', 'yaml', 'einops')
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
READ_AT_START = ('OMP_', 'MKL_', 'KMP_', 'OPENBLAS_', 'LD_', 'LC_', 'LANG', 'MALLOC_', 'PYTHON', 'TORCH_LOGS',
                 'TORCH_SHOW')
FORKED_READ = ('PYTHON', 'PYTHONPATH', 'PYTHON_EXEC', 'PYTHONUNBUFFERED', 'PYTHON38')
ENVIRON = 'environ of warm_python'  # a file in memory, which a forked process holds open
HEAD = 12  # bytes of the length prefix


def surroundings():
    """The settings that a process has from its start; a forked one has the server's."""
    env = {name: value for name, value in os.environ.items()
           if name.startswith(READ_AT_START) and name not in FORKED_READ}
    limits = {name: list(resource.getrlimit(getattr(resource, name))) for name in dir(resource)
              if name.startswith('RLIMIT_')}
    spaces = {name: os.readlink('/proc/self/ns/' + name) for name in ('mnt', 'net', 'pid', 'user')}
    return {'env': env, 'limits': limits, 'spaces': spaces, 'user': [os.getuid(), os.geteuid(), os.getegid()]}


# ---- the program that tests start: warm_python.py SOCKET ARGUMENT…

def run_client(path, arguments):
    """Have the server run Python's command line, and exit with its status."""
    command = arguments[1:] if arguments[:1] == ['-u'] else arguments
    folders = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    with open(path + '.env', encoding='utf-8') as file:
        forked = json.load(file) == surroundings()
    if not forked or not command or command[0].startswith('-') and command[0] not in ('-c', '-m') \
            or any(os.path.exists(os.path.join(folder, 'sitecustomize.py')) for folder in folders if folder):
        os.execv(sys.executable, [sys.executable] + arguments)
    early, ignored = [], [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    passed_on = [number for number in FORWARDED if number not in ignored]
    for number in passed_on:
        signal.signal(number, lambda number, _: early.append(number))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:  # the server has ended
        os.execv(sys.executable, [sys.executable] + arguments)
    umask = os.umask(0)
    os.umask(umask)
    order = json.dumps({'command': command, 'unbuffered': command != arguments, 'folder': os.getcwd(),
                        'env': dict(os.environ), 'ignored': ignored, 'umask': umask}).encode()
    connection.sendmsg([b'%*d' % (HEAD, len(order))],
                       [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1, 2]))])
    connection.sendall(order)
    pid = int(connection.recv(HEAD))
    for number in passed_on:
        signal.signal(number, lambda number, _: send_signal(pid, number))
    for number in early:
        send_signal(pid, number)
    for handle in (0, 1, 2):  # else a reader of the forked process would wait for this one too
        os.close(handle)
    answer = connection.recv(HEAD)
    status = int(answer) if answer else 70
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def send_signal(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---- the server: warm_python.py SOCKET

def serve(path):
    """Fork a process for each order. Returns the order in the child, and None in the server after its starter's end."""
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process copies nothing
    reader, writer = os.pipe()
    for handle in (reader, writer):
        os.set_blocking(handle, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    listener, running = socket.socket(socket.AF_UNIX), {}
    listener.bind(path)
    listener.listen(64)
    with open(path + '.env', 'w', encoding='utf-8') as file:
        json.dump(surroundings(), file)
    print('ready', flush=True)
    while True:
        ready = select.select([0, listener, reader] + list(running), [], [])[0]
        for connection in set(ready) & set(running):  # its client was killed and sends nothing else
            send_signal(running[connection], signal.SIGKILL)
            os.waitpid(running.pop(connection), 0)
            connection.close()
        if reader in ready:
            os.read(reader, 1000)
        for connection, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                with contextlib.suppress(OSError):
                    connection.sendall(b'%*d' % (HEAD, code))
                connection.close()
                del running[connection]
        if 0 in ready:
            for pid in running.values():
                send_signal(pid, signal.SIGKILL)
            return None
        if listener in ready:
            connection = listener.accept()[0]
            try:
                order, streams = receive(connection)
            except (OSError, ValueError):  # the client was killed meanwhile
                connection.close()
                continue
            pid = os.fork()
            if not pid:
                for each in [connection, listener] + list(running):
                    each.close()
                signal.set_wakeup_fd(-1)
                os.close(reader)
                os.close(writer)
                become(order, streams)
                return order
            for handle in streams:
                os.close(handle)
            running[connection] = pid
            with contextlib.suppress(OSError):
                connection.sendall(b'%*d' % (HEAD, pid))


def receive(connection):
    """(order, its three standard streams)."""
    streams = array.array('i')
    head, ancillary = connection.recvmsg(HEAD, socket.CMSG_SPACE(3 * streams.itemsize))[:2]
    streams.frombytes(ancillary[0][2])
    left, parts = int(head), []
    while left:
        parts.append(connection.recv(left))
        if not parts[-1]:
            raise OSError('cut off')
        left -= len(parts[-1])
    return json.loads(b''.join(parts).decode()), list(streams)


def become(order, streams):
    """In the forked process: take the settings of a new process of that command."""
    os.setsid()
    for number in FORWARDED + (signal.SIGCHLD,):
        signal.signal(number, signal.SIG_IGN if number in order['ignored'] else
                      signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for target, handle in enumerate(streams):
        os.dup2(handle, target)
        os.close(handle)
    os.chdir(order['folder'])
    os.umask(order['umask'])
    os.environ.clear()
    os.environ.update(order['env'])
    if hasattr(os, 'memfd_create'):
        os.write(os.memfd_create(ENVIRON, 0), '\0'.join('='.join(each) for each in order['env'].items()).encode())
    unbuffered = order['unbuffered'] or bool(os.environ.get('PYTHONUNBUFFERED'))
    sys.stdin = open(0, closefd=False)
    for name, handle in (('stdout', 1), ('stderr', 2)):
        stream = open(handle, 'w', errors='backslashreplace' if handle == 2 else 'strict', closefd=False,
                      buffering=1 if handle == 2 or os.isatty(handle) else -1)
        stream.reconfigure(write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, '__%s__' % name, stream)
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed()  # the random module reseeds itself


def run(order):
    """Run Python's command line as runpy and Python's main do."""
    kind, rest = order['command'][0], order['command'][1:]
    sys.path[1:1] = [folder for folder in os.environ.get('PYTHONPATH', '').split(os.pathsep) if folder]
    main = types.ModuleType('__main__')
    main.__builtins__ = builtins
    sys.modules['__main__'] = main
    if kind == '-m':
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy._run_module_as_main(rest[0])
    elif kind == '-c':
        sys.argv, sys.path[0] = ['-c'] + rest[1:], ''
        exec(compile(rest[0], '<string>', 'exec'), main.__dict__)
    else:
        sys.argv, sys.path[0], main.__file__ = [kind] + rest, os.path.dirname(os.path.realpath(kind)), kind
        with open(kind, 'rb') as file:
            code = compile(file.read(), kind, 'exec')
        exec(code, main.__dict__)


def environment_of(pid):
    """{name: value}: the initial environment of a living process, forked or not."""
    path = '/proc/%s/environ' % pid
    for handle in os.listdir('/proc/%s/fd' % pid):
        with contextlib.suppress(OSError):
            if ENVIRON in os.readlink('/proc/%s/fd/%s' % (pid, handle)):
                path = '/proc/%s/fd/%s' % (pid, handle)
    with open(path, 'rb') as file:
        return dict(entry.partition('=')[::2] for entry in file.read().decode(errors='replace').split('\0'))


def start(folder):
    """Start a server: (its process, the program to run instead of Python). It exits when its standard input closes."""
    path, program = os.path.join(folder, 'socket'), os.path.join(folder, 'python')
    with open(program, 'w', encoding='utf-8') as file:
        file.write('#!/bin/sh\nexec "%s" -IS "%s" --client "%s" "$@"\n' % (
            sys.executable, os.path.abspath(__file__), path))
    os.chmod(program, 0o755)
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    server = subprocess.Popen([sys.executable, os.path.abspath(__file__), path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, universal_newlines=True, close_fds=True,
                              env=dict(env, OMP_NUM_THREADS='1', TORCH_DEVICE_BACKEND_AUTOLOAD='0'))
    assert server.stdout.readline() == 'ready\n'
    return server, program


def end(order):
    """Run the command and exit as Python does, but without tearing the modules down."""
    status = 0
    try:
        run(order)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or without a reader
            status = status or 120
    os._exit(status & 255)


if __name__ == '__main__':
    if sys.argv[1] == '--client':
        run_client(sys.argv[2], sys.argv[3:])
    order = serve(sys.argv[1])
    if order is not None:
        end(order)
