"""Files of calibration records, one JSON line each, that survive an interruption."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator
from types import TracebackType

from keepset.calibrate import CalibrationError

Key = tuple[str, int, int, int, float]


def key_of(record: dict) -> Key:
    """What makes a record of one step unique: prompt, budget, layer, KV head (-1: gate), action."""
    return (record["prompt_id"], record["budget"], record["layer"], record.get("kv_head", -1),
            round(record["action"], 6))


class StepFile:
    """Appends the records of one step. What an earlier run wrote is kept and not asked for again.

    A last line that was cut in the middle is dropped at opening. Records that were measured against
    another table than `paired_policy` are refused: they answer another question. So is a file that
    another run is writing.
    """

    def __init__(self, path: pathlib.Path, paired_policy: str):
        self._done: set[Key] = set()
        self._file = path.open("a", encoding="utf-8")
        try:
            self._lock(path)
            self._take_up(path, paired_policy)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, path: pathlib.Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CalibrationError(f"{path}: another run is writing it: wait for its end or choose "
                                   "another --out") from None

    def _take_up(self, path: pathlib.Path, paired_policy: str) -> None:
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            record = json.loads(line)
            if record["paired_policy"] != paired_policy:
                raise CalibrationError(
                    f"{path}:{number}: paired_policy={record['paired_policy']}, want "
                    f"{paired_policy}: remove {path.parent} to start anew")
            self._done.add(key_of(record))
        os.truncate(path, len(whole))

    def __enter__(self) -> StepFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: Key) -> bool:
        return key in self._done

    def append(self, record: dict) -> None:
        """Adds one record and hands it to the system; a record that is there already is an error.

        CalibrationError for what no prompt and no model can have measured: no tokens, a loss that is no
        number.
        """
        _check(record)
        key = key_of(record)
        if key in self._done:
            raise ValueError(f"record {key} is there already")
        self._done.add(key)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _check(record: dict) -> None:
    where = f"prompt {record['prompt_id']}"
    if record["sequence_length"] < 1:
        raise CalibrationError(f"{where}: sequence_length={record['sequence_length']}, want 1 or more")
    for name in ("full_loss", "compressed_loss", "entropy", "ppl"):
        if name in record and not math.isfinite(record[name]):
            raise CalibrationError(f"{where}: {name}={record[name]}, want a finite number")


def read(path: pathlib.Path) -> Iterator[dict]:
    """The records of a file that was written to its end."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
