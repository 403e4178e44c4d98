"""The loops: train one epoch, evaluate, profile a few steps."""

import itertools
import math

import torch
import torch.nn.functional as F

import backend
import distributed
import precision
import run_folder
import utils
import watchdog
from errors import UserError
from pilot import StepMonitor, StepState

run_folder.register_output('prof')

SKIPS_IN_A_ROW = 20
UNREAD_UPDATES = 10  # the most whose outcome may wait on the device


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler=None, max_norm=None,
                    model_ema=None, mixup_fn=None, log_writer=None, start_steps=0, lr_schedule_values=None,
                    wd_schedule_values=None, num_training_steps_per_epoch=None, update_freq=1, throughput=None,
                    seed=None, first_step=0, state=None, monitor=None):
    """Train for one epoch, or for the rest of one.

    Args:
        data_loader: gives `datasets.Batch`es, or (images float32 (B, 3, H, W), class indices int64 (B,)).
        loss_scaler (precision.StepScaler): None is full precision.
        max_norm (float): clip the norm of all gradients to this; None or 0 doesn't.
        start_steps (int): update steps before this epoch, the index into the schedules.
        lr_schedule_values, wd_schedule_values (sequence of float): one per update step of the whole run.
        num_training_steps_per_epoch (int): update steps of the epoch; by default all that the loader gives.
        update_freq (int): micro-steps per update, the loss divided among them.
        seed (int): seed every update's random numbers from this (`utils.seed_step`); None leaves them alone.
        first_step (int): updates of the epoch that were done before; `data_loader` begins behind them.
        state (dict): the averages up to there, as `monitor` was given them.
        monitor (pilot.StepMonitor): handles signals, saves in mid-epoch, unreadable images and non-finite losses.

    Returns:
        dict of the epoch's averages over all processes: loss, class_acc (a share; without mixup, and with one
        class an image), lr, min_lr, weight_decay, grad_norm, loss_scale, and skipped_steps, a count.

    Raises:
        UserError: a loss or gradient is not finite, in any process, or 20 updates in a row were skipped.
        preemption.Stopped: a signal came, and what was reached is saved.
    """
    model.train()
    monitor = monitor or StepMonitor()
    scaler = loss_scaler if loss_scaler is not None else precision.StepScaler()
    meters = utils.MetricLogger()
    for name in ('lr', 'min_lr'):
        meters.add_meter(name, utils.SmoothedValue(window_size=1, fmt='{value:.6f}'))
    for name in ('loss', 'class_acc', 'weight_decay', 'grad_norm', 'loss_scale'):  # the same on every process
        meters.add_meter(name, utils.SmoothedValue())
    if num_training_steps_per_epoch is None:
        num_training_steps_per_epoch = len(data_loader) // update_freq
    micro_steps, first_micro_step = num_training_steps_per_epoch * update_freq, first_step * update_freq
    create_graph = getattr(optimizer, 'is_second_order', False)
    skipped_before = state['skipped_before'] if state else scaler.skipped
    if state:
        meters.load_state(state['meters'])
    if first_step:  # the rates that the last of them left in the optimizer: a checkpoint may come before the next
        set_schedules(optimizer, start_steps + first_step - 1, lr_schedule_values, wd_schedule_values)
    update, unread, line_is_due = None, [], False

    batches = meters.log_every(itertools.islice(data_loader, micro_steps - first_micro_step), micro_steps, 10,
                               'Epoch: [%d]' % epoch, device, distributed.world_size(), throughput,
                               hidden=('loss_scale',), start=first_micro_step)
    optimizer.zero_grad()
    scaler.forget_overflow(device)
    for micro_step, batch in enumerate(batches, first_micro_step):
        update_step = start_steps + micro_step // update_freq
        is_update = (micro_step + 1) % update_freq == 0
        if micro_step % update_freq == 0:
            update = StepState(update_step)
            if seed is not None:
                utils.seed_step(seed, update_step)
        set_schedules(optimizer, update_step, lr_schedule_values, wd_schedule_values)

        images = batch[0].to(device, non_blocking=True)
        targets = batch[1].to(device, non_blocking=True)
        mixed, labels = (images, targets) if mixup_fn is None else mixup_fn(images, targets)

        output = model(mixed if len(mixed) else images.new_zeros((1,) + images.shape[1:]))
        loss = criterion(output, labels) if len(mixed) else output.sum() * 0.  # no image could be read: stay in step
        update.add(batch, output, loss)
        if is_update:
            monitor.begin_sync(update, device)
        update.grad_norm = scaler(loss / update_freq, optimizer, model.parameters(), max_norm, is_update, create_graph)

        has_classes = len(images) and targets.dim() == 1 and not mixup_fn
        class_acc = (output.argmax(-1) == targets).float().mean() if has_classes else None
        update.values = dict(rates(optimizer), loss=loss.detach(), grad_norm=update.grad_norm, loss_scale=scaler.scale,
                             class_acc=class_acc)
        meters.update(**update.values)
        line_is_due = line_is_due or utils.should_log(micro_step, micro_steps)
        if not is_update:
            continue
        optimizer.zero_grad()
        update.skipped = scaler.newest_skipped
        if model_ema is not None:
            model_ema.update(scaler.full_precision_state(model), update.skipped)
        unread.append(update)
        must_read = monitor.finish_sync(update, device) or line_is_due
        if must_read or backend.reads_freely(device) or update.skipped is True or len(unread) >= UNREAD_UPDATES:
            settle(unread, scaler, monitor, log_writer, device)
            unread, line_is_due = [], False
        monitor.after_step(update, epoch, micro_step // update_freq + 1,
                              lambda: dict(meters=meters.state(), skipped_before=skipped_before), device)

    monitor.on_epoch_end(dict(meters=meters.state(), skipped_before=skipped_before))
    meters.synchronize_between_processes(device)
    stats = meters.averages()
    distributed.say('Averaged stats: ' + '  '.join('%s: %.4g' % item for item in stats.items()), detail=True)
    return dict(stats, skipped_steps=scaler.skipped - skipped_before)


