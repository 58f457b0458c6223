"""The tasks of keepset.eval.text_tasks for a Hugging Face model directory; needs the extra `hf`."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from transformers import AutoTokenizer

from keepset import ModelFingerprint
from keepset.adapters.hf import HfModel
from keepset.calibrate import CalibrationError
from keepset.calibrate.head_prompts import EXACT, KL, HeadPrompt
from keepset.calibrate.prompt_builder import Continuation, Ids, PromptBuilder, Script
from keepset.eval import text_tasks

LATER = "later_"
_SUMMARY_TOKENS = 32
_MARK = "\x1ctext\x1c"


class HfTasks:
    """`later_X` is X with its question asked after compression. A prompt is the text with what is hidden
    in it, the question, and what the chat template puts around both; without a template, "Answer:"."""

    INSIDE = text_tasks.TASKS
    AGNOSTIC = tuple(LATER + task for task in ("number", "code", "quotation", "summary"))
    TASKS = INSIDE + AGNOSTIC
    PROBE = ("recall", "Repeat the names, numbers, codes and definitions that the text states.")

    def __init__(self, model: HfModel, tokenizer, texts: Sequence[pathlib.Path], window: int = 32):
        self.model = model
        self.fingerprint = ModelFingerprint(**model.fingerprint())
        self._tokenizer = tokenizer
        self._window = window
        self.name = " ".join(path.name for path in texts)
        try:
            self._sentences = text_tasks.sentences(texts)
        except OSError as error:
            raise CalibrationError(f"text: {error}") from error
        if not self._sentences:
            raise CalibrationError(f"texts {self.name!r}: no sentence, want at least one text file")

    @classmethod
    def load(cls, directory: pathlib.Path, texts: Sequence[pathlib.Path], window: int = 32,
             device: str = "cpu", dtype: str = "auto") -> HfTasks:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = HfModel.load(directory, device=device, dtype=dtype)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CalibrationError(f"{directory}: {first}") from error
        return cls(model, tokenizer, texts, window)

    def on(self, texts: Sequence[pathlib.Path]) -> HfTasks:
        """The same model and tasks on other texts."""
        return HfTasks(self.model, self._tokenizer, texts, self._window)

    def prompt(self, task: str, seed: int, seq_len: int) -> HeadPrompt:
        return self._builder.build(task, f"{self.name}-{task}-{seq_len}-{seed}",
                                   self.script(task, seed, seq_len))

    def repetition(self, length: int, times: int) -> HeadPrompt:
        return self._builder.repetition(self.model.model.config.vocab_size, length, times)

    def script(self, task: str, seed: int, seq_len: int) -> Script:
        """What the prompt of a task reads and asks."""
        kind = task.removeprefix(LATER)
        rng = np.random.default_rng([seed, self.INSIDE.index(kind), seq_len])
        before, after = self._frame
        room = seq_len - len(before) - len(after)
        text = self._text(rng, room)
        asked = text_tasks.ask(kind, rng, text)
        question = self._ids("\n\n" + asked.question)
        hidden = [self._ids(" " + one) for one in asked.hidden]
        taken = sum(map(len, hidden)) + (len(question) if task == kind else 0)
        text_ids = [self._ids(" " + one) for one in text]
        if kind != "quotation":  # whose sentence must stay
            while len(text_ids) > 1 and sum(map(len, text_ids)) + taken > room:
                text_ids.pop()
        places = np.sort(rng.integers(len(text_ids) + 1, size=len(hidden)))
        for place, one in reversed(list(zip(places, hidden))):
            text_ids.insert(int(place), one)
        context = np.concatenate([before, *text_ids])
        return self._script(task != kind, context, question, after, asked)

    def _script(self, later: bool, context: Ids, question: Ids, after: Ids,
                asked: text_tasks.Asked) -> Script:
        scored = EXACT if asked.answer is not None else KL
        whole = np.concatenate([context, question, after])
        begun = self._ids(self._space + asked.begun) if asked.begun else np.empty(0, np.int32)
        answer = (self._ids((" " if asked.begun else self._space) + asked.answer)
                  if asked.answer is not None else
                  self._builder.told_by_full_cache(whole, [], _SUMMARY_TOKENS))
        if not later:
            begin = len(context)
            return Script(whole, (begin, begin + len(question)),
                          (Continuation.of((begun, False), (answer, True)),), None, scored)
        probe = (*self.PROBE, self._ids("\n\n" + self.PROBE[1]))
        asking = np.concatenate([question, after, begun])
        return Script(context, (len(context) - self._window, len(context)),
                      (Continuation.of((asking, False), (answer, True)),), probe, scored)

    def _text(self, rng: np.random.Generator, tokens: int) -> list[str]:
        """Consecutive sentences from a random one on, with about so many tokens; wraps around."""
        begin = int(rng.integers(len(self._sentences)))
        chosen: list[str] = []
        while tokens > 0:
            chosen.append(self._sentences[(begin + len(chosen)) % len(self._sentences)])
            tokens -= len(self._ids(" " + chosen[-1]))
        return chosen

    def _ids(self, text: str) -> Ids:
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
                          np.int32)

    @functools.cached_property
    def _builder(self) -> PromptBuilder:
        # The scale is what the model's attention says when it is asked once.
        scale = self.model.prefill(np.zeros(2, np.int32), 1).softmax_scale
        return PromptBuilder(self.model, self.fingerprint, scale, self._tokenizer.decode, self._window)

    @functools.cached_property
    def _space(self) -> str:
        return "" if self._tokenizer.chat_template else " "

    @functools.cached_property
    def _frame(self) -> tuple[Ids, Ids]:
        """What stands before the text and after the question."""
        if self._tokenizer.chat_template:
            framed = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True)
            before, _, after = framed.partition(_MARK)
            return self._ids(before), self._ids(after)
        begin = self._tokenizer.bos_token_id
        return (np.asarray([] if begin is None else [begin], np.int32), self._ids("\nAnswer:"))
