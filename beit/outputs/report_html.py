"""The HTML of report.html: plain data in, one page out that needs no script, no network and no other file."""

import base64
import html
import io
import math
import string
from typing import Any, Dict, List, Sequence, Tuple

from beit.errors import escape_text

HEAT_MAP_UP_TO = 30  # classes; above, the most confused pairs
BARS_UP_TO = 40  # classes; above, the worst and best `BARS_OF_MANY`
BARS_OF_MANY = 20
PATH_LETTERS = 60

PAGE = string.Template('''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f4f6f8; --text: #1c2127; --soft: #5a6672;
  --line: #dde2e7; --good: #2468b4; --bad: #b6401c; --wrong: 214, 84, 40; --right: 36, 104, 180; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --panel: #1e2329; --text: #e4e8ec; --soft: #9aa6b2; --line: #333b44; --good: #7ab8f5;
    --bad: #f0906c; --wrong: 226, 104, 62; --right: 64, 138, 220; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: clamp(1rem, 4vw, 2.5rem); background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .35rem 0 .8rem; }
dd, figure { margin: 0; }
summary { cursor: pointer; }
dt, .note, .path, .none { color: var(--soft); }
.note { font-size: .9rem; }
.number, .tiles dd, .heat td { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.tiles, .plots, .images { display: grid; gap: .8rem; margin: 1rem 0 0; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.2rem), 1fr)); }
.tiles div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { font-size: .8rem; }
.tiles dd { font-size: 1.15rem; font-weight: 600; text-align: left; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.plots svg { display: block; width: 100%; height: auto; }
.bars { display: grid; grid-template-columns: minmax(3rem, 14rem) minmax(4rem, 1fr) auto; gap: .25rem .7rem;
  align-items: center; font-size: .9rem; margin: 0 0 1rem; }
.bars .name { text-align: right; line-height: 1.25; }
.bars .track { background: var(--panel); border-radius: .25rem; height: .95rem; }
.bars .track i { display: block; height: 100%; border-radius: .25rem; background: #4a90d9; min-width: 1px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
.heat { font-size: .75rem; overflow-wrap: normal; }
.heat td { min-width: 1.9rem; height: 1.9rem; text-align: center; border: 1px solid var(--ground); }
.heat th { font-weight: 500; padding: .2rem; text-align: right; }
.heat thead th { vertical-align: bottom; }
.heat tbody th { position: sticky; left: 0; background: var(--ground); max-width: 9rem; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.tall { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden; text-align: left; }
.full { color: #ffffff; }
.list { width: 100%; text-align: left; }
.list td, .list th { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
.flags { columns: 19rem; column-gap: 2rem; font: .82rem/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
.flags div { break-inside: avoid; display: flex; gap: .8rem; justify-content: space-between;
  border-bottom: 1px dotted var(--line); }
.images { grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); }
.images img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--panel);
  border-radius: .35rem; }
.images img.tiny { image-rendering: pixelated; }
.images figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; }
.wrong { color: var(--bad); font-weight: 600; }
.right { color: var(--good); font-weight: 600; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="note">$subtitle</p>
<dl class="tiles">
$tiles
</dl>
</header>
<main>
$sections
</main>
</body>
</html>
''')

SECTION = string.Template('<section>\n<h2>$title</h2>\n<p class="note">$note</p>\n$body\n</section>')
BAR = string.Template('<span class="name">$name</span><span class="track"><i style="width:$width%"></i></span>'
                      '<span class="number">$share % <small>$right of $images</small></span>')
FIGURE = string.Template('<figure><img src="$source" alt="$alt"$tiny><figcaption>$caption</figcaption></figure>')


def escape(text: Any) -> str:
    """Any text, a path with bytes that are no text too, as HTML."""
    return html.escape(escape_text(str(text)), quote=True)


