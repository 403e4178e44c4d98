"""Images as people have them: EXIF's rotation, transparency, formats of Pillow's plugins, the fit to the square."""

import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image, ImageOps, PngImagePlugin

import beit
import datasets
import run_class_finetuning
import run_export
import run_predict
from beit.checkpoint import inference_model
from beit.checkpoint.pretrained import adapt_state_dict
from beit.config import ModelConfig
from beit.data import decode, fast_decode, transforms
from beit.data.decode import Reading, load_image
from beit.data.transforms import EvalTransform
from beit.errors import UserError
from beit.model_spec import ModelSpec
from beit.outputs import export_formats
from helpers import NANO, ROOT, lines_of, needs_extra, photo, run_program

FOLLOW = Reading('followed')


def with_orientation(path, orientation, image=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image or photo(3, 30, 20)).save(str(path), exif=exif.tobytes(), quality=95)


# ---- EXIF

@pytest.mark.parametrize('ending', ('jpg', 'png', 'webp'))
@pytest.mark.parametrize('orientation', range(10))
def test_exif_is_followed_as_pillow_does(tmp_path, ending, orientation):
    if ending != 'jpg' and not hasattr(Image, 'Transpose'):
        pytest.skip('this Pillow writes no EXIF to %s' % ending)
    path = str(tmp_path / ('a.' + ending))
    with_orientation(path, orientation)
    with Image.open(path) as file:
        plain, upright = np.asarray(file.convert('RGB')), np.asarray(ImageOps.exif_transpose(file).convert('RGB'))
    assert np.array_equal(np.asarray(load_image(path)), plain)
    assert np.array_equal(np.asarray(load_image(path, FOLLOW)), upright)
    if fast_decode.decode_jpeg is not None:
        fast = fast_decode.load_tensor(path, FOLLOW).permute(1, 2, 0).numpy()
        assert fast.shape == upright.shape and np.abs(fast.astype(int) - upright).max() <= 1


def hostile_exif():
    entry = struct.pack('<HHII', 0x0112, 3, 1, 6)
    yield b'Exif\0\0'
    yield b'Exif\0\0II*\0' + b'\xff' * 40
    yield b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', 65535) + entry  # claims more entries than there are
    yield b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHII', 1, 0x0112, 5, 2 ** 31, 2 ** 31)  # a far offset
    yield b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHII', 1, 0x0112, 7, 4, 0xffffffff)
    yield b'MM\0*' + os.urandom(64)


@pytest.mark.parametrize('block', list(hostile_exif()), ids=range(6))
def test_hostile_exif_is_no_error(tmp_path, block):
    path = str(tmp_path / 'a.jpg')
    photo(3, 30, 20).save(path, exif=block)
    assert load_image(path, FOLLOW).size in ((30, 20), (20, 30))


# ---- transparency

def transparent_images():
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (9, 7, 4)).astype(np.uint8)
    yield 'RGBA', Image.fromarray(pixels), {}
    yield 'LA', Image.fromarray(pixels[..., :2], 'LA'), {}
    palette = Image.fromarray(pixels[..., 0] % 4).convert('P')
    yield 'P', palette, {'transparency': bytes([0, 255, 128, 9])}
    yield 'RGB', Image.fromarray(pixels[..., :3]), {'transparency': tuple(pixels[0, 0, :3].tolist())}
    yield 'L', Image.fromarray(pixels[..., 0]), {'transparency': int(pixels[0, 0, 0])}


@pytest.mark.parametrize('mode, image, options', list(transparent_images()),
                         ids=('RGBA', 'LA', 'P', 'RGB', 'L'))
@pytest.mark.parametrize('colour', ((255, 255, 255), (0, 0, 0), (10, 200, 30)))
def test_transparent_images_lie_on_the_background(tmp_path, mode, image, options, colour):
    path = str(tmp_path / 'a.png')
    image.save(path, **options)
    with Image.open(path) as file:
        assert decode.has_alpha(file)
        rgba = np.asarray(file.convert('RGBA')).astype(float)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + np.array(colour) * (1 - share)
    found = np.asarray(load_image(path, Reading(transparency='%d,%d,%d' % colour))).astype(float)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1
    opaque = str(tmp_path / 'b.png')
    photo(1, 8, 8).save(opaque)
    assert np.array_equal(load_image(opaque, Reading(transparency='%d,%d,%d' % colour)), load_image(opaque))


