"""The content of a checkpoint, and how a run resumes from one.

Tensors are written as float32 on the CPU, so every device and precision reads them. Files of the reference and of timm
load as well.
"""

import collections
import contextlib
import dataclasses
import os
import time
from typing import Any, Dict, List, Optional

import torch

from beit import model_spec
from beit.checkpoint import discovery
from beit.checkpoint.pretrained import find_state_dict, mismatches, without_temperature
from beit.devices import accelerator, kernels
from beit.distributed import process_group
from beit.errors import UserError, escape_text, one_line
from beit.files import run_folder
from beit.log import log_main, pluralize
from beit.model_spec import ModelSpec, saved_args

run_folder.register_output(r'checkpoint-.*\.pth', proves_run=True)
MODEL_FLAGS = ('model', 'input_size', 'nb_classes', 'rel_pos_bias', 'abs_pos_emb', 'layer_scale_init_value',
               'use_mean_pooling')  # they determine the names and shapes of the weights


# ---- saving

def build_checkpoint(flags: Dict[str, Any], run_state: 'RunState', model: torch.nn.Module,
                     optimizer: torch.optim.Optimizer, scaler: Any, ema: Any = None,
                     spec: Optional[ModelSpec] = None, host: Optional['HostCopies'] = None) -> Dict[str, Any]:
    """The dict to save; it is valid until `host` is used again.

    `classes` and `activation` repeat parts of model_spec for other programs. Random states are not saved: a step's
    random numbers depend on seed, step and process (`utils.seed_step`). `epoch` is the last finished epoch, as in the
    reference's files; `progress` describes an unfinished one.
    """
    host = host or HostCopies()
    content = {
        'model': host.weights('model', scaler.fp32_state_dict(model)),
        'optimizer': host.optimizer(optimizer),
        'epoch': run_state.epoch - 1,
        'scaler': scaler.state_dict(),
        'args': dict(flags),
        'accuracy': dict(run_state.best),
        'progress': {'steps': run_state.steps, 'meters': run_state.meters, 'run': dict(run_state.run),
                     'files': run_state.files, 'stale': run_state.stale, 'origin': run_state.origin,
                     'val_set': run_state.val_set, 'spent': run_state.spent},
        'data': dict(run_state.data),
    }
    if spec is not None:
        content[model_spec.KEY] = spec.to_dict()
        content.update(classes=content[model_spec.KEY]['classes'], activation=spec.activation)
    if ema is not None:
        content['model_ema'] = host.weights('model_ema', ema.ema.state_dict())
    host.finish()
    return content


@dataclasses.dataclass
class RunState:
    """The progress of a run."""
    epoch: int = 0  # the current one
    steps: int = 0  # its finished updates
    meters: List[Dict[str, Any]] = dataclasses.field(default_factory=list)  # its averages, of each process
    best: Dict[str, float] = dataclasses.field(default_factory=dict)  # the best accuracies so far, in percent
    run: Dict[str, Any] = dataclasses.field(default_factory=dict)  # see `comparison.facts_of`
    data: Dict[str, Any] = dataclasses.field(default_factory=dict)  # see `comparison.data_to_save`
    stale: int = 0  # consecutive evaluations without a new best
    val_set: str = ''  # what `best` was measured on, see `comparison.evaluation_id`
    # Seconds of the run; images, seconds, seconds waiting for data, and number of the timed steps.
    spent: List[float] = dataclasses.field(default_factory=lambda: [0.] * 5)
    origin: str = ''  # the --resume that the run started with; --auto_resume compares it
    files: List[str] = dataclasses.field(default_factory=list)  # checkpoints to write after an epoch, in order

    def meters_of(self, rank: int, processes: int) -> Optional[Dict[str, Any]]:
        """The state of a process's averages; if the number of processes changed, the first gets the sum of all."""
        if not self.meters or len(self.meters) == processes:
            return self.meters[rank] if self.meters else None
        merged: Dict[str, Any] = {}
        for state in self.meters if rank == 0 else ():
            for name, (count, total) in state['meters'].items():
                counted, so_far = merged.get(name, (0, 0.))
                merged[name] = (counted + count, so_far + total)
        return dict(self.meters[0], meters=merged)

    def file_name(self) -> str:
        """checkpoint-<finished epoch>.pth, or in mid-epoch checkpoint-<epoch>-step<finished updates>.pth."""
        return 'checkpoint-%d-step%d.pth' % (self.epoch, self.steps) if self.steps \
            else 'checkpoint-%d.pth' % (self.epoch - 1)


