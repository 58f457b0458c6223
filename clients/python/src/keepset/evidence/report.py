"""The report for a person, from the same data as the JSON file."""

from __future__ import annotations

from collections.abc import Iterator


def markdown(report: dict) -> str:
    """The whole page; every number in it comes from `report`."""
    lines = [
        "# Evidence",
        "",
        f"Written by `{report['command']}` (`make evidence` is the whole) with "
        f"keepsetd {report['versions']['keepset']}, backend {report['versions']['backend']}, numpy "
        f"{report['versions']['numpy']}. Raw predictions, seeds and digests: `evidence.json`.",
        "",
    ]
    lines += _constructed(report["constructed"])
    if "small_model" in report:
        lines += _small_model(report["small_model"])
    return "\n".join(lines) + "\n"


def _constructed(cases: list[dict]) -> Iterator[str]:
    yield "## Constructed models"
    yield ""
    yield ("Models whose right keep set is known (`keepset.eval.constructed`): one KV head marks the "
           "tokens that hold the answers, six others mark useless filler more strongly. Tables are "
           "compiled by `keepset tables compile` from rollouts on some seeds and served by keepsetd on "
           "others. Pass: uniform <= 0.20, compiled >= 0.95, lower end of the paired 95 % interval of "
           "the gain above 0.5, and the marker head has the largest weight in every layer.")
    yield ""
    first = cases[0]
    yield (f"{first['facts']} facts in {first['seq_len']} tokens, budget {first['budget']} per layer; "
           f"{first['test_seeds'][1] - first['test_seeds'][0]} test prompts, every fact asked; share of "
           "exact answers.")
    yield ""
    yield ("| model | alpha_scope | layers | GQA | uniform | compiled | shuffled | random | gain, 95 % | "
           "marker found | records, rounds | rule |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        rows, gain = case["rows"], case["gain_compiled_over_uniform"]
        found = sum(case["marker_has_largest_weight"])
        rule = "pass" if case["passed"] else "fail"
        if not case["expected_to_pass"]:
            rule += " (expected to fail)"
        settled = "" if case["calibration"]["actions_settled"] else ", still changing"
        yield (f"| {case['title']} | {case['alpha_scope']} | {case['layers']} | "
               f"{case['query_heads_per_kv_head']} | "
               + " | ".join(f"{rows[name]['accuracy']:.2f}"
                            for name in ("uniform", "compiled", "shuffled", "random"))
               + f" | {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | "
               f"{found} of {case['layers']} | {case['calibration']['records']}, "
               f"{case['calibration']['rounds']}{settled} | {rule} |")
    yield ""
    yield ("What each scope gains: with alpha_scope=global, the paper's definition, attention is averaged "
           "over all heads before the head weights come in, so a table acts through value norms only: "
           "it turns the norm contrast and cannot turn the mass contrast. alpha_scope=head weighs each "
           "head's own attention and can turn both.")
    yield ""


def _small_model(part: dict) -> Iterator[str]:
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
    for scope, one in part["calibrations"].items():
        settled = "settled" if one["actions_settled"] else "were still changing"
        yield f"* alpha_scope {scope}: {one['records']} records, {one['rounds']} rounds, actions {settled}"
    yield ""
    for column in ("inside", "later"):
        yield from _rows(part, column)
    yield ("KV before and after: sums over all compressions of the row. `kept` and `candidates` "
           "(positions that reach the gate): mean per layer; fewer candidates than the budget mean "
           "that the policy keeps less than it may. `common`: overlap (Jaccard) of what is kept with "
           "what the uniform table of the same scope keeps.")
    yield ""
    yield from _comparisons(part)
    yield from _cells(part)
    yield from _transfer(part["transfer"])
    yield from _verdict(part)


def _rows(part: dict, column: str) -> Iterator[str]:
    yield f"### Question {column}"
    yield ""
    yield "| method | budget | exact | KL mean | KL p95 | KV before | KV after | kept | candidates | common |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in part["rows"]:
        if row["column"] != column:
            continue
        low, high = row["interval"]
        candidates = "-" if row["mean_candidates"] is None else f"{row['mean_candidates']:.0f}"
        common = row["kept_in_common_with_uniform"]
        yield (f"| {row['method']} | {row['budget'] or 'all'} | {row['exact']:.2f} [{low:.2f}, "
               f"{high:.2f}] | {row['kl_mean']:.2f} | {row['kl_p95']:.2f} | "
               f"{row['bytes_before'] / 1024:.0f} KiB | {row['bytes_after'] / 1024:.0f} KiB | "
               f"{row['mean_kept']:.0f} | {candidates} | {'-' if common is None else f'{common:.2f}'} |")
    yield ""


def _comparisons(part: dict) -> Iterator[str]:
    yield "### Compiled table against the others"
    yield ""
    yield ("Same prompts. `only ... right`: questions that one of the two answers (McNemar, exact p; the "
           "questions of a prompt are not independent, the interval over prompts is the cautious reading).")
    yield ""
    yield ("| scope | column | budget | against | difference, 95 % | only compiled right | only other "
           "right | p |")
    yield "|---|---|---|---|---|---|---|---|"
    for one in part["comparisons"]:
        gap, split = one["difference"], one["mcnemar"]
        yield (f"| {one['alpha_scope']} | {one['column']} | {one['budget']} | {one['compiled_against']} | "
               f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}] | {split['only_first']} | "
               f"{split['only_second']} | {split['p']:.3g} |")
    yield ""


