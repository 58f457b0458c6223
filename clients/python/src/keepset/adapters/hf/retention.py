"""Prompts of a Hugging Face model, compressed by what a policy reads: nothing else is observed or sent.

    retention = ServiceRetention(client=client, policy="observation_heads", budget_tokens=256)
    prefill = retention.prefill(model, input_ids, row_positions=question)
    cache = prefill.compact(retention.keep(model, prefill).sets())

The table says which layers, heads and rows observe; rows of K and V move in the model's own cache. Whatever
is refused, the prefill's full cache is there.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from keepset.adapters.hf.model import HfModel, HfPrefill
from keepset.client import Client
from keepset.errors import Refused
from keepset.in_process import Engine, EngineError, Kept
from keepset.types import Budget, InputNeeds, ModelFingerprint, Result, TablePin

_CHANGED = ("{policy}: the prefill observed by other needs (table {had}) than this operation has "
            "(table {has}), want a prefill of this retention's own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention(abc.ABC):
    """What is asked of every prompt, and who answers. parameters, scope, protect_*: see `Client.begin`."""

    policy: str
    budget_tokens: int
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)
    scope: str | None = None
    protect_sink: int = 0
    protect_window: int = 0

    def needs(self, model: HfModel) -> InputNeeds:
        """What an operation reads of a prompt, of the table that is served now."""
        return self._with_observe(self._asked(model))

    def prefill(self, model: HfModel, input_ids: npt.ArrayLike, window: int = 64,
                row_positions: npt.ArrayLike | None = None,
                tokenize: Callable[[str], Sequence[int]] | None = None) -> HfPrefill:
        """`HfModel.prefill` with these needs. tokenize: for the text of the table's probe, if it has one."""
        needs = self.needs(model)
        if needs.probe is not None and tokenize is None:
            raise ValueError(f"{self.policy}: the table reads rows of probe {needs.probe[0]}, want tokenize")
        prefill = model.prefill(input_ids, window, row_positions, needs)
        if needs.probe is None or tokenize is None:
            return prefill
        return model.with_probe(prefill, tokenize(needs.probe[1]))

    @abc.abstractmethod
    def keep(self, model: HfModel, prefill: HfPrefill) -> Result | Kept:
        """Decides; `sets()` of the answer are `HfPrefill.compact`'s.

        FAILED_PRECONDITION or NOT_FOUND when the table that said what to observe is not the one that would
        decide, or is gone; other errors are those of an operation.
        """

    @abc.abstractmethod
    def _asked(self, model: HfModel) -> InputNeeds: ...

    def _with_observe(self, needs: InputNeeds) -> InputNeeds:
        # Rows that a request names have to be there, whether its table reads them or not.
        if "observe" not in self.parameters or "observed_rows" in needs.rows:
            return needs
        return dataclasses.replace(needs, rows=(*needs.rows, "observed_rows"))

    def _changed(self, prefill: HfPrefill, needs: InputNeeds) -> str:
        had, has = (one.table.digest if one is not None and one.table is not None else "-"
                    for one in (prefill.needs, needs))
        return _CHANGED.format(policy=self.policy, had=had, has=has)

    def _spec(self, model: HfModel, prefill: HfPrefill) -> dict:
        """What both ways of asking share."""
        parameters = dict(self.parameters)
        if prefill.needs is not None and prefill.needs.probe is not None:
            parameters.setdefault("probe", prefill.needs.probe[0])
        spec = {
            "model": _fingerprint(model), "policy": self.policy, "parameters": parameters,
            "layers": prefill.inputs(), "seq_len": prefill.seq_len, "scope": self.scope,
            "softmax_scale": prefill.softmax_scale, "row_positions": prefill.row_positions,
            "protect_sink": self.protect_sink, "protect_window": self.protect_window,
            "kv_dtype": prefill.kv_dtype,
        }  # fmt: skip
        known = int(np.isfinite(prefill.token_logprobs).sum())
        if prefill.needs is not None and prefill.needs.ppl and known:
            spec["ppl"] = prefill.perplexity(known)
        return spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceRetention(Retention):
    """Answers come from a keepsetd. table: which of its tables, by default its choice for the model."""

    client: Client
    table: TablePin = TablePin()

    def keep(self, model: HfModel, prefill: HfPrefill) -> Result:
        pin = self._pin(prefill)
        needs = self._with_observe(self._asked(model, pin))
        if needs != prefill.needs:
            raise Refused("FAILED_PRECONDITION", self._changed(prefill, needs))
        return self.client.compress(**self._spec(model, prefill), table=pin,
                                    budget=Budget.tokens(self.budget_tokens),
                                    layer_groups=model.layer_groups)

    def _asked(self, model: HfModel, table: TablePin | None = None) -> InputNeeds:
        return self.client.input_needs(model=_fingerprint(model), policy=self.policy,
                                       parameters=self.parameters, table=table or self.table)

    def _pin(self, prefill: HfPrefill) -> TablePin:
        """The very table that said what to observe, if this retention may take it."""
        had = prefill.needs.table if prefill.needs is not None else None
        if had is None:
            return self.table
        for field in ("name", "version", "digest"):
            wanted = getattr(self.table, field)
            if wanted and wanted != getattr(had, field):
                return self.table
        return TablePin(had.name, had.version, had.digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRetention(Retention):
    """Answers come from the engine in this process. table: the bytes of a table file."""

    engine: Engine
    table: bytes | None = None

    def keep(self, model: HfModel, prefill: HfPrefill) -> Kept:
        needs = self.needs(model)
        if needs != prefill.needs:
            raise EngineError("FAILED_PRECONDITION", self._changed(prefill, needs))
        return self.engine.keep(**self._spec(model, prefill), budget_tokens=self.budget_tokens,
                                table=self.table)

    def _asked(self, model: HfModel) -> InputNeeds:
        return self.engine.input_needs(model=_fingerprint(model), policy=self.policy,
                                       parameters=self.parameters, table=self.table)


def _fingerprint(model: HfModel) -> ModelFingerprint:
    return ModelFingerprint(**model.fingerprint())
