"""The report for a person, from the same data as the JSON file."""

from __future__ import annotations

from collections.abc import Iterator

OURS = "observation_heads"
_TASKS = {
    "number": "question inside the prompt, one fact asked",
    "multi": "question inside the prompt, two facts asked",
    "later": "query-agnostic: eight facts asked after compression",
}


def markdown(found: dict) -> str:
    """The whole page; every number in it comes from `found`."""
    lines = [
        "# Observation heads",
        "",
        f"Written by `{found['command']}` (`make evidence-heads`) with libkeepset "
        f"{found['versions']['keepset']}, backend {found['versions']['backend']}, numpy "
        f"{found['versions']['numpy']}. Raw predictions: `observation_heads.json`. What a table of this "
        "kind is: [docs/observation-heads.md](../observation-heads.md).",
        "",
    ]
    lines += _verdict(found)
    lines += _constructed(found["constructed"])
    lines += _small(found)
    return "\n".join(lines) + "\n"


def _difference(one: dict) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"


def _best_other(rows: dict, budget: str) -> tuple[str, dict]:
    others = {name: one[budget] for name, one in rows["methods"].items()
              if not name.startswith(OURS) and name != "shuffled"}
    best = max(others, key=lambda name: others[name]["exact"])
    return best, others[best]


def _reading(difference: dict) -> str:
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "no difference shown"


def _readings(found: dict) -> Iterator[str]:
    for rows in found["small_model"]["tasks"].values():
        for budget in map(str, found["budgets"]):
            if rows["methods"]:
                yield _reading(_best_other(rows, budget)[1]["ours_minus_this"])


def _verdict(found: dict) -> Iterator[str]:
    """Against the best of the others, budget by budget: where the interval excludes 0."""
    cells = list(_readings(found))
    yield "## In short"
    yield ""
    yield (f"On the small model the compiled table is better than the best other method in "
           f"{cells.count('better')} of {len(cells)} cells, worse in {cells.count('worse')}, and no "
           "difference is shown in the others. It has only 8 query heads, of which those of the last "
           "layer can all retrieve, so shuffled weights do well on questions inside its prompt: the "
           "constructed models, not this one, show that it matters which heads observe. With the norm "
           "contrast the needed tokens differ in their values alone, which no observation reads.")
    yield ""
    yield ("Small model, compiled table against the best other method of the same budget (tables of "
           "ours that are compiled or shuffled aside); paired 95 % interval over prompts.")
    yield ""
    yield "| task | budget | ours | best other | difference | reading |"
    yield "|---|---|---|---|---|---|"
    for task, rows in found["small_model"]["tasks"].items():
        for budget in map(str, found["budgets"]):
            if not rows["methods"]:
                continue
            best, other = _best_other(rows, budget)
            difference = other["ours_minus_this"]
            yield (f"| {task} | {budget} | {rows['methods'][OURS][budget]['exact']:.2f} | {best} "
                   f"{other['exact']:.2f} | {_difference(difference)} | {_reading(difference)} |")
    yield ""


def _observations(table: dict) -> str:
    return ", ".join(f"({one['layer']}, {one['head']}) {one['rows']} {one['weight']:.2f}"
                     for one in table["observations"])


def _constructed(cases: list[dict]) -> Iterator[str]:
    yield "## Constructed models"
    yield ""
    yield ("The needed positions are known by construction (`keepset.eval.constructed`): every fact is "
           "asked after the prompt of 2,048 tokens. One set for all layers, so the budget is 96 per "
           "layer that holds answers. Share of exact answers.")
    yield ""
    for case in cases:
        rows = case["rows"]
        yield f"### {case['title']}, budget {case['budget']}"
        yield ""
        yield f"Table: {_observations(case['table'])}."
        yield ""
        yield "| method | exact | 95 % | ours minus this |"
        yield "|---|---|---|---|"
        for name, budgets in rows["methods"].items():
            one = budgets[str(case["budget"])]
            low, high = one["interval"]
            yield (f"| {name} | {one['exact']:.2f} | {low:.2f} .. {high:.2f} | "
                   f"{_difference(one['ours_minus_this'])} |")
        yield ""


def _small(found: dict) -> Iterator[str]:
    part = found["small_model"]
    yield "## Small model"
    yield ""
    yield (f"`{part['revision']}`, 2 layers of 4 query heads, 1,024 words of text with 32 facts. Tables "
           f"were compiled on {part['calibration_text']}, tests run on {part['test_text']} (seeds "
           f"{part['test_seeds'][0]} to {part['test_seeds'][1] - 1}); neither was trained on. 4 first "
           "and 16 last positions stay for every method, inside the budget. `other tasks`: compiled "
           "without a prompt of the tested task. Counted are prompts that the full cache answers. "
           "Per-head methods keep their own set in every KV head.")
    yield ""
    gate = ", ".join(f"{task} {share:.2f}"
                     for task, share in part["full_cache_on_further_tasks"].items())
    yield (f"Left out, because this model does not do them with its full cache (share exact: {gate}); a "
           "summary has no meaning for it. Its prompts are shorter than the 1k to 8k tokens of a real "
           "model's. Whether tables of this kind help on a real model is not shown here.")
    yield ""
    for task, rows in part["tasks"].items():
        yield f"### {task}: {_TASKS[task]}"
        yield ""
        yield (f"{rows['answered_by_full_cache']} of {rows['prompts']} prompts; full cache "
               f"{rows['full']:.2f} exact.")
        yield ""
        head = " | ".join(str(budget) for budget in found["budgets"])
        yield f"| method | {head} |"
        yield "|---|" + "---|" * len(found["budgets"])
        for name, budgets in rows["methods"].items():
            cells = [f"{one['exact']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]"
                     for one in budgets.values()]
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""
    yield "### Tables"
    yield ""
    yield ("| compiled on | observations (layer, head) rows weight | pool, dilate | recall held out | "
           "worst task | all alike | shuffled | best possible | measured loss by size |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for key, table in part["tables"].items():
        losses = ", ".join(f"{size}: {value:.2f}"
                           for size, value in table["measured_loss_by_size"].items())
        yield (f"| {key} | {_observations(table)} | {table['settings']['pool_kernel']}, "
               f"{table['settings']['dilate']} | {table['held_out_recall']:.2f} | "
               f"{table['worst_task']} {table['worst_task_recall']:.2f} | "
               f"{table['uniform_recall']:.2f} | {table['shuffled_recall']:.2f} | "
               f"{table['oracle_recall']:.2f} | {losses} |")
    yield ""
    yield "### Predicted miss rate"
    yield ""
    yield ("Test prompts ordered by the miss rate that the reply predicted, in five bins; the curve was "
           "learned on held-out calibration prompts of the other text.")
    yield ""
    yield "| prompts x budgets | predicted | measured |"
    yield "|---|---|---|"
    for one in part["risk"]:
        yield f"| {one['prompts']} | {one['predicted']:.2f} | {one['measured']:.2f} |"
    yield ""
