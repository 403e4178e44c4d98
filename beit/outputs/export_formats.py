"""Export formats, each an entry of `FORMATS`. The network has plain attention, which every exporter supports."""

import contextlib
import functools
import inspect
import io
import json
import logging
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image

import modeling_finetune
from beit import model_spec, startup
from beit.checkpoint import exported, hf_names
from beit.checkpoint.exported import EXTRA, PROGRAMS, import_optional
from beit.checkpoint.inference_model import LoadedModel
from beit.config import PROGRAM_ENDINGS, ExportConfig
from beit.data.decode import MODES
from beit.errors import UserError, one_line
from beit.outputs import atc, model_card

EXAMPLE = 3  # images in the exporters' example batch
OPSETS = (23, 20, 18, 17, 13, 11)  # the first that PyTorch's exporter writes and onnxruntime reads is used
PROTOBUF_LIMIT = 2 ** 31  # bytes of an ONNX file with its weights inside

Logits = List[torch.Tensor]
Batches = Sequence[torch.Tensor]
HAS_DYNAMO = 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters
ATC_OPSET = 11  # every ATC reads it
DYNAMO_OPSET = 18  # the first that PyTorch's newer exporter writes


class Format(NamedTuple):
    """Writes a network in one format, and reads it back."""
    ending: str  # of the default output's name
    make: Callable[[LoadedModel, ExportConfig], Tuple[Union[bytes, Dict[str, bytes]], str]]  # (content, a comment)
    run: Callable[[Any, LoadedModel, Batches], Logits]  # the logits of the bytes, or of the folder's path
    reader: str  # the package that reads it back
    files: Tuple[str, ...] = ()  # of a folder, whose content `make` returns by name; () for a single file
    takes: Tuple[str, ...] = ()  # the fields of `ExportConfig` that it has
    usage: Callable[[LoadedModel, str], List[str]] = lambda trained, path: []  # lines that show how to load the output
    defaults: Mapping[str, Any] = {}  # of the fields in `takes`
    convert: Any = None  # makes the output of the ONNX file: `atc.convert`


class NotChecked(Exception):
    """The package that reads the format back is not installed."""


def example_images(trained: LoadedModel, count: int) -> torch.Tensor:
    """Random images (count, C, H, W), with a fixed seed."""
    size = trained.preprocessing.input_size
    return torch.randn(count, trained.config.in_chans, size, size, generator=torch.Generator().manual_seed(count))


def run_program(kind: str, data: bytes, trained: LoadedModel, batches: Batches) -> Logits:
    """The logits of an exported program. Raises `UserError` if it lost its metadata."""
    found, start = PROGRAMS[kind].open(data)
    if {name: value for name, value in found.items() if name != exported.BATCH_SIZE} != metadata(trained):
        raise UserError('the export lost its metadata; nothing was written')
    program = start()
    return [program(images) for images in batches]


def package_version(module: str) -> str:
    return getattr(import_optional(module), '__version__', '')


def metadata(trained: LoadedModel, batch_size: Optional[int] = None) -> Dict[str, str]:
    """The model's spec as {name: string}; lists and dicts are JSON, in ASCII."""
    return {
        **({exported.BATCH_SIZE: str(batch_size)} if batch_size else {}),
        exported.PARAMETERS: str(sum(parameter.numel() for parameter in trained.model.parameters())),
        'model': trained.config.model,
        'classes': json.dumps(trained.classes),
        'preprocessing': json.dumps(trained.preprocessing.to_timm()),
        'pooling': 'mean of the patches' if trained.config.use_mean_pooling else 'class token',
        'input': 'float32 (batch, %d, height, width): %s from 0 to 1, less mean, divided by std' % (
            trained.config.in_chans, MODES[trained.config.in_chans]) + trained.preprocessing.preparation('; '),
        'output': 'logits (batch, %d), in the order of classes' % len(trained.classes),
        'activation': trained.activation,
        model_spec.KEY: json.dumps(trained.spec.to_dict()),
    }


