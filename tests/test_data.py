"""Data: transforms against recorded and computed figures, image formats, folders, order, randomness."""

import contextlib
import functools
import inspect
import json
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm.data.mixup
import torch
import torchvision
from PIL import Image, PngImagePlugin, TiffImagePlugin, features

import datasets
import run_class_finetuning
from beit import paths
from beit.config import TransformConfig
from beit.data import class_folders, decode, locations, transforms, unreadable
from beit.data.device_loader import PrefetchLoader, RandomErasingBoxes
from beit.data.image_dataset import ImageDataset
from beit.data.loader import Batch, EpochSampler, OrderedDistributedSampler, SampleDataset, SeededDataset, collate
from beit.data.sample_list import SampleList
from beit.distributed import collectives
from beit.errors import UserError
from flags import config_from
from helpers import NANO, ROOT, RUN, cannot_run, free_port, photo, write_cifar

pytestmark = [pytest.mark.fast, pytest.mark.computes]

RGB = (200, 30, 90)
PLAIN = ('--aa=none', '--color_jitter=0', '--reprob=0')  # a training transform with crops and mirroring only


def evaluation_by_hand(image, size, resized):
    """Resize the shorter side to `resized`, crop the centre, scale to -1..1: with Pillow and NumPy alone."""
    width, height = image.size
    shorter = min(width, height)
    new = (int(resized * width / shorter), int(resized * height / shorter))
    pixels = np.asarray(image.resize(new, Image.BICUBIC)).astype(np.float64)
    top, left = int(round((new[1] - size) / 2.)), int(round((new[0] - size) / 2.))
    return (pixels[top:top + size, left:left + size].transpose(2, 0, 1) / 255. - 0.5) / 0.5


def pixels_of(tensor):
    """A normalised (3, H, W) tensor back to bytes (H, W, 3)."""
    return np.rint((tensor.numpy() * 0.5 + 0.5) * 255.).astype(np.int64).transpose(1, 2, 0)


def transform_of(is_train, args):
    """The program's transform of a Pillow image, first in a worker and then on the device."""
    erasing = RandomErasingBoxes(args.reprob, args.recount) if is_train and args.reprob else None
    evaluation = transforms.EvalTransform.from_config(args)
    finish = PrefetchLoader(None, torch.device('cpu'), evaluation.mean, evaluation.std, remode=args.remode)
    worker = transforms.build_transform(is_train, args)

    def transform(image):
        item = SampleDataset([(worker(image), 0)], erasing=erasing)[0]
        return finish.prepare(collate([item], args.input_size)).images[0]
    return transform


# ---- the evaluation transform

@pytest.mark.parametrize('flags, size, shorter_side, crop_pct', [
    ((), 224, 256, 0.875), (('--input_size=384',), 384, 384, 1.), (('--input_size=32',), 32, 32, 1.),
    (('--input_size=48', '--crop_pct=0.9', '--imagenet_default_mean_and_std'), 48, 53, 0.9)])
def test_the_evaluation_transform_survives_json(flags, size, shorter_side, crop_pct, parse):
    evaluation = transforms.EvalTransform.from_config(config_from(parse(*flags), TransformConfig))
    assert (evaluation.input_size, evaluation.shorter_side, evaluation.crop_pct) == (size, shorter_side, crop_pct)
    assert (evaluation.mean != (0.5,) * 3) == ('--imagenet_default_mean_and_std' in flags)
    words = json.loads(json.dumps(evaluation.to_timm()))
    assert transforms.EvalTransform.from_timm(words) == evaluation
    assert evaluation.fits(size, size) and evaluation.fits(size, size + 1) == (size > 32)
    for name, value in (('input_size', [3, size, size + 1]), ('input_size', [3, 1e9, 1e9]), ('crop_pct', 0),
                        ('crop_pct', float('nan')), ('mean', None)):
        with pytest.raises((ValueError, TypeError, LookupError)):
            transforms.EvalTransform.from_timm(dict(words, **{name: value}))


def test_evaluation_transform_gives_the_recorded_pixels(golden, parse):
    recorded = golden('eval_transform.npz')
    ours = transform_of(False, parse('--input_size=224'))(Image.fromarray(recorded['photo']))
    assert ours.dtype == torch.float32 and tuple(ours.shape) == (3, 224, 224)
    assert np.abs(ours.numpy() - recorded['eval_224']).max() <= 2 / 255. + 1e-6  # one step of 255, after the /0.5


@pytest.mark.parametrize('flags, size, resized', [
    ((), 224, 256),
    (('--input_size=192',), 192, 219),
    (('--input_size=384',), 384, 384),
    (('--input_size=512',), 512, 512),
    (('--crop_pct=1.0',), 224, 224),
    (('--crop_pct=0.5',), 224, 448),
    (('--input_size=384', '--crop_pct=0.875'), 384, 438),
    (('--input_size=40',), 40, 45),
], ids=str)
@pytest.mark.parametrize('portrait', [False, True])
def test_crop_pct(golden, parse, flags, size, resized, portrait):
    image = Image.fromarray(golden('eval_transform.npz')['photo'])
    if portrait:
        image = image.transpose(Image.ROTATE_90)
    ours = transform_of(False, parse(*flags))(image).numpy()
    assert np.abs(ours - evaluation_by_hand(image, size, resized)).max() <= 2 / 255. + 1e-6


@pytest.mark.parametrize('size', [16, 32])
def test_small_images_are_evaluated_as_they_are(parse, size):
    image = photo(3, size, size)
    ours = transform_of(False, parse('--input_size=%d' % size))(image)
    assert np.array_equal(pixels_of(ours), np.asarray(image))


def test_imagenet_mean_and_deviation(parse):
    image = Image.new('RGB', (64, 64), RGB)
    expected = (np.array(RGB) / 255. - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for is_train in (False, True):
        args = parse('--input_size=48', '--imagenet_default_mean_and_std', *PLAIN)
        ours = transform_of(is_train, args)(image).numpy()
        assert ours.shape == (3, 48, 48)
        assert np.abs(ours - expected[:, None, None]).max() < 1e-5, 'is_train=%s' % is_train


# ---- the training transform

def shifts_of(output, image, padding=4):
    """The (down, right) offsets at which `output` is a crop of the zero-padded image."""
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)), mode='constant')
    side = output.shape[0]
    return [(down, right) for down in range(2 * padding + 1) for right in range(2 * padding + 1)
            if np.array_equal(output, padded[down:down + side, right:right + side])]


