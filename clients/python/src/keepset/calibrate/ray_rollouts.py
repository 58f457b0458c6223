"""Rollouts on Ray: (prompt, candidates) units over worker processes, on one machine or a cluster.

Scheduling, restarting dead workers and running their unit again are Ray's. Records reach the step file
unit by unit, when a unit is whole, so a unit that runs twice is counted once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

# Nothing leaves the machine unasked; read when ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.util import ActorPool

from keepset.calibrate import CalibrationError
from keepset.calibrate.prompts import Adapter, Prompt
from keepset.calibrate.records import StepFile
from keepset.calibrate.rollouts import Entry, Plan, Rollouts, Weights
from keepset.in_process import Engine

# Units a worker gets in a step: more even out their run times, fewer read prompts less often.
_UNITS_PER_WORKER = 4
_PROMPTS_IN_MEMORY = 16
# A unit that ends its worker so many times and once more ends the run.
_RETRIES = 2


@dataclasses.dataclass(frozen=True)
class Unit:
    """Candidates of one prompt that one worker measures."""

    prompt_index: int
    entries: tuple[Entry, ...]


class SeededPrompts(Sequence[Prompt]):
    """The prompts of an adapter, read when they are asked for; holds the latest few."""

    def __init__(self, adapter: Adapter, seeds: Sequence[int]):
        self._adapter = adapter
        self._seeds = seeds
        self._read: collections.OrderedDict[int, Prompt] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index):
        seed = self._seeds[index]
        if seed not in self._read:
            if len(self._read) == _PROMPTS_IN_MEMORY:
                self._read.popitem(last=False)
            (self._read[seed],) = self._adapter.prompts(range(seed, seed + 1))
        self._read.move_to_end(seed)
        return self._read[seed]


class Worker:
    """One Ray actor: an engine and a model of its own."""

    def __init__(self, library: str, adapter_ref: list[ray.ObjectRef], seeds: Sequence[int],
                 budgets: Sequence[int], measuring: Mapping):
        (adapter,) = ray.get(adapter_ref)
        self._engine = Engine(library)
        self._prompts = SeededPrompts(adapter, seeds)
        self._rollouts = Rollouts(self._engine, adapter.fingerprint(), self._prompts, budgets,
                                  **measuring)

    def pid(self) -> int:
        return os.getpid()

    def header(self, prompt_index: int) -> tuple[int, str, int]:
        """Index, id and length of a prompt."""
        prompt = self._prompts[prompt_index]
        return prompt_index, prompt.prompt_id, prompt.seq_len

    def measure(self, kind: str, unit: Unit, frozen: Weights, paired_policy: str) -> list[dict]:
        return [self._rollouts.record(kind, unit.prompt_index, entry, frozen, paired_policy)
                for entry in unit.entries]


class RayRollouts:
    """Measures what `Rollouts` measures, by `num_workers` Ray workers; use as a context manager.

    A Ray that runs in this process already is used and left running. The library's path and the
    adapter must mean the same on every machine of a cluster. A worker that dies is started again.
    """

    def __init__(self, library: pathlib.Path, adapter: Adapter, seeds: Sequence[int], budgets: Sequence[int],
                 *, num_workers: int, address: str | None = None, **measuring):
        self._settings = (str(library.resolve()), adapter, seeds, list(budgets), measuring)
        self._num_workers = num_workers
        self._address = address
        self._owns_ray = False
        self._adapter_ref: list[ray.ObjectRef] = []
        self._workers: list = []
        self._headers: list[tuple[str, int]] = []
        plan = {name: measuring[name] for name in ("seed", "actions_per_state", "action_step", "grids")
                if name in measuring}
        self._plan = Plan(adapter.fingerprint(), len(seeds), budgets, **plan)

    def __enter__(self) -> RayRollouts:
        if ray.is_initialized():
            # Actors that find no CPU would wait for ever, silently.
            free = int(ray.available_resources().get("CPU", 0))
            if free < self._num_workers:
                raise CalibrationError(f"workers={self._num_workers}, but the Ray of this process has "
                                       f"{free} free CPUs")
        else:
            local = {} if self._address else {
                "num_cpus": self._num_workers, "include_dashboard": False,
                "_node_ip_address": "127.0.0.1"}
            ray.init(address=self._address, log_to_driver=False, logging_level="warning", **local)
            self._owns_ray = True
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES)(Worker)
        library, adapter, *rest = self._settings
        # In a list it stays a reference, which a worker that is started again can still resolve.
        self._adapter_ref = [ray.put(adapter)]
        self._workers = [actor.remote(library, self._adapter_ref, *rest)
                         for _ in range(self._num_workers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._owns_ray:
            ray.shutdown()

    def worker_pids(self) -> list[int]:
        return ray.get([worker.pid.remote() for worker in self._workers])

    def headers(self) -> list[tuple[str, int]]:
        """Id and length of every prompt; each is read by one worker."""
        if not self._headers:
            found = self._spread(lambda worker, index: worker.header.remote(index),
                                 range(len(self._settings[2])))
            self._headers = [header[1:] for header in sorted(found)]
        return self._headers

    def count(self, kind: str) -> int:
        return self._plan.count(kind)

    def run(self, kind: str, frozen: Weights, paired_policy: str, file: StepFile,
            progress: Callable[[int], None]) -> None:
        """Fills `file` with the records that it lacks, in the order in which units are done."""
        weights = ray.put(frozen)
        measured = self._spread(
            lambda worker, unit: worker.measure.remote(kind, unit, weights, paired_policy),
            list(self._units(kind, file)))
        for records in measured:
            for record in records:
                file.append(record)
            progress(len(file))

    def _spread(self, call: Callable, values: Sequence) -> Iterator:
        """Results of call(worker, value) as they come."""
        try:
            yield from ActorPool(self._workers).map_unordered(call, values)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise CalibrationError(f"a worker cannot start: {str(error).splitlines()[-1]}") from error
            raise CalibrationError(f"a worker died {_RETRIES + 1} times over the same prompt: too little "
                                   "memory for so many workers?") from error

    def _units(self, kind: str, file: StepFile) -> Iterator[Unit]:
        missing = [self._plan.missing(kind, index, prompt_id, file)
                   for index, (prompt_id, _) in enumerate(self.headers())]
        size = math.ceil(sum(map(len, missing)) / (self._num_workers * _UNITS_PER_WORKER))
        for index, entries in enumerate(missing):
            for begin in range(0, len(entries), size):
                yield Unit(index, tuple(entries[begin : begin + size]))
