#!/usr/bin/env python3
"""Fine-tune or evaluate a BEiT image classifier.

    python run_class_finetuning.py --data_path demo --model beit_nano_patch8_32 --input_size 32 …
    python run_class_finetuning.py --data_path /data/ImageNet2012 --finetune checkpoints/weights.pth --output_dir out
    python run_class_finetuning.py --data_path /data/ImageNet2012 --resume out --eval

The scripts in test/ call this with the published hyper-parameters. BEiT base fine-tuned for 30 epochs on 8 NPUs reached
85.238 % top-1 (the Ascend adaptation's figure; not measured by this project).
"""

if __name__ == '__main__':
    import errors
    errors.quiet_interrupt()

import datetime
import gc
import os
import sys
import time

import backend  # first: it sets how torch loads its devices
import attention
import augmentation
import bad_images
import checkpoint
import criteria
import datasets
import distributed
import engine_for_finetuning as engine
import index_cache
import optim_factory
import precision
import preemption
import pretrained
import progress as watching
import run_files
import scores
import splits
import utils
import watchdog
from cli import exit_process, exit_with_error, run_with_error_report
from criteria import build_criterion
from errors import UserError, escape_text
from flags import build_parser, check_args, without_effect
from networks import build_model
from pilot import RunPilot
from report import Report


PROGRAM = 'run_class_finetuning.py'
DRAWS = 2  # another number whenever the same seed gives a run other random numbers than before


# ---- steps of main

def choose_speed(args, model, device):
    """What the flags say of how the model computes, where what it computes stays the same."""
    model.set_grad_checkpointing(args.grad_checkpointing)
    for block in model.blocks:
        block.skips_dropped = args.skip_dropped == 'on' or (
            args.skip_dropped == 'auto' and device.type == 'cpu' and not args.compile)
    if args.compile:
        backend.compile_in_place(model)


def freeze_as_due(args, model, epoch):
    """Freeze or unfreeze the backbone as --freeze_backbone has it in this epoch; gives whether that changed.

    The optimizer holds all parameters all along: those without a gradient it leaves alone, so a checkpoint has the same
    groups before and after, and a parameter's moments begin when it does.
    """
    freeze = args.freeze_backbone and not 0 < args.unfreeze_epoch <= epoch
    if freeze == model.backbone_frozen:
        return False
    model.freeze_backbone(freeze)
    distributed.say('%s, %d of %d parameters' % (
        'Training the head alone' if freeze else 'Training the whole model', parameters(model),
        sum(parameter.numel() for parameter in model.parameters())))
    return True


def distribute(model, device):
    """The model in DistributedDataParallel, which takes note now of what trains; itself where there's one process."""
    return backend.distributed_model(model, device) if distributed.world_size() > 1 else model


def unfreeze_when_due(args, training, epoch):
    """Before an epoch: where the backbone begins to train, all that hangs on what trains is made anew."""
    if freeze_as_due(args, backend.unwrap(training['model']), epoch) and distributed.world_size() > 1:
        model = training.pop('model').module
        gc.collect()  # with the old DistributedDataParallel its hooks go
        training['model'] = distribute(model, training['device'])
    if 0 < args.unfreeze_epoch <= epoch:
        optim_factory.complete_momenta(training['optimizer'])


def build_optimizer(args, model, under_apex):
    if args.unfreeze_epoch and under_apex:
        raise UserError('--unfreeze_epoch %d: apex gathers the gradients of the first step and looks for no others '
                        'later; leave --amp out, or use two runs, the second with --finetune' % args.unfreeze_epoch)
    return optim_factory.create_optimizer(
        model, args.opt, args.lr, args.weight_decay, args.layer_decay, args.opt_eps, args.opt_betas, args.momentum,
        args.disable_weight_decay_on_rel_pos_bias, under_apex)


def choose_class_weights(args, train_set, classes):
    """What each class weighs in the loss, float32 (classes,), told; or None."""
    if args.eval or not args.class_weights:
        return None
    counts = splits.class_counts(datasets.labelled(train_set), len(classes))
    weights = criteria.class_weights(args.class_weights, classes, counts)
    distributed.say(criteria.describe_weights(weights, classes))
    return weights


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


