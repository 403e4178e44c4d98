#!/usr/bin/env python3
"""Write a trained BEiT in the form that other programs read: ONNX, TorchScript, torch.export, timm, Hugging Face.

Classes, input size, pooling and how images are prepared come from the checkpoint, and go into what is written. It is
compared with the checkpoint's own network first; where the two differ, nothing is written.
"""

if __name__ == '__main__':
    from beit import errors
    errors.quiet_interrupt()

import contextlib
import inspect
import io
import json
import logging
import os
import sys
import typing
import warnings

import torch
from PIL import Image

import flags
import modeling_finetune
from beit import errors
from beit.checkpoint import hf_names
from beit.checkpoint.inference_model import load_for_inference
from beit.cli import OneLineParser, run_interruptible
from beit.errors import UserError, escape_text, one_line, unknown_value_error
from beit.files import atomic_write, run_folder

PROGRAM = 'run_export.py'
EXAMPLES = """examples:
  the best checkpoint of a run, for onnxruntime, beside it:
    python run_export.py --resume out --format onnx
  its averaged weights, for timm.create_model(…, checkpoint_path=FILE), which is printed:
    python run_export.py --resume out/checkpoint-29.pth --use_ema --format safetensors --output beit.safetensors
  a folder for transformers' from_pretrained:
    python run_export.py --resume out --format huggingface --output my_model
  weights of timm or Hugging Face, which do not say whose they are:
    python run_export.py --resume model.safetensors --model beit_base_patch16_224 --format onnx
"""
BATCHES = (1, 2, 5)  # images at a time in the comparison; the exporters see EXAMPLE
EXAMPLE = 3
TOLERANCE = 1e-3  # of the largest logit: rounding stays far below, and a lost position bias does not
OPSETS = (23, 20, 18, 17, 13, 11)  # the newest that PyTorch's exporter writes and onnxruntime reads is taken
PROTOBUF_LIMIT = 2 ** 31  # bytes of an ONNX file that holds its own weights
EXTRA = 'run: pip install -r requirements-extra.txt'


def metadata(trained):
    """What a user of the weights must know, as strings by name; lists and dicts are JSON, in ASCII."""
    return {
        'model': trained.args.model,
        'classes': json.dumps(trained.classes),
        'preprocessing': json.dumps(trained.preprocessing.to_timm()),
        'pooling': 'mean of the patches' if trained.args.use_mean_pooling else 'class token',
        'input': 'float32 (batch, 3, height, width): RGB from 0 to 1, less mean, divided by std',
        'output': 'logits (batch, %d), in the order of classes' % len(trained.classes),
        'activation': trained.activation,
    }


# ---- the formats: one function makes a file's bytes, another gives the logits that those bytes compute
# The network comes with plain attention, which every exporter takes, whatever it was trained with.

def make_onnx(trained, args):
    """An ONNX file with its weights inside, a batch of any size, and the metadata; (bytes, words)."""
    onnx = _need('onnx', '--format onnx')
    if 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters:
        _need('onnxscript', '--format onnx')
    size = sum(value.numel() * value.element_size() for value in trained.model.state_dict().values())
    if size >= PROTOBUF_LIMIT:
        raise UserError('--format onnx: the weights take %.1f GB, and a file holds 2 at most; use --format torch_export'
                        % (size / 1e9))
    known = onnx.defs.onnx_opset_version()
    if args.opset and args.opset > known:
        raise UserError('--opset %d: onnx %s knows those up to %d' % (args.opset, onnx.__version__, known))
    reasons = []
    for opset in [args.opset] if args.opset else OPSETS:
        try:
            proto = _export_onnx(onnx, trained, opset)
            written = next(each.version for each in proto.opset_import if not each.domain)
            if written != opset:
                raise ValueError('PyTorch %s wrote opset %d instead' % (torch.__version__, written))
            onnx.helper.set_model_props(proto, metadata(trained))
            data = proto.SerializeToString()
            runtime = _import('onnxruntime')
            if runtime is not None:
                _session(runtime, data)
            return data, 'opset %d' % opset
        except Exception as error:  # the exporter's and onnxruntime's are of many kinds
            reasons.append((one_line(error) or type(error).__name__)[:200])
    raise UserError('--format onnx --opset %s: %s; leave --opset out, or give another'
                    % (args.opset or '/'.join(map(str, OPSETS)), reasons[0]))


