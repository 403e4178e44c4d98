"""Open ports while processes train, and their reaction to untrusted bytes."""

import contextlib
import os
import random
import signal
import socket
import struct
import threading

import pytest

from beit.distributed import process_group
from helpers import LONG, ends, free_port, has_proc, marked, start_launcher

pytestmark = [pytest.mark.current_only, has_proc]

JUNK = [b'{"rank": 0}\n{"rank": "\x1b[2J"}\n[]\n', b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'\x1b[31m\x1b]0;title\x07\n',
        bytes(4096), b'\xff' * 4096, struct.pack('<Q', 2 ** 62) * 64, b'', random.Random(0).randbytes(100000)
        if hasattr(random.Random, 'randbytes') else os.urandom(100000)]


def listening(pids):
    """{(address, port)} on which processes listen."""
    inodes, found = set(), set()
    for pid in pids:
        for number in os.listdir('/proc/%d/fd' % pid):
            try:
                inodes.add(os.readlink('/proc/%d/fd/%s' % (pid, number)))
            except OSError:
                continue
    for family, name in ((socket.AF_INET, 'tcp'), (socket.AF_INET6, 'tcp6')):
        with open('/proc/net/' + name) as file:
            for fields in map(str.split, list(file)[1:]):
                if fields[3] == '0A' and 'socket:[%s]' % fields[9] in inodes:
                    address, _, port = fields[1].partition(':')
                    words = [int(address[start:start + 8], 16) for start in range(0, len(address), 8)]
                    packed = struct.pack('=%dI' % len(words), *words)
                    found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def send_junk(address, port):
    """Connect, send, and disconnect or stay, as a port scanner does. Returns the open connections."""
    kept = []
    for data in JUNK:
        for stays in (False, True):
            connection = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET)
            connection.settimeout(2)
            try:
                connection.connect((address, port))
                connection.sendall(data)
            except OSError:
                continue
            if stays:
                kept.append(connection)
            else:
                connection.close()
    return kept


def until_epoch(number, jobs):
    assert any('Epoch: [%d]' % number in line for line in jobs[0].stdout), [job.stderr.read() for job in jobs]


@pytest.fixture
def started(image_folder, tmp_path):
    """started(nnodes=2, …): the launchers of a training job, and the ids of all its processes."""
    jobs = []

    def start(*flags, nnodes=1, **options):
        data = '--data_path=' + image_folder()
        for rank in range(nnodes):
            jobs.append(start_launcher(data, *LONG, *flags, nnodes=nnodes, processes=2 // nnodes, node_rank=rank,
                                       MARK=str(tmp_path), **options))
        until_epoch(1, jobs)
        return jobs, marked(str(tmp_path))
    yield start
    for job in jobs:
        job.kill()


def test_only_this_machine_can_reach_its_job(started):
    """Bytes from a local user neither end the job nor appear in its output."""
    jobs, pids = started('--dist_timeout=30')
    found = listening(pids)
    print(found)
    assert found
    if takes_a_socket():
        assert {address for address, _ in found} == {'127.0.0.1'}, found
    kept = [connection for place in found for connection in send_junk(*place)]
    assert kept
    until_epoch(3, jobs)
    jobs[0].send_signal(signal.SIGTERM)
    run, = ends(jobs)
    assert run.status == 143
    assert run.err.splitlines()[1:] == [], run.err


def takes_a_socket():
    import torch.distributed
    return 'master_listen_fd' in torch.distributed.TCPStore.__init__.__doc__


def test_junk_between_two_machines(started):
    """The store must listen for the other machine, so any host can send bytes to it."""
    jobs, pids = started('--dist_timeout=30', nnodes=2, port=free_port(), address=socket.gethostbyname(
        socket.gethostname()))
    kept = [connection for place in listening(pids) for connection in send_junk(*place)]
    assert kept
    until_epoch(3, jobs)
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    runs = ends(jobs)
    assert [run.status for run in runs] == [143, 143]
    assert 'Traceback' not in ''.join(run.out + run.err for run in runs)
    assert all(line.isprintable() for run in runs for line in (run.out + run.err).splitlines())


def test_master_addr_of_a_server_that_is_no_store(image_folder):
    """A server that is no store answers at --master_addr."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen(8)

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].sendall(JUNK[2] * 100)
        threading.Thread(target=answer, daemon=True).start()
        job = start_launcher('--data_path=' + image_folder(), node_rank=1, port=server.getsockname()[1],
                             DIST_WAIT_SECONDS='5')
        run, = ends([job], 90)
        server.shutdown(socket.SHUT_RDWR)
    assert run.status == 2, run
    line, = run.err.splitlines()
    assert line.startswith('run_class_finetuning.py: error: --master_addr 127.0.0.1 ') and line.isprintable()


def test_the_port_of_a_store_on_loopback():
    port = process_group.listen_on_loopback()
    with socket.socket() as other:
        if takes_a_socket():
            with pytest.raises(OSError):
                other.bind(('127.0.0.1', port))
        else:
            other.bind(('127.0.0.1', port))
