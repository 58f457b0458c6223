"""The report for a person, from the same data as the JSON file."""

from __future__ import annotations

from collections.abc import Iterator


def markdown(report: dict) -> str:
    """The whole page; every number in it comes from `report`."""
    lines = [
        "# Evidence",
        "",
        "Written by `make evidence` with "
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
           "right answer fed, in nats. Intervals: 95 %, bootstrap over prompts. Tables were compiled on "
           f"{settings['calibration_text']} ({part['calibration']['records']} records, "
           f"{part['calibration']['rounds']} rounds, actions "
           f"{'settled' if part['calibration']['actions_settled'] else 'still changing'}); neither text "
           "was trained on. Nothing is protected beyond what a policy's definition protects (snapkv "
           "keeps its window, compilerkv nothing).")
    yield ""
    for column in ("inside", "later"):
        yield f"### Question {column}"
        yield ""
        yield "| method | budget | exact | KL mean | KL p95 | KV before | KV after | kept | candidates |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in part["rows"]:
            if row["column"] != column:
                continue
            low, high = row["interval"]
            candidates = "-" if row["mean_candidates"] is None else f"{row['mean_candidates']:.0f}"
            yield (f"| {row['method']} | {row['budget'] or 'all'} | {row['exact']:.2f} [{low:.2f}, "
                   f"{high:.2f}] | {row['kl_mean']:.2f} | {row['kl_p95']:.2f} | "
                   f"{row['bytes_before'] / 1024:.0f} KiB | {row['bytes_after'] / 1024:.0f} KiB | "
                   f"{row['mean_kept']:.0f} | {candidates} |")
        yield ""
    yield ("KV before and after: sums over all compressions of the row. `kept` and `candidates` "
           "(positions that reach the gate): mean per layer; fewer candidates than the budget mean "
           "that the policy keeps less than it may.")
    yield ""
    yield "### Compiled table against the others"
    yield ""
    yield "| column | budget | against | difference, 95 % | only compiled right | only other right | p |"
    yield "|---|---|---|---|---|---|---|"
    for one in part["comparisons"]:
        gap, split = one["difference"], one["mcnemar"]
        yield (f"| {one['column']} | {one['budget']} | {one['compiled_against']} | {gap['mean']:+.2f} "
               f"[{gap['low']:+.2f}, {gap['high']:+.2f}] | {split['only_first']} | "
               f"{split['only_second']} | {split['p']:.3g} |")
    yield ""
    yield from _verdict(part["comparisons"])


def _verdict(comparisons: list[dict]) -> Iterator[str]:
    """What the intervals say about compiled against uniform, in words."""
    yield "### Do compiled tables beat uniform ones here?"
    yield ""
    for one in comparisons:
        if one["compiled_against"] != "compilerkv uniform":
            continue
        gap = one["difference"]
        if gap["low"] > 0:
            verdict = "better: the interval lies above zero"
        elif gap["high"] < 0:
            verdict = "worse: the interval lies below zero"
        else:
            verdict = "no difference that these prompts can show"
        yield f"* question {one['column']}, budget {one['budget']}: {gap['mean']:+.2f}, {verdict}"
    yield ""
