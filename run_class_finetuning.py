#!/usr/bin/env python3
"""Fine-tune or evaluate a BEiT image classifier.

    python run_class_finetuning.py --data_path demo --model beit_nano_patch8_32 --input_size 32 …
    python run_class_finetuning.py --data_path /data/ImageNet2012 --finetune checkpoints/weights.pth --output_dir out
    python run_class_finetuning.py --data_path /data/ImageNet2012 --resume out --eval

The scripts in test/ call this with the published hyper-parameters. BEiT base fine-tuned for 30 epochs on 8 NPUs reached
85.238 % top-1 (the Ascend adaptation's figure; not measured by this project).
"""

import argparse
import datetime
import importlib.util
import os
import re
import sys
import time

import backend  # first: it sets how torch loads its devices
import checkpoint
import datasets
import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import utils
from errors import UserError, one_line, unknown

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model


# ---- flags

class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which knows what an unknown flag may have meant."""

    def error(self, message):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        args = [re.sub(r'^--[^=]+', lambda flag: '--' + flag.group()[2:].replace('-', '_'), arg) for arg in args]
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = rest[0].partition('=')[0]
            if not flag.startswith('-'):
                raise UserError('%r is not a flag; flags begin with --, as in --data_path=/data/ImageNet2012' % flag)
            known = [name for name in self._option_string_actions if name.startswith('--')]
            raise UserError(str(unknown(flag, flag, known)).replace('unknown value %r; ' % flag, 'unknown flag; ')
                            if len(flag) > 3 else '%s: unknown flag; see --help' % flag)
        return parsed


def number(kind, low=None, high=None, above=False):
    """An argparse type: an int or float from `low` (or above it) to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError('%r is not %s' % (text, 'a whole number' if kind is int else 'a number'))
        if value != value or value in (float('inf'), float('-inf')):
            raise argparse.ArgumentTypeError('%r is not a finite number' % text)
        if low is not None and (value <= low if above else value < low):
            raise argparse.ArgumentTypeError('must be %s %s, got %s' % ('above' if above else 'at least', low, text))
        if high is not None and value > high:
            raise argparse.ArgumentTypeError('must be at most %s, got %s' % (high, text))
        return value
    return parse


def loss_scale(text):
    return text if text == 'dynamic' else number(float, 0, above=True)(text)


whole, positive = number(int, 0), number(int, 1)
rate, share = number(float, 0), number(float, 0, 1)
below_one = number(float, 0, 0.999)


def switch(group, name, default, help_text, off=None):
    """A boolean flag: --name turns it on, --no_name (or `off`) turns it off."""
    group.add_argument('--' + name, action='store_true', default=default,
                       help='%s (%s)' % (help_text, 'on' if default else 'off'))
    group.add_argument('--' + (off or 'no_' + name), action='store_false', dest=name, help=argparse.SUPPRESS
                       if not default else 'turns --%s off' % name)


