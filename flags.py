"""Every flag of run_class_finetuning.py, and all that can be found wrong with them before anything slow starts."""

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import textwrap

import augmentation
import backend
import checkpoint
import config_file
import criteria
import datasets
import distributed
import modeling_finetune
import optim_factory
import pretrained
import scores
import run_folder
from errors import UserError, nearest, printable, unknown


EXAMPLES = """examples:
  try it on handwritten digits, a minute on a CPU:
    bash test/train_full_1p.sh --data_path=demo
  fine-tune pretrained weights on your own class folders, and look at the outcome in out/report.html:
    python run_class_finetuning.py --data_path DIR --finetune checkpoints/beit_base_patch16_224_pt22k_ft22k.pth \\
        --lr 2e-5 --layer_decay 0.85 --weight_decay 1e-8 --output_dir out --report
  go on after it was stopped:
    python run_class_finetuning.py --config out/args.yaml --auto_resume
  evaluate its best checkpoint:
    python run_class_finetuning.py --config out/args.yaml --eval --resume out

models:
%s

optimizers (lookahead_ may stand before one):
%s
""" % tuple(textwrap.fill(', '.join(names), 100, initial_indent='  ', subsequent_indent='  ')
            for names in (modeling_finetune.MODELS, optim_factory.OPTIMIZERS))

COLUMN = 24  # where a flag's help begins

# What timm, torchvision, Hugging Face and people call a flag whose name here doesn't look like it.
OTHER_NAMES = dict(
    learning_rate='lr', base_lr='lr', wd='weight_decay', bs='batch_size', b='batch_size', arch='model',
    data='data_path', data_dir='data_path', root='data_path', img_size='input_size', gpu='device', output='output_dir',
    pretrained='finetune', initial_checkpoint='finetune', checkpoint='resume',
    evaluate='eval', eval_only='eval', test_only='eval', fp16='amp', bf16='amp', mixed_precision='amp',
    label_smoothing='smoothing', max_grad_norm='clip_grad', gradient_checkpointing='grad_checkpointing',
    accum_iter='update_freq', grad_accum_steps='update_freq', gradient_accumulation_steps='update_freq',
    torchcompile='compile')


def nearest_flags(name, known):
    """Up to three flags that a name without its dashes may have meant, the likeliest first: `known` ones alone."""
    name = name.replace('-', '_')
    others = {other: flag for other, flag in OTHER_NAMES.items() if flag in known and other not in known}
    if name in others:
        return [others[name]]
    near = [others.get(each, each) for each in nearest(name, list(known) + list(others))]
    return list(dict.fromkeys(near))


