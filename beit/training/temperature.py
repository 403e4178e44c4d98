"""--calibrate: a temperature for a network's logits (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""

import math
import os
from typing import Any, Dict, Sequence

import torch

from beit import model_spec
from beit.checkpoint import discovery
from beit.checkpoint.inference_model import CheckpointWeights
from beit.distributed import collectives
from beit.errors import UserError, escape_text
from beit.files import weights_file
from beit.files.atomic_write import check_writable
from beit.log import log_main
from beit.training import losses, metrics

LIMITS = 0.05, 20.  # of a temperature
ROWS = 4096  # images at a time


class Temperature(metrics.Calibration):
    """Fits the temperature that minimises the loss without smoothing (NLL). `columns`: logits, targets, indices."""

    message = 'NLL %(nll_before).4f -> %(nll).4f, calibration error %(ece_before).3f%% -> %(ece).3f%%'

    def update(self, batch: Sequence[Any], output: torch.Tensor) -> None:
        for column, values in zip(self.columns, (output, batch[1], batch[2])):
            column.append(values.cpu())

    def compute(self, sharded: bool, device: torch.device) -> Dict[str, Any]:
        """The temperature, losses and errors; 'reason': why none in `LIMITS` fits, or ''. The same on every process."""
        from scipy.optimize import minimize_scalar  # slow to import
        outputs, targets, indices = map(torch.from_numpy, metrics.gather_batches(self.columns, sharded, device))
        order = indices.argsort()
        parts = list(zip(outputs[order].split(ROWS), targets[order].split(ROWS)))

        def nll(log: float) -> float:
            return sum(float(losses.image_losses(output.double() / math.exp(log), wanted, self.activation).sum())
                       for output, wanted in parts) / len(order)

        def ece(log: float) -> float:
            metric = metrics.Calibration(self.activation, self.multi_label)
            metric.update((None, targets, indices), outputs / math.exp(log))
            return metric.compute(False, device)['ece']

        low, high = map(math.log, LIMITS)
        found = float(minimize_scalar(nll, bounds=(low, high), method='bounded', options={'xatol': 1e-6}).x)
        ends, reason = (nll(low), nll(high)), ''
        if not (low + 1e-3 < found < high - 1e-3 and nll(found) < min(ends)):
            reason = 'some of its outputs are NaN or infinite; train again with a lower --lr' \
                if not all(map(math.isfinite, ends)) else \
                'nearly every prediction is right; calibrate on other images' if ends[0] < ends[1] / 2 else \
                'its predictions are no better than chance; train longer' if ends[0] > ends[1] * 2 else \
                'its outputs are nearly equal for all classes; train longer'
        found, reason = collectives.all_gather_json([found, reason], device)[0]  # the first process's
        return {'temperature': math.exp(found), 'nll_before': nll(0.), 'nll': nll(found), 'ece_before': ece(0.),
                'ece': ece(found), 'reason': reason}


def folder_of(resume: str) -> str:
    """The folder of the checkpoint that --resume names; '' if that is not on this machine."""
    folder = resume if os.path.isdir(resume) else os.path.dirname(resume)
    return os.path.abspath(folder) if os.path.exists(resume) else ''


def calibrated_path(checkpoint: CheckpointWeights, output_dir: str) -> str:
    """Where the calibrated checkpoint goes: to its own place, or under its name to an --output_dir elsewhere.

    Raises:
        UserError: another file is there, or the weights have no description to write the temperature into.
    """
    source = checkpoint.source
    if model_spec.KEY not in checkpoint.content:
        raise UserError('--calibrate: %s %s' % (
            escape_text(source), 'is an export, which takes no temperature; calibrate its checkpoint, and export that'
            if model_spec.KEY in weights_file.read_metadata(source) else
            'holds no description of its model, where the temperature belongs; fine-tune it, and calibrate the '
            'checkpoint'))
    path = os.path.join(output_dir, os.path.basename(source)) \
        if output_dir and not discovery.is_inside(source, output_dir) else source
    if path != source and os.path.lexists(path):
        raise UserError('--output_dir %s: it holds a %s already; name another folder, or leave it out to calibrate '
                        '%s in place' % tuple(map(escape_text, (output_dir, os.path.basename(path), source))))
    check_writable('--calibrate', path, is_file=True)
    return path


def write(path: str, checkpoint: CheckpointWeights, temperatures: Dict[str, float]) -> None:
    """Write the checkpoint with these fields of its description."""
    spec = dict(checkpoint.content[model_spec.KEY], **temperatures)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    weights_file.save(path, dict(checkpoint.content, **{model_spec.KEY: spec}))
    log_main('Wrote the temperature into %s' % escape_text(path))
