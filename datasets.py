"""The reference's build_transform, build_datasets and build_loaders: class folders, CSV files, CIFAR-100.

A `config` can be any object with these attributes, such as the parsed flags.
"""

import contextlib
import functools
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torchvision import datasets as torchvision_datasets

from beit import model_spec
from beit.config import DataConfig, InputConfig
from beit.data import csv_dataset, locations, subsets
from beit.data.class_folders import log_similar_names, normalize
from beit.data.decode import UnreadableImage
from beit.data.device_loader import PrefetchLoader, RandomErasingBoxes
from beit.data.image_dataset import ArrayDataset, ImageDataset, ImageFolder
from beit.data.loader import EpochSampler, OrderedDistributedSampler, SampleDataset, SeededDataset, make_loader
from beit.data.sample_list import SampleList
from beit.data.shared_memory import workers_that_fit
from beit.data.transforms import EvalTransform, build_transform
from beit.distributed import process_group
from beit.errors import UserError, escape_text, refuse
from beit.files.class_files import read_class_names

# ---- data sets

def _reading(is_train: bool, config: InputConfig, device: Optional[torch.device] = None) -> Dict[str, Any]:
    """The arguments of an `ImageDataset` for reading its images."""
    evaluation = EvalTransform.from_config(config)
    fits = evaluation.fits_in_training if is_train else evaluation.fits
    return dict(transform=build_transform(is_train, config, device), fits=None if evaluation.resizes else fits,
                read=evaluation.reader(config.data_backend if is_train else config.eval_data_backend,
                                       config.max_pixels))


def build_dataset(is_train: bool, config: InputConfig, device: Optional[torch.device] = None,
                  classes: Optional[List[str]] = None, multi_label: Optional[bool] = None) -> ImageDataset:
    """Its samples are (image uint8 (size, size, 3), class index). `classes`, `multi_label`: see `csv_dataset.read`."""
    if locations.csv_of(is_train, config):
        samples, classes = read_csv(is_train, config, device, classes, multi_label)
        return ImageDataset(samples, classes, **_reading(is_train, config, device))
    return BUILDERS[config.data_set](is_train, config, device)


def build_class_folders(is_train: bool, config: InputConfig, device: Optional[torch.device]) -> ImageFolder:
    flag, root = locations.split_root(is_train, config)
    return ImageFolder(root, flag, device, config.check_data, config.class_depth, **_reading(is_train, config, device))


def build_cifar(is_train: bool, config: InputConfig, device: Optional[torch.device]) -> ArrayDataset:
    try:
        cifar = torchvision_datasets.CIFAR100(locations.cifar_root(config.data_path), is_train)
    except RuntimeError:
        raise UserError('--data_path %s: cifar-100-python is damaged (its checksums differ); unpack it again'
                        % escape_text(config.data_path)) from None
    return ArrayDataset(cifar.data, cifar.targets, cifar.classes, build_transform(is_train, config, device))


# For each --data_set a function that builds the `ImageDataset`.
BUILDERS = {'IMNET': build_class_folders, 'image_folder': build_class_folders, 'CIFAR': build_cifar}


def read_csv(is_train: bool, config: DataConfig, device: Optional[torch.device], classes: Optional[List[str]] = None,
             multi_label: Optional[bool] = None, missing: str = '') -> Tuple[SampleList, List[str]]:
    """Read the CSV file that the flags name; see `csv_dataset.read`."""
    missing = missing or ('error' if config.bad_images == 'error' and not config.check_data else 'unreadable')
    flag, path = locations.csv_of(is_train, config) or ('', '')
    return csv_dataset.read(flag, path, locations.resolve_data_path(config.data_path), config.loss, classes,
                            multi_label, device, missing)


def build_datasets(config: InputConfig, device: Optional[torch.device] = None, classes: Optional[List[str]] = None,
                   multi_label: Optional[bool] = None, held_out: Optional[np.ndarray] = None
                   ) -> Tuple[Any, Any, List[str]]:
    """(training set or None, validation set or None, class names), consistent with each other and --nb_classes.

    Args:
        device (torch.device): this process's, if all processes of a job call this; then only the first finds the files.
        classes, multi_label: without a training set, the classes that --val_csv may name, and whether an image can have
            several; None reads them from the data.
        held_out (uint64 array): `subsets.name_keys` of the images that --val_split holds out; None selects them.
    """
    train = val = None
    if not config.eval:
        train = build_dataset(True, config, device)
        classes, multi_label = train.classes, train.samples.multi_label
    elif config.train_csv and config.val_csv and classes is None:  # the training CSV names the classes
        listed, classes = read_csv(True, config, device, missing='ignored')
        multi_label = listed.multi_label if multi_label is None else multi_label
    if config.val_split:
        train, val = split_validation(train, config, device, held_out)
    elif locations.needs_validation(config):
        val = build_dataset(False, config, device, classes, multi_label)
    parts: List[Any] = [part for part in (train, val) if part is not None]
    refuse(len(parts) == 2 and parts[1].samples.multi_label != multi_label, config, 'train_csv',
           ': its images have several classes, and class folders give one; give --val_csv')
    classes = parts[0].classes
    if classes != parts[-1].classes:
        empty = {os.path.relpath(path, escape_text(part.samples.root)) for part in parts
                 for path in getattr(part, 'empty', ())}  # --check_data
        only = [('train', set(classes) - set(parts[1].classes) - empty),
                ('val', set(parts[1].classes) - set(classes) - empty)]
        differ = '; '.join('only in %s: %s' % (split, ', '.join(map(escape_text, sorted(names)[:5])))
                           for split, names in only if names)
        refuse(config.train_csv and not config.val_csv, config, 'train_csv', ': its classes differ from the validation '
               'folders (%s); list the validation images with --val_csv' % differ)
        refuse((differ or not empty) and config.eval_data_path, config, 'eval_data_path', ': its classes differ from '
               'the training folders (%s); give the same ones here, as only --eval --resume takes a part' % differ)
        if differ or not empty:
            raise UserError('--data_path: train and val must name the same classes; %s' % differ)
    log_similar_names(classes)
    if config.image_folder_class_index_file:
        train, val, classes = order_classes(train, val, classes, config)
    if train is not None and config.max_train_samples:
        train = train.subset(subsets.subsample(train.samples, config.max_train_samples, config.seed))
    refuse(config.nb_classes not in (0, len(classes)), config, 'nb_classes',
           ': the data has %d classes; leave the flag out, or correct the data' % len(classes))
    return train, val, classes


