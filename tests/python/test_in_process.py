"""Engine: arrays of every kind become the same views, and what C would cut off is refused."""

import dataclasses
import math

import numpy as np
import pytest

import keepset
from keepset.calibrate.head_prompts import MAX_ROWS
from keepset.calibrate.observation_heads import heads_table
from keepset.in_process import Engine, EngineError

from conftest import MODEL, SEQ_LEN, WINDOW, random_layers

SCALE = MODEL.head_dim**-0.5


def keep(engine: Engine, layers: list[keepset.Layer] | dict[int, keepset.Layer], **changes):
    listed = dict(layers if isinstance(layers, dict) else enumerate(layers))
    asked = {"model": MODEL, "policy": "snapkv", "layers": listed, "seq_len": SEQ_LEN,
             "budget_tokens": 24, "softmax_scale": SCALE, "row_positions": range(SEQ_LEN - WINDOW, SEQ_LEN)}
    return engine.keep(**(asked | changes))


def sets(kept) -> list[list[int]]:
    return [one.tolist() for layer in kept.keep_indices for one in layer]


def mapped(layers: list[keepset.Layer], change, **more) -> list[keepset.Layer]:
    return [dataclasses.replace(one, **{name: change(getattr(one, name)) for name in ("q_window", "k", "v")},
                                **more) for one in layers]


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def of_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def in_heads_last(array: np.ndarray) -> np.ndarray:
    """The same numbers with the heads of a token side by side."""
    return np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2)


