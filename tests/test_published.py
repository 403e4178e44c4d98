"""The published commands of BEiT and BEiT v2, as printed, and what their flags mean."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import check_flags
import flags
import modeling_finetune
import run_class_finetuning
from beit import weights
from beit.checkpoint import inference_model, pretrained
from beit.config import ModelConfig
from beit.data.transforms import EvalTransform
from beit.errors import UserError
from beit.files import weights_file
from beit.model_spec import ModelSpec, imagenet_wnids
from helpers import NANO, RUN, TEST_DIR, photo, write_images

pytestmark = pytest.mark.fast

with open(os.path.join(TEST_DIR, 'published.json'), encoding='utf-8') as file:
    COMMANDS = json.load(file)['commands']
NAMES = ['%d %s' % (number, ' '.join(re.findall(r'eval|robust_test|large|base|pt\w+', ' '.join(command))))
         for number, command in enumerate(COMMANDS)]
EVALUATIONS = [command for command in COMMANDS if '--eval' in command]
WNIDS = imagenet_wnids(1000)


def settled(command):
    args = run_class_finetuning.build_parser().parse_args(list(command))
    check_flags.settle(args)
    return args


def in_place(command, folder, weights_path):
    """A published command with its placeholders filled in."""
    return [word.replace('DIR', str(folder)).replace('OUT', str(folder / 'out')).replace('WEIGHTS', weights_path)
            if re.match('DIR|OUT|WEIGHTS', word) else word for word in command]


@pytest.fixture
def small(monkeypatch):
    """The published architectures with two narrow blocks."""
    for name in weights.PUBLISHED.values():
        monkeypatch.setitem(modeling_finetune.MODELS, name.model, dict(
            modeling_finetune.MODELS.get(name.model), embed_dim=32, depth=2, num_heads=2, patch_size=32))


@pytest.fixture
def published(small, monkeypatch, tmp_path):
    """published(model): weights as they are published, 1,000 outputs without names, which every URL leads to."""
    def make(name, input_size=224):
        torch.manual_seed(0)
        model = inference_model.build_model(ModelConfig(name, input_size), 1000).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        path = str(tmp_path / 'weights.pth')
        torch.save({'model': model.state_dict()}, path)
        monkeypatch.setattr(weights, 'resolve', lambda source, flag: path if '://' in source else source)
        return model
    return make


def wnid_folders(root, wnids, splits=('val',)):
    for split in splits:
        for number, wnid in enumerate(wnids):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            photo(number, 40, 32).save(str(folder / 'a.png'))


def logits_of(model, root, wnids, flags=()):
    """The outputs for each folder's image, prepared by Pillow alone, as (folders, 1000)."""
    size, imagenet = model.patch_embed.img_size[0], '--imagenet_default_mean_and_std' in flags
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else ((0.5,) * 3, (0.5,) * 3)
    batch = []
    for wnid in wnids:
        with Image.open(str(root / wnid / 'a.png')) as image:
            side = int(size / (224 / 256)) if size < 384 else size
            image = image.resize((int(side * image.width / image.height), side), Image.BICUBIC)
            left, top = (int(round((length - size) / 2)) for length in image.size)
            image = image.crop((left, top, left + size, top + size))
        pixels = (np.asarray(image, np.float64) / 255 - mean) / std
        batch.append(torch.from_numpy(pixels).permute(2, 0, 1).float())
    with torch.no_grad():
        return model(torch.stack(batch))


@pytest.mark.parametrize('command', COMMANDS, ids=NAMES)
def test_a_published_command_is_understood(command, tmp_path, monkeypatch):
    """By the parser and every check before the start; each flag has the value that is printed."""
    for folder in ('train', 'val'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'weights.pth').write_bytes(b'')
    monkeypatch.setattr(check_flags, 'check_compute', lambda args: None)  # this machine's precision
    args = run_class_finetuning.build_parser().parse_args(in_place(command, tmp_path, str(tmp_path / 'weights.pth')))
    check_flags.check_args(args)
    words = in_place(command, tmp_path, str(tmp_path / 'weights.pth')) + ['--']
    for flag, value in zip(words, words[1:]):
        if not flag.startswith('--') or flag == '--' or flag == '--finetune' and args.eval:
            continue
        found = getattr(args, flag[2:])
        assert found is True if value.startswith('--') else str(found) == value or found == float(value), flag
    if '--enable_deepspeed' in command:
        assert (args.amp, args.opt_level, args.loss_scale) == (True, 'O2', 'dynamic')
    if args.eval:
        assert args.resume.startswith('https://') and not args.finetune


