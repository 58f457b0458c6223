"""Retention of a tiny model: the table says what is observed and sent, in process and to a keepsetd."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from families import MIXED, SHAPE, config_of, model_of, plain_model

import keepset
from keepset import table_file
from keepset.adapters.hf import EngineRetention, HfModel, Retention, ServiceRetention
from keepset.calibrate.head_prompts import KEY_NOVELTY, LAST_ROW, MAX_ROWS, MEAN_ROWS, PROBE_MAX
from keepset.calibrate.observation_heads import heads_table
from keepset.in_process import Engine, EngineError
from keepset.registry import TableRegistry
from keepset.server_process import ServerProcess

SEQ_LEN = 70
ROWS = np.arange(40, 52)
BUDGET = 12
PROBE = ("recall", "What was said?")
HEADS = {
    "question": [(1, 2, MAX_ROWS, 1.0), (3, 0, MEAN_ROWS, 0.5), (3, 1, MAX_ROWS, 1.0)],
    "last": [(2, 3, LAST_ROW, 1.0)],
    "novelty": [(0, 1, KEY_NOVELTY, 1.0)],
    "probing": [(1, 0, PROBE_MAX, 1.0), (3, 2, LAST_ROW, 0.5)],
    "probe alone": [(2, 1, PROBE_MAX, 1.0)],
}
TABLES = HEADS | {"of two layers": [(1, 1, MAX_ROWS, 1.0)]}
ROWS_READ = {"question": len(ROWS), "last": 1, "novelty": 0, "probing": 4, "probe alone": 3}


def ids(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SHAPE["vocab_size"], SEQ_LEN)


def tokenize(text: str) -> list[int]:
    assert text == PROBE[1]
    return [7, 8, 9]


def fingerprint(model: HfModel) -> keepset.ModelFingerprint:
    return keepset.ModelFingerprint(**model.fingerprint())


def table_of(model: HfModel, name: str, version: str = "1", heads: list | None = None) -> bytes:
    observations = TABLES[name] if heads is None else heads
    probe = PROBE if any(one[2] == PROBE_MAX for one in observations) else None
    table = heads_table(fingerprint(model), name.replace(" ", "-"), observations, pool_kernel=3, probe=probe)
    return table.replace(b'\\"version\\": \\"1\\"', f'\\"version\\": \\"{version}\\"'.encode())


@pytest.fixture(scope="module")
def model() -> HfModel:
    return model_of("llama", "sdpa")


@pytest.fixture(scope="module")
def engine(build):
    with Engine(build.library) as opened:
        yield opened


@pytest.fixture
def server(build):
    with ServerProcess(build.root / "service" / "keepsetd", arguments=["--table-writes"]) as running:
        yield running


@pytest.fixture(params=["engine", "inline", "memfd"])
def retain(request, model):
    """Makes a retention of observation_heads with a table of HEADS, or of another policy without one."""
    if request.param == "engine":
        engine = request.getfixturevalue("engine")

        def in_process(name: str | None, owner: HfModel = model, **asked) -> Retention:
            table = None if name is None else table_of(owner, name)
            return EngineRetention(engine=engine, table=table, budget_tokens=BUDGET, **asked)

        yield in_process
        return
    running = request.getfixturevalue("server")
    with keepset.Client.connect(running.address, transport=request.param) as client:

        def served(name: str | None, owner: HfModel = model, **asked) -> Retention:
            pin = keepset.TablePin()
            if name is not None:
                with TableRegistry.connect(running.address) as tables:
                    tables.load(table_of(owner, name))
                    tables.activate(f"{name.replace(' ', '-')}@1")
                pin = keepset.TablePin(name.replace(" ", "-"))
            return ServiceRetention(client=client, table=pin, budget_tokens=BUDGET, **asked)

        yield served


def positions(answer) -> list:
    """[layer][set] as plain numbers."""
    return [[head.tolist() for head in ([one] if isinstance(one, np.ndarray) else one)]
            for one in answer.sets()]


def all_observed(model: HfModel, probe: bool, rows: np.ndarray = ROWS):
    """A prefill whose every layer and head is handed over, with the rows that are asked for."""
    prefill = model.prefill(ids(), row_positions=rows)
    return model.with_probe(prefill, tokenize(PROBE[1])) if probe else prefill


def decided_on_everything(retention: Retention, model: HfModel, prefill, **more) -> list:
    """The keep sets of an operation that was sent every layer, head and row."""
    layers = prefill.inputs()
    assert sorted(layers) == list(range(len(model.full_layers)))
    assert all(one.q_window is not None and one.qo_heads is None for one in layers.values())
    spec = {"model": fingerprint(model), "policy": retention.policy, "layers": layers, "seq_len": SEQ_LEN,
            "parameters": dict(retention.parameters), "protect_sink": retention.protect_sink,
            "softmax_scale": prefill.softmax_scale, "row_positions": prefill.row_positions, **more}
    if isinstance(retention, EngineRetention):
        return positions(retention.engine.keep(**spec, budget_tokens=BUDGET, table=retention.table))
    return positions(retention.client.compress(**spec, table=retention.table, layer_groups=model.layer_groups,
                                               budget=keepset.Budget.tokens(BUDGET)))


@pytest.mark.parametrize("name", HEADS)
def test_the_layers_heads_and_rows_of_the_table_are_observed_and_sent(retain, model, name, monkeypatch):
    retention = retain(name, policy="observation_heads")
    seen = []
    kept_row = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select",
                        lambda *words: seen.append(words[0].shape[0]) or kept_row(*words))
    prefill = retention.prefill(model, ids(), row_positions=ROWS, tokenize=tokenize)
    monkeypatch.undo()
    listed: dict[int, set[int]] = {}
    for layer, head, rows, _ in HEADS[name]:
        listed.setdefault(layer, set())
        if rows != KEY_NOVELTY:
            listed[layer].add(head)
    observed = {layer: heads for layer, heads in listed.items() if heads}
    assert {layer: len(q) for layer, q in enumerate(prefill.q_windows) if q is not None} == {
        layer: len(heads) for layer, heads in observed.items()}
    passes = 2 if "prob" in name else 1
    assert sorted(seen) == sorted([len(heads) for heads in observed.values()] * passes)

    sent = prefill.inputs()
    assert sorted(sent) == sorted(listed)
    for layer, one in sent.items():
        assert one.k.shape == (2, SEQ_LEN, 12) and one.v is None
        if observed.get(layer):
            assert tuple(one.qo_heads) == tuple(sorted(observed[layer]))
            assert one.q_window.shape == (len(observed[layer]), ROWS_READ[name], 12)
        else:
            assert one.q_window is None and one.qo_heads is None


@pytest.mark.parametrize("name", HEADS)
def test_the_keep_set_is_that_of_all_layers_observed(retain, model, name):
    retention = retain(name, policy="observation_heads")
    prefill = retention.prefill(model, ids(), row_positions=ROWS, tokenize=tokenize)
    answer = retention.keep(model, prefill)
    kept = positions(answer)
    assert [len(one[0]) for one in kept] == [BUDGET] * 4
    probe = {"parameters": {"probe": PROBE[0]}} if "prob" in name else {}
    assert kept == decided_on_everything(retention, model, all_observed(model, bool(probe)), **probe)
    compacted = prefill.compact(answer.sets())
    assert compacted.num_tokens() == [[BUDGET, BUDGET]] * 4
    # K and V of layers that were not sent move, too.
    for layer, one in zip(compacted.layers, prefill.cache.layers):
        assert torch.equal(layer.keys, one.keys[:, :, kept[0][0]])
        assert torch.equal(layer.values, one.values[:, :, kept[0][0]])


@pytest.mark.parametrize("policy", ["snapkv", "tova", "knorm", "streaming_llm", "random"])
def test_policies_that_read_every_layer_answer_as_before(retain, model, policy):
    retention = retain(None, policy=policy, protect_sink=2)
    prefill = retention.prefill(model, ids(), row_positions=ROWS)
    read = {"snapkv": len(ROWS), "tova": 1}.get(policy, 0)
    assert len(prefill.row_positions) == read
    sent = prefill.inputs()
    assert len(sent) == (0 if policy in ("streaming_llm", "random") else 4)
    assert all((one.q_window is not None) == bool(read) for one in sent.values())
    assert positions(retention.keep(model, prefill)) == decided_on_everything(
        retention, model, all_observed(model, probe=False))


def test_a_gated_policy_gets_its_values_and_its_perplexity(engine, model):
    table = table_file.compilerkv_table(
        fingerprint(model), name="gated", version="1", source="hand-written",
        algorithm={"name": "by hand"},
        head_weights=np.ones((4, 4), np.float32), gate_thresholds=np.full((4, 1, 3), 0.9, np.float32),
        entropy_edges=[], ppl_edges=[20.0, 2000.0])
    retention = EngineRetention(engine=engine, policy="compilerkv", budget_tokens=BUDGET, table=table,
                                parameters={"window": 4})
    prefill = retention.prefill(model, ids())
    # The 64 rows of the default, of which the policy reads 4.
    assert prefill.row_positions.tolist() == [66, 67, 68, 69]
    assert all(one.v is not None for one in prefill.inputs().values())
    answer = retention.keep(model, prefill)
    assert answer.document["ppl"] == pytest.approx(prefill.perplexity(4))
    assert positions(answer) == decided_on_everything(
        retention, model, model.prefill(ids()), ppl=prefill.perplexity(4))


def test_bytes_of_queries_on_the_wire_are_those_of_the_needs(server, model):
    plain = plain_model(config_of("llama"), "sdpa").to(torch.bfloat16)
    half = HfModel(plain, "bf16")
    with TableRegistry.connect(server.address) as tables, keepset.Client.connect(
            server.address, transport="inline") as client:
        tables.load(table_of(half, "question"))
        tables.activate("question@1")
        retention = ServiceRetention(client=client, policy="observation_heads", budget_tokens=BUDGET)
        prefill = retention.prefill(half, ids(), row_positions=ROWS)
        requests = []
        call = client.compression_stub.Compress
        client.compression_stub.Compress = lambda request, **more: requests.append(request) or call(
            request, **more)
        answer = retention.keep(half, prefill)
    (request,) = requests
    assert {one.layer: len(one.q_window.data.inline) for one in request.layers} == {
        one.layer: len(one.qo_heads) * len(ROWS) * 12 * 2 for one in prefill.needs.layers}
    assert {len(one.k.data.inline) for one in request.layers} == {2 * SEQ_LEN * 12 * 2}
    assert not any(one.HasField("v") for one in request.layers)
    assert answer.bytes_before == 4 * 2 * 2 * SEQ_LEN * 12 * 2


def test_rows_that_a_request_names_are_sent_though_the_table_reads_the_last_alone(retain, model):
    retention = retain("last", policy="observation_heads", parameters={"observe": "41:44"})
    prefill = retention.prefill(model, ids(), row_positions=ROWS)
    assert np.array_equal(prefill.row_positions, ROWS)
    plain = retain("last", policy="observation_heads")
    assert positions(retention.keep(model, prefill)) == positions(
        plain.keep(model, plain.prefill(model, ids(), row_positions=ROWS)))


@pytest.mark.parametrize("family", MIXED)
def test_layers_are_counted_among_those_with_full_attention(retain, family):
    mixed = model_of(family, "sdpa")
    retention = retain("of two layers", mixed, policy="observation_heads")
    prefill = retention.prefill(mixed, ids(), row_positions=ROWS)
    whole = mixed.prefill(ids(), row_positions=ROWS)
    assert prefill.q_windows[0] is None
    assert torch.equal(prefill.q_windows[1], whole.q_windows[1][[1]])
    answer = retention.keep(mixed, prefill)
    assert positions(answer) == decided_on_everything(retention, mixed, whole)
    assert prefill.compact(answer.sets()).compacted_layers == mixed.full_layers


def test_a_probe_wants_a_tokenizer(retain, model):
    retention = retain("probing", policy="observation_heads")
    with pytest.raises(ValueError, match="rows of probe recall, want tokenize"):
        retention.prefill(model, ids())


def test_a_prefill_by_needs_does_not_pass_for_a_whole_one(engine, model):
    needs = engine.input_needs(model=fingerprint(model), policy="tova")
    prefill = model.prefill(ids(), needs=needs)
    with pytest.raises(ValueError, match="want a prefill without needs"):
        _ = prefill.layers


def test_needs_of_a_larger_model_are_refused(engine, model):
    larger = dataclasses.replace(fingerprint(model), num_layers=6)
    with pytest.raises(ValueError, match=r"needs of layers \[4, 5\], want 0..3"):
        model.prefill(ids(), needs=engine.input_needs(model=larger, policy="snapkv"))


# Of one row where the other table wants twelve: an operation could not tell.
SWAPPED = [(2, 3, MEAN_ROWS, 1.0)]


def test_another_table_than_the_one_observed_by_is_refused_in_process(engine, model):
    asked = {"engine": engine, "policy": "observation_heads", "budget_tokens": BUDGET}
    had = EngineRetention(table=table_of(model, "last"), **asked)
    prefill = had.prefill(model, ids(), row_positions=ROWS)
    swapped = EngineRetention(table=table_of(model, "last", "2", SWAPPED), **asked)
    with pytest.raises(EngineError, match="want a prefill of this retention's own") as error:
        swapped.keep(model, prefill)
    assert error.value.code == "FAILED_PRECONDITION"
    with pytest.raises(EngineError, match="FAILED_PRECONDITION"):
        EngineRetention(engine=engine, policy="snapkv", budget_tokens=BUDGET).keep(model, prefill)
    assert len(had.keep(model, prefill).sets()[0]) == BUDGET


def test_a_table_that_is_swapped_in_between_is_refused_by_a_server(server, model):
    with TableRegistry.connect(server.address) as tables, keepset.Client.connect(server.address) as client:
        tables.load(table_of(model, "last"))
        tables.activate("last@1")
        retention = ServiceRetention(client=client, policy="observation_heads", budget_tokens=BUDGET)
        prefill = retention.prefill(model, ids(), row_positions=ROWS)
        want = positions(retention.keep(model, prefill))
        tables.load(table_of(model, "last", "2", SWAPPED))
        tables.activate("last@2")
        # As long as the table is there it answers, and the answer names it.
        still = retention.keep(model, prefill)
        assert positions(still) == want and still.table.version == "1"
        tables.unload("last@1")
        with pytest.raises(keepset.NotFound):
            retention.keep(model, prefill)
        pinned = dataclasses.replace(retention, table=keepset.TablePin("last", "2"))
        with pytest.raises(keepset.Refused, match="want a prefill of this retention's own") as error:
            pinned.keep(model, prefill)
        assert error.value.code == "FAILED_PRECONDITION"
        again = retention.prefill(model, ids(), row_positions=ROWS)
        assert len(again.row_positions) == len(ROWS)
        assert retention.keep(model, again).table.version == "2"
    assert prefill.full_cache().num_tokens() == [[SEQ_LEN] * 2] * 4


def test_a_table_that_is_swapped_between_question_and_call_is_refused(server, model):
    """Between the retention's own two calls: the operation names the table by its digest."""
    with TableRegistry.connect(server.address) as tables, keepset.Client.connect(server.address) as client:
        tables.load(table_of(model, "last"))
        tables.activate("last@1")
        retention = ServiceRetention(client=client, policy="observation_heads", budget_tokens=BUDGET)
        prefill = retention.prefill(model, ids(), row_positions=ROWS)
        call = client.compression_stub.Compress

        def swap(request, **more):
            tables.load(table_of(model, "last", "2", SWAPPED))
            tables.activate("last@2")
            tables.unload("last@1")
            return call(request, **more)

        client.compression_stub.Compress = swap
        with pytest.raises(keepset.NotFound):
            retention.keep(model, prefill)


def test_a_service_that_moves_rows_gets_them_of_every_layer(server, model):
    with TableRegistry.connect(server.address) as tables, keepset.Client.connect(
            server.address, transport="inline") as client:
        tables.load(table_of(model, "question"))
        tables.activate("question@1")
        retention = ServiceRetention(client=client, policy="observation_heads", budget_tokens=BUDGET)
        prefill = retention.prefill(model, ids(), row_positions=ROWS)
        layers = prefill.inputs(gather=True)
        assert [one for one in layers if layers[one].q_window is not None] == [1, 3]
        answer = client.compress(
            model=fingerprint(model), policy="observation_heads", layers=layers, seq_len=SEQ_LEN, gather=True,
            softmax_scale=prefill.softmax_scale, row_positions=ROWS, budget=keepset.Budget.tokens(BUDGET))
    compacted = prefill.compact(answer.sets())
    for one, layer in zip(answer.layers, compacted.layers):
        assert np.array_equal(one.k, layer.keys[0].numpy()) and np.array_equal(one.v, layer.values[0].numpy())