def settle(updates, scaler, monitor, log_writer, device):
    """Read from the device what became of these updates, in one copy, and report those that were skipped."""
    numbers = iter(utils.to_floats([number for update in updates for number in (update.grad_norm, update.skipped)]))
    for update in updates:
        left_on_device = torch.is_tensor(update.skipped)
        update.grad_norm, update.skipped = next(numbers), bool(next(numbers))
        if left_on_device:
            scaler.count(update.skipped)
        if log_writer is not None:
            log_update(log_writer, update)
        if update.skipped:
            monitor.skipped(update, scaler, device)
            report_skip(scaler, update.step)
        else:
            monitor.norms.append(update.grad_norm)


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


def report_skip(scaler, update_step):
    what = 'gradients overflowed' if scaler.overflows else 'loss or gradients are not finite'
    distributed.say('Update step %d skipped: its %s (loss scale now %g, %d skipped so far)'
                    % (update_step, what, scaler.scale, scaler.skipped))
    if scaler.skipped_in_a_row >= SKIPS_IN_A_ROW:
        raise UserError('%d updates in a row had %s; lower --lr, %s' % (
            scaler.skipped_in_a_row, 'gradients that overflowed' if scaler.overflows else
            'a loss or gradients that are not finite', 'or use --loss_scale dynamic' if scaler.overflows else
            'or set --clip_grad'))


def log_update(log_writer, update):
    """The scalars of an update's last micro-step to TensorBoard, those that are finite."""
    names = [name for name, value in update.values.items() if value is not None]
    values = zip(names, utils.to_floats([update.values[name] for name in names]))
    values = {name: value for name, value in values if math.isfinite(value)}
    for head, scalars in (('loss', ('loss', 'class_acc')),
                          ('opt', ('loss_scale', 'lr', 'min_lr', 'weight_decay', 'grad_norm'))):
        log_writer.update(head, update.step, **{name: values.get(name) for name in scalars})


LOSS_UNIT = 2. ** -32  # losses are added up as whole multiples of this: the sum does not hang on the order


