"""Errors of the client, one class per who must act; the message is the server's."""

from __future__ import annotations

import grpc


class KeepsetError(Exception):
    """Base of all; `code` is the canonical code's name ("INVALID_ARGUMENT")."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class InvalidInput(KeepsetError):
    """A shape or value of the request is wrong."""


class NotFound(KeepsetError):
    """The server has no such policy, table, session or region."""


class Refused(KeepsetError):
    """Layout or table does not fit, a fence is stale, or permission is missing."""


class Overloaded(KeepsetError):
    """A quota or the queue is full; try again or keep the full cache."""


class Unreachable(KeepsetError):
    """No server answers, or it is shutting down."""


_CLASSES = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": Refused,
    "ABORTED": Refused,
    "ALREADY_EXISTS": Refused,
    "PERMISSION_DENIED": Refused,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unreachable,
}

_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


def error_of(code: int, message: str) -> KeepsetError:
    """The exception for a canonical code number."""
    name = _NAMES.get(code, "UNKNOWN")
    return _CLASSES.get(name, KeepsetError)(name, message)


def error_of_rpc(error: grpc.RpcError) -> KeepsetError:
    """The exception for a failed call."""
    code = error.code()
    return _CLASSES.get(code.name, KeepsetError)(code.name, error.details() or "")
