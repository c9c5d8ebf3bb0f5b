"""The servers that are compared: how each is started on an image, and what it has used of the machine."""
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time

OWN = "nbd-img"
# A server that is not up, or not gone, after so long never will be.
PATIENCE_SECONDS = 20
# In /proc/net/unix: the flag of a socket that accepts (__SO_ACCEPTCON).
LISTENS = "00010000"


@dataclasses.dataclass
class Scene:
    """What is served, and how."""
    nbd_img: str
    limit: str
    raw: str
    image: str
    socket: str
    format: str = "raw"
    cache: str = "writeback"
    read_only: bool = False
    nbd_img_args: str = ""


def command(name, scene):
    """The command line of a server; `nbdkit`, `limit` and `nbd-img-raw` always serve the raw file."""
    own = [scene.nbd_img, "serve", "--socket", scene.socket] + ["--read-only"] * scene.read_only
    own += shlex.split(scene.nbd_img_args)
    formatted = own + ["--format", scene.format, "--cache", scene.cache, scene.image]
    qemu = ["qemu-nbd", "-t", "-e", "0", "-f", scene.format, f"--cache={scene.cache}", "-k", scene.socket]
    qemu += ["-r"] * scene.read_only
    return {
        OWN: formatted,
        "nbd-img-nopoll": formatted + ["--poll", "off"],
        "nbd-img-raw": own + ["--format", "raw", "--cache", scene.cache, scene.raw],
        "nbd-img-mmap": own + ["--format", "mmap-raw", scene.raw],
        "qemu-nbd": qemu + [scene.image],
        "qemu-nbd-uring": qemu + ["--aio=io_uring", scene.image],
        # Only past the page cache.
        "qemu-nbd-native": qemu + ["--aio=native", scene.image],
        "nbdkit": ["nbdkit", "-f", "-U", scene.socket] + ["-r"] * scene.read_only + ["file", scene.raw],
        "limit": [scene.limit, scene.raw, scene.socket],
    }[name]


class Server:
    """A running server; leaving the block ends it. Ready is when a client is greeted, or, where one that ends with
    its last client must not be probed, when its socket is there."""

    def __init__(self, argv, path, pin=None, probe=True):
        self.path = path
        if os.path.exists(path):
            os.unlink(path)
        argv = (["taskset", "-c", pin] if pin else []) + argv
        self.log = tempfile.TemporaryFile()  # a pipe that nobody empties would stop a server that says much
        self.begun = time.monotonic()
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=self.log)
        try:
            self._await_ready(self._greets if probe else self._listens)
        except BaseException:
            self.end()
            raise
        self.ready_seconds = time.monotonic() - self.begun

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    @property
    def pid(self):
        return self.process.pid

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def said(self):
        """What it wrote to its standard error."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()[-300:]

    def _await_ready(self, is_ready):
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise OSError(f"did not start: {self.said()}")
            if is_ready():
                return
            time.sleep(0.0005)
        raise OSError("did not start in time")

    def _greets(self):
        """Some make the socket before they can serve."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(PATIENCE_SECONDS)
            try:
                probe.connect(self.path)
                return bool(probe.recv(18))
            except OSError:
                return False

    def _listens(self):
        """As far as the kernel tells: the socket has left the state of one that was only bound."""
        with open("/proc/net/unix") as sockets:
            return any(line.split()[-1] == self.path and line.split()[3] == LISTENS for line in sockets)


def cpu_seconds(pid):
    """Processor time of all threads of a process, in the program and in the kernel."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid, key="VmHWM"):
    """Resident memory: the peak, or `VmRSS` for now."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return 0.0
