"""Images from class folders, CSV manifests, CIFAR-100 or the digits demo; samplers and loaders.

What a process gets depends on the seed, the epoch and the image's index alone: not on the number of workers, nor on
how many processes share the data.
"""

import contextlib
import copy
import functools
import inspect
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import typing

import numpy as np
import torch
from PIL import Image
from torch.utils.data.dataloader import default_collate
from torchvision import datasets as torchvision_datasets

import backend
import distributed
import fast_images
import index_cache
import manifests
import rand_augment
import splits
from augmentation import SMALL_INPUT, build_transform, is_fast, mean_and_std, small_input_rule
from device_loader import BoxesToErase, DeviceLoader
from errors import UserError, escape_text, unknown_value_error
from image_files import EXTENSIONS, UnreadableImage, load_image, scan_classes

DATA_SETS = ('CIFAR', 'IMNET', 'image_folder')
CPU = torch.device('cpu')


# ---- data sets

class Images(torch.utils.data.Dataset):
    """Image files with their classes.

    Args:
        samples (sequence): (path, class index), or with several classes (path, float32 (classes,)), of each.
        classes (list of str): their names.
        fits (function): of an image's (width, height), where images aren't resized; see `small_input_rule`.
        read (function): of a path; gives what the transform takes.

    Raises:
        UserError: on reading, an image that can't be read (`UnreadableImage`) or doesn't fit.
    """

    def __init__(self, samples, classes, transform=None, fits=None, read=load_image):
        self.samples, self.classes, self.transform, self.fits, self.read = samples, classes, transform, fits, read

    def part(self, places, **seen):
        """The same data set with those samples only, and with another transform, fits or read where they are given."""
        part = copy.copy(self)
        part.samples = splits.Chosen(self.samples, places)
        vars(part).update(seen)
        return part

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = self.load(path)
        return image if self.transform is None else self.transform(image), label

    def load(self, path):
        image = self.read(path)
        if self.fits is not None and not self.fits(*image.size):
            raise UserError('%s is %dx%d; with --input_size of %d and less images are not resized, so give their own '
                            'size, or a larger --input_size' % ((escape_text(path),) + image.size + (SMALL_INPUT,)))
        return image


class ImageFolder(Images):
    """Class folders of images; the classes are the folders' names in sorted order.

    Args:
        index (index_cache.Index): knows the files from an earlier start; None looks for them.

    Raises:
        UserError: the folder is missing, has no class folders, or one of them has no image.
    """

    def __init__(self, root, transform=None, flag='--data_path', fits=None, index=None, read=load_image):
        shown = escape_text(root)
        if not os.path.isdir(root):
            raise UserError('%s: there is no folder %s; it must hold one folder of images per class' % (flag, shown))
        self.index = index
        tree = scan_classes(root) if index is None else index.find(root)
        super().__init__(tree.samples, tree.classes, transform, fits, read)
        if not self.classes:
            raise UserError('%s: %s has no class folders; put the images of each class in a folder of its own'
                            % (flag, shown))
        filled = np.bincount(self.samples.labels, self.samples.counts, len(self.classes)).tolist()
        empty = [name for name, images in zip(self.classes, filled) if not images]
        if empty:
            raise UserError('%s: no image (%s) in the class folder%s %s; add images or remove the folder'
                            % (flag, ' '.join(EXTENSIONS), 's' if len(empty) > 1 else '',
                               ', '.join(escape_text(os.path.join(root, name)) for name in empty[:3])))


def image_name(dataset, index):
    """What to call a sample in a message: its path, printable, or its number where it has no file of its own."""
    samples = getattr(dataset, 'samples', None)
    return 'image %d' % index if samples is None else escape_text(samples[index][0])


