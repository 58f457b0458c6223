"""Writes a prefill as a capture file, the input of `keepset compress`."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from keepset.eval.small_model import LayerObservation

FORMAT_VERSION = 1


class Observed(Protocol):
    """What a capture takes of a prefill: the small model's Prefill, or keepset.adapters.hf's."""

    @property
    def input_ids(self) -> npt.NDArray[np.int32]: ...  # [T]
    @property
    def row_positions(self) -> npt.NDArray[np.int64]: ...  # [W]
    @property
    def layers(self) -> Sequence[LayerObservation]: ...
    @property
    def token_logprobs(self) -> npt.NDArray[np.float32]: ...  # [T]
    @property
    def softmax_scale(self) -> float: ...
    @property
    def seq_len(self) -> int: ...


def write_capture(path: str | pathlib.Path, prefill: Observed, model: dict[str, Any], *,
                  dtype: npt.DTypeLike = np.float32, ppl: float | None = None,
                  spans: Sequence[tuple[str, int, int]] = ()) -> None:
    """Writes queries, K, V, LSE, log-probabilities and ids of `prefill`; replaces a file at `path`.

    `model` is the fingerprint, see `SmallModel.fingerprint`. `dtype` (float32 or float16) is that
    of queries, K and V. Log-probabilities are those of the last W tokens, W the number of observed
    rows; they are left out when that reaches the first token, which has none, and a given `ppl`
    wins over them. `spans` are (name, begin, end).
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise ValueError(f"dtype={dtype}, want float32 or float16")
    num_qo_heads, window, head_dim = prefill.layers[0].q_window.shape
    document: dict[str, Any] = {
        "format": "keepset.capture",
        "format_version": FORMAT_VERSION,
        "model": model,
        "seq_len": prefill.seq_len,
        "window": window,
        "num_layers": len(prefill.layers),
        "num_qo_heads": num_qo_heads,
        "num_kv_heads": len(prefill.layers[0].k),
        "head_dim": head_dim,
        "softmax_scale": prefill.softmax_scale,
    }
    if ppl is not None:
        document["ppl"] = float(ppl)
    if spans:
        for name, begin, end in spans:
            if not 0 <= begin < end <= prefill.seq_len:
                raise ValueError(f"span {name}: {begin}..{end}, want 0 <= begin < end <= "
                                 f"{prefill.seq_len}")
        document["spans"] = [{"name": name, "begin": begin, "end": end}
                             for name, begin, end in spans]

    tensors: dict[str, npt.NDArray[Any]] = {}
    for index, layer in enumerate(prefill.layers):
        tensors[f"layers.{index}.q_window"] = layer.q_window.astype(dtype)
        tensors[f"layers.{index}.k"] = layer.k.astype(dtype)
        tensors[f"layers.{index}.v"] = layer.v.astype(dtype)
        tensors[f"layers.{index}.window_lse"] = layer.window_lse.astype(np.float32)
    tensors["input_ids"] = prefill.input_ids.astype(np.int32)
    if not np.array_equal(prefill.row_positions, np.arange(prefill.seq_len)[-window:]):
        tensors["row_positions"] = prefill.row_positions.astype(np.int64)
    if window < prefill.seq_len:
        tensors["window_logprobs"] = prefill.token_logprobs[-window:].astype(np.float32)
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
                   metadata={"keepset": json.dumps(document)})
    target = pathlib.Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
