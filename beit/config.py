"""Settings that travel together, as frozen dataclasses. A field has the name of the flag that sets it.

`flags.config_from(args, DataConfig)` builds one from a parsed command line; nothing below the programs sees `args`.
"""

import dataclasses
import os
from typing import Any, Dict, Optional, Sequence, Tuple

from beit.errors import UserError

DEVICE_TYPES = ('npu', 'cuda', 'cpu')  # in order of preference
MAX_INPUT_SIZE = 8192  # pixels a side
SMALL_INPUT = 32  # up to this size images are not resized, and random crops have padding
COLOURS = {'white': (255, 255, 255), 'black': (0, 0, 0)}
SPLITS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val',
          'test': 'test', 'testing': 'test'}  # names of folders and in CSV files
PROGRAM_ENDINGS = {'onnx': '.onnx', 'torchscript': '.torchscript.pt', 'torch_export': '.pt2'}  # exported programs
EVAL_FITS = {'crop': 'center', 'squash': 'squash', 'letterbox': 'border'}  # --eval_fit, and timm's crop_mode


def default_num_workers() -> int:
    """The number of processors that this process can use, at most 10."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(10, allowed)


def parse_device(name: str) -> Tuple[str, str]:
    """(type or auto, index or '') of --device. Raises `UserError`."""
    kind, _, index = name.partition(':')
    if kind not in ('auto',) + DEVICE_TYPES or (index and not (index.isdigit() and kind in ('npu', 'cuda'))):
        raise UserError('--device must be auto, npu, cuda or cpu, or one with an index such as cuda:1; got %r' % name)
    return kind, index


def policy_or_none(policy: Optional[str]) -> Optional[str]:
    """An AutoAugment policy, or None for 'none' and the empty string."""
    return None if policy in (None, '', 'none', 'None') else policy


def check_input_size(model: str, input_size: int) -> None:
    """Raise a `UserError` for an input size that is no multiple of the patch size, which the model's name holds."""
    patch = int(model.partition('_patch')[2].partition('_')[0])
    if input_size % patch:
        below = input_size // patch * patch
        raise UserError('--input_size %d is not a multiple of the patch size %d of --model %s; use %s%d' % (
            input_size, patch, model, '%d or ' % below if below else '', below + patch))


def parse_colour(text: str) -> Tuple[int, ...]:
    """(red, green, blue) of a name in `COLOURS` or of R,G,B. Raises ValueError."""
    values = COLOURS.get(text) or tuple(int(each) for each in text.split(','))
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise ValueError(text)
    return values


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images to read, and their labels."""
    data_path: str = ''
    eval_data_path: Optional[str] = None
    data_set: str = 'IMNET'
    train_csv: str = ''
    val_csv: str = ''
    val_split: float = 0.  # share of each class
    max_train_samples: int = 0  # 0: all
    nb_classes: int = 0  # 0: as many as the data has
    image_folder_class_index_file: str = ''  # the class folders in the order of the outputs
    seed: int = 0
    loss: str = 'auto'  # with 'bce' an image can have several labels, see csv_dataset
    bad_images: str = 'error'  # or 'skip'
    eval: bool = False  # no training set is needed
    disable_eval_during_finetuning: bool = False
    check_data: bool = False
    class_depth: int = 1  # folders from the root to a class's


@dataclasses.dataclass(frozen=True)
class TransformConfig:
    """The transforms of one image, in training and in evaluation."""
    input_size: int = 224  # pixels a side
    imagenet_default_mean_and_std: bool = False
    crop_pct: Optional[float] = None  # None: the reference's for this input size
    in_chans: int = 3  # 1 (grey), 3 (RGB), 4 (RGBA)
    eval_fit: str = 'crop'  # of `EVAL_FITS`
    exif: str = 'ignore'  # or 'follow'
    background: str = ''  # a colour under transparent pixels; '': the alpha channel is dropped
    evaluation: Any = None  # the EvalTransform of a checkpoint, which takes precedence over these flags
    color_jitter: float = 0.4
    aa: str = 'rand-m9-mstd0.5-inc1'
    hflip: float = 0.5
    train_interpolation: str = 'bicubic'
    reprob: float = 0.25
    remode: str = 'pixel'
    recount: int = 1
    data_backend: str = 'exact'
    eval_data_backend: str = 'exact'


@dataclasses.dataclass(frozen=True)
class MixupConfig:
    """Mixup and cutmix of a batch."""
    mixup: float = 0.
    cutmix: float = 0.
    cutmix_minmax: Optional[Sequence[float]] = None
    mixup_prob: float = 1.
    mixup_switch_prob: float = 0.5
    mixup_mode: str = 'batch'
    smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """The loading of batches, and their distribution among processes."""
    batch_size: int = 64  # of training, per process; evaluation uses 1.5 times as many
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    pin_mem: bool = True
    dist_eval: bool = False
    seed: int = 0
    bad_images: str = 'error'
    max_pixels: int = 0  # the limit for decoding; 0: Pillow's


@dataclasses.dataclass(frozen=True)
class InputConfig(DataConfig, TransformConfig, LoaderConfig):
    """Everything that determines the batches: images, transforms, loaders."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network to build."""
    model: str = 'beit_base_patch16_224'
    input_size: int = 224
    drop: float = 0.
    drop_path: float = 0.1
    attn_drop_rate: float = 0.
    use_mean_pooling: bool = True
    init_scale: float = 0.001
    rel_pos_bias: bool = True
    abs_pos_emb: bool = False
    layer_scale_init_value: float = 0.1
    qkv_bias: bool = True
    in_chans: int = 3


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """How a network is written as a program."""
    opset: Optional[int] = None  # of ONNX; None: the format's default
    batch_size: Optional[int] = None  # the only size of a batch; None: any
    soc_version: str = ''  # the Ascend processor


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its parameter groups."""
    opt: str = 'adamw'
    opt_eps: float = 1e-8
    opt_betas: Optional[Sequence[float]] = None
    momentum: float = 0.9
    weight_decay: float = 0.05
    lr: float = 5e-4
    layer_decay: float = 0.9
    disable_weight_decay_on_rel_pos_bias: bool = False


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """The files that a run writes."""
    output_dir: str = ''
    log_dir: Optional[str] = None
    save_ckpt: bool = True
    save_ckpt_steps: int = 0  # updates; 0: none in mid-epoch
    save_ckpt_minutes: float = 0.
    keep_checkpoints: int = 0  # 0: all
    curves: bool = True
    report: bool = False
    auto_resume: bool = False
    flags: Dict[str, object] = dataclasses.field(default_factory=dict)  # the run's, for args.yaml and checkpoints


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The device, and the rendezvous of the processes."""
    device: str = 'auto'
    dist_url: str = 'env://'
    dist_on_itp: bool = False
    local_rank: int = -1  # -1: LOCAL_RANK of the environment
    dist_timeout: float = 600.  # seconds
