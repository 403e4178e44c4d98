import sys; sys.path.insert(0,'/work/main/test')
from test_dist_faults import *
from conftest import *
AT = {
 'data': "import datasets\nbefore = datasets.SeededSamples.__getitem__\ndef hooked(self, key):\n    if key[0] == 1: act()\n    return before(self, key)\ndatasets.SeededSamples.__getitem__ = hooked\n",
 'train': "import engine_for_finetuning as engine\nbefore = engine.set_schedules\ndef hooked(optimizer, step, *rest):\n    if step == 3: act()\n    return before(optimizer, step, *rest)\nengine.set_schedules = hooked\n",
 'eval': "import datasets\nbefore = datasets.ExactShard.__iter__\ndef hooked(self):\n    act()\n    return before(self)\ndatasets.ExactShard.__iter__ = hooked\n",
 'save': "import pilot\nbefore = pilot.distributed.gather\nimport checkpoint\ndef hooked(*a):\n    act()\ncheckpoint.save = hooked\n",
 'setup': "import datasets\nbefore = datasets.build_datasets\ndef hooked(*a):\n    act()\n    return before(*a)\ndatasets.build_datasets = hooked\n",
}
ACT = {'kill': 'import os, signal\ndef act(): os.kill(os.getpid(), signal.SIGKILL)\n',
       'stop': 'import os, signal\ndef act(): os.kill(os.getpid(), signal.SIGSTOP)\n',
       'sleep': 'import time\ndef act(): time.sleep(1000)\n'}

def test_try(job, data, tmp_path):
    jobs = []
    for launched in (False, True):
        for rank, at, act in eval(os.environ['ROWS']):
            out = tmp_path / ('out%d' % len(jobs))
            jobs.append((launched, rank, at, act, job('--data_path=' + data, '--epochs=4', '--save_ckpt_steps=2', '--dist_eval', '--dist_timeout=5', '--output_dir=' + str(out), launched=launched, fault={rank: ACT[act] + AT[at]})))
            time.sleep(float(os.environ.get('GAP') or 0))
    for launched, rank, at, act, one in jobs:
        try:
            if launched: one.end(seconds=40)
            elif act == 'stop':
                one.end(1 - rank, seconds=40)
                for pid in one.left(): os.kill(pid, signal.SIGCONT)
                one.end()
            else: one.end(seconds=40)
        except AssertionError as e: print('NOT ENDED')
        print('=====', 'launched' if launched else 'plain', rank, at, act)
        for number, each in sorted(one.ended().items()):
            print(number, each.status, '%.1f' % each.seconds)
            print(each.err)
