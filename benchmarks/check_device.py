#!/usr/bin/env python3
"""Check in about five minutes that this program computes correctly on a device, and measure its speed there.

    bash test/check_device.sh --device=npu                 on the NPU; or cuda, or cpu
    python benchmarks/check_device.py --sections trajectory numerics

Each row is PASS, FAIL or not available. The last lines are a table; device_report.json and device_report.html in
--output_dir have the same rows. The exit status is 1 if a row is FAIL. docs/ascend.md explains the rows.
"""

import contextlib
import copy
import datetime
import functools
import glob
import html
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

BENCHMARKS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BENCHMARKS)
sys.path[:0] = [ROOT, BENCHMARKS, os.path.join(ROOT, 'tests')]

from beit.config import parse_device
from beit.errors import UserError, escape_text, one_line
from beit.parser import OneLineParser

BASE, NANO = 'beit_base_patch16_224', 'beit_nano_patch8_32'
SECTIONS = ('environment', 'numerics', 'attention', 'trajectory', 'half', 'overflow', 'optimizer', 'devices',
            'checkpoint', 'compile', 'step', 'loader', 'files')

# By device type: the sizes of the measurements. A CPU, also one that emulates an NPU, gets smaller ones.
SIZES = {
    'accelerator': dict(base_blocks=12, base_images=4, step_model=BASE, step_images=64, step_seconds=2., step_pairs=3,
                        loader_images=256, loader_batch=32, compiled_blocks=4, file_model=BASE),
    'cpu': dict(base_blocks=3, base_images=1, step_model=BASE, step_images=2, step_seconds=0., step_pairs=1,
                loader_images=48, loader_batch=16, compiled_blocks=1, file_model=BASE),
    'tiny': dict(base_blocks=1, base_images=1, step_model=NANO, step_images=2, step_seconds=0., step_pairs=1,
                 loader_images=8, loader_batch=4, compiled_blocks=1, file_model=NANO)}


# ---- flags

def build_parser():
    parser = OneLineParser('check_device.py', '[flags]', description=__doc__)
    parser.add_argument('--device', default='auto', help='auto, npu, cuda, cpu or one with an index (auto)')
    parser.add_argument('--output_dir', default='.', help='folder of device_report.json and .html (this folder)')
    parser.add_argument('--sections', default=SECTIONS, nargs='+', choices=SECTIONS, metavar='SECTION',
                        help='some of: %s (all)' % ' '.join(SECTIONS))
    parser.add_argument('--size', default='', choices=sorted(SIZES),
                        help='sizes of the measurements (by device)')
    return parser


def fail(error):
    print('check_device.py: error: %s' % one_line(error), file=sys.stderr, flush=True)
    return 2


def parse(argv):
    options = build_parser().parse_args(argv)
    options.argv = argv
    parse_device(options.device)
    try:
        os.makedirs(options.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output_dir):
            pass
    except OSError as error:
        raise UserError('--output_dir %s: cannot be written (%s); choose another folder'
                        % (escape_text(options.output_dir), error.strerror)) from None
    return options


if __name__ == '__main__':
    from beit import startup
    if sys.argv[1:2] not in (['_row'], ['_process']):  # before the import of PyTorch; `main` parses again
        flags_only = sys.argv[1:2] == ['_flags']  # for test/check_device.sh
        try:
            parse(sys.argv[1 + flags_only:])
        except UserError as error:
            sys.exit(fail(error))
        if flags_only:
            sys.exit(0)
    startup.prepare()

import torch
from torch.nn import functional as F

import benchmark
import contenders
import datasets
import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import run_class_finetuning as program
import trajectory
from beit.checkpoint import training_state
from beit.config import DistributedConfig
from beit.data import locations, transforms
from beit.devices import accelerator, half_precision, kernels
from beit.distributed import process_group, watchdog
from beit.files import atomic_write, weights_file
from beit.outputs.run_log import nonfinite_to_none, versions
from beit.training import fused_attention, loss_scaler
from trajectory import Batches

PASS, FAIL, NOT_AVAILABLE = 'PASS', 'FAIL', 'not available'
CPU = torch.device('cpu')
HALVES = ('float16', 'bfloat16')
DTYPES = ('float32',) + HALVES

# The largest distance from float64, relative to the norm: (logits, gradient of any weight). A CPU reaches in float32
# 5.6e-7 and 1.3e-6, in bfloat16 1.5e-2 and 7.3e-2; other devices add up in another order.
NUMERICS_LIMIT = {'float32': (2e-5, 5e-5), 'float16': (6e-3, 3e-2), 'bfloat16': (5e-2, 2e-1)}
ATTENTION_LIMIT = {dtype: fused_attention.TOLERANCE[getattr(torch, dtype)] for dtype in HALVES}
ATTENTION_LIMIT['float32'] = NUMERICS_LIMIT['float32'][0]
HALF_LOSS_LIMIT = 0.02  # of a loss in half precision, from the recorded one in float32
OPTIMIZER_LIMIT = 1e-4  # of the weights' way in ten updates
DEVICES_LIMIT = {'losses': 1e-5, 'weights': 2e-5, 'evaluation': 1e-6}  # several processes against one, absolute
TRAJECTORY_LIMIT = {'cpu': (1e-5, 1e-4), 'accelerator': (1e-4, 1e-3)}  # relative for losses, absolute for weights


