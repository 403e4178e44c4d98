"""Optimizers by timm's names: timm's steps, layer decay, exact resuming; the warm-up of averages, the end of mixing."""

import copy

import numpy as np
import pytest
import timm.optim
import torch
from timm.utils import model_ema

import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import run_class_finetuning
import utils
from beit.checkpoint import training_state
from beit.config import OptimizerConfig
from beit.data import transforms
from beit.errors import UserError
from beit.files import weights_file
from beit.training.loss_scaler import LossScaler
from helpers import CPU, RUN
from trajectory import Batches

TIMMS = [name for name in getattr(timm.optim, 'list_optimizers', list)() if name not in optim_factory.OPTIMIZERS]
REFUSED = {name for name in TIMMS if name.startswith(('bnb', 'kron'))}  # they need CUDA; random state outside
RATES = np.array([0.002, 0.01, 0.02, 0.005])


def tiny():
    torch.manual_seed(1)
    return modeling_finetune.VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=8, depth=2, num_heads=2, init_values=0.1, qkv_bias=True,
        use_rel_pos_bias=True, init_scale=1.)


def train(model, optimizer, first, steps):
    torch.manual_seed(2)
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,))) for _ in range(4)]
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), Batches(batches[first:first + steps]), optimizer, CPU, 0,
                           start_steps=first, lr_schedule_values=RATES, seed=3)


def test_the_current_timm_has_new_optimizers():
    if hasattr(timm.optim, 'list_optimizers'):
        assert {'lion', 'muon', 'adan', 'lamb', 'madgrad', 'kron', 'bnblion'} < set(TIMMS)


@pytest.mark.parametrize('name', sorted(optim_factory.OPTIMIZERS) + TIMMS + ['lookahead_adamw', 'lookahead_lion'])
def test_a_checkpoint_in_between_changes_no_bit_and_rates_follow_the_layers(name, tmp_path):
    config = OptimizerConfig(opt=name, lr=0.02, layer_decay=0.5)
    try:
        optim_factory.check_optimizer(name, 0.9)
    except UserError as error:
        text = str(error)
        assert name in REFUSED or 'fused' in name or 'neither this PyTorch' in text or 'unknown value' in text, text
        assert text.startswith('--opt')
        return
    assert name not in REFUSED
    whole, broken = tiny(), tiny()
    optimizer = optim_factory.create_optimizer(whole, config)
    train(whole, optimizer, 0, 4)
    for group in optimizer.param_groups:
        layer = int(group['name'].split('_')[1])
        assert group['lr'] == pytest.approx(RATES[3] * 0.5 ** (3 - layer))
    optimizer = optim_factory.create_optimizer(broken, config)
    train(broken, optimizer, 0, 2)
    path = str(tmp_path / 'checkpoint-0.pth')
    weights_file.save(path, training_state.build_checkpoint(
        {'opt': name}, training_state.RunState(epoch=1), broken, optimizer, LossScaler()))
    resumed = tiny()
    optimizer = optim_factory.create_optimizer(resumed, config)
    training_state.resume_training(path, weights_file.load_weights_file(path), resumed, optimizer, LossScaler())
    train(resumed, optimizer, 2, 2)
    for (parameter, value), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, other), parameter
    assert not torch.equal(whole.head.weight, tiny().head.weight)


@pytest.mark.needs('current', bool(TIMMS), 'this timm has no further optimizers')
@pytest.mark.parametrize('name', [name for name in TIMMS if name not in REFUSED] or [''])
def test_steps_are_those_of_timms_factory(name):
    """With settings as timm's train.py passes them, on groups without layer decay."""
    ours, theirs = tiny(), tiny()
    groups = optim_factory.get_parameter_groups(theirs, 0.05, 1., optim_factory.weight_decay_skip_list(theirs))
    train(ours, optim_factory.create_optimizer(ours, opt=name, lr=0.02, weight_decay=0.05), 0, 3)
    train(theirs, timm.optim.create_optimizer_v2(groups, opt=name, lr=0.02, weight_decay=0.05, momentum=0.9), 0, 3)
    for (parameter, value), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert torch.allclose(value, other, atol=1e-6), parameter  # fused kernels round differently


