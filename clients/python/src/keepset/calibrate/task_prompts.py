"""Prompts of tasks as compilerkv's rollouts want them: the loss is that of the tasks' answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from keepset import ModelFingerprint
from keepset.calibrate.head_prompts import HeadPrompt, RememberedTasks
from keepset.calibrate.prompts import KeepSets, Prompt, sufficient_layer


@dataclasses.dataclass(frozen=True)
class TaskAdapter:
    """Prompts of several tasks in turn: seed s is prompt s // len(names) of task names[s % len(names)].

    source: names model and texts, so that a run on others is not mistaken for the rest of this one. A
    loss that is asked for after the time of `tasks` raises OutOfTime.
    """

    tasks: RememberedTasks
    names: tuple[str, ...]
    length: int
    source: str

    @property
    def name(self) -> str:
        return f"{self.source} {' '.join(self.names)} {self.length}"

    def fingerprint(self) -> ModelFingerprint:
        return self.tasks.fingerprint

    def prompts(self, seeds: Sequence[int]) -> Iterator[Prompt]:
        for seed in seeds:
            own, index = divmod(seed, len(self.names))
            yield self._prompt(seed, self.tasks.prompt(self.names[index], own, self.length))

    def _prompt(self, seed: int, prompt: HeadPrompt) -> Prompt:
        rows = np.asarray(prompt.row_positions)
        used = (rows < prompt.seq_len) & (rows >= prompt.seq_len - prompt.window)
        layers = tuple(
            sufficient_layer(one.q_window[:, used], one.k, one.v, prompt.softmax_scale, rows[used])
            for one in prompt.layers)

        def loss(keep: KeepSets) -> float:
            self.tasks.check_time()
            return prompt.outcome(keep).loss

        everything = [np.arange(prompt.seq_len)] * len(layers)
        return Prompt(prompt.prompt_id, seed, prompt.seq_len, prompt.ppl, layers, loss(everything),
                      loss, prompt.protect_sink, prompt.protect_window)