@pytest.mark.parametrize('hflip', [0, 1])
def test_small_inputs_train_on_shifted_crops(parse, hflip):
    image = photo(5, 32, 32)
    transform = transform_of(True, parse('--input_size=32', '--hflip=%d' % hflip, *PLAIN))
    found = set()
    for seed in range(30):
        random.seed(seed)
        torch.manual_seed(seed)
        tensor = transform(image)
        assert tensor.dtype == torch.float32 and tuple(tensor.shape) == (3, 32, 32)
        shifts = shifts_of(pixels_of(tensor)[:, ::-1] if hflip else pixels_of(tensor), image)
        assert len(shifts) == 1, 'seed %d is no crop of the image padded by 4' % seed
        found.update(shifts)
    assert len(found) > 10 and max(max(shift) for shift in found) > 4 > min(min(shift) for shift in found)


def test_half_of_the_images_are_mirrored_by_default(parse):
    image = photo(5, 32, 32)
    transform = transform_of(True, parse('--input_size=32', *PLAIN))
    torch.manual_seed(0)
    random.seed(0)
    mirrored = sum(not shifts_of(pixels_of(transform(image)), image) for _ in range(200))
    assert 70 < mirrored < 130  # four standard deviations


def test_large_inputs_train_on_resized_crops(parse):
    image = photo(6, 320, 240)
    outputs = {}
    for hflip in (0, 1):
        transform = transform_of(True, parse('--input_size=64', '--hflip=%d' % hflip, *PLAIN))
        for seed in range(4):
            random.seed(seed)
            torch.manual_seed(seed)
            outputs[hflip, seed] = transform(image)
            assert outputs[hflip, seed].dtype == torch.float32
            assert tuple(outputs[hflip, seed].shape) == (3, 64, 64)
            assert -1 <= outputs[hflip, seed].min() < outputs[hflip, seed].max() <= 1
    for seed in range(4):
        assert torch.equal(outputs[1, seed], outputs[0, seed].flip(2)), 'hflip=1 mirrors the same crop'
    assert not torch.equal(outputs[0, 0], outputs[0, 1])


@pytest.mark.parametrize('size', [32, 96])
def test_default_augmentations_give_finite_tensors(parse, size):
    transform = transform_of(True, parse('--input_size=%d' % size))
    for seed in range(20):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        tensor = transform(photo(seed, size, size))
        assert tuple(tensor.shape) == (3, size, size) and bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize('remode', ['const', 'rand', 'pixel'])
def test_random_erasing_writes_what_remode_says(parse, remode):
    flags = ('--input_size=64', '--aa=none', '--color_jitter=0', '--reprob=1', '--remode=%s' % remode)
    tensor = transform_of(True, parse(*flags))(Image.new('RGB', (64, 64), RGB))
    untouched = torch.tensor([value / 255. * 2 - 1 for value in RGB]).view(3, 1, 1)
    erased = ((tensor - untouched).abs() > 1e-4).any(0)
    assert 0 < int(erased.sum()) < 64 * 64
    values = len({tuple(pixel) for pixel in tensor[:, erased].t().tolist()})
    assert values == 1 if remode in ('const', 'rand') else values > 1
    assert remode != 'const' or bool((tensor[:, erased] == 0).all())


@pytest.mark.parametrize('policy', ['none', 'rand-m9-mstd0.5-inc1', 'rand-m5-n3', 'augmix-m3-w3', 'v0', 'v0r',
                                    'original', 'originalr'])
def test_known_policies_pass_and_work(parse, policy):
    transforms.check_policy(policy)
    transform = transform_of(True, parse('--input_size=48', '--aa=%s' % policy))
    assert tuple(transform(photo(1, 64, 64)).shape) == (3, 48, 48)


# ---- kinds of image files

def assert_loads_as(path, expected, tolerance=0):
    """`load_image` gives 8-bit RGB with these pixels, (H, W, 3)."""
    image = decode.load_image(str(path))
    assert image.mode == 'RGB'
    difference = np.abs(np.asarray(image).astype(np.int64) - np.asarray(expected).astype(np.int64))
    assert difference.shape == np.asarray(expected).shape and difference.max() <= tolerance


def grey_as_rgb(grey):
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


RAMP = np.arange(256).reshape(16, 16).astype(np.uint8)


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.ppm', '.tif'])
def test_rgb_comes_back_unchanged(tmp_path, suffix):
    image = photo(1, 40, 30)
    image.save(str(tmp_path / ('a' + suffix)))
    assert_loads_as(tmp_path / ('a' + suffix), np.asarray(image))


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif', '.pgm'])
def test_greyscale(tmp_path, suffix):
    Image.fromarray(RAMP).save(str(tmp_path / ('a' + suffix)))
    assert_loads_as(tmp_path / ('a' + suffix), grey_as_rgb(RAMP))


def test_greyscale_jpeg(tmp_path):
    Image.new('L', (24, 24), 77).save(str(tmp_path / 'a.jpeg'))
    assert_loads_as(tmp_path / 'a.jpeg', np.full((24, 24, 3), 77), tolerance=1)


def palette_image():
    """(palette image, its pixels as RGB)."""
    colours = [RGB, (10, 20, 30), (250, 251, 252), (0, 128, 0)]
    indices = (np.arange(64) % 4).reshape(8, 8).astype(np.uint8)
    image = Image.fromarray(indices, mode='P') if not hasattr(Image, 'Resampling') else Image.frombytes(
        'P', (8, 8), indices.tobytes())
    image.putpalette([part for colour in colours for part in colour] + [0] * (768 - 12))
    return image, np.array(colours)[indices]


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif'])
def test_palette(tmp_path, suffix):
    image, expected = palette_image()
    image.save(str(tmp_path / ('a' + suffix)))
    assert_loads_as(tmp_path / ('a' + suffix), expected)


@pytest.mark.parametrize('transparency', [1, bytes([0, 255, 128, 9])], ids=['one index', 'one alpha per index'])
def test_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    image, expected = palette_image()
    image.save(str(tmp_path / 'a.png'), transparency=transparency)
    with Image.open(str(tmp_path / 'a.png')) as written:
        assert written.mode == 'P' and 'transparency' in written.info
    assert_loads_as(tmp_path / 'a.png', expected)


def test_cmyk_jpeg(tmp_path):
    Image.new('RGB', (32, 32), RGB).convert('CMYK').save(str(tmp_path / 'a.jpg'), quality=98)
    with Image.open(str(tmp_path / 'a.jpg')) as written:
        assert written.mode == 'CMYK'
    assert_loads_as(tmp_path / 'a.jpg', np.full((32, 32, 3), RGB), tolerance=6)


