"""The adapter on tiny models of each family; transformers itself and fp64 loops are the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    FULL,
    IMPLEMENTATIONS,
    MIXED,
    SHAPE,
    WINDOW,
    config_of,
    model_of,
    plain_model,
    soft_capped,
    windowed_everywhere,
)
from transformers.cache_utils import DynamicCache

from keepset.adapters.hf import HfModel
from keepset.types import LayerGroup

SEQ_LEN = 60
OBSERVED = 8
# fp32 sums in another order.
TOLERANCE = 2e-4

each_model = pytest.mark.parametrize(
    ("family", "implementation"), [(f, i) for f in FAMILIES for i in IMPLEMENTATIONS])


def prompt(seed: int = 0, length: int = SEQ_LEN) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SHAPE["vocab_size"], length)


def keep_sets(model: HfModel, seed: int, per_head: bool) -> list:
    """Random counts per layer, or per KV head."""
    rng = np.random.default_rng([seed, per_head])

    def one():
        return np.sort(rng.choice(SEQ_LEN, int(rng.integers(5, 30)), replace=False))

    return [[one(), one()] if per_head else one() for _ in model.full_layers]


def plain_logits(model: HfModel, ids: np.ndarray, fed: np.ndarray) -> np.ndarray:
    """Transformers alone: prefill, then all of `fed` at once from its own cache."""
    cache = DynamicCache(config=model.model.config)
    with torch.no_grad():
        model.model(input_ids=torch.as_tensor(ids)[None], past_key_values=cache, use_cache=True)
        return model.model(input_ids=torch.as_tensor(fed)[None], past_key_values=cache,
                           use_cache=True).logits[0].float().numpy()


class HideDropped:
    """The reference of a compaction: nothing is removed, dropped positions are masked."""

    def __init__(self, model: HfModel, keeps: list):
        self._implementation = model.model.config._attn_implementation
        self._keeps = dict(zip(model.full_layers, keeps))

    def attend(self, layer_index, query, key, mask, scaling):
        if layer_index not in self._keeps:
            return mask
        keep = self._keeps[layer_index]
        heads = [keep] * 2 if isinstance(keep, np.ndarray) else keep
        num_new, num_keys = query.shape[2], key.shape[2]
        visible = torch.ones(1, 4, num_new, num_keys, dtype=torch.bool).tril(num_keys - num_new)
        for head in range(4):
            dropped = np.setdiff1d(np.arange(SEQ_LEN), heads[head // 2])
            visible[:, head, :, dropped] = False
        return visible if self._implementation == "sdpa" else torch.where(visible, 0.0, -torch.inf)


def masked_logits(model: HfModel, prefill, keeps: list, fed: np.ndarray) -> np.ndarray:
    with torch.no_grad(), model._running(reference := HideDropped(model, keeps)):
        return model._forward(fed[None], prefill.cache.fork(), SEQ_LEN, reference)[0].numpy()


@each_model
def test_keeping_everything_changes_no_bit(family, implementation):
    model = model_of(family, implementation)
    ids, fed = prompt(), prompt(1, 7)
    prefill = model.prefill(ids, OBSERVED)
    everything = [np.arange(SEQ_LEN)] * len(model.full_layers)
    found = model.score(prefill.compact(everything), fed, SEQ_LEN)
    assert np.array_equal(found, plain_logits(model, ids, fed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sixteen_bit_models_are_observed_in_fp32_and_compacted_in_their_own_type(implementation):
    plain = plain_model(config_of("llama"), implementation).to(torch.bfloat16)
    model = HfModel(plain, "bf16")
    ids, fed = prompt(), prompt(1, 7)
    prefill = model.prefill(ids, OBSERVED)
    everything = [np.arange(SEQ_LEN)] * 4
    cache = prefill.compact(everything)
    assert np.array_equal(model.score(cache, fed, SEQ_LEN), plain_logits(model, ids, fed))
    # One unused row in a head, so that its mask is an additive one in eager attention.
    ragged = prefill.compact([[np.arange(SEQ_LEN), np.arange(1, SEQ_LEN)]] * 4)
    assert np.isfinite(model.score(ragged, fed, SEQ_LEN)).all()
    assert {layer.keys.dtype for layer in (*cache.layers, *ragged.layers)} == {torch.bfloat16}
    for layer, one in enumerate(prefill.layers):
        assert {getattr(one, name).dtype for name in ("q_window", "k", "v", "window_lse")} == {
            np.dtype(np.float32)}
        assert np.array_equal(one.k, prefill.cache.layers[layer].keys[0].float().numpy())


@pytest.mark.parametrize("per_head", [False, True], ids=["per_layer", "per_head"])
@each_model
def test_a_compacted_cache_answers_as_if_the_rest_were_masked(family, implementation, per_head):
    model = model_of(family, implementation)
    prefill = model.prefill(prompt(), OBSERVED)
    fed = prompt(2, 6)
    for seed in range(2):
        keeps = keep_sets(model, seed, per_head)
        cache = prefill.compact(keeps)
        for many in (fed[:1], fed):
            np.testing.assert_allclose(model.score(cache, many, SEQ_LEN),
                                       masked_logits(model, prefill, keeps, many), atol=TOLERANCE)
    assert np.abs(model.score(cache, fed, SEQ_LEN)
                  - model.score(prefill.full_cache(), fed, SEQ_LEN)).max() > 100 * TOLERANCE


@each_model
def test_the_next_token_has_its_original_position(family, implementation):
    model = model_of(family, implementation)
    cache = model.prefill(prompt(), OBSERVED).compact(keep_sets(model, 3, per_head=False))
    rotated = []
    hook = model.model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: rotated.append(
            (kwargs | dict(zip(("x", "position_ids"), args)))["position_ids"][0].tolist()),
        with_kwargs=True)
    with hook:
        model.decode(cache, prompt(4, 3), SEQ_LEN, 3)
    assert [*dict.fromkeys(sum(rotated, []))] == [*range(SEQ_LEN, SEQ_LEN + 5)]
    assert cache.fork().get_seq_length(model.full_layers[0]) == SEQ_LEN


@each_model
def test_a_second_question_finds_the_same_cache(family, implementation):
    model = model_of(family, implementation)
    keeps = keep_sets(model, 5, per_head=True)
    asked_once = model.prefill(prompt(), OBSERVED).compact(keeps)
    second = model.decode(asked_once, prompt(6, 4), SEQ_LEN, 8)
    cache = model.prefill(prompt(), OBSERVED).compact(keeps)
    model.decode(cache, prompt(7, 30), SEQ_LEN, 8)
    assert model.decode(cache, prompt(6, 4), SEQ_LEN, 8) == second


@each_model
def test_many_continuations_score_as_one_by_one(family, implementation):
    model = model_of(family, implementation)
    cache = model.prefill(prompt(), OBSERVED).compact(keep_sets(model, 8, per_head=True))
    fed = np.stack([prompt(seed, 5) for seed in range(10)])
    many = model.score_many(cache, fed, SEQ_LEN)
    for ids, scores in zip(fed, many):
        np.testing.assert_allclose(scores, model.score(cache, ids, SEQ_LEN), atol=TOLERANCE)


@each_model
def test_caches_of_other_keep_sets_score_together_as_one_by_one(family, implementation):
    model = model_of(family, implementation)
    prefill = model.prefill(prompt(), OBSERVED)
    caches = [prefill.compact(keep_sets(model, seed, per_head=seed % 2 == 0)) for seed in range(5)]
    fed = np.stack([prompt(seed, 5) for seed in range(2)])
    found = list(model.score_caches(caches, fed, SEQ_LEN, 3))
    assert len(found) == 5
    for cache, scores in zip(caches, found):
        np.testing.assert_allclose(scores, model.score_many(cache, fed, SEQ_LEN)[:, -3:],
                                   atol=TOLERANCE)


@each_model
def test_more_caches_than_fit_one_pass_keep_their_order(family, implementation, monkeypatch):
    model = model_of(family, implementation)
    prefill = model.prefill(prompt(), OBSERVED)
    caches = [prefill.compact(keep_sets(model, seed, per_head=False)) for seed in range(5)]
    fed = prompt(3, 4)[None]
    together = list(model.score_caches(caches, fed, SEQ_LEN, 1))
    monkeypatch.setattr("keepset.adapters.hf.model._BATCH_TOKENS", 8)
    np.testing.assert_allclose(list(model.score_caches(caches, fed, SEQ_LEN, 1)), together,
                               atol=TOLERANCE)


def test_caches_that_end_elsewhere_are_not_scored_together():
    model = model_of("llama", "sdpa")
    cache = model.prefill(prompt(), OBSERVED).compact(keep_sets(model, 1, per_head=False))
    with pytest.raises(ValueError, match="the same end"):
        list(model.score_caches([cache, cache.before(50)], prompt(3, 4)[None], SEQ_LEN, 1))


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_observed_after_a_prefill_are_those_of_one_prefill(family, implementation):
    model = model_of(family, implementation)
    prefill, more = model.prefill(prompt(), OBSERVED), prompt(9, 7)
    found = model.observe_after(prefill, more, SEQ_LEN - 5)
    whole = np.concatenate([prompt()[: SEQ_LEN - 5], more])
    for one, expected in zip(found, model.prefill(whole, len(more)).layers):
        for name in ("q_window", "k", "v", "window_lse"):
            np.testing.assert_allclose(getattr(one, name), getattr(expected, name), atol=TOLERANCE)


@each_model
def test_queries_are_those_of_every_row(family, implementation):
    model = model_of(family, implementation)
    for one, layer in zip(model.queries(prompt()), model.prefill(prompt(), SEQ_LEN).layers):
        np.testing.assert_allclose(one, layer.q_window, atol=TOLERANCE)


@each_model
def test_observed_queries_and_keys_are_those_of_the_attention(family, implementation):
    """The tile from q_window and K, in fp64, against the weights eager attention reports."""
    model = model_of(family, implementation)
    prefill = model.prefill(prompt(), OBSERVED)
    reference = plain_model(config_of(family), "eager")
    with torch.no_grad():
        weights = reference(input_ids=torch.as_tensor(prompt())[None], output_attentions=True).attentions
    for layer, one in zip(model.full_layers, prefill.layers):
        for head, q in enumerate(one.q_window.astype(np.float64)):
            logits = prefill.softmax_scale * (q @ one.k[head // 2].astype(np.float64).T)
            for row, position in enumerate(prefill.row_positions):
                seen = np.exp(logits[row, : position + 1])
                found = weights[layer][0, head, position, : position + 1].numpy()
                np.testing.assert_allclose(found, seen / seen.sum(), atol=1e-5)
                assert one.window_lse[head, row] == pytest.approx(np.log(seen.sum()), abs=1e-4)


@each_model
def test_log_probabilities_are_those_of_the_whole_prompt(family, implementation):
    model = model_of(family, implementation)
    prefill = model.prefill(prompt(), OBSERVED)
    with torch.no_grad():
        logits = model.model(input_ids=torch.as_tensor(prompt())[None]).logits[0].double()
    told = logits.log_softmax(-1).numpy()
    expected = told[np.arange(SEQ_LEN - 1), prompt()[1:]]
    np.testing.assert_allclose(prefill.token_logprobs[-OBSERVED:], expected[-OBSERVED:], atol=TOLERANCE)
    assert np.isnan(prefill.token_logprobs[:-OBSERVED]).all()
    assert prefill.perplexity(OBSERVED) == pytest.approx(np.exp(-expected[-OBSERVED:].mean()), rel=1e-3)
    with pytest.raises(ValueError, match=f"window={OBSERVED + 1}, want 1..{OBSERVED}"):
        prefill.perplexity(OBSERVED + 1)


def test_log_probabilities_of_a_prompt_no_longer_than_the_window():
    prefill = model_of("llama", "sdpa").prefill(prompt(0, 5), OBSERVED)
    assert np.isfinite(prefill.token_logprobs).tolist() == [False, True, True, True, True]


def test_what_is_no_whole_number_is_refused():
    model = model_of("llama", "sdpa")
    prefill = model.prefill(prompt(), OBSERVED)
    for call, message in (
            (lambda: model.prefill(prompt() + 0.5), "input_ids: float64, want integers"),
            (lambda: model.prefill(prompt() + 2**32), f"input_ids: .*, want {-(2**31)}..{2**31 - 1}"),
            (lambda: model.prefill(prompt(), row_positions=[1.5, 2.5]), "row_positions: float64"),
            (lambda: prefill.compact([np.array([0.5, 1.5])] * 4), "layer 0: keep set: float64"),
            (lambda: prefill.compact([[np.arange(3), np.array([True])]] * 4), "layer 0: keep set: bool")):
        with pytest.raises(ValueError, match=message):
            call()


def test_given_rows_are_observed():
    model = model_of("qwen3", "sdpa")
    rows = [3, 40, 59]
    found = model.prefill(prompt(), row_positions=rows)
    every = model.prefill(prompt(), SEQ_LEN)
    for one, all_rows in zip(found.layers, every.layers):
        assert np.array_equal(one.q_window, all_rows.q_window[:, rows])
        np.testing.assert_allclose(one.window_lse, all_rows.window_lse[:, rows], atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", MIXED)
def test_sliding_window_layers_are_left_alone(family, implementation):
    model = model_of(family, implementation)
    assert model.full_layers == MIXED[family][1]
    assert model.fingerprint()["num_layers"] == 2
    left_out = tuple(layer for layer in range(4) if layer not in model.full_layers)
    assert model.layer_groups == (
        LayerGroup(model.full_layers), LayerGroup(left_out, "sliding_window", WINDOW, left_out=True))
    prefill = model.prefill(prompt(), OBSERVED)
    compacted = prefill.compact([np.arange(9)] * 2)
    for index in range(SHAPE["num_hidden_layers"]):
        before, after = prefill.cache.layers[index], compacted.layers[index]
        if index in model.full_layers:
            assert after.keys.shape[2] == 9
        else:
            assert after is before
            assert compacted.fork().layers[index].keys.shape[2] == WINDOW - 1


def test_a_model_that_attends_fully_states_no_groups():
    assert model_of("llama", "sdpa").layer_groups == ()


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(ValueError, match="every layer has a sliding window"):
        HfModel(plain_model(windowed_everywhere(), "sdpa"), "r")


def test_attention_that_is_not_plain_softmax_is_refused():
    model = HfModel(plain_model(soft_capped(), "eager"), "r")
    with pytest.raises(ValueError, match="layer 0: attention with softcap"):
        model.prefill(prompt())


def attention_names(model: HfModel) -> set[str]:
    return {module.config._attn_implementation for module in model.model.modules()
            if hasattr(module, "config")}


def hooks(model: HfModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks)
               for module in model.model.modules())


@each_model
def test_the_model_is_as_it_was_after_an_exception_in_the_middle(family, implementation):
    model = model_of(family, implementation)
    ids, fed = prompt(), prompt(1, 7)
    expected = plain_logits(model, ids, fed)
    prefill = model.prefill(ids, OBSERVED)
    cache = prefill.compact(keep_sets(model, 9, per_head=True))
    forwards = [type(module).forward for module in model.model.modules()]
    answer = model.decode(cache, fed, SEQ_LEN, 4)

    def fail(*unused):
        assert attention_names(model) == {f"keepset_{implementation}"}
        raise RuntimeError("the third layer fails")

    with model.model.model.layers[2].register_forward_hook(fail):
        for call in (lambda: model.prefill(ids), lambda: model.decode(cache, fed, SEQ_LEN, 4),
                     lambda: model.score_many(cache, fed[None], SEQ_LEN)):
            with pytest.raises(RuntimeError, match="the third layer fails"):
                call()
            assert attention_names(model) == {implementation}
    assert hooks(model) == 0
    assert [type(module).forward for module in model.model.modules()] == forwards
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert np.array_equal(plain_logits(model, ids, fed), expected)
    assert model.decode(cache, fed, SEQ_LEN, 4) == answer


@each_model
def test_tokens_can_be_taken_back_and_fed_again(family, implementation):
    """`before` on layers whose window has dropped nothing yet."""
    model = model_of(family, implementation)
    ids = prompt(0, WINDOW - 2)
    prefill = model.prefill(ids, OBSERVED)
    keeps = [np.arange(0, len(ids), 2)] * len(model.full_layers)
    cache = prefill.compact(keeps).before(len(ids) - 3)
    shorter = model.prefill(ids[:-3], OBSERVED)
    expected = shorter.compact([keep[keep < len(ids) - 3] for keep in keeps])
    np.testing.assert_allclose(model.score(cache, ids[-3:], len(ids) - 3),
                               model.score(expected, ids[-3:], len(ids) - 3), atol=TOLERANCE)


def test_tokens_that_a_window_needs_cannot_be_taken_back():
    model = model_of("gemma3", "sdpa")
    cache = model.prefill(prompt(), OBSERVED).full_cache()
    with pytest.raises(ValueError, match="layer 0: its sliding window has dropped"):
        cache.before(SEQ_LEN - 1)


def test_bytes_and_tokens_are_those_held():
    model = model_of("llama", "sdpa")
    prefill = model.prefill(prompt(), OBSERVED)
    row = 2 * 12 * 4
    assert prefill.full_cache().num_bytes() == 4 * 2 * SEQ_LEN * row
    shared = prefill.compact([np.arange(count) for count in (5, 6, 7, 8)])
    assert shared.num_tokens() == [[5, 5], [6, 6], [7, 7], [8, 8]]
    assert shared.num_bytes() == 2 * 26 * row
    ragged = prefill.compact([[np.arange(3), np.arange(10)]] * 4)
    assert ragged.num_tokens() == [[3, 10]] * 4
    # The shorter head's unused rows are allocated, and counted.
    assert ragged.num_bytes() == 4 * 2 * 10 * row


@pytest.mark.parametrize(("keeps", "message"), [
    ([np.arange(4)] * 3, "3 keep sets, want 4"),
    ([np.array([3, 2])] * 4, "layer 0: keep set not ascending"),
    ([np.array([2, SEQ_LEN])] * 4, f"layer 0: position {SEQ_LEN}, not in the cache"),
    ([np.array([-1, 2])] * 4, "layer 0: position -1, not in the cache"),
    ([[np.arange(4)] * 3] * 4, "layer 0: keep set of 3 KV heads, want 2"),
])
def test_keep_sets_that_do_not_fit_are_refused(keeps, message):
    prefill = model_of("llama", "sdpa").prefill(prompt(), OBSERVED)
    with pytest.raises(ValueError, match=message):
        prefill.compact(keeps)


def test_a_position_other_than_the_next_is_refused():
    model = model_of("llama", "sdpa")
    cache = model.prefill(prompt(), OBSERVED).compact([np.arange(9)] * 4)
    with pytest.raises(ValueError, match=f"position=9, want {SEQ_LEN}"):
        model.decode(cache, [1], 9, 1)


def test_a_model_in_training_mode_is_refused():
    model = model_of("llama", "sdpa")
    model.model.train()
    with pytest.raises(ValueError, match="training mode"):
        model.prefill(prompt())
    with pytest.raises(ValueError, match="training mode"):
        HfModel(model.model, "r")


def test_another_attention_implementation_is_refused():
    model = HfModel(plain_model(FULL["llama"](), "flex_attention"), "r")
    with pytest.raises(ValueError, match="flex_attention, want eager or sdpa"):
        model.prefill(prompt())
