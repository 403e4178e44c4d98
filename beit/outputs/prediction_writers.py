"""The formats of run_predict.py's results, and their output file."""

import contextlib
import csv
import io
import json
import os
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Sequence, TextIO, Type

from beit.distributed import process_group
from beit.errors import UserError, escape_text, guard_cell, loader_limit_message
from beit.files import atomic_write


class Prediction(NamedTuple):
    """The result for one image, with values of JSON's types."""
    number: int  # its position among all inputs
    path: str
    classes: List[int]  # indices of the most likely classes; [] if the image could not be read
    probabilities: List[float]  # of these classes
    heatmap: str = ''  # path of the attention map
    reason: str = ''  # why the image could not be read
    resized: bool = False  # unlike the training images, which had the input size
    features: str = ''  # see `features.encode_features`


class LineWriter:
    """A line of text for each readable image.

    Args:
        extra: the optional fields of the results, 'unsure', 'attention' and 'error'.
        threshold: an image is unsure if its best probability is lower.
    """

    def __init__(self, file: BinaryIO, classes: Sequence[str], top_k: int = 1, extra: Sequence[str] = (),
                 threshold: float = 0.) -> None:
        self.file, self.classes, self.top_k, self.extra = file, classes, min(top_k, len(classes)), extra
        self.threshold = threshold

    def is_unsure(self, prediction: Prediction) -> bool:
        return bool(prediction.probabilities) and prediction.probabilities[0] < self.threshold

    def write(self, prediction: Prediction) -> None:
        if not prediction.reason:
            words = ['unsure'] * self.is_unsure(prediction) + [
                '%s (%.1f %%)' % (escape_text(self.classes[index]), 100 * probability)
                for index, probability in zip(prediction.classes, prediction.probabilities)]
            self.write_text('%s: %s\n' % (escape_text(prediction.path), ', '.join(words)))

    def end(self) -> None:
        pass

    def write_text(self, text: str) -> None:
        self.file.write(text.encode('utf-8', 'backslashreplace'))  # a lone surrogate becomes a JSON escape


class CsvWriter(LineWriter):
    """A row for each image: file, class_1, probability_1, class_2, …, then `extra`."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.write_row(['file'] + ['%s_%d' % (name, rank + 1) for rank in range(self.top_k)
                                   for name in ('class', 'probability')] + list(self.extra))

    def write_row(self, values: Sequence[str]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerow(map(guard_cell, values))
        self.write_text(text.getvalue())

    def write(self, prediction: Prediction) -> None:
        pairs = [value for index, probability in zip(prediction.classes, prediction.probabilities)
                 for value in (escape_text(self.classes[index]), '%.6f' % probability)]
        fields = {'unsure': 'unsure' * self.is_unsure(prediction),
                  'attention': escape_text(prediction.heatmap), 'error': prediction.reason}
        self.write_row([escape_text(prediction.path)] + (pairs or ['', ''] * self.top_k)
                       + [fields[name] for name in self.extra])


class JsonLinesWriter(LineWriter):
    """An object per line for each image: file, predictions, and attention or error if there is one.

    File names are exact: bytes outside of UTF-8 are lone surrogates, which os.fsencode converts back.
    """
    start, between, last = '', '\n', '\n'
    count = 0

    def write(self, prediction: Prediction) -> None:
        content: Dict[str, object] = {'file': prediction.path}
        if prediction.reason:
            content['error'] = prediction.reason
        else:
            content['predictions'] = [
                {'class': self.classes[index], 'index': index, 'probability': round(probability, 6)}
                for index, probability in zip(prediction.classes, prediction.probabilities)]
        if 'unsure' in self.extra and not prediction.reason:
            content['unsure'] = self.is_unsure(prediction)
        if prediction.heatmap:
            content['attention'] = prediction.heatmap
        self.write_text((self.between if self.count else self.start) + json.dumps(content, ensure_ascii=False))
        self.count += 1

    def end(self) -> None:
        if self.count:
            self.write_text(self.last)


class JsonWriter(JsonLinesWriter):
    """A JSON list of the objects of `JsonLinesWriter`."""
    start, between, last = '[\n', ',\n', '\n]\n'


FORMATS: Dict[str, Type[LineWriter]] = {'csv': CsvWriter, 'json': JsonWriter, 'jsonl': JsonLinesWriter}


@contextlib.contextmanager
def open_output(path: str, stdout: TextIO, flag: str = '--output') -> Iterator[BinaryIO]:
    """Open the file for the results, in bytes: `stdout` if `path` is '' or '-'. Ranks other than 0 write nothing.

    A named file appears when it is complete.
    """
    if not process_group.is_main_process():
        yield io.BytesIO()
        return
    to_file = path not in ('', '-')
    try:
        if to_file:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with atomic_write.atomic_write(path, is_given=True) if to_file else \
                contextlib.nullcontext(stdout.buffer) as file:
            yield file
    except OSError as error:
        if loader_limit_message(error):
            raise
        if not to_file:  # Python would write again at its end, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?' % (
            flag + ' ' + escape_text(path) if to_file else 'to standard output', error.strerror or error)) from None
