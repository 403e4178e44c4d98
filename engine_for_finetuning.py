"""The loops: train one epoch, evaluate, profile a few steps."""

import itertools
import math

import torch
import torch.nn.functional as F

import backend
import distributed
import precision
import utils
from errors import UserError

SKIPS_IN_A_ROW = 20


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler=None, max_norm=None,
                    model_ema=None, mixup_fn=None, log_writer=None, start_steps=0, lr_schedule_values=None,
                    wd_schedule_values=None, num_training_steps_per_epoch=None, update_freq=1, throughput=None):
    """Train for one epoch.

    Args:
        data_loader: gives (images float32 (B, 3, H, W), class indices int64 (B,)).
        loss_scaler (precision.StepScaler): None is full precision.
        max_norm (float): clip the norm of all gradients to this; None or 0 doesn't.
        start_steps (int): update steps before this epoch, the index into the schedules.
        lr_schedule_values, wd_schedule_values (sequence of float): one per update step of the whole run.
        num_training_steps_per_epoch (int): update steps to take; by default all that the loader gives.
        update_freq (int): micro-steps per update, the loss divided among them.

    Returns:
        dict of the epoch's averages over all processes: loss, class_acc (a share; without mixup), lr, min_lr,
        weight_decay, grad_norm, loss_scale, and skipped_steps, a count.

    Raises:
        UserError: a loss is not finite, in any process, or 20 updates in a row were skipped.
    """
    model.train()
    scaler = loss_scaler if loss_scaler is not None else precision.StepScaler()
    meters = utils.MetricLogger()
    for name in ('lr', 'min_lr'):
        meters.add_meter(name, utils.SmoothedValue(window_size=1, fmt='{value:.6f}'))
    for name in ('loss', 'class_acc', 'weight_decay', 'grad_norm'):
        meters.add_meter(name, utils.SmoothedValue())
    if num_training_steps_per_epoch is None:
        num_training_steps_per_epoch = len(data_loader) // update_freq
    micro_steps = num_training_steps_per_epoch * update_freq
    create_graph = getattr(optimizer, 'is_second_order', False)
    skipped_before, skips_in_a_row, step_loss = scaler.skipped, 0, 0.

    batches = meters.log_every(itertools.islice(data_loader, micro_steps), micro_steps, 10, 'Epoch: [%d]' % epoch,
                               device, distributed.world_size(), throughput, hidden=('loss_scale',))
    optimizer.zero_grad()
    scaler.forget_overflow(device)
    for micro_step, (images, targets) in enumerate(batches):
        update_step = start_steps + micro_step // update_freq
        is_update = (micro_step + 1) % update_freq == 0
        set_schedules(optimizer, update_step, lr_schedule_values, wd_schedule_values)

        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        mixed, labels = (images, targets) if mixup_fn is None else mixup_fn(images, targets)

        output = model(mixed)
        loss = criterion(output, labels)
        loss_value = loss.item()
        step_loss += loss_value
        grad_norm = scaler(loss / update_freq, optimizer, model.parameters(), max_norm, is_update, create_graph)

        if is_update:
            stop_if_not_finite(step_loss, update_step, device)
            step_loss = 0.
            optimizer.zero_grad()
            skips_in_a_row = skips_in_a_row + 1 if scaler.skipped_last else 0
            if scaler.skipped_last:
                report_skip(scaler, update_step, skips_in_a_row)
            elif model_ema is not None:
                model_ema.update(scaler.full_precision_state(model))

        values = dict(rates(optimizer), loss=loss_value, grad_norm=finite_or_none(grad_norm), loss_scale=scaler.scale,
                      class_acc=None if mixup_fn else (output.argmax(-1) == targets).float().mean().item())
        log_values(meters, log_writer if is_update else None, update_step, values)

    meters.synchronize_between_processes(device)
    stats = meters.averages()
    distributed.say('Averaged stats: ' + '  '.join('%s: %.4g' % item for item in stats.items()))
    return dict(stats, skipped_steps=scaler.skipped - skipped_before)


