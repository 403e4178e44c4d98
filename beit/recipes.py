"""Published recipes: files of flags in recipes/, one for each kind of pretrained weights.

    python -m beit.recipes MODEL FINETUNE [NAME]   # for test/common.sh: model, weights, batch size, epochs …
"""

import os
import re
import sys
from typing import Container, Dict

from beit.errors import UserError, escape_text, print_error, unknown_value_error
from beit.paths import project_root

AUTO, FOLDER = 'auto', os.path.join(project_root(), 'recipes')
NO_FLAGS = ('devices', 'freeze_backbone')  # what a recipe says that may be no flag of the program


def path_of(name: str, program: str = '', known: Container[str] = ()) -> str:
    """The file of a recipe. Raises `UserError` for an unknown name, or a flag that the program has not in `known`."""
    names = [each[:-len('.yaml')] for each in sorted(os.listdir(FOLDER)) if each.endswith('.yaml')]
    if name not in names:
        raise unknown_value_error('--recipe', escape_text(name), names + [AUTO])
    lacks = [key for key in read(name) if key not in known] if program else []
    if lacks:
        raise UserError('--recipe %s: it sets %s, which %s does not have; give %s' % (
            name, lacks[0], program, ' or '.join(each for each in names if all(key in known for key in read(each)))))
    return os.path.join(FOLDER, name + '.yaml')


def choose(model: str = '', finetune: str = '') -> str:
    """The recipe for a model and its weights, by their names; base's, for other models and other weights."""
    weights = re.sub(r'\.\w+$', '', os.path.basename(finetune))
    return '%s_%s_%s' % ('beitv2' if 'beitv2_' in weights + model else 'beit',
                         'large' if 'large_' in (model or weights) else 'base',
                         'pretrained' if re.search('_pt(1k|22k)$', weights) else 'intermediate')


def read(name: str) -> Dict[str, str]:
    """What a recipe says, each value as it is written there."""
    with open(path_of(name), encoding='utf-8') as file:
        return dict(re.findall(r'(?m)^(\w+): (\S+)$', file.read()))


def describe(name: str, lr: float, images: int) -> str:
    """A recipe's total batch and learning rate beside a run's of `images` an update, and the linear rule's."""
    recipe = read(name)
    published = float(recipe['lr'])
    if 'batch_size' not in recipe:
        return '%s; lr %g' % (name, published)
    total = int(recipe['batch_size']) * int(recipe['devices']) * int(recipe['update_freq'])
    text = '%s; lr %g at %d images an update; this run: lr %g at %d' % (name, published, total, lr, images)
    scaled = published * images / total
    return text if images == total or abs(lr / scaled - 1) < 1e-6 else text + (
        '; the linear rule gives lr %g (--blr %g)' % (scaled, published * 256 / total))


def main(model: str, finetune: str, name: str = '') -> int:
    name = choose(model, finetune) if name in ('', AUTO) else name
    try:
        recipe = dict({'batch_size': '64', 'epochs': '30', 'warmup_epochs': '5'}, **read(name))
    except UserError as error:
        print_error('error: %s' % error)
        return 2
    print(name, *(recipe[key] for key in ('model', 'finetune', 'batch_size', 'epochs', 'warmup_epochs')))
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
