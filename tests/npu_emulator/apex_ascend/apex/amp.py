"""`apex.amp`: O0, O1 and O2 with float16 weights, float32 masters, static and dynamic loss scale, combined gradients.

It keeps the pitfalls of the real one:

* `initialize` casts the model in place and replaces the optimizer's `step` and `zero_grad`; the first
  `zero_grad` or `scale_loss` puts the masters into the optimizer;
* O1 with a static scale of 1 changes nothing: no gradient is unscaled, none combined;
* a static scale never looks for an overflow; a dynamic one skips the next `step` and halves itself;
* gradients reach the masters at the end of `scale_loss`, unless `delay_unscale` is set;
* with `combine_grad` gradients are in one buffer: a replaced gradient is never read.
"""

import contextlib
import functools
import types
import warnings

import torch

_scalers = []
_settings = types.SimpleNamespace(opt_level='O0', master_weights=False)

GROWTH_INTERVAL = 2000


class _LossScaler:
    def __init__(self, loss_scale, min_loss_scale, max_loss_scale):
        self.dynamic = loss_scale == 'dynamic'
        self.scale = min(max_loss_scale, 2. ** 16) if self.dynamic else float(loss_scale)
        self.smallest, self.largest = min_loss_scale, max_loss_scale
        self.unskipped, self.overflow = 0, False

    def update(self):
        """Change a dynamic scale after a step; returns whether to skip that step."""
        skip = self.overflow and self.dynamic
        if skip:
            self.scale = self.scale / 2 if self.smallest is None else max(self.smallest, self.scale / 2)
            self.unskipped = 0
        else:
            self.unskipped += 1
        if self.dynamic and self.unskipped == GROWTH_INTERVAL:
            self.scale, self.unskipped = min(self.largest, self.scale * 2), 0
        return skip


def _overflow_flag(tensor):
    """The overflow flag of an NPU that saturates; None on devices whose overflow gives inf."""
    module = getattr(torch, tensor.device.type, None)
    supports = getattr(getattr(module, 'utils', None), 'is_support_inf_nan', None)
    if supports is None or supports():
        return None
    found = module.utils.get_npu_overflow_flag()
    module.utils.clear_npu_overflow_flag()
    return found


def initialize(models, optimizers=None, enabled=True, opt_level='O1', cast_model_type=None, patch_torch_functions=None,
               keep_batchnorm_fp32=None, master_weights=None, loss_scale=None, cast_model_outputs=None, num_losses=1,
               verbosity=1, min_loss_scale=None, max_loss_scale=2. ** 24, combine_grad=None, combine_ddp=None,
               ddp_replica_count=4, check_combined_tensors=None, user_cast_preferred=None):
    """Cast one model and, unless it is None, prepare its optimizer: (model, optimizer), or the model alone."""
    if opt_level not in ('O0', 'O1', 'O2'):
        raise RuntimeError('Unexpected optimization level ' + str(opt_level))
    if isinstance(models, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError('Incoming model is an instance of torch.nn.parallel.DistributedDataParallel. '
                           'Parallel wrappers should only be applied to the model(s) AFTER the model(s) have been '
                           'returned from amp.initialize.')
    for name, parameter in models.named_parameters():
        if parameter.dtype != torch.float32:
            raise RuntimeError('Found param %s with type %s, expected float32.' % (name, parameter.dtype))
        if parameter.device.type == 'cpu':
            raise RuntimeError('Found param %s on the CPU: move the model to the device first.' % name)
    _settings.opt_level = opt_level if enabled else 'O0'
    if not enabled or opt_level == 'O0':
        loss_scale = 1. if loss_scale is None else loss_scale
    scaler = _LossScaler('dynamic' if loss_scale is None else loss_scale, min_loss_scale, max_loss_scale)
    _scalers[:] = [scaler]
    if _settings.opt_level == 'O1':
        models.forward = _under_autocast(models.forward, next(models.parameters()).device.type)
    if _settings.opt_level == 'O2':
        models.half()
        models.forward = _half_in_float_out(models.forward)
    if optimizers is None:
        return models
    _prepare(optimizers, with_masters=_settings.opt_level == 'O2', combine=bool(combine_grad))
    return models, optimizers


def _under_autocast(forward, device_type):
    @functools.wraps(forward)
    def call(*inputs, **options):
        with torch.autocast(device_type, dtype=torch.float16):
            return forward(*inputs, **options)
    return call


def _half_in_float_out(forward):
    @functools.wraps(forward)
    def call(*inputs, **options):
        return forward(*(value.half() for value in inputs), **options).float()
    return call


# ---- the optimizer

def _prepare(optimizer, with_masters, combine):
    stash = types.SimpleNamespace(pairs=[], combine=combine, flat=None, model_params=[], masters=with_masters,
                                  prepared=False)
    optimizer._amp_stash = stash
    optimizer._plain_step = optimizer.step

    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError('Currently, Amp does not support closure use with optimizers.')
        result = self._plain_step()
        for parameter, master in stash.pairs:
            parameter.data.copy_(master.data)
        return result

    def zero_grad(self, set_to_none=False):
        _make_masters(self)
        for parameter in stash.model_params:
            _forget(parameter, stash.combine)
        for _, master in stash.pairs:
            _forget(master, stash.combine)

    def clip_optimizer_grad_norm_fused(self, max_norm, norm_type=2):
        if not stash.combine:
            raise RuntimeError('clip_optimizer_grad_norm_fused needs amp.initialize(..., combine_grad=True)')
        if stash.flat is None:
            raise RuntimeError('stack expects a non-empty TensorList')  # nothing has been combined
        norm = torch.norm(stash.flat, norm_type)
        factor = max_norm / (norm + 1e-6)
        if factor < 1:
            stash.flat.mul_(factor)
        return norm

    for function in (step, zero_grad, clip_optimizer_grad_norm_fused):
        setattr(optimizer, function.__name__, types.MethodType(function, optimizer))


def _make_masters(optimizer):
    """The lazy initialisation of the real one."""
    stash = optimizer._amp_stash
    if stash.prepared:
        return
    stash.prepared = True
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group['params']):
            stash.model_params.append(parameter)
            if stash.masters:
                master = torch.nn.Parameter(parameter.detach().clone().float())
                group['params'][position] = master
                stash.pairs.append((parameter, master))
                if parameter in optimizer.state:
                    optimizer.state[master] = optimizer.state.pop(parameter)
    if stash.masters:
        optimizer.load_state_dict(optimizer.state_dict())  # casts the state to the masters' type


