"""The shipped small model: exact answers and distance to the full cache, by policy and budget."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Outcome, Say
from keepset.calibrate.prompts import SmallModelAdapter
from keepset.demo.job import cache_of
from keepset.eval import facts, vocabulary
from keepset.eval.kv_cache import KvCache
from keepset.eval.small_model import Prefill, SmallModel
from keepset.evidence import tables, transfer
from keepset.evidence.service import shared
from keepset.evidence.statistics import mcnemar, paired_difference
from keepset.evidence.tally import Tally
from keepset.server_process import ServerProcess

PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
CONTROLS = ("uniform", "shuffled", "heads only", "gate only")
COLUMNS = ("inside", "later")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the run. Calibration reads one held-out text, the test another."""

    calibration_text: str = "Apache-2.0"
    test_text: str = "MPL-2.0"
    seq_len: int = 1024
    num_facts: int = 32
    questions_per_prompt: int = 4
    window: int = 16
    # snapkv keeps its window by definition; the same holds for every method here.
    protect_window: int = 16
    alpha_scopes: tuple[str, ...] = ("global", "head")
    budgets: tuple[int, ...] = (64, 128, 256)
    calibration_seeds: range = range(32)
    actions_per_state: int = 29
    max_rounds: int = 3
    test_seeds: range = range(1000, 1040)
    transfer_seeds: range = range(16)
    transfer_test_seeds: range = range(2000, 2016)
    entropy_bins: int = 4
    ppl_bins: int = 2


def run(build: Build, work: pathlib.Path, settings: Settings, say: Say) -> dict:
    """Calibrates, compiles, serves and tests; returns the part of the report."""
    model = SmallModel.load()
    fingerprint = keepset.ModelFingerprint(**model.fingerprint())
    files: dict[str, bytes] = {}
    calibrations = {}
    for scope in settings.alpha_scopes:
        outcome = _calibrate(build, work / scope, model, settings, scope, say)
        made = _tables(fingerprint, outcome.table, scope, list(settings.budgets))
        files |= {f"{scope} {kind}": data for kind, data in made.items()}
        table = table_file.read_table(outcome.table)
        calibrations[scope] = {
            "records": outcome.num_records, "rounds": outcome.rounds,
            "actions_settled": outcome.settled,
            "head_weights": np.round(table.head_weights, 3).tolist(),
            "gate_thresholds": np.round(table.gate_thresholds, 3).tolist(),
            "entropy_edges": np.round(table.entropy_edges, 4).tolist(),
            "ppl_edges": np.round(table.ppl_edges, 4).tolist(),
        }  # fmt: skip
    folder = work / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        table_file.write_atomically(folder / f"{name.replace(' ', '-')}.safetensors", data)
    with ServerProcess(build.keepsetd, tables=folder) as server, keepset.Client.connect(
            server.address) as client:
        tallies = Measurement(client, model, settings, files).run(say)
    return {
        "settings": {name: [value.start, value.stop] if isinstance(value, range) else value
                     for name, value in dataclasses.asdict(settings).items()},
        "model": fingerprint.to_json(), "calibrations": calibrations,
        "digests": {name: table_file.digest(data) for name, data in files.items()},
        "rows": [{"method": method, "budget": budget, "column": column, **tally.to_json()}
                 for (method, budget, column), tally in tallies.items()],
        "comparisons": _comparisons(tallies, settings),
        "transfer": _transfer(build, work / "transfer", model, settings, say),
    }  # fmt: skip


def _calibrate(build: Build, work: pathlib.Path, model: SmallModel, settings: Settings, scope: str,
               say: Say) -> Outcome:
    work.mkdir(parents=True, exist_ok=True)
    say(f"small model, alpha_scope={scope}")
    adapter = SmallModelAdapter(model, settings.calibration_text, settings.seq_len,
                                settings.num_facts, window=settings.window)
    return calibrate(build, adapter, work / "records.jsonl", seeds=settings.calibration_seeds,
                     budgets=list(settings.budgets), alpha_scope=scope,
                     actions=settings.actions_per_state, max_rounds=settings.max_rounds,
                     name=f"{scope}-compiled", version="1", say=say,
                     bins=(settings.entropy_bins, settings.ppl_bins),
                     protect_window=settings.protect_window)


def _transfer(build: Build, work: pathlib.Path, model: SmallModel, settings: Settings, say: Say
              ) -> dict:
    """Tables compiled on the first and on the second half of the calibration text."""
    halves = [SmallModelAdapter(model, settings.calibration_text, settings.seq_len,
                                settings.num_facts, window=settings.window, text_part=part)
              for part in ((0.0, 0.5), (0.5, 1.0))]
    return transfer.measure(
        build, halves, work, seeds=settings.transfer_seeds, test_seeds=settings.transfer_test_seeds,
        budgets=list(settings.budgets), alpha_scope=settings.alpha_scopes[0],
        actions=settings.actions_per_state, max_rounds=settings.max_rounds,
        bins=(settings.entropy_bins, settings.ppl_bins), protect_window=settings.protect_window,
        say=say)


def _tables(model: keepset.ModelFingerprint, compiled: bytes, scope: str, budgets: list[int]
            ) -> dict[str, bytes]:
    return {
        "uniform": tables.uniform(model, f"{scope}-uniform", budgets),
        "compiled": compiled,
        "shuffled": tables.shuffled(model, compiled, f"{scope}-shuffled", seed=0),
        "heads only": tables.heads_only(model, compiled, f"{scope}-heads-only"),
        "gate only": tables.gate_only(model, compiled, f"{scope}-gate-only"),
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
        for name, data in files.items():
            self._specs[f"compilerkv {name}"] = {
                "policy": "compilerkv", "table": keepset.TablePin(digest=table_file.digest(data)),
                "parameters": {"alpha_scope": name.split()[0]}}

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
                    tally = self._tallies.setdefault(key, Tally())
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
                        # The uniform table comes first in each scope.
                        scope = spec["parameters"]["alpha_scope"]
                        tally.compare_kept(kept, uniform_kept.setdefault((scope, budget), kept))
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
    """The compiled table of each scope against the other methods, on the same prompts."""
    out = []
    for scope in settings.alpha_scopes:
        others = [*PLAIN, *(f"compilerkv {scope} {kind}" for kind in CONTROLS)]
        for column in COLUMNS:
            for budget in settings.budgets:
                ours = tallies[f"compilerkv {scope} compiled", budget, column]
                for method in others:
                    other = tallies[method, budget, column]
                    out.append({
                        "alpha_scope": scope, "column": column, "budget": budget,
                        "compiled_against": method,
                        "difference": paired_difference(ours.by_prompt(), other.by_prompt()),
                        "mcnemar": mcnemar(sum(ours.exact, []), sum(other.exact, [])),
                    })  # fmt: skip
    return out
