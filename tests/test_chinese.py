"""The Chinese pages, compared with the English ones: sections, commands, flags, defaults, figures and links."""

import collections
import os
import re

import flags_page
import pytest

from docs_commands import anchor, headings, read, rows, section, shown_actions, without_code

pytestmark = pytest.mark.current_only

README, ASCEND = 'README.zh-CN.md', 'docs/ascend.zh-CN.md'
ENGLISH_PAGE = {README: 'README.md', ASCEND: 'docs/ascend.md', 'docs/flags.zh-CN.md': 'docs/flags.md'}
CHINESE_PAGE = {english: chinese for chinese, english in ENGLISH_PAGE.items()}
# Sections of README.md and their Chinese titles, in the order of both pages.
README_TITLES = {
    'BEiT for PyTorch': '简述', 'Try it': '快速开始', 'Use the environment': '激活环境', 'Install': '准备环境',
    'Data': '准备数据集', 'Weights': '获取预训练模型', 'Train and evaluate': '训练模型', 'Use a model': '使用模型',
    'Results': '训练结果展示', 'Pages': '文档'}
# The sections of the Ascend adaptation's document, in its order.
ADAPTATION_TITLES = ['概述', '简述', '准备训练环境', '准备环境', '准备数据集', '获取预训练模型', '开始训练', '训练模型',
                     '训练结果展示', '版本说明', '变更', 'FAQ']
ADAPTATION_FLAGS = {
    'model', 'data_path', 'finetune', 'output_dir', 'batch_size', 'lr', 'update_freq', 'warmup_epochs', 'epochs',
    'layer_decay', 'drop_decay', 'weight_decay', 'nb_classes', 'amp', 'device', 'opt_level', 'nproc_per_node', 'resume'}
LITERAL_TURNS = ('丢失衰减', '重复训练次数', '热身', '以其路径', '没有启动器', '说出图片', '数字随机器')
NUMBER_WORDS = {'1': 'one', '2': 'two', '4': 'four', '8': 'eight'}


def split_sections(page):
    """{title: text up to the next heading} of a page, in order."""
    hidden = re.sub(r'(?ms)^[ \t]*```.*?^[ \t]*```', lambda block: re.sub(r'[^\n]', ' ', block.group()), page)
    found = list(re.finditer(r'(?m)^#+ (.*)$', hidden))
    ends = [match.start() for match in found[1:]] + [len(page)]
    return {match.group(1): page[match.end():end] for match, end in zip(found, ends)}


def resolve(name, target):
    """(path, anchor) of a link of the page `name`; (address, '') of a link to another site."""
    if re.match(r'[a-z]+:', target):
        return target, ''
    path, _, part = target.partition('#')
    return os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name, part


def facts(name, text):
    """{kind: what a section of the page `name` shows in any language}."""
    without = without_code(text)
    prose = re.sub(r'\]\([^)\s]+\)', ']', re.sub(r'`[^`]+`', '``', without))
    targets = [resolve(name, target) for target in re.findall(r'\]\(([^)\s]+)\)', without)]
    return {'code blocks': [re.sub(r'(?m)(?<=\w) {3,}\S.*$', '', block)  # without comments at the end of a line
                            for block in re.findall(r'(?ms)^(```\w*\n.*?)^```', text)],
            'paragraphs': len(re.findall(r'\S(?:.|\n(?!\n))*', without)),
            'tables': [[len(row) for row in rows(table)] for table in re.findall(r'(?m)(?:^\|.*\n)+', without)],
            'list items': len(re.findall(r'(?m)^- ', without)),
            'code': collections.Counter(' '.join(found.split()) for found in re.findall(r'`([^`]+)`', without)),
            'links': collections.Counter(target for target in targets if name not in (
                ENGLISH_PAGE.get(target[0]), CHINESE_PAGE.get(target[0]))),  # without the link to the other language
            'figures': collections.Counter(re.findall(r'\d+(?:[.,]\d+)*', prose))}


