"""The contenders of benchmarks/benchmark.py: the training steps of this repository, of timm and of the reference.

Each contender has `train(steps)` and `evaluate(batches)`, works on one batch that stays in the device's memory, and
waits for the device only where its own training script does. Model, batch, precision, loss (label smoothing 0.1),
AdamW with layer decay 0.85, stochastic depth 0.1 and clipping at 1.0 are the same for all.

- `Ours` is what `run_class_finetuning.main` builds: main itself runs, up to its epoch loop. A step is one of
  `engine.train_one_epoch`, with schedules, seeding, meters and printing. The time
  includes its set-up and its final averages.
- `Timm` is the step of timm's train.py: its model with the attention that it chooses, its `create_optimizer_v2` with
  fused AdamW where PyTorch has that, its `NativeScaler` for float16. It logs nothing and never waits: timm at its best.
- `OurCheckpoints` is `Ours` with saves in mid-epoch; `TorchCheckpoints` is the same run that saves as most scripts do,
  by torch.save of the live state dicts and fsync.
- `Reference` computes as the reference does: attention one operator at a time, an unfused optimizer, float32 on a CPU,
  float16 under autocast elsewhere; in every step it reads loss and gradient norm and waits for the device. Its model is
  timm's with fused attention off, so none of our optimisations speeds it up.

timm has no O2; O2 is compared with timm's autocast to the same dtype. timm's --model-dtype has no float32 masters and
loses small updates, so it is another training. TF32, which timm's train.py allows, is off for all contenders.
"""

import contextlib
import functools
import importlib
import inspect
import io
import logging
import os
import re
import sys
import tempfile
import time
import typing
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import timm
import timm.optim
import timm.utils
import torch
from timm.loss import LabelSmoothingCrossEntropy

import datasets
import engine_for_finetuning as engine
import modeling_finetune
import optim_factory
import run_class_finetuning as program
import utils
from beit.checkpoint.training_state import remove_old_checkpoints
from beit.data.loader import Batch
from beit.data.sample_list import SampleList
from beit.devices import accelerator, half_precision
from beit.distributed import preemption, process_group
from beit.errors import UserError
from beit.files import weights_file

PRECISIONS = ('float32', 'bfloat16', 'float16', 'O2')
logging.getLogger('timm.models._builder').setLevel(logging.ERROR)  # it warns of a model without pretrained weights
UPDATES = 10 ** 4  # of the run that `Ours` is set up for
LEARNING_RATE, WEIGHT_DECAY, LAYER_DECAY, CLIP, DROP_PATH, SMOOTHING = 1e-5, 0.05, 0.85, 1., 0.1, 0.1


class Mode(typing.NamedTuple):
    precision: str
    compiled: bool = False

    def __str__(self):
        name = self.precision + (' autocast' if self.precision in half_precision.AMP_DTYPES else '')
        return name + (' compiled' if self.compiled else '')


