#!/usr/bin/env python3
"""What a request costs in things that can be counted: system calls (strace) and instructions (callgrind).

Unlike times, these are the same on a busy machine, so a regression shows in any run. The load is fixed: whole batches,
sent at once and awaited, by a client of our own. Two runs of different length are subtracted, so that start and end do not
count.

  tests/bench/counts.py [--nbd-img PATH]      builds the release unless PATH is given

Fails only when a warm request takes more system calls or instructions than its bounds, which a slow or busy machine does
not bring about: what is above is counted again.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
from suite import images, servers  # noqa: E402
from suite.client import FLUSH, READ, WRITE, Client  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
SIZE = 16 << 20
BLOCK = 4096
# name: image, command, batch, most system calls and instructions per request. A warm batch is one receive, one read or
# write per request, one send, and what it takes to sleep and to be woken: as one that has a send for each request is
# not. A lone request pays all of that by itself. Images are in memory, but for the one on a disk, whose pages are.
# Instructions are bounded by a sixth to a half more than they are: without the short way (session/warm) they are twice as
# many for reads of raw, and a quarter more for writes of qcow2.
LOADS = {
    "raw read, depth 16": ("raw", READ, 16, 2.0, 1700),
    "raw read, depth 1": ("raw", READ, 1, 8.0, None),
    "raw write, depth 16": ("raw", WRITE, 16, 2.0, 1550),
    "qcow2 read, depth 16": ("qcow2", READ, 16, 2.0, 2300),
    "qcow2 write, depth 16": ("qcow2", WRITE, 16, 2.0, 2100),
    "on a disk, read, depth 16": ("disk", READ, 16, 2.0, 1700),
    "on a disk, write, depth 16": ("disk", WRITE, 16, None, None),
    "flush, depth 16": ("raw", FLUSH, 16, None, None),
}
# Whose threads take turns with the client for each request: what they execute depends on who is first; and writes that go
# to others for a while where a disk was slow.
UNSTEADY = ("raw read, depth 1", "on a disk, write, depth 16", "flush, depth 16")
# Requests of the long run and of the short one.
STRACE_REQUESTS = (11_000, 1_000)
# The short one is past the first reads of each place, which cost more.
CALLGRIND_REQUESTS = (9_600, 4_800)
# Threads that meet or miss each other add some now and then, never take away: the least of so many runs.
CALLGRIND_RUNS = 2
# What seems to be too much is counted so many times again: a busy machine cuts batches in two.
INSTRUCTIONS_AGAIN = 3
# Before each batch the client lets the server fall asleep, so that every batch pays for being woken: left to chance, that
# alone moved a figure by 15 %.
CALLGRIND_PAUSE_SECONDS = 0.003


def drive(path, command, batch, requests, pause):
    """Sends so many requests in batches, with a pause before each; places walk over the whole disk in steps that never
    repeat soon."""
    payload = bytes(range(256)) * (BLOCK // 256)
    blocks = SIZE // BLOCK
    with Client(path) as client:
        for first in range(0, requests, batch):
            if pause:
                time.sleep(pause)
            places = [(first + at) * 1021 % blocks * BLOCK for at in range(batch)]
            client.run([(command, 0 if command == FLUSH else place, 0 if command == FLUSH else BLOCK)
                        for place in places], payload)


def served(argv, sock, command, batch, requests, pause=0):
    """Runs a server below a tool for one load; it ends by itself with its last client."""
    drive_error = None
    with servers.Server(argv, sock, probe=False) as server:
        try:
            drive(sock, command, batch, requests, pause)
        except OSError as error:
            drive_error = error
        server.process.wait(servers.PATIENCE_SECONDS)
        if drive_error or server.process.returncode:
            raise OSError(f"{drive_error or 'the server failed'}: {server.said()}")


def serve(nbd_img, image, kind, sock):
    # Without polling: how often it looks at the socket would depend on time.
    return [nbd_img, "serve", image, "--format", "qcow2" if kind == "qcow2" else "raw", "--socket", sock, "--poll", "off", "--exit-last"]


def system_calls(own, folder, sock, load):
    """System calls by name, of all threads."""
    counts = []
    _, command, batch, _, _ = LOADS[load]
    for requests in STRACE_REQUESTS:
        log = os.path.join(folder, "strace")
        served(["strace", "-f", "-c", "-o", log, *own], sock, command, batch, requests)
        with open(log) as file:
            rows = [line.split() for line in file if re.match(r"\s*\d+\.\d", line)]
        counts.append({row[-1]: int(row[3]) for row in rows if row[-1] != "total"})
    difference = {name: counts[0].get(name, 0) - counts[1].get(name, 0) for name in counts[0]}
    requests = STRACE_REQUESTS[0] - STRACE_REQUESTS[1]
    return {name: count / requests for name, count in difference.items() if count}


def instructions(own, folder, sock, load):
    """Instructions in the program (not in the kernel)."""
    _, command, batch, _, _ = LOADS[load]
    out = os.path.join(folder, "callgrind")
    argv = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *own]

    def run(requests):
        served(argv, sock, command, batch, requests, CALLGRIND_PAUSE_SECONDS)
        with open(out) as file:
            return next(int(line.split()[1]) for line in file if line.startswith(("summary:", "totals:")))

    long, short = (min(run(requests) for _ in range(CALLGRIND_RUNS)) for requests in CALLGRIND_REQUESTS)
    return (long - short) / (CALLGRIND_REQUESTS[0] - CALLGRIND_REQUESTS[1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--nbd-img", help="count this program")
    options = p.parse_args()
    missing = [tool for tool in ("strace", "valgrind", "qemu-img") if not shutil.which(tool)]
    if missing:
        print(f"missing: {', '.join(missing)}; tests/setup installs them", file=sys.stderr)
        return 2
    if not options.nbd_img:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
    nbd_img = options.nbd_img or os.path.join(TARGET, "release", "nbd-img")
    too_many = []
    memory = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    with memory as folder, tempfile.TemporaryDirectory(dir=TARGET) as disk:
        sock, raw = os.path.join(folder, "sock"), images.make_raw(os.path.join(folder, "disk.raw"), SIZE)
        made = {"raw": raw, "qcow2": images.make_qcow2(raw, os.path.join(folder, "disk.qcow2")),
                "disk": images.make_raw(os.path.join(disk, "disk.raw"), SIZE)}
        print(f"{'per request':28}{'system calls':>14}{'instructions':>14}   calls")
        for load, (kind, _, _, calls_max, instructions_max) in LOADS.items():
            own = serve(nbd_img, made[kind], kind, sock)
            calls = system_calls(own, folder, sock, load)
            total = sum(calls.values())
            names = ", ".join(f"{name} {count:.2f}" for name, count in
                              sorted(calls.items(), key=lambda item: -item[1]) if count >= 0.005)
            executed = None if load in UNSTEADY else instructions(own, folder, sock, load)
            for _ in range(INSTRUCTIONS_AGAIN):
                if instructions_max and executed > instructions_max:
                    executed = min(executed, instructions(own, folder, sock, load))
            shown = "-" if executed is None else f"{executed:.0f}"
            print(f"{load:28}{total:14.2f}{shown:>14}   {names}", flush=True)
            for what, count, most in (("system calls", total, calls_max), ("instructions", executed, instructions_max)):
                if most and count > most:
                    too_many.append(f"{load}: {count:.2f} {what} per request, more than {most:g}")
    for line in too_many:
        print(line, file=sys.stderr)
    return 1 if too_many else 0


if __name__ == "__main__":
    sys.exit(main())