@torch.no_grad()
def evaluate(data_loader, model, device, sharded=False, throughput=None, wish=None, scores=()):
    """Top-1, top-5 and cross entropy over a validation set, every image counted once.

    Where images have several classes, targets float32 (B, classes), the loss is the binary cross entropy averaged over
    the classes, and there is no top-1 or top-5.

    The figures are the same bits on any number of processes: losses are added up as whole numbers, and a shorter batch
    is filled up, since kernels round otherwise for another number of rows.

    Args:
        sharded (bool): each process's loader holds another part of the set; the counts are added up.
        wish (function): gives the number of a signal that asks to stop, or 0.
        scores (sequence): of `scores`; each is told of every batch, and its result stands beside the others.

    Returns:
        dict of acc1, acc5 (percent), loss (per image), images (the count), the results of `scores`, and unreadable:
        (path, reason) of the files that were left out, on all processes; or None where the evaluation was given up for
        a signal, on any of them.
    """
    model.eval()
    meters = utils.MetricLogger()
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
    all_losses, unreadable, stop = [], [], 0
    processes = distributed.world_size() if sharded else 1
    for batch in meters.log_every(data_loader, len(data_loader), 10, 'Test:', device, processes, throughput):
        stop = wish() if wish else 0
        if stop:
            break
        unreadable += batch[3] if len(batch) > 3 else []
        if not len(batch[0]):
            continue
        images = batch[0].to(device, non_blocking=True)
        targets = batch[1].to(device, non_blocking=True)
        output = model(fill_up(images, data_loader))[:len(images)].float()
        losses, top = losses_and_hits(output, targets)
        for score in scores:
            score.update(batch, output)
        correct += torch.stack((top[:, 0].sum(), top.sum(), top.new_ones(len(top), dtype=torch.int64).sum()))
        all_losses.append(losses)
        acc1 = 100 * top[:, 0].float().mean() if targets.dim() == 1 else None
        meters.update(len(images), loss=losses.mean(), acc1=acc1)
    loss_units, not_finite = sum_losses(all_losses)
    acc1, acc5, images = correct.tolist()
    watchdog.mark(watchdog.LAST, 2, '')
    if wish and distributed.any_process(stop, device):
        return None
    if sharded and distributed.world_size() > 1:
        words = distributed.gather([acc1, acc5, images, loss_units, not_finite, unreadable], device)
        acc1, acc5, images, loss_units, not_finite = (sum(each) for each in list(zip(*words))[:5])
        unreadable = [tuple(pair) for word in words for pair in word[5]]
    if not images:
        raise UserError('none of the validation images can be read; look at them with --check_data')
    loss = float('nan') if not_finite else loss_units * LOSS_UNIT / images
    stats = {'acc1': 100. * acc1 / images, 'acc5': 100. * acc5 / images, 'loss': loss, 'images': images,
             'unreadable': unreadable}
    for score in scores:
        stats.update(score.compute(sharded and distributed.world_size() > 1, device))
    if 'mAP' in stats:
        del stats['acc1'], stats['acc5']
    distributed.say(('* mAP {mAP:.3f} loss {loss:.3f}' if 'mAP' in stats else
                     '* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}').format(**stats), detail=True)
    return stats


def losses_and_hits(output, targets):
    """(loss of each image (B,), whether each of the five highest outputs is of a right class (B, 5))."""
    best = output.topk(min(5, output.shape[1]), dim=1).indices
    if targets.dim() > 1:
        losses = F.binary_cross_entropy_with_logits(output, targets, reduction='none').mean(dim=1)
        return losses, targets.gather(1, best) > 0
    return F.cross_entropy(output, targets, reduction='none'), best == targets[:, None]


class WithMirrorImage(torch.nn.Module):
    """A network whose logits are the mean of those of an image and of its mirror image (--test_flip)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return (self.network(images).float() + self.network(images.flip(3)).float()) / 2


def sum_losses(losses):
    """(sum of the finite ones in `LOSS_UNIT`s, number of the others) of tensors of losses, in one copy."""
    losses = torch.cat(losses).cpu().double() if losses else torch.zeros(0)
    finite = torch.isfinite(losses) & (losses < 2. ** 24)
    return int((losses[finite] / LOSS_UNIT).round().to(torch.int64).sum()), int((~finite).sum())


def fill_up(images, data_loader):
    """A batch that is shorter than the loader's others, with blank images behind."""
    missing = (getattr(data_loader, 'batch_size', None) or 0) - len(images)
    return images if missing <= 0 else torch.cat((images, images.new_zeros((missing,) + images.shape[1:])))


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
