"""The Python client against a running keepsetd, over every transport."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest
from conftest import MODEL, SEQ_LEN, WINDOW, binary, publish, random_layers, spec

import keepset
from keepset.server_process import ServerProcess

POLICIES = ("full", "streaming_llm", "random", "tova", "snapkv", "knorm", "compilerkv")


def sets_of(result: keepset.Result) -> list[list[int]]:
    return [one.indices.tolist() for layer in result.layers for one in layer.sets]


def poll(condition, timeout_seconds: float = 10.0):
    """Returns the first true value of condition()."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    pytest.fail(f"condition not reached in {timeout_seconds} s")


@pytest.mark.parametrize("policy", POLICIES)
def test_unary_and_stream_agree(client, policy):
    layers = random_layers()
    unary = client.compress(layers=layers, **spec(policy=policy))
    operation = client.begin(**spec(policy=policy))
    for layer in layers:
        operation.observe(layer)
    stream = operation.finish()
    assert sets_of(unary) == sets_of(stream)
    assert (unary.outcome, unary.bytes_after) == (stream.outcome, stream.bytes_after)


@pytest.mark.parametrize("policy", POLICIES)
def test_memfd_and_inline_agree(server, policy):
    results = []
    for transport in ("memfd", "inline"):
        with keepset.Client.connect(server.address, transport=transport) as client:
            result = client.compress(layers=random_layers(), **spec(policy=policy))
            assert result.transport in (transport, "")
            results.append(result)
    assert sets_of(results[0]) == sets_of(results[1])


