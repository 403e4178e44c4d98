#!/usr/bin/env python3
"""Fine-tune or evaluate a BEiT image classifier.

    python run_class_finetuning.py --data_path demo --model beit_nano_patch8_32 --input_size 32 …
    python run_class_finetuning.py --data_path /data/ImageNet2012 --finetune checkpoints/weights.pth --output_dir out
    python run_class_finetuning.py --data_path /data/ImageNet2012 --resume out --eval

The scripts in test/ call this with the published hyper-parameters. BEiT base fine-tuned for 30 epochs on 8 NPUs reached
85.238 % top-1 (the Ascend adaptation's figure; not measured by this project).
"""

if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    import check_flags
    check_flags.check_command_line('run_class_finetuning.py', __doc__)

import argparse
import dataclasses
import datetime
import functools
import gc
import os
import sys
import time
import zlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

import datasets
import engine_for_finetuning as engine
import flags
import optim_factory
import utils
from beit import log, model_spec
from beit.checkpoint import comparison, discovery, inference_model, pretrained, training_state
from beit.checkpoint.inference_model import CheckpointWeights
from beit.cli import run_interruptible
from beit.config import (
    DistributedConfig, InputConfig, MixupConfig, ModelConfig, OptimizerConfig, OutputConfig, TransformConfig)
from beit.data import fingerprint, locations, subsets, transforms, unreadable
from beit.data.image_dataset import ImageDataset
from beit.data.transforms import EvalTransform
from beit.data.unreadable import LIST, UnreadableFiles
from beit.devices import accelerator, half_precision, kernels
from beit.distributed import collectives, preemption, process_group, watchdog
from beit.errors import UserError, escape_text, refuse, required_output
from beit.files import archives, run_folder
from beit.model_spec import ModelSpec
from beit.outputs import run_log, start_table
from beit.outputs.report import Report, augmented_samples
from beit.outputs.run_log import count_parameters, print_result, project_version, speed_figures
from beit.training import fused_attention, loss_scaler, losses, metrics, temperature
from beit.training.confusion import ConfusionMatrix
from beit.training.losses import build_criterion
from beit.training.step_control import CheckpointMonitor
from check_flags import check_args, check_data_paths
from flags import build_parser, config_from, evaluates_checkpoint, evaluation_sets, follow_checkpoint, without_effect

ROBUST_CLASSES = 200  # of ImageNet-R and ImageNet-A


@dataclasses.dataclass
class Data:
    """The data sets of a run, their loaders, and the spec of the model that is trained or evaluated on them."""
    train_set: Optional[ImageDataset]
    val_set: Optional[ImageDataset]
    spec: ModelSpec
    class_weights: Optional[torch.Tensor]  # in the loss, float32 (classes,)
    steps_per_epoch: int  # updates; 0 for an evaluation
    outputs: Optional[List[int]] = None  # the model's outputs that are evaluated, in this order; None: all
    path: str = ''  # of the set to evaluate
    train_loader: Any = None
    val_loader: Any = None
    layers: int = 0  # the heads of a linear probe

    @property
    def classes(self) -> List[str]:
        known = self.spec.classes
        return list(known) if self.outputs is None else [known[output] for output in self.outputs]


@dataclasses.dataclass
class Learner:
    """The model of a run, its optimizer, and how they compute."""
    model: torch.nn.Module  # in DistributedDataParallel if several processes train
    optimizer: Any  # a torch.optim.Optimizer; None for an evaluation
    scaler: loss_scaler.LossScaler
    ema: Optional[utils.ModelEma]
    device: torch.device
    dtype: Optional[torch.dtype]  # of half precision; None is float32
    attention: str  # the kernel's name
    last_scores: List[str] = dataclasses.field(default_factory=list)  # the lines of the newest evaluation


def main(args: argparse.Namespace, signals: preemption.Signals) -> None:
    check_args(args)
    if args.check_data:
        with required_output('the result of --check_data'):
            check_data(args)
        return
    device = start(args)
    in_place = temperature.folder_of(args.resume) if args.calibrate and not args.output_dir else ''
    with run_folder.locked(args.output_dir, device), run_folder.locked(in_place, device, '--calibrate in'):
        train_or_evaluate(args, signals, device)


def train_or_evaluate(args: argparse.Namespace, signals: preemption.Signals, device: torch.device) -> None:
    """The run, while it holds the lock of its folder, or of the folder whose checkpoint it calibrates."""
    checkpoint = load_checkpoint(args, device)
    dtype = choose_precision(args, device)
    utils.seed_everything(args.seed)
    output = config_from(args, OutputConfig, flags=dict(vars(args)))

    sets = [prepare_data(args, device, checkpoint, path=path) for path in evaluation_sets(args)]
    data = sets[0]
    learner = build_learner(args, build_model(args, data, checkpoint), checkpoint, device, dtype)
    report = build_report(args, output, data, learner)
    if args.eval:
        with required_output('' if args.output_dir or args.results_file else 'the figures of the evaluation'):
            start_table.show(report.environment, output.flags, data, learner.attention)
            evaluate_only(args, sets, learner, report, checkpoint)
    else:
        resume_and_train(args, signals, data, learner, report, checkpoint)