def test_colours(parse):
    for text, kept in (('white', 'white'), ('0, 128,255', '0,128,255'), ('Black', 'black'), ('', 'dropped')):
        assert EvalTransform.from_config(parse('--background', text)).transparency == kept
    for wrong in ('grey', '1,2', '1,2,256', '1,2,-3', 'a,b,c'):
        with pytest.raises(UserError, match='--background.*R,G,B'):
            parse('--background', wrong)


# ---- formats and limits

PLUGIN = '''
import struct
from PIL import Image, ImageFile

class FakeHeif(ImageFile.ImageFile):
    format = 'FAKEHEIF'

    def _open(self):
        self.fp.read(4)
        self._size, self._mode = struct.unpack('<HH', self.fp.read(4)), 'RGB'
        self.tile = [('raw', (0, 0) + self._size, 8, ('RGB', 0, 1))]

def register_heif_opener():
    Image.register_open('FAKEHEIF', FakeHeif, lambda start: start[:4] == b'HEIF')
    Image.register_extension('FAKEHEIF', '.heic')
'''
USE = '''
import sys
sys.path[:0] = [%r, %r]
from beit.data import decode
print('.heic' in decode.image_extensions(), decode.load_image(%r).size)
'''


@pytest.mark.current_only
def test_a_plugin_of_pillow_reads_its_files(tmp_path):
    (tmp_path / 'pillow_heif.py').write_text(PLUGIN)
    path = tmp_path / 'a.heic'
    path.write_bytes(b'HEIF' + struct.pack('<HH', 5, 4) + bytes(60))
    with pytest.raises(decode.UnreadableImage, match='a.heic.*the package pillow-heif'):
        load_image(str(path))
    found = subprocess.run([sys.executable, '-c', USE % (str(tmp_path), ROOT, str(path))], stdout=subprocess.PIPE)
    assert found.stdout.decode().strip() == 'True (5, 4)'


def test_skipped_heic_files_name_the_package(image_folder, parse, capsys):
    root = image_folder()
    with open(os.path.join(root, 'train', 'cat', 'x.HEIC'), 'wb') as file:
        file.write(b'x')
    datasets.build_dataset(True, parse('--data_path', root))
    assert '1 .heic); pip install pillow-heif reads' in capsys.readouterr().out


@pytest.mark.parametrize('ending', ('jfif', 'gif', 'jpe', 'tif', 'bmp', 'webp', 'avif'))
def test_endings_of_pillow_are_images(tmp_path, ending):
    if '.' + ending not in Image.registered_extensions():
        pytest.skip('this Pillow has no ' + ending)
    path = str(tmp_path / ('a.' + ending))
    photo(2, 12, 9).save(path)
    assert '.' + ending in decode.image_extensions() and load_image(path).size == (12, 9)


def test_large_texts_follow_max_pixels(tmp_path, monkeypatch):
    """A PNG with more text than the limit is unreadable; the message names the flag that raises it."""
    monkeypatch.setattr(PngImagePlugin, 'MAX_TEXT_CHUNK', 1000)
    monkeypatch.setattr(decode, 'TEXT_BYTES', 1000)
    info, path = PngImagePlugin.PngInfo(), str(tmp_path / 'a.png')
    info.add_text('note', 'x' * 5000, zip=True)
    photo(1, 8, 8).save(path, pnginfo=info)
    with pytest.raises(decode.UnreadableImage, match='--max_pixels raises the limit'):
        load_image(path)
    assert EvalTransform().reader('exact', 5001)(path).size == (8, 8)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1000


def test_the_flag_has_its_former_name(parse):
    assert parse('--max_image_pixels=7').max_pixels == parse('--max_pixels=7').max_pixels == 7


# ---- the fit to the square

SIZES = ((64, 64), (90, 50), (50, 91), (301, 7), (7, 301), (33, 48))


