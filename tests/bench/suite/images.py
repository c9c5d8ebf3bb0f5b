"""The disks that are served: real data everywhere unless holes are asked for, in a folder that goes with them."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile

CHUNK = 1 << 20


class Folder:
    """A folder of its own below `parent`; leaving the block removes it."""

    def __init__(self, parent):
        # Told to end, Python would leave gigabytes and servers behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        os.makedirs(parent, exist_ok=True)
        self.path = tempfile.mkdtemp(prefix="nbd-bench.", dir=parent)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)

    def at(self, name):
        return os.path.join(self.path, name)


def size_of(text):
    """Bytes of a size with a suffix, as 512M."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1].upper())
    return int(text[:-1]) * unit if unit else int(text)


def make_raw(path, size, half_sparse=False):
    """Random bytes (nothing to compress, nothing equal); `half_sparse` leaves every other 64 MiB a hole."""
    period = 64 * CHUNK
    with open(path, "wb") as file:
        for start in range(0, size, CHUNK):
            if half_sparse and start // period % 2:
                continue
            file.seek(start)
            file.write(os.urandom(min(CHUNK, size - start)))
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
    return path


def make_qcow2(raw, path):
    """The same content as qcow2, every cluster that is not zero allocated."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path


def empty(path, size, format):
    """A new image without content."""
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(size)], check=True)
    return path


def drop_cache(path):
    """Nothing of the file is in the page cache afterwards (written pages go to the disk first)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build_limit(folder):
    """The yardstick server, from limit.c beside this package."""
    source = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "limit.c")
    target = folder.at("limit")
    subprocess.run(["cc", "-O2", "-o", target, source, "-lpthread"], check=True)
    return target
