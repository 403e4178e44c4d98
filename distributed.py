"""Which processes there are, how they meet, and what they agree on."""

import contextlib
import ctypes
import datetime
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import typing

import numpy as np
import torch
import torch.distributed as dist

import backend
from errors import UserError


def _initialized():
    return dist.is_available() and dist.is_initialized()


def world_size():
    return dist.get_world_size() if _initialized() else 1


def rank():
    return dist.get_rank() if _initialized() else 0


def is_main_process():
    return rank() == 0


_display = None  # where a person watches the first process, see `progress`


def set_display(display):
    """Show lines on a `progress.ProgressDisplay`; None prints them."""
    global _display
    _display = display


def display():
    """What `set_display` was given."""
    return _display


def say(text, detail=False):
    """Print a line, on the first process only and at once; a `detail` is not for a terminal with a bar."""
    if _display is not None:
        _display.say(text, detail)
    elif is_main_process():
        print(text, flush=True)


def say_table(rows):
    """Lines 'name: value' of (name, value); on a terminal the values stand below one another."""
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        if _display is None:
            say('%s: %s' % (name, value) if name else value)
        else:
            _display.say_row(name, value, width)


_wait_hook = contextlib.nullcontext


def set_wait_hook(hook):
    """Enter `hook()`, a context manager, around each collective; `watchdog` notes by it who waits."""
    global _wait_hook
    _wait_hook = hook


def waiting():
    return _wait_hook()


def barrier():
    if world_size() > 1:
        with waiting():
            dist.barrier()


def launch_environment(args):
    """(rank, world_size, local_rank) as torchrun, Open MPI (--dist_on_itp) or SLURM set them; (0, 1, 0) without."""
    environ = os.environ
    numbers = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID',
               'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')
    for name in numbers:
        if not environ.get(name, '0').isdigit():
            raise UserError('%s=%s in the environment is not a whole number; a launcher sets it, or unset it'
                            % (name, environ[name]))
    if args.dist_on_itp:
        names = ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK')
        if any(name not in environ for name in names):
            raise UserError('--dist_on_itp: %s is not set; start the program with mpirun, or leave the flag out'
                            % next(name for name in names if name not in environ))
        return tuple(int(environ[name]) for name in names)
    if 'RANK' in environ and 'WORLD_SIZE' in environ:
        local = environ.get('LOCAL_RANK', args.local_rank if args.local_rank >= 0 else 0)
        return int(environ['RANK']), int(environ['WORLD_SIZE']), int(local)
    if int(environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in environ and 'MASTER_ADDR' in environ:
        return int(environ['SLURM_PROCID']), int(environ['SLURM_NTASKS']), int(environ.get('SLURM_LOCALID', 0))
    return 0, 1, 0


def wait_seconds(default):
    """How long to wait for the other processes or machines at the start: DIST_WAIT_SECONDS, or the default."""
    text = os.environ.get('DIST_WAIT_SECONDS') or str(default)
    if not text.isdigit() or not 0 < int(text) <= 10 ** 6:
        raise UserError('DIST_WAIT_SECONDS=%s in the environment is not a whole number of seconds; unset it' % text)
    return int(text)


_met = []  # the store in which the processes met
_host_group = []  # a group for `ask`, whose collectives never touch a device


def meeting_store():
    """The store in which the processes met, or None where there's one process."""
    return _met[-1] if _met else None


def init_distributed_mode(args):
    """Choose the device and join the other processes, where there are any.

    The meeting has a limit of its own, DIST_WAIT_SECONDS (300); collectives have --dist_timeout and a little more, so
    that `watchdog`, which knows more, comes first.

    Returns:
        The `torch.device` of this process.
    """
    process, processes, local_rank = launch_environment(args)
    device = backend.select_device(args.device, local_rank, processes)
    if processes > 1:
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch
        address = args.dist_url
        if args.dist_on_itp and address == 'env://':
            address = 'tcp://%s:%s' % (os.environ.get('MASTER_ADDR', '127.0.0.1'),
                                       os.environ.get('MASTER_PORT', '29500'))
        seconds = wait_seconds(300)
        try:
            store, process, processes = next(rendezvous(address, process, processes,
                                                        timeout=datetime.timedelta(seconds=seconds)))
            store = _of_this_start(store)
            dist.init_process_group(backend.PROCESS_GROUP_BACKEND[device.type], store=store, rank=process,
                                    world_size=processes,
                                    timeout=datetime.timedelta(seconds=args.dist_timeout + 10))
            _met.append(store)
            _host_group.append(_make_host_group(device, args.dist_timeout + 10))
        except (RuntimeError, ValueError) as error:
            text = ' '.join(str(error).split())
            if 'in use' in text:
                raise UserError('port %s, where the processes were to meet, is in use; choose another with '
                                '--master_port, or start again' % os.environ.get('MASTER_PORT', '')) from None
            raise UserError('--dist_url %s: the %d processes did not find one another within %d s (%s); start all of '
                            'them, with the address and port of the machine of the first'
                            % (address, processes, seconds, text[:200])) from None
        barrier()
    return device


def _of_this_start(store):
    """The store, without what processes wrote that torchrun has started anew: they would be looked for where they were.

    Only on one machine, where all are told the same count.
    """
    count = os.environ.get('TORCHELASTIC_RESTART_COUNT', '')
    return dist.PrefixStore('start %s' % count, store) if count and os.environ.get('GROUP_WORLD_SIZE') == '1' else store


def _make_host_group(device, seconds):
    if backend.PROCESS_GROUP_BACKEND[device.type] == 'gloo':
        return dist.group.WORLD
    return dist.new_group(timeout=datetime.timedelta(seconds=seconds), backend='gloo')


def shutdown() -> None:
    """End this process, one of several, at the end of a good run; where there is only one, return.

    No group is destroyed and Python does not end in its orderly way: gloo's threads need Python's lock where they let a
    tensor go, and would abort it then, or wait for ever. All files must be closed by now.
    """
    if world_size() > 1:
        dist.barrier(group=_host_group[-1])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def gather_numbers(numbers, device, dtype=torch.float32):
    """The numbers of every process, in their order: one list each."""
    if world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=dtype, device=device)
    gathered = [torch.zeros_like(mine) for _ in range(world_size())]
    with waiting():
        dist.all_gather(gathered, mine)
        return [each.tolist() for each in gathered]


