"""The average of checkpoints: in float64, only of one model, and usable as a checkpoint."""

import json
import os

import numpy as np
import pytest
import torch

import average_checkpoints
import run_class_finetuning
from beit.checkpoint import inference_model
from beit.files import weights_file
from helpers import RUN

pytestmark = [pytest.mark.fast, pytest.mark.current_only]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """A folder with four checkpoints, with averaged weights, and their log."""
    output = str(tmp_path_factory.mktemp('trained') / 'out')
    assert run_class_finetuning.run(RUN + ['--data_path', data, '--epochs=4', '--lr=1e-3', '--save_ckpt_freq=1',
                                           '--model_ema', '--model_ema_decay=0.9', '--output_dir', output]) == 0
    return output


def file_of(folder, epoch):
    return os.path.join(folder, 'checkpoint-%d.pth' % epoch)


def refused(capsys, flags, *words):
    assert average_checkpoints.run(flags) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith('average_checkpoints.py: error: '), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize('key, flags', (('model', []), ('model_ema', ['--use_ema'])))
def test_the_average_is_numpys(trained, tmp_path, capsys, data, key, flags):
    output = str(tmp_path / 'new' / 'avg.pth')
    names = [file_of(trained, epoch) for epoch in (1, 3, 0)]
    assert average_checkpoints.run(['--inputs'] + names + ['--output', output] + flags) == 0
    assert '3 checkpoints' in capsys.readouterr().out
    states = [weights_file.load_weights_file(name)[key] for name in names]
    result = weights_file.load_weights_file(output)
    assert sorted(result) == ['activation', 'args', 'averaged', 'classes', 'data', 'model', 'model_spec']
    assert result['classes'] == ['cat', 'dog'] and result['activation'] == 'softmax'
    for name, value in result['model'].items():
        assert value.dtype == states[0][name].dtype
        expected = np.mean([state[name].numpy().astype(np.float64) for state in states], axis=0)
        assert np.array_equal(value.numpy(), expected.astype(value.numpy().dtype)), name
    opened = inference_model.load_for_inference(output)
    assert opened.classes == ['cat', 'dog'] and torch.equal(opened.model.head.weight, result['model']['head.weight'])
    assert run_class_finetuning.run(RUN + ['--data_path', data, '--eval', '--resume', output]) == 0
    assert 'Accuracy of the network on the 22 test images' in capsys.readouterr().out


def test_the_best_of_a_folder_by_its_log(trained, tmp_path, capsys):
    folder = tmp_path / 'copy'
    folder.mkdir()
    for epoch in range(4):
        os.link(file_of(trained, epoch), file_of(str(folder), epoch))
    os.link(file_of(trained, 0), str(folder / 'checkpoint-2-step1.pth'))
    lines = [{'epoch': epoch, 'test_acc1': figure, 'test_ema_acc1': 100 - figure}
             for epoch, figure in enumerate((50., 80., 60., 70.))]
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines) + 'no json\n')
    for flags, expected in (([], [1, 3]), (['--use_ema'], [0, 2])):
        output = str(tmp_path / ('avg%d.pth' % len(flags)))
        assert average_checkpoints.run(['--inputs', str(folder), '--best=2', '--output', output] + flags) == 0
        assert weights_file.load_weights_file(output)['averaged'] == ['checkpoint-%d.pth' % epoch for epoch in expected]
    assert average_checkpoints.run(['--inputs', str(folder), '--output', str(tmp_path / 'all.pth')]) == 0
    assert len(weights_file.load_weights_file(str(tmp_path / 'all.pth'))['averaged']) == 4
    refused(capsys, ['--inputs', str(folder), '--best=5', '--output', str(tmp_path / 'x.pth')], '--best 5', '4')
    lines[1].pop('test_acc1')  # as with --val_interval
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    output = str(tmp_path / 'seldom.pth')
    assert average_checkpoints.run(['--inputs', str(folder), '--best=2', '--output', output]) == 0
    assert weights_file.load_weights_file(output)['averaged'] == ['checkpoint-3.pth', 'checkpoint-2.pth']
    refused(capsys, ['--inputs', str(folder), '--best=4', '--output', str(tmp_path / 'x.pth')], '--best 4', '3 were')
    (folder / 'log.txt').write_text('')
    refused(capsys, ['--inputs', str(folder), '--best=2', '--output', str(tmp_path / 'x.pth')], '--best 2', 'log.txt')


def test_a_file_is_replaced_with_overwrite_only(trained, tmp_path, capsys):
    output = tmp_path / 'avg.pth'
    output.write_text('mine')
    flags = ['--inputs', file_of(trained, 0), file_of(trained, 1), '--output', str(output)]
    refused(capsys, flags, '--output', 'avg.pth', '--overwrite')
    assert output.read_text() == 'mine'
    refused(capsys, flags[:-1] + [str(tmp_path), '--overwrite'], '--output %s exists' % tmp_path)
    assert average_checkpoints.run(flags + ['--overwrite']) == 0
    assert weights_file.load_weights_file(str(output))['averaged'] == ['checkpoint-0.pth', 'checkpoint-1.pth']


def test_incompatible_checkpoints_are_refused(trained, tmp_path, capsys):
    first, output = file_of(trained, 0), str(tmp_path / 'avg.pth')
    base = ['--output', output, '--inputs', first]
    content = weights_file.load_weights_file(first)

    def other(**changes):
        path = str(tmp_path / 'other.pth')
        torch.save(dict(content, **changes), path)
        return path

    refused(capsys, base + [other(classes=['dog', 'cat'])], 'classes')  # unlike the classes of its model_spec
    spec = content['model_spec']
    refused(capsys, base + [other(classes=['dog', 'cat'], model_spec=dict(spec, classes=['dog', 'cat']))], 'classes is')
    images = dict(spec['preprocessing'], mean=[0.4, 0.5, 0.5])
    refused(capsys, base + [other(model_spec=dict(spec, preprocessing=images))], 'preprocessing: mean')
    earlier = dict(model_spec=None, args=dict(content['args'], input_size=64))  # a version that had no model_spec
    refused(capsys, base + [other(**earlier)], '--input_size is 64 (32 in the first)')
    refused(capsys, base + [other(model=dict(content['model'], extra=torch.zeros(2)))], 'extra')
    refused(capsys, base + [other(model={name: value for name, value in content['model'].items()
                                         if name != 'head.bias'})], 'head.bias')
    refused(capsys, base + [other(model=dict(content['model'], **{'head.bias': torch.tensor([1., float('nan')])}))],
            'head.bias is not finite')
    refused(capsys, base + [first], 'more than once')
    refused(capsys, base + [str(tmp_path / 'none.pth')], 'no such file')
    refused(capsys, base + [str(tmp_path)], 'holds no checkpoint')
    refused(capsys, base + [other(model_ema=None), '--use_ema'], 'holds no averaged weights')
    refused(capsys, ['--inputs', first, '--output', first], 'exists')
    refused(capsys, ['--inputs', first], '--output')
    (tmp_path / 'other.pth').write_bytes(b'damaged')
    refused(capsys, base + [str(tmp_path / 'other.pth')], 'other.pth')
    assert not os.path.exists(output)
