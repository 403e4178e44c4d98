"""benchmarks/benchmark.py: each sub-command runs from end to end on tiny settings; its arithmetic is right."""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
import torchvision

import modeling_finetune
from beit.data import fast_decode
from beit.errors import UserError
from helpers import ROOT, all_end, cannot_run, has_proc, marked, python

sys.path.append(os.path.join(ROOT, 'benchmarks'))
import benchmark
import contenders

pytestmark = pytest.mark.current_only

NANO = ['--model=beit_nano_patch8_32', '--batch_size=2', '--classes=10', '--device=cpu']
HAS_TIMM_BEIT = contenders.importlib.util.find_spec('timm.models.beit') is not None


@pytest.fixture
def bench(tmp_path, capfd, monkeypatch):
    """bench('step', …): run the benchmark in this process; gives (its JSON, what it printed)."""
    monkeypatch.setattr(sys, 'executable', python())
    monkeypatch.setenv('PYTHON', python())

    def run(*argv):
        path = tmp_path / 'figures.json'
        argv = list(argv)
        place = argv.index('--') if '--' in argv else len(argv)
        status = benchmark.main(argv[:place] + ['--json=%s' % path] + argv[place:])
        out, err = capfd.readouterr()
        assert status == 0, err
        return json.loads(path.read_text(encoding='utf-8')), out
    return run


def check_summary(figures, samples):
    assert len(figures['samples']) == samples and all(value > 0 for value in figures['samples'])
    assert figures['min'] <= figures['quartiles'][0] <= figures['median'] <= figures['quartiles'][1] <= figures['max']


# ---- statistics

def test_summary_of_known_numbers():
    found = benchmark.summary([5, 1, 4, 2, 3])
    assert (found['median'], found['min'], found['max'], found['quartiles']) == (3, 1, 5, [2, 4])
    assert benchmark.summary([7])['quartiles'] == [7, 7]


def test_ratios_are_of_neighbours():
    """The machine becomes twice as slow half-way: each pair gives 2, unlike the ratio of the medians."""
    left, right = [20, 20, 20, 10, 10.], [10, 10, 5, 5, 5.]
    assert benchmark.ratios(left, right)['samples'] == [2, 2, 4, 2, 2]
    assert benchmark.ratios(left, right)['median'] == 2
    assert benchmark.summary(left)['median'] / benchmark.summary(right)['median'] == 4


def test_contenders_take_turns():
    order = []

    def run(name, values):
        def one():
            order.append(name)
            return values.pop(0)
        return one

    assert benchmark.take_turns([run('a', [1, 2, 3]), run('b', [4, 5, 6])], 3) == [[1, 2, 3], [4, 5, 6]]
    assert ''.join(order) == 'abbaab'


@pytest.mark.parametrize('seconds, pairs', [(-1, 1), (2.5, 2), (3, 3), (100, 4)])
def test_no_round_starts_that_ends_too_late(seconds, pairs, monkeypatch):
    """A round takes a second of a clock that only the runs advance."""
    clock = [7.]
    monkeypatch.setattr(benchmark.time, 'monotonic', lambda: clock[0])

    def run():
        clock[0] += 0.5
        return 1
    assert [len(each) for each in benchmark.take_turns([run, run], 4, 7. + seconds)] == [pairs] * 2
    assert [len(each) for each in benchmark.take_turns([run, run], 4)] == [4, 4]


@has_proc
def test_the_time_of_other_programs_leaves_out_this_one_and_its_children():
    """A loop counts until it is waited for, which makes it a child of this process with known times."""
    before = benchmark.other_programs_seconds()
    with subprocess.Popen([sys.executable, '-c', 'import time\nwhile time.process_time() < 1: pass']) as loop:
        os.waitid(os.P_PID, loop.pid, os.WEXITED | os.WNOWAIT)
        running = benchmark.other_programs_seconds()
        loop.wait()
        after = benchmark.other_programs_seconds()
    assert running - before > 0.9 and running - after > 0.9


def test_table_in_markdown_and_in_text():
    head, rows = ['a', 'long head'], [[1, 'x'], [22, '']]
    assert benchmark.table(head, rows, markdown=True) == '| a | long head |\n| --- | --- |\n| 1 | x |\n| 22 |  |'
    assert benchmark.table(head, rows) == 'a   long head\n1   x\n22'