def evaluate_all(args, loader, model, ema, device, dtype, throughput, unreadable, wish=None, predictions=None):
    """(statistics of the model, of its average or None), each printed; (None, None) where a signal broke it off."""
    sharded = args.dist_eval and distributed.world_size() > 1

    def evaluate(name, network, throughput=None, predictions=None):
        wanted = scores.scores_for(args, loader.dataset.dataset) + ([predictions] if predictions is not None else [])
        stats = engine.evaluate(loader, engine.WithMirrorImage(network) if args.test_flip else network, device, sharded,
                                throughput, wish, wanted)
        if stats is not None:
            left_out = len(set(stats['unreadable']))
            if left_out:
                unreadable.report(stats['unreadable'], len(loader.dataset), 'validation')
            del stats['unreadable']
            figure = scores.best_by(stats)
            distributed.say('%s of the %s on the %d test images: %.3f%%%s' % (
                'Accuracy' if figure == 'acc1' else figure, name, stats['images'], stats[figure],
                ' (%d more could not be read and are not counted)' % left_out if left_out else ''),
                detail=wish is not None)  # in training, the epoch's own line has it
            if 'real_acc1' in stats:
                distributed.say('By real labels: top-1 %.3f%%, top-5 %.3f%% of %d images' % (
                    stats['real_acc1'], stats['real_acc5'], stats['real_images']))
        return stats

    stats, ema_stats = evaluate('network', model, throughput, predictions), None
    if ema is not None and stats is not None:
        average = precision.autocast_for_evaluation(ema.ema.to(device), device, dtype, args.opt_level)
        ema_stats = evaluate('averaged network (EMA)', average)
        ema.ema.to('cpu' if args.model_ema_force_cpu else device)
        stats = stats if ema_stats is not None else None
    return stats, ema_stats


def resume(args, model, optimizer, scaler, ema, device, run):
    """(checkpoint that was taken up or '', checkpoint.Progress), alike on every process.

    Args:
        run (dict): what the data order of this run hangs on, compared with that of the checkpoint.
    """
    source, content = checkpoint.find_together(args, device)
    if content is None:
        return source, checkpoint.Progress(args.start_epoch, run=run)
    checkpoint.check_same_split(source, content, args)
    progress = checkpoint.resume_training(source, content, model, optimizer, scaler, ema)
    changes = checkpoint.resume_differences(content, args, run, without_effect())
    if progress.steps and progress.run.get('total_batch') != run['total_batch']:
        raise UserError('--resume %s: it was saved in mid-epoch with a total batch of %s, and this one is %d; make '
                        '--batch_size x --update_freq x processes the same, or resume the checkpoint of a whole epoch'
                        % (source, progress.run.get('total_batch'), run['total_batch']))
    same_order = not any(change.startswith(('--seed ', 'images: ', 'total_batch: ')) for change in changes)
    distributed.say('Goes on exactly as if it had not been stopped' if not changes else
                    'Goes on in %s order of the data, %s not with the same numbers as without a stop: %s' % (
                        'the same' if same_order else 'another', 'but' if same_order else 'and', '; '.join(changes)))
    progress.run = run
    return source, progress


def print_result(throughput, accuracy, loss, average_precision=None):
    """The line that the scripts in test/ read. A figure that there is none of is n/a, mAP left out."""
    distributed.say('Result: images_per_second %.2f step_milliseconds %.3f accuracy %s loss %s%s' % (
        throughput.images_per_second, throughput.step_milliseconds,
        'n/a' if accuracy is None else '%.3f' % accuracy, 'n/a' if loss is None else '%.4f' % loss,
        '' if average_precision is None else ' mAP %.3f' % average_precision))


def start(args):
    """The device of this process, which has met the others."""
    if args.deterministic:
        backend.prepare_determinism()
    device = distributed.init_distributed_mode(args)
    watchdog.start(distributed.meeting_store(), args.dist_timeout)
    watching.watch()
    backend.set_compile_mode(device, args.jit_compile)
    if args.deterministic:
        backend.make_deterministic(device)
    return device


