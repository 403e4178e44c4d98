"""Two machines, simulated by two launchers: they train as one process does, and fail together and quickly."""

import importlib.util
import os
import re
import signal
import socket
import subprocess

import pytest
import torch

from beit.distributed import process_group
from beit.errors import UserError
from beit.files import weights_file
from helpers import (
    COLD,
    LONG,
    NANO,
    ROOT,
    RUN,
    TINY,
    all_end,
    check_summary,
    copy_checkout,
    ends,
    environment,
    fails,
    free_port,
    has_proc,
    lines_of,
    marked,
    output,
    python,
    result,
    run_script,
    start_launcher,
    start_script,
)

pytestmark = pytest.mark.current_only

TORCHRUN = importlib.util.find_spec('torch.distributed.run') is not None
PLAIN = NANO + ['--finetune=', '--lr=1e-3', '--init_scale=1', '--aa=none', '--reprob=0', '--color_jitter=0',
                '--drop_path=0', '--hflip=0']


# ---- they train

def test_two_processes_and_two_nodes_train_as_one_process(tmp_path, image_folder):
    """Losses and weights equal one process with the same total batch; node 0 has the results."""
    machines = [copy_checkout(str(tmp_path / name / 'beit')) for name in ('machine 0', 'machine 1')]
    flags = PLAIN + ['--data_path=' + image_folder(train=24), '--epochs=2', '--warmup_epochs=1']
    one = run_script(machines[0], 'train_full_1p', *flags, '--batch_size=8', '--output_dir=one')
    two = run_script(machines[0], 'train_full_8p', *flags, '--batch_size=4', '--output_dir=two', '--nproc_per_node=2')
    port = free_port()
    runs = ends([start_script(machine, 'train_full_8p', *flags, '--batch_size=2', '--output_dir=four', '--nnodes=2',
                              '--nproc_per_node=2', '--node_rank=%d' % node, '--master_addr=127.0.0.1',
                              '--master_port=%d' % port) for node, machine in enumerate(machines)], 200)
    check_summary(machines[0], 'train_full_8p', runs[0], batch_size=2, devices=4)
    assert result(runs[0])['accuracy'] == result(one)['accuracy'] == result(two)['accuracy']
    assert runs[1].status == 0, runs[1].out + runs[1].err
    assert 'Final result' not in runs[1].out and 'printed and logged on node 0' in runs[1].out
    assert os.listdir(output(machines[1])) == ['train_0_node1.log']
    assert not os.path.exists(os.path.join(machines[1], 'four'))

    folders = [os.path.join(machines[0], name) for name in ('one', 'two', 'four')]
    logs = [lines_of(folder) for folder in folders]
    weights = [weights_file.load_weights_file(os.path.join(folder, 'checkpoint-1.pth'))['model'] for folder in folders]
    assert logs[0][0]['train_loss'] != pytest.approx(logs[0][1]['train_loss'], abs=1e-3)  # the model has learnt
    for log, others in zip(logs[1:], weights[1:]):
        assert [line['epoch'] for line in logs[0]] == [line['epoch'] for line in log] == [0, 1]
        for first, second in zip(logs[0], log):
            assert first['train_loss'] == pytest.approx(second['train_loss'], abs=1e-5)
            assert first['test_loss'] == pytest.approx(second['test_loss'], abs=1e-5)
        for name, value in weights[0].items():
            assert torch.allclose(value.double(), others[name].double(), rtol=0, atol=2e-5), name


def test_two_nodes_that_share_a_checkout(tmp_path, image_folder):
    checkout, port = copy_checkout(str(tmp_path / 'shared')), free_port()
    flags = TINY + ['--data_path=' + image_folder(), '--maxstep=3', '--nnodes=2', '--nproc_per_node=1',
                    '--master_addr=127.0.0.1', '--master_port=%d' % port]
    runs = ends([start_script(checkout, 'train_performance_8p', *flags, '--node_rank=%d' % node)
                 for node in (0, 1)], 200)
    check_summary(checkout, 'train_performance_8p', runs[0], batch_size=4, devices=2)
    assert runs[1].status == 0, runs[1].out + runs[1].err
    assert 'Final result' not in runs[1].out and 'node 0' in runs[1].out
    assert sorted(os.listdir(output(checkout))) == [
        'beit_nano_patch8_32_bs4_2p_perf.log', 'train_0_perf.log', 'train_0_perf_node1.log']