class Setting(typing.NamedTuple):
    """What all contenders have in common."""
    model: str
    input_size: int
    batch_size: int
    device: str  # as --device takes it
    classes: int = 1000
    extra: tuple = ()  # flags of run_class_finetuning.py, for `Ours` alone

    @property
    def architecture(self):
        return dict(modeling_finetune.MODELS[self.model], img_size=self.input_size)

    @property
    def layer_scale(self):
        return 1e-5 if 'large' in self.model else 0.1

    def batch(self, device):
        """(images, class indices), equal for all contenders."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.input_size, self.input_size, generator=generator)
        targets = torch.randint(self.classes, (self.batch_size,), generator=generator)
        return images.to(device), targets.to(device)


# ---- arithmetic

def forward_flops(architecture, classes=1000):
    """Floating-point operations of one image's forward pass; a multiply-add counts as two.

    Counts matrix products only, 2 m n k each, as is usual (PaLM, https://arxiv.org/abs/2204.02311, appendix B). With P
    patches of p x p pixels, N = P + 1 tokens, width D and L blocks (An Image is Worth 16x16 Words,
    https://arxiv.org/abs/2010.11929, eq. 1 to 4, with an MLP of 4 D):

        2 P (3 p p) D  +  L (2 N D 3D + 2 N N D + 2 N N D + 2 N D D + 2 * 2 N D 4D)  +  2 D classes
        patches              query, key, value; scores; weighted sum; projection; MLP     head

    Training takes three times that: the backward pass has two products for each one.

    Args:
        architecture (dict): img_size, patch_size, embed_dim and depth, as in `modeling_finetune.MODELS`.
    """
    patch, width = architecture['patch_size'], architecture['embed_dim']
    patches = (architecture['img_size'] // patch) ** 2
    tokens = patches + 1
    block = 2 * tokens * width * 3 * width + 4 * tokens ** 2 * width + 2 * tokens * width ** 2 \
        + 16 * tokens * width ** 2
    return 2 * patches * 3 * patch ** 2 * width + architecture['depth'] * block + 2 * width * classes


# Dense bfloat16 or float16 FLOP/s without sparsity, from NVIDIA's data sheets; the first match in the name counts.
PEAKS = (('H100 PCIe', 756e12), ('H100 NVL', 835e12), ('H200 NVL', 835e12), ('H100', 989e12), ('H200', 989e12),
         ('A100', 312e12))


def peak_flops(device_name):
    """The dense half-precision peak of a device, in FLOP/s, or None where it isn't known."""
    return next((peak for name, peak in PEAKS if name in device_name), None)


# ---- ours

class Repeated(list):
    """A loader that repeats one batch."""

    def __init__(self, batch, times):
        super().__init__([batch] * times)
        self.batch_size = len(batch[0])


class _Nothing(torch.utils.data.Dataset):
    """A data set with a length that is never read."""

    samples = SampleList('', b'', [0], [])

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


def has_flag(name):
    return '--' + name in program.build_parser()._option_string_actions


def flag_choices(name):
    """The choices of a flag of run_class_finetuning.py; () for a missing flag or one with free values."""
    action = program.build_parser()._option_string_actions.get('--' + name)
    return tuple(action.choices or ()) if action else ()


def mode_flags(mode):
    flags = {'float32': [], 'O2': ['--amp', '--opt_level=O2']}.get(
        mode.precision, ['--amp', '--opt_level=O1', '--amp_dtype=' + mode.precision])
    if mode.compiled:
        check_compiler()
        if not has_flag('compile'):
            raise UserError('run_class_finetuning.py has no --compile')
        flags = flags + ['--compile=on' if 'on' in flag_choices('compile') else '--compile']
    return flags


def check_compiler():
    if not hasattr(torch, 'compile'):
        raise UserError('this PyTorch has no torch.compile')


def forget_compiled():
    """Drop earlier compiled code, because torch.compile limits the number of versions per function."""
    if 'torch._dynamo' in sys.modules:
        sys.modules['torch._dynamo'].reset()


def our_flags(setting, mode, folder):
    """The flags with which run_class_finetuning.py trains as the other contenders do."""
    return ['--model=' + setting.model, '--input_size=%d' % setting.input_size, '--batch_size=%d' % setting.batch_size,
            '--device=' + setting.device, '--data_path=' + folder, '--num_workers=0', '--epochs=1', '--warmup_epochs=0',
            '--lr=%g' % LEARNING_RATE, '--weight_decay=%g' % WEIGHT_DECAY, '--layer_decay=%g' % LAYER_DECAY,
            '--clip_grad=%g' % CLIP, '--drop_path=%g' % DROP_PATH, '--smoothing=%g' % SMOOTHING,
            '--layer_scale_init_value=%g' % setting.layer_scale, '--disable_eval_during_finetuning',
            *mode_flags(mode), *setting.extra]


FLAGS_OF_THE_LOADER = {'--data_path', '--input_size', '--batch_size', '--num_workers', '--data_backend', '--eval',
                       '--config', '--disable_eval_during_finetuning'}


def flags_of_a_step():
    """The names of flags that define the comparison."""
    setting = Setting('beit_base_patch16_224', 224, 1, 'cpu')
    given = [flag for precision in PRECISIONS for flag in our_flags(setting, Mode(precision), '')]
    return {flag.partition('=')[0] for flag in given} | {'--compile', '--eval', '--update_freq', '--config', '--resume',
                                                         '--auto_resume'}


def build_as_main_does(args, classes, updates):
    """(arguments for `engine.train_one_epoch`, output of main): main runs without images up to its epoch loop."""
    kept, said = {}, io.StringIO()

    def train(args, training, data, learner, monitor, report):
        kept.update(training, model=learner.model, device=learner.device, monitor=monitor)

    def build_datasets(args, *_, **__):
        return _Nothing(args.batch_size * updates * process_group.world_size()), None, [str(n) for n in range(classes)]

    with mock.patch.object(program, 'train', train), mock.patch.object(datasets, 'build_datasets', build_datasets), \
            mock.patch.object(program.fingerprint, 'of_data', lambda *_: {}), contextlib.redirect_stdout(said):
        program.main(args, preemption.Signals())
    return kept, said.getvalue()


class Ours:
    """This repository's model, optimizer and loop."""

    @staticmethod
    def mode_of(mode, device):
        """The mode in which it runs for the requested `mode`."""
        return mode

    def __init__(self, setting, mode):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, 'train'))
            self.args = program.build_parser().parse_args(our_flags(setting, mode, folder))
            self.training, said = build_as_main_does(self.args, setting.classes, UPDATES)
        self.training.pop('data_loader')
        self.device = self.training['device']
        self.about = '; '.join(re.findall(r'^(?:Precision|Attention|Compile\w*): (.*)$', said, re.M))
        images, targets = setting.batch(self.device)
        self.batch = Batch(images, targets, torch.arange(len(targets)), [])
        self.steps = self.skipped_steps = 0

    def train(self, steps):
        if self.steps + steps > UPDATES:
            self.steps = 0
        with contextlib.redirect_stdout(io.StringIO()):
            stats = engine.train_one_epoch(  # updates draw different random numbers, so the work varies slightly
                epoch=0, start_steps=self.steps, data_loader=Repeated(self.batch, steps),
                num_training_steps_per_epoch=steps, throughput=utils.Throughput(), **self.training)
        self.steps += steps
        self.skipped_steps += stats['skipped_steps']

    def evaluate(self, batches):
        with contextlib.redirect_stdout(io.StringIO()):
            engine.evaluate(Repeated(self.batch, batches), self.training['model'], self.device)


