"""Optimizer, schedules and loop against recorded figures of the reference and against slow arithmetic."""

import argparse
import json
import math
import os
import re

import numpy as np
import pytest
import torch

import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import run_class_finetuning
import utils
from beit.config import MixupConfig
from beit.data import transforms
from beit.devices import kernels
from beit.distributed import preemption
from beit.errors import UserError
from beit.outputs import curves
from beit.training import fused_attention, loss_scaler, metrics
from flags import config_from
from helpers import CPU, RUN, Batches, cannot_run, check_trajectory, lines_of, scalars, summaries, toy, trajectory_run

pytestmark = [pytest.mark.fast, pytest.mark.computes]


# ---- parameter groups and schedules

def test_parameter_groups_are_the_references(golden):
    recorded = golden('param_groups.json')
    model = modeling_finetune.beit_base_patch16_224(num_classes=7, use_abs_pos_emb=False, use_rel_pos_bias=True,
                                                    init_values=0.1)
    groups = optim_factory.get_parameter_groups(model, recorded['weight_decay'], recorded['layer_decay'],
                                                model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: [group['lr_scale'], group['weight_decay']]
             for group in groups for parameter in group['params']}
    assert found == recorded['params']
    assert len({(group['lr_scale'], group['weight_decay'] > 0) for group in groups}) == len(groups)


def test_shared_table_and_positions_have_the_right_layers():
    assert [optim_factory.layer_id(name, 12) for name in (
        'cls_token', 'pos_embed', 'mask_token', 'patch_embed.proj.bias', 'blocks.0.gamma_1', 'blocks.11.norm1.bias',
        'rel_pos_bias.relative_position_bias_table', 'fc_norm.weight', 'head.bias')] == [0, 0, 0, 0, 1, 12, 13, 13, 13]


def test_zero_weight_decay_keeps_layer_decay():
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3)
    optimizer = optim_factory.create_optimizer(model, opt='adamw', lr=1., weight_decay=0., layer_decay=0.5)
    scales = sorted({group['lr_scale'] for group in optimizer.param_groups})
    assert scales == pytest.approx([0.5 ** power for power in (5, 4, 3, 2, 1, 0)])
    engine.set_schedules(optimizer, 0, [0.1], [0.2])
    assert {(group['decays'], group['weight_decay']) for group in optimizer.param_groups} == {(True, 0.2), (False, 0.)}


def test_no_weight_decay_on_bias_tables_by_flag():
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3, use_rel_pos_bias=True)
    table = model.blocks[0].attn.relative_position_bias_table
    for flag, expected in ((False, 0.05), (True, 0.)):
        skip = optim_factory.weight_decay_skip_list(model, flag)
        groups = optim_factory.get_parameter_groups(model, 0.05, 0.9, skip)
        assert [g['weight_decay'] for g in groups if any(p is table for p in g['params'])] == [expected]


def test_schedules_are_the_references(golden):
    for case in golden('cosine_schedules.json'):
        np.testing.assert_allclose(optim_factory.cosine_scheduler(**case['args']), case['values'], rtol=0, atol=1e-12)


def test_warmup_in_steps_and_too_long():
    schedule = optim_factory.cosine_scheduler(1., 0., 2, 10, warmup_epochs=0, warmup_steps=4)
    assert schedule[:4] == pytest.approx([0., 1 / 3, 2 / 3, 1.])
    assert schedule[4] == 1. and len(schedule) == 20
    assert optim_factory.cosine_scheduler(1., 0., 2, 10, warmup_epochs=2)[-1] == 1.  # only warm-up
    with pytest.raises(ValueError, match='longer than the run'):
        optim_factory.cosine_scheduler(1., 0., 2, 10, warmup_epochs=3)


@pytest.mark.parametrize('name', sorted(optim_factory.OPTIMIZERS) + ['lookahead_adamw'])
def test_every_optimizer_makes_a_step(name):
    try:
        optim_factory.optimizer_class(name)
    except UserError as error:
        assert 'fused' in name or 'neither this PyTorch' in str(error)
        return
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3)
    optimizer = optim_factory.create_optimizer(model, opt=name, lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    before = model.head.weight.detach().clone()
    loader = Batches([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1]))] * 2)
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 0)
    assert torch.isfinite(model.head.weight).all() and not torch.equal(before, model.head.weight)


