"""The shipped small model: exact answers and distance to the full cache, by policy and budget."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Outcome, Say, steps_of
from keepset.calibrate.compiler import Compiler
from keepset.calibrate.prompts import Prompt, SmallModelAdapter
from keepset.calibrate.rollouts import Rollouts
from keepset.demo.job import cache_of
from keepset.eval import facts, vocabulary
from keepset.eval.kv_cache import KvCache
from keepset.eval.small_model import Prefill, SmallModel
from keepset.evidence import headroom as headroom_search
from keepset.evidence import tables, transfer
from keepset.evidence.learning_curve import curve, tables_by_prompts
from keepset.evidence.service import shared
from keepset.evidence.statistics import mcnemar, paired_difference
from keepset.evidence.tally import Tally
from keepset.in_process import Engine
from keepset.server_process import ServerProcess

PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
KINDS = ("uniform", "compiled", "shuffled", "heads only", "gate only")
COLUMNS = ("inside", "later")


@dataclasses.dataclass(frozen=True)
class Variant:
    """compilerkv as it is run and as its tables are compiled."""

    name: str
    alpha_scope: str
    parameters: tuple[tuple[str, int], ...] = ()

    def policy_parameters(self) -> dict[str, object]:
        return {"alpha_scope": self.alpha_scope, **dict(self.parameters)}


VARIANTS = (
    Variant("global", "global"),
    Variant("head", "head"),
    Variant("global pool3", "global", (("pool_kernel", 3),)),
    Variant("head pool3", "head", (("pool_kernel", 3),)),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the run. Calibration reads one held-out text, the test another."""

    calibration_text: str = "Apache-2.0"
    test_text: str = "MPL-2.0"
    seq_len: int = 1024
    num_facts: int = 32
    questions_per_prompt: int = 3
    window: int = 16
    # snapkv keeps its window by definition; the same holds for every method here.
    protect_window: int = 16
    variants: tuple[Variant, ...] = VARIANTS
    budgets: tuple[int, ...] = (24, 32, 64, 256)
    calibration_pool: range = range(72)
    calibration_prompts: int = 24
    action_step: int = 4
    max_rounds: int = 2
    test_seeds: range = range(1000, 1032)
    headroom_seeds: range = range(1000, 1016)
    curve_prompts: tuple[int, ...] = (6, 12, 24)
    transfer_variant: int = 3
    transfer_seeds: range = range(12)
    transfer_test_seeds: range = range(2000, 2012)
    transfer_rounds: int = 2
    entropy_bins: int = 4
    ppl_bins: int = 2


def run(build: Build, work: pathlib.Path, settings: Settings, say: Say) -> dict:
    """Calibrates, compiles, serves and tests; returns the part of the report."""
    model = SmallModel.load()
    fingerprint = keepset.ModelFingerprint(**model.fingerprint())
    files: dict[str, bytes] = {}
    calibrations, headroom, curves = {}, {}, {}
    test_adapter = dataclasses.replace(_adapter(model, settings), text=settings.test_text)
    prompts = list(test_adapter.prompts(settings.headroom_seeds))
    for variant in settings.variants:
        folder = work / variant.name.replace(" ", "-")
        outcome = _calibrate(build, folder, model, settings, variant, say)
        made = _tables(fingerprint, outcome.table, variant.name, list(settings.budgets))
        files |= {f"{variant.name} {kind}": data for kind, data in made.items()}
        calibrations[variant.name] = _calibration_entry(outcome)
        with Engine(build.library) as engine:
            headroom[variant.name] = headroom_search.search(
                engine, test_adapter, prompts, list(settings.budgets), variant.policy_parameters(),
                settings.protect_window, outcome.table)
            curves[variant.name] = _curve(build, engine, folder, test_adapter, prompts, settings,
                                          variant)
        say(f"small model, {variant.name}: searched all tables, compiled from fewer prompts")
    served = work / "tables"
    served.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        table_file.write_atomically(served / f"{name.replace(' ', '-')}.safetensors", data)
    with ServerProcess(build.keepsetd, tables=served) as server, keepset.Client.connect(
            server.address) as client:
        tallies = Measurement(client, model, settings, files).run(say)
    return {
        "settings": _settings_json(settings), "model": fingerprint.to_json(),
        "calibrations": calibrations, "headroom": headroom, "learning_curves": curves,
        "digests": {name: table_file.digest(data) for name, data in files.items()},
        "rows": [{"method": method, "budget": budget, "column": column, **tally.to_json()}
                 for (method, budget, column), tally in tallies.items()],
        "comparisons": _comparisons(tallies, settings),
        "transfer": _transfer(build, work / "transfer", model, settings, say),
    }  # fmt: skip


def _settings_json(settings: Settings) -> dict:
    return {name: [value.start, value.stop] if isinstance(value, range) else value
            for name, value in dataclasses.asdict(settings).items()}