@pytest.mark.parametrize('command', EVALUATIONS, ids=[' '.join(each[:4]) for each in EVALUATIONS])
def test_a_published_evaluation_gives_the_accuracy_of_the_named_classes(command, published, tmp_path, capsys):
    """On folders of another order and number than the outputs, on whose logits alone they are evaluated."""
    model = published(command[command.index('--model') + 1],
                      int(command[command.index('--input_size') + 1]) if '--input_size' in command else 224)
    robust = '--robust_test' in command
    chosen = sorted(WNIDS[:1000:5]) if robust else [WNIDS[place] for place in (900, 3, 411)]
    wnid_folders(tmp_path, chosen)
    root = tmp_path / 'val'
    (tmp_path / 'train').mkdir()
    logits = logits_of(model, root, chosen, command)
    if robust:  # the folder itself, as printed
        command = [str(root) if word == 'DIR' else word for word in command]
    logits = logits[:, [WNIDS.index(wnid) for wnid in chosen]]
    labels = torch.arange(len(chosen))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    top5 = (logits.topk(min(5, len(chosen)))[1] == labels[:, None]).any(1).float().mean().item()
    options = ['--device=cpu', '--num_workers=0', '--no_curves']
    assert run_class_finetuning.run(in_place(command, tmp_path, '') + options) == 0
    out = capsys.readouterr().out
    figures = re.search(r'\* Acc@1 \S+(?: Acc@5 (\S+))? loss (\S+)', out)
    assert float(figures.group(2)) == pytest.approx(loss, rel=1e-3)
    if robust:
        assert float(figures.group(1)) == pytest.approx(100 * top5, abs=100 / len(chosen) + 0.01)
    else:  # any answer is among the first five of three classes
        assert figures.group(1) is None
    assert "assuming ImageNet's classes" in out
    assert 'Evaluated on the logits of %d of the 1000 classes' % len(chosen) in out
    assert ('--robust_test imagenet_r' in out) == robust


def test_published_weights_keep_their_positions_on_folders_of_other_names():
    assert imagenet_wnids(1000, ['cat', 'dog']) == imagenet_wnids(1000, ['n01440764', 'n99999999', 'cat']) == []
    assert imagenet_wnids(21841, ['n01440764']) == imagenet_wnids(1000, []) == []
    assert len(set(WNIDS)) == 1000 and sorted(WNIDS) == WNIDS


@pytest.mark.parametrize('right, wrong', [([900, 3], 'cat'), ([900, 3], 'a'), ([900, 3], 'n99999999'),
                                          (range(1, 1000), 'aardvark'), (range(1, 1000), 'zebra')])
def test_a_folder_that_is_not_imagenets_is_named_and_shifts_no_label(published, refused, tmp_path, right, wrong):
    published('beit_base_patch16_224')
    photo(0, 40, 32).save(str(tmp_path / 'a.png'))
    for name in [wrong] + [WNIDS[place] for place in right]:
        (tmp_path / 'val' / name).mkdir(parents=True)
        os.link(str(tmp_path / 'a.png'), str(tmp_path / 'val' / name / 'a.png'))
    refused(['--eval', '--finetune=https://x/w.pth', '--model=beit_base_patch16_224', '--device=cpu', '--num_workers=0',
             '--data_path', str(tmp_path)], 'the data has classes that the checkpoint does not know: %s;' % wrong)


def test_training_gives_a_misnamed_folder_no_row_of_another_class():
    state = {'head.weight': torch.arange(1000.)[:, None], 'head.bias': torch.arange(1000.)}
    model = torch.nn.Sequential()
    model.add_module('head', torch.nn.Linear(1, 1000))
    before = model.head.bias.detach().clone()
    classes = sorted(['aardvark'] + WNIDS[1:])
    pretrained.keep_head_rows(state, model, [], classes)
    assert state['head.bias'][0] == before[0]
    assert state['head.bias'][1:].tolist() == state['head.weight'][1:, 0].tolist() == [
        WNIDS.index(name) for name in classes[1:]]


