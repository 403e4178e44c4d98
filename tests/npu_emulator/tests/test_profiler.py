"""torch_npu.profiler and torch.profiler on the emulated device."""

import json
import os
import re

import pytest
import torch
from torch import nn
from torch_npu import profiler


def work():
    nn.Linear(8, 8).npu()(torch.ones(2, 8, device='npu')).sum().backward()


def traces(folder):
    """{folder name: operator names} of the traces below `folder`."""
    found = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name, 'ASCEND_PROFILER_OUTPUT', 'trace_view.json')) as file:
            found[name] = {event['name'] for event in json.load(file) if 'name' in event}
    return found


def test_a_block_is_traced(tmp_path):
    config = profiler._ExperimentalConfig(profiler_level=profiler.ProfilerLevel.Level1)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
                          on_trace_ready=profiler.tensorboard_trace_handler(str(tmp_path / 'out')), record_shapes=True,
                          profile_memory=True, with_stack=True, experimental_config=config) as prof:
        work()
        prof.step()
    (name, operators), = traces(tmp_path / 'out').items()
    assert re.fullmatch(r'.+_%d_\d{17}_ascend_pt' % os.getpid(), name) and {'aten::addmm', 'aten::sum'} <= operators
    assert not hasattr(prof, 'key_averages')  # nor has the real one


def test_start_stop_and_export(tmp_path):
    prof = profiler.profile()
    prof.start()
    work()
    prof.stop()
    prof.export_chrome_trace(str(tmp_path / 'trace.json'))
    assert 'aten::addmm' in (tmp_path / 'trace.json').read_text()
    with pytest.raises(RuntimeError, match='must be a json file'):
        prof.export_chrome_trace(str(tmp_path / 'trace.txt'))


def test_a_schedule(tmp_path):
    seen, steps = [], []
    handler = profiler.tensorboard_trace_handler(str(tmp_path), worker_name='rank0')
    with profiler.profile(schedule=profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
                          on_trace_ready=lambda prof: (handler(prof), seen.append(len(steps)))) as prof:
        while len(steps) < 6:
            work()
            steps.append(prof.step())
    (name, operators), = traces(tmp_path).items()
    assert seen == [3] and name.startswith('rank0_')
    assert {'ProfilerStep#2', 'ProfilerStep#3'} <= operators and 'ProfilerStep#1' not in operators


@pytest.mark.parametrize('activities', [[torch.profiler.ProfilerActivity.CPU], None])
def test_the_profiler_of_pytorch(tmp_path, activities):
    with torch.profiler.profile(activities=activities) as prof:
        work()
    assert 'aten::addmm' in [event.key for event in prof.key_averages()]
    prof.export_chrome_trace(str(tmp_path / 'trace.json'))
    assert 'aten::addmm' in (tmp_path / 'trace.json').read_text()
