"""A compilerkv table among the methods of the observation_heads report."""

import dataclasses
import math

import numpy as np
import pytest

from keepset import table_file
from keepset.calibrate.head_prompts import OutOfTime, RememberedTasks
from keepset.calibrate.task_prompts import TaskAdapter
from keepset.evidence.head_compilerkv import COMPILED, CompilerKvSettings, compile_table
from keepset.evidence.head_measure import measure, strata_of, summarize
from keepset.evidence.head_methods import OURS, UNCHOSEN, compilerkv
from keepset.evidence.head_part import HeadPart, Settings
from keepset.evidence.observation_heads_report import _POLICIES, _best_other, _methods

LENGTH = 256
SETTINGS = CompilerKvSettings(("number", "multi"), LENGTH, (48,), action_step=20)


def silent(_: str) -> None:
    pass


def test_tasks_take_turns_and_what_is_protected_stays(engine, small):
    adapter = TaskAdapter(RememberedTasks(small), ("number", "multi"), LENGTH, "small")
    prompts = list(adapter.prompts(range(3)))
    assert [one.prompt_id for one in prompts] == [
        small.prompt(task, seed, LENGTH).prompt_id
        for task, seed in (("number", 0), ("multi", 0), ("number", 1))]
    base = small.prompt("number", 0, LENGTH)
    first = prompts[0]
    assert (first.protect_sink, first.protect_window) == (base.protect_sink, base.protect_window)
    everything = [np.arange(first.seq_len)] * len(first.layers)
    assert first.loss(everything) == first.full_loss == base.outcome(everything).loss


def test_rollouts_decide_what_the_method_keeps(engine, small):
    """The mean row and the values' norms are all that compilerkv reads."""
    table = table_file.uniform_table(small.fingerprint, name="uniform", version="1")
    prompt = small.prompt("number", 0, LENGTH)
    (short,) = TaskAdapter(RememberedTasks(small), ("number",), LENGTH, "small").prompts((0,))
    decided = engine.decide(
        model=small.fingerprint, layers=short.layers, table=table, budget_tokens=48, ppl=short.ppl,
        parameters={"alpha_scope": "head"}, protect_sink=short.protect_sink,
        protect_window=short.protect_window).keep_indices
    for one, other in zip(decided, compilerkv(engine, table)(prompt, 48)):
        np.testing.assert_array_equal(one, other)


def test_a_table_is_compiled_once_and_an_interrupted_run_goes_on(build, engine, small, tmp_path):
    late = RememberedTasks(small)
    asked = []

    def stop_in_time(line: str) -> None:
        asked.append(line)
        late._until = -math.inf

    with pytest.raises(OutOfTime):
        compile_table(build, late, "small", SETTINGS, tmp_path, stop_in_time)
    assert asked
    table, report = compile_table(build, RememberedTasks(small), "small", SETTINGS, tmp_path, silent)
    content = table_file.read_table(table)
    assert content.head_weights.shape == (1, 2, 4) and report["rounds"] == 1
    # Both gates twice and both weights once, of 2 layers and 4 KV heads, on 2 prompts.
    assert report["records"] == 2 * (2 * 2 * 2 + 4 * 2)
    # It serves budgets that it was not compiled at too.
    assert np.mean([len(one) for one in compilerkv(engine, table)(small.prompt("code", 0, LENGTH), 64)]) <= 64
    again = compile_table(build, RememberedTasks(small, until=-math.inf), "small", SETTINGS, tmp_path,
                          silent)
    assert again == (table, report)


def test_a_method_of_some_prompts_is_no_rival_of_all(tmp_path, small):
    def of(count):
        return lambda prompt, budget: [np.arange(count if count else prompt.seq_len)] * 2

    common = {OURS: of(0), "nothing": of(4)}
    outcomes = [measure(tmp_path, small, "number", 0, 256, {**common, COMPILED: of(0)}, (40,)),
                measure(tmp_path, small, "number", 0, 512, common, (40,))]
    rows = summarize(outcomes, (40,))
    assert rows["methods"][COMPILED]["40"]["prompts"] == 1
    assert rows["methods"][COMPILED]["40"]["ours_minus_this"]["mean"] == 0
    assert rows["prompts_by_length"] == {"256": 1, "512": 1}
    assert _best_other(rows, "40")[0] == "nothing"
    told = "\n".join(_methods({"budgets": [40]}, "inside", "number", rows))
    assert "less than the budget: nothing 4 of 40." in told
    assert f"| {COMPILED} (prompts of 256 tokens alone: 1) | 1.00 [" in told


@pytest.mark.parametrize("new", [(COMPILED,), (UNCHOSEN,), (COMPILED, UNCHOSEN)])
def test_without_time_for_new_methods_the_others_stand(tmp_path, small, new):
    methods = {OURS: lambda prompt, budget: [np.arange(prompt.seq_len)] * 2}
    settings = Settings({"inside": ("number",)}, (LENGTH,), (40,), (40,), prompts=(1,), failing_prompts=1,
                        gate_prompts=1, fit_lengths=(LENGTH,))
    part = HeadPart(None, None, tmp_path, RememberedTasks(small), RememberedTasks(small), small.PROBE,
                    settings, silent)
    before, _ = part._outcomes("inside", "number", LENGTH, True, methods)
    late = dataclasses.replace(part, test=RememberedTasks(small, until=-math.inf))
    after, wanted = late._outcomes("inside", "number", LENGTH, True,
                                   methods | dict.fromkeys(new, methods[OURS]))
    assert after == before and wanted == 1


def test_lengths_of_few_prompts_are_drawn_with_shorter_ones():
    assert strata_of([1] * 12 + [2] * 6 + [4] * 3 + [8] * 2) == [1] * 12 + [2] * 6 + [4] * 5
    assert strata_of([1] * 8 + [2] * 2 + [4]) == [1] * 11
    assert strata_of([1, 1, 2, 2, 2, 2]) == [1, 1, 2, 2, 2, 2]


def test_the_report_says_where_every_policy_is(engine):
    assert set(engine.policies) == set(_POLICIES)