def test_the_folder_names_are_those_that_timm_ships():
    timm_data = pytest.importorskip('timm.data')
    path = os.path.join(os.path.dirname(timm_data.__file__), '_info', 'imagenet_synsets.txt')
    if not os.path.isfile(path):
        pytest.skip('this timm does not list them')
    with open(path, encoding='utf-8') as file:
        assert file.read().split() == WNIDS


def test_training_takes_the_rows_of_published_weights_by_name(published, tmp_path, capsys):
    published('beit_base_patch16_224')
    wnid_folders(tmp_path, [WNIDS[place] for place in (900, 3)], ('train', 'val'))
    command = ['--model=beit_base_patch16_224', '--data_path', str(tmp_path), '--finetune', 'https://x/weights.pth',
               '--device=cpu', '--num_workers=0', '--no_curves', '--batch_size=2', '--epochs=1', '--warmup_epochs=0']
    assert run_class_finetuning.run(command) == 0
    assert 'Head: the rows of 2 of 2 classes come from the file, by name' in capsys.readouterr().out


@pytest.mark.computes
def test_deepspeed_is_half_precision_with_a_dynamic_scale(tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    status = run_class_finetuning.run(RUN + ['--data_path', data, '--epochs=1', '--maxstep=1', '--enable_deepspeed'])
    out, err = capsys.readouterr()
    if status:  # an older PyTorch, whose operators lack bfloat16 on a CPU
        assert '--opt-level O2: this PyTorch cannot train' in err
        return
    line = '--enable_deepspeed: the same computation without DeepSpeed, --amp=True --opt_level=O2 --loss_scale=dynamic'
    assert line in out and re.search(r'Precision: .*O2', out)
    args = settled(['--enable_deepspeed', '--loss_scale=64', '--opt_level=O1'])
    assert (args.amp, args.opt_level, args.loss_scale) == (True, 'O1', 64.)  # flags that are given win


@pytest.mark.parametrize('words, says', [
    (['--robust_test=imagenet_r'], ['--robust_test imagenet_r', 'belongs to --eval']),
    (['--robust_test=sketch', '--eval', '--resume=x'], ['--robust_test', 'sketch', 'imagenet_a']),
    (['--eval', '--resume=a', '--finetune=b'], ['--finetune b', '--eval evaluates --resume']),
    (['--image_folder_class_index_file=gone.txt'], ['--image_folder_class_index_file gone.txt',
                                                    'no such file; give a file of class folders']),
])
def test_what_cannot_be_meant_is_refused(refused, tmp_path, words, says):
    refused(NANO + ['--data_path', write_images(tmp_path / 'data')] + words, *says)


def test_robust_test_asks_for_its_200_classes(published, refused, tmp_path):
    published('beit_base_patch16_224')
    wnid_folders(tmp_path, WNIDS[:3])
    flags = ['--model=beit_base_patch16_224', '--eval', '--finetune=https://x/w.pth', '--device=cpu', '--num_workers=0',
             '--data_path', str(tmp_path), '--robust_test=imagenet_a']
    refused(flags, '--robust_test imagenet_a', '200 classes', 'the data has 3')


def test_weights_without_a_head_are_not_evaluated(small, refused, tmp_path):
    wnid_folders(tmp_path, WNIDS[:3])
    model = inference_model.build_model(ModelConfig(), 0)
    torch.save({'model': model.state_dict()}, str(tmp_path / 'w.pth'))
    refused(['--eval', '--finetune', str(tmp_path / 'w.pth'), '--data_path', str(tmp_path), '--device=cpu'],
            'w.pth', 'no classification head', 'fine-tune it first')


def test_the_class_index_file_orders_the_outputs(tmp_path, capsys):
    data = write_images(tmp_path / 'data', classes=('ant', 'bee'))
    index = tmp_path / 'index.txt'
    index.write_text('bee\nwasp\nant\n')
    flags = RUN + ['--data_path', data, '--epochs=1', '--maxstep=1', '--output_dir', str(tmp_path / 'out')]
    assert run_class_finetuning.run(flags + ['--image_folder_class_index_file', str(index)]) == 0
    content = weights_file.load_weights_file(str(tmp_path / 'out' / 'checkpoint-best.pth'))
    assert content['classes'] == ['bee', 'wasp', 'ant'] and len(content['model']['head.weight']) == 3
    index.write_text('bee\n')
    capsys.readouterr()
    assert run_class_finetuning.run(flags + ['--image_folder_class_index_file', str(index)]) == 2
    assert 'it does not name the class folders ant' in capsys.readouterr().err


def test_disable_qkv_bias_leaves_the_bias_out_and_is_kept(tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    out = str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--data_path', data, '--epochs=1', '--disable_qkv_bias', '--output_dir',
                                           out]) == 0
    loaded = inference_model.load_for_inference(out)
    assert not any('q_bias' in name for name in loaded.model.state_dict())
    assert loaded.spec.architecture.qkv_bias is False
    images = torch.randn(2, 3, 32, 32)
    block = loaded.model.blocks[0].attn  # plain attention without a bias
    q, k, v = block.queries_keys_values(loaded.model.patch_embed(images))
    expected = loaded.model.patch_embed(images) @ block.qkv.weight.t()
    assert torch.allclose(torch.cat([each.transpose(1, 2).flatten(2) for each in (q, k, v)], -1), expected, atol=1e-6)
    capsys.readouterr()
    assert run_class_finetuning.run(RUN + ['--data_path', data, '--eval', '--resume', out]) == 0


