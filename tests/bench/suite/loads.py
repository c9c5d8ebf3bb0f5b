"""What is run against a server, and the figures that come of it.

Each function returns a dictionary of figures. `rate` is what is compared (more is better), in the unit that
the row names; `cpu_us` is the server's processor time per request.
"""
import json
import os
import statistics
import subprocess
import time

from .client import READ, Client
from .servers import cpu_seconds, memory_mib

# name: (fio's rw, block size, depth, jobs)
FIO = {
    "rread-4k-q1": ("randread", "4k", 1, 1),
    "rread-4k-q1-x4": ("randread", "4k", 1, 4),
    "rread-4k-q16": ("randread", "4k", 16, 1),
    "rread-4k-q64": ("randread", "4k", 64, 1),
    "rread-4k-q16-x4": ("randread", "4k", 16, 4),
    "rwrite-4k-q1": ("randwrite", "4k", 1, 1),
    "rwrite-4k-q16": ("randwrite", "4k", 16, 1),
    "rread-4k-q32": ("randread", "4k", 32, 1),
    "rwrite-4k-q32": ("randwrite", "4k", 32, 1),
    "mixed-4k-q16": ("randrw", "4k", 16, 1),
    "read-256k-q8": ("read", "256k", 8, 1),
    "write-256k-q8": ("write", "256k", 8, 1),
    "write-1m-q8": ("write", "1m", 8, 1),
    "read-1m-q4": ("read", "1m", 4, 1),
}
COPY_SECONDS_MAX = 300
# Of larger disks fio does not remember which blocks it has had: a bit for each takes memory, and time to clear.
RANDOM_MAP_MAX = 16 << 30


class Failed(Exception):
    """A load that gave no figures, and why."""


def uri(path):
    return f"nbd+unix:///?socket={path}"


def fio(server, workload, size, seconds, once=False, pin=None):
    """fio's nbd engine; `once` goes over the disk a single time instead of for `seconds`."""
    before = cpu_seconds(server.pid)
    target = ["--ioengine=nbd", f"--uri={uri(server.path)}"]
    if size > RANDOM_MAP_MAX:
        target += ["--norandommap", "--random_generator=tausworthe64"]
    figures = _fio(target, workload, size, seconds, once, pin)
    figures["cpu_us"] = (cpu_seconds(server.pid) - before) / figures.pop("ios") * 1e6
    figures["rss_mib"] = memory_mib(server.pid)
    return figures


def fio_file(path, workload, size, seconds):
    """fio's io_uring engine with O_DIRECT on the file itself: what the disk gives without any server."""
    figures = _fio(["--ioengine=io_uring", "--direct=1", f"--filename={path}"], workload, size, seconds, False, None)
    figures.pop("ios")
    return figures


def _fio(target, workload, size, seconds, once, pin):
    rw, block, depth, jobs = FIO[workload]
    argv = (["taskset", "-c", pin] if pin else []) + ["fio", "--name=w", *target, f"--rw={rw}", f"--bs={block}",
            f"--iodepth={depth}", f"--numjobs={jobs}", f"--size={size}", "--group_reporting", "--thread",
            "--output-format=json"]
    argv += [] if once else ["--time_based", f"--runtime={seconds}"]
    try:
        out = subprocess.run(argv, capture_output=True, text=True, timeout=seconds * 4 + 60)
    except subprocess.TimeoutExpired:
        raise Failed("fio did not end") from None
    if out.returncode or "{" not in out.stdout:
        raise Failed("fio failed: " + (out.stderr or out.stdout).strip()[-300:])
    job = json.loads(out.stdout[out.stdout.index("{"):])["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise Failed("fio did nothing")
    return {
        "rate": sum(side["iops"] for side in sides),
        "mb_s": sum(side["bw_bytes"] for side in sides) / 1e6,
        "p99_us": max(side["clat_ns"].get("percentile", {}).get("99.000000", 0) for side in sides) / 1e3,
        "ios": sum(side["total_ios"] for side in sides),
    }


def nbdcopy_to_null(server, length):
    """A backup that throws the bytes away: only the server and the client's reading count."""
    return _copy(server, ["nbdcopy", uri(server.path), "null:"], length)


def convert_out(server, length, target):
    """`qemu-img convert` out of the export into a raw file."""
    if os.path.exists(target):
        os.unlink(target)
    return _copy(server, ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri(server.path), target], length)


def convert_in(server, length, source):
    """`qemu-img convert` of a raw file into the export, which is empty."""
    return _copy(server, ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri(server.path)], length)


def _copy(server, argv, length):
    cpu, begun = cpu_seconds(server.pid), time.monotonic()
    try:
        out = subprocess.run(argv, capture_output=True, text=True, timeout=COPY_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise Failed(f"{argv[0]} did not end") from None
    seconds = time.monotonic() - begun
    if out.returncode:
        raise Failed(f"{argv[0]} failed: " + out.stderr.strip()[-300:])
    return {"rate": 1 / seconds, "seconds": seconds, "mb_s": length / seconds / 1e6,
            "cpu_s": cpu_seconds(server.pid) - cpu, "rss_mib": memory_mib(server.pid)}


def start_to_ready(start, times=11):
    """From starting the program to the first client that is greeted, the median of several starts."""
    taken, memory = [], 0.0
    for _ in range(times):
        with start() as server:
            taken.append(server.ready_seconds)
            memory = memory_mib(server.pid)
    seconds = statistics.median(taken)
    return {"rate": 1 / seconds, "seconds": seconds, "rss_mib": memory}


def connect_to_first_byte(server, times=100):
    """From connecting to the first data of a read, the median of many connections."""
    taken = []
    for _ in range(times):
        begun = time.monotonic()
        with Client(server.path) as client:
            client.run([(READ, 0, 4096)])
            taken.append(time.monotonic() - begun)
    seconds = statistics.median(taken)
    return {"rate": 1 / seconds, "seconds": seconds, "rss_mib": memory_mib(server.pid)}