def ask(numbers, device):
    """Begin to gather whole numbers of every process between their hosts: what a device is doing is not waited for.

    Returns:
        A function to call once, which waits for the answers and gives one list for each process.
    """
    if world_size() == 1:
        return lambda: [list(numbers)]
    if not _host_group:
        return lambda: gather_numbers(numbers, device)
    mine = torch.tensor(numbers, dtype=torch.float32)
    gathered = [torch.zeros_like(mine) for _ in range(world_size())]
    work = dist.all_gather(gathered, mine, group=_host_group[-1], async_op=True)

    def answers():
        with waiting():
            work.wait()
            return [each.tolist() for each in gathered]
    return answers


def gather(value, device):
    """A value that JSON can hold, of every process, in their order. For what is told seldom: two collectives."""
    if world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = [length for length, in gather_numbers([len(text)], device, torch.int64)]
    padded = np.frombuffer(text + bytes(max(lengths) - len(text)), dtype=np.uint8)
    # Not memory of NumPy's: gloo's thread would free it through Python, and a loader forked in that moment hang (3.8).
    mine = torch.from_numpy(padded.astype(np.int32)).clone().to(device)
    gathered = [torch.zeros_like(mine) for _ in lengths]
    with waiting():
        dist.all_gather(gathered, mine)
        gathered = [each.cpu().numpy() for each in gathered]
    return [json.loads(each[:length].astype(np.uint8).tobytes().decode()) for each, length in zip(gathered, lengths)]


def gather_rows(columns, device):
    """Tensors of all processes, one behind the other: (n, …) each, n another on each process, the same in all columns.

    Args:
        columns (list of float32 or int64 tensors, or None): None where this process has no row; some process has one.

    Returns:
        list of tensors on the CPU.
    """
    told = gather([None if column is None else [str(column.dtype), list(column.shape)] for column in columns], device)
    gathered = []
    for place, column in enumerate(columns):
        rows = [0 if each[place] is None else each[place][1][0] for each in told]
        dtype, shape = next(each[place] for each in told if each[place] is not None)
        padded = torch.zeros([max(rows)] + shape[1:], dtype=getattr(torch, dtype.replace('torch.', '')), device=device)
        if column is not None:
            padded[:len(column)] = column.to(device)
        parts = [torch.zeros_like(padded) for _ in rows]
        with waiting():
            dist.all_gather(parts, padded)
            gathered.append(torch.cat([part[:number].cpu() for part, number in zip(parts, rows)]))
    return gathered


