"""Model metadata in weights files: the spec, classes matched by name, and weights inside wrappers."""

import dataclasses
import json
import os

import pytest
import torch

import average_checkpoints
import modeling_finetune
import run_class_finetuning
import run_export
import run_predict
from beit import model_spec
from beit.checkpoint import hf_names, pretrained
from beit.config import ModelConfig
from beit.data.transforms import EvalTransform
from beit.errors import UserError
from beit.files import class_files
from beit.model_spec import ModelSpec
from helpers import NANO, needs_extra, write_images

pytestmark = [pytest.mark.fast, pytest.mark.current_only]
SPEC = ModelSpec(ModelConfig(model='beit_nano_patch8_32', input_size=32), EvalTransform(32, 1.0),
                 ('cat', 'dog', 'r\u00e9'), origin={'finetune': 'x.pth'})


# ---- the spec itself

def test_the_spec_survives_json():
    assert ModelSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.classes = ()


@pytest.mark.parametrize('change, words', (
    (dict(version=2), 'version 2'), (dict(classes='cat'), 'classes'), (dict(classes=['cat', 1, 'b']), 'class name'),
    (dict(loss='hinge'), 'loss'), (dict(multi_label=1), 'multi_label'), (dict(extra=1), 'newer version'),
    (dict(architecture={'input_size': '32'}), 'input_size'), (dict(architecture={'width': 3}), 'newer version'),
    (dict(preprocessing={'crop_pct': 0.}), 'crop_pct'), (dict(preprocessing={'mean': [0.5, 0.5]}), 'mean'),
    (dict(preprocessing={'std': [0., 1., 1.]}), 'std'), (dict(preprocessing={'exif': 'applied'}), 'exif'),
    (dict(preprocessing={'interpolation': 'nearby'}), 'interpolation'), (dict(preprocessing=None), 'preprocessing')))
def test_a_damaged_spec_is_refused_with_the_reason(change, words):
    with pytest.raises(ValueError, match=words):
        ModelSpec.from_dict(dict(SPEC.to_dict(), **change))


def test_a_spec_that_contradicts_its_file_is_refused():
    content = {model_spec.KEY: SPEC.to_dict(), 'classes': ['cat', 'dog', 'r\u00e9'], 'activation': 'softmax'}
    assert model_spec.spec_in(content, 'f.pth', 3).classes == SPEC.classes
    for change, outputs in (({}, 4), (dict(classes=['dog', 'cat', 'r\u00e9']), 3), (dict(activation='sigmoid'), 3)):
        with pytest.raises(UserError, match='f.pth'):
            model_spec.spec_in(dict(content, **change), 'f.pth', outputs)


# ---- classes by name

def test_classes_are_matched_by_name():
    assert model_spec.match_classes(SPEC, 'f', ['r\u00e9', 'cat'])[0] == [2, 0]
    with pytest.raises(UserError, match='zebra.*--finetune f'):
        model_spec.match_classes(SPEC, 'f', ['cat', 'zebra'])
    with pytest.raises(UserError, match='lacks.*dog'):
        model_spec.match_classes(SPEC, 'f', ['cat', 'r\u00e9'], trains=True)


def test_classes_without_names_are_matched_by_position_and_reported():
    bare = dataclasses.replace(SPEC, classes=tuple(map(str, range(11))), has_class_names=False)
    names = sorted(map(str, range(11)))  # '0', '1', '10', '2' …
    places, message = model_spec.match_classes(bare, 'f', names)
    assert places == [int(name) for name in names] and 'numbers' in message and '--class_names' in message
    places, message = model_spec.match_classes(bare, 'f', ['c%02d' % number for number in range(11)])
    assert places == list(range(11)) and 'sorted' in message
    with pytest.raises(UserError, match='11 outputs.*--class_names'):
        model_spec.match_classes(bare, 'f', names[:5])


@pytest.mark.parametrize('text, names', (
    ('cat\ndog\n', ['cat', 'dog']), ('["cat", "dog"]', ['cat', 'dog']), ('{"1": "dog", "0": "cat"}', ['cat', 'dog']),
    ('{"0": ["n01", "tench"], "1": ["n02", "goldfish"]}', ['n01', 'n02']), ('\ufeffcat\r\ndog', ['cat', 'dog'])))