def test_all_settings_reach_the_optimizer():
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3)
    optimizer = optim_factory.create_optimizer(model, lr=3e-4, weight_decay=0.07, layer_decay=0.9, opt_eps=1e-6,
                                               opt_betas=[0.8, 0.95])
    assert {(group['eps'], group['betas']) for group in optimizer.param_groups} == {(1e-6, (0.8, 0.95))}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0., 0.07}
    with pytest.raises(UserError, match='--opt_betas 0.9'):
        optim_factory.create_optimizer(model, opt='sgd', opt_betas=[0.9])


# ---- the loop

def fused(model):
    assert fused_attention.choose_attention(model, CPU, 'fused').startswith('fused, ')


def skipping(model):
    """The recording drops nothing, so this rate is too small to drop anything."""
    for block in model.blocks:
        block.skips_dropped, block.drop_path.drop_prob = True, 1e-9


MODES = {'plain': None, 'fused attention': fused, 'skip_dropped': skipping,
         'grad_checkpointing': lambda model: model.set_grad_checkpointing()}


@pytest.mark.parametrize('mode', sorted(MODES))
def test_trajectory_is_the_references(golden, mode):
    if mode == 'fused attention' and not kernels.fused_attentions(CPU):
        cannot_run('current', 'this PyTorch has no fused attention')
    recorded = golden('trajectory.npz')
    check_trajectory(recorded, *trajectory_run(recorded, prepare=MODES[mode]))


def test_clipping_by_slow_arithmetic():
    model, loader = toy()
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    criterion(model(loader[0][0]), loader[0][1]).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1., weight_decay=0.)
    stats = engine.train_one_epoch(model, criterion, Batches(loader[:1]), optimizer, CPU, 0, max_norm=norm / 4)
    assert stats['grad_norm'] == pytest.approx(norm, rel=1e-5)  # logged before clipping
    for parameter, start, gradient in zip(model.parameters(), before, gradients):
        assert torch.allclose(start - parameter, gradient / 4, rtol=1e-3, atol=1e-7)


def test_accumulation_equals_a_large_batch():
    finals = []
    for update_freq in (1, 4):
        model, loader = toy()
        if update_freq == 1:
            loader = Batches([tuple(torch.cat(part) for part in zip(*loader))])
        optimizer = optim_factory.create_optimizer(model, lr=1e-3)
        engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 0, update_freq=update_freq)
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        assert torch.allclose(value, finals[1][name], atol=2e-4), name


def test_average_of_the_weights_by_slow_arithmetic():
    model, loader = toy(use_rel_pos_bias=True)
    ema = utils.ModelEma(model, decay=0.9)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    optimizer = optim_factory.create_optimizer(model, lr=1e-3)
    for batch in loader:
        engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), Batches([batch]), optimizer, CPU, 0, model_ema=ema)
        for name, value in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in ema.ema.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name
        else:
            assert torch.equal(value, model.state_dict()[name]), name  # timm's average would change it


def test_a_loss_that_is_not_finite_stops_the_run():
    model, loader = toy()
    loader[2][0][0, 0, 0, 0] = float('nan')
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    with pytest.raises(UserError, match='the loss is nan at update step 2'):
        engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 0)
    assert all(torch.equal(parameter, start) for parameter, start in zip(model.parameters(), weights))


def test_gradients_that_are_not_finite_are_skipped_and_counted(capsys):
    model, loader = toy()
    ema = utils.ModelEma(model, decay=0.)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def poison(gradient):
        return gradient * float('inf')

    handle = model.head.weight.register_hook(poison)
    optimizer = optim_factory.create_optimizer(model, lr=1e-2)
    scaler = loss_scaler.LossScaler(overflows=True)
    stats = engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, optimizer, CPU, 0, scaler, model_ema=ema)
    assert stats['skipped_steps'] == scaler.skipped == 4 and 'grad_norm' not in stats
    assert 'Update step 3 skipped' in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match='20 updates in a row'):
        engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), Batches(loader * 6), optimizer, CPU, 0, scaler)
    handle.remove()


