#!/usr/bin/env python3
"""Tell what is in images, with a checkpoint that run_class_finetuning.py wrote.

Classes, input size, mean and deviation, pooling: all comes from the checkpoint. Results are printed, or written with
--output; --attention writes pictures of where the model looks.
"""

if __name__ == '__main__':
    from beit import errors
    errors.quiet_interrupt()

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import signal
import sys
import time
import typing

import torch

import engine_for_finetuning as engine
import flags
from beit import errors, log
from beit.checkpoint.inference_model import load_for_inference
from beit.cli import OneLineParser, exit_process, exit_with_error, run_with_error_report
from beit.data import fast_decode
from beit.data.class_folders import is_image_name
from beit.data.device_loader import PrefetchLoader
from beit.data.loader import Samples, loader_kwargs
from beit.data.prediction_inputs import PathDataset, PathSampler, check_inputs, common_folder
from beit.devices import accelerator, half_precision
from beit.distributed import collectives, preemption, process_group, watchdog
from beit.errors import UserError, escape_text
from beit.files import atomic_write, run_folder
from beit.outputs import attention_maps
from beit.training import fused_attention, loss_scaler

PROGRAM = 'run_predict.py'
EXAMPLES = """examples:
  python run_predict.py --resume train_result photo.jpg holiday/
  python run_predict.py --resume train_result --input 'photos/*.jpg' --top_k 3 --output results.csv
  python run_predict.py --resume train_result photos --bad_images skip --output - | jq .predictions[0].class
  python run_predict.py --resume train_result photos --attention --attention_dir looks
  torchrun --nproc_per_node=8 run_predict.py --resume train_result photos --output results.jsonl
"""


# ---- flags

class Parser(OneLineParser):
    """Takes images in any place among the flags, and --attention with or without a value."""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for place, arg in enumerate(args):
            if arg == '--attention' and args[place + 1:place + 2] not in ([kind] for kind in attention_maps.KINDS):
                args[place] = '--attention=auto'
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if rest and not any(flag.startswith('-') for flag in rest):  # argparse takes only the first of several groups
            parsed.images, rest = parsed.images + rest, []
        return parsed, rest


def build_parser() -> Parser:
    parser = flags.build_parser(flags.PREDICT, '--resume PATH IMAGES [flags]', __doc__, EXAMPLES, Parser,
                                format=dict(choices=sorted(FORMATS)))
    parser.add_argument('images', nargs='*', default=[],
                        help='files, folders (with all that is in them), quoted patterns (none)')
    return parser