STEP_FILES_KEPT = 2  # mid-epoch checkpoints, without --keep_checkpoints: the newest, and one in case it is damaged


def remove_old_checkpoints(folder: str, keep: int) -> None:
    """Keep the `keep` newest numbered checkpoints of each kind (0: all of epochs, `STEP_FILES_KEPT` of mid-epoch)."""
    files = discovery.list_checkpoints(folder)
    for kind, most in ((0, keep), (1, keep or STEP_FILES_KEPT)):
        of_kind = [path for (_, steps), path in files if bool(steps) == kind]
        for path in of_kind[:-most] if most else []:
            with contextlib.suppress(OSError):
                os.remove(path)


class SaveTimer:
    """Decides when to save in mid-epoch: every `steps` updates and every `minutes` (0: never)."""

    def __init__(self, steps=0, minutes=0.):
        self.steps, self.seconds, self.saved = steps, 60 * minutes, time.monotonic()

    def due(self, update_step: int) -> bool:
        """Whether to save after this update of the run, counted from 0. Only the first process reads the clock."""
        by_steps = self.steps and (update_step + 1) % self.steps == 0
        by_clock = self.seconds and process_group.is_main_process() and time.monotonic() - self.saved >= self.seconds
        return bool(by_steps or by_clock)

    def restart(self) -> None:
        self.saved = time.monotonic()


