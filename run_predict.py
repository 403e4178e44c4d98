#!/usr/bin/env python3
"""Classify images with a checkpoint of run_class_finetuning.py.

Classes, input size, mean and deviation, and pooling come from the checkpoint. Results are printed, or written with
--output; --attention writes pictures of the model's attention.
"""

if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    import check_flags
    check_flags.check_command_line('run_predict.py', __doc__)

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import sys
import time
from typing import Any, Iterable, Iterator, List, Optional, Sequence, TextIO, Tuple

import torch

import engine_for_finetuning as engine
import flags
from beit import log
from beit.checkpoint import exported
from beit.checkpoint.inference_model import load_for_inference
from beit.cli import exit_process, run_interruptible
from beit.config import DistributedConfig, LoaderConfig
from beit.data import fast_decode
from beit.data.device_loader import PrefetchLoader
from beit.data.loader import SampleDataset, make_loader
from beit.data.prediction_inputs import PathDataset, PathSampler, common_folder
from beit.data.shared_memory import workers_that_fit
from beit.data.transforms import EvalTransform
from beit.devices import accelerator, half_precision
from beit.distributed import collectives, process_group, watchdog
from beit.errors import UserError, escape_text
from beit.outputs import attention_maps
from beit.outputs.features import FeatureHook, FeaturesWriter, encode_features
from beit.outputs.prediction_writers import FORMATS, LineWriter, Prediction, open_output
from beit.training import fused_attention, loss_scaler, metrics
from check_flags import check_early

build_parser = functools.partial(flags.build_parser, flags.PREDICT, __doc__)


def check_args(args: argparse.Namespace) -> None:
    """Check the flags before any slow work, and add the final inputs, output, format and attention_dir."""
    check_early(flags.PREDICT, args)
    exported.drop_flags(args)
    if args.data_backend == 'fast':
        fast_decode.check_available()
    _, processes, local_rank = process_group.launch_environment(flags.config_from(args, DistributedConfig))
    device = accelerator.find_device(args.device, local_rank, processes)
    if device.type == 'cpu':
        half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)


# ---- predicting

@dataclasses.dataclass
class Predictor:
    """Predicts this process's images."""
    model: torch.nn.Module
    loader: PrefetchLoader  # of a `PathDataset`, in the order of `sampler`
    sampler: PathSampler
    top_k: int
    heatmaps: Any  # an attention_maps.HeatmapWriter, or None
    activation: str  # 'softmax' or 'sigmoid', from the network's outputs to probabilities
    features: Optional[FeatureHook]  # records what --features writes

    def predictions(self) -> Iterator[List[Prediction]]:
        """Yield a list for each batch; the device computes the next batch meanwhile."""
        waiting: List[Tuple[Any, ...]] = []
        for batch in self.loader:
            waiting.append(self.compute(batch))
            if len(waiting) > 1:
                yield self.read(*waiting.pop(0))
        for computed in waiting:
            yield self.read(*computed)

    @torch.no_grad()
    def compute(self, batch: Any) -> Tuple[Any, List[Tuple[int, str]], Any, Any, Any]:
        """(batch, its inputs, probabilities and classes on the device, what the hooks recorded of attention, features).
        """
        entries = self.sampler.take(len(batch.images) + len(batch.unreadable))
        if not len(batch.images):
            return batch, entries, None, None, None
        # Padded as in an evaluation: kernels may round differently for another number of rows.
        output = self.model(engine.pad_batch(batch.images, self.loader))[:len(batch.images)].float()
        probabilities = output.sigmoid() if self.activation == 'sigmoid' else output.softmax(-1)
        classes = metrics.top_classes(output, self.top_k)
        top = probabilities.gather(1, classes), classes
        return batch, entries, top, self.heatmaps and self.heatmaps.inputs, self.features and self.features.features

    def read(self, batch: Any, entries: Sequence[Tuple[int, str]], top: Any, attended: Any,
             extracted: Optional[torch.Tensor]) -> List[Prediction]:
        """The `Prediction`s of a batch, from the result of `compute`."""
        rows, unreadable = {}, iter(batch.unreadable)
        if top is not None:
            rows = {number: row for row, number in enumerate(batch.indices[0].tolist())}
            probabilities, classes, resized = top[0].tolist(), top[1].tolist(), batch.targets.tolist()
        pictures: Any = None if self.heatmaps is None or not rows else self.loader.denormalize(batch.images)
        encoded = [] if extracted is None else encode_features(extracted[:len(rows)])
        predictions = []
        for number, path in entries:
            if number not in rows:
                predictions.append(Prediction(number, path, [], [], reason=next(unreadable).reason))
                continue
            row = rows[number]
            heatmap = '' if pictures is None else self.heatmaps.write(path, pictures[row], attended, row)
            predictions.append(Prediction(number, path, classes[row], probabilities[row], heatmap,
                                          resized=bool(resized[row]), features=encoded[row] if encoded else ''))
        return predictions