class Unavailable(Exception):
    """Something that this device or installation lacks; the text is the reason."""


class Check:
    """The device, and what several sections use.

    Attributes:
        device (torch.device): None if it cannot be used; `problem` is then the reason.
    """

    def __init__(self, device_name, size='', folder='.'):
        self.device, self.problem, self.folder, self.name = None, '', folder, device_name
        try:
            self.device = accelerator.select_device(device_name)
        except UserError as error:
            self.problem = one_line(error)
        on_cpu = self.device is None or self.device.type == 'cpu' or self.is_emulated()
        self.size = size or ('cpu' if on_cpu else 'accelerator')
        self.sizes = SIZES[self.size]
        self.float64 = {}  # results of `network_results` in float64

    def half_problem(self, dtype):
        """None if the device computes in a dtype, else the reason."""
        return None if dtype == 'float32' else half_precision._half_precision_problem(
            self.device, getattr(torch, dtype))

    def half(self):
        """The name of a half precision that training has here; raises `Unavailable` without one."""
        for name in HALVES:
            with contextlib.suppress(UserError):
                half_precision.check_precision(self.device, True, 'O2', name)
                return name
        raise Unavailable('no half precision here')

    def is_emulated(self):
        return self.device is not None and 'emulated' in accelerator.device_name(self.device)


# ---- environment

def first_match(pattern, paths):
    """The first match of a pattern in the files of these glob patterns, or None."""
    for path in [found for each in paths for found in sorted(glob.glob(each))]:
        with contextlib.suppress(OSError), open(path, encoding='utf-8', errors='replace') as file:
            match = re.search(pattern, file.read())
            if match:
                return match.group(1)
    return None