def test_sixteen_bit_greyscale_is_scaled_not_cut(tmp_path):
    Image.fromarray(RAMP).save(str(tmp_path / 'eight.png'))
    deep = Image.frombytes('I;16', (16, 16), (RAMP.astype('<u2') * 257).tobytes())
    deep.save(str(tmp_path / 'sixteen.png'))
    with Image.open(str(tmp_path / 'sixteen.png')) as written:
        assert written.mode.startswith('I')
    assert_loads_as(tmp_path / 'sixteen.png', np.asarray(decode.load_image(str(tmp_path / 'eight.png'))))
    between = np.array([[0, 128, 129, 256, 32768, 65406, 65535]], dtype='<u2')  # half a step of 257 is 128.5
    Image.frombytes('I;16', (7, 1), between.tobytes()).save(str(tmp_path / 'between.png'))
    assert_loads_as(tmp_path / 'between.png', grey_as_rgb([[0, 0, 1, 1, 128, 254, 255]]))


@pytest.mark.parametrize('kind, low, high', [('<f4', 0., 1.), ('<f4', -50., 200.), ('<i4', -1000, 3000)])
def test_numbers_of_a_range_that_the_file_gives_are_scaled(tmp_path, kind, low, high):
    values = np.linspace(low, high, 256).astype(kind).reshape(16, 16)
    image = Image.fromarray(values)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in zip((340, 341), (low, high)):
        tags[tag], tags.tagtype[tag] = float(value), 12  # SMinSampleValue, SMaxSampleValue; a double
    image.save(str(tmp_path / 'a.tif'), tiffinfo=tags)
    expected = (values.astype(np.float64) - low) / (high - low) * 255
    assert_loads_as(tmp_path / 'a.tif', grey_as_rgb(np.floor(expected + 0.5)))


