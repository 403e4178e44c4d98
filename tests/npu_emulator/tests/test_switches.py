"""The environment switches and the build, each in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch_npu import _build

HERE = Path(__file__).parent


def start(*command, **environment):
    environment = {**os.environ, 'PYTHONPATH': str(HERE.parent), **environment}
    return subprocess.Popen([sys.executable, *command], env=environment, encoding='utf-8', cwd=HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*command, **environment):
    """Its exit status, standard output and standard error."""
    process = start(*command, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out.strip(), err.strip()


def last_line(code, **environment):
    """The last line of a failed program."""
    status, _, err = run('-c', code, **environment)
    assert status == 1
    return err.splitlines()[-1]


def test_910a():
    status, out, err = run('-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'cases_910a.py', FAKE_NPU_SOC='910A')
    assert status == 0 and 'passed' in out and 'skipped' not in out, out + err


def test_910b(recwarn):
    assert torch.npu.is_bf16_supported() and torch.npu.utils.is_support_inf_nan() and torch.npu._compile_mode is False
    assert (torch.ones(1, device='npu') / 0).tolist() == [float('inf')]
    with pytest.raises(RuntimeError, match='please use npu_check_overflow'):
        torch.npu.get_npu_overflow_flag()
    torch.npu.clear_npu_overflow_flag()
    assert 'clear_npu_overflow_flag is useless' in str(recwarn.pop(UserWarning).message)
    check = torch.npu.utils.npu_check_overflow
    assert check(torch.ones(1, device='npu') / 0) and not check(torch.ones(1, device='npu')) and check(float('nan'))


def test_options():
    before = torch.npu._compile_mode
    torch.npu.set_compile_mode(jit_compile=True)
    assert torch.npu._compile_mode is True and not torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=before)
    torch.npu.set_option({'ACL_PRECISION_MODE': 'must_keep_origin_dtype'})
    assert torch.npu._options['ACL_PRECISION_MODE'] == 'must_keep_origin_dtype'
    with pytest.raises(TypeError):
        torch.npu.set_option('ACL_PRECISION_MODE')


def test_no_cuda():
    assert not torch.cuda.is_available()
    for call in (lambda: torch.ones(1, device='npu').cuda(), lambda: torch.ones(1, device='cuda'),
                 torch.cuda.current_device):
        with pytest.raises((RuntimeError, AssertionError)):
            call()


def test_a_count_of_zero():
    status, out, _ = run('-c', 'import torch, torch_npu; print(torch.npu.is_available(), torch.npu.device_count(), '
                         'torch.npu.amp.GradScaler().is_enabled())', FAKE_NPU_COUNT='0')
    assert status == 0 and out == 'False 0 False'
    assert 'Invalid NPU device' in last_line('import torch, torch_npu; torch.ones(1, device="npu")', FAKE_NPU_COUNT='0')


@pytest.mark.parametrize('name', ['FAKE_NPU_SOC', 'FAKE_NPU_SDPA'])
def test_an_unknown_value(name):
    line = last_line('import torch_npu', **{name: '310P'})
    assert line.startswith('ImportError: %s must be one of ' % name) and line.endswith(', not \'310P\'')


def test_no_cann():
    line = last_line('import torch_npu', FAKE_NPU_CANN='missing')
    assert line == 'ImportError: libhccl.so: cannot open shared object file: No such file or directory'


@pytest.mark.parametrize('use', ['torch.npu.set_device(0)', 'torch.ones(1).to("npu")', 'torch.npu.manual_seed(0)'])
def test_cann_of_another_version(use):
    status, _, err = run('-c', 'import torch, torch_npu; assert torch.npu.is_available(); ' + use, FAKE_NPU_CANN='7.0')
    assert status == 1 and 'error code is 500001' in err and 'ERR00100' in err


# ------------------------------------------------------------------------------- the build


def test_no_compiler(tmp_path):
    empty = tmp_path / 'bin'
    empty.mkdir()
    environment = {'FAKE_NPU_BUILD_DIR': str(tmp_path / 'build'), 'CXX': ''}
    line = last_line('import torch_npu', PATH=str(empty), **environment)
    assert line.startswith('ImportError: the NPU emulator needs a C++ compiler (g++)')


def fake_compiler(folder, last_words):
    """A compiler that records each call and then runs `last_words`, with the name of its output in $out."""
    script = folder / 'compiler'
    script.write_text('#!/bin/sh\necho "$@" >> %s/calls\nfor word; do out=$word; done\n%s\n' % (folder, last_words))
    script.chmod(0o755)
    return {'CXX': str(script), 'FAKE_NPU_BUILD_DIR': str(folder / 'build')}


def test_a_compiler_that_fails(tmp_path):
    compiler = fake_compiler(tmp_path, 'echo "npu.h:1: error: unknown type"; exit 1')
    line = last_line('import torch_npu', **compiler)
    assert line.startswith('ImportError: the NPU emulator could not be built by ') and 'error: unknown type' in line
    assert 'error: unknown type' in Path(line.split('(all of it: ')[1].rstrip(')')).read_text()


def test_one_of_several_processes_builds(tmp_path):
    """The compiler slowly copies the existing library. A killed build has left a file."""
    ready = _build.build_directory() / (_build.NAME + '.so')
    environment = fake_compiler(tmp_path, 'sleep 0.3; cp %s $out' % ready)
    scratch = tmp_path / 'build' / _build.build_directory().name / 'scratch'
    scratch.mkdir(parents=True)
    (scratch / 'npu_device.o').write_text('half an object')
    code = 'import torch, torch_npu; print(torch.ones(1, device="npu").item())'
    processes = [start('-c', code, **environment) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in said] == ['1.0\n'] * 3, said
    assert sorted(err for _, err in said) == ['', '', 'Building the NPU emulator, once, about half a minute\n']
    sources = len(list(_build.SOURCES.glob('*.cpp')))
    assert len((tmp_path / 'calls').read_text().splitlines()) == sources + 1 and not scratch.exists()
    assert run('-c', code, **environment) == (0, '1.0', '')