def test_machines_that_do_not_see_the_same_checkpoints(tmp_path, image_folder):
    """Without a shared folder only node 0 has them; resuming there and starting from scratch elsewhere would hang."""
    machines = [copy_checkout(str(tmp_path / name)) for name in ('machine0', 'machine1')]
    flags = TINY + ['--data_path=' + image_folder(), '--epochs=2', '--maxstep=4', '--save_ckpt_freq=1', '--auto_resume']
    result(run_script(machines[0], 'train_full_1p', *flags, '--batch_size=8'))
    port = free_port()
    runs = ends([start_script(machine, 'train_full_8p', *flags, '--nnodes=2', '--nproc_per_node=1',
                              '--node_rank=%d' % node, '--master_addr=127.0.0.1', '--master_port=%d' % port)
                 for node, machine in enumerate(machines)])
    assert [run.status for run in runs] in ([2, 2], [2, 1], [1, 2]), runs
    told = [line for run in runs for line in (run.out + run.err).splitlines() if 'error: ' in line]
    assert any('the processes found different checkpoints' in line and 'give every machine the same files' in line
               for line in told), runs
    assert 'Traceback' not in ''.join(run.out + run.err for run in runs)


def test_pytorch_s_own_launcher(image_folder, tmp_path):
    """Under torchrun, whose c10d rendezvous gives the ranks; before PyTorch 1.10, under torch.distributed.launch."""
    port = free_port()
    if TORCHRUN:
        options = [['torch.distributed.run', '--rdzv_backend=c10d', '--rdzv_id=test',
                    '--rdzv_endpoint=127.0.0.1:%d' % port]] * 2
    else:
        options = [['torch.distributed.launch', '--use_env', '--master_addr=127.0.0.1', '--master_port=%d' % port,
                    '--node_rank=%d' % node] for node in (0, 1)]
    flags = RUN + ['--data_path=' + image_folder(), '--batch_size=2', '--epochs=1',
                   '--output_dir=' + str(tmp_path / 'o')]
    runs = ends([subprocess.Popen([python(), '-m'] + own + ['--nnodes=2', '--nproc_per_node=2',
                                  os.path.join(ROOT, 'run_class_finetuning.py')] + flags,
                                  env=environment(OMP_NUM_THREADS='1'), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, universal_newlines=True) for own in options], 200)
    assert [run.status for run in runs] == [0, 0], runs
    assert sum(run.out.count('Result: ') for run in runs) == 1
    assert '4 processes' in runs[0].out + runs[1].out
    assert len(lines_of(str(tmp_path / 'o'))) == 1


# ---- they don't meet

def one_error(run, *expected):
    """A user error; its line is all of standard error."""
    fails(run, *expected)
    assert len(run.err.splitlines()) == 1, run.err


def test_node_0_never_comes(image_folder):
    run, = ends([start_launcher('--data_path=' + image_folder(), node_rank=1, port=free_port(), DIST_WAIT_SECONDS='2',
                                **COLD)])  # else PyTorch, imported before the launcher silences it, prints more
    if TORCHRUN:
        one_error(run, 'run_class_finetuning.py: error: --master_addr 127.0.0.1 --master_port ',
                  'the machines did not meet within 2 s', 'start the program on each', 'address and port of node 0')
    else:
        one_error(run, 'the 2 processes did not find one another within 2 s')


@pytest.mark.parametrize('text', ['long', '0', '-3', '1.5'])
def test_a_waiting_time_that_is_not_a_number(monkeypatch, text):
    monkeypatch.setenv('DIST_WAIT_SECONDS', text)
    with pytest.raises(UserError, match='DIST_WAIT_SECONDS=%s in the environment is not a whole number' % text):
        process_group.wait_seconds(300)


# ---- one of them fails

@has_proc
@pytest.mark.parametrize('victim', ['process', 'launcher'])
def test_a_node_that_fails_ends_the_other(image_folder, tmp_path, victim):
    data, port, mark = '--data_path=' + image_folder(), free_port(), str(tmp_path)
    nodes = [start_launcher(data, *LONG, port=port, node_rank=rank, MARK=mark, **COLD) for rank in (0, 1)]
    try:
        assert any('Epoch: [2]' in line for line in nodes[0].stdout), nodes[0].stderr.read()
        pid = nodes[1].pid if victim == 'launcher' \
            else next(pid for pid, env in marked(mark).items() if env.get('RANK') == '1')
        os.kill(pid, signal.SIGKILL)
    finally:
        runs = ends(nodes)
    assert runs[0].status == 1
    assert re.match(r'run_class_finetuning.py: error: lost the connection to [^\n]*\n\Z',
                    runs[0].err), runs[0].err
    assert runs[1].status == (137 if victim == 'process' else -signal.SIGKILL)
    if victim == 'process':
        assert runs[1].err == 'process 1 ended with SIGKILL; the others were stopped\n'
    assert all_end(mark)


