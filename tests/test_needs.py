"""Common needs: a validation split, fewer images, fewer evaluations, stopping early, frozen backbones, weights."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import datasets
import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import run_class_finetuning
from beit.data import subsets
from beit.data.sample_list import SampleList
from beit.devices import half_precision
from beit.files import weights_file
from helpers import RUN, Batches, cannot_run, launch, lines_of, photo

pytestmark = pytest.mark.fast


@pytest.fixture
def no_val(tmp_path):
    """A path with only train/: 20 cats, 9 dogs, 2 emus and one fox."""
    for label, (name, count) in enumerate((('cat', 20), ('dog', 9), ('emu', 2), ('fox', 1))):
        folder = tmp_path / 'no val' / 'train' / name
        folder.mkdir(parents=True)
        for index in range(count):
            photo(100 * label + index, 32, 32).save(str(folder / ('%02d.png' % index)))
    return str(tmp_path / 'no val')


def paths(dataset):
    return [path for path, _ in dataset.samples]


# ---- --val_split and --max_train_samples

def test_the_split_has_as_many_of_each_class_as_scikit_learns():
    from sklearn.model_selection import train_test_split
    rng = np.random.RandomState(0)
    for trial in range(20):
        targets = np.repeat(np.arange(6), rng.randint(8, 60, 6))
        train, val = subsets.split(samples_of(targets), 0.25, trial)
        expected = train_test_split(targets, test_size=len(val), random_state=trial, stratify=targets)[1]
        assert len(val) == round(0.25 * len(targets))
        assert np.abs(np.bincount(targets[val], minlength=6) - np.bincount(expected, minlength=6)).max() <= 1
        assert sorted(train.tolist() + val.tolist()) == list(range(len(targets)))


def samples_of(targets):
    """Samples with their numbers as names."""
    return SampleList.from_names('', [b'%d' % number for number in range(len(targets))], targets)


def test_every_class_keeps_an_image_to_train_on(no_val, parse):
    for seed in range(5):
        args = parse('--data_path', no_val, '--val_split=0.6', '--seed=%d' % seed, *RUN)
        train, val, classes = datasets.build_datasets(args)
        assert classes == ['cat', 'dog', 'emu', 'fox']
        assert set(train.samples.targets) == {0, 1, 2, 3} and len(val) == 19 and len(train) == 13
        assert not set(paths(train)) & set(paths(val))


def test_the_split_depends_only_on_the_seed(no_val, parse):
    def part(*flags):
        args = parse('--data_path', no_val, '--val_split=0.25', *(RUN + list(flags)))
        return [None if part is None else paths(part) for part in datasets.build_datasets(args)[:2]]

    train, val = part()
    assert part('--epochs=3', '--num_workers=2', '--bad_images=skip') == [train, val]
    assert part('--eval') == [None, val]
    assert part('--data_set=image_folder', '--data_path', os.path.join(no_val, 'train')) == [train, val]
    assert part('--disable_eval_during_finetuning') == [train, None]
    assert part('--seed=1')[1] != val and len(part('--seed=1')[1]) == len(val) == 8


def test_the_held_out_part_gets_the_evaluation_transform(no_val, parse):
    args = parse('--data_path', no_val, '--val_split=0.25', '--hflip=1', *RUN)
    _, val, _ = datasets.build_datasets(args)
    for index, (image, label) in enumerate(val):
        from PIL import Image
        path, expected = val.samples[index]
        assert np.array_equal(image.numpy(), np.asarray(Image.open(path))) and label == expected
        assert os.path.basename(os.path.dirname(path)) == val.classes[label]


def test_a_split_is_refused_beside_validation_images(refused, image_folder, no_val):
    both = image_folder()
    refused(RUN + ['--data_path', both, '--val_split=0.1'], '--val_split 0.1', 'val with validation images')
    refused(RUN + ['--data_path', no_val, '--val_split=0.1', '--eval_data_path', os.path.join(both, 'val')],
            '--val_split 0.1', '--eval_data_path')
    refused(RUN + ['--data_path', no_val], 'val; it must hold', '--val_split 0.1')
    shutil.rmtree(os.path.join(no_val, 'train', 'cat'))
    shutil.rmtree(os.path.join(no_val, 'train', 'dog'))
    os.remove(os.path.join(no_val, 'train', 'emu', '01.png'))
    refused(RUN + ['--data_path', no_val, '--val_split=0.1', '--epochs=1', '--batch_size=1'], 'one image only')


def test_a_split_run_resumes_and_is_evaluated(no_val, tmp_path, capsys, refused):
    output = str(tmp_path / 'out')
    split = RUN + ['--data_path', no_val, '--val_split=0.25', '--bad_images=skip', '--max_bad_images=0.5']
    with open(os.path.join(no_val, 'train', 'cat', '00.png'), 'wb') as file:
        file.write(b'no image')
    assert run_class_finetuning.run(split + ['--epochs=2', '--output_dir', output]) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(split + ['--eval', '--resume', output]) == 0
    refused(split + ['--eval', '--resume', output, '--seed=4'], '--seed 4', 'trained with --seed 0')
    for change in ('--val_split=0.5', '--seed=4'):
        refused(split + ['--epochs=3', '--resume', output, change], change.replace('=', ' '), 'was trained with')
    assert run_class_finetuning.run(split + ['--epochs=2', '--resume', output]) == 0
    assert 'exactly as if it had not been stopped' in capsys.readouterr().out


def test_fewer_samples_are_the_same_each_time_and_of_every_class(no_val, parse):
    def part(*flags):
        return paths(datasets.build_datasets(parse(
            '--data_path', no_val, '--disable_eval_during_finetuning', *(RUN + list(flags))))[0])

    whole, some = part(), part('--max_train_samples=8')
    assert len(some) == 8 and some == [path for path in whole if path in some] == part('--max_train_samples=8')
    assert len({os.path.dirname(path) for path in some}) == 4
    assert part('--max_train_samples=99') == whole
    assert part('--max_train_samples=8', '--seed=2') != some
    assert len(part('--max_train_samples=3')) == 3


def test_no_early_stop_without_evaluations(no_val, refused):
    refused(RUN + ['--data_path', no_val, '--early_stop=3', '--disable_eval_during_finetuning'], '--early_stop 3',
            'leave one of them out')


# ---- --val_interval and --early_stop

def evaluated(output):
    return [line['epoch'] for line in lines_of(output) if 'test_acc1' in line]


def test_evaluations_come_at_the_interval_and_at_the_end(data, tmp_path):
    output = str(tmp_path / 'out')
    base = RUN + ['--data_path', data, '--epochs=5', '--output_dir', output]
    assert run_class_finetuning.run(base + ['--val_interval=2']) == 0
    assert evaluated(output) == [1, 3, 4] and len(lines_of(output)) == 5
    output = str(tmp_path / 'short')
    assert run_class_finetuning.run(base + ['--val_interval=9', '--maxstep=6', '--output_dir', output]) == 0
    assert evaluated(output) == [1]


def test_a_run_stops_early_and_a_resume_remembers(data, tmp_path, monkeypatch, capsys):
    accuracies = iter([50., 60., 60., 55., 60., 70., 1., 1., 1.])
    evaluate = run_class_finetuning.engine.evaluate

    def pretend(*args, **options):
        return dict(evaluate(*args, **options), acc1=next(accuracies))

    monkeypatch.setattr(run_class_finetuning.engine, 'evaluate', pretend)
    output = str(tmp_path / 'out')
    base = RUN + ['--data_path', data, '--early_stop=3', '--output_dir', output, '--save_ckpt_freq=1', '--lr=1e-6']
    assert run_class_finetuning.run(base + ['--epochs=9', '--maxstep=16']) == 0  # 4 epochs: 50, 60, 60, 55
    assert 'Stopped early' not in capsys.readouterr().out
    assert weights_file.load_weights_file(os.path.join(output, 'checkpoint-3.pth'))['progress']['stale'] == 2
    assert run_class_finetuning.run(base + ['--epochs=9', '--auto_resume']) == 0  # 60: the third
    out = capsys.readouterr().out
    assert 'exactly as if' in out and 'Stopped early: no new best in 3 evaluations' in out
    assert [line['epoch'] for line in lines_of(output)] == [0, 1, 2, 3, 4]
    with open(os.path.join(output, 'summary.json')) as file:
        assert json.load(file)['epochs'] == 5
    assert os.path.isfile(os.path.join(output, 'checkpoint-4.pth'))
    assert run_class_finetuning.run(base + ['--epochs=9', '--auto_resume']) == 0
    assert len(lines_of(output)) == 5 and next(accuracies) == 70.


# ---- --freeze_backbone

def backbone(content):
    return {name: value for name, value in content['model'].items() if not name.startswith('head.')}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_frozen_backbone_trains_as_a_linear_classifier_on_features():
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=3, drop_path_rate=0.5, drop_rate=0.3, init_scale=1.)
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4,))) for _ in range(5)]
    model.eval()
    with torch.no_grad():
        features = [model.forward_features(images) for images, _ in batches]
    head = torch.nn.Linear(64, 3)
    head.load_state_dict(model.head.state_dict())
    theirs = torch.optim.AdamW([{'params': [head.weight], 'weight_decay': 0.05},
                                {'params': [head.bias], 'weight_decay': 0.}], lr=1e-2)
    for each, (_, targets) in zip(features, batches):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(head(each), targets).backward()
        theirs.step()
    model.freeze_backbone()
    ours = optim_factory.create_optimizer(model, opt='adamw', lr=1e-2, weight_decay=0.05)
    engine.train_one_epoch(model, torch.nn.CrossEntropyLoss(), Batches(batches), ours, torch.device('cpu'), 0)
    assert torch.allclose(model.head.weight, head.weight, atol=1e-6)
    assert torch.allclose(model.head.bias, head.bias, atol=1e-6)


@pytest.mark.parametrize('how', (
    [], ['--opt=sgd', '--use_cls'], ['--opt=lookahead_adamw', '--model_ema', '--model_ema_decay=0.5'],
    ['--amp', '--opt-level=O2'], ['--grad_checkpointing', '--drop=0.1', '--update_freq=2']), ids=' '.join)
def test_frozen_weights_keep_every_bit_and_move_once_unfrozen(data, tmp_path, how):
    if '--amp' in how and half_precision._half_precision_problem(torch.device('cpu'), torch.bfloat16):
        cannot_run('current', 'this PyTorch has no bfloat16 on a CPU')
    output, pretrained = str(tmp_path / 'out'), str(tmp_path / 'weights.pth')
    torch.manual_seed(3)
    initial = modeling_finetune.beit_nano_patch8_32(num_classes=7, use_mean_pooling='--use_cls' not in how)
    torch.save({'model': initial.state_dict()}, pretrained)
    assert run_class_finetuning.run(RUN + how + [
        '--data_path', data, '--finetune', pretrained, '--freeze_backbone', '--unfreeze_epoch=2', '--epochs=3',
        '--lr=1e-2', '--drop_path=0.5', '--save_ckpt_freq=1', '--output_dir', output, '--clip_grad=1']) == 0
    states = [weights_file.load_weights_file(os.path.join(output, 'checkpoint-%d.pth' % epoch)) for epoch in range(3)]
    before = backbone({'model': initial.state_dict()})
    assert same(before, backbone(states[0])) and same(before, backbone(states[1]))
    assert not torch.equal(states[0]['model']['head.weight'], states[1]['model']['head.weight'])
    moved = {name for name, value in backbone(states[2]).items() if not torch.equal(value, before[name])}
    assert set(before) - moved == set() or '--amp' in how and len(moved) > len(before) / 2


def moments_of(content):
    """The optimizer's state of each parameter, in order; PyTorch 1.5 names them by their addresses."""
    optimizer = content['optimizer']
    return [optimizer['state'].get(key, {}) for group in optimizer['param_groups'] for key in group['params']]