def output_of(*command):
    """What a command prints, or None if it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=30,
                              universal_newlines=True).stdout.strip()
    return None


def package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'without a version' if importlib.util.find_spec(name) else None


def memory_gib(device):
    """The memory of the host and of the device, in GiB; None if unknown."""
    host = device_memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        host = round(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2 ** 30, 1)
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):
        properties = accelerator.device_module(device).get_device_properties(device.index or 0)
        device_memory = round(properties.total_memory / 2 ** 30, 1)
    return {'host': host, 'device': device_memory}


def describe_environment(check):
    """Versions, hardware and driver, without the machine's name."""
    cann = os.environ.get('ASCEND_HOME_PATH') or os.environ.get('ASCEND_TOOLKIT_HOME') or ''
    smi = output_of('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    device = check.device
    module = accelerator.device_module(device) if device is not None else None
    return {
        'device': accelerator.device_name(device) if device is not None else None,
        'device_type': device.type if device is not None else check.name.partition(':')[0],
        'devices': module.device_count() if module else 0,
        'driver': first_match(r'(?m)^Version=(\S+)', ['/usr/local/Ascend/driver/version.info'])
        or (smi.splitlines()[0] if smi else None),
        'cann': cann and first_match(r'(?im)^(?:Version|version)=\[?"?([\w.]+)', [
            os.path.join(cann, *parts) for parts in (
                ('*', 'ascend_toolkit_install.info'), ('version.cfg',), ('compiler', 'version.info'),
                ('runtime', 'version.info'))]) or None,
        'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version() if torch.version.cuda else None,
        # The report's comparisons turn it off; a user's run has it.
        'tf32_convolutions': getattr(torch.backends.cudnn, 'allow_tf32', None) if torch.version.cuda else None,
        'torch_npu': package_version('torch_npu'), 'apex': half_precision.find_apex()[1],
        'versions': versions(), 'cpu': benchmark.cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(), 'memory_gib': memory_gib(device),
        'saturates': half_precision.saturates(device) if device is not None else None}


def environment(check):
    found = describe_environment(check)
    kind = found['device_type']  # a PyTorch for CUDA may run on a CPU
    detail = '; '.join('%s %s' % (name, found[key] or 'unknown') for name, key, wanted in (
        ('driver', 'driver', kind != 'cpu'), ('CANN', 'cann', found['cann']), ('CUDA', 'cuda', kind == 'cuda'),
        ('torch_npu', 'torch_npu', found['torch_npu'])) if wanted) or 'no accelerator'
    detail += '; torch %s; apex: %s; %d cores; %s' % (
        found['versions']['torch'], found['apex'], found['cores'],
        ', '.join('%s %s GiB' % pair for pair in found['memory_gib'].items() if pair[1]))
    if check.problem:
        return FAIL, 'no device', check.problem
    if found['saturates']:
        detail += '; overflow saturates, as on a 910A'
    return PASS, found['device'], detail


# ---- numerics

def build_network(name, blocks=0):
    """A model with layer scale and a random bias table; a lost bias changes the logits."""
    torch.manual_seed(0)
    model = getattr(modeling_finetune, name)(
        num_classes=10, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1, init_scale=1.,
        **({'depth': blocks} if blocks else {}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith('bias_table'):
                parameter.normal_()
    return model


@contextlib.contextmanager
def without_tf32():
    """Convolutions on a GPU in float32, not in TF32, PyTorch's default for them."""
    before = getattr(torch.backends.cudnn, 'allow_tf32', None)
    try:
        if before:
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        if before:
            torch.backends.cudnn.allow_tf32 = before


def random_batch(model, images):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn((images, 3) + model.patch_embed.img_size, generator=generator),
            torch.randint(10, (images,), generator=generator))


def network_results(model, images, targets, dtype):
    """{name: float64 tensor on the CPU}: logits, and the gradient of each weight."""
    scale = 128. if dtype == torch.float16 else 1.
    wrapped = loss_scaler.HalfPrecision(model, dtype) if dtype in (torch.float16, torch.bfloat16) else model
    output = wrapped.train()(images.to(dtype) if dtype == torch.float64 else images)
    (F.cross_entropy(output, targets) * scale).backward()
    results = {name: parameter.grad.cpu().double() / scale for name, parameter in model.named_parameters()}
    return dict(results, logits=output.detach().cpu().double())


def distance(found, expected):
    """The norm of the difference, relative to the norm of `expected`; inf for a missing or non-finite tensor."""
    if found is None:
        return math.inf
    value = ((found - expected).norm() / expected.norm()).item()
    return value if math.isfinite(value) else math.inf


def apart(found, expected):
    """The largest distance of two {name: tensor}; inf if a number is not finite."""
    farthest = [(found[name].double() - value.double()).abs().max().item() for name, value in expected.items()]
    return max(value if math.isfinite(value) else math.inf for value in farthest)


def numerics(check, size, dtype):
    """Logits and every gradient against float64 on the CPU."""
    if check.half_problem(dtype):
        raise Unavailable(check.half_problem(dtype))
    name, blocks, count = (BASE, check.sizes['base_blocks'], check.sizes['base_images']) if size == 'base' \
        else (NANO, 0, 8)
    model = build_network(name, blocks)
    images, targets = random_batch(model, count)
    if name not in check.float64:
        check.float64[name] = network_results(copy.deepcopy(model).double(), images, targets, torch.float64)
    expected = check.float64[name]
    model.to(check.device)
    fused_attention.choose_attention(model, check.device, 'auto', getattr(torch, dtype), count)
    found = network_results(model, images.to(check.device), targets.to(check.device), getattr(torch, dtype))
    logits = distance(found['logits'], expected['logits'])
    gradient, worst = max((distance(found[each], expected[each]), each) for each in expected if each != 'logits')
    limits = NUMERICS_LIMIT[dtype]
    return (PASS if logits <= limits[0] and gradient <= limits[1] else FAIL,
            'logits %.1e (limit %.0e), gradients %.1e (%.0e), %d blocks' % (
                logits, limits[0], gradient, limits[1], len(model.blocks)),
            'farthest: %s; %s, %d images' % (worst, name, count))


# ---- attention

def attention_results(attend, block, inputs, weights, device, dtype):
    """{name: float64 tensor}: output of an attention, and the gradients of its inputs and of the bias table."""
    leaves = {name: value.clone().to(device).requires_grad_() for name, value in inputs.items()}
    bias = modeling_finetune.gather_bias(leaves['bias table'], block.relative_position_index.to(device))[None]
    output = attend(*[leaves[name].to(dtype) for name in ('query', 'key', 'value')], bias.to(dtype), block.scale)
    output = output if dtype == torch.float64 else output.float()
    (output * weights.to(device)).sum().backward()
    accelerator.synchronize(device)
    results = {'gradient of the ' + name: None if leaf.grad is None else leaf.grad.cpu().double()
               for name, leaf in leaves.items()}
    return dict(results, output=output.detach().cpu().double())


def attention_path(check, name):
    """Output and gradients of an attention with a bias, in base's shapes, against float64 on the CPU."""
    attend = modeling_finetune.plain_attention if name == 'plain' \
        else kernels.fused_attentions(check.device).get(name)
    if attend is None:
        raise Unavailable('this installation has no such kernel')
    block = build_network(BASE, 1).blocks[0].attn
    generator = torch.Generator().manual_seed(0)
    tokens, heads = len(block.relative_position_index), block.num_heads
    shape = (check.sizes['base_images'], heads, tokens, 64)
    inputs = {each: torch.randn(shape, generator=generator) for each in ('query', 'key', 'value')}
    inputs['bias table'] = torch.randn(block.relative_position_bias_table.shape, generator=generator)
    weights = torch.randn(shape, generator=generator)
    expected = attention_results(modeling_finetune.plain_attention, block,
                                 {each: value.double() for each, value in inputs.items()}, weights.double(), CPU,
                                 torch.float64)
    figures, wrong = [], []
    for dtype in DTYPES:
        if check.half_problem(dtype):
            continue
        try:
            found = attention_results(attend, block, inputs, weights, check.device, getattr(torch, dtype))
        except (RuntimeError, TypeError, ValueError) as error:  # the program then uses another kernel
            figures.append('%s: %s' % (dtype, accelerator.first_line(error)[:80]))
            continue
        farthest, worst = max((distance(found[each], expected[each]), each) for each in expected)
        limit = ATTENTION_LIMIT[dtype]
        figures.append('%s %.1e (%.0e)' % (dtype, farthest, limit))
        if farthest > limit:
            wrong.append('%s: the %s %s' % (dtype, worst, 'differs by %.2g %%' % (
                100 * farthest) if math.isfinite(farthest) else 'is missing or not finite'))
    if not any(':' not in figure for figure in figures):
        raise Unavailable('; '.join(figures))
    return FAIL if wrong else PASS, ', '.join(figures), '; '.join(wrong) or 'limits in brackets'


def attention_used(check):
    """Which attention --attention=auto chooses, and whether a block of base computes right with it."""
    model = build_network(BASE, 1)
    images, targets = random_batch(model, check.sizes['base_images'])
    expected = network_results(copy.deepcopy(model).double(), images, targets, torch.float64)
    said = fused_attention.choose_attention(model.to(check.device), check.device, 'auto', None, len(images))
    found = network_results(model, images.to(check.device), targets.to(check.device), torch.float32)
    farthest, limit = max(distance(found[name], expected[name]) for name in expected), NUMERICS_LIMIT['float32'][1]
    return (PASS if farthest <= limit else FAIL, '%s: %.1e (limit %.0e)' % (
        said.partition(',')[0].partition(';')[0], farthest, limit), said)


# ---- training

def golden(check):
    """The reference's recorded training in float32."""
    recorded = trajectory.load_trajectory()
    stats, losses, model = quiet(trajectory.trajectory_run, recorded, device=check.device)
    kind = 'cpu' if check.device.type == 'cpu' else 'accelerator'
    limits = TRAJECTORY_LIMIT[kind]
    expected = recorded['microbatch_losses'].tolist()
    farthest = max(abs(mine / theirs - 1) for mine, theirs in zip(losses, expected))
    figure = '%d losses, largest distance %.1e (limit %.0e)' % (len(losses), farthest, limits[0])
    try:
        trajectory.check_trajectory(recorded, stats, losses, model, *limits)
    except AssertionError as error:
        return FAIL, figure, one_line(error)[:300]
    return PASS, figure, 'limits: losses %.0e relative, weights %.0e' % limits


def quiet(function, *arguments, **named):
    """Call a function without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **named)


def library(check, dtype, by_apex):
    """A context in which apex.amp is used, or not; raises `Unavailable` without it."""
    if not by_apex:
        return mock.patch.object(half_precision, 'apex_amp', lambda device, dtype: None)
    if half_precision.apex_amp(check.device, getattr(torch, dtype)) is None:
        raise Unavailable('%s on %s: %s' % (dtype, check.device.type, half_precision.find_apex()[1]))
    return contextlib.nullcontext()


def optimizer_settings(check, by_apex):
    """The arguments of `create_optimizer` that the scripts' presets give on this device."""
    settings = dict(under_apex=by_apex)
    if check.device.type == 'npu':
        with contextlib.suppress(UserError):
            optim_factory.optimizer_class('npufusedadamw', by_apex)
            settings['opt'] = 'npufusedadamw'
    return settings


def half_training(check, level, dtype, by_apex=False):
    """The recorded training in half precision: its losses stay near the float32 losses."""
    with library(check, dtype, by_apex):
        try:
            half_precision.check_precision(check.device, True, level, dtype)
        except UserError as error:
            raise Unavailable(one_line(error)) from None
        recorded = trajectory.load_trajectory()
        stats, losses, _ = quiet(trajectory.trajectory_run, recorded, device=check.device,
                                 amp=dict(dtype=getattr(torch, dtype), opt_level=level),
                                 **optimizer_settings(check, by_apex))
    farthest = max(abs(mine / theirs - 1) if math.isfinite(mine) else math.inf
                   for mine, theirs in zip(losses, recorded['microbatch_losses'].tolist()))
    skipped = sum(epoch['skipped_steps'] for epoch in stats)
    return (PASS if farthest <= HALF_LOSS_LIMIT and not skipped else FAIL,
            '%d losses, largest distance %.1e (limit %.0e)' % (len(losses), farthest, HALF_LOSS_LIMIT),
            '%d updates skipped' % skipped)


OVERFLOWING = (2, 4)  # of six updates


def train_with_overflow(check, dtype, overflowing, batches, by_apex):
    """(updates skipped, weights) of a training in O2, in which gradients of some updates overflow."""
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3, init_scale=1.).to(check.device)
    optimizer = optim_factory.create_optimizer(model, lr=1e-3, **optimizer_settings(check, by_apex))
    calls, factor = [], 6e4 if dtype == 'float16' else math.inf

    def overflow(gradient):
        calls.append(1)
        return gradient * factor if len(calls) - 1 in overflowing else gradient

    model.head.register_forward_hook(
        lambda module, inputs, output: output.register_hook(overflow) and None if output.requires_grad else None)
    wrapped, scaler = loss_scaler.initialize_amp(model, optimizer, check.device, getattr(torch, dtype), 'O2', 1024.)
    stats = quiet(engine.train_one_epoch, wrapped, torch.nn.CrossEntropyLoss(), batches, optimizer, check.device, 0,
                  scaler)
    return stats['skipped_steps'], {name: value.detach().cpu().clone() for name, value in scaler.fp32_state_dict(
        wrapped).items()}


def overflow_is_skipped(check, by_apex=False):
    """Updates with an overflow are skipped and counted, and leave no trace in the weights."""
    dtype = check.half() if not by_apex else 'float16'
    with library(check, dtype, by_apex):
        generator = torch.Generator().manual_seed(0)
        batches = Batches((torch.randn(4, 3, 32, 32, generator=generator), torch.randint(3, (4,), generator=generator))
                          for _ in range(6))
        good = Batches(batch for place, batch in enumerate(batches) if place not in OVERFLOWING)
        skipped, weights = train_with_overflow(check, dtype, OVERFLOWING, batches, by_apex)
        _, expected = train_with_overflow(check, dtype, (), good, by_apex)
    farthest = apart(weights, expected)
    return (PASS if skipped == len(OVERFLOWING) and farthest <= 1e-3 else FAIL,
            '%d of %d skipped' % (skipped, len(OVERFLOWING)),
            'weights differ by %.1e from a training without these batches (limit 1e-3); O2 %s; %s' % (
                farthest, dtype, 'the device saturates: overflow is read from its flag'
                if half_precision.saturates(check.device) else 'the device has inf'))


def optimizer(check, name):
    """Ten updates of a fused optimizer against PyTorch's plain AdamW on the CPU."""
    model, settings = build_network(NANO), dict(lr=1e-3, weight_decay=0.05, opt_eps=1e-8, layer_decay=0.75)
    plain = copy.deepcopy(model)
    start = [parameter.detach().clone() for parameter in plain.parameters()]
    groups = optim_factory.get_parameter_groups(plain, 0.05, 0.75, optim_factory.weight_decay_skip_list(plain))
    expected = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
    model.to(check.device)
    try:
        found = optim_factory.create_optimizer(model, opt=name, under_apex=False, **settings)
    except UserError as error:
        raise Unavailable(one_line(error)) from None
    about = type(found).__module__ + ('' if not kernels.supports_grad_scale(found) else ', fused')
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for mine, theirs in zip(model.parameters(), plain.parameters()):
            gradient = torch.randn(theirs.shape, generator=generator)
            theirs.grad = gradient
            if mine.grad is None:  # NpuFusedAdamW keeps the first one's address
                mine.grad = torch.empty_like(mine)
            mine.grad.copy_(gradient)
        found.step()
        expected.step()
    farthest = max(distance(mine.detach().cpu() - before, theirs.detach() - before)
                   for mine, theirs, before in zip(model.parameters(), plain.parameters(), start))
    return (PASS if farthest <= OPTIMIZER_LIMIT else FAIL, 'largest distance %.1e (limit %.0e)' % (
        farthest, OPTIMIZER_LIMIT), about)


# ---- several devices

LEFTOVERS = (0, 1, 2, 5)  # images beyond equal shares


def process_main(order):
    """One of several processes: evaluates and trains; the first one prints the figures and writes the weights."""
    device = process_group.init_distributed_mode(DistributedConfig(device=order['device'], dist_timeout=250.))
    rank, processes = process_group.rank(), process_group.world_size()
    model = build_network(NANO).to(device)
    learner = optim_factory.create_optimizer(model, lr=1e-3)
    wrapped = accelerator.wrap_ddp(model, device) if processes > 1 else model
    images, targets = random_batch(model, order['images'])
    share = order['images'] // processes
    part = slice(rank * share, (rank + 1) * share)
    batch, losses, evaluations = Batches([(images[part], targets[part])]), [], []
    for leftover in LEFTOVERS:
        pairs = [(images[index % len(images)], int(targets[index % len(images)]))
                 for index in range(order['images'] + leftover)]
        sampler = datasets.OrderedDistributedSampler(len(pairs), rank, processes)
        loader = torch.utils.data.DataLoader(pairs, batch_size=6, sampler=sampler)
        stats = quiet(engine.evaluate, loader, model, device, sharded=True)
        evaluations.append([stats['images'], stats['acc1'], stats['loss']])
    for epoch in range(5):
        losses.append(quiet(engine.train_one_epoch, wrapped, torch.nn.CrossEntropyLoss(), batch, learner, device,
                            epoch)['loss'])
    if process_group.is_main_process():
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, order['path'])
        print(json.dumps(dict(losses=losses, evaluations=evaluations)), flush=True)
    watchdog.stop()
    process_group.shutdown()