# ---- arithmetic

@pytest.mark.parametrize('name, size', [('beit_nano_patch8_32', 32), ('beit_base_patch16_224', 224),
                                        ('beit_large_patch16_384', 384)])
def test_flops_are_those_that_pytorch_counts(name, size):
    """On the meta device, without computing; timm's model makes the check of the formula independent."""
    if importlib.util.find_spec('torch.utils.flop_counter') is None:
        cannot_run('current', 'this PyTorch does not count operations')
    counter = importlib.import_module('torch.utils.flop_counter')
    if not HAS_TIMM_BEIT:
        cannot_run('current', 'this timm is too old to have a BEiT')
    setting = contenders.Setting(name, size, 2, 'cpu')
    with torch.device('meta'):
        model = contenders.timm_model(setting)
    images = torch.empty(2, 3, size, size, device='meta')
    with counter.FlopCounterMode(display=False) as counted:
        loss = model(images).sum()
    forward = counted.get_total_flops() / 2
    assert contenders.forward_flops(setting.architecture) == pytest.approx(forward, rel=0.02)
    for block in model.blocks:  # a fused kernel recomputes its scores in the backward pass, which doesn't count
        block.attn.fused_attn = False
    with counter.FlopCounterMode(display=False) as counted:
        loss = model(images).sum()
        loss.backward()
    assert 3 * contenders.forward_flops(setting.architecture) == pytest.approx(counted.get_total_flops() / 2, rel=0.02)


def test_peaks_by_device_name():
    assert contenders.peak_flops('NVIDIA H100 80GB HBM3') == contenders.peak_flops('NVIDIA H200') == 989e12
    assert contenders.peak_flops('NVIDIA H100 NVL') == contenders.peak_flops('NVIDIA H200 NVL') == 835e12
    assert contenders.peak_flops('NVIDIA A100-SXM4-80GB') == 312e12
    assert contenders.peak_flops('Ascend910B1') is None


# ---- the contenders

def test_timms_model_is_timms_though_ours_took_its_name(caplog):
    if not HAS_TIMM_BEIT:
        cannot_run('current', 'this timm is too old to have a BEiT')
    for name in ('beit_nano_patch8_32', 'beit_base_patch16_224'):
        with torch.device('meta'):
            model = contenders.timm_model(contenders.Setting(name, 32, 2, 'cpu', classes=5))
            ours = contenders.program.inference_model.build_model(
                contenders.program.build_parser().parse_args(['--model=' + name, '--input_size=32']), 5)
        assert type(model).__module__ == 'timm.models.beit'
        assert type(ours).__module__ == 'modeling_finetune'
        assert contenders.program.count_parameters(model) == contenders.program.count_parameters(ours)
    assert [each.message for each in caplog.records if each.name == 'timm.models._builder'] == []  # needless warnings


@pytest.mark.parametrize('kind', ['ours', 'timm', 'reference'])
def test_a_contender_trains(kind):
    """It takes the requested steps, and each changes the weights."""
    if kind == 'timm' and not HAS_TIMM_BEIT:
        cannot_run('current', 'this timm is too old to have a BEiT')
    setting = contenders.Setting('beit_nano_patch8_32', 32, 2, 'cpu', classes=10)
    contender = contenders.CONTENDERS[kind](setting, contenders.Mode('float32'))
    model = contender.training['model'] if kind == 'ours' else contender.model
    optimizer = contender.training['optimizer'] if kind == 'ours' else contender.optimizer
    before = [parameter.detach().clone() for parameter in model.parameters()]
    contender.train(3)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    assert {int(state['step']) for state in optimizer.state.values()} == {3}
    assert len({group['lr'] for group in optimizer.param_groups}) == 6  # layer decay: embeddings, 4 blocks, the rest


def test_our_contender_is_what_main_builds_from_the_flags():
    setting = contenders.Setting('beit_nano_patch8_32', 32, 2, 'cpu', classes=10, extra=('--opt=sgd', '--clip_grad=7'))
    ours = contenders.Ours(setting, contenders.Mode('float32'))
    assert isinstance(ours.training['optimizer'], torch.optim.SGD)
    assert len(ours.training['lr_schedule_values']) == contenders.UPDATES
    assert ours.training['max_norm'] == 7 and ours.training['monitor'] is not None


