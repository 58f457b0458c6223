"""Rollouts spread over Ray workers; needs the extra `ray`."""

import os
import signal

import pytest

from keepset.calibrate import CalibrationError
from keepset.calibrate.__main__ import Build
from keepset.calibrate.prompts import ConstructedAdapter
from keepset.calibrate.ray_rollouts import RayRollouts, SeededPrompts
from keepset.calibrate.records import StepFile, key_of, read
from keepset.calibrate.rollouts import Rollouts, Weights
from keepset.eval import constructed
from keepset.in_process import Engine

BUDGET = 48
SEEDS = range(3, 6)
MEASURING = {"seed": 3, "parameters": {"alpha_scope": "global"}, "actions_per_state": 4,
             "protect_window": 0}
PAIRED = "t/1@0"


@pytest.fixture(scope="module")
def adapter():
    return ConstructedAdapter(constructed.marker_model(), seq_len=640, num_facts=8)


@pytest.fixture(scope="module")
def ray_rollouts(build: Build, adapter):
    with RayRollouts(build.library, adapter, SEEDS, [BUDGET], num_workers=2, **MEASURING) as two:
        yield two


@pytest.fixture(scope="module")
def alone(build: Build, adapter, tmp_path_factory):
    """Records of one process, of both kinds."""
    out = {}
    with Engine(build.library) as engine:
        rollouts = Rollouts(engine, adapter.fingerprint(), list(adapter.prompts(SEEDS)), [BUDGET],
                            **MEASURING)
        for kind in ("head", "gate"):
            out[kind] = run(rollouts, adapter, kind, tmp_path_factory.mktemp("alone") / "r.jsonl")
    return out


def run(rollouts, adapter, kind, path, progress=lambda done: None):
    with StepFile(path, PAIRED) as file:
        rollouts.run(kind, Weights.neutral(adapter.fingerprint(), 1), PAIRED, file, progress)
    return list(read(path))


def as_set(records):
    """Refuses duplicates."""
    keyed = {key_of(record): tuple(sorted(record.items())) for record in records}
    assert len(keyed) == len(records)
    return keyed


@pytest.mark.parametrize("kind", ["head", "gate"])
def test_two_workers_measure_what_one_process_measures(ray_rollouts, alone, adapter, tmp_path, kind):
    assert len(set(ray_rollouts.worker_pids())) == 2
    found = run(ray_rollouts, adapter, kind, tmp_path / "r.jsonl")
    assert len(found) == ray_rollouts.count(kind)
    assert as_set(found) == as_set(alone[kind])


def test_a_killed_worker_is_replaced_and_nothing_counts_twice(ray_rollouts, alone, adapter, tmp_path):
    killed = []

    def kill_one(done: int) -> None:
        if not killed:
            killed.append(ray_rollouts.worker_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    found = run(ray_rollouts, adapter, "head", tmp_path / "r.jsonl", kill_one)
    assert as_set(found) == as_set(alone["head"])
    assert killed[0] not in ray_rollouts.worker_pids()


def test_an_interrupted_step_goes_on_where_it_was(ray_rollouts, alone, adapter, tmp_path):
    path = tmp_path / "r.jsonl"

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ray_rollouts, adapter, "head", path, interrupt)
    first = list(read(path))
    assert 0 < len(first) < len(alone["head"])
    found = run(ray_rollouts, adapter, "head", path)
    assert found[: len(first)] == first
    assert as_set(found) == as_set(alone["head"])


def test_more_workers_than_free_cpus_is_refused(build, ray_rollouts, adapter):
    one_more = RayRollouts(build.library, adapter, SEEDS, [BUDGET], num_workers=1, **MEASURING)
    with pytest.raises(CalibrationError, match="workers=1, but the Ray of this process has 0 free"):
        one_more.__enter__()


def test_prompts_are_read_when_they_are_asked_for(adapter):
    asked = []

    class Counting(ConstructedAdapter):
        def prompts(self, seeds):
            asked.extend(seeds)
            return super().prompts(seeds)

    prompts = SeededPrompts(Counting(adapter.model, 640, 4), range(40, 60))
    assert (len(prompts), asked) == (20, [])
    assert prompts[2].seed == prompts[2].seed == 42
    assert asked == [42]
    for index in range(20):
        assert prompts[index].seed == 40 + index
    # The least recently used one was dropped.
    assert prompts[2].seed == 42
    assert asked.count(42) == 2