def build_parser():
    parser = OneLineParser('run_class_finetuning.py', description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)

    run = parser.add_argument_group('run')
    add = run.add_argument
    add('--batch_size', default=64, type=positive, help='images per device and micro-step (64)')
    add('--epochs', default=30, type=number(int, 1, 10 ** 6), help='passes over the training set (30)')
    add('--update_freq', default=1, type=positive, help='micro-steps whose gradients make one update (1)')
    add('--save_ckpt_freq', default=5, type=positive, help='epochs between checkpoints (5)')
    add('--seed', default=0, type=number(int, 0, 2 ** 62), help='seed of every random number (0)')
    add('--num_workers', default=10, type=number(int, 0, 1024),
        help='loader processes per device; 0 loads in the main one (10)')
    switch(run, 'pin_mem', True, 'page-locked memory for batches on their way to npu or cuda')
    add('--start_epoch', default=0, type=whole, help='first epoch, where no checkpoint says it (0)')
    add('--device', default='auto', help='auto (npu, cuda, cpu: the first present), npu, cuda, cpu, cuda:1 … (auto)')
    add('--maxstep', default=0, type=whole, help='stop after exactly this many update steps; 0: no limit (0)')
    switch(run, 'prof', False, 'profile a few updates, write a Chrome trace into output_dir/prof, and stop')
    switch(run, 'cann_prof', False, 'likewise through torch_npu\'s profiler')

    model = parser.add_argument_group('model')
    add = model.add_argument
    add('--model', default='beit_base_patch16_224', help='one of %s' % ', '.join(modeling_finetune.MODELS))
    switch(model, 'rel_pos_bias', True, 'relative position bias in every block', off='disable_rel_pos_bias')
    switch(model, 'abs_pos_emb', False, 'learned absolute positions')
    add('--layer_scale_init_value', default=0.1, type=rate, help='0.1 for base, 1e-5 for large, 0 for none (0.1)')
    add('--input_size', default=224, type=number(int, 1, 8192),
        help='pixels a side; any whole number of patches (224)')
    add('--drop', default=0., type=below_one, help='dropout (0)')
    add('--attn_drop_rate', default=0., type=below_one, help='dropout on attention weights (0)')
    add('--drop_path', '--drop_decay', default=0.1, type=below_one, help='stochastic depth of the last block (0.1)')
    switch(model, 'model_ema', False, 'keep and evaluate a moving average of the weights')
    add('--model_ema_decay', default=0.9999, type=share, help='its decay per update (0.9999)')
    switch(model, 'model_ema_force_cpu', False, 'keep it in host memory')
    switch(model, 'disable_eval_during_finetuning', False, 'do not evaluate after each epoch')

    optimizer = parser.add_argument_group('optimizer')
    add = optimizer.add_argument
    add('--opt', default='adamw', help='adamw, on an NPU npufusedadamw; also %s, or lookahead_ before one'
        % ', '.join(name for name in optim_factory.OPTIMIZERS if name not in ('adamw', 'npufusedadamw')))
    add('--opt_eps', default=1e-8, type=number(float, 0, above=True), help='epsilon (1e-8)')
    add('--opt_betas', default=None, type=below_one, nargs='+', help='betas (the optimizer\'s own)')
    add('--clip_grad', default=None, type=rate, help='clip the gradients\' norm to this (no clipping)')
    add('--momentum', default=0.9, type=below_one, help='momentum of SGD and its like (0.9)')
    add('--weight_decay', default=0.05, type=rate, help='weight decay (0.05)')
    add('--weight_decay_end', default=None, type=rate, help='its value at the end of a cosine (weight_decay)')
    add('--lr', default=5e-4, type=rate, help='learning rate of the last layers; not scaled by batch size (5e-4)')
    add('--layer_decay', default=0.9, type=number(float, 0, 1, above=True), help='factor per layer downwards (0.9)')
    add('--warmup_lr', default=0., type=rate, help='learning rate of the first step of the warm-up (0)')
    add('--min_lr', default=1e-6, type=rate, help='learning rate at the end (1e-6)')
    add('--warmup_epochs', default=5, type=whole, help='epochs of linear warm-up (5)')
    add('--warmup_steps', default=-1, type=number(int, -1), help='update steps instead, when above 0 (-1)')

    augmentation = parser.add_argument_group('augmentation')
    add = augmentation.add_argument
    add('--color_jitter', default=0.4, type=rate, help='strength, where --aa is none (0.4)')
    add('--aa', default='rand-m9-mstd0.5-inc1', help='AutoAugment policy or none (rand-m9-mstd0.5-inc1)')
    add('--hflip', default=0.5, type=share, help='share of images that are mirrored (0.5)')
    add('--smoothing', default=0.1, type=below_one, help='label smoothing (0.1)')
    add('--train_interpolation', default='bicubic', choices=datasets.INTERPOLATIONS, help='of random crops (bicubic)')
    add('--crop_pct', default=None, type=number(float, 0, 1, above=True),
        help='share of the resized image that evaluation crops (224/256; 1.0 from 384 pixels on)')
    add('--reprob', default=0.25, type=share, help='share of images with random erasing (0.25)')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what erasing writes (pixel)')
    add('--recount', default=1, type=positive, help='how many areas it erases (1)')
    switch(augmentation, 'resplit', False, 'refused: it needs augmentation splits, which this recipe does not have')
    add('--mixup', default=0., type=rate, help='mixup alpha; 0 is off (0)')
    add('--cutmix', default=0., type=rate, help='cutmix alpha; 0 is off (0)')
    add('--cutmix_minmax', default=None, type=share, nargs=2, help='bounds of cutmix\'s area, instead of its alpha')
    add('--mixup_prob', default=1., type=share, help='share of batches that are mixed (1)')
    add('--mixup_switch_prob', default=0.5, type=share, help='share of these with cutmix, where both are on (0.5)')
    add('--mixup_mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one mix (batch)')

    finetuning = parser.add_argument_group('fine-tuning')
    add = finetuning.add_argument
    add('--finetune', default='', help='pretrained weights, a file or an https URL; empty trains from scratch')
    add('--model_key', default='model|module', help='where the file keeps them; the first found (model|module)')
    add('--model_prefix', default='', help='what their names have in front')
    add('--init_scale', default=0.001, type=rate, help='factor on the head\'s initial weights (0.001)')
    switch(finetuning, 'use_mean_pooling', True, 'pool by the mean of the patches; --use_cls: class token',
           off='use_cls')
    switch(finetuning, 'disable_weight_decay_on_rel_pos_bias', False, 'no weight decay on bias tables')

    data = parser.add_argument_group('data')
    add = data.add_argument
    add('--data_path', default='', help='folder with train/ and val/ of class folders; or demo: handwritten digits')
    add('--eval_data_path', default=None, help='class folders to evaluate on, instead of data_path/val')
    add('--nb_classes', default=0, type=whole, help='checked against the folders; 0 takes their number (0)')
    switch(data, 'imagenet_default_mean_and_std', False, 'ImageNet\'s mean and deviation instead of 0.5')
    add('--data_set', default='IMNET', help='IMNET (train/ and val/), image_folder (data_path and eval_data_path are '
        'the class folders) or CIFAR (CIFAR-100\'s archive, unpacked) (IMNET)')

    output = parser.add_argument_group('output')
    add = output.add_argument
    add('--output_dir', default='', help='folder for checkpoints and log.txt; empty writes none')
    add('--log_dir', default=None, help='folder for TensorBoard')
    add('--resume', default='', help='checkpoint, or the folder that holds it (newest; for --eval the best)')
    switch(output, 'auto_resume', False, 'resume the newest checkpoint of output_dir, where there is one')
    switch(output, 'save_ckpt', True, 'write checkpoints')
    switch(output, 'eval', False, 'evaluate --resume, and nothing else')
    switch(output, 'dist_eval', False, 'share the evaluation among the processes, every image exactly once')

    precision = parser.add_argument_group('precision')
    add = precision.add_argument
    switch(precision, 'amp', False, 'mixed precision, by apex where it is installed, else by PyTorch')
    add('--opt_level', default='O2', choices=backend.OPT_LEVELS, metavar='O0|O1|O2',
        help='O0 float32, O1 autocast, O2 half-precision weights with float32 masters (O2); also --opt-level')
    add('--amp_dtype', default=None, choices=backend.AMP_DTYPES, help='(float16; on a CPU bfloat16)')
    add('--loss_scale', default=None, type=loss_scale, help='a number, or dynamic (128 for float16, else 1)')

    distributed = parser.add_argument_group('distributed')
    add = distributed.add_argument
    add('--world_size', default=1, type=positive, help='set by the launcher (1)')
    add('--local_rank', default=-1, type=number(int, -1), help='set by the launcher (-1)')
    switch(distributed, 'dist_on_itp', False, 'take ranks from Open MPI\'s environment')
    add('--dist_url', default='env://', help='where the processes meet (env://)')
    return parser