def title_pairs(sections):
    """[(English page, title, Chinese page, title)] of the sections with the same content."""
    return ([('README.md', english, README, chinese) for english, chinese in README_TITLES.items()]
            + [('docs/ascend.md', english, ASCEND, chinese)
               for english, chinese in zip(sections['docs/ascend.md'], sections[ASCEND])]
            + [('docs/faq.md', title, README, 'FAQ') for title in sections['docs/faq.md']])


def differences(pages):
    """One line per difference of the Chinese pages from the English ones; `pages` is {path: text}."""
    sections = {name: split_sections(page) for name, page in pages.items()}
    levels = {name: re.findall(r'(?m)^#+(?= )', without_code(page)) for name, page in pages.items()}
    translated = [title for title in sections[README] if title in README_TITLES.values()]
    found = []
    if list(sections['README.md']) != list(README_TITLES):
        found.append('README.md has the sections %s: change README_TITLES' % list(sections['README.md']))
    if translated != list(README_TITLES.values()) or 'FAQ' not in sections[README]:
        found.append('%s has the sections %s' % (README, list(sections[README])))
    if levels[ASCEND] != levels['docs/ascend.md']:
        found.append('%s has the sections %s' % (ASCEND, list(sections[ASCEND])))
    if found:
        return found
    pairs = title_pairs(sections)
    anchors = {(page, anchor(title)): (chinese, anchor(name)) for page, title, chinese, name in pairs}
    anchors['docs/faq.md', ''] = README, 'faq'
    for page, title, chinese, name in pairs:
        expected, shown = facts(page, sections[page][title]), facts(chinese, sections[chinese][name])
        expected['links'] = collections.Counter(
            anchors.get(target, (CHINESE_PAGE.get(target[0], target[0]), target[1]))
            for target in expected['links'].elements())
        for kind in ('code blocks', 'paragraphs', 'tables', 'list items'):
            if shown[kind] != expected[kind]:
                found.append('%s, %s: %s: %s, not %s' % (chinese, name, kind, shown[kind], expected[kind]))
        for kind in ('code', 'links', 'figures'):
            missing, extra = expected[kind] - shown[kind], shown[kind] - expected[kind]
            if kind == 'figures':  # a number may be a word in English
                extra = [figure for figure in extra if not re.search(
                    r'\b%s\b' % NUMBER_WORDS.get(figure, '(?!)'), sections[page][title])]
            if missing or extra:
                found.append('%s, %s: %s: lacks %s, adds %s' % (chinese, name, kind, list(missing), list(extra)))
    return found


def compared_pages():
    return {name: read(name) for name in ('README.md', README, 'docs/ascend.md', ASCEND, 'docs/faq.md')}


def test_chinese_pages_have_what_the_english_have():
    found = differences(compared_pages())
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('page, old, new', [
    (README, '## 使用模型\n', ''), (README, '## FAQ\n', ''), (ASCEND, '### 4. Python 包\n', ''),
    (ASCEND, '### 3. CANN', '## 3. CANN'), (README, 'source .venv/bin/activate\n', ''),
    (README, ' --top_k 2', ' --top_k 3'), (README, '└── val\n', ''), (README, '`--val_split 0.1`', ''),
    (ASCEND, 'npu-smi info\n```', '```'), (ASCEND, '```sh\nnpu-smi', '```bash\nnpu-smi'),
    (README, '1,797', '1,798'), (ASCEND, '| 9.1.x | 未找到 | |\n', ''), (ASCEND, '，120 至 7200', ''),
    (README, '（[如何配套](docs/ascend.zh-CN.md#版本配套表)）', ''), (README, '#版本配套表', '#精度'),
    (README, '- 您的任务可能中途被终止，需要从中断的那一步继续。\n', ''), (README, '| `lost the connection', '| `lost'),
    ('README.md', '## Use a model\n', ''), ('README.md', '`--val_split 0.1`', '`--val_split 0.2`'),
    ('docs/ascend.md', '## Errors\n', ''), ('docs/faq.md', '`--clip_grad=1`', '`--clip_grad=2`')])
