"""Runs the programs that run_export.py wrote as ONNX, TorchScript and torch.export, for evaluation and prediction.

The description of the model is read first, without running anything. ONNX holds a graph of known operators. TorchScript
and torch.export hold programs and pickles, which can do anything as the user who loads them.
"""

import argparse
import io
import json
import re
import warnings
import zipfile
from typing import Any, Callable, Dict, NamedTuple, Tuple

import torch

from beit import model_spec, startup, weights
from beit.checkpoint import sources
from beit.errors import UserError, escape_text, one_line
from beit.files.untrusted_pickle import MAX_PICKLE
from beit.log import log_main

EXTRA = startup.pip_install(file='requirements-extra.txt')
KEY = 'program'  # in the content of `load`
BATCH_SIZE = 'batch_size'  # in the metadata of a program for batches of one size
PARAMETERS = 'parameters'  # in the metadata: the number of weights
LARGEST_BATCH = 65536

Run = Callable[[torch.Tensor], torch.Tensor]  # float32 images (B, 3, H, W) to logits (B, classes)
Opened = Tuple[Dict[str, str], Callable[[], Run]]  # the metadata, and a function that loads the program


def import_optional(name: str) -> Any:
    """A module, or None if it is not installed."""
    try:
        return __import__(name, fromlist=['_'])
    except ImportError:
        return None


def onnx_session(data: bytes) -> Any:
    """A session of onnxruntime on the CPU."""
    runtime = import_optional('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(data, options, providers=['CPUExecutionProvider'])


def open_onnx(data: bytes) -> Opened:
    session = onnx_session(data)
    return session.get_modelmeta().custom_metadata_map, lambda: lambda images: torch.from_numpy(
        session.run(['logits'], {'image': images.cpu().numpy()})[0]).to(images.device)


def _extra_files(data: bytes) -> Dict[str, str]:
    """The metadata in an archive of PyTorch, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename.rpartition('/')[2]: archive.read(info).decode() for info in archive.infolist()
                if re.search(r'(^|/)extra(_files)?/', info.filename) and info.file_size <= MAX_PICKLE}


def _opener(read: Callable[[io.BytesIO], Run]) -> Callable[[bytes], Opened]:
    return lambda data: (_extra_files(data), lambda: read(io.BytesIO(data)))


class Program(NamedTuple):
    """A format of programs."""
    reader: str  # the package that runs it
    open: Callable[[bytes], Opened]
    is_code: bool = True  # an untrusted file can run any code


PROGRAMS = {
    'onnx': Program('onnxruntime', open_onnx, is_code=False),
    'torchscript': Program('torch', _opener(lambda file: torch.jit.load(file, map_location='cpu'))),
    'torch_export': Program('torch', _opener(lambda file: torch.export.load(file).module())),
}


class ExportedModel(torch.nn.Module):
    """A program in place of a network: images float32 (B, 3, H, W) to logits float32 (B, classes), for any B.

    A program for batches of one size gets them in parts, the last one filled with blank images.
    """

    def __init__(self, run: Run, batch_size: int, parameter_count: int) -> None:
        super().__init__()
        self.run, self.batch_size, self.parameter_count = run, batch_size, parameter_count

    def train(self, mode: bool = True) -> 'ExportedModel':
        return self  # torch.export's programs refuse it; all were exported for evaluation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        missing = -len(images) % self.batch_size if self.batch_size else 0
        padded = torch.cat((images, images.new_zeros((missing,) + images.shape[1:])))
        return torch.cat([self.run(part) for part in padded.split(self.batch_size or len(padded))])[:len(images)]


def drop_flags(args: argparse.Namespace) -> None:
    """Drop flags of a --config file that need the weights, where --resume names a program."""
    if not sources.program_kind(args.resume):
        return
    if getattr(args, 'amp', False):
        log_main('--amp is not used: %s is an exported program, which computes in float32' % escape_text(args.resume))
    vars(args).update((name, False) for name in ('amp', 'compile', 'model_ema') if name in args)


@torch.no_grad()
def load(path: str) -> Dict[str, Any]:
    """The content of an exported program, as of a checkpoint: its model's description, and an `ExportedModel`.

    Raises a `UserError` if the file is damaged, does not describe its model, or computes something else.
    """
    kind = PROGRAMS[sources.program_kind(path)]
    shown = '--resume %s' % escape_text(path)
    if weights.is_remote(path):
        raise UserError('%s: exported programs are not downloaded; fetch the file first' % shown)
    if import_optional(kind.reader) is None:
        raise UserError('%s: running it needs %s; %s' % (shown, kind.reader, EXTRA))
    try:
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch.export, about its own reader
            metadata, start = kind.open(file.read())
            described = json.loads(metadata[model_spec.KEY])
            spec: Any = model_spec.spec_in({model_spec.KEY: described}, path, len(described['classes']))
            if kind.is_code:
                log_main('%s holds a program, which can do anything: run only files that you trust' % escape_text(path))
            model = ExportedModel(start(), range(LARGEST_BATCH)[int(metadata.get(BATCH_SIZE, 0))],
                                  int(metadata.get(PARAMETERS, 0)))
            shape = model(torch.zeros(1, *spec.preprocessing.to_timm()['input_size'])).shape
            if shape != (1, len(spec.classes)):
                raise ValueError('logits of shape %s for %d classes' % (tuple(shape), len(spec.classes)))
    except UserError:
        raise
    except Exception as error:  # onnxruntime and PyTorch raise many types
        raise UserError('%s: damaged, or no export that this PyTorch or onnxruntime can run (%s); export it again' % (
            shown, escape_text(one_line(error))[:200] or type(error).__name__)) from None
    return {KEY: model, model_spec.KEY: described}