def make_onnx(trained: LoadedModel, config: ExportConfig) -> Tuple[bytes, str]:
    """An ONNX file with its weights inside, for batches of any size, or of `config.batch_size`."""
    opset, onnx = config.opset, import_optional('onnx')
    for name in ('onnx', 'onnxscript') if HAS_DYNAMO else ('onnx',):
        if import_optional(name) is None:
            raise UserError('--format onnx needs %s; %s' % (name, EXTRA))
    size = sum(value.numel() * value.element_size() for value in trained.model.state_dict().values())
    if size >= PROTOBUF_LIMIT:
        raise UserError('--format onnx: the weights take %.1f GB, and a file holds 2 at most; use --format torch_export'
                        % (size / 1e9))
    reasons = []
    for version in [opset] if opset else OPSETS:
        try:
            proto = _export_onnx(onnx, trained, version, config.batch_size)
            onnx.helper.set_model_props(proto, metadata(trained, config.batch_size))
            data = proto.SerializeToString()
            if import_optional('onnxruntime') is not None:
                exported.onnx_session(data)
            return data, 'opset %d, %s' % (version, _described_batch(config))
        except Exception as error:  # the exporter and onnxruntime raise many types
            reasons.append((one_line(error) or type(error).__name__)[:200])
    raise UserError('--format onnx --opset %s: %s; leave --opset out, or give another (11 to 25 with PyTorch 2.12)'
                    % (opset or '/'.join(map(str, OPSETS)), reasons[0]))


def _described_batch(config: ExportConfig) -> str:
    return 'batches of %d' % config.batch_size if config.batch_size else 'any batch size'


def _export_onnx(onnx: Any, trained: LoadedModel, opset: int, batch_size: Optional[int]) -> Any:
    """The first exporter of PyTorch that writes this opset does it. Raises what the last one raises."""
    images: Any = example_images(trained, batch_size or EXAMPLE)
    names: Dict[str, Any] = dict(input_names=['image'], output_names=['logits'], opset_version=opset)
    if HAS_DYNAMO and opset >= DYNAMO_OPSET:
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # the exporter logs tracebacks
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # and prints its progress
                program: Any = torch.onnx.export(
                    trained.model, (images,), dynamo=True, verbose=False, dynamic_shapes=_dynamic(batch_size), **names)
                proto = program.model_proto
        finally:
            logging.disable(before)
    else:
        file: Any = io.BytesIO()
        names.update({'dynamo': False} if HAS_DYNAMO else {})
        torch.onnx.export(trained.model, images, file, **names, dynamic_axes=None if batch_size else {
            'image': {0: 'batch'}, 'logits': {0: 'batch'}})
        proto = onnx.load_model_from_string(file.getvalue())
    found = next(each.version for each in proto.opset_import if not each.domain)
    if found != opset:
        raise ValueError('PyTorch %s wrote opset %d instead' % (torch.__version__, found))
    return proto


def _dynamic(batch_size: Optional[int]) -> Any:
    return None if batch_size else ({0: torch.export.Dim('batch')},)


def make_torchscript(trained: LoadedModel, config: ExportConfig) -> Tuple[bytes, str]:
    file = io.BytesIO()
    traced = torch.jit.trace(trained.model, example_images(trained, EXAMPLE), check_trace=False)
    torch.jit.save(traced, file, _extra_files=_extra_files(metadata(trained)))
    return file.getvalue(), 'torch.jit.load(FILE, _extra_files={\'classes\': \'\'}) reads it'


def _extra_files(contents: Dict[str, str]) -> Any:
    """A dict of PyTorch 1.5's own type for this purpose."""
    files: Any = getattr(torch._C, 'ExtraFilesMap', dict)()
    for name, value in contents.items():
        files[name] = value
    return files


def make_torch_export(trained: LoadedModel, config: ExportConfig) -> Tuple[bytes, str]:
    if not hasattr(getattr(torch, 'export', None), 'Dim'):
        raise UserError('--format torch_export: PyTorch %s has no torch.export; use --format torchscript'
                        % torch.__version__)
    program = torch.export.export(trained.model, (example_images(trained, config.batch_size or EXAMPLE),),
                                  dynamic_shapes=_dynamic(config.batch_size))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata(trained, config.batch_size))
    return file.getvalue(), '%s, torch.export.load(FILE).module() reads it' % _described_batch(config)


