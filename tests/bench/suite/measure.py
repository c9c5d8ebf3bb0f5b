"""Measuring rows: every server in turn, round after round, so that a machine whose speed drifts hits all alike."""
import datetime
import os
import subprocess
import sys

from . import images, loads, servers


class Bench:
    """The images of a run, made when they are first needed, and the rounds on them."""

    def __init__(self, options, memory, disk):
        self.options, self.memory, self.disk = options, memory, disk
        self.limit = None
        self.made = {}

    def run(self, row, results):
        """Measures one row into `results`."""
        options = self.options
        results.begin(row.name, {"day": datetime.date.today().isoformat(), "commit": _commit(),
                                 "rounds": options.rounds, "seconds": options.seconds, "size": options.size,
                                 "copy_size": options.copy_size})
        for _ in range(options.rounds):
            for name in row.servers:
                try:
                    results.add(row.name, name, self._one(row, name))
                except (OSError, loads.Failed) as error:
                    results.fail(row.name, name, str(error))
                    print(f"FAILED {row.name} {name}: {error}", file=sys.stderr)

    def _one(self, row, name):
        scene = self._scene(row)
        size = images.size_of(self.options.size)
        if name == "fio":
            # On the raw file, whatever the row's format: writing to a qcow2 file would destroy it.
            return loads.fio_file(scene.raw, row.load, size, self.options.seconds)
        if row.cold:
            images.drop_cache(scene.raw)
            images.drop_cache(scene.image)
        try:
            if row.load == "ready":
                return loads.start_to_ready(lambda: servers.Server(servers.command(name, scene), scene.socket))
            with servers.Server(servers.command(name, scene), scene.socket) as server:
                return self._load(row, server, scene)
        finally:
            for scrap in ("out.raw", "in.raw", "in.qcow2"):
                if os.path.exists(self.memory.at(scrap)):
                    os.unlink(self.memory.at(scrap))

    def _load(self, row, server, scene):
        copied = images.size_of(self.options.copy_size)
        if row.load == "first-byte":
            return loads.connect_to_first_byte(server)
        if row.load == "nbdcopy":
            return loads.nbdcopy_to_null(server, copied)
        if row.load == "convert-out":
            return loads.convert_out(server, copied, self.memory.at("out.raw"))
        if row.load == "convert-in":
            return loads.convert_in(server, copied, self._image("raw", True, half_sparse=True))
        # What the page cache holds after one pass is not cold any more.
        once = row.cold and row.load.startswith("read-")
        return loads.fio(server, row.load, images.size_of(self.options.size), self.options.seconds, once)

    def _scene(self, row):
        raw, image = self._images(row)
        if self.limit is None:
            self.limit = images.build_limit(self.memory)
        return servers.Scene(self.options.nbd_img, self.limit, raw, image, self.memory.at("sock"), row.format,
                             row.cache, row.read_only)

    def _images(self, row):
        if row.load == "convert-in":
            length = images.size_of(self.options.copy_size)
            raw = images.empty(self.memory.at("in.raw"), length, "raw")
            return raw, raw if row.format == "raw" else images.empty(self.memory.at("in.qcow2"), length, "qcow2")
        half_sparse = row.group.startswith("copy-")
        # Large copies are read from a file that the page cache holds: there is not always memory for two of them.
        on_disk = row.disk or half_sparse
        raw = self._image("raw", on_disk, half_sparse)
        return raw, raw if row.format == "raw" else self._image(row.format, on_disk, half_sparse)

    def _image(self, format, on_disk, half_sparse=False):
        key = (format, on_disk, half_sparse)
        if key not in self.made:
            folder = self.disk if on_disk else self.memory
            path = folder.at(f"{'half' if half_sparse else 'full'}.{format}")
            size = images.size_of(self.options.copy_size if half_sparse else self.options.size)
            if format == "raw":
                images.make_raw(path, size, half_sparse)
            else:
                images.make_qcow2(self._image("raw", on_disk, half_sparse), path)
            self.made[key] = path
        return self.made[key]


def _commit():
    """The commit that the program is believed to be of, or nothing outside of a repository."""
    out = subprocess.run(["git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True, check=False)
    return out.stdout.strip()