def test_class_names_files(tmp_path, text, names):
    path = tmp_path / 'names'
    path.write_bytes(text.encode())
    assert class_files.read_class_names(str(path)) == names


@pytest.mark.parametrize('content', (b'', b'cat\ncat\n', b'{"0": "cat", "2": "dog"}', b'[[]]', b'\xff\xfe\x00'))
def test_other_class_names_files_are_refused(tmp_path, content):
    path = tmp_path / 'names'
    path.write_bytes(content)
    with pytest.raises(UserError, match='--class_names'):
        class_files.read_class_names(str(path))
    with pytest.raises(UserError, match='--class_names .*none: No such file or directory; give a readable file'):
        class_files.read_class_names(str(tmp_path / 'none'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder of data, and weights that do not name their classes, trained on it."""
    folder = tmp_path_factory.mktemp('spec')
    data, output = write_images(folder / 'data', ('a', 'b', 'c')), str(folder / 'out')
    assert run_class_finetuning.run(NANO + ['--data_path', data, '--output_dir', output, '--epochs=1', '--batch_size=4',
                                            '--warmup_epochs=0', '--init_scale=1', '--lr=1e-3']) == 0
    model = torch.load(os.path.join(output, 'checkpoint-best.pth'), weights_only=True)['model']
    torch.save({'model': model}, str(folder / 'bare.pth'))
    return folder


def test_weights_without_names_take_a_file_of_names(trained, tmp_path, capsys):
    names, bare = tmp_path / 'names.txt', ['--resume', str(trained / 'bare.pth'), '--model=beit_nano_patch8_32']
    names.write_text('c\nb\na\n')
    image = str(trained / 'data' / 'val' / 'a' / '0.png')
    assert run_predict.run(bare + ['--input_size=32', '--class_names', str(names), '--top_k=3', image]) == 0
    found = capsys.readouterr().out
    assert all(name in found for name in 'abc')
    flags = ['--eval', '--data_path', str(trained / 'data'), '--num_workers=0', '--input_size=32']
    assert run_class_finetuning.run(bare + flags) == 0
    by_position = capsys.readouterr().out
    assert 'by position' in by_position
    assert run_class_finetuning.run(bare + flags + ['--class_names', str(names)]) == 0
    by_name = capsys.readouterr().out
    assert 'by position' not in by_name and 'Classes are in the checkpoint\'s order: c, b, a' in by_name
    assert run_class_finetuning.run(bare + flags + ['--class_names', image]) == 2
    names.write_text('a\nb\n')
    assert run_class_finetuning.run(bare + flags + ['--class_names', str(names)]) == 2
    assert 'names 2 classes' in capsys.readouterr().err


def test_a_subset_of_the_classes_is_evaluated_and_reported(trained, tmp_path, capsys):
    write_images(tmp_path / 'two', ('c', 'a'))
    assert run_class_finetuning.run(['--eval', '--resume', str(trained / 'out'), '--num_workers=0', '--data_path',
                                     str(tmp_path / 'two')]) == 0
    assert 'Evaluated on the logits of 2 of the 3 classes' in capsys.readouterr().out


def test_names_that_hold_a_comma_are_in_quotes():
    assert model_spec.shorten_names(['10', 'a,b', 'c;d', '9']) == '10, "a,b", c;d, 9'


def test_a_resume_onto_other_classes_is_refused(trained, tmp_path, capsys):
    for classes, name in ((('a', 'b', 'zebra'), 'zebra'), (('a', 'b'), 'c')):
        data = write_images(tmp_path / name, classes)
        assert run_class_finetuning.run(NANO + ['--resume', str(trained / 'out'), '--data_path', data, '--epochs=2',
                                                '--batch_size=4', '--warmup_epochs=0']) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and name in err and '--finetune' in err


def test_a_resume_with_another_kind_of_labels_is_refused(tmp_path, capsys):
    data = write_images(tmp_path / 'data', ('a', 'b'))
    names = ['%s/%d.png' % (name, index) for name in 'ab' for index in range(8)]
    for kind, label in (('several', 'a;b'), ('one', 'a')):
        (tmp_path / kind).write_text('path,label\n' + ''.join(
            'train/%s,%s\n' % (name, label if name == 'a/0.png' else name[0]) for name in names))
    flags = NANO + ['--data_path', data, '--output_dir', str(tmp_path / 'out'), '--batch_size=4', '--warmup_epochs=0',
                    '--val_csv', str(tmp_path / 'several')]
    assert run_class_finetuning.run(flags + ['--train_csv', str(tmp_path / 'several'), '--epochs=1']) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(flags[:-2] + ['--train_csv', str(tmp_path / 'one'), '--epochs=2', '--auto_resume',
                                                  '--val_csv', str(tmp_path / 'one')]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'loss bce' in err and '--loss bce' in err and '--finetune' in err


# ---- wrapped weights

def nano(classes=3):
    return modeling_finetune.beit_nano_patch8_32(num_classes=classes, use_rel_pos_bias=True, init_values=0.1)


def test_only_a_given_key_is_tried():
    state = nano().state_dict()
    for content in ({'model': state, 'model_ema': state}, state):
        with pytest.raises(UserError, match='nokey.*--model_key'):
            pretrained.find_state_dict(content, '--resume', 'x.pth', 'nokey')


def test_names_of_a_checkpoint_are_not_replaced(trained, tmp_path, capsys):
    (tmp_path / 'names').write_text('c\nb\na\n')
    assert run_predict.run(['--resume', str(trained / 'out'), '--class_names', str(tmp_path / 'names'),
                            str(trained / 'data' / 'val' / 'a' / '0.png')]) == 2
    assert 'has other class names (a, b, c)' in capsys.readouterr().err


def test_a_given_loss_is_used_for_evaluation(trained, tmp_path, capsys):
    losses = {}
    for flags in ((), ('--loss=bce',), ('--loss=ce',)):
        path = tmp_path / 'row.json'
        assert run_class_finetuning.run(['--eval', '--resume', str(trained / 'out'), '--num_workers=0', '--data_path',
                                         str(trained / 'data'), '--results_file', str(path), *flags]) == 0
        losses[flags] = json.loads(path.read_text())[0]['loss']
        assert ('--loss bce (the checkpoint: ce)' in capsys.readouterr().out) == (flags == ('--loss=bce',))
    assert losses[()] == losses[('--loss=ce',)] != losses[('--loss=bce',)]


def test_an_average_with_weights_without_metadata_is_refused(trained, tmp_path, capsys):
    files = [str(trained / 'out' / 'checkpoint-best.pth'), str(trained / 'bare.pth')]
    for order in (files, files[::-1]):
        assert average_checkpoints.run(['--inputs', *order, '--output', str(tmp_path / 'x.pth')]) == 2
        assert 'bare.pth: ' in capsys.readouterr().err


def test_bare_weights_report_their_size_and_the_assumptions(trained, capsys):
    assert run_class_finetuning.run(['--eval', '--resume', str(trained / 'bare.pth'), '--model=beit_nano_patch8_32',
                                     '--num_workers=0', '--data_path', str(trained / 'data')]) == 0
    out = capsys.readouterr().out
    assert 'input 32x32' in out and 'preprocessing' in out


def test_the_content_of_a_file_without_weights_is_named():
    with pytest.raises(UserError, match='net, epoch.*--model_key'):
        pretrained.find_state_dict({'net': {'blocks': [1]}, 'epoch': 2}, '--finetune', 'x.pth')
    state = {'net': nano().state_dict()}
    assert pretrained.find_state_dict(state, '--finetune', 'x.pth', 'net')[0] == 'net'
    with pytest.raises(UserError, match='encoder.*cls_token'):
        pretrained.find_state_dict(state, '--finetune', 'x.pth', 'net', 'encoder.')


def test_a_plain_vit_is_refused(tmp_path):
    vit = pytest.importorskip('timm.models.vision_transformer').VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=3)
    torch.save({'model': vit.state_dict()}, str(tmp_path / 'vit.pth'))
    with pytest.raises(UserError, match='not the weights of this --model.*q_bias'):
        pretrained.load_pretrained(nano(), str(tmp_path / 'vit.pth'))


def test_the_head_is_kept_where_names_match(tmp_path, capsys):
    model, path = nano(3), str(tmp_path / 'x.pth')
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    torch.save({'model': model.state_dict(), 'classes': ['cat', 'dog', 'emu']}, path)
    other = nano(4)
    start = other.head.weight.detach().clone()
    pretrained.load_pretrained(other, path, classes=['ant', 'cat', 'dog', 'zebu'])
    assert torch.equal(other.head.weight[1:3], model.head.weight[:2]) and torch.equal(
        other.head.bias[1:3], model.head.bias[:2]) and torch.equal(other.head.weight[[0, 3]], start[[0, 3]])
    assert '2 of 4 classes' in capsys.readouterr().out
    strange = nano(3)
    start = strange.head.weight.detach().clone()
    pretrained.load_pretrained(strange, path, classes=['x', 'y', 'z'])
    assert torch.equal(strange.head.weight, start) and 'other classes (cat, dog, emu)' in capsys.readouterr().out


# ---- Hugging Face's preprocessing

@pytest.mark.parametrize('content, expected', (
    (dict(size=224, do_center_crop=False, crop_size=224, resample=2, image_mean=[.5] * 3, image_std=[.5] * 3),
     EvalTransform(224, 1.0, 'bilinear', (.5,) * 3, (.5,) * 3, 'squash')),
    (dict(size={'shortest_edge': 438}, do_center_crop=True, crop_size={'height': 384, 'width': 384}, resample=3,
          image_mean=[.4, .5, .6], image_std=[.2] * 3),
     EvalTransform(384, 384 / 438, 'bicubic', (.4, .5, .6), (.2,) * 3))))
def test_hugging_faces_preprocessing_is_read(tmp_path, content, expected):
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(content))
    found = hf_names.hf_preprocessing(str(tmp_path / 'model.safetensors'))
    assert found.shorter_side == expected.shorter_side
    assert dataclasses.replace(found, crop_pct=1.0) == dataclasses.replace(expected, crop_pct=1.0)
    assert found.crop_pct == pytest.approx(expected.crop_pct, rel=2e-3)


@pytest.mark.parametrize('change', (dict(do_resize=False), dict(rescale_factor=1.), dict(image_mean=[.5]),
                                    dict(size='x'), dict(resample=9), dict(size={'height': 224, 'width': 200}),
                                    dict(size={'shortest_edge': 256}), dict(do_center_crop=True, crop_size=200)))
def test_preprocessing_that_is_not_computed_here_is_refused(tmp_path, change):
    content = dict(size=224, resample=2, image_mean=[.5] * 3, image_std=[.5] * 3)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(content, **change)))
    with pytest.raises(UserError, match='preprocessor_config.json'):
        hf_names.hf_preprocessing(str(tmp_path / 'model.safetensors'))


@needs_extra('safetensors')
def test_a_folder_that_contradicts_itself_is_refused(trained, tmp_path, capsys):
    folder, image = tmp_path / 'hf', str(trained / 'data' / 'val' / 'a' / '0.png')
    assert run_export.run(['--resume', str(trained / 'out'), '--format=huggingface', '--output', str(folder),
                           '--no_check']) == 0
    assert run_predict.run(['--resume', str(folder), image]) == 0
    for name, key, value in (('preprocessor_config.json', 'image_mean', [0.4] * 3),
                             ('preprocessor_config.json', 'resample', 2),
                             ('config.json', 'id2label', {'0': 'c', '1': 'b', '2': 'a'})):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(dict(json.loads(before), **{key: value})))
        capsys.readouterr()
        assert run_predict.run(['--resume', str(folder), image]) == 2
        assert 'differ in' in capsys.readouterr().err
        (folder / name).write_text(before)
