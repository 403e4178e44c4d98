"""Every flag of the programs, declared once, and the checks of a training run's flags at its start."""

import argparse
import dataclasses
import importlib.util
import os
import textwrap
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

import modeling_finetune
import optim_factory
from beit import model_spec, startup
from beit.checkpoint import discovery, hf_names, pretrained
from beit.cli import OneLineParser, add_bool_flag, bounded_number
from beit.config import (
    MAX_INPUT_SIZE,
    DistributedConfig,
    InputConfig,
    MixupConfig,
    TransformConfig,
    default_num_workers,
)
from beit.data import locations, transforms
from beit.devices import accelerator, half_precision, kernels, profiler
from beit.distributed import process_group
from beit.errors import UserError, escape_text, unknown_value_error
from beit.files import run_folder
from beit.outputs import attention_maps
from beit.training import losses, metrics

TRAINING, PREDICT, EXPORT, AVERAGE = PROGRAMS = (
    'run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py')

EXAMPLES = """examples:
  try it on handwritten digits, one minute on a CPU:
    bash test/train_full_1p.sh --data_path=demo
  fine-tune pretrained weights on your own class folders, and open out/report.html:
    python run_class_finetuning.py --data_path DIR --finetune checkpoints/beit_base_patch16_224_pt22k_ft22k.pth \\
        --lr 2e-5 --layer_decay 0.85 --weight_decay 1e-8 --output_dir out --report
  resume it after a stop:
    python run_class_finetuning.py --config out/args.yaml --auto_resume
  evaluate its best checkpoint:
    python run_class_finetuning.py --config out/args.yaml --eval --resume out

models:
%s

optimizers, with an optional prefix lookahead_:
%s
""" % tuple(textwrap.fill(', '.join(names), 100, initial_indent='  ', subsequent_indent='  ')
            for names in (modeling_finetune.MODELS, optim_factory.OPTIMIZERS))


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, for the parsers, --help, docs/flags.md and the comparison of a resumed run.

    Attributes:
        name: without its dashes; `aliases` are further spellings.
        default: a bool makes a switch; --no_name, or the name in `off`, turns it off. An empty `off` adds no such flag.
        help: one line for --help and docs/flags.md, which add the default, or `shown` instead of it.
        type, choices, nargs, metavar, action: as argparse has them.
        synonyms: its names in other projects, separated by blanks, for hints at an unknown flag.
        affects_results: whether the results of a training run depend on it; a resumed run names such changes.
        follows_checkpoint: whether --eval takes it from the checkpoint if it is not given, besides the fields of
            `model_spec.ModelSpec`.
        names_difference: whether --eval logs a value that differs from the checkpoint's.
        also: {another program with this flag: its group and its differences there}.
    """
    name: str
    default: Any
    help: str
    shown: Optional[str] = None
    type: Optional[Callable[[str], Any]] = None
    choices: Optional[Sequence[str]] = None
    nargs: Any = None
    metavar: Optional[str] = None
    action: Optional[str] = None
    aliases: Tuple[str, ...] = ()
    off: Optional[str] = None
    synonyms: str = ''
    affects_results: bool = True
    follows_checkpoint: bool = False
    names_difference: bool = True
    also: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def add_to(self, group: Any) -> None:
        if isinstance(self.default, bool):
            add_bool_flag(group, self.name, self.default, self.help, self.off)
            return
        options = {option: getattr(self, option) for option in ('type', 'choices', 'nargs', 'metavar', 'action')
                   if getattr(self, option) is not None}
        group.add_argument(*['--' + name for name in (self.name,) + self.aliases], default=self.default,
                           help='%s (%s)' % (self.help, self.shown_default()), **options)

    def check(self, value: Any) -> Any:
        """The value, converted. Raises ValueError, TypeError or ArgumentTypeError for an invalid one."""
        if value is None or isinstance(self.default, bool):
            if value is not self.default and type(value) is not bool:
                raise ValueError(value)
            return value
        value = self.type(str(value)) if self.type is not None else str(value)
        if self.choices and value not in self.choices:
            raise ValueError(value)
        return value

    def shown_default(self) -> str:
        if self.shown is not None:
            return self.shown
        if self.default in (None, [], ''):
            return 'empty' if self.default == '' else 'none'
        return '%g' % self.default if isinstance(self.default, (int, float)) else str(self.default)


def loss_scale(text: str) -> Any:
    return text if text == 'dynamic' else bounded_number(float, 0, above=True)(text)


whole, positive = bounded_number(int, 0), bounded_number(int, 1)
rate, share = bounded_number(float, 0), bounded_number(float, 0, 1)
below_one = bounded_number(float, 0, 0.999)

UNLABELLED = 'weights without metadata'
TRAINED = dict(help='checkpoint, https URL, or a folder: its best checkpoint', shown='required')
LAUNCHED = {PREDICT: dict(group='distributed')}

GROUPS = {  # in the order of --help
    TRAINING: ('run', 'model', 'optimizer', 'augmentation', 'fine-tuning', 'data', 'output', 'precision',
               'distributed'),
    PREDICT: ('input', 'results', 'run', UNLABELLED, 'distributed'),
    EXPORT: ('source', 'export'),
    AVERAGE: ('flags',)}

FLAGS: Dict[Tuple[str, str], Tuple[Flag, ...]] = {  # by program and group; --help has each group in this order
    (TRAINING, 'run'): (
        Flag('batch_size', 64, 'images per device and forward pass', type=positive, synonyms='bs b',
             affects_results=False, also={PREDICT: dict(group='run', help='images per device and forward pass')}),
        Flag('epochs', 30, 'passes over the training images', type=bounded_number(int, 1, 10 ** 6)),
        Flag('update_freq', 1, 'batches whose gradients are accumulated for one update', type=positive,
             synonyms='accum_iter grad_accum_steps gradient_accumulation_steps', affects_results=False),
        Flag('save_ckpt_freq', 5, 'save a checkpoint every N epochs, and after the last', type=positive,
             affects_results=False),
        Flag('save_ckpt_steps', 0, 'save within an epoch every N updates; 0: never', type=whole,
             affects_results=False),
        Flag('save_ckpt_minutes', 0., 'save within an epoch every N minutes; 0: never', type=rate,
             affects_results=False),
        Flag('keep_checkpoints', 0, 'keep the newest N of each kind; 0: all of whole epochs, 2 within epochs',
             type=whole, affects_results=False),
        Flag('deterministic', False, 'compute bit-identical results on the same machine',
             affects_results=False),
        Flag('on_nonfinite', 'stop', 'if a loss or gradient is infinite or NaN: stop, or skip the update',
             choices=('stop', 'skip')),
        Flag('seed', 0, 'random seed', type=bounded_number(int, 0, 2 ** 62), follows_checkpoint=True),
        Flag('num_workers', default_num_workers(), 'loader processes per device; 0: none',
             shown='one per processor, at most 10', type=bounded_number(int, 0, 1024), affects_results=False,
             also={PREDICT: dict(group='run', default=None, help='loader processes per device',
                                 shown='one per core, up to 8; 0 for one batch')}),
        Flag('pin_mem', True, 'page-locked host memory for batches (npu, cuda)', affects_results=False,
             also={PREDICT: dict(group='run')}),
        Flag('max_train_samples', 0, 'train on a fixed subset of N images; 0: all', type=whole),
        Flag('val_interval', 1, 'evaluate every N epochs, and after the last', type=positive),
        Flag('early_stop', 0, 'stop after N evaluations without a new best; 0: never', type=whole,
             affects_results=False),
        Flag('start_epoch', 0, 'first epoch, counted from 0, if no checkpoint is resumed', type=whole,
             affects_results=False),
        Flag('device', 'auto', 'npu, cuda, cpu, cuda:1 …; auto: the first of npu, cuda, cpu', synonyms='gpu',
             affects_results=False, also={PREDICT: dict(group='run')}),
        Flag('jit_compile', 'auto', 'npu: compile operators: on, off, auto (on for 910A, off for 910B)',
             choices=('auto', 'on', 'off')),
        Flag('maxstep', 0, 'stop after N updates; 0: no limit', type=whole, affects_results=False),
        Flag('prof', False, 'profile 5 updates, write a Chrome trace to output_dir/prof, and exit',
             affects_results=False),
        Flag('cann_prof', False, 'the same with torch_npu\'s profiler', affects_results=False),
    ),
    (TRAINING, 'output'): (
        Flag('output_dir', '', 'folder for checkpoints, log.txt and reports', shown='empty: write none',
             synonyms='output', affects_results=False),
        Flag('config', None, 'read flags from a file, such as args.yaml; the command line wins', metavar='FILE'),
        Flag('curves', True, 'draw output_dir/curves.png, at most every 20 s', affects_results=False),
        Flag('report', False, 'write output_dir/report.html: curves, classes, confusions, images',
             affects_results=False),
        Flag('log_dir', None, 'TensorBoard folder', affects_results=False),
        Flag('resume', '', 'checkpoint, or a folder: its newest one; with --eval its best one', synonyms='checkpoint',
             affects_results=False, also={PREDICT: dict(TRAINED, group='input'),
                                          EXPORT: dict(TRAINED, group='source')}),
        Flag('auto_resume', False, 'resume the newest checkpoint of output_dir, if it holds one',
             affects_results=False),
        Flag('save_ckpt', True, 'write checkpoints', affects_results=False),
        Flag('eval', False, 'evaluate --resume without training', synonyms='evaluate eval_only test_only',
             affects_results=False),
        Flag('test_flip', False, 'evaluate the mean logits of each image and its mirror image',
             follows_checkpoint=True, names_difference=False),
        Flag('results_file', '', 'with --eval: write the results to this .csv or .json file', affects_results=False),
        Flag('class_names', '', 'with --eval: class names, for weights without them',
             affects_results=False, also={
                 PREDICT: dict(group=UNLABELLED, help='class names, one per line or JSON'),
                 EXPORT: dict(group='source', help='class names, one per line or JSON')}),
        Flag('real_labels', '', 'with --eval: JSON file of ImageNet\'s reassessed labels', affects_results=False),
        Flag('dist_eval', False, 'split the evaluation among the processes, each image once',
             affects_results=False),
    ),
    (AVERAGE, 'flags'): (
        Flag('inputs', [], 'checkpoints, or folders with checkpoints of whole epochs', shown='required', nargs='+'),
        Flag('output', '', 'the file to write', shown='required'),
        Flag('best', 0, 'average only the N best by the log.txt beside them', shown='all',
             type=positive),
    ),
    (PREDICT, 'input'): (
        Flag('input', [], 'images, folders and patterns, the same as without a flag', nargs='+', action='append'),
        Flag('use_ema', False, 'use the averaged weights of --model_ema',
             also={EXPORT: dict(group='source', off=''),
                   AVERAGE: dict(group='flags', off='',
                                 help='average the averaged weights of --model_ema')}),
    ),
    (PREDICT, 'results'): (
        Flag('top_k', 5, 'classes per image, most probable first', type=positive),
        Flag('output', '', 'file to write; - is standard output'),
        Flag('format', None, 'format of --output: csv, json, jsonl', shown='by the ending; jsonl for -'),
        Flag('attention', None, 'write attention heat maps: cls, mean; without a value as it pools', metavar='cls|mean',
             choices=('auto',) + attention_maps.KINDS),
        Flag('attention_block', None, 'transformer block of the heat maps, counted from 1', shown='the last',
             type=bounded_number(int)),
        Flag('attention_heads', False, 'write a heat map per head as well'),
        Flag('attention_dir', '', 'folder of the heat maps', shown='attention, beside --output'),
    ),
    (EXPORT, 'export'): (
        Flag('format', '', 'format', shown='required'),
        Flag('output', '', 'file to write; for huggingface a folder', shown='beside the checkpoint'),
        Flag('overwrite', False, 'replace an existing file or folder', off='', also={AVERAGE: dict(group='flags')}),
        Flag('opset', None, 'opset of onnx', shown='the newest that works', type=bounded_number(int, 7, 99)),
        Flag('no_check', False, 'skip the comparison with the checkpoint', off=''),
    ),
    (TRAINING, 'model'): (
        Flag('model', 'beit_base_patch16_224', 'model name; --help lists them', synonyms='arch',
             also={PREDICT: dict(group=UNLABELLED, default=None, shown='the checkpoint\'s'),
                   EXPORT: dict(group='source', default=None, shown='the checkpoint\'s')}),
        Flag('rel_pos_bias', True, 'relative position bias in every block', off='disable_rel_pos_bias'),
        Flag('abs_pos_emb', False, 'learned absolute position embedding'),
        Flag('attention', 'auto', 'fused, plain, auto (fused on npu and cuda if it agrees with plain)',
             choices=('auto', 'fused', 'plain')),
        Flag('layer_scale_init_value', 0.1, 'layer scale: 0.1 for base, 1e-5 for large, 0 for none', type=rate),
        Flag('input_size', 224, 'image width and height in pixels, a multiple of the patch size',
             type=bounded_number(int, 1, MAX_INPUT_SIZE), synonyms='img_size',
             also={PREDICT: dict(group=UNLABELLED, default=None, help='image width and height in pixels',
                                 shown='the checkpoint\'s, else 224'),
                   EXPORT: dict(group='source', default=None, help='image width and height in pixels',
                                shown='the checkpoint\'s, else 224')}),
        Flag('drop', 0., 'dropout probability', type=below_one),
        Flag('attn_drop_rate', 0., 'dropout probability of attention weights', type=below_one),
        Flag('drop_path', 0.1, 'stochastic depth of the last block, rising from 0', type=below_one,
             aliases=('drop_decay',)),
        Flag('skip_dropped', 'auto', 'skip dropped paths: on, off; auto: on a CPU without --compile',
             choices=('auto', 'on', 'off')),
        Flag('grad_checkpointing', False, 'recompute activations in the backward pass: less memory, slower',
             synonyms='gradient_checkpointing'),
        Flag('compile', False, 'use torch.compile; the first steps take minutes',
             synonyms='torchcompile'),
        Flag('model_ema', False, 'keep and evaluate a moving average of the weights', follows_checkpoint=True),
        Flag('model_ema_decay', 0.9999, 'decay of the average per update', type=share),
        Flag('model_ema_force_cpu', False, 'keep the average in host memory', affects_results=False),
        Flag('disable_eval_during_finetuning', False, 'skip the evaluations during training'),
    ),
    (TRAINING, 'optimizer'): (
        Flag('opt', 'adamw', 'optimizer name; --help lists them'),
        Flag('opt_eps', 1e-8, 'epsilon of the optimizer', shown='1e-8', type=bounded_number(float, 0, above=True)),
        Flag('opt_betas', None, 'betas of the optimizer', shown='the optimizer\'s defaults', type=below_one, nargs='+'),
        Flag('clip_grad', None, 'clip the norm of all gradients to this value', shown='no clipping', type=rate,
             synonyms='max_grad_norm'),
        Flag('momentum', 0.9, 'momentum of SGD and RMSprop', type=below_one),
        Flag('weight_decay', 0.05, 'weight decay', type=rate, synonyms='wd'),
        Flag('weight_decay_end', None, 'final weight decay of a cosine schedule', shown='--weight_decay', type=rate),
        Flag('lr', 5e-4, 'learning rate of the last layers, not scaled by the batch size', shown='5e-4',
             type=bounded_number(float, 0, above=True), synonyms='learning_rate base_lr'),
        Flag('layer_decay', 0.9, 'factor on the learning rate per layer, from the head down; 1: none',
             type=bounded_number(float, 0, 1, above=True)),
        Flag('warmup_lr', 0., 'learning rate at the start of the warm-up', type=rate),
        Flag('min_lr', 1e-6, 'final learning rate', shown='1e-6', type=rate),
        Flag('warmup_epochs', 5, 'linear warm-up in epochs', type=whole),
        Flag('warmup_steps', -1, 'linear warm-up in updates; above 0 it replaces --warmup_epochs',
             type=bounded_number(int, -1)),
    ),
    (TRAINING, 'augmentation'): (
        Flag('color_jitter', 0.4, 'color jitter, used if --aa is none', type=bounded_number(float, 0, 1000)),
        Flag('aa', 'rand-m9-mstd0.5-inc1', 'RandAugment or AutoAugment policy, or none'),
        Flag('hflip', 0.5, 'probability of a horizontal flip', type=share),
        Flag('loss', 'auto', 'ce, bce (binary, per class), auto (bce for several labels per image)',
             choices=losses.LOSSES),
        Flag('class_weights', '', 'balanced (rare classes weigh more), or a CSV or JSON file', shown='all equal'),
        Flag('smoothing', 0.1, 'label smoothing', type=below_one, synonyms='label_smoothing'),
        Flag('train_interpolation', 'bicubic', 'interpolation of random crops: random, bilinear, bicubic, lanczos',
             choices=transforms.INTERPOLATIONS),
        Flag('crop_pct', None, 'center crop, relative to the resized image',
             shown='224/256; 1.0 from 384 pixels',
             type=bounded_number(float, 0, 1, above=True),
             also={PREDICT: dict(group=UNLABELLED, shown='the checkpoint\'s')}),
        Flag('reprob', 0.25, 'probability of random erasing', type=share),
        Flag('remode', 'pixel', 'fill of random erasing: const, rand, pixel', choices=('const', 'rand', 'pixel')),
        Flag('recount', 1, 'number of areas to erase', type=positive),
        Flag('resplit', False, 'not supported; the program refuses it'),
        Flag('mixup', 0., 'mixup alpha; 0: off', type=rate),
        Flag('cutmix', 0., 'cutmix alpha; 0: off', type=rate),
        Flag('cutmix_minmax', None, 'minimum and maximum area of cutmix, instead of its alpha', type=share, nargs=2),
        Flag('mixup_prob', 1., 'probability of mixing a batch', type=share),
        Flag('mixup_switch_prob', 0.5, 'probability of cutmix instead of mixup, if both are on', type=share),
        Flag('mixup_mode', 'batch', 'unit of one mixing ratio: batch, pair, elem', choices=('batch', 'pair', 'elem')),
    ),
    (TRAINING, 'fine-tuning'): (
        Flag('finetune', '', 'pretrained weights: file, folder or https URL', shown='empty: from scratch',
             synonyms='pretrained initial_checkpoint', affects_results=False),
        Flag('model_key', 'model|module', 'keys of the weights in the file; the first one found counts',
             affects_results=False),
        Flag('model_prefix', '', 'prefix of the parameter names in the file', affects_results=False),
        Flag('init_scale', 0.001, 'factor on the initial weights of the head', type=rate, affects_results=False),
        Flag('use_mean_pooling', True, 'pool the patch tokens, not the class token', off='use_cls'),
        Flag('freeze_backbone', False, 'train only the head: linear probing'),
        Flag('unfreeze_epoch', 0, 'with --freeze_backbone: train all from epoch N, counted from 0; 0: never',
             type=whole),
        Flag('disable_weight_decay_on_rel_pos_bias', False, 'no weight decay on position bias tables'),
    ),
    (TRAINING, 'precision'): (
        Flag('amp', False, 'mixed precision, by apex if installed, else by PyTorch',
             synonyms='fp16 bf16 mixed_precision', follows_checkpoint=True,
             also={PREDICT: dict(group='run', help='mixed precision')}),
        Flag('opt_level', 'O2', 'O0 float32, O1 autocast, O2 half-precision weights',
             choices=half_precision.OPT_LEVELS, metavar='O0|O1|O2', follows_checkpoint=True,
             also={PREDICT: dict(group='run', aliases=('opt-level',))}),
        Flag('amp_dtype', None, 'float16, bfloat16', shown='float16; bfloat16 on a CPU',
             choices=half_precision.AMP_DTYPES, follows_checkpoint=True, also={PREDICT: dict(group='run')}),
        Flag('loss_scale', None, 'loss scale: a number, or dynamic', shown='128 for float16, else 1', type=loss_scale),
    ),
    (TRAINING, 'data'): (
        Flag('data_path', '', 'folder with train/ and val/, or demo: handwritten digits',
             synonyms='data data_dir root', affects_results=False),
        Flag('eval_data_path', None, 'class folders to evaluate on, instead of data_path/val', affects_results=False),
        Flag('train_csv', '', 'CSV file of training images: path,label or path,label;label', affects_results=False),
        Flag('val_csv', '', 'CSV file of validation images', affects_results=False),
        Flag('val_split', 0., 'fraction of each class to hold out for evaluation, without a val/',
             type=bounded_number(float, 0, 0.9), follows_checkpoint=True),
        Flag('nb_classes', 0, 'expected number of classes; 0: as many as the data has', type=whole,
             affects_results=False),
        Flag('imagenet_default_mean_and_std', False, 'normalise with ImageNet\'s mean and std instead of 0.5'),
        Flag('data_set', 'IMNET', 'IMNET (train/, val/), image_folder (class folders), CIFAR (100)',
             follows_checkpoint=True, names_difference=False),
        Flag('data_backend', 'exact', 'exact (Pillow), fast (torchvision; pixels differ slightly)',
             choices=transforms.BACKENDS,
             also={PREDICT: dict(group='run')}),
        Flag('eval_data_backend', 'exact', 'the same for evaluation: exact, fast', choices=transforms.BACKENDS,
             follows_checkpoint=True),
        Flag('bad_images', 'error', 'unreadable images: error (stop), skip (leave out and list)',
             choices=('error', 'skip'),
             also={PREDICT: dict(group='input')}),
        Flag('max_bad_images', 0.001, 'with skip: stop at this fraction of unreadable images', type=share,
             affects_results=False),
        Flag('max_image_pixels', 0, 'reject images with more pixels; 0: Pillow\'s limit, 179 million',
             type=whole, affects_results=False, also={PREDICT: dict(group='input')}),
        Flag('check_data', False, 'decode every image, list the unreadable ones, and exit',
             affects_results=False),
    ),
    (TRAINING, 'distributed'): (
        Flag('world_size', 1, 'set by the launcher', type=positive, affects_results=False),
        Flag('local_rank', -1, 'set by the launcher', type=bounded_number(int, -1), affects_results=False,
             also=LAUNCHED),
        Flag('dist_on_itp', False, 'read the ranks from Open MPI\'s environment', affects_results=False,
             also=LAUNCHED),
        Flag('dist_timeout', 600., 'end the job if a process blocks the others for N seconds',
             type=bounded_number(float, 1, 10 ** 6), affects_results=False,
             also=LAUNCHED),
        Flag('dist_url', 'env://', 'rendezvous address', affects_results=False,
             also=LAUNCHED),
    ),
}


def flags_of(program: str) -> Iterator[Tuple[str, Flag]]:
    """Each (group, flag) of a program."""
    for (home, group), flags in FLAGS.items():
        for flag in flags:
            if home == program:
                yield group, flag
            elif program in flag.also:
                changes = dict(flag.also[program])
                yield changes.pop('group'), dataclasses.replace(flag, **changes)


def without_effect() -> FrozenSet[str]:
    """The names of the training flags that do not affect the results."""
    return frozenset(flag.name for _, flag in flags_of(TRAINING) if not flag.affects_results)


def build_parser(program: str = TRAINING, usage: str = '--data_path DIR [flags]', description: Optional[str] = None,
                 examples: str = EXAMPLES, parser_class: Type[OneLineParser] = OneLineParser,
                 **changes: Mapping[str, Any]) -> OneLineParser:
    """The parser of a program.

    Args:
        usage, description, examples: text of --help besides the flags.
        changes: {name of a flag: the attributes of its `Flag` that the program itself sets}, such as choices.
    """
    parser = parser_class(program, usage, description=description, epilog=examples)
    groups = {title: parser.add_argument_group(title) for title in GROUPS[program]}
    for group, flag in flags_of(program):
        dataclasses.replace(flag, **changes.get(flag.name, {})).add_to(groups[group])
        parser.synonyms.update((name, flag.name) for name in flag.synonyms.split())
    return parser


Config = TypeVar('Config')


def config_from(args: argparse.Namespace, kind: Callable[..., Config], **given: Any) -> Config:
    """A dataclass of `config` with the values of the flags that its fields are named after; `given` wins."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**dict({field.name: getattr(args, field.name) for field in fields if hasattr(args, field.name)},
                       **given))


