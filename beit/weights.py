"""Published weights by name: where they are, what they reach, and their way to this machine.

    python -m beit.weights list     # all names, with the files that are here already
"""

import os
import re
import sys
from typing import Any, Dict, List, NamedTuple, Optional

from beit import startup
from beit.errors import UserError, escape_text, print_error, print_line
from beit.paths import cache_folder, project_root

RELEASES = 'https://github.com/addf400/files/releases/download'
HUB = 'hf-hub:'
HUB_FILES = ('config.json', 'preprocessor_config.json', 'model.safetensors', 'pytorch_model.bin')


class Weights(NamedTuple):
    """A published file. Accuracies are the publishers', in percent on ImageNet-1k; None where they give none."""
    name: str
    acc1: Optional[float] = None
    acc5: Optional[float] = None

    @property
    def url(self) -> str:
        return '%s/%s/%s.pth' % (RELEASES, 'BEiT-v2' if self.name.startswith('beitv2_') else 'v1.0', self.name)

    @property
    def model(self) -> str:
        return '_'.join(self.name.split('_')[:4])

    @property
    def input_size(self) -> int:
        return int(self.name.split('_')[3])

    @property
    def classes(self) -> int:
        """How many outputs the head has; 0: pretrained, without a head."""
        return 0 if '_ft' not in self.name else 21841 if re.search('_ft2[12]k$', self.name) else 1000

    @property
    def megabytes(self) -> int:
        """About how large the file is: float32 weights of the blocks and the head."""
        width, depth = (1024, 24) if '_large_' in self.name else (768, 12)
        return 4 * (12 * depth * width + self.classes) * width // 10 ** 6

    @property
    def flags(self) -> Dict[str, Any]:
        """What the flags of its architecture and preprocessing are."""
        import modeling_finetune  # and timm, which `list` does not need
        return dict(model=self.model, input_size=self.input_size, imagenet_default_mean_and_std=(
            modeling_finetune.input_statistics(self.model)[0] != modeling_finetune.INPUT_MEAN))

    def accuracy(self) -> str:
        return ' / '.join('%g' % each for each in (self.acc1, self.acc5) if each is not None) or '-'


PUBLISHED = {each.name: each for each in (
    Weights('beit_base_patch16_224_pt22k'),
    Weights('beit_large_patch16_224_pt22k'),
    Weights('beit_base_patch16_224_pt22k_ft22k'),
    Weights('beit_large_patch16_224_pt22k_ft22k'),
    Weights('beit_base_patch16_224_pt22k_ft1k', 83.7, 96.6),
    Weights('beit_base_patch16_224_pt22k_ft22kto1k', 85.2, 97.6),
    Weights('beit_base_patch16_384_pt22k_ft22kto1k', 86.82, 98.124),
    Weights('beit_large_patch16_224_pt22k_ft1k', 86.0, 97.6),
    Weights('beit_large_patch16_224_pt22k_ft22kto1k', 87.396, 98.282),
    Weights('beit_large_patch16_384_pt22k_ft22kto1k', 88.408, 98.602),
    Weights('beit_large_patch16_512_pt22k_ft22kto1k', 88.6, 98.658),
    Weights('beitv2_base_patch16_224_pt1k'),
    Weights('beitv2_large_patch16_224_pt1k'),
    Weights('beitv2_base_patch16_224_pt1k_ft21k'),
    Weights('beitv2_large_patch16_224_pt1k_ft21k'),
    Weights('beitv2_base_patch16_224_pt1k_300e_ft1k', 85.0),
    Weights('beitv2_base_patch16_224_pt1k_ft1k', 85.5, 97.5),
    Weights('beitv2_base_patch16_224_pt1k_ft21kto1k', 86.458, 97.978),
    Weights('beitv2_large_patch16_224_pt1k_300e_ft1k', 86.6),
    Weights('beitv2_large_patch16_224_pt1k_ft1k', 87.3, 98.2),
    Weights('beitv2_large_patch16_224_pt1k_ft21kto1k', 88.37, 98.578))}


def published(source: str) -> Optional[Weights]:
    """The published weights that a flag names: by name, unless a file or folder has it; by a URL or file of it."""
    named = re.search(r'(?:^|/)(\w+)\.pth(?:[?#].*)?$', source)
    if named and ('://' in source or os.path.isfile(source)):
        return PUBLISHED.get(named.group(1))
    return None if os.path.exists(source) else PUBLISHED.get(source)


def is_remote(source: str) -> bool:
    """Whether `resolve` may have to download it."""
    return bool(re.match('[a-z]+://|%s[^/]+/' % HUB, source)) or source in PUBLISHED and not os.path.exists(source)


def resolve(source: str, flag: str) -> str:
    """The local path of weights: of a published name, an address of the Hub (then a folder), a URL; or the path itself.

    The first process downloads the missing files. Raises `UserError`, which names `flag`, if that fails or a file
    holds other weights than its name says.
    """
    from beit.files import download  # imports PyTorch, for several processes
    known = published(source)
    if source.startswith(HUB):
        return resolve_hub(source, flag)
    if known is None or source not in (known.name, known.url):
        return download.resolve_url(source, flag)
    path = find(known) or os.path.join(folders()[0], known.name + '.pth')
    shown = '%s %s' % (flag, escape_text(source))
    download.fetch(known.url, path, shown, check=lambda file: check_content(known, file, file == path, shown),
                   remedy='copy it to checkpoints/ on each machine')
    return path


