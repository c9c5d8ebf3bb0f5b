"""A small NBD client: enough to negotiate, and to send many requests at once and take the replies.

Simple replies only. What it sends depends on its arguments alone, so that the same calls make the same load.
"""
import socket
import struct

REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, OPTION_REPLY_MAGIC = 0x25609513, 0x67446698, 0x3E889045565A9
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
OPTION_STARTTLS, OPTION_GO, REPLY_ACK, REPLY_INFO, INFO_EXPORT = 5, 7, 1, 3, 0


class Client:
    """One connection in transmission. `secured` turns a connected socket to TLS."""

    def __init__(self, path, export="", patience=30, secured=None):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(patience)
        self.size = None
        try:
            self.socket.connect(path)
            self._greet()
            if secured:
                self._option(OPTION_STARTTLS, b"")
                self.socket = secured(self.socket)
            self._option(OPTION_GO, struct.pack(">I", len(export.encode())) + export.encode() + struct.pack(">H", 0))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        try:
            self.socket.sendall(request(DISCONNECT, 0, 0))
        except OSError:
            pass
        self.socket.close()

    def run(self, requests, payload=b""):
        """Sends (command, offset, length) all at once; returns when every reply is there. All are of one kind and
        length, so that replies can be told apart in whatever order they come."""
        command, _, length = requests[0]
        body = payload[:length] if command == WRITE else b""
        self.socket.sendall(b"".join(request(command, offset, length) + body for _, offset, _ in requests))
        reply_length = 16 + (length if command == READ else 0)
        replies = self._take(reply_length * len(requests))
        for start in range(0, len(replies), reply_length):
            magic, error, _ = struct.unpack_from(">IIQ", replies, start)
            if magic != SIMPLE_REPLY_MAGIC or error:
                raise OSError(f"a reply has magic {magic:#x} and error {error}")

    def _greet(self):
        if self._take(16) != b"NBDMAGICIHAVEOPT":
            raise OSError("not an NBD server")
        self._take(2)
        self.socket.sendall(struct.pack(">I", 3))

    def _option(self, option, data):
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._take(20))
            body = self._take(length)
            if magic != OPTION_REPLY_MAGIC or kind & 1 << 31:
                raise OSError(f"the export was refused: {body[:200]!r}")
            if kind == REPLY_INFO and struct.unpack(">H", body[:2])[0] == INFO_EXPORT:
                self.size = struct.unpack(">Q", body[2:10])[0]
            if kind == REPLY_ACK:
                return

    def _take(self, length):
        data = memoryview(bytearray(length))
        have = 0
        while have < length:
            got = self.socket.recv_into(data[have:])
            if not got:
                raise OSError("the server hung up")
            have += got
        return bytes(data)


def request(command, offset, length):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, offset, offset, length)