class HostCopies:
    """Copies of tensors in the host's memory, where a save in the background reads them while training changes the
    tensors. The next save overwrites them: memory that is allocated once costs no time again.
    """

    def __init__(self) -> None:
        self.buffers: Dict[Any, torch.Tensor] = {}
        self.used: Dict[Any, torch.Tensor] = {}
        self.device: Optional[torch.device] = None

    def copy(self, key: Any, value: torch.Tensor, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        """A copy of `value` on the CPU; it is complete after `finish`."""
        buffer, dtype = self.buffers.get(key), dtype or value.dtype
        if buffer is None or buffer.shape != value.shape or buffer.dtype != dtype:
            buffer = torch.empty(value.shape, dtype=dtype)
            if value.device.type != 'cpu':
                buffer = buffer.pin_memory()
        self.device = value.device if value.device.type != 'cpu' else self.device
        self.used[key] = buffer.copy_(value.detach(), non_blocking=True)
        return buffer

    def finish(self) -> None:
        """Wait for the copies, and forget buffers that this save did not need."""
        if self.device is not None:
            accelerator.synchronize(self.device)
        self.buffers, self.used = self.used, {}

    def weights(self, part: str, state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """A state dict, with floating-point tensors in float32."""
        return collections.OrderedDict(
            (name, self.copy((part, name), value, torch.float32 if value.is_floating_point() else None))
            for name, value in state.items())

    def optimizer(self, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
        """Optimizer state for any machine and version: tensors on the CPU, `step` as a number."""
        state = optimizer.state_dict()
        if 'slow_state' in state:  # timm 0.4's Lookahead uses the parameters' addresses as keys
            names = {id(parameter): name for group, saved in zip(optimizer.param_groups, state['param_groups'])
                     for parameter, name in zip(group['params'], saved['params'])}
            state['slow_state'] = {names.get(key, key): values for key, values in state['slow_state'].items()}
        for part in ('state', 'slow_state'):
            if part in state:
                state[part] = {key: {name: self._portable((part, key, name), value) for name, value in values.items()}
                               for key, values in state[part].items()}
        state['param_groups'] = [{name: float(value) if torch.is_tensor(value) else value
                                  for name, value in group.items()} for group in state['param_groups']]
        if hasattr(kernels.base_optimizer(optimizer), 'generator'):  # Adahessian's
            state['generator'] = kernels.base_optimizer(optimizer).generator.get_state()
        return state

    def _portable(self, key: Any, value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return float(value) if key[-1] == 'step' else self.copy(key, value)


# ---- resuming

def load_weights(source: str, content: Any, model: torch.nn.Module, scaler: Any, ema: Any, **keys: Any) -> None:
    """Load a checkpoint's weights into the model and, where both have one, the average."""
    state = without_temperature(find_state_dict(content, '--resume', source, **keys)[1], source)
    live = scaler.fp32_state_dict(model)
    problems = mismatches(state, live)
    if problems:
        raise UserError('--resume %s: these are not the weights of this model: %s%s'
                        % (escape_text(source), problems, _trained_with(content, source)))
    for name, tensor in live.items():
        if name in state and not name.endswith('relative_position_index'):
            tensor.copy_(state[name])
    scaler.sync_model_weights()
    if ema is not None:
        # Without an average in the file, the average restarts from the loaded weights.
        average = find_state_dict(content, '--resume', source, use_ema=True)[1] if content.get('model_ema') \
            else scaler.fp32_state_dict(model)
        problems = mismatches(average, ema.ema.state_dict())
        if problems:
            raise UserError('--resume %s: its model_ema does not fit this model: %s' % (escape_text(source), problems))
        ema.ema.load_state_dict({**ema.ema.state_dict(), **average})


def _trained_with(content, source):
    """' (it was trained with --model …)', with the run's args.yaml if it exists; '' if the file holds no flags."""
    args = saved_args(content)
    flags = ['--%s %s' % (name, args[name]) for name in MODEL_FLAGS
             if name in args and (name, args[name]) != ('nb_classes', 0)]
    config = os.path.join(os.path.dirname(source), 'args.yaml')
    if flags and os.path.isfile(config):
        flags[-1] += '; --config %s gives all of its flags' % escape_text(config)
    return ' (it was trained with %s)' % ' '.join(flags) if flags else ''


COUNTERS = ('step', 'lookahead_step')  # some optimizers keep them in their groups, not in each parameter's state


def load_optimizer(source: str, optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load an optimizer's moments. Learning rates and other settings keep the values of this run's flags."""
    kinds = {'betas', 'momentum', 'rho', 'alpha'}  # they distinguish the families of optimizers
    try:
        theirs = state['param_groups']
        if kinds & set(theirs[0] if theirs else ()) != kinds & set(optimizer.param_groups[0]):
            raise ValueError('another kind of optimizer wrote it')
        if len(theirs) != len(optimizer.param_groups):
            raise ValueError('it has %d parameter groups, this run %d' % (len(theirs), len(optimizer.param_groups)))
        groups = [dict({name: value for name, value in mine.items() if name != 'params'}, params=group['params'],
                       **{name: group[name] for name in COUNTERS if type(group.get(name)) in (int, float)})
                  for mine, group in zip(optimizer.param_groups, theirs)]
        _check_moments(optimizer, groups, state['state'])
        optimizer.load_state_dict(dict(
            {name: _copies(state[name]) for name in ('state', 'slow_state') if name in state}, param_groups=groups))
        inner = kernels.base_optimizer(optimizer)
        for values in inner.state.values() if type(inner).__module__.startswith('timm.') else ():
            if type(values.get('step')) is float:  # a tensor before `HostCopies`
                values['step'] = torch.tensor(values['step'])
        if hasattr(inner, 'generator') and 'generator' in state:
            inner.generator = torch.Generator(inner.param_groups[0]['params'][0].device)
            inner.generator.set_state(state['generator'])
        if hasattr(inner, '_momentum_initialized') and state['state']:
            inner._momentum_initialized = True  # otherwise timm 0.4's NovoGrad starts again
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError('--resume %s: its optimizer state does not fit this run (%s); use the --opt and model flags of '
                        'that run, or give the file to --finetune'
                        % (escape_text(source), one_line(error)[:200])) from None


def _copies(states):
    """Copies of the tensors: on a CPU an optimizer would keep tensors of the mapped file, which may be replaced."""
    return {key: {name: value.clone() if torch.is_tensor(value) else value for name, value in values.items()}
            for key, values in states.items()}


def _check_moments(optimizer, groups, state):
    """Raise a ValueError where a moment's shape differs from its parameter's; PyTorch compares only their number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    keys = [key for group in groups for key in group['params']]
    for key, parameter in zip(keys, parameters):
        for name, value in state.get(key, {}).items():
            moment = name in ('exp_avg', 'exp_avg_sq', 'momentum_buffer')
            if moment and not (name == 'momentum_buffer' and value is None) and tuple(value.shape) not in (
                    tuple(parameter.shape), () if name == 'exp_avg_sq' else None):  # NovoGrad's has no dimension
                raise ValueError('%s is %s for a parameter of %s' % (name, tuple(value.shape), tuple(parameter.shape)))
            if name == 'step' and not 0 <= float(value) < 2 ** 53:
                raise ValueError('step is %r' % (value,))


def resume_training(source: str, content: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: Any,
                    ema: Any = None, **keys: str) -> RunState:
    """Resume a run, or start one from a file that holds only weights. `keys`: see `pretrained.find_state_dict`."""
    load_weights(source, content, model, scaler, ema, **keys)
    if not isinstance(content.get('optimizer'), dict) or 'epoch' not in content:
        log_main('Resumed the weights of %s; it holds no optimizer state, so the schedule starts again'
                 % escape_text(source))
        return RunState()
    load_optimizer(source, optimizer, content['optimizer'])
    epoch = content['epoch']
    if not isinstance(epoch, int) or not -1 <= epoch < 2 ** 31:  # the reference's best checkpoint says 'best'
        raise UserError('--resume %s: its epoch is %.40r, not a number; give its weights to --finetune instead'
                        % (escape_text(source), epoch))
    try:
        if isinstance(content.get('scaler'), dict):
            scaler.load_state_dict(content['scaler'])
        inside = content.get('progress') or {}
        best = {str(name): float(value) for name, value in (content.get('accuracy') or {}).items()}
        meters = [{'meters': {str(name): [int(count), float(total)] for name, (count, total) in each['meters'].items()},
                   'skipped_before': int(each['skipped_before']), 'counts_images': bool(each.get('counts_images'))}
                  for each in inside.get('meters', ())]
        run_state = RunState(epoch + 1, int(inside.get('steps', 0)), meters, best, dict(inside.get('run') or {}),
                             stale=int(inside.get('stale', 0)), origin=str(inside.get('origin', '')),
                             val_set=str(inside.get('val_set', '')),
                             spent=list(map(float, inside.get('spent', RunState().spent))))
        if run_state.steps < 0 or bool(run_state.steps) != bool(meters) or len(run_state.spent) != 5:
            raise ValueError('its averages do not fit %d steps' % run_state.steps)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise UserError('--resume %s: its scaler, accuracy or progress is invalid (%s); give its weights to --finetune '
                        'instead' % (escape_text(source), one_line(error)[:200])) from None
    log_main('Resumed %s: %s%s' % (escape_text(source), 'epoch %d is done' % run_state.epoch if not run_state.steps else
                                   '%s of epoch %d' % (pluralize(run_state.steps, 'update'), run_state.epoch + 1),
                                   ', best ' * bool(best) + discovery.best_text(best)))
    return run_state
