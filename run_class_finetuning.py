#!/usr/bin/env python3
"""Fine-tune or evaluate a BEiT image classifier.

    python run_class_finetuning.py --data_path demo --model beit_nano_patch8_32 --input_size 32 …
    python run_class_finetuning.py --data_path /data/ImageNet2012 --finetune checkpoints/weights.pth --output_dir out
    python run_class_finetuning.py --data_path /data/ImageNet2012 --resume out --eval

The scripts in test/ call this with the published hyper-parameters. BEiT base fine-tuned for 30 epochs on 8 NPUs reached
85.238 % top-1 (the Ascend adaptation's figure; not measured by this project).
"""

import datetime
import os
import sys
import time

import backend  # first: it sets how torch loads its devices
import attention
import checkpoint
import datasets
import distributed
import engine_for_finetuning as engine
import optim_factory
import precision
import pretrained
import utils
from errors import UserError, one_line
from flags import build_parser, check_args

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model


# ---- steps of main

def build_model(args, nb_classes):
    return create_model(
        args.model, pretrained=False, num_classes=nb_classes, img_size=args.input_size, drop_rate=args.drop,
        drop_path_rate=args.drop_path, attn_drop_rate=args.attn_drop_rate, use_mean_pooling=args.use_mean_pooling,
        init_scale=args.init_scale, use_rel_pos_bias=args.rel_pos_bias, use_abs_pos_emb=args.abs_pos_emb,
        init_values=args.layer_scale_init_value)


def build_optimizer(args, model, under_apex):
    return optim_factory.create_optimizer(
        model, args.opt, args.lr, args.weight_decay, args.layer_decay, args.opt_eps, args.opt_betas, args.momentum,
        args.disable_weight_decay_on_rel_pos_bias, under_apex)


def build_criterion(args, mixup):
    if mixup is not None:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else torch.nn.CrossEntropyLoss()


def count_steps(args, images):
    """Update steps per epoch. Raises `UserError` where an epoch has none or the warm-up outlasts the run."""
    total_batch = args.batch_size * args.update_freq * distributed.world_size()
    if images < total_batch:
        raise UserError('--batch_size %d x %d processes x --update_freq %d = %d images an update, more than the %d of '
                        'the training set; lower one of them'
                        % (args.batch_size, distributed.world_size(), args.update_freq, total_batch, images))
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


def evaluate_all(args, loader, model, ema, device, dtype, throughput=None):
    """(statistics of the model, of its average or None), each printed."""
    sharded = args.dist_eval and distributed.world_size() > 1

    def evaluate(name, network, throughput=None):
        stats = engine.evaluate(loader, network, device, sharded, throughput)
        distributed.say('Accuracy of the %s on the %d test images: %.3f%%' % (name, stats['images'], stats['acc1']))
        return stats

    stats, ema_stats = evaluate('network', model, throughput), None
    if ema is not None:
        average = precision.autocast_for_evaluation(ema.ema.to(device), device, dtype, args.opt_level)
        ema_stats = evaluate('averaged network (EMA)', average)
        ema.ema.to('cpu' if args.model_ema_force_cpu else device)
    return stats, ema_stats


def resume(args, model, optimizer, scaler, ema, device):
    """(checkpoint that was taken up or '', first epoch to train, dict of best accuracies), alike on every process."""
    source = checkpoint.source_to_resume(args.resume, args.auto_resume, args.output_dir)
    start_epoch, best = args.start_epoch, {}
    if source:
        start_epoch, best = checkpoint.resume_training(source, model, optimizer, scaler, ema)
    if not distributed.same_on_all(start_epoch, device):
        raise UserError('--%s: the processes did not find the same checkpoint (this one %s); every machine needs the '
                        'same files there' % ('resume ' + args.resume if args.resume else 'output_dir '
                                              + args.output_dir, source or 'none'))
    return source, start_epoch, best


def print_result(throughput, accuracy, loss):
    """The line that the scripts in test/ read. A figure that there is none of is n/a."""
    distributed.say('Result: images_per_second %.2f step_milliseconds %.3f accuracy %s loss %s' % (
        throughput.images_per_second, throughput.step_milliseconds,
        'n/a' if accuracy is None else '%.3f' % accuracy, 'n/a' if loss is None else '%.4f' % loss))


def main(args):
    check_args(args)
    device = distributed.init_distributed_mode(args)
    backend.set_compile_mode(device, args.jit_compile)
    dtype = backend.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    utils.seed_everything(args.seed)

    train_set, val_set, classes = datasets.build_datasets(args)
    steps_per_epoch = None if args.eval else count_steps(args, len(train_set))
    train_loader, val_loader = datasets.build_loaders(args, train_set, val_set, backend.can_pin_memory(device))

    model = build_model(args, len(classes))
    if args.finetune:
        pretrained.load_pretrained(model, args.finetune, args.model_key, args.model_prefix)
    model.to(device)
    optimizer = None if args.eval else build_optimizer(args, model, backend.apex_amp(device, dtype) is not None)
    ema = utils.ModelEma(model, args.model_ema_decay, 'cpu' if args.model_ema_force_cpu else None) \
        if args.model_ema else None
    model, scaler = precision.initialize_amp(model, optimizer, device, dtype, args.opt_level, args.loss_scale)
    about_attention = attention.choose_attention(backend.unwrap(model), device, args.attention, dtype, args.batch_size)
    describe(args, device, scaler, about_attention, model, train_set, val_set, classes, steps_per_epoch)

    if args.eval:
        evaluate_only(args, model, scaler, ema, val_loader, device, dtype)
        return
    utils.seed_everything(args.seed + distributed.rank())  # each process its own dropout
    source, start_epoch, best = resume(args, model, optimizer, scaler, ema, device)
    goes_on = start_epoch > 0 and checkpoint.lies_in(source, args.output_dir)
    utils.prepare_folder(args.output_dir, keep=goes_on or args.prof or args.cann_prof)
    if distributed.world_size() > 1:
        model = backend.distributed_model(model, device)

    mixup = datasets.build_mixup(args, len(classes))
    lr_values, wd_values = build_schedules(args, steps_per_epoch)
    training = dict(model=model, criterion=build_criterion(args, mixup), data_loader=train_loader,
                    optimizer=optimizer, device=device, loss_scaler=scaler, max_norm=args.clip_grad, model_ema=ema,
                    mixup_fn=mixup, lr_schedule_values=lr_values, wd_schedule_values=wd_values,
                    update_freq=args.update_freq)
    if args.prof or args.cann_prof:
        engine.profile(os.path.join(args.output_dir or '.', 'prof'), cann=args.cann_prof, **training)
        return
    fit(args, training, val_loader, start_epoch, steps_per_epoch, best, dtype)


