"""The figures as text: Markdown for the page, lines for the terminal."""
from . import bars
from .rows import GROUPS

NAMES = {
    "nbd-img": "nbd-img", "nbd-img-nopoll": "nbd-img, `--poll off`", "nbd-img-raw": "nbd-img on the raw file",
    "nbd-img-mmap": "nbd-img, mmap-raw", "qemu-nbd": "qemu-nbd", "qemu-nbd-uring": "qemu-nbd, io_uring",
    "qemu-nbd-native": "qemu-nbd, native",
    "nbdkit": "nbdkit file", "limit": "limit", "fio": "fio on the file",
}


def rate_text(figures):
    """The rate as people say it."""
    if "seconds" in figures:
        seconds = figures["seconds"]
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
    if figures["mb_s"] / figures["rate"] > 0.1:
        return f"{figures['mb_s']:.0f} MB/s"
    return f"{figures['rate'] / 1e3:.1f} kIOPS"


def cpu_text(figures):
    if "cpu_us" in figures:
        return f"{figures['cpu_us']:.1f} us"
    return f"{figures['cpu_s']:.2f} s" if "cpu_s" in figures else "-"


def page(rows, results, machine):
    """The whole page."""
    parts = ["# nbd-img beside its peers", "", machine, "",
             "![Rates of nbd-img and its peers](results.svg)", "",
             "A ratio is nbd-img's rate divided by the peer's: above 1 nbd-img is faster. CPU is the server's "
             "processor time per request (per copy, where that is the row). `nbdkit` and `limit` always serve the raw file; "
             "`limit` ([limit.c](limit.c)) checks nothing and is a yardstick, not a server.", ""]
    for group, title in GROUPS.items():
        measured = [row for row in rows if row.group == group and results.medians(row.name)]
        if measured:
            parts += [f"## {title}", "", *_group(measured, results), ""]
    parts += ["## The bars", "", *_bars(rows, results), ""]
    return "\n".join(parts)


def _group(rows, results):
    lines = ["| load | server | rate | ratio | CPU | p99 | peak memory |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        medians = results.medians(row.name)
        own = medians.get("nbd-img")
        for at, (server, figures) in enumerate(medians.items()):
            ratio = f"{own['rate'] / figures['rate']:.2f} x" if own and server != "nbd-img" else ""
            p99 = f"{figures['p99_us']:.0f} us" if "p99_us" in figures else "-"
            memory = f"{figures['rss_mib']:.0f} MiB" if "rss_mib" in figures else "-"
            lines.append(f"| {row.title if at == 0 else ''} | {NAMES[server]} | {rate_text(figures)} | {ratio} "
                         f"| {cpu_text(figures)} | {p99} | {memory} |")
        lines += [f"| {row.title} | failed: {why} | | | | | |" for why in results.failures(row.name)]
    return lines


def _bars(rows, results):
    lines = ["| row | asked | found | |", "|---|---|---:|---|"]
    every = bars.all_verdicts(rows, results)
    lines += [f"| {one.row} | {one.asked} | {one.found} | {'met' if one.met else '**missed**'} |" for one in every]
    met = sum(one.met for one in every)
    return [f"{met} of {len(every)} are met.", "", *lines]


def terminal(row, results):
    """What was found in one row, and its bars."""
    medians = results.medians(row.name)
    own = medians.get("nbd-img")
    lines = [f"{row.name}  ({row.title})"]
    for server, figures in medians.items():
        ratio = f"{own['rate'] / figures['rate']:.2f} x" if own and server != "nbd-img" else ""
        lines.append(f"  {NAMES[server]:26}{rate_text(figures):>14}{cpu_text(figures):>12}{ratio:>10}")
    for one in bars.verdicts(row.name, medians):
        lines.append(f"  {'met   ' if one.met else 'MISSED'} {one.asked}: {one.found}")
    return "\n".join(lines)
