"""Weights by name: the table, the way from a server to checkpoints/, broken downloads, the Hub, and the pages."""

import collections
import errno
import fcntl
import hashlib
import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest
import torch

import check_flags
import modeling_finetune
import run_class_finetuning
import run_predict
from beit import load, weights
from beit.checkpoint import inference_model, pretrained
from beit.config import ModelConfig
from beit.errors import UserError
from beit.files import download
from helpers import NANO, ROOT, TEST_DIR, cannot_run, photo, write_images

pytestmark = pytest.mark.fast

with open(os.path.join(TEST_DIR, 'published.json'), encoding='utf-8') as file:
    PUBLISHED = json.load(file)['weights']
NAME = 'beit_base_patch16_224_pt22k_ft1k'


# ---- the table

@pytest.mark.parametrize('facts', PUBLISHED, ids=lambda facts: facts['name'])
def test_a_name_has_the_published_facts(facts):
    found = weights.PUBLISHED[facts['name']]
    assert (found.url, found.input_size, found.classes) == (facts['url'], facts['input_size'], facts['classes'])
    assert found.model.replace('v2', '') == facts['model'] and found.model in modeling_finetune.MODELS
    half = modeling_finetune.input_statistics(found.model)[0] == (0.5,) * 3
    assert half == (facts['mean_std'] == '0.5')
    expected = facts['expected'] or {}
    assert (found.acc1, found.acc5) == (expected.get('acc1'), expected.get('acc5'))


def test_the_table_has_all_names_and_no_other():
    assert list(weights.PUBLISHED) == [facts['name'] for facts in PUBLISHED] and len(PUBLISHED) == 21


@pytest.mark.parametrize('name', ['beit_base_patch16_224_pt22k', 'beit_large_patch16_224_pt22k_ft22k'])
def test_the_size_is_that_of_the_network(name):
    known = weights.PUBLISHED[name]
    with torch.no_grad():
        model = inference_model.build_model(ModelConfig(known.model), known.classes)
    size = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert known.megabytes == pytest.approx(size, rel=0.02)


def test_the_page_lists_all_of_them():
    """checkpoints/README.md: name with its address, model, input, classes and published accuracy."""
    with open(os.path.join(ROOT, 'checkpoints', 'README.md'), encoding='utf-8') as file:
        rows = [line for line in file.read().splitlines() if line.startswith('| [`beit')]
    assert rows == ['| [`%s`](%s) | %s | %d | %s | %s |' % (
        each.name, each.url, each.megabytes, each.input_size, each.classes or '–', each.accuracy().replace('-', '–'))
        for each in weights.PUBLISHED.values()]


@pytest.mark.current_only
def test_list_shows_each_and_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, 'folders', lambda: [str(tmp_path)])
    (tmp_path / (NAME + '.pth')).write_bytes(bytes(3 * 10 ** 6))
    assert weights.main(['list']) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ['name', 'MB', 'input', 'classes'] and len(out) == 26
    assert not out[22] and out[23].startswith('model: the name up to the input size')
    assert [line.split()[-1] for line in out[24:]] == sorted(
        {facts['url'].replace(facts['name'], 'NAME') for facts in PUBLISHED}, reverse=True)
    assert max(len(line.replace(str(tmp_path), 'checkpoints')) for line in out) <= 100
    line = next(line for line in out if line.startswith(NAME + ' '))
    assert line.split() == [NAME, '3', '224', '1000', '83.7', '/', '96.6', str(tmp_path)]
    assert next(line for line in out if line.startswith('beit_base_patch16_224_pt22k ')).split()[1:] == [
        '~339', '224', '-', '-', '-']
    assert weights.main([]) == 2 and 'python -m beit.weights list' in capsys.readouterr().err
    done = subprocess.run([sys.executable, '-m', 'beit.weights', 'list'], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 26
    done = subprocess.run(['bash', '-c', '"$0" -m beit.weights list | head -1', sys.executable], cwd=ROOT,
                          stderr=subprocess.PIPE)
    assert b'Traceback' not in done.stderr
    monkeypatch.chdir(str(tmp_path.parent))
    assert weights.main(['list']) == 0 and ' 96.6  %s\n' % tmp_path.name in capsys.readouterr().out


# ---- a server that can send the rest of a file, and breaks off

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `server.body`; breaks off after `server.breaks` bytes, if any; `server.asked` has (path, Range)."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, start = self.server, 0
        asked = self.headers.get('Range')
        server.asked.append((self.path, asked))
        if asked and server.ranges:
            start = int(re.match(r'bytes=(\d+)-$', asked).group(1))
            self.send_response(206)
            self.send_header('Content-Range', 'bytes %d-%d/%d' % (start, len(server.body) - 1, len(server.body)))
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(server.body) - start))
        self.send_header('ETag', server.tag)
        self.send_header('Accept-Ranges', 'bytes')
        self.end_headers()
        self.wfile.write(server.body[start:server.breaks or None])


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tls')
    paths = str(folder / 'cert.pem'), str(folder / 'key.pem')
    try:
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', paths[1], '-out',
                        paths[0], '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        cannot_run('openssl', 'no openssl to make a certificate with')
    return paths


