"""What the READMEs and --help say about flags, scripts, files, sections and tests, held against the repository."""

import argparse
import dataclasses
import glob
import os
import re
import subprocess

import benchmark
import pytest

import average_checkpoints
import flags
import run_class_finetuning
import run_export
import run_predict
from beit import config
from beit.errors import UserError
from helpers import ROOT, cannot_run
from structure import product_files

pytestmark = pytest.mark.current_only

PROGRAMS = {'run_class_finetuning.py': run_class_finetuning, 'run_predict.py': run_predict,
            'run_export.py': run_export, 'average_checkpoints.py': average_checkpoints}
READMES = ('README.md', 'README.zh-CN.md')
PAGES = READMES + ('CONTRIBUTING.md', 'checkpoints/README.md') + tuple(
    os.path.relpath(path, ROOT) for path in sorted(glob.glob(os.path.join(ROOT, 'docs', '*.md'))))

# In the two READMEs: the section that holds a program's flags.
SECTIONS = {'run_class_finetuning.py': ('Flags', '参数说明'), 'run_predict.py': ('Predict', '预测'),
            'run_export.py': ('Export', '导出'), 'average_checkpoints.py': ('Average', '平均')}
GROUPS = ('Run 运行', 'Model 模型', 'Optimizer 优化器', 'Augmentation 数据增强', 'Fine-tuning 微调', 'Data 数据',
          'Output 输出', 'Precision 精度', 'Distributed 分布式')

# Headings that say the same, in the English order. The Chinese README keeps the order of Ascend's ModelZoo.
HEADINGS = (
    ('BEiT for PyTorch', 'BEiT for PyTorch'), ('Install', '准备环境'), ('Data', '准备数据集'),
    ('Weights', '获取预训练模型'), ('Train and evaluate', '训练模型'), ('Common needs', '常见需求'),
    ('More than one machine', '多机训练'), ('Look at a run', '查看一次运行'), ('Flags', '参数说明'),
    ('Precision', '混合精度'), ('Use a model', '使用模型'), ('Predict', '预测'), ('Export', '导出'),
    ('Average', '平均'), ('Checkpoints', '检查点'), ('Reliability', '可靠性'), ('Resuming', '续训'),
    ('What is written', '写出的文件'),
    ('Several processes', '多进程'), ('Bad images', '坏图片'), ('Loss and gradients', 'loss 与梯度'),
    ('How it is shown', '如何验证'), ('Ascend', '昇腾 NPU'), ('Quick start', '昇腾快速开始'),
    ('Versions that belong together', '配套版本'), ('What was run on an NPU', '在 NPU 上运行过什么'),
    ('Precision on Ascend', '昇腾上的精度'), ('Fused attention', '融合注意力'), ('Compiled operators', '算子编译'),
    ('Environment switches', '环境变量'), ('Errors and their cure', '错误与处理'), ('Performance', '性能'),
    ('Results', '训练结果展示'), ('Differences from the reference', '与参考实现的差异'),
    ('What was run, and what was not', '已运行与未运行'), ('Files', '文件说明'), ('FAQ', 'FAQ'))
CHINESE_ONLY = {'概述', '简述', '快速开始', '准备训练环境', '开始训练', '版本说明', '变更'}

# Defaults that are told in words, as no literal says them: in English and in Chinese.
IN_WORDS = {
    '--opt_betas': ('the optimizer\'s', '优化器自带'), '--weight_decay_end': ('weight_decay', 'weight_decay'),
    '--num_workers': ('one per processor, at most 10', '每个处理器一个，最多 10'),
    '--crop_pct': ('224/256, from 384 px on 1.0', '224/256；384 像素起 1.0'), '--use_mean_pooling': ('mean', '均值'),
    '--amp_dtype': ('float16; on a CPU bfloat16', 'float16；CPU 为 bfloat16'),
    '--loss_scale': ('128 for float16, else 1', 'float16 为 128，否则 1'),
}
IN_WORDS_ELSEWHERE = {  # told for a program alone; only that the cell says something is looked at
    'run_predict.py': {'--amp_dtype', '--crop_pct', '--format', '--attention_block', '--attention_dir', '--model',
                       '--input_size', '--num_workers'},
    'run_export.py': {'--resume', '--format', '--output', '--opset', '--model', '--input_size'},
    'average_checkpoints.py': {'--best'},
}
SCRIPT_OPTIONS = {'--nproc_per_node', '--nnodes', '--node_rank', '--master_addr', '--master_port', '--max_restarts',
                  '--help'}
