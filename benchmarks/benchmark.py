#!/usr/bin/env python3
"""Measure this repository against timm and torchvision, side by side on the same machine.

    python benchmarks/benchmark.py                          a table in three minutes; --all measures everything
    python benchmarks/benchmark.py step                     training steps, on the available device
    python benchmarks/benchmark.py step --model beit_base_patch16_224 --batch_size 128 --precision bfloat16 O2 \\
        --compile both --json step.json -- --attention=fused     flags after -- go to run_class_finetuning.py
    python benchmarks/benchmark.py eval                     evaluation
    python benchmarks/benchmark.py data                     the loader against timm's and torchvision's
    python benchmarks/benchmark.py checkpoint               saving and reading, against torch.save and torch.load
    python benchmarks/benchmark.py startup                  large folders: time to the first step
    python benchmarks/benchmark.py script                   test/train_performance_1p.sh against its own step
    python benchmarks/benchmark.py scaling                  1, 2, 4 and 8 processes

The contenders alternate, and the order reverses each round. A ratio compares two samples of a round; tables show the
median of the ratios, their extremes and quartiles. Warm-up, including compilation, is measured separately. A mode that
cannot run here gets a row with the reason. docs/performance.md explains the columns; benchmarks/contenders.py
describes the contenders.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TEST_DIR)
BEGIN = time.monotonic()
sys.path[:0] = [ROOT, TEST_DIR]

import flags
from beit.config import InputConfig, check_input_size, parse_device
from beit.errors import UserError, escape_text, nearest, one_line, unknown_value_error
from beit.files.atomic_write import check_writable
from beit.parser import bounded_number

ENOUGH_PAIRS = 5  # a median over fewer should not be published
RUN_SECONDS = 1800  # timeout for one process to end
PRECISIONS = flags.names_in('benchmarks/contenders.py', 'PRECISIONS')


# ---- flags

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def build_parser():
    positive = bounded_number(int, 1)
    parser = Parser('benchmark.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--all', action='store_true', help='measure everything; hours on a CPU')
    commands = parser.add_subparsers(dest='command', metavar='step|eval|checkpoint|data|startup|script|scaling')

    def command(name, help_text, description=''):
        description = '%s%s. %s' % (help_text[0].upper(), help_text[1:], description)
        sub = commands.add_parser(name, help=help_text, description=description, allow_abbrev=False)
        sub.set_defaults(main=functools.partial(run_command, name))
        sub.add_argument('--device', default='auto', help='auto, npu, cuda, cpu or one with an index (auto)')
        sub.add_argument('--pairs', default=ENOUGH_PAIRS, type=positive,
                         help='how often each contender is measured (%d)' % ENOUGH_PAIRS)
        sub.add_argument('--json', default='', help='write all measurements to this file')
        sub.add_argument('--markdown', action='store_true', help='print the table in Markdown')
        return sub

    def model(sub):
        sub.add_argument('--model', default='beit_base_patch16_224',
                         help='one of %s (beit_base_patch16_224)' % ', '.join(flags.MODELS))
        sub.add_argument('--input_size', default=0, type=bounded_number(int, 0, 8192),
                         help='pixels a side (the model\'s own)')
        sub.add_argument('--batch_size', default=0, type=positive, help='images in a step (128, on a CPU 4)')
        sub.add_argument('--classes', default=1000, type=positive, help='classes (1000)')
        sub.add_argument('--warmup', default=3, type=positive, help='steps before the first sample (3)')

    for name, text in (('step', 'training steps: forward, backward, clip, optimizer'),
                       ('eval', 'evaluation: forward, loss, top-1 and top-5')):
        sub = command(name, text, 'Flags after -- go to run_class_finetuning.py, for this repository\'s side.')
        model(sub)
        sub.add_argument('--precision', default=None, nargs='+', choices=PRECISIONS,
                         help='float32, bfloat16 and float16 autocast, O2 (all; on a CPU float32 bfloat16)')
        sub.add_argument('--compile', default='off', choices=('off', 'on', 'both'),
                         help='torch.compile on both sides (off)')
        sub.add_argument('--against', default=['timm', 'best', 'reference'], nargs='+',
                         choices=('timm', 'best', 'reference'),
                         help='timm in the same mode; the fastest mode of each; plain attention as the reference '
                         'computes it (all)')
        sub.add_argument('--steps', default=0, type=bounded_number(int, 0),
                         help='steps in a sample (--seconds of them)')
        sub.add_argument('--seconds', default=2., type=bounded_number(float, 0), help='minimum length of a sample (2)')
        sub.add_argument('--peak', default=None, type=bounded_number(float, 0, above=True),
                         help='the device\'s dense peak in FLOP/s (known for H100, H200 and A100)')

    sub = command('checkpoint', 'a save during training and the reading of its file, against '
                  'torch.save with fsync and torch.load(weights_only=True)',
                  'The time of a save is what it adds to the steps during which it is written. The files are in a '
                  'temporary folder of the current folder.')
    model(sub)
    sub.add_argument('--steps', default=0, type=bounded_number(int, 0),
                     help='steps in a sample (as long as three saves)')

    sub = command('data', 'the loader, against timm\'s and torchvision\'s ImageFolder')
    sub.add_argument('--data_path', default='', help='a folder with train/ in it (JPEGs of ImageNet\'s sizes are made)')
    sub.add_argument('--input_size', default=224, type=bounded_number(int, 33, 8192),
                     help='pixels a side; up to 32, training does not resize as timm\'s does (224)')
    sub.add_argument('--batch_size', default=64, type=positive, help='images in a batch (64)')
    sub.add_argument('--workers', default=1, type=positive, help='loader processes (1)')
    sub.add_argument('--images', default=512, type=positive,
                     help='minimum number of images in a sample, equally many from each worker (512)')
    sub.add_argument('--distinct', default=128, type=positive, help='different pictures to make (128)')
    sub.add_argument('--warmup', default=2, type=positive, help='batches of each worker before a sample (2)')

    sub = command('startup', 'time to the first step with large folders',
                  'The operating system has cached the directory entries before the first sample.')
    sub.add_argument('--files', default=[1000, 10000, 100000], nargs='+', type=bounded_number(int, 16, 10 ** 7),
                     help='sizes of the folders (1000 10000 100000)')

    sub = command('script', 'what test/train_performance_1p.sh reports from JPEG files, against the step',
                  'A ratio of 1 means that loader, logging and everything else cost nothing.')
    model(sub)
    sub.add_argument('--precision', default=None, choices=PRECISIONS, help='(bfloat16, on a CPU float32)')
    sub.add_argument('--compile', default='off', choices=('off', 'on'), help='torch.compile (off)')
    sub.add_argument('--steps', default=15, type=bounded_number(int, 7),
                     help='steps of a run; the first 5 are not counted (15)')
    sub.add_argument('--workers', default=2, type=positive, help='loader processes (2)')

    sub = command('scaling', 'the step on several processes of this machine',
                  'Each process has its own batch. Efficiency is images per second, divided by the figure of one '
                  'process and by the number of devices. A CPU counts as one device.')
    model(sub)
    sub.add_argument('--processes', default=[1, 2, 4, 8], nargs='+', type=positive, help='process counts (1 2 4 8)')
    sub.add_argument('--precision', default=None, choices=PRECISIONS, help='(bfloat16, on a CPU float32)')
    sub.add_argument('--compile', default='off', choices=('off', 'on'), help='torch.compile (off)')
    sub.add_argument('--steps', default=5, type=positive, help='steps in a sample; a run has three samples (5)')
    return parser


def parse(argv):
    extra = []
    if '--' in argv:
        argv, extra = argv[:argv.index('--')], argv[argv.index('--') + 1:]
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    options.is_part, options.until = False, math.inf  # of the table without a command
    if options.command is None:
        if rest or extra:
            raise UserError('%s: name what to measure first: %s; see --help' % (
                (rest + extra)[0], ', '.join(parser._subparsers._group_actions[0].choices)))
        options.main = functools.partial(run_command, 'all' if options.all else 'overview')
        options.device = 'auto'
        return options
    if options.all:
        raise UserError('--all: it measures everything; leave %s out' % options.command)
    if rest:
        known = parser._subparsers._group_actions[0].choices[options.command]._option_string_actions
        near = nearest(rest[0].partition('=')[0], known)
        raise UserError('%s: unknown flag of %s; %s' % (rest[0], options.command, 'did you mean %s?' % ' or '.join(near)
                                                        if near else 'see %s --help' % options.command))
    options.extra, options.argv = extra, argv + (['--'] + extra if extra else [])
    if options.json and (os.path.isdir(options.json) or not os.path.isdir(os.path.dirname(options.json) or '.')):
        raise UserError('--json %s: cannot be written there' % escape_text(options.json))
    check_writable('--json', options.json, is_file=True)
    parse_device(options.device)
    flags.build_parser().parse_args(extra)
    if getattr(options, 'data_path', ''):
        from beit.data import locations
        locations.check_named_files(flags.config_from(options, InputConfig))
    if 'model' in options:
        if options.model not in flags.MODELS:
            raise unknown_value_error('--model', options.model, flags.MODELS)
        check_input_size(options.model, options.input_size)
    return options


def run_command(name, options, device):
    """Measure; the function of a command comes after the slow imports."""
    globals()[name + '_main'](options, device)


def fail(error):
    print('benchmark.py: error: %s' % one_line(error), file=sys.stderr, flush=True)
    return 2


if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    if sys.argv[1:2] not in (['_entry'], ['_process']):  # before the import of PyTorch; `main` parses again
        try:
            parse(sys.argv[1:])
        except UserError as error:
            sys.exit(fail(error))

import numpy as np
import timm
import timm.data
import torch
import torchvision
from PIL import Image

import contenders
import datasets
import modeling_finetune
import run_class_finetuning as program
from beit.data import locations, transforms
from beit.devices import accelerator
from beit.distributed import process_group, watchdog
from contenders import CONTENDERS, Mode, Ours, Setting


# ---- statistics

def summary(values):
    """Median, extremes and quartiles (by linear interpolation) of a list of numbers, and the numbers."""
    values = [float(value) for value in values]
    quartiles = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    return dict(median=statistics.median(values), min=min(values), max=max(values),
                quartiles=[quartiles[0], quartiles[2]], samples=values)


def ratios(left, right):
    """The summary of left / right, sample by sample."""
    return summary(a / b for a, b in zip(left, right))


def take_turns(runs, pairs, until=math.inf):
    """Run each of `runs` once per round, one round per pair; every second round runs backwards.

    Args:
        runs (list of functions): each returns a number.
        until (float): after the first round, none starts that would end later, in seconds of `time.monotonic`.

    Returns:
        list of the numbers of each run.
    """
    results, begin = [[] for _ in runs], time.monotonic()
    for pair in range(pairs):
        now = time.monotonic()
        if pair and now + (now - begin) / pair > until:
            break
        order = list(range(len(runs)))
        for index in order if pair % 2 == 0 else order[::-1]:
            if _heard:
                sys.exit(128 + _heard[0])
            results[index].append(runs[index]())
    return results


_heard = []  # signals


def stop(number, _):
    """Exit so that temporary files are removed. A signal during a fork is lost, so `take_turns` checks again."""
    _heard.append(number)
    sys.exit(128 + number)


def progress(text):
    print('benchmark.py: ' + text, file=sys.stderr, flush=True)


# ---- description of the run

def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def about_run(options, device):
    """Everything that affects the figures, without the machine's name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return dict(
        benchmark=options.command, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        command=['benchmarks/benchmark.py'] + options.argv,
        hardware=dict(device=accelerator.device_name(device), device_type=device.type, cpu=cpu_name(), cores=cores,
                      threads=torch.get_num_threads()),
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      timm=timm.__version__),
        pairs=options.pairs, rows=[])