@pytest.fixture
def server(certificate, tmp_path, monkeypatch):
    """The releases' server, which sends the weights of a narrow network under every name."""
    for name in ('beit_base_patch16_224', 'beitv2_base_patch16_224'):
        monkeypatch.setitem(modeling_finetune.MODELS, name, dict(
            modeling_finetune.MODELS[name], embed_dim=32, depth=2, num_heads=2, patch_size=32))
    server = http.server.ThreadingHTTPServer(('localhost', 0), Server)
    server.daemon_threads, server.asked, server.breaks, server.tag, server.ranges = True, [], 0, '"v1"', True
    server.handle_error = lambda *_: None
    server.body = published_file(tmp_path, 1000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('SSL_CERT_FILE', certificate[0])
    monkeypatch.setattr(weights, 'RELEASES', 'https://localhost:%d' % server.server_port)
    monkeypatch.setattr(weights, 'folders', lambda: [str(tmp_path / 'checkpoints')])
    monkeypatch.setattr(download, 'TIMEOUT', 2.)
    yield server
    server.shutdown()
    server.server_close()


def published_file(folder, classes, change=lambda state: None, **settings):
    torch.manual_seed(0)
    path = str(folder / 'made.pth')
    state = inference_model.build_model(ModelConfig(**settings), classes).state_dict()
    change(state)
    torch.save({'model': state}, path)
    with open(path, 'rb') as file:
        body = file.read()
    os.remove(path)
    return body


def kept(tmp_path):
    folder = tmp_path / 'checkpoints'
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}


def test_a_name_is_downloaded_once_and_trained_with(server, tmp_path, capsys):
    data = write_images(tmp_path / 'data')
    command = ['--data_path', data, '--finetune', NAME, '--device=cpu', '--num_workers=0', '--no_curves',
               '--batch_size=4', '--maxstep=1', '--epochs=1', '--warmup_epochs=0', '--disable_eval_during_finetuning']
    for _ in range(2):
        assert run_class_finetuning.run(command) == 0
    out = capsys.readouterr().out
    assert server.asked == [('/v1.0/%s.pth' % NAME, None)]
    assert out.count('Downloading https://localhost') == 1 and 'weights from ' + NAME in out
    assert kept(tmp_path) == {NAME + '.pth': len(server.body)}
    loaded = load(NAME)  # which knows its model and classes
    assert (loaded.source, loaded.classes[:2]) == (NAME, ['n01440764', 'n01443537'])
    assert loaded.spec.architecture.model == 'beit_base_patch16_224'
    assert weights.resolve(weights.PUBLISHED[NAME].url, '--finetune') == str(tmp_path / 'checkpoints' / (NAME + '.pth'))
    assert len(server.asked) == 1


