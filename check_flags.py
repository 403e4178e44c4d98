"""Checks of the flags before slow work starts. This module imports no PyTorch; the functions that need it do."""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import sys
from typing import Optional

import flags
from beit import startup, weights
from beit.checkpoint import sources
from beit.config import (
    PROGRAM_ENDINGS, SMALL_INPUT, DistributedConfig, ExportConfig, InputConfig, MixupConfig, TransformConfig,
    check_input_size, parse_device, policy_or_none)
from beit.distributed.launch_environment import defer_report, launch_environment, reports_errors
from beit.errors import UserError, check_output_is_open, escape_text, print_error, refuse, unknown_value_error
from beit.files.atomic_write import check_writable
from beit.log import log_main

NEED_WEIGHTS = ('amp', 'attention', 'calibrate', 'compile', 'features', 'model_ema', 'use_ema', 'model_key',
                'model_prefix')  # flags that an exported program cannot have


def check_command_line(program: str, description: Optional[str]) -> None:
    """Print --help, or one line about a wrong flag, name or file, and exit.

    A program calls this before it imports PyTorch, which takes seconds. Later it parses and checks everything.
    """
    parser = flags.build_parser(program, description)
    parser.logs = False
    try:
        check_early(program, parser.parse_args())
    except UserError as error:
        defer_report(reports_errors(), seconds=20)
        print_error('%s: error: %s' % (program, error))
        sys.exit(2)


def check_early(program: str, args: argparse.Namespace) -> None:
    """Raise a `UserError` for a wrong name, file, folder or schedule: all checks that need no PyTorch."""
    if getattr(args, 'model', None) is not None and args.model not in flags.MODELS:
        raise unknown_value_error('--model', args.model, flags.MODELS)
    parse_device(getattr(args, 'device', 'auto'))
    CHECKS[program](args)


def check_training(args: argparse.Namespace) -> None:
    """A training, an evaluation or a linear probe."""
    check_combinations(args)
    check_schedule(args)
    for flag, what in (('finetune', 'the weights to probe'), ('output_dir', 'the folder for the results')):
        refuse('knn' in args and not getattr(args, flag), args, flag, ' is missing; give ' + what)
    evaluates = flags.evaluates_checkpoint(args)
    if not evaluates and ('knn' not in args or 'model' in args.given):  # else the weights name the model
        check_input_size(args.model, args.input_size)
    if evaluates or args.data_path == 'demo':  # the checkpoint can name the kind of data set; the digits may not exist
        from beit.data import locations
        for path in flags.evaluation_sets(args):
            locations.check_named_files(flags.config_from(args, InputConfig, eval_data_path=path))
    else:
        check_data_paths(args)
    check_evaluation(args)
    check_weights(args)
    check_outputs(args)


def check_prediction(args: argparse.Namespace) -> None:
    """The flags of run_predict.py; adds `inputs`, and completes output, format and attention_dir."""
    from beit.data import decode, locations
    refuse(not args.resume, args, 'resume', ' is missing; give the checkpoint, or the folder that holds it')
    args.inputs = args.images + list(itertools.chain(*args.input))
    if not args.inputs:
        raise UserError('no image is named; give files, folders, or a quoted pattern such as \'photos/*.jpg\'')
    locations.check_inputs(args.inputs)
    check_resume(args)
    if args.format and not args.output or args.output and _is_standard_output(args.output):
        args.output = '-'
    if args.output in ('', '-'):
        check_output_is_open('the predictions')
    if args.output:
        ending = os.path.splitext(args.output)[1][1:].lower()
        args.format = args.format or ('jsonl' if args.output == '-' else ending)
        refuse(args.format not in flags.PREDICTION_FORMATS, args, 'output',
               ': its ending names no format; end it in .%s, or give --format' % ', .'.join(flags.PREDICTION_FORMATS))
    if args.output not in ('', '-'):
        refuse(os.path.isdir(args.output), args, 'output', ': a folder has this name; choose another name')
        refuse(decode.is_image_name(args.output), args, 'output',
               ': this would overwrite an image; choose another name')
        check_writable('--output', args.output, is_file=True)
    refuse(args.layer is not None and not args.features, args, 'layer', ' needs --features, the file to write')
    for flag in ('top_k', 'threshold', 'class_names'):
        refuse(args.features and not args.output and flag in args.typed, args, flag,
               ': --features alone writes no predictions; give --output, or leave it out')
    if args.features:
        refuse(not args.features.endswith('.npz') or os.path.isdir(args.features), args, 'features',
               ': give a file that ends in .npz')
        check_writable('--features', args.features, is_file=True)
    beside = '' if args.output in ('', '-') else os.path.dirname(args.output)
    if args.attention is not None:
        args.attention_dir = args.attention_dir or os.path.join(beside, 'attention')
        folder = os.path.join(os.path.realpath(args.attention_dir), '')
        refuse(any(os.path.join(os.path.realpath(each), '').startswith(folder) for each in args.inputs), args,
               'attention_dir', ' holds inputs, and its pictures would become inputs too; choose another folder')
        check_writable('--attention_dir', args.attention_dir)
    for name in ('attention_block', 'attention_heads', 'attention_dir') if args.attention is None else ():
        if getattr(args, name):
            raise UserError('--%s needs --attention' % name)


