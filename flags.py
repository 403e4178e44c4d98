"""Every flag of the programs, declared once, and their parsers.

This module imports no PyTorch, so that --help and a mistyped flag take no time: `names_in` reads the tables of the
modules that do.
"""

import argparse
import ast
import dataclasses
import functools
import os
import sys
import textwrap
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

from beit.config import EVAL_FITS, MAX_INPUT_SIZE, default_num_workers, parse_colour
from beit.errors import UserError, escape_text
from beit.parser import OneLineParser, OneOrMore, add_bool_flag, bounded_number
from beit.paths import project_root

TRAINING, PREDICT, EXPORT, AVERAGE, PROBE = PROGRAMS = (
    'run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py', 'run_linear_eval.py')


def node_of(path: str, table: str) -> Any:
    """The value of a name at the top of a module of the project, as its source has it."""
    with open(os.path.join(project_root(), path), encoding='utf-8') as file:
        nodes = ast.parse(file.read()).body
    targets: Any = [(target, node) for node in nodes
                    for target in getattr(node, 'targets', [getattr(node, 'target', None)])]
    return next(node.value for target, node in targets if getattr(target, 'id', '') == table)


def names_in(path: str, table: str) -> Tuple[Any, ...]:
    """The keys of a dict, or the items of a tuple, at the top of a module of the project."""
    value = node_of(path, table)
    return tuple(ast.literal_eval(each) for each in getattr(value, 'keys', None) or value.elts)


MODELS, OPTIMIZERS = names_in('modeling_finetune.py', 'MODELS'), names_in('optim_factory.py', 'OPTIMIZERS')
EXPORTS = node_of('beit/outputs/export_formats.py', 'FORMATS')
EXPORT_FORMATS = {ast.literal_eval(key): {each.arg: ast.literal_eval(each.value) for each in call.keywords
                                          if each.arg in ('takes', 'files')}
                  for key, call in zip(EXPORTS.keys, EXPORTS.values)}  # the names, with the fields that checks need
NEWEST_OPSET = names_in('beit/outputs/export_formats.py', 'OPSETS')[0]
PREDICTION_FORMATS = tuple(sorted(names_in('beit/outputs/prediction_writers.py', 'FORMATS')))
BACKENDS = names_in('beit/data/transforms.py', 'BACKENDS')
FAST_RESIZES = names_in('beit/data/fast_decode.py', 'RESIZES')
OPT_LEVELS = names_in('beit/devices/half_precision.py', 'OPT_LEVELS')
AMP_DTYPES = names_in('beit/devices/half_precision.py', 'AMP_DTYPES')
BEST_BY = names_in('beit/training/metrics.py', 'BEST_BY')
ATTENTION_KINDS = names_in('beit/outputs/attention_maps.py', 'KINDS')

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
    action: Any = None
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


Neutral = functools.partial(Flag, affects_results=False)  # a flag on which the results of a training do not depend


def loss_scale(text: str) -> Any:
    return text if text == 'dynamic' else bounded_number(float, 0, above=True)(text)


def colour(text: str) -> str:
    """An argparse type: a colour, without blanks; '' for none."""
    text = text.replace(' ', '').lower()
    try:
        parse_colour(text or 'white')
        return text
    except ValueError:
        raise argparse.ArgumentTypeError('%r is no colour; write white, black or R,G,B, as in 255,255,255' % text)


whole, positive = bounded_number(int, 0), bounded_number(int, 1)
rate, share = bounded_number(float, 0), bounded_number(float, 0, 1)
below_one = bounded_number(float, 0, 0.999)

UNLABELLED = 'weights without metadata'
TRAINED = dict(help='checkpoint, https URL, or a folder: its best checkpoint', shown='required')
SIZE = dict(help='image width and height in pixels', shown='the checkpoint\'s, else 224')
IN_RUN, LAUNCHED = {PREDICT: dict(group='run')}, {PREDICT: dict(group='distributed')}


def described(**changes: Any) -> Dict[str, Any]:
    """The programs that take a flag for weights without metadata, and its differences there."""
    return {PREDICT: dict(changes, group=UNLABELLED), EXPORT: dict(changes, group='source')}


DEEPSPEED = {'amp': True, 'opt_level': 'O2', 'loss_scale': 'dynamic'}  # what --enable_deepspeed stands for

