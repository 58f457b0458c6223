"""The constructed models, and what the service makes of the exact retriever."""

import dataclasses

import numpy as np
import pytest
from conftest import binary

import keepset
from keepset.eval import constructed
from keepset.server_process import ServerProcess

SEQ_LEN, NUM_FACTS, BUDGET = 1024, 32, 64
PROMPTS = range(12)


@pytest.fixture(scope="module")
def retriever():
    return constructed.retriever()


@pytest.fixture(scope="module")
def service_client():
    with ServerProcess(binary()) as server, keepset.Client.connect(server.address) as client:
        yield client


def accuracy_through_service(client, model, policy, query_last, **parameters):
    """Share of right answers from the K and V that came back; with query_last fact 0 alone is asked."""
    correct = []
    for seed in PROMPTS:
        facts = model.make_facts(seed, SEQ_LEN, NUM_FACTS, query_last)
        prefill = model.prefill(facts)
        result = client.compress(
            model=keepset.ModelFingerprint(**model.fingerprint()), seq_len=SEQ_LEN,
            softmax_scale=model.softmax_scale, policy=policy, parameters=parameters,
            budget=keepset.Budget.tokens(BUDGET), gather=True,
            layers=[keepset.Layer(q_window=one.q_window, k=one.k, v=one.v) for one in prefill.layers])
        cache = [(layer.k[model.retrieval_head(i)], layer.v[model.retrieval_head(i)])
                 for i, layer in enumerate(result.layers)]
        if query_last:
            # The question, always kept as part of the window, is read again from what lies before it.
            cache = [(k[:-1], v[:-1]) for k, v in cache]
            facts = dataclasses.replace(facts, ids=facts.ids[:-1])
        correct += model.answer(facts, cache, [0] if query_last else None).correct.tolist()
        result.release()
    return np.mean(correct)


@pytest.mark.parametrize("seq_len", [1024, 2048, 4096])
def test_retriever_answers_everything_from_the_full_cache(retriever, seq_len):
    facts = retriever.make_facts(1, seq_len, NUM_FACTS)
    prefill = retriever.prefill(facts)
    assert retriever.answer(facts, retriever.retrieval_cache(prefill)).correct.all()


def test_retriever_forgets_what_is_dropped(retriever):
    facts = retriever.make_facts(1, SEQ_LEN, NUM_FACTS)
    prefill = retriever.prefill(facts)
    keep = np.setdiff1d(np.arange(SEQ_LEN), facts.key_positions[3] + 1)
    correct = retriever.answer(facts, retriever.retrieval_cache(prefill, [keep])).correct
    assert not correct[3] and correct.sum() == NUM_FACTS - 1


@pytest.mark.parametrize("policy", ["streaming_llm", "random"])
def test_blind_policies_lose_the_facts(service_client, retriever, policy):
    assert accuracy_through_service(service_client, retriever, policy, query_last=False) <= 0.2


def test_snapkv_finds_the_fact_that_the_prompt_asks_for(service_client, retriever):
    # Without smoothing along the positions: facts of two tokens, not phrases.
    found = accuracy_through_service(service_client, retriever, "snapkv", query_last=True,
                                     kernel_size=1)
    assert found >= 0.99


def test_back_head_logits_are_dot_products_of_rotated_vectors():
    steps, position = 2, np.asarray([700])
    k = np.zeros((1, constructed.HEAD_DIM), np.float32)
    k[0, :16] = 1
    q = constructed.rotate(k, position - steps)
    keys = constructed.rotate(np.repeat(k, 5, 0), position - np.arange(5))
    np.testing.assert_allclose(30 * (q @ keys.T)[0], constructed.back_logits(steps)[:5], atol=2e-2)


@pytest.mark.parametrize("contrast", ["norm", "mass"])
@pytest.mark.parametrize("num_layers,group_size", [(1, 1), (3, 2)])
def test_marker_model_answers_from_its_value_tokens_alone(contrast, num_layers, group_size):
    model = constructed.marker_model(contrast, num_layers=num_layers, group_size=group_size,
                                     permute_heads=True)
    facts = model.make_facts(5, 1024, 16)
    prefill = model.prefill(facts)
    values = [facts.key_positions + 1 + layer for layer in range(num_layers)]
    assert model.answer(facts, model.retrieval_cache(prefill, values)).correct.all()
    keys_only = [facts.key_positions] * num_layers
    assert not model.answer(facts, model.retrieval_cache(prefill, keys_only)).correct.any()


def test_norm_contrast_stands_in_the_values():
    model = constructed.marker_model("norm", permute_heads=True, seed=3)
    facts = model.make_facts(0, 1024, 16)
    layer = model.prefill(facts).layers[0]
    marker = np.linalg.norm(layer.v[model.marker_heads()[0]], axis=-1)
    values = facts.key_positions + 1
    assert marker[values].min() > 2 * np.delete(marker, values).max()


def test_same_seed_is_the_same_prompt():
    first, second = (constructed.marker_model().make_facts(4, 2048, 32) for _ in range(2))
    assert np.array_equal(first.ids, second.ids)