def resume_and_train(args: argparse.Namespace, signals: preemption.Signals, data: Data, learner: Learner,
                     report: Report, checkpoint: Optional[CheckpointWeights]) -> None:
    """Train from a checkpoint, or from the start without one."""
    run_state = resume(args, data, learner, checkpoint)
    source = checkpoint.source if checkpoint else ''
    start_table.show(report.environment, report.output.flags, data, learner.attention, data.steps_per_epoch, source)
    prepare_folder(args, source, run_state)
    update_freezing(args, accelerator.unwrap(learner.model), run_state.epoch)

    training = build_training(args, data, learner)
    distribute(learner)
    if args.prof or args.cann_prof:
        engine.profile(os.path.join(args.output_dir or '.', 'prof'), learner.device, learner.model,
                       cann=args.cann_prof, **training)
        return
    parts = dict(model=accelerator.unwrap(learner.model), optimizer=learner.optimizer, scaler=learner.scaler,
                 ema=learner.ema, spec=data.spec)
    bad_images = UnreadableFiles(args.output_dir, args.max_bad_images)
    monitor = CheckpointMonitor(report.output, signals, run_state, bad_images, data.train_set, parts,
                                args.on_nonfinite)
    with signals.deferred(), monitor:
        train(args, training, data, learner, monitor, report)


# ---- steps of main

def start(args: argparse.Namespace, program: str = flags.TRAINING) -> torch.device:
    """Connect this process to the others; returns its device."""
    if args.deterministic:
        accelerator.prepare_determinism()
    device = process_group.init_distributed_mode(config_from(args, DistributedConfig))
    watchdog.start(args.dist_timeout, program)
    log.start_display()
    accelerator.set_compile_mode(device, args.jit_compile)
    if args.deterministic:
        accelerator.make_deterministic(device)
    return device


def check_data(args: argparse.Namespace) -> None:
    """Decode every image. Raises `UserError` with the number of unreadable images and of empty class folders."""
    if process_group.launch_environment(config_from(args, DistributedConfig))[0] != 0:
        return  # the first process decodes all of them
    parts = [part for path in evaluation_sets(args)
             for part in datasets.build_datasets(config_from(args, InputConfig, eval_data_path=path))[:2]]
    with run_folder.locked(args.output_dir):
        damaged, empty = unreadable.check_data(parts, args.num_workers, args.output_dir)
    listed = ', listed in %s' % os.path.join(args.output_dir, LIST) if args.output_dir else ''
    refuse(damaged, args, 'check_data', ': %s cannot be read%s; repair or remove the files, or leave them out with '
           '--bad_images skip, and a --max_bad_images above their share' % (log.pluralize(damaged, 'image'), listed))
    refuse(empty, args, 'check_data', ': %s without an image; add images or remove the folders'
           % log.pluralize(empty, 'class folder'))


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> Optional[CheckpointWeights]:
    """The checkpoint of --resume or --auto_resume, the same on every process; None without one.

    For an evaluation, the flags that were not given take the checkpoint's values.
    """
    path, content = discovery.load_agreed(args.resume, config_from(args, OutputConfig), device,
                                          for_evaluation=args.eval)
    if content is None:
        return None
    keys = dict(model_key=args.model_key, model_prefix=args.model_prefix)
    if not args.eval:
        return inference_model.read_weights(path, content, trains=True, **keys)
    saved = model_spec.saved_args(content)
    if args.eval_data_path or args.val_csv or archives.isdir(locations.part_of(args.data_path, 'val')):
        saved = {name: value for name, value in saved.items() if name != 'val_split'}
    given = args.given & {field.name for kind in (ModelConfig, TransformConfig) for field in dataclasses.fields(kind)}
    given |= args.given & {'loss'} if args.loss != 'auto' else set()
    differ = follow_checkpoint(args, saved, path)
    if differ:
        log.log_main('Flags that differ from %s: %s' % (escape_text(path), ', '.join(differ)))
    checkpoint = inference_model.read_weights(path, content, class_names=args.class_names, defaults=vars(args), **keys,
                                              **{name: getattr(args, name) for name in given})
    if args.calibrate:
        temperature.calibrated_path(checkpoint, args.output_dir)  # what cannot be written is refused now
    vars(args).update(checkpoint.spec.flags, loss=checkpoint.spec.loss)
    if args.model_ema and not content.get('model_ema'):
        log.log_main('%s holds no averaged weights' % escape_text(path))
        args.model_ema = False
    check_data_paths(args)
    return checkpoint


def choose_precision(args: argparse.Namespace, device: torch.device) -> Optional[torch.dtype]:
    """The half-precision dtype, or None. Float32 replaces a checkpoint's dtype that this device lacks, with a line."""
    try:
        return half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    except UserError as error:
        if not evaluates_checkpoint(args) or args.given & {'amp', 'opt_level', 'amp_dtype'}:
            raise
        log.log_main('The checkpoint was trained in half precision; here it is evaluated in float32: %s' % error)
        args.amp = False
        return None


