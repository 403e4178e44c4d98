"""Other programs read the exports and give equal logits; their weights are loaded here."""

import dataclasses
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from timm.models import create_model

import flags as program_flags
import modeling_finetune
import run_class_finetuning
import run_export
from beit.checkpoint import hf_names, inference_model, pretrained, sources
from beit.config import ModelConfig
from beit.data import transforms
from beit.errors import UserError
from beit.files import weights_file
from beit.model_spec import ModelSpec
from beit.outputs import export_formats
from helpers import ROOT, needs_extra, photo, save_random_weights, shake, with_dynamo, with_export

pytestmark = pytest.mark.current_only

try:
    import timm.models.beit as timm_beit
except ImportError:
    timm_beit = None
try:
    import timm.models._registry as timm_registry
except ImportError:
    timm_registry = None

with_timm = pytest.mark.needs('current', hasattr(timm_beit, 'Beit') and timm_registry is not None,
                              'it needs a timm with BEiT')
NANO = ('--model', 'beit_nano_patch8_32', '--input_size', '32')
CLASSES = ['cat', 'grüner "Hund"', '鸟']
PLAIN = ('--disable_rel_pos_bias', '--abs_pos_emb', '--use_cls', '--layer_scale_init_value', '0')


@pytest.fixture
def trained(tmp_path, parse):
    """trained(*flags): the path of a checkpoint of a network with three classes, and the network."""
    return lambda *flags, classes=CLASSES, **more: save_random_weights(
        str(tmp_path / 'weights.pth'), parse(*(flags or NANO)), classes, **more)


