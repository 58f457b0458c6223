"""One prompt of the small model, compressed by the service and answered from what was kept."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

import keepset
from keepset.eval import facts
from keepset.eval.kv_cache import KvCache
from keepset.eval.small_model import Prefill, SmallModel

WINDOW = 16  # observed rows


@dataclasses.dataclass
class SharedPrefill:
    """A prefill whose queries, K and V lie in shared memory."""

    prefill: Prefill
    layers: list[keepset.Layer]


@dataclasses.dataclass
class Score:
    """Sums over the prompts of one row and column of the table."""

    exact: int = 0
    questions: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    service_seconds: float = 0.0
    operations: int = 0


def fingerprint(model: SmallModel) -> keepset.ModelFingerprint:
    return keepset.ModelFingerprint(**model.fingerprint())


def share(client: keepset.Client, prefill: Prefill) -> SharedPrefill:
    """Puts one prefill into a registered region, as an engine would have it there already."""
    arrays = [array for layer in prefill.layers for array in (layer.q_window, layer.k, layer.v)]
    region = client.shared_region(sum(array.nbytes + 64 for array in arrays))
    layers = [
        keepset.Layer(
            q_window=region.place(layer.q_window), k=region.place(layer.k), v=region.place(layer.v)
        )
        for layer in prefill.layers
    ]
    return SharedPrefill(prefill, layers)


def compress(client: keepset.Client, model: SmallModel, shared: SharedPrefill, policy: str,
             budget: keepset.Budget, **spec) -> keepset.Result:
    """Hands the prompt over by reference and returns keep sets and compacted K/V.

    The observed rows stay, inside the budget, as snapkv keeps them by definition.
    """
    return client.compress(
        model=fingerprint(model),
        seq_len=shared.prefill.seq_len,
        softmax_scale=model.config.softmax_scale,
        layers=shared.layers,
        policy=policy,
        budget=budget,
        ppl=shared.prefill.perplexity(WINDOW),
        gather=True,
        protect_window=WINDOW,
        **spec,
    )


def cache_of(result: keepset.Result) -> KvCache:
    """The compacted cache, built from the bytes that came back."""
    keep = [
        [one.indices for one in layer.sets] if len(layer.sets) > 1 else layer.sets[0].indices
        for layer in result.layers
    ]
    return KvCache.from_compacted(
        keep,
        [_rows(layer.k) for layer in result.layers],
        [_rows(layer.v) for layer in result.layers],
    )


def _rows(kv: object) -> list[np.ndarray]:
    """Rows of each KV head, whether the sets are shared or not."""
    assert isinstance(kv, (np.ndarray, list)), "gather was asked for"
    return list(kv)


def answer_inside(model: SmallModel, prefill: Prefill, cache: KvCache) -> tuple[str, ...]:
    """The prompt ended in the question: its last word is read again from what was kept."""
    last = prefill.seq_len - 1
    return tuple(
        model.detokenize(
            model.decode(cache.before(last), prefill.input_ids[-1:], last, facts.ANSWER_WORDS)
        )
    )


def answer_later(model: SmallModel, prefill: Prefill, cache: KvCache,
                 fact: facts.Fact) -> tuple[str, ...]:
    """The question comes after compression."""
    ids = model.tokenize(fact.question)
    return tuple(
        model.detokenize(model.decode(cache, ids, prefill.seq_len, facts.ANSWER_WORDS))
    )


def run_inside(client: keepset.Client, model: SmallModel, prompts: Sequence[SharedPrefill],
               asked: Sequence[facts.Fact], policy: str, budget: keepset.Budget, **spec) -> Score:
    """Every prompt ends in its own question and is compressed as a whole."""
    score = Score()
    for shared, fact in zip(prompts, asked):
        result = compress(client, model, shared, policy, budget, **spec)
        answer = answer_inside(model, shared.prefill, cache_of(result))
        _add(score, result, int(answer == fact.answer), 1)
    return score


def run_later(client: keepset.Client, model: SmallModel, shared: SharedPrefill,
              asked: Sequence[facts.Fact], policy: str, budget: keepset.Budget, **spec) -> Score:
    """One context, compressed once; all questions are asked of what was kept."""
    score = Score()
    result = compress(client, model, shared, policy, budget, **spec)
    cache = cache_of(result)
    exact = sum(answer_later(model, shared.prefill, cache, fact) == fact.answer for fact in asked)
    _add(score, result, exact, len(asked))
    return score


def _add(score: Score, result: keepset.Result, exact: int, questions: int) -> None:
    score.exact += exact
    score.questions += questions
    score.bytes_before += result.bytes_before
    score.bytes_after += result.bytes_after
    score.service_seconds += result.service_seconds
    score.operations += 1
    result.release()
