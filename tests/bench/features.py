#!/usr/bin/env python3
"""features.py: what qcow2's features cost, beside QEMU's programs, in one run.

  tests/bench/features.py --nbd-img target/release/nbd-img [--dir DIR] [--from PATH,PATH] [--size 512M] [--rounds 3]
                          [--seconds 1] [--rows WORD,WORD]

compress-zlib, compress-zstd   nbdcopy into an empty image that is written compressed (qemu-nbd: driver=compress), of a tar
                               of --from (programs and texts); with the length of the image that comes of it
check-64k, check-4k            `check` of a sound image with clusters of that length: 4 TiB with --size of data in a row and
                               one cluster in each GiB
bitmap-none, bitmap-one        4 KiB random writes at depth 16 to an allocated image, for --seconds, without and with a dirty
                               bitmap that records them

A row's figures are of one copy (the time with the server's end), of one check, or of one write.  cpu is the processor time of
the server, or of the program that checks.  The last column is the median beside that of nbd-img.

Servers take turns, round after round: quote the ratios of medians.  Needs what compressed.py needs.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import compressed  # noqa: E402
from suite import images, loads, servers  # noqa: E402

SERVERS = [servers.OWN, "qemu-nbd"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--nbd-img", default="target/release/nbd-img")
    p.add_argument("--dir", default="/dev/shm")
    p.add_argument("--from", dest="source", default="/usr/lib,/usr/share")
    p.add_argument("--size", default="512M")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=int, default=1)
    p.add_argument("--rows", default=",".join(ROWS), help="parts of rows' names")
    args = p.parse_args()
    args.len = images.size_of(args.size)
    return args


def compress(args, folder, name, kind):
    """Seconds and the server's processor time of a compressed copy, its last flush and the close included."""
    source, image, path = folder.at("content"), folder.at("target.qcow2"), folder.at("sock")
    if not os.path.exists(source):
        compressed.write_content(source, args.source, args.len)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compression_type={kind}", image, str(args.len)],
                   check=True)
    argv = {
        servers.OWN: [args.nbd_img, "serve", "--socket", path, "--compress", kind, image],
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "0", "-k", path, "--image-opts",
                     f"driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={image}"],
    }[name]
    begun = time.monotonic()
    with servers.Server(argv, path) as server:
        # qemu-nbd takes whole clusters only.
        copy = subprocess.run(["nbdcopy", "--flush", "--request-size=65536", source, loads.uri(path)],
                              capture_output=True, text=True)
        cpu = servers.cpu_seconds(server.pid)
    seconds = time.monotonic() - begun
    if copy.returncode:
        raise loads.Failed(copy.stderr.strip()[-300:])
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, image], check=True)
    return {"seconds": seconds, "cpu_s": cpu, "MiB": os.path.getsize(image) / (1 << 20)}


def check(args, folder, name, cluster):
    """Seconds and processor time of a check that finds nothing."""
    image = folder.at(f"check-{cluster}.qcow2")
    if not os.path.exists(image):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, "4T"],
                       check=True)
        writes = [f"write -q {at} {images.CHUNK}" for at in range(0, args.len, images.CHUNK)]
        writes += [f"write -q {gib}G 4k" for gib in range(1, 4096)]
        subprocess.run(["qemu-io", "-f", "qcow2", image], input="\n".join(writes), text=True, check=True,
                       stdout=subprocess.DEVNULL)
    argv = [args.nbd_img, "check", image] if name == servers.OWN else ["qemu-img", "check", "-q", image]
    before, begun = os.times(), time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.monotonic() - begun, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_s": cpu}


def record(args, folder, name, with_bitmap):
    """Random writes to an image that is allocated, and has a bitmap or not."""
    image = folder.at(f"bitmap-{with_bitmap}.qcow2")
    if not os.path.exists(image):
        raw = images.make_raw(folder.at("disk.raw"), args.len)
        images.make_qcow2(raw, image)
        os.unlink(raw)
        if with_bitmap:
            subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b"], check=True)
    scene = servers.Scene(args.nbd_img, "", "", image, folder.at("sock"), "qcow2")
    with servers.Server(servers.command(name, scene), scene.socket) as server:
        figures = loads.fio(server, "rwrite-4k-q16", args.len, args.seconds)
    return {"seconds": 1 / figures["rate"], "cpu_s": figures["cpu_us"] / 1e6}


# row: what is run, with the folder, the server's name and these
ROWS = {
    "compress-zlib": (compress, "zlib"),
    "compress-zstd": (compress, "zstd"),
    "check-64k": (check, "64k"),
    "check-4k": (check, "4k"),
    "bitmap-none": (record, False),
    "bitmap-one": (record, True),
}


def main():
    args = arguments()
    rows = [row for row in ROWS if any(word in row for word in args.rows.split(","))]
    results = {row: {name: [] for name in SERVERS} for row in rows}
    for row in rows:
        run, what = ROWS[row]
        with images.Folder(args.dir) as folder:
            for _ in range(args.rounds):
                for name in SERVERS:
                    results[row][name].append(run(args, folder, name, what))
    print(f"{'row':15}{'server':10}{'median':>12}{'cpu':>12}{'MiB':>8}{'vs nbd-img':>12}")
    for row in rows:
        medians = {name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
                   for name, rounds in results[row].items()}
        for name, m in medians.items():
            image = f"{m['MiB']:8.0f}" if "MiB" in m else f"{'-':>8}"
            ratio = m["seconds"] / medians[servers.OWN]["seconds"]
            print(f"{row:15}{name:10}{show(m['seconds'])}{show(m['cpu_s'])}{image}{ratio:11.2f}x")


def show(seconds):
    return f"{seconds:10.2f} s" if seconds > 0.1 else f"{seconds * 1e6:9.1f} us"


if __name__ == "__main__":
    sys.exit(main())