def prepare_data(args: argparse.Namespace, device: torch.device, checkpoint: Optional[CheckpointWeights],
                 preprocessing: Optional[EvalTransform] = None, path: Optional[str] = None) -> Data:
    """Build the data sets, their loaders, their class weights and the spec of the model.

    `preprocessing` is that of the weights that a linear probe starts from; `path` is one of --eval_data_path.
    """
    known = checkpoint.spec if checkpoint and args.eval else None
    inputs = config_from(args, InputConfig, evaluation=known.preprocessing if known else preprocessing,
                         eval_data_path=path, **(dict(nb_classes=0) if known else {}))
    held_out = comparison.held_out_before(checkpoint.source, checkpoint.content, args.val_split, args.seed) \
        if checkpoint else None
    train_set, val_set, classes = datasets.build_datasets(
        inputs, device, list(known.classes) if known and known.has_class_names else None, known and known.multi_label,
        held_out)
    if process_group.is_main_process():
        fingerprint.report_shared_files(train_set, val_set)
    spec = known or build_spec(args, inputs, val_set if train_set is None else train_set, classes)
    outputs = None
    if checkpoint:
        train_set, val_set, spec, outputs = use_classes_of(args, checkpoint, spec, train_set, val_set, classes, path)
    if val_set is not None:
        datasets.check_fits(val_set)
        metrics.check_best_by(args.best_by, spec.multi_label)
        count = len(spec.classes if outputs is None else outputs)
        if 'topk' in args.given and max(args.topk) >= count and not spec.multi_label:
            log.log_main('--topk %d: not shown, because it is always 100 %% with %d classes' % (max(args.topk), count))
        counts = subsets.class_counts(val_set.samples, len(spec.classes)) if outputs is None else ()
        absent = [name for name, count in zip(spec.classes, counts) if not count]
        if absent:
            log.log_main('Evaluated on all logits: there is no validation image of %d of the %d classes (%s)' % (
                len(absent), len(spec.classes), model_spec.shorten_names(absent)))
    weights: Any = None
    if args.class_weights and not args.eval:
        counts = subsets.class_counts(train_set.samples, len(spec.classes))
        weights = losses.class_weights(args.class_weights, list(spec.classes), counts)
        log.log_main(losses.describe_weights(weights, list(spec.classes)))
    steps_per_epoch = 0 if args.eval else count_steps(args, len(train_set))
    data = Data(train_set, val_set, spec, weights, steps_per_epoch, outputs, path or args.val_csv or args.data_path,
                *datasets.build_loaders(inputs, train_set, val_set, device))
    if val_set is not None:
        metrics_of(args, data)
    return data


def metrics_of(args: argparse.Namespace, data: Data) -> List[metrics.Metric]:
    """New metrics for an evaluation. Raises `UserError` where a flag does not fit the validation set."""
    return metrics.build_metrics(metrics.Evaluation(
        data.val_set, args.results_file, args.real_labels, args.data_set, data.spec.multi_label, data.spec.activation,
        args.topk, data.outputs, len(data.spec.classes)))


def build_spec(args: argparse.Namespace, inputs: InputConfig, dataset: Any, classes: Sequence[str]) -> ModelSpec:
    """The spec of the model that this run trains or, without a checkpoint, evaluates."""
    multi_label = dataset.samples.multi_label
    return ModelSpec(config_from(args, ModelConfig), EvalTransform.from_config(inputs), tuple(classes),
                     loss='bce' if losses.activation(args.loss, multi_label) == 'sigmoid' else 'ce',
                     multi_label=multi_label, origin={'program': 'BEiT for PyTorch %s' % project_version(),
                                                      'finetune': escape_text(args.finetune)})


def match_classes(known: ModelSpec, source: str, classes: Sequence[str], trains: bool = False
                  ) -> Tuple[ModelSpec, List[int]]:
    """(the checkpoint's spec, the output of each class of the data); a line names an assumption."""
    wnids = [] if known.has_class_names else model_spec.imagenet_wnids(len(known.classes), classes)
    if wnids:
        log.log_main('%s does not name its 1000 outputs; assuming ImageNet\'s classes, as the folders\' names are'
                     % escape_text(source))
        known = known.with_class_names(wnids, source)
    places, message = model_spec.match_classes(known, source, classes, trains)
    if message:
        log.log_main(message)
    return known, places


