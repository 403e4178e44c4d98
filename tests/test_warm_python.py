"""tests/warm_python.py runs a command as Python does: each test compares both."""

import os
import signal
import subprocess
import sys

import pytest

import warm_python
from helpers import environment, python

pytestmark = [pytest.mark.current_only,
              pytest.mark.needs('linux', os.path.isdir('/proc/self'), 'processes are found through /proc')]

SAYS = """import os, signal, sys, threading, atexit
print(sys.argv[1:], os.getcwd(), os.environ['X'], __name__, sys.path[0], sys.stdin.read())
print(signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
print(oct(os.umask(0)), sys.flags.isolated, [name for name in sys.modules if name.split('.')[0] == 'beit'])
sys.stderr.write('on standard error\\n')
atexit.register(print, 'at its end')
threading.Thread(target=print, args=['in a thread']).start()
"""
ENDS = {'well': 'pass', 'a number': 'import sys; sys.exit(7)', 'words': 'import sys; sys.exit("words")',
        'an exception': 'raise SystemExit(None)', 'a signal': 'import os; os.kill(os.getpid(), 15)',
        'an abort': 'import os; os.abort()', 'an interrupt': 'import os; os.kill(os.getpid(), 2)'}


def both(*command, **options):
    """(exit status, standard output, standard error) of an ordinary and of a forked Python."""
    for start in (sys.executable, python()):
        done = subprocess.run([start] + list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=100, **options)
        yield done.returncode, done.stdout, done.stderr.partition('Traceback')[0]


@pytest.mark.parametrize('kind', ['-c', '-m', 'a file'])
def test_it_inherits_everything_that_a_command_sets(tmp_path, kind):
    (tmp_path / 'program.py').write_text(SAYS)
    command = {'-c': ['-c', SAYS], '-m': ['-m', 'program'], 'a file': ['-u', 'program.py']}[kind]
    mine, forked = both(*command, 'one', 'two words', cwd=str(tmp_path), input='typed', env=environment(X='ä'),
                        preexec_fn=lambda: [signal.signal(signal.SIGHUP, signal.SIG_IGN), os.umask(0o27)])
    assert mine == forked and mine[0] == 0 and 'at its end' in mine[1]


@pytest.mark.parametrize('way', ENDS)
def test_it_ends_as_a_command_ends(way):
    mine, forked = both('-c', ENDS[way])
    assert mine == forked


def test_a_signal_is_passed_on_and_a_killed_command_leaves_nothing():
    code = 'import signal, sys\nsignal.signal(15, lambda *_: sys.exit(3))\nprint("on", flush=True)\nsignal.pause()'
    for number, status in ((signal.SIGTERM, 3), (signal.SIGKILL, -9)):
        with subprocess.Popen([python(), '-c', code], stdout=subprocess.PIPE, universal_newlines=True,
                              env=environment(MARK='left %d' % number)) as command:
            assert command.stdout.readline() == 'on\n'
            command.send_signal(number)
            assert command.stdout.read() == ''  # closed by the process itself
            assert command.wait() == status


def test_a_separate_python_starts_where_a_fork_would_differ():
    code = 'import os, sys; print("torch" in sys.modules, os.getppid())'
    forked, *others = (
        subprocess.run([python(), '-c', code], stdout=subprocess.PIPE, universal_newlines=True, env=environment(**env)
                       ).stdout.split() for env in ({}, {'OMP_NUM_THREADS': '3'}, {'PYTHONHASHSEED': '1'}))
    assert forked[0] == str(python() != sys.executable)
    assert others == [['False', str(os.getpid())]] * 2


def test_a_forked_process_is_found_by_its_environment():
    with subprocess.Popen([python(), '-c', 'import os; print(os.getpid(), flush=True); input()'], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, universal_newlines=True, env=environment(MARK='this')) as command:
        assert warm_python.environment_of(int(command.stdout.readline()))['MARK'] == 'this'
        command.stdin.close()