# ---- checks before slow work starts

def check_args(args: argparse.Namespace) -> None:
    """Check the flags before slow work starts. Raises `UserError`."""
    check_model(args)
    check_augmentation(args)
    check_schedule(args)
    if not evaluates_checkpoint(args):  # else the checkpoint may name the data set
        locations.check_paths(config_from(args, InputConfig))
    check_compute(args)
    check_optimizer(args)
    check_evaluation(args)
    check_weights(args)
    check_outputs(args)


def evaluates_checkpoint(args: argparse.Namespace) -> bool:
    """Whether the checkpoint overrides the defaults of the flags."""
    return bool(args.eval and args.resume)


def follow_checkpoint(args: argparse.Namespace, saved: Mapping[str, Any], source: str) -> List[str]:
    """Take the flags that were not given from a checkpoint; return a text for each given flag that differs.

    Args:
        saved: the flags of the checkpoint, from an untrusted file.

    Raises:
        UserError: a flag that is needed has no value that it can have.
    """
    differ = []
    for _, flag in flags_of(TRAINING):
        if not flag.follows_checkpoint or flag.name not in saved:
            continue
        try:
            value = flag.check(saved[flag.name])
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise UserError('--resume %s: it was trained with --%s %.40r, which is no value of it; give the flag'
                            % (escape_text(source), flag.name, saved[flag.name])) from None
        if flag.name not in args.given:
            setattr(args, flag.name, value)
        elif flag.names_difference and getattr(args, flag.name) != value:
            differ.append('--%s %s (the checkpoint: %s)' % (flag.name, getattr(args, flag.name), value))
    return differ