TEST_OPTIONS = {'--stack', '--lint', '--soak', '--fast', '--ci', '--help', '--durations', '--ignore', '--deselect'}


def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as file:
        return file.read()


def without_code(text):
    return re.sub(r'(?m)^[ \t>]*```.*?^[ \t>]*```', '', text, flags=re.S)


def headings(name):
    return re.findall(r'(?m)^(#+) (.*?)\s*$', without_code(read(name)))


def section(name, title):
    """What stands beneath the last heading of this title, with the smaller headings in it."""
    text = read(name)
    start = [match for match in re.finditer(r'(?m)^(#+) (.*?)\s*$', text) if match.group(2) == title][-1]
    end = re.search(r'(?m)^#{1,%d} ' % len(start.group(1)), text[start.end():])
    return text[start.end():][:end.start() if end else None]


def rows(text):
    """The cells of each table row."""
    return [[cell.strip() for cell in re.split(r'(?<!\\)\|', line.strip())[1:-1]]
            for line in text.splitlines() if line.strip().startswith('|')]


def flag_rows(name, program):
    """[(flags, the default's cell)] of a program's tables in a README."""
    text = section(name, SECTIONS[program][READMES.index(name)])
    return [(re.findall(r'`(--[\w-]+)`', cells[0]), cells[1]) for cells in rows(text)
            if cells[0].startswith('`--') and len(cells) == 3]


def shown_actions(program):
    """The parser's actions that --help shows, but for -h and the images of run_predict.py."""
    return [action for action in PROGRAMS[program].build_parser()._actions
            if action.help != argparse.SUPPRESS and action.option_strings and action.dest != 'help']


def says(text, default):
    """Whether a cell, or what stands in brackets at the end of a help line, is this default."""
    text = text.replace('\\|', '|').strip('`')
    if default is True or default is False:
        return text.split(';')[0] in (('on', '开') if default else ('off', '关'))
    if default is None or default in ('', []):
        return text.partition(';')[0].partition(':')[0] in ('none', '无', 'empty', '空')
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
                and action.dest not in ('best', 'num_workers'):
            assert says(told.split('; off by')[0], action.default), (line, action.default)
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_help_has_the_groups_of_the_tables_and_examples():
    shown = run_class_finetuning.build_parser().format_help()
    groups = re.findall(r'(?m)^([a-z-]+):$', shown)
    assert groups[1:groups.index('examples')] == [name.split()[0].lower() for name in GROUPS]
    for index, name in enumerate(READMES):
        text = section(name, SECTIONS['run_class_finetuning.py'][index])
        assert re.findall(r'(?m)^\*\*(.*)\*\*$', text) == [group.split()[index] for group in GROUPS]
    examples = shown.split('\nexamples:')[1]
    for needed in ('--data_path=demo', '--finetune', '--auto_resume', '--eval --resume'):
        assert needed in examples
    groups = {group.title: {action.option_strings[0] for action in group._group_actions if action.option_strings}
              for group in run_class_finetuning.build_parser()._action_groups}
    for index, name in enumerate(READMES):  # a flag stands in the table of its group
        text = section(name, SECTIONS['run_class_finetuning.py'][index])
        for group, body in re.findall(r'(?ms)^\*\*(.*?)\*\*$(.*?)(?=^\*\*|\Z)', text):
            title = [known.split()[0] for known in GROUPS if known.split()[index] == group][0].lower()
            for first in (re.match(r'\| `(--\w+)`', line) for line in body.splitlines()):
                assert not first or first.group(1) in groups[title], (name, group, first.group(1))