@pytest.mark.current_only
@pytest.mark.parametrize('fit', ('crop', 'squash', 'letterbox'))
@pytest.mark.parametrize('flags', ([], ['--imagenet_default_mean_and_std']), ids=('half', 'imagenet'))
def test_a_fit_is_timms(parse, fit, flags):
    from timm.data import create_transform
    evaluation = EvalTransform.from_config(parse('--input_size=48', '--eval_fit', fit, *flags))
    timms = create_transform(**evaluation.to_timm())
    mean, std = torch.tensor(evaluation.mean), torch.tensor(evaluation.std)
    for width, height in SIZES:
        image = photo(5, width, height)
        found = (evaluation.build()(image).float() / 255 - mean) / std
        assert torch.allclose(found.permute(2, 0, 1), timms(image), atol=1e-5), (width, height)


@pytest.mark.current_only
@pytest.mark.parametrize('fit', ('crop', 'squash', 'letterbox'))
def test_fast_fits_as_exact_does(parse, fit):
    evaluation = EvalTransform.from_config(parse('--input_size=48', '--eval_fit', fit))
    assert evaluation.is_fast('fast')
    for width, height in SIZES:
        image = photo(5, width, height)
        exact, fast = (evaluation.build(kind)(image).int() for kind in ('exact', 'fast'))
        assert exact.shape == fast.shape and (exact - fast).abs().max() <= 2, (width, height)


@pytest.mark.parametrize('flags, words', (
    (['--eval_fit=squash', '--crop_pct=0.8'], '--eval_fit squash: --crop_pct 0.8 crops'),
    (['--eval_fit=letterbox', '--input_size=32'], '--eval_fit letterbox: images for --input_size 32 are not resized')))
def test_contradicting_fits_are_refused(refused, flags, words):
    refused(['--data_path=demo', '--model=beit_nano_patch8_32', '--input_size=48'] + flags, words)


