"""The shipped small model through transformers against its numpy runner."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from keepset.adapters.hf import HfModel
from keepset.eval import facts, vocabulary
from keepset.eval.capture import write_capture
from keepset.eval.small_model import SmallModel

WINDOW = 16
NUM_PROMPTS = 4
# fp32 sums in another order; logits are of the order of ten.
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def small():
    return SmallModel.load()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def hf(request, exported):
    return HfModel.load(exported, attn_implementation=request.param)


@pytest.fixture(scope="module")
def samples(small):
    words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / "MPL-2.0")
    return [facts.make_sample(np.random.default_rng(seed), words, 400 + 50 * seed, 16)
            for seed in range(NUM_PROMPTS)]


def keep_sets(prefill, per_head: bool):
    rng = np.random.default_rng([prefill.seq_len, per_head])

    def one():
        return np.sort(rng.choice(prefill.seq_len, int(rng.integers(100, 300)), replace=False))

    return [[one(), one()] if per_head else one() for _ in prefill.layers]


def pairs(small, hf, samples):
    """Prefills of the same prompts by both, and a question each."""
    for sample in samples:
        ids = small.tokenize(sample.context)
        yield (small.prefill(ids, WINDOW), hf.prefill(ids, WINDOW),
               small.tokenize(sample.facts[3].question))


def test_observations_are_the_same(small, hf, samples):
    for ours, theirs, _ in pairs(small, hf, samples):
        assert np.array_equal(ours.row_positions, theirs.row_positions)
        assert theirs.perplexity(WINDOW) == pytest.approx(ours.perplexity(WINDOW), rel=1e-3)
        assert theirs.softmax_scale == pytest.approx(small.config.softmax_scale)
        for one, other in zip(ours.layers, theirs.layers, strict=True):
            for name in ("q_window", "k", "v", "window_lse"):
                found = getattr(other, name)
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, getattr(one, name), atol=2e-4, err_msg=name)


def test_tokens_are_the_same_from_the_full_cache(small, hf, samples):
    for ours, theirs, question in pairs(small, hf, samples):
        expected = small.decode(ours.full_cache(), question, ours.seq_len, 16)
        assert hf.decode(theirs.full_cache(), question, ours.seq_len, 16) == expected


@pytest.mark.parametrize("per_head", [False, True], ids=["per_layer", "per_head"])
def test_tokens_and_logits_are_the_same_after_compaction(small, hf, samples, per_head):
    for ours, theirs, question in pairs(small, hf, samples):
        keeps = keep_sets(ours, per_head)
        mine, other = ours.compact(keeps), theirs.compact(keeps)
        assert other.num_tokens() == mine.num_tokens()
        expected = small.decode(mine, question, ours.seq_len, 16)
        assert hf.decode(other, question, ours.seq_len, 16) == expected
        fed = np.concatenate([question, expected])
        np.testing.assert_allclose(hf.score(other, fed, ours.seq_len),
                                   small.score(mine, fed, ours.seq_len), atol=LOGIT_TOLERANCE)


def test_an_answer_is_found_when_its_tokens_are_kept(small, hf, samples):
    sample = samples[1]
    fact = sample.facts[5]
    ids = small.tokenize(sample.prompt_with_question(fact))
    prefill = hf.prefill(ids, WINDOW)
    last = prefill.seq_len - 1
    near = set(range(prefill.seq_len - WINDOW, prefill.seq_len))
    answer = near | set(range(fact.position, fact.position + facts.WORDS_PER_FACT))
    told = []
    for kept in (answer, near):
        cache = prefill.compact([np.array(sorted(kept))] * 2).before(last)
        told.append(tuple(small.detokenize(hf.decode(cache, ids[-1:], last, 2))))
    assert told[0] == fact.answer
    assert told[1] != fact.answer


def test_a_capture_is_written_from_either(small, hf, samples, tmp_path):
    ids = small.tokenize(samples[0].context)
    for name, runner in (("ours", small), ("theirs", hf)):
        write_capture(tmp_path / name, runner.prefill(ids, WINDOW), runner.fingerprint())
    with safe_open(tmp_path / "ours", "np") as ours, safe_open(tmp_path / "theirs", "np") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for key in ours.keys():
            np.testing.assert_allclose(theirs.get_tensor(key), ours.get_tensor(key), atol=2e-4)
        mine, other = (json.loads(file.metadata()["keepset"]) for file in (ours, theirs))
    for document in (mine, other):
        document["model"].pop("revision")
    assert mine == other
