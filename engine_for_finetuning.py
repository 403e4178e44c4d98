"""The loops: train one epoch, evaluate, profile a few updates."""

import dataclasses
import itertools
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

import utils
from beit.devices import accelerator, profiler
from beit.distributed import collectives, process_group, watchdog
from beit.errors import UserError
from beit.files import run_folder
from beit.log import log_main
from beit.training.loss_scaler import LossScaler
from beit.training.metrics import Loss, Metric, TopAccuracy
from beit.training.step_control import CheckpointMonitor, StepState

run_folder.register_output('prof')

SKIPS_IN_A_ROW = 20
UNREAD_UPDATES = 10  # whose outcome may stay on the device, at most
RATE: Dict[str, Any] = dict(window_size=1, fmt='{value:.4g}')  # in a line, the newest learning rate


@dataclasses.dataclass
class EpochSettings:
    """Settings of `train_one_epoch`: first the reference's arguments, in its order."""
    max_norm: Optional[float] = None  # clip the norm of all gradients to this; None or 0: no clipping
    model_ema: Optional[utils.ModelEma] = None
    mixup_fn: Optional[Callable] = None
    log_writer: Optional[utils.TensorboardLogger] = None
    start_steps: int = 0  # update steps before this epoch, the index into the schedules
    lr_schedule_values: Optional[Sequence[float]] = None  # one per update step of the whole run
    wd_schedule_values: Optional[Sequence[float]] = None
    num_training_steps_per_epoch: Optional[int] = None  # update steps; by default the whole loader
    update_freq: int = 1  # micro-steps per update, the loss divided among them
    throughput: Optional[utils.Throughput] = None
    seed: Optional[int] = None  # seeds every update (`utils.seed_step`); None: no seeding
    first_step: int = 0  # updates of this epoch before a resume; the loader starts after them
    state: Optional[Dict[str, Any]] = None  # the averages of those updates, from the checkpoint
    monitor: Optional[CheckpointMonitor] = None  # signals, saves in mid-epoch, unreadable images, non-finite losses