def write_json(options, report):
    if not options.json:
        return
    with open(options.json, 'w', encoding='utf-8') as file:
        json.dump(report, file, indent=1)
        file.write('\n')


def add_row(options, report, row):
    """Add a row and write all rows, which survive an interrupted run."""
    report['rows'].append(row)
    write_json(options, report)
    return row


# ---- tables

def shown(value, form='%.1f'):
    return 'n/a' if value is None else form % value


def about_ratio(ratio):
    """The cells of a ratio: its median, extremes and quartiles."""
    if ratio is None:
        return ['n/a', '', '']
    return ['%.3f' % ratio['median'], '%.3f..%.3f' % (ratio['min'], ratio['max']),
            '%.3f..%.3f' % tuple(ratio['quartiles'])]


RATIO = ['ratio', 'min..max', 'quartiles']


def table(head, rows, markdown=False):
    """Lines of a table in plain text, or in Markdown."""
    rows = [[str(cell) for cell in row] for row in rows]
    if markdown:
        return '\n'.join('| %s |' % ' | '.join(row) for row in [head, ['---'] * len(head)] + rows)
    widths = [max(len(row[column]) for row in [head] + rows) for column in range(len(head))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in [head] + rows)


def print_report(options, report, head, cells):
    options.report = report
    if options.is_part:
        return
    hardware, versions = report['hardware'], report['versions']
    print('%s; %s, %d cores, %d threads; Python %s, torch %s, torchvision %s, timm %s; %d pairs' % (
        hardware['device'], hardware['cpu'], hardware['cores'], hardware['threads'], versions['python'],
        versions['torch'], versions['torchvision'], versions['timm'], options.pairs))
    if options.extra:
        print('Ours with %s' % escape_text(' '.join(options.extra)))
    if options.pairs < ENOUGH_PAIRS:
        print('Fewer than %d pairs: a trial, not a measurement' % ENOUGH_PAIRS)
    print()
    print(table(head, [cells(row) for row in report['rows']], options.markdown), flush=True)


