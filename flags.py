"""Every flag of the programs, declared once, and the checks of a training run's flags at its start."""

import argparse
import dataclasses
import importlib.util
import os
import textwrap
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

import modeling_finetune
import optim_factory
from beit import model_spec, weights
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
from beit.log import log_main
from beit.outputs import attention_maps
from beit.training import losses, metrics

TRAINING, PREDICT, EXPORT, AVERAGE = PROGRAMS = (
    'run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py')

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


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: everything that the parsers, --help and a resumed run need to know of it.

    Attributes:
        name: without its dashes; `aliases` are further spellings.
        default: a bool makes a switch, which --no_name (or `off`) turns off; where `off` is empty, nothing does.
        help: what it does. --help adds the default in brackets, or what `shown` says of it.
        type, choices, nargs, metavar, action: as argparse has them.
        synonyms: what other projects call it, separated by blanks; for hints at an unknown flag.
        affects_results: whether the numbers of a training run depend on it; a resumed run names such changes.
        follows_checkpoint: whether --eval takes it from the checkpoint, where it is not given; besides those that
            `model_spec.ModelSpec` holds.
        also: {another program that has it: its group and its differences there}.
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
        """The value, where the flag can have it. Raises ValueError, TypeError or ArgumentTypeError."""
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

UNLABELLED = 'weights that do not say what they are of'
TRAINED = dict(help='checkpoint, or its folder, of which the best is taken', shown='empty; needed')
LAUNCHED = {PREDICT: dict(group='distributed')}

DEEPSPEED = {'amp': True, 'opt_level': 'O2', 'loss_scale': 'dynamic'}  # what --enable_deepspeed stands for

GROUPS = {  # in the order of --help
    TRAINING: ('run', 'model', 'optimizer', 'augmentation', 'fine-tuning', 'data', 'output', 'precision',
               'distributed'),
    PREDICT: ('what', 'results', 'run', UNLABELLED, 'distributed'),
    EXPORT: ('what to export', 'how'),
    AVERAGE: ('flags',)}

