"""Which further tasks the small model can do with its full cache; the others are left out and named."""

from __future__ import annotations

import numpy as np

from keepset.eval import facts, vocabulary
from keepset.eval.small_model import SmallModel

TASKS = ("code of words", "quotation", "variable tracking", "few-shot classification")


def full_cache_accuracy(model: SmallModel, text: str, prompts: int, seq_len: int = 1024) -> dict:
    """Share of prompts whose whole answer the full cache gives, by task."""
    words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / text)
    return {task: float(np.mean([_answers(model, *_prompt(task, words, seed, seq_len))
                                 for seed in range(prompts)])) for task in TASKS}


def _prompt(task: str, words: list[str], seed: int, seq_len: int) -> tuple[list[str], list[str]]:
    """Words of a prompt that ends with the question, and of the answer."""
    rng = np.random.default_rng([seed, TASKS.index(task)])
    sample = facts.make_sample(rng, words, seq_len, 16)
    context = list(sample.context)
    first, second = sample.facts[3], sample.facts[9]
    if task == "code of words":
        for fact in sample.facts:
            context[fact.position + 2 : fact.position + 4] = rng.choice(vocabulary.NAMES, 2)
        answer = context[first.position + 2 : first.position + 4]
        return [*context, *first.question], answer
    if task == "quotation":
        place = int(rng.integers(50, seq_len - 60))
        return [*context, *context[place : place + 7]], context[place + 7 : place + 10]
    if task == "variable tracking":
        context[first.position + 2] = second.name
        return [*context, *first.question], [second.name, *second.answer]
    labels = {"license": "01", "software": "02"}
    shown = sum((["ask", word, labels[word]] for word in rng.choice(list(labels), 10)), [])
    return [*context[: seq_len // 2], *shown, "ask", "license"], [labels["license"]]


def _answers(model: SmallModel, prompt: list[str], answer: list[str]) -> bool:
    ids = model.tokenize(prompt)
    last = len(ids) - 1
    cache = model.prefill(ids).full_cache().before(last)
    return model.detokenize(model.decode(cache, ids[-1:], last, len(answer))) == list(answer)