def render(data: Dict[str, Any]) -> str:
    """The page.

    Args:
        data (dict): title, subtitle; tiles, flags, versions: (name, text) pairs; plots: SVG texts; hint: why there are
            none; classes: names; per_class: (right, images) or None; matrix: int (classes, classes) or None;
            confused: (target, predicted, count); evaluated: which weights; hardest, most_confident: (pixels,
            `EvaluatedImage`, path); samples: (pixels, caption). Pixels are uint8 (H, W, 3).
    """
    sections = [_plots(data)]
    if data['per_class'] is not None:
        sections += [_per_class(data), _confusions(data), _hardest(data), _most_confident(data)]
    else:
        sections.append(_section('Evaluation', data['evaluated']))
    sections += [_samples(data), _flags(data)]
    return PAGE.substitute(title=escape(data['title']), subtitle=escape(data['subtitle']), tiles=_pairs(data['tiles']),
                           sections='\n'.join(filter(None, sections)))


def _section(title: str, note: str, body: str = '') -> str:
    return SECTION.substitute(title=escape(title), note=escape(note), body=body)


def _pairs(pairs: Sequence[Tuple[str, str]]) -> str:
    return '\n'.join('<div><dt>%s</dt><dd>%s</dd></div>' % (escape(name), escape(text)) for name, text in pairs)


def _plots(data: Dict[str, Any]) -> str:
    if not data['plots'] and not data['hint']:
        return ''
    return _section('Curves', data['hint'], '<div class="plots">\n%s\n</div>' % '\n'.join(data['plots']))


def _flags(data: Dict[str, Any]) -> str:
    return _section('Flags', '', '<details><summary>All %d, and versions</summary>\n<dl class="flags">\n%s\n</dl>\n'
                    '</details>' % (len(data['flags']), _pairs(data['flags'] + data['versions'])))


# ---- classes

def _per_class(data: Dict[str, Any]) -> str:
    right, images = data['per_class']
    rows = sorted((right[label] / images[label], label) for label in range(len(images)) if images[label])
    note, parts = data['evaluated'], [('', rows)]
    if len(rows) > BARS_UP_TO:
        parts = [('<h3>The %d worst</h3>\n' % BARS_OF_MANY, rows[:BARS_OF_MANY]),
                 ('<h3>The %d best</h3>\n' % BARS_OF_MANY, rows[-BARS_OF_MANY:][::-1])]
        note += ' %d classes.' % len(rows)
    if len(rows) < len(images):
        note += ' %d more have no validation image.' % (len(images) - len(rows))
    return _section('Accuracy of each class', note, '\n'.join('%s<div class="bars">\n%s\n</div>' % (
        title, '\n'.join(BAR.substitute(
            name=escape(data['classes'][label]), width='%.2f' % (100 * share), share='%.1f' % (100 * share),
            right=int(right[label]), images=int(images[label])) for share, label in part)) for title, part in parts))


def _confusions(data: Dict[str, Any]) -> str:
    if not data['confused']:
        return _section('Confusions', 'None: every image was taken for what it is.')
    if data['matrix'] is not None:
        return _section('Confusions', 'Rows are the true classes, columns what the images were taken for; the shade is '
                        'the share of the row.', _heat_map(data['matrix'], data['classes']))
    images = data['per_class'][1]
    rows = '\n'.join(
        '<tr><td>%s</td><td>%s</td><td class="number">%d</td><td class="number">%.1f %%</td></tr>' % (
            escape(data['classes'][target]), escape(data['classes'][predicted]), count, 100 * count / images[target])
        for target, predicted, count in data['confused'])
    return _section('Most confused', 'The pairs with most images; the share is of the images of the true class.',
                    '<div class="scroll"><table class="list"><thead><tr><th>true class</th><th>taken for</th>'
                    '<th class="number">images</th><th class="number">share</th></tr></thead>\n<tbody>\n%s\n</tbody>'
                    '</table></div>' % rows)