class OneLineHelp(argparse.RawDescriptionHelpFormatter):
    """Help in which a flag is one line of at most 100 columns: its names, what it does, its default in brackets."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=COLUMN, width=100)

    def _format_action_invocation(self, action):
        return ', '.join(action.option_strings) or action.dest

    def _format_action(self, action):  # what a long name would put on a line of its own follows it
        return super()._format_action(action).replace('\n' + ' ' * COLUMN, '  ', 1)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose help and errors are one line each, and which knows what an unknown flag may have meant.

    --help shows `usage` instead of all flags in brackets.
    """

    def __init__(self, prog, usage, **given):
        super().__init__(prog, usage='python %s %s' % (prog, usage), allow_abbrev=False,
                         formatter_class=OneLineHelp, **given)

    def error(self, message):
        message = re.sub('^argument (?=--)', '', message)
        raise UserError(re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", lambda found: 'unknown value %s; it must '
                               'be one of %s' % (found.group(1), found.group(2).replace("'", '')), message))

    def parse_args(self, args=None, namespace=None):
        args = without_traps(sys.argv[1:] if args is None else list(args))
        parsed, rest = self.parse_known_args(args, namespace)
        if getattr(parsed, 'config', None):  # once more, behind those of the file
            parsed, rest = self.parse_known_args(args, self.read_config(parsed.config))
        if 'config' in parsed:
            del parsed.config  # what it says is in the other flags now
        if 'auto_resume' in parsed:  # not every program goes on
            parsed.auto_resume = parsed.auto_resume or was_restarted()
        if rest:
            flag = rest[0].partition('=')[0]
            if not flag.startswith('-'):
                raise UserError('%r is not a flag; flags begin with --, as in --data_path=/data/ImageNet2012' % flag)
            known = [name[2:] for name in self._option_string_actions if name.startswith('--')]
            near = ' or '.join('--' + name for name in nearest_flags(flag.lstrip('-'), known))
            raise UserError('%s: unknown flag; %s' % (flag, 'did you mean %s?' % near if near else 'see --help'))
        return parsed

    def read_config(self, path):
        """A namespace of the flags that a --config file holds. `UserError`s name the file and the key."""
        parsed, known = argparse.Namespace(), self._option_string_actions
        for key, value in config_file.read(path).items():
            shown, flag = '--config %s: %s' % (printable(path), printable(key)), '--' + key.replace('-', '_')
            if flag in ('--help', '--config'):
                raise UserError('%s: this one works on the command line only' % shown)
            if flag not in known:
                near = ' or '.join(nearest_flags(key, [name[2:] for name in known if name.startswith('--')]))
                raise UserError('%s: no flag has this name; %s' % (shown, 'did you mean %s?' % near if near else
                                                                   'see --help'))
            if value is None:  # null, the default
                continue
            if known[flag].nargs == 0:
                flag, value = self.turned(known[flag], value, shown), []
            elif isinstance(value, list) != (known[flag].nargs is not None):
                raise UserError('%s: it takes %s' % (shown, 'one value, not a list' if known[flag].nargs is None else
                                                     'a list of numbers, as in [0.9, 0.999]'))
            try:
                args = [flag + '=' + value] if isinstance(value, str) else [flag] + value
                if self.parse_known_args(without_traps(args), parsed)[1]:
                    raise UserError('%d values are too many' % len(value))
            except UserError as error:
                text = str(error)
                raise UserError('%s: %s' % (shown, text[len(flag) + 2:] if text.startswith(flag + ': ') else text)) \
                    from None
        return parsed

    def turned(self, switch, value, shown):
        """The option that sets a switch as a file's `value` says."""
        if str(value).lower() not in ('true', 'false'):
            raise UserError('%s: it must be true or false, got %r' % (shown, value))
        wanted = switch.const if str(value).lower() == 'true' else not switch.const
        return next(action.option_strings[0] for action in self._actions
                    if action.dest == switch.dest and action.const is wanted)


def without_traps(args):
    """The command line with `_` in flags; refuses what argparse would misread or drop."""
    for arg in args:
        if '\0' in arg:
            raise UserError('%r: a flag cannot hold a NUL character' % arg)
        if re.match(r'--[^=]+=--$', arg):
            raise UserError('%s: -- is not a value' % arg)
    return [re.sub(r'^--[^=]+', lambda flag: '--' + flag.group()[2:].replace('-', '_'), arg) for arg in args]


def was_restarted():
    """Whether torchrun (--max_restarts) or SLURM (--requeue) starts this program anew, which then has to go on."""
    return any(os.environ.get(name, '0') not in ('', '0') for name in ('TORCHELASTIC_RESTART_COUNT',
                                                                        'SLURM_RESTART_COUNT'))


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
    off = off or 'no_' + name
    group.add_argument('--' + name, action='store_true', default=default,
                       help='%s (%s)' % (help_text, 'on; off by --' + off if default else 'off'))
    group.add_argument('--' + off, action='store_false', dest=name, help=argparse.SUPPRESS)


