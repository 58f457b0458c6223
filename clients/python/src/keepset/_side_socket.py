"""Client end of the side socket (proto/side_socket_wire.h): passes memfd descriptors to the server."""

from __future__ import annotations

import array
import socket
import struct

from keepset.errors import KeepsetError, error_of

_MAGIC = 0x3153504B
_HELLO, _PASS_FD = 1, 2
_UNAVAILABLE = 14
_REQUEST = struct.Struct("<II32s24x")
_REPLY = struct.Struct("<IiQ16x")


class SideSocket:
    """One connection, open for the life of the session: the server ends the session at hang-up."""

    def __init__(self, path: str, token: bytes, timeout_seconds: float):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(path)
            self._call(_HELLO, token, None)
        except OSError as error:
            self._socket.close()
            raise error_of(_UNAVAILABLE, f"side socket {path}: {error}") from error
        except KeepsetError:
            self._socket.close()
            raise

    def pass_fd(self, fd: int) -> int:
        """Sends a descriptor; returns the token RegisterRegion names."""
        return self._call(_PASS_FD, bytes(32), fd)

    def close(self) -> None:
        self._socket.close()

    def _call(self, kind: int, token: bytes, fd: int | None) -> int:
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._socket.sendmsg([_REQUEST.pack(_MAGIC, kind, token)], ancillary)
            reply = self._socket.recv(_REPLY.size)
        except OSError as error:
            raise error_of(_UNAVAILABLE, f"side socket: {error}") from error
        if len(reply) != _REPLY.size:
            raise KeepsetError("PERMISSION_DENIED", "the side socket closed the connection")
        magic, code, fd_token = _REPLY.unpack(reply)
        if magic != _MAGIC:
            raise KeepsetError("INTERNAL", f"side socket answered with magic {magic:#x}")
        if code != 0:
            raise error_of(code, "refused by the side socket")
        return fd_token