# ---- the sub-commands

def test_step(bench):
    report, out = bench('step', '--precision', 'float32', 'float16', '--pairs=2', '--steps=1', '--warmup=1',
                        '--peak=1e12', *NANO, '--', '--attention=plain')
    assert report['benchmark'] == 'step' and report['peak_flops'] == 1e12
    assert report['command'][-2:] == ['--', '--attention=plain'] and report['extra_flags'] == ['--attention=plain']
    assert set(report['versions']) == {'python', 'torch', 'torchvision', 'timm'}
    assert set(report['hardware']) == {'device', 'device_type', 'cpu', 'cores', 'threads'}
    rows = report['rows']
    assert [row['name'] for row in rows] == (['same mode', 'same mode'] + ['fastest of each'] * HAS_TIMM_BEIT
                                             + ['reference'])
    for row in rows[:1] + rows[2:]:
        check_summary(row['ours']['images_per_second'], 2)
        assert row['ours']['warmup_seconds'] > 0
        assert row['ours']['flops_per_second'] == pytest.approx(
            3 * contenders.forward_flops(modeling_finetune.MODELS['beit_nano_patch8_32'], 10)
            * row['ours']['images_per_second']['median'])
        if row['name'] == 'reference' or HAS_TIMM_BEIT:
            check_summary(row['ratio'], 2)
            assert row['ratio']['samples'] == [pytest.approx(a / b) for a, b in zip(
                row['ours']['images_per_second']['samples'], row['other']['images_per_second']['samples'])]
        else:
            assert 'has no BEiT' in row['other']['not_available'] and 'ratio' not in row
    assert 'float16' in rows[1]['ours']['not_available'] and 'ratio' not in rows[1]
    assert 'n/a: --amp_dtype float16' in out and 'Fewer than 5 pairs' in out


def test_a_contender_that_dies_in_a_sample_keeps_the_other_rows(bench, monkeypatch):
    """Our first process is killed after its warm-up, as if memory ran out."""
    rate, killed = benchmark.Apart.rate, []

    def dies(entry, *arguments):
        if entry.record['contender'] == 'ours' and not killed:
            killed.append(entry)
            entry.process.kill()
        return rate(entry, *arguments)

    monkeypatch.setattr(benchmark.Apart, 'rate', dies)
    report, out = bench('step', '--precision', 'float32', '--pairs=2', '--steps=1', '--warmup=1', *NANO)
    dead, *rest = report['rows']
    assert dead['ours']['not_available'] == 'its process ended with status -9' and 'ratio' not in dead
    assert 'images_per_second' in rest[-1]['ours'] and 'n/a: its process ended with status -9' in out


def test_memory_is_that_of_the_contender_alone():
    """This process has had more, which its child must not count."""
    if benchmark.peak_resident_mib() is None:
        cannot_run('linux', 'this system does not tell the peak of a process')
    more = torch.ones(2 ** 28)  # 1 GiB
    assert benchmark.peak_resident_mib() > 1024
    del more
    setting = contenders.Setting('beit_nano_patch8_32', 32, 2, 'cpu', classes=10)
    entry = benchmark.Apart('reference', setting, contenders.Mode('float32'), 'train', 1, torch.device('cpu'))
    try:
        assert 50 < entry.record['peak_memory_mib'] < 1000 and entry.rate(1) > 0
        entry.process.kill()
        entry.process.wait()  # its end of the pipe is closed
        with pytest.raises(UserError, match='reference float32: its process ended with status -9'):
            entry.rate(1)
    finally:
        entry.end()


def test_eval(bench):
    report, out = bench('eval', '--precision=float32', '--pairs=2', '--steps=1', '--warmup=1',
                        '--markdown', '--against=reference', *NANO)
    row, = report['rows']
    assert report['flops_per_image'] == contenders.forward_flops(modeling_finetune.MODELS['beit_nano_patch8_32'], 10)
    check_summary(row['ratio'], 2)
    assert '| float32 | reference float32 |' in out


