"""The figures as a picture: an SVG of two panels, raw and qcow2, one block of bars for each load."""
from html import escape

from .rows import TITLES
from .table import rate_text

SERVERS = {  # colour and name, in the order of the bars
    "nbd-img": ("#1864ab", "nbd-img"),
    "nbdkit": ("#63a375", "nbdkit file"),
    "qemu-nbd-uring": ("#e8a15c", "qemu-nbd, io_uring"),
    "qemu-nbd": ("#c9683c", "qemu-nbd, threads"),
    "limit": (None, "limit (checks nothing: a yardstick)"),
}
PANELS = (("raw", "raw", ("nbd-img", "nbdkit", "qemu-nbd-uring", "qemu-nbd", "limit")),
          ("qcow2", "qcow2, all allocated", ("nbd-img", "qemu-nbd-uring", "qemu-nbd")))
WIDTH, MARGIN, GAP = 900, 24, 36
BAR, BAR_GAP, TITLE, BLOCK_GAP, TOP, FOOT = 13, 3, 20, 16, 112, 40
# Room behind the longest bar for its figures.
LABEL = 118
INK, FAINT, PAPER = "#212529", "#6c757d", "#ffffff"


def svg(rows, results, machine):
    """The whole picture, or None when there is nothing to show."""
    loads = [load for load in TITLES if any(results.medians(f"{panel}/{load}") for panel, _, _ in PANELS)]
    if not loads:
        return None
    panel_width = (WIDTH - 2 * MARGIN - GAP) / 2
    block = TITLE + len(PANELS[0][2]) * (BAR + BAR_GAP) + BLOCK_GAP
    height = TOP + len(loads) * block + FOOT
    parts = [_head(height), *_legend()]
    for at, (group, title, servers) in enumerate(PANELS):
        left = MARGIN + at * (panel_width + GAP)
        parts.append(_text(left, TOP - 18, title, size=15, weight="bold"))
        for index, load in enumerate(loads):
            medians = results.medians(f"{group}/{load}")
            parts += _block(left, TOP + index * block, panel_width, TITLES[load], medians, servers)
    parts.append(_text(MARGIN, height - 16, machine, size=11, fill=FAINT))
    return "\n".join([*parts, "</svg>", ""])


def _head(height):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>')


def _legend():
    parts = [_text(MARGIN, 36, "Rate of each server, and its processor time per request", size=18, weight="bold")]
    left = MARGIN
    for colour, name in SERVERS.values():
        parts += [_bar(left, 54, 12, 12, colour), _text(left + 18, 64.5, name, size=12)]
        left += 18 + 6.6 * len(name) + 24
    return parts


def _block(left, top, width, title, medians, servers):
    parts = [_text(left, top + 12, title, size=12.5, weight="600")]
    shown = [server for server in servers if server in medians]
    if not shown:
        return [*parts, _text(left, top + TITLE + 12, "not measured", size=11, fill=FAINT)]
    fastest = max(medians[server]["rate"] for server in shown)
    for at, server in enumerate(shown):
        figures = medians[server]
        y = top + TITLE + at * (BAR + BAR_GAP)
        length = max((width - LABEL) * figures["rate"] / fastest, 1)
        parts.append(_bar(left, y, length, BAR, SERVERS[server][0]))
        bold = "600" if server == "nbd-img" else "normal"
        cpu = f'<tspan fill="{FAINT}" font-weight="normal">  {figures["cpu_us"]:.1f} us</tspan>'
        parts.append(_text(left + length + 6, y + 10.5, rate_text(figures), size=11, weight=bold, more=cpu))
    return parts


def _bar(x, y, width, height, colour):
    paint = f'fill="{colour}"' if colour else f'fill="none" stroke="{FAINT}" stroke-dasharray="3 2"'
    inset = 0 if colour else 0.5
    return (f'<rect x="{x + inset:.1f}" y="{y + inset:.1f}" width="{max(width - 2 * inset, 0.5):.1f}" '
            f'height="{height - 2 * inset:.1f}" rx="2" {paint}/>')


def _text(x, y, text, size, weight="normal", fill=INK, more=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
            f'xml:space="preserve">{escape(text)}{more}</text>')
