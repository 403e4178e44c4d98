"""The recorded training of tests/golden/trajectory.npz, repeated on any device. It needs no pytest.

benchmarks/check_device.py uses it too.
"""

import json
import os
import sys
from functools import partial

import numpy as np
import torch

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(TEST_DIR))

import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
from beit.training import loss_scaler

CPU = torch.device('cpu')


class Batches(list):
    """A list of (images, targets) with a loader's batch_size."""

    @property
    def batch_size(self):
        return len(self[0][1])


def load_trajectory():
    return np.load(os.path.join(TEST_DIR, 'golden', 'trajectory.npz'))


def trajectory_run(recorded, epochs=None, amp=None, prepare=None, device=CPU, **optimizer_settings):
    """The recorded training in this project's loop: (epoch statistics, microbatch losses, model).

    Args:
        amp (dict): arguments of `loss_scaler.initialize_amp`; None is float32.
        prepare (function): changes how the model computes.
        optimizer_settings: other arguments of `optim_factory.create_optimizer`.
    """
    from timm.loss import LabelSmoothingCrossEntropy
    config, training = json.loads(str(recorded['config'])), json.loads(str(recorded['training']))
    model = modeling_finetune.VisionTransformer(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **config)
    model.load_state_dict({name[len('start.'):]: torch.from_numpy(recorded[name]) for name in recorded.files
                           if name.startswith('start.')})
    model.to(device)
    optimizer = optim_factory.create_optimizer(
        model, lr=training['lr'], weight_decay=training['weight_decay'], layer_decay=training['layer_decay'],
        opt_eps=training['opt_eps'], **optimizer_settings)
    scaler = None
    if amp is not None:
        model, scaler = loss_scaler.initialize_amp(model, optimizer, device, **amp)
    if prepare is not None:
        prepare(model)
    images = (torch.from_numpy(recorded['images']).float() / 255 - 0.5) / 0.5
    loader = Batches(zip(images, torch.from_numpy(recorded['targets'])))
    steps = training['steps_per_epoch']
    lr = optim_factory.cosine_scheduler(training['lr'], training['min_lr'], training['epochs'], steps,
                                        training['warmup_epochs'])
    wd = optim_factory.cosine_scheduler(training['weight_decay'], training['weight_decay_end'], training['epochs'],
                                        steps)
    losses, criterion = [], LabelSmoothingCrossEntropy(training['smoothing'])

    def recording_criterion(output, target):
        loss = criterion(output, target)
        losses.append(loss.item())
        return loss

    stats = [engine.train_one_epoch(model, recording_criterion, loader, optimizer, device, epoch, scaler,
                                    training['clip_grad'], start_steps=epoch * steps, lr_schedule_values=lr,
                                    wd_schedule_values=wd, num_training_steps_per_epoch=steps,
                                    update_freq=training['update_freq'])
             for epoch in range(epochs or training['epochs'])]
    return stats, losses, model


def check_trajectory(recorded, stats, losses, model, rtol=1e-5, atol=1e-4):
    """Assert that losses and statistics are within `rtol` of the recorded ones, and the weights within `atol`."""
    np.testing.assert_allclose(losses, recorded['microbatch_losses'], rtol=rtol)
    for mine, theirs in zip(stats, json.loads(str(recorded['epoch_stats']))):
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=rtol, err_msg=name)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor.cpu().numpy(), recorded['final.' + name], rtol=0, atol=atol, err_msg=name)
