"""The byte loaders equal timm's transform bit for bit; erasing on the device; the fast backend."""

import argparse
import contextlib
import gc
import inspect
import itertools
import math
import os
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import check_flags
import datasets
from beit import errors
from beit.data import decode, device_loader, device_randaugment, fast_decode
from beit.data.device_loader import PrefetchLoader, RandomErasingBoxes
from beit.config import default_num_workers
from beit.data.loader import Sample, collate
from beit.data.transforms import InterpolationMode, build_transform, check_backend
from beit.devices import accelerator
from beit.errors import UserError
from helpers import photo

pytestmark = [pytest.mark.fast, pytest.mark.computes]

PERSISTENT = 'persistent_workers' in inspect.signature(torch.utils.data.DataLoader.__init__).parameters
CPU = torch.device('cpu')


def has_fast():
    try:
        fast_decode.check_available()
    except UserError:
        return False
    return True


needs_fast = pytest.mark.needs('current', has_fast(), 'this stack has no --data_backend fast')


@pytest.fixture
def loaders(image_folder, parse):
    """loaders('--reprob=1'): (training, validation) of 12 and 4 JPEG files of 90x70; later calls reuse them."""
    root = image_folder(train=6, val=2, size=(90, 70), suffix='.jpg')

    def build(*flags):
        args = parse('--data_path', root, '--num_workers=0', '--batch_size=4', '--input_size=48', '--seed=5', *flags)
        return datasets.build_loaders(args, *datasets.build_datasets(args)[:2])
    return build


def samples_of(loader, epoch=None):
    """{index: image}"""
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return {int(index): image for batch in loader for index, image in zip(batch.indices, batch.images)}


def seed_sample(*key):
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


# ---- the bits

@pytest.mark.parametrize('size', [48, 32])
@pytest.mark.parametrize('flags, settings', [
    ((), dict(auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3)),
    (('--aa=none', '--train_interpolation=random', '--imagenet_default_mean_and_std'),
     dict(auto_augment=None, interpolation='random', color_jitter=0.4)),
], ids=['RandAugment', 'colour jitter'])
def test_training_images_are_the_bits_of_timms_transform(loaders, flags, settings, size):
    loader = loaders('--reprob=0', '--input_size=%d' % size, *flags)[0]
    oracle = create_transform(size, is_training=True, re_prob=0., **settings)
    if size == 32:
        oracle.transforms[0] = transforms.RandomCrop(32, padding=4)
    for epoch in (0, 3):
        images = samples_of(loader, epoch)
        assert len(images) == 12
        for index, image in images.items():
            with Image.open(loader.dataset.dataset.samples[index][0]) as file:
                original = file.convert('RGB')
            seed_sample(5, epoch, index)
            assert torch.equal(image, oracle(original)), 'epoch %d image %d' % (epoch, index)
            assert image.is_contiguous() and image.dtype == torch.float32


