"""The small model: exactness on text it was not trained on, and its runner against plain loops."""

from __future__ import annotations

import hashlib
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from keepset.eval import facts, measure_exactness, small_model, vocabulary
from keepset.eval.kv_cache import HeadCache, KvCache

# fp32 matrix products of a few hundred terms against fp64 loops.
ORACLE_TOLERANCE = 2e-4
LICENSE = pathlib.Path(__file__).parents[2] / "LICENSE"


def held_out_text_words() -> list[str]:
    """The held-out MPL-2.0 of the machine, elsewhere the held-out text in the repository."""
    path = vocabulary.COMMON_LICENSES / "MPL-2.0"
    return vocabulary.read_text_words(path if path.exists() else LICENSE)


@pytest.fixture(scope="module")
def model() -> small_model.SmallModel:
    return small_model.SmallModel.load()


@pytest.fixture(scope="module")
def long_sample() -> facts.Sample:
    return facts.make_sample(np.random.default_rng(7), held_out_text_words(), 2000, 48)


@pytest.fixture(scope="module")
def long_prefill(model: small_model.SmallModel,
                 long_sample: facts.Sample) -> small_model.Prefill:
    return model.prefill(model.tokenize(long_sample.context), window=64)


def answer(model: small_model.SmallModel, cache: KvCache, seq_len: int,
           fact: facts.Fact) -> tuple[str, ...]:
    """Asks for `fact` after a context of `seq_len` tokens."""
    ids = model.decode(cache, model.tokenize(fact.question), seq_len, facts.ANSWER_WORDS)
    return tuple(model.detokenize(ids))


