"""Tasks of the shipped small model, word by word, in the form nearest to what it was trained on: facts in
a passage of 256 to 2,048 words, asked by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from keepset import ModelFingerprint
from keepset.calibrate.head_prompts import EXACT, KL, HeadPrompt
from keepset.calibrate.prompt_builder import Continuation, Ids, PromptBuilder, Script
from keepset.eval import facts, vocabulary
from keepset.eval.small_model import SmallModel

LATER = "later_"
_SUMMARY_WORDS = 24
# Facts asked of one compressed context.
_ASKED_LATER = 8


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Words of a context, of what ends the prompt, and of what is asked: (words, are they judged)."""

    context: list[str]
    question: list[str]
    turns: tuple[tuple[Sequence[str], bool], ...]


class SmallModelTasks:
    """`later_X` is X with its question asked after compression: the query-agnostic column.

    number: a fact's two numbers. multi: two facts are asked, the second is answered first and the first
    is asked again. code: a fact of two words instead of numbers. quotation: the words that follow seven
    given ones. tracking: the later value of a name that has two. few_shot: the label of an example that
    was shown, eight labels over all examples. summary: 24 words that the full cache writes next; scored
    by KL alone.
    """

    INSIDE = ("number", "multi", "code", "quotation", "tracking", "few_shot", "summary")
    AGNOSTIC = tuple(LATER + task for task in ("number", "multi", "few_shot", "summary"))
    TASKS = INSIDE + AGNOSTIC
    PROBE = ("recall", "pin ask")
    # What the model was trained on, in words.
    TRAINED = (256, 2048)

    def __init__(self, model: SmallModel, *, text: str = "Apache-2.0", window: int = 16):
        self.model = model
        self.text = text
        self.fingerprint = ModelFingerprint(**model.fingerprint())
        self._words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / text)
        self._builder = PromptBuilder(model, self.fingerprint, model.config.softmax_scale,
                                      lambda ids: " ".join(model.detokenize(ids)), window)

    def prompt(self, task: str, seed: int, seq_len: int) -> HeadPrompt:
        kind = task.removeprefix(LATER)
        rng = np.random.default_rng([seed, self.INSIDE.index(kind), seq_len])
        # The longest training samples had 60 facts.
        sample = facts.make_sample(rng, self._words, seq_len, min(60, seq_len // 32))
        name = f"{self.text}-{task}-{seq_len}-{seed}"
        if task != kind and kind != "summary":
            return self._builder.build(task, name, self._later(kind, sample, rng))
        made = getattr(self, f"_{kind}")(sample, rng)
        ids = self._ids(made.context + made.question)
        observed = len(made.question)
        scored = EXACT
        if kind == "summary":
            turns = [(self._builder.told_by_full_cache(ids, [], _SUMMARY_WORDS), True)]
            # There is no question: the last words observe.
            scored, observed = KL, self._builder.window
        else:
            turns = [(self._ids(words), judged) for words, judged in made.turns]
        return self._builder.build(task, name, Script(
            ids, (len(ids) - observed, len(ids)), (Continuation.of(*turns),),
            self._probe() if task != kind else None, scored))

    def repetition(self, length: int, times: int) -> HeadPrompt:
        return self._builder.repetition(self.model.config.vocab_size, length, times)

    def _later(self, kind: str, sample: facts.Sample, rng: np.random.Generator) -> Script:
        context = list(sample.context)
        if kind == "few_shot":
            sample = self._labelled(sample, rng)
            context = list(sample.context)
        asked = [sample.facts[i] for i in rng.permutation(len(sample.facts))[:_ASKED_LATER]]
        turns = [((fact.question, False), (fact.answer, True)) for fact in asked]
        if kind == "multi":
            turns = [one + other for one, other in zip(turns[::2], turns[1::2])]
        ids = self._ids(context)
        return Script(ids, (len(ids) - self._builder.window, len(ids)), tuple(
            Continuation.of(*((self._ids(words), judged) for words, judged in turn))
            for turn in turns), self._probe())

    def _probe(self) -> tuple[str, str, Ids]:
        return (*self.PROBE, self._ids(self.PROBE[1].split()))

    def _ids(self, words: Sequence[str]) -> Ids:
        return self.model.tokenize(words)

    def _number(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        fact = sample.facts[rng.integers(len(sample.facts))]
        return _Asked(list(sample.context), list(fact.question), ((fact.answer, True),))

    def _multi(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        first, second = (sample.facts[i] for i in rng.permutation(len(sample.facts))[:2])
        return _Asked(list(sample.context), [*second.question, *first.question],
                      ((first.answer, True), (second.question, False), (second.answer, True)))

    def _code(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        context = list(sample.context)
        fact = sample.facts[rng.integers(len(sample.facts))]
        code = [str(word) for word in rng.choice(vocabulary.NAMES, facts.ANSWER_WORDS)]
        context[fact.position + 2 : fact.position + 4] = code
        return _Asked(context, list(fact.question), ((code, True),))

    def _quotation(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        context = list(sample.context)
        begin = int(rng.integers(20, len(context) - 40))
        return _Asked(context, context[begin : begin + 7], ((context[begin + 7 : begin + 14], True),))

    def _tracking(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        context = list(sample.context)
        early, late = (sample.facts[i] for i in sorted(rng.permutation(len(sample.facts))[:2]))
        context[late.position + 1] = early.name
        return _Asked(context, list(early.question), ((late.answer, True),))

    def _few_shot(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        return self._number(self._labelled(sample, rng), rng)

    def _labelled(self, sample: facts.Sample, rng: np.random.Generator) -> facts.Sample:
        """Facts whose numbers are one of eight labels of two words."""
        context, labelled = list(sample.context), []
        for fact in sample.facts:
            label = int(rng.integers(8))
            one = dataclasses.replace(fact, first=vocabulary.NUMBERS[label],
                                      second=vocabulary.NUMBERS[label + 8])
            context[one.position : one.position + facts.WORDS_PER_FACT] = one.words
            labelled.append(one)
        return facts.Sample(tuple(context), tuple(labelled))

    def _summary(self, sample: facts.Sample, rng: np.random.Generator) -> _Asked:
        return _Asked(list(sample.context), [], ())
