"""The HTML of report.html: one page, without scripts, network or other files."""

import base64
import html
import io
import math
import string
from typing import Any, Dict, List, Sequence, Tuple

from PIL import Image

from beit.errors import escape_text

HEAT_MAP_UP_TO = 30  # classes; above, the most confused pairs
BARS_UP_TO = 40  # classes; above, the worst and best `BARS_OF_MANY`
BARS_OF_MANY = 20
PATH_LETTERS = 60
SIDE = 160  # pixels of an image, at most

PAGE = string.Template('''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ground: #f6f7f9; --panel: #ffffff; --text: #1b2129; --soft: #5b6775;
  --line: #e1e5ea; --track: #e9edf1; --accent: #2f7ed8; --good: #2468b4; --bad: #b6401c;
  --shadow: rgba(27, 33, 41, .28);  --wrong: 214, 84, 40; --right: 36, 104, 180; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #101317; --panel: #191e24; --text: #e6eaee; --soft: #98a4b0; --line: #2b323a; --track: #2a3139;
    --accent: #5c9fe8; --good: #7ab8f5; --bad: #f0906c; --shadow: rgba(0, 0, 0, .75);
    --wrong: 226, 104, 62; --right: 64, 138, 220; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: clamp(1rem, 3.5vw, 3rem); background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { font-size: clamp(1.4rem, 4vw, 1.9rem); font-weight: 650; line-height: 1.2; letter-spacing: -.015em;
  margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.2rem; font-weight: 650; letter-spacing: -.01em; margin: 2.75rem 0 .35rem; }
h3 { font-size: .95rem; margin: 0 0 .6rem; }
p { margin: 0 0 .9rem; }
dl, dd, figure { margin: 0; }
summary { cursor: pointer; padding: .2rem 0; }
dt, .note, .path, .none, .bars small { color: var(--soft); }
.note { font-size: .9rem; max-width: 54rem; }
.note:empty { display: none; }
.number, dd, .heat td { font-variant-numeric: tabular-nums; }
.number { text-align: right; white-space: nowrap; }
.tiles, .facts, .plots, .images { display: grid; gap: 1rem; }
.tiles div, .panel, .plots > div { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); margin-top: 1.4rem; }
.tiles div { padding: .8rem 1rem; }
.tiles div:first-child { border-left: .25rem solid var(--accent); }
.tiles dt, .facts dt { font-size: .8rem; }
.tiles dd { font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; line-height: 1.3; }
.facts { grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .6rem 1rem; margin: 1rem .1rem 0; }
.facts dd { font-weight: 500; }
.panel { padding: 1rem 1.1rem; }
.panel:has(.heat) { width: fit-content; max-width: 100%; }
.panel + .panel { margin-top: 1rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.plots > div { padding: .7rem; }
.plots svg { display: block; width: 100%; height: auto; }
.bars { display: grid; grid-template-columns: fit-content(clamp(6rem, 24vw, 14rem)) minmax(4rem, 1fr) auto;
  gap: .35rem .8rem; align-items: center; font-size: .9rem; }
.bars .name { text-align: right; line-height: 1.25; }
.bars .track { background: var(--track); border-radius: .25rem; height: .8rem; }
.bars .track i { display: block; height: 100%; border-radius: .25rem; background: var(--accent); min-width: 1px; }
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--panel) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--panel) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9rem; }
.heat { font-size: .78rem; overflow-wrap: normal; }
.heat td { min-width: 2.1rem; height: 2.1rem; text-align: center; white-space: nowrap;
  border: 1px solid var(--line); }
.heat th { font-weight: 500; padding: .2rem .4rem; }
.heat thead th { vertical-align: bottom; }
.heat tbody th { position: sticky; left: 0; background: var(--panel); max-width: 9rem; overflow: hidden;
  text-align: right; text-overflow: ellipsis; white-space: nowrap; }
.tall { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden; text-align: left; }
.full { color: #ffffff; }
.list { width: 100%; min-width: 26rem; text-align: left; }
.list td, .list th { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
.list tr:last-child td { border-bottom: 0; }
.list th { color: var(--soft); font-size: .8rem; font-weight: 500; }
.flags { columns: 19rem; column-gap: 2.5rem; font: .82rem/1.7 ui-monospace, "DejaVu Sans Mono", monospace; }
.flags div { break-inside: avoid; display: flex; gap: .8rem; justify-content: space-between;
  border-bottom: 1px solid var(--line); }
.flags dd { text-align: right; }
.images { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: 1.2rem 1rem; }
.images img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--track);
  border-radius: .4rem; }
.images img.tiny { image-rendering: pixelated; }
.images figcaption { font-size: .8rem; line-height: 1.4; margin-top: .4rem; }
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
<dl class="facts">
$facts
</dl>
</header>
<main>
$sections
</main>
</body>
</html>
''')