def train_one_epoch(model: torch.nn.Module, criterion: Callable, data_loader: Any,
                    optimizer: torch.optim.Optimizer, device: torch.device, epoch: int,
                    loss_scaler: Optional[LossScaler] = None, *settings: Any,
                    **named_settings: Any) -> Dict[str, float]:
    """Train for one epoch, or for the rest of one.

    Args:
        data_loader: yields `loader.Batch`es, or (images float32 (B, 3, H, W), class indices int64 (B,)).
        loss_scaler: None is full precision.
        settings, named_settings: the fields of `EpochSettings`, by position or by name.

    Returns:
        The epoch's averages over all processes: loss, class_acc (0 to 1; only without mixup and with one class per
        image), lr, min_lr, weight_decay, grad_norm, loss_scale, and skipped_steps, a count.

    Raises:
        UserError: a loss or gradient is not finite, in any process, or 20 updates in a row were skipped.
        preemption.Stopped: after a signal and a checkpoint.
    """
    config = EpochSettings(*settings, **named_settings)
    model.train()
    monitor, update_freq = config.monitor or CheckpointMonitor(), config.update_freq or 1
    scaler = loss_scaler if loss_scaler is not None else LossScaler()
    meters = training_meters(config.state, getattr(data_loader, 'batch_size', None) or 1)
    skipped_before = config.state['skipped_before'] if config.state else scaler.skipped
    updates = config.num_training_steps_per_epoch
    micro_steps = (len(data_loader) // update_freq if updates is None else updates) * update_freq
    first_micro_step, start_steps = config.first_step * update_freq, config.start_steps or 0
    create_graph = getattr(optimizer, 'is_second_order', False)
    schedules = config.lr_schedule_values, config.wd_schedule_values
    if first_micro_step:  # the rates of the last update before the resume, for a checkpoint before the next one
        set_schedules(optimizer, start_steps + config.first_step - 1, *schedules)
    unread: List[StepState] = []
    line_is_due = False

    def state() -> Dict[str, Any]:
        return dict(meters=meters.state(), skipped_before=skipped_before, counts_images=True)

    # Without --bad_images skip, a step does not depend on the image counts of the other processes.
    grad_factor = monitor.grad_factor if getattr(getattr(data_loader, 'dataset', None), 'skips', True) else None
    timer = utils.StepTimer(device, process_group.world_size(), config.throughput)
    batches = meters.log_every(itertools.islice(data_loader, micro_steps - first_micro_step), micro_steps,
                               'Epoch: [%d]' % epoch, timer, first_micro_step)
    optimizer.zero_grad()
    scaler.clear_overflow(device)
    for micro_step, batch in enumerate(batches, first_micro_step):
        update_step = start_steps + micro_step // update_freq
        is_update = (micro_step + 1) % update_freq == 0
        if micro_step % update_freq == 0:
            update = StepState(update_step)
            if config.seed is not None:
                utils.seed_step(config.seed, update_step)
        set_schedules(optimizer, update_step, *schedules)
        output, loss, accuracy = forward(model, criterion, batch, config.mixup_fn, device)
        update.add(batch, output, loss)
        if is_update:
            monitor.begin_sync(update, device)
        update.grad_norm = scaler(loss / loss_divisor(batch, update_freq), optimizer, model.parameters(),
                                  config.max_norm, is_update, create_graph, grad_factor)
        means = dict(loss=loss.detach() if len(batch[0]) else None, class_acc=accuracy)
        update.values = dict(current_rates(optimizer), grad_norm=update.grad_norm, loss_scale=scaler.scale)
        meters.update(**update.values)
        meters.update(len(batch[0]), **means)
        update.values.update(means)
        line_is_due = line_is_due or utils.should_log(micro_step, micro_steps)
        if not is_update:
            continue
        optimizer.zero_grad()
        update.skipped = scaler.last_skipped
        if config.model_ema is not None:
            config.model_ema.update(scaler.fp32_state_dict(model), update.skipped, update_step)
        unread.append(update)
        must_read = monitor.finish_sync(update, device) or line_is_due
        if must_read or accelerator.is_synchronous(device) or update.skipped is True or len(unread) >= UNREAD_UPDATES:
            read_updates(unread, scaler, monitor, config.log_writer, device)
            unread, line_is_due = [], False
        monitor.after_step(update, epoch, micro_step // update_freq + 1, state, device)

    monitor.epoch_state = state()
    meters.synchronize_between_processes(device)
    stats = meters.averages()
    log_main('Averaged stats: ' + '  '.join('%s: %.4g' % item for item in stats.items()), detail=True)
    return dict(stats, skipped_steps=scaler.skipped - skipped_before)


def forward(model: torch.nn.Module, criterion: Callable, batch: Sequence[Any], mixup: Optional[Callable],
            device: torch.device) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """(output, mean loss, accuracy from 0 to 1 or None) of a micro-step, on the device.

    Without a readable image the loss is 0, with gradients: the other processes wait for this one's.
    """
    images = batch[0].to(device, non_blocking=True)
    targets = batch[1].to(device, non_blocking=True)
    if not len(images):
        output = model(images.new_zeros((1,) + images.shape[1:]))
        return output, output.sum() * 0., None
    mixed, labels = (images, targets) if mixup is None else mixup(images, targets)
    output = model(mixed)
    has_accuracy = mixup is None and targets.dim() == 1 and output.dim() == 2  # else several classes, or several heads
    accuracy = (output.argmax(-1) == targets).float().mean() if has_accuracy else None
    return output, criterion(output, labels), accuracy


def loss_divisor(batch: Sequence[Any], update_freq: int) -> float:
    """Divides the mean loss of a micro-step, for a sum over micro-steps that is the mean over an update's files."""
    unreadable = len(batch[3]) if len(batch) > 3 else 0
    return update_freq * (len(batch[0]) + unreadable) / len(batch[0]) if unreadable and len(batch[0]) else update_freq


def training_meters(state: Optional[Dict[str, Any]], batch_size: int) -> utils.MetricLogger:
    """Meters of an epoch, the same names on every process.

    `state` holds the updates before a resume. An earlier version counted batches instead of images.
    """
    meters = utils.MetricLogger()
    for name in ('lr', 'min_lr', 'loss', 'class_acc', 'weight_decay', 'grad_norm', 'loss_scale'):
        meters.meters[name] = utils.SmoothedValue(**(RATE if name in ('lr', 'min_lr') else {}))
    if state:
        meters.load_state({name: [part * batch_size for part in totals] if name in ('loss', 'class_acc') and not
                           state.get('counts_images') else totals for name, totals in state['meters'].items()})
    return meters


def read_updates(updates: List[StepState], scaler: LossScaler, monitor: CheckpointMonitor, log_writer: Any,
                 device: torch.device) -> None:
    """Copy the outcomes of updates from the device at once, and report skipped updates."""
    numbers = iter(utils.to_floats([number for update in updates for number in (update.grad_norm, update.skipped)]))
    for update in updates:
        left_on_device = torch.is_tensor(update.skipped)
        update.grad_norm, update.skipped = next(numbers), bool(next(numbers))
        if left_on_device:
            scaler.count(update.skipped)
        if log_writer is not None:
            log_update(log_writer, update)
        if update.skipped and not update.images_of_all:
            log_main('Update step %d skipped: none of its images could be read' % update.step)
        elif update.skipped:
            monitor.skipped(update, scaler, device)
            report_skip(scaler, update.step)
        else:
            monitor.norms.append(update.grad_norm)


def set_schedules(optimizer: torch.optim.Optimizer, update_step: int, lr_values: Optional[Sequence[float]] = None,
                  wd_values: Optional[Sequence[float]] = None) -> None:
    """Set each group's learning rate to value * lr_scale, and the weight decay of the groups with weight decay."""
    for group in optimizer.param_groups:
        if lr_values is not None:
            group['lr'] = float(lr_values[update_step]) * group.get('lr_scale', 1.)
        if wd_values is not None and group.get('decays', group['weight_decay'] > 0):
            group['weight_decay'] = float(wd_values[update_step])


def current_rates(optimizer: torch.optim.Optimizer) -> Dict[str, float]:
    """The groups' highest and lowest learning rate, and their weight decay."""
    lrs = [group['lr'] for group in optimizer.param_groups]
    decays = [group['weight_decay'] for group in optimizer.param_groups if group['weight_decay'] > 0]
    return dict(lr=max(lrs), min_lr=min(lrs), weight_decay=decays[-1] if decays else 0.)


def report_skip(scaler: LossScaler, update_step: int) -> None:
    log_main('Update step %d skipped: its %s (loss scale now %g, %d skipped so far)' % (
        update_step, 'gradients overflowed' if scaler.overflows else 'loss or gradients are not finite', scaler.scale,
        scaler.skipped))
    if scaler.skipped_in_a_row >= SKIPS_IN_A_ROW:
        raise UserError('%d updates in a row had %s' % (
            scaler.skipped_in_a_row, 'gradients that overflowed; lower --lr, or use --loss_scale dynamic'
            if scaler.overflows else 'a loss or gradients that are not finite; lower --lr, or set --clip_grad'))


def log_update(log_writer: Any, update: StepState) -> None:
    """Write the finite scalars of an update's last micro-step to TensorBoard."""
    values = {name: value for name, value in update.values.items() if value is not None}
    for name, value in zip(values, utils.to_floats(values.values())):
        if math.isfinite(value):
            log_writer.update('loss' if name in ('loss', 'class_acc') else 'opt', update.step, **{name: value})


@torch.no_grad()
def evaluate(data_loader: Any, model: torch.nn.Module, device: torch.device, sharded: bool = False,
             throughput: Optional[utils.Throughput] = None, stop_signal: Optional[Callable[[], int]] = None,
             metrics: Optional[List[Metric]] = None) -> Optional[Dict[str, Any]]:
    """Top-1, top-5 and loss over a validation set, or other `metrics`; every image counts once.

    The figures are bitwise equal for any number of processes: short batches are padded, because kernels may round
    differently for another number of rows.

    Args:
        sharded: each process's loader holds another part of the set.
        stop_signal: returns the number of a signal that asks to stop, or 0.

    Returns:
        The metrics' figures, by default acc1, acc5 (percent), loss (per image), images (the count); and unreadable:
        (path, reason) of the skipped files of all processes. None if a signal stopped the evaluation.
    """
    model.eval()
    metrics = [TopAccuracy(), Loss()] if metrics is None else metrics
    sharded = sharded and process_group.world_size() > 1
    meters = utils.MetricLogger()
    meters.meters['loss'] = utils.SmoothedValue()  # first in the line, as in training
    timer = utils.StepTimer(device, process_group.world_size() if sharded else 1, throughput)
    seen, unreadable, stop = 0, [], 0  # type: int, List[Any], int
    for batch in meters.log_every(data_loader, len(data_loader), 'Test:', timer):
        stop = stop_signal() if stop_signal else 0
        if stop:
            break
        unreadable += batch[3] if len(batch) > 3 else []
        if not len(batch[0]):
            continue
        images = batch[0].to(device, non_blocking=True)
        targets = batch[1].to(device, non_blocking=True)
        output = model(pad_batch(images, data_loader))[:len(images)].float()
        for metric in metrics:
            meters.update(len(images), **metric.update((images, targets) + tuple(batch[2:]), output) or {})
        seen += len(images)
    watchdog.mark_item(watchdog.LAST, 2, '')
    if stop_signal and collectives.any_process(stop, device):
        return None
    parts: List[Any] = collectives.all_gather_json([seen, unreadable], device) if sharded else [[seen, unreadable]]
    if not any(images for images, _ in parts):
        raise UserError('none of the validation images can be read; --check_data lists the reasons')
    stats = {}
    for metric in metrics:
        stats.update(metric.compute(sharded, device))
    return dict(stats, unreadable=[tuple(pair) for _, pairs in parts for pair in pairs])


class EvaluatedNetwork(torch.nn.Module):
    """A network as an evaluation uses it; `outputs` are the logits to return, in this order (None: all).

    With `flip` (--test_flip) it averages the logits of each image and its mirror image.
    """

    def __init__(self, network: torch.nn.Module, flip: bool = False, outputs: Optional[Sequence[int]] = None) -> None:
        super().__init__()
        self.network, self.flip, self.outputs = network, flip, outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images).float()
        if self.flip:
            logits = (logits + self.network(images.flip(3)).float()) / 2
        return logits if self.outputs is None else logits[:, self.outputs]


def pad_batch(images: torch.Tensor, data_loader: Any) -> torch.Tensor:
    """Pad a short batch with blank images to the loader's batch size."""
    missing = (getattr(data_loader, 'batch_size', None) or 0) - len(images)
    return images if missing <= 0 else torch.cat((images, images.new_zeros((missing,) + images.shape[1:])))


def profile(folder: str, device: torch.device, model: torch.nn.Module, data_loader: Any, update_freq: int = 1,
            cann: bool = False, **training: Any) -> None:
    """Profile 5 updates, after a warm-up, and write the trace to `folder`; `cann` chooses the NPU's own profiler."""
    def train(steps: int) -> None:
        train_one_epoch(model=model, data_loader=data_loader, device=device, epoch=0, update_freq=update_freq,
                        num_training_steps_per_epoch=min(steps, len(data_loader) // update_freq), **training)

    train(2)
    with profiler.profiler(device, folder, process_group.rank(), cann):
        train(5)
    log_main('Profile of 5 updates: %s (%s)' % (folder, 'open it with MindStudio Insight' if cann else
                                                'open trace_rank*.json at chrome://tracing or ui.perfetto.dev'))
