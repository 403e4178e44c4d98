"""Exchanges numbers, JSON, tensors and bytes between processes."""

import json
import time
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist

from beit.distributed import process_group
from beit.errors import UserError

ALIVE_SECONDS = 0.3  # between two keep-alive messages; less than any --dist_timeout
BLOCK = 1 << 26  # bytes per message; sent as int32, which HCCL supports


def _gather(tensor: torch.Tensor) -> List[torch.Tensor]:
    """The tensor of every process, by rank and on the CPU; all have the same shape."""
    gathered = [torch.zeros_like(tensor) for _ in range(process_group.world_size())]
    with process_group.waiting():
        dist.all_gather(gathered, tensor)
        return [each.cpu() for each in gathered]


def all_gather_numbers(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
                       ) -> List[List[Any]]:
    """A list of numbers for every process, by rank."""
    if process_group.world_size() == 1:
        return [list(numbers)]
    return [each.tolist() for each in _gather(torch.tensor(numbers, dtype=dtype, device=device))]


def all_gather_async(numbers: Sequence[int], device: torch.device) -> Callable[[], List[List[Any]]]:
    """Gather whole numbers over the hosts' network. Returns a function, to call once, that waits for each process's."""
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
    """Bytes, padded with zeros to a multiple of four, as an int32 tensor."""
    numbers = np.frombuffer(data.ljust(len(data) + 3 & ~3, b'\0'), np.int32)
    # Cloned out of NumPy's memory: gloo's thread would free that through Python, and a loader forked just then hangs.
    return torch.from_numpy(numbers.copy()).clone().to(device)


def all_gather_json(value: Any, device: torch.device) -> List[Any]:
    """A JSON value of every process, by rank. It takes two collectives, so it is for rare use."""
    if process_group.world_size() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = max(length for length, in all_gather_numbers([len(text)], device, torch.int64))
    return [json.loads(each.numpy().tobytes().rstrip(b'\0').decode())
            for each in _gather(_to_int32(text.ljust(longest, b'\0'), device))]


def all_gather_rows(columns: Sequence[Optional[torch.Tensor]], device: torch.device) -> List[torch.Tensor]:
    """Concatenate the rows of all processes: a tensor (rows, …) for each column, on the CPU.

    Columns are float32 or int64 (n, …); n may differ between processes, not between columns. They are None where this
    process has no row; at least one process has rows.
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
    """Whether `flag` is true in at least one process; every process must call it."""
    return any(value > 0 for value, in all_gather_numbers([float(flag)], device))


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    with process_group.waiting():
        dist.broadcast(tensor, 0)
    return tensor


def broadcast_from_main(make: Callable[[Callable[[], None]], Any], device: Optional[torch.device]) -> Any:
    """Return the JSON value from `make` on the main process on every process, or raise its `UserError` everywhere.

    `make` can take long: it gets a function to call often, which shows the watchdog that the process is alive. Without
    a device, each process calls `make` itself.
    """
    if process_group.world_size() == 1 or device is None:
        return json.loads(json.dumps(make(lambda: None)))

    if not process_group.is_main_process():
        is_alive, failed, length = 1, 0, 0
        while is_alive:
            is_alive, failed, length = _broadcast(torch.zeros(3, dtype=torch.int64, device=device)).tolist()
        blocks = [torch.zeros(min(BLOCK, length - start) + 3 >> 2, dtype=torch.int32, device=device)
                  for start in range(0, length, BLOCK)]
        data = b''.join(_broadcast(block).cpu().numpy().tobytes() for block in blocks)[:length]
        if failed:
            raise UserError(data.decode())
        return json.loads(data)

    last_sent = time.monotonic()

    def keep_alive() -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent > ALIVE_SECONDS:
            _broadcast(torch.tensor([1, 0, 0], dtype=torch.int64, device=device))
            last_sent = time.monotonic()

    error = None
    try:
        data = json.dumps(make(keep_alive)).encode()
    except UserError as caught:
        error, data = caught, str(caught).encode('utf-8', 'backslashreplace')
    _broadcast(torch.tensor([0, error is not None, len(data)], dtype=torch.int64, device=device))
    for start in range(0, len(data), BLOCK):
        _broadcast(_to_int32(data[start:start + BLOCK], device))
    if error is not None:
        raise error
    return json.loads(data)


def all_reduce_sum(counts: Sequence[int], total: float, device: torch.device) -> Tuple[Any, ...]:
    """(*counts, total), summed over all processes: counts exactly, and without float64, which HCCL can't reduce."""
    if process_group.world_size() == 1:
        return tuple(counts) + (total,)
    whole = torch.tensor(counts, dtype=torch.int64, device=device)
    with process_group.waiting():
        dist.all_reduce(whole)
    # A float64 as the sum of two float32 keeps 48 of its 53 bits; every process adds the parts in the same order.
    high = torch.tensor(total, dtype=torch.float32).item()
    parts = all_gather_numbers([high, total - high], device)
    return tuple(whole.tolist()) + (sum(value for pair in parts for value in pair),)
