"""Read the sections, tables and commands of README.md and docs/; parse the commands with the programs' parsers."""

import argparse
import os
import re
import shlex
import subprocess

import benchmark
import check_device

import run_class_finetuning
from flags_page import PROGRAMS
from helpers import ROOT, text

# Pages whose `bash` and `python` blocks test_end_to_end.py runs, in this order; test_docs.py runs docs/digits.md.
RUN_IN_ORDER = ('README.md', 'docs/flags.md', 'docs/data.md', 'docs/training.md', 'docs/inference.md')
TEST_OPTIONS = {'--stack', '--lint', '--soak', '--fast', '--ci', '--help', '--durations'}
# Prints each flag that a script gives to Python; its own options for the launcher are left out.
SCRIPT_FLAGS = r'''source test/common.sh; parse_options "$@"
for name in $OPTIONS; do
    case $name in nproc_per_node|nnodes|node_rank|master_*|max_restarts) continue ;; esac
    ! given $name || printf '%s\n' "--$name=${!name}"
done
printf '%s\n' ${FLAGS[@]+"${FLAGS[@]}"}'''


def read(name):
    return text(os.path.join(ROOT, name))


def without_code(page):
    return re.sub(r'(?m)^[ \t>]*```.*?^[ \t>]*```', '', page, flags=re.S)


def headings(name):
    return re.findall(r'(?m)^(#+) (.*?)\s*$', without_code(read(name)))


def section(name, title):
    """The text under the last heading of this title, with its subsections."""
    text = read(name)
    start = [match for match in re.finditer(r'(?m)^(#+) (.*?)\s*$', text) if match.group(2) == title][-1]
    end = re.search(r'(?m)^#{1,%d} ' % len(start.group(1)), text[start.end():])
    return text[start.end():][:end.start() if end else None]


def rows(text):
    """The cells of each table row."""
    return [[cell.strip() for cell in re.split(r'(?<!\\)\|', line.strip())[1:-1]]
            for line in text.splitlines() if line.strip().startswith('|')]


def shown_actions(program):
    """The parser's actions that --help shows, except -h and the images of run_predict.py."""
    return [action for action in PROGRAMS[program].build_parser()._actions
            if action.help != argparse.SUPPRESS and action.option_strings and action.dest != 'help']


def anchor(title):
    """GitHub's name of a heading in links: lower case, without punctuation, hyphens for blanks."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


def blocks(name):
    """[(language, content)] of a page's code blocks."""
    return re.findall(r'(?ms)^```(\w*)\n(.*?)^```', read(name))


def commands(name):
    """The lines of a page's `bash` and `sh` blocks, and its `python …` and `bash …` in the text."""
    lines = [line for language, block in blocks(name) if language in ('bash', 'sh')
             for line in block.replace('\\\n', ' ').splitlines()]
    return lines + re.findall(r'`((?:[A-Z_]+=\S+ )*(?:python|bash) [^`]+)`', without_code(read(name)))


def check_command(command):
    """Parse a command of this project; returns the file that it runs, or None for another command.

    Raises UserError, SystemExit or AssertionError for a wrong one.
    """
    words = [word for word in shlex.split(command, comments=True) if word != '…']
    while words and re.match(r'[A-Z_]+=', words[0]):
        words.pop(0)
    if not words or words[0] not in ('python', 'bash', 'torchrun'):
        return None
    script = next((word for word in words[1:] if word.endswith(('.py', '.sh'))), None)
    if script is None:
        return None
    assert os.path.isfile(os.path.join(ROOT, script)), command
    rest = words[words.index(script) + 1:]
    if '--config' in rest:  # the parser reads that file, which an earlier command writes
        del rest[rest.index('--config'):rest.index('--config') + 2]
    if script in PROGRAMS:
        if '--help' not in rest:
            PROGRAMS[script].build_parser().parse_args(rest)
    elif script == 'benchmarks/benchmark.py':
        own, _, training = ' '.join(rest).partition(' -- ')
        benchmark.build_parser().parse_args(own.split())
        run_class_finetuning.build_parser().parse_args(training.split())
    elif script in ('benchmarks/check_device.py', 'test/check_device.sh'):
        check_device.build_parser().parse_args(rest)
    elif script == 'test/run_tests.sh':
        assert {word.partition('=')[0] for word in rest if word.startswith('--')} <= TEST_OPTIONS, command
    elif script.startswith('test/train_'):
        given = subprocess.run(['bash', '-c', SCRIPT_FLAGS, script] + rest, cwd=ROOT, check=True,
                               stdout=subprocess.PIPE, universal_newlines=True).stdout.split('\n')
        run_class_finetuning.build_parser().parse_args([flag for flag in given if flag])
    return script
