"""The shipped small model: exact answers and distance to the full cache, by policy and budget."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Say
from keepset.calibrate.prompts import SmallModelAdapter
from keepset.demo.job import cache_of
from keepset.eval import facts, vocabulary
from keepset.eval.kv_cache import KvCache
from keepset.eval.small_model import Prefill, SmallModel
from keepset.evidence import tables
from keepset.evidence.service import candidates_of, shared
from keepset.evidence.statistics import bootstrap_interval, mcnemar, paired_difference
from keepset.server_process import ServerProcess

PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
TABLES = ("uniform", "compiled", "shuffled")
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
    budgets: tuple[int, ...] = (64, 128, 256)
    calibration_seeds: range = range(24)
    actions_per_state: int = 29
    max_rounds: int = 3
    test_seeds: range = range(1000, 1024)
    entropy_bins: int = 4
    ppl_bins: int = 2


class Tally:
    """Raw outcomes of one method at one budget in one column."""

    def __init__(self) -> None:
        self.exact: list[list[bool]] = []  # by prompt, by question
        self.predicted: list[list[str]] = []
        self.kl: list[float] = []
        self.bytes_before = 0
        self.bytes_after = 0
        self.kept: list[float] = []
        self.candidates: list[int] = []

    def by_prompt(self) -> list[float]:
        return [float(np.mean(one)) for one in self.exact]

    def add_result(self, result: keepset.Result) -> None:
        self.bytes_before += result.bytes_before
        self.bytes_after += result.bytes_after
        self.kept += [float(np.mean([len(one.indices) for one in layer.sets]))
                      for layer in result.layers]
        self.candidates += candidates_of(result) or []

    def to_json(self) -> dict:
        mean = float(np.mean(self.by_prompt()))
        return {
            "exact": mean, "interval": bootstrap_interval(self.by_prompt()),
            "kl_mean": float(np.mean(self.kl)), "kl_p95": float(np.percentile(self.kl, 95)),
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "mean_kept": float(np.mean(self.kept)),
            "mean_candidates": float(np.mean(self.candidates)) if self.candidates else None,
            "correct_by_prompt": ["".join("01"[int(x)] for x in one) for one in self.exact],
            "predicted": self.predicted,
        }  # fmt: skip


def run(build: Build, work: pathlib.Path, settings: Settings, say: Say) -> dict:
    """Calibrates, compiles, serves and tests; returns the part of the report."""
    model = SmallModel.load()
    adapter = SmallModelAdapter(model, settings.calibration_text, settings.seq_len,
                                settings.num_facts, window=settings.window)
    fingerprint = adapter.fingerprint()
    budgets = list(settings.budgets)
    work.mkdir(parents=True, exist_ok=True)
    outcome = calibrate(build, adapter, work / "records.jsonl", seeds=settings.calibration_seeds,
                        budgets=budgets, alpha_scope="global", actions=settings.actions_per_state,
                        max_rounds=settings.max_rounds, name="compiled", version="1", say=say,
                        bins=(settings.entropy_bins, settings.ppl_bins))
    files = {"uniform": tables.uniform(fingerprint, "uniform", budgets), "compiled": outcome.table,
             "shuffled": tables.shuffled(fingerprint, outcome.table, "shuffled", seed=0)}
    folder = work / "tables"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        table_file.write_atomically(folder / f"{name}.safetensors", data)
    with ServerProcess(build.keepsetd, tables=folder) as server, keepset.Client.connect(
            server.address) as client:
        info = client.server_info()
        tallies = Measurement(client, model, settings, files).run(say)
    compiled = table_file.read_table(outcome.table)
    return {
        "settings": {**dataclasses.asdict(settings),
                     "calibration_seeds": [settings.calibration_seeds.start,
                                           settings.calibration_seeds.stop],
                     "test_seeds": [settings.test_seeds.start, settings.test_seeds.stop]},
        "model": fingerprint.to_json(), "backend": info.backend,
        "calibration": {"records": outcome.num_records, "rounds": outcome.rounds,
                        "actions_settled": outcome.settled},
        "digests": {name: table_file.digest(data) for name, data in files.items()},
        "compiled_head_weights": np.round(compiled.head_weights, 3).tolist(),
        "compiled_gates": np.round(compiled.gate_thresholds, 3).tolist(),
        "rows": [{"method": method, "budget": budget, "column": column, **tally.to_json()}
                 for (method, budget, column), tally in tallies.items()],
        "comparisons": _comparisons(tallies, budgets),
    }  # fmt: skip


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
        for name in TABLES:
            pin = keepset.TablePin(digest=table_file.digest(files[name]))
            self._specs[f"compilerkv {name}"] = {"policy": "compilerkv", "table": pin}

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
            self._tallies[key].exact.append([])
            self._tallies[key].predicted.append([])

    def _inside(self, sample: facts.Sample, asked: list[facts.Fact]) -> None:
        for number, fact in enumerate(asked):
            prefill = self._prefill(sample.prompt_with_question(fact))
            last = prefill.seq_len - 1
            fed = self._ids((fact.name, *fact.answer[:1]))[None]

            def logits(cache: KvCache, fed=fed, last=last) -> np.ndarray:
                return self._model.score_many(cache.before(last), fed, last)

            for key in self._compressions("inside", prefill, logits, self._ids(fact.answer)[None]):
                if number == 0:
                    self._tallies[key].exact.append([])
                    self._tallies[key].predicted.append([])

    def _compressions(self, column: str, prefill: Prefill, logits: Callable[[KvCache], np.ndarray],
                      answers: np.ndarray) -> Iterator[tuple[str, int, str]]:
        """Every method and budget on one prompt; yields the tally's key before it is added to."""
        reference = logits(prefill.full_cache())
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
                        ppl=prefill.perplexity(self._settings.window), **spec)
                    scores = logits(cache_of(result))
                    tally.add_result(result)
                    result.release()
                    # Greedy decoding gives the answer exactly when both words are the most likely
                    # ones with the answer's own first word fed.
                    best = scores.argmax(-1)
                    tally.exact[-1] += (best == answers).all(-1).tolist()
                    tally.predicted[-1] += [" ".join(self._model.detokenize(one)) for one in best]
                    tally.kl += _kl(reference, scores).tolist()

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


def _comparisons(tallies: dict[tuple[str, int, str], Tally], budgets: list[int]) -> list[dict]:
    """The compiled table against every other method, on the same prompts."""
    out = []
    for column in COLUMNS:
        for budget in budgets:
            ours = tallies["compilerkv compiled", budget, column]
            for method in (*PLAIN, "compilerkv uniform", "compilerkv shuffled"):
                other = tallies[method, budget, column]
                out.append({
                    "column": column, "budget": budget, "compiled_against": method,
                    "difference": paired_difference(ours.by_prompt(), other.by_prompt()),
                    "mcnemar": mcnemar(sum(ours.exact, []), sum(other.exact, [])),
                })  # fmt: skip
    return out
