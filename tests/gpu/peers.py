"""Times of PyTorch on the work that gpu_bench times, on the same device: JSON lines on stdout.

Usage: peers.py [--quick | --cpu]. Exit codes: 0 done, 3 no torch or no device (stderr says which).

Peers are written here from what they compute: the keep sets of SnapKV per KV head, and the kept rows of K
and V. `repeat_kv` is the operator sequence of a press: K copied to all query heads, masks in full-size
tensors, attention cast back to the queries' type, and a wait for the host where the window is padded.
`grouped` has none of that: products per KV head (whose logits torch rounds to the queries' type, where our
kernels keep fp32), the mask on the last positions alone, fp32 from the softmax on, means over rows and group
at once, as pooling along the positions commutes with them. `grouped_compiled` is
the same under torch.compile. `ms` is a prompt of all layers, `scores_ms` its window attention alone, as far
as the mean over rows: beside it stands `device_ms` of gpu_bench's window scores, which form the norms of all
values, too, but have no gaps between launches. `overlap` is the share of the positions kept by `grouped`
that a peer keeps too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

POOL_KERNEL = 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a model and its observed window; keeps `budget` rows of each KV head."""

    layers: int = 32
    qo_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rows: int = 64
    budget: int = 512

    @property
    def group(self) -> int:
        return self.qo_heads // self.kv_heads


SMALL = Shape(layers=2, qo_heads=4, kv_heads=2, head_dim=16, rows=8, budget=40)


def repeat_kv_scores(torch: Any, shape: Shape, q: Any, k: Any) -> Any:
    """Mean over the rows [qo_heads, T] of q [qo_heads, rows, d] attending to k [kv_heads, T, d]."""
    seq_len = k.shape[1]
    keys = k[:, None].expand(shape.kv_heads, shape.group, seq_len, shape.head_dim)
    keys = keys.reshape(shape.qo_heads, seq_len, shape.head_dim)
    weights = torch.matmul(q, keys.transpose(1, 2)) / shape.head_dim**0.5
    mask = torch.ones_like(weights) * float("-inf")
    weights = weights + torch.triu(mask, diagonal=seq_len - shape.rows + 1)
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : seq_len - shape.rows].mean(dim=-2)


def grouped_scores(torch: Any, shape: Shape, q: Any, k: Any) -> Any:
    """Mean over rows and group [kv_heads, T - rows], without copying K or writing a full mask."""
    seq_len = k.shape[1]
    rows = q.reshape(shape.kv_heads, shape.group * shape.rows, shape.head_dim)
    weights = torch.baddbmm(
        rows.new_zeros(()), rows, k.transpose(1, 2), beta=0, alpha=shape.head_dim**-0.5
    )
    weights = weights.reshape(shape.qo_heads, shape.rows, seq_len)
    later = torch.ones(shape.rows, shape.rows, dtype=torch.bool, device=q.device).triu(1)
    weights[:, :, seq_len - shape.rows :].masked_fill_(later, float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32)
    weights = weights.reshape(shape.kv_heads, shape.group * shape.rows, seq_len)
    return weights[..., : seq_len - shape.rows].mean(dim=-2)


def pooled(torch: Any, scores: Any) -> Any:
    """Averages over POOL_KERNEL positions; zeros beyond the ends count."""
    return torch.nn.functional.avg_pool1d(scores, POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)