def test_a_broken_download_is_taken_up(server, tmp_path, capsys):
    server.breaks = 3 * 10 ** 5
    with pytest.raises(UserError, match=r'--finetune %s: download failed \(it broke off after 300000 of %d bytes\); '
                       'try again to resume it' % (NAME, len(server.body))):
        weights.resolve(NAME, '--finetune')
    (part, size), = kept(tmp_path).items()
    assert part.startswith(NAME + '.pth.part-') and size == 300000
    server.breaks = 0
    path = weights.resolve(NAME, '--finetune')
    assert server.asked[1:] == [('/v1.0/%s.pth' % NAME, None), ('/v1.0/%s.pth' % NAME, 'bytes=300000-')]
    with open(path, 'rb') as file:
        assert hashlib.sha256(file.read()).digest() == hashlib.sha256(server.body).digest()
    assert kept(tmp_path) == {NAME + '.pth': len(server.body)}
    assert 'Resuming after 300000 of %d bytes' % len(server.body) in capsys.readouterr().out


def test_a_file_that_changed_on_the_server_is_not_mixed_with_the_old_one(server, tmp_path):
    server.breaks = 3 * 10 ** 5
    with pytest.raises(UserError):
        weights.resolve(NAME, '--finetune')
    server.breaks, server.tag = 0, '"v2"'
    weights.resolve(NAME, '--finetune')
    assert [asked for _, asked in server.asked] == [None, None]
    assert kept(tmp_path)[NAME + '.pth'] == len(server.body)


def test_a_server_that_ignores_the_range_does_not_spoil_the_file(server, tmp_path):
    server.breaks, server.ranges = 3 * 10 ** 5, False
    with pytest.raises(UserError):
        weights.resolve(NAME, '--finetune')
    server.breaks = 0
    with pytest.raises(UserError, match='does not send the rest of .*part-.*; remove that file'):
        weights.resolve(NAME, '--finetune')
    assert NAME + '.pth' not in kept(tmp_path)


def without(*names):
    return lambda state: [state.pop(name) for name in names]


SPOILT = [
    (lambda folder: b'<html>a captive portal</html>', 'not a weights file'),
    (lambda folder: published_file(folder, 10), r'head.weight is (10, 32) there and (1000, 32) in ' + NAME),
    (lambda folder: published_file(folder, 0), r'head.weight is missing there and (1000, 32) in ' + NAME),
    (lambda folder: published_file(folder, 1000, model='beit_base_patch16_384', input_size=384),
     'blocks.0.attn.relative_position_bias_table is (532, 2) there and (172, 2) in ' + NAME),
    (lambda folder: published_file(folder, 1000, model='beit_large_patch16_224'),
     'blocks.2.norm1.weight is (32,) there and missing in ' + NAME),
    (lambda folder: published_file(folder, 1000, without('blocks.1.mlp.fc2.bias')),
     'blocks.1.mlp.fc2.bias is missing there and (32,) in ' + NAME),
    (lambda folder: published_file(folder, 1000, without('patch_embed.proj.weight')), 'patch_embed.proj.weight')]


@pytest.mark.parametrize('place', ['url', 'path'])
@pytest.mark.parametrize('spoil, says', SPOILT, ids=[says[:20] for _, says in SPOILT])
def test_what_is_not_these_weights_is_refused_and_not_kept(server, tmp_path, monkeypatch, spoil, says, place):
    """From the server, and from its place in checkpoints/; only a download is removed."""
    small = modeling_finetune.MODELS['beit_base_patch16_224']
    monkeypatch.setitem(modeling_finetune.MODELS, 'beit_base_patch16_384', dict(small, img_size=384))
    monkeypatch.setitem(modeling_finetune.MODELS, 'beit_large_patch16_224', dict(small, depth=3))
    server.body, before, path = spoil(tmp_path), {}, tmp_path / 'checkpoints' / (NAME + '.pth')
    if place == 'path':
        path.parent.mkdir()
        path.write_bytes(server.body)
        before = kept(tmp_path)
    with pytest.raises(UserError) as caught:
        weights.resolve(NAME, '--finetune')
    where = str(path) if place == 'path' else weights.PUBLISHED[NAME].url
    assert str(caught.value).startswith('--finetune %s: %s' % (NAME, where)) and says in str(caught.value)
    assert kept(tmp_path) == before and '.part' not in str(caught.value)


