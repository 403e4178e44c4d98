"""benchmarks/check_device.py: on the CPU, on the emulated NPU with each of its faults, and with a fault in sections."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys

import check_device
import pytest
import torch

import optim_factory
from beit.devices import kernels
from beit.files import weights_file
from beit.training import fused_attention, loss_scaler
from helpers import ROOT, cannot_run, copy_checkout, python, run_script

pytestmark = pytest.mark.current_only

SCRIPT = os.path.join(ROOT, 'benchmarks', 'check_device.py')
TINY = ['--size=tiny', '--sections']
ROW = {'section': str, 'name': str, 'status': str, 'figure': str, 'detail': str, 'seconds': (int, float)}
REPORT = {'format': int, 'date': str, 'command': list, 'emulated': bool, 'environment': dict, 'sizes': dict,
          'rows': list, 'seconds': (int, float), 'passed': int, 'failed': int, 'not_available': int}
ENVIRONMENT = {'device', 'device_type', 'devices', 'driver', 'cann', 'cuda', 'cudnn', 'tf32_convolutions', 'torch_npu',
               'apex', 'versions', 'cpu', 'cores', 'threads', 'memory_gib', 'saturates'}


def read_report(folder, status):
    """{(section, name): row} of a report, after a check of its fields and its page."""
    with open(os.path.join(str(folder), 'device_report.json'), encoding='utf-8') as file:
        report = json.load(file)
    assert set(report) == set(REPORT) and all(isinstance(report[key], kind) for key, kind in REPORT.items())
    assert set(report['environment']) == ENVIRONMENT
    for row in report['rows']:
        assert set(row) == set(ROW) and all(isinstance(row[key], kind) for key, kind in ROW.items()), row
        assert row['status'] in ('PASS', 'FAIL', 'not available') and row['section'] in check_device.SECTIONS
        assert row['figure'] or row['detail'] and '\n' not in row['detail'], row
    counts = [sum(row['status'] == each for row in report['rows']) for each in ('PASS', 'FAIL', 'not available')]
    assert [report['passed'], report['failed'], report['not_available']] == counts
    assert status == (1 if report['failed'] else 0)
    with open(os.path.join(str(folder), 'device_report.html'), encoding='utf-8') as file:
        page = file.read()
    assert page.count('<tr><td') == len(report['rows']) and '<script' not in page
    return report, {(row['section'], row['name']): row for row in report['rows']}


@pytest.fixture
def on_cpu(tmp_path, monkeypatch, capfd):
    """on_cpu('attention', …): (exit status, rows, what it prints) of these sections in this process."""
    monkeypatch.setattr(sys, 'executable', python())

    def run(*sections):
        status = check_device.main(['--device=cpu', '--output_dir=%s' % tmp_path] + TINY + list(sections))
        return status, read_report(tmp_path, status)[1], capfd.readouterr().out
    return run


@pytest.fixture
def on_npu(tmp_path, emulator):
    """on_npu('attention', …, apex=…, VARIABLE=…): (report, rows, what it prints) on the emulated NPU."""
    def run(*sections, apex=None, **env):
        done = subprocess.run([python(), SCRIPT, '--device=npu', '--output_dir=%s' % tmp_path] + TINY + list(sections),
                              env=dict(os.environ, **emulator(apex, **env)), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
        assert done.returncode in (0, 1) and 'Traceback' not in done.stdout + done.stderr, done.stderr
        return read_report(tmp_path, done.returncode) + (done.stdout,)
    return run


def statuses(rows, section):
    return {name: row['status'] for (each, name), row in rows.items() if each == section}


# ---- a CPU

def test_a_cpu_passes(on_cpu):
    status, rows, out = on_cpu('environment', 'attention', 'trajectory', 'half', 'overflow', 'optimizer', 'checkpoint',
                               'files')
    assert status == 0
    assert statuses(rows, 'attention')['plain'] == statuses(rows, 'trajectory')['recorded training'] == 'PASS'
    half = statuses(rows, 'half')
    assert half['O1 bfloat16 by PyTorch'] == ('PASS' if hasattr(torch, 'autocast') else 'not available')
    assert len(half) == 6 and half['O1 float16 by PyTorch'] == half['O2 float16 by apex'] == 'not available'
    assert statuses(rows, 'optimizer')['adamw'] == statuses(rows, 'files')['save and load'] == 'PASS'
    assert len(list(itertools.groupby(section for section, _ in rows))) == 8  # a section's rows stand together
    assert re.search(r'^attention +plain +PASS +float32 ', out, re.M) and ' 0 FAIL, ' in out


@pytest.mark.soak
def test_every_section_runs_on_a_cpu(on_cpu):
    status, rows, _ = on_cpu(*check_device.SECTIONS)
    assert status == 0 and {section for section, _ in rows} == set(check_device.SECTIONS)
    assert statuses(rows, 'devices') == {'all devices against one': 'PASS'}
    assert statuses(rows, 'step')['float32'] == statuses(rows, 'loader')['fast'] == 'PASS'
    assert statuses(rows, 'compile')['compiled'] == 'PASS'


def test_a_table_of_a_failed_section_ends_with_its_reason(on_cpu, monkeypatch):
    def broken(check):
        raise RuntimeError('the kernel\nstopped')

    monkeypatch.setattr(check_device, 'attention_used', broken)
    status, rows, out = on_cpu('attention')
    assert status == 1 and statuses(rows, 'attention')['used'] == 'FAIL'
    assert 'FAIL attention, used: RuntimeError: the kernel stopped\n' in out


@pytest.fixture
def cpu_check(tmp_path):
    return check_device.Check('cpu', 'tiny', str(tmp_path))


def test_a_small_model_agrees_with_float64(cpu_check):
    for dtype in check_device.DTYPES:
        if cpu_check.half_problem(dtype):
            continue
        status, figure, detail = check_device.numerics(cpu_check, 'small', dtype)
        assert status == 'PASS' and re.match(
            r'logits [\d.e-]+ \(limit [\d.e-]+\), gradients [\d.e-]+ \([\d.e-]+\), \d+ blocks$', figure), figure
        assert 'farthest' in detail


def test_a_speed_names_its_sample(cpu_check, monkeypatch):
    rate = {'images_per_second': {'median': 0.09}, 'flops_per_second': 1.}
    monkeypatch.setattr(check_device.benchmark, 'measure_rows',
                        lambda *_: [{'ours': rate, 'other': rate, 'steps_per_sample': 1}])
    assert check_device.step_rate(cpu_check, 'float32')[1].startswith('0.09 images/s in 1 step, timm 0.09, ')


def lose_the_bias(monkeypatch):
    def choose(model, *arguments):
        for block in model.blocks:
            block.attn.fused = lambda q, k, v, bias, scale: check_device.modeling_finetune.plain_attention(
                q, k, v, bias * 0., scale)
    monkeypatch.setattr(fused_attention, 'choose_attention', choose)


def ignore_the_layer_decay(monkeypatch):
    create = optim_factory.create_optimizer
    monkeypatch.setattr(optim_factory, 'create_optimizer', lambda model, **settings: create(
        model, **dict(settings, layer_decay=1.)))


def never_skip(monkeypatch):
    monkeypatch.setattr(loss_scaler.LossScaler, 'count', lambda self, skipped: False)


def step_too_far(monkeypatch):
    monkeypatch.setattr(kernels, 'build_optimizer', lambda cls, groups, **settings: cls(
        groups, **dict(settings, lr=1.001 * settings['lr'])))


def round_the_file(monkeypatch):
    load = weights_file.load_weights_file

    def rounded(path):
        content = load(path)
        return dict(content, model={name: value.half().float() if value.is_floating_point() else value
                                    for name, value in content['model'].items()})
    monkeypatch.setattr(weights_file, 'load_weights_file', rounded)


def keep_it_on_the_device(monkeypatch):
    load = weights_file.load_weights_file
    monkeypatch.setattr(weights_file, 'load_weights_file', lambda path: dict(
        load(path), optimizer={'state': {0: {'exp_avg': torch.zeros(1, device='meta')}}}))


FAULTS = [(lose_the_bias, check_device.numerics, ('small', 'float32')),
          (lose_the_bias, check_device.numerics, ('small', 'bfloat16')),
          (ignore_the_layer_decay, check_device.golden, ()), (never_skip, check_device.overflow_is_skipped, ()),
          (step_too_far, check_device.optimizer, ('adamw',)), (round_the_file, check_device.checkpoint, ()),
          (keep_it_on_the_device, check_device.checkpoint, ())]


@pytest.mark.parametrize('fault, section, arguments', FAULTS, ids=lambda value: getattr(value, '__name__', ''))
def test_a_fault_is_found(cpu_check, monkeypatch, fault, section, arguments):
    status, _, detail = check_device.run_row(cpu_check, section, arguments)
    if status == 'not available':
        cannot_run('current', 'this PyTorch lacks it: ' + detail)
    assert status == 'PASS'
    fault(monkeypatch)
    assert check_device.run_row(cpu_check, section, arguments)[0] == 'FAIL'


@pytest.mark.parametrize('figures, expected', [
    ([1., 2.], 'PASS'), ([1., 2.0001], 'FAIL')])
def test_devices_that_disagree_are_found(cpu_check, monkeypatch, figures, expected):
    """With recorded figures of the processes."""
    images = [4 * 2 + leftover for leftover in check_device.LEFTOVERS]

    def run_processes(count, order, *others):
        torch.save({'weight': torch.ones(1)}, order['path'])
        return dict(losses=figures if count == 2 else [1., 2.], evaluations=[[each, 50., 1.] for each in images])

    monkeypatch.setattr(check_device.benchmark, 'run_processes', run_processes)
    assert check_device.several_devices(cpu_check)[0] == expected


# ---- the emulated NPU

def test_the_emulated_npu_passes_and_is_called_emulated(on_npu):
    report, rows, out = on_npu('environment', 'attention', 'trajectory', 'overflow', 'optimizer', 'checkpoint',
                               apex='ascend')
    assert report['failed'] == 0 and report['emulated'] and 'EMULATED' in out
    assert statuses(rows, 'attention') == dict.fromkeys(
        ['plain', 'scaled_dot_product_attention', 'npu_fusion_attention', 'used'], 'PASS')
    assert statuses(rows, 'overflow') == {'overflow skipped by %s' % by: 'PASS' for by in ('PyTorch', 'apex')}
    assert statuses(rows, 'optimizer')['npufusedadamw'] == 'PASS'
    assert rows['attention', 'used']['figure'].startswith('fused: ')


@pytest.mark.soak
def test_every_section_runs_on_the_emulated_npu(on_npu):
    report, rows, _ = on_npu(*check_device.SECTIONS, apex='ascend', FAKE_NPU_COUNT='2')
    assert report['failed'] == 0 and statuses(rows, 'devices') == {'all devices against one': 'PASS'}
    assert set(statuses(rows, 'half').values()) == {'PASS'}
    assert statuses(rows, 'compile') == {'compiled': 'not available'}


def test_a_chosen_attention_that_computes_wrongly_is_found(cpu_check, monkeypatch):
    assert check_device.attention_used(cpu_check)[0] == 'PASS'

    def choose(model, *arguments):
        for block in model.blocks:
            block.attn.fused = lambda q, k, v, bias, scale: check_device.modeling_finetune.plain_attention(
                q, k, v, bias * 0., scale)
        return 'fused, as chosen'
    monkeypatch.setattr(fused_attention, 'choose_attention', choose)
    assert check_device.attention_used(cpu_check)[0] == 'FAIL'


@pytest.mark.parametrize('fault', ['drop_bias', 'scale_bias'])
def test_an_attention_that_treats_the_bias_wrongly_is_found(on_npu, fault):
    _, rows, out = on_npu('attention', FAKE_NPU_SDPA=fault)
    assert statuses(rows, 'attention') == {
        'plain': 'PASS', 'scaled_dot_product_attention': 'FAIL', 'npu_fusion_attention': 'FAIL', 'used': 'PASS'}
    assert rows['attention', 'used']['figure'].startswith('plain: ')
    for name in ('scaled_dot_product_attention', 'npu_fusion_attention'):
        assert re.search('FAIL attention, %s: float32: the gradient of the bias table ' % name, out)


@pytest.mark.parametrize('env, reason', [
    ({'FAKE_NPU_CANN': 'missing'}, 'CANN is not set up'), ({'FAKE_NPU_CANN': '7.0'}, 'cannot be started'),
    ({'FAKE_NPU_COUNT': '0'}, 'sees no NPU')])
def test_a_device_that_cannot_be_used_is_reported(on_npu, env, reason):
    report, rows, _ = on_npu('environment', 'attention', **env)
    assert statuses(rows, 'environment') == {'environment': 'FAIL'} and reason in rows[
        'environment', 'environment']['detail']
    assert set(statuses(rows, 'attention').values()) == {'not available'} and report['environment']['device'] is None


def test_a_910a_saturates_and_has_no_bfloat16(on_npu):
    report, rows, _ = on_npu('environment', 'half', 'overflow', FAKE_NPU_SOC='910A')
    assert report['failed'] == 0 and report['environment']['saturates']
    assert 'saturates' in rows['overflow', 'overflow skipped by PyTorch']['detail']
    assert rows['half', 'O2 float16 by PyTorch']['status'] == 'PASS'
    assert rows['half', 'O2 bfloat16 by PyTorch']['status'] == 'not available'
    assert '910A' in rows['half', 'O2 bfloat16 by PyTorch']['detail']


# ---- the script

def test_the_script_writes_its_report_where_it_was_called(tmp_path):
    checkout = copy_checkout(str(tmp_path / 'my code' / 'beit'))
    run = run_script(checkout, 'check_device', '--device=cpu', '--sections', 'environment', where='test')
    assert run.status == 0 and 'PASS' in run.out, run.err
    read_report(os.path.join(checkout, 'test'), run.status)


@pytest.mark.parametrize('flags, words', [
    (['--device=tpu'], '--device must be auto'), (['--output_dir=/proc/none'], '--output_dir /proc/none'),
    (['--section=step'], 'did you mean --sections'), (['--mistyped=3'], 'see --help')])
def test_a_wrong_flag_is_one_line(flags, words, capfd):
    assert check_device.main(flags) == 2
    err = capfd.readouterr().err
    assert err.startswith('check_device.py: error: ') and words in err and err.count('\n') == 1


def test_a_wrong_flag_comes_before_the_import_of_pytorch():
    done = subprocess.run([python(), '-X', 'importtime', SCRIPT, '--mistyped=3'], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 2 and not re.search(r'^import time:.* (torch|numpy|PIL)$', done.stderr, re.M)


def test_the_script_refuses_flags_before_it_looks_for_packages():
    bare = os.path.realpath(os.path.join(sys.base_prefix, 'bin', 'python3'))
    done = subprocess.run(['bash', os.path.join(ROOT, 'test', 'check_device.sh'), '--sections=foo'],
                          env=dict(os.environ, PYTHON=bare), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 2 and done.stderr.startswith('check_device.py: error: --sections: '), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupted_check_says_so(tmp_path):
    with subprocess.Popen([python(), SCRIPT, '--device=cpu', '--output_dir=%s' % tmp_path] + TINY + [
            'environment', 'numerics', 'trajectory'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            universal_newlines=True) as check:
        assert any('environment' in line for line in check.stderr)
        check.send_signal(signal.SIGINT)
        assert 'interrupted by SIGINT; device_report.json has the rows above' in check.stderr.read()
    assert check.returncode == 130 and json.loads((tmp_path / 'device_report.json').read_text(encoding='utf-8'))['rows']