def check_args(args, local_rank=0):
    """Everything that can be found wrong before anything slow starts. Raises `UserError`.

    Args:
        local_rank (int): the highest process of this machine, where a launcher asks before it starts them.
    """
    if args.model not in modeling_finetune.MODELS:
        raise unknown('--model', args.model, modeling_finetune.MODELS)
    patch = modeling_finetune.MODELS[args.model]['patch_size']
    if args.input_size % patch:
        below = args.input_size // patch * patch
        raise UserError('--input_size %d is not a multiple of the patch size %d of --model %s; use %s%d' % (
            args.input_size, patch, args.model, '%d or ' % below if below else '', below + patch))
    datasets.check_policy(args.aa)
    if args.resplit:
        raise UserError('--resplit needs augmentation splits, which this recipe does not have; leave it out')
    if args.warmup_steps <= 0 and args.warmup_epochs > args.epochs:
        raise UserError('--warmup_epochs %d is longer than --epochs %d; give --warmup_epochs=%d or fewer'
                        % (args.warmup_epochs, args.epochs, args.epochs))
    if datasets.mixes(args) and args.batch_size % 2 and not args.eval:
        raise UserError('--batch_size %d: mixup and cutmix pair images, so it must be even' % args.batch_size)
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise UserError('--cutmix_minmax %g %g: the first must be below the second' % tuple(args.cutmix_minmax))
    if args.opt_betas is not None and len(args.opt_betas) != 2:
        raise UserError('--opt_betas %s: give 2 numbers, as in --opt_betas 0.9 0.999'
                        % ' '.join(map(str, args.opt_betas)))
    if args.start_epoch >= args.epochs:
        raise UserError('--start_epoch %d: --epochs %d leaves nothing to train; raise --epochs'
                        % (args.start_epoch, args.epochs))
    if args.world_size > 1 and utils.launch_environment(args)[1] == 1:
        raise UserError('--world_size %d is set by the launcher; start the processes with test/train_full_8p.sh '
                        '--nproc_per_node=%d, or torchrun' % (args.world_size, args.world_size))
    datasets.check_paths(args)
    device = backend.find_device(args.device, local_rank or utils.launch_environment(args)[2])
    if device.type == 'cpu':
        backend.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    if not args.eval:
        optim_factory.check_optimizer(args.opt, args.momentum)
        checkpoint.check_finetune(args.finetune)
    if args.cann_prof:
        backend.check_cann_profiler()
    if args.eval and not (args.resume or args.finetune):
        raise UserError('--eval needs --resume: the checkpoint to evaluate, or the folder that holds it')
    if args.resume:
        checkpoint.find(args.resume, prefer_best=args.eval)
    if args.log_dir and importlib.util.find_spec('tensorboardX') is None:
        raise UserError('--log_dir %s needs tensorboardX; run: pip install tensorboardX' % args.log_dir)
    for flag, folder in (('--output_dir', args.output_dir), ('--log_dir', args.log_dir)):
        utils.check_writable(flag, folder)


