"""What processes tell one another."""

import json
import time
import typing

import numpy as np
import torch
import torch.distributed as dist

from beit.distributed import process_group
from beit.errors import UserError


def all_gather_numbers(numbers, device, dtype=torch.float32):
    """The numbers of every process, in their order: one list each."""
    if process_group.world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=dtype, device=device)
    gathered = [torch.zeros_like(mine) for _ in range(process_group.world_size())]
    with process_group.waiting():
        dist.all_gather(gathered, mine)
        return [each.tolist() for each in gathered]


def all_gather_async(numbers, device):
    """Begin to gather whole numbers of every process between their hosts: what a device is doing is not waited for.

    Returns:
        A function to call once, which waits for the answers and gives one list for each process.
    """
    if process_group.world_size() == 1:
        return lambda: [list(numbers)]
    if not process_group.host_groups:
        return lambda: all_gather_numbers(numbers, device)
    mine = torch.tensor(numbers, dtype=torch.float32)
    gathered = [torch.zeros_like(mine) for _ in range(process_group.world_size())]
    work = dist.all_gather(gathered, mine, group=process_group.host_groups[-1], async_op=True)

    def answers():
        with process_group.waiting():
            work.wait()
            return [each.tolist() for each in gathered]
    return answers


def all_gather_json(value, device):
    """A value that JSON can hold, of every process, in their order. For what is told seldom: two collectives."""
    if process_group.world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    lengths = [length for length, in all_gather_numbers([len(text)], device, torch.int64)]
    padded = np.frombuffer(text + bytes(max(lengths) - len(text)), dtype=np.uint8)
    # Not memory of NumPy's: gloo's thread would free it through Python, and a loader forked in that moment hang (3.8).
    mine = torch.from_numpy(padded.astype(np.int32)).clone().to(device)
    gathered = [torch.zeros_like(mine) for _ in lengths]
    with process_group.waiting():
        dist.all_gather(gathered, mine)
        gathered = [each.cpu().numpy() for each in gathered]
    return [json.loads(each[:length].astype(np.uint8).tobytes().decode()) for each, length in zip(gathered, lengths)]


def all_gather_rows(columns, device):
    """Tensors of all processes, one behind the other: (n, …) each, n another on each process, the same in all columns.

    Args:
        columns (list of float32 or int64 tensors, or None): None where this process has no row; some process has one.

    Returns:
        list of tensors on the CPU.
    """
    shapes = all_gather_json([None if column is None else [str(column.dtype), list(column.shape)]
                              for column in columns], device)
    gathered = []
    for place, column in enumerate(columns):
        rows = [0 if each[place] is None else each[place][1][0] for each in shapes]
        dtype, shape = next(each[place] for each in shapes if each[place] is not None)
        padded = torch.zeros([max(rows)] + shape[1:], dtype=getattr(torch, dtype.replace('torch.', '')), device=device)
        if column is not None:
            padded[:len(column)] = column.to(device)
        parts = [torch.zeros_like(padded) for _ in rows]
        with process_group.waiting():
            dist.all_gather(parts, padded)
            gathered.append(torch.cat([part[:number].cpu() for part, number in zip(parts, rows)]))
    return gathered


def any_process(flag, device):
    """Whether `flag` is true in at least one process; all learn it together."""
    return any(vote > 0 for vote, in all_gather_numbers([float(flag)], device))


ALIVE_SECONDS = 0.3  # between two signs of life; less than any --dist_timeout
BLOCK = 1 << 26  # bytes that are sent at once; they go as int32, which HCCL surely knows


def broadcast_from_main(make: typing.Callable[[typing.Callable[[], None]], bytes],
                        device: typing.Optional[torch.device]) -> bytes:
    """Return on every process the bytes that `make` returns on the main one, or raise the `UserError` of there.

    `make` may take long. Its argument is a function to call now and then, so that the process isn't taken for hung.

    Args:
        device (torch.device or None): None for each process to make its own.
    """
    if process_group.world_size() == 1 or device is None:
        return make(lambda: None)

    def broadcast(data):
        with process_group.waiting():
            dist.broadcast(data, 0)
        return data

    if not process_group.is_main_process():
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
        broadcast(torch.from_numpy(block.copy()).clone().to(device))  # see `all_gather_json`
    if error is not None:
        raise error
    return data


def all_reduce_sum(counts, total, device):
    """Add up whole numbers, exactly, and a float over all processes; no float64, which HCCL can't reduce.

    Returns:
        The counts and the total, in one tuple.
    """
    if process_group.world_size() == 1:
        return tuple(counts) + (total,)
    whole = torch.tensor(counts, dtype=torch.int64, device=device)
    with process_group.waiting():
        dist.all_reduce(whole)
    # A float64 as the sum of two float32 keeps 48 of its 53 bits; each process adds the parts in the same order.
    high = torch.tensor(total, dtype=torch.float32).item()
    parts = all_gather_numbers([high, total - high], device)
    return tuple(whole.tolist()) + (sum(value for pair in parts for value in pair),)