def use_classes_of(args: argparse.Namespace, checkpoint: CheckpointWeights, spec: ModelSpec, train_set: Any,
                   val_set: Any, classes: List[str], path: Optional[str]
                   ) -> Tuple[Any, Any, ModelSpec, Optional[List[int]]]:
    """Match the data's classes with the checkpoint's by name; returns (training set, validation set, spec, outputs).

    The outputs are those to evaluate, None for all: where each image has one class, the folders' alone compete.
    """
    known = checkpoint.spec
    if known is None:
        log.log_main('%s does not name its classes: its outputs are assigned to the data\'s classes by position'
                     % escape_text(checkpoint.source))
        return train_set, val_set, spec, None
    for what, count in (('the data has', len(classes)), ('--nb_classes is', args.nb_classes or ROBUST_CLASSES)):
        refuse(args.robust_test and count != ROBUST_CLASSES, args, 'robust_test', ': that set has %d classes, and %s '
               '%d; correct that, or leave the flag out' % (ROBUST_CLASSES, what, count))
    refuse(args.eval and args.nb_classes not in (0, len(known.classes), len(classes)), args, 'nb_classes',
           ': %s has %d classes; leave the flag out' % (escape_text(checkpoint.source), len(known.classes)))
    if args.loss == 'auto' and known.loss != spec.loss:
        raise UserError('--resume %s: it was trained with the loss %s, and these training images need %s, as they '
                        'have %s; give --loss %s, or start a new run with --finetune' % (
                            escape_text(checkpoint.source), known.loss, spec.loss,
                            'several labels each' if spec.multi_label else 'one label each', known.loss))
    try:
        known, places = match_classes(known, checkpoint.source, classes, trains=not args.eval)
    except UserError as error:
        raise UserError('--eval_data_path %s: %s' % (escape_text(path), error) if path else str(error)) from None
    if args.robust_test or args.eval and len(classes) < len(known.classes) and not known.multi_label:
        log.log_main('Evaluated on the logits of %d of the %d classes of %s; the data%s names no others%s' % (
            len(places), len(known.classes), escape_text(checkpoint.source), path and ' in ' + escape_text(path) or '',
            args.robust_test and ' (--robust_test %s)' % args.robust_test or ''))
        return train_set, val_set, known, places
    names = list(known.classes) if known.has_class_names else [classes[places.index(k)] for k in range(len(places))]
    if list(classes) != names:
        train_set, val_set = (each and each.relabel(places, names) for each in (train_set, val_set))
        if known.has_class_names and len(classes) == len(names):
            log.log_main('Classes are in the checkpoint\'s order: %s' % model_spec.shorten_names(names))
    return train_set, val_set, dataclasses.replace(spec, classes=tuple(names)), None


def count_steps(args: argparse.Namespace, images: int) -> int:
    """Update steps per epoch. Raises `UserError` if an epoch has none or the warm-up is longer than the run."""
    total_batch = args.batch_size * args.update_freq * process_group.world_size()
    refuse(images < total_batch, args, 'batch_size', ' x %d processes x --update_freq %d = %d images an update, more '
           'than the %d of the training set; lower one of them' % (
               process_group.world_size(), args.update_freq, total_batch, images))
    steps = images // total_batch
    refuse(args.warmup_steps > steps * args.epochs, args, 'warmup_steps',
           ' is longer than the run of %d steps; lower it' % (steps * args.epochs))
    return steps


def build_model(args: argparse.Namespace, data: Data, checkpoint: Optional[CheckpointWeights]) -> torch.nn.Module:
    """Build the model with the weights of --finetune or, for an evaluation, of the checkpoint."""
    spec = data.spec
    if checkpoint and checkpoint.program is not None:
        return checkpoint.program
    model = inference_model.build_model(spec.architecture, len(spec.classes))
    if args.eval and checkpoint:
        inference_model.load_state(model, checkpoint)
    elif args.finetune:
        pretrained.load_pretrained(model, args.finetune, args.model_key, args.model_prefix, spec.classes)
    return model


def build_learner(args: argparse.Namespace, model: torch.nn.Module, checkpoint: Optional[CheckpointWeights],
                  device: torch.device, dtype: Optional[torch.dtype]) -> Learner:
    """Build the optimizer and the moving average of a model, in the chosen precision."""
    model.to(device)
    if checkpoint and checkpoint.program is not None:
        return Learner(model, None, loss_scaler.LossScaler(), None, device, None, 'as exported')
    attention = 'plain' if args.deterministic and args.attention == 'auto' else args.attention
    chosen = fused_attention.choose_attention(model, device, attention, dtype, args.batch_size,
                                              not args.eval)  # the model's copies have it
    optimizer = None if args.eval else build_optimizer(args, model, half_precision.apex_amp(device, dtype) is not None)
    ema = utils.ModelEma(model, args.model_ema_decay, 'cpu' if args.model_ema_force_cpu else None,
                         args.model_ema_warmup) \
        if args.model_ema else None
    if ema is not None and args.eval and checkpoint:
        inference_model.load_state(ema.ema, checkpoint.averaged(), quiet=True)
    model, scaler = loss_scaler.initialize_amp(model, optimizer, device, dtype, args.opt_level, args.loss_scale)
    configure_speed(args, accelerator.unwrap(model), device)
    return Learner(model, optimizer, scaler, ema, device, dtype, chosen)


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module, under_apex: bool) -> torch.optim.Optimizer:
    refuse(args.unfreeze_epoch and under_apex, args, 'unfreeze_epoch', ': apex takes the gradients of the first step '
           'and ignores later ones; leave --amp out, or use two runs, the second with --finetune')
    return optim_factory.create_optimizer(model, config_from(args, OptimizerConfig), under_apex)


def configure_speed(args: argparse.Namespace, model: Any, device: torch.device) -> None:
    """Choose how the model computes. Results do not change."""
    model.set_grad_checkpointing(args.grad_checkpointing)
    for block in model.blocks:
        block.skips_dropped = args.skip_dropped == 'on' or (
            args.skip_dropped == 'auto' and device.type == 'cpu' and not args.compile)
    if args.compile:
        kernels.compile_in_place(model, args.compile_backend)


