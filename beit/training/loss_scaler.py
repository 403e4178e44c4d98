"""Prepares a model for float32, O1 or O2, and does the training step through one scaler interface.

`beit.devices.half_precision` detects the features of the device and the libraries.
"""

import inspect
import math
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch import nn

from beit.devices import accelerator, half_precision, kernels
from beit.distributed import collectives

Norm = Union[float, torch.Tensor, None]


def total_norm(parameters: List[Any]) -> torch.Tensor:
    """The norm of all gradients together. Not by clipping to infinity, which would set an NPU's overflow flag."""
    gradients = [parameter.grad for parameter in parameters]
    if hasattr(nn.utils, 'get_total_norm'):
        return nn.utils.get_total_norm(gradients)
    return torch.norm(torch.stack([torch.norm(gradient) for gradient in gradients]))


class LossScaler:
    """Backward, unscale, clip and step: one call per micro-step, the same for every precision.

    This class is for float32 and native O1. An update with non-finite gradients is skipped and counted; a dynamic scale
    is then halved, and doubled after 2,000 good updates ("Mixed Precision Training", https://arxiv.org/abs/1710.03740,
    section 3.2). A non-finite loss makes all gradients non-finite, on every process after the averaging. If the
    optimizer can skip on the device (PyTorch's fused optimizers) and the scale is static, the host does not wait for
    the norm of the gradients. If the device saturates (`half_precision.saturates`), its overflow flag counts too, and
    the processes agree on it.
    """

    GROWTH_INTERVAL = 2000
    LARGEST, SMALLEST = 2. ** 24, 2. ** -14

    def __init__(self, scale: float = 1., dynamic: bool = False, description: str = 'float32',
                 overflows: bool = False) -> None:
        self.scale, self.dynamic, self.description = float(scale), dynamic, description
        self.overflows = overflows or dynamic or self.scale != 1.  # non-finite gradients are normal, as in float16
        self.skipped, self.skipped_in_a_row, self.good_updates = 0, 0, 0  # updates
        self.last_skipped: Union[bool, torch.Tensor] = False  # the newest update; a 0-dim tensor on the device

    def __call__(self, loss: torch.Tensor, optimizer: Any, parameters: Iterable[torch.Tensor],
                 clip_grad: Optional[float] = None, is_update: bool = True, create_graph: bool = False,
                 grad_factor: Optional[Callable[[], float]] = None) -> Norm:
        """One micro-step: `loss` is a scalar tensor, already divided by the number of micro-steps.

        `grad_factor()`, called after the backward pass of an update, returns a factor for its gradients; with 0 the
        update is skipped.

        Returns, at an update, the norm of all gradients before clipping, unscaled: a float or a 0-dim tensor.
        """
        loss = loss * (loss.detach() * 0. + 1.)  # times 1, or NaN if the loss is not finite
        self._backward(loss, optimizer, is_update, create_graph)
        if not is_update:
            return None
        factor = 1. if grad_factor is None else grad_factor()
        if factor == 0.:
            self.last_skipped, self.skipped = True, self.skipped + 1
            return math.nan
        return self._finish(optimizer, self._trained(parameters), clip_grad, loss.device, factor)

    def _backward(self, loss: torch.Tensor, optimizer: Any, is_update: bool, create_graph: bool) -> None:
        (loss if self.scale == 1. else loss * self.scale).backward(create_graph=create_graph)

    def _trained(self, parameters: Iterable[torch.Tensor]) -> List[Any]:
        """The optimizer's parameters that have a gradient."""
        return [parameter for parameter in parameters if parameter.grad is not None]

    def clear_overflow(self, device: torch.device) -> None:
        """Call before training: an earlier overflow, such as in an evaluation, must not skip a step."""
        if half_precision.saturates(device):
            half_precision.read_overflow(device)

    def _finish(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float], device: torch.device,
                factor: float) -> Norm:
        """Unscale, multiply by `factor`, clip and, if the gradients are finite, step."""
        scale = self.scale / factor
        if kernels.supports_grad_scale(optimizer) and not (self.dynamic or half_precision.saturates(device)):
            return self._finish_on_device(optimizer, parameters, clip_grad, device, scale)
        if scale != 1.:
            kernels.foreach('mul', [parameter.grad for parameter in parameters], 1. / scale)
        grad_norm = self._clip(optimizer, parameters, clip_grad)
        if not self.count(self._overflowed(grad_norm, device)):
            optimizer.step()
        self.good_updates = 0 if self.last_skipped else self.good_updates + 1
        if self.dynamic and self.last_skipped:
            self.scale = max(self.scale / 2, self.SMALLEST)
        elif self.dynamic and self.good_updates % self.GROWTH_INTERVAL == 0:
            self.scale = min(self.scale * 2, self.LARGEST)
        return grad_norm

    def _finish_on_device(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float],
                          device: torch.device, scale: float) -> torch.Tensor:
        """The same without waiting: the optimizer's kernel divides by scale and clipping, and skips."""
        grad_norm = total_norm(parameters)
        divisor = None
        if scale != 1.:
            grad_norm = grad_norm / scale
            divisor = torch.full_like(grad_norm, scale)
        if clip_grad:
            divisor = scale / (clip_grad / (grad_norm + 1e-6)).clamp(max=1.)  # as torch.nn.utils.clip_grad_norm_
        skip = ~torch.isfinite(grad_norm)
        if not accelerator.is_synchronous(device):
            self.last_skipped = skip
            kernels.step_scaled(optimizer, divisor, skip)
        elif not self.count(bool(skip)):
            kernels.step_scaled(optimizer, divisor)
        return grad_norm

    def _overflowed(self, grad_norm: float, device: torch.device) -> bool:
        if half_precision.saturates(device):
            return collectives.any_process(half_precision.read_overflow(device) or not math.isfinite(grad_norm), device)
        return not math.isfinite(grad_norm)

    def _clip(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float]) -> float:
        if not clip_grad:
            return float(total_norm(parameters))
        if hasattr(optimizer, 'clip_grad_norm_fused_'):  # such an optimizer uses its own copies of the gradients
            return float(optimizer.clip_grad_norm_fused_(clip_grad))
        return float(nn.utils.clip_grad_norm_(parameters, clip_grad))

    def count(self, skipped: bool) -> bool:
        """Record whether an update was skipped, and return that. The caller does it when `last_skipped` is a tensor."""
        self.last_skipped = skipped
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return skipped

    def fp32_state_dict(self, model: nn.Module) -> Dict[str, torch.Tensor]:
        """{name: float32 tensor} of every parameter and buffer. The tensors are live: copying into them sets the model.
        """
        return dict(accelerator.unwrap(model).state_dict())

    def sync_model_weights(self) -> None:
        """Call after copying into `fp32_state_dict`, to update half-precision copies."""

    def state_dict(self) -> Dict[str, Any]:
        return {'scale': self.scale, 'good_updates': self.good_updates, 'skipped': self.skipped,
                'skipped_in_a_row': self.skipped_in_a_row}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the counters and a dynamic scale. Other programs' scaler states are ignored."""
        self.skipped, self.skipped_in_a_row = int(state.get('skipped', 0)), int(state.get('skipped_in_a_row', 0))
        if 'good_updates' in state:
            self.good_updates = int(state['good_updates'])
            self.scale = float(state['scale']) if self.dynamic else self.scale


