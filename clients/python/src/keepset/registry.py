"""A server's table registry: which table versions it has, which one unpinned requests get."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from keepset.channel import TlsFiles, open_channel
from keepset.errors import error_of_rpc
from keepset.v1 import table_pb2, table_pb2_grpc


def table_ref(text: str) -> table_pb2.TableRef:
    """"NAME", "NAME@VERSION", "NAME@sha256:HEX" or "NAME:ALIAS". Raises ValueError."""
    at = min((i for i in (text.find("@"), text.find(":")) if i >= 0), default=len(text))
    name, mark, rest = text[:at], text[at : at + 1], text[at + 1 :]
    if not name or (mark and not rest):
        raise ValueError(
            f'table "{text}", want NAME, NAME@VERSION, NAME@sha256:HEX or NAME:ALIAS'
        )
    if mark == ":":
        return table_pb2.TableRef(name=name, alias=rest)
    if rest.startswith("sha256:"):
        return table_pb2.TableRef(name=name, digest=rest)
    return table_pb2.TableRef(name=name, version=rest)


class TableRegistry:
    """TableService of one server. Tables are named as `table_ref` reads them; replies are the messages of
    keepset/v1/table.proto. Errors are those of `keepset.errors`. Thread-safe; opens no session.

    `actor` stands in the server's audit log; `expected_revision` of a write refuses it (code ABORTED) when the
    line has another revision by now, 0 takes whatever it is.
    """

    def __init__(self, channel: grpc.Channel, timeout_seconds: float, actor: str):
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._actor = actor
        self._stub = table_pb2_grpc.TableServiceStub(channel)

    @staticmethod
    def connect(address: str, *, timeout_seconds: float = 30.0, actor: str = "",
                tls: TlsFiles | None = None) -> TableRegistry:
        """`address`: "unix:/path" or "host:port"; does not wait for the server."""
        return TableRegistry(open_channel(address, tls), timeout_seconds, actor)

    def __enter__(self) -> TableRegistry:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def list(self, name: str = "", architecture: str = "") -> table_pb2.ListTablesResponse:
        """Every version; only one line, or one model's, where named."""
        return self._call(
            self._stub.List, table_pb2.ListTablesRequest(name=name, architecture=architecture)
        )

    def get(self, table: str) -> table_pb2.GetTableResponse:
        return self._call(self._stub.Get, table_pb2.GetTableRequest(table=table_ref(table)))

    def validate(self, content: bytes, signature: bytes = b"") -> table_pb2.ValidateTableResponse:
        """Whether `content` could be loaded there, and what would be noticed; changes nothing."""
        return self._call(
            self._stub.Validate,
            table_pb2.ValidateTableRequest(content=content, signature=signature),
        )

    def watch(self, name: str = "", *, until_active: str = "",
              timeout_seconds: float | None = None) -> Iterator[table_pb2.WatchTablesResponse]:
        """The state, then every change; ends when `until_active` is active.

        Raises KeepsetError DEADLINE_EXCEEDED when `timeout_seconds` pass before. Closing the generator ends
        the call.
        """
        request = table_pb2.WatchTablesRequest(name=name)
        if until_active:
            request.until_active.CopyFrom(table_ref(until_active))
        call = self._stub.Watch(request, timeout=timeout_seconds)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error
        finally:
            call.cancel()

    def wait_until_active(self, table: str, timeout_seconds: float) -> None:
        """Returns when the version is what unpinned requests get; raises as `watch` does."""
        for _ in self.watch(until_active=table, timeout_seconds=timeout_seconds):
            pass

    # Writers: the server must have been started with --table-writes.

    def load(self, content: bytes, *, expected_digest: str = "",
             signature: bytes = b"") -> table_pb2.LoadTableResponse:
        """Uploads a table file; it is checked completely and kept ready, nothing becomes active."""
        return self._call(
            self._stub.Load,
            table_pb2.LoadTableRequest(inline=content, expected_digest=expected_digest,
                                       signature=signature, actor=self._actor),
        )

    def activate(self, table: str, *, set_alias: str = "",
                 expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        return self._write(
            self._stub.Activate,
            table_pb2.ActivateTableRequest(table=table_ref(table), set_alias=set_alias),
            expected_revision,
        )

    def follow_newest(self, name: str,
                      expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        """The newest version of the watched directory is active again."""
        return self._write(
            self._stub.Activate,
            table_pb2.ActivateTableRequest(
                table=table_pb2.TableRef(name=name), follow_newest=True
            ),
            expected_revision,
        )

    def rollback(self, name: str, expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        """The previous active version; again: the one before it."""
        return self._write(
            self._stub.Rollback, table_pb2.RollbackTableRequest(name=name), expected_revision
        )

    def set_canary(self, table: str, percent: float, *, salt: str = "",
                   expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        """`percent` of the unpinned requests get `table`; 0 ends the canary."""
        return self._write(
            self._stub.SetCanary,
            table_pb2.SetCanaryRequest(table=table_ref(table), percent=percent, salt=salt),
            expected_revision,
        )

    def set_alias(self, name: str, alias: str, table: str = "",
                  expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        """Without `table` the alias is removed."""
        request = table_pb2.SetAliasRequest(name=name, alias=alias)
        if table:
            request.table.CopyFrom(table_ref(table))
        return self._write(self._stub.SetAlias, request, expected_revision)

    def unload(self, table: str, expected_revision: int = 0) -> table_pb2.TableWriteResponse:
        return self._write(
            self._stub.Unload,
            table_pb2.UnloadTableRequest(table=table_ref(table)),
            expected_revision,
        )

    def _write(self, method: Callable, request, expected_revision: int):
        request.actor = self._actor
        request.expected_revision = expected_revision
        return self._call(method, request)

    def _call(self, method: Callable, request):
        try:
            return method(request, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error
