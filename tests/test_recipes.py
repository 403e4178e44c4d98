"""The recipes: the published values, what chooses one, how flags win over it, and the linear rule of the rate."""

import json
import os
import re
import sys

import pytest
import yaml

import check_flags
import run_class_finetuning
from beit import recipes
from beit.errors import UserError
from helpers import RUN, TEST_DIR, copy_checkout, launch, run_script, write_images

pytestmark = pytest.mark.fast

with open(os.path.join(TEST_DIR, 'published.json'), encoding='utf-8') as file:
    PUBLISHED = json.load(file)
NAMES = ('beit_base_intermediate', 'beit_large_intermediate', 'beit_base_pretrained', 'beit_large_pretrained',
         'beitv2_base_intermediate', 'beitv2_large_intermediate', 'beitv2_base_pretrained', 'beitv2_large_pretrained',
         'beitv2_base_imagenet21k', 'beit_base_linear_probe')  # in the order of published.json


@pytest.mark.parametrize('name, published', list(zip(NAMES, PUBLISHED['recipes'])), ids=NAMES)
def test_a_recipe_has_the_published_values(name, published, parse):
    args = parse('--recipe', name)
    for flag, value in published.items():
        if flag not in ('name', 'init', 'devices'):
            assert getattr(args, flag) == value, flag
    weights = {each['name']: each for each in PUBLISHED['weights']}
    assert args.finetune == published['init'][0]
    assert args.model.replace('v2', '') == weights[args.finetune]['model']
    with open(recipes.path_of(name), encoding='utf-8') as file:
        content = yaml.safe_load(file)
    assert content['devices'] == published['devices'] and args.recipe == name
    assert set(content) == set(published) - {'name', 'init'} | {'model', 'finetune'} | (
        {'freeze_backbone'} if 'probe' in name else set())


def test_there_is_one_for_each_published_recipe():
    assert sorted(os.listdir(recipes.FOLDER)) == sorted(name + '.yaml' for name in NAMES)
    assert len(NAMES) == len(PUBLISHED['recipes'])


@pytest.mark.parametrize('command', [each for each in PUBLISHED['commands'] if '--lr' in each],
                         ids=lambda command: re.sub(r'.*/', '', command[command.index('--finetune') + 1]))
def test_the_published_command_and_its_recipe_set_the_same_flags(command, parse):
    printed = parse(*command)
    if printed.nb_classes == 21841:
        args = parse('--recipe=beitv2_base_imagenet21k')
    else:
        args = parse('--recipe=auto', '--model', printed.model, '--finetune', printed.finetune)
        assert (args.model, args.finetune) == (printed.model, printed.finetune)
    for flag in ('lr', 'batch_size', 'update_freq', 'warmup_epochs', 'epochs', 'layer_decay', 'drop_path', 'mixup',
                 'cutmix', 'weight_decay', 'imagenet_default_mean_and_std', 'disable_eval_during_finetuning'):
        assert getattr(args, flag) == getattr(printed, flag), flag


@pytest.mark.parametrize('model, finetune, name', [
    ('beit_large_patch16_224', 'checkpoints/beit_large_patch16_224_pt22k_ft22k.pth', 'beit_large_intermediate'),
    ('beit_large_patch16_512', '', 'beit_large_intermediate'),
    ('beit_base_patch16_384', 'out/checkpoint-best.pth', 'beit_base_intermediate'),
    ('beit_base_patch16_224', 'beit_base_patch16_224_pt22k', 'beit_base_pretrained'),
    ('beit_base_patch16_224', '/x/beitv2_base_patch16_224_pt1k.pth', 'beitv2_base_pretrained'),
    ('beitv2_large_patch16_224', 'own.pth', 'beitv2_large_intermediate'),
    ('beit_nano_patch8_32', '', 'beit_base_intermediate')])
def test_model_and_weights_choose_the_recipe(model, finetune, name, parse):
    assert recipes.choose(model, finetune) == name
    args = parse('--recipe=auto', '--model', model, '--finetune', finetune)
    assert (args.recipe, args.model, args.finetune) == (name, model, finetune)
    assert parse('--recipe=auto', '--finetune=beit_large_patch16_224_pt22k').recipe == 'beit_large_pretrained'


