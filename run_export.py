#!/usr/bin/env python3
"""Export a trained BEiT for other programs: ONNX, TorchScript, torch.export, timm, Hugging Face.

Classes, input size, pooling and preprocessing come from the checkpoint and are part of the export. The export is first
compared with the checkpoint's network; if they differ, nothing is written.
"""

if __name__ == '__main__':
    from beit import startup
    startup.prepare()
    import check_flags
    check_flags.check_command_line('run_export.py', __doc__)

import argparse
import functools
import os
import sys
import warnings
from typing import Any, Callable, Dict, Optional, Sequence

import torch

import flags
from beit.checkpoint.inference_model import LoadedModel, load_for_inference
from beit.cli import run_interruptible
from beit.config import ExportConfig
from beit.errors import UserError, escape_text, print_line
from beit.files import atomic_write
from beit.outputs.export_formats import (
    EXTRA, FORMATS, Format, NotChecked, example_images, import_optional, package_version)
from check_flags import check_early, check_export_output

BATCHES = (1, 2, 5)  # images at a time in the comparison
TOLERANCE = 1e-3  # of the largest logit: rounding stays far below; a lost position bias is above


# ---- the comparison

def compare(chosen: Format, written: Any, trained: LoadedModel, batch_size: Optional[int] = None) -> str:
    """Compare the export with the checkpoint's network, for one batch size or several; returns a line for the log.

    Raises `UserError` if the logits differ by more than rounding.
    """
    if import_optional(chosen.reader) is None:
        return 'Not checked: the check needs %s; %s' % (chosen.reader, EXTRA)
    sizes = BATCHES if batch_size is None else (batch_size,)
    batches = [example_images(trained, count) for count in sizes]
    try:
        found = chosen.run(written, trained, batches)
    except NotChecked as reason:
        return 'Not checked: %s' % reason
    expected = [trained.model(images) for images in batches]
    largest = max(logits.abs().max().item() for logits in expected)
    difference = max((exported - logits).abs().max().item() if exported.shape == logits.shape else float('nan')
                     for exported, logits in zip(found, expected))
    result = 'logits differ by at most %.2g (the largest is %.3g) for batches of %s, with %s %s' % (
        difference, largest, ', '.join(map(str, sizes)), chosen.reader, package_version(chosen.reader))
    if not difference <= TOLERANCE * largest:
        raise UserError('the export is not the checkpoint\'s network: %s; nothing was written (--no_check writes it)'
                        % result)
    return 'Checked: ' + result


# ---- the program

build_parser = functools.partial(flags.build_parser, flags.EXPORT, __doc__)


def default_output(source: str, ending: str) -> str:
    """The checkpoint's path with another ending; for a URL in the current folder."""
    name = source.partition('#')[0].partition('?')[0].rpartition('/')[2] if '://' in source else source
    return os.path.splitext(name.rstrip('/'))[0] + ending


def main(args: argparse.Namespace) -> None:
    check_early(flags.EXPORT, args)
    trained = load_for_inference(args.resume, args.use_ema, args.class_names, model=args.model,
                                 input_size=args.input_size)
    chosen = FORMATS[args.format]
    config = flags.config_from(args, ExportConfig, **{
        name: value for name, value in chosen.defaults.items() if getattr(args, name) is None})
    target = args.output or default_output(trained.source, ('-ema' if args.use_ema else '') + chosen.ending)
    path = target if chosen.convert is None else os.path.splitext(target)[0] + FORMATS['onnx'].ending
    for each in dict.fromkeys((target, path)):
        check_export_output(args, each)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing, about fixed sizes, which `compare` checks
        content, description = chosen.make(trained, config)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if isinstance(content, dict):
            result = write_folder(path, content, lambda folder: None if args.no_check else
                                  compare(chosen, folder, trained))
        else:
            result = None if args.no_check else compare(chosen, content, trained, config.batch_size)
            atomic_write.write_bytes(path, content, is_given=True)
    size = sum(map(len, content.values())) if isinstance(content, dict) else len(content)
    print_line('Exported %s, %d classes, input %dx%d, from %s' % (
        trained.config.model, len(trained.classes), trained.config.input_size, trained.config.input_size,
        escape_text(trained.source)))
    print_line(result or 'Not checked (--no_check)')
    print_line('Wrote %s (%s, %s, %.1f MB)' % (escape_text(path), 'onnx' if chosen.convert else args.format,
                                               description, size / 1e6))
    for line in chosen.convert(trained, config, path, target) if chosen.convert else ():
        print_line(line)
    for line in chosen.usage(trained, path):
        print_line(line)


def write_folder(path: str, files: Dict[str, bytes], check: Callable[[str], Any]) -> Any:
    """Write files into a new folder, call `check` with its path, then rename it. Returns the result of `check`."""
    try:
        with atomic_write.atomic_directory(path) as folder:
            for name, data in files.items():
                with open(os.path.join(folder, name), 'wb') as file:
                    file.write(data)
            return check(folder)
    except OSError as error:
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?'
                        % (escape_text(path), error.strerror or error)) from None


def run(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and export; a user error is one line and exit status 2."""
    return run_interruptible(flags.EXPORT, lambda: main(build_parser().parse_args(argv)), 'close other programs')


if __name__ == '__main__':
    sys.exit(run())