class PlainModel:
    """The same forward pass in fp64, one token and one head at a time."""

    def __init__(self, model: small_model.SmallModel) -> None:
        self._config = model.config
        self._weights = {name: value.astype(np.float64) for name, value in model._weights.items()}

    def _rope(self, x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        out = np.empty_like(x)
        for pair in range(half):
            angle = position * self._config.rope_theta**(-2 * pair / len(x))
            c, s = math.cos(angle), math.sin(angle)
            out[pair] = x[pair] * c - x[pair + half] * s
            out[pair + half] = x[pair + half] * c + x[pair] * s
        return out

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = sum(float(value)**2 for value in x) / len(x)
        return x / math.sqrt(mean_square + self._config.rms_norm_eps) * self._weights[name]

    def run(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns logits [T, vocab], and per layer q, k, v [heads, T, d] and lse [heads, T]."""
        config = self._config
        group = config.num_qo_heads // config.num_kv_heads
        xs = [self._weights["model.embed_tokens.weight"][token] for token in ids]
        result: dict[str, np.ndarray] = {}
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            q, k, v = [], [], []
            for position, x in enumerate(xs):
                normed = self._norm(x, prefix + "input_layernorm.weight")
                parts = [(self._weights[f"{prefix}self_attn.{name}_proj.weight"] @ normed).reshape(
                    -1, config.head_dim) for name in "qkv"]
                q.append([self._rope(head, position) for head in parts[0]])
                k.append([self._rope(head, position) for head in parts[1]])
                v.append(list(parts[2]))
            lse = np.empty((config.num_qo_heads, len(ids)))
            for position in range(len(ids)):
                merged = []
                for head in range(config.num_qo_heads):
                    logits = [float(q[position][head] @ k[past][head // group]) /
                              math.sqrt(config.head_dim) for past in range(position + 1)]
                    top = max(logits)
                    exponentials = [math.exp(logit - top) for logit in logits]
                    total = sum(exponentials)
                    lse[head, position] = top + math.log(total)
                    out = np.zeros(config.head_dim)
                    for past, exponential in enumerate(exponentials):
                        out += exponential / total * v[past][head // group]
                    merged.append(out)
                x = xs[position] + self._weights[prefix + "self_attn.o_proj.weight"] @ (
                    np.concatenate(merged))
                normed = self._norm(x, prefix + "post_attention_layernorm.weight")
                gate = self._weights[prefix + "mlp.gate_proj.weight"] @ normed
                up = self._weights[prefix + "mlp.up_proj.weight"] @ normed
                gated = np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)])
                xs[position] = x + self._weights[prefix + "mlp.down_proj.weight"] @ gated
            for name, value in (("q", q), ("k", k), ("v", v)):
                result[f"{layer}.{name}"] = np.array(value).transpose(1, 0, 2)
            result[f"{layer}.lse"] = lse
        result["logits"] = np.array([
            self._weights["lm_head.weight"] @ self._norm(x, "model.norm.weight") for x in xs])
        return result


@pytest.fixture(scope="module")
def short_ids(model: small_model.SmallModel) -> np.ndarray:
    sample = facts.make_sample(np.random.default_rng(3), held_out_text_words(), 40, 3)
    return model.tokenize(sample.context)


@pytest.fixture(scope="module")
def plain(model: small_model.SmallModel, short_ids: np.ndarray) -> dict[str, np.ndarray]:
    return PlainModel(model).run(short_ids)


def test_the_model_is_importable_without_grpc() -> None:
    code = ("import sys; sys.modules['grpc'] = None; "
            "from keepset.eval import capture, measure_exactness, small_model")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoint_matches_the_digest_beside_it() -> None:
    digest, name = small_model.CHECKPOINT_DIGEST.read_text().split()
    assert name == small_model.CHECKPOINT.name
    assert hashlib.sha256(small_model.CHECKPOINT.read_bytes()).hexdigest() == digest


def test_readme_states_the_digest() -> None:
    readme = pathlib.Path(small_model.__file__).parent / "README.md"
    assert small_model.CHECKPOINT_DIGEST.read_text().split()[0] in readme.read_text()


def test_checkpoint_is_small_enough_to_ship() -> None:
    assert small_model.CHECKPOINT.stat().st_size <= 3_000_000


def test_checkpoint_names_its_training(model: small_model.SmallModel) -> None:
    training = model.document["training"]
    assert training["script"] == "keepset/eval/train_small_model.py"
    assert isinstance(training["seed"], int)
    assert "MPL-2.0" in training["held_out_texts"]
    assert not set(training["texts"]) & set(training["held_out_texts"])


def test_checkpoint_without_our_metadata_is_refused(tmp_path: pathlib.Path) -> None:
    from safetensors.numpy import save_file
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="keepset_small_model"):
        small_model.SmallModel.load(tmp_path / "other.safetensors")


def test_answers_are_exact_at_2000_tokens_with_the_full_cache(
        model: small_model.SmallModel) -> None:
    text = held_out_text_words()
    rng = np.random.default_rng(2026)
    samples = [facts.make_sample(rng, text, 2000, 48) for _ in range(8)]
    asked = sum(len(sample.facts) for sample in samples)
    right = sum(measure_exactness.count_exact(model, sample) for sample in samples)
    assert right / asked >= .95, f"{right} of {asked} answers exact"


def test_question_inside_the_prompt_is_answered_from_the_cache_alone(
        model: small_model.SmallModel, long_sample: facts.Sample) -> None:
    chosen = long_sample.facts[::8]
    right = 0
    for fact in chosen:
        ids = model.tokenize(long_sample.prompt_with_question(fact))
        last = len(ids) - 1
        cache = model.prefill(ids, window=1).full_cache().before(last)
        right += tuple(model.detokenize(
            model.decode(cache, ids[last:], last, facts.ANSWER_WORDS))) == fact.answer
    assert right >= len(chosen) - 1


def test_answer_is_lost_with_the_fact(model: small_model.SmallModel,
                                      long_sample: facts.Sample,
                                      long_prefill: small_model.Prefill) -> None:
    right = 0
    for fact in long_sample.facts[::4]:
        # The text word after the fact has seen it too.
        keep = np.delete(np.arange(2000), np.arange(fact.position, fact.position + 5))
        right += answer(model, long_prefill.compact([keep, keep]), 2000, fact) == fact.answer
    assert right <= 1


def test_answer_survives_when_only_fact_sinks_and_tail_are_kept(
        model: small_model.SmallModel, long_sample: facts.Sample,
        long_prefill: small_model.Prefill) -> None:
    right = 0
    for fact in long_sample.facts:
        keep = np.unique(np.concatenate([np.arange(4), np.arange(1960, 2000),
                                         np.arange(fact.position, fact.position + 4)]))
        right += answer(model, long_prefill.compact([keep, keep]), 2000, fact) == fact.answer
    assert right >= .75 * len(long_sample.facts)


def window_attention_keep_sets(prefill: small_model.Prefill, budget: int) -> list[list[np.ndarray]]:
    """Per KV head: the window and the best rest by mean window attention, averaged over 5."""
    window, kernel = len(prefill.row_positions), 5
    past = prefill.seq_len - window
    keep_sets = []
    for layer in prefill.layers:
        num_qo_heads, _, head_dim = layer.q_window.shape
        group = num_qo_heads // len(layer.k)
        heads = []
        for index, k in enumerate(layer.k):
            score = np.zeros(past)
            for head in range(index * group, (index + 1) * group):
                logits = layer.q_window[head] @ k[:past].T * head_dim**-.5
                mass = np.exp(logits - layer.window_lse[head][:, None]).mean(0)
                score += np.convolve(mass, np.ones(kernel) / kernel, mode="same")
            best = np.argsort(-score, kind="stable")[:budget - window]
            heads.append(np.sort(np.concatenate([best, np.arange(past, prefill.seq_len)])))
        keep_sets.append(heads)
    return keep_sets


def test_window_attention_of_a_question_points_to_its_fact(model: small_model.SmallModel,
                                                           long_sample: facts.Sample) -> None:
    chosen = long_sample.facts[::4]
    right = 0
    for fact in chosen:
        ids = model.tokenize(long_sample.prompt_with_question(fact))
        last = len(ids) - 1
        prefill = model.prefill(ids, window=32)
        cache = prefill.compact(window_attention_keep_sets(prefill, 256)).before(last)
        right += tuple(model.detokenize(
            model.decode(cache, ids[last:], last, facts.ANSWER_WORDS))) == fact.answer
    assert right >= .8 * len(chosen)


@pytest.mark.parametrize("layer", [0, 1])
def test_prefill_equals_plain_loops(model: small_model.SmallModel, short_ids: np.ndarray,
                                    plain: dict[str, np.ndarray], layer: int) -> None:
    observed = model.prefill(short_ids, window=9).layers[layer]
    np.testing.assert_allclose(observed.q_window, plain[f"{layer}.q"][:, -9:],
                               atol=ORACLE_TOLERANCE, rtol=ORACLE_TOLERANCE)
    np.testing.assert_allclose(observed.k, plain[f"{layer}.k"], atol=ORACLE_TOLERANCE,
                               rtol=ORACLE_TOLERANCE)
    np.testing.assert_allclose(observed.v, plain[f"{layer}.v"], atol=ORACLE_TOLERANCE,
                               rtol=ORACLE_TOLERANCE)
    np.testing.assert_allclose(observed.window_lse, plain[f"{layer}.lse"][:, -9:],
                               atol=ORACLE_TOLERANCE, rtol=ORACLE_TOLERANCE)


def test_logprobs_and_last_logits_equal_plain_loops(model: small_model.SmallModel,
                                                    short_ids: np.ndarray,
                                                    plain: dict[str, np.ndarray]) -> None:
    prefill = model.prefill(short_ids)
    logits = plain["logits"]
    expected = [logits[t - 1, short_ids[t]] - math.log(np.exp(logits[t - 1]).sum())
                for t in range(1, len(short_ids))]
    assert math.isnan(prefill.token_logprobs[0])
    np.testing.assert_allclose(prefill.token_logprobs[1:], expected, atol=1e-3)
    np.testing.assert_allclose(prefill.logits_last, logits[-1], atol=1e-3)
    assert prefill.perplexity(10) == pytest.approx(math.exp(-np.mean(expected[-10:])), rel=1e-3)


def test_window_lse_normalises_the_window_queries(long_prefill: small_model.Prefill,
                                                  model: small_model.SmallModel) -> None:
    group = model.config.num_qo_heads // model.config.num_kv_heads
    for layer in long_prefill.layers:
        for head in range(model.config.num_qo_heads):
            logits = layer.q_window[head].astype(np.float64) @ layer.k[head // group].T
            logits *= model.config.softmax_scale
            for row, position in enumerate(long_prefill.row_positions):
                mass = np.exp(logits[row, :position + 1] - layer.window_lse[head, row]).sum()
                assert mass == pytest.approx(1, abs=1e-3)


def test_given_rows_are_observed_instead_of_the_last(model: small_model.SmallModel,
                                                     short_ids: np.ndarray) -> None:
    every = model.prefill(short_ids, window=len(short_ids))
    chosen = model.prefill(short_ids, row_positions=[2, 11, 30])
    for layer, all_rows in zip(chosen.layers, every.layers):
        np.testing.assert_array_equal(layer.q_window, all_rows.q_window[:, [2, 11, 30]])
        np.testing.assert_array_equal(layer.window_lse, all_rows.window_lse[:, [2, 11, 30]])


def test_later_tokens_do_not_change_earlier_ones(model: small_model.SmallModel,
                                                 long_sample: facts.Sample,
                                                 long_prefill: small_model.Prefill) -> None:
    ids = model.tokenize(long_sample.context)
    changed = ids.copy()
    changed[1000:] = ids[1000:][::-1]
    other = model.prefill(changed)
    np.testing.assert_allclose(other.token_logprobs[1:1000], long_prefill.token_logprobs[1:1000],
                               atol=1e-5)
    assert not np.allclose(other.token_logprobs[1001:], long_prefill.token_logprobs[1001:])
    for layer, expected in zip(other.layers, long_prefill.layers):
        np.testing.assert_allclose(layer.k[:, :1000], expected.k[:, :1000], atol=1e-5)


def test_decoding_from_the_full_cache_equals_prefill(model: small_model.SmallModel,
                                                     long_sample: facts.Sample,
                                                     long_prefill: small_model.Prefill) -> None:
    ids = model.tokenize(long_sample.context)
    logits = model.score(long_prefill.full_cache().before(1990), ids[1990:], 1990)
    np.testing.assert_allclose(logits[-1], long_prefill.logits_last, atol=1e-3)


def test_tokens_a_layer_dropped_are_missing_in_that_layer_only(
        model: small_model.SmallModel, short_ids: np.ndarray) -> None:
    prefill = model.prefill(short_ids)
    everything = np.arange(len(short_ids))
    cache = prefill.compact([everything, [everything[::2], everything[5:]]])
    assert cache.num_tokens() == [[40, 40], [20, 35]]
    assert cache.num_bytes(2) == (40 + 40 + 20 + 35) * 2 * 32 * 2
    np.testing.assert_array_equal(cache.layers[1][1].k, prefill.layers[1].k[1, 5:])


def test_gathered_rows_decode_like_selected_rows(model: small_model.SmallModel,
                                                 short_ids: np.ndarray) -> None:
    prefill = model.prefill(short_ids)
    keep = np.array([0, 3, 4, 20, 38, 39], np.int32)
    gathered = KvCache.from_compacted([keep] * 2, [layer.k[:, keep] for layer in prefill.layers],
                                      [layer.v[:, keep] for layer in prefill.layers])
    np.testing.assert_array_equal(model.score(gathered, [5, 6], 40),
                                  model.score(prefill.compact([keep] * 2), [5, 6], 40))


def test_decoding_leaves_the_cache_as_it_was(model: small_model.SmallModel,
                                             short_ids: np.ndarray) -> None:
    cache = model.prefill(short_ids).full_cache()
    first = model.decode(cache, [4], 40, 5)
    assert model.decode(cache, [4], 40, 5) == first
    assert cache.num_tokens() == [[40, 40], [40, 40]]


def test_position_inside_the_cache_is_refused(model: small_model.SmallModel,
                                              short_ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match="position=39, want more than 39"):
        model.decode(model.prefill(short_ids).full_cache(), [4], 39, 1)


@pytest.mark.parametrize("positions", [[3, 2], [2, 2], [-1, 2]])
def test_positions_out_of_order_are_refused(positions: list[int]) -> None:
    rows = np.zeros((2, 32), np.float32)
    with pytest.raises(ValueError, match="not ascending"):
        HeadCache(np.array(positions), rows, rows)


def test_sample_hides_its_facts_where_it_says(long_sample: facts.Sample) -> None:
    assert len(long_sample.context) == 2000
    for fact in long_sample.facts:
        assert long_sample.context[fact.position:fact.position + 4] == fact.words
    assert len({fact.name for fact in long_sample.facts}) == 48
    assert sum(word == vocabulary.PIN for word in long_sample.context) == 48


def test_sample_repeats_with_its_seed() -> None:
    text = held_out_text_words()
    assert facts.make_sample(np.random.default_rng(5), text, 300, 10) == facts.make_sample(
        np.random.default_rng(5), text, 300, 10)


@pytest.mark.parametrize(("seq_len", "num_facts"), [(50, 10), (2000, 0), (2000, 65)])
def test_impossible_sample_is_refused(seq_len: int, num_facts: int) -> None:
    with pytest.raises(ValueError, match="want"):
        facts.make_sample(np.random.default_rng(0), ["word"], seq_len, num_facts)


def test_markers_in_the_text_become_unknown_words() -> None:
    assert vocabulary.split_text("Ask ADA: pin 48, to-day.") == [
        "<unk>", "ada", ":", "<unk>", ",", "to-day", "."]


def test_words_survive_the_round_trip(model: small_model.SmallModel) -> None:
    words = ["<bos>", "the", "pin", "Nora", "48", "21", "."]
    assert model.detokenize(model.tokenize(words)) == words
    assert model.detokenize(model.tokenize(["zzzz"])) == ["<unk>"]