# ---- step and eval

def build(kind, setting, mode, device):
    """(contender, MiB in use on the device before it)."""
    if device.type != 'cpu':
        accelerator.device_module(device).reset_peak_memory_stats()
    before = accelerator.max_memory_mb(device)
    return CONTENDERS[kind](setting, mode), before


def why_not(error):
    """The reason why a mode cannot run here, for its row."""
    if accelerator.is_out_of_memory(error):
        return 'out of memory'
    text = one_line(error) or type(error).__name__
    return text.partition(';')[0][:150]


class Entry:
    """A contender in one mode, warmed up: its record for the report, and its samples."""

    def __init__(self, kind, setting, mode, work, warmup, device):
        self.record = dict(contender=kind, mode=str(CONTENDERS[kind].mode_of(mode, device)))
        self.mode, self.batch_size, self.work, self.device = mode, setting.batch_size, work, device
        self.contender, self.seconds = None, None
        try:
            self.contender, before = build(kind, setting, mode, device)
            self.record['about'] = self.contender.about
            warming = self.run(warmup - 1) if warmup > 1 else 0.
            self.seconds = self.run(1)
            self.record['warmup_seconds'] = warming + self.seconds
            if device.type != 'cpu':
                self.record['peak_memory_mib'] = accelerator.max_memory_mb(device) - before
        except Exception as error:  # torch.compile can fail in any way; keep the other rows
            self.contender = None
            self.record['not_available'] = why_not(error)
            if not isinstance(error, UserError):
                progress('%s %s: %s' % (kind, mode, one_line(error)[:500]))

    def is_able(self):
        return 'not_available' not in self.record

    def run(self, steps, work=''):
        """Seconds for this many steps, from an idle device until the device has finished."""
        accelerator.synchronize(self.device)
        start = time.perf_counter()
        getattr(self.contender, work or self.work)(steps)
        accelerator.synchronize(self.device)
        seconds = time.perf_counter() - start
        if getattr(self.contender, 'skipped_steps', None):
            self.record['skipped_steps'] = self.contender.skipped_steps
        self.record.update(getattr(self.contender, 'figures', {}))
        return seconds

    def rate(self, steps, work=''):
        """Images per second. On failure the record has the reason."""
        try:
            return self.batch_size * steps / self.run(steps, work)
        except Exception as error:
            self.record.setdefault('not_available', why_not(error))
            raise

    def finish(self, rates, flops, peak):
        """Its record with these rates."""
        record = dict(self.record, images_per_second=summary(rates))
        record['flops_per_second'] = record['images_per_second']['median'] * flops
        if peak and self.mode is not None and self.mode.precision != 'float32':
            record['peak_fraction'] = record['flops_per_second'] / peak
        return record

    def end(self):
        """Free its resources."""
        self.contender = None


class Apart(Entry):
    """An entry in a separate process, as users run it: the set-up of one side cannot affect the other.

    Its memory is the process's. Use `Entry` for devices whose memory several processes can't share well.
    """

    def __init__(self, kind, setting, mode, work, warmup, device):
        self.mode, self.batch_size = mode, setting.batch_size
        self.record = dict(contender=kind, mode=str(CONTENDERS[kind].mode_of(mode, device)))
        order = dict(kind=kind, setting=setting._asdict(), mode=mode, work=work, warmup=warmup)
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), '_entry', json.dumps(order)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True,
                                        preexec_fn=process_group.end_with_parent)
        try:
            self.seconds = self.answer()
        except BaseException:  # a signal during the warm-up, which would otherwise continue
            self.end()
            raise

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.record['not_available'] = 'its process ended with status %d' % self.process.wait()
            return None
        seconds, record = json.loads(line)
        self.record.update(record)
        return seconds

    def run(self, steps, work=''):
        with contextlib.suppress(BrokenPipeError):  # it is dead and will not answer
            print(steps, work, file=self.process.stdin, flush=True)
        seconds = self.answer()
        if seconds is None:
            raise UserError('%s %s: %s' % (self.record['contender'], self.record['mode'], self.record['not_available']))
        return seconds

    def end(self):
        self.process.kill()
        self.process.communicate()