# The linear probe has the flags of a training with these defaults, but not the flags that are fixed.
PROBE_DEFAULTS = dict(epochs=50, warmup_epochs=0, lr=4e-3, min_lr=0., weight_decay=1e-4, aa='none', color_jitter=0.,
                      smoothing=0., reprob=0.)
PROBE_FIXED = ('eval', 'check_data', 'prof', 'cann_prof', 'report', 'results_file', 'class_names', 'real_labels',
               'best_by', 'calibrate', 'in_chans', 'robust_test', 'test_flip', 'model_ema', 'model_ema_decay',
               'model_ema_force_cpu', 'model_ema_warmup', 'disable_eval_during_finetuning', 'layer_decay', 'drop',
               'drop_path', 'attn_drop_rate', 'skip_dropped', 'grad_checkpointing', 'rel_pos_bias', 'abs_pos_emb',
               'qkv_bias', 'use_mean_pooling', 'layer_scale_init_value', 'init_scale', 'freeze_backbone',
               'unfreeze_epoch', 'disable_weight_decay_on_rel_pos_bias')

GROUPS = {  # in the order of --help
    TRAINING: ('run', 'model', 'optimizer', 'augmentation', 'fine-tuning', 'data', 'output', 'precision',
               'distributed'),
    PREDICT: ('input', 'results', 'run', UNLABELLED, 'distributed'),
    EXPORT: ('source', 'export'),
    AVERAGE: ('flags',)}
GROUPS[PROBE] = ('probe',) + GROUPS[TRAINING]