def test_flags_win_over_the_recipe_and_it_over_a_file(parse, tmp_path):
    config = tmp_path / 'own.yaml'
    config.write_text('lr: 3e-3\nsmoothing: 0.2\n')
    args = parse('--recipe=beit_large_intermediate', '--drop_path=0.2', '--config', str(config))
    assert (args.drop_path, args.layer_decay, args.lr, args.smoothing) == (0.2, 0.9, 2e-5, 0.2)
    config.write_text('recipe: beit_large_intermediate\nlr: 3e-3\n')  # what a file says beside a recipe wins over it
    args = parse('--config', str(config))
    assert (args.lr, args.layer_decay, args.recipe) == (3e-3, 0.9, 'beit_large_intermediate')
    assert {'lr', 'drop_path', 'recipe'} <= args.given and args.typed == {'config'}


def test_an_unknown_recipe_names_those_that_there_are(refused, tmp_path):
    data = write_images(tmp_path / 'data')
    refused(RUN + ['--data_path', data, '--recipe=beit_base_intermediat'], '--recipe', 'beit_base_intermediate')
    refused(RUN + ['--data_path', data, '--recipe=../../x'], '--recipe', '../../x')
    refused(RUN + ['--data_path', data, '--eval', '--resume=x', '--recipe=auto'], '--recipe', 'training')


# ---- the learning rate

def scaled(parse, *words):
    args = parse(*words)
    check_flags.settle(args)
    return args


def test_blr_is_the_rate_of_256_images(parse, monkeypatch):
    words = ['--recipe=beit_base_intermediate', '--batch_size=16', '--update_freq=2']
    assert scaled(parse, *words).lr == 2e-5
    assert scaled(parse, *words, '--blr=1e-5').lr == pytest.approx(1e-5 * 32 / 256)
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '8')):
        monkeypatch.setenv(name, value)
    assert scaled(parse, *words, '--blr=1e-5').lr == pytest.approx(1e-5 * 256 / 256)
    with pytest.raises(UserError, match='--blr 1e-05: --lr is given too'):
        check_flags.check_combinations(parse('--blr=1e-5', '--lr=1'))


def test_a_rate_on_the_command_line_wins_over_a_files_blr(parse, tmp_path):
    config = tmp_path / 'args.yaml'
    config.write_text('blr: 1e-5\nlr: 7e-5\n')
    assert scaled(parse, '--config', str(config)).lr == pytest.approx(1e-5 * 64 / 256)
    assert scaled(parse, '--config', str(config), '--lr=1e-3').lr == 1e-3


