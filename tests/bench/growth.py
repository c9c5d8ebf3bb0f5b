#!/usr/bin/env python3
"""How cost grows: what one request, one open and one connection cost as there is more of something.

  tests/bench/growth.py [--nbd-img PATH] [--only connections,exports,size,chain,tables] [--seconds 1]

  connections   4 KiB random reads in batches of 4 on 1 to 1,000 connections, raw; memory of idle ones
  exports       the same on 16 connections, dealt to 1 to 100 exports
  size          qcow2 of 1 GiB to 64 TiB: time to open it, memory after it, reads
  chain         qcow2 with 0 to 8 backing files, the data in the lowest
  tables        qcow2 whose tables are up to 8 times as large as the cache that is theirs

Images are made in --dir (default /dev/shm) and removed. The client is one process of Python and takes a share of the
machine: read the server's processor time per request before the rate. A cliff is a line that costs a multiple of the
one above it.
"""
import argparse
import os
import random
import selectors
import shutil
import subprocess
import sys
import time

sys.dont_write_bytecode = True
from suite import images, loads, servers  # noqa: E402
from suite.client import READ, Client, request  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
BLOCK = 4096
MIB = 1 << 20
# What an open of any size may take.
OPEN_SECONDS_MAX, OPEN_MIB_MAX = 0.050, 64


class Growth:
    def __init__(self, nbd_img, folder, seconds):
        self.nbd_img, self.folder, self.seconds = nbd_img, folder, seconds
        self.sock = folder.at("sock")
        self.missed = False

    def serve(self, *arguments):
        return servers.Server([self.nbd_img, "serve", "--socket", self.sock, *arguments], self.sock)

    def connections(self):
        """Rate and processor time per request, and what an idle connection holds."""
        raw = images.make_raw(self.folder.at("disk.raw"), 64 * MIB)
        yield f"{'connections':>12}{'kIOPS':>9}{'CPU us':>9}{'MiB before':>12}{'MiB busy':>10}{'KiB/idle':>10}"
        for count in (1, 4, 16, 64, 250, 500, 1000):
            with self.serve(raw, "--format", "raw", "--max-connections", "2000") as server:
                before = servers.memory_mib(server.pid, "VmRSS")
                clients = [Client(self.sock) for _ in range(count)]
                idle = (servers.memory_mib(server.pid, "VmRSS") - before) * 1024 / count
                rate, cpu = self.batches(server, clients, 4)
                yield (f"{count:12}{rate / 1e3:9.1f}{cpu:9.1f}{before:12.1f}"
                       f"{servers.memory_mib(server.pid, 'VmRSS'):10.1f}{idle:10.1f}")
                close(clients)

    def exports(self):
        """Each export has threads of its own."""
        yield f"{'exports':>12}{'kIOPS':>9}{'CPU us':>9}{'ready ms':>10}{'MiB':>8}{'threads':>9}"
        paths = [images.make_raw(self.folder.at(f"disk{at}.raw"), 4 * MIB) for at in range(100)]
        for count in (1, 4, 16, 50, 100):
            arguments = [word for at in range(count) for word in
                         ("--export", f"name=e{at},file={paths[at]},format=raw")]
            with self.serve(*arguments) as server:
                clients = [Client(self.sock, f"e{at % count}") for at in range(max(16, count))]
                rate, cpu = self.batches(server, clients, 4)
                yield (f"{count:12}{rate / 1e3:9.1f}{cpu:9.1f}{server.ready_seconds * 1e3:10.1f}"
                       f"{servers.memory_mib(server.pid, 'VmRSS'):8.1f}"
                       f"{len(os.listdir(f'/proc/{server.pid}/task')):9}")
                close(clients)

    def size(self):
        """Opens of empty disks; then reads all over them, which ask the L1 table only."""
        yield f"{'virtual size':>12}{'open ms':>9}{'MiB':>8}{'kIOPS':>9}{'CPU us':>9}{'MiB after':>11}   open"
        for size in ("1G", "64G", "1T", "8T", "64T"):
            image = images.empty(self.folder.at(f"{size}.qcow2"), images.size_of(size), "qcow2")
            every = ["--read-only", image, "--format", "qcow2"]
            opens = []
            for _ in range(9):
                with self.serve(*every) as server:
                    opens.append((server.ready_seconds, servers.memory_mib(server.pid)))
            seconds, memory = sorted(opens)[len(opens) // 2]
            with self.serve(*every) as server:
                figures = loads.fio(server, "rread-4k-q16", images.size_of(size), self.seconds)
            good = seconds < OPEN_SECONDS_MAX and memory < OPEN_MIB_MAX
            self.missed |= not good
            yield (f"{size:>12}{seconds * 1e3:9.1f}{memory:8.1f}{figures['rate'] / 1e3:9.1f}{figures['cpu_us']:9.1f}"
                   f"{figures['rss_mib']:11.1f}   {'met' if good else 'MISSED'}: < 50 ms and < 64 MiB")

    def chain(self):
        """All data but a cluster in the lowest image: a read looks into the tables of every one above."""
        yield f"{'backing':>12}{'open ms':>9}{'4k kIOPS':>10}{'CPU us':>9}{'256k MB/s':>11}{'CPU us':>9}{'MiB':>7}"
        size = 256 * MIB
        raw = images.make_raw(self.folder.at("base.raw"), size)
        top = images.make_qcow2(raw, self.folder.at("chain0.qcow2"))
        for depth in range(9):
            if depth:
                above = self.folder.at(f"chain{depth}.qcow2")
                create(above, "-b", top, "-F", "qcow2")
                subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q {depth << 16} 64k", above], check=True)
                top = above
            if depth not in (0, 1, 2, 4, 8):
                continue
            with self.serve("--read-only", top, "--format", "qcow2") as server:
                small = loads.fio(server, "rread-4k-q16", size, self.seconds)
                large = loads.fio(server, "read-256k-q8", size, self.seconds)
                yield (f"{depth:12}{server.ready_seconds * 1e3:9.1f}{small['rate'] / 1e3:10.1f}"
                       f"{small['cpu_us']:9.1f}{large['mb_s']:11.0f}{large['cpu_us']:9.1f}{large['rss_mib']:7.1f}")

    def tables(self):
        """Reads all over allocated disks whose L2 tables outgrow the cache, which is 32 MiB (256 GiB of disk)."""
        yield f"{'tables MiB':>12}{'kIOPS':>9}{'CPU us':>9}{'p99 us':>9}{'MiB':>7}"
        for tables in (8, 24, 40, 64, 256):
            # 64 KiB clusters: 8 bytes of table each. The data are holes of the file.
            size = tables * MIB // 8 * 65536
            image = self.folder.at(f"tables{tables}.qcow2")
            create(image, "-o", "preallocation=metadata", size=size)
            with self.serve("--read-only", image, "--format", "qcow2") as server:
                touch_tables(self.sock, size)
                figures = loads.fio(server, "rread-4k-q16", size, self.seconds)
                yield (f"{tables:12}{figures['rate'] / 1e3:9.1f}{figures['cpu_us']:9.1f}{figures['p99_us']:9.0f}"
                       f"{figures['rss_mib']:7.1f}")
            os.unlink(image)

    def batches(self, server, clients, depth):
        """Batches of random reads on all clients at once for the given time: requests/s, and CPU us/request."""
        source = random.Random(7)
        blocks = clients[0].size // BLOCK
        batches = [b"".join(request(READ, source.randrange(blocks) * BLOCK, BLOCK) for _ in range(depth))
                   for _ in range(64)]
        reply_len = depth * (16 + BLOCK)
        room = memoryview(bytearray(reply_len))
        left, done, at = {}, 0, 0
        with selectors.EpollSelector() as selector:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ, client)
            cpu, begun = servers.cpu_seconds(server.pid), time.monotonic()
            for client in clients:
                client.socket.sendall(batches[at % 64])
                left[client], at = reply_len, at + 1
            # At least one answer for everybody, however many they are.
            while time.monotonic() - begun < self.seconds or done < len(clients):
                for key, _ in selector.select():
                    client = key.data
                    got = client.socket.recv_into(room[:left[client]])
                    if not got:
                        raise OSError("the server hung up")
                    left[client] -= got
                    if not left[client]:
                        done += 1
                        client.socket.sendall(batches[at % 64])
                        left[client], at = reply_len, at + 1
            seconds = time.monotonic() - begun
        requests = done * depth
        return requests / seconds, (servers.cpu_seconds(server.pid) - cpu) / requests * 1e6


