"""Times of PyTorch on the work that gpu_bench times, on the same device: JSON lines on stdout.

Usage: peers.py [--quick]. Exit codes: 0 done, 3 no torch or no device (stderr says which).

Peers are written here from what they compute: `repeat_kv` is the operator sequence of a press that
copies K to all query heads and masks in full-size tensors; `grouped` multiplies per KV head without the
copy and masks the last positions only; `grouped_compiled` is the same under torch.compile.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM, ROWS = 32, 32, 8, 128, 64
GROUP = QO_HEADS // KV_HEADS


def repeat_kv(torch: Any, q: Any, k: Any) -> Any:
    """Column means [QO_HEADS, T] of q [QO_HEADS, ROWS, d] over k [KV_HEADS, T, d]."""
    seq_len = k.shape[1]
    keys = k[:, None].expand(KV_HEADS, GROUP, seq_len, HEAD_DIM).reshape(QO_HEADS, seq_len, HEAD_DIM)
    weights = torch.matmul(q, keys.transpose(1, 2)) / HEAD_DIM**0.5
    mask = torch.ones_like(weights) * float("-inf")
    weights = weights + torch.triu(mask, diagonal=seq_len - ROWS + 1)
    return torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype).mean(dim=-2)


def grouped(torch: Any, q: Any, k: Any) -> Any:
    """The same without copying K, masking in place where rows end."""
    seq_len = k.shape[1]
    rows = q.reshape(KV_HEADS, GROUP * ROWS, HEAD_DIM)
    weights = torch.matmul(rows, k.transpose(1, 2)).float() * HEAD_DIM**-0.5
    weights = weights.reshape(QO_HEADS, ROWS, seq_len)
    tail = torch.ones(ROWS, ROWS, dtype=torch.bool, device=q.device).triu(1)
    weights[:, :, seq_len - ROWS :].masked_fill_(tail, float("-inf"))
    return torch.softmax(weights, dim=-1).mean(dim=-2)


def median_ms(torch: Any, repetitions: int, work: Callable[[], object]) -> float:
    """Wall-clock median of `work` queued and waited for, after two warm-ups."""
    times = []
    for run in range(repetitions + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if run >= 2:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def report(**fields: object) -> None:
    """One JSON line."""
    print(json.dumps(fields), flush=True)


def time_scores(torch: Any, seq_len: int, repetitions: int) -> None:
    """Window scores of LAYERS layers; layers share inputs where memory asks for it."""
    layer_bytes = seq_len * KV_HEADS * HEAD_DIM * 2
    distinct = max(1, min(LAYERS, int(torch.cuda.mem_get_info()[0] * 0.5) // layer_bytes))
    keys = [torch.randn(KV_HEADS, seq_len, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(distinct)]
    q = torch.randn(QO_HEADS, ROWS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda a, b: grouped(torch, a, b))
    for name, fn in (
        ("repeat_kv", lambda a, b: repeat_kv(torch, a, b)),
        ("grouped", lambda a, b: grouped(torch, a, b)),
        ("grouped_compiled", compiled),
    ):
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms = median_ms(torch, repetitions, lambda: [fn(q, keys[i % distinct]) for i in range(LAYERS)][-1])
            peak = torch.cuda.max_memory_allocated() - before
        except Exception as error:  # noqa: BLE001 - a peer that cannot run is reported, not fatal
            report(peer=name, seq_len=seq_len, error=str(error).splitlines()[0])
            continue
        report(peer=name, seq_len=seq_len, layers=LAYERS, distinct_layers=distinct, ms=ms, peak_bytes=peak)


def main() -> int:
    """Runs every peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prompts, few repetitions")
    quick = parser.parse_args().quick
    try:
        import torch
    except ImportError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("peers: no device that torch can use", file=sys.stderr)
        return 3
    report(peer="torch", version=torch.__version__, device=torch.cuda.get_device_name())
    repetitions = 3 if quick else 11
    with torch.inference_mode():
        for seq_len in (1024, 4096) if quick else (1024, 4096, 32768, 131072):
            time_scores(torch, seq_len, repetitions)
        scores = torch.rand(32, 32768, device="cuda")
        ms = median_ms(torch, repetitions, lambda: torch.topk(scores, 512, dim=-1))
        report(peer="torch.topk", rows=32, length=32768, k=512, us=ms * 1e3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
