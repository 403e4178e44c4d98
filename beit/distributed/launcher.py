"""Runs torchrun, or torch.distributed.launch for PyTorch 1.5 and 1.8, with their options, for the scripts.

A failed job ends with the failed process's error line and exit status, not with a traceback and status 1. After a
signal the processes have as long as they need to save, not 30 s.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import signal
import subprocess
import sys
import time
from typing import Any, List

from beit import startup
from beit.distributed import preemption, process_group
from beit.errors import UserError, print_error

IGNORED = [number for number in preemption.NUMBERS if signal.getsignal(number) == signal.SIG_IGN]  # under nohup
started: List['Rank'] = []
failed: List['Rank'] = []  # the first


def signal_all(number: int, _: Any = None) -> None:
    for rank in started:
        rank.send_signal(number)


class Rank(subprocess.Popen):
    """A process of the job, in place of torchrun's Popen. The first failure kills the others, which would only wait."""

    def __init__(self, *args: Any, env: Any = None, **kwargs: Any) -> None:
        for number in preemption.NUMBERS:  # not earlier: torchrun has set its own handlers
            signal.signal(number, signal.SIG_IGN if number in IGNORED else signal_all)
        kwargs.update(env=env, preexec_fn=process_group.end_with_parent)
        super().__init__(*args, **kwargs)
        if failed:  # --max_restarts: all start again
            del started[:], failed[:]
        self.number = env['RANK']
        started.append(self)

    def poll(self) -> Any:
        status = super().poll()
        if status and not failed:
            failed.append(self)
            signal_all(signal.SIGKILL)
        return status

    def wait(self, timeout: Any = None) -> Any:
        """Poll all processes, since PyTorch 1.5's launcher waits for one after the other."""
        while timeout is None and [rank.poll() for rank in started] and self.returncode is None:
            time.sleep(0.2)
        return super().wait(timeout)


def main() -> int:
    """Run the job of the command line. Returns the status of the process that failed first, or 0."""
    own = sys.argv[1:]
    vars(subprocess)['Popen'] = Rank  # in this process, which has no other purpose
    logging.disable(logging.CRITICAL)  # the processes report failures better
    try:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument('--nnodes', default='1')
        parser.add_argument('--master_port', default=0, type=int)
        options = parser.parse_known_args(own)[0]
        sys.argv[1:] = ['--nnodes=1', '--master_addr=' + process_group.LOOPBACK[0]]
        if options.nnodes == '1':
            sys.argv += ['--master_port=%d' % process_group.listen_on_loopback(options.master_port)]
        if importlib.util.find_spec('torch.distributed.run'):
            from torch.distributed.run import main as run
            sys.argv += ['--monitor_interval=0.2', '--rdzv_conf=timeout=%d' % process_group.wait_seconds(300)]
        else:
            from torch.distributed.launch import main as run
            sys.argv += ['--use_env']
            if any(each.startswith('--max_restarts') for each in own):
                raise UserError('--max_restarts needs torchrun, which this PyTorch does not have; leave it out')
        sys.argv += own
        with contextlib.redirect_stdout(io.StringIO()):  # PyTorch 1.8 prints lines about processes that it ends
            run()
    except BaseException as error:
        if isinstance(error, (UserError, RuntimeError, OSError)) and not started:
            address = ' '.join(each.replace('=', ' ') for each in own if each.startswith('--master_'))
            error = process_group.rendezvous_error(address, 'machines did not meet', error)
            print_error('run_class_finetuning.py: error: %s' % error)
            return 2
        if hasattr(error, 'sigval'):  # a signal before the processes exist
            return 128 + error.sigval
        if not failed:
            raise
    status = failed[0].returncode if failed else 0
    if status not in (0, 1, 2) and status - 128 not in preemption.NUMBERS:  # else the process reported it
        end = signal.Signals(-status).name if status < 0 else 'exit status %d' % status
        print_error('process %s ended with %s; the others were stopped' % (failed[0].number, end))
    return status if status >= 0 else 128 - status


if __name__ == '__main__':
    startup.prepare()
    sys.exit(main())
