"""One step of the alternation: perturb one entry of a table at a time and measure the loss.

The complete pipeline of the engine runs for every candidate table; nothing is approximated by layer.
Actions are logged uniformly: every action of a state occurs equally often, up to one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from keepset import ModelFingerprint, table_file
from keepset.calibrate.grids import PAPER_GRIDS, Grids
from keepset.calibrate.prompts import Prompt
from keepset.calibrate.records import StepFile
from keepset.in_process import Decision, Engine

# Below stands the rounding of 32-bit arithmetic, which must not choose between equal actions.
_LOSS_DECIMALS = 4


@dataclasses.dataclass(frozen=True)
class Weights:
    """The table that stands while one entry is perturbed.

    head_weights [N_B, L, H], gate_thresholds [N_B, L, E, P], edges as in the table file.
    """

    head_weights: np.ndarray
    gate_thresholds: np.ndarray
    entropy_edges: np.ndarray
    ppl_edges: np.ndarray

    @staticmethod
    def neutral(model: ModelFingerprint, num_budgets: int, grids: Grids = PAPER_GRIDS) -> Weights:
        """Weights of one, and the gates that let most through."""
        return Weights(
            np.ones((num_budgets, model.num_layers, model.num_qo_heads), np.float32),
            np.full((num_budgets, model.num_layers, 1, 1), grids.gate.first, np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
        )

    @staticmethod
    def of(table: table_file.TableContent) -> Weights:
        return Weights(table.head_weights, table.gate_thresholds, table.entropy_edges,
                       table.ppl_edges)

    def digest(self) -> str:
        """Twelve hex digits that stand for the numbers."""
        parts = (self.head_weights, self.gate_thresholds, self.entropy_edges, self.ppl_edges)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The entry of a table that one record perturbs; kv_head None: the gate of the layer."""

    budget_index: int
    layer: int
    kv_head: int | None
    action: float


class Plan:
    """Which entries of a table are measured on which prompt."""

    def __init__(self, model: ModelFingerprint, num_prompts: int, budgets: Sequence[int], *,
                 seed: int, actions_per_state: int | None = None, action_step: int = 1,
                 grids: Grids = PAPER_GRIDS):
        """actions_per_state: so many are measured per prompt and state; all when None.

        action_step: every so many-th action of the grids is measured, the first one included.
        """
        self._model = model
        self._num_prompts = num_prompts
        self._budgets = budgets
        self._actions_per_state = actions_per_state
        self._head_actions = grids.head.actions()[::action_step]
        self._gate_actions = grids.gate.actions()[::action_step]
        self._seed = seed

    def head_entries(self, prompt_index: int) -> Iterator[Entry]:
        for budget_index in range(len(self._budgets)):
            for layer in range(self._model.num_layers):
                for kv_head in range(self._model.num_kv_heads):
                    state = (budget_index, layer, kv_head)
                    for action in self._actions(self._head_actions, state, prompt_index):
                        yield Entry(budget_index, layer, kv_head, action)

    def gate_entries(self, prompt_index: int) -> Iterator[Entry]:
        for budget_index in range(len(self._budgets)):
            for layer in range(self._model.num_layers):
                state = (budget_index, layer, self._model.num_kv_heads)
                for action in self._actions(self._gate_actions, state, prompt_index):
                    yield Entry(budget_index, layer, None, action)

    def count(self, kind: str) -> int:
        """Records of a whole step."""
        states = len(self._budgets) * self._model.num_layers
        if kind == "head":
            states *= self._model.num_kv_heads
        grid = self._head_actions if kind == "head" else self._gate_actions
        return self._num_prompts * states * self._share(grid)

    def missing(self, kind: str, prompt_index: int, prompt_id: str, file: StepFile) -> list[Entry]:
        """The entries of one prompt that `file` has no record of. kind: "head" or "gate"."""
        entries = self.head_entries if kind == "head" else self.gate_entries
        return [entry for entry in entries(prompt_index)
                if (prompt_id, self._budgets[entry.budget_index], entry.layer,
                    -1 if entry.kv_head is None else entry.kv_head, entry.action) not in file]

    def _share(self, grid: Sequence[float]) -> int:
        return len(grid) if self._actions_per_state is None else min(self._actions_per_state, len(grid))

    def _actions(self, grid: Sequence[float], state: tuple[int, ...], prompt_index: int
                 ) -> list[float]:
        """The share of one prompt: consecutive places of one shuffled order per state."""
        count = self._share(grid)
        order = np.random.default_rng([self._seed, len(grid), *state]).permutation(len(grid))
        return [grid[order[(prompt_index * count + i) % len(grid)]] for i in range(count)]


