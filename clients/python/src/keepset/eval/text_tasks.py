"""Tasks in plain English for any language model: what is hidden in a text, and what is asked about it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

import numpy as np

TASKS = ("number", "code", "quotation", "multi", "tracking", "few_shot", "summary")

_CITIES = ("Oslo", "Lima", "Cairo", "Dublin", "Hanoi", "Quito", "Riga", "Tunis", "Perth", "Seoul",
           "Turin", "Basel", "Lagos", "Porto", "Delhi", "Minsk")
_CLASSES = {
    "dax": ("apple", "pear", "plum", "cherry", "grape", "peach", "lemon", "mango", "melon", "fig"),
    "wug": ("horse", "goat", "rabbit", "wolf", "otter", "badger", "camel", "donkey", "tiger", "sheep"),
    "fep": ("hammer", "saw", "chisel", "wrench", "drill", "pliers", "shovel", "rake", "axe", "file"),
}
_QUOTED_WORDS = 7
_SENTENCE = re.compile(r"(?<=[.;:])\s+|\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Asked:
    """hidden: sentences to be put at random places of a text, in this order. answer: None where only the
    full cache can say it. begun: how the answer begins, which is given and not asked."""

    hidden: tuple[str, ...]
    question: str
    answer: str | None
    begun: str = ""


def sentences(texts: Sequence[str | pathlib.Path]) -> list[str]:
    """Sentences of UTF-8 text files, white space folded."""
    found: list[str] = []
    for path in texts:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
        found += [" ".join(one.split()) for one in _SENTENCE.split(text)]
    return [one for one in found if len(one) > 1]


def ask(task: str, rng: np.random.Generator, text: Sequence[str]) -> Asked:
    """What a task hides in and asks about `text`, the sentences of its prompt."""
    return {"number": _number, "code": _code, "quotation": _quotation, "multi": _multi,
            "tracking": _tracking, "few_shot": _few_shot, "summary": _summary}[task](rng, text)


def _digits(rng: np.random.Generator, count: int = 7) -> str:
    return str(rng.integers(1, 10)) + "".join(map(str, rng.integers(10, size=count - 1)))


def _fact(city: str, number: str) -> str:
    return f"The special number of the {city} office is {number}."


def _number(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    city, number = str(rng.choice(_CITIES)), _digits(rng)
    return Asked((_fact(city, number),),
                 f"What is the special number of the {city} office? Answer with the number only.",
                 number)


def _code(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    city = str(rng.choice(_CITIES))
    code = "".join("0123456789abcdef"[i] for i in rng.integers(16, size=8))
    return Asked((f"The access code of the {city} archive is {code}.",),
                 f"What is the access code of the {city} archive? Answer with the code only.", code)


def _quotation(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    """A sentence of the text itself; the longest one where none has words enough."""
    long = [one for one in text if len(one.split()) >= 2 * _QUOTED_WORDS] or [max(text, key=len)]
    words = long[rng.integers(len(long))].split()
    given = max(1, min(_QUOTED_WORDS, len(words) - 1))
    begun = " ".join(words[:given])
    return Asked((), f"Which sentence of the text begins with the words \"{begun}\"? Quote the whole "
                     "sentence, nothing else.", " ".join(words[given : given + _QUOTED_WORDS]), begun)


def _multi(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    cities = [str(one) for one in rng.choice(_CITIES, 4, replace=False)]
    numbers = [_digits(rng, 5) for _ in cities]
    first, second = (int(one) for one in rng.permutation(len(cities))[:2])
    return Asked(tuple(map(_fact, cities, numbers)),
                 f"What are the special numbers of the {cities[first]} office and of the "
                 f"{cities[second]} office, in this order? Answer with the two numbers only, separated "
                 "by a comma.", f"{numbers[first]}, {numbers[second]}")


def _tracking(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    """Two chains of three assignments; one is asked at its end."""
    names = ["".join("ABCDEFGHJKLMNPQRSTUVWXYZ"[i] for i in rng.integers(24, size=3)) + str(step)
             for step in range(6)]
    values = _digits(rng, 5), _digits(rng, 5)
    hidden = [f"VAR {names[0]} = {values[0]}.", f"VAR {names[3]} = {values[1]}."]
    for step in (1, 2):
        hidden += [f"VAR {names[at + step]} = VAR {names[at + step - 1]}." for at in (0, 3)]
    return Asked(tuple(hidden),
                 f"Variables are assigned in the text. What is the value of VAR {names[2]}? Answer with "
                 "the number only.", values[0])


def _few_shot(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    """Twelve labelled words; one of the same kinds that was not shown is asked."""
    shown, unseen = [], []
    for label, words in _CLASSES.items():
        order = [words[i] for i in rng.permutation(len(words))]
        shown += [f"Example: the label of {word} is {label}." for word in order[:4]]
        unseen.append((order[4], label))
    word, label = unseen[rng.integers(len(unseen))]
    return Asked(tuple(shown[i] for i in rng.permutation(len(shown))),
                 "The text holds examples of labels; words of the same kind have the same label. What "
                 f"is the label of {word}?", label, f"The label of {word} is")


def _summary(rng: np.random.Generator, text: Sequence[str]) -> Asked:
    return Asked((), "Summarize the text above in two sentences.", None)
