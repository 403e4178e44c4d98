"""args.yaml and summary.json: what a run leaves beside its checkpoints."""

import contextlib
import importlib
import json
import math
import os
import platform
import re
from typing import Any, Dict, Iterator, Optional

import torch

from beit.config import OutputConfig
from beit.distributed import process_group
from beit.errors import UserError, one_line
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.outputs import args_yaml
from beit.paths import project_root

run_folder.register_output(r'(eval-)?args\.yaml')
run_folder.register_output(r'(eval-)?summary\.json', at_end=True)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """A full disk is reported, but does not end the run: what was trained cannot be had again."""
    try:
        yield
    except (OSError, UserError) as error:
        log_main('Not written: ' + one_line(error))


def write_args(output: OutputConfig, name: str = 'args.yaml') -> None:
    """output_dir/args.yaml, by the first process."""
    if output.output_dir and process_group.is_main_process():
        with best_effort():
            os.makedirs(output.output_dir, exist_ok=True)
            args_yaml.write(os.path.join(output.output_dir, name), output.flags)


def write_summary(output_dir: str, figures: Dict[str, Any], name: str = 'summary.json') -> None:
    """output_dir/summary.json, by the first process: one object, versions too; what isn't a finite number is null.

    The scripts in test/ name a further file for it in `BEIT_SUMMARY`.
    """
    paths = [os.environ.get('BEIT_SUMMARY'), output_dir and os.path.join(output_dir, name)]
    for path in filter(None, paths) if process_group.is_main_process() else ():
        text = json.dumps(nonfinite_to_none(dict(figures, versions=versions())), indent=2, allow_nan=False)
        with best_effort():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_bytes(path, (text + '\n').encode())


def nonfinite_to_none(value: Any) -> Any:
    """A copy of nested dicts and lists in which infinite and undefined numbers are None."""
    if isinstance(value, dict):
        return {name: nonfinite_to_none(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> Dict[str, Optional[str]]:
    """{name: version} of what computed, None where that cannot be told."""
    found = {'beit': project_version(), 'python': platform.python_version(), 'torch': str(torch.__version__)}
    for name in ('torchvision', 'timm', 'numpy'):
        found[name] = getattr(importlib.import_module(name), '__version__', None)
    return found


def project_version() -> Optional[str]:
    """This project's newest version in CHANGELOG.md; None where that is not there."""
    path = os.path.join(project_root(), 'CHANGELOG.md')
    with contextlib.suppress(OSError, ValueError), open(path, encoding='utf-8') as file:
        return next((line.split(']')[0][4:] for line in file if re.match(r'## \[\d', line)), None)
    return None
