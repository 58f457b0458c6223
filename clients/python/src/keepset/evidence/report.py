"""The report for a person, from the same data as the JSON file."""

from __future__ import annotations

from collections.abc import Iterator

from keepset.evidence import small_model_report
from keepset.evidence.transfer_report import transfer_lines


def markdown(report: dict) -> str:
    """The whole page; every number in it comes from `report`."""
    lines = [
        "# Evidence",
        "",
        f"Written by `{report['command']}` (`make evidence` is the whole) with "
        f"keepsetd {report['versions']['keepset']}, backend {report['versions']['backend']}, numpy "
        f"{report['versions']['numpy']}. Raw predictions, seeds and digests: `evidence.json`.",
        "",
        _cost(report["run"]),
        "",
    ]
    lines += _constructed(report["constructed"], report.get("plots", []))
    if "small_model" in report:
        lines += small_model_report.lines(report["small_model"], report.get("plots", []))
    return "\n".join(lines).rstrip("\n") + "\n"


def _cost(run: dict) -> str:
    return (f"One run, {'resumed' if run['resumed'] else 'from scratch'}: {run['wall_seconds'] / 60:.1f} "
            f"minutes, in which it had {run['cpu_seconds'] / 60:.1f} minutes of processor time on "
            f"{run['cores']} cores.")


def _constructed(cases: list[dict], plots: list[str]) -> Iterator[str]:
    yield "## Constructed models"
    yield ""
    yield ("Models whose right keep set is known (`keepset.eval.constructed`): one KV head marks the "
           "tokens that hold the answers, six others mark useless filler more strongly. Tables are "
           "compiled by `keepset tables compile` from rollouts on some seeds and served by keepsetd on "
           "others. Pass: uniform and shuffled <= 0.20, compiled >= 0.95, lower end of the paired 95 % "
           "interval of the gain above 0.5, and the marker head has the largest weight in every layer.")
    yield ""
    first = cases[0]
    yield (f"{first['facts']} facts in {first['seq_len']} tokens, budget {first['budget']} per layer; "
           f"{first['test_seeds'][1] - first['test_seeds'][0]} test prompts, every fact asked; share of "
           "exact answers. `heads only` and `gate only` are the compiled table with the other half made "
           "neutral. `settled`: the last round changed no state by more than "
           f"{first['calibration']['tolerance']} nats of mean reward.")
    yield ""
    yield ("| model | alpha_scope | layers | GQA | uniform | compiled | shuffled | heads only | gate only | "
           "random | gain, 95 % | marker found | records, rounds | rule |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        rows, gain = case["rows"], case["gain_compiled_over_uniform"]
        found = sum(case["marker_has_largest_weight"])
        rule = "pass" if case["passed"] else "fail"
        if not case["expected_to_pass"]:
            rule += " (expected to fail)"
        settled = "settled" if case["calibration"]["settled"] else "not settled"
        yield (f"| {case['title']} | {case['alpha_scope']} | {case['layers']} | "
               f"{case['query_heads_per_kv_head']} | "
               + " | ".join(f"{rows[name]['accuracy']:.2f}"
                            for name in ("uniform", "compiled", "shuffled", "heads only", "gate only",
                                         "random"))
               + f" | {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | "
               f"{found} of {case['layers']} | {case['calibration']['records']}, "
               f"{case['calibration']['rounds']} {settled} | {rule} |")
    yield ""
    if "evidence-constructed.png" in plots:
        yield "![Accuracy of uniform, compiled and shuffled tables](evidence-constructed.png)"
        yield ""
    yield ("What each scope gains: with alpha_scope=global, the paper's definition, attention is averaged "
           "over all heads before the head weights come in, so a table acts through value norms only: "
           "it turns the norm contrast and cannot turn the mass contrast. alpha_scope=head weighs each "
           "head's own attention and can turn both.")
    yield ""
    yield from _gates(cases)
    for case in cases:
        if "transfer" in case:
            yield from transfer_lines(
                case["transfer"], f"Transfer, {case['title']}, alpha_scope {case['alpha_scope']}",
                "two sets of prompts without a seed in common")


def _gates(cases: list[dict]) -> Iterator[str]:
    yield "### Gates and risk cells"
    yield ""
    yield ("Candidates: positions that reach the gate, mean per layer; under-filled: share of decisions "
           "with fewer candidates than the budget, which then keep less than they may. Cells: decisions "
           "of a layer by (entropy bin, perplexity bin) on the test prompts, and the cells that the "
           "calibration prompts cover.")
    yield ""
    yield ("| model | alpha_scope | candidates uniform | compiled | under-filled uniform | compiled | kept "
           "compiled | cells hit | cells calibrated |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        uniform, compiled = case["rows"]["uniform"], case["rows"]["compiled"]
        coverage = case["calibration"]["coverage"]
        hits = ", ".join(f"({cell}) {count}" for cell, count
                         in compiled["hits_by_entropy_and_ppl_bin"].items())
        yield (f"| {case['title']} | {case['alpha_scope']} | {uniform['mean_candidates']:.0f} | "
               f"{compiled['mean_candidates']:.0f} | {uniform['under_filled']:.2f} | "
               f"{compiled['under_filled']:.2f} | {compiled['mean_kept']:.0f} | {hits} | "
               f"{coverage['covered_cells']} of {coverage['cells']} |")
    yield ""