def test_log_line_has_the_documented_form(capsys):
    model, loader = toy()
    loader = Batches(loader * 6)
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, torch.optim.AdamW(model.parameters()), CPU, 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Epoch:')]
    assert [line.split('eta')[0] for line in lines] == [
        'Epoch: [3]  [ 0/24]  ', 'Epoch: [3]  [10/24]  ', 'Epoch: [3]  [20/24]  ', 'Epoch: [3]  [23/24]  ']
    number = r'[\d.]+'
    meter = number + r' \(' + number + r'\)'
    assert re.fullmatch(
        r'Epoch: \[3\]  \[10/24\]  eta: \d:\d\d:\d\d  lr: %s  min_lr: %s  loss: %s  class_acc: %s  weight_decay: %s  '
        r'grad_norm: %s  time: %s  data: %s  max mem: \d+  fps: \d+'
        % (number, number, meter, meter, meter, meter, number, number), lines[1]), lines[1]


def test_a_small_learning_rate_has_its_digits_in_the_log_line(capsys):
    model, loader = toy()
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, torch.optim.SGD(model.parameters(), lr=1), CPU,
                           0, lr_schedule_values=[1.23456e-8, 0, 0, 2e-5])
    rates = re.findall(r'  lr: (\S+)  min_lr: (\S+)  ', capsys.readouterr().out)
    assert [tuple(map(float, pair)) for pair in rates] == [(1.235e-8, 1.235e-8), (2e-5, 2e-5)]


def test_a_limited_run_says_that_it_evaluates(data, capsys):
    flags = RUN + ['--data_path', data, '--epochs=2', '--maxstep=1']
    assert run_class_finetuning.run(flags) == 0
    out = capsys.readouterr().out
    assert re.search(r'^Evaluating \d+ images after --maxstep 1; --disable_eval_during_finetuning ', out, re.M)
    assert run_class_finetuning.run(flags + ['--disable_eval_during_finetuning']) == 0
    assert 'Evaluating' not in capsys.readouterr().out


@pytest.mark.parametrize('flags, hint', [
    (['--eval', '--resume=x.pth'], 'nothing was saved'), (['--check_data'], 'nothing was saved'),
    ([], 'with --output_dir, the same command with --auto_resume continues from the last checkpoint, if '
     'there is one')])
def test_a_signal_promises_a_resume_in_training_only(capsys, monkeypatch, flags, hint):
    def interrupted(args, signals):
        raise preemption.Stopped(2)
    monkeypatch.setattr(run_class_finetuning, 'main', interrupted)
    assert run_class_finetuning.run(flags) == 130
    assert capsys.readouterr().err == 'run_class_finetuning.py: error: interrupted by SIGINT; %s\n' % hint


def test_an_evaluation_with_an_average_resizes_with_one_line_and_names_differences_of_the_model(data, tmp_path, capsys):
    flags = RUN[:-2] + ['--rel_pos_bias', '--data_path', data]
    assert run_class_finetuning.run(flags + ['--epochs=1', '--maxstep=1', '--model_ema', '--output_dir',
                                             str(tmp_path)]) == 0
    capsys.readouterr()
    base = ['--data_path', data, '--eval', '--resume', str(tmp_path), '--num_workers=0', '--device=cpu']
    assert run_class_finetuning.run(base + ['--input_size=64', '--test_flip']) == 0
    out = capsys.readouterr().out
    assert out.count('blocks.0.attn.relative_position_bias_table: resized from 7x7 to 15x15') == 1
    assert 'averaged network' in out and 'test_flip' not in ''.join(re.findall('^Flags that.*', out, re.M))
    assert run_class_finetuning.run(base + ['--opt_level=O0']) == 0
    assert re.search(r'^Flags that differ from \S+: --opt_level O0 \(the checkpoint: O2\)$',
                     capsys.readouterr().out, re.M)


def test_evaluation_by_a_slow_loop(capsys):
    model, _ = toy(classes=7)
    images, targets = torch.randn(23, 3, 32, 32), torch.randint(0, 7, (23,))
    loader = Batches([(images[:10], targets[:10]), (images[10:20], targets[10:20]), (images[20:], targets[20:])])
    stats = engine.evaluate(loader, model, CPU)
    model.eval()
    top1 = top5 = total = 0
    for image, target in zip(images, targets):
        logits = model(image[None])[0].detach().double()
        order = sorted(range(7), key=lambda index: -float(logits[index]))
        top1 += order[0] == target
        top5 += int(target) in order[:5]
        total += float(torch.logsumexp(logits, 0) - logits[target])
    assert stats['acc1'] == pytest.approx(100. * float(top1) / 23)
    assert stats['acc5'] == pytest.approx(100. * top5 / 23)
    assert stats['loss'] == pytest.approx(total / 23, rel=1e-5)  # per image, not per batch
    last, = re.findall(r'Test:  \[2/3\].* loss: \S+ \((\S+)\)  acc1: \S+ \((\S+)\)', capsys.readouterr().out)
    assert (float(last[0]), float(last[1])) == pytest.approx((total / 23, 100. * float(top1) / 23), abs=1e-4)


