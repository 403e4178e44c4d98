"""Finds the folders and files that the flags name, and writes the digits of --data_path demo."""

import glob
import os
import tempfile
from typing import Optional, Sequence, Tuple

from beit import startup
from beit.config import SMALL_INPUT, SPLITS, DataConfig, InputConfig
from beit.data.decode import is_image_name
from beit.errors import UserError, escape_text, refuse, unknown_value_error
from beit.files import archives
from beit.log import log_main
from beit.paths import cache_folder, project_root


def write_digits(root: str) -> None:
    """Write scikit-learn's UCI handwritten digits as class folders: 1,797 scans, 10 classes, stratified 80/20.

    The 8x8 scans become 32x32 PNG files. The folder appears complete or not at all.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits  # slow to import, for the demo only
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=0.2, random_state=0, stratify=digits.target)
    os.makedirs(os.path.dirname(root), exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix='.digits-', dir=os.path.dirname(root)) as temporary:
            for split, members in (('train', train), ('val', val)):
                for index in members:
                    folder = os.path.join(temporary, 'digits', split, str(digits.target[index]))
                    os.makedirs(folder, exist_ok=True)
                    scan = Image.fromarray(np.uint8(np.round(digits.images[index] * (255. / 16.))))
                    scan = scan.resize((32, 32), Image.BICUBIC)  # type: ignore[attr-defined]
                    scan.save(os.path.join(folder, '%04d.png' % index))
            os.rename(os.path.join(temporary, 'digits'), root)
    except OSError:
        if not os.path.isdir(os.path.join(root, 'val')):  # else another process wrote it
            raise


def resolve_data_path(data_path: str) -> str:
    """The folder of --data_path; `demo` is the folder of the digits, written on first use."""
    if data_path != 'demo':
        return data_path
    roots = [os.path.join(folder, 'data', 'digits') for folder in (project_root(), cache_folder())]
    for root in roots:
        if os.path.isdir(os.path.join(root, 'val')):
            return root
    for root in roots:  # the second where the project is read-only
        try:
            write_digits(root)
            log_main('Wrote the UCI handwritten digits, 1,797 scans in 10 classes, to %s' % escape_text(root))
            return root
        except ImportError:
            raise UserError('--data_path demo needs scikit-learn; ' + startup.pip_install('scikit-learn')) from None
        except OSError as error:
            reason = error.strerror or error
    raise UserError('--data_path demo: the digits can be written neither to %s nor to %s (%s)'
                    % (escape_text(roots[0]), escape_text(roots[1]), reason))


def check_paths(config: InputConfig) -> None:
    """Raise a `UserError` where a flag names a missing folder or file, or contradicts another. Cheap."""
    check_named_files(config)
    check_split(config)
    index = config.image_folder_class_index_file
    refuse(index and (config.data_set == 'CIFAR' or config.train_csv or config.val_csv), config,
           'image_folder_class_index_file', ': it orders class folders, and --data_set CIFAR and CSV files have none; '
           'leave it out')
    DATA_SETS[config.data_set](config)


def check_named_files(config: InputConfig) -> None:
    """Raise a `UserError` where a flag names a missing folder or file."""
    if config.data_set not in DATA_SETS:
        raise unknown_value_error('--data_set', config.data_set, DATA_SETS)
    check_csv_flags(config)
    index = config.image_folder_class_index_file
    refuse(index and not os.path.isfile(index), config, 'image_folder_class_index_file',
           ': no such file; give a file of class folders, one a line')
    for flag in ('data_path', 'eval_data_path') if config.data_set != 'CIFAR' else ():
        path = getattr(config, flag)
        try:
            is_folder = not path or archives.isdir(path)
        except UserError as error:
            raise UserError('--%s %s' % (flag, error)) from None
        refuse(not is_folder and (path, flag) != ('demo', 'data_path'), config, flag,
               ': a file; give a folder, or a .zip or .tar that is not compressed further'
               if os.path.isfile(path or '') else ': no such file or folder')


def check_class_folders(config: InputConfig) -> None:
    """`check_paths` for class folders, and for images that CSV files list."""
    needed = [True] * (not config.eval) + [False] * needs_validation(config)
    in_folders = [is_train for is_train in needed if csv_of(is_train, config) is None]
    if not config.data_path and any(is_train or not config.eval_data_path for is_train in in_folders):
        raise UserError('--data_path is missing; give the folder that holds train/ and val/, or the word demo'
                        if not config.train_csv else '--train_csv %s: there are no validation images; give --val_csv, '
                        'or --val_split 0.1 to hold out a tenth of these' % escape_text(config.train_csv))
    for is_train in in_folders if config.data_path != 'demo' else ():
        flag, root = split_root(is_train, config)
        if not archives.isdir(root):
            remedy = _layout_remedy(getattr(config, flag[2:]), is_train) + (
                '' if is_train or config.eval_data_path else
                '; or --val_split 0.1 holds out a tenth of the training images')
            refuse(True, config, flag[2:], ': there is no folder %s; it must hold one folder of images per class%s'
                   % (escape_text(root), remedy))


def _layout_remedy(folder: str, is_train: bool) -> str:
    """The flags that read other folders in --data_path than train/ and val/."""
    if os.path.basename(os.path.normpath(folder)) in ('train', 'val'):
        return '; or give the folder above, if that holds train/ and val/'
    with archives.scandir(folder) as entries:
        folders = {entry.name: entry.path for entry in entries if archives.isdir(entry.path)}
    for name, path in sorted(folders.items(), reverse=True):  # valid before test
        if SPLITS.get(name.lower()) in (('train',) if is_train else ('val', 'test')):
            return ('; --data_set image_folder --data_path %s reads that folder' if is_train else
                    '; --eval_data_path %s reads that folder') % escape_text(path)
    for path in folders.values():  # an archive of a folder
        if archives.isdir(part_of(path, 'train' if is_train else 'val')):
            return '; give %s' % escape_text(path)
    with_images = []
    for name, path in folders.items() if not {'train', 'val'} & set(folders) else ():
        with archives.scandir(path) as entries:
            with_images += [name] * any(is_image_name(entry.name) for entry in entries)
    if not with_images:
        return ''
    return '; --data_set image_folder --data_path %s reads the class folders in it (%s%s), with --val_split or ' \
        '--eval_data_path' % (escape_text(folder), ', '.join(map(escape_text, sorted(with_images)[:3])),
                              ', …' if len(with_images) > 3 else '')


def check_cifar(config: InputConfig) -> None:
    """`check_paths` for CIFAR-100."""
    if not config.data_path:
        raise UserError('--data_path is missing; give the folder that holds cifar-100-python')
    cifar_root(config.data_path)
    refuse(config.in_chans != 3, config, 'in_chans', ': the images of CIFAR are RGB; leave it out')
    refuse(config.input_size < SMALL_INPUT, config, 'input_size',
           ': the images of CIFAR are 32x32 and cannot be made smaller; use 32 or more')


def check_split(config: DataConfig) -> None:
    """Raise a `UserError` where --val_split is given and there are validation images already."""
    if not config.val_split:
        return
    for flag in ('eval_data_path', 'val_csv'):
        refuse(getattr(config, flag), config, 'val_split',
               ': --%s names the validation images; leave one of the two out' % flag)
    refuse(config.data_set == 'CIFAR', config, 'val_split', ': CIFAR has a test set; leave the flag out')
    train, val = (part_of(resolve_data_path(config.data_path), part) for part in ('train', 'val'))
    has_val = config.data_path and not config.train_csv and (os.path.lexists(val) or archives.isdir(val))
    refuse(config.data_set == 'IMNET' and has_val, config, 'val_split', ': there is a folder %s with validation '
           'images; leave the flag out, or name the class folders with --data_set image_folder --data_path %s'
           % (escape_text(val), escape_text(train)))


def check_csv_flags(config: DataConfig) -> None:
    """Raise a `UserError` where --train_csv or --val_csv names no file, or contradicts another flag."""
    for flag in ('train_csv', 'val_csv'):
        path = getattr(config, flag)
        refuse(path and not os.path.isfile(path), config, flag, ': %s; give a CSV file with one path,label per line'
               % ('is a folder' if os.path.isdir(path) else 'no such file'))
        refuse(path and config.data_set == 'CIFAR', config, flag,
               ': --data_set CIFAR has no image files to list; leave one of the two out')
    refuse(config.val_csv and config.eval_data_path, config, 'val_csv',
           ': --eval_data_path names validation images too; leave one of the two out')


def csv_of(is_train: bool, config: DataConfig) -> Optional[Tuple[str, str]]:
    """(flag, CSV file) that lists the images for training or validation, or None."""
    flag = 'train_csv' if is_train or config.val_split else 'val_csv'
    return ('--' + flag, getattr(config, flag)) if getattr(config, flag) else None


def needs_validation(config: DataConfig) -> bool:
    return config.eval or not config.disable_eval_during_finetuning


def split_root(is_train: bool, config: DataConfig) -> Tuple[str, str]:
    """(flag, folder) of the class folders for training or validation; --val_split uses one folder for both."""
    is_train = is_train or config.val_split > 0
    if not is_train and config.eval_data_path:
        return '--eval_data_path', config.eval_data_path
    if config.data_set != 'image_folder':
        return '--data_path', part_of(resolve_data_path(config.data_path), 'train' if is_train else 'val')
    if not is_train:
        raise UserError('--data_set image_folder needs --eval_data_path, the class folders for validation '
                        '(or --disable_eval_during_finetuning)')
    return '--data_path', config.data_path


def part_of(folder: str, part: str) -> str:
    """The class folders of train or val: a folder there, or an archive, whose uppermost folder can have that name."""
    path = os.path.join(folder, part)
    for archive in [path + ending for ending in archives.READERS] if not archives.isdir(path) else ():
        if os.path.isfile(archive):
            inside = os.path.join(archive, part)
            return inside if archives.isdir(inside) else archive
    return path


def cifar_root(data_path: str) -> str:
    """The folder that holds cifar-100-python; the user may also name that folder itself."""
    path = os.path.normpath(data_path)
    for root in (path, os.path.dirname(path)):
        if os.path.isfile(os.path.join(root, 'cifar-100-python', 'train')):
            return root
    raise UserError('--data_path %s: there is no cifar-100-python/train in it; unpack cifar-100-python.tar.gz there'
                    % escape_text(data_path))


# The values of --data_set, with the function that checks its flags; `datasets.BUILDERS` opens the files.
DATA_SETS = {'IMNET': check_class_folders, 'image_folder': check_class_folders, 'CIFAR': check_cifar}


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise a `UserError` for an input without a file."""
    for name in inputs:
        if not (os.path.lexists(name) or archives.isdir(name)) and next(glob.iglob(name, recursive=True), None) is None:
            raise UserError('%s: %s' % (escape_text(name), 'no file matches' if glob.has_magic(name) else
                                        'no such file or folder'))
