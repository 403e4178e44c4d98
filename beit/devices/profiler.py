"""Profiles a few updates with PyTorch or CANN."""

import contextlib
import importlib
import importlib.util
import os
from typing import Any, Iterator

import torch

from beit.devices import accelerator
from beit.errors import UserError


@contextlib.contextmanager
def profiler(device: torch.device, folder: str, rank: int = 0, cann: bool = False) -> Iterator[None]:
    """Profile the code inside, and write the result into `folder`.

    Args:
        cann (bool): with torch_npu's profiler, for Ascend's tools; else a Chrome trace, trace_rank<N>.json.
    """
    os.makedirs(folder, exist_ok=True)
    if cann:
        with _cann_profiler(folder):
            yield
        return
    path = os.path.join(folder, 'trace_rank%d.json' % rank)
    if hasattr(torch, 'profiler') and hasattr(torch.profiler, 'ProfilerActivity'):
        activities = [getattr(torch.profiler.ProfilerActivity, name) for name in ('CPU', 'CUDA', 'PrivateUse1')
                      if hasattr(torch.profiler.ProfilerActivity, name)
                      and (name == 'CPU' or (name == 'CUDA') == (device.type == 'cuda') and device.type != 'cpu')]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            yield
            accelerator.synchronize(device)
    else:  # PyTorch 1.5
        options: Any = {'use_cuda': device.type == 'cuda'}
        with torch.autograd.profiler.profile(**options) as profile:
            yield
            accelerator.synchronize(device)
    profile.export_chrome_trace(path)


def check_cann_profiler() -> None:
    """Raise a `UserError` where torch_npu's profiler is not available."""
    problem = accelerator.npu_problem()
    if problem is None and not hasattr(importlib.import_module('torch_npu'), 'profiler'):
        problem = 'this torch_npu has no profiler; use --prof'
    if problem:
        raise UserError('--cann_prof: %s' % problem)


def _cann_profiler(folder: str) -> Any:
    torch_npu = importlib.import_module('torch_npu')
    return torch_npu.profiler.profile(
        activities=[torch_npu.profiler.ProfilerActivity.CPU, torch_npu.profiler.ProfilerActivity.NPU],
        on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(folder))