# ---- steps of main

def build_model(args, nb_classes):
    return create_model(
        args.model, pretrained=False, num_classes=nb_classes, img_size=args.input_size, drop_rate=args.drop,
        drop_path_rate=args.drop_path, attn_drop_rate=args.attn_drop_rate, use_mean_pooling=args.use_mean_pooling,
        init_scale=args.init_scale, use_rel_pos_bias=args.rel_pos_bias, use_abs_pos_emb=args.abs_pos_emb,
        init_values=args.layer_scale_init_value)


def build_optimizer(args, model):
    return optim_factory.create_optimizer(
        model, args.opt, args.lr, args.weight_decay, args.layer_decay, args.opt_eps, args.opt_betas, args.momentum,
        args.disable_weight_decay_on_rel_pos_bias)


def build_criterion(args, mixup):
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else torch.nn.CrossEntropyLoss()


def count_steps(args, images):
    """Update steps per epoch. Raises `UserError` where an epoch has none or the warm-up outlasts the run."""
    total_batch = args.batch_size * args.update_freq * utils.world_size()
    if images < total_batch:
        raise UserError('--batch_size %d x %d processes x --update_freq %d = %d images an update, more than the %d of '
                        'the training set; lower one of them'
                        % (args.batch_size, utils.world_size(), args.update_freq, total_batch, images))
    steps = images // total_batch
    if args.warmup_steps > steps * args.epochs:
        raise UserError('--warmup_steps %d is longer than the run of %d steps; lower it'
                        % (args.warmup_steps, steps * args.epochs))
    return steps


def build_schedules(args, steps_per_epoch):
    """(learning rate, weight decay) of each update step."""
    warmup = dict(warmup_epochs=args.warmup_epochs, warmup_steps=args.warmup_steps)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    lr = optim_factory.cosine_scheduler(args.lr, args.min_lr, args.epochs, steps_per_epoch,
                                        start_warmup_value=args.warmup_lr, **warmup)
    return lr, optim_factory.cosine_scheduler(args.weight_decay, end, args.epochs, steps_per_epoch)


def evaluate_all(args, loader, model, ema, device, scaler_dtype, throughput=None):
    """(statistics of the model, of its average or None), each printed."""
    sharded = args.dist_eval and utils.world_size() > 1
    results = []
    for name, network in (('network', model), ('averaged network (EMA)', ema and ema.ema)):
        if network is None:
            results.append(None)
            continue
        if network is not model:
            network = backend.autocast_for_evaluation(network, device, scaler_dtype, args.opt_level)
            network.to(device)
        stats = engine.evaluate(loader, network, device, sharded, throughput)
        utils.say('Accuracy of the %s on the %d test images: %.3f%%' % (name, stats['images'], stats['acc1']))
        results.append(stats)
        throughput = None
    return results