def close(clients):
    for client in clients:
        client.socket.close()


def create(path, *options, size=None):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, *([str(size)] if size else [])],
                   check=True)


def touch_tables(sock, size):
    """Reads once from what each 4 KiB of table describe (32 MiB of disk), so that what fits is in memory."""
    with Client(sock) as client:
        places = range(0, size, 32 * MIB)
        for first in range(0, len(places), 64):
            client.run([(READ, place, BLOCK) for place in places[first:first + 64]])


def main():
    sections = ("connections", "exports", "size", "chain", "tables")
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--nbd-img", help="measure this program, else the release is built")
    p.add_argument("--only", default=",".join(sections))
    p.add_argument("--seconds", type=int, default=1, help="length of each measurement")
    p.add_argument("--dir", default="/dev/shm")
    options = p.parse_args()
    wanted = options.only.split(",")
    if not set(wanted) <= set(sections):
        p.error(f"sections are {', '.join(sections)}")
    missing = [tool for tool in ("fio", "qemu-img", "qemu-io") if not shutil.which(tool)]
    if missing:
        print(f"missing: {', '.join(missing)}; tests/setup installs them", file=sys.stderr)
        return 2
    if not options.nbd_img:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
    nbd_img = options.nbd_img or os.path.join(TARGET, "release", "nbd-img")
    missed = False
    for section in wanted:
        with images.Folder(options.dir) as folder:
            growth = Growth(nbd_img, folder, options.seconds)
            method = getattr(growth, section)
            print(f"\n{section}: {method.__doc__}")
            for line in method():
                print(line, flush=True)
            missed |= growth.missed
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
