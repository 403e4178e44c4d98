"""Exported programs in place of a checkpoint, ATC, and the model card."""

import csv
import dataclasses
import json
import os
import re
import stat
import sys
import zipfile

import numpy as np
import pytest
import torch

import beit
import modeling_finetune
import run_class_finetuning
import run_export
import run_predict
from beit.checkpoint import inference_model, sources
from beit.config import ExportConfig
from beit.outputs import export_formats, model_card
from helpers import NANO, launch, needs_extra, photo, save_random_weights, with_dynamo, with_export

QUIET = ['--no_curves', '--num_workers=0', '--device=cpu']
CLASSES = ['dog', 'cat', 'ox']  # not in the order of the folders
KINDS = {'onnx': [needs_extra('onnx', 'onnxscript', 'onnxruntime'), with_dynamo, pytest.mark.current_only],
         'torch_export': [with_export, pytest.mark.current_only], 'torchscript': []}


@pytest.fixture
def trained(tmp_path, parse):
    """trained(*flags): the path of a checkpoint of a network with random weights, and the network."""
    return lambda *flags, classes=('cat', 'grüner "Hund"', '鸟'), **more: save_random_weights(
        str(tmp_path / 'weights.pth'), parse(*(flags or NANO)), list(classes), **more)


every_program = pytest.mark.parametrize('kind, size', [
    pytest.param(kind, size, marks=KINDS[kind]) for kind, size in (
        ('onnx', 0), ('onnx', 3), ('torchscript', 0), ('torch_export', 0), ('torch_export', 4))])


def export(*flags):
    return run_export.run([str(flag) for flag in flags])


@pytest.fixture
def program(trained, tmp_path):  # noqa: F811
    """program(kind, size): (the checkpoint, its export for batches of `size` images or, with 0, of any size)."""
    def make(kind, size=0, *flags):
        path, _ = trained(*flags, classes=CLASSES)
        output = str(tmp_path / ('other' + sources.PROGRAM_ENDINGS[kind]))
        assert export('--resume', path, '--format', kind, '--output', output, '--overwrite',
                      *(['--batch_size', size] if size else [])) == 0
        return path, output
    return make


def row_of(path):
    with open(str(path), encoding='utf-8', newline='') as file:
        row, = csv.DictReader(file)
    return {name: float(row[name]) for name in ('acc1', 'loss', 'param_count', 'img_size')}


@every_program
def test_a_program_gives_the_figures_of_its_checkpoint(kind, size, program, image_folder, tmp_path, capsys):
    """Predictions in the same order, evaluation with and without mirror images; partial batches too."""
    path, output = program(kind, size)
    data = image_folder(train=1, val=5, classes=('cat', 'dog', 'ox'))
    found = []
    for source in (path, output):
        capsys.readouterr()
        assert run_predict.run(['--num_workers=0', '--device=cpu', '--resume', source, data + '/val', '--output', '-',
                                '--batch_size=7']) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(found[0]) == 15 and [each['file'] for each in found[0]] == [each['file'] for each in found[1]]
    for ours, theirs in zip(*found):
        assert [each['class'] for each in ours['predictions']] == [each['class'] for each in theirs['predictions']]
        assert [each['probability'] for each in ours['predictions']] == pytest.approx(
            [each['probability'] for each in theirs['predictions']], abs=1e-5)
    for flags in ([], ['--test_flip']):
        rows = []
        for source in (path, output):
            file = tmp_path / 'r.csv'
            assert run_class_finetuning.run(QUIET + flags + [
                '--data_path', data, '--eval', '--resume', source, '--batch_size=4', '--results_file', str(file)]) == 0
            rows.append(row_of(file))
        assert rows[1] == pytest.approx(rows[0], abs=1e-4)
    trusted = 'run only files that you trust' in capsys.readouterr().out
    assert trusted == (kind != 'onnx')


