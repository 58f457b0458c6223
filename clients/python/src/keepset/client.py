"""Typed client of keepsetd."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import grpc
import numpy as np

from keepset import _codec, types
from keepset._request import Request
from keepset._side_socket import SideSocket
from keepset.channel import TlsFiles, open_channel
from keepset.device_memory import LIBCUDA, DeviceRegion, ServiceDeviceRegion
from keepset.errors import InvalidInput, KeepsetError, error_of_rpc
from keepset.memory import SharedRegion
from keepset.operation import Operation
from keepset.v1 import (
    common_pb2,
    compression_pb2,
    compression_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

TransportName = Literal["auto", "memfd", "inline"]


class Client:
    """One session with a server. Calls may come from several threads; arrays are the caller's.

    `transport` says how tensors travel: "memfd" by descriptor, "inline" in the message, "auto" memfd when
    the server passes descriptors. The choice made is `client.transport`, never silent.
    """

    def __init__(self, channel: grpc.Channel, transport: TransportName, timeout_seconds: float,
                 engine: str):
        self._channel = channel
        self.timeout_seconds = timeout_seconds
        self.compression_stub = compression_pb2_grpc.CompressionServiceStub(channel)
        self._sessions = session_pb2_grpc.SessionServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._regions: list[tuple[SharedRegion | DeviceRegion | ServiceDeviceRegion, str]] = []
        self._spare: list[SharedRegion] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._draining = threading.Event()
        self._side: SideSocket | None = None
        self._client_uuid = uuid.uuid4().bytes
        opened = self._call(
            self._sessions.OpenSession,
            session_pb2.OpenSessionRequest(
                client_uuid=self._client_uuid, engine=engine, pid_hint=os.getpid()
            ),
        )
        self.session_id = opened.session_id
        self.transport = "inline"
        if transport != "inline":
            if opened.side_socket_path:
                self._side = SideSocket(
                    opened.side_socket_path, opened.side_socket_token, timeout_seconds
                )
                self.transport = "memfd"
            elif transport == "memfd":
                raise KeepsetError(
                    "FAILED_PRECONDITION", "the server passes no descriptors; use transport='inline'"
                )
        self._beat = threading.Thread(
            target=self._keep_alive, args=(max(1, opened.heartbeat_seconds),), daemon=True
        )
        self._beat.start()

    @staticmethod
    def connect(address: str, *, transport: TransportName = "auto", timeout_seconds: float = 30.0,
                engine: str = "python", tls: TlsFiles | None = None) -> Client:
        """Opens a session. `address`: "unix:/path" or "host:port"; `tls` for the latter.

        Raises Unreachable, and InvalidInput for TLS files that cannot be used.
        """
        channel = open_channel(address, tls)
        try:
            return Client(channel, transport, timeout_seconds, engine)
        except BaseException:
            channel.close()
            raise

    @property
    def draining(self) -> bool:
        """The server said that it is shutting down: retire what is held of its own memory, which ends with it."""
        return self._draining.is_set()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; the server releases all of its regions."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            owned = [entry for entry in self._regions if entry[0].owned_by_server]
        for region, _ in owned:
            # What the server does not hear it keeps from others until this process ends.
            with contextlib.suppress(KeepsetError):
                self.retire(region)
        try:
            self._call(
                self._sessions.CloseSession,
                session_pb2.CloseSessionRequest(session_id=self.session_id),
            )
        except KeepsetError:
            pass  # The hang-up below ends the session as well.
        if self._side is not None:
            self._side.close()
        self._beat.join()
        self._channel.close()
        for region, _ in self._regions:
            region.close()

    def shared_region(self, num_bytes: int, *, writable_by_server: bool = False) -> SharedRegion:
        """A new registered memory region; arrays made in it travel by reference."""
        if self._side is None:
            raise KeepsetError("FAILED_PRECONDITION", "shared regions need transport 'memfd'")
        region = SharedRegion(num_bytes)
        try:
            self._register(
                region,
                session_pb2.RegisterRegionRequest(
                    kind="memfd",
                    fd_token=self._side.pass_fd(region.fd),
                    allocation_bytes=region.size_bytes,
                    length=region.size_bytes,
                ),
                writable_by_server,
            )
        except BaseException:
            region.close()
            raise
        return region

    def register(self, region: DeviceRegion, *, writable_by_server: bool = False) -> None:
        """Makes device memory known to a server that lists `region.kind` among its transports.

        Layers then name it by `region.array(tensor)`. `retire` and `close` close the region.
        """
        if self._side is None:
            raise KeepsetError("FAILED_PRECONDITION", "device memory needs transport 'memfd'")
        request = session_pb2.RegisterRegionRequest(
            kind=region.kind,
            allocation_bytes=region.allocation_bytes,
            offset=region.offset,
            length=region.size_bytes,
            device_uuid=region.device_uuid,
            generation=region.generation,
        )
        if region.fd >= 0:
            request.fd_token = self._side.pass_fd(region.fd)
        else:
            request.ipc_handle = region.ipc_handle
        self._register(region, request, writable_by_server)

    def allocate_region(self, num_bytes: int, *, kind: str = "memfd", device_uuid: str = "",
                        library: str = LIBCUDA) -> SharedRegion | ServiceDeviceRegion:
        """Fresh zeroed memory of the server's own that it may write: kept from others until
        `retire`, for as long as the session lives.

        kind: "memfd", or "cuda_ipc" or "cuda_vmm" with the `device_uuid` of one of server_info().devices. Arrays made in it
        travel by reference; no array of it is to be used after `retire` or `close`. library: the CUDA driver.
        Raises Overloaded where a limit of the server's is reached, KeepsetError FAILED_PRECONDITION where it
        gives no such memory.
        """
        if self._side is None:
            raise KeepsetError("FAILED_PRECONDITION", "the server's memory needs transport 'memfd'")
        if num_bytes < 1:
            raise InvalidInput("INVALID_ARGUMENT", f"num_bytes={num_bytes}, want at least 1")
        if kind == "memfd":
            num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        reply = self._call(
            self._sessions.AllocateRegion,
            session_pb2.AllocateRegionRequest(
                session_id=self.session_id, name=f"region-{uuid.uuid4().hex[:12]}", kind=kind,
                length=num_bytes, device_uuid=device_uuid,
            ),
        )
        try:
            if reply.WhichOneof("descriptor") == "ipc_handle":
                region = ServiceDeviceRegion(reply.ipc_handle, num_bytes, device_uuid, library)
            elif kind == "memfd":
                region = SharedRegion.of_server(self._side.fetch_fd(reply.fd_token), num_bytes)
            else:
                fd = self._side.fetch_fd(reply.fd_token)
                try:
                    region = ServiceDeviceRegion.of_descriptor(
                        fd, reply.allocation_bytes, num_bytes, device_uuid, library
                    )
                finally:
                    os.close(fd)
        except BaseException:
            # What the server does not hear it keeps until the session ends; the first error is the cause.
            with contextlib.suppress(KeepsetError):
                self._retire_id(reply.region_id)
            raise
        with self._lock:
            self._regions.append((region, reply.region_id))
        return region

    def _register(self, region: SharedRegion | DeviceRegion,
                  request: session_pb2.RegisterRegionRequest, writable_by_server: bool) -> None:
        request.session_id = self.session_id
        request.name = f"region-{uuid.uuid4().hex[:12]}"
        request.access = (
            session_pb2.REGION_ACCESS_READ_WRITE
            if writable_by_server
            else session_pb2.REGION_ACCESS_READ_ONLY
        )
        registered = self._call(self._sessions.RegisterRegion, request)
        with self._lock:
            self._regions.append((region, registered.region_id))

    def retire(self, region: SharedRegion | DeviceRegion | ServiceDeviceRegion) -> None:
        """Unregisters a region; returns when no operation uses it any more.

        Device memory of the server's own is unmapped before the server, which frees it then, is told; where
        that fails the server is not told. Host
        memory (memfd) stays mapped while arrays of it, or the region, live: the kernel keeps its pages.
        """
        with self._lock:
            found = next((r for r in self._regions if r[0] is region), None)
        if found is None:
            raise InvalidInput("INVALID_ARGUMENT", "this region is not registered with this client")
        if region.owned_by_server:
            with self._lock:
                self._regions.remove(found)
            region.close()
            self._retire_id(found[1])
            return
        self._retire_id(found[1])
        with self._lock:
            self._regions.remove(found)
        region.close()

    def _retire_id(self, region_id: str) -> None:
        self._call(
            self._sessions.RetireRegion,
            session_pb2.RetireRegionRequest(session_id=self.session_id, region_id=region_id),
        )

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Version, transports, policies, limits and active tables of the server."""
        return self._call(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())

    def statistics(self, *, own_session: bool = False) -> server_pb2.GetStatisticsResponse:
        """Ended operations by model, policy and table, with outcomes and times, since the server began.

        own_session: this client's operations alone.
        """
        session_id = self.session_id if own_session else ""
        return self._call(self._server.GetStatistics,
                          server_pb2.GetStatisticsRequest(session_id=session_id))

    def input_needs(self, *, model: types.ModelFingerprint, policy: str,
                    parameters: Mapping[str, object] | None = None,
                    table: types.TablePin = types.TablePin()  # noqa: B008 - frozen
                    ) -> types.InputNeeds:
        """What an operation of this policy and table reads, so that nothing else has to be sent."""
        spec = Request(self, model=model, seq_len=1, policy=policy, parameters=parameters,
                       table=table).spec
        reply = self._call(self.compression_stub.GetRequirements,
                           compression_pb2.GetRequirementsRequest(spec=spec))
        return _codec.input_needs(reply)

    def compress(self, *, layers: Sequence[types.Layer] | Mapping[int, types.Layer],
                 **spec) -> types.Result:
        """One operation in one call. Keywords are those of `begin`.

        `layers` by index where the policy does not read them all (`input_needs`).
        """
        operation = Request(self, **spec)
        listed = sorted(layers.items()) if isinstance(layers, Mapping) else enumerate(layers)
        # The first layer completes the spec, so the inputs are built before it.
        try:
            inputs = [operation.layer_input(index, layer) for index, layer in listed]
            operation.complete()
            request = compression_pb2.CompressRequest(spec=operation.spec, layers=inputs)
            response = self._call(self.compression_stub.Compress, request)
        except BaseException as error:
            operation.abandon(error)
            raise
        return operation.result(response.result)

    def begin(self, **spec) -> Operation:
        """Starts an operation on a stream: `observe` each layer as it is computed, then `finish`.

        model: ModelFingerprint. seq_len: T. softmax_scale. policy: name; parameters: mapping.
        budget: Budget, default the table's. scope: name, default the policy's own.
        num_rows / row_positions: the observed rows, default the last W of q_window or attn_tile.
        protect_sink, protect_window, protect_spans: positions that stay, inside the budget.
        ppl or window_logprobs: the prompt signal a gated table needs. table: TablePin.
        shadow_table: TablePin of a table that is asked too and never applied, see `Result.shadow`.
        shadow: decide and report only. gather: also return compacted K and V; "in_place": the kept rows
        move to the front of `k` and `v` themselves, arrays in a region that the server may write. After an
        error of code DATA_LOSS, and when a whole operation was sent and not answered, they are lost.
        shared_prefix_tokens: first positions whose blocks other sequences use; refused with "in_place".
        kv_dtype: "float32", "float16" or "bfloat16", of the cache where no layer shows it and of uint16 arrays
        that do not name theirs.
        layer_groups: how the decoder's layers attend; those not left out are the operation's layers.
        deadline_ms: past it the outcome is kept_full. request_id: for the log.
        """
        return Operation(Request(self, **spec))

    def _call(self, method, request):
        try:
            return method(request, timeout=self.timeout_seconds)
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error

    def _keep_alive(self, seconds: float) -> None:
        def beats() -> Iterator[session_pb2.LeaseBeat]:
            while not self._closed.is_set():
                yield session_pb2.LeaseBeat(session_id=self.session_id)
                self._closed.wait(seconds)

        try:
            for notice in self._sessions.Lease(beats()):
                if notice.draining:
                    self._draining.set()
                if self._closed.is_set():
                    return
        except grpc.RpcError:
            return  # A lost server shows at the next call.

    def slice_of(self, array: np.ndarray) -> common_pb2.RegionSlice | None:
        num_bytes = _codec.span_bytes(array)
        with self._lock:
            regions = list(self._regions)
        for region, region_id in regions:
            offset = region.offset_of(array)
            if offset is not None:
                return common_pb2.RegionSlice(region_id=region_id, offset=offset, length=num_bytes)
        return None

    def take_spare(self, num_bytes: int) -> SharedRegion:
        """A read-write region of at least num_bytes for results or copied inputs, from the pool."""
        with self._lock:
            for region in self._spare:
                if region.size_bytes >= num_bytes:
                    self._spare.remove(region)
                    region.reset()
                    return region
        return self.shared_region(num_bytes, writable_by_server=True)

    def give_spare(self, region: SharedRegion) -> None:
        with self._lock:
            self._spare.append(region)
