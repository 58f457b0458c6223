"""The Python client against a running keepsetd, over every transport."""

import numpy as np
import pytest
from conftest import MODEL, SEQ_LEN, poll, random_layers, sets_of, spec

import keepset

POLICIES = ("full", "streaming_llm", "random", "tova", "snapkv", "knorm", "compilerkv")


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


def test_statistics_of_a_session_are_its_own(server):
    with keepset.Client.connect(server.address) as one, keepset.Client.connect(server.address) as other:
        one.compress(layers=random_layers(), **spec(policy="tova"))
        own = one.statistics(own_session=True)
        assert [(row.policy, row.outcomes[0].count) for row in own.operations] == [("tova", 1)]
        assert {stage.stage for stage in own.operations[0].stages} >= {"score", "select"}
        assert not other.statistics(own_session=True).operations
        assert other.statistics().operations and other.statistics().sessions >= 2


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


def test_a_refused_operation_leaves_no_memory_behind(server):
    broken = random_layers()
    broken[2].k[0, 3, 2] = np.nan
    with keepset.Client.connect(server.address, transport="memfd") as client:
        held = []
        for _ in range(3):
            with pytest.raises(keepset.InvalidInput, match="layer 2: k"):
                client.compress(layers=broken, gather=True, **spec())
            operation = client.begin(gather=True, **spec())
            operation.observe(broken[0])
            operation.cancel()
            with pytest.raises(ValueError, match="2 dimensions, want 3"):
                client.compress(layers=[broken[0], keepset.Layer(k=broken[1].k[0])], **spec(policy="knorm"))
            held.append(len(client._regions))
            assert len(client._spare) == held[-1]
        assert held[0] == held[-1] > 0


@pytest.mark.parametrize(("changes", "says"), [
    ({"protect_sink": -1}, "protect_sink=-1, want an integer in 0.."),
    ({"seq_len": 2**64}, f"seq_len={2**64}, want"),
    ({"deadline_ms": 2**32}, f"deadline_ms={2**32}, want an integer in 0..{2**32 - 1}"),
    ({"row_positions": [1, 2.5]}, r"row_positions\[1\]=2.5, want an integer"),
    ({"budget": keepset.Budget.tokens(-3)}, "budget tokens=-3, want"),
    ({"layers": {-1: keepset.Layer()}}, "layer=-1, want"),
])
def test_numbers_that_no_field_holds_are_refused_at_home(client, changes, says):
    with pytest.raises(keepset.InvalidInput, match=says):
        client.compress(**{"layers": random_layers(), **spec(**changes)})


def test_queries_of_sixteen_bits_go_with_keys_of_thirty_two(client):
    layers = random_layers()
    for layer in layers:
        layer.q_window = (layer.q_window.view(np.uint32) >> 16).astype(np.uint16)
        layer.dtype = "bfloat16"
    mixed = client.compress(layers=layers, **spec())
    for layer in layers:
        layer.q_window = (layer.q_window.astype(np.uint32) << 16).view(np.float32)
        layer.dtype = None
    assert sets_of(mixed) == sets_of(client.compress(layers=layers, **spec()))


@pytest.mark.parametrize("policy", ["random", "streaming_llm"])
def test_layers_of_which_nothing_is_read_may_be_left_out(client, policy):
    """The cache's type is stated, since no layer shows it."""
    asked = spec(policy=policy)
    assert client.input_needs(model=MODEL, policy=policy).layers == ()
    whole = client.compress(layers=random_layers(dtype=np.float16), **asked)
    none = client.compress(layers={}, kv_dtype="float16", **asked)
    assert sets_of(none) == sets_of(whole) and none.bytes_before == whole.bytes_before
