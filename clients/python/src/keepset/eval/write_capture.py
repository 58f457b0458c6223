"""Writes a capture of the small model reading a real text with facts in it, and prints the question.

    python -m keepset.eval.write_capture --out prompt.safetensors
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from keepset.eval import capture, facts, vocabulary
from keepset.eval.small_model import SmallModel


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, default=vocabulary.COMMON_LICENSES / "MPL-2.0")
    parser.add_argument("--seq-len", type=int, default=2000, help="words of the context")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--window", type=int, default=16, help="observed rows")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args(arguments)
    model = SmallModel.load()
    words = vocabulary.read_text_words(options.text)
    sample = facts.make_sample(np.random.default_rng(options.seed), words, options.seq_len,
                               options.facts)
    fact = sample.facts[0]
    prefill = model.prefill(model.tokenize(sample.prompt_with_question(fact)), options.window)
    # The first `pin NAME 48 21` of the question's fact, as a span that can be protected by name.
    span = ("answer", fact.position, fact.position + facts.WORDS_PER_FACT)
    capture.write_capture(options.out, prefill, model.fingerprint(), spans=[span])
    print(f"{options.out}: {prefill.seq_len} words, {len(sample.facts)} facts; the prompt ends in "
          f"'{' '.join(fact.question)}', the answer '{' '.join(fact.answer)}' stands at "
          f"{fact.position + 2}..{fact.position + 3}")


if __name__ == "__main__":
    main()
