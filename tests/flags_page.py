"""Write docs/flags.md and docs/flags.zh-CN.md, the tables of all flags, from the parsers.

    python tests/flags_page.py

docs/flags.zh-CN.json maps each text of the English page to its Chinese text: {"random seed": "随机种子", …}. A text
without a translation stays English; the program lists these texts and exits with status 1. `test_readme.py` compares
the pages with the parsers, and `test_chinese.py` requires all translations.
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
import run_linear_eval  # noqa: E402
import run_predict  # noqa: E402

PROGRAMS = {'run_class_finetuning.py': run_class_finetuning, 'run_predict.py': run_predict,
            'run_export.py': run_export, 'average_checkpoints.py': average_checkpoints,
            'run_linear_eval.py': run_linear_eval}
TITLE = 'Which flags are there?'
NOTES = ('A value follows its flag after a blank or `=`. A flag with the default on or off takes no value: `--amp` '
         'turns it on, `--no_amp` off. `-` and `_` are the same in names. Names cannot be shortened.',
         'The scripts in `test/` pass every flag that they do not know to `run_class_finetuning.py`.',
         'This page is generated: edit `flags.py` and run `python tests/flags_page.py`.')
MODELS, OPTIMIZERS = 'Models', 'Optimizers (the prefix `lookahead_` is allowed)'
ENGLISH, CHINESE = os.path.join('docs', 'flags.md'), os.path.join('docs', 'flags.zh-CN.md')
TRANSLATIONS = os.path.join('docs', 'flags.zh-CN.json')
LINK = '(中文: [flags.zh-CN.md](flags.zh-CN.md))', '(English: [flags.md](flags.md))'


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


def load_translations():
    with open(os.path.join(ROOT, TRANSLATIONS), encoding='utf-8') as file:
        return json.load(file)


def page(text=lambda english: english, link=LINK[0]):
    """The page; `text` translates each of its texts."""
    lines = ['# ' + text(TITLE), '', link, '', '```bash', 'python run_class_finetuning.py --help', '```']
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
    return '\n'.join(lines) + '\n'


def pages():
    """{path: content} of the English and the Chinese page."""
    translations = load_translations()
    return {ENGLISH: page(), CHINESE: page(lambda english: translations.get(english, english), LINK[1])}


def differences(translations):
    """(texts of the page without a translation, translations of no text), each in order."""
    texts = {}
    page(lambda english: texts.setdefault(english, english))
    return ([english for english in texts if english not in translations],
            [english for english in translations if english not in texts])


if __name__ == '__main__':
    for name, content in pages().items():
        with open(os.path.join(ROOT, name), 'w', encoding='utf-8') as file:
            file.write(content)
    missing, unused = differences(load_translations())
    for english in missing:
        print('%s lacks a translation of: %s' % (TRANSLATIONS, english))
    for english in unused:
        print('%s translates a text that is no longer used: %s' % (TRANSLATIONS, english))
    sys.exit(1 if missing or unused else 0)
