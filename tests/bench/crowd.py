#!/usr/bin/env python3
"""A crowd of strangers, and what a good client has to suffer beside it.

  tests/bench/crowd.py [--nbd-img PATH] [--count 1000] [--rounds 400]

Held open at once: `count` connections that say nothing, `count` that send a byte a second, and `count` that stand still
somewhere in TLS (behind STARTTLS, in the middle of the ClientHello, behind it). Meanwhile a good client connects,
negotiates, reads 4 KiB and leaves, again and again, in plain text and under TLS, before the crowd and beside it. Then the
crowd is waited for: each of them has to be closed when its time for negotiating (10 s) is over, and not before.

Fails when a bar is missed: the 99th percentile of a good client's round within 50 ms, less than 64 KiB of the server's
memory for each of the crowd, nobody closed early or late. The client is Python and shares the machine with the server: so
the times are an upper bound, and belong to a quiet machine. Builds the release unless PATH is given.
"""
import argparse
import os
import resource
import selectors
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
from suite import images, servers  # noqa: E402
from suite.client import OPTION_STARTTLS, READ, Client  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
KINDS = ("silent", "a byte a second", "stuck in TLS")
HANDSHAKE_SECONDS = 10
P99_MS_MAX, KIB_EACH_MAX = 50, 64
# Beyond the time for negotiating: how late the last of them may be closed.
LATE_SECONDS = 3
FLAGS = (3).to_bytes(4, "big")
STARTTLS = b"IHAVEOPT" + OPTION_STARTTLS.to_bytes(4, "big") + bytes(4)


class Crowd:
    """All its connections, each with the bytes that it still drips."""

    def __init__(self, path, count, hello):
        self.selector, self.drips, self.closed = selectors.DefaultSelector(), {}, []
        self.begun = time.monotonic()
        for index in range(count):
            self.join(path)
            self.drips[self.join(path)] = FLAGS + b"IHAVEOPT" + bytes([0, 0, 0, 3, 0, 0, 0, 0]) * 4
            stuck = self.join(path)
            stuck.sendall(FLAGS + STARTTLS)
            self.take(stuck, 18 + 20)
            stuck.sendall(hello[:(0, len(hello) // 2, len(hello))[index % 3]])
        self.joined = time.monotonic()

    def join(self, path):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.settimeout(30)
        stranger.connect(path)
        self.selector.register(stranger, selectors.EVENT_READ)
        return stranger

    @staticmethod
    def take(stranger, length):
        while length:
            got = len(stranger.recv(length))
            if not got:
                raise OSError("closed early")
            length -= got

    def drip(self):
        """One byte from each that drips. Some may have been closed."""
        for stranger, rest in self.drips.items():
            if rest:
                try:
                    stranger.send(rest[:1])
                except OSError:
                    pass
                self.drips[stranger] = rest[1:]

    def look(self, seconds):
        """Takes what comes for a while and notes who was closed."""
        for key, _ in self.selector.select(seconds):
            try:
                over = not key.fileobj.recv(65536)
            except OSError:
                over = True
            if over:
                self.closed.append(time.monotonic())
                self.selector.unregister(key.fileobj)
                key.fileobj.close()

    def left(self):
        return len(self.selector.get_map())


def round_trip(path, secured):
    begin = time.monotonic()
    with Client(path, secured=secured) as client:
        client.run([(READ, 4096, 4096)])
    return (time.monotonic() - begin) * 1e3


def rounds(path, secured, count, crowd=None):
    """Sorted milliseconds of each; alternately in plain text and under TLS."""
    times = {"plain": [], "TLS": []}
    dripped = time.monotonic()
    for index in range(count):
        name = ("plain", "TLS")[index % 2]
        times[name].append(round_trip(path, secured if index % 2 else None))
        if crowd and time.monotonic() - dripped >= 1:
            dripped += 1
            crowd.drip()
            crowd.look(0)
    return {name: sorted(each) for name, each in times.items()}


def at(values, part):
    return values[min(len(values) - 1, int(len(values) * part))]


def secured_by(folder):
    context = ssl.create_default_context(cafile=os.path.join(folder, "ca-cert.pem"))
    context.load_cert_chain(os.path.join(folder, "client-cert.pem"), os.path.join(folder, "client-key.pem"))
    outgoing = ssl.MemoryBIO()
    hello = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        hello.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return (lambda plain: context.wrap_socket(plain, server_hostname="localhost")), outgoing.read()


def show(what, times):
    for name, each in times.items():
        print(f"{what:28}{name:>6}{len(each):8}{at(each, 0.5):10.2f}{at(each, 0.99):10.2f}{each[-1]:10.2f}", flush=True)


def measure(nbd_img, folder, count, rounds_each):
    at_folder = lambda name: os.path.join(folder, name)  # noqa: E731
    certificates, path = at_folder("tls"), at_folder("sock")
    subprocess.run([nbd_img, "tls", "init", certificates], check=True, stdout=subprocess.DEVNULL)
    secured, hello = secured_by(certificates)
    raw = images.make_raw(at_folder("disk.raw"), 16 << 20)
    argv = [nbd_img, "serve", raw, "--format", "raw", "--socket", path, "--tls", "optional", "--tls-dir", certificates]
    failures = []
    with servers.Server(argv, path) as server:
        print(f"{'a good client, ms':28}{'':6}{'rounds':>8}{'p50':>10}{'p99':>10}{'most':>10}")
        show("alone", rounds(path, secured, rounds_each * 2))
        before = servers.memory_mib(server.pid, "VmRSS")
        crowd = Crowd(path, count, hello)
        crowd.look(0)
        early = len(crowd.closed)
        grown = (servers.memory_mib(server.pid, "VmRSS") - before) * 1024 / (3 * count)
        beside = rounds(path, secured, rounds_each * 2, crowd)
        show(f"beside {3 * count} strangers", beside)
        measured = time.monotonic()
        if crowd.left() < 3 * count or measured - crowd.begun > HANDSHAKE_SECONDS:
            failures.append(f"only {crowd.left()} of the crowd were there to the end of the measurement")
        while crowd.left() and time.monotonic() - crowd.joined < HANDSHAKE_SECONDS + 10:
            crowd.look(0.1)
        last = (max(crowd.closed) if crowd.closed else measured) - crowd.joined
        print(f"the crowd: {', '.join(KINDS)}; {count} each, there within {crowd.joined - crowd.begun:.1f} s")
        print(f"memory: {grown:.1f} KiB for each; the last was closed {last:.1f} s after it came, {crowd.left()} were not")
        if early or crowd.left() or last > HANDSHAKE_SECONDS + LATE_SECONDS:
            failures.append("the crowd was not closed in time")
        if grown >= KIB_EACH_MAX:
            failures.append(f"{grown:.1f} KiB for each, bar {KIB_EACH_MAX}")
        for name, each in beside.items():
            if at(each, 0.99) > P99_MS_MAX:
                failures.append(f"p99 {name} {at(each, 0.99):.1f} ms, bar {P99_MS_MAX}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbd-img", metavar="PATH")
    parser.add_argument("--count", type=int, default=1000, help="connections of each kind")
    parser.add_argument("--rounds", type=int, default=400, help="rounds of the good client of each kind")
    options = parser.parse_args()
    if not options.nbd_img:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
        options.nbd_img = os.path.join(TARGET, "release", "nbd-img")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    folder = tempfile.mkdtemp(dir="/dev/shm")
    try:
        failures = measure(os.path.abspath(options.nbd_img), folder, options.count, options.rounds)
    finally:
        shutil.rmtree(folder)
    for failure in failures:
        print(f"missed: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