@pytest.mark.parametrize('name, classes, change', [
    ('beit_base_patch16_224_pt22k', 0, 'pretrained'), ('beitv2_base_patch16_224_pt1k_ft21k', 21841, None)])
def test_files_as_they_are_published_pass(server, tmp_path, name, classes, change):
    """Pretraining shares one bias table, has a last norm and heads of its own."""
    def pretrained_layout(state):
        tables = [key for key in state if '.relative_position_' in key]
        state['rel_pos_bias.relative_position_bias_table'] = state[tables[0]]
        state.update({'norm.weight': state.pop('fc_norm.weight'), 'norm.bias': state.pop('fc_norm.bias'),
                      'mask_token': torch.zeros(1, 1, 32), 'lm_head.weight': torch.zeros(8, 32)})
        without(*tables)(state)

    server.body = published_file(tmp_path, classes, pretrained_layout if change else lambda state: None)
    random = torch.random.get_rng_state()
    for _ in range(2):
        assert os.path.isfile(weights.resolve(name, '--finetune'))
    assert torch.equal(torch.random.get_rng_state(), random)  # the run draws the same numbers
    server.body = published_file(tmp_path, 1000)  # fine-tuned weights are no pretrained ones
    os.remove(str(tmp_path / 'checkpoints' / (name + '.pth')))
    with pytest.raises(UserError, match=r'head\.weight is \(1000, 32\) there|bias_table|norm'):
        weights.resolve(name, '--finetune')


@pytest.mark.parametrize('first', ['ends', 'breaks off'])
def test_a_second_program_waits_for_the_download_of_the_first(server, tmp_path, monkeypatch, first):
    lines, results, locked, gate = [], [], threading.Event(), threading.Event()
    monkeypatch.setattr(download, 'log_main', lines.append)
    server.breaks = 3 * 10 ** 5 if first == 'breaks off' else 0

    def resolve():
        try:
            results.append(weights.resolve(NAME, '--finetune'))
        except UserError as error:
            results.append(str(error))

    def until(condition):
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end, (lines, results)
            time.sleep(0.01)

    receive = download._receive
    monkeypatch.setattr(download, '_receive', lambda *args: (locked.set(), gate.wait(20), receive(*args))[2])
    one, two = threading.Thread(target=resolve), threading.Thread(target=resolve)
    one.start()
    until(locked.is_set)  # the first has the file
    two.start()
    until(lambda: 'Another program is downloading it; waiting for that to end' in lines)
    server.breaks = 0
    assert not results
    gate.set()
    for thread in (one, two):
        thread.join(20)
    path = str(tmp_path / 'checkpoints' / (NAME + '.pth'))
    assert path in results and kept(tmp_path) == {NAME + '.pth': len(server.body)}
    with open(path, 'rb') as file:
        assert file.read() == server.body
    assert [each for each in results if each != path] == [] if first == 'ends' else 'broke off' in str(results)
    assert len([line for line in lines if line.startswith('Resuming')]) == (first == 'breaks off')


