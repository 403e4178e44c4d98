"""Write docs/flags.md, the tables of all flags, from the parsers; and docs/flags.zh-CN.md if its translations exist.

    python tests/flags_page.py

docs/flags.zh-CN.json maps each text of the English page to its Chinese text: {"random seed": "随机种子", …}. The
program lists the texts without a translation. `test_readme.py` compares the pages with the parsers.
"""

import argparse
import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import average_checkpoints  # noqa: E402
import modeling_finetune  # noqa: E402
import optim_factory  # noqa: E402
import run_class_finetuning  # noqa: E402
import run_export  # noqa: E402
import run_predict  # noqa: E402

PROGRAMS = {'run_class_finetuning.py': run_class_finetuning, 'run_predict.py': run_predict,
            'run_export.py': run_export, 'average_checkpoints.py': average_checkpoints}
TITLE = 'Which flags are there?'
NOTES = ('A value follows its flag after a blank or `=`. A flag with the default on or off takes no value: `--amp` '
         'turns it on, `--no_amp` off. `-` and `_` are the same in names. Names cannot be shortened.',
         'The scripts in `test/` pass every flag that they do not know to `run_class_finetuning.py`.',
         'This page is generated: edit `flags.py` and run `python tests/flags_page.py`.')
MODELS, OPTIMIZERS = 'Models', 'Optimizers (the prefix `lookahead_` is allowed)'
ENGLISH, CHINESE = os.path.join('docs', 'flags.md'), os.path.join('docs', 'flags.zh-CN.md')
TRANSLATIONS = os.path.join(ROOT, 'docs', 'flags.zh-CN.json')


def groups(program):
    """[(group, [(names, default, whether that is a value, description)])] of a program, in the order of its --help."""
    found = []
    for group in PROGRAMS[program].build_parser()._action_groups:
        rows = []
        for action in group._group_actions:
            if action.option_strings and action.dest != 'help' and action.help != argparse.SUPPRESS:
                description, _, default = action.help[:-1].rpartition(' (')
                default, _, off = default.partition('; off by ')
                names = [name for name in action.option_strings if name.count('-') == 2] + ([off] if off else [])
                is_literal = default == str(action.default) or re.match(r'-?[\d.]+(e-\d+)?$', default)
                rows.append((names, default, is_literal, description))
        if rows:
            found.append((group.title, rows))
    return found


def page(translations=None):
    """The page; with {English: Chinese} in Chinese. Raises KeyError for texts without a translation."""
    missing = []

    def text(english):
        if translations is None:
            return english
        if english not in translations:
            missing.append(english)
        return translations.get(english, english)

    lines = ['# ' + text(TITLE), '', '```bash', 'python run_class_finetuning.py --help', '```']
    for note in NOTES:
        lines += ['', text(note)]
    for program in PROGRAMS:
        lines += ['', '## ' + program]
        for title, rows in groups(program):
            lines += ['', '**%s**' % text(title[0].upper() + title[1:]), '',
                      '| %s | %s | %s |' % tuple(map(text, ('flag', 'default', 'meaning'))), '|---|---|---|']
            for names, default, is_literal, description in rows:
                lines.append('| %s | %s | %s |' % (
                    ', '.join('`%s`' % name for name in names),
                    ('`%s`' % default if is_literal else text(default)).replace('|', '\\|'),
                    text(description).replace('|', '\\|')))
    for title, names in ((MODELS, modeling_finetune.MODELS), (OPTIMIZERS, optim_factory.OPTIMIZERS)):
        lines += ['', '**%s**: %s' % (text(title), ', '.join('`%s`' % name for name in names))]
    if missing:
        raise KeyError('%s translates no %s' % (os.path.basename(TRANSLATIONS), missing))
    return '\n'.join(lines) + '\n'


def pages():
    """{path: content} of the English page, and of the Chinese page if its translations exist."""
    found = {ENGLISH: page()}
    if os.path.exists(TRANSLATIONS):
        with open(TRANSLATIONS, encoding='utf-8') as file:
            found[CHINESE] = page(json.load(file))
    return found


if __name__ == '__main__':
    for name, content in pages().items():
        with open(os.path.join(ROOT, name), 'w', encoding='utf-8') as file:
            file.write(content)
