"""Image files that cannot be read: stop, or leave them out, report and count them."""

import collections
import concurrent.futures
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Deque, Dict, Iterable, Iterator, Optional, Sequence, Set, Tuple

from beit.data.class_folders import describe_unused
from beit.data.decode import UnreadableImage
from beit.data.image_dataset import image_name
from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.files import atomic_write, run_folder
from beit.log import log_main, pluralize

LIST = 'bad_images.txt'
run_folder.register_output(r'bad_images\.txt')
FILES_AT_ONCE = 16  # that one process of check_data takes
_dataset: Any = None  # of a process of check_data


class UnreadableFiles:
    """The files that a run left out: each reported once and listed in output_dir/bad_images.txt; too many stop it.

    A file that is already listed, from before a resume or from --check_data, is not reported again. It counts against
    the limit only when this process meets it: the file may have been repaired.

    Args:
        output_dir (str): '' or None keeps no list.
        limit (float): the largest share of a set's files that may be bad.
    """

    def __init__(self, output_dir: Optional[str], limit: float) -> None:
        self.path, self.limit = output_dir and os.path.join(output_dir, LIST), limit
        self.listed = _read_list(self.path)
        self.encountered: Dict[str, Set[str]] = collections.defaultdict(set)

    def report(self, unreadable: Iterable[Tuple[str, str]], total: int, split: str) -> None:
        """Report and count newly met files. Every process calls this with the same list.

        Args:
            unreadable (list of (str, str)): printable path and reason, of all processes together.
            total (int): the files of that set.
            split (str): 'training' or 'validation'; each is counted separately.

        Raises:
            UserError: too many files of the set are bad, or the list can't be written.
        """
        new = {}
        for path, reason in unreadable:
            self.encountered[split].add(path)
            if path not in self.listed:
                self.listed[path] = new[path] = reason
        for path, reason in new.items():
            log_main('Left out: %s cannot be read as an image (%s)' % (path, reason))
        if new and self.path and process_group.is_main_process():
            _write_list(self.path, self.listed)
        count = len(self.encountered[split])
        if count and count / total > self.limit:
            listed_in = ', see ' + escape_text(self.path) if self.path else ''
            raise UserError('--max_bad_images %g: %d of the %d %s images cannot be read%s; mend or remove them, or '
                            'raise --max_bad_images' % (self.limit, count, total, split, listed_in))


def _read_list(path: Optional[str]) -> Dict[str, str]:
    """{printable path: reason} of a bad_images.txt; {} where there is none."""
    if not path or not os.path.isfile(path):
        return {}
    with open(path, encoding='utf-8', errors='replace') as file:
        return dict(line.rstrip('\n').partition('\t')[::2] for line in file if line.strip())


def _write_list(path: str, reasons: Dict[str, str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lines = ['%s\t%s\n' % item for item in reasons.items()]
    atomic_write.write_bytes(path, ''.join(lines).encode())


# ---- before a run

def check_data(parts: Sequence[Any], num_workers: int, output_dir: str) -> Tuple[int, int]:
    """Decode every image of the data sets, print a line for each file that can't be or isn't used, and list the former.

    It replaces output_dir/bad_images.txt, or removes that file if every image is good.

    Args:
        parts: data sets; None among them is skipped.

    Returns:
        (number of files that can't be used, number of class folders without an image). A size that the flags don't
        allow counts: a run would stop there.
    """
    from tqdm import tqdm  # needed only here

    tqdm.monitor_interval = 0  # its thread must not be there when processes are forked
    parts = [part for part in parts if part is not None]
    total = sum(map(len, parts))
    bad: Dict[str, str] = {}
    with tqdm(total=total, desc='Checking', unit=' images', disable=None) as bar:  # None: only on a terminal
        for dataset in parts:
            found = {}
            # CIFAR's images are in one file, whose checksum was compared when it was read.
            for indices, reasons in _check_files(dataset, num_workers) if hasattr(dataset, 'load') else ():
                for index in reasons:
                    bar.write('%s\t%s' % (image_name(dataset, index), reasons[index]))
                found.update(reasons)
                bar.update(len(indices))
            bad.update((image_name(dataset, index), found[index]) for index in sorted(found))
    path = output_dir and os.path.join(output_dir, LIST)
    if bad and path:
        _write_list(path, bad)
    elif path and os.path.isfile(path):
        os.remove(path)
    unused = {path: reason for part in parts for path, reason in getattr(part, 'unused', ())}
    for path, reason in unused.items():
        log_main('%s\tnot used: %s' % (escape_text(path), escape_text(reason)))
    empty = sorted({path for part in parts for path in getattr(part, 'empty', ())})
    for path in empty:
        log_main('%s\tno image in this class folder' % path)
    log_main('Checked %d images: %d cannot be read%s%s' % (
        total, len(bad), '; no image in %s' % pluralize(len(empty), 'class folder') if empty else '',
        '; ' + describe_unused(unused.values()) if unused else ''))
    return len(bad), len(empty)


def _check_files(dataset: Any, workers: int) -> Iterator[Tuple[Sequence[int], Dict[int, str]]]:
    """Yield (indices, {index: reason} of the bad ones among them) until every file was looked at once.

    Where a worker dies, the files that were under way are looked at one at a time, to tell which one it died of.
    """
    waiting: Deque[Sequence[int]] = collections.deque(
        range(len(dataset))[first:first + FILES_AT_ONCE] for first in range(0, len(dataset), FILES_AT_ONCE))
    while waiting and not workers:
        indices = waiting.popleft()
        yield indices, _check_some(dataset, indices)
    while waiting:
        under_way: Dict[concurrent.futures.Future, Sequence[int]] = {}
        try:
            with _pool(min(workers, len(waiting)), dataset) as pool:
                while waiting or under_way:
                    while waiting and len(under_way) < 2 * workers:
                        under_way[pool.submit(_check_in_worker, waiting[0])] = waiting[0]
                        waiting.popleft()
                    done, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        reasons = future.result()
                        yield under_way.pop(future), reasons
        except BrokenProcessPool:
            for indices in under_way.values():
                yield indices, _check_one_at_a_time(dataset, indices)


def _check_some(dataset: Any, indices: Iterable[int]) -> Dict[int, str]:
    """{index: reason} of those files that can't be used."""
    reasons = {}
    for index in indices:
        path = dataset.samples[index][0]
        try:
            dataset.load(path)
        except UnreadableImage as error:
            reasons[index] = error.reason
        except UserError as error:
            reasons[index] = str(error).replace(escape_text(path), 'it', 1)
    return reasons


def _check_one_at_a_time(dataset: Any, indices: Iterable[int]) -> Dict[int, str]:
    reasons: Dict[int, str] = {}
    waiting = collections.deque(indices)
    while waiting:
        try:
            with _pool(1, dataset) as pool:
                while waiting:
                    reasons.update(pool.submit(_check_in_worker, [waiting[0]]).result())
                    waiting.popleft()
        except BrokenProcessPool:
            reasons[waiting.popleft()] = 'the process that read it died: killed by the system, or a decoder crashed'
    return reasons


def _pool(workers: int, dataset: Any) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(dataset,))


def _start_worker(dataset: Any) -> None:
    global _dataset
    _dataset = dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process reports it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process_group.end_with_parent()


def _check_in_worker(indices: Iterable[int]) -> Dict[int, str]:
    return _check_some(_dataset, indices)