BAR = ('<span class="name">%s</span><span class="track"><i style="width:%.2f%%"></i></span>'
       '<span class="number">%.1f %% <small>%d of %d</small></span>')
FIGURE = '<figure><img src="data:image/jpeg;base64,%s" alt="%s"%s><figcaption>%s</figcaption></figure>'
SCROLL = '<div class="panel"><div class="scroll" tabindex="0">%s</div></div>'  # its edges are dark where more is hidden


def escape(text: Any) -> str:
    """Escape any text for HTML, also a path with undecodable bytes."""
    return html.escape(escape_text(str(text)), quote=True)


def render(data: Dict[str, Any]) -> str:
    """Render the page.

    Args:
        data (dict): title, subtitle; tiles, facts, flags, versions: (name, text) pairs; plots: SVG texts; hint: the
            reason without plots; classes: names; per_class: (right, images) or None; matrix: int (classes, classes) or
            None; figures: of the evaluation; confused: (target, predicted, count); evaluated: which weights; hardest,
            most_confident: (pixels, `EvaluatedImage`, path); samples: (pixels, caption). Pixels: uint8 (H, W, 3).
    """
    sections = []
    if data['plots'] or data['hint']:
        plots = '\n'.join('<div>%s</div>' % plot for plot in data['plots'])
        sections.append(_section('Curves', data['hint'], '<div class="plots">\n%s\n</div>' % plots))
    if data['per_class'] is not None:
        sections += [_per_class(data), _scores(data), _reliability(data), _confusions(data), _hardest(data),
                     _most_confident(data)]
    else:
        sections.append(_section('Evaluation', data['evaluated']))
    sections.append(_images('Training images as the model saw them', 'The first of epoch 1, with this run\'s '
                            'augmentation.', [(pixels, text, escape(text)) for pixels, text in data['samples']]))
    sections.append(_section('Flags', '', '<details class="panel"><summary>All %d, and versions</summary>\n'
                             '<dl class="flags">\n%s\n</dl>\n</details>'
                             % (len(data['flags']), _pairs(data['flags'] + data['versions']))))
    return PAGE.substitute(title=escape(data['title']), subtitle=escape(data['subtitle']), tiles=_pairs(data['tiles']),
                           facts=_pairs(data['facts']), sections='\n'.join(filter(None, sections)))


def _section(title: str, note: str, body: str = '') -> str:
    return '<section>\n<h2>%s</h2>\n<p class="note">%s</p>\n%s\n</section>' % (escape(title), escape(note), body)


def _pairs(pairs: Sequence[Tuple[str, str]]) -> str:
    return '\n'.join('<div><dt>%s</dt><dd>%s</dd></div>' % (escape(name), escape(text)) for name, text in pairs)


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
    panel = '<div class="panel">%s<div class="bars">\n%s\n</div></div>'
    return _section('Accuracy of each class', note, '\n'.join(panel % (
        title, '\n'.join(BAR % (escape(data['classes'][label]), 100 * share, 100 * share, right[label], images[label])
                         for share, label in part)) for title, part in parts))


def _scores(data: Dict[str, Any]) -> str:
    figures, scores = data['figures'], ('precision', 'recall', 'f1')
    if 'classes' not in figures:
        return ''
    lines = list(zip(data['classes'], figures['classes']))
    lines += [(kind + ' average', {name: figures['%s_%s' % (kind, name)] for name in scores})
              for kind in ('macro', 'weighted')]
    row = '<tr><td>%s</td>' + '<td class="number">%s</td>' * 4 + '</tr>'
    rows = [row % ('class', 'images', *scores)] + [row % (escape(name), each.get('images', ''), *(
        '-' if each[score] is None else '%.2f' % each[score] for score in scores)) for name, each in lines]
    return _section('Precision, recall and F1', 'In percent.', '<details class="panel"%s><summary>Of each class, and '
                    'on average</summary><div class="scroll" tabindex="0"><table class="list">\n%s\n</table></div>'
                    '</details>' % (' open' * (len(lines) <= BARS_UP_TO), '\n'.join(rows)))