class MasterWeightScaler(LossScaler):
    """Native O2: the model has half-precision weights, the optimizer float32 masters; `pairs` are (weight, master)."""

    def __init__(self, pairs: List[Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.pairs = pairs

    def _backward(self, loss: torch.Tensor, optimizer: Any, is_update: bool, create_graph: bool) -> None:
        super()._backward(loss, optimizer, is_update, create_graph)
        # Accumulate in float32, in buffers that keep their addresses: NpuFusedAdamW never looks for new ones.
        pairs = [pair for pair in self.pairs if pair[0].grad is not None]
        begun = [pair for pair in pairs if pair[1].grad is not None]
        kernels.foreach('add', [master.grad for _, master in begun], [parameter.grad.float() for parameter, _ in begun])
        fresh = [pair for pair in pairs if pair[1].grad is None]
        for _, master in fresh:
            master.grad = torch.empty_like(master)
        kernels.foreach('copy', [master.grad for _, master in fresh], [parameter.grad for parameter, _ in fresh])
        for parameter, _ in pairs:
            parameter.grad = None

    def _trained(self, parameters: Iterable[torch.Tensor]) -> List[Any]:
        return [master for _, master in self.pairs if master.grad is not None]

    def _finish(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float], device: torch.device,
                factor: float) -> Norm:
        grad_norm = super()._finish(optimizer, parameters, clip_grad, device, factor)
        self.sync_model_weights()
        return grad_norm

    def fp32_state_dict(self, model: nn.Module) -> Dict[str, torch.Tensor]:
        state = super().fp32_state_dict(model)
        masters = {id(parameter): master for parameter, master in self.pairs}
        return dict(state, **{name: masters.get(id(parameter), parameter).data
                              for name, parameter in accelerator.unwrap(model).named_parameters()})

    def sync_model_weights(self) -> None:
        kernels.foreach('copy', [parameter.data for parameter, _ in self.pairs],
                        [master.data for _, master in self.pairs])


class AmpLibraryScaler(MasterWeightScaler):
    """O1 and O2 of `half_precision.apex_amp`, which scales, unscales and keeps masters; this class checks and skips."""

    def __init__(self, amp: Any, pairs: List[Any], **settings: Any) -> None:
        super().__init__(pairs, **settings)
        self.amp = amp

    def _backward(self, loss: torch.Tensor, optimizer: Any, is_update: bool, create_graph: bool) -> None:
        with self.amp.scale_loss(loss, optimizer, delay_unscale=not is_update) as scaled:
            scaled.backward(create_graph=create_graph)

    def _finish(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float], device: torch.device,
                factor: float) -> Norm:
        masters = [master for master in self.amp.master_params(optimizer) if master.grad is not None]
        if factor != 1.:
            kernels.foreach('mul', [master.grad for master in masters], factor)
        grad_norm = self._clip(optimizer, masters, clip_grad)
        before, self.scale = self.scale, float(next(iter(self.amp.state_dict().values()))['loss_scale'])
        if self.dynamic:  # the library decided, and replaced a step to skip by a no-op, which must be called
            skip = self.scale < before or not math.isfinite(grad_norm)
        else:
            skip = self._overflowed(grad_norm, device)
        if not self.count(skip) or self.dynamic:
            optimizer.step()
        return grad_norm

    def _clip(self, optimizer: Any, parameters: List[Any], clip_grad: Optional[float]) -> float:
        has_combined = self.pairs or self.dynamic or self.scale != 1.  # the gradients into one tensor
        if clip_grad and has_combined and hasattr(optimizer, 'clip_optimizer_grad_norm_fused'):
            return float(optimizer.clip_optimizer_grad_norm_fused(clip_grad))
        return super()._clip(optimizer, parameters, clip_grad)

    def state_dict(self) -> Dict[str, Any]:
        return dict(super().state_dict(), apex=self.amp.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        super().load_state_dict(state)
        if 'apex' in state:
            self.amp.load_state_dict(state['apex'])


class HalfPrecision(nn.Module):
    """Native O1 runs the model under autocast on `device_type`; O2, without it, casts its weights and input to `dtype`.

    The output is float32.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device_type: str = '') -> None:
        super().__init__()
        self.module, self.dtype, self.device_type = module if device_type else module.to(dtype), dtype, device_type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.device_type:
            return self.module(images.to(self.dtype)).float()
        with half_precision.autocast(self.device_type, self.dtype):
            return self.module(images).float()


def initialize_amp(model: nn.Module, optimizer: Optional[torch.optim.Optimizer], device: torch.device,
                   dtype: Optional[torch.dtype] = None, opt_level: str = 'O2',
                   loss_scale: Union[float, str, None] = None) -> Tuple[nn.Module, LossScaler]:
    """(a module to call instead of the model, scaler) for a precision. Call before DistributedDataParallel.

    Args:
        optimizer: built on the model's float32 parameters; under O2 it holds their masters afterwards. None for an
            evaluation.
        dtype: the result of `half_precision.check_precision`; None is float32.
        loss_scale: a number, or 'dynamic'; None is 128 (the adaptation's static scale) for float16, else 1.
    """
    if dtype is None:
        return model, LossScaler()
    if loss_scale is None:
        loss_scale = 128. if dtype == torch.float16 else 1.
    dynamic, name = loss_scale == 'dynamic', '%s %s by ' % (opt_level, str(dtype).replace('torch.', ''))
    scaling: Dict[str, Any] = dict(scale=2. ** 16 if dynamic else loss_scale, dynamic=dynamic,
                                   overflows=dtype == torch.float16)
    amp = half_precision.apex_amp(device, dtype)
    amp_status = half_precision.find_apex()[1] if device.type != 'cpu' and dtype == torch.float16 else ''
    if amp is not None and optimizer is not None:
        before = [p for group in optimizer.param_groups for p in group['params']]
        options = dict(opt_level=opt_level, loss_scale=loss_scale, verbosity=0)
        if 'combine_grad' in inspect.signature(amp.initialize).parameters:
            options['combine_grad'] = True
        model, optimizer = amp.initialize(model, optimizer, **options)
        optimizer.zero_grad()  # this call puts the masters into the optimizer
        after = [p for group in optimizer.param_groups for p in group['params']]
        pairs = [pair for pair in zip(before, after) if pair[0] is not pair[1]]
        return model, AmpLibraryScaler(amp, pairs, description=name + amp_status, **scaling)
    scaling['description'] = name + 'PyTorch' + (amp_status and ' (%s)' % amp_status)
    if opt_level == 'O1' and not half_precision.has_autocast(device.type, dtype):
        return model, LossScaler()  # an evaluation, where only the library's training has O1
    if opt_level == 'O1':
        return HalfPrecision(model, dtype, device.type), LossScaler(**scaling)
    pairs = []
    for group in optimizer.param_groups if optimizer is not None else []:
        masters = [nn.Parameter(parameter.detach().clone()) for parameter in group['params']]
        pairs += zip(group['params'], masters)
        group['params'] = masters
    return HalfPrecision(model, dtype), MasterWeightScaler(pairs, **scaling)