def folders() -> List[str]:
    """Where weights are kept, the first for new ones: checkpoints/, or the user's cache where that is read-only."""
    both = [os.path.join(root, 'checkpoints') for root in (project_root(), cache_folder())]
    return both if os.access(both[0], os.W_OK) else both[::-1]


def find(known: Weights) -> str:
    """The path of a published file on this machine, or ''."""
    paths = [os.path.join(folder, known.name + '.pth') for folder in folders()]
    return next(filter(os.path.isfile, paths), '')


def check_content(known: Weights, path: str, is_kept: bool, shown: str) -> None:
    """Raise a `UserError` where a file, kept or just downloaded, is damaged or not the network of its name."""
    import torch  # which `list` does not need
    import modeling_finetune
    from beit.files import weights_file
    where = escape_text(path) if is_kept else known.url
    try:
        content = weights_file.load_weights_file(path)
    except UserError as error:
        raise UserError('%s: %s' % (shown, str(error).replace(escape_text(path), where))) from None
    states = [content] + [content.get(key) for key in ('model', 'module')] if isinstance(content, dict) else []
    state = next((each for each in states if isinstance(each, dict) and 'cls_token' in each), {})
    with torch.random.fork_rng(devices=[]):  # the run's random numbers stay as they are
        block = getattr(modeling_finetune, known.model)(depth=1, num_classes=known.classes, img_size=known.input_size,
                                                        use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()
              if not re.search('_index$' if known.classes else '_index$|^fc_norm', name)}  # pretraining: another norm
    depth = modeling_finetune.MODELS[known.model]['depth']
    wanted = {name.replace('blocks.0.', 'blocks.%d.' % number): shape for number in range(depth)
              for name, shape in shapes.items()}
    for name in [*wanted, 'head.weight', 'blocks.%d.norm1.weight' % depth]:
        shared = state.get('rel_pos_bias.relative_position_bias_table') if name.endswith('_bias_table') else None
        found, right = (str(each or 'missing') for each in (
            tuple(getattr(state.get(name, shared), 'shape', ())), wanted.get(name)))
        if found != right:
            raise UserError('%s: %s has other weights: %s is %s there and %s in %s; %s' % (
                shown, where, name, found, right, known.name, 'remove that file' if is_kept else
                'fetch the file yourself and give its path'))


def resolve_hub(source: str, flag: str) -> str:
    """The local folder of hf-hub:owner/name or hf-hub:owner/name@revision, of the Hugging Face Hub or HF_ENDPOINT."""
    shown = '%s %s' % (flag, escape_text(source))
    try:
        import huggingface_hub
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise UserError('%s needs huggingface_hub; %s' % (shown, startup.pip_install('huggingface_hub'))) from None
    from beit.distributed import process_group
    repository, _, revision = source[len(HUB):].partition('@')

    def fetch(name: str) -> str:
        try:
            return huggingface_hub.hf_hub_download(repository, name, revision=revision or None,
                                                   endpoint=os.environ.get('HF_ENDPOINT') or None)
        except LocalEntryNotFoundError:  # no network, and not in the cache
            raise
        except EntryNotFoundError:
            return ''

    def fetch_all() -> str:
        try:
            config, _ = fetch(HUB_FILES[0]), fetch(HUB_FILES[1])
            found = next(filter(None, map(fetch, HUB_FILES[2:])), '')
        except Exception as error:  # of that client, or of the library that it sends requests with
            reason: Any = re.sub(r' ?\(Request ID:[^)]*\)', '', ' '.join(str(error).split()))
            reason = re.match(r'.{,400}(?:(?<=\.)(?= )|$)|.{400}', reason)  # whole sentences
            raise UserError('%s: download failed (%s); fetch the files yourself and give their folder' % (
                shown, escape_text(reason.group()) or type(error).__name__)) from None
        return os.path.dirname(found or config)

    if process_group.is_main_process():
        fetch_all()
    process_group.barrier()
    return fetch_all()


def main(argv: List[str]) -> int:
    if argv != ['list']:
        print_error('usage: python -m beit.weights list')
        return 2
    row = '%-39s %5s %5s %7s %15s  %s'
    print_line(row % ('name', 'MB', 'input', 'classes', 'acc@1 / acc@5', 'on this machine'))
    for each in PUBLISHED.values():
        path = find(each)
        megabytes = '%d' % (os.path.getsize(path) // 10 ** 6) if path else '~%d' % each.megabytes
        print_line(row % (each.name, megabytes, each.input_size, each.classes or '-', each.accuracy(),
                          escape_text(os.path.dirname(path).replace(os.path.join(os.getcwd(), ''), '')) or '-'))
    print_line('\nmodel: the name up to the input size, such as beit_base_patch16_224\nURL:   %s' % '\n       '.join(
        sorted({each.url.replace(each.name, 'NAME') for each in PUBLISHED.values()}, reverse=True)))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
