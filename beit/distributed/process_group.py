"""Process ranks, the set-up of the process groups, and the end of a process."""

import contextlib
import ctypes
import datetime
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from typing import Any, Callable, Iterator, List

import torch
import torch.distributed as dist

from beit.config import DistributedConfig
from beit.devices import accelerator
from beit.distributed.launch_environment import defer_report, launch_environment, reports_errors, wait_seconds
from beit.errors import UserError, escape_text, one_line


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    return dist.get_rank() if _initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


wait_hooks: List[Callable[[], Any]] = [contextlib.nullcontext]  # the last is entered around each collective
_last_wait = 0.  # time of the end of the last collective
FORK_PAUSE = 0.02  # seconds


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A context manager around each collective. By `wait_hooks`, `watchdog` sees which ranks wait."""
    global _last_wait
    with wait_hooks[-1]():
        yield
    _last_wait = time.monotonic()


def _pause_before_fork() -> None:
    """Shortly after a collective, gloo's threads take Python's lock; a child forked then waits for it forever."""
    time.sleep(max(0., _last_wait + FORK_PAUSE - time.monotonic()))


def barrier() -> None:
    if world_size() > 1:
        with waiting():
            dist.barrier()


rendezvous_stores: List[Any] = []  # the store of the rendezvous, with several processes
LOOPBACK = ('127.0.0.1', 'localhost')
_daemons: List[Any] = []  # keeps stores alive that listen in this process
host_groups: List[Any] = []  # a group for `all_gather_async`, whose collectives never use a device


def listen_on_loopback(port: int = 0) -> int:
    """Let a store listen at this port, or at a free one (0), of 127.0.0.1 only. Returns the port.

    Older PyTorch, such as 1.5 and 1.8, cannot pass a socket to its TCPStore, which then listens on all addresses.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK[0], port))
    port = listener.getsockname()[1]
    store_type: Any = getattr(dist, 'TCPStore', None)  # not in every build of PyTorch
    if 'master_listen_fd' in str(vars(store_type or object)['__init__'].__doc__):
        listener.listen(1024)
        # PyTorch reuses this store if it creates another at the same port.
        _daemons.append(store_type(LOOPBACK[0], port, None, True, wait_for_workers=False, multi_tenant=True,
                                   master_listen_fd=listener.detach()))
    listener.close()
    return port


def rendezvous_error(address: str, problem: str, error: Exception) -> UserError:
    """The error for processes, or launchers of several machines, that do not meet at an address."""
    if isinstance(error, UserError):
        return error
    if 'in use' in str(error):
        return UserError('%s: address already in use; choose another port, the same on every machine, or on one '
                         'machine leave the flag out' % address)
    return UserError('%s: the %s within %d s (%s); start the program on each machine, with the same --nnodes, its own '
                     '--node_rank, and the address and port of node 0'
                     % (address, problem, wait_seconds(300), escape_text(one_line(error))[:200]))


def init_distributed_mode(config: DistributedConfig) -> torch.device:
    """Select the device, which it returns, and join the other processes, if any.

    The rendezvous has the time limit DIST_WAIT_SECONDS (300). Collectives have --dist_timeout plus 10 s: `watchdog`
    reports a hang earlier, and with more details.
    """
    process, processes, local_rank = launch_environment(config)
    device = accelerator.select_device(config.device, local_rank, processes)
    if processes == 1:
        return device
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch
    address = config.dist_url
    if address == 'env://':
        host, port = os.environ.get('MASTER_ADDR', LOOPBACK[0]), os.environ.get('MASTER_PORT', '29500')
        address = 'tcp://%s:%s' % (host, port) if config.dist_on_itp else address
    else:
        host, _, port = address.partition('://')[2].rpartition(':')
    timeout = datetime.timedelta(seconds=config.dist_timeout + 10)
    try:
        is_one_machine = host in LOOPBACK or os.environ.get('LOCAL_WORLD_SIZE') == str(processes)
        if is_one_machine and sys.platform.startswith('linux'):
            for name in ('GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME'):
                os.environ.setdefault(name, 'lo')
        if host in LOOPBACK and process == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
            listen_on_loopback(int(port))
        store, process, processes = next(rendezvous(address, process, processes,
                                                    timeout=datetime.timedelta(seconds=wait_seconds(300))))
        store = _of_this_start(store)
        backend = accelerator.PROCESS_GROUP_BACKEND[device.type]
        dist.init_process_group(backend, store=store, rank=process, world_size=processes, timeout=timeout)
        rendezvous_stores.append(store)
        host_groups.append(dist.group.WORLD if backend == 'gloo' else dist.new_group(timeout=timeout, backend='gloo'))
    except (RuntimeError, ValueError, OSError) as error:
        shown = '--master_addr %s --master_port %s' % (host, port) if address == 'env://' else '--dist_url ' + address
        raise rendezvous_error(shown, '%d processes did not find one another' % processes, error) from None
    os.register_at_fork(before=_pause_before_fork)
    barrier()
    return device


def _of_this_start(store: Any) -> Any:
    """The store with a prefix for this restart of torchrun: keys of the previous processes hold outdated addresses.

    For one machine only, where all processes get the same restart count.
    """
    count = os.environ.get('TORCHELASTIC_RESTART_COUNT', '')
    return dist.PrefixStore('start %s' % count, store) if count and os.environ.get('GROUP_WORLD_SIZE') == '1' else store


def shutdown() -> None:
    """Exit one of several processes after a successful run, when all files are closed; return in a single process.

    It skips Python's own exit, during which gloo's threads would abort, or wait forever for Python's lock.
    """
    if world_size() > 1:
        dist.barrier(group=host_groups[-1])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.flush()
        os._exit(0)


def is_error_reporter() -> bool:
    """Whether this process reports a shared error: the main process; before the rendezvous, one per machine."""
    return is_main_process() if _initialized() else reports_errors()


def defer_error_report(first: bool = False) -> None:
    """Wait before an error's line, unless this process is the `first` to report it.

    Several processes often have the same error, or lose a connection. After a line, the launcher ends the processes
    that wait.
    """
    defer_report(first, 5 if _initialized() else 20)  # start-up times differ


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error is a collective's, because another process has exited."""
    kinds = tuple(getattr(dist, name) for name in ('DistBackendError', 'DistNetworkError', 'DistStoreError')
                  if hasattr(dist, name))
    return world_size() > 1 and (isinstance(error, kinds) or re.search(
        r'[Cc]onnection (closed|reset|refused)|gloo|NCCL|HCCL|Socket|Broken pipe|[Tt]imed out', str(error)) is not None)


PRCTL = ctypes.CDLL(None).prctl if sys.platform.startswith('linux') else None


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends in any way. Linux only."""
    if PRCTL:
        PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():  # it has ended already
            os._exit(1)