def _adapter(model: SmallModel, settings: Settings) -> SmallModelAdapter:
    return SmallModelAdapter(model, settings.calibration_text, settings.seq_len, settings.num_facts,
                             window=settings.window)


def _calibration_entry(outcome: Outcome) -> dict:
    table = table_file.read_table(outcome.table)
    return {
        "records": outcome.num_records, "rounds": outcome.rounds, "settled": outcome.settled,
        "tolerance": outcome.tolerance, "changes": [one.to_json() for one in outcome.changes],
        "coverage": outcome.coverage,
        "head_weights": np.round(table.head_weights, 3).tolist(),
        "gate_thresholds": np.round(table.gate_thresholds, 3).tolist(),
        "entropy_edges": np.round(table.entropy_edges, 4).tolist(),
        "ppl_edges": np.round(table.ppl_edges, 4).tolist(),
    }  # fmt: skip


def _calibrate(build: Build, work: pathlib.Path, model: SmallModel, settings: Settings,
               variant: Variant, say: Say) -> Outcome:
    work.mkdir(parents=True, exist_ok=True)
    say(f"small model, {variant.name}")
    return calibrate(build, _adapter(model, settings), work / "records.jsonl",
                     seeds=settings.calibration_pool, num_prompts=settings.calibration_prompts,
                     budgets=list(settings.budgets), alpha_scope=variant.alpha_scope,
                     parameters=dict(variant.parameters),
                     action_step=settings.action_step,
                     max_rounds=settings.max_rounds, name=_table_name(variant, "compiled"),
                     version="1", say=say, bins=(settings.entropy_bins, settings.ppl_bins),
                     protect_window=settings.protect_window)


def _curve(build: Build, engine: Engine, folder: pathlib.Path, adapter: SmallModelAdapter,
           prompts: list[Prompt], settings: Settings, variant: Variant) -> list[dict]:
    """Losses on the test prompts of tables from fewer of the calibration prompts."""
    out = folder / "records.jsonl"
    ids = json.loads((steps_of(out) / "settings.json").read_text())["prompts"]
    # Not in order of seeds: even ones ask after the prompt, odd ones inside.
    ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]
    compiler = Compiler(build.keepset, adapter.fingerprint(), settings.entropy_bins,
                        settings.ppl_bins)
    rollouts = Rollouts(engine, adapter.fingerprint(), prompts, list(settings.budgets), seed=0,
                        parameters=variant.policy_parameters(),
                        protect_window=settings.protect_window)
    made = tables_by_prompts(compiler, out, ids, settings.curve_prompts, folder / "curve")
    return curve(made, lambda table: transfer.mean_losses(rollouts, len(prompts), table))


def _transfer(build: Build, work: pathlib.Path, model: SmallModel, settings: Settings, say: Say
              ) -> dict:
    """Tables compiled on the first and on the second half of the calibration text."""
    variant = settings.variants[settings.transfer_variant]
    halves = [transfer.Half(dataclasses.replace(_adapter(model, settings), text_part=part),
                            settings.transfer_seeds, settings.transfer_test_seeds)
              for part in ((0.0, 0.5), (0.5, 1.0))]
    return {"variant": variant.name} | transfer.measure(
        build, halves, work, budgets=list(settings.budgets), alpha_scope=variant.alpha_scope,
        parameters=dict(variant.parameters), action_step=settings.action_step,
        max_rounds=settings.transfer_rounds, bins=(settings.entropy_bins, settings.ppl_bins),
        protect_window=settings.protect_window, say=say)


def _table_name(variant: Variant, kind: str) -> str:
    return f"{variant.name} {kind}".replace(" ", "-")


def _tables(model: keepset.ModelFingerprint, compiled: bytes, variant: str, budgets: list[int]
            ) -> dict[str, bytes]:
    prefix = variant.replace(" ", "-")
    return {
        "uniform": tables.uniform(model, f"{prefix}-uniform", budgets),
        "compiled": compiled,
        "shuffled": tables.shuffled(model, compiled, f"{prefix}-shuffled", seed=0),
        "heads only": tables.heads_only(model, compiled, f"{prefix}-heads-only"),
        "gate only": tables.gate_only(model, compiled, f"{prefix}-gate-only"),
    }


