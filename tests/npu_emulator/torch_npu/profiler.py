"""``torch_npu.profiler``: PyTorch's CPU trace in the folders that Ascend's profiler writes."""

import enum
import json
import os
import socket
import tempfile
import warnings
from datetime import datetime
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerAction

__all__ = ['profile', 'ProfilerActivity', 'supported_activities', 'tensorboard_trace_handler', 'schedule',
           'ProfilerAction', '_ExperimentalConfig', 'supported_profiler_level', 'ProfilerLevel', 'AiCMetrics',
           'ExportType']


class ProfilerActivity(enum.Enum):
    CPU = 0
    NPU = 1


def supported_activities():
    return set(ProfilerActivity)


class ProfilerLevel:
    Level0, Level1, Level2, Level_none = 'Level0', 'Level1', 'Level2', 'Level_none'


def supported_profiler_level():
    return {ProfilerLevel.Level0, ProfilerLevel.Level1, ProfilerLevel.Level2, ProfilerLevel.Level_none}


class AiCMetrics:
    PipeUtilization = 'ACL_AICORE_PIPE_UTILIZATION'
    ArithmeticUtilization = 'ACL_AICORE_ARITHMETIC_UTILIZATION'
    Memory = 'ACL_AICORE_MEMORY_BANDWIDTH'
    L2Cache = 'ACL_AICORE_L2_CACHE'
    AiCoreNone = 'ACL_AICORE_NONE'


class ExportType:
    Db, Text = 'db', 'text'


class _ExperimentalConfig(SimpleNamespace):
    """Additional measurements of an NPU: stored without effect."""

    def __init__(self, profiler_level=ProfilerLevel.Level0, aic_metrics=AiCMetrics.AiCoreNone, l2_cache=False,
                 msprof_tx=False, mstx=False, data_simplification=True, record_op_args=False, op_attr=False,
                 gc_detect_threshold=None, export_type=None, host_sys=None, mstx_domain_include=None,
                 mstx_domain_exclude=None, sys_io=False, sys_interconnection=False):
        super().__init__(**{name: value for name, value in locals().items() if name not in ('self', '__class__')})


def schedule(wait, active, warmup=0, repeat=0, skip_first=0):
    return torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first)


class profile:
    """Traces the operators of a with block, or between start and stop; step() moves the schedule on.

    It has only the methods of the real one: no key_averages, for example.
    """

    def __init__(self, *, activities=None, schedule=None, on_trace_ready=None, record_shapes=False,
                 profile_memory=False, with_stack=False, with_flops=False, with_modules=False,
                 experimental_config=None, use_cuda=None):
        if set(activities or ()) - supported_activities():
            warnings.warn('Invalid activities: they are torch_npu.profiler.ProfilerActivity\'s', stacklevel=2)
        self.on_trace_ready = on_trace_ready
        self._torch = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], schedule=schedule,
            on_trace_ready=None if on_trace_ready is None else lambda _: on_trace_ready(self),
            record_shapes=record_shapes, profile_memory=profile_memory, with_stack=with_stack,
            with_flops=with_flops, with_modules=with_modules)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def start(self):
        self._torch.start()

    def stop(self):
        self._torch.stop()

    def step(self):
        self._torch.step()

    def add_metadata(self, key, value):
        self._torch.add_metadata(key, value)

    def add_metadata_json(self, key, value):
        self._torch.add_metadata_json(key, value)

    def export_chrome_trace(self, output_path):
        """The events as a JSON list, which is what Ascend's profiler writes and Chrome's viewer reads."""
        if not output_path.endswith('.json'):
            raise RuntimeError('Invalid parameter output_path, which must be a json file.')
        with tempfile.TemporaryDirectory() as scratch:
            whole = os.path.join(scratch, 'trace.json')
            self._torch.export_chrome_trace(whole)
            with open(whole) as file:
                events = json.load(file)['traceEvents']
        with open(output_path, 'w') as file:
            json.dump(events, file)


def tensorboard_trace_handler(dir_name=None, worker_name=None, analyse_flag=True, async_mode=False):
    """Writes <dir_name>/<worker or host>_<pid>_<time>_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json."""

    def write(prof):
        now = datetime.now().strftime('%Y%m%d%H%M%S%f')[:-3]
        name = '%s_%d_%s_ascend_pt' % (worker_name or socket.gethostname(), os.getpid(), now)
        folder = os.path.join(dir_name or os.getcwd(), name)
        os.makedirs(os.path.join(folder, 'FRAMEWORK'), exist_ok=True)
        if analyse_flag:
            os.makedirs(os.path.join(folder, 'ASCEND_PROFILER_OUTPUT'), exist_ok=True)
            prof.export_chrome_trace(os.path.join(folder, 'ASCEND_PROFILER_OUTPUT', 'trace_view.json'))

    return write