def several_devices(check):
    """Training and evaluation on all devices, or on two processes of a CPU, against one."""
    count = 2 if check.device.type == 'cpu' else accelerator.device_module(check.device).device_count()
    if count < 2:
        raise Unavailable('there is one device')
    found, weights = [], []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, count):
            path = os.path.join(folder, '%d.pth' % processes)
            order = dict(device=check.device.type, images=4 * count, path=path)
            found.append(benchmark.run_processes(processes, order, 1 if check.device.type == 'cpu' else None,
                                                 __file__, 300))
            weights.append(weights_file.load_weights_file(path))
    one, several = found
    images = [row[0] for row in several['evaluations']]
    far = dict(losses=max(abs(mine - theirs) for mine, theirs in zip(several['losses'], one['losses'])),
               weights=apart(weights[1], weights[0]),
               evaluation=max(abs(mine[2] - theirs[2]) for mine, theirs in zip(several['evaluations'],
                                                                               one['evaluations'])))
    fine = all(far[name] <= limit for name, limit in DEVICES_LIMIT.items())
    return (PASS if fine and images == [4 * count + leftover for leftover in LEFTOVERS] else FAIL,
            '%d processes: ' % count + ', '.join('%s %.1e (%.0e)' % (name, value, DEVICES_LIMIT[name])
                                                 for name, value in far.items()),
            'limits in brackets; %s; images counted: %s' % (
                accelerator.PROCESS_GROUP_BACKEND[check.device.type], ', '.join(map(str, images))))