def print_result(throughput, accuracy, loss):
    """The line that the scripts in test/ read. A figure that there is none of is n/a."""
    utils.say('Result: images_per_second %.2f step_milliseconds %.3f accuracy %s loss %s' % (
        throughput.images_per_second, throughput.step_milliseconds,
        'n/a' if accuracy is None else '%.3f' % accuracy, 'n/a' if loss is None else '%.4f' % loss))


def main(args):
    check_args(args)
    device = utils.init_distributed_mode(args)
    dtype = backend.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    utils.seed_everything(args.seed)

    train_set, val_set, classes = datasets.build_datasets(args)
    steps_per_epoch = None if args.eval else count_steps(args, len(train_set))
    train_loader, val_loader = datasets.build_loaders(args, train_set, val_set, backend.can_pin_memory(device))

    model = build_model(args, len(classes))
    if args.finetune:
        checkpoint.load_pretrained(model, args.finetune, args.model_key, args.model_prefix)
    model.to(device)
    optimizer = None if args.eval else build_optimizer(args, model)
    ema = utils.ModelEma(model, args.model_ema_decay, 'cpu' if args.model_ema_force_cpu else None) \
        if args.model_ema else None
    model, scaler = backend.initialize_amp(model, optimizer, device, dtype, args.opt_level, args.loss_scale)
    describe(args, device, scaler, model, train_set, val_set, classes, steps_per_epoch)

    if args.eval:
        evaluate_only(args, model, scaler, ema, val_loader, device, dtype)
        return
    source = checkpoint.source_to_resume(args.resume, args.auto_resume, args.output_dir)
    utils.prepare_folder(args.output_dir, keep=source or args.prof or args.cann_prof)
    utils.seed_everything(args.seed + utils.rank())  # each process its own dropout
    start_epoch, best = checkpoint.resume_training(source, model, optimizer, scaler, ema) if source \
        else (args.start_epoch, {})
    if utils.world_size() > 1:
        model = backend.distributed_model(model, device)

    mixup = datasets.build_mixup(args, len(classes))
    lr_values, wd_values = build_schedules(args, steps_per_epoch)
    training = dict(model=model, criterion=build_criterion(args, mixup), data_loader=train_loader,
                    optimizer=optimizer, device=device,
                    loss_scaler=scaler, max_norm=args.clip_grad, model_ema=ema, mixup_fn=mixup,
                    lr_schedule_values=lr_values, wd_schedule_values=wd_values, update_freq=args.update_freq)
    if args.prof or args.cann_prof:
        engine.profile(os.path.join(args.output_dir or '.', 'prof'), cann=args.cann_prof, **training)
        return
    fit(args, training, val_loader, start_epoch, steps_per_epoch, best, dtype)


def describe(args, device, scaler, model, train_set, val_set, classes, steps_per_epoch):
    """Say at the start what this run is."""
    say = utils.say
    say('Flags: %s' % ' '.join('--%s=%s' % item for item in sorted(vars(args).items()) if item[1] is not None))
    say('Device: %s, %s, %d process%s' % (device, backend.device_name(device), utils.world_size(),
                                          'es' if utils.world_size() > 1 else ''))
    say('Precision: %s' % scaler.description)
    say('Model: %s, %.2f M parameters, %d classes, input %dx%d' % (
        args.model, parameters(model) / 1e6, len(classes), args.input_size, args.input_size))
    say('Data: %s training and %s validation images' % tuple('no' if part is None else len(part)
                                                             for part in (train_set, val_set)))
    if steps_per_epoch:
        say('Batch: %d per device x %d x %d accumulated = %d; %d update steps an epoch, %d in all' % (
            args.batch_size, utils.world_size(), args.update_freq,
            args.batch_size * args.update_freq * utils.world_size(), steps_per_epoch, steps_per_epoch * args.epochs))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def evaluate_only(args, model, scaler, ema, val_loader, device, dtype):
    if args.resume:
        source = checkpoint.find(args.resume, prefer_best=True)
        utils.say('Evaluating %s' % source)
        content = checkpoint.resume_weights(source, model, scaler, ema)
        if ema is not None and 'model_ema' not in content:
            utils.say('%s holds no averaged weights (it was trained without --model_ema)' % source)
            ema = None
    throughput = utils.Throughput(warmup_steps=1)
    stats, _ = evaluate_all(args, val_loader, model, ema, device, dtype, throughput)
    print_result(throughput, stats['acc1'], stats['loss'])


