"""summary.json, which a run writes beside its checkpoints."""

import contextlib
import importlib
import json
import math
import os
import platform
import re
from typing import Any, Dict, Iterator, Optional

import torch

from beit.distributed import process_group
from beit.errors import UserError, one_line
from beit.files import run_folder
from beit.files.atomic_write import write_bytes
from beit.log import log_main
from beit.paths import project_root

run_folder.register_output(r'(eval-)?summary\.json', at_end=True)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Log a write error, such as a full disk, without ending the run, whose weights would be lost."""
    try:
        yield
    except (OSError, UserError) as error:
        log_main('Not written: ' + one_line(error))


def write_summary(output_dir: str, figures: Dict[str, Any], name: str = 'summary.json') -> None:
    """Write output_dir/summary.json, on the first process: figures and versions; non-finite values become null.

    The scripts in test/ name a second file for it in `BEIT_SUMMARY`.
    """
    paths = [os.environ.get('BEIT_SUMMARY'), output_dir and os.path.join(output_dir, name)]
    for path in filter(None, paths) if process_group.is_main_process() else ():
        text = json.dumps(nonfinite_to_none(dict(figures, versions=versions())), indent=2, allow_nan=False)
        with best_effort():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_bytes(path, (text + '\n').encode())


def nonfinite_to_none(value: Any) -> Any:
    """Copy nested dicts and lists, with None for non-finite numbers."""
    if isinstance(value, dict):
        return {name: nonfinite_to_none(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> Dict[str, Optional[str]]:
    """{package: version}, or None if unknown."""
    found = {'beit': project_version(), 'python': platform.python_version(), 'torch': str(torch.__version__)}
    for name in ('torchvision', 'timm', 'numpy'):
        found[name] = getattr(importlib.import_module(name), '__version__', None)
    return found


def project_version() -> Optional[str]:
    """The newest version in CHANGELOG.md; None without one."""
    path = os.path.join(project_root(), 'CHANGELOG.md')
    with contextlib.suppress(OSError, ValueError), open(path, encoding='utf-8') as file:
        return next((line.split()[1] for line in file if re.match(r'## \d', line)), None)
    return None