def test_the_wait_for_another_program_is_interruptible(server, tmp_path, monkeypatch, capsys):
    server.breaks = 3 * 10 ** 5
    with pytest.raises(UserError):
        weights.resolve(NAME, '--resume')
    server.breaks, log = 0, download.log_main

    def log_and_interrupt(line):
        log(line)
        if line.startswith('Another program'):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(download, 'log_main', log_and_interrupt)
    with open(str(tmp_path / 'checkpoints' / next(iter(kept(tmp_path)))), 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_class_finetuning.run(['--eval', '--resume', NAME, '--device=cpu', '--num_workers=0', '--data_path',
                                         write_images(tmp_path / 'data')]) == 130
    out = capsys.readouterr().out
    assert out.count('Another program is downloading it; waiting for that to end') == 1
    assert 'interrupted by SIGINT' in out and list(kept(tmp_path).values()) == [300000]


def test_a_full_disk_says_where_and_how_much_and_the_next_run_resumes(server, tmp_path, monkeypatch):
    usage = collections.namedtuple('usage', 'free')
    real = download._receive

    def receive(response, file, *rest):
        file.write(response.read(3 * 10 ** 5))
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    size = len(server.body) / 1e6
    for free, needed in ((10 ** 9, size - 0.3), (10 ** 5, size - 0.3)):  # in the middle, and seen before
        monkeypatch.setattr(download, '_receive', receive)
        monkeypatch.setattr(download.shutil, 'disk_usage', lambda _, free=free: usage(free))
        with pytest.raises(UserError) as caught:
            weights.resolve(NAME, '--finetune')
        says = '%s: no space for %.1f MB; %.1f MB are free); make room, then try again to resume it' % (
            tmp_path / 'checkpoints', needed, free / 1e6)
        assert says in str(caught.value) and '--finetune ' + NAME in str(caught.value)
        assert list(kept(tmp_path).values()) == [300000]
    monkeypatch.undo()
    monkeypatch.setattr(download, '_receive', real)


@pytest.mark.parametrize('folder', ['/proc/x/beit/checkpoints', 'file/checkpoints'])
def test_a_folder_that_cannot_be_written_to_is_named(server, tmp_path, monkeypatch, folder):
    (tmp_path / 'file').write_bytes(b'')
    folder = os.path.join(str(tmp_path), folder)
    monkeypatch.setattr(weights, 'folders', lambda: [folder])
    with pytest.raises(UserError) as caught:
        weights.resolve(NAME, '--finetune')
    assert '--finetune %s: download failed (%s: cannot be written to: ' % (NAME, folder) in str(caught.value)
    assert 'set XDG_CACHE_HOME to another folder' in str(caught.value)


@pytest.mark.parametrize('program', ['training', 'prediction'])
def test_an_interrupted_download_says_that_it_resumes(server, tmp_path, monkeypatch, capsys, program):
    def receive(response, file, *rest):
        file.write(response.read(3 * 10 ** 5))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    real = download._receive
    monkeypatch.setattr(download, '_receive', receive)
    data = write_images(tmp_path / 'data')
    run, words = {'training': (run_class_finetuning.run, ['--eval', '--num_workers=0', '--data_path', data]),
                  'prediction': (run_predict.run, [os.path.join(data, 'val', 'cat')])}[program]
    assert run(words + ['--resume', NAME, '--device=cpu']) == 130
    (part, size), = kept(tmp_path).items()
    out, err = capsys.readouterr()
    says = 'interrupted by SIGINT; %s keeps the downloaded part, and the same command resumes it' % (
        tmp_path / 'checkpoints' / part)
    assert size == 300000 and says in out + err and 'nothing was' not in out + err
    monkeypatch.setattr(download, '_receive', real)
    weights.resolve(NAME, '--resume')
    assert server.asked[-1][1] == 'bytes=300000-'


def test_a_file_or_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / NAME).write_bytes(b'x')
    assert weights.published(NAME) is None and not weights.is_remote(NAME)
    assert weights.resolve(NAME, '--finetune') == NAME


