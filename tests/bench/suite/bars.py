"""What the figures have to reach. Printed as met or missed; nothing fails by it."""
import dataclasses

# What a figure is held against: the fastest of the qemu-nbd modes, of all peers, ...
FASTEST = {
    "qemu-nbd": ("qemu-nbd", "qemu-nbd-uring", "qemu-nbd-native"),
    "peer": ("qemu-nbd", "qemu-nbd-uring", "qemu-nbd-native", "nbdkit"),
    "nbdkit": ("nbdkit",),
    "limit": ("limit",),
    "own raw": ("nbd-img-raw",),
    "own, polling off": ("nbd-img-nopoll",),
    "fio on the file": ("fio",),
}
LARGE_RAW = {"qemu-nbd": 5.0, "nbdkit": 2.0, "limit": 1.3}
MANY_RAW = {"qemu-nbd": 2.7, "nbdkit": 1.4, "limit": 0.9, "cpu": 5.5}
MANY_QCOW2 = {"qemu-nbd": 2.7, "own raw": 0.9, "cpu": 6.5}
NOT_SLOWER = {"peer": 1.0}

# row: at least so many times the rate of what is named; `cpu`: at most so many microseconds per request;
# `cpu of qemu-nbd`: at most that part of the thriftier qemu-nbd's; `unpolled limit`: own rate without polling.
BARS = {
    "raw/rread-4k-q1": {"qemu-nbd": 2.5, "nbdkit": 1.5, "unpolled limit": 0.95},
    "raw/rread-4k-q1-x4": {"own, polling off": 1.0},
    "raw/rread-4k-q16": MANY_RAW,
    "raw/rread-4k-q64": MANY_RAW,
    "raw/rread-4k-q16-x4": {"qemu-nbd": 4.0, "nbdkit": 1.6, "limit": 0.85, "cpu": 4.5},
    "raw/read-256k-q8": LARGE_RAW,
    "raw/read-1m-q4": LARGE_RAW,
    "raw/rwrite-4k-q16": {"qemu-nbd": 3.0, "nbdkit": 1.1, "limit": 0.9, "cpu": 5.5},
    "raw/write-256k-q8": {"qemu-nbd": 3.0, "nbdkit": 1.2, "limit": 1.0},
    "qcow2/rread-4k-q1": {"qemu-nbd": 2.5},
    "qcow2/rread-4k-q1-x4": {"own, polling off": 1.0},
    "qcow2/rread-4k-q16": MANY_QCOW2,
    "qcow2/rread-4k-q64": MANY_QCOW2,
    "qcow2/rread-4k-q16-x4": {"qemu-nbd": 4.0},
    "qcow2/read-256k-q8": {"qemu-nbd": 3.5},
    "qcow2/read-1m-q4": {"qemu-nbd": 3.5},
    "qcow2/rwrite-4k-q16": {"qemu-nbd": 2.7, "own raw": 0.9},
    "qcow2/write-256k-q8": {"qemu-nbd": 3.0, "own raw": 0.9},
    "qcow2-ro/read-256k-q8": {"qemu-nbd": 5.0},
    "qcow2-ro/read-1m-q4": {"qemu-nbd": 5.0},
    "disk-raw/rread-4k-q32": {"qemu-nbd": 1.1, "fio on the file": 0.6, "cpu of qemu-nbd": 0.5},
    "disk-raw/rwrite-4k-q32": {"qemu-nbd": 1.5, "fio on the file": 0.6, "cpu of qemu-nbd": 0.5},
    "disk-qcow2/rread-4k-q32": {"qemu-nbd": 1.1, "fio on the file": 0.6, "cpu of qemu-nbd": 0.5},
    "disk-qcow2/rwrite-4k-q32": {"qemu-nbd": 1.5, "fio on the file": 0.6, "cpu of qemu-nbd": 0.5},
    "cold-raw/rread-4k-q32": {"peer": 1.2},
    "cold-raw/read-256k-q8": {"peer": 1.2},
    "cold-qcow2/rread-4k-q32": {"peer": 1.2},
    "cold-qcow2/read-256k-q8": {"peer": 1.2},
    **{f"{group}-{format}/{load}": NOT_SLOWER for format in ("raw", "qcow2") for group, load in (
        ("copy", "nbdcopy"), ("copy", "convert-out"), ("copy", "convert-in"), ("start", "ready"),
        ("start", "first-byte"))},
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One bar: what it asks for, what was found, and whether that is enough."""
    row: str
    asked: str
    found: str
    met: bool


def verdicts(row, figures):
    """Every bar of a row for which there are figures; `figures` are medians by server."""
    found = []
    for key, bound in BARS.get(row, {}).items():
        verdict = _verdict(row, key, bound, figures)
        if verdict:
            found.append(verdict)
    return found


def all_verdicts(rows, results):
    """Of every row, in their order."""
    return [verdict for row in rows for verdict in verdicts(row.name, results.medians(row.name))]


def _verdict(row, key, bound, figures):
    own = figures.get("nbd-img")
    if key == "unpolled limit":
        own, key, who = figures.get("nbd-img-nopoll"), "limit", "limit, polling off"
    else:
        who = key
    if not own:
        return None
    if key == "cpu":
        return Verdict(row, f"<= {bound:g} us/request", f"{own['cpu_us']:.1f} us", own["cpu_us"] <= bound)
    if key == "cpu of qemu-nbd":
        theirs = [figures[name]["cpu_us"] for name in FASTEST["qemu-nbd"] if figures.get(name)]
        if not theirs:
            return None
        part = own["cpu_us"] / min(theirs)
        return Verdict(row, f"<= {bound:g} x CPU of qemu-nbd", f"{part:.2f} x", part <= bound)
    theirs = [figures[name]["rate"] for name in FASTEST[key] if figures.get(name)]
    if not theirs:
        return None
    ratio = own["rate"] / max(theirs)
    return Verdict(row, f">= {bound:g} x {who}", f"{ratio:.2f} x", ratio >= bound)