def known_classes(args, device):
    """The class names in the checkpoint to evaluate, where no folder and no --train_csv tells them; or None."""
    if not (args.eval and args.val_csv and args.resume) or args.train_csv:
        return None
    content = checkpoint.find_together(args, device)[1]
    names = content.get('classes') if isinstance(content, dict) else None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def check_data(args):
    """Decode every image; a `UserError` says how many cannot be."""
    damaged = bad_images.check_data(args)
    if damaged:
        place = ', listed in %s' % os.path.join(args.output_dir, bad_images.LIST) if args.output_dir else ''
        raise UserError('--check_data: %d image%s cannot be read%s; mend or remove what is listed, or leave it out '
                        'with --bad_images skip, and a --max_bad_images above its share'
                        % (damaged, 's' if damaged > 1 else '', place))


def main(args, signals):
    check_args(args)
    if args.check_data:
        if distributed.speaks_first():  # the others would decode the same
            check_data(args)
        return
    device = start(args)
    dtype = backend.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    utils.seed_everything(args.seed)

    train_set, val_set, classes = datasets.build_datasets(args, device, known_classes(args, device))
    if val_set is not None:
        datasets.check_fits(val_set)
        scores.check_scores(args, val_set)
    weights = choose_class_weights(args, train_set, classes)
    steps_per_epoch = None if args.eval else count_steps(args, len(train_set))
    train_loader, val_loader = datasets.build_loaders(args, train_set, val_set, device)

    model = build_model(args, len(classes))
    if args.finetune:
        pretrained.load_pretrained(model, args.finetune, args.model_key, args.model_prefix)
    model.to(device)
    optimizer = None if args.eval else build_optimizer(args, model, backend.apex_amp(device, dtype) is not None)
    ema = utils.ModelEma(model, args.model_ema_decay, 'cpu' if args.model_ema_force_cpu else None) \
        if args.model_ema else None
    model, scaler = precision.initialize_amp(model, optimizer, device, dtype, args.opt_level, args.loss_scale)
    about_attention = attention.choose_attention(
        backend.unwrap(model), device, 'plain' if args.deterministic and args.attention == 'auto' else args.attention,
        dtype, args.batch_size)
    choose_speed(args, backend.unwrap(model), device)
    about = (args, device, scaler, about_attention, model, train_set, val_set, classes, steps_per_epoch)

    environment = run_files.environment(args, device, scaler, parameters(model), classes, train_set, val_set)
    if args.eval:
        describe(*about)
        report = Report(args, environment, classes, None, val_set, prefix='eval-')
        evaluate_only(args, model, scaler, ema, val_loader, device, dtype, report)
        return
    run = dict(processes=distributed.world_size(), images=len(train_set), device=device.type, random_numbers=DRAWS,
               total_batch=args.batch_size * args.update_freq * distributed.world_size(),
               **({} if weights is None else {'class_weights': criteria.fingerprint(weights)}))
    source, progress = resume(args, model, optimizer, scaler, ema, device, run)
    describe(*about, source)
    goes_on = source and checkpoint.lies_in(source, args.output_dir)
    utils.prepare_folder(args.output_dir, keep=goes_on or args.prof or args.cann_prof)
    index_cache.write_late(train_set, val_set)
    freeze_as_due(args, backend.unwrap(model), progress.epoch)

    mixup = augmentation.build_mixup(args, len(classes))
    multi_label = splits.is_multi_label(datasets.labelled(train_set))
    criterion = build_criterion(args, mixup, None if weights is None else weights.to(device), multi_label)
    lr_values, wd_values = build_schedules(args, steps_per_epoch)
    training = dict(model=distribute(model, device), criterion=criterion, data_loader=train_loader,
                    optimizer=optimizer, device=device, loss_scaler=scaler, max_norm=args.clip_grad, model_ema=ema,
                    mixup_fn=mixup, lr_schedule_values=lr_values, wd_schedule_values=wd_values,
                    update_freq=args.update_freq, seed=args.seed)
    if args.prof or args.cann_prof:
        engine.profile(os.path.join(args.output_dir or '.', 'prof'), cann=args.cann_prof, **training)
        return
    pilot = RunPilot(args, signals, progress, bad_images.BadImages(args.output_dir, args.max_bad_images), train_set,
                     dict(model=model, optimizer=optimizer, scaler=scaler, ema=ema, classes=classes,
                          activation=criteria.activation(args, multi_label)))
    report = Report(args, environment, classes, train_set, val_set)
    with signals.finishing():
        fit(args, training, val_loader, pilot, steps_per_epoch, dtype, report)