def _export_onnx(onnx, trained, opset):
    images, names = _images(trained, EXAMPLE), dict(input_names=['image'], output_names=['logits'])
    if 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters:
        with contextlib.redirect_stdout(io.StringIO()), _no_log():  # it tells of its progress, and logs tracebacks
            program = torch.onnx.export(trained.model, (images,), dynamo=True, verbose=False, opset_version=opset,
                                        dynamic_shapes=({0: torch.export.Dim('batch')},), **names)
        return program.model_proto
    file = io.BytesIO()
    torch.onnx.export(trained.model, images, file, opset_version=opset,
                      dynamic_axes={'image': {0: 'batch'}, 'logits': {0: 'batch'}}, **names)
    return onnx.load_model_from_string(file.getvalue())


@contextlib.contextmanager
def _no_log():
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _session(runtime, data):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(data, options, providers=['CPUExecutionProvider'])


def run_onnx(data, trained, batches):
    session = _session(_need('onnxruntime', ''), data)
    return [torch.from_numpy(session.run(['logits'], {'image': images.numpy()})[0]) for images in batches]


def make_torchscript(trained, args):
    file = io.BytesIO()
    traced = torch.jit.trace(trained.model, _images(trained, EXAMPLE), check_trace=False)
    torch.jit.save(traced, file, _extra_files=_extra_files(metadata(trained)))
    return file.getvalue(), 'torch.jit.load(FILE, _extra_files={\'classes\': \'\'}) reads it'


def run_torchscript(data, trained, batches):
    found = _extra_files(dict.fromkeys(metadata(trained), ''))
    loaded = torch.jit.load(io.BytesIO(data), map_location='cpu', _extra_files=found)
    _same_metadata({name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()},
                   trained)
    return [loaded(images) for images in batches]


def _extra_files(about):
    """A dict as PyTorch 1.5 wants it, which has a type of its own for that."""
    files = getattr(torch._C, 'ExtraFilesMap', dict)()
    for name, value in about.items():
        files[name] = value
    return files


def make_torch_export(trained, args):
    if not hasattr(getattr(torch, 'export', None), 'Dim'):
        raise UserError('--format torch_export: PyTorch %s has no torch.export; use --format torchscript'
                        % torch.__version__)
    program = torch.export.export(trained.model, (_images(trained, EXAMPLE),),
                                  dynamic_shapes=({0: torch.export.Dim('batch')},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata(trained))
    return file.getvalue(), 'torch.export.load(FILE).module() reads it'


def run_torch_export(data, trained, batches):
    found = dict.fromkeys(metadata(trained), '')
    loaded = torch.export.load(io.BytesIO(data), extra_files=found).module()
    _same_metadata(found, trained)
    return [loaded(images) for images in batches]


def make_safetensors(trained, args):
    """timm's names and shapes, which are this project's, without what timm computes itself."""
    tensors = {name: value for name, value in trained.model.state_dict().items()
               if not name.endswith('relative_position_index')}
    return _safetensors(tensors, metadata(trained)), 'for timm'


def run_safetensors(data, trained, batches):
    from safetensors.numpy import load
    beit = _import('timm.models.beit')
    if not hasattr(beit, 'Beit'):
        raise _NotChecked('this timm (%s) has no BEiT' % _version('timm'))
    model = beit.Beit(**timm_arguments(trained))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load(data).items()})
    model.eval()
    return [model(images) for images in batches]


