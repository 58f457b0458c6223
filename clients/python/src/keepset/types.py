"""Plain data of a request and its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Sequence

import numpy as np

#: Marks arrays of bfloat16 bits, which numpy has no type for: pass uint16 arrays and this dtype.
BFLOAT16 = "bfloat16"


@dataclasses.dataclass(frozen=True)
class ModelFingerprint:
    """Which model a request comes from; tables are matched on it."""

    architecture: str
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rope: dict | None = None
    revision: str = ""

    def to_json(self) -> dict:
        out = dataclasses.asdict(self)
        if self.rope is None:
            del out["rope"]
        if not self.revision:
            del out["revision"]
        return out

    def rope_json(self) -> str:
        return "" if self.rope is None else json.dumps(self.rope, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much may stay: one of tokens per layer, kept fraction, bytes per layer, or the table's default."""

    num_tokens: int | None = None
    kept_fraction: float | None = None
    num_bytes: int | None = None

    @staticmethod
    def tokens(count: int) -> Budget:
        return Budget(num_tokens=count)

    @staticmethod
    def fraction(kept_fraction: float) -> Budget:
        return Budget(kept_fraction=kept_fraction)

    @staticmethod
    def bytes(count: int) -> Budget:
        return Budget(num_bytes=count)

    @staticmethod
    def table_default() -> Budget:
        return Budget()

    @staticmethod
    def compression_ratio(ratio: float, seq_len: int) -> Budget:
        """kvpress' fraction *removed*, converted exactly as there."""
        return Budget.tokens(kept_tokens_of_compression_ratio(ratio, seq_len))

    def capacity(self, seq_len: int, bytes_per_token: int) -> int:
        """Rows a destination must offer: never more than seq_len."""
        if self.num_tokens is not None:
            return max(0, min(seq_len, self.num_tokens))
        if self.kept_fraction is not None:
            return max(1, min(seq_len, int(seq_len * self.kept_fraction)))
        if self.num_bytes is not None and bytes_per_token > 0:
            return max(0, min(seq_len, self.num_bytes // bytes_per_token))
        return seq_len


def kept_tokens_of_compression_ratio(ratio: float, seq_len: int) -> int:
    """int(T * (1 - r)) in double: T = 1000, r = 0.9 gives 99."""
    return int(seq_len * (1 - ratio))


@dataclasses.dataclass(frozen=True)
class Span:
    """Positions [begin, end) that must stay."""

    begin: int
    end: int
    name: str = ""


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """How layers attend, by their index in the decoder.

    attention: "full", "sliding_window" (with the `window` that a row sees), "mla" or "linear". Only full
    attention is compressed: groups of another kind say left_out, or the operation is refused.
    """

    layers: tuple[int, ...]
    attention: str = "full"
    window: int = 0
    left_out: bool = False


@dataclasses.dataclass(frozen=True)
class TablePin:
    """Picks a table; every field that is set must match. A name alone: the active version, or the canary.

    alias: "stable", "canary" or the operator's own.
    """

    name: str = ""
    version: str = ""
    digest: str = ""
    alias: str = ""


@dataclasses.dataclass(frozen=True)
class TableIdentity:
    """The table that decided; `source` is its provenance ("uniform", "offline-calibration" ...)."""

    name: str
    version: str
    digest: str
    source: str


@dataclasses.dataclass(frozen=True)
class ShadowResult:
    """What the request's shadow table would have kept; with an `error` nothing else is set.

    kept_overlap: share of the positions kept here that it keeps too, mean over layers.
    """

    table: TableIdentity | None = None
    kept_overlap: float | None = None
    would_be_bytes: int | None = None
    error: str = ""


@dataclasses.dataclass
class PagedKv:
    """K or V of one layer in blocks: data [num_blocks, block_size, num_kv_heads, head_dim]."""

    data: np.ndarray
    block_table: Sequence[int] | np.ndarray
    dtype: str | None = None


@dataclasses.dataclass
class Layer:
    """What one layer brings. Arrays in a SharedRegion are passed by reference.

    q_window [H, W, d]; window_lse [H, W], by lse_base "e" or "2"; attn_tile [H, W, T]; k and v [Hkv, T, d], any
    strides with the last one contiguous, or PagedKv. dtype names the type of uint16 arrays ("bfloat16").
    column_stats [H, T] instead of q_window and attn_tile: their attention added up over the W observed
    rows ("sum") or divided by W too ("mean"); `num_rows` of the operation says W.
    qo_heads: ascending query heads that q_window, window_lse and attn_tile hold, where `input_needs` lists
    some: H is their number then. None: all heads.
    """

    q_window: np.ndarray | None = None
    k: np.ndarray | PagedKv | None = None
    v: np.ndarray | PagedKv | None = None
    window_lse: np.ndarray | None = None
    attn_tile: np.ndarray | None = None
    column_stats: np.ndarray | None = None
    column_reduction: str = "mean"
    dtype: str | None = None
    qo_heads: Sequence[int] | None = None
    lse_base: str = "e"


@dataclasses.dataclass
class KeepSet:
    """Ascending positions of one set and how they came about."""

    indices: np.ndarray  # int32 [kept]
    candidates: int
    filled: int


@dataclasses.dataclass
class LayerKept:
    """One layer's answer. `k` and `v` only when gathered: [Hkv, n, d] of a shared set, or one [n, d] per
    KV head; with outcome kept_full the caller's own arrays, and gathered in place their first rows, or the
    blocks that hold these. They are views of shared memory where the
    transport allows; valid until the client is closed or `Result.release` was called."""

    sets: list[KeepSet]
    tau: float | None = None
    entropy: float | None = None
    entropy_bin: int | None = None
    k: np.ndarray | list[np.ndarray] | PagedKv | None = None
    v: np.ndarray | list[np.ndarray] | PagedKv | None = None

    @property
    def keep_indices(self) -> np.ndarray:
        """The shared set; use `sets` in scope kv_head."""
        if len(self.sets) != 1:
            raise ValueError(f"{len(self.sets)} sets, one per KV head: read `sets`")
        return self.sets[0].indices


@dataclasses.dataclass(frozen=True)
class LayerNeeds:
    """What one layer has to bring. Empty lists of heads mean all heads."""

    layer: int
    queries: bool
    keys: bool
    values: bool
    qo_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    columns: bool = False  # column_stats serve instead of queries and keys


@dataclasses.dataclass(frozen=True)
class InputNeeds:
    """What a worker has to send for an operation; layers that are not listed may be left out.

    rows: which rows observe, of "last_row", "observed_rows" and "probe_rows". probe: name and text.
    max_rows: the last of the observed rows that are read, and the most that column_stats may stand for;
    0: all.
    """

    layers: tuple[LayerNeeds, ...]
    rows: tuple[str, ...]
    ppl: bool
    probe: tuple[str, str] | None
    table: TableIdentity | None = None
    max_rows: int = 0


@dataclasses.dataclass
class Result:
    """The answer of one operation. `outcome` is "compressed", "kept_full" or "shadow"."""

    outcome: str
    reason: str
    policy: str
    scope: str
    seq_len: int
    budget_tokens: int
    layers: list[LayerKept]
    table: TableIdentity | None
    entropy: float | None
    ppl: float | None
    entropy_bin: int | None
    ppl_bin: int | None
    has_candidates: bool
    defaulted_inputs: list[str]
    relaxed: list[str]
    backend: str
    transport: str
    bytes_before: int
    bytes_after: int
    stage_seconds: dict[str, float]
    # Share of the score outside the cut, and the miss rate the table's calibration predicts for it.
    outside_mass: float | None = None
    predicted_miss_rate: float | None = None
    shadow: ShadowResult | None = None  # when the request named a shadow_table
    layers_left_out: tuple[int, ...] = ()  # of the request's layer_groups, by index in the decoder
    _release: object = None

    def sets(self) -> list:
        """Per layer the shared set, or the list of sets per KV head."""
        return [layer.sets[0].indices if len(layer.sets) == 1 else [one.indices for one in layer.sets]
                for layer in self.layers]

    @property
    def compression_spec(self) -> str:
        """What a prefix cache adds to the key of a compacted block: the block's content no longer follows
        from its tokens alone. Equal for equal keep sets of the same policy, table, scope and budget; empty
        where nothing was dropped."""
        if self.outcome != "compressed":
            return ""
        sets = hashlib.sha256()
        for layer in self.layers:
            for one in layer.sets:
                sets.update(len(one.indices).to_bytes(8, "little"))
                sets.update(np.ascontiguousarray(one.indices, "<i4").tobytes())
        table = self.table.digest if self.table else "-"
        return (f"keepset/1 policy={self.policy} table={table} scope={self.scope} "
                f"budget={self.budget_tokens} sets={sets.hexdigest()}")

    @property
    def service_seconds(self) -> float:
        """Time of all stages inside the service."""
        return sum(self.stage_seconds.values())

    def release(self) -> None:
        """Gives the gathered memory back for the next operation; `k` and `v` become invalid."""
        if callable(self._release):
            self._release()
            self._release = None