def grey_tiff(path, packed, bits, photometric):
    """Write a TIFF file of 16 x 16 packed samples by hand."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 16),
            (279, len(packed))]
    entries = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    path.write_bytes(b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + packed)


def test_twelve_bits_and_white_as_zero(tmp_path):
    values = np.arange(256) * 16 + 15  # of 4095
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    grey_tiff(tmp_path / 'a.tif', packed.astype(np.uint8).tobytes(), 12, 1)
    assert_loads_as(tmp_path / 'a.tif', grey_as_rgb(np.floor(values.reshape(16, 16) * 255 / 4095 + 0.5)))
    grey_tiff(tmp_path / 'b.tif', (RAMP.astype('<u2') * 257).tobytes(), 16, photometric=0)
    if decode.is_image_file(str(tmp_path / 'b.tif')):  # older Pillows don't support it
        assert_loads_as(tmp_path / 'b.tif', grey_as_rgb(255 - RAMP))


@pytest.mark.parametrize('name, mode', [('a.tif', 'F'), ('a.tif', 'I'), ('a.im', 'F')])
def test_numbers_of_no_known_range_are_refused_by_name(tmp_path, name, mode):
    Image.new(mode, (8, 8), 1).save(str(tmp_path / name))
    with pytest.raises(decode.UnreadableImage, match='%s: .*%s of unknown range.*SMinSampleValue' % (
            name, {'F': 'floats', 'I': 'integers'}[mode])):
        decode.load_image(str(tmp_path / name))


def test_eps_is_not_given_to_ghostscript(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    with pytest.raises(decode.UnreadableImage, match='EPS files are not decoded'):
        decode.load_image(str(tmp_path / 'a.jpg'))
    assert not decode.is_image_file(str(tmp_path / 'a.jpg'))


def test_a_png_with_much_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt('workflow', 'x' * 3000000, zip=True)
    Image.new('RGB', (8, 8), RGB).save(str(tmp_path / 'a.png'), pnginfo=text)
    assert_loads_as(tmp_path / 'a.png', np.full((8, 8, 3), RGB))


@pytest.mark.parametrize('workers', [0, 2])
def test_the_first_of_several_pages_is_used_and_reported_once(image_folder, parse, capsys, monkeypatch, workers):
    monkeypatch.setattr(PrefetchLoader, 'logged_first_page', False)
    root, first = image_folder(train=1, val=4), np.full((32, 32, 3), RGB, np.uint8)
    pages = [Image.new('RGB', (32, 32), (9, 9, 9 + number)) for number in range(3)]
    for name in ('1.tif', '2.tif', '3.gif'):
        images = [image.quantize(4) if name == '3.gif' else image for image in [Image.fromarray(first)] + pages]
        images[0].save(os.path.join(root, 'val', 'cat', name), save_all=True, append_images=images[1:])
    args = parse('--data_path', root, *NANO, '--num_workers=%d' % workers, '--batch_size=2')
    _, val, _ = datasets.build_datasets(args)
    seen = {}
    for batch in datasets.build_loaders(args, None, val)[1]:
        seen.update(zip(batch.indices.tolist(), batch.images))
    shown = [pixels_of(seen[index]) for index, (path, _) in enumerate(val.samples) if not path.endswith('.png')]
    assert len(shown) == 3 and all(np.abs(each - first).max() <= 2 for each in shown)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(os.path.join(root, 'val', 'cat')) and 'only the first' in line


def test_transparent_images_keep_their_colours(tmp_path):
    rgb = np.asarray(photo(2, 16, 16))
    Image.fromarray(np.dstack((rgb, RAMP))).save(str(tmp_path / 'rgba.png'))
    assert_loads_as(tmp_path / 'rgba.png', rgb)
    Image.fromarray(RAMP).save(str(tmp_path / 'grey.png'))
    grey = Image.open(str(tmp_path / 'grey.png')).convert('LA')
    grey.putalpha(Image.new('L', (16, 16), 5))
    grey.save(str(tmp_path / 'la.png'))
    with Image.open(str(tmp_path / 'la.png')) as written:
        assert written.mode == 'LA'
    assert_loads_as(tmp_path / 'la.png', grey_as_rgb(RAMP))


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif'])
def test_one_bit(tmp_path, suffix):
    bits = (RAMP % 3 == 0).astype(np.uint8) * 255
    Image.fromarray(bits).convert('1').save(str(tmp_path / ('a' + suffix)))
    with Image.open(str(tmp_path / ('a' + suffix))) as written:
        assert written.mode == '1'
    assert_loads_as(tmp_path / ('a' + suffix), grey_as_rgb(bits))


@pytest.mark.parametrize('mode', ['RGB', 'RGBA'])
def test_webp(tmp_path, mode):
    if not features.check('webp'):
        cannot_run('current', 'this Pillow has no WebP')
    image = photo(4, 24, 24)
    saved = image.copy()
    if mode == 'RGBA':
        saved.putalpha(200)
    saved.save(str(tmp_path / 'a.webp'), lossless=True)
    assert_loads_as(tmp_path / 'a.webp', np.asarray(image))


@pytest.mark.parametrize('suffix, mode', [('.jpg', 'RGB'), ('.jpg', 'CMYK'), ('.png', 'P'), ('.png', 'LA'),
                                          ('.bmp', '1')])
def test_every_kind_goes_through_the_transforms(tmp_path, parse, suffix, mode):
    path = str(tmp_path / ('a' + suffix))
    photo(7, 60, 50).convert('L' if mode == 'LA' else 'RGB').convert(mode).save(path)
    for is_train in (False, True):
        tensor = transform_of(is_train, parse('--input_size=48'))(decode.load_image(path))
        assert tuple(tensor.shape) == (3, 48, 48)


# ---- folders and classes

def test_class_count_and_order_come_from_the_folders(image_folder, parse):
    names = ('zebra', 'ant', 'n01440764', 'Bee', 'two words')
    root = image_folder(train=3, val=2, classes=names)
    train, val, classes = datasets.build_datasets(parse('--data_path', root, *NANO))
    assert classes == sorted(names)
    assert (len(train), len(val)) == (15, 10)
    for index in range(len(train)):
        path, label = train.samples[index]
        assert os.path.basename(os.path.dirname(path)) == classes[label] == classes[train[index][1]]
    assert len(datasets.build_datasets(parse('--data_path', root, '--nb_classes=5', *NANO))[2]) == 5


def test_every_suffix_counts_and_other_files_do_not(image_folder, parse):
    root = image_folder(train=1, val=1)
    folder = os.path.join(root, 'train', 'cat')
    names = ['a.JPEG', 'b.jpg', 'c.PNG', 'd.bmp', 'e.tiff']
    for name in names:
        photo(1, 32, 32).save(os.path.join(folder, name))
    os.makedirs(os.path.join(folder, 'deeper'))
    photo(1, 32, 32).save(os.path.join(folder, 'deeper', 'f.png'))
    for name in ('notes.txt', 'Thumbs.db', 'png'):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write('not an image')
    train, _, _ = datasets.build_datasets(parse('--data_path', root, *NANO))
    found = sorted(os.path.basename(path) for path, label in train.samples if label == 0)
    assert found == sorted(names + ['000.png', 'f.png'])


def make_files(root, **contents):
    for name, content in contents.items():
        path = os.path.join(str(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(content)


def test_every_pillow_format_is_read_and_other_files_are_reported(image_folder, parse, capsys):
    root = image_folder(train=1, val=1)
    folder = os.path.join(root, 'train', 'cat')
    names = {'a.jfif': 'JPEG', 'b.JPE': 'JPEG', 'c.gif': 'GIF', 'd.tga': 'TGA', 'no ending': 'PNG', 'e.dib': 'BMP',
             'f.pcx': 'PCX', 'g.apng': 'PNG'}
    if '.avif' in decode.image_extensions():
        names['h.avif'] = 'AVIF'
    for name, kind in names.items():
        photo(1, 32, 32).save(os.path.join(folder, name), kind)
    loose = os.path.join(root, 'train', 'loose.png')
    photo(1, 32, 32).save(loose)
    rest = {'train/cat/notes.TXT': '.txt', 'train/cat/README': 'without an ending', 'train/dog/x.mp4': '.mp4',
            'train/dog/Thumbs.db': 'hidden', 'train/dog/.DS_Store': 'hidden', 'train/dog/._000.png': 'hidden',
            'train/dog/y.eps': '.eps', 'train/dog/z.jpg~': '.jpg~', 'train/loose.txt': '.txt'}
    make_files(root, **dict.fromkeys(rest, b'%!PS-Adobe-3.0 EPSF-3.0 no image'))
    for hidden in ('@eaDir', '.thumbnails', 'lost+found', 'dog/@eaDir'):
        make_files(root, **{'train/%s/000.png' % hidden: b'x'})
        rest['train/' + hidden] = 'hidden'
    os.symlink('nowhere', os.path.join(root, 'train', 'dangling.png'))
    rest.update({'train/loose.png': 'beside the class folders', 'train/dangling.png': 'beside the class folders'})
    train, val, classes = datasets.build_datasets(parse('--data_path', root, *NANO))
    assert classes == ['cat', 'dog']
    found = [os.path.basename(path) for path, label in train.samples if label == 0]
    assert sorted(found) == sorted(list(names) + ['000.png']) and len(train) == len(found) + 1
    assert all(train.load(path).size == (32, 32) for path, _ in train.samples)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith('%s/train: %d files or folders are not used (7 hidden' % (root, len(rest)))
    for part in ('--check_data', '2 .txt', '1 .mp4', '2 beside the class folders'):
        assert part in line
    assert unreadable.check_data((train, val), 0, '') == (0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert dict(line.split('\tnot used: ') for line in lines[:-1]) == {
        os.path.join(root, name): reason for name, reason in rest.items()}
    assert lines[-1].startswith('Checked %d images: 0 cannot be read; %d files or folders are not used (7 hidden, ' % (
        len(train) + len(val), len(rest)))


def test_the_files_of_a_class_without_images_are_named(tmp_path):
    make_files(tmp_path, **{'cat/a.txt': b'x', 'cat/b.mp4': b'x'})
    with pytest.raises(UserError, match='no image in the class folder .*cat; 2 files or folders are not used .*1 .mp4'):
        datasets.ImageFolder(str(tmp_path))


def test_similar_class_names_are_reported(image_folder, parse, capsys):
    root = image_folder(train=1, val=1, classes=('Cat', 'cat', 'big dog', 'Big  Dog', 'bird'))
    assert len(datasets.build_datasets(parse('--data_path', root, *NANO))[2]) == 5
    line, = capsys.readouterr().out.splitlines()
    assert 'Big  Dog, big dog; Cat, cat' in line and 'bird' not in line


def test_class_names_are_compared_in_one_unicode_form(image_folder, parse):
    root = image_folder(train=2, val=2, classes=('ros\u00e9', 'dog'))
    os.rename(os.path.join(root, 'train', 'ros\u00e9'), os.path.join(root, 'train', 'rose\u0301'))
    train, val, classes = datasets.build_datasets(parse('--data_path', root, *NANO))
    assert classes == ['dog', 'ros\u00e9'] and [label for _, label in train.samples] == [0, 0, 1, 1]
    assert train[3][1] == 1 and len(val) == 4
    os.makedirs(os.path.join(root, 'train', 'ros\u00e9'))
    with pytest.raises(UserError, match='two class folders are called ros\u00e9'):
        class_folders.scan_classes(os.path.join(root, 'train'))


def test_other_layouts_name_the_flags_that_read_them(image_folder, refused, capsys):
    root = image_folder(train=2, val=1)
    base = RUN + ['--epochs=1', '--batch_size=2']
    refused(base + ['--data_path', os.path.join(root, 'val')], 'the folder above')
    os.rename(os.path.join(root, 'val'), os.path.join(root, 'valid'))
    refused(base + ['--data_path', root], '--eval_data_path %s/valid' % root, '--val_split')
    os.rename(os.path.join(root, 'valid'), os.path.join(root, 'Test'))
    refused(base + ['--data_path', root], '--eval_data_path %s/Test' % root)
    os.rename(os.path.join(root, 'train'), os.path.join(root, 'Training'))
    refused(base + ['--data_path', root], '--data_set image_folder --data_path %s/Training' % root)
    classes = os.path.join(root, 'Training')
    os.rename(classes, root + ' 2')
    refused(base + ['--data_path', root + ' 2'], '--data_set image_folder --data_path %s 2 reads' % root, 'cat, dog')
    os.makedirs(root + ' 3/train/pets')
    os.rename(root + ' 2', root + ' 3/train/pets/kinds')
    assert datasets.ImageFolder(root + ' 3/train').classes == ['pets']
    out = capsys.readouterr().out
    assert 'pets/kinds/dog: subfolders hold all images of the class pets' in out and 'give --class_depth 3' in out
    assert datasets.ImageFolder(root + ' 3/train', depth=3).classes == ['pets/kinds/cat', 'pets/kinds/dog']


def test_samples_are_those_of_torchvision_in_its_order(tmp_path, monkeypatch):
    root = tmp_path / 'root'
    for name in ('b/2.png', 'b/10.JPG', 'b/a/x.tiff', 'b/a-b/x.webp', 'b/a/deep/er/1.bmp', 'b/a/deep.png', 'b/Z/1.png',
                 'B/only/below/1.ppm', 'a b/\u00fc.jpeg', 'a b/notes.txt', 'a b/png', 'a b/x.png.txt', 'b/x.jpg/1.png',
                 '10/1.pgm', '9/1.tif', 'loose.png', '../outside/c/1.png', '../outside/2.png'):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
    (root / 'b' / 'empty').mkdir()
    (root / '9' / 'gone.png').symlink_to('nowhere')
    (root / 'linked class').symlink_to('../outside')
    if 'followlinks' in inspect.getsource(torchvision.datasets.folder):  # torchvision 0.2 leaves such folders out
        (root / 'b' / 'more').symlink_to(str(tmp_path / 'outside' / 'c'))
        (root / '10' / 'sister').symlink_to('../9')
    os.mkfifo(str(root / '9' / 'pipe.png'))
    extensions = tuple(decode.image_extensions())
    theirs = torchvision.datasets.DatasetFolder(str(root), None, extensions)
    classes, samples, _ = class_folders.scan_classes(str(root))
    assert list(samples) == theirs.samples and classes == theirs.classes
    assert len(samples) >= 16 and len(classes) == 6
    listed = os.scandir

    @contextlib.contextmanager
    def backwards(folder):
        with listed(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)
    monkeypatch.setattr(os, 'scandir', backwards)  # a file system lists its entries in any order
    assert list(class_folders.scan_classes(str(root))[1]) == theirs.samples
    monkeypatch.undo()
    assert list(class_folders.scan_classes(str(root) + '/')[1]) == torchvision.datasets.DatasetFolder(
        str(root) + '/', None, extensions).samples


def test_a_list_of_images_is_a_sequence(image_folder):
    samples = datasets.ImageFolder(os.path.join(image_folder(), 'train')).samples
    pairs = list(samples)
    assert len(samples) == len(pairs) == 32 and samples.targets.tolist() == [label for _, label in pairs]
    assert samples[3:-2] == pairs[3:-2] and samples[::-1] == pairs[::-1] and samples[-1] == pairs[-1]
    assert samples[np.int64(4)] == pairs[4] and pairs[5] in samples and samples.index(pairs[6]) == 6
    for index in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError):
            samples[index]
    assert len(SampleList('x', b'', [0], [])) == 0 and list(SampleList('x', b'', [0], [], [0], 3)) == []
    chosen = samples.select(np.array([5, 31, 0]))
    assert list(chosen) == [pairs[5], pairs[31], pairs[0]] and chosen.targets.tolist() == [0, 1, 0]
    assert list(chosen.select(np.array([2, 1]))) == [pairs[0], pairs[31]]
    several = SampleList('x', b'abc/d', [0, 1, 3, 5], [2, 0, 1], [0, 2, 2, 3], 3)
    assert [(path, target.tolist()) for path, target in several.select(np.array([2, 0]))] == [
        ('/d', [0., 1., 0.]), ('x/a', [1., 0., 1.])]
    assert several.select(np.array([1, 0])).labels_of(1).tolist() == [2, 0]


def test_names_take_the_memory_of_their_text():
    names = [b'class/%07d.png' % number for number in range(10000)]
    samples = SampleList.from_names('root', names, [0] * 10000)
    assert len(pickle.dumps(samples)) < sum(map(len, names)) + 10000 * 3 * 8 + 1000
    assert list(pickle.loads(pickle.dumps(samples))) == list(samples)


class ZipDataset(ImageDataset):
    """train.zip and val.zip with an image file for each class in their class folders."""

    def __init__(self, is_train, config, device):
        self.archive = os.path.join(config.data_path, 'train.zip' if is_train else 'val.zip')
        with zipfile.ZipFile(self.archive) as file:
            names = sorted(file.namelist())
        classes = sorted({name.split('/')[0] for name in names})
        labels = [classes.index(name.split('/')[0]) for name in names]
        samples = SampleList.from_names('', list(map(os.fsencode, names)), labels)
        super().__init__(samples, classes, transforms.build_transform(is_train, config, device), read=self.read_member)

    def read_member(self, name):
        with zipfile.ZipFile(self.archive) as file, file.open(name) as member:
            return Image.open(member).convert('RGB')


def check_zips(config):
    if not os.path.isfile(os.path.join(config.data_path, 'train.zip')):
        raise UserError('--data_path: no train.zip')


def test_a_new_kind_of_data_set_takes_two_entries(image_folder, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setitem(locations.DATA_SETS, 'zip', check_zips)
    monkeypatch.setitem(datasets.BUILDERS, 'zip', ZipDataset)
    root, figures = image_folder(train=4, val=3), []
    for split in ('train', 'val'):
        with zipfile.ZipFile(str(tmp_path / (split + '.zip')), 'w') as archive:
            for name, path in files_in(os.path.join(root, split)).items():
                archive.write(path, name)
    for data in (['--data_set=zip', '--data_path', str(tmp_path)], ['--data_path', root]):
        for more in (['--max_train_samples=6'], ['--check_data']):
            assert run_class_finetuning.run(RUN + data + ['--epochs=1', '--batch_size=2'] + more) == 0
        out = capsys.readouterr().out
        figures.append(re.findall(r'^(?:Classes|Data|Max|Checked|\* Acc).*', out, re.M))
    assert figures[0] == figures[1] and len(figures[0]) >= 2
    refused(RUN + ['--data_set=zip', '--data_path', root], 'no train.zip')


SEVERAL = '''
import argparse, json, sys
sys.path.insert(0, %r)
from beit.data import class_folders
from beit.distributed import collectives, process_group
from beit.errors import UserError
args = argparse.Namespace(device='cpu', dist_on_itp=False, local_rank=-1, dist_url='env://', dist_timeout=60.)
device = process_group.init_distributed_mode(args)
collectives.ALIVE_SECONDS = 0  # a sign of life after every folder
scans, results = [], []
def scan(root, keep_alive, scan=class_folders._scan):
    scans.append(root)
    return scan(root, keep_alive)
class_folders._scan = scan
for root in sys.argv[1:]:
    for collectives.BLOCK in (64, 1 << 26):
        scans.clear()
        try:
            classes, samples, _ = class_folders.scan_classes(root, device)
            result = [classes, list(samples)]
        except UserError as error:
            result = str(error)
        results.append([len(scans), result])
print('RESULTS ' + json.dumps(results))
process_group.shutdown()
'''


@pytest.mark.slow
def test_one_process_scans_and_broadcasts(tmp_path):
    """Its result and its error reach all processes."""
    tree, lost = os.path.join(str(tmp_path), os.fsdecode(b'ro\not \xff')), str(tmp_path / 'lost')
    for name in (b'b/2.png', b'b/a/x.tiff', 'a b/\u00fc\U0001f600.jpeg'.encode(), b'a b/new\nline.png',
                 b'a b/\xff\xfe\r.png', b'a b/\xee\x80\x80.png', b'cl\nass \xfe/1.tif', b'../lost/cat/1.png'):
        path = os.path.join(tree, os.fsdecode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb'):
            pass
    os.symlink('nowhere', lost + '/cat/link')
    port = free_port()
    started = [subprocess.Popen(
        [sys.executable, '-c', SEVERAL % ROOT, tree, lost], stdout=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), OMP_NUM_THREADS='1',
                 MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert not any(process.returncode for process in started)
    main, other = (json.loads(re.search('RESULTS (.*)', out).group(1)) for out in outputs)
    classes, samples, _ = class_folders.scan_classes(tree)
    assert len(samples) == 7
    error = main[2][1]
    assert error.startswith('%s/cat/link: cannot be listed' % lost)
    assert main == [[1, [classes, [list(pair) for pair in samples]]]] * 2 + [[1, error]] * 2
    assert other == [[0, result] for _, result in main]


def test_without_other_processes_nothing_is_broadcast():
    assert collectives.broadcast_from_main(lambda keep_alive: keep_alive() or 'x', None) == 'x'


def test_image_folder_with_a_separate_evaluation_folder(image_folder, parse):
    root = image_folder(train=5, val=3)
    train, val, classes = datasets.build_datasets(parse(
        '--data_set=image_folder', '--data_path', os.path.join(root, 'train'),
        '--eval_data_path', os.path.join(root, 'val'), *NANO))
    assert (len(train), len(val), classes) == (10, 6, ['cat', 'dog'])


def test_eval_data_path_replaces_val(image_folder, parse):
    root, other = image_folder(), image_folder(train=1, val=9, name='other')
    args = parse('--data_path', root, '--eval_data_path', os.path.join(other, 'val'), *NANO)
    train, val, _ = datasets.build_datasets(args)
    assert (len(train), len(val)) == (32, 18)


def test_only_the_needed_split_is_read(image_folder, parse):
    root = image_folder(train=2, val=3)
    os.rename(os.path.join(root, 'train'), os.path.join(root, 'elsewhere'))
    train, val, classes = datasets.build_datasets(parse('--data_path', root, '--eval', *NANO))
    assert train is None and len(val) == 6 and classes == ['cat', 'dog']
    os.rename(os.path.join(root, 'elsewhere'), os.path.join(root, 'train'))
    os.rename(os.path.join(root, 'val'), os.path.join(root, 'elsewhere'))
    train, val, _ = datasets.build_datasets(parse('--data_path', root, '--disable_eval_during_finetuning', *NANO))
    assert val is None and len(train) == 4


# ---- CIFAR-100

@pytest.mark.parametrize('given', ['.', 'cifar-100-python', 'cifar-100-python/'])
def test_cifar(tmp_path, monkeypatch, parse, given):
    content = write_cifar(tmp_path, monkeypatch)
    args = parse('--data_set=CIFAR', '--data_path', os.path.join(str(tmp_path), given), *NANO)
    locations.check_paths(args)
    train, val, classes = datasets.build_datasets(args)
    assert (len(train), len(val), len(classes)) == (12, 7, 100)
    for index in range(7):
        tensor, label = val[index]
        assert label == content['test']['fine_labels'][index]
        expected = content['test']['data'][index].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(tensor.numpy(), expected)
    assert [train[index][1] for index in range(12)] == content['train']['fine_labels']
    assert tuple(train[0][0].shape) == (32, 32, 3)


def test_damaged_cifar_is_refused(tmp_path, monkeypatch, parse):
    write_cifar(tmp_path, monkeypatch)
    with open(str(tmp_path / 'cifar-100-python' / 'train'), 'ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match='cifar-100-python is damaged'):
        datasets.build_datasets(parse('--data_set=CIFAR', '--data_path', str(tmp_path), *NANO))


# ---- the digits

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Two separately written folders."""
    root = tmp_path_factory.mktemp('digits')
    for name in ('first', 'second'):
        locations.write_digits(str(root / name))
    return root