FLAGS: Dict[Tuple[str, str], Tuple[Flag, ...]] = {  # by program and group; --help has each group in this order
    (TRAINING, 'run'): (
        Flag('batch_size', 64, 'images per device and micro-step', type=positive, synonyms='bs b',
             affects_results=False, also={PREDICT: dict(group='run', help='images per device at a time')}),
        Flag('epochs', 30, 'passes over the training set', type=bounded_number(int, 1, 10 ** 6)),
        Flag('update_freq', 1, 'micro-steps whose gradients make one update', type=positive,
             synonyms='accum_iter grad_accum_steps gradient_accumulation_steps', affects_results=False),
        Flag('save_ckpt_freq', 5, 'epochs between checkpoints', type=positive, affects_results=False),
        Flag('save_ckpt_steps', 0, 'update steps between checkpoints in mid-epoch; 0: none', type=whole,
             affects_results=False),
        Flag('save_ckpt_minutes', 0., 'minutes between them; 0: none', type=rate, affects_results=False),
        Flag('keep_checkpoints', 0, 'only the newest so many of each kind; 0: all epochs, 2 in mid-epoch', type=whole,
             affects_results=False),
        Flag('deterministic', False, 'the same bits from the same command twice, on the same machine',
             affects_results=False),
        Flag('on_nonfinite', 'stop', 'loss or gradient infinite or no number: stop, or skip that update',
             choices=('stop', 'skip')),
        Flag('seed', 0, 'seed of every random number', type=bounded_number(int, 0, 2 ** 62), follows_checkpoint=True),
        Flag('num_workers', default_num_workers(), 'loader processes per device; 0: none',
             shown='one per processor, at most 10', type=bounded_number(int, 0, 1024), affects_results=False,
             also={PREDICT: dict(group='run', default=None, help='loader processes per device',
                                 shown='one per core, up to 8; 0 for one batch')}),
        Flag('pin_mem', True, 'page-locked memory for batches to npu or cuda', affects_results=False,
             also={PREDICT: dict(group='run')}),
        Flag('max_train_samples', 0, 'train on so many images, the same in every epoch; 0: all', type=whole),
        Flag('val_interval', 1, 'evaluate after each so many epochs, and the last', type=positive),
        Flag('early_stop', 0, 'stop after so many evaluations in a row without a new best; 0: never', type=whole,
             affects_results=False),
        Flag('start_epoch', 0, 'first epoch, where no checkpoint says it', type=whole, affects_results=False),
        Flag('device', 'auto', 'auto (npu, cuda, cpu: the first present), npu, cuda, cpu, cuda:1 …', synonyms='gpu',
             affects_results=False, also={PREDICT: dict(group='run')}),
        Flag('jit_compile', 'auto', 'npu: compile operators; auto: on for 910A, off for 910B; on, off',
             choices=('auto', 'on', 'off')),
        Flag('maxstep', 0, 'stop after exactly this many update steps; 0: no limit', type=whole, affects_results=False),
        Flag('prof', False, 'profile a few updates, write a trace into output_dir/prof, stop', affects_results=False),
        Flag('cann_prof', False, 'likewise through torch_npu\'s profiler', affects_results=False),
    ),
    (TRAINING, 'output'): (
        Flag('output_dir', '', 'folder for checkpoints, log.txt and the like', shown='empty: none', synonyms='output',
             affects_results=False),
        Flag('config', None, 'flags from a file, such as a run\'s args.yaml; those given here win', metavar='FILE'),
        Flag('recipe', '', 'published flags, a file of recipes/; auto: by --model and --finetune', metavar='NAME',
             affects_results=False),
        Flag('curves', True, 'draw output_dir/curves.png, every 20 s at most', affects_results=False),
        Flag('report', False, 'write output_dir/report.html: curves, classes, confusions, images',
             affects_results=False),
        Flag('log_dir', None, 'folder for TensorBoard', affects_results=False),
        Flag('resume', '', 'checkpoint, or its folder: the newest; to evaluate the best', synonyms='checkpoint',
             affects_results=False, also={PREDICT: dict(TRAINED, group='what'),
                                          EXPORT: dict(TRAINED, group='what to export')}),
        Flag('auto_resume', False, 'resume the newest checkpoint of output_dir, where there is one',
             affects_results=False),
        Flag('save_ckpt', True, 'write checkpoints', affects_results=False),
        Flag('eval', False, 'evaluate --resume, and nothing else', synonyms='evaluate eval_only test_only',
             affects_results=False),
        Flag('test_flip', False, 'evaluate on the mean of the logits of an image and of its mirror image',
             follows_checkpoint=True),
        Flag('results_file', '', 'with --eval: a file for the figures, .csv or .json', affects_results=False),
        Flag('class_names', '', 'with --eval: file of class names, where the weights have none',
             affects_results=False, also={
                 PREDICT: dict(group=UNLABELLED, help='file of class names, one a line or JSON'),
                 EXPORT: dict(group='what to export', help='file of class names, one a line or JSON')}),
        Flag('real_labels', '', 'with --eval: JSON list of ImageNet\'s reassessed labels', affects_results=False),
        Flag('dist_eval', False, 'share the evaluation among the processes, every image exactly once',
             affects_results=False),
        Flag('robust_test', None, 'with --eval: imagenet_r, imagenet_a: on the logits of its 200 classes',
             choices=('imagenet_r', 'imagenet_a'), metavar='SET', affects_results=False),
    ),
    (AVERAGE, 'flags'): (
        Flag('inputs', [], 'checkpoints, or folders with some after whole epochs', shown='none; needed', nargs='+'),
        Flag('output', '', 'the file to write; it must not be there yet', shown='empty; needed'),
        Flag('best', 0, 'only so many, the best by the log.txt beside them; all count alike', shown='all',
             type=positive),
    ),
    (PREDICT, 'what'): (
        Flag('input', [], 'images, folders and patterns, as those without a flag', nargs='+', action='append'),
        Flag('use_ema', False, 'the averaged weights of the checkpoint',
             also={EXPORT: dict(group='what to export', help='the averaged weights of --model_ema', off=''),
                   AVERAGE: dict(group='flags', off='',
                                 help='the averaged weights of --model_ema, not the trained ones')}),
    ),
    (PREDICT, 'results'): (
        Flag('top_k', 5, 'classes for each image, the likeliest first', type=positive),
        Flag('output', '', 'file to write instead of printing; - is standard output'),
        Flag('format', None, 'of --output: csv, json, jsonl', shown='by its ending; of - jsonl'),
        Flag('attention', None, 'pictures of where it looks: cls, mean; no value: as it pools', metavar='cls|mean',
             choices=('auto',) + attention_maps.KINDS),
        Flag('attention_block', None, 'the block that is looked at, from 1', shown='the last',
             type=bounded_number(int)),
        Flag('attention_heads', False, 'a picture for each head, too'),
        Flag('attention_dir', '', 'folder for these pictures', shown='attention, beside --output or here'),
    ),
    (EXPORT, 'how'): (
        Flag('format', '', 'the formats', shown='empty; needed'),
        Flag('output', '', 'file, for huggingface a folder', shown='beside the checkpoint, by its name'),
        Flag('overwrite', False, 'replace what is there', off=''),
        Flag('opset', None, 'of onnx', shown='the newest that works', type=bounded_number(int, 7, 99)),
        Flag('no_check', False, 'do not compare the result with the checkpoint', off=''),
    ),
    (TRAINING, 'model'): (
        Flag('model', 'beit_base_patch16_224', 'name; the models stand below', synonyms='arch',
             also={PREDICT: dict(group=UNLABELLED, default=None, help='name of the model', shown='the checkpoint\'s'),
                   EXPORT: dict(group='what to export', default=None, help='name, where the file does not say it',
                                shown='the file\'s')}),
        Flag('rel_pos_bias', True, 'relative position bias in every block', off='disable_rel_pos_bias'),
        Flag('abs_pos_emb', False, 'learned absolute positions'),
        Flag('qkv_bias', True, 'a bias on queries and values', off='disable_qkv_bias'),
        Flag('attention', 'auto', 'auto: fused on npu, cuda, where it agrees with plain; fused; plain',
             choices=('auto', 'fused', 'plain')),
        Flag('layer_scale_init_value', 0.1, '0.1 for base, 1e-5 for large, 0 for none', type=rate),
        Flag('input_size', 224, 'pixels a side; any whole number of patches',
             type=bounded_number(int, 1, MAX_INPUT_SIZE), synonyms='img_size',
             also={PREDICT: dict(group=UNLABELLED, default=None, help='pixels a side',
                                 shown='the checkpoint\'s, else 224'),
                   EXPORT: dict(group='what to export', default=None, help='likewise, in pixels a side',
                                shown='the file\'s, else 224')}),
        Flag('drop', 0., 'dropout, a share', type=below_one),
        Flag('attn_drop_rate', 0., 'dropout on attention weights, a share', type=below_one),
        Flag('drop_path', 0.1, 'stochastic depth of the last block, a share', type=below_one, aliases=('drop_decay',)),
        Flag('skip_dropped', 'auto', 'on, off: no work on dropped images; auto: on a CPU, not compiled',
             choices=('auto', 'on', 'off')),
        Flag('grad_checkpointing', False, 'compute the blocks again in the backward pass: less memory, slower',
             synonyms='gradient_checkpointing'),
        Flag('compile', False, 'compile the model with torch.compile; the first steps take minutes',
             synonyms='torchcompile'),
        Flag('model_ema', False, 'keep and evaluate a moving average of the weights', follows_checkpoint=True),
        Flag('model_ema_decay', 0.9999, 'its decay per update', type=share),
        Flag('model_ema_force_cpu', False, 'keep it in host memory', affects_results=False),
        Flag('disable_eval_during_finetuning', False, 'do not evaluate after each epoch'),
    ),
    (TRAINING, 'optimizer'): (
        Flag('opt', 'adamw', 'name; the optimizers stand below; on an NPU npufusedadamw'),
        Flag('opt_eps', 1e-8, 'epsilon', shown='1e-8', type=bounded_number(float, 0, above=True)),
        Flag('opt_betas', None, 'betas', shown='the optimizer\'s own', type=below_one, nargs='+'),
        Flag('clip_grad', None, 'clip the gradients\' norm to this', shown='no clipping', type=rate,
             synonyms='max_grad_norm'),
        Flag('momentum', 0.9, 'momentum of SGD and its like', type=below_one),
        Flag('weight_decay', 0.05, 'weight decay', type=rate, synonyms='wd'),
        Flag('weight_decay_end', None, 'its value at the end of a cosine', shown='weight_decay', type=rate),
        Flag('lr', 5e-4, 'learning rate of the last layers; not scaled by batch size', shown='5e-4',
             type=bounded_number(float, 0, above=True), synonyms='learning_rate base_lr'),
        Flag('blr', 0., 'learning rate per 256 images an update, instead of --lr; 0: unused', type=rate,
             affects_results=False),
        Flag('layer_decay', 0.9, 'factor per layer downwards', type=bounded_number(float, 0, 1, above=True)),
        Flag('warmup_lr', 0., 'learning rate of the first step of the warm-up', type=rate),
        Flag('min_lr', 1e-6, 'learning rate at the end', shown='1e-6', type=rate),
        Flag('warmup_epochs', 5, 'epochs of linear warm-up', type=whole),
        Flag('warmup_steps', -1, 'update steps instead, when above 0', type=bounded_number(int, -1)),
    ),
    (TRAINING, 'augmentation'): (
        Flag('color_jitter', 0.4, 'strength, where --aa is none', type=bounded_number(float, 0, 1000)),
        Flag('aa', 'rand-m9-mstd0.5-inc1', 'AutoAugment policy or none'),
        Flag('hflip', 0.5, 'share of images that are mirrored', type=share),
        Flag('loss', 'auto', 'ce, bce (a binary one for each class); auto: bce for many labels',
             choices=losses.LOSSES),
        Flag('class_weights', '', 'balanced: rare ones weigh more; or a CSV or JSON file', shown='all the same'),
        Flag('smoothing', 0.1, 'label smoothing', type=below_one, synonyms='label_smoothing'),
        Flag('train_interpolation', 'bicubic', 'of random crops: random, bilinear, bicubic, lanczos',
             choices=transforms.INTERPOLATIONS),
        Flag('crop_pct', None, 'share of the resized image to evaluate', shown='224/256; from 384 pixels on 1.0',
             type=bounded_number(float, 0, 1, above=True),
             also={PREDICT: dict(group=UNLABELLED, help='share of the resized image that is cropped',
                                 shown='the checkpoint\'s')}),
        Flag('reprob', 0.25, 'share of images with random erasing', type=share),
        Flag('remode', 'pixel', 'what erasing writes: const, rand, pixel', choices=('const', 'rand', 'pixel')),
        Flag('recount', 1, 'how many areas it erases', type=positive),
        Flag('resplit', False, 'refused: it needs augmentation splits, which this recipe does not have'),
        Flag('mixup', 0., 'mixup alpha; 0 is off', type=rate),
        Flag('cutmix', 0., 'cutmix alpha; 0 is off', type=rate),
        Flag('cutmix_minmax', None, 'bounds of cutmix\'s area, two shares, instead of its alpha', type=share, nargs=2),
        Flag('mixup_prob', 1., 'share of batches that are mixed', type=share),
        Flag('mixup_switch_prob', 0.5, 'share of these with cutmix, where both are on', type=share),
        Flag('mixup_mode', 'batch', 'what shares one mix: batch, pair, elem', choices=('batch', 'pair', 'elem')),
    ),
    (TRAINING, 'fine-tuning'): (
        Flag('finetune', '', 'weights: a file, an https URL or a published name',
             shown='empty: from scratch', synonyms='pretrained initial_checkpoint', affects_results=False),
        Flag('model_key', 'model|module', 'where the file keeps them; the first found', affects_results=False),
        Flag('model_prefix', '', 'what their names have in front', aliases=('model_filter_name',),
             affects_results=False),
        Flag('init_scale', 0.001, 'factor on the head\'s initial weights', type=rate, affects_results=False),
        Flag('use_mean_pooling', True, 'pool by the mean of the patches, not the class token', off='use_cls'),
        Flag('freeze_backbone', False, 'train the head alone (linear probing)'),
        Flag('unfreeze_epoch', 0, 'with it: train all from this epoch on, counted from 0; 0: never', type=whole),
        Flag('disable_weight_decay_on_rel_pos_bias', False, 'no weight decay on bias tables'),
    ),
    (TRAINING, 'precision'): (
        Flag('amp', False, 'mixed precision, by apex where it is installed, else by PyTorch',
             synonyms='fp16 bf16 mixed_precision', follows_checkpoint=True,
             also={PREDICT: dict(group='run', help='mixed precision, as in evaluation')}),
        Flag('opt_level', 'O2', 'O0 float32; O1 autocast; O2 half weights, float32 masters',
             choices=half_precision.OPT_LEVELS, metavar='O0|O1|O2', follows_checkpoint=True,
             also={PREDICT: dict(group='run', help='O0 float32, O1 autocast, O2 half-precision weights',
                                 aliases=('opt-level',))}),
        Flag('enable_deepspeed', False, 'the reference\'s flag for --amp --opt_level O2 --loss_scale dynamic',
             affects_results=False),
        Flag('amp_dtype', None, 'float16, bfloat16', shown='float16; on a CPU bfloat16',
             choices=half_precision.AMP_DTYPES, follows_checkpoint=True, also={PREDICT: dict(group='run')}),
        Flag('loss_scale', None, 'a number, or dynamic', shown='128 for float16, else 1', type=loss_scale),
    ),
    (TRAINING, 'data'): (
        Flag('data_path', '', 'folder with train/ and val/ of class folders; or demo: digits',
             synonyms='data data_dir root', affects_results=False),
        Flag('eval_data_path', None, 'class folders to evaluate on, instead of data_path/val', affects_results=False),
        Flag('train_csv', '', 'list of training images: path,label or path,label;label', affects_results=False),
        Flag('val_csv', '', 'likewise of the validation images', affects_results=False),
        Flag('val_split', 0., 'share of each class to evaluate on, where there is no val',
             type=bounded_number(float, 0, 0.9), follows_checkpoint=True),
        Flag('nb_classes', 0, 'checked against the folders; 0 takes their number', type=whole, affects_results=False),
        Flag('image_folder_class_index_file', '', 'the class folders in the order of the outputs, one a line'),
        Flag('imagenet_default_mean_and_std', False, 'ImageNet\'s mean and deviation instead of 0.5'),
        Flag('data_set', 'IMNET', 'IMNET (train/, val/), image_folder (class folders), CIFAR (100)',
             follows_checkpoint=True),
        Flag('data_backend', 'exact', 'exact, the reference\'s pixels; fast, by torchvision, nearly so',
             choices=transforms.BACKENDS,
             also={PREDICT: dict(group='run',
                                 help='exact, or fast: JPEG files by torchvision, pixels differ a little')}),
        Flag('eval_data_backend', 'exact', 'the same of evaluation: exact, fast', choices=transforms.BACKENDS,
             follows_checkpoint=True),
        Flag('bad_images', 'error', 'a file that cannot be read: error, or skip: leave out and list it',
             choices=('error', 'skip'),
             also={PREDICT: dict(group='what',
                                 help='a file that cannot be read: error, or skip: say so and leave it out')}),
        Flag('max_bad_images', 0.001, 'with skip, the share of bad files to stop at', type=share,
             affects_results=False),
        Flag('max_image_pixels', 0, 'largest number of pixels of an image; 0: Pillow\'s limit',
             type=whole, affects_results=False, also={PREDICT: dict(group='what')}),
        Flag('check_data', False, 'decode every image, report those that cannot be read, and stop',
             affects_results=False),
    ),
    (TRAINING, 'distributed'): (
        Flag('world_size', 1, 'set by the launcher', type=positive, affects_results=False),
        Flag('local_rank', -1, 'set by the launcher', type=bounded_number(int, -1), affects_results=False,
             also=LAUNCHED),
        Flag('dist_on_itp', False, 'take ranks from Open MPI\'s environment', affects_results=False,
             also=LAUNCHED),
        Flag('dist_timeout', 600., 'seconds that a process may hold up the others before the job ends',
             type=bounded_number(float, 1, 10 ** 6), affects_results=False,
             also=LAUNCHED),
        Flag('dist_url', 'env://', 'where the processes meet', affects_results=False,
             also=LAUNCHED),
    ),
}