def test_a_name_url_or_file_says_its_model_and_preprocessing(tmp_path, capsys):
    def settled(*words):
        args = run_class_finetuning.build_parser().parse_args(list(words))
        check_flags.settle(args)
        return args.model, args.input_size, args.imagenet_default_mean_and_std

    assert settled('--finetune=beitv2_large_patch16_224_pt1k') == ('beitv2_large_patch16_224', 224, True)
    out = capsys.readouterr().out
    assert 'pt1k: --model beitv2_large_patch16_224, --imagenet_default_mean_and_std True' in out
    url = weights.PUBLISHED['beitv2_large_patch16_224_pt1k_ft1k'].url
    mirror = 'https://mirror/a/beitv2_large_patch16_224_pt1k_ft1k.pth?sig=a/b'
    (tmp_path / 'beitv2_large_patch16_224_pt1k_ft1k.pth').write_bytes(b'')
    for source in (url, url + '#sha256=' + '0' * 64, mirror, str(tmp_path / 'beitv2_large_patch16_224_pt1k_ft1k.pth')):
        for words in (['--finetune', source], ['--eval', '--resume', source], ['--eval', '--finetune', source]):
            assert settled(*words) == ('beitv2_large_patch16_224', 224, True)
    capsys.readouterr()
    assert settled('--finetune', url, '--no_imagenet_default_mean_and_std', '--model=beit_large_patch16_224') == (
        'beit_large_patch16_224', 224, False)
    assert capsys.readouterr().out == (
        'beitv2_large_patch16_224_pt1k_ft1k: --model beit_large_patch16_224 (given; published: '
        'beitv2_large_patch16_224), --imagenet_default_mean_and_std False (given; published: True)\n')
    # A published command names v1's architecture for weights of v2: their mean and deviation stay ImageNet's.
    assert settled('--finetune', url, '--model=beit_large_patch16_224') == ('beit_large_patch16_224', 224, True)
    assert settled('--finetune=beit_base_patch16_224_pt22k', '--model=beitv2_base_patch16_224') == (
        'beitv2_base_patch16_224', 224, False)
    assert settled('--eval', '--resume=beit_large_patch16_512_pt22k_ft22kto1k') == (
        'beit_large_patch16_512', 512, False)
    assert settled('--finetune=' + NAME, '--model=beit_base_patch16_384', '--input_size=384') == (
        'beit_base_patch16_384', 384, False)  # flags win
    for source in ('x.pth', 'gone/beitv2_large_patch16_224_pt1k_ft1k.pth', url + 'x'):  # not published, not there
        assert settled('--finetune', source) == ('beit_base_patch16_224', 224, False)


@pytest.mark.parametrize('place', ['name', 'url', 'mirror', 'file'])
def test_evaluation_prediction_and_python_prepare_images_of_v2_alike(server, tmp_path, monkeypatch, capsys, place):
    """With ImageNet's mean and deviation, and without a line that says another one."""
    name = 'beitv2_base_patch16_224_pt1k_ft1k'
    (tmp_path / 'checkpoints').mkdir()
    path = tmp_path / ('checkpoints' if place in ('name', 'url') else 'elsewhere') / (name + '.pth')
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(server.body)
    source = {'name': name, 'url': weights.PUBLISHED[name].url, 'file': str(path),
              'mirror': 'https://localhost:%d/%s.pth' % (server.server_port, name)}[place]
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    loaded = load(source)
    assert loaded.spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.spec.architecture.model == 'beitv2_base_patch16_224' and loaded.classes[0] == 'n01440764'
    assert 'does not describe' not in capsys.readouterr().out
    given = inference_model.load_for_inference(source, model='beit_base_patch16_224',
                                               imagenet_default_mean_and_std=False)
    assert given.preprocessing.mean == (0.5,) * 3 and given.config.model == 'beit_base_patch16_224'
    out = capsys.readouterr().out
    assert '--model beit_base_patch16_224 (the checkpoint: beitv2_base_patch16_224), mean (0.5, 0.5, 0.5)' in out
    means = []
    monkeypatch.setattr(run_class_finetuning.datasets, 'build_loaders', lambda inputs, *_: means.append(
        inputs.evaluation.mean) or refuse())
    (tmp_path / 'val' / 'n01440764').mkdir(parents=True)
    photo(0).save(str(tmp_path / 'val' / 'n01440764' / 'a.png'))
    command = ['--eval', '--resume', source, '--data_path', str(tmp_path), '--device=cpu', '--num_workers=0']
    assert run_class_finetuning.run(command) == 2
    assert means == [(0.485, 0.456, 0.406)]
    out = capsys.readouterr().out
    assert 'does not describe' not in out and name + ': --model beitv2_base_patch16_224, --imagenet' in out


def refuse():
    raise UserError('far enough')


def test_the_line_on_unknown_preprocessing_says_what_is_used(server, tmp_path, capsys):
    path = tmp_path / 'other.pth'
    path.write_bytes(server.body)
    for model, says in (('beit_base_patch16_224', 'a mean and deviation of 0.5'), ('beitv2_base_patch16_224',
                                                                                  "ImageNet's mean and deviation")):
        mean = inference_model.load_for_inference(str(path), model=model).preprocessing.mean
        assert (mean == (0.5,) * 3) == ('0.5' in says)
        assert '%s does not describe its preprocessing; using %s and' % (path, says) in capsys.readouterr().out


