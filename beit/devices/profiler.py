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

    With `cann`, torch_npu's profiler writes files for Ascend's tools; else it is a Chrome trace, trace_rank<N>.json.
    """
    os.makedirs(folder, exist_ok=True)
    profile: Any
    if cann:
        torch_npu = importlib.import_module('torch_npu')
        profile = torch_npu.profiler.profile(
            activities=[torch_npu.profiler.ProfilerActivity.CPU, torch_npu.profiler.ProfilerActivity.NPU],
            on_trace_ready=torch_npu.profiler.tensorboard_trace_handler(folder))
    elif hasattr(torch, 'profiler') and hasattr(torch.profiler, 'ProfilerActivity'):
        names = {'cpu': ['CPU'], 'cuda': ['CPU', 'CUDA']}.get(device.type, ['CPU', 'PrivateUse1'])
        activities = [getattr(torch.profiler.ProfilerActivity, name) for name in names
                      if hasattr(torch.profiler.ProfilerActivity, name)]
        profile = torch.profiler.profile(activities=activities, record_shapes=True)
    else:  # PyTorch 1.5
        options: Any = {'use_cuda': device.type == 'cuda'}
        profile = torch.autograd.profiler.profile(**options)
    with profile:
        yield
        accelerator.synchronize(device)
    if not cann:
        profile.export_chrome_trace(os.path.join(folder, 'trace_rank%d.json' % rank))


def check_cann_profiler() -> None:
    """Raise a `UserError` where torch_npu's profiler is not available."""
    problem = accelerator.npu_problem()
    if problem is None and not hasattr(importlib.import_module('torch_npu'), 'profiler'):
        problem = 'this torch_npu has no profiler; use --prof'
    if problem:
        raise UserError('--cann_prof: %s' % problem)