def check_model(args: argparse.Namespace) -> None:
    if not evaluates_checkpoint(args):
        model_spec.check_architecture(args.model, args.input_size)
    elif args.model not in modeling_finetune.MODELS:
        raise unknown_value_error('--model', args.model, modeling_finetune.MODELS)
    if args.class_names and not (args.eval and (args.resume or args.finetune)):
        raise UserError('--class_names %s: it belongs to --eval --resume; a training takes the names of its data'
                        % escape_text(args.class_names))


def check_augmentation(args: argparse.Namespace) -> None:
    transforms.check_policy(args.aa)
    transforms.check_backend(config_from(args, TransformConfig))
    if args.resplit:
        raise UserError('--resplit needs augmentation splits, which this recipe does not have; leave it out')
    if transforms.uses_mixup(config_from(args, MixupConfig)) and args.batch_size % 2 and not args.eval:
        raise UserError('--batch_size %d: mixup and cutmix pair images, so it must be even' % args.batch_size)
    for flag in ('mixup', 'cutmix'):
        if 0 < getattr(args, flag) < 1e-6:  # NumPy's beta distribution gives no number there
            raise UserError('--%s %g: an alpha below 1e-6 mixes nothing; 0 turns it off' % (flag, getattr(args, flag)))
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise UserError('--cutmix_minmax %g %g: the first must be below the second' % tuple(args.cutmix_minmax))
    if args.class_weights and not args.eval:
        losses.check_weights(args.class_weights)


