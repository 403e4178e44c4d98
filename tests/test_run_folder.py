"""The output folder: its lock, resuming from an earlier checkpoint, --config with another folder."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import average_checkpoints
import run_class_finetuning
from beit.checkpoint import discovery
from beit.checkpoint.inference_model import load_for_inference
from beit.parser import OF_FOLDER
from beit.errors import UserError
from beit.files import run_folder, weights_file
from beit.outputs import report
from helpers import COLD, LAUNCHER, LONG, PROGRAM, RUN, environment, holder, launch, lines_of

pytestmark = pytest.mark.fast


# ---- the lock

def test_the_line_names_the_run_that_holds_the_folder(tmp_path):
    folder, before = str(tmp_path / 'out'), time.strftime('%Y-%m-%d %H:%M:%S')
    with holder(folder) as (pid, _), pytest.raises(UserError) as caught, run_folder.locked(folder):
        pass
    found = re.match(r'--output_dir (.+): process (\d+) on (.+), since ([\d-]+ [\d:]+), writes there; ',
                     str(caught.value))
    assert found.groups()[:3] == (folder, str(pid), socket.gethostname())
    assert before <= found.group(4) <= time.strftime('%Y-%m-%d %H:%M:%S')


def test_a_killed_process_leaves_no_lock_behind_though_its_child_lives(tmp_path):
    folder = str(tmp_path / 'out')
    with holder(folder, with_child=True) as (pid, child):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.kill(child, 0)  # the child is alive and has the file open
        assert os.listdir(folder) == [run_folder.LOCK]
        with run_folder.locked(folder):
            pass
    assert os.listdir(folder) == []  # it existed before, and stays


def test_a_refused_run_creates_no_folder(tmp_path):
    with pytest.raises(KeyError), run_folder.locked(str(tmp_path / 'new' / 'er')):
        raise KeyError
    assert os.listdir(str(tmp_path)) == []
    with run_folder.locked(''):
        assert os.listdir(str(tmp_path)) == []


def test_the_lock_is_exclusive(tmp_path):
    """Each exit removes the lock file, which another process may just have opened."""
    folder, inside = str(tmp_path), str(tmp_path / 'inside')

    def work():
        held = 0
        while held < 200:
            with contextlib.suppress(UserError), run_folder.locked(folder):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # an error while another process is inside
                os.remove(inside)
                held += 1

    pids = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]


@pytest.mark.parametrize('kind', ['symbolic', 'hard', 'pipe'])
def test_nothing_is_written_through_a_planted_link(tmp_path, kind):
    folder, victim = tmp_path / 'out', tmp_path / 'victim'
    folder.mkdir()
    victim.write_text('whole')
    lock = str(folder / run_folder.LOCK)
    {'symbolic': os.symlink, 'hard': os.link, 'pipe': lambda _, path: os.mkfifo(path)}[kind](str(victim), lock)
    with pytest.raises(UserError, match=r'--output_dir .*\.beit\.lock'), run_folder.locked(str(folder)):
        pass
    assert victim.read_text() == 'whole' and os.path.lexists(lock)


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'lockf', lockf)
    with run_folder.locked(str(tmp_path / 'out')):
        pass
    assert re.fullmatch(r'\S+/out cannot be locked \(No locks available\); .*\n', capsys.readouterr().out)


# ---- the lock, held by a run

@contextlib.contextmanager
def running(flags, processes=1):
    """A training run in separate processes; its main process is killed at the end."""
    command = [sys.executable, '-u', PROGRAM] if processes == 1 else \
        [sys.executable] + LAUNCHER + ['--nproc_per_node=%d' % processes, PROGRAM]
    process = subprocess.Popen(command + flags, cwd=os.path.dirname(PROGRAM),
                               env=environment(OMP_NUM_THREADS='1', **COLD),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    try:
        assert any('Epoch: [1]' in line for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.slow
def test_a_second_run_in_a_folder_stops_and_changes_nothing(image_folder, tmp_path, refused, capsys):
    data, output, weights = image_folder(), str(tmp_path / 'out'), str(tmp_path / 'weights')
    base = RUN + ['--data_path=' + data]
    assert run_class_finetuning.run(base + ['--epochs=1', '--output_dir=' + weights]) == 0
    capsys.readouterr()
    with running(base + LONG + ['--num_workers=2', '--output_dir=' + output]) as first:
        words = ('--output_dir ' + output, 'process %d on %s, since 20' % (first.pid, socket.gethostname()))
        names = sorted(os.listdir(output))
        for flags in (['--epochs=1'], ['--epochs=1', '--auto_resume'], ['--eval', '--resume=' + weights],
                      ['--check_data']):
            refused(base + flags + ['--output_dir=' + output], *words)
        begun = time.monotonic()
        status, out, err = launch(2, '--data_path=' + data, '--epochs=1', '--output_dir=' + output)
        assert status == 2 and time.monotonic() - begun < 100  # it informs the others, which don't wait for it
        assert len(err.splitlines()) == 1 and all(word in err for word in words), out + err
        assert sorted(os.listdir(output)) == names and not [
            name for name in os.listdir(str(tmp_path)) if name.startswith('out-')]
    # The lock of a killed run is free immediately. Its files move to a backup folder, except the lock file.
    assert run_class_finetuning.run(base + ['--epochs=1', '--output_dir=' + output]) == 0
    aside, = [name for name in os.listdir(str(tmp_path)) if name.startswith('out-')]
    assert 'log.txt' in os.listdir(str(tmp_path / aside))
    for folder in (output, str(tmp_path / aside)):
        assert run_folder.LOCK not in os.listdir(folder)


@pytest.mark.slow
def test_the_first_of_several_processes_holds_the_folder(image_folder, tmp_path, refused):
    base, output = RUN + ['--data_path=' + image_folder()], str(tmp_path / 'out')
    with running(base + LONG + ['--batch_size=4', '--output_dir=' + output], processes=2):
        refused(base + ['--epochs=1', '--output_dir=' + output], '--output_dir ' + output, 'process ', ', since 20')


# ---- resuming from an earlier checkpoint

def test_later_checkpoints_are_moved_to_a_backup_when_a_run_goes_back(image_folder, tmp_path, capsys):
    base, output = RUN + ['--data_path=' + image_folder(), '--save_ckpt_freq=1', '--epochs=4', '--model_ema',
                          '--report'], tmp_path / 'out'
    base += ['--output_dir=' + str(output)]
    assert run_class_finetuning.run(base) == 0
    for name in (discovery.BEST, discovery.BEST_EMA):  # one is later than the resumed checkpoint, one is not
        os.remove(str(output / name))  # a link
        shutil.copy(str(output / ('checkpoint-%d.pth' % (3 if name == discovery.BEST else 0))), str(output / name))
    (output / 'notes.txt').write_text('mine')
    log = (output / 'log.txt').read_text()
    capsys.readouterr()

    back = base + ['--resume=' + str(output / 'checkpoint-1.pth'), '--smoothing=0.3']
    assert run_class_finetuning.run(back + ['--maxstep=12', '--val_interval=9']) == 0  # of 4 epochs of 4 updates 3
    said = re.search(r'^Moved .* in %s\b.* to (\S+) ' % output, capsys.readouterr().out, re.M)
    assert sorted(os.listdir(said.group(1))) == ['checkpoint-2.pth', 'checkpoint-3.pth', 'checkpoint-best.pth',
                                                 'log.txt', 'report.html', 'summary.json']
    with open(os.path.join(said.group(1), 'log.txt')) as file:
        assert file.read() == log
    assert {'checkpoint-0.pth', 'checkpoint-1.pth', 'checkpoint-2.pth', 'checkpoint-best-ema.pth', 'notes.txt'} \
        <= set(os.listdir(str(output)))

    assert run_class_finetuning.run(base + ['--auto_resume', '--smoothing=0.3']) == 0
    out = capsys.readouterr().out
    assert 'Resumed %s: ' % (output / 'checkpoint-2.pth') in out and 'Nothing left' not in out
    assert [line['epoch'] for line in lines_of(str(output))] == [0, 1, 2, 3]
    for epoch, smoothing in ((1, 0.1), (2, 0.3), (3, 0.3)):
        content = weights_file.load_weights_file(str(output / ('checkpoint-%d.pth' % epoch)))
        assert content['args']['smoothing'] == smoothing
    # Nothing is later than its newest checkpoint, or than a file from elsewhere.
    assert run_class_finetuning.run(base + ['--resume=' + str(output / 'checkpoint-3.pth'), '--epochs=5']) == 0
    assert not re.search('^Moved ', capsys.readouterr().out, re.M)


def test_resuming_bare_weights_starts_a_new_run_and_keeps_the_file(image_folder, tmp_path):
    output = tmp_path / 'out'
    base = RUN + ['--data_path=' + image_folder(), '--output_dir=' + str(output)]
    assert run_class_finetuning.run(base + ['--epochs=2', '--save_ckpt_freq=1']) == 0
    content = weights_file.load_weights_file(str(output / 'checkpoint-1.pth'))
    weights_file.save(str(output / 'checkpoint-9.pth'), {'model': content['model'], 'args': content['args']})
    assert run_class_finetuning.run(base + ['--epochs=1', '--resume=' + str(output / 'checkpoint-9.pth')]) == 0
    assert {'checkpoint-0.pth', 'checkpoint-9.pth'} <= set(os.listdir(str(output)))
    aside, = [name for name in os.listdir(str(tmp_path)) if name.startswith('out-')]
    assert {'checkpoint-0.pth', 'checkpoint-1.pth'} <= set(os.listdir(str(tmp_path / aside)))


# ---- --auto_resume beside --resume

def test_auto_resume_ignores_runs_that_began_with_another_file(image_folder, tmp_path, capsys):
    """Here the folder holds a run that began with another file and is further; test_faults.py tests restarts."""
    base = RUN + ['--data_path=' + image_folder(), '--save_ckpt_freq=1']
    first, output = str(tmp_path / 'first'), str(tmp_path / 'out')
    assert run_class_finetuning.run(base + ['--epochs=1', '--output_dir=' + first]) == 0
    assert run_class_finetuning.run(base + ['--epochs=3', '--output_dir=' + output]) == 0
    capsys.readouterr()
    file = os.path.join(first, 'checkpoint-0.pth')
    again = base + ['--epochs=2', '--auto_resume', '--output_dir=' + output]
    assert run_class_finetuning.run(again + ['--resume=' + file]) == 0
    out = capsys.readouterr().out
    assert 'Resumed %s: ' % file in out and 'Moved the earlier run in ' in out
    for more in ([], ['--resume=' + output]):  # meanwhile a user resumes another checkpoint
        assert run_class_finetuning.run(again + ['--epochs=3'] + more) == 0
    assert 'Resumed %s: ' % os.path.join(output, 'checkpoint-1.pth') in capsys.readouterr().out
    assert run_class_finetuning.run(again + ['--epochs=4', '--resume=' + os.path.relpath(file)]) == 0
    out = capsys.readouterr().out
    newest = os.path.join(output, 'checkpoint-2.pth')
    assert 'Resumed %s: ' % newest in out and 'Moved ' not in out
    assert re.search('^--auto_resume: .*%s.*--resume ' % newest, out, re.M)
    os.remove(file)  # the rest of the job doesn't need it
    assert run_class_finetuning.run(again + ['--epochs=5', '--resume=' + file]) == 0
    assert [line['epoch'] for line in lines_of(output)] == [1, 2, 3, 4]


def test_a_resumed_file_that_is_gone_is_still_an_error(image_folder, tmp_path, refused):
    base, output = RUN + ['--data_path=' + image_folder(), '--epochs=1'], str(tmp_path / 'out')
    assert run_class_finetuning.run(base + ['--output_dir=' + output]) == 0
    gone = str(tmp_path / 'gone.pth')
    refused(base + ['--auto_resume', '--output_dir=' + output, '--resume=' + gone], '--resume ' + gone)
    assert os.path.isfile(os.path.join(output, 'checkpoint-0.pth'))


# ---- which checkpoint of a folder

def test_averaged_weights_come_from_the_checkpoint_where_they_were_best(image_folder, tmp_path):
    output = tmp_path / 'out'
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--epochs=1', '--model_ema',
                                           '--output_dir=' + str(output)]) == 0
    for number, name in enumerate((discovery.BEST, discovery.BEST_EMA, 'checkpoint-0.pth')):
        content = weights_file.load_weights_file(str(output / name))
        for part in ('model', 'model_ema'):
            content[part]['head.bias'].fill_(number + 10 * (part == 'model_ema'))
        weights_file.save(str(output / name), content)
    for use_ema, value, name in ((False, 0., discovery.BEST), (True, 11., discovery.BEST_EMA)):
        loaded = load_for_inference(str(output), use_ema=use_ema)
        assert os.path.basename(loaded.source) == name and set(loaded.model.head.bias.tolist()) == {value}
    (output / discovery.BEST_EMA).unlink()
    assert os.path.basename(load_for_inference(str(output), use_ema=True).source) == discovery.BEST


# ---- --config

THEIRS = {'log_dir': 'tb', 'resume': 'a.pth', 'auto_resume': True, 'start_epoch': 2, 'results_file': 'a.csv'}


@pytest.fixture
def config(tmp_path):
    """An args.yaml of a run with `THEIRS`, in the folder out."""
    path = tmp_path / 'args.yaml'
    flags = dict(THEIRS, output_dir=str(tmp_path / 'out'), lr=0.25, epochs=7)
    path.write_text(''.join('%s: %s\n' % (name, json.dumps(value)) for name, value in flags.items()))
    return str(path)


@pytest.mark.parametrize('other', ['another', ''])
def test_config_drops_the_folder_flags_for_another_folder(config, parse, capsys, other):
    args, default = parse('--config', config, '--output_dir=' + other), parse()
    assert (args.output_dir, args.lr, args.epochs) == (other, 0.25, 7)
    assert set(THEIRS) == set(OF_FOLDER)
    for name in THEIRS:
        assert getattr(args, name) == getattr(default, name), name
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and '--config' in out and os.path.join(os.path.dirname(config), 'out') in out
    for words in ('--log_dir tb', '--resume a.pth', '--auto_resume', '--start_epoch 2', '--results_file a.csv'):
        assert words in out


def test_config_keeps_the_folder_flags_for_the_same_folder_or_when_given(config, parse, capsys, tmp_path):
    for flags in ([], ['--output_dir', str(tmp_path / 'x' / '..' / 'out') + os.sep]):
        args = parse('--config', config, *flags)
        assert {name: getattr(args, name) for name in THEIRS} == THEIRS
    assert capsys.readouterr().out == ''
    args = parse('--config', config, '--output_dir=another', '--log_dir=mine', '--auto_resume')
    assert (args.log_dir, args.auto_resume, args.resume) == ('mine', True, '')


def test_config_keeps_the_checkpoint_of_an_evaluation(config, parse, capsys):
    with open(config, 'a') as file:
        file.write('eval: true\n')
    args = parse('--config', config, '--output_dir=another')
    assert (args.eval, args.resume, args.log_dir) == (True, 'a.pth', None)
    assert '--resume' not in capsys.readouterr().out


def test_only_one_process_reports_dropped_flags(config, parse, capsys, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert parse('--config', config, '--output_dir=another').log_dir is None
    assert capsys.readouterr().out == ''


# ---- the best figure belongs to a validation set, and to a file

def best_of(folder, name='checkpoint-best.pth'):
    return weights_file.load_weights_file(os.path.join(str(folder), name))


@pytest.fixture
def easier(monkeypatch):
    """easier(figures): the coming evaluations give these accuracies."""
    evaluate = run_class_finetuning.engine.evaluate

    def give(*figures):
        coming = iter(figures)
        monkeypatch.setattr(run_class_finetuning.engine, 'evaluate', lambda *args, **options: dict(
            evaluate(*args, **options), acc1=next(coming)))
    return give


@pytest.mark.parametrize('change', [['--eval_data_path=OTHER'], ['--imagenet_default_mean_and_std'], ['--test_flip']])
def test_another_validation_set_starts_the_best_figure_again(image_folder, tmp_path, capsys, easier, change):
    """The old set was easier; the new run stops after as many evaluations without a new best as its own set gives."""
    output = tmp_path / 'out'
    other = os.path.join(image_folder(val=5, name='other'), 'val')
    change = [flag.replace('OTHER', other) for flag in change]
    base = RUN + ['--data_path=' + image_folder(), '--output_dir=' + str(output), '--early_stop=2',
                  '--save_ckpt_freq=1']
    easier(90., 80., 50., 40., 30.)
    assert run_class_finetuning.run(base + ['--epochs=2']) == 0
    capsys.readouterr()
    assert run_class_finetuning.run(base + ['--epochs=9', '--auto_resume'] + change) == 0
    out = capsys.readouterr().out
    assert re.search('^The best figure starts again: .*checkpoint-1.pth is of other validation images', out, re.M)
    assert 'no new best in 2 evaluations' in out and [line['test_acc1'] for line in lines_of(output)] == [
        90., 80., 50., 40., 30.]
    assert best_of(output)['epoch'] == 2 and best_of(output)['accuracy'] == {'accuracy': 50.}
    with open(str(output / 'summary.json')) as file:
        assert json.load(file)['accuracy'] == 50.
    # The averages of both sets together have no meaning.
    average = ['--inputs', str(output), '--output', str(tmp_path / 'average.pth')]
    assert average_checkpoints.run(average + ['--best=2']) == 2
    error = capsys.readouterr().err
    assert '--best 2: ' in error and 'different validation images' in error and len(error.splitlines()) == 1
    assert report.best_epoch(run_folder.read_log(str(output)))['epoch'] == 2


def test_epochs_without_an_evaluation_keep_the_best_figure(image_folder, tmp_path, capsys, easier):
    output = tmp_path / 'out'
    base = RUN + ['--data_path=' + image_folder(), '--output_dir=' + str(output), '--save_ckpt_freq=1', '--auto_resume']
    easier(90., 80.)
    assert run_class_finetuning.run(base + ['--epochs=1']) == 0
    assert run_class_finetuning.run(base + ['--epochs=2', '--disable_eval_during_finetuning']) == 0
    assert run_class_finetuning.run(base + ['--epochs=3']) == 0
    assert 'starts again' not in capsys.readouterr().out
    assert best_of(output)['epoch'] == 0 and best_of(output, 'checkpoint-2.pth')['accuracy'] == {'accuracy': 90.}


def test_a_resume_into_a_new_folder_takes_the_best_checkpoints_along(image_folder, tmp_path, capsys, easier):
    first, output = tmp_path / 'first', tmp_path / 'out'
    base = RUN + ['--data_path=' + image_folder(), '--save_ckpt_freq=1', '--model_ema']
    easier(90., 85., 80., 75., 70., 65., 60., 77.)  # the model's and its average's in turn
    assert run_class_finetuning.run(base + ['--epochs=2', '--output_dir=' + str(first)]) == 0
    resume = base + ['--epochs=3', '--resume=' + str(first / 'checkpoint-1.pth'), '--output_dir=' + str(output)]
    assert run_class_finetuning.run(resume) == 0
    out = capsys.readouterr().out
    assert re.search('^Copied the best checkpoint so far .*: accuracy 90.000%, ema_accuracy 85.000%$', out, re.M)
    for name in ('checkpoint-best.pth', 'checkpoint-best-ema.pth'):
        ours, theirs = best_of(output, name), best_of(first, name)
        assert ours['epoch'] == theirs['epoch'] and ours['accuracy'] == theirs['accuracy']
        assert all(torch.equal(ours['model'][key], theirs['model'][key]) for key in theirs['model'])
    # Without that file beside the resumed one, the figure starts again; the average's stays.
    os.remove(str(first / 'checkpoint-best.pth'))
    shutil.rmtree(str(output))
    assert run_class_finetuning.run(resume) == 0
    out = capsys.readouterr().out
    assert re.search('^The best figure starts again: beside .*checkpoint-1.pth ', out, re.M)
    assert best_of(output)['epoch'] == 2 and best_of(output)['accuracy'] == {'accuracy': 60., 'ema_accuracy': 85.}
    assert best_of(output, 'checkpoint-best-ema.pth')['epoch'] == 0