def test_evaluation_with_fewer_than_five_classes():
    model, loader = toy(classes=2)
    assert engine.evaluate(loader, model, CPU)['acc5'] == 100.


def test_the_references_call_trains():
    """Positional as in the reference's run_class_finetuning.py: scaler, clipping, EMA and mixup; then by name."""
    model, loader = toy()
    average = utils.ModelEma(model, 0.5)
    before = average.ema.head.weight.clone()
    stats = engine.train_one_epoch(
        model, torch.nn.CrossEntropyLoss(), loader, torch.optim.SGD(model.parameters(), lr=1e-3), CPU, 0, None, 1.,
        average, None, log_writer=None, start_steps=0, lr_schedule_values=[0.01] * len(loader), wd_schedule_values=None,
        num_training_steps_per_epoch=len(loader), update_freq=1)
    assert stats['lr'] == 0.01 and 'class_acc' in stats and not torch.equal(before, average.ema.head.weight)


class Confidence(metrics.Metric):
    """The mean of the highest logit: the complete code of a new metric."""

    specs = (metrics.MetricSpec('confidence', 'confidence %.3f', 'Confidence'),)

    def __init__(self):
        self.highest = []

    def update(self, batch, output):
        self.highest += output.max(dim=1).values.tolist()

    def compute(self, sharded, device):
        return {'confidence': sum(self.highest) / len(self.highest)}


def test_every_metric_of_the_module_is_registered():
    classes = {each for each in vars(metrics).values() if isinstance(each, type) and issubclass(each, metrics.Metric)}
    assert classes - {metrics.Metric, metrics.OfLayers} == set(metrics.METRICS)  # OfLayers has others for each head


def test_a_new_metric_is_everywhere(data, tmp_path, monkeypatch, capsys):
    """In the line, log.txt, TensorBoard, the curves, the results file, summary.json and both reports."""
    monkeypatch.setattr(metrics, 'METRICS', metrics.METRICS + (Confidence,))
    output, results, board = str(tmp_path / 'out'), str(tmp_path / 'results.json'), str(tmp_path / 'tb')
    base = RUN + ['--data_path', data, '--output_dir', output, '--log_dir', board, '--report']
    assert run_class_finetuning.run(base + ['--epochs=1']) == 0
    value = lines_of(output)[0]['test_confidence']
    assert re.search(r'^\* Acc@1 .* loss \S+ confidence %.3f$' % value, capsys.readouterr().out, re.M)
    assert scalars(board)['perf/test_confidence'] == pytest.approx([value])
    curve, = curves.panels(lines_of(output))['Confidence']
    assert (curve.epochs, curve.values) == ((1,), (value,))
    assert run_class_finetuning.run(base + ['--eval', '--resume', output, '--results_file', results]) == 0
    for name in (results, os.path.join(output, 'eval-summary.json')):
        with open(name, encoding='utf-8') as file:
            content = json.load(file)
        assert (content[0] if name == results else content)['confidence'] == pytest.approx(value)
    assert scalars(os.path.join(board, 'eval'))['perf/test_confidence'] == pytest.approx([value])
    for name, title in (('report.html', 'Confidence, best epoch'), ('eval-report.html', 'Confidence')):
        with open(os.path.join(output, name), encoding='utf-8') as file:
            assert '<dt>%s</dt><dd>%.4f</dd>' % (title, value) in file.read()


def test_figures_have_one_name_each():
    for name in ('name', 'summary', 'title'):
        found = [getattr(spec, name) for spec in metrics.metric_specs() if getattr(spec, name)]
        assert len(found) == len(set(found))
    assert all(spec.summary and spec.title for spec in metrics.metric_specs() if spec.is_primary)


def test_throughput_leaves_the_first_steps_out():
    throughput = utils.Throughput()
    for seconds in [10.] * 5 + [0.5] * 10:
        throughput.update(64, seconds)
    assert throughput.images_per_second == pytest.approx(128.)
    assert throughput.step_milliseconds == pytest.approx(500.)


