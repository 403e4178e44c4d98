"""Converts an ONNX file for an Ascend processor with ATC, the compiler of CANN, if it is installed. No PyTorch."""

import glob
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from typing import Any, List

from beit.config import ExportConfig
from beit.errors import UserError, escape_text

ENDING = '.om'


def check(soc_version: str, output: str) -> None:
    """Raise a `UserError` for an invalid name of an Ascend processor or of a .om file."""
    if not re.match(r'Ascend\d{3}[A-Za-z0-9_-]{0,30}\Z', soc_version):
        raise UserError('--soc_version %s: --format om needs the name of the processor, such as Ascend910B4 or '
                        'Ascend310P3; npu-smi info shows it' % (escape_text(soc_version) or 'is missing'))
    if output and not output.endswith(ENDING):
        raise UserError('--output %s: end the name in .om; the ONNX file gets the same name with .onnx'
                        % escape_text(output))


def convert(trained: Any, config: ExportConfig, onnx: str, path: str) -> List[str]:
    """Convert the ONNX file of a `LoadedModel` to `path`, a .om file. Without ATC it writes nothing.

    Returns lines for the log.

    Raises:
        UserError: ATC fails, or writes no file.
    """
    def arguments(onnx: str, output: str) -> List[str]:
        side = trained.config.input_size  # ATC adds .om to `output`
        return ['--framework=5', '--model=' + onnx, '--output=' + output, '--soc_version=' + config.soc_version,
                '--input_format=NCHW', '--input_shape=image:%d,%d,%d,%d' % (
                    config.batch_size or 1, trained.config.in_chans, side, side)]

    shown = ' '.join(map(shlex.quote, ['atc'] + arguments(onnx, path[:-len(ENDING)])))
    inside = [os.path.join(os.environ.get('ASCEND_TOOLKIT_HOME') or '/nowhere', folder)
              for folder in ('bin', 'compiler/bin', 'atc/bin')]
    atc = shutil.which('atc', path=os.pathsep.join([os.environ.get('PATH', os.defpath)] + inside))
    if not atc:
        return ['Not converted: atc is neither on PATH nor in ASCEND_TOOLKIT_HOME; where CANN is, this converts it:',
                shown]
    with tempfile.TemporaryDirectory(prefix='.atc-', dir=os.path.dirname(os.path.abspath(path))) as work:
        result = subprocess.run([atc] + arguments(os.path.abspath(onnx), os.path.join(work, 'model')), cwd=work,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # in `work`: ATC writes other files
        made = glob.glob(os.path.join(work, '*' + ENDING))  # the name can contain the system: model_linux_aarch64.om
        if result.returncode or len(made) != 1:
            raise UserError('--format om: atc ended with status %d and %s (%s); %s is ready for this command: %s' % (
                result.returncode, 'a file' if made else 'no file',
                escape_text(result.stdout.strip().rpartition(b'\n')[2])[-300:], escape_text(onnx), shown))
        os.replace(made[0], path)
    return ['Wrote %s (om, %s, batches of %d, %.1f MB) with %s' % (
        escape_text(path), config.soc_version, config.batch_size or 1, os.path.getsize(path) / 1e6, escape_text(atc))]