def test_a_difference_is_found(page, old, new):
    pages = compared_pages()
    before = differences(pages)
    assert old in pages[page]
    pages[page] = pages[page].replace(old, new, 1)
    assert set(differences(pages)) - set(before)


@pytest.mark.parametrize('chinese', sorted(ENGLISH_PAGE))
def test_a_page_and_its_translation_link_to_each_other(chinese):
    english = ENGLISH_PAGE[chinese]
    assert '](%s)' % os.path.basename(english) in read(chinese).split('\n## ')[0]
    assert '](%s)' % os.path.basename(chinese) in read(english).split('\n## ')[0]


@pytest.mark.parametrize('chinese', sorted(ENGLISH_PAGE))
def test_chinese_pages_avoid_literal_turns(chinese):
    assert not [turn for turn in LITERAL_TURNS if turn in read(chinese)]


# ---- README.zh-CN.md beside the Ascend adaptation's document

def test_the_chinese_readme_has_the_sections_of_the_adaptation():
    titles = [title for _, title in headings(README)]
    assert [title for title in titles if title in ADAPTATION_TITLES] == ADAPTATION_TITLES
    top = [title for level, title in headings(README) if level == '#'][1:]
    assert re.findall(r'(?m)^-   \[(.*?)\]', read(README)) == top
    assert re.findall(r'(?m)^  (\w+)=', read(README)) == ['url', 'commit_id', 'url', 'code_path']


def test_the_training_parameters_have_the_defaults_and_presets():
    table = {name.replace('-', '_'): cells for cells in rows(section(README, '训练参数'))
             for name in re.findall(r'`--(.*?)`', cells[0])}
    assert set(table) >= ADAPTATION_FLAGS
    page = {name: cells for cells in rows(section('docs/flags.zh-CN.md', 'run_class_finetuning.py'))
            for name in re.findall(r'`--(.*?)`', cells[0])}
    for name in set(table) - {'nproc_per_node'}:
        assert table[name][1] == page[name][1], name
    presets = dict(re.findall(r'--([\w-]+)=([^\s`]+)', section('docs/training.md', 'Presets').split('| demo')[0]))
    presets.update(batch_size='64', epochs='30', update_freq='1')
    for name, value in presets.items():
        assert table[name.replace('-', '_')][2].startswith('`%s`' % value), name


def test_the_changes_name_each_version():
    versions = re.findall(r'(?m)^## (\d\S+) - (\S+)$', read('CHANGELOG.md'))
    shown = dict(re.findall(r'(?m)^(\d{4}\.\d\d\.\d\d)：(.*)$', section(README, '变更')))
    for version, date in versions:
        assert version in shown[date.replace('-', '.')], version
    assert '2022.10.24' in shown


# ---- docs/flags.zh-CN.md

def test_each_text_of_the_flags_page_is_translated():
    missing, unused = flags_page.differences(flags_page.load_translations())
    assert not missing, '%s lacks: %s' % (flags_page.TRANSLATIONS, missing)
    assert not unused, '%s translates texts that are no longer used: %s' % (flags_page.TRANSLATIONS, unused)


def test_a_missing_and_an_unused_translation_are_named():
    translations = flags_page.load_translations()
    translations['no such text'] = translations.pop('random seed')
    missing, unused = flags_page.differences(translations)
    assert 'random seed' in missing and 'no such text' in unused
    assert '| `--seed` | `0` | random seed |' in flags_page.page(lambda english: translations.get(english, english))


def test_translations_keep_figures_flags_files_and_choices():
    """A translation has the numbers, flags and file names of its English text, and the choices of its flag."""
    for english, chinese in flags_page.load_translations().items():
        for found in re.findall(r'--\w+|\w+\.\w+|\w+/|\d\S*\d|\d', english.replace('179 million', '1.79')):
            assert found in chinese, (english, found)
    translations = flags_page.load_translations()
    for program in flags_page.PROGRAMS:
        for action in shown_actions(program):
            english = action.help.rpartition(' (')[0]
            for choice in action.choices or ():
                if re.search(r'\b%s\b' % re.escape(str(choice)), english):
                    assert str(choice) in translations[english], (english, choice)