# ---- whole runs

def test_maxstep_is_exact(image_folder, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', counted(torch.optim.AdamW.step, steps))
    for maxstep, update_freq in ((3, 1), (5, 2), (4, 1)):  # 32 images: 4 or 2 updates per epoch
        steps.clear()
        assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(train=16, name='d%d' % maxstep),
                                               '--epochs=9', '--maxstep=%d' % maxstep,
                                               '--update_freq=%d' % update_freq]) == 0
        assert len(steps) == maxstep


def counted(function, calls):
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)
    return wrapper


def test_a_run_with_every_training_feature(image_folder, tmp_path, capsys):
    data = image_folder(train=24, classes=('a', 'b', 'c'))
    output = str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + [
        '--data_path=' + data, '--epochs=3', '--output_dir=' + output,
        '--log_dir=' + str(tmp_path / 'tb'), '--model_ema', '--model_ema_decay=0.5', '--mixup=0.8', '--cutmix=1.0',
        '--clip_grad=1', '--update_freq=2', '--save_ckpt_freq=2', '--weight_decay_end=0.1', '--dist_eval',
        '--drop_path=0.2', '--drop=0.1', '--attn_drop_rate=0.1', '--warmup_steps=2', '--warmup_lr=1e-5']) == 0
    out = capsys.readouterr().out
    assert 'Accuracy of the network on the 18 test images: ' in out
    assert 'Accuracy of the averaged network (EMA) on the 18 test images: ' in out
    records = lines_of(output)
    assert [record['epoch'] for record in records] == [0, 1, 2]
    assert {'train_loss', 'train_lr', 'train_min_lr', 'train_weight_decay', 'train_grad_norm', 'train_loss_scale',
            'test_acc1', 'test_acc5', 'test_loss', 'test_ema_acc1', 'n_parameters'} <= set(records[0])
    assert 'train_class_acc' not in records[0]  # mixed labels have none
    assert sorted(name for name in os.listdir(output) if name != 'log.txt') == [
        'args.yaml', 'checkpoint-1.pth', 'checkpoint-2.pth', 'checkpoint-best-ema.pth', 'checkpoint-best.pth',
        'summary.json']
    tags = scalars(str(tmp_path / 'tb'))
    assert {'loss/loss', 'opt/loss_scale', 'opt/lr', 'opt/min_lr', 'opt/weight_decay', 'opt/grad_norm',
            'perf/test_acc1', 'perf/test_acc5', 'perf/test_loss'} <= set(tags)
    assert tags['opt/lr'][0] == pytest.approx(1e-5) and len(tags['opt/lr']) == 12
    assert tags['perf/test_acc1'] == pytest.approx([record['test_acc1'] for record in records])
    assert run_class_finetuning.run(RUN + [
        '--data_path=' + data, '--eval', '--model_ema', '--dist_eval',
        '--resume=' + os.path.join(output, 'checkpoint-1.pth'), '--log_dir=' + str(tmp_path / 'tb')]) == 0
    found = [(step, value.tag) for step, value in summaries(str(tmp_path / 'tb' / 'eval'))]
    assert {(1, 'perf/test_acc1'), (1, 'perf/test_loss'), (1, 'perf/ema_acc1'), (1, 'images/confusion')} <= set(found)
    tags = scalars(str(tmp_path / 'tb' / 'eval'))
    assert tags['perf/test_acc1'] == pytest.approx([records[1]['test_acc1']])
    assert tags['perf/ema_acc1'] == pytest.approx([records[1]['test_ema_acc1']])


@pytest.mark.parametrize('smoothing, mixup, expected', (
    ('0', '0', 'CrossEntropyLoss'), ('0.1', '0', 'LabelSmoothingCrossEntropy'),
    ('0.1', '0.5', 'SoftTargetCrossEntropy')))
def test_choice_of_the_loss(parse, smoothing, mixup, expected):
    args = parse('--smoothing', smoothing, '--mixup', mixup)
    criterion = run_class_finetuning.build_criterion(args.loss, args.smoothing, transforms.build_mixup(
        config_from(args, MixupConfig), 3))
    assert type(criterion).__name__ == expected