def order_classes(train: Any, val: Any, classes: Sequence[str], config: DataConfig) -> Tuple[Any, Any, List[str]]:
    """(training set, validation set, classes) in the order of the class names in a file, which may name more."""
    flag = 'image_folder_class_index_file'
    names = [normalize(name) for name in read_class_names(getattr(config, flag), '--' + flag)]
    unknown = sorted(set(classes) - set(names))
    refuse(unknown, config, flag, ': it does not name the class folders %s; add them to the file'
           % model_spec.shorten_names(unknown))
    place = {name: index for index, name in enumerate(names)}
    places = [place[name] for name in classes]
    return train and train.relabel(places, names), val and val.relabel(places, names), names


def check_fits(val_set: Any) -> None:
    """Raise a `UserError` where the first image has a wrong size, before an epoch of training."""
    if val_set.fits is not None and len(val_set):
        with contextlib.suppress(UnreadableImage):
            val_set.load(val_set.samples[0][0])


def split_validation(train: Optional[ImageDataset], config: InputConfig, device: Optional[torch.device] = None,
                     held_out: Optional[np.ndarray] = None) -> Tuple[Optional[ImageDataset], Optional[ImageDataset]]:
    """(the training set without the held-out images, the held-out images) for --val_split; None if not needed.

    `train` has all images; None if only the validation set is needed.
    """
    dataset = train if train is not None else build_dataset(False, config, device)
    keys = subsets.name_keys(dataset.samples)
    if held_out is None:
        train_indices, val_indices = subsets.split(dataset.samples, config.val_split, config.seed, keys)
        held_out = keys[val_indices]
    else:
        train_indices, val_indices = subsets.split_as_recorded(keys, held_out, config.val_split)
    val = dataset.subset(val_indices, **_reading(False, config)) if locations.needs_validation(config) else None
    return None if train is None else train.subset(train_indices, held_out=held_out), val


def without_augmentation(dataset: Any, config: InputConfig) -> ImageDataset:
    """The images of a training set as an evaluation reads them."""
    return dataset.subset(slice(None), **_reading(False, config))


# ---- loaders

def build_loaders(config: InputConfig, train: Any, val: Any, device: Optional[torch.device] = None
                  ) -> Tuple[Optional[PrefetchLoader], Optional[PrefetchLoader]]:
    """(training loader or None, validation loader or None) of `Batch`es on `device` (the CPU) for this process.

    The validation batch is 1.5 times the training batch. Without --dist_eval each process evaluates the whole set.
    """
    skip_unreadable = config.bad_images == 'skip'
    erasing = RandomErasingBoxes(config.reprob, config.recount) if config.reprob > 0 else None
    evaluation, device = EvalTransform.from_config(config), device or torch.device('cpu')
    train_loader = val_loader = None

    pixels = len(evaluation.mean) * config.input_size ** 2
    # Workers of training stay alive while the others load their batches.
    sizes = [config.batch_size] * (train is not None) + [int(1.5 * config.batch_size)] * (val is not None)
    num_workers = workers_that_fit(config.num_workers, *(size * pixels for size in sizes))

    load = functools.partial(make_loader, evaluation=evaluation, device=device, num_workers=num_workers,
                             pin_mem=config.pin_mem, remode=config.remode, persistent_workers=num_workers > 0)
    processes = process_group.rank(), process_group.world_size()
    if train is not None:
        train_loader = load(SeededDataset(train, config.seed, skip_unreadable, erasing), batch_size=config.batch_size,
                            drop_last=True, sampler=EpochSampler(len(train), *processes, seed=config.seed))
    if val is not None:
        sampler = OrderedDistributedSampler(len(val), *(processes if config.dist_eval else (0, 1)))
        val_loader = load(SampleDataset(val, skip_unreadable), batch_size=int(1.5 * config.batch_size),
                          sampler=sampler)
    return train_loader, val_loader