def test_a_misspelt_name_is_refused_before_anything_starts(refused, tmp_path):
    refused(NANO + ['--data_path', write_images(tmp_path / 'data'), '--finetune', NAME + 'x'], '--finetune ' + NAME,
            'no such file', 'did you mean %s or ' % NAME)


# ---- the Hugging Face Hub

class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that fetches single files; `server.files` by name."""

    def log_message(self, *_):
        pass

    def answer(self):
        found = re.match(r'/owner/name/resolve/\w+/([\w.]+)$', self.path)
        body = self.server.files.get(found.group(1)) if found else None
        self.server.asked.append(self.path)
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header('X-Error-Code', 'EntryNotFound' if found else 'RepoNotFound')
        else:
            self.send_header('ETag', '"%s"' % hashlib.sha256(body).hexdigest())
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('Content-Length', str(len(body or b'')))
        self.end_headers()
        return body or b''

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip('huggingface_hub')
    server = http.server.ThreadingHTTPServer(('localhost', 0), Hub)
    server.daemon_threads, server.files, server.asked = True, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', 'http://localhost:%d' % server.server_port)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.current_only
@pytest.mark.parametrize('config', [{'model_type': 'beit'}, {'architecture': 'beit_base_patch16_224'}])
def test_weights_of_the_hub(hub, tmp_path, capsys, config):
    from safetensors.torch import save
    model = inference_model.build_model(ModelConfig('beit_nano_patch8_32', 32), 2)
    hub.files.update({'config.json': json.dumps(config).encode(), 'model.safetensors': save(model.state_dict())})
    data = write_images(tmp_path / 'data')
    command = NANO + ['--data_path', data, '--finetune', 'hf-hub:owner/name', '--batch_size=4', '--maxstep=1',
                      '--epochs=1', '--warmup_epochs=0']
    assert run_class_finetuning.run(command) == 0
    assert re.search(r'Loaded (\d+) of \1 weights from hf-hub:owner/name', capsys.readouterr().out)
    assert run_class_finetuning.run(NANO + ['--data_path', data, '--eval', '--finetune', 'hf-hub:owner/name@main']) == 0
    assert 'Acc@1' in capsys.readouterr().out


@pytest.mark.current_only
@pytest.mark.parametrize('source, says', [
    ('hf-hub:owner/name', 'has no model.safetensors'),
    ('hf-hub:owner/gone', 'hf-hub:owner/gone: download failed'),
    ('hf-hub:not a name', 'hf-hub:not a name: .* did you mean hf-hub:owner/name'),
    ('hf-hub:owner/a name', r'hf-hub:owner/a name: download failed \(.*[^ ]\); fetch')])
def test_what_the_hub_does_not_have(hub, source, says):
    hub.files['config.json'] = b'{"model_type": "beit"}'
    with pytest.raises(UserError, match=says) as caught:
        pretrained.load_pretrained(torch.nn.Linear(1, 1), source)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text, shown', [
    ('404 Client Error. (Request ID: Root=1-a;b)\n\nNot Found. %s If (as here' % ('See it. ' * 45) + ' long' * 40,
     '404 Client Error. Not Found.%s' % (' See it.' * 45)),
    ('gone (as here)', 'gone (as here)'), ('', 'ValueError')])
def test_an_error_of_the_hub_is_whole_sentences(monkeypatch, text, shown):
    huggingface_hub = pytest.importorskip('huggingface_hub')

    def fail(*args, **more):
        raise ValueError(text)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
    with pytest.raises(UserError) as caught:
        weights.resolve('hf-hub:o/n', '--finetune')
    assert '(%s); fetch' % shown in str(caught.value)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match='--finetune hf-hub:o/n needs huggingface_hub; run: .*pip install'):
        weights.resolve('hf-hub:o/n', '--finetune')