@pytest.mark.parametrize("policy", ["compilerkv", "snapkv"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_column_statistics_decide_like_their_tile(client, policy, reduction):
    rng = np.random.default_rng(3)
    tiles, columns = [], []
    for layer in random_layers():
        tile = rng.integers(0, 16, (MODEL.num_qo_heads, WINDOW, SEQ_LEN)) / np.float32(64)
        tile = np.tril(tile, SEQ_LEN - WINDOW).astype(np.float32)
        stats = tile.sum(axis=1) if reduction == "sum" else tile.mean(axis=1)
        tiles.append(keepset.Layer(attn_tile=tile, k=layer.k, v=layer.v))
        columns.append(keepset.Layer(column_stats=stats, column_reduction=reduction, v=layer.v))
    wanted = client.compress(layers=tiles, **spec(policy=policy))
    result = client.compress(layers=columns, num_rows=WINDOW, **spec(policy=policy))
    assert result.outcome == "compressed"
    assert sets_of(result) == sets_of(wanted)


def with_log_sum_exp(layers: list[keepset.Layer], base: str) -> list[keepset.Layer]:
    """The layers with what each query row's attention sums to, as a kernel of that base returns it."""
    heads_of_one = MODEL.num_qo_heads // MODEL.num_kv_heads
    unseen = np.triu(np.full((WINDOW, SEQ_LEN), -np.inf), SEQ_LEN - WINDOW + 1)
    for layer in layers:
        keys = np.repeat(layer.k.astype(np.float64), heads_of_one, axis=0)
        logits = layer.q_window @ keys.transpose(0, 2, 1) * MODEL.head_dim**-0.5 + unseen
        lse = np.log(np.exp(logits).sum(axis=2))
        layer.window_lse = (lse / np.log(2) if base == "2" else lse).astype(np.float32)
        layer.lse_base = base
    return layers


@pytest.mark.parametrize("base", ["e", "2"])
def test_log_sum_exp_of_either_base_decides_like_none(client, base):
    wanted = client.compress(layers=random_layers(), **spec(policy="compilerkv"))
    layers = with_log_sum_exp(random_layers(), base)
    assert sets_of(client.compress(layers=layers, **spec(policy="compilerkv"))) == sets_of(wanted)


def test_log_sum_exp_of_the_other_base_is_refused(client):
    layers = with_log_sum_exp(random_layers(), "2")
    for layer in layers:
        layer.lse_base = "e"
    with pytest.raises(keepset.KeepsetError, match="window_lse"):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def test_log_sum_exp_of_no_known_base_is_refused_at_home(client):
    layers = with_log_sum_exp(random_layers(), "e")
    layers[1].lse_base = "10"
    with pytest.raises(ValueError, match="layer 1: lse_base '10', want 'e' or '2'"):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def test_requirements_say_who_takes_column_statistics(client):
    needs = {policy: client.input_needs(model=MODEL, policy=policy)
             for policy in ("compilerkv", "snapkv", "tova", "knorm")}
    assert needs["compilerkv"].layers[0].columns and needs["compilerkv"].max_rows == 64
    assert needs["snapkv"].layers[0].columns and needs["snapkv"].max_rows == 0
    assert needs["tova"].max_rows == 1
    assert not needs["knorm"].layers[0].columns


def test_statistics_of_a_session_are_its_own(server):
    with keepset.Client.connect(server.address) as one, keepset.Client.connect(server.address) as other:
        one.compress(layers=random_layers(), **spec(policy="tova"))
        own = one.statistics(own_session=True)
        assert [(row.policy, row.outcomes[0].count) for row in own.operations] == [("tova", 1)]
        assert {stage.stage for stage in own.operations[0].stages} >= {"score", "select"}
        assert not other.statistics(own_session=True).operations
        assert other.statistics().operations and other.statistics().sessions >= 2


def test_unknown_column_reduction_is_refused(client):
    stats = np.ones((MODEL.num_qo_heads, SEQ_LEN), np.float32)
    layers = [keepset.Layer(column_stats=stats, column_reduction="max", v=layer.v)
              for layer in random_layers()]
    with pytest.raises(ValueError, match="column_reduction 'max', want 'mean' or 'sum'"):
        client.compress(layers=layers, num_rows=WINDOW, **spec())


@pytest.mark.parametrize("policy", ["tova", "compilerkv", "snapkv"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gathered_rows_equal_the_source_rows(client, policy, dtype):
    layers = random_layers(dtype=dtype)
    result = client.compress(layers=layers, gather=True, **spec(policy=policy))
    assert result.outcome == "compressed"
    for layer, kept in zip(layers, result.layers):
        for head in range(MODEL.num_kv_heads):
            indices = kept.sets[head % len(kept.sets)].indices
            assert np.array_equal(kept.k[head], layer.k[head][indices])
            assert np.array_equal(kept.v[head], layer.v[head][indices])
    result.release()


def test_layer_local_policy_answers_a_layer_before_the_end(client):
    layers = random_layers()
    operation = client.begin(**spec(policy="snapkv"))
    for layer in layers:
        operation.observe(layer)
    early = [poll(lambda index=index: operation.early_result(index)) for index in range(len(layers))]
    result = operation.finish()
    for one, final in zip(early, result.layers):
        assert [kept.indices.tolist() for kept in one.sets] == [
            kept.indices.tolist() for kept in final.sets]


def test_global_policy_answers_no_layer_before_the_end(client):
    operation = client.begin(**spec(policy="compilerkv"))
    for layer in random_layers():
        operation.observe(layer)
    result = operation.finish()
    assert result.outcome == "compressed"
    assert all(operation.early_result(index) is None for index in range(len(result.layers)))


def test_a_layer_that_was_not_sent_has_no_early_result(client):
    operation = client.begin(**spec(policy="snapkv"))
    operation.observe(random_layers()[0])
    assert poll(lambda: operation.early_result(0)) is not None
    assert operation.early_result(1) is None
    operation.cancel()


def test_layers_that_slide_are_left_out_by_the_workers_word(client):
    full = keepset.LayerGroup((0, 2, 4))
    sliding = keepset.LayerGroup((1, 3), "sliding_window", 32)
    with pytest.raises(keepset.Refused, match="layer 1 is of ATTENTION_KIND_SLIDING_WINDOW, want it left_out"):
        client.compress(layers=random_layers(), layer_groups=[full, sliding], **spec())
    left_out = keepset.LayerGroup((1, 3), "sliding_window", 32, left_out=True)
    result = client.compress(layers=random_layers(), layer_groups=[full, left_out], **spec())
    assert result.layers_left_out == (1, 3) and len(result.layers) == 3
    assert sets_of(result) == sets_of(client.compress(layers=random_layers(), **spec()))
    with pytest.raises(keepset.InvalidInput, match="4 layers take part, want model.num_layers=3"):
        client.compress(layers=random_layers(), **spec(),
                        layer_groups=[keepset.LayerGroup((0, 1, 2, 3)), keepset.LayerGroup((4,), "mla",
                                                                                           left_out=True)])
    with pytest.raises(ValueError, match="attention 'local', want one of full, sliding_window"):
        client.compress(layers=random_layers(), layer_groups=[keepset.LayerGroup((0,), "local")], **spec())


def in_region(region: keepset.SharedRegion, layers: list[keepset.Layer]) -> list[keepset.Layer]:
    return [keepset.Layer(layer.q_window, region.place(layer.k), region.place(layer.v))
            for layer in layers]


@pytest.mark.parametrize("policy", ["tova", "snapkv"])
def test_rows_gathered_in_place_are_the_front_of_the_callers_arrays(server, policy):
    layers = random_layers()
    with keepset.Client.connect(server.address, transport="memfd") as client:
        region = client.shared_region(1 << 20, writable_by_server=True)
        placed = in_region(region, layers)
        result = client.compress(layers=placed, gather="in_place", **spec(policy=policy))
        assert result.outcome == "compressed"
        for layer, own, kept in zip(layers, placed, result.layers):
            for head in range(MODEL.num_kv_heads):
                indices = kept.sets[head % len(kept.sets)].indices
                assert np.array_equal(kept.k[head], layer.k[head][indices])
                assert np.array_equal(own.v[head, : len(indices)], layer.v[head][indices])
                assert np.shares_memory(kept.k[head], own.k)


def test_in_place_is_refused_where_rows_of_a_copy_would_move(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        with pytest.raises(keepset.InvalidInput, match="layer 0: k lies in no registered region"):
            client.compress(layers=random_layers(), gather="in_place", **spec())
    with keepset.Client.connect(server.address, transport="inline") as client:
        with pytest.raises(keepset.InvalidInput, match="over transport 'inline', want 'memfd'"):
            client.compress(layers=random_layers(), gather="in_place", **spec())


def test_in_place_is_refused_where_the_server_may_not_write(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        layers = in_region(client.shared_region(1 << 20), random_layers())
        with pytest.raises(keepset.Refused, match="registered read-only, want read-write"):
            client.compress(layers=layers, gather="in_place", **spec())
        writable = in_region(client.shared_region(1 << 20, writable_by_server=True), random_layers())
        with pytest.raises(keepset.Refused, match="shared_prefix_tokens=4"):
            client.compress(layers=writable, gather="in_place", shared_prefix_tokens=4, **spec())


def test_kept_full_hands_back_the_callers_own_cache(client):
    layers = random_layers()
    result = client.compress(
        layers=layers, gather=True, **spec(budget=keepset.Budget.tokens(SEQ_LEN + 5))
    )
    assert (result.outcome, result.reason) == ("kept_full", "below_budget")
    assert result.layers[0].k is layers[0].k
    assert sets_of(result)[0] == list(range(SEQ_LEN))


def test_strided_and_paged_kv_give_the_answer_of_contiguous_kv(client):
    layers = random_layers()
    plain = client.compress(layers=layers, gather=True, **spec(policy="snapkv"))
    expected = sets_of(plain)
    nhd = [
        keepset.Layer(layer.q_window, *(
            np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2) for x in (layer.k, layer.v)
        ))
        for layer in layers
    ]
    assert sets_of(client.compress(layers=nhd, **spec(policy="snapkv"))) == expected
    block, table = 16, [5, 0, 3, 1, 4, 2]
    paged = []
    for layer in layers:
        pages = []
        for x in (layer.k, layer.v):
            data = np.full((6, block, MODEL.num_kv_heads, MODEL.head_dim), np.nan, np.float32)
            for index, page in enumerate(table):
                rows = x[:, index * block : (index + 1) * block].transpose(1, 0, 2)
                data[page, : rows.shape[0]] = rows
            pages.append(keepset.PagedKv(data, table))
        paged.append(keepset.Layer(layer.q_window, *pages))
    result = client.compress(layers=paged, gather=True, **spec(policy="snapkv"))
    assert sets_of(result) == expected
    assert np.array_equal(result.layers[1].k[1], plain.layers[1].k[1])


def test_arrays_in_a_registered_region_are_not_copied(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        region = client.shared_region(1 << 20)
        layers = [
            keepset.Layer(*(region.place(x) for x in (layer.q_window, layer.k, layer.v)))
            for layer in random_layers()
        ]
        before = len(client._regions)
        first = client.compress(layers=layers, **spec())
        assert len(client._regions) == before
        assert sets_of(first) == sets_of(client.compress(layers=random_layers(), **spec()))
        client.retire(region)
        with pytest.raises(keepset.InvalidInput, match="not registered"):
            client.retire(region)


def test_released_result_memory_is_used_again(server):
    with keepset.Client.connect(server.address, transport="memfd") as client:
        for _ in range(5):
            client.compress(layers=random_layers(), gather=True, **spec()).release()
        first = len(client._regions)
        for _ in range(20):
            client.compress(layers=random_layers(), gather=True, **spec()).release()
        assert len(client._regions) == first


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "full"])
def test_ranks_that_hold_other_heads_keep_equally_many(client, policy):
    """Tensor parallelism: every rank asks for its own heads, one block table serves them all."""
    parameters = {"min_kept": 24} if policy == "compilerkv" else {}
    counts = set()
    for rank in range(3):
        result = client.compress(layers=random_layers(seed=rank), **spec(
            policy=policy, scope="layer_equal", parameters=parameters))
        counts |= {len(layer.keep_indices) for layer in result.layers}
    assert counts == {24}


def test_compression_spec_is_of_what_was_kept(client):
    def of(**changes) -> str:
        return client.compress(layers=random_layers(), **spec(**changes)).compression_spec

    assert of() == of()
    other = [of(budget=keepset.Budget.tokens(23)), of(policy="tova"), of(parameters={"kernel_size": 3}),
             of(scope="layer_equal")]
    assert len({of(), *other}) == 5
    assert of(budget=keepset.Budget.tokens(SEQ_LEN)) == ""  # the prompt's own blocks


def test_compression_spec_names_the_table(client):
    result = client.compress(layers=random_layers(), **spec(policy="compilerkv"))
    assert result.table.digest in result.compression_spec


def test_reply_names_table_bins_and_provenance(client):
    result = client.compress(layers=random_layers(), **spec(policy="compilerkv"))
    assert (result.table.name, result.table.version, result.table.source) == ("tiny", "1", "uniform")
    assert result.table.digest.startswith("sha256:")
    assert result.ppl == pytest.approx(10.0)
    assert 0 <= result.entropy <= np.log(SEQ_LEN) + 1e-6
    assert result.ppl_bin == 1 and result.has_candidates


def test_missing_perplexity_is_an_error_and_median_is_reported(client):
    with pytest.raises(keepset.InvalidInput, match="missing_ppl=median"):
        client.compress(layers=random_layers(), **spec(policy="compilerkv", ppl=None))
    result = client.compress(
        layers=random_layers(),
        **spec(policy="compilerkv", ppl=None, parameters={"missing_ppl": "median"}),
    )
    assert result.defaulted_inputs == ["ppl"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"policy": "h2o"}, keepset.NotFound, "snapkv"),
        ({"parameters": {"kernel": 5}}, keepset.InvalidInput, "kernel_size"),
        ({"budget": keepset.Budget.tokens(0)}, keepset.InvalidInput, "budget"),
        ({"protect_sink": 30}, keepset.InvalidInput, "protected"),
        ({"policy": "compilerkv", "table": keepset.TablePin(name="other")}, keepset.NotFound, "tiny"),
        ({"seq_len": SEQ_LEN + 1}, keepset.InvalidInput, "layer 0"),
        ({"softmax_scale": 0.0}, keepset.InvalidInput, "softmax_scale"),
    ],
)
def test_mistakes_are_named(client, changes, error, says):
    with pytest.raises(error, match=says):
        client.compress(layers=random_layers(), **spec(**changes))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("q_window", "layer 1: q: head 0 row 3 is not finite"),
        ("k", "layer 1: k: head 0 position 3 is not finite"),
        ("v", "layer 1: v: head 0 position 3 is not finite"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(client, tensor, says, value):
    layers = random_layers()
    getattr(layers[1], tensor)[0, 3, 2] = value
    with pytest.raises(keepset.InvalidInput, match=says):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def test_missing_values_are_named_where_the_policy_reads_them(client):
    layers = random_layers()
    layers[1].v = None
    with pytest.raises(keepset.InvalidInput, match="layer 1: missing v, policy compilerkv"):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def reflected_services(address: str) -> bytes:
    """The raw answer of server reflection to list_services (field 7) "*"."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        return next(ask(iter([b"\x3a\x01*"]), timeout=30))


def test_reflection_lists_the_services(server):
    services = reflected_services(server.address)
    for name in ("CompressionService", "SessionService", "ServerService", "TableService"):
        assert f"keepset.v1.{name}".encode() in services
    assert b"grpc.health.v1.Health" in services


def test_reflection_can_be_switched_off():
    with ServerProcess(binary(), arguments=["--disable-reflection"]) as server:
        with pytest.raises(grpc.RpcError) as refused:
            reflected_services(server.address)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_stream_error_ends_the_operation_and_the_client_goes_on(client):
    operation = client.begin(**spec())
    layers = random_layers()
    layers[1].k = layers[1].k.copy()
    layers[1].k[0, 3, 2] = np.nan
    with pytest.raises(keepset.InvalidInput, match="layer 1: k: head 0 position 3"):
        for layer in layers:
            operation.observe(layer)
        operation.finish()
    assert client.compress(layers=random_layers(), **spec()).outcome == "compressed"


def test_nobody_listening_is_unreachable(tmp_path):
    with pytest.raises(keepset.Unreachable):
        keepset.Client.connect(f"unix:{tmp_path}/none.sock", timeout_seconds=5)


def test_server_restart_is_survived_by_connecting_again(tmp_path):
    with ServerProcess(binary()) as server:
        client = keepset.Client.connect(server.address)
        server.kill()
        with pytest.raises(keepset.Unreachable):
            client.compress(layers=random_layers(), **spec())
        client.close()
    with ServerProcess(binary()) as server, keepset.Client.connect(server.address) as client:
        assert client.compress(layers=random_layers(), **spec()).outcome == "compressed"


def test_reload_under_load_never_fails_or_mixes(tmp_path):
    """Each version has its own tau; a mixed operation would show two of them."""
    with ServerProcess(binary(), tables=tmp_path) as server:
        publish(server, "0")
        with keepset.Client.connect(server.address) as client:
            poll(lambda: client.server_info().tables)
            layers = random_layers()
            seen = set()

            def one_operation() -> str:
                result = client.compress(layers=layers, **spec(policy="compilerkv"))
                tau = np.float32(0.8 + 0.005 * int(result.table.version))
                assert [layer.tau for layer in result.layers] == pytest.approx([tau] * 3)
                seen.add(result.table.version)
                return result.table.version

            # Before the first reload, which may be quicker than an operation.
            one_operation()
            for version in range(1, 20):
                publish(server, str(version), gate=0.8 + 0.005 * version)
                poll(lambda want=str(version): one_operation() == want)
            assert len(seen) == 20


CRASHING_CLIENT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import random_layers, spec
import keepset
phase = {phase!r}
client = keepset.Client.connect({address!r}, transport="memfd")
region = client.shared_region(8 << 20, writable_by_server=True)
if phase == "registered":
    os.kill(os.getpid(), signal.SIGKILL)
operation = client.begin(**spec(gather=True))
layers = random_layers()
operation.observe(layers[0])
if phase == "midway":
    os.kill(os.getpid(), signal.SIGKILL)
for layer in layers[1:]:
    operation.observe(layer)
if phase == "before_result":
    operation._send(end=__import__("keepset.v1.compression_pb2", fromlist=["x"]).OperationEnd())
    os.kill(os.getpid(), signal.SIGKILL)
operation.finish()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("phase", ["registered", "midway", "before_result", "holding_result"])
def test_killed_client_leaves_nothing_behind(server, phase):
    script = CRASHING_CLIENT.format(
        tests=str(pathlib.Path(__file__).parent), phase=phase, address=server.address
    )
    died = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60)
    assert died.returncode == -signal.SIGKILL
    maps = pathlib.Path(f"/proc/{server.pid}/maps")
    poll(lambda: "memfd:keepset" not in maps.read_text())
    with keepset.Client.connect(server.address) as client:
        assert client.compress(layers=random_layers(), **spec()).outcome == "compressed"


def test_sigterm_drains_and_exits_zero():
    server = ServerProcess(binary())
    with keepset.Client.connect(server.address) as client:
        client.compress(layers=random_layers(), **spec())
    assert server.stop() == 0