def _cells(part: dict) -> Iterator[str]:
    yield "### Risk cells of the compiled tables"
    yield ""
    yield "Decisions of a layer by entropy bin, perplexity bin (first budget)."
    yield ""
    budget = part["settings"]["budgets"][0]
    for row in part["rows"]:
        if row["method"].endswith("compiled") and row["budget"] == budget:
            hits = ", ".join(f"({cell}) {count}"
                             for cell, count in row["hits_by_entropy_and_ppl_bin"].items())
            yield f"* {row['method']}, {row['column']}: {hits}"
    yield ""


def _transfer(part: dict) -> Iterator[str]:
    yield "### Transfer between halves of the calibration text"
    yield ""
    correlation = part["rank_correlation"]["mean"]
    correlation = "not defined (no state ranks its actions)" if correlation is None else f"{correlation:.2f}"
    yield (f"alpha_scope {part['alpha_scope']}; mean Spearman correlation of the head action rankings: "
           f"{correlation}. Mean loss of the answer words on {part['test_prompts']} other prompts of "
           "each half, in nats:")
    yield ""
    yield "| half | budget | full cache | own table | other half's table | uniform table |"
    yield "|---|---|---|---|---|---|"
    for half, losses in enumerate(part["loss_by_half"]):
        for index, budget in enumerate(part["budgets"]):
            yield (f"| {half + 1} | {budget} | {losses['full']:.3f} | {losses['own'][index]:.3f} | "
                   f"{losses['other'][index]:.3f} | {losses['uniform'][index]:.3f} |")
    yield ""


def _verdict(part: dict) -> Iterator[str]:
    """What the intervals say, in words; the shuffled table tells content from size."""
    yield "### Do compiled tables help here?"
    yield ""
    yield ("Better or worse: the interval of the difference lies above or below zero. A table that beats "
           "the uniform one and not its own shuffled numbers gains by their size (larger weights let "
           "more positions pass the gate), not by what was learned about the heads.")
    yield ""
    yield "| scope | column | budget | against uniform | against shuffled | kept, uniform to compiled | common |"
    yield "|---|---|---|---|---|---|---|"
    rows = {(row["method"], row["budget"], row["column"]): row for row in part["rows"]}
    gaps = {(one["alpha_scope"], one["column"], one["budget"], one["compiled_against"]):
            one["difference"] for one in part["comparisons"]}
    proven = 0
    for scope in part["calibrations"]:
        for column in ("inside", "later"):
            for budget in part["settings"]["budgets"]:
                uniform, shuffled = (gaps[scope, column, budget, f"compilerkv {scope} {kind}"]
                                     for kind in ("uniform", "shuffled"))
                proven += uniform["low"] > 0 and shuffled["low"] > 0
                before, after = (rows[f"compilerkv {scope} {kind}", budget, column]
                                 for kind in ("uniform", "compiled"))
                yield (f"| {scope} | {column} | {budget} | {_in_words(uniform)} | {_in_words(shuffled)} | "
                       f"{before['mean_kept']:.0f} to {after['mean_kept']:.0f} | "
                       f"{after['kept_in_common_with_uniform']:.2f} |")
    total = len(part["calibrations"]) * 2 * len(part["settings"]["budgets"])
    yield ""
    yield (f"Better than both, so by content: {proven} of {total} rows. "
           + ("On this model the learned content of a table is not shown to help." if proven == 0 else
              "The other rows do not show that learned content helps."))
    yield ""
    yield ("Why the table has little to turn: in scope global a score is attention mass, the same for "
           "every head, times the largest weighted value norm of a KV head, and this model has two KV "
           "heads per layer. Two weights per layer cannot point at single tokens unless value norms do.")


def _in_words(gap: dict) -> str:
    verdict = "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "no difference shown"
    return f"{gap['mean']:+.2f}, {verdict}"