@pytest.mark.parametrize('program, wrong, near', [
    ('run_class_finetuning.py', '--epoch', '--epochs'), ('run_predict.py', '--topk', '--top_k'),
    ('run_class_finetuning.py', '--lerning_rate', '--lr'), ('run_class_finetuning.py', '--bs', '--batch_size'),
    ('run_class_finetuning.py', '--data-dir', '--data_path'), ('run_export.py', '--checkpoint', '--resume'),
    ('run_predict.py', '--atention', '--attention'), ('run_export.py', '--formt', '--format'),
    ('run_export.py', '--over-write', '--overwrite'), ('average_checkpoints.py', '--input', '--inputs'),
    ('average_checkpoints.py', '--use-em', '--use_ema')])
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
    parsed = run_class_finetuning.build_parser().parse_args([])
    assert flags.config_from(parsed, kind) == kind()


def test_a_flag_without_effect_is_declared_so():
    ignored = flags.without_effect()
    assert {'output_dir', 'num_workers', 'device', 'resume', 'curves'} < ignored
    assert not {'lr', 'seed', 'model', 'amp', 'loss', 'data_backend', 'clip_grad'} & ignored
    assert ignored < set(vars(run_class_finetuning.build_parser().parse_args([])))


@pytest.mark.parametrize('program', sorted(PROGRAMS))
@pytest.mark.parametrize('name', READMES)
def test_the_flag_tables_are_the_programs_flags(name, program):
    table = flag_rows(name, program)
    first = [names[0] for names, _ in table]
    actions = {action.option_strings[0]: action for action in shown_actions(program)}
    assert sorted(first) == sorted(actions)
    known = PROGRAMS[program].build_parser()._option_string_actions
    for names, default in table:
        action = actions[names[0]]
        for flag in names:
            assert known[flag.replace('-', '_').replace('__', '--', 1)].dest == action.dest, flag
        if action.default is True:  # the one that turns it off stands beside it
            assert len(names) == 2, names
        if names[0] in IN_WORDS_ELSEWHERE.get(program, ()):
            continue
        if names[0] in IN_WORDS:
            assert default == IN_WORDS[names[0]][READMES.index(name)]
        else:
            assert says(default, action.default), (names, default, action.default)


@pytest.mark.parametrize('program', sorted(PROGRAMS))
def test_both_readmes_have_the_same_rows(program):
    english, chinese = (flag_rows(name, program) for name in READMES)
    assert [names for names, _ in english] == [names for names, _ in chinese]


# ---- sections and links

def test_the_readmes_have_the_same_sections():
    english, chinese = ([title for _, title in headings(name)] for name in READMES)
    assert english == [pair[0] for pair in HEADINGS]
    assert sorted(set(chinese) - CHINESE_ONLY) == sorted(pair[1] for pair in HEADINGS)
    assert set(chinese) > CHINESE_ONLY
    for titles in (english, chinese):  # a second one of the same title would have no link of its own
        assert len(set(titles)) == len(titles)


def anchor(title):
    """What GitHub calls a heading in links: lower case, without punctuation, hyphens for blanks."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


@pytest.mark.parametrize('name', PAGES + ('CHANGELOG.md',))
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


FOLDERS = {'beit/', 'test/', 'tests/', 'benchmarks/', 'docs/'}


@pytest.mark.parametrize('name', READMES)
def test_the_readmes_say_where_to_look(name):
    text = section(name, HEADINGS[-2][READMES.index(name)])
    assert {found for row in rows(text) for found in re.findall(r'^`(\w+/)`$', row[0])} == FOLDERS
    others = {name.split('/')[0] + '/' for name in tracked() if re.match(r'\w+/', name)} - FOLDERS
    assert others == {'checkpoints/', 'recipes/'}
    assert '(docs/architecture.md)' in text and '(CONTRIBUTING.md)' in text
    for file in re.findall(r'`(\w+\.(?:py|sh))`', text):
        assert os.path.isfile(os.path.join(ROOT, file)) or os.path.isfile(os.path.join(ROOT, 'test', file)), file


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
    """Each file of CONTRIBUTING.md's table is there, at most two a row, and defines what is named after it."""
    table = [row for row in rows(section('CONTRIBUTING.md', 'Where is X changed?')) if '`' in row[1]]
    assert len(table) == 11
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


