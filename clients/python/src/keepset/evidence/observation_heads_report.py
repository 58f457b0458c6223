"""The report for a person, from the same data as the JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from keepset.evidence.earlier_run import HF_RESULTS, RESULTS
from keepset.evidence.head_compilerkv import COMPILED
from keepset.evidence.head_measure import FEWEST
from keepset.evidence.head_methods import (
    NOVELTY,
    OTHERS,
    OTHERS_FIXED,
    OURS,
    OWN,
    SHUFFLED,
    UNCHOSEN,
    UNCHOSEN_OTHERS,
    UNIFORM,
)
from keepset.evidence.head_novelty_report import novelty_section
from keepset.evidence.head_risk_report import risk_section
from keepset.evidence.head_ways_report import ways_section

_COLUMNS = {
    "needles": "Needles, the question stands in the prompt",
    "inside": "The question stands in the prompt",
    "agnostic": "Query-agnostic: the question is asked after compression",
}
# Share of the budget that counts as spent.
_SPENT = 0.95
# Where the engine's policies are found among the methods, and what of each is not measured.
_POLICIES = {
    "compilerkv": (f"`{UNIFORM}`, `{COMPILED}`",
                   "`alpha_scope` global and layer: one weight for all heads, or all heads of a layer, "
                   "of the same scores. The small model's compiled table is in [evidence.md](evidence.md)"),
    "snapkv": ("`snapkv`, `snapkv, one set`",
               "one set per layer (scope layer_equal), between these two"),
    "streaming_llm": ("`streaming_llm`", ""),
    "tova": ("`tova`; over all layers: `all heads, last row`", ""),
    "knorm": ("`knorm`", "one set for all layers"),
    "random": ("`random`", ""),
    "full": ("table \"What the full cache answers\"", ""),
    "observation_heads": (f"`{OURS}`, `{OTHERS}`, `{SHUFFLED}`, and tables that treat all heads alike",
                          "layer groups and merging by maximum: read by the policy, not compiled"),
}
_SMALL_TASKS = {
    "number": "two numbers of a fact", "multi": "two facts asked",
    "code": "a fact of two words instead of numbers",
    "quotation": "the seven words after seven given ones",
    "tracking": "the later of two values of a name",
    "few_shot": "the label, one of eight, of an example that was shown",
    "summary": "what the full cache writes next, 24 words",
}


def markdown(found: dict, pictures: Sequence[str]) -> str:
    """The whole page; every number in it comes from `found`."""
    lines = [
        "# Observation heads",
        "",
        f"Written by `{found['command']}` (`make evidence-heads`) with libkeepset "
        f"{found['versions']['keepset']}, backend {found['versions']['backend']}, numpy "
        f"{found['versions']['numpy']}. Raw predictions: `{RESULTS}` and, of the Hugging Face model, `{HF_RESULTS}`, "
        "null where they are the full cache's, which stand beside them as `full_of_prompts`. What a table of this "
        "kind is: [docs/observation-heads.md](../observation-heads.md).",
        "",
        _cost(found["run"]),
        "",
    ]
    parts = [(title, found[key], key) for key, title in (
        ("small_model", "Small model"), ("hf_model", "Hugging Face model")) if key in found]
    lines += _short([one[:2] for one in parts])
    lines += _policies(found.get("policies", ()))
    if "hf_model" not in found:
        lines += ["No Hugging Face model was given: whether tables of this kind help on a real model is "
                  "not yet measured by this command. `--hf-model DIRECTORY` adds it.", ""]
    kept = found.get("kept", {})
    for title, part, key in parts:
        lines += _part(title, part, pictures, {name.removeprefix(key).lstrip("."): one
                                               for name, one in kept.items() if name.startswith(key)})
    if "constructed" in found:
        lines += _constructed(found["constructed"], kept.get("constructed"))
    return "\n".join(lines) + "\n"


def _kept(source: dict | None, what: str) -> list[str]:
    if source is None:
        return []
    return [f"**Not measured by this run.** {what} kept from an earlier one, `{source['command']}`, with "
            f"libkeepset {source['versions']['keepset']}, backend {source['versions']['backend']}.", ""]


def _cost(run: dict) -> str:
    return (f"One run, {'resumed' if run['resumed'] else 'from scratch'}: {run['wall_seconds'] / 60:.1f} "
            f"minutes, in which it had {run['cpu_seconds'] / 60:.1f} minutes of processor time on "
            f"{run['cores']} cores." + (" What earlier runs had measured was read from the work folder."
                                        if run["resumed"] else ""))


def _difference(one: dict) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"


def _best_other(rows: dict, budget: str) -> tuple[str, dict]:
    """Chosen in hindsight on these very prompts, which favours the others."""
    others = {name: one[budget] for name, one in rows["methods"].items()
              if name not in OWN and budget in one and not _is_partial(rows, one[budget], budget)}
    sign = -1 if rows["value"] == "exact" else 1
    best = min(others, key=lambda name: sign * others[name]["value"])
    return best, others[best]


def _is_partial(rows: dict, cell: dict, budget: str) -> bool:
    """A method that was measured on some of the prompts alone: fewer than ours at that budget."""
    return cell.get("prompts", 0) < rows["methods"][OURS][budget].get("prompts", 0)


def _reading(rows: dict, difference: dict, prompts: int | None = None) -> str:
    """Where the interval excludes 0; a divergence is better below it. prompts: all by default."""
    if (rows["counted"] if prompts is None else prompts) < FEWEST:
        return "too few prompts"
    low, high = difference["low"], difference["high"]
    if rows["value"] != "exact":
        low, high = -high, -low
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def _cells(part: dict, column: str) -> Iterator[tuple[str, str, dict]]:
    for task, rows in part["columns"][column]["tasks"].items():
        for budget in map(str, part["budgets"]):
            if budget in rows["methods"].get(OURS, {}):
                yield task, budget, rows


def _short(parts: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """Counts of cells; no judgement that the numbers do not make."""
    yield "## In short"
    yield ""
    yield ("A cell is a task at a budget, over all lengths. A compiled table stands against the best "
           "other method of that cell, picked in hindsight, and against some fixed ones; better and "
           "worse are cells whose paired 95 % interval excludes 0. Tasks that the full cache seldom "
           "answers and summaries are compared by KL divergence from the full cache, the others by exact "
           "answers. Tables: compiled on all tasks of the column; on its other tasks, so that none is "
           f"both learned from and tested. Prompts are drawn within their lengths; a length of fewer than "
           f"{FEWEST} is drawn together with the next shorter one. Cells of fewer than {FEWEST} prompts are left "
           "out here.")
    yield ""
    yield ("| model, column | scored by | against | cells | all tasks: better | worse | no difference "
           "shown | other tasks: better | worse | no difference shown |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for title, part in parts:
        for column in part["columns"]:
            for value, name in (("exact", "exact answers"), ("kl", "KL divergence")):
                cells = [one for one in _cells(part, column)
                         if one[2]["value"] == value and one[2]["counted"] >= FEWEST]
                if not cells:
                    continue
                rivals = ["best other", "snapkv", "tova", UNIFORM, COMPILED, "keydiff, per head",
                          SHUFFLED, UNCHOSEN, UNCHOSEN_OTHERS]
                if column == "agnostic":
                    rivals.insert(5, "expected attention, per head")
                for rival in rivals:
                    against = [(rows, _best_other(rows, budget)[1] if rival == "best other" else
                                rows["methods"][rival][budget]) for _, budget, rows in cells
                               if rival == "best other" or budget in rows["methods"].get(rival, {})]
                    if not against:
                        continue
                    counts = [Counter(_reading(rows, one[key], one.get("prompts"))
                                      for rows, one in against if one[key])
                              for key in ("ours_minus_this", "other_tasks_minus_this")]
                    told = (str(count[word]) if count else "-" for count in counts
                            for word in ("better", "worse", "no difference shown"))
                    yield (f"| {title}, {column} | {name} | {rival} | {len(against)} | "
                           f"{' | '.join(told)} |")
    yield ""


def _policies(names: Sequence[str]) -> Iterator[str]:
    if not names:
        return
    yield "## Every policy of the engine"
    yield ""
    yield "| policy | here | not measured here |"
    yield "|---|---|---|"
    for name in names:
        here, left_out = _POLICIES.get(name, ("-", "the policy"))
        yield f"| `{name}` | {here} | {left_out or '-'} |"
    yield ""


def _part(title: str, part: dict, pictures: Sequence[str], kept: dict[str, dict]) -> Iterator[str]:
    """kept: where the part ("") or its columns are from when another run measured them."""
    layers, heads = part["layers_and_heads"]
    yield f"## {title}"
    yield ""
    yield from _kept(kept.get(""), "This section is")
    lengths, fitted = (", ".join(f"{one:,}" for one in part[key]) for key in ("lengths", "fit_lengths"))
    counts = ", ".join(map(str, part["prompts"]))
    yield (f"`{part['revision']}`, {layers} layers of {heads} query heads; prompts of "
           f"about {lengths} tokens, {counts} of each task. Tables were compiled on "
           f"{part['calibration_text']}, prompts of about {fitted} tokens, "
           f"{part['calibration_prompts']} per task and length at budgets "
           f"{' and '.join(map(str, part['fit_budgets']))}{_other_budgets(part)}, tests run on {part['test_text']} (seeds from "
           f"{part['test_seeds'][0]}). `{OURS}` is "
           f"compiled on all tasks of its column that the full cache answers; `{OTHERS}` without a "
           f"prompt of the tested task; `{SHUFFLED}` carries the same weights on heads drawn anew for "
           f"each seed; `{UNCHOSEN}` has every head of the model alike, by the rows, pooling and dilation of the "
           f"table of all tasks{_unmeasured(part)}, and `{UNCHOSEN_OTHERS}` by those of the table of the other "
           "tasks. The first 4 positions, the last window and the question stay for every method, inside the "
           "budget. Per-head methods keep their own set in every KV head. The methods "
           "called DuoAttention-like and RazorAttention-like give the bytes of the budget to chosen KV "
           "heads in full; neither the former's trained gates nor the latter's compensation token are "
           "reproduced."
           + "".join(f" `{OTHERS_FIXED}` ({column}): {number} observations by recall on the other tasks, "
                     "not pooled, dilated by 12, no choice by measured loss."
                     for column, number in part["fixed_heads"].items())
           + "".join(f" No table learned from `{task}`: it is tested by those of its column, so that both columns "
                     "of figures are of the same table." for task in part.get("untaught", ()))
           + (f" `{NOVELTY}`: {part['novelty_heads']} KV heads chosen by recall on the other tasks, pooled over 5 "
              "positions, one set; it reads the keys of these heads and no query."
              if part.get("novelty_heads") else ""))
    yield ""
    if "model" in part:
        yield from _model(part)
    yield from _missing(part)
    if "trained" in part:
        yield (f"The model was trained on prompts of {part['trained'][0]:,} to {part['trained'][1]:,} "
               "words; longer ones would measure the model, not the method, so 4k and 8k are left "
               "to a real model. Its tasks are those of a real model in words, as near as may be to "
               "the facts that it was trained on: "
               + "; ".join(f"`{task}`: {text}" for task, text in _SMALL_TASKS.items())
               + ". So other tasks are near relatives of the tested one; how far a table carries over "
               "to unlike tasks shows on a real model alone.")
        yield ""
    yield from _compilerkv(part)
    yield from _full_cache(part)
    yield from _free(part)
    for column in part["columns"]:
        yield from _column(part, column, kept.get(column))
    yield from _tables(part)
    yield from ways_section(part)
    yield from novelty_section(part)
    yield from risk_section(part, pictures)


def _unmeasured(part: dict) -> str:
    measured = any(UNCHOSEN in rows["methods"] for column in part["columns"].values()
                   for rows in column["tasks"].values())
    return "" if measured else " (not measured yet)"


def _other_budgets(part: dict) -> str:
    """What a table does at budgets that it was not compiled for."""
    smaller = [one for one in part["budgets"] if one < min(part["fit_budgets"])]
    if not smaller:
        return ""
    return (f" (so pooling, dilation and observations at {' and '.join(map(str, smaller))} are those that serve more "
            "positions: no table was compiled for fewer)")


def _model(part: dict) -> Iterator[str]:
    model, versions = part["model"], part["versions"]
    layers, heads, kv_heads, head_dim = model["heads"]
    yield (f"The model calls itself `{model['name']}` in its configuration: {model['parameters']:,} "
           f"parameters in {model['dtype']}, {layers} layers of {heads} query and {kv_heads} KV heads, "
           f"head dimension {head_dim}. Run with torch {versions['torch']}, transformers "
           f"{versions['transformers']}, {versions['threads']} thread. Teacher-forced: an answer is exact "
           "where every token of it is the most likely one, which is what greedy decoding writes. SHA-256 "
           "of its files:")
    yield ""
    for name, digest in model["files"].items():
        yield f"- `{name}` `{digest}`"
    yield ""


def _missing(part: dict) -> Iterator[str]:
    if not part["missing"]:
        return
    yield ("**Not measured yet** (the run was given no more time; the same command goes on): "
           + "; ".join(f"{one['column']} {one['task']} at {one['length']:,}: {one['prompts']} of "
                       f"{one['wanted']} prompts" for one in part["missing"]) + ".")
    yield ""


def _compilerkv(part: dict) -> Iterator[str]:
    found = part.get("compilerkv")
    if not found:
        return
    heads, gates, states = found["changed_states"][-1]
    yield (f"`{COMPILED}`: a table of `keepset tables compile` from {found['records']:,} calibration "
           f"records ({found['prompts']} prompt of each of {', '.join(found['tasks'])} of the calibration "
           f"text at {found['length']:,} tokens, budgets {' and '.join(map(str, found['budgets']))}, every "
           f"{found['action_step']}th action of the paper's grids, one entropy and one perplexity bin). It "
           f"alternated {found['rounds']} of at most {found['rounds_asked']} rounds of heads and gate and had "
           f"{'settled' if found['settled'] else 'not settled'}: the last round changed {heads + gates} of "
           f"{states} states. More records might make a better table. At other "
           "budgets it uses the nearest of these. It is measured on prompts of "
           f"{found['length']:,} tokens alone, those of its calibration: what is said of it says nothing of other "
           "lengths, and a cell compares with it on these prompts.")
    yield ""


def _free(part: dict) -> Iterator[str]:
    """Arithmetic that decides small budgets."""
    budgets = part["budgets"]
    rows_of = [(column, task, rows) for column, found in part["columns"].items()
               for task, rows in found["tasks"].items() if rows.get("protected_by_length")]
    if not rows_of:
        return
    yield "### Positions that a method may choose"
    yield ""
    yield ("What is protected (sinks, last window, question and what the template puts behind it) is "
           "inside the budget, so of it only the rest can be chosen: least and most over the prompts of all "
           "lengths; a budget that is filled is not measured. A table that dilates by 12 spends up to 13 "
           "positions on one place.")
    yield ""
    yield f"| column | task | protected | {' | '.join(f'free of {one}' for one in budgets)} |"
    yield "|---|---|---|" + "---|" * len(budgets)
    for column, task, rows in rows_of:
        least = min(low for low, _ in rows["protected_by_length"].values())
        most = max(high for _, high in rows["protected_by_length"].values())
        cells = (_span(max(0, one - most), max(0, one - least)) for one in budgets)
        yield f"| {column} | {task} | {_span(least, most)} | {' | '.join(cells)} |"
    yield ""


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least}..{most}"


def _full_cache(part: dict) -> Iterator[str]:
    lengths = [str(one) for one in part["lengths"]]
    yield "### What the full cache answers"
    yield ""
    yield (f"Share of exact answers with nothing dropped. Below {part['floor']:.1f} (over the prompts "
           "of the calibration text) a task is neither learned from nor compared by answers. In brackets "
           f"the prompts of each length: with fewer than {FEWEST} a figure is no more than a direction, "
           "and - is not measured.")
    yield ""
    yield f"| column | task | prompts | {' | '.join(lengths)} | compared by |"
    yield "|---|---|---|" + "---|" * (len(lengths) + 1)
    for column, rows_of in part["columns"].items():
        for task, rows in rows_of["tasks"].items():
            counts = rows.get("prompts_by_length", {})
            shares = [" ".join(filter(None, (
                          f"{rows['full_by_length'][one]:.2f}" if rows["scored"] == "exact" else "no answer",
                          f"({counts[one]})" if one in counts else "")))
                      if one in rows["full_by_length"] else "-" for one in lengths]
            by = "answers" if rows["value"] == "exact" else "KL"
            yield f"| {column} | {task} | {rows['prompts']} | {' | '.join(shares)} | {by} |"
    yield ""


def _column(part: dict, column: str, kept: dict | None) -> Iterator[str]:
    yield f"### {_COLUMNS[column]}"
    yield ""
    yield from _kept(kept, "This column, its tables and its predicted miss rates are")
    yield ("The compiled tables, of all tasks of the column (ours) and of its other tasks, against the "
           "best other method of the same budget. By length, with the number of prompts: ours / other "
           "tasks / that method.")
    yield ""
    yield ("| task | budget | ours | other tasks | best other | ours minus it | reading | other tasks "
           "minus it | reading | by length |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for task, budget, rows in _cells(part, column):
        name, other = _best_other(rows, budget)
        ours = rows["methods"][OURS][budget]
        unit = "" if rows["value"] == "exact" else " KL"
        disjoint = rows["methods"].get(OTHERS, {}).get(budget)
        shown = [one for one in (ours, disjoint, other) if one]
        counts = Counter(rows["lengths_of_prompts"])
        by_length = ", ".join(
            f"{length} ({counts[int(length)]}): " + " / ".join(f"{one['by_length'][length]:.2f}" for one in shown)
            for length in other["by_length"])
        told = ["-", "-", "-"]
        if disjoint:
            told = [f"{disjoint['value']:.2f}", _difference(other["other_tasks_minus_this"]),
                    _reading(rows, other["other_tasks_minus_this"])]
        yield (f"| {task} | {budget} | {ours['value']:.2f}{unit} | {told[0]} | {name} "
               f"{other['value']:.2f} | {_difference(other['ours_minus_this'])} | "
               f"{_reading(rows, other['ours_minus_this'])} | {told[1]} | {told[2]} | {by_length} |")
    yield ""
    for task, rows in part["columns"][column]["tasks"].items():
        if rows["methods"]:
            yield from _methods(part, column, task, rows)


def _methods(part: dict, column: str, task: str, rows: dict) -> Iterator[str]:
    yield f"#### {task} ({column})"
    yield ""
    if rows["value"] == "exact":
        yield (f"Share of exact answers on {rows['counted']} of {rows['prompts']} prompts, those that "
               "the full cache answers, all lengths together; 95 % interval.")
    else:
        yield (f"Mean KL divergence from the full cache on {rows['counted']} prompts, nats; less is "
               "better; 95 % interval.")
    yield ""
    budgets = [str(one) for one in part["budgets"] if str(one) in rows["methods"][OURS]]
    yield f"| method | {' | '.join(budgets)} |"
    yield "|---|" + "---|" * len(budgets)
    for name, values in rows["methods"].items():
        cells = [f"{one['value']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]" if one else "-"
                 for one in map(values.get, budgets)]
        some = [one for budget, one in values.items() if _is_partial(rows, one, budget)]
        told = f"{name} (prompts of {', '.join(some[0]['by_length'])} tokens alone: {some[0]['prompts']})" if some else name
        yield f"| {told} | " + " | ".join(cells) + " |"
    yield ""
    yield from _unspent(rows, budgets)


def _unspent(rows: dict, budgets: Sequence[str]) -> Iterator[str]:
    """Methods that leave a part of the budget: what they lose there is not for want of positions."""
    spent = {name: {budget: values[budget]["kept"] for budget in budgets if budget in values
                    and values[budget]["kept"] < _SPENT * int(budget)}
             for name, values in rows["methods"].items()}
    told = [f"{name} {', '.join(f'{kept:.0f} of {budget}' for budget, kept in found.items())}"
            for name, found in spent.items() if found]
    if told:
        yield f"Positions kept on average, where it is less than the budget: {'; '.join(told)}."
        yield ""


def _observations(table: dict) -> str:
    return ", ".join(f"({one['layer']}, {one['head']}) {one['rows']} {one['weight']:.2f}"
                     for one in table["observations"])


def _tables(part: dict) -> Iterator[str]:
    yield "### Tables"
    yield ""
    yield ("Recall of needed mass on held-out calibration prompts, tasks and lengths alike; `unseen task`: "
           "on the worst task whose prompts were all held out; `all alike`, `shuffled` and `best possible` "
           "on all prompts. A measured loss has the standard error of its paired difference from the least "
           "of its row: tables within it count as equals, and recall of held-out tasks chooses among them.")
    yield ""
    yield ("| column | compiled on | observations (layer, head) rows weight | pool, dilate | held out | "
           "unseen task | worst task | worst task and length | all alike | shuffled | best possible | measured loss of "
           "observations at pooling, dilation |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for column, rows in part["columns"].items():
        for key, table in rows["tables"].items():
            errors = table.get("loss_errors", {})
            losses = ", ".join(f"{way}: {value:.2f}" + (f" ± {errors[way]:.2f}" if errors.get(way) else "")
                               for way, value in table["measured_losses"].items())
            worst = table["worst_task_and_length"]
            unseen = table.get("unseen_task_recall")
            least = min(unseen, key=lambda task: unseen[task]) if unseen else None
            beyond = f"{least} {unseen[least]:.2f}" if unseen else "-"
            yield (f"| {column} | {key} | {_observations(table)} | {table['settings']['pool_kernel']}, "
                   f"{table['settings']['dilate']} | {table['held_out_recall']:.2f} | {beyond} | "
                   f"{table['worst_task']} {table['worst_task_recall']:.2f} | {worst['task']} at "
                   f"{worst['length']}: {worst['recall']:.2f} | {table['uniform_recall']:.2f} | "
                   f"{table['shuffled_recall']:.2f} | {table['oracle_recall']:.2f} | {losses} |")
    yield ""


def _constructed(cases: list[dict], kept: dict | None) -> Iterator[str]:
    yield "## Constructed models"
    yield ""
    yield from _kept(kept, "This section is")
    yield ("The needed positions are known by construction (`keepset.eval.constructed`): every fact is "
           "asked after the prompt of 2,048 tokens. One set for all layers, so the budget is 96 per "
           "layer that holds answers. Share of exact answers. With the norm contrast the needed tokens "
           "differ in their values alone, which no observation reads.")
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
            yield (f"| {name} | {one['value']:.2f} | {low:.2f} .. {high:.2f} | "
                   f"{_difference(one['ours_minus_this'])} |")
        yield ""