def files_in(root):
    return {os.path.relpath(os.path.join(folder, name), str(root)): os.path.join(folder, name)
            for folder, _, names in os.walk(str(root)) for name in names}


def test_digits_are_the_scans_of_scikit_learn_each_once(digits):
    from sklearn.datasets import load_digits
    scans = load_digits()
    files = files_in(digits / 'first')
    assert len(files) == 1797 == len(scans.target)
    assert sorted(os.listdir(str(digits / 'first'))) == ['train', 'val']
    seen = set()
    for name, path in files.items():
        _, label, file_name = name.split(os.sep)
        index = int(file_name.partition('.')[0])
        seen.add(index)
        assert int(label) == scans.target[index]
        if index % 50 == 0:
            image = Image.open(path)
            assert image.size == (32, 32)
            blocks = np.asarray(image).reshape(8, 4, 8, 4).mean((1, 3)).ravel()  # each scan's dot became 4x4 pixels
            assert np.corrcoef(blocks, scans.images[index].ravel())[0, 1] > 0.97
    assert seen == set(range(1797))


def test_digits_are_stratified(digits):
    total = 0
    for label in map(str, range(10)):
        train, val = (len(os.listdir(str(digits / 'first' / split / label))) for split in ('train', 'val'))
        assert abs(val - 0.2 * (train + val)) <= 1, 'class %s' % label
        total += val
    assert total == math.ceil(0.2 * 1797)