def test_model_filter_name_takes_the_weights_below_it(tmp_path, capsys):
    torch.manual_seed(0)
    data, model = write_images(tmp_path / 'data'), inference_model.build_model(ModelConfig(
        'beit_nano_patch8_32', 32, rel_pos_bias=False, abs_pos_emb=True, layer_scale_init_value=0.), 2)
    path = str(tmp_path / 'moco.pth')
    torch.save({'model': dict({'encoder.' + name: value for name, value in model.state_dict().items()},
                              **{'decoder.w': torch.zeros(3)})}, path)
    flags = RUN + ['--data_path', data, '--epochs=1', '--maxstep=1', '--finetune', path]
    assert run_class_finetuning.run(flags + ['--model_filter_name=encoder.']) == 0
    assert re.search(r'Loaded (\d+) of \1 weights', capsys.readouterr().out)
    assert run_class_finetuning.run(flags + ['--model_filter_name=other.']) == 2
    assert "no weight has the prefix 'other.'" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['beitv2_base_patch16_224', 'beitv2_large_patch16_224'])
def test_models_of_v2_take_imagenets_mean_and_std(name):
    half, imagenet = (0.5,) * 3, (0.485, 0.456, 0.406)
    assert EvalTransform.from_config(settled(['--model', name])).mean == imagenet
    assert EvalTransform.from_config(settled(['--model', name, '--no_imagenet_default_mean_and_std'])).mean == half
    assert EvalTransform.from_config(settled(['--model', name.replace('v2', '')])).mean == half
    assert ModelSpec.from_flags({'model': name}, None, 3).preprocessing.mean == imagenet
    spec = ModelSpec.from_flags({'model': name, 'imagenet_default_mean_and_std': False}, None, 3)
    assert spec.preprocessing.mean == half  # as a checkpoint says


@pytest.mark.parametrize('name', ['beitv2_base_patch16_224', 'beitv2_large_patch16_224'])
def test_models_of_v2_are_timms(name, monkeypatch):
    beit = pytest.importorskip('timm.models.beit')
    if not hasattr(beit, name):
        pytest.skip('this timm has no BEiT v2')
    monkeypatch.setitem(modeling_finetune.MODELS, name, dict(modeling_finetune.MODELS[name], depth=1))
    model = inference_model.build_model(ModelConfig(name), 10).eval()
    theirs = getattr(beit, name)(num_classes=10, depth=1).eval()
    missing = model.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert all(key.endswith('relative_position_index') for key in missing)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(model(images), theirs(images), atol=1e-5)
    published = [cfg for key, cfg in beit.default_cfgs.items() if key.startswith(name)]
    assert published and all(tuple(cfg['mean'] if isinstance(cfg, dict) else cfg.default.mean) ==
                             tuple(model.default_cfg['mean']) for cfg in published)


def test_a_misspelt_model_of_v2_is_found():
    with pytest.raises(UserError, match='beitv2_base'):
        check_flags.check_early(flags.TRAINING, settled(['--model', 'beitv2_bas_patch16_224']))