def check_schedule(args: argparse.Namespace) -> None:
    if args.warmup_steps <= 0 and args.warmup_epochs > args.epochs:
        raise UserError('--warmup_epochs %d is longer than --epochs %d; give --warmup_epochs=%d or fewer'
                        % (args.warmup_epochs, args.epochs, args.epochs))
    if args.start_epoch >= args.epochs:
        raise UserError('--start_epoch %d: --epochs %d leaves nothing to train; raise --epochs'
                        % (args.start_epoch, args.epochs))
    if args.early_stop and args.disable_eval_during_finetuning:
        raise UserError('--early_stop %d: --disable_eval_during_finetuning evaluates nothing to stop by; leave one of '
                        'them out' % args.early_stop)


def check_compute(args: argparse.Namespace) -> None:
    """The device, and what it can do."""
    _, processes, local_rank = process_group.launch_environment(config_from(args, DistributedConfig))
    if args.world_size > 1 and processes == 1:
        raise UserError('--world_size %d is set by the launcher; start the processes with test/train_full_8p.sh '
                        '--nproc_per_node=%d, or torchrun' % (args.world_size, args.world_size))
    # Too few devices are an error of all processes of a machine, so that none waits for one that cannot come.
    highest = os.environ.get('LOCAL_WORLD_SIZE', '1')
    device = accelerator.find_device(
        args.device, max(local_rank, int(highest) - 1) if highest.isdigit() else local_rank, processes)
    if device.type == 'cpu' and not evaluates_checkpoint(args):
        half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    if args.cann_prof:
        profiler.check_cann_profiler()
    if args.compile:
        kernels.check_compile(device)
        if args.skip_dropped == 'on':
            raise UserError('--skip_dropped on: it changes shapes from step to step, and --compile needs one; leave '
                            'one of them out')