def test_frozen_runs_resume_to_the_bit_before_and_after_unfreezing(data, tmp_path, capsys):
    base = RUN + ['--data_path', data, '--freeze_backbone', '--unfreeze_epoch=1', '--epochs=3', '--lr=1e-3',
                  '--save_ckpt_freq=1', '--batch_size=8', '--drop_path=0.3', '--model_ema']
    whole = str(tmp_path / 'whole')
    assert run_class_finetuning.run(base + ['--output_dir', whole]) == 0
    expected = weights_file.load_weights_file(os.path.join(whole, 'checkpoint-2.pth'))
    for stop in (2, 4, 6):  # four updates an epoch: frozen, at the end of the frozen epoch, unfrozen
        output = str(tmp_path / ('stop %d' % stop))
        assert run_class_finetuning.run(base + ['--output_dir', output, '--maxstep=%d' % stop]) == 0
        capsys.readouterr()
        assert run_class_finetuning.run(base + ['--output_dir', output, '--auto_resume']) == 0
        assert 'exactly as if it had not been stopped' in capsys.readouterr().out
        found = weights_file.load_weights_file(os.path.join(output, 'checkpoint-2.pth'))
        assert same(expected['model'], found['model']) and same(expected['model_ema'], found['model_ema'])
        moments, others = moments_of(expected), moments_of(found)
        assert len(moments) == len(others) and all(moments)
        for state, other in zip(moments, others):
            assert set(state) == set(other)
            for name, value in state.items():
                assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]