def build_parser(description=__doc__):
    parser = OneLineParser('run_class_finetuning.py', '--data_path DIR [flags]', description=description,
                           epilog=EXAMPLES)

    run = parser.add_argument_group('run')
    add = run.add_argument
    add('--batch_size', default=64, type=positive, help='images per device and micro-step (64)')
    add('--epochs', default=30, type=number(int, 1, 10 ** 6), help='passes over the training set (30)')
    add('--update_freq', default=1, type=positive, help='micro-steps whose gradients make one update (1)')
    add('--save_ckpt_freq', default=5, type=positive, help='epochs between checkpoints (5)')
    add('--save_ckpt_steps', default=0, type=whole, help='update steps between checkpoints in mid-epoch; 0: none (0)')
    add('--save_ckpt_minutes', default=0., type=rate, help='minutes between them; 0: none (0)')
    add('--keep_checkpoints', default=0, type=whole,
        help='only the newest so many of each kind; 0: all epochs, 2 in mid-epoch (0)')
    switch(run, 'deterministic', False, 'the same bits from the same command twice, on the same machine')
    add('--on_nonfinite', default='stop', choices=('stop', 'skip'),
        help='loss or gradient infinite or no number: stop, or skip that update (stop)')
    add('--seed', default=0, type=number(int, 0, 2 ** 62), help='seed of every random number (0)')
    add('--num_workers', default=10, type=number(int, 0, 1024),
        help='loader processes per device; 0 loads in the main one (10)')
    switch(run, 'pin_mem', True, 'page-locked memory for batches to npu or cuda')
    add('--max_train_samples', default=0, type=whole,
        help='train on so many images, the same in every epoch; 0: all (0)')
    add('--val_interval', default=1, type=positive, help='evaluate after each so many epochs, and the last (1)')
    add('--early_stop', default=0, type=whole,
        help='stop after so many evaluations in a row without a new best; 0: never (0)')
    add('--start_epoch', default=0, type=whole, help='first epoch, where no checkpoint says it (0)')
    add('--device', default='auto', help='auto (npu, cuda, cpu: the first present), npu, cuda, cpu, cuda:1 … (auto)')
    add('--jit_compile', default='auto', choices=('auto', 'on', 'off'),
        help='npu: compile operators; auto: on for 910A, off for 910B; on, off (auto)')
    add('--maxstep', default=0, type=whole, help='stop after exactly this many update steps; 0: no limit (0)')
    switch(run, 'prof', False, 'profile a few updates, write a trace into output_dir/prof, stop')
    switch(run, 'cann_prof', False, 'likewise through torch_npu\'s profiler')

    model = parser.add_argument_group('model')
    add = model.add_argument
    add('--model', default='beit_base_patch16_224', help='name; the models stand below (beit_base_patch16_224)')
    switch(model, 'rel_pos_bias', True, 'relative position bias in every block', off='disable_rel_pos_bias')
    switch(model, 'abs_pos_emb', False, 'learned absolute positions')
    add('--attention', default='auto', choices=('auto', 'fused', 'plain'),
        help='auto: fused on npu, cuda, where it agrees with plain; fused; plain (auto)')
    add('--layer_scale_init_value', default=0.1, type=rate, help='0.1 for base, 1e-5 for large, 0 for none (0.1)')
    add('--input_size', default=224, type=number(int, 1, 8192),
        help='pixels a side; any whole number of patches (224)')
    add('--drop', default=0., type=below_one, help='dropout, a share (0)')
    add('--attn_drop_rate', default=0., type=below_one, help='dropout on attention weights, a share (0)')
    add('--drop_path', '--drop_decay', default=0.1, type=below_one,
        help='stochastic depth of the last block, a share (0.1)')
    add('--skip_dropped', default='auto', choices=('auto', 'on', 'off'),
        help='on, off: no work on dropped images; auto: on a CPU, not compiled (auto)')
    switch(model, 'grad_checkpointing', False, 'compute the blocks again in the backward pass: less memory, slower')
    switch(model, 'compile', False, 'compile the model with torch.compile; the first steps take minutes')
    switch(model, 'model_ema', False, 'keep and evaluate a moving average of the weights')
    add('--model_ema_decay', default=0.9999, type=share, help='its decay per update (0.9999)')
    switch(model, 'model_ema_force_cpu', False, 'keep it in host memory')
    switch(model, 'disable_eval_during_finetuning', False, 'do not evaluate after each epoch')

    optimizer = parser.add_argument_group('optimizer')
    add = optimizer.add_argument
    add('--opt', default='adamw', help='name; the optimizers stand below; on an NPU npufusedadamw (adamw)')
    add('--opt_eps', default=1e-8, type=number(float, 0, above=True), help='epsilon (1e-8)')
    add('--opt_betas', default=None, type=below_one, nargs='+', help='betas (the optimizer\'s own)')
    add('--clip_grad', default=None, type=rate, help='clip the gradients\' norm to this (no clipping)')
    add('--momentum', default=0.9, type=below_one, help='momentum of SGD and its like (0.9)')
    add('--weight_decay', default=0.05, type=rate, help='weight decay (0.05)')
    add('--weight_decay_end', default=None, type=rate, help='its value at the end of a cosine (weight_decay)')
    add('--lr', default=5e-4, type=number(float, 0, above=True),
        help='learning rate of the last layers; not scaled by batch size (5e-4)')
    add('--layer_decay', default=0.9, type=number(float, 0, 1, above=True), help='factor per layer downwards (0.9)')
    add('--warmup_lr', default=0., type=rate, help='learning rate of the first step of the warm-up (0)')
    add('--min_lr', default=1e-6, type=rate, help='learning rate at the end (1e-6)')
    add('--warmup_epochs', default=5, type=whole, help='epochs of linear warm-up (5)')
    add('--warmup_steps', default=-1, type=number(int, -1), help='update steps instead, when above 0 (-1)')

    augmenting = parser.add_argument_group('augmentation')
    add = augmenting.add_argument
    add('--color_jitter', default=0.4, type=number(float, 0, 1000), help='strength, where --aa is none (0.4)')
    add('--aa', default='rand-m9-mstd0.5-inc1', help='AutoAugment policy or none (rand-m9-mstd0.5-inc1)')
    add('--hflip', default=0.5, type=share, help='share of images that are mirrored (0.5)')
    add('--loss', default='auto', choices=criteria.LOSSES,
        help='ce, bce (a binary one for each class); auto: bce for many labels (auto)')
    add('--class_weights', default='', help='balanced: rare ones weigh more; or a CSV or JSON file (all the same)')
    add('--smoothing', default=0.1, type=below_one, help='label smoothing (0.1)')
    add('--train_interpolation', default='bicubic', choices=augmentation.INTERPOLATIONS,
        help='of random crops: random, bilinear, bicubic, lanczos (bicubic)')
    add('--crop_pct', default=None, type=number(float, 0, 1, above=True),
        help='share of the resized image to evaluate (224/256; from 384 pixels on 1.0)')
    add('--reprob', default=0.25, type=share, help='share of images with random erasing (0.25)')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'),
        help='what erasing writes: const, rand, pixel (pixel)')
    add('--recount', default=1, type=positive, help='how many areas it erases (1)')
    switch(augmenting, 'resplit', False, 'refused: it needs augmentation splits, which this recipe does not have')
    add('--mixup', default=0., type=rate, help='mixup alpha; 0 is off (0)')
    add('--cutmix', default=0., type=rate, help='cutmix alpha; 0 is off (0)')
    add('--cutmix_minmax', default=None, type=share, nargs=2,
        help='bounds of cutmix\'s area, two shares, instead of its alpha (none)')
    add('--mixup_prob', default=1., type=share, help='share of batches that are mixed (1)')
    add('--mixup_switch_prob', default=0.5, type=share, help='share of these with cutmix, where both are on (0.5)')
    add('--mixup_mode', default='batch', choices=('batch', 'pair', 'elem'),
        help='what shares one mix: batch, pair, elem (batch)')

    finetuning = parser.add_argument_group('fine-tuning')
    add = finetuning.add_argument
    add('--finetune', default='', help='pretrained weights, a file or an https URL (empty: from scratch)')
    add('--model_key', default='model|module', help='where the file keeps them; the first found (model|module)')
    add('--model_prefix', default='', help='what their names have in front (empty)')
    add('--init_scale', default=0.001, type=rate, help='factor on the head\'s initial weights (0.001)')
    switch(finetuning, 'use_mean_pooling', True, 'pool by the mean of the patches, not the class token',
           off='use_cls')
    switch(finetuning, 'freeze_backbone', False, 'train the head alone (linear probing)')
    add('--unfreeze_epoch', default=0, type=whole, help='with it: train all from this epoch on, counted from 0; '
        '0: never (0)')
    switch(finetuning, 'disable_weight_decay_on_rel_pos_bias', False, 'no weight decay on bias tables')

    data = parser.add_argument_group('data')
    add = data.add_argument
    add('--data_path', default='', help='folder with train/ and val/ of class folders; or demo: digits (empty)')
    add('--eval_data_path', default=None, help='class folders to evaluate on, instead of data_path/val (none)')
    add('--train_csv', default='', help='list of training images: path,label or path,label;label (empty)')
    add('--val_csv', default='', help='likewise of the validation images (empty)')
    add('--val_split', default=0., type=number(float, 0, 0.9),
        help='share of each class to evaluate on, where there is no val (0)')
    add('--nb_classes', default=0, type=whole, help='checked against the folders; 0 takes their number (0)')
    switch(data, 'imagenet_default_mean_and_std', False, 'ImageNet\'s mean and deviation instead of 0.5')
    add('--data_set', default='IMNET', help='IMNET (train/, val/), image_folder (class folders), CIFAR (100) (IMNET)')

    add('--data_backend', default='exact', choices=augmentation.BACKENDS,
        help='exact, the reference\'s pixels; fast, by torchvision, nearly so (exact)')
    add('--eval_data_backend', default='exact', choices=augmentation.BACKENDS,
        help='the same of evaluation: exact, fast (exact)')
    add('--bad_images', default='error', choices=('error', 'skip'),
        help='a file that cannot be read: error, or skip: leave out and list it (error)')
    add('--max_bad_images', default=0.001, type=share, help='with skip, the share of bad files to stop at (0.001)')
    switch(data, 'index_cache', True, 'keep the list of files for the next start')
    switch(data, 'check_data', False, 'decode every image, report those that cannot be read, and stop')

    output = parser.add_argument_group('output')
    add = output.add_argument
    add('--output_dir', default='', help='folder for checkpoints, log.txt and the like (empty: none)')
    add('--config', default=None, metavar='FILE',
        help='flags from a file, such as a run\'s args.yaml; those given here win (none)')
    switch(output, 'curves', True, 'draw output_dir/curves.png, every 20 s at most')
    switch(output, 'report', False, 'write output_dir/report.html: curves, classes, confusions, images')
    add('--log_dir', default=None, help='folder for TensorBoard (none)')
    add('--resume', default='', help='checkpoint, or its folder: the newest; to evaluate the best (empty)')
    switch(output, 'auto_resume', False, 'resume the newest checkpoint of output_dir, where there is one')
    switch(output, 'save_ckpt', True, 'write checkpoints')
    switch(output, 'eval', False, 'evaluate --resume, and nothing else')
    switch(output, 'test_flip', False, 'evaluate on the mean of the logits of an image and of its mirror image')
    add('--results_file', default='', help='with --eval: a file for the figures, .csv or .json (empty)')
    add('--real_labels', default='', help='with --eval: JSON list of ImageNet\'s reassessed labels (empty)')
    switch(output, 'dist_eval', False, 'share the evaluation among the processes, every image exactly once')

    halves = parser.add_argument_group('precision')
    add = halves.add_argument
    switch(halves, 'amp', False, 'mixed precision, by apex where it is installed, else by PyTorch')
    add('--opt_level', default='O2', choices=backend.OPT_LEVELS, metavar='O0|O1|O2',
        help='O0 float32; O1 autocast; O2 half weights, float32 masters (O2)')
    add('--amp_dtype', default=None, choices=backend.AMP_DTYPES, help='float16, bfloat16 (float16; on a CPU bfloat16)')
    add('--loss_scale', default=None, type=loss_scale, help='a number, or dynamic (128 for float16, else 1)')

    distributed = parser.add_argument_group('distributed')
    distributed.add_argument('--world_size', default=1, type=positive, help='set by the launcher (1)')
    add_meeting(distributed)
    return parser