def describe(args, device, scaler, about_attention, model, train_set, val_set, classes, steps_per_epoch):
    """Say at the start what this run is."""
    say = distributed.say
    say('Flags: %s' % ' '.join('--%s=%s' % item for item in sorted(vars(args).items()) if item[1] is not None))
    say('Device: %s, %s, %d process%s' % (device, backend.device_name(device), distributed.world_size(),
                                          'es' if distributed.world_size() > 1 else ''))
    if backend.npu_passed_over(args.device, device):
        say(backend.npu_passed_over(args.device, device).rstrip())
    say('Precision: %s' % scaler.description)
    say('Attention: %s' % about_attention)
    say('Model: %s, %.2f M parameters, %d classes, input %dx%d' % (
        args.model, parameters(model) / 1e6, len(classes), args.input_size, args.input_size))
    say('Data: %s training and %s validation images' % tuple('no' if part is None else len(part)
                                                             for part in (train_set, val_set)))
    if steps_per_epoch:
        say('Batch: %d per device x %d x %d accumulated = %d; %d update steps an epoch, %d in all' % (
            args.batch_size, distributed.world_size(), args.update_freq,
            args.batch_size * args.update_freq * distributed.world_size(), steps_per_epoch,
            steps_per_epoch * args.epochs))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def evaluate_only(args, model, scaler, ema, val_loader, device, dtype):
    if args.resume:
        source = checkpoint.find(args.resume, prefer_best=True)
        distributed.say('Evaluating %s' % source)
        content = checkpoint.resume_weights(source, model, scaler, ema)
        if ema is not None and 'model_ema' not in content:
            distributed.say('%s holds no averaged weights (it was trained without --model_ema)' % source)
            ema = None
    throughput = utils.Throughput(warmup_steps=1)
    stats, _ = evaluate_all(args, val_loader, model, ema, device, dtype, throughput)
    print_result(throughput, stats['acc1'], stats['loss'])


def fit(args, training, val_loader, start_epoch, steps_per_epoch, best, dtype):
    """Train from `start_epoch` on; evaluate, save and log after each epoch."""
    device, ema, throughput, started = training['device'], training['model_ema'], utils.Throughput(), time.time()
    writer = utils.TensorboardLogger(args.log_dir) if args.log_dir and distributed.is_main_process() else None
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
    distributed.say('Training time %s' % datetime.timedelta(seconds=int(time.time() - started)))
    if start_epoch >= args.epochs:
        distributed.say('Nothing left to train: all %d epochs are done; raise --epochs to go on' % args.epochs)
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
        distributed.say('Max accuracy: %.3f%%%s' % (best['accuracy'], '' if ema_stats is None
                                              else ', of the average: %.3f%%' % best['ema_accuracy']))
    return improved


def save_checkpoints(args, epoch, training, best, improved, is_last):
    names = improved + (['checkpoint-%d.pth' % epoch] if is_last or (epoch + 1) % args.save_ckpt_freq == 0 else [])
    if not names or not distributed.is_main_process():
        return
    content = checkpoint.training_state(args, epoch, training['model'], training['optimizer'],
                                        training['loss_scaler'], training['model_ema'], best)
    for name in names:
        checkpoint.save(os.path.join(args.output_dir, name), content)


def record(args, writer, epoch, model, train_stats, test_stats, ema_stats):
    """One JSON line in log.txt, and the epoch's scalars to TensorBoard."""
    if not distributed.is_main_process():
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
        return run_and_explain(argv)
    except KeyboardInterrupt:  # also while an error is told: another process, interrupted too, may have caused that one
        return fail('interrupted; with --output_dir, the same command and --auto_resume goes on from the last '
                    'checkpoint', 130)


def run_and_explain(argv):
    try:
        main(build_parser(__doc__).parse_args(argv))
        distributed.leave_processes()
    except UserError as error:
        distributed.wait_for_others_to_speak(first=distributed.speaks_first())
        return fail(one_line(error), 2)
    except RuntimeError as error:
        if not distributed.lost_a_process(error):
            raise
        distributed.wait_for_others_to_speak()
        return fail('lost the connection to another process, which ended or hangs; its own message says why', 1)
    return 0


def fail(message, status):
    rank = distributed.rank()
    print('run_class_finetuning.py: error: %s%s' % ('process %d: ' % rank if rank else '', message),
          file=sys.stderr, flush=True)
    if distributed.world_size() > 1:
        os._exit(status)  # an orderly exit would wait for processes that wait for this one
    return status


if __name__ == '__main__':
    sys.exit(run())
