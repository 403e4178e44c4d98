"""Half precision: autocast, apex, the choice of dtype, and overflow on devices that saturate."""

import functools
import importlib
import importlib.util
import os
from typing import Any, Optional, Tuple

import torch
from torch import nn

from beit.devices import accelerator
from beit.errors import UserError

AMP_DTYPES = ('float16', 'bfloat16')
OPT_LEVELS = ('O0', 'O1', 'O2')


@functools.lru_cache(maxsize=None)
def saturates(device: torch.device) -> bool:
    """Whether overflow on this device gives the largest finite value instead of inf, as on an Ascend 910A."""
    if device.type != 'npu':
        return False
    return bool(torch.isfinite(torch.full((1,), 6e4, dtype=torch.float16, device=device) * 2).all())


def read_overflow(device: torch.device) -> bool:
    """Whether a device that `saturates` had an overflow since the last call, by its overflow flag."""
    module = accelerator.device_module(device)
    if not hasattr(module, 'get_npu_overflow_flag'):
        return False
    overflowed = bool(module.get_npu_overflow_flag())
    module.clear_npu_overflow_flag()
    return overflowed


def autocast(device_type: str, dtype: torch.dtype) -> Any:
    if hasattr(torch, 'autocast'):
        return torch.autocast(device_type, dtype=dtype)
    return accelerator.device_module(device_type).amp.autocast()  # PyTorch 1.8, float16


def has_autocast(device_type: str, dtype: torch.dtype) -> bool:
    return hasattr(torch, 'autocast') or dtype == torch.float16 and hasattr(
        getattr(accelerator.device_module(device_type), 'amp', None), 'autocast')


def find_apex() -> Tuple[Any, str]:
    """(apex.amp or None, a description). Three packages have the name apex; only some have `amp`."""
    spec = importlib.util.find_spec('apex')
    if spec is None:
        return None, 'apex is not installed'
    try:
        apex = importlib.import_module('apex')
        amp = importlib.import_module('apex.amp')
    except Exception as error:  # an apex built for another PyTorch can raise anything; PyTorch's amp always works
        if not isinstance(error, ModuleNotFoundError) or error.name != 'apex.amp':
            return None, 'the installed apex cannot be imported (%s)' % ' '.join(str(error).split())
        if any(os.path.isdir(os.path.join(folder, 'optimizers')) for folder in spec.submodule_search_locations or ()):
            return None, 'the installed apex is NVIDIA\'s without amp, which newer versions removed'
        return None, 'the installed apex is an unrelated package of that name'
    kind = 'Ascend\'s' if hasattr(getattr(apex, 'optimizers', None), 'NpuFusedAdamW') else 'NVIDIA\'s'
    return amp, 'apex.amp (%s)' % kind


def apex_amp(device: torch.device, dtype: Optional[torch.dtype]) -> Any:
    """apex.amp if it is installed, for float16 on an accelerator; else None."""
    return find_apex()[0] if device.type != 'cpu' and dtype == torch.float16 else None


def check_precision(device: torch.device, amp: bool, opt_level: str, amp_dtype: Optional[str]
                    ) -> Optional[torch.dtype]:
    """The half-precision `torch.dtype`, or None for float32. The default is float16, on a CPU bfloat16.

    Raises `UserError` where this device or this PyTorch does not support the flags.
    """
    if not amp or opt_level == 'O0':
        return None
    if amp_dtype is None:
        amp_dtype = 'bfloat16' if device.type == 'cpu' else 'float16'
    if device.type == 'cpu' and amp_dtype == 'float16':
        raise UserError('--amp_dtype float16: half precision on a CPU is bfloat16; leave the flag out')
    dtype = getattr(torch, amp_dtype)
    problem = _half_precision_problem(device, dtype) if opt_level == 'O2' or device.type != 'cpu' else None
    if amp_dtype == 'bfloat16' and device.type != 'cpu' and problem:
        raise UserError('--amp_dtype bfloat16: this %s has none (%s), as an Ascend 910A; use --amp_dtype float16'
                        % (device.type, problem))
    if opt_level == 'O1' and not has_autocast(device.type, dtype) and not apex_amp(device, dtype):
        raise UserError('--opt-level O1: this PyTorch has no autocast to %s on %s%s; leave --amp out, or use a newer '
                        'one' % (amp_dtype, device.type, '' if device.type == 'cpu' else ', and %s' % find_apex()[1]))
    if opt_level == 'O2' and problem:
        raise UserError('--opt-level O2: this PyTorch cannot train in %s on %s (%s); leave --amp out, or use a newer '
                        'one' % (amp_dtype, device.type, problem))
    return dtype


@functools.lru_cache(maxsize=None)
def _half_precision_problem(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """None, or the error of a forward and backward pass through the model's kinds of layers in this dtype."""
    try:
        layers = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(),
                               nn.Softmax(-1), nn.Dropout(0.1)).to(device=device, dtype=dtype)
        (layers(torch.ones(2, 3, 4, 4, device=device, dtype=dtype)) @ torch.ones(
            2, 4, 4, device=device, dtype=dtype)).float().sum().backward()
        accelerator.synchronize(device)  # an NPU reports an unsupported operator late
    except (RuntimeError, TypeError) as error:
        return ' '.join(str(error).split())[:100]
    return None