# ---- kept with the checkpoint

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A training on rotated transparent images, with all three settings."""
    folder = tmp_path_factory.mktemp('trained')
    for part in ('train', 'val'):
        for label, name in enumerate(('a', 'b')):
            (folder / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = np.asarray(photo(10 * label + index, 60, 41)).copy()
                image = Image.fromarray(np.dstack([pixels, pixels[..., 0]]))
                image.save(str(folder / part / name / ('%d.png' % index)))
                with_orientation(folder / part / name / ('%d.jpg' % index), 6, Image.fromarray(pixels))
    out = str(folder / 'out')
    _, text, _ = run_program(*NANO, '--data_path', str(folder), '--input_size=48', '--exif=follow',
                              '--background=white', '--eval_fit=letterbox', '--output_dir', out, '--epochs=1',
                              '--batch_size=4', '--warmup_epochs=0')
    return str(folder), out, text


@pytest.mark.current_only
@needs_extra('safetensors')
def test_the_settings_go_with_the_checkpoint(trained, capsys, tmp_path):
    folder, out, text = trained
    assert '8 of 16 images (a sample) have an alpha channel: they get the background white' in text
    best = torch.load(os.path.join(out, 'checkpoint-best.pth'), weights_only=True)
    images = best['model_spec']['preprocessing']
    assert (images['exif'], images['transparency'], images['crop_mode']) == ('followed', 'white', 'border')
    paths = [os.path.join(folder, 'val', 'a', name) for name in ('0.png', '0.jpg')]

    classifier = beit.load(out)
    for path in paths:
        with Image.open(path) as file:
            expected = ImageOps.exif_transpose(file)
            canvas = Image.new('RGBA', expected.size, 'white')
            canvas.alpha_composite(expected.convert('RGBA'))
            inputs = classifier.transform(canvas.convert('RGB'))
            assert torch.equal(classifier.transform(path), inputs)
            assert torch.equal(classifier.transform(file), inputs)
    assert run_predict.run(['--resume', out, '--num_workers=0', '--output', str(tmp_path / 'p.json')] + paths) == 0
    rows = json.loads((tmp_path / 'p.json').read_text())
    for path, row in zip(paths, rows):
        name, probability = classifier.predict(path, 1)[0]
        assert row['predictions'][0]['probability'] == pytest.approx(probability, abs=1e-5)
        assert row['predictions'][0]['class'] == name

    capsys.readouterr()
    target = str(tmp_path / 'x.safetensors')
    assert run_export.run(['--resume', out, '--format=safetensors', '--output', target, '--no_check']) == 0
    assert 'does not know that images are turned as EXIF says, transparent images get the background white' in \
        capsys.readouterr().out
    assert beit.load(target).spec.preprocessing == classifier.spec.preprocessing
    assert run_export.run(['--resume', out, '--format=huggingface', '--output', str(tmp_path / 'hf')]) == 2
    err = capsys.readouterr().err
    assert 'has no --eval_fit letterbox; use' in err and '--in_chans' not in err and not (tmp_path / 'hf').exists()


@pytest.mark.current_only
def test_an_evaluation_names_other_settings(trained, capsys, tmp_path):
    folder, out, _ = trained
    run = run_class_finetuning.run
    flags = ['--eval', '--resume', out, '--data_path', folder, '--num_workers=0', '--device=cpu']
    target = str(tmp_path / 'evaluated')
    assert run(flags + ['--output_dir', target, '--results_file', str(tmp_path / 'r.json')]) == 0
    assert '--exif=follow' in capsys.readouterr().out
    with open(os.path.join(target, 'eval-args.yaml'), encoding='utf-8') as file:
        recorded = yaml.safe_load(file)
    row, = json.loads((tmp_path / 'r.json').read_text())
    for found in (recorded, row):
        assert (found['exif'], found['background'], found['eval_fit']) == ('follow', 'white', 'letterbox')
    assert run(flags + ['--exif=ignore', '--background=']) == 0
    text = capsys.readouterr().out
    assert 'exif ignored (the checkpoint: followed), transparency dropped (the checkpoint: white)' in text
    assert '8 of 16 images (a sample) have an alpha channel: it is dropped; --background white' in text
    assert run(flags + ['--crop_pct=0.8']) == 2
    assert '--crop_pct 0.8' in capsys.readouterr().err


@pytest.mark.current_only
def test_options_of_the_loader_are_checked(trained):
    _, out, _ = trained
    assert beit.load(out, exif='ignore').spec.preprocessing.exif == 'ignored'
    for options, word in ((dict(exif='bogus'), 'bogus'), (dict(background='purple'), 'purple'),
                          (dict(eval_fit='stretch'), 'crop mode'), (dict(model=''), "^--model: unknown value ''")):
        with pytest.raises(UserError, match=word):
            beit.load(out, **options)
    with pytest.raises(TypeError, match='eval_fitt'):
        beit.load(out, eval_fitt='crop')


def test_damaged_flags_of_a_checkpoint_are_refused():
    for change in (dict(exif='x'), dict(eval_fit='x'), dict(background='pink'), dict(in_chans=5)):
        with pytest.raises(ValueError):
            ModelSpec.from_flags(dict(change, model='beit_nano_patch8_32'), None, 2)


def test_a_letterbox_of_a_damaged_file_is_refused():
    for change in (dict(transparency='pink'), dict(exif='x'), dict(crop_mode='stretch'), dict(transparency='1,2')):
        with pytest.raises(ValueError):
            EvalTransform(**change).check()


# ---- --in_chans

def stored(path, mode):
    """An image of another mode with photo-like bands."""
    pixels = np.asarray(photo(3, 40, 30))
    if mode == 'L':
        Image.fromarray(pixels[..., 0]).save(path)
    elif mode in ('RGBA', 'CMYK'):
        Image.fromarray(np.dstack([pixels, pixels[..., 1]]), mode).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize('mode, ending', (('L', 'png'), ('RGB', 'png'), ('RGBA', 'png'), ('CMYK', 'jpg'), ('P', 'png'),
                                          ('LA', 'png'), ('RGBA', 'tif'), ('1', 'png')))
def test_images_are_read_with_each_number_of_channels(tmp_path, mode, ending):
    path = str(tmp_path / ('a.' + ending))
    stored(path, mode)
    with Image.open(path) as file:
        file.load()
        rgb = file.convert('RGB')
        grey = file.convert('L')
        rgba = rgb.convert('RGBA') if mode == 'CMYK' else file.convert('RGBA')
    assert np.array_equal(load_image(path), rgb)
    assert np.array_equal(load_image(path, Reading(channels=1)), grey)
    assert np.array_equal(load_image(path, Reading(channels=4)), rgba)


@pytest.mark.parametrize('channels', (1, 4))
def test_patches_are_adapted_as_timm_does(channels, capsys):
    pretrained = inference_model.build_model(ModelConfig(model='beit_nano_patch8_32', input_size=32), 3)
    model = inference_model.build_model(ModelConfig(model='beit_nano_patch8_32', input_size=32, in_chans=channels), 3)
    state = dict(pretrained.state_dict())
    weight = state['patch_embed.proj.weight']
    adapt_state_dict(state, model)
    model.load_state_dict(state, strict=False)
    assert 'adapted from 3 channels to %d' % channels in capsys.readouterr().out
    grey = weight.sum(1, keepdim=True)
    expected = grey if channels == 1 else torch.cat([weight, weight[:, :1]], 1) * 0.75
    assert torch.allclose(model.patch_embed.proj.weight, expected)
    if hasattr(timm.models, 'adapt_input_conv'):
        assert torch.equal(model.patch_embed.proj.weight, timm.models.adapt_input_conv(channels, weight))
    if channels == 1:  # a grey image in three channels gives the same
        image = torch.randn(2, 1, 32, 32)
        with torch.no_grad():
            assert torch.allclose(model.eval()(image), pretrained.eval()(image.expand(-1, 3, -1, -1)), atol=1e-5)


@pytest.mark.parametrize('channels, size, policy', [
    (1, size, policy) for size in (32, 48)
    for policy in ('rand-m9-mstd0.5-inc1', 'rand-m10-n4', 'original', 'v0', 'augmix-m3-w3', 'none')] + [
        (4, 48, 'none')])
def test_augmentations_of_other_channels(parse, channels, size, policy):
    config = parse('--in_chans=%d' % channels, '--input_size=%d' % size, '--aa', policy)
    if policy.startswith('augmix') and not hasattr(timm.models, 'adapt_input_conv'):
        with pytest.raises(UserError, match='--aa augmix-m3-w3: this timm cannot apply it to images of --in_chans 1'):
            transforms.check_policy(policy, channels)
        return
    transforms.check_policy(policy, channels)
    transform = transforms.build_transform(True, config)
    image = photo(1, 60, 50).convert(decode.MODES[channels])
    torch.manual_seed(0)
    different = set()
    for _ in range(25):
        pixels = transform(image)
        assert pixels.shape == (size, size, channels) and pixels.dtype == torch.uint8
        different.add(pixels.float().mean().item())
    assert len(different) > 10


def test_means_of_other_channels(parse):
    half = EvalTransform.from_config(parse('--in_chans=1'))
    assert half.mean == half.std == (0.5,) and EvalTransform.from_config(parse('--in_chans=4')).mean == (0.5,) * 4
    imagenet = EvalTransform.from_config(parse('--in_chans=4', '--imagenet_default_mean_and_std'))
    assert imagenet.mean[:3] == (0.485, 0.456, 0.406) and imagenet.mean[3] == pytest.approx(0.449)
    assert imagenet.to_timm()['input_size'] == (4, 224, 224)
    assert EvalTransform.from_timm(imagenet.to_timm()) == imagenet


@pytest.fixture(scope='module', params=(1, 4))
def other_channels(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('channels')
    for part in ('train', 'val'):
        for name in ('a', 'b'):
            (folder / part / name).mkdir(parents=True)
            for index in range(6):
                stored(str(folder / part / name / ('%d.png' % index)), ('L', 'RGB', 'RGBA', 'LA')[index % 4])
    (folder / 'train' / 'a' / 'bad.png').write_bytes(b'x')
    out = str(folder / 'out')
    status, _, err = run_program(*NANO, '--data_path', str(folder), '--input_size=48', '--epochs=1', '--batch_size=4',
                                 '--in_chans=%d' % request.param, '--warmup_epochs=0', '--output_dir', out, '--report',
                                 '--bad_images=skip', '--max_bad_images=0.5',
                                 *(['--aa=none'] if request.param == 4 else []))
    assert status == 0, err
    return request.param, str(folder), out


@pytest.mark.current_only
@needs_extra('onnx', 'onnxruntime', 'onnxscript', 'safetensors')
def test_other_channels_train_predict_and_export(other_channels, tmp_path, capsys):
    channels, folder, out = other_channels
    image = os.path.join(folder, 'val', 'a', '2.png')
    classifier = beit.load(out)
    expected = np.asarray(Image.open(image).convert(decode.MODES[channels])).reshape(30, 40, channels)
    classifier.spec.preprocessing.check()
    inputs = classifier.transform(image)
    converted = timm.data.create_transform(**classifier.spec.preprocessing.to_timm())(
        Image.open(image).convert(decode.MODES[channels]))  # as the export to timm says
    assert torch.allclose(converted, inputs, atol=1e-6)
    assert inputs.shape == (channels, 48, 48) and expected.shape[2] == channels
    logged = lines_of(out)[-1]['test_acc1']
    assert run_class_finetuning.run(['--eval', '--resume', out, '--data_path', folder, '--num_workers=0',
                                     '--device=cpu']) == 0
    assert '%.3f' % logged in capsys.readouterr().out
    assert run_predict.run(['--resume', out, '--num_workers=0', image, '--attention', '--attention_dir',
                            str(tmp_path / 'maps')]) == 0
    assert len(list((tmp_path / 'maps').iterdir())) == 1
    for form in ('onnx', 'safetensors', 'torchscript'):
        target = str(tmp_path / form) + export_formats.FORMATS[form].ending
        assert run_export.run(['--resume', out, '--format', form, '--output', target]) == 0
        said = capsys.readouterr().out
        assert 'Checked: logits differ' in said
        assert (".convert('%s')" % decode.MODES[channels] in said) == (form == 'safetensors')
    import onnxruntime
    session = onnxruntime.InferenceSession(str(tmp_path / 'onnx.onnx'), providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape[1:] == [channels, 48, 48]
    with torch.no_grad():
        logits = session.run(None, {'image': inputs[None].numpy()})[0]
        assert np.allclose(logits, classifier.model(inputs[None]).numpy(), atol=1e-5)
    assert beit.load(str(tmp_path / 'safetensors.safetensors')).spec == classifier.spec
    assert run_export.run(['--resume', out, '--format=huggingface', '--output', str(tmp_path / 'hf')]) == 2
    assert 'its preprocessor reads RGB, not --in_chans %d; use' % channels in capsys.readouterr().err
    assert run_class_finetuning.run(['--eval', '--resume', out, '--data_path', folder, '--in_chans=3']) == 2
    err = capsys.readouterr().err
    assert re.search('--in_chans 3: %s.* prepares images of (1 channel|4 channels); leave' % out, err)
    loaded = beit.load(out, imagenet_default_mean_and_std=channels == 3)
    assert loaded.spec.preprocessing.mean == classifier.spec.preprocessing.mean
    if channels == 4:
        with pytest.raises(UserError, match='--background'):
            beit.load(out, background='white')


@pytest.mark.parametrize('flags, words', (
    (['--in_chans=2'], "--in_chans"), (['--in_chans=4'], '--in_chans 4: it keeps the alpha channel'),
    (['--in_chans=4', '--aa=none', '--background=white'], '--background white: --in_chans 4'),
    (['--in_chans=1', '--data_backend=fast'], '--in_chans 1: the backend fast reads RGB')))
def test_channels_that_cannot_be_are_refused(refused, flags, words):
    refused(NANO + ['--data_path=demo'] + flags, words)


def test_an_unreadable_batch_has_the_channels(parse):
    from beit.data.device_loader import PrefetchLoader
    from beit.data.loader import Unreadable, collate
    loader = PrefetchLoader(None, torch.device('cpu'), (0.5,) * 4, (0.5,) * 4)
    assert loader.prepare(collate([Unreadable('a', 'b')], 48)).images.shape == (0, 4, 48, 48)