def build_report(args: argparse.Namespace, output: OutputConfig, data: Data, learner: Learner) -> Report:
    device_name = accelerator.device_name(learner.device).replace(', 1 threads', ', 1 thread')
    environment = {
        'model': args.model, 'parameters': count_parameters(learner.model), 'input_size': args.input_size,
        'classes': len(data.classes), 'training_images': None if data.train_set is None else len(data.train_set),
        'validation_images': None if data.val_set is None else len(data.val_set), 'device': str(learner.device),
        'device_name': device_name, 'processes': process_group.world_size(),
        'precision': learner.scaler.description}
    samples = functools.partial(augmented_samples, data.train_set, data.classes, config_from(args, TransformConfig),
                                config_from(args, MixupConfig), args.seed)
    return Report(output, environment, data.classes, data.val_set, samples, prefix='eval-' if args.eval else '')


def resume(args: argparse.Namespace, data: Data, learner: Learner,
           checkpoint: Optional[CheckpointWeights]) -> training_state.RunState:
    """Load the checkpoint into the learner; returns the state that this run starts from."""
    total_batch = args.batch_size * args.update_freq * process_group.world_size()
    run = comparison.Run(vars(args), learner.device,
                         fingerprint.of_data(data.train_set, data.val_set, data.classes, learner.device),
                         None if data.class_weights is None else zlib.crc32(data.class_weights.numpy().tobytes()))
    run_state = training_state.RunState(args.start_epoch)
    val_set = comparison.evaluation_id(run.data, data.spec, args.test_flip)
    if checkpoint is not None:
        source, content, saved = checkpoint.source, checkpoint.content, model_spec.saved_args(checkpoint.content)
        comparison.check_unseen(source, content, data.val_set, args.val_split)
        if isinstance(content.get('optimizer'), dict):
            optim_factory.check_same_state(source, saved.get('opt'), args.opt)
        run_state = training_state.resume_training(source, content, learner.model, learner.optimizer, learner.scaler,
                                                   learner.ema, model_key=args.model_key,
                                                   model_prefix=args.model_prefix)
        if run_state.steps and run_state.run.get('total_batch') != total_batch:
            raise UserError('--resume %s: it was saved in mid-epoch with a total batch of %s, and this one is %d; keep '
                            '--batch_size x --update_freq x processes, or resume the checkpoint of a whole epoch'
                            % (source, run_state.run.get('total_batch'), total_batch))
        log.log_main(comparison.resume_message(comparison.resume_differences(content, run, without_effect())))
        if source == args.resume or not discovery.is_inside(source, args.output_dir):
            run_state.origin = args.resume
        before = run_state.val_set or comparison.evaluation_id(
            comparison.saved_data(content), checkpoint.spec, saved.get('test_flip', False))
        theirs, mine = (each or ('mAP' if data.spec.multi_label else 'acc1')
                        for each in (saved.get('best_by'), args.best_by))
        reason = 'by --best_by %s, and this run has --best_by %s' % (escape_text(str(theirs)), mine) \
            if theirs != mine else ''
        if val_set and before not in ('', val_set):
            reason = 'of other validation images or another preprocessing'
        if run_state.best and reason:
            run_state.best, run_state.stale = {}, 0
            log.log_main('The best figure starts again: that of %s is %s' % (escape_text(source), reason))
        val_set = val_set or before
    run_state.val_set = val_set
    run_state.run = comparison.facts_of(run)
    run_state.data = comparison.data_to_save(run.data, getattr(data.train_set, 'held_out', None))
    return run_state


def prepare_folder(args: argparse.Namespace, source: str, run_state: training_state.RunState) -> None:
    """Keep the files that this run continues; move files of another run, or later than --resume, to a backup."""
    keep, later = args.prof or args.cann_prof, []
    if not keep and source and discovery.is_inside(source, args.output_dir):
        keep = True
        if source == args.resume and process_group.is_main_process():
            later = discovery.later_checkpoints(source, (run_state.epoch, run_state.steps))
    run_folder.prepare_folder(args.output_dir, keep, later)
    if run_state.best and args.output_dir and args.save_ckpt and not keep and process_group.is_main_process():
        copied = discovery.copy_best(source, args.output_dir, run_state.best)
        if copied:
            log.log_main('Copied the best checkpoint so far from the folder of %s: %s' % (
                escape_text(source), discovery.best_text(copied)))
        missing = {name: best for name, best in run_state.best.items() if name not in copied}
        if missing:
            run_state.best, run_state.stale = copied, 0
            log.log_main('The best figure starts again: beside %s is no checkpoint of %s' % (
                escape_text(source), discovery.best_text(missing)))


def update_freezing(args: argparse.Namespace, model: Any, epoch: int) -> bool:
    """Freeze or unfreeze the backbone for this epoch; returns whether that changed.

    The optimizer holds all parameters from the start and ignores parameters without a gradient. So checkpoints have
    the same groups before and after, and the moments of a parameter start with its training.
    """
    freeze = args.freeze_backbone and not 0 < args.unfreeze_epoch <= epoch
    if freeze == model.backbone_frozen:
        return False
    model.freeze_backbone(freeze)
    log.log_main('%s, %d of %d parameters' % (
        'Training only the head' if freeze else 'Training the whole model', count_parameters(model),
        sum(parameter.numel() for parameter in model.parameters())))
    return True


