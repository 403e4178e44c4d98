"""Reports and counts image files that cannot be read (--bad_images), and checks a data set (--check_data)."""

import collections
import concurrent.futures
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Deque, Dict, Iterable, Iterator, Optional, Sequence, Set, Tuple

from beit.data.class_folders import describe_unused
from beit.data.decode import UnreadableImage
from beit.data.image_dataset import ArrayDataset, image_name
from beit.distributed import process_group
from beit.errors import UserError, escape_text
from beit.files import atomic_write, run_folder
from beit.log import log_main, pluralize

LIST = 'bad_images.txt'
run_folder.register_output(r'bad_images\.txt')
FILES_AT_ONCE = 16  # per task of check_data's processes
_dataset: Any = None  # in check_data's processes


class UnreadableFiles:
    """Reports each file that a run left out once, and lists it in output_dir/bad_images.txt; too many stop the run.

    A file listed before a resume or by --check_data is not reported again. It counts against the limit only when it is
    met again, since the user may have repaired it.

    Args:
        output_dir (str): '' or None for no list.
        limit (float): the largest allowed share of bad files in a set.
    """

    def __init__(self, output_dir: Optional[str], limit: float) -> None:
        self.path, self.limit = output_dir and os.path.join(output_dir, LIST), limit
        self.listed = _read_list(self.path)
        self.encountered: Dict[str, Set[str]] = collections.defaultdict(set)

    def report(self, unreadable: Iterable[Tuple[str, str]], total: int, split: str) -> None:
        """Report and count new files, (escaped path, reason) of all processes; every process calls this with the same.

        Args:
            total: the number of files of the set.
            split: 'training' or 'validation'; each is counted separately.

        Raises:
            UserError: too many files of the set are bad, or the list can't be written.
        """
        reasons = dict(unreadable)
        new = {path: reasons[path] for path in reasons if path not in self.listed}
        self.encountered[split].update(reasons)
        self.listed.update(new)
        for item in new.items():
            log_main('Left out: %s cannot be read as an image (%s)' % item)
        if new and self.path and process_group.is_main_process():
            _write_list(self.path, self.listed)
        count = len(self.encountered[split])
        if count and count / total > self.limit:
            listed_in = ', see ' + escape_text(self.path) if self.path else ''
            raise UserError('--max_bad_images %g: %d of the %d %s images cannot be read%s; repair or remove them, or '
                            'raise --max_bad_images' % (self.limit, count, total, split, listed_in))


def _read_list(path: Optional[str]) -> Dict[str, str]:
    """{escaped path: reason} of a bad_images.txt; {} if there is none."""
    if not path or not os.path.isfile(path):
        return {}
    with open(path, encoding='utf-8', errors='replace') as file:
        return dict(line.rstrip('\n').partition('\t')[::2] for line in file if line.strip())


def _write_list(path: str, reasons: Dict[str, str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lines = ['%s\t%s\n' % item for item in reasons.items()]
    atomic_write.write_bytes(path, ''.join(lines).encode())


# ---- --check_data

def check_data(parts: Sequence[Any], num_workers: int, output_dir: str) -> Tuple[int, int]:
    """Decode every image of the data sets (or None), and print a line for each unreadable and each unused file.

    Replaces output_dir/bad_images.txt by the list of unreadable files, or removes it if every file is good.

    Returns:
        (number of unreadable files and of images with a size that the flags don't allow, number of class folders
        without an image).
    """
    from tqdm import tqdm  # needed only here

    tqdm.monitor_interval = 0  # no thread may run when processes are forked
    parts = [part for part in parts if part is not None]
    total = sum(map(len, parts))
    bad: Dict[str, str] = {}
    with tqdm(total=total, desc='Checking', unit=' images', disable=None) as bar:  # None: only on a terminal
        for dataset in parts:
            found = {}
            # CIFAR's images are in one file, whose checksum is compared on reading.
            for indices, reasons in () if isinstance(dataset, ArrayDataset) else _check_files(dataset, num_workers):
                for index in reasons:
                    with bar.external_write_mode():
                        log_main('%s\t%s' % (image_name(dataset, index), reasons[index]))
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
    """Yield (indices, {index: reason} of the bad files among them), for every file once.

    If a worker dies, the files in progress are checked one by one, to find the file that killed it.
    """
    waiting: Deque[Sequence[int]] = collections.deque(
        range(len(dataset))[first:first + FILES_AT_ONCE] for first in range(0, len(dataset), FILES_AT_ONCE))
    suspects: Deque[Sequence[int]] = collections.deque()  # single files
    while waiting and not workers:
        indices = waiting.popleft()
        yield indices, _check_some(dataset, indices)
    while suspects or waiting:
        queue, limit = (suspects, 1) if suspects else (waiting, 2 * workers)
        pending: Dict[concurrent.futures.Future, Sequence[int]] = {}
        try:
            with concurrent.futures.ProcessPoolExecutor(min(workers, limit, len(queue)), initializer=_start_worker,
                                                        initargs=(dataset,)) as pool:
                while queue or pending:
                    while queue and len(pending) < limit:
                        pending[pool.submit(_check_in_worker, queue[0])] = queue[0]
                        queue.popleft()
                    done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        reasons = future.result()
                        yield pending.pop(future), reasons
        except BrokenProcessPool:
            for indices in pending.values():
                if queue is waiting:
                    suspects.extend([index] for index in indices)
                else:
                    yield indices, dict.fromkeys(
                        indices, 'its reader process died: killed by the system, or crashed in a decoder')


def _check_some(dataset: Any, indices: Iterable[int]) -> Dict[int, str]:
    """{index: reason} of the bad files among `indices`."""
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


def _start_worker(dataset: Any) -> None:
    global _dataset
    _dataset = dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process_group.end_with_parent()


def _check_in_worker(indices: Iterable[int]) -> Dict[int, str]:
    return _check_some(_dataset, indices)
