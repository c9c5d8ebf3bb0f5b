#!/usr/bin/env python3
"""tls.py: what encryption costs servers, side by side in one run.

nbdcopy reads a raw image in memory over TLS (certificates, TCP on the loopback) from nbd-img, nbdkit and qemu-nbd in turn,
round after round, by one connection and by two. Printed are the medians of rate and of the server's processor time per byte;
quote the ratios, for the absolute figures are the machine's.

  tls.py [--nbd-img target/release/nbd-img] [--size 512M] [--rounds 5]

Needs nbdcopy, nbdkit, qemu-nbd and a release build.
"""
import argparse
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(program, image, folder, port):
    """Command line by name. Each server asks for the client's certificate."""
    credentials = f"tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={folder}"
    return {
        "nbd-img": [program, "serve", "-r", "--format", "raw", "--tls-dir", folder, "--listen", f"127.0.0.1:{port}", image],
        "nbdkit": ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "--tls=require", f"--tls-certificates={folder}",
                   "--tls-verify-peer", "file", image],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", "0", "-f", "raw", "-b", "127.0.0.1", "-p", str(port), "--object", credentials,
                     "--tls-creds", "t", image],
    }


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def wait_until_it_listens(server, port):
    for _ in range(500):
        if server.poll() is not None:
            raise SystemExit(f"{server.args[0]} has ended with {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise SystemExit(f"{server.args[0]} does not listen")


def measure(command, port, folder, connections, size):
    """Bytes per second, and the server's nanoseconds per byte."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_it_listens(server, port)
            uri = f"nbds://127.0.0.1:{port}/?tls-certificates={folder}"
            before, begin = cpu_seconds(server.pid), time.monotonic()
            subprocess.run(["nbdcopy", f"--connections={connections}", "--requests=16", uri, "null:"], check=True, timeout=120)
            took, used = time.monotonic() - begin, cpu_seconds(server.pid) - before
        finally:
            server.terminate()
    return size / took, used * 1e9 / size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbd-img", default=str(ROOT / "target/release/nbd-img"))
    parser.add_argument("--size", default="512M")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    size = int(args.size[:-1]) << {"M": 20, "G": 30}[args.size[-1]]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        keys, image = f"{folder}/pki", f"{folder}/image.raw"
        subprocess.run([args.nbd_img, "tls", "init", keys], check=True, stdout=subprocess.DEVNULL)
        with open(image, "wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        found = {}
        for number in range(args.rounds):
            for connections in (1, 2):
                for name in commands(args.nbd_img, image, keys, 0):
                    port = free_port()
                    command = commands(args.nbd_img, image, keys, port)[name]
                    found.setdefault((connections, name), []).append(measure(command, port, keys, connections, size))
    print(f"{'connections':>11} {'server':10} {'MB/s':>7} {'ns/byte':>8} {'rate':>7} {'cpu':>7}")
    for (connections, name), results in sorted(found.items()):
        rate, cost = (statistics.median(column) for column in zip(*results))
        ours = [statistics.median(column) for column in zip(*found[connections, "nbd-img"])]
        print(f"{connections:>11} {name:10} {rate / 1e6:7.0f} {cost:8.3f} {ours[0] / rate:6.2f}x {ours[1] / cost:6.2f}x")


if __name__ == "__main__":
    main()