def timm_arguments(trained):
    """What timm's `Beit` takes to be this network."""
    model, block = trained.model, trained.model.blocks[0]
    return dict(
        img_size=trained.args.input_size, patch_size=model.patch_embed.patch_size[0], embed_dim=model.embed_dim,
        depth=len(model.blocks), num_heads=block.attn.num_heads, num_classes=len(trained.classes),
        global_pool='avg' if model.fc_norm is not None else 'token', use_abs_pos_emb=model.pos_embed is not None,
        use_rel_pos_bias=block.attn.has_relative_position, init_values=_layer_scale(trained))


def timm_line(trained, path):
    """The Python that opens the file with timm: the registered name, and what differs from its defaults."""
    arguments, name = timm_arguments(trained), trained.args.model
    if not hasattr(_import('timm.models.beit'), name):  # as beit_nano_patch8_32
        return 'model = timm.models.beit.Beit(%s); timm.models.load_checkpoint(model, %r)' % (_spell(arguments), path)
    usual = dict(img_size=modeling_finetune.MODELS[name]['img_size'], global_pool='avg', use_abs_pos_emb=False,
                 use_rel_pos_bias=True)
    chosen = {key: arguments[key] for key in usual if arguments[key] != usual[key]}
    if not arguments['init_values']:
        chosen['init_values'] = 0.  # create_model leaves out what is None
    return 'model = timm.create_model(%r, checkpoint_path=%r, %s)' % (
        name, path, _spell(dict(num_classes=len(trained.classes), **chosen)))


def _spell(arguments):
    return ', '.join('%s=%r' % item for item in arguments.items())


def make_huggingface(trained, args):
    """The three files of a folder for transformers, as {name: bytes}."""
    try:
        tensors = hf_names.to_hugging_face(trained.model.state_dict())
    except KeyError as error:
        raise UserError('--format huggingface: BeitForImageClassification has no place for %s; use another --format'
                        % error) from None
    return {'config.json': _json(huggingface_config(trained)),
            'preprocessor_config.json': _json(huggingface_preprocessor(trained)),
            'model.safetensors': _safetensors(tensors, dict(metadata(trained), format='pt'))}, 'for transformers'


def huggingface_config(trained):
    model, args = trained.model, trained.args
    block = model.blocks[0]
    return dict(
        architectures=['BeitForImageClassification'], model_type='beit', hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks), num_attention_heads=block.attn.num_heads, hidden_act='gelu',
        intermediate_size=block.mlp.fc1.out_features, layer_norm_eps=block.norm1.eps, image_size=args.input_size,
        patch_size=model.patch_embed.patch_size[0], num_channels=model.patch_embed.proj.in_channels,
        hidden_dropout_prob=float(args.drop), attention_probs_dropout_prob=float(args.attn_drop_rate),
        drop_path_rate=float(args.drop_path), layer_scale_init_value=_layer_scale(trained), use_mask_token=False,
        use_absolute_position_embeddings=model.pos_embed is not None,
        use_relative_position_bias=block.attn.has_relative_position,
        use_shared_relative_position_bias=model.rel_pos_bias is not None,
        use_mean_pooling=model.fc_norm is not None, torch_dtype='float32',
        problem_type='%s_label_classification' % ('multi' if trained.activation == 'sigmoid' else 'single'),
        id2label={str(label): name for label, name in enumerate(trained.classes)},
        label2id={name: label for label, name in enumerate(trained.classes)})


def huggingface_preprocessor(trained):
    """Evaluation's transform: the shorter side resized, the centre cropped. CLIP's is the processor that all know.

    BEiT's own takes no shorter side before transformers 5, and would distort the image.
    """
    images = trained.preprocessing
    return dict(
        image_processor_type='CLIPImageProcessor', do_convert_rgb=True,
        do_resize=True, size={'shortest_edge': images.shorter_side},
        resample=int(getattr(Image, images.interpolation.upper())), do_center_crop=True,
        crop_size={'height': images.input_size, 'width': images.input_size}, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(images.mean), image_std=list(images.std))