def _reliability(data: Dict[str, Any]) -> str:
    """The reliability diagram: the accuracy of the predictions in each bin of probability."""
    bins = data['figures'].get('reliability')
    if not bins:
        return ''
    bars = ''.join('<rect x="%.2f" y="%.2f" width="5" height="%.2f" fill="var(--accent)"><title>probability %.1f %%, '
                   'accuracy %.1f %%, images %d</title></rect>' % (
                       100 * each['probability'] - 2.5, 100 - 100 * each['accuracy'], 100 * each['accuracy'],
                       100 * each['probability'], 100 * each['accuracy'], each['images']) for each in bins)
    return _section('Reliability', 'Bars: how often predictions of this probability are right. Line: how often they '
                    'should be.',
                    '<div class="panel" style="max-width:24rem"><svg viewBox="-14 -4 122 118" role="img" '
                    'aria-label="Reliability" font-size="5" fill="currentColor">%s<path fill="none" '
                    'd="M0 0V100H100M0 100L100 0" '
                    'stroke="currentColor" stroke-width=".6"/><text x="35" y="112">probability (%%)</text>'
                    '<text x="-13" y="-0">100</text><text x="-5" y="106">0</text><text x="95" y="106">100</text>'
                    '<text transform="rotate(-90)" x="-62" y="-5">accuracy (%%)</text></svg></div>' % bars)


def _confusions(data: Dict[str, Any]) -> str:
    if not data['confused']:
        return _section('Confusions', 'None: every image was classified correctly.')
    if data['matrix'] is not None:
        return _section('Confusions', 'Rows are the true classes, columns the predicted ones; the shade is the share '
                        'of the row.', _heat_map(data['matrix'], data['classes']))
    images = data['per_class'][1]
    rows = '\n'.join(
        '<tr><td>%s</td><td>%s</td><td class="number">%d</td><td class="number">%.1f %%</td></tr>' % (
            escape(data['classes'][target]), escape(data['classes'][predicted]), count, 100 * count / images[target])
        for target, predicted, count in data['confused'])
    return _section('Most confused', 'The pairs with the most images; shares are of the images of the true class.',
                    SCROLL % ('<table class="list"><thead><tr><th>true class</th><th>predicted</th>'
                              '<th class="number">images</th><th class="number">share</th></tr></thead>\n'
                              '<tbody>\n%s\n</tbody></table>' % rows))


def _heat_map(matrix: Any, classes: Sequence[str]) -> str:
    upright = ' class="tall"' if max(map(len, map(str, classes))) > 3 else ''
    head = ''.join('<th scope="col"><div%s>%s</div></th>' % (upright, escape(name)) for name in classes)
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
    return SCROLL % ('<table class="heat"><thead><tr><th></th>%s</tr></thead>\n<tbody>\n%s\n</tbody></table>' % (
        head, '\n'.join(rows)))


# ---- images

def _hardest(data: Dict[str, Any]) -> str:
    classes = data['classes']
    return _images('Most mistaken', 'Wrong predictions with the highest loss, as the model saw the images.', [
        (pixels, '%s taken for %s' % (classes[image.target], classes[image.predicted]),
         'taken for <span class="wrong">%s</span> (%s)<br>is %s (%s)<br>%s' % (
             escape(classes[image.predicted]), percent(image.probability), escape(classes[image.target]),
             percent(image.target_probability), _path(path)))
        for pixels, image, path in data['hardest']])


def _most_confident(data: Dict[str, Any]) -> str:
    if not data['most_confident']:
        return _section('Surest', 'No image was classified correctly.')
    classes = data['classes']
    return _images('Surest', 'Right predictions with the highest probability.', [
        (pixels, classes[image.target], '<span class="right">%s</span> (%s)<br>%s' % (
            escape(classes[image.target]), percent(image.probability), _path(path)))
        for pixels, image, path in data['most_confident']])


def _images(title: str, note: str, images: List[Tuple[Any, str, str]]) -> str:
    """A section of images (pixels, alternative text, caption as HTML); '' without images."""
    figures = []
    for pixels, alt, caption in images:
        picture, file = Image.fromarray(pixels), io.BytesIO()
        tiny = ' class="tiny"' if max(picture.size) <= 96 else ''
        picture.thumbnail((SIDE, SIDE), Image.LANCZOS)  # type: ignore[attr-defined]
        picture.save(file, 'JPEG', quality=88)
        figures.append(FIGURE % (base64.b64encode(file.getvalue()).decode(), escape(alt), tiny, caption))
    return _section(title, note, '<div class="images">\n%s\n</div>' % '\n'.join(figures)) if images else ''


def percent(share: float) -> str:
    """A percentage with enough digits to distinguish 99.99 % from 100 %, and a no-break space."""
    if not math.isfinite(share):
        return 'n/a'
    return '%.*f\u00a0%%' % (1 if 0.001 <= share <= 0.999 else 3, 100 * share)


def _path(path: str) -> str:
    """The file and its folder; the whole path as a tooltip."""
    end = '/'.join(path.replace('\\', '/').split('/')[-2:])
    return '<span class="path" title="%s">%s</span>' % (escape(path), escape(
        end if len(end) <= PATH_LETTERS else '…' + end[1 - PATH_LETTERS:]))
