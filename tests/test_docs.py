"""The worked example of docs/digits.md: its commands, run in order, print the output that the page shows."""

import csv
import glob
import json
import os
import re
import shlex

import pytest
from PIL import Image

import average_checkpoints
import run_class_finetuning
import run_export
import run_predict
from beit.data import locations
from helpers import ROOT, needs_extra

pytestmark = pytest.mark.current_only

PROGRAMS = {'run_class_finetuning.py': run_class_finetuning.run, 'run_predict.py': run_predict.run,
            'run_export.py': run_export.run, 'average_checkpoints.py': average_checkpoints.run}
FIXED = (r'(\b\w+_patch\d+_\d+\b|\b\d+x\d+\b|\d+ classes|[\w./-]+\.(?:png|pth|onnx|csv)|Acc@\d|float32|'
         r'\d+ test images|Checked \d+ images: \d+ cannot|of 3 checkpoints|^\d+ images)')
NUMBER = r'\d+(?::\d+)*(?:\.\d+)?(?:e[-+]\d+)?'


def steps():
    """[(commands, the lines shown after them)]: the page's bash blocks and the text blocks that follow."""
    with open(os.path.join(ROOT, 'docs', 'digits.md'), encoding='utf-8') as file:
        blocks = re.findall(r'```(bash|text)\n(.*?)```', file.read(), re.S)
    found = []
    for kind, block in blocks:
        if kind == 'bash':
            found.append((block.replace('\\\n', ' ').splitlines(), []))
        else:
            found[-1][1].extend(block.splitlines())
    return found


def pattern(line):
    """A pattern of the line on any machine: figures may vary; names and sizes may not."""
    parts = re.split(FIXED, line)
    return ''.join(re.escape(part) if place % 2 else NUMBER.join(map(re.escape, re.split(NUMBER, part)))
                   for place, part in enumerate(parts))


def accuracies(out):
    return [float(found) for found in re.findall(r'(?m)^Accuracy of the network on the 360 test images: (.*)%$', out)]


@pytest.fixture(scope='module')
def example(tmp_path_factory):
    """(folder, [output of each step]) of the page, run once in a new folder, in which data/digits is made."""
    folder, outputs = tmp_path_factory.mktemp('example'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(str(folder))
        patch.setattr(locations, 'project_root', lambda: str(folder))
        yield folder, outputs


@needs_extra('matplotlib', 'onnx', 'onnxscript', 'onnxruntime')
def test_the_worked_example_gives_the_output_shown(example, capfd):
    folder, outputs = example
    for lines, shown in steps():
        for line in lines:
            words = shlex.split(line)
            assert words[0] == 'python'
            assert PROGRAMS[words[1]](words[2:]) == 0, line
        captured = capfd.readouterr()
        outputs.append(captured.out + captured.err)
        assert shown, lines
        for line in shown:
            assert re.search('(?m)^%s$' % pattern(line), outputs[-1]), (line, outputs[-1])
    assert len(outputs) == 7
    training, evaluation, average = accuracies(outputs[1]), accuracies(outputs[2]), accuracies(outputs[5])
    assert len(training) == 6 and evaluation == [max(training)] and evaluation[0] > 30 and average[0] > 20
    with open(str(folder / 'digits' / 'figures.json'), encoding='utf-8') as file:
        assert str(evaluation[0])[:5] in file.read()
    with open(str(folder / 'digits' / 'summary.json'), encoding='utf-8') as file:
        assert json.load(file)
    for name in ('report.html', 'curves.png', 'log.txt', 'args.yaml', 'checkpoint-best.onnx', 'average.pth'):
        assert os.path.getsize(str(folder / 'digits' / name)) > 100
    with open(str(folder / 'digits' / 'sevens.csv'), encoding='utf-8') as file:
        assert len(list(csv.DictReader(file))) == 36
    pictures = glob.glob(str(folder / 'digits' / 'looks' / '**' / '*.attention.png'), recursive=True)
    assert len(pictures) == 36
    with Image.open(pictures[0]) as picture:
        assert len(set(picture.convert('RGB').getdata())) > 10