@pytest.mark.parametrize('theirs, opt, says', [
    ('adamw', 'lion', '--opt lion: a.pth was trained with --opt adamw'), ('lion', 'adamw', '--opt adamw: a.pth'),
    ('adamw', 'npufusedadamw', ''), ('lookahead_fusedsgd', 'momentum', ''), ('adam', 'adamw', ''), (None, 'lion', ''),
    (['x'], 'adamw', "['x']")])
def test_moments_of_another_optimizer_are_refused_by_name(theirs, opt, says):
    if not says:
        optim_factory.check_same_state('a.pth', theirs, opt)
        return
    with pytest.raises(UserError) as caught:
        optim_factory.check_same_state('a.pth', theirs, opt)
    assert says in str(caught.value) and 'give its --opt' in str(caught.value)


@pytest.mark.needs('current', bool(TIMMS), 'this timm has no further optimizers')
def test_an_adamw_run_is_not_continued_by_lion(image_folder, tmp_path, capsys):
    base = RUN + ['--data_path=' + image_folder(), '--output_dir=' + str(tmp_path / 'out'), '--epochs=2']
    assert run_class_finetuning.run(base + ['--maxstep=4']) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(base + ['--auto_resume', '--opt=lion']) == 2
    error, = capsys.readouterr().err.splitlines()
    assert '--opt lion: ' in error and 'trained with --opt adamw' in error
    assert run_class_finetuning.run(base + ['--opt=kron']) == 2
    assert '--opt kron: it has more state than moments' in capsys.readouterr().err


@pytest.mark.needs('current', hasattr(model_ema, 'ModelEmaV3'), 'this timm has no ModelEmaV3')
def test_the_warm_up_of_the_average_is_timms():
    model = tiny()
    ours = utils.ModelEma(model, 0.9, warmup=True)
    theirs = model_ema.ModelEmaV3(copy.deepcopy(model), 0.9, use_warmup=True)
    for step in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ours.update(model.state_dict(), step=step)
        theirs.update(model, step=step + 1)  # timm counts from 1
        for name, value in theirs.module.named_parameters():
            assert torch.allclose(value, dict(ours.ema.named_parameters())[name], atol=1e-5), (step, name)
        if not step:
            assert torch.equal(ours.ema.head.weight, model.head.weight)


def test_mixing_ends_at_its_epoch(image_folder, tmp_path, monkeypatch, capsys):
    seen, mix = [], transforms.DeviceMixup.__call__

    def recorded(self, images, targets):
        before = images.clone()
        mixed, soft = mix(self, images, targets)
        plain = torch.full((len(targets), 2), 0.05)
        plain[torch.arange(len(targets)), targets] = 0.95  # --smoothing 0.1, two classes
        seen.append((torch.equal(before, mixed), torch.allclose(soft, plain)))
        return mixed, soft

    monkeypatch.setattr(transforms.DeviceMixup, '__call__', recorded)
    flags = RUN + ['--data_path=' + image_folder(), '--mixup=0.8', '--epochs=3', '--output_dir',
                   str(tmp_path / 'out')]
    assert run_class_finetuning.run(flags + ['--mixup_off_epoch=1', '--maxstep=8']) == 0
    assert seen == [(False, False)] * 4 + [(True, True)] * 4
    capsys.readouterr()
    assert run_class_finetuning.run(flags + ['--mixup_off_epoch=2', '--auto_resume']) == 0
    assert '--mixup_off_epoch is 2 (was 1)' in capsys.readouterr().out


@pytest.mark.parametrize('flags, says', [
    (['--mixup_off_epoch=2'], '--mixup_off_epoch 2: there is no --mixup or --cutmix'),
    (['--model_ema_warmup'], '--model_ema_warmup needs --model_ema'), (['--opt=liom'], "--opt: unknown value 'liom'")])
def test_mistakes(image_folder, capsys, flags, says):
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder()] + flags) == 2
    error, = capsys.readouterr().err.splitlines()
    assert says in error