@pytest.mark.slow
def test_two_processes_freeze_and_unfreeze_as_one(data, tmp_path):
    base = ['--data_path', data, '--freeze_backbone', '--unfreeze_epoch=1', '--epochs=2', '--lr=1e-3', '--opt=sgd',
            '--drop_path=0', '--reprob=0', '--hflip=0', '--save_ckpt_freq=1', '--disable_eval_during_finetuning']
    one, two = str(tmp_path / 'one'), str(tmp_path / 'two')
    assert run_class_finetuning.run(RUN + base + ['--batch_size=16', '--output_dir', one]) == 0
    status, _, err = launch(2, *(base + ['--output_dir', two]))
    assert status == 0, err
    contents = [weights_file.load_weights_file(os.path.join(folder, 'checkpoint-1.pth'))['model']
                for folder in (one, two)]
    first = weights_file.load_weights_file(os.path.join(two, 'checkpoint-0.pth'))['model']
    for name, value in contents[0].items():
        assert torch.allclose(value.float(), contents[1][name].float(), atol=1e-5), name
    assert not torch.allclose(first['blocks.0.mlp.fc1.weight'], contents[1]['blocks.0.mlp.fc1.weight'], atol=1e-6)


def test_impossible_unfreezing(refused, data):
    base = RUN + ['--data_path', data, '--epochs=2']
    refused(base + ['--unfreeze_epoch=1'], '--unfreeze_epoch 1', '--freeze_backbone')
    refused(base + ['--unfreeze_epoch=2', '--freeze_backbone'], '--unfreeze_epoch 2', '--epochs 2')
    refused(base + ['--unfreeze_epoch=1', '--freeze_backbone', '--opt=npufusedadamw'], 'npufusedadamw', '--opt adamw')