def _is_standard_output(path):
    """Whether it is /dev/stdout, or the file that a shell opened for that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except (OSError, ValueError):
        return False


def check_args(args):
    """Everything that can be found wrong before anything slow starts. Raises `UserError`.

    Returns:
        A Namespace of the flags in which inputs, output, format and attention_dir are settled.
    """
    args = argparse.Namespace(inputs=args.images + list(itertools.chain(*args.input)), **vars(args))
    if not args.resume:
        raise UserError('--resume is missing; give the checkpoint, or the folder that holds it')
    if not args.inputs:
        raise UserError('no image is named; give files, folders, or a quoted pattern such as \'photos/*.jpg\'')
    check_inputs(args.inputs)
    if args.format and not args.output:
        args.output = '-'
    if args.output and _is_standard_output(args.output):
        args.output = '-'
    if args.output:
        ending = os.path.splitext(args.output)[1][1:].lower()
        args.format = args.format or ('jsonl' if args.output == '-' else ending)
        if args.format not in FORMATS:
            raise UserError('--output %s: its ending names no format; end it in .%s, or give --format'
                            % (escape_text(args.output), ', .'.join(sorted(FORMATS))))
    if args.output not in ('', '-'):
        if os.path.isdir(args.output) or is_image_name(args.output):
            raise UserError('--output %s: %s; choose another name' % (escape_text(args.output), 'a folder has this name'
                            if os.path.isdir(args.output) else 'this would overwrite an image'))
        run_folder.check_writable('--output', os.path.dirname(os.path.abspath(args.output)))
    if args.attention is None:
        for name in ('attention_block', 'attention_heads', 'attention_dir'):
            if getattr(args, name):
                raise UserError('--%s needs --attention' % name)
    else:
        beside = '' if args.output in ('', '-') else os.path.dirname(args.output)
        args.attention_dir = args.attention_dir or os.path.join(beside, 'attention')
        folder = os.path.join(os.path.realpath(args.attention_dir), '')
        if any(os.path.join(os.path.realpath(each), '').startswith(folder) for each in args.inputs):
            raise UserError('--attention_dir %s holds inputs, and its pictures would become some; choose another folder'
                            % escape_text(args.attention_dir))
        run_folder.check_writable('--attention_dir', args.attention_dir)
    if args.data_backend == 'fast':
        fast_decode.check_available()
    _, processes, local_rank = process_group.launch_environment(args)
    device = accelerator.find_device(args.device, local_rank, processes)
    if device.type == 'cpu':
        half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    return args


# ---- predicting

class Answer(typing.NamedTuple):
    """What became of one image; JSON can hold it."""
    number: int  # its place among all inputs
    path: str
    classes: list  # the indices of its likeliest classes; [] where it could not be read
    probabilities: list  # theirs
    picture: str = ''  # of the attention
    reason: str = ''  # why it could not be read
    resized: bool = False  # against the custom of a model for small inputs


class Predictor:
    """The network with what it needs: `answers` gives those of this process.

    Args:
        loader (PrefetchLoader): of a `PathDataset`, in the order of `stream`.
        painter (attention_maps.Painter or None).
        activation (str): what makes probabilities of the network's outputs, softmax or sigmoid.
    """

    def __init__(self, model, loader, stream, top_k, painter=None, activation='softmax'):
        self.model, self.loader, self.stream, self.top_k, self.painter = model, loader, stream, top_k, painter
        self.activation = activation

    def answers(self):
        """Yield a list of `Answer`s for each batch. They are read while the device computes the next."""
        before = None
        for batch in self.loader:
            computed = self.compute(batch)
            if before is not None:
                yield self.read(*before)
            before = computed
        if before is not None:
            yield self.read(*before)

    @torch.no_grad()
    def compute(self, batch):
        """(batch, its inputs, probabilities and classes on the device, what the attention was given)."""
        entries = self.stream.take(len(batch.images) + len(batch.unreadable))
        if not len(batch.images):
            return batch, entries, None, None
        # Filled up as in an evaluation: kernels round otherwise for another number of rows.
        output = self.model(engine.fill_up(batch.images, self.loader))[:len(batch.images)].float()
        shares = output.sigmoid() if self.activation == 'sigmoid' else output.softmax(-1)
        top = shares.topk(min(self.top_k, output.shape[1]), dim=-1)
        return batch, entries, top, None if self.painter is None else self.painter.recorder.take()

    def read(self, batch, entries, top, attended):
        places, unreadable = {}, iter(batch.unreadable)
        if top is not None:
            places = {its_number: place for place, its_number in enumerate(batch.indices[0].tolist())}
            probabilities, classes, resized = top.values.tolist(), top.indices.tolist(), batch.targets.tolist()
        pictures = None if self.painter is None or not places else self.loader.as_bytes(batch.images)
        answers = []
        for its_number, path in entries:
            place = places.get(its_number)
            if place is None:
                answers.append(Answer(its_number, path, [], [], reason=next(unreadable).reason))
                continue
            picture = '' if pictures is None else self.painter.write(path, pictures[place], attended, place)
            answers.append(Answer(its_number, path, classes[place], probabilities[place], picture,
                                  resized=bool(resized[place])))
        return answers


def together(answers, device):
    """Yield the lists of answers, those of all processes in one, in the order of the inputs.

    The k-th batches of all processes are neighbours: process r of w has every w-th image.
    """
    if process_group.world_size() == 1:
        yield from answers
        return
    stage, mine = ' (predicting, batch %d)', iter(answers)
    watchdog.enter_stage('predicting')
    for batch in itertools.count():
        watchdog.mark_item(batch, 0, stage)
        lists = collectives.all_gather_json(next(mine, None), device)
        if not any(lists):
            watchdog.mark_item(watchdog.LAST, 2, stage)
            return
        yield [Answer(*each) for each in sorted(itertools.chain(*filter(None, lists)), key=lambda each: each[0])]


def check_streams(stream, device):
    """Raise a `UserError` where the processes did not pass the same images."""
    if any(state != stream.state for state in collectives.all_gather_json(stream.state, device)):
        raise UserError('the processes did not find the same images; every machine needs the same files, and they '
                        'must stay as they are for the time')


# ---- results

class Lines:
    """The results for people: a line for each image, on standard output."""

    def __init__(self, file, classes, *_):
        self.file, self.classes = file, [escape_text(name) for name in classes]

    def write(self, answer):
        if not answer.reason:
            self.file.write(('%s: %s\n' % (escape_text(answer.path), ', '.join(
                '%s %.1f %%' % (self.classes[index], 100 * share)
                for index, share in zip(answer.classes, answer.probabilities)))).encode('utf-8', 'backslashreplace'))

    def end(self):
        pass


class Csv(Lines):
    """One row for each image: file, class_1, probability_1, class_2, …; what no UTF-8 text can hold is escaped.

    attention is a column where there are such pictures, error where unreadable files are left out.
    """

    def __init__(self, file, classes, args):
        super().__init__(file, classes)
        self.extra = [name for name, there in (('attention', args.attention), ('error', args.bad_images == 'skip'))
                      if there]
        self.columns = 2 * min(args.top_k, len(classes))
        self.row(['file'] + ['%s_%d' % (name, rank + 1) for rank in range(self.columns // 2)
                             for name in ('class', 'probability')] + self.extra)

    def row(self, values):
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerow(values)
        self.file.write(text.getvalue().encode('utf-8'))

    def write(self, answer):
        pairs = [value for index, share in zip(answer.classes, answer.probabilities)
                 for value in (self.classes[index], '%.6f' % share)]
        extra = {'attention': escape_text(answer.picture), 'error': answer.reason}
        self.row([escape_text(answer.path)] + (pairs or [''] * self.columns) + [extra[name] for name in self.extra])


class JsonLines:
    """One object for each image and line: file, predictions, and where there are such attention, error.

    File names are exact: bytes that are no UTF-8 are lone surrogates, as Python's os.fsencode takes them.
    """
    start, between, last = '', '\n', '\n'

    def __init__(self, file, classes, *_):
        self.file, self.classes, self.count = file, classes, 0

    def write(self, answer):
        content = {'file': answer.path}
        if answer.reason:
            content['error'] = answer.reason
        else:
            content['predictions'] = [
                {'class': self.classes[index], 'index': index, 'probability': round(share, 6)}
                for index, share in zip(answer.classes, answer.probabilities)]
        if answer.picture:
            content['attention'] = answer.picture
        self.text((self.between if self.count else self.start) + json.dumps(content, ensure_ascii=False))
        self.count += 1

    def end(self):
        if self.count:
            self.text(self.last)

    def text(self, text):
        self.file.write(text.encode('utf-8', 'backslashreplace'))  # a lone surrogate becomes JSON's own escape


class Json(JsonLines):
    """A list of what JSONL has."""
    start, between, last = '[\n', ',\n', '\n]\n'


FORMATS = {'csv': Csv, 'json': Json, 'jsonl': JsonLines}


@contextlib.contextmanager
def destination(args, stdout):
    """The file that takes the results, as bytes; one that is named appears only when it is whole."""
    if not process_group.is_main_process():
        yield io.BytesIO()
        return
    to_file = args.output not in ('', '-')
    try:
        if to_file:
            os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        with atomic_write.atomic_write(args.output, is_given=True) if to_file else \
                contextlib.nullcontext(stdout.buffer) as file:
            yield file
    except OSError as error:
        if not to_file:  # Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError('cannot write %s (%s); is the disk full, or its folder gone?' % (
            '--output ' + escape_text(args.output) if to_file else 'to standard output', error.strerror or error)
                        ) from None


def report(predictor, args, stdout, trained, device):
    """Write the results, and say what was left out; gives (images read, files left out)."""
    from tqdm import tqdm  # slow to import, and of no use to --help

    tqdm.monitor_interval = 0  # its thread must not be there when processes are forked
    to_file, size = args.output not in ('', '-'), trained.config.input_size
    read = left_out = resized = 0
    hidden = None if to_file and process_group.is_main_process() else True  # None: shown on a terminal
    with destination(args, stdout) as file, tqdm(desc='Predicting', unit=' images', disable=hidden) as bar:
        sink = (FORMATS[args.format] if args.output else Lines)(file, trained.classes, args)
        for answers in together(predictor.answers(), device):
            if any(answer.resized for answer in answers) and not resized:
                log.log_main('Note: images that are not %dx%d are resized and cropped to that; the model was '
                                'trained on images of just that size' % (size, size))
            for answer in answers if process_group.is_main_process() else ():
                if answer.reason:
                    bar.write('Left out: %s cannot be read as an image (%s)'
                              % (escape_text(answer.path), answer.reason), file=sys.stderr)
                sink.write(answer)
            left_out += sum(bool(answer.reason) for answer in answers)
            read += sum(not answer.reason for answer in answers)
            resized += sum(answer.resized for answer in answers)
            bar.update(len(answers))
            if not to_file:
                file.flush()
        check_streams(predictor.stream, device)
        if not read:
            raise UserError('none of the %d images can be read' % left_out)
        sink.end()
        if not to_file:
            file.flush()
    return read, left_out


# ---- the program

def start(args):
    """The device of this process, which has met the others."""
    device = process_group.init_distributed_mode(args)
    watchdog.start(process_group.rendezvous_store(), args.dist_timeout)
    return device


def loader_processes(args, found):
    """How many load images, where no flag says it. A single batch is loaded before new processes would have begun."""
    if args.num_workers is not None:
        return args.num_workers
    return 0 if found < args.batch_size else max(1, min(8, (os.cpu_count() or 1) // process_group.world_size()))


def build_loader(args, trained, stream, device):
    found, evaluation = stream.first(args.batch_size), trained.preprocessing
    options = loader_kwargs(loader_processes(args, found), args.pin_mem, evaluation.input_size, device)
    if 'persistent_workers' in options:
        options['persistent_workers'] = False  # there is one pass
    samples = Samples(PathDataset(evaluation, args.data_backend), args.bad_images == 'skip')
    return PrefetchLoader(torch.utils.data.DataLoader(samples, batch_size=found, sampler=stream, **options), device,
                          evaluation.mean, evaluation.std)


def main(args, stdout):
    """Predict; the results go to `stdout`, a text file, or to where the flags say."""
    args = check_args(args)
    device = start(args)
    dtype = half_precision.check_precision(device, args.amp, args.opt_level, args.amp_dtype)
    trained = load_for_inference(args.resume, args.use_ema, model=args.model, input_size=args.input_size,
                           crop_pct=args.crop_pct)
    recorder = None if args.attention is None else attention_maps.AttentionHook(
        trained.model, args.attention_block, None if args.attention == 'auto' else args.attention)
    stream = PathSampler(args.inputs, {os.path.realpath(args.attention_dir)} if recorder else (),
                         process_group.rank(), process_group.world_size())
    loader = build_loader(args, trained, stream, device)
    model, scaler = loss_scaler.initialize_amp(trained.model.to(device), None, device, dtype, args.opt_level)
    fused_attention.choose_attention(trained.model, device, 'auto', dtype, loader.batch_size)
    log.log_main('%s: %s, %d classes, input %dx%d, %s; on %s, %s' % (
        escape_text(trained.source), trained.config.model, len(trained.classes), trained.config.input_size,
        trained.config.input_size, 'averaged weights' if args.use_ema else 'pooled by the %s' % (
            'mean' if trained.model.fc_norm is not None else 'class token'), device, scaler.description))

    painter = recorder and attention_maps.HeatmapWriter(recorder, args.attention_dir, common_folder(args.inputs),
                                                  args.attention_heads)
    started = time.time()
    predictor = Predictor(model.eval(), loader, stream, args.top_k, painter, trained.activation)
    read, left_out = report(predictor, args, stdout, trained, device)
    seconds = time.time() - started
    log.log_main('%d image%s in %.1f s (%.0f images/s)%s%s%s' % (
        read, '' if read == 1 else 's', seconds, read / seconds, ', %d left out' % left_out if left_out else '',
        '; results in %s' % escape_text(args.output) if args.output not in ('', '-') else '',
        '; pictures in %s' % escape_text(args.attention_dir) if painter else ''))


def run(argv=None):
    """Parse, run, and turn what the user can mend into one line and exit status 2; a signal gives 128 + its number."""
    stdout = sys.stdout

    def work():
        with contextlib.redirect_stdout(stdout):  # --help
            args = build_parser().parse_args(argv)
        main(args, stdout)
        stdout.flush()  # several processes end without doing that

    try:
        with preemption.Signals(), contextlib.redirect_stdout(sys.stderr):  # so that only results are on stdout
            return run_with_error_report(PROGRAM, work, 'lower --batch_size')
    except BrokenPipeError:  # whoever read the results has seen enough
        return exit_process(128 + signal.SIGPIPE)
    except preemption.Stopped as stop:
        watchdog.stop()
        if not process_group.is_error_reporter():
            return exit_process(128 + stop.number)
        return exit_with_error(PROGRAM, 'interrupted by %s; a file for --output is not written'
                               % preemption.name(stop.number), 128 + stop.number)


if __name__ == '__main__':
    sys.exit(run())
