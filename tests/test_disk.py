"""A full, read-only or missing disk gives one error line and status 2, and older checkpoints stay complete."""

import os
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest

import run_class_finetuning
from beit.checkpoint import discovery
from beit.files import weights_file
from helpers import ROOT, RUN, cannot_run, launch, lines_of, python, run_program

pytestmark = pytest.mark.current_only

CHECKPOINT_BYTES = 3 * 2 ** 20  # of the nano model, about: weights and two moments


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes): a folder on a file system of that size."""
    mounted = []

    def mount(size):
        folder = str(tmp_path / ('disk%d' % len(mounted)))
        os.mkdir(folder)
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=%d' % size, 'none', folder],
                              stderr=subprocess.PIPE, universal_newlines=True) if shutil.which('mount') else None
        if done is None or done.returncode:
            cannot_run('tmpfs', 'no right to mount a small file system here')
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted:
        subprocess.run(['umount', '-l', folder], check=True)


def failed_in_one_line(status, err, *says):
    assert status == 2, err
    lines = [line for line in err.splitlines() if 'error: ' in line]
    assert len(lines) == 1 and 'Traceback' not in err, err
    for part in says:
        assert part in lines[0], err


def goes_on(base, output):
    """The folder's checkpoints are complete, and a run resumes from the newest."""
    files = [path for _, path in discovery.list_checkpoints(output)]
    assert files
    for path in files:
        assert weights_file.load_weights_file(path)['model']
    assert not [name for name in os.listdir(output) if '.tmp-' in name]
    status, out, err = run_program(*base, '--auto_resume')
    assert status == 0, err
    assert 'Resumed ' + files[-1] in out
    return out


@pytest.mark.parametrize('processes', (1, 2))
def test_a_disk_that_fills_up_with_checkpoints(image_folder, small_disk, processes):
    disk = small_disk(2 * CHECKPOINT_BYTES + CHECKPOINT_BYTES // 2)
    base = RUN + ['--data_path=' + image_folder(), '--epochs=4', '--save_ckpt_freq=1', '--output_dir=' + disk,
                  '--disable_eval_during_finetuning', '--batch_size=4']
    if processes == 1:
        status, _, err = run_program(*base)
    else:
        status, _, err = launch(2, *base, preset=())
    failed_in_one_line(status, err, '--output_dir', 'cannot write', 'earlier checkpoints are intact')
    kept = [os.path.basename(path) for _, path in discovery.list_checkpoints(disk)]
    assert kept and kept[0] == 'checkpoint-0.pth' and 'checkpoint-3.pth' not in kept
    if processes == 1:  # space is free again
        subprocess.run(['mount', '-o', 'remount,size=%d' % (8 * CHECKPOINT_BYTES), disk], check=True)
        goes_on(base, disk)
        assert [line['epoch'] for line in lines_of(disk)] == [0, 1, 2, 3]


def test_a_limit_on_the_size_of_files(image_folder, tmp_path):
    """RLIMIT_FSIZE acts like a quota: write() fails in the middle of the file."""
    output = str(tmp_path / 'out')
    base = RUN + ['--data_path=' + image_folder(), '--epochs=3', '--save_ckpt_freq=1', '--output_dir=' + output]
    assert run_program(*base, '--maxstep=4')[0] == 0

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT_BYTES // 3, resource.RLIM_INFINITY))

    done = subprocess.run([sys.executable, os.path.join(ROOT, 'run_class_finetuning.py')] + base + ['--auto_resume'],
                          preexec_fn=limit, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    failed_in_one_line(done.returncode, done.stderr, '--output_dir', 'cannot write', 'File too large')
    goes_on(base, output)


@pytest.mark.parametrize('what', ('log.txt', 'bad_images.txt', 'tensorboard'))
def test_a_disk_without_room_for_a_line(image_folder, small_disk, tmp_path, what):
    disk = small_disk(64 * 1024)
    with open(os.path.join(disk, 'filler'), 'wb') as file:
        file.write(bytes(64 * 1024 - (4096 if what == 'tensorboard' else 0)))
    data = image_folder()
    base = RUN + ['--data_path=' + data, '--epochs=1', '--no_save_ckpt', '--bad_images=skip', '--max_bad_images=0.5']
    if what == 'bad_images.txt':
        with open(os.path.join(data, 'train', 'cat', '003.png'), 'w') as file:
            file.write('no image')
    if what != 'tensorboard':
        # An empty file can still be created in the folder, so writing the line fails first.
        status, _, err = run_program(*base, '--output_dir=' + disk)
        failed_in_one_line(status, err, os.path.join(disk, what), 'No space left on device')
        assert os.listdir(disk) == ['filler']
    else:
        status, _, err = run_program(*base, '--epochs=40', '--log_dir=' + disk)
        failed_in_one_line(status, err, '--log_dir ' + disk, 'No space left')


# Runs the program and changes its output folder between two epochs.
BETWEEN = textwrap.dedent('''
    import os, shutil, subprocess, sys
    sys.path.insert(0, %r)
    import run_class_finetuning; from beit.files import run_folder
    output = sys.argv[1]
    append = run_folder.append_log
    def append_log(folder, stats):
        append(folder, stats)
        if stats['epoch'] == 1:
            %s
    run_folder.append_log = append_log
    sys.exit(run_class_finetuning.run(sys.argv[2:]))
''')
HAPPENINGS = {
    'removed': 'shutil.rmtree(output)',
    'replaced by a file': 'os.rename(output, output + "-kept"); open(output, "w").close()',
    'moved away': 'os.rename(output, output + "-kept")',
    # A second mount on top: the disk itself can't be remounted while a run holds its lock.
    'read-only': 'for how in (["--bind", output], ["-o", "remount,ro,bind"]): '
                 'subprocess.run(["mount"] + how + [output], check=True)',
}


@pytest.mark.parametrize('happening', sorted(HAPPENINGS))
def test_an_output_folder_that_changes_under_the_run(image_folder, tmp_path, small_disk, happening):
    output = small_disk(8 * CHECKPOINT_BYTES) if happening == 'read-only' else str(tmp_path / 'out')
    base = RUN + ['--data_path=' + image_folder(), '--epochs=3', '--save_ckpt_freq=1', '--output_dir=' + output]
    done = subprocess.run([python(), '-c', BETWEEN % (ROOT, HAPPENINGS[happening]), output] + base,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=200)
    failed_in_one_line(done.returncode, done.stderr, '--output_dir', output)
    kept = output + '-kept' if happening in ('moved away', 'replaced by a file') else output
    if happening == 'removed':
        return
    assert [os.path.basename(path) for _, path in discovery.list_checkpoints(kept)] == ['checkpoint-0.pth']
    assert weights_file.load_weights_file(os.path.join(kept, 'checkpoint-0.pth'))['epoch'] == 0
    if happening == 'read-only':
        subprocess.run(['umount', output], check=True)
        goes_on(base, output)


def test_a_read_only_folder_from_the_start(image_folder, small_disk, capsys):
    disk = small_disk(CHECKPOINT_BYTES)
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    assert run_class_finetuning.run(RUN + ['--data_path=' + image_folder(), '--output_dir=' + disk]) == 2
    assert 'cannot be written to (Read-only file system)' in capsys.readouterr().err