def build_training(args: argparse.Namespace, data: Data, learner: Learner) -> Dict[str, Any]:
    """The arguments of `engine.train_one_epoch` that are the same in every epoch."""
    mixup = transforms.build_mixup(config_from(args, MixupConfig), len(data.classes))
    weights = None if data.class_weights is None else data.class_weights.to(learner.device)
    criterion: Any = build_criterion(args.loss, args.smoothing, mixup, weights, data.spec.multi_label)
    criterion = losses.sum_over_layers(criterion) if data.layers else criterion
    length = args.epochs, data.steps_per_epoch
    lr_values = optim_factory.cosine_scheduler(args.lr, args.min_lr, *length, args.warmup_epochs, args.warmup_lr,
                                               args.warmup_steps)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    wd_values = optim_factory.cosine_scheduler(args.weight_decay, end, *length)
    return dict(criterion=criterion, data_loader=data.train_loader, optimizer=learner.optimizer,
                loss_scaler=learner.scaler, max_norm=args.clip_grad, model_ema=learner.ema, mixup_fn=mixup,
                lr_schedule_values=lr_values, wd_schedule_values=wd_values, update_freq=args.update_freq,
                seed=args.seed)


def distribute(learner: Learner) -> None:
    """Wrap the model in DistributedDataParallel if there are several processes. It records the trainable parameters."""
    if process_group.world_size() > 1:
        learner.model = accelerator.wrap_ddp(learner.model, learner.device)


def unfreeze_when_due(args: argparse.Namespace, learner: Learner, epoch: int) -> None:
    """Rebuild DistributedDataParallel and the optimizer's state before the epoch that unfreezes the backbone."""
    if update_freezing(args, accelerator.unwrap(learner.model), epoch) and process_group.world_size() > 1:
        learner.model = learner.model.module  # type: ignore[assignment]
        gc.collect()  # removes the hooks of the old DistributedDataParallel
        distribute(learner)
    if 0 < args.unfreeze_epoch <= epoch:
        optim_factory.complete_momenta(learner.optimizer)


# ---- evaluation

def evaluate_only(args: argparse.Namespace, sets: List[Data], learner: Learner, report: Report,
                  checkpoint: Optional[CheckpointWeights]) -> None:
    """Evaluate the sets one after another; write a row of --results_file for each, with all weights."""
    started, source, epoch = time.time(), args.finetune, 0
    rows, of_sets, bad_images = [], [], UnreadableFiles(args.output_dir, args.max_bad_images)
    throughput = utils.Throughput(warmup_steps=1)
    if checkpoint:
        source, epoch = checkpoint.source, discovery.last_epoch(checkpoint.content)
        if args.calibrate:
            calibrate(args, sets[0], learner, checkpoint)
    for data in sets:
        if checkpoint:
            log.log_main('Evaluating %s%s' % (escape_text(source), sets[1:] and ' on ' + escape_text(data.path) or ''))
            comparison.check_evaluation(source, checkpoint.content, data.val_set, data.classes, args.val_split,
                                        learner.device)
        stats, ema_stats = evaluate_all(args, data, learner, bad_images, throughput,
                                        predictions=report.predictions(data.spec.multi_label, data.spec.activation))
        rows += [dict(run_log.results_row(source, weights, data.spec, count_parameters(learner.model), each,
                                          args.test_flip), data=escape_text(data.path))
                 for weights, each in (('model', stats), ('model_ema', ema_stats)) if each is not None]
        figure = metrics.primary_metric(stats)
        of_sets.append(dict(metrics.summary_figures(stats), data=escape_text(data.path),
                            **{'ema_' + figure.summary: ema_stats and ema_stats[figure.name]}))
    if args.results_file and process_group.is_main_process():
        metrics.write_results(args.results_file, rows)
    if sets[1:]:
        run_log.print_sets(rows)
    figures = {'sets': of_sets} if sets[1:] else of_sets[0]
    print_result(throughput, figures)
    if args.log_dir and process_group.is_main_process():
        writer = utils.TensorboardLogger(os.path.join(args.log_dir, 'eval'))  # apart from the training's figures
        run_log.record_scores(writer, epoch, stats, ema_stats)
        report.draw_confusions(writer, epoch)
        writer.close()
    report.of_weights(source)
    report.environment['validation_images'] = sum(len(each) for each in (data.val_set for data in sets) if each)
    report.finish(dict(figures, bad_images=len(bad_images.listed), **speed_figures(throughput, time.time() - started)))