def test_profile_writes_a_chrome_trace(image_folder, tmp_path):
    output = str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--epochs=1', '--prof',
                                           '--output_dir=' + output]) == 0
    with open(os.path.join(output, 'prof', 'trace_rank0.json'), encoding='utf-8') as file:
        trace = json.load(file)
    events = trace['traceEvents'] if isinstance(trace, dict) else trace
    assert any('addmm' in event.get('name', '') for event in events)


def test_no_training_set_is_needed_for_evaluation(image_folder, tmp_path):
    import shutil
    data, output = image_folder(), str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--data_path=' + data, '--epochs=1', '--output_dir=' + output]) == 0
    shutil.rmtree(os.path.join(data, 'train'))
    assert run_class_finetuning.run(RUN + ['--data_path=' + data, '--eval', '--resume=' + output]) == 0


DEFAULTS = dict(
    batch_size=64, epochs=30, update_freq=1, save_ckpt_freq=5, seed=0,
    num_workers=min(10, len(os.sched_getaffinity(0))), pin_mem=True, start_epoch=0,
    device='auto', maxstep=0, prof=False, cann_prof=False, model='beit_base_patch16_224', rel_pos_bias=True,
    abs_pos_emb=False, layer_scale_init_value=0.1, input_size=224, drop=0., attn_drop_rate=0., drop_path=0.1,
    model_ema=False, model_ema_decay=0.9999, model_ema_force_cpu=False, disable_eval_during_finetuning=False,
    opt='adamw', opt_eps=1e-8, opt_betas=None, clip_grad=None, momentum=0.9, weight_decay=0.05, weight_decay_end=None,
    lr=5e-4, layer_decay=0.9, warmup_lr=0., min_lr=1e-6, warmup_epochs=5, warmup_steps=-1, color_jitter=0.4,
    aa='rand-m9-mstd0.5-inc1', smoothing=0.1, train_interpolation='bicubic', crop_pct=None, reprob=0.25,
    remode='pixel', recount=1, resplit=False, mixup=0., cutmix=0., cutmix_minmax=None, mixup_prob=1.,
    mixup_switch_prob=0.5, mixup_mode='batch', finetune='', model_key='model|module', model_prefix='',
    init_scale=0.001, use_mean_pooling=True, disable_weight_decay_on_rel_pos_bias=False, data_path='',
    eval_data_path=None, nb_classes=0, imagenet_default_mean_and_std=False, data_set='IMNET', output_dir='',
    log_dir=None, resume='', auto_resume=False, save_ckpt=True, eval=False, dist_eval=False, amp=False,
    opt_level='O2', amp_dtype=None, loss_scale=None, world_size=1, local_rank=-1, dist_on_itp=False,
    dist_url='env://', hflip=0.5, jit_compile='auto', attention='auto', save_ckpt_steps=0, save_ckpt_minutes=0.,
    keep_checkpoints=0, deterministic=False, on_nonfinite='stop', bad_images='error', max_bad_images=0.001,
    max_pixels=0,
    check_data=False, dist_timeout=600., data_backend='exact', eval_data_backend='exact',
    skip_dropped='auto', grad_checkpointing=False, compile=False, curves=True, report=False,
    val_split=0., max_train_samples=0, val_interval=1, early_stop=0,
    best_by=None, topk=[1, 5], calibrate=False,
    class_names='', train_csv='', val_csv='',
    loss='auto', class_weights='', test_flip=False, results_file='', real_labels='',
    freeze_backbone=False, unfreeze_epoch=0, recipe='', blr=0., enable_deepspeed=False, robust_test=None, qkv_bias=True,
    image_folder_class_index_file='', exif='ignore', background='', eval_fit='crop',
    class_depth=1, compile_backend='inductor', mixup_off_epoch=0, model_ema_warmup=False, in_chans=3)


def test_flags_and_defaults_are_the_references(parse):
    assert vars(parse()) == DEFAULTS


def test_spellings_of_flags(parse):
    args = parse('--opt-level=O1', '--drop_decay', '0.2', '--disable_rel_pos_bias', '--use_cls', '--no_pin_mem',
                 '--no_auto_resume', '--no_save_ckpt', '--loss_scale=dynamic', '--batch-size=8')
    assert args == argparse.Namespace(**dict(
        DEFAULTS, opt_level='O1', drop_path=0.2, rel_pos_bias=False, use_mean_pooling=False, pin_mem=False,
        save_ckpt=False, loss_scale='dynamic', batch_size=8))
    assert parse('--no_save_ckpt', '--save_ckpt').save_ckpt