def describe(args, device, scaler, about_attention, model, train_set, val_set, classes, steps_per_epoch, source=''):
    """Say at the start what this run is."""
    distributed.say('Flags: %s' % escape_text(' '.join('--%s=%s' % item for item in sorted(vars(args).items())
                                                       if item[1] is not None)), detail=True)
    processes = distributed.world_size()
    rows = [('Device', '%s, %s, %d process%s' % (device, backend.device_name(device), processes,
                                                 'es' if processes > 1 else ''))]
    if backend.npu_passed_over(args.device, device):
        rows.append(('', backend.npu_passed_over(args.device, device).rstrip()))
    rows += [
        ('Precision', scaler.description),
        ('Attention', about_attention),
        ('Model', '%s, %.2f M parameters, %d classes, input %dx%d' % (
            args.model, parameters(model) / 1e6, len(classes), args.input_size, args.input_size)),
        ('Classes', shorten_names(classes) + (' (one only: there is nothing to tell apart)' * (len(classes) == 1))),
        ('Data', '%s training and %s validation images' % tuple('no' if part is None else len(part)
                                                                for part in (train_set, val_set)))]
    if steps_per_epoch:
        steps = steps_per_epoch * args.epochs
        rows.append(('Batch', '%d per device x %d x %d accumulated = %d; %d update steps an epoch, %d in all%s' % (
            args.batch_size, processes, args.update_freq, args.batch_size * args.update_freq * processes,
            steps_per_epoch, steps, '; --maxstep ends after %d' % args.maxstep if 0 < args.maxstep < steps else '')))
        rows.append(('Checkpoints', 'each %d epochs and the best into %s' % (args.save_ckpt_freq,
                                                                           escape_text(args.output_dir))
                     if args.output_dir and args.save_ckpt else 'none'))
        rows.append(('Resumed', escape_text(source) if source else 'nothing, training starts'))
    distributed.say_table(rows)


def shorten_names(names, most=6):
    shown = [escape_text(name) for name in names[:most]]
    return ', '.join(shown) + (', … and %d more' % (len(names) - most) if len(names) > most else '')


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def evaluate_only(args, model, scaler, ema, val_loader, device, dtype, report):
    started, source, epoch = time.time(), args.finetune, 0
    if args.resume:
        source, content = checkpoint.find_together(args, device)
        distributed.say('Evaluating %s' % escape_text(source))
        checkpoint.check_same_split(source, content, args)
        checkpoint.load_weights(source, content, model, scaler, ema)
        epoch = checkpoint.last_epoch(content)
        if ema is not None and not content.get('model_ema'):
            distributed.say('%s holds no averaged weights (it was trained without --model_ema)' % escape_text(source))
            ema = None
    unreadable = bad_images.BadImages(args.output_dir, args.max_bad_images)
    throughput = utils.Throughput(warmup_steps=1)
    stats, ema_stats = evaluate_all(args, val_loader, model, ema, device, dtype, throughput, unreadable,
                                    predictions=report.predictions())
    if args.results_file and distributed.is_main_process():
        scores.write_results(args.results_file, [
            results_row(args, source, weights, model, each)
            for weights, each in (('model', stats), ('model_ema', ema_stats)) if each is not None])
    print_result(throughput, stats.get('acc1'), stats['loss'], stats.get('mAP'))
    if args.log_dir and distributed.is_main_process():
        writer = utils.TensorboardLogger(os.path.join(args.log_dir, 'eval'))  # not among the training's own figures
        record_scores(writer, epoch, stats, ema_stats)
        report.draw_confusions(writer, epoch)
        writer.close()
    report.of_weights(source)
    report.finish(figures(throughput, time.time() - started, stats.get('acc1'), stats['loss'],
                          ema_stats and ema_stats.get('acc1'), top5=stats.get('acc5'), images=stats['images'],
                          mAP=stats.get('mAP'), bad_images=len(unreadable.listed)))