def test_a_run_says_its_recipe_and_the_linear_rule(tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    flags = ['--data_path', data, '--recipe=beit_base_intermediate', '--finetune=', '--maxstep=1', '--epochs=1']
    assert run_class_finetuning.run(RUN + flags + ['--output_dir', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert 'Recipe: beit_base_intermediate; lr 2e-05 at 512 images an update; this run: lr 2e-05 at 8; the linear ' \
        'rule gives lr 3.125e-07 (--blr 1e-05)' in out
    assert run_class_finetuning.run(RUN + flags + ['--blr=1e-5']) == 0
    out = capsys.readouterr().out
    assert '--lr 3.125e-07: --blr 1e-05 x 8 images an update / 256' in out
    assert 'this run: lr 3.125e-07 at 8\n' in out
    with open(str(tmp_path / 'out' / 'args.yaml'), encoding='utf-8') as file:
        assert 'recipe: "beit_base_intermediate"\n' in file.read()
    assert run_class_finetuning.run(['--config', str(tmp_path / 'out' / 'args.yaml'), '--eval', '--resume',
                                     str(tmp_path / 'out')]) == 0


def test_the_same_rate_on_several_processes(tmp_path):
    data = write_images(tmp_path / 'data')
    status, out, err = launch(2, '--data_path', data, '--recipe=auto', '--blr=0.01', '--maxstep=1', '--epochs=1')
    assert status == 0, err
    assert '--lr 0.000625: --blr 0.01 x 16 images an update / 256' in out and out.count('--blr 0.01 x') == 1


# ---- the scripts

@pytest.mark.current_only
@pytest.mark.parametrize('words, expected', [
    (['', ''], 'beit_base_intermediate beit_base_patch16_224 beit_base_patch16_224_pt22k_ft22k 64 30 5'),
    (['beit_large_patch16_224', 'x.pth'],
     'beit_large_intermediate beit_large_patch16_224 beit_large_patch16_224_pt22k_ft22k 32 30 5'),
    (['', 'a/beitv2_large_patch16_224_pt1k.pth'],
     'beitv2_large_pretrained beitv2_large_patch16_224 beitv2_large_patch16_224_pt1k 64 50 5'),
    (['', '', 'beit_base_linear_probe'],
     'beit_base_linear_probe beit_base_patch16_224 beit_base_patch16_224_pt22k 64 30 5')])
def test_what_the_scripts_ask_for(words, expected, capsys):
    assert recipes.main(*words) == 0
    assert capsys.readouterr().out == expected + '\n'


def test_a_script_is_told_of_an_unknown_recipe(capsys):
    assert recipes.main('', '', 'beit_base') == 2
    assert '--recipe: unknown value' in capsys.readouterr().err


@pytest.mark.current_only
def test_a_script_takes_the_recipe_of_its_model(tmp_path):
    """large has its own layer decay, drop path, batch and weights; what the user gives wins."""
    folder, data = tmp_path / 'record', write_images(tmp_path / 'data')
    program = tmp_path / 'python'
    program.write_text('#!/usr/bin/env bash\n[ "$2" != beit.recipes ] || exec "$REAL" "$@"\n'
                       'case $2 in *fcntl*) exec "$REAL" "$@" ;; esac\n'
                       'if [ "$1" = -c ]; then echo cpu; exit; fi\nprintf "%s\\n" "$@" >"$RECORD"\nexit 3\n')
    program.chmod(0o755)
    checkout = copy_checkout(str(tmp_path / 'beit'))

    def arguments(*flags):
        run_script(checkout, 'train_full_1p', '--data_path=' + data, '--device=cpu', *flags, PYTHON=str(program),
                   REAL=sys.executable, RECORD=str(folder))
        words = folder.read_text().splitlines()
        return run_class_finetuning.build_parser().parse_args(words[words.index('run_class_finetuning.py') + 1:])

    args = arguments('--model=beit_large_patch16_224')
    assert (args.layer_decay, args.drop_path, args.batch_size, args.update_freq) == (0.9, 0.4, 32, 2)
    assert (args.layer_scale_init_value, args.epochs, args.warmup_epochs) == (1e-5, 30, 5)
    assert args.finetune == './checkpoints/beit_large_patch16_224_pt22k_ft22k.pth'
    args = arguments('--finetune=beit_base_patch16_224_pt22k', '--epochs=50', '--layer_decay=0.7')
    assert (args.lr, args.layer_decay, args.epochs, args.warmup_epochs, args.mixup) == (4e-3, 0.7, 50, 20, 0.8)
    assert (args.finetune, args.recipe) == ('beit_base_patch16_224_pt22k', 'beit_base_pretrained')
    args = arguments('--finetune=', '--lr=5e-4')
    assert (args.finetune, args.lr, args.layer_decay) == ('', 5e-4, 0.85)
    args = arguments('--finetune=hf-hub:owner/name', '--batch_size=16')
    assert (args.finetune, args.batch_size, args.lr) == ('hf-hub:owner/name', 16, 2e-5)
    run = run_script(checkout, 'train_eval_1p', '--data_path=demo', '--resume=.', '--recipe=auto', PYTHON=str(program),
                     REAL=sys.executable, RECORD=str(folder))
    assert run.status == 2 and '--recipe auto: it belongs to training' in run.err
    args = arguments('--recipe=beitv2_large_pretrained')
    assert (args.model, args.epochs, args.lr) == ('beitv2_large_patch16_224', 50, 2e-4)
    assert args.finetune == './checkpoints/beitv2_large_patch16_224_pt1k.pth'
