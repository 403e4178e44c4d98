"""The HTML of report.html: plain data in, one page out that needs no script, no network and no other file."""

import base64
import html
import io
import math
import string
from typing import Any, Dict

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
  --line: #dde2e7; --good: #2468b4; --bar: #4a90d9; --bad: #b6401c; --wrong: 214, 84, 40; --right: 36, 104, 180; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --panel: #1e2329; --text: #e4e8ec; --soft: #9aa6b2; --line: #333b44; --good: #7ab8f5;
    --bar: #4a90d9; --bad: #f0906c; --wrong: 226, 104, 62; --right: 64, 138, 220; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: clamp(1rem, 4vw, 2.5rem); background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .35rem 0 .8rem; }
.note { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.2rem), 1fr)); gap: .6rem;
  margin: 1.2rem 0 0; }
.tiles div { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.plots svg { display: block; width: 100%; height: auto; color: var(--text); }
.bars { display: grid; grid-template-columns: minmax(3rem, auto) minmax(4rem, 1fr) auto; gap: .25rem .7rem;
  align-items: center; font-size: .9rem; margin: 0 0 1rem; }
.bars .name { max-width: 14rem; text-align: right; line-height: 1.25; }
.bars .track { background: var(--panel); border-radius: .25rem; height: .95rem; }
.bars .track i { display: block; height: 100%; border-radius: .25rem; background: var(--bar); min-width: 1px; }
.bars .share { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.bars .share small { color: var(--soft); display: inline-block; min-width: 4.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
.heat { font-size: .78rem; font-variant-numeric: tabular-nums; margin: .3rem 0; overflow-wrap: normal; }
.heat td { min-width: 2.1rem; height: 2.1rem; text-align: center; border: 1px solid var(--ground); }
.heat.dense td { min-width: 1.65rem; height: 1.65rem; font-size: .7rem; }
.heat th { font-weight: 500; padding: .2rem .45rem; }
.heat thead th { vertical-align: bottom; }
.heat.dense thead th { padding: .2rem .1rem; }
.heat tbody th { text-align: right; position: sticky; left: 0; background: var(--ground); max-width: 9rem;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.heat th.note { font-size: .7rem; max-width: 5rem; }
.heat .tall { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; text-align: left; margin: 0 auto; }
.full { color: #ffffff; }
.none { color: var(--soft); opacity: .45; }
.list { width: 100%; }
.list th { text-align: left; font-weight: 600; color: var(--soft); }
.list td, .list th { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.list td.number, .list th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.flags { columns: 19rem; column-gap: 2rem; margin: .6rem 0;
  font: .82rem/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
.flags div { break-inside: avoid; display: flex; gap: .8rem; justify-content: space-between;
  border-bottom: 1px dotted var(--line); }
.flags dt { color: var(--soft); white-space: nowrap; }
.flags dd { margin: 0; text-align: right; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); gap: .9rem; }
.images figure { margin: 0; }
.images img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--panel);
  border-radius: .35rem; }
.images img.tiny { image-rendering: pixelated; }
.images figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; }
.images .path { color: var(--soft); font-size: .72rem; }
.wrong { color: var(--bad); font-weight: 600; }
.right { color: var(--good); font-weight: 600; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
summary { cursor: pointer; color: var(--good); }
@media (max-width: 480px) { .bars .share small { display: block; line-height: 1; } .bars .name { max-width: 8rem; }
  .heat td { min-width: 1.75rem; } .heat th { padding: .2rem; } .heat th.note { max-width: 3.6rem; } }
@media print { details { display: block; } }
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

SECTION = string.Template('<section>\n<h2>$title</h2>\n$note$body\n</section>')
BAR = string.Template('<span class="name">$name</span><span class="track"><i style="width:$width%"></i></span>'
                      '<span class="share">$share % <small>$right of $images</small></span>')
FIGURE = string.Template('<figure><img src="$source" alt="$alt"$tiny><figcaption>$caption</figcaption></figure>')


def escape(text: Any) -> str:
    """Any text, a path with bytes that are no text too, as HTML."""
    return html.escape(escape_text(str(text)), quote=True)


def render(data: Dict[str, Any]) -> str:
    """The page, str.

    Args:
        data (dict): title, subtitle; tiles, flags: (name, text) pairs; plots: SVG texts; classes: names; per_class:
            (right, images) or None; matrix: int (classes, classes) or None; confused: (true, predicted, count);
            evaluated: which weights; hardest, most_confident: (pixels, `Prediction`, path); samples: (pixels, caption);
            hint. Pixels are uint8 (H, W, 3).
    """
    sections = [_plots(data)]
    if data['per_class'] is not None:
        sections += [_per_class(data), _confusions(data), _wrong(data), _right(data)]
    else:
        sections.append(_section('Evaluation', data['evaluated'], ''))
    sections += [_samples(data), _flags(data)]
    return PAGE.substitute(
        title=escape(data['title']), subtitle=escape(data['subtitle']), tiles=_pairs(data['tiles']),
        sections='\n'.join(filter(None, sections)))


def _section(title, note, body):
    return SECTION.substitute(title=escape(title), note='<p class="note">%s</p>\n' % escape(note) if note else '',
                              body=body)


def _pairs(pairs):
    return '\n'.join('<div><dt>%s</dt><dd>%s</dd></div>' % (escape(name), escape(text)) for name, text in pairs)


def _plots(data):
    if not data['plots']:
        return _section('Curves', data['hint'], '') if data['hint'] else ''
    return _section('Curves', '', '<div class="plots">\n%s\n</div>' % '\n'.join(data['plots']))


# ---- classes

def _per_class(data):
    right, images = data['per_class']
    rows = [(right[label] / images[label], label) for label in range(len(images)) if images[label]]
    rows.sort()

    def bars(rows):
        return '<div class="bars">\n%s\n</div>' % '\n'.join(BAR.substitute(
            name=escape(data['classes'][label]), width='%.2f' % (100 * share), share='%.1f' % (100 * share),
            right=int(right[label]), images=int(images[label])) for share, label in rows)

    if len(rows) <= BARS_UP_TO:
        body = bars(rows)
    else:
        body = '<h3>The %d worst</h3>\n%s\n<h3>The %d best</h3>\n%s' % (
            BARS_OF_MANY, bars(rows[:BARS_OF_MANY]), BARS_OF_MANY, bars(rows[-BARS_OF_MANY:][::-1]))
    empty = sum(not count for count in images)
    return _section('Accuracy of each class', data['evaluated'] + (
        ' The worst class comes first.' if len(rows) <= BARS_UP_TO else ' %d classes.' % len(rows)) + (
        ' %d more have no validation image.' % empty if empty else ''), body)


def _confusions(data):
    if not data['confused']:
        return _section('Confusions', 'None: every image was taken for what it is.', '')
    if len(data['classes']) <= HEAT_MAP_UP_TO:
        return _section('Confusions', 'Rows are the true classes, columns what the images were taken for; the shade is '
                        'the share of the row.', _heat_map(data['matrix'], data['classes']))
    images = data['per_class'][1]
    rows = '\n'.join(
        '<tr><td>%s</td><td>%s</td><td class="number">%d</td><td class="number">%.1f %%</td></tr>' % (
            escape(data['classes'][true]), escape(data['classes'][predicted]), count, 100 * count / images[true])
        for true, predicted, count in data['confused'])
    return _section('Most confused', 'The pairs with most images; the share is of the images of the true class.',
                    '<div class="scroll"><table class="list"><thead><tr><th>true class</th><th>taken for</th>'
                    '<th class="number">images</th><th class="number">share</th></tr></thead>\n<tbody>\n%s\n</tbody>'
                    '</table></div>' % rows)


def _heat_map(matrix, classes):
    long_names = any(len(name) > 3 for name in classes)
    name_form = '<div class="tall">%s</div>' if long_names else '%s'
    head = '<th class="note">true ↓&nbsp; taken for →</th>' + ''.join(
        '<th scope="col">%s</th>' % (name_form % escape(name)) for name in classes)
    rows = []
    for true, name in enumerate(classes):
        total, cells = max(int(matrix[true].sum()), 1), []
        for predicted, count in enumerate(matrix[true]):
            if not count:
                cells.append('<td class="none">·</td>')
                continue
            share = count / total
            shade = share if predicted == true else 0.15 + 0.85 * math.sqrt(share)
            cells.append('<td style="background:rgba(var(--%s),%.2f)"%s title="%s → %s: %d, %.1f %%">%d</td>' % (
                'right' if predicted == true else 'wrong', shade, ' class="full"' if shade > 0.6 else '', escape(name),
                escape(classes[predicted]), count, 100 * share, count))
        rows.append('<tr><th scope="row" title="%s">%s</th>%s</tr>' % (escape(name), escape(name), ''.join(cells)))
    return '<div class="scroll"><table class="heat%s"><thead><tr>%s</tr></thead>\n<tbody>\n%s\n</tbody>' \
        '</table></div>' % (' dense' if len(classes) > 18 else '', head, '\n'.join(rows))


# ---- images

def _wrong(data):
    if not data['hardest']:
        return ''
    return _images('Most mistaken', 'Wrong ones with the highest loss, as the model saw them.', [
        (pixels, '%s taken for %s' % (data['classes'][each.true], data['classes'][each.predicted]),
         'taken for <span class="wrong">%s</span> (%s)<br>is %s (%s)<br>%s' % (
             escape(data['classes'][each.predicted]), percent(each.probability), escape(data['classes'][each.true]),
             percent(math.exp(-each.loss) if math.isfinite(each.loss) else math.nan), _path(path)))
        for pixels, each, path in data['hardest']])


def _right(data):
    if not data['most_confident']:
        return _section('Surest', 'No image was taken for what it is.', '')
    return _images('Surest', 'Right ones with the highest probability.', [
        (pixels, data['classes'][each.true], '<span class="right">%s</span> (%s)<br>%s' % (
            escape(data['classes'][each.true]), percent(each.probability), _path(path)))
        for pixels, each, path in data['most_confident']])


def _samples(data):
    if not data['samples']:
        return ''
    return _images('Training images as the model saw them', 'The first of epoch 1, with what is done to them: crops, '
                   'colours, erasing, and mixed where mixup or cutmix is on.',
                   [(pixels, caption, escape(caption)) for pixels, caption in data['samples']])


def _images(title, note, images):
    """Args: images: (pixels, text instead of the picture, caption as HTML)."""
    return _section(title, note, '<div class="images">\n%s\n</div>' % '\n'.join(
        FIGURE.substitute(source=data_uri(pixels), alt=escape(alt), caption=caption,
                          tiny=' class="tiny"' if max(pixels.shape[:2]) <= 96 else '')
        for pixels, alt, caption in images))


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


def _path(path):
    """The file and its folder; all of it where the mouse rests."""
    end = '/'.join(path.replace('\\', '/').split('/')[-2:])
    return '<span class="path" title="%s">%s</span>' % (escape(path), escape(
        end if len(end) <= PATH_LETTERS else '…' + end[1 - PATH_LETTERS:]))


def _flags(data):
    return _section('Flags', '', '<details><summary>All %d, and versions</summary>\n<dl class="flags">\n%s\n</dl>\n'
                    '</details>' % (len(data['flags']), _pairs(data['flags'] + data['versions'])))
