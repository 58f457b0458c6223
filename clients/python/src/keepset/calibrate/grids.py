"""The actions that rollouts measure: evenly spaced head weights and gates."""

from __future__ import annotations

import dataclasses

from keepset.calibrate import CalibrationError

# What `keepset tables compile` takes.
_MOST_ACTIONS = 64
_LARGEST_ACTION = 1000
# Tables hold 32-bit floats: actions must stay apart in them.
_LEAST_STEP = 1e-3
_DECIMALS = 6


@dataclasses.dataclass(frozen=True)
class Grid:
    """`count` actions from `first`, `step` apart; written FIRST:STEP:COUNT."""

    first: float
    step: float
    count: int

    @staticmethod
    def parse(name: str, text: str) -> Grid:
        """CalibrationError, which says `name`, for what is no grid of positive ascending actions."""
        parts = text.split(":")
        try:
            grid = Grid(float(parts[0]), float(parts[1]), int(parts[2]))
        except (IndexError, ValueError):
            grid = None
        if len(parts) != 3 or grid is None or not grid._is_usable():
            raise CalibrationError(
                f"{name} {text}, want FIRST:STEP:COUNT with FIRST > 0, STEP >= {_LEAST_STEP}, COUNT "
                f"2..{_MOST_ACTIONS} and actions up to {_LARGEST_ACTION}, such as {HEAD_GRID}")
        return grid

    def _is_usable(self) -> bool:
        return (self.first > 0 and self.step >= _LEAST_STEP and 2 <= self.count <= _MOST_ACTIONS
                and self.first + self.step * (self.count - 1) <= _LARGEST_ACTION)

    def actions(self) -> tuple[float, ...]:
        return tuple(round(self.first + self.step * i, _DECIMALS) for i in range(self.count))

    def index(self, value: float) -> int | None:
        """The action that a 32-bit table value stands for; None when it stands for none."""
        index = round((value - self.first) / self.step)
        near = abs(value - self.first - index * self.step) <= self.step / 4
        return index if near and 0 <= index < self.count else None

    def __str__(self) -> str:
        return f"{self.first}:{self.step}:{self.count}"


HEAD_GRID = Grid(0.8, 0.025, 29)
GATE_GRID = Grid(0.8, 0.01, 21)
# What `keepset tables compile` puts where a state has no records.
_UNSUPPORTED_HEAD, _UNSUPPORTED_GATE = 1.0, 0.8


@dataclasses.dataclass(frozen=True)
class Grids:
    """Of head weights and of gates; those of the paper by default."""

    head: Grid = HEAD_GRID
    gate: Grid = GATE_GRID

    def ranges(self) -> dict[str, list[float]]:
        """Key `grid` of a table file: what tables on these grids may hold."""
        heads, gates = (*self.head.actions(), _UNSUPPORTED_HEAD), (*self.gate.actions(), _UNSUPPORTED_GATE)
        return {"head": [min(heads), max(heads)], "gate": [min(gates), max(gates)]}

    def to_json(self) -> dict[str, str]:
        return {"head": str(self.head), "gate": str(self.gate)}


PAPER_GRIDS = Grids()
