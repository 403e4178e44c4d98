"""torchrun for the scripts: a failed job ends with its own error line and exit status, and a signal lets it save first.

    python -m beit.distributed.launcher --nproc_per_node=8 \\
        [--nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500] \\
        run_class_finetuning.py --data_path=/data/ImageNet2012 …

The options are torchrun's, or those of torch.distributed.launch where this PyTorch has no torchrun (1.5, 1.8). By
themselves both answer a failure with a traceback and status 1, and kill processes that save for longer than 30 s.
"""

import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from typing import List

QUIET = __name__ == '__main__' and 'TORCH_CPP_LOG_LEVEL' not in os.environ
if QUIET:  # before PyTorch is imported, which would tell of connections in many lines
    os.environ['TORCH_CPP_LOG_LEVEL'] = 'FATAL'

from beit.distributed import preemption, process_group  # noqa: E402
from beit.errors import UserError, one_line  # noqa: E402


class Rank(subprocess.Popen):
    """One process of the job, as the launcher starts it. The first that fails ends the others: they could only wait."""

    ignored = ()  # signals, as nohup wishes
    stopping = False  # whether one was passed on
    started: List['Rank'] = []
    failed: List['Rank'] = []

    def __init__(self, *args, **kwargs):
        self.rank = (kwargs.get('env') or {}).get('RANK')
        if self.rank is None:  # not one of the job's
            super().__init__(*args, **kwargs)
            return
        if Rank.failed:  # --max_restarts: all start again
            del Rank.started[:], Rank.failed[:]
        for number in preemption.NUMBERS:  # now: the launcher has set its own handlers before
            signal.signal(number, signal.SIG_IGN if number in Rank.ignored else Rank.forward)
        super().__init__(*args, preexec_fn=process_group.end_with_parent, **kwargs)
        Rank.started.append(self)

    def poll(self):
        status = super().poll()
        if status and self.rank is not None and not Rank.failed:
            Rank.failed.append(self)
            Rank.kill_all()
        return status

    def wait(self, timeout=None):
        """PyTorch 1.5's launcher waits for one process after the other; a failed one ends the wait for any."""
        while timeout is None and self.rank is not None and self.poll() is None:
            time.sleep(0.2)
            for rank in Rank.started:
                rank.poll()
        return super().wait(timeout)

    @staticmethod
    def kill_all():
        for rank in Rank.started:
            if rank.returncode is None:
                rank.kill()

    @staticmethod
    def forward(number, _):
        Rank.stopping = True
        for rank in Rank.started:
            if rank.returncode is None:
                rank.send_signal(number)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start(arguments):
    """Run the job to its end; raises what the launcher raises."""
    defaults = ['--nnodes=1', '--master_addr=127.0.0.1', '--master_port=%d' % free_port()]
    Rank.ignored = [number for number in preemption.NUMBERS if signal.getsignal(number) == signal.SIG_IGN]
    subprocess.Popen = Rank  # in this process, which does nothing else
    try:
        from torch.distributed import run as engine
        defaults += ['--max_restarts=0', '--monitor_interval=0.2',
                     '--rdzv_conf=timeout=%d' % process_group.wait_seconds(300)]
    except ImportError:
        from torch.distributed import launch as engine
        defaults += ['--use_env']
        if any(argument.startswith('--max_restarts') for argument in arguments):
            raise UserError('--max_restarts needs torchrun, which this PyTorch does not have; leave it out') from None
    sys.argv[1:] = defaults + arguments
    options = engine.get_args_parser().parse_args() if hasattr(engine, 'run') else engine.parse_args()
    processes = int(options.nproc_per_node)
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ['LOCAL_WORLD_SIZE'] = str(processes)  # the older ones do not set it
    logging.disable(logging.CRITICAL)  # of a failure the processes say more
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what PyTorch 1.8 prints of the processes that it ends
            engine.run(options) if hasattr(engine, 'run') else engine.main()
    except RuntimeError as error:
        if Rank.started:
            raise
        text = one_line(error)
        where = '--master_addr %s --master_port %s: ' % (options.master_addr, options.master_port)
        if 'in use' in text:
            raise UserError(where + 'address already in use; choose another port, the same on every machine, or on one '
                            'machine leave the flag out') from None
        raise UserError(where + 'the machines did not meet within %d s (%s); start the script on each, with its own '
                        '--node_rank, and the same --nnodes and address and port of node 0'
                        % (process_group.wait_seconds(300), text[:200])) from None


def exit_status():
    """That of the process that failed first, with a line where it could not tell why; 0 where none did."""
    if not Rank.failed:
        return 0
    number, status = Rank.failed[0].rank, Rank.failed[0].returncode
    if -status in preemption.NUMBERS and Rank.stopping:
        print('stopped by %s before the training began; nothing new was saved' % signal.Signals(-status).name,
              file=sys.stderr)
    elif status not in (1, 2) and status - 128 not in preemption.NUMBERS:
        print('process %s ended with %s; the others were stopped' % (
            number, 'exit status %d' % status if status > 0 else signal.Signals(-status).name), file=sys.stderr)
    return status if status > 0 else 128 - status


def main():
    if QUIET:
        del os.environ['TORCH_CPP_LOG_LEVEL']  # the processes may tell
    try:
        start(sys.argv[1:])
    except UserError as error:
        print('run_class_finetuning.py: error: %s' % one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there are processes to pass it on to
        return 130
    except Exception:
        if not Rank.failed:
            raise
    finally:
        Rank.kill_all()
    return exit_status()


if __name__ == '__main__':
    sys.exit(main())