class OurCheckpoints(Ours):
    """This repository's loop; `setting.extra` has its --output_dir.

    `figures` has the seconds that training stands still in each save, before the file is complete, and the file's MiB.
    """

    def __init__(self, setting, mode):
        super().__init__(setting, mode)
        self.monitor, self.save_at, self.saves, self.path = self.training['monitor'], -1, 0, ''
        self.monitor.timer.due = lambda update_step: update_step == self.save_at
        self.write, self.monitor._write = self.monitor._write, lambda _: self.write_numbered()
        self.figures = dict(waits=[])
        os.makedirs(self.args.output_dir, exist_ok=True)

    def write_numbered(self, *more):
        """Save under a new name, as a run does, and the names `more`."""
        self.saves += 1
        name, start = 'checkpoint-0-step%d.pth' % self.saves, time.perf_counter()
        self.write([name, *more])
        self.figures['waits'].append(time.perf_counter() - start)
        self.path = os.path.join(self.args.output_dir, name)

    def save(self, steps):
        """Train this many steps; a checkpoint is due after the first, and complete at the end."""
        self.save_at = self.steps
        self.train(steps)
        self.monitor.saving.wait()
        self.figures['file_mib'] = os.path.getsize(self.path) / 2 ** 20

    def save_twice(self, times):
        """Save under two names, as after an epoch with a new best accuracy."""
        for _ in range(times):
            self.write_numbered('checkpoint-best.pth')
            self.monitor.saving.wait()

    def load(self, times):
        for _ in range(times):
            weights_file.load_weights_file(self.path)