def write_digits(root):
    """Write scikit-learn's UCI handwritten digits as an image folder: 1,797 scans, 10 classes, stratified 80/20.

    The 8x8 scans become 32x32 PNG files. The folder appears whole or not at all.
    """
    from sklearn.datasets import load_digits  # slow to import, for the demo only
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=0.2, random_state=0, stratify=digits.target)
    os.makedirs(os.path.dirname(root), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix='.digits-', dir=os.path.dirname(root))
    try:
        for split, members in (('train', train), ('val', val)):
            for index in members:
                folder = os.path.join(temporary, split, str(digits.target[index]))
                os.makedirs(folder, exist_ok=True)
                scan = Image.fromarray(np.uint8(np.round(digits.images[index] * (255. / 16.))))
                scan.resize((32, 32), Image.BICUBIC).save(os.path.join(folder, '%04d.png' % index))
        os.chmod(temporary, 0o755)
        os.rename(temporary, root)
    except OSError:
        if not os.path.isdir(os.path.join(root, 'val')):  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def resolve_data_path(data_path):
    """The folder that --data_path means; the word demo is the digits, written on first use."""
    if data_path != 'demo':
        return data_path
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'digits')
    if not os.path.isdir(os.path.join(root, 'val')):
        try:
            write_digits(root)
        except ImportError:
            raise UserError('--data_path demo needs scikit-learn; run: pip install scikit-learn') from None
        except OSError as error:
            raise UserError('--data_path demo: cannot write the digits to %s (%s)'
                            % (escape_text(root), error.strerror or error)) from None
        distributed.say('Wrote the UCI handwritten digits, 1,797 scans in 10 classes, to %s' % root)
    return root


def check_paths(args):
    """Raise a `UserError` where the folders that the flags name can't be right. Cheap, so that it can come first."""
    if args.data_set not in DATA_SETS:
        raise unknown_value_error('--data_set', args.data_set, DATA_SETS)
    check_split(args)
    check_manifests(args)
    in_folders = [is_train for is_train in needed_parts(args) if manifest_of(is_train, args) is None]
    if not args.data_path and any(is_train or not args.eval_data_path for is_train in in_folders):
        raise UserError('--data_path is missing; give the folder that holds train/ and val/, or the word demo'
                        if not args.train_csv else '--train_csv %s: there are no validation images; give --val_csv, or '
                        '--val_split 0.1 to take a tenth of these' % escape_text(args.train_csv))
    for flag, path in (('--data_path', args.data_path), ('--eval_data_path', args.eval_data_path)):
        if path and (path, flag) != ('demo', '--data_path') and not os.path.isdir(path):
            raise UserError('%s %s: no such folder' % (flag, escape_text(path)))
    if args.data_path == 'demo':
        return
    if args.data_set == 'CIFAR':
        cifar_root(args.data_path)
        if args.input_size < SMALL_INPUT:
            raise UserError('--input_size %d: the images of CIFAR are 32x32 and are not made smaller; use 32 or more'
                            % args.input_size)
    for is_train in in_folders:
        if args.data_set != 'CIFAR':
            flag, root = split_root(is_train, args)
            if not os.path.isdir(root):
                raise UserError('%s %s: there is no folder %s; it must hold one folder of images per class%s' % (
                    flag, escape_text(getattr(args, flag[2:])), escape_text(root), '' if is_train or args.eval_data_path
                    else '; or --val_split 0.1 takes a tenth of the training images for it')
                    + ('; or give the folder above, if that holds train/ and val/' if os.path.basename(
                        os.path.normpath(getattr(args, flag[2:]))) in ('train', 'val') else ''))


def check_split(args):
    """Raise a `UserError` where --val_split stands beside validation images that are there."""
    if not args.val_split:
        return
    about = '--val_split %g: ' % args.val_split
    for flag in ('eval_data_path', 'val_csv'):
        if getattr(args, flag):
            raise UserError(about + '--%s names the validation images; leave one of the two out' % flag)
    if args.data_set == 'CIFAR':
        raise UserError(about + 'CIFAR has a test set of its own; leave the flag out')
    val = os.path.join(resolve_data_path(args.data_path), 'val')
    if args.data_set == 'IMNET' and args.data_path and not args.train_csv and os.path.lexists(val):
        raise UserError(about + 'there is a folder %s with validation images; leave the flag out, or name the class '
                        'folders with --data_set image_folder --data_path %s'
                        % (escape_text(val), escape_text(os.path.join(os.path.dirname(val), 'train'))))


def check_manifests(args):
    """Raise a `UserError` where --train_csv or --val_csv can't be."""
    for flag, path in (('--train_csv', args.train_csv), ('--val_csv', args.val_csv)):
        if path and not os.path.isfile(path):
            raise UserError('%s %s: %s; give a CSV file with a path,label a line' % (
                flag, escape_text(path), 'is a folder' if os.path.isdir(path) else 'no such file'))
        if path and args.data_set == 'CIFAR':
            raise UserError('%s %s: --data_set CIFAR has no image files to list; leave one of the two out'
                            % (flag, escape_text(path)))
    if args.val_csv and args.eval_data_path:
        raise UserError('--val_csv %s: --eval_data_path names validation images too; leave one of the two out'
                        % escape_text(args.val_csv))