def test_the_changelogs_versions_have_links():
    text = read('CHANGELOG.md')
    links = dict(re.findall(r'(?m)^\[(.+?)\]: (\S+)$', text))
    assert set(re.findall(r'(?m)^## \[(.+?)\]', text)) == set(links)
    for target in links.values():
        path, _, part = target.partition('#')
        assert not part or part in [anchor(title) for _, title in headings(path)], target


@pytest.mark.parametrize('name', READMES)
def test_scripts_and_tests_that_are_named_exist(name):
    text = read(name)
    scripts = set(re.findall(r'test/\w+\.sh', text))
    assert scripts == {'test/' + os.path.basename(path) for path in glob.glob(os.path.join(ROOT, 'test', '*.sh'))}
    sources = glob.glob(os.path.join(ROOT, 'tests', '**', '*.py'), recursive=True)
    files = {os.path.basename(path) for path in sources}
    tests = {found for path in sources for found in re.findall(r'(?m)^\s*def (test_\w+)', read(path))}
    named = re.findall(r'`(?:tests/)?(test_\w+)(\.py|…)?`', text)
    assert len(named) > 30
    for test, ending in named:
        if ending == '.py':
            assert test + ending in files, test
        elif ending:
            assert any(known.startswith(test) for known in tests), test
        else:
            assert test in tests, test


# ---- commands

def commands(name):
    """The commands of code blocks and of `python …` and `bash …` in the text, in one line each."""
    text = read(name)
    blocks = re.findall(r'(?ms)^[ \t>]*```(?:bash|sh)?\n(.*?)^[ \t>]*```', text)
    lines = [line.strip() for block in blocks for line in re.sub(r'\\\n\s*', '', block).splitlines()]
    return lines + re.findall(r'`((?:[A-Z_]+=\S+ )*(?:python|bash) [^`]+)`', without_code(text))


def known_flags(script, words):
    """The flags that a command takes; None for a program that is not ours to know."""
    training = set(run_class_finetuning.build_parser()._option_string_actions)
    if script in PROGRAMS:
        return set(PROGRAMS[script].build_parser()._option_string_actions)
    if script == 'test/run_tests.sh':
        return TEST_OPTIONS
    if script.startswith('tests/'):
        return set()
    if script == 'benchmarks/benchmark.py':
        subs = benchmark.build_parser()._subparsers._group_actions[0].choices
        return set(subs[words[0]]._option_string_actions) | (training if '--' in words else set())
    return training | SCRIPT_OPTIONS


@pytest.mark.parametrize('name', PAGES)
def test_commands_name_files_and_flags_that_exist(name):
    seen = 0
    for command in commands(name):
        command = command.split('  #')[0]
        found = re.search(r'(?:^|\s)((?:\./)?(?:tests?/|benchmarks/)?\w+\.(?:py|sh))(?=\s|$)', command)
        if not found or not re.match(r'(?:[A-Z_]+=\S+ )*(?:python|bash|torchrun|source)\b', command):
            continue
        seen += 1
        script, words = found.group(1).replace('./', ''), command[found.end():].split()
        assert os.path.isfile(os.path.join(ROOT, script)), command
        given = {re.sub(r'(?<=\w)-', '_', word.partition('=')[0]) for word in words
                 if re.match(r'--\w', word)}
        assert given <= known_flags(script, words), (command, given - known_flags(script, words))
    assert seen or name.endswith(('comparison.md', 'architecture.md'))


def test_flags_that_the_text_names_exist():
    """`--flag` or `--flag=value` or `--flag value` in backticks is a flag of one of the programs."""
    known = set(SCRIPT_OPTIONS | TEST_OPTIONS)
    for program in PROGRAMS.values():
        known |= set(program.build_parser()._option_string_actions)
    for sub in benchmark.build_parser()._subparsers._group_actions[0].choices.values():
        known |= set(sub._option_string_actions)
    assert flags.build_parser()._option_string_actions.keys() < known
    foreign = {'--key', '--use_env', '--requeue', '--signal', '--shm_size', '--no_amp'}
    for name in READMES:
        for flag in re.findall(r'`(--[a-z][\w-]*)(?=[`= ])', read(name)):
            assert re.sub(r'(?<=\w)-', '_', flag) in known | foreign, (name, flag)