def flags_of(program: str) -> Iterator[Tuple[str, Flag]]:
    """Each flag of a program, as it is there, with its group."""
    for (home, group), flags in FLAGS.items():
        for flag in flags:
            if home == program:
                yield group, flag
            elif program in flag.also:
                changes = dict(flag.also[program])
                yield changes.pop('group'), dataclasses.replace(flag, **changes)


def without_effect() -> FrozenSet[str]:
    """The names of the training flags on which no number of a run depends."""
    return frozenset(flag.name for _, flag in flags_of(TRAINING) if not flag.affects_results)


def build_parser(program: str = TRAINING, usage: str = '--data_path DIR [flags]', description: Optional[str] = None,
                 examples: str = EXAMPLES, parser_class: Type[OneLineParser] = OneLineParser,
                 **changes: Mapping[str, Any]) -> OneLineParser:
    """The parser of a program.

    Args:
        usage, description, examples: what --help says besides the flags.
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


# ---- checks before anything slow starts

def settle(args: argparse.Namespace) -> None:
    """Set the flags that others stand for or imply, and log each. Raises `UserError`."""
    lines = []
    if args.eval and args.finetune and not args.resume:
        args.resume, args.finetune = args.finetune, ''
        lines.append('--eval --finetune: evaluated as --resume %s' % escape_text(args.resume))
    elif args.eval and {'resume', 'finetune'} <= args.typed and args.finetune:
        raise UserError('--finetune %s: --eval evaluates --resume; leave one of them out' % escape_text(args.finetune))
    known = weights.published(args.resume if args.eval else args.finetune)
    for name in ('model', 'input_size'):
        if known and name not in args.given and getattr(args, name) != getattr(known, name):
            setattr(args, name, getattr(known, name))
            lines.append('--%s %s, as %s' % (name, getattr(args, name), known.name))
    if modeling_finetune.input_statistics(args.model)[0] != modeling_finetune.INPUT_MEAN and not (
            args.imagenet_default_mean_and_std or 'imagenet_default_mean_and_std' in args.given):
        args.imagenet_default_mean_and_std = True
        lines.append('--imagenet_default_mean_and_std, as --model %s' % args.model)
    if args.enable_deepspeed:
        vars(args).update((name, value) for name, value in DEEPSPEED.items() if name not in args.given)
        args.given |= set(DEEPSPEED)
        lines.append('--enable_deepspeed: the same computation without DeepSpeed, %s'
                     % ' '.join('--%s=%s' % (name, getattr(args, name)) for name in DEEPSPEED))
    if 'lr' in args.typed:
        if 'blr' in args.typed and args.blr:
            raise UserError('--blr %g: --lr is given too; leave one of them out' % args.blr)
        args.blr = 0.
    if args.blr:
        processes = process_group.launch_environment(config_from(args, DistributedConfig))[1]
        images = args.batch_size * args.update_freq * processes
        args.lr = args.blr * images / 256
        lines.append('--lr %g: --blr %g x %d images an update / 256' % (args.lr, args.blr, images))
    for line in lines if process_group.is_error_reporter() else ():
        log_main(line)


def check_args(args: argparse.Namespace) -> None:
    """`settle`, and check everything that can be checked before anything slow starts. Raises `UserError`."""
    settle(args)
    check_model(args)
    check_augmentation(args)
    check_schedule(args)
    if not evaluates_checkpoint(args):  # else it may say how the images lie there
        locations.check_paths(config_from(args, InputConfig))
    check_compute(args)
    check_optimizer(args)
    check_evaluation(args)
    check_weights(args)
    check_outputs(args)


def evaluates_checkpoint(args: argparse.Namespace) -> bool:
    """Whether a checkpoint says what is evaluated, and not the flags' defaults."""
    return bool(args.eval and args.resume)


def follow_checkpoint(args: argparse.Namespace, saved: Mapping[str, Any], source: str) -> List[str]:
    """Set the flags that were not given to what a checkpoint was trained with; gives those given that differ, in words.

    Args:
        saved: the flags of the checkpoint, as a stranger may have written them.

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
        elif getattr(args, flag.name) != value:
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
    if args.eval and 'recipe' in args.typed and args.recipe:
        raise UserError('--recipe %s: it belongs to training; leave it out of --eval' % escape_text(args.recipe))
    for flag in ('results_file', 'real_labels', 'robust_test'):
        if getattr(args, flag) and not args.eval:
            raise UserError('--%s %s: it belongs to --eval; leave it out of training' % (flag, getattr(args, flag)))
    if args.results_file:
        metrics.check_results_file(args.results_file)
        run_folder.check_writable('--results_file', os.path.dirname(args.results_file))
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
        raise UserError('--log_dir %s needs tensorboardX; run: pip install tensorboardX' % args.log_dir)
    for flag, folder in (('--output_dir', args.output_dir), ('--log_dir', args.log_dir)):
        run_folder.check_writable(flag, folder)
