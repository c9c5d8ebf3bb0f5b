#!/usr/bin/env python3
"""compressed.py: reads of a compressed qcow2 image, beside qemu-nbd and beside bare decompression, in one run.

  tests/bench/compressed.py --nbd-img target/release/nbd-img [--dir DIR] [--from PATH,PATH] [--size 512M] [--rounds 3]
                            [--seconds 2] [--rows WORD,WORD] [--compression zlib|zstd] [--cluster-cache SIZE] [--bare MB/S]

The image is `qemu-img convert -c` of a tar of --from (programs and texts, default /usr/lib and /usr/share); its ratio is
printed.  Sequential reads go over all of it, which is larger than the cache; every row is run on every server in turn,
round after round: quote the ratios of medians.  "bare" is what this program's decompressor does with the image's blobs on
all cores at once and nothing else, by `cargo bench --bench micro -- decompress` (or --bare): no server can be faster.
Needs fio (with its nbd engine), nbdcopy, qemu-nbd, qemu-img, tar and cargo.  Images are made in DIR (default /dev/shm)
and removed.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys

sys.dont_write_bytecode = True
from suite import images, loads, servers  # noqa: E402

# row: (fio's rw, block size, depth, jobs)
ROWS = {f"seq-{block}-q{depth}": ("read", block, depth, 1) for block in ("256k", "1m") for depth in (1, 4, 16)}
ROWS.update({f"{name}-4k-q{depth}": (rw, "4k", depth, 1)
             for name, rw in (("seq", "read"), ("rand", "randread")) for depth in (1, 16)})
COPY = "nbdcopy"
SERVERS = [servers.OWN, "qemu-nbd"]
DECOMPRESSORS = {"zlib": "libdeflate", "zstd": "zstd"}
UNITS = {"KB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--nbd-img", default="target/release/nbd-img")
    p.add_argument("--dir", default="/dev/shm")
    p.add_argument("--from", dest="source", default="/usr/lib,/usr/share")
    p.add_argument("--size", default="512M")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=int, default=2)
    p.add_argument("--rows", default=",".join([*ROWS, COPY]), help="parts of rows' names")
    p.add_argument("--compression", default="zlib", choices=DECOMPRESSORS)
    p.add_argument("--cluster-cache", default="64M")
    p.add_argument("--bare", type=float, help="MB/s of bare decompression on all cores, if it is known")
    return p.parse_args()


def write_content(path, source, size):
    """A tar of these files, cut off at the size, or repeated up to it."""
    with open(path, "wb") as file:
        while file.tell() < size:
            tar = subprocess.Popen(["tar", "c", "--ignore-failed-read", *source.split(",")], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
            begun = file.tell()
            while file.tell() < size and (chunk := tar.stdout.read(min(images.CHUNK, size - file.tell()))):
                file.write(chunk)
            tar.stdout.close()
            tar.wait()
            if file.tell() == begun:
                sys.exit(f"there is nothing to read in {source}")


def make_image(folder, args):
    """The image and its raw content."""
    size, raw, image = images.size_of(args.size), folder.at("disk.raw"), folder.at("disk.qcow2")
    write_content(raw, args.source, size)
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
                    f"compression_type={args.compression}", raw, image], check=True)
    print(f"{args.size} of {args.source}, {args.compression}: ratio {size / os.path.getsize(image):.2f}, "
          f"cache {args.cluster_cache}, {os.cpu_count()} cores")
    return raw, image


def bare(image, args):
    """MB/s of decompression on all cores at once."""
    if args.bare:
        return args.bare
    out = subprocess.run(["cargo", "bench", "--bench", "micro", "--", f"decompress::{DECOMPRESSORS[args.compression]}"],
                         capture_output=True, text=True, env=os.environ | {"NBD_IMG_BENCH_IMAGE": image})
    # The table's last line of throughput is that of all cores: of fastest, slowest, median and mean the median, for
    # one thread.
    found = re.findall(r"([\d.]+) (KB/s|MB/s|GB/s)", out.stdout)
    if out.returncode or len(found) < 4:
        sys.exit("cargo bench failed: " + (out.stderr or out.stdout)[-500:])
    value, unit = found[-2]
    return float(value) * UNITS[unit] / 1e6 * os.cpu_count()


def one(name, row, scene, args):
    size = images.size_of(args.size)
    try:
        with servers.Server(servers.command(name, scene), scene.socket) as server:
            if row == COPY:
                return loads.nbdcopy_to_null(server, size)
            loads.FIO[row] = ROWS[row]
            return loads.fio(server, row, size, args.seconds)
    except (OSError, loads.Failed) as error:
        print(f"FAILED {name} {row}: {error}", file=sys.stderr)
        return None


def main():
    args = arguments()
    rows = [row for row in [*ROWS, COPY] if any(word in row for word in args.rows.split(","))]
    results = {row: {name: [] for name in SERVERS} for row in rows}
    with images.Folder(args.dir) as folder:
        raw, image = make_image(folder, args)
        ceiling = bare(image, args)
        print(f"bare decompression: {ceiling:.0f} MB/s on all cores")
        own = f"--cluster-cache {args.cluster_cache}"
        scene = servers.Scene(args.nbd_img, "", raw, image, folder.at("sock"), "qcow2", "writeback", True, own)
        for _ in range(args.rounds):
            for row in rows:
                for name in SERVERS:
                    figures = one(name, row, scene, args)
                    if figures:
                        results[row][name].append(figures)
    print(f"{'row':14}{'nbd-img MB/s':>14}{'of bare':>9}{'qemu-nbd MB/s':>15}{'ratio':>9}{'MiB':>7}{'qemu MiB':>10}")
    for row in rows:
        if not all(results[row].values()):
            print(f"{row:14}{'failed':>14}")
            continue
        m = {name: {key: statistics.median(figures[key] for figures in rounds) for key in ("mb_s", "rss_mib")}
             for name, rounds in results[row].items()}
        mine, theirs = m[SERVERS[0]], m[SERVERS[1]]
        print(f"{row:14}{mine['mb_s']:14.0f}{mine['mb_s'] / ceiling:9.2f}{theirs['mb_s']:15.0f}"
              f"{mine['mb_s'] / theirs['mb_s']:8.2f}x{mine['rss_mib']:7.0f}{theirs['rss_mib']:10.0f}")
    return 0 if all(len(rounds) == args.rounds for by in results.values() for rounds in by.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