def run_huggingface(folder, trained, batches):
    transformers = _import('transformers')
    if transformers is None:
        raise _NotChecked('that needs transformers; %s' % EXTRA)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.BeitForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return [model(pixel_values=images).logits for images in batches]


def _layer_scale(trained):
    """The value that layer scale began at, 0.0 where there is none."""
    if trained.model.blocks[0].gamma_1 is None:
        return 0.
    return float(trained.args.layer_scale_init_value)


def _json(content):
    return (json.dumps(content, indent=2) + '\n').encode('ascii')


def _safetensors(tensors, about):
    try:
        from safetensors.numpy import save  # the one for tensors needs a newer PyTorch than 1.8
    except ImportError:
        raise UserError('--format safetensors and huggingface need safetensors; run: pip install safetensors') from None
    return save({name: value.detach().contiguous().numpy() for name, value in tensors.items()}, about)


class Format(typing.NamedTuple):
    """How a network is written in one form, and read back by whom."""
    ending: str  # of the default output's name
    make: typing.Callable  # (trained, args): bytes, or {name: bytes} for a folder; and words about it
    run: typing.Callable  # (bytes or the folder's path, trained, batches): logits of each batch
    reader: str  # the package that reads it back


FORMATS = {
    'onnx': Format('.onnx', make_onnx, run_onnx, 'onnxruntime'),
    'torchscript': Format('.torchscript.pt', make_torchscript, run_torchscript, 'torch'),
    'torch_export': Format('.pt2', make_torch_export, run_torch_export, 'torch'),
    'safetensors': Format('.safetensors', make_safetensors, run_safetensors, 'timm'),
    'huggingface': Format('-huggingface', make_huggingface, run_huggingface, 'transformers'),
}
FOLDER = {'config.json', 'preprocessor_config.json', 'model.safetensors'}  # what --overwrite may replace a folder of


# ---- the comparison

class _NotChecked(Exception):
    """What reads the format back isn't installed."""


def compare(chosen, written, trained):
    """Run what was made, on batches of several sizes, beside the checkpoint's network; gives one sentence.

    Raises:
        UserError: the logits differ by more than rounding.
    """
    if _import(chosen.reader) is None:
        return 'Not checked: that needs %s; %s' % (chosen.reader, EXTRA)
    batches = [_images(trained, count) for count in BATCHES]
    try:
        found = chosen.run(written, trained, batches)
    except _NotChecked as reason:
        return 'Not checked: %s' % reason
    expected = [trained.model(images) for images in batches]
    largest = max(logits.abs().max().item() for logits in expected)
    difference = max((there - here).abs().max().item() if there.shape == here.shape else float('nan')
                     for there, here in zip(found, expected))
    about = 'logits differ by at most %.2g (the largest is %.3g) for batches of %s, with %s %s' % (
        difference, largest, ', '.join(map(str, BATCHES)), chosen.reader, _version(chosen.reader))
    if not difference <= TOLERANCE * largest:
        raise UserError('the export is not the checkpoint\'s network: %s; nothing was written (--no_check would)'
                        % about)
    return 'Checked: ' + about


def _images(trained, count):
    """Random images (count, 3, H, W), the same each time."""
    size = trained.preprocessing.input_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def _same_metadata(found, trained):
    if found != metadata(trained):
        raise UserError('the export lost its metadata; nothing was written')


def _version(module):
    return getattr(_import(module), '__version__', '')


def _import(name):
    """A module, or None where it isn't installed."""
    try:
        return __import__(name, fromlist=['_'])
    except ImportError:
        return None


def _need(name, what):
    module = _import(name)
    if module is None:
        raise UserError('%s needs %s; %s' % (what, name, EXTRA))
    return module


# ---- the program

def build_parser() -> OneLineParser:
    return flags.build_parser(flags.EXPORT, '--resume PATH --format FORMAT [flags]', __doc__, EXAMPLES,
                              format=dict(help=', '.join(FORMATS)),
                              opset=dict(shown='%d, or the newest that works' % OPSETS[0]))


