#!/usr/bin/env python3
"""Start run_class_finetuning.py on several processes by PyTorch's own launcher, after one look at the flags.

    python test/launch.py --nproc_per_node=8 [--nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500] \\
        -- --data_path=/data/ImageNet2012 …

The launcher is torchrun's (PyTorch 1.10 on) or torch.distributed.launch. A mistake in the flags ends in one line and
status 2 before any process starts; a process that fails ends all of them, and its status becomes this program's.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import flags  # noqa: E402
import datasets  # noqa: E402
from errors import UserError, one_line  # noqa: E402


def build_parser():
    parser = argparse.ArgumentParser('launch.py', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    number = flags.number
    parser.add_argument('--nproc_per_node', type=number(int, 1), default=8, help='processes on this machine (8)')
    parser.add_argument('--nnodes', type=number(int, 1), default=1, help='machines (1)')
    parser.add_argument('--node_rank', type=number(int, 0), default=0, help='which of them this is, from 0 (0)')
    parser.add_argument('--master_addr', default='127.0.0.1', help='address of machine 0 (127.0.0.1)')
    parser.add_argument('--master_port', type=number(int, 1, 65535), default=None, help='a free port there (any)')
    parser.add_argument('flags', nargs=argparse.REMAINDER, help='-- and the flags of run_class_finetuning.py')
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    return parser


def check(options, arguments):
    """Find what's wrong before anything starts; give the port to meet at."""
    args = flags.build_parser().parse_args(arguments)
    if options.node_rank >= options.nnodes:
        raise UserError('--node_rank %d: with --nnodes %d it goes from 0 to %d'
                        % (options.node_rank, options.nnodes, options.nnodes - 1))
    if options.nnodes > 1 and options.master_port is None:
        raise UserError('--nnodes %d needs --master_addr and --master_port, the same on every machine' % options.nnodes)
    flags.check_args(args, local_rank=options.nproc_per_node - 1,
                     processes=options.nproc_per_node * options.nnodes)
    if args.data_path == 'demo':
        datasets.resolve_data_path(args.data_path)
    return meeting_port(options)


def meeting_port(options):
    """--master_port, known to be free where this machine is the one that listens; or any free port."""
    if options.node_rank > 0:
        return options.master_port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', options.master_port or 0))
        except OSError as error:
            raise UserError('--master_port %d: %s; choose another, or leave the flag out'
                            % (options.master_port, error.strerror.lower())) from None
        return probe.getsockname()[1]


def launch(options, port, program_flags):
    """Run the processes to their end; gives the exit status of the first that failed, or 0."""
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // options.nproc_per_node)))
    arguments = ['--nproc_per_node=%d' % options.nproc_per_node, '--nnodes=%d' % options.nnodes,
                 '--node_rank=%d' % options.node_rank, '--master_addr=%s' % options.master_addr,
                 '--master_port=%d' % port]
    program = [os.path.join(ROOT, 'run_class_finetuning.py')] + program_flags
    if importlib.util.find_spec('torch.distributed.run') is None:
        return launch_by_the_old_one(arguments + ['--use_env'] + program)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    logging.getLogger('torch.distributed').setLevel(logging.CRITICAL)  # the processes have said what failed
    try:
        run.main(arguments + program)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return report(rank, failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def launch_by_the_old_one(arguments):
    old = importlib.import_module('torch.distributed.launch')
    sys.argv = ['launch'] + arguments
    try:
        old.main()
    except subprocess.CalledProcessError as error:
        return report(None, error.returncode)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def report(rank, status):
    """Name the process that ended first, and turn its status into one for the shell."""
    how = 'exit status %d' % status if status >= 0 else signal.Signals(-status).name
    print('launch.py: %s ended with %s; the others were stopped'
          % ('a process' if rank is None else 'process %d' % rank, how), file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status


def main():
    try:
        options = build_parser().parse_args()
        arguments = options.flags[1:] if options.flags[:1] == ['--'] else options.flags
        port = check(options, arguments)
    except UserError as error:
        print('run_class_finetuning.py: error: %s' % one_line(error), file=sys.stderr)
        return 2
    try:
        return launch(options, port, arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