@pytest.mark.parametrize('kind, size', [pytest.param('onnx', 3, marks=KINDS['onnx'])])
def test_two_processes_give_the_figures_of_one(kind, size, program, image_folder, tmp_path):
    path, output = program(kind, size)
    data, rows = image_folder(train=1, val=5, classes=('cat', 'dog', 'ox')), []
    for processes, source in ((1, path), (2, output)):
        file = str(tmp_path / 'r.csv')
        status, _, err = launch(processes, '--data_path', data, '--eval', '--dist_eval', '--resume', source,
                                '--batch_size=4', '--results_file', file, preset=QUIET)
        assert status == 0, err
        rows.append(row_of(file))
    assert rows[1] == pytest.approx(rows[0], abs=1e-4)


def test_a_program_in_python(program, tmp_path):
    path, output = program('torchscript')
    picture = photo(1, 32, 32)
    assert dict(beit.load(output).predict(picture)) == pytest.approx(dict(beit.load(path).predict(picture)))


def test_a_program_keeps_the_activation_and_preprocessing(program):
    path, output = program('torchscript', 0, *NANO[1:3], '--loss=bce', '--imagenet_default_mean_and_std')
    before, after = (inference_model.load_for_inference(each) for each in (path, output))
    assert after.spec == before.spec and after.activation == 'sigmoid'


@pytest.mark.parametrize('flags, says', [
    (['--use_ema'], '--use_ema'), (['--attention'], '--attention'), (['--amp'], '--amp'),
    (['--input_size=64'], 'computes with 32'), (['--model=beit_base_patch16_224'], '--model beit_base_patch16_224')])
