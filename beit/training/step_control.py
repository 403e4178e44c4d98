"""Actions between two updates, which all processes agree on: save, stop, report unusable images and losses."""

import collections
import functools
import itertools
import json
import math
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from beit.checkpoint import training_state
from beit.config import OutputConfig
from beit.data.image_dataset import image_name
from beit.data.unreadable import UnreadableFiles
from beit.distributed import collectives, preemption, process_group, watchdog
from beit.errors import UserError
from beit.files import run_folder, weights_file
from beit.files.atomic_write import write_bytes
from beit.log import log_main

run_folder.register_output(r'nonfinite\.txt')

NORMS_KEPT = 10  # gradient norms in a report of a non-finite loss


class StepState:
    """An update in progress. Tensors stay on the device until they are needed."""

    def __init__(self, step: int) -> None:
        self.step = step  # counted from 0 over the whole run
        self.losses: List[torch.Tensor] = []  # of its micro-steps, means over the readable images
        self.images: List[int] = []  # readable images of each micro-step
        self.images_of_all = 0  # readable images of all processes, after `finish_sync`
        self.outputs: List[torch.Tensor] = []
        self.indices: List[torch.Tensor] = []  # in the data set, of the images of these outputs
        self.unreadable: List[Tuple[str, str]] = []  # (path, reason) of skipped files
        self.grad_norm: Any = None  # float or 0-dim tensor
        self.skipped: Any = False  # bool or 0-dim tensor
        self.values: Dict[str, Any] = {}  # to log, from its last micro-step: numbers and 0-dim tensors
        self.stop = 0  # the number of a signal that a process received
        self.save = False  # a checkpoint is due in some process

    def add(self, batch: Sequence[Any], output: torch.Tensor, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        self.images.append(len(batch[0]))
        if len(batch) > 2:
            self.outputs.append(output.detach())
            self.indices.append(batch[2])
            self.unreadable += batch[3]

    @property
    def loss(self) -> float:
        """The mean over the images of this process, copied from the device."""
        losses = torch.stack(self.losses)
        return float((losses * losses.new_tensor(self.images)).sum() / max(sum(self.images), 1))

    def nonfinite_indices(self) -> List[int]:
        """Indices of the images with a non-finite output; all indices if every output is finite."""
        found = []
        for indices, output in zip(self.indices, self.outputs):
            rows = (~torch.isfinite(output.float()).flatten(1).all(dim=1)).cpu()[:len(indices)]
            found += indices[rows].tolist()
        return found or [index for indices in self.indices for index in indices.tolist()]


class CheckpointMonitor:
    """Decides the outcome of an update, together with all processes, which call each method at the same point.

    It saves in mid-epoch and at a signal, stops at a non-finite loss, and writes reports to output_dir.

    Args:
        output: the folder and interval of checkpoints, and the flags that they hold.
        signals: the source of requests to stop.
        run_state: the start of the run; updated with its progress.
        bad_images: collects unreadable files.
        parts: model, optimizer, scaler and ema, for `training_state.build_checkpoint`.
        on_nonfinite: 'stop' at a non-finite loss, or 'skip' the update.
    """

    def __init__(self, output: Optional[OutputConfig] = None, signals: Optional[preemption.Signals] = None,
                 run_state: Optional[training_state.RunState] = None, bad_images: Optional[UnreadableFiles] = None,
                 train_set: Any = None, parts: Optional[Dict[str, Any]] = None, on_nonfinite: str = 'stop') -> None:
        self.output, self.signals = output or OutputConfig(), signals or preemption.Signals()
        self.run_state, self.parts = run_state or training_state.RunState(), parts or {}
        self.bad_images: Any = bad_images
        self.train_set, self.on_nonfinite = train_set, on_nonfinite
        self.saves = bool(self.output.output_dir and self.output.save_ckpt)
        self.timer = training_state.SaveTimer(self.output.save_ckpt_steps, self.output.save_ckpt_minutes)
        self.spent: Callable[[], List[float]] = lambda: self.run_state.spent  # of the whole run, until now
        self.saving, self.host = weights_file.BackgroundSave(), training_state.HostCopies()
        self.epoch_state: Optional[Dict[str, Any]] = None  # the averages of the last complete epoch
        self.norms: Any = collections.deque(maxlen=NORMS_KEPT)  # gradient norms of the last updates
        self.wait: Any = None  # waits for [stop, save, images read, files] of each process in this update

    def __enter__(self) -> 'CheckpointMonitor':
        return self

    def __exit__(self, *_: Any) -> None:
        """Whatever ends the training, a save that has begun is completed."""
        self.saving.join()

    def begin_sync(self, update: StepState, device: torch.device) -> None:
        """Before the step: send this process's requests; the others' arrive while the step runs."""
        watchdog.mark_waiting()
        self.saving.check()
        images = sum(update.images)
        self.wait = functools.lru_cache(maxsize=None)(collectives.all_gather_async(
            [self.signals.stop_signal, self.saves and self.timer.due(update.step), images,
             images + len(update.unreadable)], device))

    def grad_factor(self) -> float:
        """Turns a sum over images, divided by the number of files, into a mean over readable images; 0 without any."""
        _, _, images, files = (sum(column) for column in zip(*self.wait()))
        return files / images if images else 0.

    def finish_sync(self, update: StepState, device: torch.device) -> bool:
        """After the step: store the requests of all processes in `update`; returns whether it saves or stops."""
        stops, saves, images, files = zip(*self.wait())
        update.stop, update.save, update.images_of_all = int(max(stops)), any(saves), int(sum(images))
        if images != files:
            unreadable = collectives.all_gather_json(update.unreadable, device)
            if self.bad_images is not None:
                self.bad_images.report(itertools.chain(*unreadable), len(self.train_set), 'training')
        return bool(update.stop or update.save)

    def name_images(self, indices: List[int]) -> List[str]:
        """Printable names of images, by their indices in the data set."""
        return [] if self.train_set is None else [image_name(self.train_set, index) for index in indices]

    def skipped(self, update: StepState, scaler: Any, device: torch.device) -> None:
        """Handle a skipped update, on every process: an error unless an overflow explains it."""
        losses = [loss for loss, in collectives.all_gather_numbers([update.loss], device)]
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad and scaler.overflows:
            return
        named = [] if bad and math.isfinite(update.loss) else self.name_images(update.nonfinite_indices())
        images = list(itertools.chain(*collectives.all_gather_json(named, device)))
        what = '%s at update step %d' % (
            'the loss is %s' % losses[bad[0]] if bad else
            'the gradients are not finite (their norm is %s, the loss %.4f)' % (update.grad_norm, update.loss),
            update.step)
        where = self.write_report(dict(update_step=update.step, what=what, loss_scale=scaler.scale, images=images,
                                       norms=[repr(norm) for norm in self.norms]))
        shown = ', '.join(images[:3]) + (' and %d more' % (len(images) - 3) if len(images) > 3 else '')
        text = '%s; loss scale %g; norms of the gradients before: %s%s' % (
            what, scaler.scale, ' '.join('%.4g' % norm for norm in self.norms) or 'none yet',
            '; images: %s%s' % (shown, where) if images else '')
        if self.on_nonfinite == 'skip':
            log_main(text)
            return
        self.wait_for_save()  # the launcher ends the other processes after an error line
        raise UserError(text + '; lower --lr, set --clip_grad, look at the images, or --on_nonfinite skip',
                        rank=bad[0] if bad and process_group.world_size() > 1 else None)

    def write_report(self, record: Dict[str, Any]) -> str:
        """Add a record to nonfinite.txt; returns ' (all in FILE)', or '' without an output_dir."""
        if not self.output.output_dir:
            return ''
        path = os.path.join(self.output.output_dir, 'nonfinite.txt')
        if process_group.is_main_process():
            earlier = ''
            if os.path.isfile(path):
                with open(path, encoding='utf-8') as file:
                    earlier = file.read()
            write_bytes(path, (earlier + json.dumps(record) + '\n').encode())
        process_group.barrier()  # before a process ends the job
        return ' (all in %s)' % path

    def after_step(self, update: StepState, epoch: int, steps: int, state: Callable[[], Dict[str, Any]],
                   device: torch.device) -> None:
        """Save or stop if `update` requests it. `steps`: of the epoch so far; `state()`: what a resumed epoch needs."""
        if update.stop or update.save:
            self.save(epoch, steps, state(), device)
        if update.stop:
            self.stop(update.stop, epoch, steps)

    def save(self, epoch: int, steps: int, state: Optional[Dict[str, Any]], device: torch.device) -> None:
        """Write a checkpoint in mid-epoch, on the first process, with the averages of every process."""
        self.run_state.epoch, self.run_state.steps, self.run_state.files = epoch, steps, []
        if self.saves:
            watchdog.enter_stage('saving a checkpoint')
            self.run_state.meters = collectives.all_gather_json(state, device)
            self._write([self.run_state.file_name()])

    def _write(self, names: List[str]) -> None:
        """Copy the checkpoint to host memory, and start to write it, under each of the names."""
        self.run_state.spent = self.spent()
        if process_group.is_main_process():
            self.saving.wait()
            content = training_state.build_checkpoint(self.output.flags, self.run_state, host=self.host, **self.parts)
            self.saving.start(functools.partial(self._write_files, content, names))
        watchdog.mark_waiting()
        self.timer.restart()

    def _write_files(self, content: Dict[str, Any], names: List[str]) -> None:
        first, *others = [os.path.join(self.output.output_dir, name) for name in names]
        weights_file.save(first, content)
        for path in others:
            weights_file.save_copy(path, first, content)
        training_state.remove_old_checkpoints(self.output.output_dir, self.output.keep_checkpoints)

    def wait_for_save(self) -> None:
        """Wait, in every process, until the last save is complete."""
        watchdog.enter_stage('saving a checkpoint')
        self.saving.wait()
        watchdog.mark_waiting()
        process_group.barrier()

    def save_epoch(self, improved: List[str], numbered: bool) -> None:
        """After an epoch and its evaluation: write the new bests, and the numbered checkpoint if it is due."""
        self.run_state.files = improved + ([self.run_state.file_name()] if numbered else [])
        if self.saves and self.run_state.files:
            watchdog.enter_stage('saving a checkpoint')
            self._write(self.run_state.files)

    def stop_after(self, epoch: int, steps: int, device: torch.device) -> None:
        """Stop after the updates of an epoch, if a signal interrupted its evaluation."""
        number = int(max(stop for stop, in collectives.all_gather_numbers([self.signals.stop_signal], device)))
        self.save(epoch, steps, self.epoch_state, device)
        self.stop(number, epoch, steps)

    def stop(self, number: int, epoch: int, steps: int) -> None:
        outcome = 'nothing was saved, without --output_dir or with --no_save_ckpt'
        if self.saves:
            self.wait_for_save()
            outcome = 'saved %s; the same command%s continues from there' % (
                os.path.join(self.output.output_dir, self.run_state.file_name()),
                '' if self.output.auto_resume else ' with --auto_resume')
        raise preemption.Stopped(number, 'stopped by %s after update %d of epoch %d; %s' % (
            preemption.name(number), steps, epoch + 1, outcome))