def test_data(bench):
    report, out = bench('data', '--pairs=2', '--images=4', '--batch_size=2', '--distinct=3', '--warmup=1',
                        '--input_size=64', '--device=cpu')
    assert 40e3 < report['mean_file_bytes'] < 250e3
    missing = set()
    try:
        fast_decode.check_available()
    except benchmark.UserError:
        missing = {'fast', 'fast, workers alone'}
    assert [row['backend'] for row in report['rows']] == ['exact', 'fast', 'exact, workers alone',
                                                          'fast, workers alone']
    assert {row['backend'] for row in report['rows'] if 'not_available' in row} == missing
    for row in report['rows']:
        for name in ('ours', 'timm', 'baseline', 'ratio', 'baseline_ratio') if row['backend'] not in missing else ():
            check_summary(row[name], 2)
    assert 'images/s per worker' in out


@pytest.mark.parametrize('enough_time', [True, False])
def test_without_a_command_one_table(enough_time, monkeypatch, capfd):
    """It has the rates and ratios of the commands' reports; without time left, only the first rows are measured."""
    monkeypatch.setattr(sys, 'executable', python())
    tiny = {'step': NANO, 'data': ['--device=cpu', '--images=4', '--batch_size=2', '--distinct=3', '--input_size=64']}
    parts = [(flags + tiny[flags[0]], other) for flags, other in benchmark.overview_parts(torch.device('cpu'))]
    monkeypatch.setattr(benchmark, 'overview_parts', lambda _: parts)
    monkeypatch.setattr(benchmark, 'OVERVIEW_PAIRS', 2)
    reports, add_row = [], benchmark.add_row
    monkeypatch.setattr(benchmark, 'add_row', lambda options, report, row: reports.append(row) or add_row(
        options, report, row))
    others = iter([10., 10. + 1000.])
    monkeypatch.setattr(benchmark, 'other_programs_seconds', lambda: next(others))
    monkeypatch.setattr(benchmark, 'BEGIN', time.monotonic() + (0 if enough_time else -1000))
    assert benchmark.main([]) == 0
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if 'images/s' in line or 'n/a' in line]
    assert len(reports) == (6 if enough_time else 2) and out.count('times as fast') == 1
    for line, row in zip(lines, reports):
        if 'ratio' in row:
            pairs = 2 if enough_time else 1
            check_summary(row['ratio'], pairs)
            ratio = row['ratio']
            assert line.split()[-5:] == ['%.2f' % ratio['median'], '%.2f' % ratio['min'], 'to', '%.2f' % ratio['max'],
                                         str(pairs)]
    assert [line.partition('  ')[0] for line in lines] == ['training, float32', 'evaluation, float32'] + (
        ['training, bfloat16 autocast', 'evaluation, bfloat16 autocast', 'loading JPEG files, exact',
         'loading JPEG files, fast'] if enough_time else ['training, bfloat16', 'loading'])
    assert 'The machine was busy: other programs had ' in out
    assert {'step', 'eval', 'checkpoint', 'data', 'startup', 'script', 'scaling'} <= set(
        benchmark.build_parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize('damage, words', [
    pytest.param('class000/.hidden', 'Found no valid file for the classes .hidden', marks=pytest.mark.needs(
        'current', hasattr(torchvision.datasets.folder, 'find_classes'), 'this torchvision allows empty classes')),
    ('class001/000001.jpg', 'cannot identify image file')])
def test_a_folder_that_the_baseline_cannot_read(tmp_path, damage, words, capfd):
    """Ours skips hidden folders and, with a flag, damaged files; torchvision raises an error."""
    benchmark.make_photographs(str(tmp_path), 12, 2, classes=2)
    path = tmp_path / 'train' / damage
    if 'hidden' in damage:
        path = tmp_path / 'train' / '.hidden'
        path.mkdir()
    else:
        path.unlink()
        path.write_bytes(b'junk')
    assert benchmark.main(['data', '--device=cpu', '--data_path=%s' % tmp_path, '--images=10', '--batch_size=2',  # all
                           '--warmup=1', '--input_size=64', '--pairs=1', '--', '--bad_images=skip']) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if 'error: ' in line]
    assert len(lines) == 1 and 'a baseline cannot read it' in lines[0] and words in lines[0]