def check_args(args):
    """What can be found wrong before the checkpoint is read. Raises `UserError`."""
    if not args.resume:
        raise UserError('--resume: name the checkpoint to export, or the folder that holds it')
    if args.format not in FORMATS:
        if not args.format:
            raise UserError('--format is missing; give one of %s' % ', '.join(FORMATS))
        raise unknown_value_error('--format', args.format, FORMATS)
    if args.model is not None and args.model not in modeling_finetune.MODELS:
        raise unknown_value_error('--model', args.model, modeling_finetune.MODELS)
    if args.opset and args.format != 'onnx':
        raise UserError('--opset %d goes with --format onnx, not %s' % (args.opset, args.format))
    if args.output:
        check_output(args, args.output)


def default_output(source, ending):
    """The checkpoint's name with another ending; beside it, or of an address here."""
    name = source.partition('#')[0].partition('?')[0].rpartition('/')[2] if '://' in source else source
    return os.path.splitext(name.rstrip('/'))[0] + ending


def check_output(args, path):
    """Raise a `UserError` where the output cannot be written, or would replace what nobody said to."""
    shown = '--output %s' % escape_text(path)
    run_folder.check_writable('--output', os.path.dirname(os.path.abspath(path)))
    if not os.path.lexists(path):
        return
    if os.path.isdir(path) != (args.format == 'huggingface'):
        raise UserError('%s: %s; --format %s writes a %s' % (shown, 'a folder' if os.path.isdir(path) else 'a file',
                                                             args.format, 'folder' if os.path.isfile(path) else 'file'))
    if args.format == 'huggingface' and set(os.listdir(path)) - FOLDER:
        raise UserError('%s: the folder holds other files (%s), which would be lost; name a new one' % (
            shown, escape_text(sorted(set(os.listdir(path)) - FOLDER)[0])))
    if not args.overwrite and (args.format != 'huggingface' or os.listdir(path)):
        raise UserError('%s: already there; give --overwrite, or another name' % shown)


def main(args):
    check_args(args)
    trained = load_for_inference(args.resume, use_ema=args.use_ema, model=args.model, input_size=args.input_size)
    chosen = FORMATS[args.format]
    path = args.output or default_output(trained.source, ('-ema' if args.use_ema else '') + chosen.ending)
    check_output(args, path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing: which sizes are fixed is known, and is compared below
        made, about = chosen.make(trained, args)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        if isinstance(made, dict):
            told = write_folder(path, made, lambda folder: None if args.no_check else compare(chosen, folder, trained))
        else:
            told = None if args.no_check else compare(chosen, made, trained)
            atomic_write.write_bytes(path, made, is_given=True)
    size = sum(map(len, made.values())) if isinstance(made, dict) else len(made)
    print('Exported %s, %d classes, input %dx%d, from %s' % (
        trained.args.model, len(trained.classes), trained.args.input_size, trained.args.input_size,
        escape_text(trained.source)))
    print(told or 'Not checked, as --no_check says')
    print('Wrote %s (%s, %s, %.1f MB)' % (escape_text(path), args.format, about, size / 1e6))
    if args.format == 'safetensors':
        print('Load it: %s' % timm_line(trained, path))
        print('Prepare images: timm.data.create_transform(%s)' % _spell(trained.preprocessing.to_timm()))


def write_folder(path, files, check):
    """Write files into a new folder, call `check` with its path, then give it its name; what `check` gave."""
    try:
        with atomic_write.atomic_directory(path) as folder:
            for name, data in files.items():
                with open(os.path.join(folder, name), 'wb') as file:
                    file.write(data)
            return check(folder)
    except OSError as error:
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?'
                        % (escape_text(path), error.strerror or error)) from None


def run(argv=None):
    """Parse, export, and turn what the user can mend into one line and exit status 2."""
    return run_interruptible(PROGRAM, lambda: main(build_parser().parse_args(argv)), 'close other programs')


if __name__ == '__main__':
    sys.exit(run())
