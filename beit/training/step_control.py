"""What happens between two updates, as all processes agree: save, stop, report what cannot be used."""

import collections
import functools
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

NORMS_KEPT = 10  # gradient norms that a report of what is not finite shows


class StepState:
    """An update in progress. Values on the device stay there until they must be read."""

    def __init__(self, step: int) -> None:
        self.step = step  # its number, from 0 over the whole run
        self.losses: List[torch.Tensor] = []  # of its micro-steps, means over the images that were read
        self.images: List[int] = []  # that were read in each micro-step
        self.files = 0  # that were to be read
        self.images_of_all = 0  # that all processes read, from `finish_sync` on
        self.outputs: List[torch.Tensor] = []
        self.indices: List[torch.Tensor] = []  # of the images that gave those outputs, in the data set
        self.unreadable: List[Tuple[str, str]] = []  # (path, reason) of files that were left out
        self.grad_norm: Any = None  # float or 0-dim tensor
        self.skipped: Any = False  # bool or 0-dim tensor
        self.values: Dict[str, Any] = {}  # what is logged of its last micro-step: numbers and 0-dim tensors
        self.stop = 0  # the number of a signal that some process got
        self.save = False  # some process is due to save

    def add(self, batch: Sequence[Any], output: torch.Tensor, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        self.images.append(len(batch[0]))
        self.files += len(batch[0])
        if len(batch) > 2:
            self.outputs.append(output.detach())
            self.indices.append(batch[2])
            self.unreadable += batch[3]
            self.files += len(batch[3])

    @property
    def loss(self) -> float:
        """The mean over the images of this process, read from the device."""
        losses = torch.stack(self.losses)
        return float((losses * losses.new_tensor(self.images)).sum() / max(sum(self.images), 1))

    def nonfinite_indices(self) -> List[int]:
        """Positions of the images whose outputs are not finite; of all, where every output is finite."""
        found = []
        for indices, output in zip(self.indices, self.outputs):
            rows = (~torch.isfinite(output.float()).all(dim=1)).cpu()[:len(indices)]
            found += indices[rows].tolist()
        return found or [index for indices in self.indices for index in indices.tolist()]


class StepMonitor:
    """Decides, with all processes, what becomes of an update; this one stops at the first non-finite loss.

    `run_class_finetuning.py` gives one that saves, too. Every process calls each method at the same place.
    """

    on_nonfinite = 'stop'

    def __init__(self) -> None:
        self.norms: Any = collections.deque(maxlen=NORMS_KEPT)  # of the last updates' gradients
        self.requests: Any = None  # gives those of all processes, once they are there
        self.votes: Optional[List[List[float]]] = None  # what it gave

    def local_requests(self, update_step: int) -> Tuple[int, bool]:
        """(signal that asks to stop or 0, whether to save after this update), of this process."""
        return 0, False

    def begin_sync(self, update: StepState, device: torch.device) -> None:
        """Before the step: send this process's requests to the others; the answers arrive while the step runs."""
        watchdog.mark_waiting()
        stop, save = self.local_requests(update.step)
        self.requests, self.votes = collectives.all_gather_async(
            [stop, save, sum(update.images), update.files], device), None

    def wait(self) -> List[List[float]]:
        """[stop, save, images read, files] of each process in this update."""
        if self.votes is None:
            self.votes = self.requests()
        return self.votes

    def grad_factor(self) -> float:
        """What turns a sum over images that was divided by all files into a mean over those read; 0 without any."""
        _, _, images, files = (sum(column) for column in zip(*self.wait()))
        return files / images if images else 0.

    def finish_sync(self, update: StepState, device: torch.device) -> bool:
        """After the step: put the requests of all processes into `update`; return whether it saves or stops."""
        stops, saves, images, files = zip(*self.wait())
        update.stop, update.save, update.images_of_all = int(max(stops)), any(saves), int(sum(images))
        if images != files:
            pairs_of_each = collectives.all_gather_json(update.unreadable, device)
            self.unreadable([(path, reason) for pairs in pairs_of_each for path, reason in pairs])
        return bool(update.stop or update.save)

    def unreadable(self, pairs: List[Tuple[str, str]]) -> None:
        """Files, (path, reason), that no process could read."""

    def name_images(self, indices: List[int]) -> List[str]:
        """Printable names of images, by their positions in the data set."""
        return []

    def skipped(self, update: StepState, scaler: Any, device: torch.device) -> None:
        """An update was skipped, on every process. Where no overflow is to be expected, something is wrong."""
        losses = [loss for loss, in collectives.all_gather_numbers([update.loss], device)]
        nonfinite = [not math.isfinite(loss) for loss in losses]
        if not any(nonfinite) and scaler.overflows:
            return
        names = collectives.all_gather_json(self.name_images(update.nonfinite_indices())
                                            if not any(nonfinite) or not math.isfinite(update.loss) else [], device)
        images = [name for names_of_process in names for name in names_of_process]
        what = '%s at update step %d' % (
            'the loss is %s' % losses[nonfinite.index(True)] if any(nonfinite) else
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
        raise UserError(text + '; lower --lr, set --clip_grad, look at the images, or --on_nonfinite skip',
                        rank=nonfinite.index(True) if any(nonfinite) and process_group.world_size() > 1 else None)

    def write_report(self, record: Dict[str, Any]) -> str:
        """Write a record to a file; returns ' (all in …)', or ''."""
        return ''

    def after_step(self, update: StepState, epoch: int, steps: int, state: Callable[[], Dict[str, Any]],
                   device: torch.device) -> None:
        """After the step: save or stop, where `update` says so. `steps` of the epoch are done; `state()` returns what
        a resumed epoch needs."""

    def on_epoch_end(self, state: Dict[str, Any]) -> None:
        """All updates of the epoch are done."""


class CheckpointMonitor(StepMonitor):
    """The monitor of a whole run: saves in mid-epoch, and before it stops for a signal; writes reports to output_dir.

    Args:
        output: where to save, how often, and the flags that a checkpoint holds.
        signals: where the request to stop comes from.
        run_state: where the run begins; kept up to date.
        bad_images: takes the files that can't be read.
        parts: model, optimizer, scaler and ema, as `training_state.build_checkpoint` takes them.
        on_nonfinite: 'stop', or 'skip' such an update.
    """

    def __init__(self, output: OutputConfig, signals: preemption.Signals, run_state: training_state.RunState,
                 bad_images: UnreadableFiles, train_set: Any, parts: Dict[str, Any],
                 on_nonfinite: str = 'stop') -> None:
        super().__init__()
        self.output, self.signals, self.run_state, self.parts = output, signals, run_state, parts
        self.bad_images, self.train_set, self.on_nonfinite = bad_images, train_set, on_nonfinite
        self.saves = bool(output.output_dir and output.save_ckpt)
        self.timer = training_state.SaveTimer(output.save_ckpt_steps, output.save_ckpt_minutes)
        self.spent: Callable[[], List[float]] = lambda: run_state.spent  # so far, of the whole run
        self.saving, self.host = weights_file.BackgroundSave(), training_state.HostCopies()
        self.epoch_state: Optional[Dict[str, Any]] = None  # the averages of the epoch whose updates are done

    def __enter__(self) -> 'CheckpointMonitor':
        return self

    def __exit__(self, *_: Any) -> None:
        """Whatever ends the training, a save that has begun is completed."""
        self.saving.join()

    def local_requests(self, update_step: int) -> Tuple[int, bool]:
        self.saving.check()
        return self.signals.stop_signal, self.saves and self.timer.due(update_step)

    def unreadable(self, pairs: List[Tuple[str, str]]) -> None:
        self.bad_images.report(pairs, len(self.train_set), 'training')

    def name_images(self, indices: List[int]) -> List[str]:
        return [image_name(self.train_set, index) for index in indices]

    def write_report(self, record: Dict[str, Any]) -> str:
        if not self.output.output_dir:
            return ''
        path = os.path.join(self.output.output_dir, 'nonfinite.txt')
        if process_group.is_main_process():
            earlier = ''
            if os.path.isfile(path):
                with open(path, encoding='utf-8') as file:
                    earlier = file.read()
            write_bytes(path, (earlier + json.dumps(record) + '\n').encode())
        process_group.barrier()  # one of them ends the job next
        return ' (all in %s)' % path

    def after_step(self, update: StepState, epoch: int, steps: int, state: Callable[[], Dict[str, Any]],
                   device: torch.device) -> None:
        if update.stop or update.save:
            self.save(epoch, steps, state(), device)
        if update.stop:
            self.stop(update.stop, epoch, steps)

    def on_epoch_end(self, state: Dict[str, Any]) -> None:
        self.epoch_state = state

    def save(self, epoch: int, steps: int, state: Optional[Dict[str, Any]], device: torch.device) -> None:
        """Write a checkpoint of mid-epoch, by the first process; every process hands in its averages."""
        self.run_state.epoch, self.run_state.steps, self.run_state.files = epoch, steps, []
        if self.saves:
            watchdog.enter_stage('saving a checkpoint')
            self.run_state.meters = collectives.all_gather_json(state, device)
            self._write([self.run_state.file_name()])

    def _write(self, names: List[str]) -> None:
        """Copy what is saved, and start to write it: the same content under each of the names."""
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
        """After an epoch and its evaluation: the files of new bests, and the numbered one where it is due."""
        self.run_state.files = improved + ([self.run_state.file_name()] if numbered else [])
        if self.saves and self.run_state.files:
            watchdog.enter_stage('saving a checkpoint')
            self._write(self.run_state.files)

    def stop_after(self, epoch: int, steps: int, device: torch.device) -> None:
        """Stop after the updates of an epoch, where a signal interrupted its evaluation."""
        number = int(max(stop for stop, in collectives.all_gather_numbers([self.signals.stop_signal], device)))
        self.save(epoch, steps, self.epoch_state, device)
        self.stop(number, epoch, steps)

    def stop(self, number: int, epoch: int, steps: int) -> None:
        outcome = 'nothing was saved, for want of --output_dir (or by --no_save_ckpt)'
        if self.saves:
            self.wait_for_save()
            outcome = 'saved %s; the same command%s goes on from there' % (
                os.path.join(self.output.output_dir, self.run_state.file_name()),
                '' if self.output.auto_resume else ' with --auto_resume')
        raise preemption.Stopped(number, 'stopped by %s after update %d of epoch %d; %s' % (
            preemption.name(number), steps, epoch, outcome))
