#!/usr/bin/env python3
"""first_writes.py: what changes a qcow2 image's tables, beside qemu-nbd, in one run.

  tests/bench/first_writes.py --nbd-img target/release/nbd-img [--dir DIR] [--rounds 3] [--rows WORD,WORD]
                              [--servers nbd-img,...] [--disk DIR] [--json FILE]

Rows: writes into an empty image (4 KiB and 64 KiB, jumping and in order), zeroes and discards over nothing
and over data, zeroes over 8 TiB, reads through a chain of overlays, overwrites.  Every row has the final
FLUSH inside of its time, and is run on every server in turn, round after round: quote the ratios of medians.
`raw` is nbd-img on a sparse raw file, which pays for the same pages of the file system and no tables.
--disk adds first writes with a FLUSH after every 32, by fio, in a folder of a real disk.  Images are made
in DIR (default /dev/shm) and removed.  Needs qemu-nbd, qemu-img, cc, and fio for --disk.
"""
import argparse, json, os, signal, statistics, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40
# The largest request in whole clusters: lengths have 32 bits.
HUGE = 4 * G - 64 * K
# row: (disk, what is in the image before, operation, order, bytes of a request, depth, bytes covered)
ROWS = {
    "first-4k-rand": (256 * M, None, "write", "rand", 4 * K, 16, 256 * M),
    "first-4k-seq": (256 * M, None, "write", "seq", 4 * K, 16, 256 * M),
    "first-64k-rand": (512 * M, None, "write", "rand", 64 * K, 16, 512 * M),
    "first-64k-seq": (512 * M, None, "write", "seq", 64 * K, 16, 512 * M),
    "over-4k-rand": (256 * M, "data", "write", "rand", 4 * K, 16, 256 * M),
    "over-64k-seq": (512 * M, "data", "write", "seq", 64 * K, 16, 512 * M),
    "zero-8t-q1": (8 * T, None, "zero", "seq", HUGE, 1, 8 * T),
    "zero-8t-q16": (8 * T, None, "zero", "seq", HUGE, 16, 8 * T),
    "zero-empty-1g": (64 * G, None, "zero", "seq", G, 1, 64 * G),
    "zero-empty-64k": (512 * M, None, "zero", "seq", 64 * K, 16, 512 * M),
    "zero-data-large": (512 * M, "data", "zero", "seq", 512 * M, 1, 512 * M),
    "zero-data-64k": (512 * M, "data", "zero", "seq", 64 * K, 16, 512 * M),
    "zero-data-64k-rand": (512 * M, "data", "zero", "rand", 64 * K, 16, 512 * M),
    "trim-data-large": (512 * M, "data", "trim", "seq", 512 * M, 1, 512 * M),
    "trim-data-64k": (512 * M, "data", "trim", "seq", 64 * K, 16, 512 * M),
    "nohole-empty-large": (512 * M, None, "nohole", "seq", 32 * M, 1, 512 * M),
    "nohole-empty-64k": (512 * M, None, "nohole", "seq", 64 * K, 16, 512 * M),
    "nohole-data-large": (512 * M, "data", "nohole", "seq", 32 * M, 1, 512 * M),
    "chain-0-4k-rand": (256 * M, "data", "read", "rand", 4 * K, 16, 256 * M),
    "chain-3-4k-rand": (256 * M, "chain", "read", "rand", 4 * K, 16, 256 * M),
}
# Requests that a peer is given where it would take minutes; the time is made up to all of them.
RUN_MAX = {"zero-8t-q1": 4, "zero-8t-q16": 16}
SERVERS = ["nbd-img", "raw", "qemu-nbd", "qemu-nbd-uring"]


def command(server, args, image, sock):
    if server in ("nbd-img", "raw"):
        kind = "raw" if server == "raw" else "qcow2"
        return [args.nbd_img, "serve", image, "--format", kind, "--socket", sock]
    aio = ["--aio=io_uring"] if server == "qemu-nbd-uring" else []
    return ["qemu-nbd", "-t", "-f", "qcow2", "--cache=writeback", "--discard=unmap"] + aio + ["-k", sock, image]


class Served:
    """A server of one image, ready; ended on leaving."""

    def __init__(self, server, args, image):
        self.sock = f"{args.tmp}/sock"
        self.cmd = command(server, args, image, self.sock)

    def __enter__(self):
        if os.path.exists(self.sock):
            os.unlink(self.sock)
        self.process = subprocess.Popen(self.cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(500):
            if os.path.exists(self.sock) or self.process.poll() is not None:
                break
            time.sleep(0.01)
        if self.process.poll() is not None:
            sys.exit(f"{self.cmd} did not start: {self.process.stderr.read().decode(errors='replace')}")
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, args, *words):
        out = subprocess.run([f"{args.tmp}/load", self.sock, *map(str, words)], capture_output=True, text=True)
        if out.returncode:
            sys.exit(f"{self.cmd}: {words}: {out.stderr.strip()}")
        count, answered, flushed = out.stdout.split()
        return int(count), float(answered), float(flushed)