@pytest.fixture
def export(capsys):
    """export(*flags): the program's output; with `fails` its one line on standard error."""
    def run(*flags, fails=False):
        capsys.readouterr()
        status = run_export.run([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        if not fails:
            assert (status, err) == (0, ''), err
            return out
        assert status == 2 and not out and err.startswith('run_export.py: error: ') and err.count('\n') == 1, err
        return err
    return run


def images_of(side, count=4):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


def logits_of(model, images):
    with torch.no_grad():
        return model(images)


def close(found, expected, share=1e-5):
    expected = torch.as_tensor(expected)
    return (torch.as_tensor(found) - expected).abs().max() <= share * expected.abs().max()


def is_told(about):
    """Whether metadata has the information that a user needs."""
    preprocessing = json.loads(about['preprocessing'])
    return json.loads(about['classes']) == CLASSES and preprocessing['mean'] == [0.5] * 3 \
        and {'input_size', 'std', 'crop_pct', 'interpolation'} <= set(preprocessing) \
        and about['model'] in modeling_finetune.MODELS


# ---- exports

@needs_extra('onnx', 'onnxscript', 'onnxruntime')
@with_dynamo
@pytest.mark.parametrize('name', sorted(modeling_finetune.MODELS))
def test_onnx(name, trained, export, tmp_path, monkeypatch):
    import onnx
    import onnxruntime

    monkeypatch.setitem(modeling_finetune.MODELS, name, dict(modeling_finetune.MODELS[name], depth=2 if 'nano' in name
                                                             else 1))  # the other blocks are the same
    side = {'beit_nano_patch8_32': 32, 'beit_base_patch16_224': 224}.get(name, 64)  # the same
    path, model = trained('--model', name, '--input_size', str(side))
    said = export('--resume', path, '--format', 'onnx', '--output', tmp_path / 'x.onnx')
    assert 'Checked: logits differ by at most' in said and 'with onnxruntime' in said
    file = onnx.load(str(tmp_path / 'x.onnx'))
    assert [each.version for each in file.opset_import if not each.domain] == [export_formats.OPSETS[0]]
    assert is_told({each.key: each.value for each in file.metadata_props})
    session = onnxruntime.InferenceSession(str(tmp_path / 'x.onnx'))
    assert isinstance(session.get_inputs()[0].shape[0], str)  # any batch
    images = images_of(side, 2)
    assert close(session.run(None, {'image': images.numpy()})[0], logits_of(model, images))


def test_torchscript(trained, export, tmp_path):
    path, model = trained()
    assert 'Checked' in export('--resume', path, '--format', 'torchscript')
    about = export_formats._extra_files(dict.fromkeys(('classes', 'preprocessing', 'model'), ''))
    loaded = torch.jit.load(str(tmp_path / 'weights.torchscript.pt'), _extra_files=about)
    assert is_told({name: value if isinstance(value, str) else value.decode() for name, value in about.items()})
    assert close(logits_of(loaded, images_of(32)), logits_of(model, images_of(32)))


@pytest.mark.parametrize('format', ['torchscript', pytest.param('torch_export', marks=with_export)])
def test_an_export_under_another_name_is_recognized(trained, export, tmp_path, capsys, format):
    """Some of its records are compressed, which a weights file's never are."""
    path, _ = trained()
    export('--resume', path, '--format', format, '--no_check', '--overwrite')
    made, = set(os.listdir(str(tmp_path))) - {'weights.pth'}
    other = str(tmp_path / 'model.pth')
    os.rename(str(tmp_path / made), other)
    for flag in ('--resume', '--finetune'):
        with pytest.raises(UserError, match='^%s .*model.pth: it is an exported program, not weights; give .*'
                           'if its name ends in .torchscript.pt or .pt2; rename it' % flag):
            weights_file.load_weights_file(other, flag)


@with_export
def test_torch_export(trained, export, tmp_path):
    path, model = trained()
    assert 'Checked' in export('--resume', path, '--format', 'torch_export')
    about = dict.fromkeys(('classes', 'preprocessing', 'model'), '')
    loaded = torch.export.load(str(tmp_path / 'weights.pt2'), extra_files=about).module()
    assert is_told(about)
    assert close(logits_of(loaded, images_of(32)), logits_of(model, images_of(32)))


@with_timm
@pytest.mark.parametrize('flags', [NANO, NANO + PLAIN, ('--model', 'beit_base_patch16_224'), (
    '--model', 'beit_large_patch16_384', '--input_size', '64') + PLAIN])
def test_timm_loads_it_with_the_printed_line(flags, trained, export, tmp_path, monkeypatch):
    """Its logits equal timm's own network."""
    import timm
    from safetensors import safe_open

    name, shallow = flags[1], dict(depth=2)  # on both sides
    if 'nano' not in name:
        monkeypatch.setitem(modeling_finetune.MODELS, name, dict(modeling_finetune.MODELS[name], **shallow))
    path, model = trained(*flags)
    said = export('--resume', path, '--format', 'safetensors', '--output', tmp_path / 'x.safetensors')
    assert 'Checked' in said and ', with timm ' in said
    line = [line for line in said.splitlines() if line.startswith('Load it: ')][0][len('Load it: '):]
    names = {'timm': timm}
    monkeypatch.setitem(timm_registry._model_entrypoints, name,  # this process has ours registered
                        lambda **options: getattr(timm_beit, name)(**dict(shallow, **options)))
    exec(line, names)  # noqa: S102
    side = model.patch_embed.img_size[0]
    assert type(names['model']) is timm_beit.Beit
    assert close(logits_of(names['model'].eval(), images_of(side)), logits_of(model, images_of(side)))
    with safe_open(str(tmp_path / 'x.safetensors'), 'pt') as file:
        assert is_told(file.metadata())


@needs_extra('transformers')
@pytest.mark.parametrize('flags', [NANO, NANO + PLAIN, NANO + ('--abs_pos_emb', '--use_cls')])
def test_hugging_face_loads_it_offline(flags, trained, export, tmp_path):
    from safetensors import safe_open
    from transformers import BeitForImageClassification

    path, model = trained(*flags)
    said = export('--resume', path, '--format', 'huggingface', '--output', tmp_path / 'folder')
    assert 'Checked' in said and ', with transformers ' in said
    assert sorted(os.listdir(str(tmp_path / 'folder'))) == sorted(export_formats.FORMATS['huggingface'].files)
    loaded, about = BeitForImageClassification.from_pretrained(str(tmp_path / 'folder'), local_files_only=True,
                                                               output_loading_info=True)
    assert not about['missing_keys'] and not about['unexpected_keys']
    assert close(logits_of(lambda images: loaded.eval()(pixel_values=images).logits, images_of(32)),
                 logits_of(model, images_of(32)))
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    assert loaded.config.label2id == {name: label for label, name in enumerate(CLASSES)}
    with safe_open(str(tmp_path / 'folder' / 'model.safetensors'), 'pt') as file:
        assert is_told(file.metadata())


@needs_extra('transformers')
@pytest.mark.parametrize('flags', [(), ('--crop_pct', '0.9'), ('--imagenet_default_mean_and_std',)])
def test_hugging_face_sees_the_same_pixels(flags, parse, tmp_path):
    from transformers import AutoImageProcessor
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    args = parse('--input_size', '48', *flags)
    spec = ModelSpec(ModelConfig(), transforms.EvalTransform.from_config(args), ())
    about = inference_model.LoadedModel(None, spec, '')
    (tmp_path / 'preprocessor_config.json').write_bytes(
        export_formats._json(export_formats.huggingface_preprocessor(about)))
    half = [0.5] * 3
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if 'imagenet' in str(flags) else (half, half)
    for name, most in (('pil', 1e-4), ('torchvision', 1.01)):  # of 255 steps
        processor = AutoImageProcessor.from_pretrained(str(tmp_path), local_files_only=True, backend=name)
        for width, height in ((96, 72), (61, 200)):
            picture = photo(width, width, height)
            found = processor(picture, return_tensors='pt')['pixel_values'][0].permute(1, 2, 0)
            found = found * torch.tensor(std) + torch.tensor(mean)
            expected = transforms.build_transform(False, args)(picture)
            assert (255 * found - expected).abs().max() < most, name


def test_the_averaged_weights(trained, export, tmp_path, parse):
    average = shake(inference_model.build_model(parse(*NANO), 3), seed=5)
    path, _ = trained(model_ema=average.state_dict())
    export('--resume', path, '--format', 'torchscript', '--use_ema')
    loaded = torch.jit.load(str(tmp_path / 'weights-ema.torchscript.pt'))
    assert close(logits_of(loaded, images_of(32)), logits_of(average, images_of(32)))


# ---- failed exports

class ToyFormat:
    """A folder of two files: the complete code of a new export format."""

    files = ('weights', 'about.json')

    @staticmethod
    def make(trained, opset):
        content = {name: value.tolist() for name, value in trained.model.state_dict().items()}
        return {'weights': json.dumps(content).encode(), 'about.json': b'{}'}, 'for tests'

    @staticmethod
    def run(folder, trained, batches):
        with open(os.path.join(folder, 'weights'), encoding='utf-8') as file:
            content = json.load(file)
        model = inference_model.build_model(trained.config, len(trained.classes)).eval()
        model.load_state_dict({name: torch.tensor(value) for name, value in content.items()})
        return [model(images) for images in batches]


TOY = export_formats.Format('-toy', ToyFormat.make, ToyFormat.run, 'torch', ToyFormat.files,
                            usage=lambda trained, path: ['Open it: %s' % os.path.basename(path)])
EVERY = dict({name: each for name, each in export_formats.FORMATS.items() if each.convert is None}, toy=TOY)
NEEDS = {'onnx': [needs_extra('onnx', 'onnxscript', 'onnxruntime'), with_dynamo], 'torch_export': [with_export],
         'safetensors': [with_timm], 'huggingface': [needs_extra('transformers')]}
every_format = pytest.mark.parametrize(
    'kind', [pytest.param(kind, marks=NEEDS.get(kind, [])) for kind in sorted(EVERY)])


def register(kind, monkeypatch):
    monkeypatch.setitem(export_formats.FORMATS, kind, EVERY[kind])
    monkeypatch.setitem(program_flags.EXPORT_FORMATS, kind, {'takes': EVERY[kind].takes, 'files': EVERY[kind].files})


@every_format
def test_a_format_is_written_checked_and_replaced(kind, trained, export, tmp_path, monkeypatch):
    """Its entry in `FORMATS` is enough for run_export.py."""
    register(kind, monkeypatch)
    path, _ = trained()
    said = export('--resume', path, '--format', kind)
    output = tmp_path / ('weights' + EVERY[kind].ending)
    assert 'Checked: logits differ by at most' in said and ', with ' + EVERY[kind].reader in said
    lines, usage = said.splitlines(), EVERY[kind].usage(inference_model.load_for_inference(path), str(output))
    assert lines[len(lines) - len(usage):] == usage and lines[-len(usage) - 1].startswith('Wrote ')
    if EVERY[kind].files:
        assert set(os.listdir(str(output))) == set(EVERY[kind].files)
        (output / 'thesis.txt').write_text('all of it')
        assert 'thesis.txt' in export('--resume', path, '--format', kind, '--overwrite', fails=True)
    else:
        assert output.is_file()
        assert '--overwrite' in export('--resume', path, '--format', kind, fails=True)
        export('--resume', path, '--format', kind, '--overwrite', '--no_check')


@every_format
def test_another_network_is_not_written(kind, trained, export, tmp_path, monkeypatch):
    """The comparison detects a lost bias table."""
    register(kind, monkeypatch)
    path, _ = trained()
    make = export_formats.FORMATS[kind].make

    def lose(found, opset):
        other = inference_model.build_model(found.config, 3).eval()
        other.load_state_dict(found.model.state_dict())
        other.blocks[2].attn.relative_position_bias_table.zero_()
        return make(dataclasses.replace(found, model=other), opset)

    monkeypatch.setitem(export_formats.FORMATS, kind, export_formats.FORMATS[kind]._replace(make=lose))
    before = sorted(os.listdir(str(tmp_path)))
    assert 'not the checkpoint\'s network' in export('--resume', path, '--format', kind, fails=True)
    assert sorted(os.listdir(str(tmp_path))) == before
    export('--resume', path, '--format', kind, '--no_check')


@pytest.mark.parametrize('kind', ['torchscript', 'huggingface'])
def test_a_full_disk_keeps_the_old_export(kind, trained, export, tmp_path, monkeypatch):
    path, _ = trained()
    output = tmp_path / 'output.torchscript.pt'
    if kind == 'huggingface':
        output.mkdir()
        (output / 'config.json').write_text('old')
    else:
        output.write_text('old')

    def full(handle):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    flags = ('--resume', path, '--format', kind, '--output', output, '--overwrite', '--no_check')
    assert 'No space left' in export(*flags, fails=True)
    assert (output / 'config.json' if kind == 'huggingface' else output).read_text() == 'old'
    assert sorted(os.listdir(str(tmp_path))) == [output.name, 'weights.pth']


def test_existing_files_stay_without_overwrite(trained, export, tmp_path):
    path, _ = trained()
    (tmp_path / 'x.torchscript.pt').write_text('mine')
    to = ('--resume', path, '--output', tmp_path / 'x.torchscript.pt', '--no_check', '--format')
    assert '--overwrite' in export(*to, 'torchscript', fails=True)
    assert 'a file' in export(*to, 'huggingface', '--overwrite', fails=True)
    assert (tmp_path / 'x.torchscript.pt').read_text() == 'mine'
    export(*to, 'torchscript', '--overwrite')
    assert torch.jit.load(str(tmp_path / 'x.torchscript.pt'))
    folder = tmp_path / 'new.torchscript.pt'
    folder.mkdir()
    to = ('--resume', path, '--output', folder, '--no_check', '--format')
    assert 'a folder' in export(*to, 'torchscript', fails=True)
    export(*to, 'huggingface')
    assert '--overwrite' in export(*to, 'huggingface', fails=True)
    export(*to, 'huggingface', '--overwrite')
    (folder / 'thesis.txt').write_text('all of it')
    assert 'thesis.txt' in export(*to, 'huggingface', '--overwrite', fails=True)
    assert sorted(os.listdir(str(tmp_path))) == ['new.torchscript.pt', 'weights.pth', 'x.torchscript.pt']


@pytest.mark.parametrize('flags, says', [
    (['--format', 'onnx'], '--resume'),
    (['--resume', 'no/such.pth', '--format', 'onnx'], 'no such file'),
    (['--resume', 'WEIGHTS', '--format', 'onxn'], 'did you mean onnx'),
    (['--resume', 'WEIGHTS'], '--format'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--opset', '18'], '--opset 18 goes with --format onnx'),
    (['--resume', 'WEIGHTS', '--format', 'onnx', '--opset', 'new'], '--opset'),
    (['--resume', 'WEIGHTS', '--format', 'onnx', '--opset', '10'], '--opset: must be at least 11'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--use_ema'], 'no averaged weights'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--output', '/dev/null/x'], '--output'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--output', 'a.ts'], 'end the name in .torchscript.pt'),
    (['--resume', 'WEIGHTS', '--format', 'torch_export', '--output', 'a.torch_export'], 'end the name in .pt2'),
    (['--resume', 'WEIGHTS', '--format', 'onnx', '--output', 'a.pt'], 'end the name in .onnx'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--fromat', 'x'], 'did you mean --format'),
    (['--resume', 'WEIGHTS', '--format', 'torchscript', '--model', 'beit_base'], '--model'),
])
def test_bad_flags_are_one_line(flags, says, trained, export):
    path, _ = trained()
    assert says in export(*[path if flag == 'WEIGHTS' else flag for flag in flags], fails=True)


PIP = '%%s; run: %s -m pip install -r %s/requirements-extra.txt' % (sys.executable, ROOT)


@pytest.mark.parametrize('kind, module, says', [
    ('onnx', 'onnx', PIP % 'needs onnx'),
    ('huggingface', 'transformers', PIP % 'Not checked: the check needs transformers'),
    pytest.param('onnx', 'onnxscript', PIP % 'needs onnxscript', marks=[needs_extra('onnx'), with_dynamo]),
    pytest.param('onnx', 'onnxruntime', PIP % 'Not checked: the check needs onnxruntime',
                 marks=[needs_extra('onnx', 'onnxscript'), with_dynamo]),
])
def test_a_missing_package_is_one_line(kind, module, says, trained, export, monkeypatch):
    path, _ = trained()
    monkeypatch.setitem(sys.modules, module, None)
    assert says in export('--resume', path, '--format', kind, fails='Not checked' not in says)


def test_help_ends_with_examples(capsys):
    with pytest.raises(SystemExit):
        run_export.run(['--help'])
    assert 'examples:' in capsys.readouterr().out.split('--no_check')[-1]


# ---- imports

def by_hand(model):
    """A state dict under Hugging Face's names, written out one by one."""
    state, theirs = model.state_dict(), {}
    for ours, name in (('cls_token', 'embeddings.cls_token'), ('head.weight', 'classifier.weight'),
                       ('head.bias', 'classifier.bias'), ('fc_norm.weight', 'pooler.layernorm.weight'),
                       ('fc_norm.bias', 'pooler.layernorm.bias'),
                       ('patch_embed.proj.weight', 'embeddings.patch_embeddings.projection.weight'),
                       ('patch_embed.proj.bias', 'embeddings.patch_embeddings.projection.bias')):
        theirs[name if 'classifier' in name else 'beit.' + name] = state[ours]
    for index in range(4):
        here, there = 'blocks.%d.' % index, 'beit.encoder.layer.%d.' % index
        for place, name in enumerate(('query', 'key', 'value')):
            theirs[there + 'attention.attention.%s.weight' % name] = state[here + 'attn.qkv.weight'][64 * place:][:64]
        theirs[there + 'attention.attention.query.bias'] = state[here + 'attn.q_bias']
        theirs[there + 'attention.attention.value.bias'] = state[here + 'attn.v_bias']
        theirs[there + 'attention.attention.relative_position_bias.relative_position_bias_table'] = \
            state[here + 'attn.relative_position_bias_table']
        theirs[there + 'lambda_1'], theirs[there + 'lambda_2'] = state[here + 'gamma_1'], state[here + 'gamma_2']
        for kind in ('weight', 'bias'):
            theirs[there + 'attention.output.dense.' + kind] = state[here + 'attn.proj.' + kind]
            theirs[there + 'intermediate.dense.' + kind] = state[here + 'mlp.fc1.' + kind]
            theirs[there + 'output.dense.' + kind] = state[here + 'mlp.fc2.' + kind]
            theirs[there + 'layernorm_before.' + kind] = state[here + 'norm1.' + kind]
            theirs[there + 'layernorm_after.' + kind] = state[here + 'norm2.' + kind]
    return {name: value.clone() for name, value in theirs.items()}


def finetuned(source, parse, *flags, classes=3):
    model = inference_model.build_model(parse(*NANO, *flags), classes)
    pretrained.load_pretrained(model, str(source))
    return model.eval()


def test_names_of_hugging_face_on_every_pytorch(trained, export, parse, tmp_path, capsys):
    """A folder for `from_pretrained`, also an old one with pytorch_model.bin; errors are reported."""
    path, model = trained()
    theirs = by_hand(model)
    export('--resume', path, '--format', 'huggingface', '--output', tmp_path / 'new')
    written = weights_file.load_weights_file(str(tmp_path / 'new' / 'model.safetensors'))
    assert {name: value.tolist() for name, value in written.items()} == {
        name: value.tolist() for name, value in theirs.items()}
    folder = tmp_path / 'old'
    folder.mkdir()
    (folder / 'config.json').write_text('{"model_type": "beit"}')
    torch.save(theirs, str(folder / 'pytorch_model.bin'))
    for source in (folder, folder / 'pytorch_model.bin', tmp_path / 'new'):
        assert close(logits_of(finetuned(source, parse), images_of(32)), logits_of(model, images_of(32)))
        assert 'names of Hugging Face' in capsys.readouterr().out
    for labels, classes in ({}, ['0', '1', '2']), ({'id2label': {'1': 'b', '0': 'a', '2': 'c'}}, ['a', 'b', 'c']):
        (folder / 'config.json').write_text(json.dumps(dict(model_type='beit', **labels)))
        opened = inference_model.load_for_inference(str(folder), model='beit_nano_patch8_32', input_size=32)
        assert close(logits_of(opened.model, images_of(32)), logits_of(model, images_of(32)))
        assert opened.classes == classes
    inner = {name.replace('beit.', ''): value for name, value in theirs.items() if 'classifier' not in name}
    torch.save(inner, str(folder / 'pytorch_model.bin'))  # of BeitModel, which has no head
    kept = finetuned(folder, parse).state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items() if 'head' not in name)

    del theirs['beit.encoder.layer.1.attention.attention.key.weight']
    torch.save(theirs, str(folder / 'pytorch_model.bin'))
    for source, says in ((folder, 'blocks.1.attn.qkv.weight (192, 64) is missing'), (tmp_path, 'not a Hugging Face')):
        with pytest.raises(run_export.UserError, match=says.replace('(', r'\(').replace(')', r'\)')):
            finetuned(source, parse)
    unreadable = 'cannot be read'
    for config, says in (('{"model_type": "vit"}', 'model_type vit'), ('[', unreadable), ('{}', unreadable)):
        (folder / 'config.json').write_text(config)
        with pytest.raises(run_export.UserError, match=says):
            run_class_finetuning.check_args(parse(*NANO, '--data_path', 'demo', '--finetune', str(folder)))


@needs_extra('transformers')
@pytest.mark.parametrize('flags, options, share', [
    ((), dict(use_relative_position_bias=True, layer_norm_eps=1e-6), 1e-5),
    ((), dict(use_relative_position_bias=True), 1e-4),  # its norms add 1e-12 to the variance where ours add 1e-6
    (PLAIN, dict(use_absolute_position_embeddings=True, use_mean_pooling=False, layer_scale_init_value=0.), 1e-4),
    ((), dict(use_shared_relative_position_bias=True, use_mask_token=True), 1e-4),
])
def test_weights_of_transformers_are_loaded(flags, options, share, parse, tmp_path):
    """Its saved files, and its state dict, whose names changed in version 5."""
    from transformers import BeitConfig, BeitForImageClassification

    torch.manual_seed(0)
    theirs = shake(BeitForImageClassification(BeitConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8,
        num_labels=3, **options)))
    theirs.save_pretrained(str(tmp_path / 'folder'))
    torch.save(theirs.state_dict(), str(tmp_path / 'state.bin'))
    expected = logits_of(lambda images: theirs(pixel_values=images).logits, images_of(32))
    for source in ('folder', 'folder/model.safetensors', 'state.bin'):
        assert close(logits_of(finetuned(tmp_path / source, parse, *flags), images_of(32)), expected, share), source
    opened = inference_model.load_for_inference(str(tmp_path / 'folder'), model='beit_nano_patch8_32', input_size=32)
    assert close(logits_of(opened.model, images_of(32)), expected, share)


@with_timm
@pytest.mark.parametrize('flags, options', [
    ((), dict(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)), (PLAIN, dict(global_pool='token'))])
def test_weights_of_timm_are_loaded(flags, options, parse, tmp_path):
    from safetensors.torch import save_file

    theirs = shake(timm_beit.Beit(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=3,
                                  **options))
    torch.save(theirs.state_dict(), str(tmp_path / 'x.pth'))
    save_file(theirs.state_dict(), str(tmp_path / 'x.safetensors'))
    expected = logits_of(theirs, images_of(32))
    for source in ('x.pth', 'x.safetensors'):
        assert close(logits_of(finetuned(tmp_path / source, parse, *flags), images_of(32)), expected), source
    opened = inference_model.load_for_inference(str(tmp_path / 'x.safetensors'), model='beit_nano_patch8_32',
                                                input_size=32)
    assert close(logits_of(opened.model, images_of(32)), expected)
    assert opened.classes == ['0', '1', '2']


def test_every_name_maps_both_ways(parse):
    """Names of each kind of network, with numbers of several digits, which re.match must not truncate."""
    for flags in ((), PLAIN, ('--abs_pos_emb', '--use_cls')):
        model = create_model('beit_nano_patch8_32', depth=12, num_classes=3, use_rel_pos_bias=not flags,
                             use_abs_pos_emb=bool(flags), use_mean_pooling='--use_cls' not in flags,
                             init_values=0. if flags == PLAIN else 0.1)
        state = {name: value for name, value in model.state_dict().items() if not name.endswith('position_index')}
        renamed = hf_names.to_hugging_face(state)
        assert not set(renamed) & set(state) and all(name.startswith(('beit.', 'classifier.')) for name in renamed)
        back, library = hf_names.to_native(renamed)
        assert library and set(back) == set(state)
        assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize('kind', ['safetensors', 'huggingface'])
def test_exports_are_used_without_flags(kind, trained, export, tmp_path):
    path, model = trained(*NANO, '--imagenet_default_mean_and_std', '--use_cls', activation='sigmoid')
    export('--resume', path, '--format', kind, '--output', tmp_path / 'out.safetensors')
    before = inference_model.load_for_inference(path)
    after = inference_model.load_for_inference(str(tmp_path / 'out.safetensors'))
    assert after.classes == before.classes == CLASSES and after.activation == before.activation
    assert after.preprocessing == before.preprocessing and after.config == before.config
    assert close(logits_of(after.model, images_of(32)), logits_of(model, images_of(32)))


def hostile(size, crop):
    return {'model': 'beit_nano_patch8_32', 'classes': '[]', 'activation': 'softmax', 'preprocessing':
            '{"input_size": %s, "crop_pct": %s, "mean": [0, 0, 0]}' % (size, crop)}


@pytest.mark.parametrize('about', [{}, {'preprocessing': '['}, {'preprocessing': '{"input_size": 3}', 'model': 'x'},
                                   hostile('[3, Infinity, Infinity]', 1), hostile('[3, 1e9, 1e9]', 1),
                                   hostile('[3, 32, 32]', -1), hostile('[3, 32, 32]', 'NaN')])
def test_empty_metadata_asks_for_flags(about, trained, export, tmp_path):
    from safetensors.numpy import load_file, save_file
    export('--resume', trained()[0], '--format', 'safetensors', '--output', tmp_path / 'out.safetensors')
    save_file(load_file(str(tmp_path / 'out.safetensors')), str(tmp_path / 'bare.safetensors'), about)
    with pytest.raises(run_export.UserError, match='--model'):
        inference_model.load_for_inference(str(tmp_path / 'bare.safetensors'))


@pytest.mark.parametrize('ending', ['.onnx', '.pt2', '.torchscript.pt'])
def test_an_export_to_run_is_not_taken_for_weights(tmp_path, ending):
    path = tmp_path / ('model' + ending)
    path.write_bytes(b'whatever')
    with pytest.raises(run_export.UserError, match='%s: .*the checkpoint' % re.escape(str(path))):
        sources.check_finetune(str(path))