def make_safetensors(trained: LoadedModel, config: ExportConfig) -> Tuple[bytes, str]:
    """The state dict with timm's names and shapes, without the buffers that timm computes."""
    tensors = {name: value for name, value in trained.model.state_dict().items()
               if not name.endswith('relative_position_index')}
    return _safetensors(tensors, metadata(trained)), 'for timm'


def run_safetensors(data: bytes, trained: LoadedModel, batches: Batches) -> Logits:
    from safetensors.numpy import load
    beit = import_optional('timm.models.beit')
    if not hasattr(beit, 'Beit'):
        raise NotChecked('this timm (%s) has no BEiT' % package_version('timm'))
    model = beit.Beit(**timm_arguments(trained))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load(data).items()})
    model.eval()
    return [model(images) for images in batches]


def timm_arguments(trained: LoadedModel) -> Dict[str, Any]:
    """The arguments of timm's `Beit` for this network."""
    model, block = trained.model, trained.model.blocks[0]
    return dict(
        img_size=trained.config.input_size, patch_size=model.patch_embed.patch_size[0], embed_dim=model.embed_dim,
        depth=len(model.blocks), num_heads=block.attn.num_heads, num_classes=len(trained.classes),
        global_pool='avg' if model.fc_norm is not None else 'token', use_abs_pos_emb=model.pos_embed is not None,
        use_rel_pos_bias=block.attn.has_relative_position, init_values=_layer_scale(trained),
        qkv_bias=block.attn.q_bias is not None, in_chans=trained.config.in_chans)


def timm_usage(trained: LoadedModel, path: str) -> List[str]:
    """The Python code that opens the file with timm: the registered name, and arguments other than its defaults."""
    arguments, name = timm_arguments(trained), trained.config.model
    if hasattr(import_optional('timm.models.beit'), name):
        usual = dict(img_size=modeling_finetune.MODELS[name]['img_size'], global_pool='avg', use_abs_pos_emb=False,
                     use_rel_pos_bias=True, qkv_bias=True, in_chans=3)
        chosen = {key: arguments[key] for key in usual if arguments[key] != usual[key]}
        if not arguments['init_values']:
            chosen['init_values'] = 0.  # create_model drops arguments that are None
        line = 'model = timm.create_model(%r, checkpoint_path=%r, %s)' % (
            name, path, format_arguments(dict(num_classes=len(trained.classes), **chosen)))
    else:  # as beit_nano_patch8_32
        line = 'model = timm.models.beit.Beit(%s); timm.models.load_checkpoint(model, %r)' % (
            format_arguments(arguments), path)
    images, mode = trained.preprocessing, MODES[trained.config.in_chans]
    return ['Load it: ' + line, 'Prepare images: timm.data.create_transform(%s)%s%s' % (
        format_arguments(images.to_timm()), ', of image.convert(%r)' % mode if mode != 'RGB' else '',
        images.preparation('; it does not know that '))]


def format_arguments(arguments: Dict[str, Any]) -> str:
    return ', '.join('%s=%r' % item for item in arguments.items())


def make_huggingface(trained: LoadedModel, config: ExportConfig) -> Tuple[Dict[str, bytes], str]:
    """The files of a folder for transformers."""
    try:
        tensors = hf_names.to_hugging_face(trained.model.state_dict())
    except KeyError as error:
        raise UserError('--format huggingface: BeitForImageClassification has no place for %s; use another --format'
                        % error) from None
    contents = _json(huggingface_config(trained)), _json(huggingface_preprocessor(trained)), _safetensors(
        tensors, dict(metadata(trained), format='pt')), model_card.write(trained)
    return dict(zip(FORMATS['huggingface'].files, contents)), 'for transformers' + trained.preprocessing.preparation(
        '; its preprocessor cannot hold that ')


