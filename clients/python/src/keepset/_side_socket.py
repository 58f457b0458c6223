"""Client end of the side socket (proto/side_socket_wire.h): descriptors to the server and back."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading

from keepset.errors import KeepsetError, error_of

_MAGIC = 0x3153504B
_HELLO, _PASS_FD, _FETCH_FD = 1, 2, 3
_UNAVAILABLE = 14
_REQUEST = struct.Struct("<II32sQ16x")
_REPLY = struct.Struct("<IiQ16x")


class SideSocket:
    """One connection, open for the life of the session: the server ends the session at hang-up.

    Thread-safe. A frame without its reply ends the connection, since what comes later would be taken for the
    reply to the next one; every later call then raises Unreachable.
    """

    def __init__(self, path: str, token: bytes, timeout_seconds: float):
        self._exchange = threading.Lock()  # one frame and its reply at a time
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(path)
            self._call(_HELLO, token=token)
        except OSError as error:
            self._socket.close()
            raise error_of(_UNAVAILABLE, f"side socket {path}: {error}") from error
        except KeepsetError:
            self._socket.close()
            raise

    def pass_fd(self, fd: int) -> int:
        """Sends a descriptor; returns the token RegisterRegion names."""
        return self._call(_PASS_FD, fd=fd)[0]

    def fetch_fd(self, fd_token: int) -> int:
        """The descriptor behind a token of AllocateRegion, once; the caller closes it."""
        descriptors = self._call(_FETCH_FD, fd_token=fd_token)[1]
        if len(descriptors) != 1:
            raise KeepsetError(
                "RESOURCE_EXHAUSTED",
                "the descriptor did not arrive: this process is out of descriptors (RLIMIT_NOFILE)",
            )
        return descriptors[0]

    def close(self) -> None:
        self._socket.close()

    def _call(self, kind: int, *, token: bytes = bytes(32), fd: int | None = None,
              fd_token: int = 0) -> tuple[int, list[int]]:
        """The token and the descriptors of the reply."""
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        descriptors: list[int] = []
        try:
            with self._exchange:
                self._send(_REQUEST.pack(_MAGIC, kind, token, fd_token), ancillary)
                try:
                    reply, descriptors = self._receive()
                    code, replied = self._check(reply)
                    # A refused fetch may name no token.
                    if kind != _FETCH_FD:
                        expected = not descriptors
                    else:
                        expected = replied == fd_token or (code != 0 and replied == 0)
                    if not expected:
                        raise KeepsetError(
                            "INTERNAL", f"side socket: reply for fd_token={replied}, want {fd_token}"
                        )
                except KeepsetError:
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)
                    raise
            if code != 0:
                raise error_of(code, "refused by the side socket")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return replied, descriptors

    def _send(self, frame: bytes, ancillary: list) -> None:
        try:
            self._socket.sendmsg([frame], ancillary)
        except OSError as error:
            raise error_of(_UNAVAILABLE, f"side socket: {error}") from error

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            reply, descriptors, _, _ = socket.recv_fds(
                self._socket, _REPLY.size, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise error_of(_UNAVAILABLE, f"side socket: {error}") from error
        return reply, descriptors

    @staticmethod
    def _check(reply: bytes) -> tuple[int, int]:
        """Code and token."""
        if len(reply) != _REPLY.size:
            raise KeepsetError("PERMISSION_DENIED", "the side socket closed the connection")
        magic, code, fd_token = _REPLY.unpack(reply)
        if magic != _MAGIC:
            raise KeepsetError("INTERNAL", f"side socket answered with magic {magic:#x}")
        return code, fd_token