def make_image(server, args, disk, content, path):
    """A fresh image; what is in it was written by nbd-img, so that all servers find the same."""
    kind = "raw" if server == "raw" else "qcow2"
    create = ["qemu-img", "create", "-q", "-f", kind]
    subprocess.run(create + [path, str(disk)], check=True)
    if content is None:
        return
    writer = "raw" if server == "raw" else "nbd-img"
    with Served(writer, args, path) as served:
        served.load(args, "write", "seq", 64 * K, 16, 0, disk)
    if content == "chain" and kind == "qcow2":
        below = path
        for depth in (1, 2, 3):
            above = path if depth == 3 else f"{path}.{depth}"
            if depth == 1:
                os.rename(path, f"{path}.0")
                below = f"{path}.0"
            subprocess.run(create + ["-F", "qcow2", "-b", below, above], check=True)
            with Served(writer, args, above) as served:
                served.load(args, "write", "seq", 64 * K, 16, disk // 4 * depth, disk // 4)
            below = above


def one(row, server, args):
    disk, content, op, order, block, depth, length = ROWS[row]
    path = f"{args.tmp}/image"
    make_image(server, args, disk, content, path)
    try:
        with Served(server, args, path) as served:
            words = [op, order, block, depth, 0, length]
            if op == "read":  # warm tables
                served.load(args, *words)
            if row in RUN_MAX and server.startswith("qemu"):
                words.append(RUN_MAX[row])
            before = served.cpu_seconds()
            count, answered, flushed = served.load(args, *words)
            cpu = served.cpu_seconds() - before
        scale = (length // block) / count
        return {"seconds": answered * scale + flushed, "flush": flushed, "cpu_us": cpu / count * 1e6, "count": length // block}
    finally:
        for name in os.listdir(args.tmp):
            if name.startswith("image"):
                os.unlink(f"{args.tmp}/{name}")


def one_disk(rw, server, args):
    path = os.path.join(args.disk, f"first-writes-{os.getpid()}")
    make_image(server, args, G, None, path)
    try:
        with Served(server, args, path) as served:
            before = served.cpu_seconds()
            out = subprocess.run(
                ["fio", "--name=w", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={served.sock}", f"--rw={rw}",
                 "--bs=4k", "--iodepth=16", "--fsync=32", "--size=1G", "--time_based", f"--runtime={args.seconds}",
                 "--output-format=json"], capture_output=True, text=True, check=True).stdout
            cpu = served.cpu_seconds() - before
        job = json.loads(out[out.index("{"):])["jobs"][0]["write"]
        count = job["total_ios"]
        return {"seconds": job["runtime"] / 1e3 / count, "flush": 0.0, "cpu_us": cpu / count * 1e6, "count": 1}
    finally:
        os.unlink(path)


def show(results, servers):
    print(f"{'row':22}" + "".join(f"{s:>25}" for s in servers) + f"{'ours / best qemu':>18}{'ours / raw':>12}")
    print(f"{'':22}" + f"{'ms (flush) us-cpu/op':>25}" * len(servers))
    for row, by_server in results.items():
        line, medians = f"{row:22}", {}
        for server in servers:
            runs = by_server[server]
            if not runs:
                line += f"{'-':>25}"
                continue
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            medians[server] = median["seconds"]
            cell = f"{median['seconds'] * 1e3:.2f} ({median['flush'] * 1e3:.1f}) {median['cpu_us']:.1f}"
            line += f"{cell:>25}"
        own = medians.get("nbd-img")
        peers = [medians[s] for s in medians if s.startswith("qemu")]
        line += f"{min(peers) / own:17.2f}x" if own and peers else f"{'-':>18}"
        line += f"{medians['raw'] / own:11.2f}x" if own and "raw" in medians else f"{'-':>12}"
        print(line, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nbd-img", default="target/release/nbd-img")
    p.add_argument("--dir", default="/dev/shm")
    p.add_argument("--disk", help="a folder of a real disk: adds the rows with --fsync=32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=int, default=3, help="of each run of the rows on the disk")
    p.add_argument("--rows", default="", help="only rows whose name has one of these words")
    p.add_argument("--servers", default=",".join(SERVERS))
    p.add_argument("--json", help="write all figures there")
    args = p.parse_args()
    servers = args.servers.split(",")
    words = args.rows.split(",")
    rows = [row for row in ROWS if any(word in row for word in words)]
    disk_rows = {f"disk-4k-{rw}-fsync32": rw for rw in ("randwrite", "write")} if args.disk else {}
    with tempfile.TemporaryDirectory(prefix="nbd-first-writes.", dir=args.dir) as args.tmp:
        subprocess.run(["cc", "-O2", "-o", f"{args.tmp}/load", f"{HERE}/load.c"], check=True)
        results = {row: {server: [] for server in servers} for row in rows + list(disk_rows)}
        for _ in range(args.rounds):
            for row in rows:
                for server in servers:
                    # A raw file of 8 TiB or a chain of them says nothing.
                    if server != "raw" or not row.startswith(("zero-8t", "chain-3")):
                        results[row][server].append(one(row, server, args))
            for row, rw in disk_rows.items():
                for server in servers:
                    results[row][server].append(one_disk(rw, server, args))
    show(results, servers)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