def fit(args, training, val_loader, start_epoch, steps_per_epoch, best, dtype):
    """Train from `start_epoch` on; evaluate, save and log after each epoch."""
    device, ema, throughput, started = training['device'], training['model_ema'], utils.Throughput(), time.time()
    writer = utils.TensorboardLogger(args.log_dir) if args.log_dir and utils.is_main_process() else None
    step_limit = min(args.maxstep or args.epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    train_stats, test_stats = {}, None
    for epoch in range(start_epoch, args.epochs):
        steps = min(steps_per_epoch, step_limit - epoch * steps_per_epoch)
        if steps <= 0:
            break
        is_last = (epoch + 1) * steps_per_epoch >= step_limit
        training['data_loader'].sampler.set_epoch(epoch)
        train_stats = engine.train_one_epoch(
            epoch=epoch, log_writer=writer, start_steps=epoch * steps_per_epoch,
            num_training_steps_per_epoch=steps, throughput=throughput, **training)
        test_stats, ema_stats = (None, None) if val_loader is None else evaluate_all(
            args, val_loader, training['model'], ema, device, dtype)
        improved = note_best(best, test_stats, ema_stats)
        if args.output_dir and args.save_ckpt:
            save_checkpoints(args, epoch, training, best, improved, is_last)
        record(args, writer, epoch, training['model'], train_stats, test_stats, ema_stats)
    if writer is not None:
        writer.close()
    utils.say('Training time %s' % datetime.timedelta(seconds=int(time.time() - started)))
    if start_epoch >= args.epochs:
        utils.say('Nothing left to train: all %d epochs are done; raise --epochs to go on' % args.epochs)
    print_result(throughput, best.get('accuracy'), train_stats.get('loss'))


def note_best(best, test_stats, ema_stats):
    """Update the best accuracies; gives the checkpoint names that are new bests."""
    improved = []
    for name, stats, file_name in (('accuracy', test_stats, checkpoint.BEST),
                                   ('ema_accuracy', ema_stats, checkpoint.BEST_EMA)):
        if stats is not None and stats['acc1'] > best.get(name, -1.):
            best[name] = stats['acc1']
            improved.append(file_name)
    if test_stats is not None:
        utils.say('Max accuracy: %.3f%%%s' % (best['accuracy'], '' if ema_stats is None
                                              else ', of the average: %.3f%%' % best['ema_accuracy']))
    return improved


def save_checkpoints(args, epoch, training, best, improved, is_last):
    names = improved + (['checkpoint-%d.pth' % epoch] if is_last or (epoch + 1) % args.save_ckpt_freq == 0 else [])
    if not names or not utils.is_main_process():
        return
    content = checkpoint.training_state(args, epoch, training['model'], training['optimizer'],
                                        training['loss_scaler'], training['model_ema'], best)
    for name in names:
        checkpoint.save(os.path.join(args.output_dir, name), content)


def record(args, writer, epoch, model, train_stats, test_stats, ema_stats):
    """One JSON line in log.txt, and the epoch's scalars to TensorBoard."""
    if not utils.is_main_process():
        return
    stats = {'train_' + name: value for name, value in train_stats.items()}
    stats.update({'test_' + name: value for name, value in (test_stats or {}).items() if name != 'images'})
    stats.update({'test_ema_' + name: value for name, value in (ema_stats or {}).items() if name != 'images'})
    if args.output_dir:
        utils.append_log(args.output_dir, dict(stats, epoch=epoch, n_parameters=parameters(model)))
    if writer is not None:
        for prefix, results in (('test', test_stats), ('ema', ema_stats)):
            if results:
                writer.update('perf', epoch, **{'%s_%s' % (prefix, name): results[name]
                                                for name in ('acc1', 'acc5', 'loss')})


def run(argv=None):
    """Parse, run, and turn what the user can mend into one line and exit status 2."""
    try:
        main(build_parser().parse_args(argv))
        utils.leave_processes()
    except UserError as error:
        utils.wait_for_others_to_speak(first=utils.is_main_process())
        return fail(one_line(error), 2)
    except RuntimeError as error:
        if not utils.lost_a_process(error):
            raise
        utils.wait_for_others_to_speak()
        return fail('lost the connection to another process, which ended or hangs; its own message says why', 1)
    return 0


def fail(message, status):
    rank = utils.rank()
    print('run_class_finetuning.py: error: %s%s' % ('process %d: ' % rank if rank else '', message),
          file=sys.stderr, flush=True)
    if utils.world_size() > 1:
        os._exit(status)  # an orderly exit would wait for processes that wait for this one
    return status


if __name__ == '__main__':
    sys.exit(run())