class Rollouts(Plan):
    """Measures candidate tables on prompts that were read once."""

    def __init__(self, engine: Engine, model: ModelFingerprint, prompts: Sequence[Prompt],
                 budgets: Sequence[int], *, parameters: Mapping[str, object], seed: int,
                 actions_per_state: int | None = None, protect_window: int = 0, action_step: int = 1,
                 grids: Grids = PAPER_GRIDS, ranges: Mapping[str, Sequence[float]] | None = None):
        """ranges: that candidate tables declare; None: those of the grids."""
        super().__init__(model, len(prompts), budgets, actions_per_state=actions_per_state, seed=seed,
                         action_step=action_step, grids=grids)
        self._engine = engine
        self._prompts = prompts
        self._parameters = dict(parameters)
        self._protect_window = protect_window
        self._ranges = grids.ranges() if ranges is None else ranges
        # Losses by what is kept: many candidate tables keep the same tokens.
        self._losses: list[dict[bytes, float]] = [{} for _ in range(len(prompts))]

    def headers(self) -> list[tuple[str, int]]:
        """Id and length of every prompt."""
        return [(prompt.prompt_id, prompt.seq_len) for prompt in self._prompts]

    def run(self, kind: str, frozen: Weights, paired_policy: str, file: StepFile,
            progress: Callable[[int], None]) -> None:
        """Fills `file` with the records that it lacks. kind: "head" or "gate"."""
        for index, prompt in enumerate(self._prompts):
            for entry in self.missing(kind, index, prompt.prompt_id, file):
                file.append(self.record(kind, index, entry, frozen, paired_policy))
                progress(len(file))

    def evaluate(self, prompt_index: int, weights: Weights, budget_index: int
                 ) -> tuple[Decision, float]:
        """Decision and loss of one prompt under a table."""
        prompt = self._prompts[prompt_index]
        table = table_file.compilerkv_table(
            self._model, name="candidate", version="0",
            head_weights=weights.head_weights[budget_index],
            gate_thresholds=weights.gate_thresholds[budget_index],
            entropy_edges=weights.entropy_edges, ppl_edges=weights.ppl_edges,
            algorithm={"name": "candidate"}, source="hand-written", grid=self._ranges)
        decision = self._engine.decide(
            model=self._model, layers=prompt.layers, table=table,
            budget_tokens=self._budgets[budget_index], ppl=prompt.ppl, parameters=self._parameters,
            protect_sink=prompt.protect_sink,
            protect_window=(self._protect_window if prompt.protect_window is None
                            else prompt.protect_window))
        # A digest: the sets themselves are tens of kilobytes a candidate on a model of many layers.
        kept = hashlib.sha256(b"|".join(one.tobytes() for one in decision.keep_indices)).digest()
        losses = self._losses[prompt_index]
        if kept not in losses:
            losses[kept] = prompt.loss(list(decision.keep_indices))
        return decision, losses[kept]

    def record(self, kind: str, index: int, entry: Entry, frozen: Weights,
               paired_policy: str) -> dict:
        """Measures one entry of one prompt."""
        prompt = self._prompts[index]
        decision, loss = self.evaluate(index, self._perturbed(frozen, entry), entry.budget_index)
        record: dict = {
            "kind": kind, "prompt_id": prompt.prompt_id, "seed": prompt.seed,
            "budget": self._budgets[entry.budget_index], "layer": entry.layer,
            "action": entry.action, "full_loss": round(prompt.full_loss, _LOSS_DECIMALS),
            "compressed_loss": round(loss, _LOSS_DECIMALS),
            "sequence_length": prompt.seq_len, "paired_policy": paired_policy,
        }  # fmt: skip
        if kind == "head":
            record["kv_head"] = entry.kv_head
        else:
            record |= {"entropy": decision.entropy[entry.layer], "ppl": prompt.ppl,
                       "candidate_count": decision.candidates[entry.layer]}
        return record

    def _perturbed(self, frozen: Weights, entry: Entry) -> Weights:
        if entry.kv_head is None:
            gates = frozen.gate_thresholds.copy()
            gates[entry.budget_index, entry.layer] = entry.action
            return dataclasses.replace(frozen, gate_thresholds=gates)
        group = self._model.num_qo_heads // self._model.num_kv_heads
        heads = frozen.head_weights.copy()
        first = entry.kv_head * group
        heads[entry.budget_index, entry.layer, first : first + group] = entry.action
        return dataclasses.replace(frozen, head_weights=heads)