class TorchCheckpoints(OurCheckpoints):
    """The same loop with torch.save, fsync and torch.load."""

    def __init__(self, setting, mode):
        super().__init__(setting, mode)
        self.write = functools.partial(_write_with_torch, self.monitor)

    def load(self, times):
        for _ in range(times):
            torch.load(self.path, map_location='cpu', weights_only=True)


def _write_with_torch(monitor, names):
    content = dict(model=monitor.parts['model'].state_dict(), optimizer=monitor.parts['optimizer'].state_dict(),
                   epoch=monitor.run_state.epoch, args=dict(monitor.output.flags))
    for name in names:
        with open(os.path.join(monitor.output.output_dir, name), 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    remove_old_checkpoints(monitor.output.output_dir, 0)


# ---- timm's

def timm_model(setting):
    """timm's own model of this name, which ours replaces in timm's registry; for a name that timm lacks, of this shape.

    Raises:
        UserError: this timm has no BEiT.
    """
    try:
        beit = importlib.import_module('timm.models.beit')
    except ImportError:
        raise UserError('timm %s has no BEiT' % timm.__version__) from None
    options = dict(img_size=setting.input_size, num_classes=setting.classes, drop_path_rate=DROP_PATH,
                   init_values=setting.layer_scale)
    if hasattr(beit, setting.model):
        return getattr(beit, setting.model)(pretrained=False, **options)
    return beit.Beit(**dict(setting.architecture, use_abs_pos_emb=False, use_rel_pos_bias=True, **options))


def half_dtype(precision, device):
    """The dtype to autocast to, or None for float32."""
    return half_precision.check_precision(device, precision != 'float32', 'O1',
                                          None if precision == 'float32' else precision)


@contextlib.contextmanager
def tuned_convolutions():
    """Inside the context cuDNN benchmarks its algorithms, as in timm's train.py and the reference's script."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Timm:
    """timm's model, optimizer and step as in its train.py."""

    @staticmethod
    def mode_of(mode, device):
        if mode.precision != 'O2':
            return mode
        return mode._replace(precision='bfloat16' if device.type == 'cpu' else 'float16')

    def __init__(self, setting, mode):
        self.device = accelerator.select_device(setting.device)
        mode = self.mode_of(mode, self.device)
        self.dtype = half_dtype(mode.precision, self.device)
        torch.manual_seed(0)
        self.model = self.build_model(setting).to(self.device)
        self.optimizer, about_optimizer = self.build_optimizer()
        self.about = '%s, %s' % (self.about_attention(), about_optimizer)
        self.criterion = LabelSmoothingCrossEntropy(SMOOTHING)
        self.scaler = self.build_scaler() if self.dtype == torch.float16 else None
        if mode.compiled:
            check_compiler()
            self.model = torch.compile(self.model)
        self.images, self.targets = setting.batch(self.device)
        self.skipped_steps = None  # its scaler doesn't report it

    def build_model(self, setting):
        return timm_model(setting)

    def about_attention(self):
        return 'fused attention' if getattr(self.model.blocks[0].attn, 'fused_attn', False) else 'plain attention'

    def build_optimizer(self):
        options = dict(opt='adamw', lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY)
        try:
            optimizer, about = timm.optim.create_optimizer_v2(self.model, fused=True, **options), 'fused AdamW'
        except (RuntimeError, TypeError):  # this PyTorch has no fused one for the device
            optimizer, about = timm.optim.create_optimizer_v2(self.model, **options), 'AdamW'
        for group in optimizer.param_groups:  # timm's scheduler does that
            group['lr'] *= group.get('lr_scale', 1.)
        return optimizer, about

    def build_scaler(self):
        takes_device = 'device' in inspect.signature(timm.utils.NativeScaler.__init__).parameters
        return timm.utils.NativeScaler(**({'device': self.device.type} if takes_device else {}))

    def autocast(self):
        return contextlib.nullcontext() if self.dtype is None else half_precision.autocast(self.device.type, self.dtype)

    def train(self, steps):
        self.model.train()
        with tuned_convolutions():
            for _ in range(steps):
                with self.autocast():
                    output = self.model(self.images)
                    loss = self.criterion(output, self.targets)
                self.update(loss)
                self.optimizer.zero_grad()
                self.after_step(output, loss)

    def update(self, loss):
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=CLIP, parameters=self.model.parameters())
            return
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()

    def after_step(self, output, loss):
        pass

    def evaluate(self, batches):
        self.model.eval()
        correct, losses = 0, 0
        # An NPU's tensors are not part of PyTorch and may lack inference mode.
        without_gradients = getattr(torch, 'inference_mode', torch.no_grad) if self.device.type != 'npu' \
            else torch.no_grad
        with without_gradients(), tuned_convolutions():
            for _ in range(batches):
                with self.autocast():
                    output = self.model(self.images)
                    losses = losses + torch.nn.functional.cross_entropy(output, self.targets)
                top = output.topk(min(5, output.shape[1]), dim=1).indices == self.targets[:, None]
                correct = correct + torch.stack((top[:, 0].sum(), top.sum()))
        return correct.tolist(), float(losses)