FLAGS: Dict[Tuple[str, str], Tuple[Flag, ...]] = {  # by program and group; --help has each group in this order
    (TRAINING, 'run'): (
        Neutral('batch_size', 64, 'images per device and forward pass', type=positive, synonyms='bs b', also={
            PREDICT: dict(group='run'),
            EXPORT: dict(group='export', default=None, help='the only batch size of onnx, om, torch_export',
                         shown='any; om: 1')}),
        Flag('epochs', 30, 'passes over the training images', type=bounded_number(int, 1, 10 ** 6)),
        Neutral('update_freq', 1, 'batches whose gradients are accumulated for one update', type=positive,
                synonyms='accum_iter grad_accum_steps gradient_accumulation_steps'),
        Neutral('save_ckpt_freq', 5, 'save a checkpoint every N epochs, and after the last', type=positive),
        Neutral('save_ckpt_steps', 0, 'save within an epoch every N updates; 0: never', type=whole),
        Neutral('save_ckpt_minutes', 0., 'save within an epoch every N minutes; 0: never', type=rate),
        Neutral('keep_checkpoints', 0, 'keep the newest N of each kind; 0: all of whole epochs, 2 within epochs',
                type=whole),
        Neutral('deterministic', False, 'compute bit-identical results on the same machine'),
        Flag('on_nonfinite', 'stop', 'if a loss or gradient is infinite or NaN: stop, or skip the update',
             choices=('stop', 'skip')),
        Flag('seed', 0, 'random seed', type=bounded_number(int, 0, 2 ** 62), follows_checkpoint=True),
        Neutral('num_workers', default_num_workers(), 'loader processes per device; 0: none',
                shown='one per processor, at most 10', type=bounded_number(int, 0, 1024),
                also={PREDICT: dict(group='run', default=None, help='loader processes per device',
                                    shown='one per core, up to 8; 0 for one batch')}),
        Neutral('pin_mem', True, 'page-locked host memory for batches (npu, cuda)', also=IN_RUN),
        Flag('max_train_samples', 0, 'train on a fixed subset of N images; 0: all', type=whole),
        Flag('val_interval', 1, 'evaluate every N epochs, and after the last', type=positive),
        Neutral('early_stop', 0, 'stop after N evaluations without a new best; 0: never', type=whole),
        Neutral('best_by', None, 'best checkpoint by ' + ', '.join(BEST_BY), shown='acc1, or mAP', choices=BEST_BY,
                metavar='FIGURE'),
        Neutral('start_epoch', 0, 'first epoch, counted from 0, if no checkpoint is resumed', type=whole),
        Neutral('device', 'auto', 'npu, cuda, cpu, cuda:1 …; auto: the first of npu, cuda, cpu', synonyms='gpu',
                also=IN_RUN),
        Flag('jit_compile', 'auto', 'npu: compile operators: on, off, auto (on for 910A, off for 910B)',
             choices=('auto', 'on', 'off')),
        Neutral('maxstep', 0, 'stop after N updates; 0: no limit', type=whole),
        Neutral('prof', False, 'profile 5 updates, write a Chrome trace to output_dir/prof, and exit'),
        Neutral('cann_prof', False, 'the same with torch_npu\'s profiler'),
    ),
    (TRAINING, 'output'): (
        Neutral('output_dir', '', 'folder for checkpoints, log.txt and reports', shown='empty: write none',
                synonyms='output', also={PROBE: dict(group='output', shown='required')}),
        Flag('config', None, 'read flags from a file, such as args.yaml; the command line wins', metavar='FILE'),
        Neutral('recipe', '', 'published hyper-parameters of recipes/; auto: by model and weights', metavar='NAME'),
        Neutral('curves', True, 'draw output_dir/curves.png, at most every 20 s'),
        Neutral('report', False, 'write output_dir/report.html: curves, classes, confusions, images'),
        Neutral('log_dir', None, 'TensorBoard folder'),
        Neutral('resume', '', 'checkpoint, or a folder: its newest one; with --eval its best one',
                synonyms='checkpoint',
                also={PREDICT: dict(TRAINED, group='input'), EXPORT: dict(TRAINED, group='source')}),
        Neutral('auto_resume', False, 'resume the newest checkpoint of output_dir, if it holds one'),
        Neutral('save_ckpt', True, 'write checkpoints'),
        Neutral('eval', False, 'evaluate --resume without training', synonyms='evaluate eval_only test_only'),
        Flag('test_flip', False, 'evaluate the mean logits of each image and its mirror image', follows_checkpoint=True,
             names_difference=False),
        Neutral('results_file', '', 'with --eval: write the results to this .csv or .json file'),
        Neutral('class_names', '', 'with --eval: class names, for weights without them',
                also=described(help='class names, one per line or JSON')),
        Neutral('topk', [1, 5], 'report the top-K accuracy for each of these K', shown='1 5', type=positive, nargs='+'),
        Neutral('calibrate', False, 'with --eval: fit a temperature, and write it into the checkpoint'),
        Neutral('real_labels', '', 'with --eval: JSON file of ImageNet\'s reassessed labels'),
        Neutral('dist_eval', False, 'split the evaluation among the processes, each image once'),
        Neutral('robust_test', None, 'with --eval: evaluate on the 200 classes of imagenet_r or imagenet_a',
                choices=('imagenet_r', 'imagenet_a'), metavar='SET'),
    ),
    (PROBE, 'probe'): (
        Neutral('knn', 0, 'also classify by the N nearest training images; 0: off', type=whole),
    ),
    (AVERAGE, 'flags'): (
        Flag('inputs', [], 'checkpoints, or folders with checkpoints of whole epochs', shown='required', nargs='+'),
        Flag('output', '', 'the file to write', shown='required'),
        Flag('best', 0, 'average only the N best by the log.txt beside them', shown='all', type=positive),
    ),
    (PREDICT, 'input'): (
        Flag('input', [], 'images, folders and patterns, the same as without a flag', nargs='+', action='append'),
        Flag('use_ema', False, 'use the averaged weights of --model_ema', also={
            EXPORT: dict(group='source', off=''),
            AVERAGE: dict(group='flags', off='', help='average the averaged weights of --model_ema')}),
    ),
    (PREDICT, 'results'): (
        Flag('top_k', 5, 'classes per image, most probable first', type=positive),
        Flag('output', '', 'file to write; - is standard output'),
        Flag('format', None, 'format of --output: csv, json, jsonl', shown='by the ending; jsonl for -',
             choices=PREDICTION_FORMATS),
        Flag('threshold', 0., 'mark images whose best probability is lower as unsure; 0: none', type=share),
        Flag('features', '', 'write the features of the images to this .npz file'),
        Flag('layer', None, 'features of block N, from 1: its class token and mean', shown='the head\'s input',
             type=positive),
        Flag('attention', None, 'write attention heat maps: cls, mean; without a value as it pools', metavar='cls|mean',
             choices=('auto',) + ATTENTION_KINDS),
        Flag('attention_block', None, 'transformer block of the heat maps, counted from 1', shown='the last',
             type=positive),
        Flag('attention_heads', False, 'write a heat map per head as well'),
        Flag('attention_dir', '', 'folder of the heat maps', shown='attention, beside --output'),
    ),
    (EXPORT, 'export'): (
        Flag('format', '', ', '.join(EXPORT_FORMATS), shown='required'),
        Flag('output', '', 'file to write; for huggingface a folder', shown='beside the checkpoint'),
        Flag('overwrite', False, 'replace an existing file or folder', off='', also={AVERAGE: dict(group='flags')}),
        Flag('opset', None, 'opset of onnx and om', shown='%d, or the newest that works; om: 11' % NEWEST_OPSET,
             type=bounded_number(int, 11, 99)),
        Flag('soc_version', '', 'om: the Ascend processor, such as Ascend910B4', shown='required'),
        Flag('no_check', False, 'skip the comparison with the checkpoint', off=''),
    ),
    (TRAINING, 'model'): (
        Flag('model', 'beit_base_patch16_224', 'model name; --help lists them', synonyms='arch',
             also={**described(default=None, shown='the checkpoint\'s'),
                   PROBE: dict(group='model', shown='the checkpoint\'s')}),
        Flag('rel_pos_bias', True, 'relative position bias in every block', off='disable_rel_pos_bias'),
        Flag('abs_pos_emb', False, 'learned absolute position embedding'),
        Flag('qkv_bias', True, 'a bias on queries and values', off='disable_qkv_bias'),
        Flag('attention', 'auto', 'fused, plain, auto (fused if it agrees; on cpu to evaluate)',
             choices=('auto', 'fused', 'plain')),
        Flag('layer_scale_init_value', 0.1, 'layer scale: 0.1 for base, 1e-5 for large, 0 for none', type=rate),
        Flag('input_size', 224, 'image width and height in pixels, a multiple of the patch size',
             type=bounded_number(int, 1, MAX_INPUT_SIZE), synonyms='img_size',
             also={**described(default=None, **SIZE), PROBE: dict(SIZE, group='model')}),
        Flag('in_chans', 3, 'channels of an image: 1 (grey), 3 (RGB), 4 (RGBA)',
             type=int, choices=(1, 3, 4)),  # type: ignore[arg-type]
        Flag('drop', 0., 'dropout probability', type=below_one),
        Flag('attn_drop_rate', 0., 'dropout probability of attention weights', type=below_one),
        Flag('drop_path', 0.1, 'stochastic depth of the last block, rising from 0', type=below_one,
             aliases=('drop_decay',)),
        Flag('skip_dropped', 'auto', 'skip dropped paths: on, off; auto: on a CPU without --compile',
             choices=('auto', 'on', 'off')),
        Flag('grad_checkpointing', False, 'recompute activations in the backward pass: less memory, slower',
             synonyms='gradient_checkpointing'),
        Flag('compile', False, 'use torch.compile; the first steps take minutes', synonyms='torchcompile'),
        Flag('compile_backend', 'inductor', 'of --compile; on an NPU also torchair, npugraph_ex'),
        Flag('model_ema', False, 'keep and evaluate a moving average of the weights', follows_checkpoint=True),
        Flag('model_ema_decay', 0.9999, 'decay of the average per update', type=share),
        Flag('model_ema_warmup', False, 'start the average with a lower decay'),
        Neutral('model_ema_force_cpu', False, 'keep the average in host memory'),
        Flag('disable_eval_during_finetuning', False, 'skip the evaluations during training'),
    ),
    (TRAINING, 'optimizer'): (
        Flag('opt', 'adamw', 'optimizer: one that --help lists, or any of timm, such as lion'),
        Flag('opt_eps', 1e-8, 'epsilon of the optimizer', shown='1e-8', type=bounded_number(float, 0, above=True)),
        Flag('opt_betas', None, 'betas of the optimizer', shown='the optimizer\'s defaults', type=below_one, nargs='+'),
        Flag('clip_grad', None, 'clip the norm of all gradients to this value', shown='no clipping', type=rate,
             synonyms='max_grad_norm'),
        Flag('momentum', 0.9, 'momentum of SGD and RMSprop', type=below_one),
        Flag('weight_decay', 0.05, 'weight decay', type=rate, synonyms='wd'),
        Flag('weight_decay_end', None, 'final weight decay of a cosine schedule', shown='--weight_decay', type=rate),
        Flag('lr', 5e-4, 'learning rate of the last layers, not scaled by the batch size', shown='5e-4',
             type=bounded_number(float, 0, above=True), synonyms='learning_rate base_lr'),
        Neutral('blr', 0., 'learning rate per 256 images of an update, instead of --lr; 0: use --lr', type=rate),
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
        Flag('aa', 'rand-m9-mstd0.5-inc1', 'RandAugment, AutoAugment or AugMix policy, or none'),
        Flag('hflip', 0.5, 'probability of a horizontal flip', type=share),
        Flag('loss', 'auto', 'ce, bce (binary, per class), auto (bce for several labels per image)',
             choices=names_in('beit/training/losses.py', 'LOSSES')),
        Flag('class_weights', '', 'balanced (rare classes weigh more), or a CSV or JSON file', shown='all equal'),
        Flag('smoothing', 0.1, 'label smoothing', type=below_one, synonyms='label_smoothing'),
        Flag('train_interpolation', 'bicubic', 'interpolation of random crops: random, bilinear, bicubic, lanczos',
             choices=names_in('beit/data/transforms.py', 'INTERPOLATIONS')),
        Flag('crop_pct', None, 'center crop, relative to the resized image', shown='224/256; 1.0 from 384 pixels',
             type=bounded_number(float, 0, 1, above=True),
             also={PREDICT: dict(group=UNLABELLED, shown='the checkpoint\'s')}),
        Flag('eval_fit', 'crop', 'evaluation: crop, squash to the square, letterbox (pad with the mean)',
             choices=tuple(EVAL_FITS), metavar='FIT'),
        Flag('reprob', 0.25, 'probability of random erasing', type=share),
        Flag('remode', 'pixel', 'fill of random erasing: const, rand, pixel', choices=('const', 'rand', 'pixel')),
        Flag('recount', 1, 'number of areas to erase', type=positive),
        Flag('resplit', False, 'not supported; the program refuses it'),
        Flag('mixup', 0., 'mixup alpha; 0: off', type=rate),
        Flag('cutmix', 0., 'cutmix alpha; 0: off', type=rate),
        Flag('cutmix_minmax', None, 'minimum and maximum area of cutmix, instead of its alpha', type=share, nargs=2),
        Flag('mixup_prob', 1., 'probability of mixing a batch', type=share),
        Flag('mixup_switch_prob', 0.5, 'probability of cutmix instead of mixup, if both are on', type=share),
        Flag('mixup_off_epoch', 0, 'mix no more from epoch N, counted from 0; 0: mix in all', type=whole),
        Flag('mixup_mode', 'batch', 'unit of one mixing ratio: batch, pair, elem', choices=('batch', 'pair', 'elem')),
    ),
    (TRAINING, 'fine-tuning'): (
        Neutral('finetune', '', 'weights: file, folder, URL, name, hf-hub:NAME', shown='empty: from scratch',
                synonyms='pretrained initial_checkpoint', also={PROBE: dict(group='fine-tuning', shown='required')}),
        Neutral('model_key', 'model|module', 'keys of the weights in the file; the first one found counts'),
        Neutral('model_prefix', '', 'prefix of the parameter names in the file', aliases=('model_filter_name',)),
        Neutral('init_scale', 0.001, 'factor on the initial weights of the head', type=rate),
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
        Flag('opt_level', 'O2', 'O0 float32, O1 autocast, O2 half-precision weights', choices=OPT_LEVELS,
             metavar='O0|O1|O2', follows_checkpoint=True, also={PREDICT: dict(group='run', aliases=('opt-level',))}),
        Neutral('enable_deepspeed', False, 'the reference\'s flag for --amp --opt_level O2 --loss_scale dynamic'),
        Flag('amp_dtype', None, 'float16, bfloat16', shown='float16; bfloat16 on a CPU', choices=AMP_DTYPES,
             follows_checkpoint=True, also=IN_RUN),
        Flag('loss_scale', None, 'loss scale: a number, or dynamic', shown='128 for float16, else 1', type=loss_scale),
    ),
    (TRAINING, 'data'): (
        Neutral('data_path', '', 'folder, .zip or .tar with train/ and val/; demo: digits',
                synonyms='data data_dir root'),
        Neutral('eval_data_path', None, 'class folders to evaluate on, not data_path/val; with --eval several',
                action=OneOrMore, nargs='+'),
        Neutral('train_csv', '', 'CSV file of training images: path,label or path,label;label'),
        Neutral('val_csv', '', 'CSV file of validation images'),
        Flag('val_split', 0., 'fraction of each class to hold out for evaluation, without a val/',
             type=bounded_number(float, 0, 0.9), follows_checkpoint=True),
        Flag('class_depth', 1, 'class folders are N folders deep; at 2 a class is called dog/husky', type=positive,
             follows_checkpoint=True),
        Neutral('nb_classes', 0, 'expected number of classes; 0: as many as the data has', type=whole),
        Flag('image_folder_class_index_file', '', 'file of class folders in the outputs\' order'),
        Flag('imagenet_default_mean_and_std', False, 'normalise with ImageNet\'s mean and std instead of 0.5'),
        Flag('data_set', 'IMNET', 'IMNET (train/, val/), image_folder (class folders), CIFAR (100)',
             follows_checkpoint=True, names_difference=False),
        Flag('data_backend', 'exact', 'exact (Pillow), fast (torchvision; pixels differ slightly)', choices=BACKENDS,
             also=IN_RUN),
        Flag('eval_data_backend', 'exact', 'the same for evaluation: exact, fast', choices=BACKENDS,
             follows_checkpoint=True),
        Flag('bad_images', 'error', 'unreadable images: error (stop), skip (leave out and list)',
             choices=('error', 'skip'), also={PREDICT: dict(group='input')}),
        Neutral('max_bad_images', 0.001, 'with skip: stop at this fraction of unreadable images', type=share),
        Neutral('max_pixels', 0, 'most pixels of an image; 0: Pillow\'s limit, 179 million', type=whole,
                aliases=('max_image_pixels',), also={PREDICT: dict(group='input')}),
        Flag('exif', 'ignore', 'the rotation that a camera noted: ignore, follow', choices=('ignore', 'follow')),
        Flag('background', '', 'lay transparent images on white, black or R,G,B', shown='none: alpha is dropped',
             type=colour, metavar='COLOUR'),
        Neutral('check_data', False, 'decode every image, list the unreadable ones, and exit'),
    ),
    (TRAINING, 'distributed'): (
        Neutral('world_size', 1, 'set by the launcher', type=positive),
        Neutral('local_rank', -1, 'set by the launcher', type=bounded_number(int, -1), also=LAUNCHED),
        Neutral('dist_on_itp', False, 'read the ranks from Open MPI\'s environment', also=LAUNCHED),
        Neutral('dist_timeout', 600., 'end the job if a process blocks the others for N seconds',
                type=bounded_number(float, 1, 10 ** 6), also=LAUNCHED),
        Neutral('dist_url', 'env://', 'rendezvous address', also=LAUNCHED),
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
            elif (home, program) == (TRAINING, PROBE) and flag.name not in PROBE_FIXED:
                yield group, dataclasses.replace(flag, default=PROBE_DEFAULTS[flag.name], shown=None) \
                    if flag.name in PROBE_DEFAULTS else flag


def without_effect() -> FrozenSet[str]:
    """The names of the flags of trainings that do not affect the results."""
    return frozenset(flag.name for program in (TRAINING, PROBE) for _, flag in flags_of(program)
                     if not flag.affects_results)


class AnyPlaceParser(OneLineParser):
    """The parser of run_predict.py: images among the flags, and --attention with or without a value."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument('images', nargs='*', default=[],
                          help='files, folders (with all that is in them), quoted patterns (none)')

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for index, arg in enumerate(args):
            if arg == '--attention' and args[index + 1:index + 2] not in ([kind] for kind in ATTENTION_KINDS):
                args[index] = '--attention=auto'
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Tuple[Any, List[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        if rest and not any(flag.startswith('-') for flag in rest):  # argparse takes only the first group of images
            parsed.images, rest = parsed.images + rest, []
        return parsed, rest


USAGES = {  # of each program: how it is called, and the end of its --help
    TRAINING: ('--data_path DIR [flags]', """examples:
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

optimizers beside timm.optim.list_optimizers(), with an optional prefix lookahead_:
%s
""" % tuple(textwrap.fill(', '.join(names), 100, initial_indent='  ', subsequent_indent='  ')
            for names in (MODELS, OPTIMIZERS))),
    PREDICT: ('--resume PATH IMAGES [flags]', """examples:
  python run_predict.py --resume train_result photo.jpg holiday/
  python run_predict.py --resume train_result --input 'photos/*.jpg' --top_k 3 --output results.csv
  python run_predict.py --resume train_result photos --bad_images skip --output - | jq .predictions[0].class
  python run_predict.py --resume train_result photos --attention --attention_dir looks
  python run_predict.py --resume train_result photos --features features.npz --layer 9
  torchrun --nproc_per_node=8 run_predict.py --resume train_result photos --output results.jsonl
"""),
    EXPORT: ('--resume PATH --format FORMAT [flags]', """examples:
  the best checkpoint of a run, for onnxruntime, beside it:
    python run_export.py --resume out --format onnx
  for an Ascend processor, by CANN's atc where it is installed:
    python run_export.py --resume out --format om --soc_version Ascend910B4 --batch_size 8
  its averaged weights, for timm.create_model(…, checkpoint_path=FILE), which is printed:
    python run_export.py --resume out/checkpoint-29.pth --use_ema --format safetensors --output beit.safetensors
  a folder for transformers' from_pretrained:
    python run_export.py --resume out --format huggingface --output my_model
  weights of timm or Hugging Face, which do not name their model:
    python run_export.py --resume model.safetensors --model beit_base_patch16_224 --format onnx
"""),
    AVERAGE: ('--inputs PATHS --output FILE [flags]', """examples:
  python average_checkpoints.py --inputs out/checkpoint-8.pth out/checkpoint-9.pth --output avg.pth
  python average_checkpoints.py --inputs out --best 5 --output avg.pth
  python run_class_finetuning.py --eval --resume avg.pth --data_path /data/ImageNet2012
"""),
    PROBE: ('--finetune WEIGHTS --data_path DIR --output_dir DIR [flags]', """examples:
  python run_linear_eval.py --finetune beit_base_patch16_224_pt22k --data_path DIR --output_dir probe --amp
  python run_linear_eval.py --recipe beit_base_linear_probe --data_path DIR --output_dir probe --knn 20
  torchrun --nproc_per_node=8 run_linear_eval.py --finetune out/checkpoint-best.pth --data_path DIR --output_dir probe
"""),
}


def build_parser(program: str = TRAINING, description: Optional[str] = None) -> OneLineParser:
    """The parser of a program. `description` is the beginning of --help."""
    usage, examples = USAGES[program]
    kind = AnyPlaceParser if program == PREDICT else OneLineParser
    parser = kind(program, usage, description=description, epilog=examples)
    groups = {title: parser.add_argument_group(title) for title in GROUPS[program]}
    if program == PROBE:
        parser.set_defaults(**dict({flag.name: flag.default for _, flag in flags_of(TRAINING)}, freeze_backbone=True,
                                   layer_decay=1.))
    for group, flag in flags_of(program):
        flag.add_to(groups[group])
        parser.synonyms.update((name, flag.name) for name in flag.synonyms.split())
    return parser


Config = TypeVar('Config')


def config_from(args: argparse.Namespace, kind: Callable[..., Config], **given: Any) -> Config:
    """A dataclass of `config` with the values of the flags that its fields are named after; `given` wins."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**dict({field.name: getattr(args, field.name) for field in fields if hasattr(args, field.name)},
                       **given))


def evaluation_sets(args: argparse.Namespace) -> List[Optional[str]]:
    """The values of --eval_data_path; [None] without any."""
    return args.eval_data_path if isinstance(args.eval_data_path, list) else [args.eval_data_path]


def evaluates_checkpoint(args: argparse.Namespace) -> bool:
    """Whether the checkpoint overrides the defaults of the flags."""
    return bool(args.eval and (args.resume or args.finetune))


def follow_checkpoint(args: argparse.Namespace, saved: Mapping[str, Any], source: str) -> List[str]:
    """Take the flags that were not given from a checkpoint; return a text for each given flag that differs.

    `saved` are its flags, from an untrusted file. Raises `UserError` for a value that a flag cannot have.
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
