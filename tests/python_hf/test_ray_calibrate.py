"""Ray workers of their own for each test; apart from the other Ray tests, whose workers hold every CPU."""

import os

import numpy as np
import pytest

from keepset import table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.__main__ import calibrate
from keepset.calibrate.prompts import ConstructedAdapter, SmallModelAdapter
from keepset.calibrate.ray_rollouts import RayRollouts
from keepset.calibrate.rollouts import Weights
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel


def test_a_prompt_that_ends_every_worker_ends_the_run(build):
    # A local class travels to the workers by value: they cannot import this file.
    class Deadly(ConstructedAdapter):
        def prompts(self, seeds):
            os._exit(1)

    adapter = Deadly(constructed.marker_model(), 640, 4)
    with RayRollouts(build.library, adapter, range(1), [48], num_workers=1, seed=0, parameters={},
                     actions_per_state=1) as rollouts:
        with pytest.raises(CalibrationError, match="died 3 times over the same prompt"):
            rollouts.headers()


def test_a_worker_that_cannot_start_says_why(tmp_path):
    adapter = ConstructedAdapter(constructed.marker_model(), 640, 4)
    with RayRollouts(tmp_path / "absent.so", adapter, range(1), [48], num_workers=1, seed=0,
                     parameters={}, actions_per_state=1) as rollouts:
        with pytest.raises(CalibrationError, match="a worker cannot start: .*absent.so"):
            rollouts.headers()


def test_calibration_with_workers_compiles_the_same_actions(build, tmp_path):
    adapter = SmallModelAdapter(SmallModel.load(), seq_len=200, num_facts=8, num_questions=2)
    tables = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        outcome = calibrate(
            build, adapter, folder / "records.jsonl", seeds=range(2), budgets=[32],
            alpha_scope="global", actions=5, max_rounds=1, name="t", version="1", bins=(1, 1),
            say=lambda line: None, workers=workers)
        tables.append(Weights.of(table_file.read_table(outcome.table)))
    np.testing.assert_array_equal(tables[0].head_weights, tables[1].head_weights)
    np.testing.assert_array_equal(tables[0].gate_thresholds, tables[1].gate_thresholds)