def _heat_map(matrix: Any, classes: Sequence[str]) -> str:
    head = ''.join('<th scope="col"><div class="tall">%s</div></th>' % escape(name) for name in classes)
    rows = []
    for target, name in enumerate(classes):
        total, cells = max(int(matrix[target].sum()), 1), []
        for predicted, count in enumerate(matrix[target]):
            share = count / total
            shade = share if predicted == target else 0.15 + 0.85 * math.sqrt(share)
            cells.append('<td style="background:rgba(var(--%s),%.2f)"%s title="%s → %s: %d, %.1f %%">%d</td>' % (
                'right' if predicted == target else 'wrong', shade, ' class="full"' if shade > 0.6 else '',
                escape(name), escape(classes[predicted]), count, 100 * share, count)
                if count else '<td class="none">·</td>')
        rows.append('<tr><th scope="row" title="%s">%s</th>%s</tr>' % (escape(name), escape(name), ''.join(cells)))
    return '<div class="scroll"><table class="heat"><thead><tr><th></th>%s</tr></thead>\n<tbody>\n%s\n</tbody>' \
        '</table></div>' % (head, '\n'.join(rows))


# ---- images

def _hardest(data: Dict[str, Any]) -> str:
    classes = data['classes']
    return _images('Most mistaken', 'Wrong ones with the highest loss, as the model saw them.', [
        (pixels, '%s taken for %s' % (classes[image.target], classes[image.predicted]),
         'taken for <span class="wrong">%s</span> (%s)<br>is %s (%s)<br>%s' % (
             escape(classes[image.predicted]), percent(image.probability), escape(classes[image.target]),
             percent(image.target_probability), _path(path)))
        for pixels, image, path in data['hardest']])


def _most_confident(data: Dict[str, Any]) -> str:
    if not data['most_confident']:
        return _section('Surest', 'No image was taken for what it is.')
    classes = data['classes']
    return _images('Surest', 'Right ones with the highest probability.', [
        (pixels, classes[image.target], '<span class="right">%s</span> (%s)<br>%s' % (
            escape(classes[image.target]), percent(image.probability), _path(path)))
        for pixels, image, path in data['most_confident']])


def _samples(data: Dict[str, Any]) -> str:
    return _images('Training images as the model saw them', 'The first of epoch 1, with what is done to them: crops, '
                   'colours, erasing, and mixed where mixup or cutmix is on.',
                   [(pixels, caption, escape(caption)) for pixels, caption in data['samples']])


def _images(title: str, note: str, images: List[Tuple[Any, str, str]]) -> str:
    """A section of images, (pixels, text instead of the picture, caption as HTML); '' without one."""
    return _section(title, note, '<div class="images">\n%s\n</div>' % '\n'.join(
        FIGURE.substitute(source=data_uri(pixels), alt=escape(alt), caption=caption,
                          tiny=' class="tiny"' if max(pixels.shape[:2]) <= 96 else '')
        for pixels, alt, caption in images)) if images else ''


def data_uri(pixels: Any, side: int = 160) -> str:
    """A JPEG of at most `side` pixels a side, inside the page."""
    from PIL import Image  # slow to import
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.LANCZOS)  # type: ignore[attr-defined]
    picture.save(file, 'JPEG', quality=88)
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()


def percent(share: float) -> str:
    """Enough digits to tell 99.99 % from 100 %, and a space at which no line ends."""
    if not math.isfinite(share):
        return 'n/a'
    return '%.*f\u00a0%%' % (1 if 0.001 <= share <= 0.999 else 3, 100 * share)


def _path(path: str) -> str:
    """The file and its folder; all of it where the mouse rests."""
    end = '/'.join(path.replace('\\', '/').split('/')[-2:])
    return '<span class="path" title="%s">%s</span>' % (escape(path), escape(
        end if len(end) <= PATH_LETTERS else '…' + end[1 - PATH_LETTERS:]))