def set_schedules(optimizer, update_step, lr_values=None, wd_values=None):
    """Give each group its learning rate, value times lr_scale, and its weight decay where it has any."""
    for group in optimizer.param_groups:
        if lr_values is not None:
            group['lr'] = float(lr_values[update_step]) * group.get('lr_scale', 1.)
        if wd_values is not None and group.get('decays', group['weight_decay'] > 0):
            group['weight_decay'] = float(wd_values[update_step])


def rates(optimizer):
    """The highest and lowest learning rate of the groups, and their weight decay."""
    lrs = [group['lr'] for group in optimizer.param_groups]
    decays = [group['weight_decay'] for group in optimizer.param_groups if group['weight_decay'] > 0]
    return dict(lr=max(lrs), min_lr=min(lrs), weight_decay=decays[-1] if decays else 0.)


def stop_if_not_finite(step_loss, update_step, device):
    """End the run, on every process, where any process's loss is infinite or not a number."""
    mine = not math.isfinite(step_loss)
    if distributed.any_process(mine, device):
        raise UserError('the loss is %s at update step %d; lower --lr, set --clip_grad, or look at the data'
                        % (step_loss if mine else 'not finite on another process', update_step))


def report_skip(scaler, update_step, skips_in_a_row):
    distributed.say('Update step %d skipped: its gradients overflowed (loss scale now %g, %d skipped so far)'
              % (update_step, scaler.scale, scaler.skipped))
    if skips_in_a_row >= SKIPS_IN_A_ROW:
        raise UserError('%d updates in a row had gradients that overflowed; lower --lr, or use --loss_scale dynamic'
                        % skips_in_a_row)


def finite_or_none(value):
    return value if value is not None and math.isfinite(value) else None


def log_values(meters, log_writer, update_step, values):
    meters.update(**values)
    if log_writer is not None:
        log_writer.update('loss', update_step, loss=values['loss'], class_acc=values['class_acc'])
        log_writer.update('opt', update_step, **{name: values[name] for name in (
            'loss_scale', 'lr', 'min_lr', 'weight_decay', 'grad_norm')})


@torch.no_grad()
def evaluate(data_loader, model, device, sharded=False, throughput=None):
    """Top-1, top-5 and cross entropy over a validation set, every image counted once.

    Args:
        sharded (bool): each process's loader holds another part of the set; the counts are added up.

    Returns:
        dict of acc1, acc5 (percent), loss (per image) and images (the count).
    """
    model.eval()
    meters = utils.MetricLogger()
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
    loss_sum = 0.
    processes = distributed.world_size() if sharded else 1
    for images, targets in meters.log_every(data_loader, len(data_loader), 10, 'Test:', device, processes, throughput):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        output = model(images).float()
        losses = F.cross_entropy(output, targets, reduction='none')
        top = output.topk(min(5, output.shape[1]), dim=1).indices == targets[:, None]
        correct += torch.stack((top[:, 0].sum(), top.sum(), top.new_ones(len(top), dtype=torch.int64).sum()))
        loss_sum += losses.cpu().double().sum().item()
        meters.update(loss=losses.mean().item(), acc1=100 * top[:, 0].float().mean().item())
    acc1, acc5, images = correct.tolist()
    if sharded:
        acc1, acc5, images, loss_sum = distributed.sum_over_processes((acc1, acc5, images), loss_sum, device)
    stats = {'acc1': 100. * acc1 / images, 'acc5': 100. * acc5 / images, 'loss': loss_sum / images, 'images': images}
    distributed.say('* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}'.format(**stats))
    return stats


def profile(folder, device, model, data_loader, update_freq=1, cann=False, warmup_updates=2, updates=5, **training):
    """Profile a few updates, after a few that compile and fill caches, and write the trace into `folder`.

    Args:
        cann (bool): by torch_npu's profiler; else a Chrome trace.
        training: the other arguments of `train_one_epoch`.
    """
    def train(steps):
        train_one_epoch(model=model, data_loader=data_loader, device=device, epoch=0, update_freq=update_freq,
                        num_training_steps_per_epoch=min(steps, len(data_loader) // update_freq), **training)

    train(warmup_updates)
    with backend.profiler(device, folder, distributed.rank(), cann):
        train(updates)
    distributed.say('Profile of %d updates: %s (%s)' % (
        updates, folder, 'open it with MindStudio Insight' if cann else 'open trace_rank*.json at chrome://tracing '
                                                                        'or ui.perfetto.dev'))