def _forget(parameter, in_place):
    if parameter.grad is not None and in_place:
        parameter.grad.zero_()
    else:
        parameter.grad = None


def _combine(stash):
    """Put the optimizer's gradients into one buffer, once; later gradients outside it are never read."""
    owners = [master if stash.masters else parameter
              for parameter, master in (stash.pairs or [(p, p) for p in stash.model_params])
              if parameter.grad is not None]
    if stash.flat is None:
        stash.flat = torch.zeros(sum(p.numel() for p in owners), device=owners[0].device)
        offset = 0
        for owner in owners:
            part = stash.flat[offset:offset + owner.numel()].view_as(owner)
            if owner.grad is not None:
                part.copy_(owner.grad)
            owner.grad = part
            offset += owner.numel()


def _unscale(stash, scaler):
    """Unscale the model's gradients into the optimizer's. Only a dynamic scale checks for overflow."""
    found = [p.grad for p in stash.model_params if p.grad is not None]
    if not found:
        raise RuntimeError('no gradients: backward was not called inside scale_loss')
    flag = _overflow_flag(found[0]) if scaler.dynamic else None
    scaler.overflow = scaler.dynamic and (
        flag if flag is not None else not all(bool(torch.isfinite(gradient).all()) for gradient in found))
    if stash.combine:
        _combine(stash)
    for parameter, master in stash.pairs:
        if parameter.grad is not None:
            unscaled = parameter.grad.float() / scaler.scale
            if master.grad is None:
                master.grad = unscaled
            else:
                master.grad.copy_(unscaled)  # the model's gradients hold all micro-steps since zero_grad
    if not stash.pairs:
        for parameter in stash.model_params:
            if parameter.grad is not None:
                parameter.grad.div_(scaler.scale)


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    """The scaled loss for backward; the exit unscales the gradients or prepares a skipped step."""
    if not _scalers:
        raise RuntimeError('Invoked `with amp.scale_loss`, but internal Amp state has not been initialized. '
                           'model, optimizer = amp.initialize(model, optimizer, opt_level=...) must be called first')
    if _settings.opt_level == 'O0':
        yield loss
        return
    scaler, stash = _scalers[loss_id], optimizers._amp_stash
    _make_masters(optimizers)
    if not stash.masters and not scaler.dynamic and scaler.scale == 1.:
        yield loss.float()
        return
    yield loss.float() * scaler.scale
    if delay_unscale:
        return
    _unscale(stash, scaler)
    if not delay_overflow_check and scaler.update():
        usual = optimizers.step

        def skip_step(self, closure=None):
            self.step = usual

        optimizers.step = types.MethodType(skip_step, optimizers)
        print('Gradient overflow.  Skipping step, loss scaler 0 reducing loss scale to %s' % scaler.scale)


def master_params(optimizer):
    """The parameters that the optimizer changes: the float32 masters under O2."""
    for group in optimizer.param_groups:
        yield from group['params']


def state_dict(destination=None):
    return {'loss_scaler%d' % index: {'loss_scale': scaler.scale, 'unskipped': scaler.unskipped}
            for index, scaler in enumerate(_scalers)}


def load_state_dict(state):
    if len(state) != len(_scalers):
        warnings.warn('state_dict contains %d entries, while %d loss_scalers are used' % (len(state), len(_scalers)),
                      stacklevel=2)
    for index, scaler in enumerate(_scalers):
        entry = state['loss_scaler%d' % index]
        scaler.scale, scaler.unskipped = entry['loss_scale'], entry['unskipped']