def calibrate(args: argparse.Namespace, data: Data, learner: Learner, checkpoint: CheckpointWeights) -> None:
    """Fit the temperature of the network and of its average; apply both, and write the checkpoint."""
    refuse(data.outputs is not None, args, 'calibrate', ': the data has %d of the %d classes of %s; evaluate a set '
           'with all of them' % (len(data.classes), len(data.spec.classes), escape_text(checkpoint.source)))
    sharded, fitted = args.dist_eval and process_group.world_size() > 1, {}
    for name, what, model in ((model_spec.TEMPERATURES[0], 'network', learner.model),
                              (model_spec.TEMPERATURES[1], 'averaged network (EMA)', averaged_network(args, learner))):
        if model is not None:
            metric = temperature.Temperature(data.spec.activation, data.spec.multi_label)
            stats = engine.evaluate(data.val_loader, engine.EvaluatedNetwork(model), learner.device, sharded,
                                    metrics=[metric]) or {}
            if stats['reason']:
                text = '--calibrate: no temperature from %g to %g fits the %s, since %s' % (
                    *temperature.LIMITS, what, stats['reason'])
                if name == model_spec.TEMPERATURES[0]:
                    raise UserError(text)
                log.log_main('%s. Its temperature stays %g' % (text, getattr(data.spec, name)))
                continue
            fitted[name] = stats['temperature'] * getattr(data.spec, name)
            log.log_main('Calibrated the %s: temperature %.4f, ' % (what, fitted[name]) + metric.message % stats)
            head: Any = accelerator.unwrap(model).head
            for parameter in head.parameters():
                parameter.data.div_(stats['temperature'])
    if process_group.is_main_process():
        temperature.write(temperature.calibrated_path(checkpoint, args.output_dir), checkpoint, fitted)


def averaged_network(args: argparse.Namespace, learner: Learner) -> Any:
    """The moving average on the device, float32 or under O1's autocast; None without one."""
    network: Any = learner.ema and learner.ema.ema.to(learner.device)
    kind, dtype = learner.device.type, learner.dtype
    if network is None or dtype is None or args.opt_level != 'O1' or not half_precision.has_autocast(kind, dtype):
        return network
    return loss_scaler.HalfPrecision(network, dtype, kind)


def evaluate_all(args: argparse.Namespace, data: Data, learner: Learner, bad_images: UnreadableFiles,
                 throughput: Optional[utils.Throughput] = None, stop_signal: Optional[Callable[[], int]] = None,
                 predictions: Optional[ConfusionMatrix] = None) -> Tuple[Any, Any]:
    """Evaluate the model and its average; returns (statistics, the average's or None).

    In training, `stop_signal` gives the number of a signal that asks to stop; then the result is (None, None). The
    model fills `predictions`, not its average.
    """
    sharded = args.dist_eval and process_group.world_size() > 1

    def evaluate(name, network, throughput=None, predictions=None):
        wanted = metrics_of(args, data)
        if data.layers:
            wanted = [metrics.OfLayers([metrics_of(args, data) for _ in range(data.layers)])]
        stats = engine.evaluate(
            data.val_loader, engine.EvaluatedNetwork(network, args.test_flip, data.outputs), learner.device, sharded,
            throughput, stop_signal, wanted + ([predictions] if predictions is not None else []))
        if stats is not None:
            left_out = stats.pop('unreadable')
            if left_out:
                bad_images.report(left_out, len(data.val_set), escape_text(data.path) if len(evaluation_sets(args)) > 1
                                  else 'validation')
            if predictions is not None:
                predictions.figures = stats
            lines = run_log.score_lines(name, stats, len(set(left_out)))
            lines += [metric.message % stats for metric in wanted if metric.message]
            for line in lines:  # in training, a terminal shows the last epoch's at the end
                log.log_main(line, detail=stop_signal is not None)
            learner.last_scores += lines
            if args.best_by and not args.eval:
                stats['best_by'] = args.best_by
        return stats

    learner.last_scores.clear()
    stats, ema_stats = evaluate('network', learner.model, throughput, predictions), None
    if learner.ema is not None and stats is not None:
        ema_stats = evaluate('averaged network (EMA)', averaged_network(args, learner))
        learner.ema.ema.to('cpu' if args.model_ema_force_cpu else learner.device)
        stats = stats if ema_stats is not None else None
    return stats, ema_stats


# ---- training