@pytest.mark.parametrize('workers, images, expected', [
    (1, 512, (2, 8)), (1, 3, (2, 1)), (3, 512, (2, 4)), (2, 640, (2, 5))])
def test_all_workers_deliver_equally_many_batches(workers, images, expected):
    """In each round all workers deliver; the images determine the number of batches."""
    options = benchmark.build_parser().parse_args(['data', '--workers=%d' % workers, '--images=%d' % images])
    assert benchmark.rounds(options) == expected


def test_made_photographs_are_the_same_each_time(tmp_path):
    for name in ('a', 'b'):
        benchmark.make_photographs(str(tmp_path / name), 4, 2, classes=2)
    paths = sorted(path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a' / 'train').glob('*/*.jpg'))
    assert [str(path.parent.name) for path in paths] == ['class000', 'class000', 'class001', 'class001']
    assert all((tmp_path / 'a' / path).read_bytes() == (tmp_path / 'b' / path).read_bytes() for path in paths)


def test_startup(bench):
    report, _ = bench('startup', '--files=20', '--pairs=1', '--device=cpu')
    assert [row['what'] for row in report['rows']] == ['data set', 'to first step']
    for row in report['rows']:
        check_summary(row['seconds'], 1)
    data_set = report['rows'][0]
    assert data_set['ratio']['samples'] == [pytest.approx(data_set['image_folder_seconds']['samples'][0]
                                                          / data_set['seconds']['samples'][0])]


def test_a_tree_has_all_its_files(tmp_path):
    benchmark.make_tree(str(tmp_path / 'tree'), 250)
    assert [len(list(folder.iterdir())) for folder in sorted((tmp_path / 'tree').iterdir())] == [100, 100, 50]


def test_script(bench):
    """The script's figure from JPEG files beside the step's."""
    report, out = bench('script', '--pairs=1', '--steps=7', '--workers=1', '--input_size=48', *NANO)
    row, = report['rows']
    assert row['ratio']['median'] == pytest.approx(row['script']['median'] / row['step']['median'])
    log = os.path.join(ROOT, 'test', 'output', '0', 'train_0_perf.log')
    with open(log, encoding='utf-8') as file:
        assert 'images_per_second %.2f ' % row['script']['median'] in file.read()
    assert 'waited for data' in row['limits'][0] and row['limits'][0].partition(';')[0] in out


def test_scaling(bench):
    report, _ = bench('scaling', '--processes=2', '--pairs=1', '--steps=1', '--warmup=1', *NANO)
    one, two = report['rows']
    assert (one['processes'], two['processes']) == (1, 2) and one['efficiency']['median'] == 1
    check_summary(two['images_per_second'], 1)
    assert two['efficiency']['median'] == pytest.approx(  # on a CPU they share the cores
        two['images_per_second']['median'] / one['images_per_second']['median'])


def test_a_process_that_fails_ends_the_others():
    """They would wait minutes for it at the rendezvous."""
    setting = contenders.Setting('beit_nano_patch8_32', 32, 2, 'cpu', extra=('--opt=adamv',))
    order = dict(setting=setting._asdict(), mode=['float32', False], warmup=1, steps=1, samples=1)
    with pytest.raises(benchmark.UserError, match='process [01] of 2 failed: --opt: unknown value .adamv.'):
        benchmark.run_processes(2, order, 1)


def test_a_signal_removes_temporary_files(tmp_path):
    with subprocess.Popen([sys.executable, os.path.join(ROOT, 'benchmarks', 'benchmark.py'), 'data', '--device=cpu',
                           '--distinct=5000'], stderr=subprocess.PIPE, universal_newlines=True,
                          env=dict(os.environ, TMPDIR=str(tmp_path))) as run:
        assert 'making' in next(line for line in run.stderr if 'making' in line)
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob('*.jpg')) and time.monotonic() < deadline:
            time.sleep(0.05)
        made = len(list(tmp_path.rglob('*.jpg')))
        run.terminate()
    assert made and run.returncode == 143
    assert list(tmp_path.rglob('*.jpg')) == []


@has_proc
@pytest.mark.parametrize('argv, working', [
    (['step', '--precision=float32', '--warmup=1000000', '--against=reference', *NANO], '_entry'),
    (['script', '--pairs=1', '--steps=400', '--workers=1', '--input_size=48', *NANO], 'run_class_finetuning.py')])
def test_a_signal_ends_child_processes(tmp_path, argv, working):
    """In other processes: a warm-up of hours, and a script that trains."""
    def works(pid):  # PyTorch and more is loaded
        with contextlib.suppress(OSError):
            command = pathlib.Path('/proc/%d/cmdline' % pid).read_bytes().decode().split('\0')
            resident = int(pathlib.Path('/proc/%d/statm' % pid).read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
            return working in command and resident > 2 ** 27

    with subprocess.Popen([sys.executable, os.path.join(ROOT, 'benchmarks', 'benchmark.py'), *argv],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          env=dict(os.environ, TMPDIR=str(tmp_path), MARK=str(tmp_path))) as run:
        deadline = time.monotonic() + 120
        while not any(works(pid) for pid in marked(str(tmp_path))):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        run.terminate()
        assert run.wait(timeout=60) == 143
    assert all_end(str(tmp_path), seconds=2)
    assert os.listdir(str(tmp_path)) == []


# ---- mistakes

@pytest.mark.parametrize('argv, words', [
    (['step', '--batch_sise=2'], 'did you mean --batch_size?'),
    (['step', '--precision=float8'], 'float8'),
    (['step', '--model=beit_bass_patch16_224'], 'did you mean beit_base_patch16_224'),
    (['step', '--device=cpu', '--', '--attention=fussed'], 'fussed'),
    (['step', '--device=cpu', '--', '--amp'], '--amp after --'),
    (['scaling', '--device=cpu', '--', '--update-freq', '2'], '--update-freq after --'),
    (['data', '--', '--batch_size=3'], '--batch_size=3 after --'),
    (['data', '--input_size=32'], '--input_size: must be at least 33'),
    (['data', '--data_path=/nowhere/at all'], 'no such file or folder'),
    (['step', '--json=/nowhere/at all/figures.json'], 'cannot be written'),
    (['scaling', '--device=tpu'], '--device must be'),
    (['--pairs=2'], '--pairs=2: name what to measure first: step, eval, '), (['--all', 'step'], '--all'),
])
def test_a_mistake_is_one_line_and_status_2(argv, words, capfd):
    assert benchmark.main(argv) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if 'error' in line]
    assert out == '' and len(lines) == 1 and lines[0].startswith('benchmark.py: error: ') and words in lines[0]


def test_the_exit_status_is_that_of_the_program():
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'benchmarks', 'benchmark.py'), 'step', '--workers=3'],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.splitlines() == [
        'benchmark.py: error: --workers=3: unknown flag of step; see step --help']


# ---- checkpoint

def test_checkpoints_are_saved_and_read(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files
    report, out = bench('checkpoint', '--pairs=2', '--steps=2', '--warmup=1', *NANO)
    twice, reading, memory = report['rows'][1:]
    for row in (twice, reading):
        for side in ('ours', 'other'):
            check_summary(row[side], 2)
    assert report['rows'][0]['what'] == 'one save in 2 steps, s' and len(report['rows'][0]['ours']['samples']) == 2
    assert report['waits']['min'] > 0 and report['file_mib'] > 1
    assert 'reading, s' in out and not [name for name in os.listdir(str(tmp_path)) if name != 'figures.json']


def test_both_contenders_write_the_same_weights(tmp_path):
    files = []
    for kind in ('checkpoints', 'torch.save'):
        setting = contenders.Setting('beit_nano_patch8_32', 32, 2, 'cpu', 10, ('--output_dir=%s' % (tmp_path / kind),))
        contender = contenders.CONTENDERS[kind](setting, contenders.Mode('float32'))
        contender.save(2)
        contender.save_twice(1)
        files.append(torch.load(contender.path, weights_only=True))
        names = set(os.listdir(str(tmp_path / kind)))
        assert {'checkpoint-best.pth', 'checkpoint-0-step1.pth', 'checkpoint-0-step2.pth'} <= names
        assert len(contender.figures['waits']) == 2
    ours, theirs = files
    assert {name: value.shape for name, value in ours['model'].items()} == \
        {name: value.shape for name, value in theirs['model'].items()}
    assert len(ours['optimizer']['state']) == len(theirs['optimizer']['state']) > 10