def needed_parts(args):
    """Of training (True) and validation (False) those that the flags need."""
    return ([] if args.eval else [True]) + ([False] if needs_validation(args) else [])


def manifest_of(is_train, args):
    """(flag, CSV file) that lists the images for training or validation, or None."""
    flag = 'train_csv' if is_train or args.val_split else 'val_csv'
    return ('--' + flag, getattr(args, flag)) if getattr(args, flag) else None


def needs_validation(args):
    return args.eval or not args.disable_eval_during_finetuning


def split_root(is_train, args):
    """(flag, folder) of the class folders for training or validation; with --val_split these are the same."""
    is_train = is_train or args.val_split > 0
    if args.data_set == 'image_folder':
        if is_train:
            return '--data_path', args.data_path
        if not args.eval_data_path:
            raise UserError('--data_set image_folder needs --eval_data_path, the class folders for validation '
                            '(or --disable_eval_during_finetuning)')
        return '--eval_data_path', args.eval_data_path
    if not is_train and args.eval_data_path:
        return '--eval_data_path', args.eval_data_path
    return '--data_path', os.path.join(resolve_data_path(args.data_path), 'train' if is_train else 'val')


def cifar_root(data_path):
    """The folder that holds cifar-100-python, the archive's own folder; that folder itself will do as well."""
    path = os.path.normpath(data_path)
    for root in (path, os.path.dirname(path)):
        if os.path.isfile(os.path.join(root, 'cifar-100-python', 'train')):
            return root
    raise UserError('--data_path %s: there is no cifar-100-python/train in it; unpack cifar-100-python.tar.gz there'
                    % escape_text(data_path))


def build_dataset(is_train, args, device=None, classes=None, multi_label=None):
    """(data set, class names): samples are (image uint8 (size, size, 3), class index).

    Args:
        classes, multi_label: for a CSV file, see `manifests.read`.
    """
    transform = build_transform(is_train, args, device)
    if args.data_set == 'CIFAR':
        try:
            dataset = torchvision_datasets.CIFAR100(cifar_root(args.data_path), train=is_train, transform=transform)
        except RuntimeError:
            raise UserError('--data_path %s: cifar-100-python is damaged (its checksums differ); unpack it again'
                            % escape_text(args.data_path)) from None
        return dataset, list(getattr(dataset, 'classes', None) or map(str, range(100)))
    seen = dict(transform=transform, fits=small_input_rule(is_train, args.input_size),
                read=fast_images.load_bytes if is_fast(is_train, args) else load_image)
    if manifest_of(is_train, args):
        dataset = Images(*read_manifest(is_train, args, device, classes, multi_label), **seen)
        return dataset, dataset.classes
    flag, root = split_root(is_train, args)
    index = index_cache.Index(args.output_dir, device) if args.index_cache else None
    dataset = ImageFolder(root, flag=flag, index=index, **seen)
    return dataset, dataset.classes


def read_manifest(is_train, args, device, classes=None, multi_label=None, must_exist=True):
    """`manifests.read` as the flags have it; an image that isn't there may be an unreadable one."""
    flag, path = manifest_of(is_train, args)
    return manifests.read(flag, path, resolve_data_path(args.data_path), args.loss, classes, multi_label, device,
                          must_exist and args.bad_images == 'error' and not args.check_data)


def build_datasets(args, device=None, classes=None):
    """(training set or None, validation set or None, class names), checked against one another and --nb_classes.

    Args:
        device (torch.device): of this process, where all of a job call this; then the first one looks for the files.
        classes (list of str): those that --val_csv may name, where no training images tell.
    """
    train = train_classes = val = val_classes = multi_label = None
    if not args.eval:
        train, train_classes = build_dataset(True, args, device)
        multi_label = splits.is_multi_label(labelled(train))
    elif args.train_csv and args.val_csv:  # it says which classes there are
        listed, classes = read_manifest(True, args, device, must_exist=False)
        multi_label = listed.multi_label
    if args.val_split:
        train, val, val_classes = put_aside(train, args, device)
    elif needs_validation(args):
        val, val_classes = build_dataset(False, args, device, train_classes or classes, multi_label)
    if train is not None and val is not None and splits.is_multi_label(labelled(val)) != multi_label:
        raise UserError('--train_csv %s: it gives images several classes, and class folders give one; give --val_csv'
                        % escape_text(args.train_csv))
    if train_classes and val_classes and train_classes != val_classes:
        only = [('train', set(train_classes) - set(val_classes)), ('val', set(val_classes) - set(train_classes))]
        differ = '; '.join('only in %s: %s' % (split, ', '.join(map(escape_text, sorted(names)[:5])))
                           for split, names in only if names)
        if args.train_csv and not args.val_csv:
            raise UserError('--train_csv %s: its classes are not those of the validation folders (%s); give --val_csv, '
                            'the images to evaluate with these' % (escape_text(args.train_csv), differ))
        raise UserError('--data_path: train and val must name the same classes; %s' % differ)
    classes = train_classes or val_classes
    if train is not None and args.max_train_samples:
        train = take_fewer(train, args)
    if args.nb_classes and args.nb_classes != len(classes):
        raise UserError('--nb_classes %d: the data has %d classes; leave the flag out, or mend the folders'
                        % (args.nb_classes, len(classes)))
    return train, val, classes


