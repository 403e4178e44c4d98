"""README.md, docs/, CHANGELOG.md, CONTRIBUTING.md and --help, compared with the repository."""

import dataclasses
import glob
import os
import re
import subprocess

import benchmark
import flags_page
import pytest

import flags
import run_class_finetuning
from beit import config
from beit.errors import UserError
from docs_commands import (
    RUN_IN_ORDER,
    TEST_OPTIONS,
    anchor,
    blocks,
    check_command,
    commands,
    headings,
    read,
    rows,
    section,
    shown_actions,
    without_code,
)
from flags_page import PROGRAMS
from helpers import ROOT, cannot_run
from structure import product_files

pytestmark = pytest.mark.current_only

DOCS = tuple(os.path.relpath(path, ROOT) for path in sorted(glob.glob(os.path.join(ROOT, 'docs', '*.md')))
             if not path.endswith('.zh-CN.md'))
PAGES = ('README.md', 'CONTRIBUTING.md', 'checkpoints/README.md') + DOCS
CHINESE = ('README.zh-CN.md', 'docs/ascend.zh-CN.md', 'docs/flags.zh-CN.md')  # compared in test_chinese.py
SCRIPT_OPTIONS = {'--nproc_per_node', '--nnodes', '--node_rank', '--master_addr', '--master_port', '--max_restarts',
                  '--help'}


def says(text, default):
    """Whether the brackets at the end of a help line hold this default."""
    if default is True or default is False:
        return text.split(';')[0] == ('on' if default else 'off')
    try:
        return float(text) == float(default)
    except ValueError:
        return text == default


# ---- --help

