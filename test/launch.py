#!/usr/bin/env python3
"""Start run_class_finetuning.py on several processes, of one machine or more, after one look at the flags.

    python test/launch.py --nproc_per_node=8 [--nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=29500] \\
        -- --data_path=/data/ImageNet2012 …

The processes get the environment that torchrun gives them, and meet as PyTorch does (env://). A mistake in the flags
ends in one line and status 2 before any process starts. A process that fails ends all of them, on every machine, and
its status becomes this program's: PyTorch 1.5's launcher leaves the others running, and no PyTorch's tells the other
machines, where NCCL and HCCL wait for minutes.

The launchers of several machines meet at --master_port of node 0 and keep that connection to the end. Whoever leaves
it without a good word has failed.
"""

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cli  # noqa: E402
import locations  # noqa: E402
import distributed  # noqa: E402
import flags  # noqa: E402
import preemption  # noqa: E402
from errors import UserError, one_line  # noqa: E402

MEETING_SECONDS = 300  # for people to start the script on the other machines; DIST_WAIT_SECONDS says otherwise
DONE = b'done'


def build_parser():
    parser = argparse.ArgumentParser('launch.py', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    number = cli.bounded_number
    parser.add_argument('--nproc_per_node', type=number(int, 1), default=8, help='processes on this machine (8)')
    parser.add_argument('--nnodes', type=number(int, 1), default=1, help='machines (1)')
    parser.add_argument('--node_rank', type=number(int, 0), default=0, help='which of them this is, from 0 (0)')
    parser.add_argument('--master_addr', default=None, help='address of machine 0')
    parser.add_argument('--master_port', type=number(int, 1, 65535), default=None, help='a free port there (any)')
    parser.add_argument('flags', nargs=argparse.REMAINDER, help='-- and the flags of run_class_finetuning.py')
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    return parser


def check(options, arguments):
    """Find what's wrong before anything starts; give the port to meet at."""
    args = flags.build_parser().parse_args(arguments)
    if options.node_rank >= options.nnodes:
        raise UserError('--node_rank %d: with --nnodes %d it goes from 0 to %d'
                        % (options.node_rank, options.nnodes, options.nnodes - 1))
    if options.nnodes > 1 and (options.master_port is None or (options.node_rank and options.master_addr is None)):
        raise UserError('--nnodes %d needs --master_addr and --master_port, the same on every machine' % options.nnodes)
    distributed.wait_seconds(MEETING_SECONDS)
    flags.check_args(args, local_rank=options.nproc_per_node - 1,
                     processes=options.nproc_per_node * options.nnodes)
    if args.data_path == 'demo':
        locations.resolve_data_path(args.data_path)
    if options.node_rank > 0:
        return options.master_port
    with listen(options.master_port) as probe:
        return probe.getsockname()[1]


def listen(port=None):
    """A socket that listens at this port, or at any free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(('', port or 0))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError('--master_port %d: %s; choose another, the same on every machine, or on one machine leave the '
                        'flag out' % (port, error.strerror.lower())) from None
    return listener


# ---- several machines

class Nodes:
    """The connections between node 0's launcher and the others'; none where there is one machine.

    Attributes:
        address, port: where the processes are to meet.
    """

    def __init__(self, options, port):
        self.links = {}  # node: socket
        self.address, self.port = '127.0.0.1', port
        self.facts = {'nnodes': options.nnodes, 'nproc_per_node': options.nproc_per_node}
        self.seconds = distributed.wait_seconds(MEETING_SECONDS)
        self.until = time.time() + self.seconds
        try:
            if options.nnodes > 1 and options.node_rank == 0:
                self.gather(options)
            elif options.nnodes > 1:
                self.address = options.master_addr
                self.join(options)
        except BaseException:
            self.part()
            raise

    def gather(self, options):
        """As node 0: wait for the others, compare, and tell them the port of the processes."""
        print('Waiting for %d more of %d machines at port %d, for up to %d s'
              % (options.nnodes - 1, options.nnodes, options.master_port, self.seconds), flush=True)
        with listen(options.master_port) as listener:
            while len(self.links) < options.nnodes - 1:
                listener.settimeout(max(self.until - time.time(), 0.01))
                try:
                    link = listener.accept()[0]
                except socket.timeout:
                    missing = [rank for rank in range(1, options.nnodes) if rank not in self.links]
                    self.refuse('--nnodes %d: node %s did not come to port %d of node 0 within %d s; start the script '
                                'there with --node_rank=%d and node 0\'s --master_addr and --master_port'
                                % (options.nnodes, ', '.join(map(str, missing)), options.master_port, self.seconds,
                                   missing[0]))
                facts = read_line(watched(link), 5)
                node = facts.pop('node_rank', None)
                if node is None:
                    link.close()  # some other program that knocked
                    continue
                if node in self.links:
                    tell(self.links.pop(node), error='--node_rank %d was given to another machine too' % node).close()
                self.links[node] = link
                for name in facts:
                    if facts[name] != self.facts[name]:
                        self.refuse('--%s is %d on node 0 and %d on node %d; give the same on every machine'
                                    % (name, self.facts[name], facts[name], node))
        with listen() as free:
            self.port = free.getsockname()[1]
        for link in self.links.values():
            tell(link, port=self.port)

    def refuse(self, message):
        for link in self.links.values():
            tell(link, error=message)
        raise UserError(message)

    def join(self, options):
        """As another node: connect to node 0, and learn the port of the processes."""
        place = '--master_addr %s --master_port %d' % (options.master_addr, options.master_port)
        print('Looking for node 0 at %s:%d, for up to %d s'
              % (options.master_addr, options.master_port, self.seconds), flush=True)
        cure = 'start the script on node 0 with --nnodes=%d --node_rank=0, and give its address and port here' \
            % options.nnodes
        while True:
            left = max(self.until - time.time(), 0.01)
            try:
                link = socket.create_connection((options.master_addr, options.master_port), min(left, 10))
                break
            except OSError as error:
                if time.time() >= self.until:
                    raise UserError('%s: node 0 did not answer within %d s (%s); %s'
                                    % (place, self.seconds, error.strerror or error, cure)) from None
                time.sleep(0.3)
        self.links[0] = watched(link)
        reply = read_line(tell(link, node_rank=options.node_rank, **self.facts), self.seconds + 5)
        if 'port' not in reply:
            raise UserError(reply.get('error') or '%s: what answers there is not this launcher, or it gave up; %s'
                            % (place, cure))
        self.port = reply['port']

    def lost(self, seconds):
        """Wait so long for news; the number of a node that failed or went away, or None."""
        if not self.links:
            time.sleep(seconds)
            return None
        for link in select.select(list(self.links.values()), [], [], seconds)[0]:
            node = next(node for node in self.links if self.links[node] is link)
            try:
                word = link.recv(len(DONE))
            except OSError:
                word = b''
            if word != DONE:
                return node
            self.links.pop(node).close()
        return None

    def part(self, word=b''):
        """Leave the others, with a good word or without."""
        for link in self.links.values():
            try:
                link.sendall(word)
            except OSError:
                pass
            link.close()
        self.links = {}


def watched(link):
    """The connection, which breaks within a minute where the other machine falls silent."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (('TCP_KEEPIDLE', 20), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 6)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def tell(link, **facts):
    try:
        link.sendall(json.dumps(facts).encode() + b'\n')
    except OSError:
        pass  # it went away; the next that reads from it learns of that
    return link


def read_line(link, seconds):
    """What the other side told, or {} where it told nothing sensible."""
    text, until = b'', time.time() + seconds
    try:
        while not text.endswith(b'\n') and len(text) < 2000:
            link.settimeout(max(until - time.time(), 0.01))
            byte = link.recv(1)
            if not byte:
                return {}
            text += byte
        facts = json.loads(text.decode())
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}
    finally:
        link.settimeout(10)