def test_validation_images_are_the_bits_of_torchvisions_transform(loaders):
    loader = loaders('--imagenet_default_mean_and_std')[1]
    oracle = transforms.Compose([
        transforms.Resize(54, interpolation=InterpolationMode.BICUBIC), transforms.CenterCrop(48),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = samples_of(loader)
    assert len(images) == 4
    for index, image in images.items():
        with Image.open(loader.dataset.dataset.samples[index][0]) as file:
            assert torch.equal(image, oracle(file.convert('RGB')))


def test_every_byte_value_is_normalised_as_by_torchvision():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack((ramp, ramp[::-1], ramp.T), axis=2)
    oracle = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    batch = collate([Sample(torch.from_numpy(image.copy()), 0, 0)], 16)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (1, 3, 16, 16)
    assert torch.equal(PrefetchLoader(None, CPU, mean, std).prepare(batch).images[0], oracle(Image.fromarray(image)))


# ---- erasing

@pytest.mark.parametrize('most', [1, 3])
def test_the_boxes_are_timms(most):
    theirs = RandomErasing(0.5, mode='const', max_count=most, device='cpu')
    ours, erased = RandomErasingBoxes(0.5, most), 0
    for seed in range(400):
        random.seed(seed)
        expected = theirs(torch.ones(3, 40, 56))
        random.seed(seed)
        found, image = ours(40, 56), torch.ones(3, 40, 56)
        for top, left, height, width in found[1] if found else ():
            image[:, top:top + height, left:left + width] = 0
        assert torch.equal(image, expected)
        erased += bool(found)
    assert 160 < erased < 240  # half of them, within four standard deviations


def erased_by(mode, images):
    """The values that erasing writes into the same 40x40 box of `images` images: (images, 3, 40, 40)."""
    loader = PrefetchLoader(None, CPU, (0.5,) * 3, (0.5,) * 3, remode=mode)
    black = torch.zeros(48, 48, 3, dtype=torch.uint8)
    items = [Sample(black, 0, index, (index, [(2, 3, 40, 40)])) for index in range(images)]
    result = loader.prepare(collate(items, 48))
    assert result.erasing == []
    inside = result.images[:, :, 2:42, 3:43].clone()
    result.images[:, :, 2:42, 3:43] = -1
    assert bool((result.images == -1).all()), 'something outside the box was written'
    return inside


def test_erasing_writes_normal_noise():
    """Mean and deviation within five standard errors of timm's `normal_`."""
    pixels = erased_by('pixel', 20)
    assert abs(float(pixels.mean())) < 5 / math.sqrt(pixels.numel())
    assert abs(float(pixels.std()) - 1) < 5 / math.sqrt(2 * pixels.numel())
    assert len({image.numpy().tobytes() for image in pixels}) == 20, 'two images got the same noise'
    colours = erased_by('rand', 1000)
    assert torch.equal(colours, colours[:, :, :1, :1].expand_as(colours))
    colours = colours[:, :, 0, 0]
    assert abs(float(colours.mean())) < 5 / math.sqrt(3000) and abs(float(colours.std()) - 1) < 5 / math.sqrt(6000)
    assert bool((erased_by('const', 2) == 0).all())


def test_erasing_changes_the_boxes_and_nothing_else(loaders):
    whole, erased = samples_of(loaders('--reprob=0')[0]), loaders('--reprob=1', '--recount=2')[0]
    boxes = {int(batch.indices[place]): boxes for batch in erased.loader for place, _, boxes in batch.erasing}
    images = samples_of(erased)
    assert sorted(boxes) == sorted(images) == list(range(12))
    for index, image in images.items():
        inside = torch.zeros(48, 48, dtype=torch.bool)
        for top, left, height, width in boxes[index]:
            inside[top:top + height, left:left + width] = True
        assert bool(inside.any()) and torch.equal((image != whole[index]).any(0), inside)


def test_an_image_depends_only_on_seed_epoch_and_index(loaders, monkeypatch):
    """Workers, batch size, number of processes and other random draws have no effect."""
    flags = ('--reprob=0.6', '--recount=3')
    expected = samples_of(loaders(*flags)[0], epoch=2)
    torch.manual_seed(77)
    for more in (('--batch_size=3',), ('--batch_size=6', '--num_workers=2')):
        found = samples_of(loaders(*flags + more)[0], epoch=2)
        assert sorted(found) == list(range(12)) and all(torch.equal(found[index], expected[index]) for index in found)
    monkeypatch.setattr(datasets.process_group, 'world_size', lambda: 2)
    monkeypatch.setattr(datasets.process_group, 'rank', lambda: 1)
    found = samples_of(loaders('--batch_size=2', *flags)[0], epoch=2)
    assert len(found) == 6 and all(torch.equal(found[index], expected[index]) for index in found)


# ---- the loader

def worker_pids(loader):
    return sorted(worker.pid for worker in loader.loader._iterator._workers) if PERSISTENT else []


def test_an_interrupted_loader_starts_again(loaders):
    loader = loaders('--num_workers=2', '--batch_size=2')[0]
    expected = samples_of(loaders('--batch_size=2')[0], epoch=1)
    loader.sampler.set_epoch(0)
    assert len(list(itertools.islice(loader, 2))) == 2
    pids = worker_pids(loader)
    with contextlib.suppress(KeyError):
        for batch in loader:
            raise KeyError(batch)
    found = samples_of(loader, epoch=1)
    assert sorted(found) == sorted(expected) and all(torch.equal(found[index], expected[index]) for index in found)
    assert worker_pids(loader) == pids, 'the workers stay'
    del loader
    gc.collect()
    until = time.time() + 10
    while any(os.path.exists('/proc/%d' % pid) for pid in pids):
        assert time.time() < until, 'a worker outlives its loader'
        time.sleep(0.05)


def test_a_device_loader_has_the_interface_of_a_loader(loaders):
    train, val = loaders('--dist_eval')
    assert (len(train), len(val)) == (3, 1) and (train.batch_size, val.batch_size) == (4, 6)
    assert len(train.dataset) == 12 and train.num_workers == 0
    train.sampler.set_epoch(1, 4)
    assert len(train) == 2
    assert not hasattr(train, 'no_such_thing')


class FakeDevices:
    """Streams that record their waits, and on which stream `move` runs."""

    def __init__(self):
        self.log, self.on = [], 'main'
        devices = self

        class Stream:
            def __init__(self, name='side'):
                self.name = name

            def wait_stream(self, other):
                devices.log.append('%s waits for %s' % (self.name, other.name))

        self.Stream, self.current_stream = Stream, lambda: Stream(self.on)

    @contextlib.contextmanager
    def stream(self, stream):
        self.on = stream.name
        yield
        self.on = 'main'


def test_the_next_batch_is_prefetched(monkeypatch):
    devices = FakeDevices()
    monkeypatch.setattr(accelerator, 'device_module', lambda _: devices)

    def move(item):
        devices.log.append('%s copies %s' % (devices.on, item))
        return item * 2

    for item in accelerator.prefetch('ab', move, CPU):
        devices.log.append('%s uses %s' % (devices.on, item))
    assert devices.log == ['side waits for main', 'side copies a', 'main waits for side',
                           'side waits for main', 'side copies b', 'main uses aa', 'main waits for side',
                           'main uses bb']
    assert list(accelerator.prefetch('', move, CPU)) == []
    assert list(itertools.islice(accelerator.prefetch('abc', move, CPU), 1)) == ['aa']


# ---- the fast backend

def differences(one, other):
    """Mean and largest difference of two {index: image}, in steps of 255."""
    assert sorted(one) == sorted(other) and one
    steps = torch.cat([(one[index] - other[index]).abs().flatten() for index in one]) * 127.5
    return float(steps.mean()), float(steps.max())


@needs_fast
def test_fast_takes_the_same_crops_and_flips(loaders, monkeypatch):
    boxes = []
    choose = RandomResizedCropAndInterpolation.get_params

    def noted(*args):
        boxes.append(choose(*args))
        return boxes[-1]
    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', staticmethod(noted))
    images = {}
    for name in ('exact', 'fast'):
        for interpolation in ('bicubic', 'bilinear', 'random'):
            images[name, interpolation] = samples_of(loaders(
                '--aa=none', '--color_jitter=0', '--reprob=0', '--data_backend=' + name,
                '--train_interpolation=' + interpolation)[0])
    assert len(boxes) == 72 and len(set(boxes)) > 10
    assert boxes[:36] == boxes[36:]
    for interpolation in ('bicubic', 'bilinear', 'random'):
        exact, fast = images['exact', interpolation], images['fast', interpolation]
        mean, most = differences(exact, fast)
        print('%s: mean difference %.3f, largest %.0f' % (interpolation, mean, most))
        assert 0 < mean < 0.05 and most < 2.5
        mirrored = {index: image.flip(2) for index, image in fast.items()}
        assert differences(exact, mirrored)[0] > 5


@needs_fast
@pytest.mark.parametrize('drawn', [False, True])
def test_fast_augments_by_the_same_policy(loaders, drawn, monkeypatch):
    """Only rotated, sheared and shifted images differ by more than one step, because these operations interpolate."""
    def policy(name):
        loader = loaders('--reprob=0', '--data_backend=' + name)[0]
        step = loader.dataset.dataset.transform.transforms[1 if on_device else 2]
        ops = getattr(step, 'policy', step).ops
        return loader, [(op.name, op.prob, op.magnitude, op.magnitude_std) for op in ops]
    on_device = False
    exact, theirs = policy('exact')
    if drawn:  # as for an accelerator, but executed by the CPU
        monkeypatch.setattr(datasets, 'build_transform', lambda is_train, config, device: build_transform(
            is_train, config, torch.device('cuda')))
        on_device = True
    fast, ours = policy('fast')
    assert ours == theirs
    mean, _ = differences(samples_of(exact), samples_of(fast))
    print('with RandAugment: mean difference %.3f' % mean)
    assert 0 < mean < 1


RAND_AUGMENT = ('AutoContrast', 'Equalize', 'Invert', 'Rotate', 'PosterizeIncreasing', 'SolarizeIncreasing',
                'SolarizeAdd', 'ColorIncreasing', 'ContrastIncreasing', 'BrightnessIncreasing', 'SharpnessIncreasing',
                'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')


def one_operation(name):
    """timm's RandAugment with only this operation, always applied, bilinear."""
    policy = rand_augment_transform('rand-m9-mstd0.5-inc1', dict(
        translate_const=100, img_mean=(124, 116, 104), interpolation=Image.BILINEAR))
    assert sorted(operation.name for operation in policy.ops) == sorted(RAND_AUGMENT)
    policy.ops = [operation for operation in policy.ops if operation.name == name]
    policy.ops[0].prob, policy.num_layers = 1., 1
    return policy


@needs_fast
@pytest.mark.parametrize('name', RAND_AUGMENT)
def test_the_devices_operations_are_pillows(name):
    generator = np.random.RandomState(0)
    pictures = [np.uint8(generator.randint(low, high, (40, 56, 3))) for low, high in ((0, 256), (40, 90), (200, 256))]
    pictures += [np.full((40, 56, 3), 77, np.uint8), np.uint8(np.arange(40 * 56 * 3).reshape(40, 56, 3) // 27)]
    flip = transforms.RandomHorizontalFlip(0.)
    theirs, draw = one_operation(name), device_randaugment.DeferredRandAugment(flip, one_operation(name))
    random.seed(1)
    expected = np.stack([np.array(theirs(Image.fromarray(picture))) for picture in pictures])
    random.seed(1)
    drawn = [draw(torch.from_numpy(picture).permute(2, 0, 1)) for picture in pictures]
    images = torch.stack([each.image for each in drawn]).permute(0, 3, 1, 2).contiguous()
    device_randaugment.apply(images, device_randaugment.collate_ops([each.operations for each in drawn]))
    assert (expected != np.stack(pictures)).any()
    differ = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    rounds = name.startswith(('Rotate', 'Shear', 'Translate', 'AutoContrast'))  # in float32 here, in float64 there
    assert differ.max() <= rounds and (differ > 0).mean() <= 0.02 * rounds


@needs_fast
def test_operations_run_in_order(monkeypatch):
    """Two operations on the first image, others on the second, none on the last, as Pillow applies them in turn."""
    flip = transforms.RandomHorizontalFlip(1.)
    picture = np.uint8(np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)))
    chosen = [('SolarizeAdd', 'Invert'), ('Invert', 'ContrastIncreasing'), ()]
    expected, drawn = [], []
    for image, names in zip(picture, chosen):
        pillow, operations = Image.fromarray(image[:, ::-1].copy()), []
        for name in names:
            random.seed(3)
            pillow = one_operation(name)(pillow)
            random.seed(3)
            draw = device_randaugment.DeferredRandAugment(flip, one_operation(name))
            operations += draw(torch.from_numpy(image).permute(2, 0, 1)).operations[1:]
        expected.append(np.array(pillow))
        drawn.append(device_randaugment.DeferredImage(torch.from_numpy(image), [('mirror', [])] + operations))
    images = torch.from_numpy(picture).permute(0, 3, 1, 2).contiguous()
    device_randaugment.apply(images, device_randaugment.collate_ops([each.operations for each in drawn]))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@needs_fast
def test_fast_runs_an_unsupported_policy_in_the_worker(loaders):
    steps = loaders('--data_backend=fast', '--aa=augmix-m3-w3')[0].dataset.dataset.transform.transforms
    assert not any(isinstance(step, device_randaugment.DeferredRandAugment) for step in steps)
    assert len(samples_of(loaders('--data_backend=fast', '--aa=augmix-m3-w3')[0])) == 12


@needs_fast
def test_fast_evaluation_is_within_a_step(loaders):
    exact, fast = (samples_of(loaders('--eval_data_backend=' + name)[1]) for name in ('exact', 'fast'))
    mean, most = differences(exact, fast)
    print('evaluation: mean difference %.3f, largest %.0f' % (mean, most))
    assert 0 < mean < 0.05 and most < 2.5
    unasked = samples_of(loaders('--data_backend=fast')[1])
    assert all(torch.equal(unasked[index], exact[index]) for index in exact)


@needs_fast
@pytest.mark.parametrize('how', ['plain', 'progressive', 'no subsampling', 'grey', 'CMYK', 'turned by EXIF', 'png',
                                 '16-bit png', 'palette png'])
def test_fast_reads_what_load_image_reads(tmp_path, how):
    image, path = photo(3, 61, 47), str(tmp_path / ('a.png' if 'png' in how else 'a.jpg'))
    if how == 'turned by EXIF':
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    elif how == '16-bit png':
        Image.fromarray((np.arange(47 * 61).reshape(47, 61) * 20).astype(np.uint16)).save(path)
    else:
        image.convert({'grey': 'L', 'CMYK': 'CMYK', 'palette png': 'P'}.get(how, 'RGB')).save(
            path, **{'progressive': dict(progressive=True), 'no subsampling': dict(subsampling=0)}.get(how, {}))
    expected = np.asarray(decode.load_image(path)).astype(int)
    found = fast_decode.load_tensor(path)
    assert found.dtype == torch.uint8 and found.shape == (3, 47, 61)
    difference = np.abs(found.permute(1, 2, 0).numpy() - expected).max()
    assert difference <= (2 if how in ('plain', 'progressive', 'no subsampling', 'turned by EXIF') else 0)


@needs_fast
@pytest.mark.parametrize('how', ['half', 'head only', 'empty', 'text', 'folder', 'gone'])
def test_fast_reports_a_bad_file_as_load_image_does(tmp_path, how):
    path = str(tmp_path / 'a.jpg')
    photo(3, 200, 150).save(path)
    with open(path, 'rb') as file:
        content = file.read()
    os.remove(path)
    if how == 'folder':
        os.mkdir(path)
    elif how != 'gone':
        with open(path, 'wb') as file:
            file.write({'half': content[:len(content) // 2], 'head only': content[:700], 'empty': b'',
                        'text': b'no picture'}[how])
    messages = []
    for load in (decode.load_image, fast_decode.load_tensor):
        with pytest.raises(decode.UnreadableImage) as caught:
            load(path)
        messages.append(str(caught.value).replace('BytesIO', 'file'))
    assert messages[0] == messages[1]


@needs_fast
def test_fast_refuses_a_bomb_before_it_is_decoded(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.jpg')
    photo(1, 64, 64).save(path)
    monkeypatch.setattr(fast_decode, 'decode_jpeg', lambda *_: pytest.fail('it was decoded'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    with pytest.raises(decode.UnreadableImage, match='decompression bomb'):
        fast_decode.load_tensor(path)


@needs_fast
def test_small_inputs_are_the_same_with_fast(loaders):
    exact, fast = (loaders('--input_size=32', '--data_backend=' + name)[0] for name in ('exact', 'fast'))
    exact, fast = samples_of(exact), samples_of(fast)
    assert all(torch.equal(exact[index], fast[index]) for index in range(12))


def test_the_number_of_workers_is_the_number_of_usable_processors(monkeypatch):
    for allowed, workers in ((1, 1), (3, 3), (64, 10)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, count=allowed: set(range(count)), raising=False)
        assert default_num_workers() == workers
    monkeypatch.delattr(os, 'sched_getaffinity')
    for count, workers in ((None, 1), (4, 4)):
        monkeypatch.setattr(os, 'cpu_count', lambda count=count: count)
        assert default_num_workers() == workers


def test_fast_is_refused_where_unavailable(parse, monkeypatch):
    check_backend(parse())
    if has_fast():
        check_backend(parse('--data_backend=fast'))
        with pytest.raises(UserError, match='--train_interpolation lanczos needs --data_backend exact'):
            check_flags.check_combinations(parse('--data_backend=fast', '--train_interpolation=lanczos'))
    monkeypatch.setattr(fast_decode, 'decode_jpeg', None)
    for flag in ('--data_backend', '--eval_data_backend'):
        with pytest.raises(UserError, match='%s fast: this torchvision cannot decode JPEG files; use a newer one, or '
                                            '%s exact' % (flag, flag)):
            check_backend(parse(flag + '=fast'))


@pytest.mark.parametrize('error', (EOFError(), ConnectionResetError('reset'), FileNotFoundError('a socket')))
@pytest.mark.parametrize('alive', (True, False))
def test_a_worker_that_dies_while_sending_a_batch_is_reported(error, alive):
    """In Python 3.8 it appeared as a connection error."""
    class Batches:
        _workers = [argparse.Namespace(pid=7, is_alive=lambda: alive)]

        def __iter__(self):
            raise error

    with pytest.raises(type(error) if alive else RuntimeError) as caught:
        list(device_loader._detect_worker_death(Batches()))
    assert alive or 'a loader process (7) exited unexpectedly' in errors.worker_death_message(caught.value)
