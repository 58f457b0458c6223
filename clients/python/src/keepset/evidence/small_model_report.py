"""The small model's part of the report."""

from __future__ import annotations

from collections.abc import Iterator

from keepset.evidence.headroom import reason
from keepset.evidence.transfer_report import transfer_lines

_REASONS = {
    "ceiling": "the uniform table with an open gate already loses less than 0.1 nats against the full "
               "cache",
    "no signal": "no table that was tried, chosen in hindsight and far beyond the grid, gains a tenth of what is "
                 "lost",
    "grid": "a table beyond the grid 0.8..1.5 gains a tenth of what is lost or more, none that was tried on it "
            "does",
    "not learned": "a table on the grid gains a tenth of what is lost or more, and the compiled one takes less "
                   "than half of that gain",
    "learned": "the compiled table takes at least half of what the best table on the grid gains",
}


def lines(part: dict, plots: list[str]) -> Iterator[str]:
    settings = part["settings"]
    prompts = settings["test_seeds"][1] - settings["test_seeds"][0]
    yield "## Small model"
    yield ""
    yield (f"`{part['model']['revision']}`: {prompts} prompts of {settings['seq_len']} words of "
           f"{settings['test_text']} with {settings['num_facts']} facts, "
           f"{settings['questions_per_prompt']} questions each. Exact: both words of the answer. "
           "`inside` = query-aware: the question stands in the compressed prompt. `later` = "
           "query-agnostic: the context alone is compressed. KL(full || method) per answer word with the "
           "right answer fed, in nats. Intervals: 95 %, bootstrap over prompts. Every method keeps the "
           f"last {settings['protect_window']} positions, inside the budget. Tables were compiled on "
           f"{settings['calibration_text']}; neither text was trained on.")
    yield ""
    yield ("compilerkv runs in four variants, each with tables compiled for it: alpha_scope global (the "
           "paper) or head (ours), scores as they are (the paper) or averaged over 3 positions "
           "(`pool3`, ours: pool_kernel=3).")
    yield ""
    yield from _calibrations(part)
    yield from _verdict(part)
    yield from _headroom(part, plots)
    if "evidence-accuracy.png" in plots:
        yield "![Exact answers by budget](evidence-accuracy.png)"
        yield ""
    for column in ("inside", "later"):
        yield from _rows(part, column)
    yield ("KV before and after: sums over all compressions of the row. `kept` and `candidates` "
           "(positions that reach the gate): mean per layer; `under`: share of decisions with fewer "
           "candidates than the budget, which keep less than they may. `common`: overlap (Jaccard) of "
           "what is kept with what the uniform table of the same variant keeps.")
    yield ""
    yield from _comparisons(part)
    yield from _gates(part, plots)
    yield from transfer_lines(part["transfer"], f"Transfer, variant {part['transfer']['variant']}",
                              "the first and the second half of the calibration text")


def _calibrations(part: dict) -> Iterator[str]:
    yield "| variant | records | rounds | settled | changed in the last round | risk cells calibrated |"
    yield "|---|---|---|---|---|---|"
    for variant, one in part["calibrations"].items():
        last, coverage = one["changes"][-1], one["coverage"]
        worth = ("" if last["largest_difference"] is None
                 else f", worth at most {last['largest_difference']:.3f} nats")
        yield (f"| {variant} | {one['records']} | {one['rounds']} | "
               f"{'yes' if one['settled'] else 'no'}, within {one['tolerance']} nats | "
               f"{last['changed_head_states'] + last['changed_gate_states']} of {last['states']} "
               f"states{worth} | {coverage['covered_cells']} of {coverage['cells']} "
               f"({coverage['chosen']} prompts of {coverage['pool']}) |")
    yield ""


def _verdict(part: dict) -> Iterator[str]:
    """What the intervals say, in words; the shuffled table tells content from size."""
    yield "### Do compiled tables help here?"
    yield ""
    yield ("Exact answers, same prompts. Better or worse: the interval of the difference lies above or "
           "below zero. A table that beats the uniform one and not its own shuffled numbers is not "
           "shown to gain by what was learned about the heads: larger weights let more positions pass the "
           "gate wherever they stand.")
    yield ""
    yield ("| variant | column | budget | uniform | compiled | against uniform | against shuffled | kept, "
           "uniform to compiled | common |")
    yield "|---|---|---|---|---|---|---|---|---|"
    rows = {(row["method"], row["budget"], row["column"]): row for row in part["rows"]}
    gaps = {(one["variant"], one["column"], one["budget"], one["compiled_against"]):
            one["difference"] for one in part["comparisons"]}
    proven, total = [], 0
    for variant in part["calibrations"]:
        for column in ("inside", "later"):
            for budget in part["settings"]["budgets"]:
                uniform, shuffled = (gaps[variant, column, budget, f"compilerkv {variant} {kind}"]
                                     for kind in ("uniform", "shuffled"))
                total += 1
                if uniform["low"] > 0 and shuffled["low"] > 0:
                    proven.append(f"{variant}, {column}, {budget}")
                before, after = (rows[f"compilerkv {variant} {kind}", budget, column]
                                 for kind in ("uniform", "compiled"))
                yield (f"| {variant} | {column} | {budget} | {before['exact']:.2f} | "
                       f"{after['exact']:.2f} | {_in_words(uniform)} | {_in_words(shuffled)} | "
                       f"{before['mean_kept']:.0f} to {after['mean_kept']:.0f} | "
                       f"{after['kept_in_common_with_uniform']:.2f} |")
    yield ""
    yield (f"Better than both, so by content: {len(proven)} of {total} rows"
           + (f" ({'; '.join(proven)}). The other rows do not show that learned content helps."
              if proven else ". On this model the learned content of a table is not shown to help."))
    yield ""


