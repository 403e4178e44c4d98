"""``torch_npu.npu.utils``: overflow, which a 910A flags instead of giving inf."""

import math
import warnings

import torch

import torch_npu

from .. import _C


def is_support_inf_nan():
    """False on a 910A, whose arithmetic saturates."""
    return not _C.is_910a()


def is_bf16_supported():
    return not _C.is_910a()


def get_npu_overflow_flag():
    """Whether arithmetic has overflowed since the flag was cleared; a RuntimeError on a 910B."""
    if is_support_inf_nan():
        raise RuntimeError('Unsupported api when soc_version >= Ascend910B1, please use npu_check_overflow')
    return bool(torch_npu.npu_get_float_status(torch.zeros(8, device='npu'))[0] != 0)


def clear_npu_overflow_flag():
    if is_support_inf_nan():
        warnings.warn('When soc_version >= Ascend910B1, clear_npu_overflow_flag is useless, please remove it.',
                      stacklevel=2)
        return
    torch_npu.npu_clear_float_status(torch.zeros(8, device='npu'))


def npu_check_overflow(grad):
    """910A: the flag, which is cleared. 910B: whether the sum of `grad` (a tensor or float) is inf or nan."""
    if not is_support_inf_nan():
        overflow = get_npu_overflow_flag()
        if overflow:
            clear_npu_overflow_flag()
        return overflow
    if not isinstance(grad, (float, torch.Tensor)):
        raise RuntimeError('Unsupported type.')
    return not math.isfinite(float(grad.float().sum()) if isinstance(grad, torch.Tensor) else grad)