# ---- files

def checkpoint(check):
    """A checkpoint of the device is read on the CPU: the same bits, and the same logits."""
    model = build_network(NANO).to(check.device)
    learner = optim_factory.create_optimizer(model, lr=1e-3)
    images, targets = random_batch(model, 4)
    scaler = loss_scaler.LossScaler()
    quiet(engine.train_one_epoch, model, torch.nn.CrossEntropyLoss(), Batches([(images, targets)] * 2), learner,
          check.device, 0, scaler)
    content = training_state.build_checkpoint({}, training_state.RunState(), model, learner, scaler)
    with tempfile.TemporaryDirectory(dir=check.folder) as folder:
        path = os.path.join(folder, 'checkpoint.pth')
        weights_file.save(path, content)
        read = weights_file.load_weights_file(path)
    tensors = list(read['model'].values()) + [
        value for state in read['optimizer']['state'].values() for value in state.values() if torch.is_tensor(value)]
    same = all(torch.equal(read['model'][name], value.cpu()) for name, value in model.state_dict().items())
    on_cpu = build_network(NANO)
    on_cpu.load_state_dict(read['model'])
    with torch.no_grad():
        difference = distance(model.eval()(images.to(check.device)).cpu(), on_cpu.eval()(images))
    where = {value.device.type for value in tensors}
    return (PASS if same and where == {'cpu'} and difference <= NUMERICS_LIMIT['float32'][0] else FAIL,
            'logits %.1e (limit %.0e)' % (difference, NUMERICS_LIMIT['float32'][0]), '%d tensors on %s, weights %s' % (
                len(tensors), ', '.join(sorted(where)), 'equal' if same else 'differ'))


