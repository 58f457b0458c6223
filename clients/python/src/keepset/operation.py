"""One operation streamed layer by layer."""

from __future__ import annotations

import queue
import threading

import grpc

from keepset import _codec, types
from keepset._request import Request
from keepset.errors import InvalidInput, KeepsetError, error_of, error_of_rpc
from keepset.v1 import compression_pb2


class Operation:
    """One operation on its own stream. Use from one thread.

    A reader thread takes credits and the reply; `observe` waits while the server grants no credit.
    """

    def __init__(self, request: Request):
        self._request = request
        self._next_layer = 0
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._credit = 0
        self._result: compression_pb2.OperationResult | None = None
        self._error: KeepsetError | None = None
        self._early: dict[int, types.LayerKept] = {}
        self._call = request.client_stub.CompressStream(
            iter(self._outgoing.get, None), timeout=request.timeout_seconds
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def observe(self, layer: types.Layer) -> None:
        """Sends the next layer. Raises what the server answered when it refused an earlier one."""
        message = self._request.layer_input(self._next_layer, layer)
        if self._next_layer == 0:
            self._send(begin=self._request.spec)
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self._ended())
            if self._error is not None:
                raise self._error
            self._credit -= 1
        self._send(layer=message)
        self._next_layer += 1

    def early_result(self, layer: int) -> types.LayerKept | None:
        """The keep set of a layer that a layer-local policy has answered already."""
        with self._changed:
            return self._early.get(layer)

    def finish(self) -> types.Result:
        """Ends the operation and waits for its result."""
        if self._next_layer == 0:
            self.cancel()
            raise InvalidInput("INVALID_ARGUMENT", "no layer was observed")
        self._send(end=compression_pb2.OperationEnd())
        with self._changed:
            self._changed.wait_for(self._ended)
        self.cancel()
        if self._result is None:
            assert self._error is not None
            raise self._error
        return self._request.result(self._result)

    def cancel(self) -> None:
        """Gives the operation up; idempotent."""
        self._outgoing.put(None)
        self._call.cancel()
        self._reader.join()
        if self._result is None:
            self._request.abandon(self._error)

    def _ended(self) -> bool:
        return self._result is not None or self._error is not None

    def _send(self, **step) -> None:
        self._outgoing.put(compression_pb2.StreamRequest(operation_id=1, **step))

    def _read(self) -> None:
        error = KeepsetError("UNAVAILABLE", "the stream ended without a result")
        try:
            for response in self._call:
                with self._changed:
                    self._take(response)
                    self._changed.notify_all()
        except grpc.RpcError as failed:
            error = error_of_rpc(failed)
        with self._changed:
            if not self._ended():
                self._error = error
            self._changed.notify_all()

    def _take(self, response: compression_pb2.StreamResponse) -> None:
        step = response.WhichOneof("step")
        if step == "credit":
            self._credit += response.credit.layer_inputs
        elif step == "layer":
            seq_len = self._request.spec.seq_len
            self._early[response.layer.layer] = _codec.layer_kept(response.layer, seq_len)
        elif step == "result":
            self._result = response.result
        elif step == "error":
            self._error = error_of(response.error.code, response.error.message)