def _is_standard_output(path):
    """Whether a path is /dev/stdout, or the file that standard output is redirected to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except (OSError, ValueError):
        return False


def check_export(args: argparse.Namespace) -> None:
    """The flags of run_export.py."""
    from beit.outputs import atc
    refuse(not args.resume, args, 'resume', ': name the checkpoint to export, or the folder that holds it')
    refuse(not args.format, args, 'format', ' is missing; give one of ' + ', '.join(flags.EXPORT_FORMATS))
    if args.format not in flags.EXPORT_FORMATS:
        raise unknown_value_error('--format', args.format, flags.EXPORT_FORMATS)
    sources.refuse_programs('--resume', args.resume)
    check_resume(args)
    takes = {name: each.get('takes', ()) for name, each in flags.EXPORT_FORMATS.items()}
    for field in dataclasses.fields(ExportConfig):
        if getattr(args, field.name) and field.name not in takes[args.format]:
            raise UserError('--%s %s goes with --format %s, not %s' % (
                field.name, escape_text(str(getattr(args, field.name))), ' or '.join(
                    name for name, each in takes.items() if field.name in each), args.format))
    if 'soc_version' in takes[args.format]:
        atc.check(args.soc_version, args.output)
    if args.output:
        check_export_output(args, args.output)
        refuse_program_ending(args, args.output if args.format not in PROGRAM_ENDINGS else '')


def check_export_output(args: argparse.Namespace, path: str) -> None:
    """Raise a `UserError` where the output cannot be written, or would replace other files."""
    shown, files = '--output %s' % escape_text(path), flags.EXPORT_FORMATS[args.format].get('files')
    check_writable('--output', path, is_file=True)
    ending = PROGRAM_ENDINGS.get(args.format, '')
    if not path.endswith(ending):
        raise UserError('%s: end the name in %s, by which --eval and run_predict.py know the format' % (shown, ending))
    if not os.path.lexists(path):
        return
    if os.path.isdir(path) != bool(files):
        raise UserError('%s: %s; --format %s writes a %s' % (shown, 'a folder' if os.path.isdir(path) else 'a file',
                                                             args.format, 'folder' if os.path.isfile(path) else 'file'))
    others = sorted(set(os.listdir(path)).difference(files)) if files else []
    if others:
        raise UserError('%s: the folder holds other files (%s), which would be lost; name a new one'
                        % (shown, escape_text(others[0])))
    if not args.overwrite and (not files or os.listdir(path)):
        raise UserError('%s: it exists already; give --overwrite, or another name' % shown)


def refuse_program_ending(args: argparse.Namespace, path: str) -> None:
    """Raise a `UserError` for weights whose name would make them an exported program."""
    refuse(sources.program_kind(path), args, 'output', ': this ending is that of an exported program; choose another')


def check_average(args: argparse.Namespace) -> None:
    """The flags of average_checkpoints.py."""
    for flag in ('inputs', 'output'):
        refuse(not getattr(args, flag), args, flag, ' is missing; see --help')
    sources.find_inputs(args.inputs)
    refuse_program_ending(args, args.output)
    refuse(os.path.lexists(args.output) and not (args.overwrite and os.path.isfile(args.output)), args, 'output',
           ' exists; choose another' + (', or give --overwrite' if os.path.isfile(args.output) else ''))
    check_writable('--output', args.output, is_file=True)


CHECKS = {flags.TRAINING: check_training, flags.PROBE: check_training, flags.PREDICT: check_prediction,
          flags.EXPORT: check_export, flags.AVERAGE: check_average}


def settle(args: argparse.Namespace) -> None:
    """Set the flags that others stand for or imply, and log each. Raises `UserError`."""
    import modeling_finetune
    lines = []
    if args.eval and args.finetune and not args.resume:
        args.resume, args.finetune = args.finetune, ''
        lines.append('--eval --finetune: evaluated as --resume %s' % escape_text(args.resume))
    known = weights.published(args.resume if args.eval else args.finetune)
    is_v2 = modeling_finetune.input_statistics(args.model)[0] != modeling_finetune.INPUT_MEAN
    implied = known.flags if known else {'imagenet_default_mean_and_std': True} if is_v2 else {}
    differ = {name: value for name, value in implied.items() if getattr(args, name) != value}
    vars(args).update((name, value) for name, value in differ.items() if name not in args.given)
    if differ:
        lines.append('%s: %s' % (known.name if known else '--model ' + args.model, ', '.join(
            '--%s %s%s' % (name, getattr(args, name), ' (given; published: %s)' % value * (name in args.given))
            for name, value in differ.items())))
    if args.enable_deepspeed:
        vars(args).update((name, value) for name, value in flags.DEEPSPEED.items() if name not in args.given)
        args.given |= set(flags.DEEPSPEED)
        lines.append('--enable_deepspeed: the same computation without DeepSpeed, %s'
                     % ' '.join('--%s=%s' % (name, getattr(args, name)) for name in flags.DEEPSPEED))
    if 'lr' in args.typed:
        args.blr = 0.
    if args.blr:
        processes = launch_environment(flags.config_from(args, DistributedConfig))[1]
        images = args.batch_size * args.update_freq * processes
        args.lr = args.blr * images / 256
        lines.append('--lr %g: --blr %g x %d images an update / 256' % (args.lr, args.blr, images))
    for line in lines if reports_errors() else ():
        log_main(line)


def check_args(args: argparse.Namespace) -> None:
    """Check the flags before slow work starts, and `settle` them. Raises `UserError`."""
    from beit.checkpoint import exported
    check_early(flags.TRAINING, args)
    settle(args)
    exported.drop_flags(args)
    check_augmentation(args)
    if args.data_path == 'demo' and not flags.evaluates_checkpoint(args):
        check_data_paths(args)  # may write the digits
    check_compute(args)
    check_optimizer(args)


def check_data_paths(args: argparse.Namespace) -> None:
    from beit.data import locations  # imports NumPy and Pillow, which --help does not need
    for path in flags.evaluation_sets(args):
        locations.check_paths(flags.config_from(args, InputConfig, eval_data_path=path))


def check_combinations(args: argparse.Namespace) -> None:
    """The flags that contradict one another."""
    evaluates, mixes = flags.evaluates_checkpoint(args), flags.config_from(args, MixupConfig).mixes
    refuse(args.eval and {'resume', 'finetune'} <= args.typed and args.resume and args.finetune, args, 'finetune',
           ': --eval evaluates --resume; leave one of them out')
    refuse({'lr', 'blr'} <= args.typed and args.blr, args, 'blr', ': --lr is given too; leave one of them out')
    refuse(args.world_size > 1 and launch_environment(flags.config_from(args, DistributedConfig))[1] == 1, args,
           'world_size', ' is set by the launcher; start the processes with test/train_full_8p.sh --nproc_per_node=%d, '
           'or torchrun' % args.world_size)
    refuse(args.data_backend == 'fast' and args.train_interpolation not in flags.FAST_RESIZES, args,
           'train_interpolation', ' needs --data_backend exact; fast has ' + ', '.join(flags.FAST_RESIZES))
    refuse(args.in_chans == 4 and not args.eval and policy_or_none(args.aa), args, 'in_chans',
           ': it keeps the alpha channel, which --aa %s cannot; give --aa none' % args.aa)
    refuse(args.in_chans != 3 and 'fast' in (args.data_backend, args.eval_data_backend), args, 'in_chans',
           ': the backend fast reads RGB; leave --data_backend and --eval_data_backend out')
    refuse(args.eval_fit != 'crop' and args.crop_pct and not evaluates, args, 'eval_fit',
           ': --crop_pct %g crops; leave one of them out' % (args.crop_pct or 0))
    refuse(args.eval_fit != 'crop' and args.input_size <= SMALL_INPUT and not evaluates, args, 'eval_fit',
           ': images for --input_size %d are not resized; leave one of them out' % args.input_size)
    refuse(args.in_chans == 4 and not args.eval and args.background, args, 'background',
           ': --in_chans 4 keeps the alpha channel; leave --background out')
    refuse(args.resplit, args, 'resplit', ' needs augmentation splits, which this recipe does not have; leave it out')
    refuse(mixes and args.batch_size % 2 and not args.eval, args, 'batch_size',
           ': mixup and cutmix pair images, so it must be even')
    for flag in ('mixup', 'cutmix'):  # NumPy's beta distribution gives no number there
        refuse(0 < getattr(args, flag) < 1e-6, args, flag, ': an alpha below 1e-6 mixes nothing; 0 turns it off')
    refuse(args.mixup_off_epoch and not mixes, args, 'mixup_off_epoch',
           ': there is no --mixup or --cutmix to turn off; leave it out')
    refuse(args.model_ema_warmup and not args.model_ema, args, 'model_ema_warmup',
           ' needs --model_ema, without which there is no average')
    refuse(args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1], args, 'cutmix_minmax',
           ': the first must be below the second')
    refuse('compile_backend' in args.typed and not args.compile, args, 'compile_backend', ' needs --compile')
    refuse(args.compile and args.skip_dropped == 'on', args, 'skip_dropped',
           ': it changes shapes from step to step, and --compile needs one; leave one of them out')
    refuse(args.opt_betas is not None and len(args.opt_betas) != 2, args, 'opt_betas',
           ': give 2 numbers, as in --opt_betas 0.9 0.999')


def check_augmentation(args: argparse.Namespace) -> None:
    from beit.data import transforms
    transforms.check_policy(args.aa, args.in_chans)
    transforms.check_backend(flags.config_from(args, TransformConfig))


def check_schedule(args: argparse.Namespace) -> None:
    refuse(args.warmup_steps <= 0 and args.warmup_epochs > args.epochs, args, 'warmup_epochs',
           ' is longer than --epochs %d; give --warmup_epochs=%d or fewer' % (args.epochs, args.epochs))
    refuse(args.start_epoch >= args.epochs, args, 'start_epoch',
           ': --epochs %d leaves nothing to train; raise --epochs' % args.epochs)
    refuse(args.early_stop and args.disable_eval_during_finetuning, args, 'early_stop',
           ': --disable_eval_during_finetuning evaluates nothing to stop by; leave one of them out')
    refuse(args.unfreeze_epoch and not args.freeze_backbone, args, 'unfreeze_epoch',
           ': it needs --freeze_backbone, without which nothing is frozen')
    refuse(args.unfreeze_epoch >= args.epochs and not args.eval, args, 'unfreeze_epoch',
           ': --epochs %d ends before; lower it, or leave it out to train the head alone' % args.epochs)


def check_compute(args: argparse.Namespace) -> None:
    """The device, and what it can do."""
    from beit.devices import accelerator, half_precision, kernels, profiler
    _, processes, local_rank = launch_environment(flags.config_from(args, DistributedConfig))
    # Too few devices are an error of all processes of a machine, so that none waits for one that cannot come.
    highest = os.environ.get('LOCAL_WORLD_SIZE', '1')
    device = accelerator.find_device(
        args.device, max(local_rank, int(highest) - 1) if highest.isdigit() else local_rank, processes)
    if device.type == 'cpu' and not flags.evaluates_checkpoint(args):
        half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    if args.cann_prof:
        profiler.check_cann_profiler()
    if args.compile:
        kernels.check_compile(device, args.compile_backend)


def check_optimizer(args: argparse.Namespace) -> None:
    import optim_factory
    if not args.eval:
        optim_factory.check_optimizer(args.opt, args.momentum)
    refuse(args.unfreeze_epoch and (
        'fused' in args.opt.lower() or optim_factory.optimizer_class(args.opt)[0].__name__ == 'NovoGrad'), args,
           'unfreeze_epoch', ': --opt %s looks for gradients in its first step and for no others later; use --opt '
           'adamw, or two runs, the second with --finetune' % args.opt)


def check_evaluation(args: argparse.Namespace) -> None:
    refuse(args.eval and 'recipe' in args.typed and args.recipe, args, 'recipe',
           ': it belongs to training; leave it out of --eval')
    for flag in ('results_file', 'real_labels', 'robust_test', 'calibrate'):
        refuse(getattr(args, flag) and not args.eval, args, flag, ': it belongs to --eval; leave it out of training')
    sets = flags.evaluation_sets(args)
    for flag in ('report', 'log_dir', 'calibrate'):
        refuse(sets[1:] and (getattr(args, flag) or not args.eval), args, 'eval_data_path', ': several sets %s; name '
               'one' % ('have no --' + flag if args.eval else 'belong to --eval'))
    if args.results_file:
        refuse(os.path.splitext(args.results_file)[1] not in ('.csv', '.json'), args, 'results_file',
               ': it must end in .csv or .json')
        refuse(os.path.isdir(args.results_file), args, 'results_file', ': there is a folder of that name')
        check_writable('--results_file', args.results_file, is_file=True)
    refuse(args.real_labels and not os.path.isfile(args.real_labels), args, 'real_labels',
           ': no such file; give a JSON list of the right class indices of each image')
    refuse(args.class_names and not (args.eval and (args.resume or args.finetune)), args, 'class_names',
           ': it belongs to --eval --resume; a training takes the names of its data')
    refuse(args.eval and not (args.resume or args.finetune), args, 'eval',
           ' needs --resume: the checkpoint to evaluate, or the folder that holds it')


def check_weights(args: argparse.Namespace) -> None:
    """The files that a run starts from."""
    if not args.eval:
        sources.refuse_programs('--resume', args.resume)
        sources.check_finetune(args.finetune, is_required='knn' in args)
    check_resume(args)


def check_resume(args: argparse.Namespace) -> None:
    """The checkpoint of --resume, the flags that go with it, and the files that list classes."""
    from beit.files import class_files  # imports NumPy
    evaluates = getattr(args, 'eval', True)  # prediction and export have no such flag
    source: str = args.resume or (getattr(args, 'finetune', '') if evaluates else '')
    for name in NEED_WEIGHTS if source and sources.program_kind(source) else ():
        if name in args.typed:
            raise UserError('--%s: %s is an exported program, which computes as it was exported; leave the flag out, '
                            'or give the checkpoint' % (name, escape_text(source)))
    if getattr(args, 'class_names', ''):
        class_files.read_class_names(args.class_names)
    if not evaluates and args.class_weights not in ('', 'balanced'):
        class_files.read_weights(args.class_weights)
    if not source or evaluates and sources.is_hugging_face(source):
        return
    if not (getattr(args, 'auto_resume', False) and args.output_dir and sources.list_checkpoints(args.output_dir)):
        sources.candidates(source)  # else it may have been removed since, and isn't needed


def check_outputs(args: argparse.Namespace) -> None:
    refuse(args.report and not args.output_dir, args, 'report', ' needs --output_dir, the folder for report.html')
    refuse(args.log_dir and importlib.util.find_spec('tensorboardX') is None, args, 'log_dir',
           ' needs tensorboardX; ' + startup.pip_install('tensorboardX'))
    for flag, folder in (('--output_dir', args.output_dir), ('--log_dir', args.log_dir)):
        check_writable(flag, folder)