# ---- the processes

def launch(options, port, program_flags):
    """Run the processes to their end; gives the exit status of the first that failed, or 0."""
    heard = Signals()
    nodes, processes = Nodes(options, port), {}
    heard.processes = processes.values()
    print('Starting %d processes on this machine' % options.nproc_per_node, flush=True)
    try:
        for local_rank in range(options.nproc_per_node):
            rank = options.node_rank * options.nproc_per_node + local_rank
            processes[rank] = start(options, nodes, rank, local_rank, program_flags)
        status = watch(processes, nodes, heard)
        if status == 0:
            nodes.part(DONE)
        return status
    finally:
        nodes.part()
        stop(processes.values())


class Signals:
    """Passes signals on: the processes finish their step, save and end. A second one ends them at once."""

    def __init__(self):
        self.processes, self.first = None, None
        for number in preemption.NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self.heard)

    def heard(self, number, _):
        if not self.processes:
            sys.exit(128 + number)
        now = time.monotonic()
        if self.first is not None and now - self.first < preemption.SAME_EVENT_SECONDS:
            return
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        if self.first is not None:
            sys.exit(128 + number)
        self.first = now


def start(options, nodes, rank, local_rank, program_flags):
    env = dict(os.environ, MASTER_ADDR=nodes.address, MASTER_PORT=str(nodes.port), RANK=str(rank),
               WORLD_SIZE=str(options.nproc_per_node * options.nnodes), LOCAL_RANK=str(local_rank),
               LOCAL_WORLD_SIZE=str(options.nproc_per_node))
    env.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // options.nproc_per_node)))
    return subprocess.Popen([sys.executable, '-u', os.path.join(ROOT, 'run_class_finetuning.py')] + program_flags,
                            env=env, preexec_fn=distributed.end_with_parent)


def watch(processes, nodes, heard):
    """Until all are done, or one has failed, here or on another machine: the exit status."""
    running = dict(processes)
    while running:
        for rank, process in list(running.items()):
            if process.poll():
                return report(rank, process.returncode, heard)
            if process.poll() == 0:
                del running[rank]
        node = nodes.lost(0.2)
        if node is not None:
            say('node %d failed or was stopped, its own messages say why; the processes here were stopped' % node)
            return 1
    return 0


def stop(processes):
    """End those that still run, at once: without the one that failed they can only wait, and their files are whole."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.kill()
    for process in running:
        process.wait()


def report(rank, status, heard):
    """The shell's status for a process that failed. One that ended with 2 or by a signal's wish has said why."""
    if -status in preemption.NUMBERS and heard.first is not None:
        say('stopped by %s before the training began; nothing new was saved' % signal.Signals(-status).name)
    elif status != 2 and status - 128 not in preemption.NUMBERS:
        say('process %d ended with %s; the others were stopped'
            % (rank, 'exit status %d' % status if status > 0 else signal.Signals(-status).name))
    return status if status > 0 else 128 - status


def say(text):
    print('launch.py: ' + text, file=sys.stderr, flush=True)


def main():
    try:
        options = build_parser().parse_args()
        arguments = options.flags[1:] if options.flags[:1] == ['--'] else options.flags
        port = check(options, arguments)
        return launch(options, port, arguments)
    except UserError as error:
        print('run_class_finetuning.py: error: %s' % one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there are processes to tell
        return 130


if __name__ == '__main__':
    sys.exit(main())
