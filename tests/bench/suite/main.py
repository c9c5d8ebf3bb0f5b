"""The whole comparison: options, the run, the page and the chart."""
import argparse
import contextlib
import datetime
import fnmatch
import os
import shutil
import subprocess
import sys

from . import bars, chart, images, table
from .measure import Bench
from .results import Results
from .rows import all_rows

BENCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(os.path.dirname(BENCH))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
PROGRAMS = ("fio", "qemu-nbd", "qemu-img", "nbdkit", "nbdcopy", "cc")


def arguments():
    p = argparse.ArgumentParser(
        prog="tests/bench/run", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compares nbd-img with its peers, row by row, and writes results.md and results.svg beside itself.",
        epilog="Rows keep their figures between calls, so that they can be measured in several: those that a call\n"
               "does not name stay as they were. A row's servers are always measured in one call, in turn.")
    p.add_argument("--quick", action="store_true", help="one round of a second, small images: whether it works")
    p.add_argument("--only", default="*", metavar="ROWS", help="names or patterns, with commas: 'raw/*,qcow2/read-*'")
    p.add_argument("--list", action="store_true", help="list the rows and end")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=int, default=2, help="length of each measurement")
    p.add_argument("--size", default="512M", help="of the disks")
    p.add_argument("--copy-size", default="4G", help="of the half-sparse disk that is copied")
    p.add_argument("--memory-dir", default="/dev/shm", help="for images without a disk below them")
    p.add_argument("--disk-dir", default=os.path.join(TARGET, "bench"), help="a folder on a disk")
    p.add_argument("--nbd-img", default=os.path.join(TARGET, "release", "nbd-img"))
    p.add_argument("--figures", help="where figures are kept [default: bench/figures.json in the target folder]")
    p.add_argument("--output", help="folder of results.md and results.svg [default: tests/bench; with --quick the "
                   "target folder's]")
    options = p.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.size, options.copy_size = 1, 1, "128M", "512M"
    kept = os.path.join(TARGET, "bench", "quick" if options.quick else "")
    options.output = options.output or (kept if options.quick else BENCH)
    options.figures = options.figures or os.path.join(kept, "figures.json")
    return options


def main():
    options = arguments()
    rows = all_rows()
    wanted = [row for row in rows if any(fnmatch.fnmatch(row.name, one) for one in options.only.split(","))]
    if options.list or not wanted:
        print("\n".join(row.name for row in rows))
        return 0 if options.list else 2
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        print(f"missing: {', '.join(missing)}; tests/setup installs what Debian has of them", file=sys.stderr)
        return 2
    results = Results(options.figures)
    with images.Folder(options.memory_dir) as memory, images.Folder(options.disk_dir) as disk:
        bench = Bench(options, memory, disk)
        for row in wanted:
            bench.run(row, results)
            results.save()
            print(table.terminal(row, results), flush=True)
    write(options, rows, results)
    return 1 if any(results.failures(row.name) for row in wanted) else 0


def write(options, rows, results):
    """The page and the chart, of everything that has figures."""
    os.makedirs(options.output, exist_ok=True)
    machine = describe(rows, results)
    with open(os.path.join(options.output, "results.md"), "w") as file:
        file.write(table.page(rows, results, machine))
    picture = chart.svg(rows, results, machine)
    if picture:
        with open(os.path.join(options.output, "results.svg"), "w") as file:
            file.write(picture)
    every = bars.all_verdicts(rows, results)
    print(f"{sum(one.met for one in every)} of {len(every)} bars are met")
    print(f"written: {options.output}/results.md and results.svg")


def describe(rows, results):
    """What was measured where, in a sentence."""
    measured = [results.conditions(row.name) for row in rows if results.medians(row.name)]
    span = _span(measured, "rounds", "round")
    of = _span(measured, "seconds", "second")
    versions = ", ".join(filter(None, (_version("qemu-nbd"), _version("nbdkit"), _version("fio"))))
    day = _span(measured, "day") or datetime.date.today().isoformat()
    commit = ", ".join(sorted({one["commit"] for one in measured if one.get("commit")}))
    return (f"Medians of {span} of {of}, servers in turn; {os.cpu_count()} CPUs, Linux "
            f"{os.uname().release.split('-')[0]}, {versions}; {day}{', commit ' if commit else ''}{commit}.")


def _span(conditions, key, unit=""):
    """The value that all rows have of it, or the first and the last of them in order."""
    found = sorted({one[key] for one in conditions if one.get(key)})
    text = " to ".join(str(one) for one in sorted({*found[:1], *found[-1:]}))
    return f"{text} {unit}{'' if found == [1] else 's'}" if unit else text


def _version(program):
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        words = out.split("\n")[0].split(" (")[0].split()
        return f"{program} {words[-1].removeprefix('fio-')}"
    return None
