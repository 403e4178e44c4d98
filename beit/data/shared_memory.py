"""Shared memory: the files in /dev/shm through which loader processes hand over their batches."""

import os

from beit.distributed import process_group
from beit.log import log_main

FOLDER = '/dev/shm'
BATCHES = 3  # of a worker: two that wait, and the one that it makes


def workers_that_fit(wanted: int, batch_bytes: int) -> int:
    """The number of loader processes, at most `wanted`, for whose batches there is room; a line says if it is smaller.

    In a container there often is little (docker gives 64 MB), and a process that finds none is killed by SIGBUS.
    """
    try:
        status = os.statvfs(FOLDER)
    except (OSError, AttributeError):  # this system shares memory in another way
        return wanted
    processes = os.environ.get('LOCAL_WORLD_SIZE', '')  # that share it
    sharers = int(processes) if processes.isdigit() else process_group.world_size()
    share = 0.9 * status.f_bavail * status.f_frsize / sharers
    workers = min(wanted, int(share / (BATCHES * batch_bytes)))
    if workers < wanted:
        log_main('%s has room for the batches of %d loader processes, not of %d; with docker run --shm-size=%dg it is '
                 'larger' % (FOLDER, workers, wanted, 1 + BATCHES * wanted * batch_bytes * process_group.world_size()
                             // 2 ** 30))
    return workers
