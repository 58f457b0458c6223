"""How much device memory an operation takes, asked in process."""

import pytest

from keepset import table_file
from keepset.in_process import Engine, EngineError

from conftest import MODEL, SEQ_LEN, WINDOW

SHAPE = {"model": MODEL, "seq_len": SEQ_LEN, "num_rows": WINDOW, "budget_tokens": 24}


@pytest.mark.parametrize("row_move", ["gathered", "in_place", "stay"])
@pytest.mark.parametrize("handover", ["together", "one_by_one"])
def test_host_memory_takes_none_of_a_device(engine, handover, row_move):
    table = table_file.uniform_table(MODEL, name="tiny", version="1", seq_len=SEQ_LEN)
    assert engine.device_bytes(**SHAPE, policy="compilerkv", table=table, handover=handover, row_move=row_move) == 0


@pytest.mark.parametrize(("name", "message"), [
    ("kv_dtype", "kv_dtype='odd', want one of float32, float16, bfloat16"),
    ("handover", "handover='odd', want one of together, one_by_one"),
    ("row_move", "row_move='odd', want one of gathered, in_place, stay"),
])
def test_an_unknown_choice_is_refused(engine, name, message):
    with pytest.raises(ValueError, match=message):
        engine.device_bytes(**SHAPE, policy="snapkv", **{name: "odd"})


def test_device_memory_of_the_cpu_is_refused(build):
    with pytest.raises(EngineError, match="device_memory_bytes=1048576, want none"):
        Engine(build.library, device_memory_bytes=1 << 20)


def test_window_kernels_of_the_cpu_are_refused(build):
    with pytest.raises(EngineError, match='window_kernels="hopper"'):
        Engine(build.library, window_kernels="hopper")
