"""A whole calibration by Ray workers; apart from the other Ray tests, whose workers hold every CPU."""

import numpy as np

from keepset import table_file
from keepset.calibrate.__main__ import calibrate
from keepset.calibrate.prompts import SmallModelAdapter
from keepset.calibrate.rollouts import Weights
from keepset.eval.small_model import SmallModel


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
