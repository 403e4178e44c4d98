"""What processes tell one another."""

import json
import time
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist

from beit.distributed import process_group
from beit.errors import UserError

ALIVE_SECONDS = 0.3  # between two signs of life; less than any --dist_timeout
BLOCK = 1 << 26  # bytes that are sent at once; they go as int32, which HCCL surely knows


def _gather(tensor: torch.Tensor) -> List[torch.Tensor]:
    """The tensor of every process, in their order and on the CPU; all have one shape."""
    gathered = [torch.zeros_like(tensor) for _ in range(process_group.world_size())]
    with process_group.waiting():
        dist.all_gather(gathered, tensor)
        return [each.cpu() for each in gathered]


def all_gather_numbers(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
                       ) -> List[List[Any]]:
    """The numbers of every process, in their order: one list each."""
    if process_group.world_size() == 1:
        return [list(numbers)]
    return [each.tolist() for each in _gather(torch.tensor(numbers, dtype=dtype, device=device))]


def all_gather_async(numbers: Sequence[int], device: torch.device) -> Callable[[], List[List[Any]]]:
    """Begin to gather whole numbers of every process between their hosts: what a device is doing is not waited for.

    Returns:
        A function to call once, which waits for the answers and gives one list for each process.
    """
    if not process_group.host_groups:
        return lambda: all_gather_numbers(numbers, device)
    mine = torch.tensor(numbers, dtype=torch.float32)
    gathered = [torch.zeros_like(mine) for _ in range(process_group.world_size())]
    work = dist.all_gather(gathered, mine, group=process_group.host_groups[-1], async_op=True)

    def answers() -> List[List[Any]]:
        with process_group.waiting():
            work.wait()
            return [each.tolist() for each in gathered]
    return answers


def _to_int32(data: bytes, device: torch.device) -> torch.Tensor:
    """Bytes, filled up with zeros to a multiple of four, as numbers."""
    numbers = np.frombuffer(data.ljust(len(data) + 3 & ~3, b'\0'), np.int32)
    # Not memory of NumPy's: gloo's thread would free it through Python, and a loader forked in that moment hang (3.8).
    return torch.from_numpy(numbers.copy()).clone().to(device)


def all_gather_json(value: Any, device: torch.device) -> List[Any]:
    """A value that JSON can hold, of every process, in their order. For what is told seldom: two collectives."""
    if process_group.world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = max(length for length, in all_gather_numbers([len(text)], device, torch.int64))
    return [json.loads(each.numpy().tobytes().rstrip(b'\0').decode())
            for each in _gather(_to_int32(text.ljust(longest, b'\0'), device))]


def all_gather_rows(columns: Sequence[Optional[torch.Tensor]], device: torch.device) -> List[torch.Tensor]:
    """Tensors of all processes, one behind the other: (n, …) each, n another on each process, the same in all columns.

    Args:
        columns (list of float32 or int64 tensors, or None): None where this process has no row; some process has one.

    Returns:
        list of tensors on the CPU.
    """
    shapes = all_gather_json([None if column is None else [str(column.dtype), list(column.shape)]
                              for column in columns], device)
    gathered = []
    for index, column in enumerate(columns):
        rows = [0 if each[index] is None else each[index][1][0] for each in shapes]
        dtype, shape = next(each[index] for each in shapes if each[index] is not None)
        padded = torch.zeros([max(rows)] + shape[1:], dtype=getattr(torch, dtype.replace('torch.', '')), device=device)
        if column is not None:
            padded[:len(column)] = column.to(device)
        gathered.append(torch.cat([part[:number] for part, number in zip(_gather(padded), rows)]))
    return gathered


def any_process(flag: float, device: torch.device) -> bool:
    """Whether `flag` is true in at least one process; all learn it together."""
    return any(vote > 0 for vote, in all_gather_numbers([float(flag)], device))


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    with process_group.waiting():
        dist.broadcast(tensor, 0)
    return tensor


def broadcast_from_main(make: Callable[[Callable[[], None]], bytes], device: Optional[torch.device]) -> bytes:
    """Return on every process the bytes that `make` returns on the main one, or raise the `UserError` of there.

    `make` may take long. Its argument is a function to call now and then, so that the process isn't taken for hung.

    Args:
        device (torch.device or None): None for each process to make its own.
    """
    if process_group.world_size() == 1 or device is None:
        return make(lambda: None)

    if not process_group.is_main_process():
        is_alive, failed, length = 1, 0, 0
        while is_alive:
            is_alive, failed, length = _broadcast(torch.zeros(3, dtype=torch.int64, device=device)).tolist()
        blocks = [torch.zeros(min(BLOCK, length - start) + 3 >> 2, dtype=torch.int32, device=device)
                  for start in range(0, length, BLOCK)]
        data = b''.join(_broadcast(block).cpu().numpy().tobytes() for block in blocks)[:length]
        if failed:
            raise UserError(data.decode())
        return data

    last_sent = time.monotonic()

    def keep_alive() -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent > ALIVE_SECONDS:
            _broadcast(torch.tensor([1, 0, 0], dtype=torch.int64, device=device))
            last_sent = time.monotonic()

    error = None
    try:
        data = make(keep_alive)
    except UserError as caught:
        error, data = caught, str(caught).encode('utf-8', 'backslashreplace')
    _broadcast(torch.tensor([0, error is not None, len(data)], dtype=torch.int64, device=device))
    for start in range(0, len(data), BLOCK):
        _broadcast(_to_int32(data[start:start + BLOCK], device))
    if error is not None:
        raise error
    return data


def all_reduce_sum(counts: Sequence[int], total: float, device: torch.device) -> Tuple[Any, ...]:
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