def add_meeting(group):
    """The flags by which a process finds the others."""
    add = group.add_argument
    add('--local_rank', default=-1, type=number(int, -1), help='set by the launcher (-1)')
    switch(group, 'dist_on_itp', False, 'take ranks from Open MPI\'s environment')
    add('--dist_timeout', default=600., type=number(float, 1, 10 ** 6),
        help='seconds that a process may hold up the others before the job ends (600)')
    add('--dist_url', default='env://', help='where the processes meet (env://)')


def config_from(args, kind, **given):
    """A dataclass of `config` with the values of the flags that its fields are named after; `given` wins."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if hasattr(args, field.name)}
    return kind(**dict(values, **given))


def check_unfreezing(args):
    about = '--unfreeze_epoch %d: ' % args.unfreeze_epoch
    if not args.freeze_backbone:
        raise UserError(about + 'it needs --freeze_backbone, without which nothing is frozen')
    if args.unfreeze_epoch >= args.epochs and not args.eval:
        raise UserError(about + '--epochs %d ends before; lower it, or leave it out to train the head alone'
                        % args.epochs)
    if 'fused' in args.opt.lower() or optim_factory.optimizer_class(args.opt)[0].__name__ == 'NovoGrad':
        raise UserError(about + '--opt %s looks for gradients in its first step and for no others later; use '
                        '--opt adamw, or two runs, the second with --finetune' % args.opt)


def check_args(args, local_rank=0, processes=1):
    """Everything that can be found wrong before anything slow starts. Raises `UserError`.

    Args:
        local_rank, processes (int): the highest process of this machine and how many there are in all, where a
            launcher asks before it starts them.
    """
    if args.model not in modeling_finetune.MODELS:
        raise unknown('--model', args.model, modeling_finetune.MODELS)
    patch = modeling_finetune.MODELS[args.model]['patch_size']
    if args.input_size % patch:
        below = args.input_size // patch * patch
        raise UserError('--input_size %d is not a multiple of the patch size %d of --model %s; use %s%d' % (
            args.input_size, patch, args.model, '%d or ' % below if below else '', below + patch))
    augmentation.check_policy(args.aa)
    augmentation.check_backend(args)
    if args.resplit:
        raise UserError('--resplit needs augmentation splits, which this recipe does not have; leave it out')
    if args.warmup_steps <= 0 and args.warmup_epochs > args.epochs:
        raise UserError('--warmup_epochs %d is longer than --epochs %d; give --warmup_epochs=%d or fewer'
                        % (args.warmup_epochs, args.epochs, args.epochs))
    if augmentation.mixes(args) and args.batch_size % 2 and not args.eval:
        raise UserError('--batch_size %d: mixup and cutmix pair images, so it must be even' % args.batch_size)
    for flag in ('mixup', 'cutmix'):
        if 0 < getattr(args, flag) < 1e-6:  # NumPy's beta distribution gives no number there
            raise UserError('--%s %g: an alpha below 1e-6 mixes nothing; 0 turns it off' % (flag, getattr(args, flag)))
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise UserError('--cutmix_minmax %g %g: the first must be below the second' % tuple(args.cutmix_minmax))
    if args.opt_betas is not None and len(args.opt_betas) != 2:
        raise UserError('--opt_betas %s: give 2 numbers, as in --opt_betas 0.9 0.999'
                        % ' '.join(map(str, args.opt_betas)))
    if args.start_epoch >= args.epochs:
        raise UserError('--start_epoch %d: --epochs %d leaves nothing to train; raise --epochs'
                        % (args.start_epoch, args.epochs))
    if args.world_size > 1 and distributed.launch_environment(args)[1] == 1:
        raise UserError('--world_size %d is set by the launcher; start the processes with test/train_full_8p.sh '
                        '--nproc_per_node=%d, or torchrun' % (args.world_size, args.world_size))
    datasets.check_paths(args)
    _, launched, launched_rank = distributed.launch_environment(args)
    device = backend.find_device(args.device, local_rank or launched_rank, max(processes, launched))
    if device.type == 'cpu':
        backend.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    if not args.eval:
        optim_factory.check_optimizer(args.opt, args.momentum)
        pretrained.check_finetune(args.finetune)
    if args.cann_prof:
        backend.check_cann_profiler()
    if args.compile:
        backend.check_compile(device)
        if args.skip_dropped == 'on':
            raise UserError('--skip_dropped on: it changes shapes from step to step, and --compile needs one; leave '
                            'one of them out')
    for flag in ('results_file', 'real_labels'):
        if getattr(args, flag) and not args.eval:
            raise UserError('--%s %s: it belongs to --eval; leave it out of training' % (flag, getattr(args, flag)))
    if args.early_stop and args.disable_eval_during_finetuning:
        raise UserError('--early_stop %d: --disable_eval_during_finetuning evaluates nothing to stop by; leave one of '
                        'them out' % args.early_stop)
    if args.unfreeze_epoch:
        check_unfreezing(args)
    if args.results_file:
        scores.check_results_file(args.results_file)
        run_folder.check_writable('--results_file', os.path.dirname(args.results_file))
    if args.real_labels and not os.path.isfile(args.real_labels):
        raise UserError('--real_labels %s: no such file' % args.real_labels)
    if args.class_weights and not args.eval:
        criteria.check_weights(args.class_weights)
    if args.eval and not (args.resume or args.finetune):
        raise UserError('--eval needs --resume: the checkpoint to evaluate, or the folder that holds it')
    if args.resume:
        checkpoint.candidates(args.resume)
    if args.report and not args.output_dir:
        raise UserError('--report needs --output_dir, the folder for report.html')
    if args.log_dir and importlib.util.find_spec('tensorboardX') is None:
        raise UserError('--log_dir %s needs tensorboardX; run: pip install tensorboardX' % args.log_dir)
    for flag, folder in (('--output_dir', args.output_dir), ('--log_dir', args.log_dir)):
        run_folder.check_writable(flag, folder)