def results_row(args, source, weights, model, stats):
    """What --results_file says of one evaluation: the figures, and all that they hang on."""
    prepared = augmentation.preprocessing(args)
    about = {'model': args.model, 'checkpoint': escape_text(source), 'weights': weights}
    about.update((name, value) for name, value in stats.items() if name != 'classes')
    about.update(param_count=parameters(model), img_size=args.input_size, crop_pct=prepared['crop_pct'],
                 interpolation=prepared['interpolation'], test_flip=args.test_flip)
    return dict(about, classes=stats['classes']) if 'classes' in stats else about


def figures(throughput, seconds, accuracy, loss, ema_accuracy, **more):
    """The result block's figures as summary.json has them; None for those that there are not."""
    measured = bool(throughput.steps)
    return dict(more, images_per_second=throughput.images_per_second if measured else None,
                step_milliseconds=throughput.step_milliseconds if measured else None, accuracy=accuracy,
                ema_accuracy=ema_accuracy, loss=loss, duration_seconds=round(seconds, 3))


def fit(args, training, val_loader, pilot, steps_per_epoch, dtype, report):
    """Train on from `pilot.progress`; evaluate, log and save after each epoch.

    The line in log.txt comes before the checkpoint: where a kill falls between them, the resumed run writes it again.
    """
    device, ema, throughput, started = training['device'], training['model_ema'], utils.Throughput(), time.time()
    writer = utils.TensorboardLogger(args.log_dir) if args.log_dir and distributed.is_main_process() else None
    step_limit = min(args.maxstep or args.epochs * steps_per_epoch, args.epochs * steps_per_epoch)
    progress, best, train_stats, first = pilot.progress, dict(pilot.progress.best), {}, pilot.progress.epoch
    epochs = first  # that something was done of
    report.begin(writer)
    for epoch in range(first, args.epochs):
        steps = min(steps_per_epoch, step_limit - epoch * steps_per_epoch)
        if steps <= 0 or is_stale(args, progress, device):
            break
        unfreeze_when_due(args, training, epoch)
        training['data_loader'].sampler.set_epoch(epoch, progress.steps * args.update_freq * args.batch_size)
        begun = time.time()
        train_stats = engine.train_one_epoch(
            epoch=epoch, log_writer=writer, start_steps=epoch * steps_per_epoch, first_step=progress.steps,
            num_training_steps_per_epoch=steps, throughput=throughput, pilot=pilot,
            state=progress.meters_of(distributed.rank(), distributed.world_size()), **training)
        epochs = epoch + 1
        is_last = epoch * steps_per_epoch + steps >= step_limit
        is_due = (epoch + 1) % args.val_interval == 0
        evaluates = val_loader is not None and (is_due or is_last)
        test_stats, ema_stats = (None, None) if not evaluates else evaluate_all(
            args, val_loader, training['model'], ema, device, dtype, None, pilot.bad_images,
            lambda: pilot.signals.wish, report.predictions())
        if evaluates and test_stats is None:
            pilot.stop_after(epoch, steps, device)
        improved = note_best(best, test_stats, ema_stats)
        counts = evaluates and is_due and steps == steps_per_epoch  # an unbroken run has it too
        progress.stale = 0 if improved else progress.stale + counts
        record(args, writer, epoch, training['model'], train_stats, test_stats, ema_stats)
        watching.epoch(epoch, args.epochs, train_stats, test_stats, best, throughput.images_per_second,
                       time.time() - begun)
        report.after_epoch(writer, epoch, checkpoint.BEST in improved)
        if steps < steps_per_epoch:  # --maxstep, in mid-epoch
            progress.best = dict(best)  # or a run that goes on would put worse weights in the best's place
            pilot.save(epoch, steps, pilot.state, device)
            pilot.save_epoch(improved, numbered=False)
            break
        progress.epoch, progress.steps, progress.meters, progress.best = epoch + 1, 0, [], dict(best)
        is_last = is_last or is_stale(args, progress, device)
        pilot.save_epoch(improved, numbered=is_last or (epoch + 1) % args.save_ckpt_freq == 0)
    if writer is not None:
        writer.close()
    if throughput.steps:
        distributed.say('Speed: %s' % throughput.limit())
    distributed.say('Training time %s' % datetime.timedelta(seconds=int(time.time() - started)))
    if is_stale(args, progress, device):
        distributed.say('Stopped early: no new best in %d evaluation%s (--early_stop %d)'
                        % (progress.stale, 's' if progress.stale > 1 else '', args.early_stop))
    if first >= args.epochs:
        distributed.say('Nothing left to train: all %d epochs are done; raise --epochs to go on' % args.epochs)
        if report.is_complete():
            return  # else it was killed between its last checkpoint and its summary
    else:
        print_result(throughput, best.get('accuracy'), train_stats.get('loss'), best.get('mAP'))
    report.finish(figures(throughput, time.time() - started, best.get('accuracy'), train_stats.get('loss'),
                          best.get('ema_accuracy'), epochs=epochs, mAP=best.get('mAP'),
                          bad_images=len(pilot.bad_images.listed)))