def entry_main(order):
    """The process of an `Apart`: prints [seconds, record] for one step, then for each number of steps that it reads."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # output of libraries
    setting = Setting(**dict(order['setting'], extra=tuple(order['setting']['extra'])))
    entry = Entry(order['kind'], setting, order['mode'] and Mode(*order['mode']), order['work'], order['warmup'],
                  accelerator.select_device(setting.device))

    def answer(seconds):
        entry.record.update(peak_memory_mib=peak_resident_mib())
        print(json.dumps([seconds, entry.record]), file=answers, flush=True)

    answer(entry.seconds)
    for line in sys.stdin:
        steps, *work = line.split()
        answer(entry.run(int(steps), *work))


def measure_rows(ours, other, options, setting, device, works, flops, peak):
    """Two alternating contenders, (kind, mode) each: a row for each of `works`. If one can't run, the other's figures.

    Args:
        works (sequence of str): 'train', 'evaluate'.
        flops (float): of one image's forward pass.
    """
    contenders.forget_compiled()
    progress(' against '.join('%s %s' % (kind, CONTENDERS[kind].mode_of(mode, device)) for kind, mode in (ours, other)))
    kind_of_entry, entries = Apart if device.type == 'cpu' else Entry, {}
    try:
        for side, (kind, mode) in (('ours', ours), ('other', other)):
            entries[side] = kind_of_entry(kind, setting, mode, works[0], options.warmup, device)
        able = {side: entry for side, entry in entries.items() if entry.is_able()}
        rows = [dict(work=work, **{side: entry.record for side, entry in entries.items()}) for work in works]
        if able:
            least = 3 if device.type == 'cpu' else 10  # every tenth of our steps waits to print a line
            slowest = max(entry.seconds for entry in able.values())
            steps = options.steps or max(least, int(options.seconds / slowest) + 1)
            try:
                rates = iter(take_turns([functools.partial(entry.rate, steps, work) for work in works
                                         for entry in able.values()], options.pairs, options.until))
            except Exception:  # memory can run out this late; keep the other rows
                if all(entry.is_able() for entry in able.values()):
                    raise
                return rows
            for row in rows:
                row['steps_per_sample'] = steps
                for side, entry in able.items():
                    row[side] = entry.finish(next(rates), flops * (3 if row['work'] == 'train' else 1), peak)
                if len(able) == 2:
                    row['ratio'] = ratios(*(row[side]['images_per_second']['samples'] for side in able))
    finally:
        for entry in entries.values():
            entry.end()
        gc.collect()
    return rows


def peak_resident_mib():
    """The peak memory of this process in MiB. (getrusage includes its parent's memory before the fork.)"""
    try:
        with open('/proc/self/status', encoding='utf-8') as file:
            for line in file:
                if line.startswith('VmHWM:'):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def modes_of(options):
    compiled = {'off': (False,), 'on': (True,), 'both': (False, True)}[options.compile]
    return [Mode(precision, each) for each in compiled for precision in options.precision]


def fastest(measured, side):
    """The mode of the fastest record on one side of the measured (row, (mode, mode)) pairs, or None."""
    rates = [(row[side]['images_per_second']['median'], modes[side == 'other']) for row, modes in measured
             if 'images_per_second' in row[side]]
    return max(rates)[1] if rates else None


def setting_of(options, device):
    size = options.input_size or modeling_finetune.MODELS[options.model]['img_size']
    batch = options.batch_size or (4 if device.type == 'cpu' else 128)
    check_extra(options.extra, contenders.flags_of_a_step())  # a wrong flag concerns every mode
    return Setting(options.model, size, batch, options.device, options.classes, tuple(options.extra))


def check_extra(extra, taken):
    """Raise a `UserError` for `taken` flags after --, which the comparison sets."""
    for flag in extra:
        name = flag.partition('=')[0].replace('-', '_').replace('__', '--', 1)
        if name in taken:
            raise UserError('%s after --: the comparison rests on it; leave it out, or give the benchmark its own, '
                            'where it has one, before --' % flag)


def sides(options, device, works):
    """`step` and `eval`: rows of the same mode, then the fastest of ours against timm's fastest and the reference."""
    setting = setting_of(options, device)
    options.precision = options.precision or (['float32', 'bfloat16'] if device.type == 'cpu' else list(PRECISIONS))
    report = about_run(options, device)
    flops = contenders.forward_flops(setting.architecture, setting.classes)
    peak = options.peak or contenders.peak_flops(report['hardware']['device'])
    report.update(model=setting.model, input_size=setting.input_size, batch_size=setting.batch_size,
                  flops_per_image=flops * (3 if works[0] == 'train' else 1), peak_flops=peak, extra_flags=options.extra)

    def measure(name, our_mode, kind, its_mode):
        rows = measure_rows(('ours', our_mode), (kind, its_mode), options, setting, device, works, flops, peak)
        return [add_row(options, report, dict(name=name, **row)) for row in rows][0]

    measured = []
    if 'timm' in options.against or 'best' in options.against:
        measured = [(measure('same mode', mode, 'timm', mode), (mode, mode)) for mode in modes_of(options)]
    ours, timms = fastest(measured, 'ours'), fastest(measured, 'other')
    if 'best' in options.against and ours and timms and len(measured) > 1:
        measure('fastest of each', ours, 'timm', timms)
    if 'reference' in options.against:
        for mode in [ours] if ours else modes_of(options):
            measure('reference', mode, 'reference', None)
    write_json(options, report)
    head = ['ours', 'against', 'images/s', 'its images/s'] + RATIO + [
        'TFLOP/s', 'of peak', 'MiB', 'its MiB', 'warm-up s', 'its warm-up s', 'note']
    print_report(options, report, head, side_cells)


def side_cells(row):
    ours, other = row['ours'], row['other']
    against = {'timm': 'timm ', 'reference': 'reference '}[other['contender']] + other['mode']
    note = 'fastest of each' if row['name'] == 'fastest of each' else ''
    rates = [record.get('images_per_second') and record['images_per_second']['median'] for record in (ours, other)]
    reason = ours.get('not_available') or other.get('not_available')
    flops, share = ours.get('flops_per_second'), ours.get('peak_fraction')
    return [ours['mode'], against, shown(rates[0], '%.2f'), shown(rates[1], '%.2f')] \
        + about_ratio(row.get('ratio')) + [
            shown(flops and flops / 1e12, '%.3f'), shown(share and 100 * share, '%.1f %%')] \
        + [shown(record.get(key), form) for key, form in (('peak_memory_mib', '%.0f'), ('warmup_seconds', '%.1f'))
           for record in (ours, other)] + ['n/a: ' + reason if reason else note]


def step_main(options, device):
    sides(options, device, ('train',))


def eval_main(options, device):
    sides(options, device, ('evaluate',))


# ---- checkpoint

def checkpoint_main(options, device):
    setting = setting_of(options, device)
    mode = Mode('float32' if device.type == 'cpu' else 'bfloat16')
    report = about_run(options, device)
    report.update(model=setting.model, batch_size=setting.batch_size, mode=str(mode), extra_flags=options.extra)
    entries, folder = [], tempfile.TemporaryDirectory(dir='.')  # a disk, as of --output_dir

    def measure(what, sample):
        progress(what)
        ours, theirs = take_turns([functools.partial(sample, entry) for entry in entries], options.pairs)
        add_row(options, report, dict(what=what, ours=summary(ours), other=summary(theirs), ratio=ratios(ours, theirs)))

    def stall(entry):
        return -entry.run(steps, 'train') + entry.run(steps, 'save')

    try:
        for kind in ('checkpoints', 'torch.save'):
            extra = (*setting.extra, '--output_dir=' + os.path.join(os.path.abspath(folder.name), kind))
            entries.append(Apart(kind, setting._replace(extra=extra), mode, 'train', options.warmup, device))
            if not entries[-1].is_able():
                raise UserError('%s cannot run here: %s' % (mode, entries[-1].record['not_available']))
        before = [entry.record['peak_memory_mib'] for entry in entries]
        first = [entry.run(1, 'save') for entry in entries]  # allocates the copy
        steps = options.steps or int(3 * max(first) / entries[1].run(1, 'train')) + 2
        report['steps_per_sample'] = steps
        measure('one save in %d steps, s' % steps, stall)
        memory = [summary([entry.record['peak_memory_mib'] - least]) for entry, least in zip(entries, before)]
        measure('the same content under two names, s', lambda entry: entry.run(1, 'save_twice'))
        for entry in entries:  # a file that ours wrote is not in the system's cache
            entry.run(1, 'load')
        measure('reading, s', lambda entry: entry.run(1, 'load'))
        add_row(options, report, dict(what='memory of saving, MiB', ours=memory[0], other=memory[1]))
        report.update(file_mib=entries[0].record['file_mib'], waits=summary(entries[0].record['waits'][1:]))
    finally:
        for entry in entries:
            entry.end()
        folder.cleanup()
    write_json(options, report)

    def cells(row):
        return [row['what']] + [shown(row[side]['median'], '%.2f') for side in ('ours', 'other')] \
            + about_ratio(row.get('ratio'))

    print_report(options, report, [setting.model, 'ours', 'torch.save, torch.load'] + RATIO, cells)
    print('The file has %.0f MiB. Of a save, training waits %.3f s (%.3f..%.3f) for the copy to host memory.' % (
        report['file_mib'], report['waits']['median'], report['waits']['min'], report['waits']['max']))


# ---- data

# Common sizes in ImageNet with their frequencies; its mean is 469 x 387 pixels and 110 KB.
SIZES = ((500, 375),) * 9 + ((375, 500),) * 3 + ((500, 333),) * 4 + ((333, 500),) * 2 + ((500, 400), (640, 480),
                                                                                         (500, 500), (400, 300))


def photograph(rng, width, height):
    """A picture with the statistics of a photograph: 1/f noise (Field, JOSA A 4, 1987) and shapes with edges."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.

    def noise(power):
        spectrum = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        field = np.fft.irfft2(spectrum / frequency ** power, (height, width))
        return (field - field.mean()) / field.std()

    light, colour = noise(1.), np.stack([noise(1.6) for _ in range(3)], -1)
    row, column = np.mgrid[:height, :width]
    for _ in range(6):
        centre, radius = rng.uniform(0, (height, width)), rng.uniform(0.08, 0.35, 2) * (height, width)
        inside = ((row - centre[0]) / radius[0]) ** 2 + ((column - centre[1]) / radius[1]) ** 2 < 1
        light = light + inside * rng.normal(0, 0.7)
        colour = colour + inside[..., None] * rng.normal(0, 0.7, 3)
    return Image.fromarray(np.uint8(np.clip(120 + 45 * light[..., None] + 20 * colour, 0, 255)))


def make_photographs(root, files, distinct, classes=10):
    """Class folders of JPEGs under `root`/train: `files` names for `distinct` deterministic pictures."""
    rng = np.random.default_rng(0)
    originals = os.path.join(root, 'originals')
    os.makedirs(originals)
    for index in range(min(distinct, files)):
        width, height = SIZES[index % len(SIZES)]
        photograph(rng, width, height).save(os.path.join(originals, '%d.jpg' % index), quality=90)
    for index in range(files):
        folder = os.path.join(root, 'train', 'class%03d' % (index % classes))
        os.makedirs(folder, exist_ok=True)
        link(os.path.join(originals, '%d.jpg' % (index % distinct)), os.path.join(folder, '%06d.jpg' % index))


def link(source, path):
    try:
        os.link(source, path)
    except OSError:  # no hard links on this file system, or too many to this file
        shutil.copyfile(source, path)


def our_batches(options, args, device, alone=False):
    """An iterator of our loader's batches as in the training loop: on the device, normalised and erased.

    Args:
        alone (bool): as the workers send them for an accelerator, which does the remaining work.
    """
    train, _, _ = datasets.build_datasets(args, torch.device('cuda') if alone else device)
    loader, _ = datasets.build_loaders(args, train, None, device)
    return iter(loader.loader if alone else loader)


AUGMENTATION = dict(color_jitter=0.4, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', re_prob=0.25,
                    re_mode='pixel', re_count=1, mean=modeling_finetune.INPUT_MEAN, std=modeling_finetune.INPUT_STD)


def timm_batches(options, root, device, alone=False):
    """An iterator over timm's own loader: fast collate, bytes from its workers, normalised and erased on the device.

    Args:
        alone (bool): as the workers send them.
    """
    loader = timm.data.create_loader(
        timm.data.create_dataset('', root=os.path.join(root, 'train')), (3, options.input_size, options.input_size),
        options.batch_size, is_training=True, use_prefetcher=True, num_workers=options.workers, device=device,
        persistent_workers=False, pin_memory=device.type != 'cpu', **AUGMENTATION)
    return iter(loader.loader if alone else loader)


def folder_batches(options, root, device):
    """An iterator over torchvision's ImageFolder with timm's create_transform and PyTorch's own collate function."""
    transform = timm.data.create_transform(input_size=options.input_size, is_training=True, **AUGMENTATION)
    folder = torchvision.datasets.ImageFolder(os.path.join(root, 'train'), transform)
    return iter(torch.utils.data.DataLoader(
        folder, batch_size=options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True,
        pin_memory=device.type != 'cpu'))


def rounds(options):
    """The number of batches per worker before and in a sample: at least four, because more workers than cores deliver
    batches in bursts."""
    batches = -(-options.images // options.batch_size)
    return options.warmup, max(-(-batches // options.workers), 4 if options.workers > 1 else 1)


def loader_rate(start, options, device):
    """Images per second and worker, between two batches.

    The clock starts after the workers' start-up and after their prefetched batches, so the main process waits for every
    batch. All workers deliver equally many batches before and in the sample, because their first batches arrive
    together.
    """
    batches, (before, counted) = start(), rounds(options)
    try:
        for _ in range(before * options.workers):
            next(batches)
        begin = time.perf_counter()
        images = sum(len(next(batches)[0]) for _ in range(counted * options.workers))
        accelerator.synchronize(device)
        return images / (time.perf_counter() - begin) / options.workers
    finally:  # stop the workers before the next loader, and after an error
        (batches.close if hasattr(batches, 'close') else batches._shutdown_workers)()


def baseline_rate(start, options, root, device, *more):
    """`loader_rate` of a baseline, `timm_batches` or `folder_batches`.

    Raises:
        UserError: it cannot read something in the folder.
    """
    try:
        return loader_rate(functools.partial(start, options, root, device, *more), options, device)
    except StopIteration:
        raise
    except Exception as error:  # torchvision's and Pillow's, wrapped in a worker's traceback
        raise UserError('--data_path %s: a baseline cannot read it (%s); repair or remove that file'
                        % (escape_text(root), str(error).strip().splitlines()[-1][:300])) from None


def loader_rows(options, root, device, backends, alone):
    """A row for each backend. Its loaders and the baselines, without ImageFolder in the overview, alternate."""
    rows, runs = [dict(backend=name + (', workers alone' if alone else '')) for name in backends], {}
    progress('loaders%s, against timm\'s%s' % (', workers alone' if alone else '',
                                              '' if options.is_part else ' and ImageFolder'))
    for name, row in zip(backends, rows):
        args = program.build_parser().parse_args([
            '--data_path=' + root, '--input_size=%d' % options.input_size, '--batch_size=%d' % options.batch_size,
            '--num_workers=%d' % options.workers, '--disable_eval_during_finetuning'] + options.extra
            + ['--data_backend=' + name])
        locations.check_paths(args)
        try:
            transforms.check_backend(args)
        except UserError as error:
            row['not_available'] = why_not(error)
            continue
        runs[name] = functools.partial(loader_rate, functools.partial(our_batches, options, args, device, alone),
                                       options, device)
        runs.setdefault('timm', functools.partial(baseline_rate, timm_batches, options, root, device, alone))
    if not options.is_part:
        runs['baseline'] = functools.partial(baseline_rate, folder_batches, options, root, device)
    try:
        rates = dict(zip(runs, take_turns(list(runs.values()), options.pairs, options.until)))
    except StopIteration:
        raise UserError('--data_path %s: too few images, for a sample needs %d; lower --images, --batch_size '
                        'or --workers' % (escape_text(root), sum(rounds(options)) * options.workers
                                          * options.batch_size)) from None
    except UserError as error:
        if options.data_path:
            raise
        return [dict(row, not_available=why_not(error)) for row in rows]
    for name, row in zip(backends, rows):
        if name in rates:
            row.update(ours=summary(rates[name]))
            for baseline, ratio in (('timm', 'ratio'), ('baseline', 'baseline_ratio')):
                if baseline in rates:
                    row.update({baseline: summary(rates[baseline]), ratio: ratios(rates[name], rates[baseline])})
    return rows


def data_main(options, device):
    check_extra(options.extra, contenders.FLAGS_OF_THE_LOADER)
    backends = contenders.flag_choices('data_backend')
    report = about_run(options, device)
    report.update(workers=options.workers, batch_size=options.batch_size, input_size=options.input_size,
                  images_per_sample=options.images, extra_flags=options.extra,
                  images='folder' if options.data_path else 'made')
    with tempfile.TemporaryDirectory() as folder:
        root = locations.resolve_data_path(options.data_path) if options.data_path else folder
        if not options.data_path:
            progress('making %d JPEGs' % options.distinct)
            batches = options.workers * (sum(rounds(options)) + 2) + 1  # including prefetched batches
            make_photographs(folder, batches * options.batch_size, options.distinct)
            sizes = [os.path.getsize(entry.path) for entry in os.scandir(os.path.join(folder, 'originals'))]
            report['mean_file_bytes'] = sum(sizes) / len(sizes)
        for alone in (False, True)[:1 + (device.type == 'cpu' and not options.is_part)]:
            for row in loader_rows(options, root, device, backends, alone):
                add_row(options, report, row)
    write_json(options, report)

    def cells(row):
        return [row['backend']] + [shown(row.get(side) and row[side]['median']) for side in ('ours', 'timm')] \
            + about_ratio(row.get('ratio')) + [shown(row.get('baseline') and row['baseline']['median'])] \
            + about_ratio(row.get('baseline_ratio')) + [row.get('not_available', '')]

    print_report(options, report, ['loader', 'images/s per worker', 'timm\'s loader'] + RATIO
                 + ['ImageFolder + timm\'s transform'] + RATIO + ['note'], cells)


# ---- startup

FILES_PER_CLASS = 100


def make_tree(root, files):
    """Class folders with `files` links to tiny JPEGs, a hundred per folder."""
    source = os.path.join(os.path.dirname(root), 'tiny0.jpg')
    Image.fromarray(np.uint8(np.random.RandomState(0).randint(0, 256, (32, 32, 3)))).save(source)
    for index in range(files):
        folder = os.path.join(root, 'class%05d' % (index // FILES_PER_CLASS))
        if index % FILES_PER_CLASS == 0:
            os.makedirs(folder)
        if index and index % 30000 == 0:  # the number of links to a file is limited
            source = shutil.copyfile(source, os.path.join(os.path.dirname(root), 'tiny%d.jpg' % index))
        link(source, os.path.join(folder, '%06d.jpg' % index))


def folder_flags(root):
    """The flags that train on class folders."""
    return ['--data_set=image_folder', '--data_path=' + root, '--disable_eval_during_finetuning',
            '--model=beit_nano_patch8_32', '--input_size=32', '--batch_size=16']


def open_folder(root, options):
    """Seconds to open a folder as this repository's data set."""
    args = program.build_parser().parse_args(folder_flags(root) + options.extra)
    start = time.perf_counter()
    datasets.build_dataset(True, args)
    return time.perf_counter() - start


def open_image_folder(root):
    """Seconds to open it as torchvision's ImageFolder."""
    start = time.perf_counter()
    torchvision.datasets.ImageFolder(root)
    return time.perf_counter() - start


def first_step(root, options):
    """Seconds from the start of the program to the line of its first step."""
    command = [sys.executable, '-u', os.path.join(ROOT, 'run_class_finetuning.py')] + folder_flags(root) + [
        '--num_workers=1', '--maxstep=1', '--epochs=1', '--warmup_epochs=0', '--device=' + options.device,
        '--no_save_ckpt'] + options.extra
    start, seconds, last = time.perf_counter(), None, ''
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True) as run:
        for line in run.stdout:
            last = line.strip() or last
            if seconds is None and line.startswith('Epoch: [0]'):
                seconds = time.perf_counter() - start
    if run.returncode or seconds is None:
        raise UserError('run_class_finetuning.py failed: %s' % last)
    return seconds


def startup_main(options, device):
    report = about_run(options, device)
    report['extra_flags'] = options.extra
    for files in options.files:
        with tempfile.TemporaryDirectory() as folder:
            root = os.path.join(folder, 'images')
            progress('%d files' % files)
            make_tree(root, files)
            open_image_folder(root)  # from now on the directory entries are cached
            theirs, ours = take_turns([functools.partial(open_image_folder, root),
                                       functools.partial(open_folder, root, options)], options.pairs)
            add_row(options, report, dict(files=files, what='data set', seconds=summary(ours),
                                          image_folder_seconds=summary(theirs), ratio=ratios(theirs, ours)))
            steps, = take_turns([functools.partial(first_step, root, options)], options.pairs)
            add_row(options, report, dict(files=files, what='to first step', seconds=summary(steps)))

    def cells(row):
        theirs = row.get('image_folder_seconds')
        return [row['files'], row['what'], '%.3f' % row['seconds']['median']] + (
            ['%.3f' % theirs['median']] + about_ratio(row['ratio']) if theirs else [''] * 4)

    print_report(options, report, ['files', 'what', 'seconds', 'ImageFolder\'s'] + RATIO, cells)


# ---- the script, end to end

def script_rate(options, setting, mode, root):
    """Images per second that test/train_performance_1p.sh reports, and the bottleneck that it names."""
    flags = [flag for flag in contenders.our_flags(setting, mode, root)
             if not flag.startswith(('--num_workers=', '--epochs=', '--disable_eval'))]
    command = ['bash', os.path.join(contenders.ROOT, 'test', 'train_performance_1p.sh'), *flags, '--epochs=1',
               '--num_workers=%d' % options.workers, '--maxstep=%d' % options.steps, '--finetune=', '--loss_scale=1'] \
        + ([] if mode.precision != 'float32' else ['--no_amp'])
    status, out, err = run_to_end(command)
    found = re.search(r'^Final Performance images/sec : ([\d.]+)', out, re.M)
    if status or not found:
        raise UserError('test/train_performance_1p.sh failed: %s' % one_line((err.strip() or out.strip())[-300:]))
    return float(found.group(1)), re.search(r'^Speed: (.*)', out, re.M).group(1)


def run_to_end(command):
    """(status, stdout, stderr) of a script; if this process must exit, the script and its children are ended."""
    script = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, env=dict(os.environ, PYTHON=sys.executable),
                              start_new_session=True)  # Ctrl-C reaches it only through this process
    try:
        out, err = script.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError('%s did not end in %d s' % (os.path.basename(command[1]), RUN_SECONDS)) from None
    finally:
        if script.poll() is None:
            script.terminate()  # it forwards the signal and waits
            script.communicate()
    return script.returncode, out, err


def script_main(options, device):
    setting = setting_of(options, device)
    mode = Mode(options.precision or ('float32' if device.type == 'cpu' else 'bfloat16'), options.compile == 'on')
    report = about_run(options, device)
    report.update(model=setting.model, input_size=setting.input_size, batch_size=setting.batch_size, mode=str(mode),
                  steps_per_sample=options.steps, extra_flags=options.extra)
    entry, limits = Entry('ours', setting, mode, 'train', options.warmup, device), []
    if not entry.is_able():
        raise UserError('%s cannot run here: %s' % (mode, entry.record['not_available']))
    with tempfile.TemporaryDirectory() as root:
        progress('making JPEGs')
        make_photographs(root, setting.batch_size * options.steps, min(128, setting.batch_size * options.steps))

        def script():
            rate, limit = script_rate(options, setting, mode, root)
            limits.append(limit)
            return rate
        scripts, steps = take_turns([script, functools.partial(entry.rate, max(3, options.steps - 5))], options.pairs)
    add_row(options, report, dict(script=summary(scripts), step=summary(steps), ratio=ratios(scripts, steps),
                                  limits=limits))

    def cells(row):
        return [str(mode), shown(row['script']['median'], '%.2f'), shown(row['step']['median'], '%.2f')] \
            + about_ratio(row['ratio']) + [row['limits'][-1].partition(';')[0]]

    print_report(options, report, ['mode', 'script, images/s', 'step, images/s'] + RATIO + ['the last run says'], cells)


# ---- scaling

def process_main(order):
    """One of several processes: the step of `Ours`, in synchronised samples; the first process prints them."""
    setting = Setting(**dict(order['setting'], extra=tuple(order['setting']['extra'])))
    ours = Ours(setting, Mode(*order['mode']))
    ours.train(order['warmup'])
    rates = []
    for _ in range(order['samples']):
        process_group.barrier()
        accelerator.synchronize(ours.device)
        start = time.perf_counter()
        ours.train(order['steps'])
        accelerator.synchronize(ours.device)
        process_group.barrier()
        rates.append(process_group.world_size() * setting.batch_size * order['steps'] / (time.perf_counter() - start))
    if process_group.is_main_process():
        print(json.dumps(dict(rates=rates, threads=torch.get_num_threads())), flush=True)
    watchdog.stop()
    process_group.shutdown()


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run_processes(count, order, threads, script=__file__, seconds=RUN_SECONDS):
    """Start `count` processes of a program with torchrun's environment; returns the first one's output, or raises a
    `UserError`."""
    port, processes = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, '%d.%s') % (rank, '%s') for rank in range(count)]
        try:
            for rank, path in enumerate(paths):
                env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                           LOCAL_WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                if threads:
                    env['OMP_NUM_THREADS'] = str(threads)
                with open(path % 'out', 'wb') as out, open(path % 'err', 'wb') as err:
                    processes.append(subprocess.Popen(
                        [sys.executable, os.path.abspath(script), '_process', json.dumps(order)], env=env,
                        stdout=out, stderr=err, preexec_fn=process_group.end_with_parent))
            failed = wait_for(processes, seconds)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if failed is not None:
            said = last_line(paths[failed] % 'err').replace('benchmark.py: error: ', '')
            raise UserError('process %d of %d failed: %s' % (failed, count, said or 'without a message'))
        return json.loads(last_line(paths[0] % 'out'))


def wait_for(processes, seconds=RUN_SECONDS):
    """The number of the first process that fails, or None; the others would wait for it forever."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed:
            return failed[0]
        if time.monotonic() > until:
            raise UserError('%d processes did not end in %d s' % (len(processes), seconds))
        time.sleep(0.05)
    return next((rank for rank, process in enumerate(processes) if process.returncode), None)


def last_line(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        return (file.read().strip().splitlines() or [''])[-1]


def scaling_main(options, device):
    setting = setting_of(options, device)
    precision = options.precision or ('float32' if device.type == 'cpu' else 'bfloat16')
    mode = Mode(precision, options.compile == 'on')
    contenders.mode_flags(mode)
    report = about_run(options, device)
    report.update(model=setting.model, input_size=setting.input_size, batch_size=setting.batch_size, mode=str(mode),
                  extra_flags=options.extra)
    order = dict(setting=setting._asdict(), mode=list(mode), warmup=options.warmup, steps=options.steps, samples=3)
    counts = sorted(set(options.processes) | {1})
    rates, threads, reasons = {count: [] for count in counts}, {}, {}
    cores = report['hardware']['threads']
    for turn in range(options.pairs):
        for count in counts if turn % 2 == 0 else counts[::-1]:
            if count in reasons:
                continue
            progress('%d processes, run %d of %d' % (count, turn + 1, options.pairs))
            try:
                accelerator.find_device(options.device, count - 1, count)
                told = run_processes(count, order, max(1, cores // count) if device.type == 'cpu' else None)
                rates[count].append(statistics.median(told['rates']))
                threads[count] = told['threads']
            except UserError as error:
                reasons[count] = why_not(error)
    for count in counts:
        row = dict(processes=count)
        if count in reasons or 1 in reasons:
            row['not_available'] = reasons.get(count) or 'one process failed: %s' % reasons[1]
        else:
            devices = 1 if device.type == 'cpu' else count  # processes of a CPU share its cores
            row.update(threads=threads[count], images_per_second=summary(rates[count]),
                       speedup=ratios(rates[count], rates[1]),
                       efficiency=ratios(rates[count], [devices * rate for rate in rates[1]]))
        add_row(options, report, row)

    def cells(row):
        rate = row.get('images_per_second')
        return [row['processes'], shown(row.get('threads'), '%d'), shown(rate and rate['median'], '%.2f'),
                shown(row.get('speedup') and row['speedup']['median'], '%.3f')] \
            + about_ratio(row.get('efficiency')) + [row.get('not_available', '')]

    print_report(options, report, ['processes', 'threads each', 'images/s in all', 'against one', 'efficiency']
                 + RATIO[1:] + ['note'], cells)


# ---- the table without a command

OVERVIEW_SECONDS = 170  # with the start of Python and PyTorch
OVERVIEW_PAIRS = 15  # at most


def other_programs_seconds():
    """Processor time of other programs since this machine started; None where the system does not tell."""
    try:
        with open('/proc/stat', encoding='utf-8') as file:
            user, nice, kernel, _, _, *rest = file.readline().split()[1:9]
    except (OSError, ValueError):
        return None
    return sum(map(int, (user, nice, kernel, *rest))) / os.sysconf('SC_CLK_TCK') - sum(os.times()[:4])


def overview_parts(device):
    """[(flags, the other side)]: what the table without a command measures."""
    steps = ['--steps=1', '--warmup=1'] if device.type == 'cpu' else ['--seconds=1']  # a step of a CPU takes seconds
    return [(['step', '--precision=' + precision, '--against=timm', *steps], 'timm\'s model')
            for precision in (('float32', 'bfloat16') if device.type == 'cpu' else ('bfloat16', 'O2'))] + [
                (['data', '--workers=1', '--images=320', '--distinct=16'], 'timm\'s create_loader')]


def overview_main(options, device):
    """One table: this project's images per second beside timm's, and their ratio, in three minutes.

    Each part has an equal share of the time that is left, and measures at least one pair of each row; where no time is
    left, only the first does.
    """
    rows, parts, others, begin = [], overview_parts(device), other_programs_seconds(), time.monotonic()
    for number, (words, other) in enumerate(parts):
        part = parse(words + ['--pairs=%d' % OVERVIEW_PAIRS])
        now, end = time.monotonic(), BEGIN + OVERVIEW_SECONDS
        if number and now > end:
            name = 'loading' if words[0] == 'data' else 'training, ' + words[1].partition('=')[2]
            rows.append([name, 'n/a', 'n/a', other, 'n/a', 'no time was left', 0])
            continue
        part.is_part, part.until = True, now + (end - now) / (len(parts) - number)
        if part.command == 'data':
            data_main(part, device)
        else:
            sides(part, device, ('train', 'evaluate'))
        report = part.report
        for row in report['rows']:
            what = 'loading JPEG files, ' + row['backend'] if part.command == 'data' else '%s, %s' % (
                dict(train='training', evaluate='evaluation')[row['work']], row['ours']['mode'])
            records = [row.get(side, {}) for side in ('ours', 'timm' if part.command == 'data' else 'other')]
            rates = [record.get('images_per_second', record).get('median') for record in records]
            reasons = [each['not_available'] for each in [row] + records if 'not_available' in each]
            rows.append([what] + [shown(rate, '%.1f images/s') for rate in rates] + [other] + (
                ['%.2f' % row['ratio']['median'], '%.2f to %.2f' % (row['ratio']['min'], row['ratio']['max']),
                 len(row['ratio']['samples'])] if 'ratio' in row else ['n/a', reasons[0], 0]))
    hardware, versions = report['hardware'], report['versions']
    print('%s, %s, %d cores; torch %s, torchvision %s, timm %s; %d seconds\n' % (
        hardware['device'], hardware['cpu'], hardware['cores'], versions['torch'], versions['torchvision'],
        versions['timm'], time.monotonic() - BEGIN))
    print(table(['BEiT base, 224 pixels', 'this project', 'the other', 'which is', 'times as fast', 'lowest to highest',
                 'pairs'], rows))
    print('\nAbove 1, this project is faster; the median of the pairs. Fewer than %d pairs are a trial. --all measures '
          'everything;\ndocs/performance.md explains it.' % ENOUGH_PAIRS, flush=True)
    busy = others is not None and (other_programs_seconds() - others) / (time.monotonic() - begin) / os.cpu_count()
    if busy > 0.05:
        print('The machine was busy: other programs had %.0f %% of its processor time. Repeat it when they have ended.'
              % (100 * busy), flush=True)


def all_main(options, device):
    """Every command with its defaults, one table each."""
    for name in build_parser()._subparsers._group_actions[0].choices:
        print('\n== %s' % name, flush=True)
        part = parse([name])
        try:
            part.main(part, device)
        except UserError as error:  # measure the others
            print('not measured: %s' % error, flush=True)


# ---- the program

def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    internal = {'_entry': entry_main, '_process': process_main}.get(argv[0] if argv else '')
    try:
        if internal:
            internal(json.loads(argv[1]))
            return 0
        options = parse(argv)
        options.main(options, accelerator.select_device(options.device))
        return 0
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    sys.exit(main())
