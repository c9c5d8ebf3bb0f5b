"""The rows of the comparison: which load, on which image, by which servers."""
import dataclasses

PEERS = ("qemu-nbd", "qemu-nbd-uring")
RAW_PEERS = PEERS + ("nbdkit",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `name` is GROUP/LOAD; the group says what is served and from where."""
    name: str
    title: str
    servers: tuple
    format: str = "raw"
    disk: bool = False
    cache: str = "writeback"
    read_only: bool = False
    cold: bool = False

    @property
    def group(self):
        return self.name.split("/")[0]

    @property
    def load(self):
        return self.name.split("/")[1]


TITLES = {
    "rread-4k-q1": "4 KiB random read, depth 1",
    "rread-4k-q1-x4": "4 KiB random read, depth 1 on 4 connections",
    "rread-4k-q16": "4 KiB random read, depth 16",
    "rread-4k-q64": "4 KiB random read, depth 64",
    "rread-4k-q16-x4": "4 KiB random read, depth 16 on 4 connections",
    "rread-4k-q32": "4 KiB random read, depth 32",
    "rwrite-4k-q16": "4 KiB random write, depth 16",
    "rwrite-4k-q32": "4 KiB random write, depth 32",
    "read-256k-q8": "256 KiB sequential read",
    "read-1m-q4": "1 MiB sequential read",
    "write-256k-q8": "256 KiB sequential write",
    "write-1m-q8": "1 MiB sequential write",
    "nbdcopy": "nbdcopy to null:",
    "convert-out": "qemu-img convert out of the export",
    "convert-in": "qemu-img convert into the export",
    "ready": "start to ready",
    "first-byte": "connect to first byte",
}
GROUPS = {
    "raw": "raw, image in memory",
    "qcow2": "qcow2 (all allocated, writable), image in memory",
    "qcow2-ro": "qcow2, read-only, image in memory",
    "disk-raw": "raw on a disk, `--cache none`",
    "disk-qcow2": "qcow2 on a disk, `--cache none`",
    "cold-raw": "raw on a disk, through an empty page cache",
    "cold-qcow2": "qcow2 on a disk, through an empty page cache",
    "copy-raw": "raw, copies of a half-sparse disk",
    "copy-qcow2": "qcow2, copies of a half-sparse disk",
    "start-raw": "raw, beginnings",
    "start-qcow2": "qcow2, beginnings",
}
READS = ("rread-4k-q1", "rread-4k-q1-x4", "rread-4k-q16", "rread-4k-q64", "rread-4k-q16-x4")
LARGE = ("read-256k-q8", "read-1m-q4")
WRITES = ("rwrite-4k-q16", "write-256k-q8", "write-1m-q8")


def all_rows():
    """Every row, in the order of the table."""
    return [*_memory("raw"), *_memory("qcow2"), *_read_only(), *_disk("raw"), *_disk("qcow2"),
            *_cold("raw"), *_cold("qcow2"), *_copies("raw"), *_copies("qcow2"), *_starts("raw"), *_starts("qcow2")]


def _row(group, load, servers, **more):
    return Row(f"{group}/{load}", TITLES[load], tuple(servers), **more)


def _peers(format):
    return RAW_PEERS if format == "raw" else PEERS


def _memory(format):
    for load in READS + LARGE + WRITES:
        servers = ["nbd-img", *_peers(format), *(["limit"] if format == "raw" else ["nbd-img-raw"])]
        if "-q1" in load and "q16" not in load:
            servers.insert(1, "nbd-img-nopoll")
        yield _row(format, load, servers, format=format)


def _read_only():
    for load in LARGE:
        yield _row("qcow2-ro", load, ("nbd-img", *PEERS), format="qcow2", read_only=True)


def _disk(format):
    for load in ("rread-4k-q32", "rwrite-4k-q32"):
        yield _row(f"disk-{format}", load, ("nbd-img", *PEERS, "qemu-nbd-native", "fio"), format=format, disk=True,
                   cache="none")


def _cold(format):
    for load in ("rread-4k-q32", "read-256k-q8"):
        yield _row(f"cold-{format}", load, ("nbd-img", *_peers(format)), format=format, disk=True, read_only=True,
                   cold=True)


def _copies(format):
    for load in ("nbdcopy", "convert-out"):
        yield _row(f"copy-{format}", load, ("nbd-img", *_peers(format)), format=format, read_only=True)
    yield _row(f"copy-{format}", "convert-in", ("nbd-img", *_peers(format)), format=format)


def _starts(format):
    for load in ("ready", "first-byte"):
        yield _row(f"start-{format}", load, ("nbd-img", *_peers(format)), format=format, read_only=True)