def is_stale(args, progress, device):
    """Whether --early_stop ends the run. The first process decides: the others' figures may round otherwise."""
    return args.early_stop > 0 and distributed.any_process(
        distributed.is_main_process() and progress.stale >= args.early_stop, device)


def note_best(best, test_stats, ema_stats):
    """Update the best accuracies; gives the checkpoint names that are new bests."""
    improved = []
    for prefix, stats, file_name in (('', test_stats, checkpoint.BEST), ('ema_', ema_stats, checkpoint.BEST_EMA)):
        if stats is not None:
            figure = scores.best_by(stats)
            name = prefix + FIGURES[figure]
            if stats[figure] > best.get(name, -1.):
                best[name] = stats[figure]
                improved.append(file_name)
    if test_stats is not None:
        name = FIGURES[scores.best_by(test_stats)]
        average = '' if ema_stats is None else ', of the average: %.3f%%' % best.get('ema_' + name, float('nan'))
        distributed.say('Max %s: %.3f%%%s' % (name, best.get(name, float('nan')), average), detail=True)
    return improved


FIGURES = {'acc1': 'accuracy', 'mAP': 'mAP'}  # what they are called among the best


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
        record_scores(writer, epoch, test_stats, ema_stats)


def record_scores(writer, epoch, test_stats, ema_stats):
    for prefix, results in (('test', test_stats), ('ema', ema_stats)):
        if results:
            writer.update('perf', epoch, **{'%s_%s' % (prefix, name): results[name]
                                            for name in ('acc1', 'acc5', 'mAP', 'loss') if name in results})


def run(argv=None):
    """Parse, run, and turn what the user can mend into one line and exit status 2; a signal gives 128 + its number."""
    signals = preemption.Signals()
    try:
        with signals:
            return run_with_error_report(PROGRAM,
                                         lambda: main(build_parser(description=__doc__).parse_args(argv), signals),
                                         'lower --batch_size and raise --update_freq by as much, or lower --input_size',
                                         '; the same command with --auto_resume goes on from the last checkpoint')
    except preemption.Stopped as stop:  # also while an error is told: another process may have caused that one
        watchdog.stop()
        if str(stop):
            distributed.say('%s: %s' % (PROGRAM, stop))
            distributed.wait_for_others_to_speak(first=distributed.is_main_process())
            return exit_process(128 + stop.number)
        if not distributed.speaks_first():
            return exit_process(128 + stop.number)
        return exit_with_error(PROGRAM, 'interrupted by %s; with --output_dir, the same command and --auto_resume goes '
                               'on from the last checkpoint' % preemption.name(stop.number), 128 + stop.number)


if __name__ == '__main__':
    sys.exit(run())