@pytest.mark.parametrize('program', sorted(PROGRAMS))
def test_a_flag_is_one_line_of_help_with_its_default(program, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    shown = PROGRAMS[program].build_parser().format_help()
    for action in shown_actions(program):
        names = ', '.join(action.option_strings)
        line = [line for line in shown.splitlines() if line.startswith('  %s  ' % names)]
        assert len(line) == 1, (names, line)
        assert len(line[0]) <= 100 and line[0].endswith(')') and '(' in line[0], line
        told = line[0][line[0].rindex('(') + 1:-1] if '))' not in line[0] else ''
        if isinstance(action.default, (bool, int, float)) and not isinstance(action.default, str) \
                and action.dest not in ('best', 'num_workers') and told != 'the checkpoint\'s, else 224':
            assert says(told.split('; off by')[0], action.default), (line, action.default)
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_help_has_the_groups_of_the_flags_page_and_examples():
    shown = run_class_finetuning.build_parser().format_help()
    groups = re.findall(r'(?m)^([a-z-]+):$', shown)
    page = section('docs/flags.md', 'run_class_finetuning.py')
    assert groups[1:groups.index('examples')] == [name.lower() for name in re.findall(r'(?m)^\*\*(.*)\*\*$', page)]
    examples = shown.split('\nexamples:')[1]
    for needed in ('--data_path=demo', '--finetune', '--auto_resume', '--eval --resume'):
        assert needed in examples


@pytest.mark.parametrize('program, wrong, near', [
    ('run_class_finetuning.py', '--epoch', '--epochs'), ('run_predict.py', '--topk', '--top_k'),
    ('run_class_finetuning.py', '--lerning_rate', '--lr'), ('run_class_finetuning.py', '--bs', '--batch_size'),
    ('run_class_finetuning.py', '--data-dir', '--data_path'), ('run_export.py', '--checkpoint', '--resume'),
    ('run_predict.py', '--atention', '--attention'), ('run_export.py', '--formt', '--format'),
    ('run_export.py', '--over-write', '--overwrite'), ('average_checkpoints.py', '--input', '--inputs'),
    ('average_checkpoints.py', '--use-em', '--use_ema'), ('run_linear_eval.py', '--kn', '--knn')])
def test_an_unknown_flag_finds_the_nearest(program, wrong, near):
    with pytest.raises(UserError, match=r'%s: unknown flag; did you mean.* %s\b' % (wrong.replace('-', '[-_]'), near)):
        PROGRAMS[program].build_parser().parse_args([wrong + '=1'])


def test_other_names_are_of_flags_that_there_are():
    parser = run_class_finetuning.build_parser()
    known = {name[2:] for name in parser._option_string_actions}
    assert parser.synonyms and set(parser.synonyms.values()) <= known
    assert not set(parser.synonyms) & known


# ---- flags

@pytest.mark.parametrize('kind', [kind for _, kind in sorted(vars(config).items()) if dataclasses.is_dataclass(kind)])
def test_settings_have_the_defaults_of_their_flags(kind):
    program = flags.EXPORT if kind is config.ExportConfig else flags.TRAINING
    assert flags.config_from(flags.build_parser(program).parse_args([]), kind) == kind()


def test_a_flag_without_effect_is_declared_so():
    ignored = flags.without_effect()
    assert {'output_dir', 'num_workers', 'device', 'resume', 'curves'} < ignored
    assert not {'lr', 'seed', 'model', 'amp', 'loss', 'data_backend', 'clip_grad'} & ignored
    assert ignored - {'knn'} < set(vars(run_class_finetuning.build_parser().parse_args([])))  # run_linear_eval.py's


@pytest.mark.parametrize('path', sorted(flags_page.pages()))
def test_the_flags_page_is_up_to_date(path):
    assert read(path) == flags_page.pages()[path], 'run: python tests/flags_page.py'


@pytest.mark.parametrize('program', sorted(PROGRAMS))
def test_the_flags_page_has_each_flag_with_its_default(program):
    table = {cells[0].split('`')[1]: cells for cells in rows(section('docs/flags.md', program))
             if cells[0].startswith('`--')}
    actions = {action.option_strings[0]: action for action in shown_actions(program)}
    assert set(table) == set(actions)
    for name, action in actions.items():
        names, default, meaning = table[name]
        assert meaning and default
        if default.startswith('`') and action.default is not None:  # other defaults are a phrase
            assert says(default.strip('`').replace('\\|', '|'), action.default), (name, default, action.default)
        if action.default is True:  # the flag that turns it off follows
            assert names.count('`--') == 2, names


# ---- pages and links

def test_readme_is_short():
    assert len(read('README.md').encode()) <= 12 * 1024


@pytest.mark.parametrize('name', DOCS)
def test_a_page_opens_with_its_question_and_a_command(name):
    opening = re.split(r'(?m)^## ', read(name))[0]
    assert re.match(r'# [^\n]*\?(?: |\n)|# [^\n]*, and why\?\n', opening), opening.splitlines()[0]
    assert '```' in opening
    assert '](%s)' % name in section('README.md', 'Pages')


@pytest.mark.parametrize('name', PAGES + CHINESE)
def test_headings_of_a_page_differ(name):
    titles = [title for _, title in headings(name)]
    assert len(set(titles)) == len(titles)


def test_readme_names_the_versions_that_requirements_allow():
    required = dict(re.findall(r'(?m)^(torch|torchvision)>=([\d.]+,<[\d.]+)', read('requirements.txt')))
    for name, bounds in required.items():
        lowest, below = bounds.split(',<')
        major, minor = below.split('.')[:2]
        shown = '%s to %s.%d' % ('.'.join(lowest.split('.')[:2]), major, int(minor) - 1)
        assert {'torch': 'PyTorch ', 'torchvision': 'torchvision '}[name] + shown in section('README.md', 'Install')


@pytest.mark.parametrize('name', PAGES + CHINESE + ('CHANGELOG.md',))
def test_links_lead_somewhere(name):
    for target in re.findall(r'\]\(([^)\s]+)\)', without_code(read(name))):
        if re.match(r'[a-z]+:', target):
            continue
        path, _, part = target.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert os.path.exists(os.path.join(ROOT, path)), target
        if part:
            assert part in [anchor(title) for _, title in headings(path)], target


# ---- files, scripts, tests

def tracked():
    try:
        listed = subprocess.check_output(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                                         cwd=ROOT, stderr=subprocess.DEVNULL).decode().split('\0')
    except (OSError, subprocess.CalledProcessError):
        cannot_run('git', 'this is no clone, or there is no git to list its files')
    return [name for name in listed if name and os.path.exists(os.path.join(ROOT, name))]


FOLDERS = {'beit/', 'recipes/', 'test/', 'tests/', 'benchmarks/', 'docs/'}


def test_the_map_has_every_folder():
    listed = {found for row in rows(read('docs/architecture.md')) for found in re.findall(r'^`(\w+/)`$', row[0])}
    assert listed == FOLDERS
    assert {name.split('/')[0] + '/' for name in tracked() if re.match(r'\w+/', name)} - FOLDERS == {'checkpoints/'}


def test_the_map_has_every_module_once_and_no_other():
    cells = [row[0].strip('`') for row in rows(read('docs/architecture.md')) if row[0].endswith('.py`')]
    assert len(cells) == len(set(cells))
    assert set(cells) == {path for path in product_files() if not path.endswith('__init__.py')}
    for path in re.findall(r'`([\w/]+\.py)`', read('docs/architecture.md')):
        assert os.path.isfile(os.path.join(ROOT, path)), path


def names_in(path):
    """Functions, classes, methods and constants that a file defines."""
    return set(re.findall(r'(?m)^\s*(?:def|class) (\w+)|^(\w+)\b[^=\n(]* = ', read(path)))


def test_where_something_is_changed_exists():
    """Each file of CONTRIBUTING.md's table exists, at most two a row, and defines the names after it."""
    table = [row for row in rows(section('CONTRIBUTING.md', 'Where is X changed?')) if '`' in row[1]]
    assert len(table) == 14
    for row in table:
        assert 1 <= len(re.findall(r'`[\w/]+\.py`', row[1])) <= 2, row
        assert re.search(r'`test_\w+`', row[2]), row
        for cell in row[1:]:
            for path, rest in re.findall(r'`([\w/]+\.py)`: ((?:(?!`[\w/]+\.py`).)*)', cell):
                defined = {name for pair in names_in(path) for name in pair}
                named = re.findall(r'`([a-zA-Z_]+)`', rest)
                assert named and set(named) & defined, (path, rest)
                words = {'values', 'MetricSpec', 'Metric'} & set(re.findall(r'\w+', read(path)))
                assert set(named) - defined <= words, (path, set(named) - defined)


def test_the_changelogs_versions_are_dated_and_in_order():
    versions = re.findall(r'(?m)^## (.+)$', read('CHANGELOG.md'))
    assert versions[0] == 'Unreleased'
    dated = [re.match(r'(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$', version).groups() for version in versions[1:]]
    assert dated == sorted(dated, reverse=True)


def test_readme_names_the_scripts():
    scripts = {'test/' + os.path.basename(path) for path in glob.glob(os.path.join(ROOT, 'test', 'train_*.sh'))}
    assert set(re.findall(r'test/train_\w+\.sh', section('README.md', 'Train and evaluate'))) == scripts


@pytest.mark.parametrize('name', PAGES + CHINESE)
def test_scripts_and_tests_that_are_named_exist(name):
    text = read(name)
    for path in set(re.findall(r'\btests?/\w+\.(?:sh|py)', text)):
        assert os.path.isfile(os.path.join(ROOT, path)), path
    sources = glob.glob(os.path.join(ROOT, 'tests', '**', '*.py'), recursive=True)
    files = {os.path.basename(path) for path in sources}
    tests = {found for path in sources for found in re.findall(r'(?m)^\s*def (test_\w+)', read(path))}
    for test, ending in re.findall(r'`(?:tests/)?(test_\w+)(\.py)?`', text):
        assert test + ending in (files if ending else tests), test


# ---- commands

@pytest.mark.parametrize('name', PAGES + CHINESE)
def test_commands_are_parsed(name):
    for language, block in blocks(name):
        assert language in ('', 'bash', 'sh', 'python', 'text'), language
        if language in ('bash', 'sh'):
            subprocess.run(['bash', '-n', '-c', block], check=True)
    for command in commands(name):
        check_command(command)


@pytest.mark.parametrize('command', [
    'python run_predict.py --resume out --topk 3', 'python run_export.py --formats onnx',
    'bash test/train_full_1p.sh --data_path=demo --epoch=3', 'python benchmarks/benchmark.py step -- --epoch 3',
    'bash test/check_device.sh --devices=npu'])
def test_a_wrong_command_is_found(command):
    with pytest.raises((UserError, SystemExit)):
        check_command(command)


def test_every_page_with_commands_to_run_is_run():
    runs = {name for name in PAGES for language, _ in blocks(name) if language in ('bash', 'python')}
    assert runs == set(RUN_IN_ORDER) | {'docs/digits.md'}


def test_flags_that_the_text_names_exist():
    """`--flag` or `--flag=value` or `--flag value` in backticks is a flag of one of the programs."""
    known = set(SCRIPT_OPTIONS | TEST_OPTIONS)
    for program in PROGRAMS.values():
        known |= set(program.build_parser()._option_string_actions)
    for sub in benchmark.build_parser()._subparsers._group_actions[0].choices.values():
        known |= set(sub._option_string_actions)
    assert flags.build_parser()._option_string_actions.keys() < known
    foreign = {'--key', '--requeue', '--shm_size', '--signal', '--untyped', '--use_env', '--valid_labels',
               '--precision_mode'}
    for name in PAGES + CHINESE:
        for flag in re.findall(r'`(--[a-z][\w-]*)(?=[`= ])', read(name)):
            assert re.sub(r'(?<=\w)-', '_', flag) in known | foreign, (name, flag)