def check_fits(val_set):
    """Raise a `UserError` where the first image does not fit: it shall not be found after an epoch of training."""
    if getattr(val_set, 'fits', None) is not None and len(val_set):
        with contextlib.suppress(UnreadableImage):
            val_set.load(val_set.samples[0][0])


def put_aside(train, args, device=None):
    """(the training set without what --val_split takes, or None; that part or None, classes). The files are found once.

    Args:
        train (ImageFolder): all images; None where only the validation part is wanted.
    """
    whole = train if train is not None else build_dataset(False, args, device)[0]
    kept, aside = splits.split(whole.samples, args.val_split, args.seed)
    val = None
    if needs_validation(args):
        val = whole.part(aside, transform=build_transform(False, args), fits=small_input_rule(False, args.input_size),
                         read=fast_images.load_bytes if is_fast(False, args) else load_image)
    return None if train is None else train.part(kept), val, whole.classes


def take_fewer(train, args):
    """At most --max_train_samples of the training set: the same ones in every epoch."""
    places = splits.fewer(labelled(train), args.max_train_samples, args.seed)
    if hasattr(train, 'part'):
        return train.part(places)
    part = torch.utils.data.Subset(train, places.tolist())
    part.targets = np.asarray(train.targets)[places]
    return part


def labelled(dataset):
    """What knows the classes of a data set's images: its samples, or CIFAR itself."""
    return getattr(dataset, 'samples', dataset)


# ---- order and randomness

class EpochSampler(torch.utils.data.Sampler):
    """This process's share of one permutation per epoch; gives (epoch, index) pairs.

    Process r of w takes places r, r+w, r+2w, … so that the k-th batches of all processes together are the k-th batch
    of one process with w times the batch size. The last places that don't go round are left out.
    """

    def __init__(self, length, rank=0, world_size=1, seed=0):
        self.length, self.rank, self.world_size, self.seed = length, rank, world_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """Give this epoch, from this process's `start`-th sample on."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        """What is left of the epoch."""
        return max(self.length // self.world_size - self.start, 0)

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        share = order[:self.length // self.world_size * self.world_size][self.rank::self.world_size]
        for index in share[self.start:]:
            yield self.epoch, int(index)


class ExactShard(torch.utils.data.Sampler):
    """This process's share of a validation set: every image in exactly one process, none twice."""

    def __init__(self, length, rank=0, world_size=1):
        self.indices = range(rank, length, world_size)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class Unreadable(typing.NamedTuple):
    """A file that was left out; its path is printable."""
    path: str
    reason: str


class Batch(typing.NamedTuple):
    """What the loaders give. B is smaller by the files that were left out; it can be 0."""
    images: torch.Tensor  # float32 (B, 3, H, W), normalised; from a worker uint8
    targets: torch.Tensor  # int64 (B,), class indices
    indices: torch.Tensor  # int64 (B,), places in the data set; see `image_name`
    unreadable: list  # of Unreadable
    erasing: list = ()  # what is still to be erased: (place in the batch, seed, boxes), see `BoxesToErase`
    augmenting: list = ()  # what is still to be done to the bytes, see `rand_augment.pack`


class Sample(typing.NamedTuple):
    """What a worker makes of an image, for `collate`."""
    image: torch.Tensor  # uint8 (H, W, 3)
    target: int
    index: int
    erasing: tuple = ()  # what to erase of it
    drawn: rand_augment.Drawn = None  # what else is to be done to it