def test_what_needs_the_weights_is_refused(flags, says, program, tmp_path, capsys):
    _, output = program('torchscript')
    photo(1).save(str(tmp_path / 'a.png'))
    capsys.readouterr()
    assert run_predict.run(['--resume', output, str(tmp_path / 'a.png')] + QUIET[1:] + flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and 'other.torchscript.pt' in err[-1] and 'exported program' in err[-1]


def test_training_and_exporting_need_weights(program, refused, image_folder, capsys):
    _, output = program('torchscript')
    data = ['--data_path', image_folder()] + NANO
    capsys.readouterr()
    refused(data + ['--resume', output], '--resume', output, 'the checkpoint')
    refused(data + ['--finetune', output], '--finetune', output, 'the checkpoint')
    refused(data + ['--eval', '--resume', output, '--compile'], '--compile', output)
    assert export('--resume', output, '--format', 'onnx') == 2
    assert 'the checkpoint' in capsys.readouterr().err


def rewrite(path, name, content):
    """Replace a record of an archive; None removes it."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, 'w') as archive:
        for each, data in records:
            if not each.endswith('/extra/' + name):
                archive.writestr(each, data)
            elif content is not None:
                archive.writestr(each, content)


@pytest.mark.parametrize('name, content, says', [
    ('model_spec', None, 'model_spec'), ('model_spec', '[', 'export it again'), ('model_spec', '{}', 'classes'),
    ('model_spec', '{"classes": ["a"]}', 'its model description cannot be used')])
def test_a_program_is_not_started_before_its_description_is_read(name, content, says, program, monkeypatch):
    _, output = program('torchscript')
    rewrite(output, name, content)
    monkeypatch.setattr(torch.jit, 'load', lambda *_, **__: pytest.fail('the program was loaded'))
    with pytest.raises(run_export.UserError, match=says):
        inference_model.load_for_inference(output)


def test_damaged_programs_are_one_line(program, tmp_path, monkeypatch):
    _, output = program('torchscript')
    with open(output, 'rb') as file:
        data = file.read()
    for ending in ('.onnx', '.pt2', '.torchscript.pt'):
        path = str(tmp_path / ('bad' + ending))
        for content in (b'', b'whatever', data[:-1000]):
            with open(path, 'wb') as file:
                file.write(content)
            with pytest.raises(run_export.UserError, match='^--resume .*bad.*(damaged|needs onnxruntime)'):
                inference_model.load_for_inference(path)
    with pytest.raises(run_export.UserError, match='not downloaded'):
        inference_model.load_for_inference('https://example.invalid/x.pt2')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(run_export.UserError, match='bad.onnx: running it needs onnxruntime; run: '):
        inference_model.load_for_inference(str(tmp_path / 'bad.onnx'))


def test_another_number_of_classes_is_detected(program):
    _, output = program('torchscript')
    spec = inference_model.load_for_inference(output).spec
    rewrite(output, 'model_spec', json.dumps(dict(spec.to_dict(), classes=['a', 'b'])))
    with pytest.raises(run_export.UserError, match=r'logits of shape \(1, 3\) for 2 classes'):
        inference_model.load_for_inference(output)


# ---- opsets and batches

with_onnx = [needs_extra('onnx', 'onnxscript', 'onnxruntime'), with_dynamo, pytest.mark.current_only]
NEWEST = 99


def marks(function):
    for mark in with_onnx:
        function = mark(function)
    return function


@marks
@pytest.mark.parametrize('opsets', [(11, 14, 17, 18, export_formats.OPSETS[0]), pytest.param(
    range(11, NEWEST), marks=pytest.mark.soak)])
def test_every_opset_with_fixed_and_any_batch(opsets, trained, monkeypatch):  # noqa: F811
    """onnxruntime computes the checkpoint's logits; an opset that is refused is newer than all others."""
    import onnx
    import onnxruntime

    name = 'beit_nano_patch8_32'
    monkeypatch.setitem(modeling_finetune.MODELS, name, dict(modeling_finetune.MODELS[name], depth=1))
    path, model = trained()
    loaded = inference_model.load_for_inference(path)
    images, works = torch.randn(2, 3, 32, 32), {}
    for opset in opsets:
        for size in (None, 2):
            try:
                with torch.no_grad():
                    data, about = export_formats.make_onnx(loaded, ExportConfig(opset, size))
            except run_export.UserError as error:
                assert '--opset %d: ' % opset in str(error)
                continue
            session = onnxruntime.InferenceSession(data)
            shape = session.get_inputs()[0].shape
            assert isinstance(shape[0], str) if size is None else shape == [2, 3, 32, 32]
            assert about.startswith('opset %d, ' % opset) and next(
                each.version for each in onnx.load_model_from_string(data).opset_import if not each.domain) == opset
            with torch.no_grad():
                np.testing.assert_allclose(session.run(None, {'image': images.numpy()})[0], model(images), atol=1e-4)
            works.setdefault(opset, []).append(size)
    assert list(works) == [each for each in opsets if each <= max(works)] and max(works) >= export_formats.OPSETS[0]
    assert set(map(tuple, works.values())) == {(None, 2)}


@marks
def test_an_opset_that_is_too_new_names_those_that_work(trained):  # noqa: F811
    loaded = inference_model.load_for_inference(trained()[0])
    for opset in (26, NEWEST):
        with torch.no_grad(), pytest.raises(run_export.UserError, match='11 to 25') as caught:
            export_formats.make_onnx(loaded, ExportConfig(opset))
        assert '--opset %d: ' % opset in str(caught.value) and '\n' not in str(caught.value)


# ---- ATC

FAKE_ATC = '''#!%s
import json, os, sys
with open(os.environ['FAKE_ATC_LOG'], 'w') as file:
    json.dump(sys.argv[1:], file)
mode, output = os.environ['FAKE_ATC'], dict(arg.partition('=')[::2] for arg in sys.argv[1:])['--output']
open('fusion_result.json', 'w').close()
print('ATC start working now\\nE40021: the last line')
if mode != 'nothing':
    open(output + ('_linux_aarch64.om' if mode == 'system' else '.om'), 'w').write('compiled')
sys.exit(mode == 'fails')
'''


@pytest.fixture
def atc(tmp_path, monkeypatch):
    """atc(mode, home=False): a fake ATC on PATH, or in ASCEND_TOOLKIT_HOME; returns what reads its arguments."""
    def install(mode, home=False):
        folder = tmp_path / 'cann' / 'bin'
        folder.mkdir(parents=True)
        (folder / 'atc').write_text(FAKE_ATC % sys.executable)
        (folder / 'atc').chmod(stat.S_IRWXU)
        monkeypatch.setenv('FAKE_ATC', mode)
        monkeypatch.setenv('FAKE_ATC_LOG', str(tmp_path / 'argv.json'))
        if home:
            monkeypatch.setenv('ASCEND_TOOLKIT_HOME', str(tmp_path / 'cann'))
        else:
            monkeypatch.setenv('PATH', str(folder) + os.pathsep + os.environ['PATH'])
        return lambda: json.loads((tmp_path / 'argv.json').read_text())
    monkeypatch.delenv('ASCEND_TOOLKIT_HOME', raising=False)
    return install


@marks
@pytest.mark.parametrize('mode, home', [('works', False), ('system', True)])
def test_atc_converts(mode, home, trained, atc, tmp_path, capsys):  # noqa: F811
    import onnx

    arguments, path = atc(mode, home), trained()[0]
    folder = tmp_path / 'a folder; rm'
    folder.mkdir()
    assert export('--resume', path, '--format', 'om', '--soc_version', 'Ascend910B4', '--batch_size', 4, '--output',
                  folder / 'x.om', '--no_check') == 0
    assert (folder / 'x.om').read_text() == 'compiled' and sorted(os.listdir(str(folder))) == ['x.om', 'x.onnx']
    given = dict(each.split('=', 1) for each in arguments())
    given.pop('--output')
    assert given == {'--framework': '5', '--model': str(folder / 'x.onnx'), '--soc_version': 'Ascend910B4',
                     '--input_format': 'NCHW', '--input_shape': 'image:4,3,32,32'}
    written = onnx.load(str(folder / 'x.onnx'))
    assert written.opset_import[0].version == 11
    assert [each.dim_value for each in written.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 32]
    assert 'x.om (om, Ascend910B4, batches of 4' in capsys.readouterr().out


@marks
@pytest.mark.parametrize('mode, says', [('fails', 'status 1 and a file'), ('nothing', 'status 0 and no file')])
def test_a_failure_of_atc_is_one_line(mode, says, trained, atc, tmp_path, capsys):  # noqa: F811
    atc(mode)
    (tmp_path / 'weights.om').write_text('old')
    assert export('--resume', trained()[0], '--format', 'om', '--soc_version', 'Ascend310P3', '--no_check',
                  '--overwrite') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and says in err and 'E40021: the last line' in err and '--input_shape=image:1,3' in err
    assert (tmp_path / 'weights.om').read_text() == 'old' and (tmp_path / 'weights.onnx').is_file()
    assert not [name for name in os.listdir(str(tmp_path)) if name.startswith('.')]


@marks
def test_without_atc_the_command_is_printed(trained, atc, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv('PATH', '/nowhere')
    path = trained()[0]
    assert export('--resume', path, '--format', 'om', '--soc_version', 'Ascend910B4') == 0
    missing, command = capsys.readouterr().out.splitlines()[-2:]
    assert missing.startswith('Not converted: atc is neither on PATH nor in ASCEND_TOOLKIT_HOME')
    assert command == 'atc --framework=5 --model=%s --output=%s --soc_version=Ascend910B4 --input_format=NCHW ' \
        '--input_shape=image:1,3,32,32' % (tmp_path / 'weights.onnx', tmp_path / 'weights')
    assert sorted(os.listdir(str(tmp_path))) == ['weights.onnx', 'weights.pth']
    assert export('--resume', path, '--format', 'om', '--soc_version', 'Ascend910B4') == 2
    assert '--overwrite' in capsys.readouterr().err


@pytest.mark.parametrize('flags, says', [
    ([], '--soc_version is missing'), (['--soc_version', 'Ascend910; rm -rf /'], '--soc_version Ascend910; rm'),
    (['--soc_version', '910B4'], 'Ascend910B4'), (['--soc_version', 'Ascend910B4\n'], '--soc_version'),
    (['--soc_version', 'Ascend910B4', '--output', 'x.onnx'], 'end the name in .om')])
def test_mistakes_before_atc(flags, says, trained, capsys):  # noqa: F811
    assert export('--resume', trained()[0], '--format', 'om', *flags) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1


def test_flags_of_other_formats_are_refused(trained, capsys):  # noqa: F811
    for flag, value, formats in (('--soc_version', 'Ascend310', 'om'),
                                 ('--batch_size', 2, 'onnx or om or torch_export')):
        assert export('--resume', trained()[0], '--format', 'torchscript', flag, value) == 2
        assert '%s %s goes with --format %s, not torchscript' % (flag, value, formats) in capsys.readouterr().err


# ---- the model card

HOSTILE = ['---\nlibrary_name: evil', '[x](javascript:alert)', '<script>alert(1)</script>', '| a | b |', '`code`',
           '# big', '{{ template }}', '![i](http://x.invalid/i.png)', 'http://x.invalid', '*bold* _it_', '&lt;b&gt;',
           '猫']


@needs_extra('transformers', 'huggingface_hub')
@pytest.mark.current_only
def test_the_model_card(trained, tmp_path, capsys):  # noqa: F811
    """The YAML and the Markdown, read by other programs, have these facts, and no more than them."""
    yaml, markdown = pytest.importorskip('yaml'), pytest.importorskip('markdown_it')
    path, _ = trained(*NANO[1:3], '--finetune=/home/me/a | b.pth', '--data_path=/home/me/data', '--lr=0.125',
                      classes=HOSTILE, epoch=3)
    with open(str(tmp_path / 'log.txt'), 'w', encoding='utf-8') as file:
        for epoch in (2, 3):
            file.write('%s\n' % json.dumps({'epoch': epoch, 'test_acc1': 60. + epoch, 'test_ema_acc1': 1.,
                                            'train_loss': 2.}))
    folder = tmp_path / 'folder'
    assert export('--resume', path, '--format', 'huggingface', '--output', folder) == 0
    text = (folder / 'README.md').read_text(encoding='utf-8')
    _, head, body = text.split('---\n', 2)
    head = yaml.safe_load(head)
    assert head['library_name'] == 'transformers' and head['pipeline_tag'] == 'image-classification'
    assert head['model-index'][0]['results'][0]['metrics'] == [{'type': 'accuracy', 'value': 0.63}]
    from huggingface_hub import metadata_load
    assert metadata_load(str(folder / 'README.md')) == head
    tokens = markdown.MarkdownIt('gfm-like', {'html': True, 'linkify': False}).parse(body)
    inner = [each for token in tokens for each in token.children or ()]
    assert {token.type for token in inner} <= {'text', 'text_special', 'softbreak'}
    assert {token.type for token in tokens if not token.type.endswith('_close')} <= {
        'heading_open', 'inline', 'paragraph_open', 'table_open', 'thead_open', 'tbody_open', 'tr_open', 'th_open',
        'td_open'}
    cells = [token.content for token in tokens if token.type == 'inline']
    plain = [''.join(each.content for each in token.children) for token in tokens if token.type == 'inline']
    assert len([token for token in tokens if token.type == 'heading_open']) == 4 and cells
    assert plain[plain.index('acc1') + 1] == '63' and plain[plain.index('--lr') + 1] == '0.125'
    assert 'train_loss' not in plain and '/home/me' not in text
    for name in HOSTILE[1:]:
        assert name in plain[-1]
    assert '---\\nlibrary_name: evil' in plain[-1]


def test_the_card_of_weights_that_this_project_did_not_train(trained, tmp_path):  # noqa: F811
    """Their publishers' accuracy without a training table; of a trained model, the flags in effect."""
    path, _ = trained(*NANO[1:3])
    found = inference_model.load_for_inference(path)
    card = model_card.write(found).decode()
    assert '\\-\\-lr' in card and not re.search('opt.{0,2}level|ema|color', card)
    foreign = dataclasses.replace(found, about={}, spec=dataclasses.replace(found.spec, origin={}),
                                  source='beit_base_patch16_224_pt22k_ft1k')
    card = model_card.write(foreign).decode()
    assert 'top-1 / top-5 83.7 / 96.6 %' in card and 'Training' not in card and 'random' not in card