@has_proc
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_leaves_no_process(image_folder, tmp_path, number):
    """Under nohup it survives the end of its terminal."""
    node = start_launcher('--data_path=' + image_folder(), *LONG, nnodes=1, processes=2, prefix=['nohup'],
                          MARK=str(tmp_path), **COLD)
    try:
        assert any('Epoch: [2]' in line for line in node.stdout)
        node.send_signal(signal.SIGHUP)
        assert any('Epoch: [9]' in line for line in node.stdout)
        node.send_signal(number)
    finally:
        run, = ends([node])
    assert run.status == (143 if number == signal.SIGTERM else -number)
    assert all_end(str(tmp_path))


# ---- a process that dies while it starts

SITE = """import os, signal
moment = os.environ.get('DIES_AT') if os.environ.get('RANK') == '1' else None
if moment == 'import':
    os._exit(3)
elif moment:
    import torch.distributed
    join = torch.distributed.init_process_group
    def join_and_die(*args, **kwargs):
        if moment == 'after':
            join(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.init_process_group = join_and_die
"""


@pytest.fixture
def site(tmp_path):
    """A folder for PYTHONPATH whose sitecustomize.py kills one process at a chosen moment."""
    (tmp_path / 'sitecustomize.py').write_text(SITE)
    return str(tmp_path)


@has_proc
@pytest.mark.parametrize('nnodes, moment', [(1, 'import'), (1, 'before'), (1, 'after'), (2, 'before')])
def test_a_process_that_dies_while_it_starts(image_folder, site, nnodes, moment):
    """On one machine with two processes, and on two with one each: every process ends."""
    data, port = '--data_path=' + image_folder(), free_port()
    runs = ends([start_launcher(data, *LONG, '--dist_timeout=5', nnodes=nnodes, processes=2 // nnodes, node_rank=rank,
                                port=port, MARK=site, PYTHONPATH=site, DIES_AT=moment, DIST_WAIT_SECONDS='20')
                 for rank in range(nnodes)], 150)
    assert runs[-1].status == (3 if moment == 'import' else 137)
    lines = runs[-1].err.splitlines()
    assert lines[-1] == 'process 1 ended with %s; the others were stopped' \
        % ('exit status 3' if moment == 'import' else 'SIGKILL')
    if nnodes == 2:
        fails(runs[0], 'the 2 processes did not find one another')
        runs.pop(0)
    assert not re.search('Traceback|error: ', ''.join(run.err for run in runs))
    assert all_end(site)


# ---- ports and devices, through the scripts

def test_a_port_in_use(tmp_path, image_folder):
    checkout = copy_checkout(str(tmp_path / 'beit'))
    with socket.socket() as other:
        other.bind(('', 0))
        other.listen(1)
        port = other.getsockname()[1]
        run = run_script(checkout, 'train_full_8p', '--data_path=' + image_folder(), *TINY, '--nproc_per_node=2',
                         '--nnodes=2', '--master_addr=127.0.0.1', '--master_port=%d' % port)
    fails(run, '--master_port %d: address already in use; choose another' % port)


def test_more_processes_than_npus(emulator, tmp_path):
    """Each machine checks it after the rendezvous."""
    machines = [copy_checkout(str(tmp_path / name)) for name in ('machine0', 'machine1')]
    flags = ['--data_path=demo', '--device=npu', '--nproc_per_node=3']
    port, two = free_port(), emulator(FAKE_NPU_COUNT='2')
    runs = [run_script(machines[0], 'train_full_8p', *flags, **two)]
    runs += ends([start_script(machine, 'train_full_8p', *flags, '--nnodes=2', '--node_rank=%d' % node,
                               '--master_addr=127.0.0.1', '--master_port=%d' % port, **two)
                  for node, machine in enumerate(machines)], 200)
    for run in runs:
        fails(run, '--device npu: process 2 needs npu:2, but there are 2; lower --nproc_per_node')
