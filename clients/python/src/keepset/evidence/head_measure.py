"""Raw outcomes of one prompt under every method and budget, and what they say together."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from keepset import table_file
from keepset.calibrate.head_prompts import KL, HeadPrompt, Tasks
from keepset.calibrate.observation_heads import keep, undated
from keepset.evidence.head_methods import NOVELTY, OTHERS, OURS, Run
from keepset.evidence.statistics import bootstrap_interval, paired_difference
from keepset.in_process import Engine

# A task whose full cache gives fewer exact answers is not compared by answers.
FLOOR = 0.6
# What key novelty of a few KV heads stands against: that of all of them.
_NOVELTY_RIVALS = ("keydiff, per head", "key novelty, one set")
# Fewer prompts of a length have no interval to speak of.
FEWEST = 4


def everything(prompt: HeadPrompt) -> list[np.ndarray]:
    return [np.arange(prompt.seq_len)] * len(prompt.layers)


def measure(folder: pathlib.Path, tasks: Tasks, task: str, seed: int, length: int,
            methods: Mapping[str, Run], budgets: Sequence[int]) -> dict:
    """Raw outcomes of one prompt: {"length", "scored", "full", "methods": {name: {budget: ..}}}; what was
    written before is read, what is new among methods and budgets is measured. A budget that the protected
    positions fill or the prompt does is left out. In the order of methods and budgets, not in that of the
    runs that measured them."""
    path = folder / f"{task}-{length}-{seed}.json"
    known = json.loads(path.read_text()) if path.exists() else {"methods": {}, "identities": {}}
    identities = {name: getattr(run, "identity", "") for name, run in methods.items()}
    held = {name: known["methods"][name] if name in known["methods"]
            and known["identities"].get(name, "") == identity else {}
            for name, identity in identities.items()}
    if "protected" in known and all(str(budget) in found for found in held.values()
                                    for budget in _usable(budgets, known)):
        return known | {"methods": _ordered(held, _usable(budgets, known))}
    prompt = tasks.prompt(task, seed, length)
    full = prompt.outcome(everything(prompt))
    known = {"length": length, "seed": seed, "tokens": prompt.seq_len, "scored": prompt.scored,
             "protected": prompt.protect_sink + prompt.protect_window,
             "identities": {name: one for name, one in identities.items() if one},
             "full": {"share": full.share, "loss": round(full.loss, 4), "predicted": full.predicted}}
    asked = [(name, budget, methods[name](prompt, budget)) for name, found in held.items()
             for budget in _usable(budgets, known) if str(budget) not in found]
    for (name, budget, sets), outcome in zip(asked, prompt.outcomes([one[2] for one in asked])):
        same = outcome.predicted == full.predicted
        held[name][str(budget)] = {
            "share": outcome.share, "loss": round(outcome.loss, 4), "kl": round(outcome.kl, 5),
            # None: as with the full cache.
            "predicted": None if same else outcome.predicted,
            "kept": mean_kept(sets)}
    known["methods"] = held
    folder.mkdir(parents=True, exist_ok=True)
    table_file.write_atomically(path, json.dumps(known).encode())
    return known | {"methods": _ordered(held, _usable(budgets, known))}


def _usable(budgets: Sequence[int], known: dict) -> list[int]:
    return [one for one in budgets if known["protected"] < one < known["tokens"]]


def _ordered(held: dict[str, dict], budgets: Sequence[int]) -> dict[str, dict]:
    return {name: {str(one): found[str(one)] for one in budgets} for name, found in held.items()}


def mean_kept(sets: list) -> float:
    counts = [len(one) if isinstance(one, np.ndarray) else float(np.mean([len(g) for g in one]))
              for one in sets]
    return float(np.mean(counts))


def strata_of(lengths: Sequence[int], fewest: int = FEWEST) -> list[int]:
    """Of each prompt the length that it is drawn with: its own or, where that has fewer than `fewest` prompts,
    the next shorter one. Prompts drawn from one or two say nothing of how they scatter."""
    stratum = {}
    for one in sorted(set(lengths), reverse=True):
        members = [length for length in stratum if stratum[length] == one] + [one]
        shorter = [length for length in set(lengths) if length < one]
        target = max(shorter) if shorter and sum(map(lengths.count, members)) < fewest else one
        stratum |= dict.fromkeys(members, target)
    return [stratum[one] for one in lengths]


def summarize(outcomes: Sequence[dict], budgets: Sequence[int], floor: float = FLOOR) -> dict:
    """Per method and budget the share of exact answers over the prompts that the full cache answers, or
    the mean KL divergence where a task has no answer or the full cache seldom gives it; against ours
    paired, prompts drawn within their lengths as far as these have enough."""
    by_length = {str(length): float(np.mean([one["full"]["share"] for one in outcomes
                                             if one["length"] == length]))
                 for length in sorted({one["length"] for one in outcomes})}
    full = float(np.mean([one["full"]["share"] for one in outcomes]))
    is_kl = outcomes[0]["scored"] == KL or full < floor
    good = [one for one in outcomes if is_kl or one["full"]["share"] > 0.5]
    rows: dict = {"prompts": len(outcomes), "counted": len(good), "full": full,
                  "full_by_length": by_length,
                  "prompts_by_length": dict(Counter(str(one["length"]) for one in outcomes)),
                  "protected_by_length": {
                      length: [min(held), max(held)] for length, held in
                      ((key, [one["protected"] for one in outcomes if one["length"] == int(key)])
                       for key in by_length)}, "scored": outcomes[0]["scored"],
                  "value": "kl" if is_kl else "exact", "methods": {}}
    field = "kl" if is_kl else "share"
    for name in dict.fromkeys(name for one in good for name in one["methods"]):
        rows["methods"][name] = {}
        for key in map(str, budgets):
            held = [one for one in good if key in one["methods"].get(name, {})]
            if not held:
                continue
            strata = strata_of([one["length"] for one in held])
            values = [one["methods"][name][key][field] for one in held]
            ours = [one["methods"][OURS][key][field] for one in held]
            of_length = [one["length"] for one in held]
            lengths = sorted(set(of_length))
            rows["methods"][name][key] = {
                "prompts": len(held),
                "value": float(np.mean(values)), "interval": bootstrap_interval(values, strata=strata),
                "by_length": {str(one): float(np.mean([v for v, s in zip(values, of_length) if s == one]))
                              for one in lengths},
                "loss": float(np.mean([one["methods"][name][key]["loss"] for one in held])),
                "kl": float(np.mean([one["methods"][name][key]["kl"] for one in held])),
                "kept": float(np.mean([one["methods"][name][key]["kept"] for one in held])),
                "ours_minus_this": paired_difference(ours, values, strata),
                "other_tasks_minus_this": paired_difference(
                    [one["methods"][OTHERS][key][field] for one in held], values, strata)
                if all(OTHERS in one["methods"] for one in held) else None,
                "by_prompt": [round(one, 4) for one in values],
                # null: as with the full cache.
                "predicted": [one["methods"][name][key]["predicted"] for one in held]}
    if novelty := _novelty_rows(good, budgets, field):
        rows["novelty"] = novelty
    rows["lengths_of_prompts"] = [one["length"] for one in good]
    rows["seeds_of_prompts"] = [one["seed"] for one in good]
    # Where the full cache is exact, its prediction is the answer.
    rows["full_of_prompts"] = [{"exact": one["full"]["share"], "predicted": one["full"]["predicted"]}
                               for one in good]
    return rows


def _novelty_rows(outcomes: Sequence[dict], budgets: Sequence[int], field: str) -> dict:
    """By budget, on the prompts that NOVELTY was measured on; empty without any."""
    rows = {}
    for key in map(str, budgets):
        held = [one for one in outcomes if key in one["methods"].get(NOVELTY, {})]
        if not held:
            continue
        strata = strata_of([one["length"] for one in held])
        values = {name: [one["methods"][name][key][field] for one in held] for name in (NOVELTY, *_NOVELTY_RIVALS)}
        rows[key] = {"prompts": len(held), "value": float(np.mean(values[NOVELTY])), "against": {
            name: {"value": float(np.mean(values[name])),
                   "difference": paired_difference(values[NOVELTY], values[name], strata)}
            for name in _NOVELTY_RIVALS}}
    return rows


def risk_of(folder: pathlib.Path, engine: Engine, tasks: Tasks, table: bytes, task: str, seed: int,
            length: int, budgets: Sequence[int], targets: Sequence[float], most: int) -> dict:
    """What the reply predicted for one prompt, and what came: at fixed budgets, and with a target miss
    rate between the smallest budget and `most` tokens. Empty where the full cache gives no answer."""
    path = folder / f"{task}-{length}-{seed}.json"
    identity = f"{table_file.digest(undated(table))} {[*budgets]} {[*targets]} {most}"
    if path.exists() and (known := json.loads(path.read_text()))["table"] == identity:
        return known
    prompt = tasks.prompt(task, seed, length)
    found: dict = {"task": task, "length": length, "seed": seed, "table": identity, "budgets": [],
                   "targets": []}
    protected = prompt.protect_sink + prompt.protect_window
    usable = [one for one in budgets if protected < one < prompt.seq_len]
    if usable and prompt.scored != KL and prompt.outcome(everything(prompt)).exact:
        fixed = [keep(engine, prompt, table, budget) for budget in usable]
        gated = [keep(engine, prompt, table, min(usable),
                      {"risk_target": target, "risk_max_tokens": min(most, prompt.seq_len - 1)})
                 for target in targets]
        outcomes = iter(prompt.outcomes([one.sets() for one in (*fixed, *gated)]))
        for budget, kept in zip(usable, fixed):
            found["budgets"].append({
                "budget": budget, "predicted": kept.predicted_miss_rate,
                "outside_mass": kept.outside_mass, "missed": not next(outcomes).exact})
        for target, kept in zip(targets, gated):
            found["targets"].append({
                "target": target, "predicted": kept.predicted_miss_rate,
                "kept": mean_kept(kept.sets()), "missed": not next(outcomes).exact})
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def summarize_risk(found: Sequence[dict], bins: int = 5) -> dict:
    """Predicted against measured miss rates, in bins of equal size, and by target."""
    points = [one for prompt in found for one in prompt["budgets"] if one["predicted"] is not None]
    points.sort(key=lambda one: one["predicted"])
    rows = []
    for part in np.array_split(np.asarray(points, object), bins):
        if len(part):
            missed = [float(one["missed"]) for one in part]
            rows.append({"prompts": len(part),
                         "predicted": float(np.mean([one["predicted"] for one in part])),
                         "measured": float(np.mean(missed)), "interval": bootstrap_interval(missed)})
    targets = []
    for target in sorted({one["target"] for prompt in found for one in prompt["targets"]}):
        part = [one for prompt in found for one in prompt["targets"] if one["target"] == target]
        missed = [float(one["missed"]) for one in part]
        targets.append({
            "target": target, "prompts": len(part),
            "predicted": float(np.mean([one["predicted"] for one in part])),
            "measured": float(np.mean(missed)), "interval": bootstrap_interval(missed),
            "kept": float(np.mean([one["kept"] for one in part]))})
    return {"bins": rows, "targets": targets,
            "points": [[round(one["outside_mass"], 4), round(one["predicted"], 4), int(one["missed"])]
                       for one in points]}