def gather_ordered(predictions: Iterable[List[Prediction]], device: torch.device) -> Iterator[List[Prediction]]:
    """Yield the lists of all processes, merged batch by batch into the order of the inputs.

    Process r of w has every w-th image, so the k-th batches of all processes are adjacent.
    """
    if process_group.world_size() == 1:
        yield from predictions
        return
    stage, own = ' (predicting, batch %d)', iter(predictions)
    watchdog.enter_stage('predicting')
    for batch in itertools.count():
        watchdog.mark_item(batch, 0, stage)
        lists = collectives.all_gather_json(next(own, None), device)
        if not any(lists):
            watchdog.mark_item(watchdog.LAST, 2, stage)
            return
        yield [Prediction(*each) for each in sorted(itertools.chain(*filter(None, lists)), key=lambda each: each[0])]


def write_predictions(predictor: Predictor, writers: Sequence[LineWriter], input_size: int, shows_progress: bool,
                      device: torch.device) -> Tuple[int, int]:
    """Write the results and report files that were left out. Returns (images read, files left out).

    `shows_progress`: show a bar on a terminal; otherwise flush after each batch.
    """
    from tqdm import tqdm  # slow to import, and not needed for --help

    tqdm.monitor_interval = 0  # no thread may run when processes are forked
    read, left_out, has_resized = 0, 0, False
    with tqdm(desc='Predicting', unit=' images', disable=None if shows_progress else True) as bar:
        for predictions in gather_ordered(predictor.predictions(), device):
            if any(each.resized for each in predictions) and not has_resized:
                has_resized = True
                log.log_main('Note: the model was trained on images of exactly %dx%d; others are resized and cropped'
                             % (input_size, input_size))
            for each in predictions if process_group.is_main_process() else ():
                if each.reason:
                    bar.write('Left out: %s cannot be read as an image (%s)'
                              % (escape_text(each.path), each.reason), file=sys.stderr)
                for writer in writers:
                    writer.write(each)
            left_out += sum(bool(each.reason) for each in predictions)
            read += sum(not each.reason for each in predictions)
            bar.update(len(predictions))
            for writer in () if shows_progress else writers:
                writer.file.flush()
        state = predictor.sampler.state
        if any(each != state for each in collectives.all_gather_json(state, device)):
            raise UserError('the processes did not find the same images; give every machine the same files, and do '
                            'not change them during the run')
    if not read:
        raise UserError('none of the %d images can be read; give other images' % left_out)
    for writer in writers:
        writer.end()
        writer.file.flush()
    return read, left_out


# ---- the program

@contextlib.contextmanager
def open_writers(args: argparse.Namespace, classes: Sequence[str], extra: Sequence[str], stdout: TextIO
                 ) -> Iterator[List[LineWriter]]:
    """Open what the results go to: --features, and --output or, without --features, standard output."""
    with contextlib.ExitStack() as files:
        writers: List[LineWriter] = []
        if args.output or not args.features:
            writers.append((FORMATS[args.format] if args.output else LineWriter)(
                files.enter_context(open_output(args.output, stdout)), classes, args.top_k, extra, args.threshold))
        if args.features:
            writers.append(FeaturesWriter(files.enter_context(open_output(args.features, stdout, '--features'))))
        yield writers