def test_digits_have_the_same_pixels_each_time(digits):
    first, second = files_in(digits / 'first'), files_in(digits / 'second')
    assert sorted(first) == sorted(second)
    assert all(np.array_equal(np.asarray(Image.open(first[name])), np.asarray(Image.open(second[name])))
               for name in first)


def test_digits_of_a_read_only_checkout_are_in_the_users_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')  # not even root can write there
    monkeypatch.setattr(locations, 'project_root', lambda: str(tmp_path / 'file' / 'project'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for _ in range(2):
        root = locations.resolve_data_path('demo')
        assert root == str(tmp_path / 'cache' / 'beit' / 'data' / 'digits') and len(files_in(root)) == 1797
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith('to ' + root)
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert paths.cache_folder() == str(tmp_path / '.cache' / 'beit')


def test_interrupted_digits_leave_no_files(digits, tmp_path, monkeypatch):
    assert sorted(os.listdir(str(digits))) == ['first', 'second']

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'rename', full)
    with pytest.raises(OSError):
        locations.write_digits(str(tmp_path / 'digits'))
    assert os.listdir(str(tmp_path)) == []


# ---- order

@pytest.mark.parametrize('length, world, batch', [(96, 2, 8), (103, 4, 5), (119, 4, 5), (100, 8, 3), (7, 3, 2)])
def test_processes_share_the_batches_of_one(length, world, batch):
    for epoch in (0, 3):
        alone = EpochSampler(length, seed=5)
        alone.set_epoch(epoch)
        together = [EpochSampler(length, rank, world, seed=5) for rank in range(world)]
        for sampler in together:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in together]
        assert [len(share) for share in shares] == [len(sampler) for sampler in together] == [length // world] * world
        order = list(alone)
        steps = length // (batch * world)
        assert steps == len(shares[0]) // batch
        for step in range(steps):
            union = [key for share in shares for key in share[step * batch:(step + 1) * batch]]
            assert sorted(union) == sorted(order[step * batch * world:(step + 1) * batch * world])


def test_every_epoch_is_another_permutation():
    sampler, orders = EpochSampler(50, seed=1), []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert keys == list(sampler), 'the same epoch twice is the same order'
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
        assert sorted(orders[-1]) == list(range(50))
    assert len({tuple(order) for order in orders}) == 6
    assert [index for _, index in EpochSampler(50, seed=2)] != orders[0]


class Keys(torch.utils.data.Dataset):
    """A data set that returns the requested key."""

    def __len__(self):
        return 40

    def __getitem__(self, key):
        return torch.tensor(key)


def test_order_does_not_depend_on_the_workers():
    def order(workers):
        loader = torch.utils.data.DataLoader(Keys(), batch_size=8, sampler=EpochSampler(40, seed=3),
                                             num_workers=workers)
        return torch.cat(list(loader)).tolist()
    assert order(0) == order(1) == order(2)


@pytest.mark.parametrize('world', [1, 2, 3, 8])
def test_exact_shards_hold_every_index_once(world):
    for length in range(21):
        shards = [OrderedDistributedSampler(length, rank, world) for rank in range(world)]
        assert sorted(index for shard in shards for index in shard) == list(range(length))
        assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize('workers', [0, 2])
def test_loaders_have_the_reference_batches(image_folder, parse, workers):
    args = parse('--data_path', image_folder(train=11, val=7), '--batch_size=4', *NANO, '--num_workers=%d' % workers)
    train, val, _ = datasets.build_datasets(args)
    train_loader, val_loader = datasets.build_loaders(args, train, val)
    batches = list(train_loader)
    assert [len(batch.targets) for batch in batches] == [4] * 5  # the last two of 22 are dropped
    assert [len(batch.targets) for batch in val_loader] == [6, 6, 2]  # 1.5 times 4, and nothing dropped
    for part, batch in [(train, batch) for batch in batches] + [(val, batch) for batch in val_loader]:
        assert isinstance(batch, Batch) and batch.unreadable == []
        assert batch.images.dtype == torch.float32 and batch.images.shape[1:] == (3, 32, 32)
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert batch.targets.tolist() == [part.samples[index][1] for index in batch.indices]
    for batch in val_loader:
        for image, index in zip(batch.images, batch.indices):
            assert np.array_equal(pixels_of(image), np.asarray(Image.open(val.samples[index][0])))


# ---- the rest of an epoch

def loader_of(dataset, batch_size, rank=0, world=1, workers=0):
    return torch.utils.data.DataLoader(
        SeededDataset(dataset, seed=4), batch_size=batch_size, drop_last=True, num_workers=workers,
        sampler=EpochSampler(len(dataset), rank, world, seed=4),
        collate_fn=functools.partial(collate, size=32))


@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('done', [0, 1, 3, 4])
def test_the_rest_of_an_epoch_is_that_of_the_whole(image_folder, parse, world, done):
    train = datasets.build_dataset(True, parse('--data_path', image_folder(train=13 * world), *NANO))
    batch_size = 6
    for rank in range(world):
        whole = loader_of(train, batch_size, rank, world)
        whole.sampler.set_epoch(2)
        expected = list(whole)
        rest = loader_of(train, batch_size, rank, world, workers=2 if done == 1 else 0)
        rest.sampler.set_epoch(2, done * batch_size)
        assert len(expected) == 4 and len(rest) == 4 - done == len(list(rest))
        assert len(rest.sampler) == 26 - done * batch_size == len(list(rest.sampler))
        for mine, theirs in zip(rest, expected[done:]):
            assert all(torch.equal(*pair) for pair in zip(mine[:3], theirs[:3]))
        rest.sampler.set_epoch(3)
        assert len(rest) == 4, 'the next epoch starts at its beginning'


def test_no_batch_is_left_after_the_end_of_an_epoch():
    sampler = EpochSampler(10, 0, 2)
    for start in (5, 6, 100):
        sampler.set_epoch(1, start)
        assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize('length', [48, 61, 100])
def test_an_update_has_the_same_images_on_other_numbers_of_processes(length):
    """Also within an epoch: 12 images per update, after three updates."""
    def updates(world, batch, accumulated):
        shares = []
        for rank in range(world):
            sampler = EpochSampler(length, rank, world, seed=9)
            sampler.set_epoch(5, start=3 * batch * accumulated)
            shares.append([index for _, index in sampler])
        share = batch * accumulated
        return [sorted(index for each in shares for index in each[step * share:(step + 1) * share])
                for step in range(length // 12 - 3)]

    order = np.random.default_rng([9, 5]).permutation(length).tolist()
    expected = [sorted(order[12 * step:12 * step + 12]) for step in range(3, length // 12)]
    for setting in ((1, 12, 1), (1, 3, 4), (2, 6, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1), (6, 1, 2), (12, 1, 1)):
        assert updates(*setting) == expected, setting


# ---- randomness

def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [torch.cat(parts) for parts in list(zip(*loader))[:3]]


@pytest.mark.parametrize('size', [32, 48])
def test_samples_do_not_depend_on_the_workers(image_folder, parse, size):
    """With every default augmentation: RandAugment, mirroring, random erasing."""
    root = image_folder(train=6, val=1, size=(size, size))
    epochs, states = {}, {}
    for workers in (0, 2):
        args = parse('--data_path', root, '--batch_size=3', '--input_size=%d' % size, '--num_workers=%d' % workers,
                     '--disable_eval_during_finetuning')
        loader, _ = datasets.build_loaders(args, *datasets.build_datasets(args)[:2])
        random.seed(workers)  # earlier random draws of the process must have no effect
        np.random.seed(workers)
        torch.manual_seed(workers)
        for epoch in (0, 1):
            epochs[workers, epoch] = epoch_of(loader, epoch)
        torch.manual_seed(0)
        list(loader)
        states[workers] = torch.get_rng_state()
    for epoch in (0, 1):
        for mine, theirs in zip(epochs[0, epoch], epochs[2, epoch]):
            assert torch.equal(mine, theirs), 'epoch %d' % epoch
    assert not torch.equal(epochs[0, 0][0], epochs[0, 1][0])
    assert torch.equal(states[0], states[2]), 'what the training loop draws next depends on the workers'


def test_an_image_is_augmented_afresh_in_every_epoch(image_folder, parse):
    args = parse('--data_path', image_folder(), *NANO)
    train = datasets.build_datasets(args)[0]
    samples = SeededDataset(train, seed=0)
    versions = [samples[epoch, 5][0] for epoch in range(8)]
    assert len({image.numpy().tobytes() for image in versions}) == 8
    assert torch.equal(samples[3, 5][0], versions[3])
    assert not torch.equal(SeededDataset(train, seed=1)[3, 5][0], versions[3])


def test_the_main_process_keeps_its_random_numbers(image_folder, parse):
    args = parse('--data_path', image_folder(), *NANO)
    samples = SeededDataset(datasets.build_datasets(args)[0])
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for index in range(5):
        samples[0, index]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_hidden_files_and_folders_are_ignored(image_folder, parse):
    root = image_folder()
    for name in ('.ipynb_checkpoints', '__MACOSX', os.path.join('cat', '.ipynb_checkpoints')):
        os.makedirs(os.path.join(root, 'train', name))
    for name in ('cat/._000.png', 'cat/.ipynb_checkpoints/000-checkpoint.png', '__MACOSX/x.png'):
        with open(os.path.join(root, 'train', name), 'wb') as file:
            file.write(b'no image')
    dataset = datasets.build_dataset(True, parse('--data_path=' + root, '--input_size=32', '--aa=none'))
    assert dataset.classes == ['cat', 'dog'] and len(dataset) == 32
    assert all(len(dataset[index]) == 2 for index in range(len(dataset)))


# ---- mixing

def timms_mixup(monkeypatch, **settings):
    """timm's own Mixup, whose 0.4 puts the targets on CUDA."""
    if 'device' in inspect.signature(timm.data.mixup.mixup_target).parameters:
        monkeypatch.setattr(timm.data.mixup, 'mixup_target',
                            functools.partial(timm.data.mixup.mixup_target, device='cpu'))
    return timm.data.mixup.Mixup(**settings)


def mixed(mixup, count, seed=0):
    """(images before, images after, class indices, soft targets)"""
    generator = torch.Generator()
    generator.manual_seed(count)
    before = torch.rand(count, 3, 16, 16, generator=generator)
    targets = torch.randint(0, 5, (count,), generator=generator)
    np.random.seed(seed)
    after, soft = mixup(before.clone(), targets)
    return before, after, targets, soft


MIXES = [dict(mixup_alpha=0.8, cutmix_alpha=1.0), dict(mixup_alpha=0.8), dict(mixup_alpha=0., cutmix_alpha=1.0),
         dict(mixup_alpha=0., cutmix_minmax=[0.2, 0.8]), dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5)]


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('settings', MIXES, ids=str)
def test_even_batches_are_mixed_as_timm_mixes_them(monkeypatch, settings, mode):
    settings = dict(settings, mode=mode, num_classes=5, label_smoothing=0.1)
    theirs = timms_mixup(monkeypatch, **settings)
    changed = 0
    for seed in range(6):
        for count in (2, 4, 10):
            before, images, _, soft = mixed(transforms.DeviceMixup(**settings), count, seed)
            _, expected_images, _, expected_soft = mixed(theirs, count, seed)
            assert torch.equal(images, expected_images) and torch.equal(soft, expected_soft)
            changed += not torch.equal(images, before)
    assert changed >= 6


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('count', [1, 3, 7])
def test_the_last_image_of_an_odd_batch_is_not_mixed(mode, count):
    settings = dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, num_classes=5, label_smoothing=0.1)
    changed = 0
    for seed in range(6):
        before, images, targets, soft = mixed(transforms.DeviceMixup(**settings), count, seed)
        assert torch.equal(images[-1], before[-1])
        smooth = torch.full((5,), 0.1 / 5)
        smooth[targets[-1]] += 0.9
        assert soft.shape == (count, 5) and torch.allclose(soft[-1], smooth, atol=1e-7)
        assert torch.allclose(soft.sum(1), torch.ones(count), atol=1e-6)
        np.random.seed(seed)
        even_images, even_soft = transforms.DeviceMixup(**settings)(before[:-1].clone(), targets[:-1])
        assert torch.equal(images[:-1], even_images) and torch.equal(soft[:-1], even_soft)
        changed += not torch.equal(images, before)
    assert changed >= 3 if count > 1 else changed == 0


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_an_empty_batch_stays_empty(mode):
    _, images, _, soft = mixed(transforms.DeviceMixup(mixup_alpha=0.8, mode=mode, num_classes=5), 0)
    assert images.shape == (0, 3, 16, 16) and soft.shape == (0, 5) and soft.dtype == torch.float32