def kept_rows(torch: Any, scores: Any, budget: int, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Positions [kv_heads, budget] of the highest scores, in their order, and the rows of K and V there."""
    positions = scores.topk(budget, dim=-1).indices
    index = positions[..., None].expand(-1, -1, k.shape[2])
    return positions, k.gather(1, index).contiguous(), v.gather(1, index).contiguous()


def repeat_kv(torch: Any, shape: Shape, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """One layer by the operator sequence of a press; `kept_rows` of it."""
    scores = pooled(torch, repeat_kv_scores(torch, shape, q, k))
    scores = scores.reshape(shape.kv_heads, shape.group, -1).mean(dim=1)
    # The host waits for the highest score.
    scores = torch.nn.functional.pad(scores, (0, shape.rows), value=scores.max().item() + 1)
    return kept_rows(torch, scores, shape.budget, k, v)


def grouped(torch: Any, shape: Shape, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The same with every operator it can do without left out."""
    scores = pooled(torch, grouped_scores(torch, shape, q, k))
    scores = torch.nn.functional.pad(scores, (0, shape.rows), value=float("inf"))
    return kept_rows(torch, scores, shape.budget, k, v)


class Clock:
    """Times work on `device`: by events on its stream, or by the host's clock on a CPU."""

    def __init__(self, torch: Any, device: str, repetitions: int):
        self._torch, self._device, self._repetitions = torch, device, repetitions

    def median_ms(self, work: Callable[[], object]) -> float:
        """After two warm-ups."""
        times = [self._once_ms(work) for _ in range(self._repetitions + 2)]
        return statistics.median(times[2:])

    def _once_ms(self, work: Callable[[], object]) -> float:
        if self._device == "cpu":
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def report(**fields: object) -> None:
    """One JSON line."""
    print(json.dumps(fields), flush=True)


class Bench:
    """Every peer on one device."""

    def __init__(self, torch: Any, device: str, shape: Shape, repetitions: int):
        self._torch, self._device, self._shape = torch, device, shape
        self._clock = Clock(torch, device, repetitions)
        # Without a device the graph is traced and run as it is: nothing is timed there.
        backend = "aot_eager" if device == "cpu" else "inductor"

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

        def grouped_whole(q: Any, k: Any, v: Any) -> Any:
            return grouped(torch, shape, q, k, v)

        def grouped_part(q: Any, k: Any) -> Any:
            return grouped_scores(torch, shape, q, k)

        self._peers = {
            "repeat_kv": (
                lambda q, k, v: repeat_kv(torch, shape, q, k, v),
                lambda q, k: repeat_kv_scores(torch, shape, q, k),
            ),
            "grouped": (grouped_whole, grouped_part),
            "grouped_compiled": (compiled(grouped_whole), compiled(grouped_part)),
        }

    def time_prompts(self, seq_len: int) -> None:
        """Prompts of `seq_len`; layers share K and V where memory asks for it."""
        torch, shape = self._torch, self._shape
        distinct = min(shape.layers, self._most_layers(seq_len))
        q = self._random(shape.qo_heads, shape.rows, shape.head_dim)
        keys = [self._random(shape.kv_heads, seq_len, shape.head_dim) for _ in range(distinct)]
        values = [torch.randn_like(keys[0]) for _ in range(distinct)]
        want = grouped(torch, shape, q, keys[0], values[0])[0]
        for name, (whole, scores) in self._peers.items():

            def prompt(layer_work: Callable[[int], object]) -> None:
                for layer in range(shape.layers):
                    layer_work(layer % distinct)

            try:
                before = self._reset_peak()
                ms = self._clock.median_ms(
                    lambda whole=whole: prompt(lambda i: whole(q, keys[i], values[i]))
                )
                peak = self._peak() - before
                overlap = self._overlap(whole(q, keys[0], values[0])[0], want)
                scores_ms = self._clock.median_ms(
                    lambda scores=scores: prompt(lambda i: scores(q, keys[i]))
                )
            except Exception as error:  # noqa: BLE001 - a peer that cannot run is reported, not fatal
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                report(peer=name, seq_len=seq_len, error=reason)
                continue
            report(
                peer=name, seq_len=seq_len, layers=shape.layers, distinct_layers=distinct,
                budget=shape.budget, ms=ms, scores_ms=scores_ms, peak_bytes=peak, overlap=overlap,
            )  # fmt: skip

    def time_topk(self, rows: int, length: int, k: int) -> None:
        """torch.topk alone; ties at the cut fall as they may."""
        calls = 10
        scores = self._torch.rand(rows, length, device=self._device)
        ms = self._clock.median_ms(
            lambda: [self._torch.topk(scores, k, dim=-1) for _ in range(calls)]
        )
        report(peer="torch.topk", rows=rows, length=length, k=k, us=ms * 1e3 / calls)

    @staticmethod
    def _overlap(positions: Any, want: Any) -> float:
        """Share of the positions `want` of a layer that are among `positions`."""
        same = (want[:, :, None] == positions[:, None, :]).any(dim=-1)
        return same.float().mean().item()

    def _random(self, *sizes: int) -> Any:
        return self._torch.randn(*sizes, device=self._device, dtype=self._torch.bfloat16)

    def _most_layers(self, seq_len: int) -> int:
        if self._device == "cpu":
            return self._shape.layers
        layer_bytes = 2 * seq_len * self._shape.kv_heads * self._shape.head_dim * 2
        return max(1, int(self._torch.cuda.mem_get_info()[0] * 0.5) // layer_bytes)

    def _reset_peak(self) -> int:
        if self._device == "cpu":
            return 0
        self._torch.cuda.reset_peak_memory_stats()
        return self._torch.cuda.memory_allocated()

    def _peak(self) -> int:
        return 0 if self._device == "cpu" else self._torch.cuda.max_memory_allocated()


def main() -> int:
    """Runs every peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prompts, few repetitions")
    parser.add_argument("--cpu", action="store_true",
                        help="small shapes without a device: shows that it runs, its times mean nothing")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 3
    if arguments.cpu:
        device, shape, lengths, repetitions = "cpu", SMALL, (97, 130), 1
    elif not torch.cuda.is_available():
        print("peers: no device that torch can use", file=sys.stderr)
        return 3
    elif arguments.quick:
        device, shape, lengths, repetitions = "cuda", Shape(), (1024, 4096), 3
    else:
        device, shape, lengths, repetitions = "cuda", Shape(), (1024, 4096, 32768, 131072), 11
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    report(peer="torch", version=torch.__version__, device=name)
    bench = Bench(torch, device, shape, repetitions)
    with torch.inference_mode():
        for seq_len in lengths:
            bench.time_prompts(seq_len)
        rows = (4, 16) if device == "cpu" else (32, 256)
        for one in rows:
            bench.time_topk(one, max(lengths) if device == "cpu" else 32768,
                            40 if device == "cpu" else 512)
    return 0


if __name__ == "__main__":
    sys.exit(main())