def build_loader(sampler: PathSampler, preprocessing: EvalTransform, data_backend: str, config: LoaderConfig,
                 device: torch.device) -> PrefetchLoader:
    """A loader of the sampler's images; the batch size is at most the number of images.

    Without --num_workers this process loads a single batch itself, which is faster than starting workers.
    """
    found, workers = sampler.first(config.batch_size), config.num_workers
    if workers is None:
        cores = (os.cpu_count() or 1) // process_group.world_size()
        workers = 0 if found < config.batch_size else max(1, min(8, cores))
    workers = workers_that_fit(workers, found * len(preprocessing.mean) * preprocessing.input_size ** 2)
    images = PathDataset(preprocessing, data_backend, config.max_pixels)
    samples = SampleDataset(images, config.bad_images == 'skip')
    return make_loader(samples, preprocessing, device, workers, config.pin_mem, batch_size=found, sampler=sampler)


def main(args: argparse.Namespace, stdout: TextIO) -> None:
    """Predict, and write the results to `stdout`, a text file, or to --output."""
    check_args(args)
    device = process_group.init_distributed_mode(flags.config_from(args, DistributedConfig))
    watchdog.start(args.dist_timeout, flags.PREDICT)
    dtype = half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    loaded = load_for_inference(args.resume, args.use_ema, args.class_names, model=args.model,
                                input_size=args.input_size, crop_pct=args.crop_pct,
                                needs_head=bool(args.output or not args.features))
    heatmaps = None if args.attention is None else attention_maps.HeatmapWriter(
        loaded.model, args.attention_block, None if args.attention == 'auto' else args.attention, args.attention_dir,
        common_folder(args.inputs), args.attention_heads)
    features = FeatureHook(loaded.model, args.layer) if args.features else None
    sampler = PathSampler(args.inputs, {os.path.realpath(args.attention_dir)} if heatmaps else (),
                          process_group.rank(), process_group.world_size())
    loader = build_loader(sampler, loaded.preprocessing, args.data_backend, flags.config_from(args, LoaderConfig),
                          device)
    model, scaler = loss_scaler.initialize_amp(loaded.model.to(device), None, device, dtype, args.opt_level)
    if hasattr(loaded.model, 'blocks'):
        fused_attention.choose_attention(loaded.model, device, 'auto', dtype, loader.batch_size)
    log.log_main('%s: %s, %d classes, input %dx%d, %s; on %s, %s' % (
        escape_text(loaded.source), loaded.config.model, len(loaded.classes), loaded.config.input_size,
        loaded.config.input_size, 'averaged weights' if args.use_ema else 'pooled by the %s' % (
            'mean' if loaded.config.use_mean_pooling else 'class token'), device, scaler.description))

    started = time.time()
    to_file = ' and '.join(escape_text(each) for each in (args.output, args.features) if each not in ('', '-'))
    predictor = Predictor(model.eval(), loader, sampler, args.top_k, heatmaps, loaded.activation, features)
    extra = ['unsure'] * (args.threshold > 0) + ['attention'] * (heatmaps is not None) + [
        'error'] * (args.bad_images == 'skip')
    with open_writers(args, loaded.classes, extra, stdout) as writers:
        shows_progress = args.output != '-' and bool(to_file) and process_group.is_main_process()
        read, left_out = write_predictions(predictor, writers, loaded.config.input_size, shows_progress, device)
    seconds = time.time() - started
    log.log_main('%s in %.1f s (%.0f images/s)%s%s%s' % (
        log.pluralize(read, 'image'), seconds, read / seconds, ', %d left out' % left_out if left_out else '',
        '; results in %s' % to_file if to_file else '',
        '; pictures in %s' % escape_text(args.attention_dir) if heatmaps else ''))


def run(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and run; user errors are one line and exit status 2, a signal gives 128 + its number."""
    stdout = sys.stdout

    def work():
        with contextlib.redirect_stdout(stdout):  # --help
            args = build_parser().parse_args(argv)
        main(args, stdout)
        stdout.flush()  # several processes exit without flushing

    try:
        with contextlib.redirect_stdout(sys.stderr):  # only results go to stdout
            return run_interruptible(flags.PREDICT, work, 'lower --batch_size',
                                     lost=lambda: '; a file for --output is not written')
    except BrokenPipeError:  # the reader of the results has closed the pipe
        return exit_process(128 + signal.SIGPIPE)


if __name__ == '__main__':
    sys.exit(run())