def any_process(flag, device):
    """Whether `flag` is true in at least one process; all learn it together."""
    return any(vote > 0 for vote, in gather_numbers([float(flag)], device))


ALIVE_SECONDS = 0.3  # between two signs of life; less than any --dist_timeout
BLOCK = 1 << 26  # bytes that are sent at once; they go as int32, which HCCL surely knows


def broadcast_from_main(make: typing.Callable[[typing.Callable[[], None]], bytes],
                        device: typing.Optional[torch.device]) -> bytes:
    """Return on every process the bytes that `make` returns on the main one, or raise the `UserError` of there.

    `make` may take long. Its argument is a function to call now and then, so that the process isn't taken for hung.

    Args:
        device (torch.device or None): None for each process to make its own.
    """
    if world_size() == 1 or device is None:
        return make(lambda: None)

    def broadcast(data):
        with waiting():
            dist.broadcast(data, 0)
        return data

    if not is_main_process():
        message = [1, 0, 0]  # whether it is a sign of life only, whether there was an error, the length
        while message[0]:
            message = broadcast(torch.zeros(3, dtype=torch.int64, device=device)).tolist()
        _, failed, length = message
        blocks = [torch.zeros(min(BLOCK, length - start) + 3 >> 2, dtype=torch.int32, device=device)
                  for start in range(0, length, BLOCK)]
        data = b''.join(broadcast(block).cpu().numpy().tobytes() for block in blocks)[:length]
        if failed:
            raise UserError(data.decode())
        return data

    last_sent = time.monotonic()

    def keep_alive():
        nonlocal last_sent
        if time.monotonic() - last_sent > ALIVE_SECONDS:
            broadcast(torch.tensor([1, 0, 0], dtype=torch.int64, device=device))
            last_sent = time.monotonic()

    error = None
    try:
        data = make(keep_alive)
    except UserError as caught:
        error, data = caught, str(caught).encode('utf-8', 'backslashreplace')
    broadcast(torch.tensor([0, error is not None, len(data)], dtype=torch.int64, device=device))
    for start in range(0, len(data), BLOCK):
        block = np.frombuffer(data[start:start + BLOCK].ljust(min(BLOCK, len(data) - start) + 3 & ~3, b'\0'), np.int32)
        broadcast(torch.from_numpy(block.copy()).clone().to(device))  # see `gather`
    if error is not None:
        raise error
    return data


def sum_over_processes(counts, total, device):
    """Add up whole numbers, exactly, and a float over all processes; no float64, which HCCL can't reduce.

    Returns:
        The counts and the total, in one tuple.
    """
    if world_size() == 1:
        return tuple(counts) + (total,)
    whole = torch.tensor(counts, dtype=torch.int64, device=device)
    with waiting():
        dist.all_reduce(whole)
    # A float64 as the sum of two float32 keeps 48 of its 53 bits; each process adds the parts in the same order.
    high = torch.tensor(total, dtype=torch.float32).item()
    parts = gather_numbers([high, total - high], device)
    return tuple(whole.tolist()) + (sum(value for pair in parts for value in pair),)


def speaks_first():
    """Whether an error that every process may meet is this one's to tell; before they have met, one of each machine."""
    return is_main_process() if _initialized() else os.environ.get('LOCAL_RANK', '0') == '0'


def wait_for_others_to_speak(first=False):
    """Before an error's line: several processes often meet the same error, or one meets the end of another.

    The process that the line comes from best (`first`) speaks at once; a launcher then ends the others, who wait.
    """
    if not first and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        time.sleep(5 if _initialized() else 20)  # while they start, one may be far behind another


def lost_a_process(error):
    """Whether an error is a collective's, that another process has left."""
    kinds = tuple(getattr(dist, name) for name in ('DistBackendError', 'DistNetworkError', 'DistStoreError')
                  if hasattr(dist, name))
    return world_size() > 1 and (isinstance(error, kinds) or re.search(
        r'[Cc]onnection (closed|reset|refused)|gloo|NCCL|HCCL|Socket|Broken pipe|[Tt]imed out', str(error)) is not None)


PRCTL = ctypes.CDLL(None).prctl if sys.platform.startswith('linux') else None


def end_with_parent():
    """From here on this process is killed when its parent ends, however that ends. Linux only."""
    if PRCTL:
        PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():  # it ended before
            os._exit(1)