def paged(array: np.ndarray, seed: int) -> keepset.PagedKv:
    """Blocks of 16 tokens in another order, the last of the pool unused."""
    heads, tokens, dim = array.shape
    order = np.random.default_rng(seed).permutation(tokens // 16)
    pool = np.full((len(order) + 1, 16, heads, dim), np.nan, np.float32)
    for block, at in enumerate(order):
        pool[at] = array[:, block * 16 : (block + 1) * 16].transpose(1, 0, 2)
    return keepset.PagedKv(pool, order)


def test_sixteen_bit_numbers_are_read_as_what_they_are(engine):
    half = mapped(random_layers(1), lambda one: one.astype(np.float16))
    assert sets(keep(engine, half)) == sets(keep(engine, mapped(half, lambda one: one.astype(np.float32))))
    brain = mapped(random_layers(2), bfloat16_bits, dtype="bfloat16")
    assert sets(keep(engine, brain)) == sets(keep(engine, mapped(brain, of_bits, dtype=None)))
    assert sets(keep(engine, brain)) != sets(keep(engine, half))


def test_bytes_are_those_of_the_caches_type(engine):
    layers = random_layers()
    plain = keep(engine, layers).document["bytes_before"]
    assert keep(engine, mapped(layers, lambda one: one.astype(np.float16))).document["bytes_before"] == plain / 2
    nothing = keep(engine, [], policy="random", row_positions=[], kv_dtype="bfloat16")
    assert nothing.document["bytes_before"] == plain / 2


def test_strides_and_blocks_are_followed(engine):
    layers = random_layers(3)
    want = sets(keep(engine, layers))
    strided = mapped(layers, in_heads_last)
    assert not strided[0].k.flags.c_contiguous
    assert sets(keep(engine, strided)) == want
    blocks = [dataclasses.replace(one, k=paged(one.k, 1), v=paged(one.v, 2)) for one in layers]
    assert sets(keep(engine, blocks)) == want


def test_heads_that_are_listed_are_found(engine):
    table = heads_table(MODEL, "two", [(1, 1, MAX_ROWS, 1.0), (1, 3, MAX_ROWS, 0.5)])
    asked = {"policy": "observation_heads", "table": table}
    layers = random_layers(4)
    whole = sets(keep(engine, layers, **asked))
    some = keepset.Layer(layers[1].q_window[[1, 3]], layers[1].k, qo_heads=(1, 3))
    assert sets(keep(engine, {1: some}, **asked)) == whole


def test_arrays_that_c_would_misread_are_refused(engine):
    layers = random_layers()
    for change, message in (
            (lambda one: one.astype(">f4"), "dtype >f4, want float32"),
            (lambda one: one.astype(np.float64), "dtype float64, want float32"),
            (bfloat16_bits, "dtype uint16, want float32"),
            (lambda one: one[:, ::-1], "none negative"),
            (lambda one: np.repeat(one, 2, -1)[..., ::2], "innermost stride is 2, want 1"),
            (lambda one: one[0], "want 3 axes")):  # fmt: skip
        with pytest.raises(ValueError, match=f"layer 0: .*{message}"):
            keep(engine, mapped(layers, change))


@pytest.mark.parametrize("name", ["seq_len", "budget_tokens", "protect_sink", "protect_window"])
def test_numbers_that_c_would_cut_off_are_refused(engine, name):
    with pytest.raises(ValueError, match=f"{name}={2**64 + 24}, want"):
        keep(engine, random_layers(), **{name: 2**64 + 24})
    with pytest.raises(EngineError) as error:
        keep(engine, random_layers(), **{name: -1})
    assert error.value.code == "INVALID_ARGUMENT"


def test_rows_that_are_no_positions_are_refused(engine):
    last = np.arange(SEQ_LEN - WINDOW, SEQ_LEN)
    for rows, message in ((last + 0.5, "want a vector of integers"), (last[None], "want a vector of integers"),
                          (last.astype(np.uint64) + 2**63, "row_positions: .*, want")):
        with pytest.raises(ValueError, match=message):
            keep(engine, random_layers(), row_positions=rows)
    assert sets(keep(engine, random_layers(), row_positions=last.astype(np.int32))) == sets(
        keep(engine, random_layers()))


def test_a_block_table_that_c_would_cut_off_is_refused(engine):
    layers = random_layers()
    blocks = paged(layers[0].k, 1)
    blocks.block_table = np.asarray(blocks.block_table, np.int64) + 2**32
    with pytest.raises(ValueError, match="layer 0: k: block_table"):
        keep(engine, [dataclasses.replace(layers[0], k=blocks)])


def test_words_end_where_they_end(engine):
    with pytest.raises(ValueError, match="want text without NUL"):
        keep(engine, random_layers(), policy="snapkv\0x")
    with pytest.raises(ValueError, match="want text without NUL"):
        keep(engine, random_layers(), parameters={"kernel_size": "5\0x"})


def test_a_closed_engine_says_so(build):
    engine = Engine(build.library)
    engine.close()
    engine.close()
    for use in (lambda: engine.backend, lambda: engine.policies, lambda: keep(engine, random_layers()),
                lambda: engine.input_needs(model=MODEL, policy="snapkv")):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()


def test_an_engine_serves_on_after_an_error(engine):
    want = sets(keep(engine, random_layers()))
    broken = random_layers()
    broken[2].k[0, 5, 0] = math.nan
    with pytest.raises(EngineError, match="layer 2"):
        keep(engine, broken)
    assert sets(keep(engine, random_layers())) == want


def test_short_device_memory_keeps_everything_where_that_is_asked_for(build):
    library = build.root / "tests" / "kernels" / "cuda" / "libemulated_libkeepset.so"
    long = 60_000
    shape = dataclasses.replace(MODEL, num_layers=1)
    k = np.ones((2, long, 8), np.float32)
    asked = {"model": shape, "policy": "knorm", "layers": {0: keepset.Layer(k=k)}, "seq_len": long,
             "row_positions": [], "budget_tokens": 24, "softmax_scale": SCALE}
    with Engine(library, backend="cuda", device_memory_bytes=512 << 10) as engine:
        with pytest.raises(EngineError) as error:
            engine.keep(**asked)
        assert error.value.code == "RESOURCE_EXHAUSTED"
        kept = engine.keep(**asked, keep_full_on_short_memory=True)
    assert (kept.document["outcome"], kept.document["reason"]) == ("kept_full", "shed")
    assert np.array_equal(kept.sets()[0][0], np.arange(long))
