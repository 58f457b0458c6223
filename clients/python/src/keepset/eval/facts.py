"""Retrieval task that a person can read: facts hidden in a passage of real text, and questions.

A fact reads `pin Nora 48 21`; its question reads `ask Nora` and the answer is `48 21`. The same
sample serves both columns of an evaluation:

* question inside the prompt: `prompt_with_question(fact)` is compressed as a whole; its last word
  is then decoded again from the compacted cache, so the answer comes from what was kept;
* question asked later: `context` alone is compressed and `question(fact)` is fed through the
  compacted cache afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from keepset.eval import vocabulary

WORDS_PER_FACT = 4
QUESTION_WORDS = 2
ANSWER_WORDS = 2


@dataclasses.dataclass(frozen=True)
class Fact:
    """One hidden fact and the index of its `pin` in the context that holds it."""

    name: str
    first: str
    second: str
    position: int

    @property
    def words(self) -> tuple[str, str, str, str]:
        return (vocabulary.PIN, self.name, self.first, self.second)

    @property
    def question(self) -> tuple[str, str]:
        return (vocabulary.ASK, self.name)

    @property
    def answer(self) -> tuple[str, str]:
        return (self.first, self.second)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A context of words, `<bos>` first, and the facts in it in order of position."""

    context: tuple[str, ...]
    facts: tuple[Fact, ...]

    def prompt_with_question(self, fact: Fact) -> tuple[str, ...]:
        return self.context + fact.question

    def text(self) -> str:
        return " ".join(self.context[1:])


def passage(rng: np.random.Generator, text_words: Sequence[str], num_words: int) -> list[str]:
    """Returns `num_words` consecutive words from a random start; the text wraps around."""
    if not text_words:
        raise ValueError("text_words: empty, want at least one word")
    start = int(rng.integers(len(text_words)))
    return [text_words[(start + offset) % len(text_words)] for offset in range(num_words)]


def make_sample(rng: np.random.Generator, text_words: Sequence[str], seq_len: int,
                num_facts: int) -> Sample:
    """Hides `num_facts` facts at random places of a random passage.

    The context has exactly `seq_len` words. Names differ; numbers are free, so that a second number
    cannot be found by looking for the first alone. Two facts never touch.
    """
    num_text_words = seq_len - 1 - WORDS_PER_FACT * num_facts
    if not 1 <= num_facts <= len(vocabulary.NAMES):
        raise ValueError(f"num_facts={num_facts}, want 1..{len(vocabulary.NAMES)}")
    if num_text_words < num_facts:
        raise ValueError(
            f"seq_len={seq_len}, want at least {1 + (WORDS_PER_FACT + 1) * num_facts} for "
            f"{num_facts} facts")
    text = passage(rng, text_words, num_text_words)
    names = rng.choice(len(vocabulary.NAMES), size=num_facts, replace=False)
    numbers = rng.integers(len(vocabulary.NUMBERS), size=(num_facts, ANSWER_WORDS))
    # Gaps are counted before a text word, so every fact has a text word after it.
    gaps = np.sort(rng.choice(num_text_words, size=num_facts, replace=False))

    context = [vocabulary.BOS]
    facts = []
    done = 0
    for gap, name, (first, second) in zip(gaps, names, numbers):
        context += text[done:gap]
        done = int(gap)
        fact = Fact(vocabulary.NAMES[name], vocabulary.NUMBERS[first], vocabulary.NUMBERS[second],
                    len(context))
        context += fact.words
        facts.append(fact)
    context += text[done:]
    return Sample(tuple(context), tuple(facts))