def train(args: argparse.Namespace, training: Dict[str, Any], data: Data, learner: Learner,
          monitor: CheckpointMonitor, report: Report) -> None:
    """Train from `monitor.run_state`; evaluate, log and save after each epoch.

    The line in log.txt comes before the checkpoint: after a kill between the two, the resumed run writes it again.
    """
    state, train_stats = monitor.run_state, {}
    started, throughput = time.time() - state.spent[0], utils.Throughput(earlier=state.spent[1:])
    monitor.spent = lambda: [time.time() - started, *throughput.totals()]
    writer = utils.TensorboardLogger(args.log_dir) if args.log_dir and process_group.is_main_process() else None
    step_limit = min(args.maxstep or args.epochs * data.steps_per_epoch, args.epochs * data.steps_per_epoch)
    first = epochs = state.epoch  # epochs: the number of those begun
    report.begin(writer)
    for epoch in range(first, args.epochs):
        steps = min(data.steps_per_epoch, step_limit - epoch * data.steps_per_epoch)
        if steps <= 0 or should_stop_early(args, state, learner.device):
            break
        begun, epochs, steps_before = time.time(), epoch + 1, len(throughput.steps)
        is_due, is_whole = epochs % args.val_interval == 0, steps == data.steps_per_epoch
        is_last = epoch * data.steps_per_epoch + steps >= step_limit
        unfreeze_when_due(args, learner, epoch)
        if training['mixup_fn'] is not None:
            training['mixup_fn'].mixup_enabled = not 0 < args.mixup_off_epoch <= epoch
        training['data_loader'].sampler.set_epoch(epoch, state.steps * args.update_freq * args.batch_size)
        train_stats = engine.train_one_epoch(
            model=learner.model, device=learner.device, epoch=epoch, log_writer=writer,
            start_steps=epoch * data.steps_per_epoch, first_step=state.steps, num_training_steps_per_epoch=steps,
            throughput=throughput, monitor=monitor,
            state=state.meters_of(process_group.rank(), process_group.world_size()), **training)

        test_stats = ema_stats = None
        if data.val_loader is not None and (is_due or is_last):
            if not is_whole:
                log.log_main('Evaluating %s after --maxstep %d; --disable_eval_during_finetuning leaves that out'
                             % (log.pluralize(report.environment['validation_images'], 'image'), args.maxstep))
            test_stats, ema_stats = evaluate_all(args, data, learner, monitor.bad_images, None,
                                                 lambda: monitor.signals.stop_signal,
                                                 report.predictions(data.spec.multi_label or data.layers > 0,
                                                                    data.spec.activation))
            if test_stats is None:
                monitor.stop_after(epoch, steps, learner.device)
        improved = run_log.update_best(state.best, test_stats, ema_stats)
        if test_stats is not None:
            learner.last_scores.append(run_log.best_line(state.best, test_stats, ema_stats is not None))
            log.log_main(learner.last_scores[-1], detail=True)
            state.stale += is_due and is_whole  # as in a run without a stop
        state.stale = 0 if improved else state.stale
        run_log.record(args.output_dir, writer, epoch, count_parameters(learner.model), train_stats, test_stats,
                       ema_stats, state.val_set)
        log.log_epoch(epoch, args.epochs, train_stats, run_log.best_texts(test_stats, state.best),
                      throughput.since(steps_before).images_per_second, time.time() - begun)
        report.after_epoch(writer, epoch, discovery.BEST in improved)
        if not is_whole:  # --maxstep, in mid-epoch
            monitor.save(epoch, steps, monitor.epoch_state, learner.device)
            monitor.save_epoch(improved, numbered=False)
            break
        state.epoch, state.steps, state.meters = epochs, 0, []
        is_last = is_last or should_stop_early(args, state, learner.device)
        monitor.save_epoch(improved, numbered=is_last or epochs % args.save_ckpt_freq == 0)
    monitor.wait_for_save()
    if writer is not None:
        writer.close()
    finish(args, learner, monitor, report, throughput, train_stats, first, epochs, started)


def finish(args: argparse.Namespace, learner: Learner, monitor: CheckpointMonitor, report: Report,
           throughput: utils.Throughput, train_stats: Dict[str, Any], first: int, epochs: int, started: float) -> None:
    """Print how the training ended, and write its report. `epochs`: the number of those begun."""
    state = monitor.run_state
    for line in learner.last_scores:
        log.current_display().show(line)
    if throughput.images_per_second:
        log.log_main('Speed: %s' % throughput.bottleneck())
    log.log_main('Training time %s' % datetime.timedelta(seconds=int(time.time() - started)))
    if should_stop_early(args, state, learner.device):
        log.log_main('Stopped early: no new best in %s (--early_stop %d)'
                     % (log.pluralize(state.stale, 'evaluation'), args.early_stop))
    figures = dict(metrics.best_figures(state.best), loss=train_stats.get('loss'), best_by=args.best_by)
    if first >= args.epochs:
        log.log_main('Nothing left to train: all %d epochs are done; raise --epochs to continue' % args.epochs)
        if report.is_complete():
            return  # else the run was killed between its last checkpoint and its summary
    else:
        print_result(throughput, figures)
    report.finish(dict(figures, epochs=epochs, bad_images=len(monitor.bad_images.listed),
                       **speed_figures(throughput, time.time() - started)))


def should_stop_early(args: argparse.Namespace, run_state: training_state.RunState, device: torch.device) -> bool:
    """Whether --early_stop ends the run. The first process decides: figures of the others may round differently."""
    return args.early_stop > 0 and collectives.any_process(
        process_group.is_main_process() and run_state.stale >= args.early_stop, device)


def run(argv: Optional[Sequence[str]] = None, program: str = flags.TRAINING, description: Optional[str] = __doc__,
        work: Optional[Callable[[argparse.Namespace, preemption.Signals], None]] = None) -> int:
    """Run the command line. A user error is one line and exit status 2; a signal gives 128 + its number."""
    signals, parsed = preemption.Signals(), {}

    def parse_and_run() -> None:
        parsed['args'] = build_parser(program, description).parse_args(argv)
        (work or main)(parsed['args'], signals)

    def resume_hint(condition: str = '') -> str:
        args = parsed.get('args')
        return '; nothing was saved' if args is None or args.eval or args.check_data else \
            '; %sthe same command with --auto_resume continues from the last checkpoint, if there is one' % condition

    return run_interruptible(program, parse_and_run, 'lower --batch_size and raise --update_freq by as much, or lower '
                             '--input_size', resume_hint, lambda: resume_hint('with --output_dir, '), signals)


if __name__ == '__main__':
    sys.exit(run())
