"""Words of the small model: specials, names, two-digit numbers and frequent words of English text.

Text is lower-cased before it is split, so a name (capitalised) and a number (digits) can never come
out of the text, and the two markers are replaced by `<unk>` when the text happens to hold them.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

BOS = "<bos>"
UNKNOWN = "<unk>"
PIN = "pin"
ASK = "ask"
SPECIALS: tuple[str, ...] = (BOS, UNKNOWN, PIN, ASK)

NAMES: tuple[str, ...] = tuple(
    "Ada Alan Anna Boris Carla Chloe Clara Diego Dora Edith Elena Emil Erik Esther Fatima Felix "
    "Fiona Georg Greta Hana Hector Helga Hugo Ines Irene Ivan Jonas Judith Julia Karim Karl Kenji "
    "Laila Lars Leon Linus Lotte Luisa Marco Marta Milan Mina Nadia Nils Nora Olga Oscar Otto "
    "Paula Pedro Petra Priya Ravi Rita Rosa Samir Selma Sven Tariq Tessa Uma Viktor Wanda Yusuf"
    .split())
NUMBERS: tuple[str, ...] = tuple(f"{value:02d}" for value in range(100))

# Folder of the licence texts that every Debian machine carries.
COMMON_LICENSES = pathlib.Path("/usr/share/common-licenses")

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*|[.,;:()]")


def split_text(text: str) -> list[str]:
    """Returns lower-case words and punctuation marks of `text`; everything else is dropped."""
    return [UNKNOWN if word in (PIN, ASK) else word for word in _WORD.findall(text.lower())]


def read_text_words(path: str | pathlib.Path) -> list[str]:
    """Returns the words of a UTF-8 text file, see `split_text`."""
    return split_text(pathlib.Path(path).read_text(encoding="utf-8", errors="replace"))


class Vocabulary:
    """Immutable two-way map between words and ids; unknown words become `<unk>`."""

    def __init__(self, words: Sequence[str]) -> None:
        """Takes the whole list in order of id; the specials come first."""
        self._words = tuple(words)
        if self._words[:len(SPECIALS)] != SPECIALS:
            raise ValueError(f"vocabulary: starts with {self._words[:4]}, want {SPECIALS}")
        self._ids = {word: index for index, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            raise ValueError("vocabulary: a word is listed twice")

    @classmethod
    def from_text(cls, text_words: Iterable[str], size: int) -> Vocabulary:
        """Fills the list up to `size` with the most frequent words, ties in alphabetical order."""
        fixed = SPECIALS + NAMES + NUMBERS
        counts = collections.Counter(text_words)
        for word in SPECIALS:
            counts.pop(word, None)
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(fixed + tuple(frequent[:size - len(fixed)]))

    def __len__(self) -> int:
        return len(self._words)

    @property
    def words(self) -> tuple[str, ...]:
        return self._words

    def tokenize(self, words: Iterable[str]) -> npt.NDArray[np.int32]:
        """Returns ids [num_words] of `words`."""
        unknown = self._ids[UNKNOWN]
        return np.asarray([self._ids.get(word, unknown) for word in words], dtype=np.int32)

    def detokenize(self, ids: Iterable[int]) -> list[str]:
        """Returns the words of `ids` [num_ids]."""
        return [self._words[int(index)] for index in ids]