class Measurement:
    """All methods on the same prompts."""

    def __init__(self, client: keepset.Client, model: SmallModel, settings: Settings,
                 files: dict[str, bytes]):
        self._client = client
        self._model = model
        self._settings = settings
        self._fingerprint = keepset.ModelFingerprint(**model.fingerprint())
        self._tallies: dict[tuple[str, int, str], Tally] = {}
        self._specs: dict[str, dict] = {"full": {"policy": "full"}}
        self._specs |= {policy: {"policy": policy} for policy in PLAIN}
        self._variant_of: dict[str, str] = {}
        for variant in settings.variants:
            for kind in KINDS:
                method = f"compilerkv {variant.name} {kind}"
                self._variant_of[method] = variant.name
                self._specs[method] = {
                    "policy": "compilerkv", "parameters": variant.policy_parameters(),
                    "table": keepset.TablePin(
                        digest=table_file.digest(files[f"{variant.name} {kind}"]))}

    def run(self, say: Say) -> dict[tuple[str, int, str], Tally]:
        settings = self._settings
        words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / settings.test_text)
        for seed in settings.test_seeds:
            rng = np.random.default_rng(seed)
            sample = facts.make_sample(rng, words, settings.seq_len, settings.num_facts)
            order = rng.permutation(settings.num_facts)[: settings.questions_per_prompt]
            asked = [sample.facts[i] for i in order]
            self._later(sample, asked)
            self._inside(sample, asked)
        say(f"small model: {len(settings.test_seeds)} test prompts, {len(self._specs)} methods")
        return self._tallies

    def _later(self, sample: facts.Sample, asked: list[facts.Fact]) -> None:
        prefill = self._prefill(sample.context)
        fed = np.stack([self._ids(fact.question + fact.answer[:1]) for fact in asked])
        answers = np.stack([self._ids(fact.answer) for fact in asked])

        def logits(cache: KvCache) -> np.ndarray:
            scores = self._model.score_many(cache, fed, prefill.seq_len)
            return scores[:, -facts.ANSWER_WORDS:]

        for key in self._compressions("later", prefill, logits, answers):
            self._tallies[key].begin_prompt()

    def _inside(self, sample: facts.Sample, asked: list[facts.Fact]) -> None:
        for number, fact in enumerate(asked):
            prefill = self._prefill(sample.prompt_with_question(fact))
            last = prefill.seq_len - 1
            fed = self._ids((fact.name, *fact.answer[:1]))[None]

            def logits(cache: KvCache, fed=fed, last=last) -> np.ndarray:
                return self._model.score_many(cache.before(last), fed, last)

            for key in self._compressions("inside", prefill, logits, self._ids(fact.answer)[None]):
                if number == 0:
                    self._tallies[key].begin_prompt()

    def _compressions(self, column: str, prefill: Prefill, logits: Callable[[KvCache], np.ndarray],
                      answers: np.ndarray) -> Iterator[tuple[str, int, str]]:
        """Every method and budget on one prompt; yields the tally's key before it is added to."""
        reference = logits(prefill.full_cache())
        uniform_kept: dict[tuple[str, int], list[np.ndarray]] = {}
        with shared(self._client, prefill.layers) as layers:
            for method, spec in self._specs.items():
                for budget in self._settings.budgets if method != "full" else (prefill.seq_len,):
                    key = (method, budget if method != "full" else 0, column)
                    tally = self._tallies.setdefault(key, Tally(budget))
                    yield key
                    result = self._client.compress(
                        model=self._fingerprint, seq_len=prefill.seq_len, layers=layers, gather=True,
                        softmax_scale=self._model.config.softmax_scale,
                        budget=keepset.Budget.tokens(budget),
                        protect_window=self._settings.protect_window,
                        ppl=prefill.perplexity(self._settings.window), **spec)
                    scores = logits(cache_of(result))
                    # Greedy decoding gives the answer exactly when both words are the most likely
                    # ones with the answer's own first word fed.
                    best = scores.argmax(-1)
                    tally.add(result, (best == answers).all(-1).tolist(),
                              [" ".join(self._model.detokenize(one)) for one in best],
                              _kl(reference, scores))
                    if spec["policy"] == "compilerkv":
                        kept = [layer.keep_indices for layer in result.layers]
                        # The uniform table comes first in each variant.
                        variant = self._variant_of[method]
                        tally.compare_kept(kept, uniform_kept.setdefault((variant, budget), kept))
                    result.release()

    def _prefill(self, words: tuple[str, ...]) -> Prefill:
        return self._model.prefill(self._ids(words), self._settings.window)

    def _ids(self, words: tuple[str, ...]) -> np.ndarray:
        return self._model.tokenize(words)


def _kl(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """KL(full || compressed) in nats of every answer word, [n * words]."""
    p, q = (_log_softmax(one.reshape(-1, one.shape[-1])) for one in (reference, scores))
    return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _comparisons(tallies: dict[tuple[str, int, str], Tally], settings: Settings) -> list[dict]:
    """The compiled table of each variant against the other methods, on the same prompts."""
    out = []
    for variant in settings.variants:
        others = [*PLAIN, *(f"compilerkv {variant.name} {kind}" for kind in KINDS
                            if kind != "compiled")]
        for column in COLUMNS:
            for budget in settings.budgets:
                ours = tallies[f"compilerkv {variant.name} compiled", budget, column]
                for method in others:
                    other = tallies[method, budget, column]
                    out.append({
                        "variant": variant.name, "column": column, "budget": budget,
                        "compiled_against": method,
                        "difference": paired_difference(ours.by_prompt(), other.by_prompt()),
                        "mcnemar": mcnemar(sum(ours.exact, []), sum(other.exact, [])),
                    })  # fmt: skip
    return out
