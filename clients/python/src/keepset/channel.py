"""gRPC channels to a server, plain or with TLS."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import grpc

from keepset.errors import InvalidInput

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files. Without `ca` the system's certificates are trusted; certificate and key go together."""

    ca: str | os.PathLike | None = None
    certificate: str | os.PathLike | None = None
    key: str | os.PathLike | None = None
    server_name: str = ""  # expected in the server's certificate; "": the address's host


def _read_pem(field: str, path: str | os.PathLike | None) -> bytes | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput("INVALID_ARGUMENT", f'tls {field} "{path}": {error.strerror}') from error


def open_channel(address: str, tls: TlsFiles | None) -> grpc.Channel:
    """A channel to "unix:/path" or "host:port". Raises InvalidInput."""
    if tls is None:
        return grpc.insecure_channel(address, options=_UNLIMITED)
    if address.startswith("unix:"):
        raise InvalidInput(
            "INVALID_ARGUMENT",
            f"TLS to {address}: a Unix socket is guarded by its file mode, TLS is for host:port",
        )
    if (tls.certificate is None) != (tls.key is None):
        raise InvalidInput(
            "INVALID_ARGUMENT",
            f"tls certificate {tls.certificate} and key {tls.key}: a client certificate needs both",
        )
    credentials = grpc.ssl_channel_credentials(
        _read_pem("ca", tls.ca), _read_pem("key", tls.key), _read_pem("certificate", tls.certificate)
    )
    options = list(_UNLIMITED)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, credentials, options=options)