def file_times(check):
    """Seconds to save and to load a checkpoint with AdamW's state, through the disk of --output_dir."""
    model = build_network(check.sizes['file_model']).to(check.device)
    learner = optim_factory.create_optimizer(model, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.step()
    with tempfile.TemporaryDirectory(dir=check.folder) as folder:
        path = os.path.join(folder, 'checkpoint.pth')
        start = time.perf_counter()
        content = training_state.build_checkpoint({}, training_state.RunState(), model, learner,
                                                  loss_scaler.LossScaler())
        copied = time.perf_counter()
        weights_file.save(path, content)
        saved = time.perf_counter()
        weights_file.load_weights_file(path)
        loaded = time.perf_counter()
        size = os.path.getsize(path) / 2 ** 20
    return PASS, 'save %.2f s, load %.2f s' % (saved - start, loaded - saved), \
        '%s with AdamW, %.0f MiB; %.2f s of the save copy to the host' % (
            check.sizes['file_model'], size, copied - start)


# ---- compilation and speed

def compiled(check):
    """A compiled model computes what it computes without compilation."""
    try:
        kernels.check_compile(check.device)
    except UserError as error:
        raise Unavailable(one_line(error)) from None
    model = build_network(NANO, check.sizes['compiled_blocks'])
    images, targets = random_batch(model, 4)
    expected = network_results(copy.deepcopy(model).to(check.device), images.to(check.device),
                               targets.to(check.device), torch.float32)
    model.to(check.device)
    contenders.forget_compiled()
    kernels.compile_in_place(model)
    start = time.perf_counter()
    try:
        found = network_results(model, images.to(check.device), targets.to(check.device), torch.float32)
    except Exception as error:  # torch.compile can fail in any way
        if check.device.type == 'npu':  # its backend is another package
            raise Unavailable(one_line(error)[:150]) from None
        raise
    finally:
        contenders.forget_compiled()
    farthest, worst = max((distance(found[name], expected[name]), name) for name in expected)
    limit = NUMERICS_LIMIT['float32'][1]
    return (PASS if farthest <= limit else FAIL, 'largest distance %.1e (limit %.0e)' % (farthest, limit),
            'farthest: %s; %.0f s to compile' % (worst, time.perf_counter() - start))


def step_rate(check, precision):
    """Images per second of the training step, timm's beside it."""
    sizes, mode = check.sizes, contenders.Mode(precision)
    if check.device.type == 'cpu' and precision not in ('float32', 'bfloat16'):
        raise Unavailable('not measured on a CPU')
    if precision != 'float32':
        try:
            half_precision.check_precision(check.device, True, 'O2' if precision == 'O2' else 'O1',
                                           None if precision == 'O2' else precision)
        except UserError as error:
            raise Unavailable(one_line(error)) from None
    setting = contenders.Setting(sizes['step_model'], modeling_finetune.MODELS[sizes['step_model']]['img_size'],
                                 sizes['step_images'], check.name if check.name != 'auto' else check.device.type)
    flops = contenders.forward_flops(setting.architecture, setting.classes)
    options = types.SimpleNamespace(warmup=1 if check.device.type == 'cpu' else 5, seconds=sizes['step_seconds'],
                                    steps=1 if check.size != 'accelerator' else 0, pairs=sizes['step_pairs'],
                                    until=math.inf)
    with contextlib.redirect_stderr(io.StringIO()):
        row, = benchmark.measure_rows(('ours', mode), ('timm', mode), options, setting, check.device, ['train'], flops,
                                      contenders.peak_flops(accelerator.device_name(check.device)))
    ours, timms = row['ours'], row['other']
    if 'images_per_second' not in ours:
        return FAIL, 'no figure', ours.get('not_available', '')
    steps = options.pairs * row.get('steps_per_sample', 0)
    parts = ['%.2f images/s in %d step%s' % (ours['images_per_second']['median'], steps, 's' * (steps != 1))]
    parts += ['timm %.2f' % timms['images_per_second']['median']] if 'images_per_second' in timms else []
    details = ['timm: ' + timms['not_available']] if 'not_available' in timms else []
    if 'peak_fraction' in ours:
        parts.append('%.1f %% of peak' % (100 * ours['peak_fraction']))
    memory = ['%.0f MiB' % record['peak_memory_mib'] if record.get('peak_memory_mib') else 'unknown'
              for record in (ours, timms)]
    parts.append('memory %s, timm %s' % tuple(memory))
    details += ['%.2f TFLOP/s%s' % (ours['flops_per_second'] / 1e12,
                                    '' if 'peak_fraction' in ours else ', peak unknown'),
                '%s, batch %d' % (setting.model, setting.batch_size)]
    return PASS, ', '.join(parts), '; '.join(details)


def loader_rate(check, backend):
    """Images per second and worker of the loader, from JPEG files of ImageNet's sizes."""
    sizes = check.sizes
    options = types.SimpleNamespace(input_size=224, batch_size=sizes['loader_batch'], workers=1, warmup=1,
                                    images=sizes['loader_images'])
    with tempfile.TemporaryDirectory() as folder:
        batches = sum(benchmark.rounds(options)) + 3
        benchmark.make_photographs(folder, batches * options.batch_size, 8 if check.size == 'tiny' else 32)
        args = program.build_parser().parse_args([
            '--data_path=' + folder, '--input_size=224', '--batch_size=%d' % options.batch_size, '--num_workers=1',
            '--disable_eval_during_finetuning', '--data_backend=' + backend])
        locations.check_paths(args)
        try:
            transforms.check_backend(args)
        except UserError as error:
            raise Unavailable(one_line(error)) from None
        with contextlib.redirect_stdout(io.StringIO()):
            rate = benchmark.loader_rate(functools.partial(benchmark.our_batches, options, args, check.device),
                                         options, check.device)
    return PASS, '%.1f images/s per worker' % rate, '224 pixels, JPEG of about 500 x 375, 1 worker'


# ---- the report

def rows_of(check):
    """[(section, title, function, arguments)] in the order of the report; those by apex run in a separate process."""
    npu = check.device is not None and check.device.type == 'npu'
    paths = ['plain', 'scaled_dot_product_attention'] + ['npu_fusion_attention'] * npu
    table = [('environment', 'environment', environment, ())]
    table += [('numerics', '%s in %s' % (size, dtype), numerics, (size, dtype))
              for size in ('small', 'base') for dtype in DTYPES]
    table += [('attention', name, attention_path, (name,)) for name in paths]
    table += [('attention', 'used', attention_used, ()),
              ('trajectory', 'recorded training', golden, ())]
    table += [('half', '%s %s by %s' % (level, dtype, by), half_training, (level, dtype, by == 'apex'))
              for by, dtypes in (('PyTorch', HALVES), ('apex', ('float16',)))
              for dtype in dtypes for level in ('O1', 'O2')]
    table += [('overflow', 'overflow skipped by %s' % by, overflow_is_skipped, (by == 'apex',))
              for by in ('PyTorch', 'apex')]
    table += [('optimizer', name, optimizer, (name,)) for name in ('adamw', 'npufusedadamw', 'fusedadamw')]
    table += [('devices', 'all devices against one', several_devices, ()),
              ('checkpoint', 'read on the CPU', checkpoint, ()), ('compile', 'compiled', compiled, ())]
    table += [('step', precision, step_rate, (precision,)) for precision in contenders.PRECISIONS]
    table += [('loader', backend, loader_rate, (backend,)) for backend in contenders.flag_choices('data_backend')]
    return table + [('files', 'save and load', file_times, ())]


MEASUREMENTS = (step_rate, loader_rate, file_times)


def run_row(check, function, arguments):
    """(status, figure, detail) of a row; every failure becomes one line."""
    if check.device is None and function is not environment:
        return NOT_AVAILABLE, '', 'the device cannot be used'
    try:
        with contextlib.nullcontext() if function in MEASUREMENTS else without_tf32():
            return function(check, *arguments)
    except Unavailable as reason:
        return NOT_AVAILABLE, '', one_line(reason)
    except (Exception, SystemExit) as error:  # a device can fail in any way; the other rows still run
        return FAIL, '', '%s: %s' % (type(error).__name__, one_line(error)[:300])


def run_apart(check, function, arguments):
    """`run_row` in another process: apex changes functions of PyTorch for the rest of a process."""
    order = dict(device=check.name, size=check.size, folder=check.folder, function=function.__name__,
                 arguments=arguments)
    try:
        done = subprocess.run([sys.executable, os.path.abspath(__file__), '_row', json.dumps(order)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
    except subprocess.TimeoutExpired:
        return FAIL, '', 'its process did not end in 300 s'
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [''])[-1]
        return FAIL, '', 'its process ended with status %d: %s' % (done.returncode, said[:200])
    return tuple(json.loads(lines[-1]))


def row_main(order):
    check = Check(order['device'], order['size'], order['folder'])
    print(json.dumps(run_row(check, globals()[order['function']], order['arguments'])), flush=True)


def needs_process(check, arguments):
    """Whether a row uses an apex.amp that is installed."""
    return check.device is not None and arguments[-1:] == (True,) \
        and half_precision.apex_amp(check.device, torch.float16) is not None


def head(report):
    """The lines above the table."""
    found = report['environment']
    lines = ['Device report: %s, torch %s, %s cores' % (found['device'] or 'no device', found['versions']['torch'],
                                                        found['cores'])]
    if report['emulated']:
        lines.append('EMULATED: this NPU computes on the CPU. Speed and rounding say nothing about an NPU.')
    return lines


def tail(report):
    return '%d PASS, %d FAIL, %d not available, in %.0f s' % (
        report['passed'], report['failed'], report['not_available'], report['seconds'])


def page(report):
    """The report as HTML, without scripts or links."""
    def cells(row):
        return ''.join('<td%s>%s</td>' % (
            ' class="%s"' % row['status'].replace(' ', '-') if key == 'status' else '', html.escape(str(row[key])))
            for key in ('section', 'name', 'status', 'figure', 'detail', 'seconds'))

    return '\n'.join(
        ['<!DOCTYPE html>', '<html lang="en"><meta charset="utf-8"><title>Device report</title>',
         '<style>body{font:14px sans-serif;margin:2em}td,th{text-align:left;padding:3px 9px;vertical-align:top;'
         'border-bottom:1px solid #ddd}.PASS{color:#17692b}.FAIL{color:#b00020;font-weight:bold}'
         '.not-available{color:#666}</style>', '<h1>Device report</h1>']
        + ['<p>%s</p>' % html.escape(line) for line in head(report) + [report['date'], tail(report)]]
        + ['<table><tr><th>section<th>row<th>result<th>figure<th>detail<th>s</tr>']
        + ['<tr>%s</tr>' % cells(row) for row in report['rows']] + ['</table>', '<h2>Environment</h2>', '<pre>%s</pre>'
           % html.escape(json.dumps(report['environment'], indent=1)), '</html>', ''])


def write_report(report, folder):
    report['seconds'] = round(sum(row['seconds'] for row in report['rows']), 1)
    for key, status in (('passed', PASS), ('failed', FAIL), ('not_available', NOT_AVAILABLE)):
        report[key] = sum(row['status'] == status for row in report['rows'])
    for name, content in (('device_report.json', json.dumps(nonfinite_to_none(report), indent=1) + '\n'),
                          ('device_report.html', page(report))):
        atomic_write.write_bytes(os.path.join(folder, name), content.encode())


def shorten(text, length=90):
    return text if len(text) <= length else text[:length - 1] + '…'


def print_report(report):
    print('\n'.join(head(report)))
    print(benchmark.table(['section', 'row', 'result', 'figure', 's'], [
        [row['section'], row['name'], row['status'], shorten(row['figure'] or row['detail']), '%.1f' % row['seconds']]
        for row in report['rows']]))
    for row in report['rows']:
        if row['status'] == FAIL:
            print('FAIL %s, %s: %s' % (row['section'], row['name'], row['detail']))
    print(tail(report), flush=True)


def check_device(options):
    """Run the chosen sections; returns the report."""
    check = Check(options.device, options.size, options.output_dir)
    report = dict(
        format=1, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        command=['benchmarks/check_device.py'] + options.argv, emulated=check.is_emulated(),
        environment=describe_environment(check), sizes=dict(check.sizes, name=check.size), rows=[])
    for section, name, function, arguments in rows_of(check):
        if section not in options.sections:
            continue
        start = time.perf_counter()
        run = run_apart if needs_process(check, arguments) else run_row
        status, figure, detail = run(check, function, arguments)
        row = dict(section=section, name=name, status=status, figure=figure, detail=detail,
                   seconds=round(time.perf_counter() - start, 2))
        report['rows'].append(row)
        write_report(report, options.output_dir)  # an interrupted run leaves its rows
        print('%-13s %s, %s%s' % (status, section, name, ': ' + figure if figure else ''), file=sys.stderr, flush=True)
    return report


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    internal = {'_row': row_main, '_process': process_main}.get(argv[0] if argv else '')
    try:
        if internal:
            with without_tf32():
                internal(json.loads(argv[1]))
            return 0
        options = parse(argv)
        report = check_device(options)
        print_report(report)
        print('Reports: %s and device_report.html' % os.path.join(options.output_dir, 'device_report.json'))
        return 1 if report['failed'] else 0
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt as stopped:
        number = (stopped.args or (signal.SIGINT,))[0]
        print('check_device.py: interrupted by %s; device_report.json has the rows above' % signal.Signals(number).name,
              file=sys.stderr, flush=True)
        return 128 + number


def stop(number, _):
    raise KeyboardInterrupt(number)


if __name__ == '__main__':
    if sys.argv[1:2] not in (['_row'], ['_process']):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, stop)
    sys.exit(main())