class Samples(torch.utils.data.Dataset):
    """A `Sample` by index; where `skips`, an `Unreadable` for a bad file.

    Args:
        erasing (BoxesToErase): draws its numbers behind all others of an image; None erases nothing.
    """

    def __init__(self, dataset, skips=False, erasing=None):
        self.dataset, self.skips, self.erasing = dataset, skips, erasing

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, target = self.dataset[index]
            drawn = image if isinstance(image, rand_augment.Drawn) else None
            image = image if drawn is None else drawn.image
            return Sample(image, target, index, self.erasing(*image.shape[:2]) if self.erasing else (), drawn)
        except UnreadableImage as error:
            if self.skips:
                return Unreadable(error.path, error.reason)
            raise UserError(str(error)) from None  # the name by which `one_line` knows it, coming from a worker


class SeededSamples(Samples):
    """Samples by (epoch, index), the augmentation's random numbers drawn from (seed, epoch, index)."""

    def __init__(self, dataset, seed=0, skips=False, erasing=None):
        super().__init__(dataset, skips, erasing)
        self.seed = seed

    def __getitem__(self, key):
        epoch, index = key
        in_worker = torch.utils.data.get_worker_info() is not None
        kept = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
        try:
            words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(3).tolist()
            random.seed(words[0])
            np.random.seed(words[1])
            torch.default_generator.manual_seed(words[2])  # torch.manual_seed would go to every device too
            return super().__getitem__(index)
        finally:
            if kept is not None:  # the training loop's own numbers must not notice
                random.setstate(kept[0])
                np.random.set_state(kept[1])
                torch.set_rng_state(kept[2])


def collate(items, size):
    """What `Samples` gave, as a `Batch` of bytes, images of size x size."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    read = [item for item in items if not isinstance(item, Unreadable)]
    if not read:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, 3, size, size, dtype=torch.uint8), nothing, nothing.clone(), unreadable, [])
    images, targets, indices = default_collate([sample[:3] for sample in read])
    erasing = [(place,) + sample.erasing for place, sample in enumerate(read) if sample.erasing]
    augmenting = rand_augment.pack([sample.drawn for sample in read])
    return Batch(images.permute(0, 3, 1, 2), targets, indices, unreadable, erasing, augmenting)


def calm_worker(_):
    """Make a loader's worker one that only the main process ends: by SIGTERM, as PyTorch does, or by its own end.

    A signal to all processes of a job must not take the workers from a main process that is about to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_connection_is_lost
    distributed.end_with_parent()
    if hasattr(signal, 'sigwaitinfo'):  # on Linux; a handler wouldn't learn who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _unless_connection_is_lost(kind, error, traceback):
    """The hook of a worker, whose thread that hands batches over meets this where the main process is killed."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _end_when_told(parent):
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def build_loaders(args, train, val, device=CPU):
    """(training loader or None, validation loader or None) for this process; both give a `Batch` on `device` at a time.

    The validation batch is 1.5 times the training batch. Without --dist_eval each process evaluates the whole set.
    """
    skips = args.bad_images == 'skip'
    erasing = BoxesToErase(args.reprob, args.recount) if args.reprob > 0 else None
    train_loader = val_loader = None
    if train is not None:
        train_loader = DeviceLoader(torch.utils.data.DataLoader(
            SeededSamples(train, args.seed, skips, erasing), batch_size=args.batch_size, drop_last=True,
            sampler=EpochSampler(len(train), distributed.rank(), distributed.world_size(), args.seed),
            **loading(args, device)), device, *mean_and_std(args), remode=args.remode)
    if val is not None:
        shards = (distributed.rank(), distributed.world_size()) if args.dist_eval else (0, 1)
        val_loader = DeviceLoader(torch.utils.data.DataLoader(
            Samples(val, skips), batch_size=int(1.5 * args.batch_size), sampler=ExactShard(len(val), *shards),
            **loading(args, device)), device, *mean_and_std(args))
    return train_loader, val_loader


def loading(args, device):
    """How a DataLoader is to load. Its workers stay from one epoch to the next, where PyTorch has that."""
    wanted = dict(
        num_workers=args.num_workers, pin_memory=args.pin_mem and backend.can_pin_memory(device),
        worker_init_fn=calm_worker, collate_fn=functools.partial(collate, size=args.input_size),
        persistent_workers=args.num_workers > 0,
        generator=torch.Generator())  # new workers are given a number, ones that stay not: don't take it from the run's
    known = inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    return {name: value for name, value in wanted.items() if name in known}