class Reference(Timm):
    """The reference's step (microsoft/unilm, beit, engine_for_finetuning.py and utils.py)."""

    @staticmethod
    def mode_of(mode, device):
        return Mode('float32' if device.type == 'cpu' else 'float16')

    def build_model(self, setting):
        try:
            model = timm_model(setting)
        except UserError:  # then our model without a kernel computes the same
            return program.inference_model.build_model(program.build_parser().parse_args([
                '--model=' + setting.model, '--input_size=%d' % setting.input_size, '--drop_path=%g' % DROP_PATH,
                '--layer_scale_init_value=%g' % setting.layer_scale]), setting.classes)
        for block in model.blocks:
            block.attn.fused_attn = False
        return model

    def build_optimizer(self):
        skip = set(self.model.no_weight_decay())
        layers = len(self.model.blocks)
        groups = {}
        for name, parameter in self.model.named_parameters():
            layer = optim_factory.layer_id(name, layers)
            decays = parameter.dim() > 1 and not name.endswith('.bias') and name not in skip
            group = groups.setdefault((layer, decays), dict(
                params=[], lr=LEARNING_RATE * LAYER_DECAY ** (layers + 1 - layer),
                weight_decay=WEIGHT_DECAY if decays else 0.))
            group['params'].append(parameter)
        return torch.optim.AdamW(list(groups.values()), lr=LEARNING_RATE), 'AdamW'

    def build_scaler(self):
        return _ScalerWithNorm(super().build_scaler()._scaler)

    def update(self, loss):
        if self.scaler is None:
            super().update(loss)
        else:
            self.grad_norm = self.scaler(loss, self.optimizer, self.model.parameters())

    def after_step(self, output, loss):
        loss.item()
        accelerator.synchronize(self.device)
        (output.max(-1)[-1] == self.targets).float().mean().item()
        self.grad_norm.item()


class _ScalerWithNorm:
    """The reference's NativeScalerWithGradNormCount, with clipping."""

    def __init__(self, scaler):
        self.scaler = scaler

    def __call__(self, loss, optimizer, parameters):
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm


CONTENDERS = {'ours': Ours, 'timm': Timm, 'reference': Reference, 'checkpoints': OurCheckpoints,
              'torch.save': TorchCheckpoints}
