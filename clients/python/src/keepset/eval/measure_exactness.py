"""Prints the share of exact answers of the small model with the full cache, by prompt length.

    python -m keepset.eval.measure_exactness --text /usr/share/common-licenses/MPL-2.0
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from keepset.eval import facts, vocabulary
from keepset.eval.small_model import SmallModel

# Prompt length and facts in it; every fact is asked, each on a fresh copy of the cache.
LENGTHS: tuple[tuple[int, int], ...] = ((256, 20), (512, 30), (1024, 48), (2048, 60))


def count_exact(model: SmallModel, sample: facts.Sample) -> int:
    """Returns how many questions, asked after the context, get both numbers right."""
    seq_len = len(sample.context)
    cache = model.prefill(model.tokenize(sample.context), window=1).full_cache()
    return sum(
        tuple(model.detokenize(
            model.decode(cache, model.tokenize(fact.question), seq_len, facts.ANSWER_WORDS)))
        == fact.answer for fact in sample.facts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=pathlib.Path,
                        default=vocabulary.COMMON_LICENSES / "MPL-2.0")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="default: the one of the package")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args(arguments)
    model = SmallModel.load(options.checkpoint)
    text_words = vocabulary.read_text_words(options.text)
    rng = np.random.default_rng(options.seed)
    print(f"{model.revision}, {options.text.name}, seed {options.seed}")
    print("tokens  facts  questions  exact")
    for seq_len, num_facts in LENGTHS:
        right = sum(count_exact(model, facts.make_sample(rng, text_words, seq_len, num_facts))
                    for _ in range(options.prompts))
        questions = options.prompts * num_facts
        print(f"{seq_len:6d} {num_facts:6d} {questions:10d}  {right / questions:.3f}")


if __name__ == "__main__":
    main()