def huggingface_config(trained: LoadedModel) -> Dict[str, Any]:
    model, config = trained.model, trained.config
    block = model.blocks[0]
    return dict(
        architectures=['BeitForImageClassification'], model_type='beit', hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks), num_attention_heads=block.attn.num_heads, hidden_act='gelu',
        intermediate_size=block.mlp.fc1.out_features, layer_norm_eps=block.norm1.eps, image_size=config.input_size,
        patch_size=model.patch_embed.patch_size[0], num_channels=model.patch_embed.proj.in_channels,
        hidden_dropout_prob=float(config.drop), attention_probs_dropout_prob=float(config.attn_drop_rate),
        drop_path_rate=float(config.drop_path), layer_scale_init_value=_layer_scale(trained), use_mask_token=False,
        use_absolute_position_embeddings=model.pos_embed is not None,
        use_relative_position_bias=block.attn.has_relative_position,
        use_shared_relative_position_bias=model.rel_pos_bias is not None,
        use_mean_pooling=model.fc_norm is not None, torch_dtype='float32',
        problem_type='%s_label_classification' % ('multi' if trained.activation == 'sigmoid' else 'single'),
        id2label={str(label): name for label, name in enumerate(trained.classes)},
        label2id={name: label for label, name in enumerate(trained.classes)})


def huggingface_preprocessor(trained: LoadedModel) -> Dict[str, Any]:
    """The evaluation transform, resize and centre crop, for CLIP's processor, which every transformers version has.

    BEiT's own takes no shorter side before transformers 5, and would distort the image.
    """
    images = trained.preprocessing
    lacks = ['has no --eval_fit letterbox'] * (images.crop_mode == 'border') + [
        'reads RGB, not --in_chans %d' % len(images.mean)] * (len(images.mean) != 3)
    if lacks:
        raise UserError('--format huggingface: its preprocessor %s; use another --format' % ' and '.join(lacks))
    square = {'height': images.input_size, 'width': images.input_size}
    return dict(
        image_processor_type='CLIPImageProcessor', do_convert_rgb=True, do_resize=True,
        size=square if images.crop_mode == 'squash' else {'shortest_edge': images.shorter_side},
        resample=int(getattr(Image, images.interpolation.upper())), do_center_crop=True,
        crop_size=square, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(images.mean), image_std=list(images.std))


def run_huggingface(folder: str, trained: LoadedModel, batches: Batches) -> Logits:
    transformers = import_optional('transformers')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.BeitForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return [model(pixel_values=images).logits for images in batches]


def _layer_scale(trained: LoadedModel) -> float:
    """The initial value of layer scale; 0.0 without layer scale."""
    return 0. if trained.model.blocks[0].gamma_1 is None else float(trained.config.layer_scale_init_value)


def _json(content: Dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + '\n').encode('ascii')


def _safetensors(tensors: Dict[str, torch.Tensor], description: Dict[str, str]) -> bytes:
    try:
        from safetensors.numpy import save  # the one for tensors needs a newer PyTorch than 1.8
    except ImportError:
        raise UserError('--format safetensors and huggingface need safetensors; '
                        + startup.pip_install('safetensors')) from None
    return save({name: value.detach().contiguous().numpy() for name, value in tensors.items()}, description)


def _program(kind: str, make: Any, ending: str = '', **more: Any) -> Format:
    run = functools.partial(run_program, kind)
    return Format(ending or PROGRAM_ENDINGS[kind], make, run, PROGRAMS[kind].reader, **more)


# flags.py reads `takes` and `files` from this source, so that wrong flags are refused before PyTorch is imported.
FORMATS = {
    'onnx': _program('onnx', make_onnx, takes=('opset', 'batch_size')),
    'om': _program('onnx', make_onnx, atc.ENDING, takes=('opset', 'batch_size', 'soc_version'), convert=atc.convert,
                   defaults={'opset': ATC_OPSET, 'batch_size': 1}),
    'torchscript': _program('torchscript', make_torchscript),
    'torch_export': _program('torch_export', make_torch_export, takes=('batch_size',)),
    'safetensors': Format('.safetensors', make_safetensors, run_safetensors, 'timm', usage=timm_usage),
    'huggingface': Format('-huggingface', make_huggingface, run_huggingface, 'transformers', files=(
        'config.json', 'preprocessor_config.json', 'model.safetensors', 'README.md')),
}