def _headroom(part: dict, plots: list[str]) -> Iterator[str]:
    yield "### Why: what any table could gain"
    yield ""
    first = next(iter(part["headroom"].values()))[0]
    yield ("With two KV heads a layer and an open gate a table decides by one number per layer, the ratio "
           "of its two weights, so tables of all kinds can be tried, seven ratios a layer on the grid and "
           "five beyond. Mean loss of the answer words in nats on "
           f"{first['prompts']} of the test prompts per column: with the full cache, the uniform table, "
           "the same with an open gate, the compiled table, and the best that was found in hindsight, "
           "chosen on these very prompts, more than a compiler can know: on the paper's grid (0.8..1.5, "
           "ratios up to 1.875) and beyond it (ratios up to 20).")
    yield ""
    yield ("| variant | column | budget | full | uniform | uniform, gate open | compiled | best on the grid | "
           "best beyond | reason |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    counts: dict[str, int] = {}
    for variant, rows in part["headroom"].items():
        for row in sorted(rows, key=lambda row: (row["column"], row["budget"])):
            why = reason(row)
            counts[why] = counts.get(why, 0) + 1
            yield (f"| {variant} | {row['column']} | {row['budget']} | {row['full']:.2f} | "
                   f"{row['uniform']:.2f} | {row['uniform_open']:.2f} | {row['compiled']:.2f} | "
                   f"{row['best_on_grid']:.2f} | {row['best_beyond_grid']:.2f} | {why} |")
    yield ""
    for why, words in _REASONS.items():
        if why in counts:
            yield f"* {why}, {counts[why]} row{'s' if counts[why] > 1 else ''}: {words}."
    yield ""
    yield from _sentences(part)
    if "evidence-curve.png" in plots:
        yield "![Loss by number of calibration prompts](evidence-curve.png)"
        yield ""
    yield ("More calibration prompts: mean loss over both columns of the same test prompts under tables "
           "compiled from the records of some of the calibration prompts.")
    yield ""
    counts_of = [point["prompts"] for point in next(iter(part["learning_curves"].values()))]
    yield "| variant | budget | " + " | ".join(f"{count} prompts" for count in counts_of) + " |"
    yield "|---|---|" + "---|" * len(counts_of)
    for variant, points in part["learning_curves"].items():
        for index, budget in enumerate(part["settings"]["budgets"]):
            yield (f"| {variant} | {budget} | "
                   + " | ".join(f"{point['loss_by_budget'][index]:.2f}" for point in points) + " |")
    yield ""


def _sentences(part: dict) -> Iterator[str]:
    """What stands behind the reasons, as far as the numbers carry it."""
    by_key = {(variant, row["column"], row["budget"]): row
              for variant, rows in part["headroom"].items() for row in rows}
    budget = part["settings"]["budgets"][len(part["settings"]["budgets"]) // 2]
    plain, pooled = (by_key[name, "inside", budget] for name in ("global", "global pool3"))
    if pooled["uniform"] < 0.5 * plain["uniform"]:
        exact = {row["method"]: row["exact"] for row in part["rows"]
                 if row["column"] == "inside" and row["budget"] == budget}
        plain_exact, pooled_exact = (exact[f"compilerkv {name} uniform"]
                                     for name in ("global", "global pool3"))
        yield (f"Question inside: averaging scores over 3 positions alone, with a uniform table, takes the "
               f"loss at budget {budget} from {plain['uniform']:.2f} to {pooled['uniform']:.2f} nats and "
               f"exact answers from {plain_exact:.2f} to {pooled_exact:.2f}; snapkv, which pools as well, "
               f"has {exact['snapkv']:.2f}. An answer is two words side by side; head weights multiply whole "
               "heads and cannot carry a score from one position to the next.")
        yield ""
    later = [row for (_, column, _), row in by_key.items() if column == "later"]
    beyond = max((row["uniform_open"] - row["best_beyond_grid"]) / (row["uniform_open"] - row["full"])
                 for row in later)
    yield ("Question later: the observed rows are text that asks nothing, drawn without regard to "
           f"which fact will be asked; the best table that was found beyond the grid gains at most "
           f"{100 * beyond:.0f} % of what is lost in any row.")
    yield ""
    gated = max((row for rows in part["headroom"].values() for row in rows),
                key=lambda row: row["uniform"] - row["uniform_open"])
    if gated["uniform"] - gated["uniform_open"] > 0.1:
        name = next(variant for variant, rows in part["headroom"].items() if gated in rows)
        yield (f"The gate costs where candidates are fewer than the budget: variant {name}, "
               f"{gated['column']}, budget {gated['budget']}, a uniform table loses {gated['uniform']:.2f} "
               f"nats behind its gate of 0.8 and {gated['uniform_open']:.2f} with an open one. 0.8 is the "
               "most permissive gate of the paper's grid, so no compiled table can open it; larger head "
               "weights let more through, whichever heads they stand at.")
        yield ""
    turned = max((row for rows in part["headroom"].values() for row in rows),
                 key=lambda row: row["uniform_open"] - row["best_on_grid"])
    name = next(variant for variant, rows in part["headroom"].items() if turned in rows)
    ranks = part["transfer"]["rank_correlation"]["mean"]
    yield (f"Most to gain on the grid: variant {name}, {turned['column']}, budget {turned['budget']}, "
           f"{turned['uniform_open']:.2f} to {turned['best_on_grid']:.2f} nats; the compiled table reaches "
           f"{turned['compiled']:.2f}. Actions are logged equally often, so the fit takes the action of the "
           "best mean reward. How far such a ranking of actions carries over to other prompts is measured "
           f"under Transfer, for variant {part['transfer']['variant']} and "
           f"{part['transfer']['calibration_prompts'][0]} prompts a side: Spearman "
           f"{'not defined' if ranks is None else format(ranks, '.2f')} on average. Whether more prompts "
           "would change the tables is measured only as far as the next table goes.")
    yield ""


def _rows(part: dict, column: str) -> Iterator[str]:
    yield f"### Question {column}"
    yield ""
    yield ("| method | budget | exact | KL mean | KL p95 | KV before | KV after | kept | candidates | under | "
           "common |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in part["rows"]:
        if row["column"] != column:
            continue
        low, high = row["interval"]
        yield (f"| {row['method']} | {row['budget'] or 'all'} | {row['exact']:.2f} [{low:.2f}, "
               f"{high:.2f}] | {row['kl_mean']:.2f} | {row['kl_p95']:.2f} | "
               f"{row['bytes_before'] / 1024:.0f} KiB | {row['bytes_after'] / 1024:.0f} KiB | "
               f"{row['mean_kept']:.0f} | {_optional(row['mean_candidates'], '.0f')} | "
               f"{_optional(row['under_filled'], '.2f')} | "
               f"{_optional(row['kept_in_common_with_uniform'], '.2f')} |")
    yield ""


def _comparisons(part: dict) -> Iterator[str]:
    yield "### Compiled table against the others"
    yield ""
    yield ("Same prompts. `only ... right`: questions that one of the two answers (McNemar, exact p; the "
           "questions of a prompt are not independent, the interval over prompts is the cautious reading).")
    yield ""
    yield ("| variant | column | budget | against | difference, 95 % | only compiled right | only other "
           "right | p |")
    yield "|---|---|---|---|---|---|---|---|"
    for one in part["comparisons"]:
        gap, split = one["difference"], one["mcnemar"]
        yield (f"| {one['variant']} | {one['column']} | {one['budget']} | {one['compiled_against']} | "
               f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}] | {split['only_first']} | "
               f"{split['only_second']} | {split['p']:.3g} |")
    yield ""


def _gates(part: dict, plots: list[str]) -> Iterator[str]:
    yield "### Gates and risk cells of the compiled tables"
    yield ""
    if "evidence-gates.png" in plots:
        yield "![Risk cells hit, and candidates against the budget](evidence-gates.png)"
        yield ""
    yield ("Decisions of a layer by (entropy bin, perplexity bin), all budgets of the column. Ablation: "
           "rows `heads only` and `gate only` in the tables above.")
    yield ""
    for variant in part["calibrations"]:
        for column in ("inside", "later"):
            hits: dict[str, int] = {}
            for row in part["rows"]:
                if row["method"] == f"compilerkv {variant} compiled" and row["column"] == column:
                    for cell, count in row["hits_by_entropy_and_ppl_bin"].items():
                        hits[cell] = hits.get(cell, 0) + count
            listed = ", ".join(f"({cell}) {count}" for cell, count in sorted(hits.items()))
            yield f"* {variant}, {column}: {listed}"
    yield ""


def _in_words(gap: dict) -> str:
    verdict = "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "no difference shown"
    return f"{gap['mean']:+.2f}, {verdict}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