def check_optimizer(args: argparse.Namespace) -> None:
    if args.opt_betas is not None and len(args.opt_betas) != 2:
        raise UserError('--opt_betas %s: give 2 numbers, as in --opt_betas 0.9 0.999'
                        % ' '.join(map(str, args.opt_betas)))
    if not args.eval:
        optim_factory.check_optimizer(args.opt, args.momentum)
    if args.unfreeze_epoch:
        check_unfreezing(args)


def check_unfreezing(args: argparse.Namespace) -> None:
    flag = '--unfreeze_epoch %d: ' % args.unfreeze_epoch
    if not args.freeze_backbone:
        raise UserError(flag + 'it needs --freeze_backbone, without which nothing is frozen')
    if args.unfreeze_epoch >= args.epochs and not args.eval:
        raise UserError(flag + '--epochs %d ends before; lower it, or leave it out to train the head alone'
                        % args.epochs)
    if 'fused' in args.opt.lower() or optim_factory.optimizer_class(args.opt)[0].__name__ == 'NovoGrad':
        raise UserError(flag + '--opt %s looks for gradients in its first step and for no others later; use '
                        '--opt adamw, or two runs, the second with --finetune' % args.opt)


def check_evaluation(args: argparse.Namespace) -> None:
    for flag in ('results_file', 'real_labels'):
        if getattr(args, flag) and not args.eval:
            raise UserError('--%s %s: it belongs to --eval; leave it out of training' % (flag, getattr(args, flag)))
    if args.results_file:
        metrics.check_results_file(args.results_file)
        run_folder.check_writable('--results_file', args.results_file, is_file=True)
    if args.real_labels and not os.path.isfile(args.real_labels):
        raise UserError('--real_labels %s: no such file' % args.real_labels)
    if args.eval and not (args.resume or args.finetune):
        raise UserError('--eval needs --resume: the checkpoint to evaluate, or the folder that holds it')


def check_weights(args: argparse.Namespace) -> None:
    """The files that a run starts from."""
    if not args.eval:
        pretrained.check_finetune(args.finetune)
    if args.eval and os.path.isfile(os.path.join(args.resume, hf_names.CONFIG)):
        return
    if args.resume and not (args.auto_resume and args.output_dir and discovery.list_checkpoints(args.output_dir)):
        discovery.candidates(args.resume)  # else it may have been removed since, and isn't needed


def check_outputs(args: argparse.Namespace) -> None:
    if args.report and not args.output_dir:
        raise UserError('--report needs --output_dir, the folder for report.html')
    if args.log_dir and importlib.util.find_spec('tensorboardX') is None:
        raise UserError('--log_dir %s needs tensorboardX; %s' % (args.log_dir, startup.pip_install('tensorboardX')))
    for flag, folder in (('--output_dir', args.output_dir), ('--log_dir', args.log_dir)):
        run_folder.check_writable(flag, folder)
