"""Starts a keepsetd of one's own on a Unix socket in a temporary directory; for demo and tests."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import tempfile
import threading
from typing import Sequence

_READY = re.compile(r"\bready\b")
_METRICS = re.compile(r"\bmetrics=\"?([0-9.:\[\]a-zA-Z]+:\d+)")


class ServerProcess:
    """A running keepsetd: `address` of its socket, `metrics_url` of its Prometheus page, `log` so far.

    Use as a context manager; leaving it drains and ends the process.
    """

    def __init__(self, binary: str | os.PathLike, *, arguments: Sequence[str] = (),
                 tables: str | os.PathLike | None = None, timeout_seconds: float = 30.0):
        self._directory = tempfile.TemporaryDirectory(prefix="keepset-")
        root = pathlib.Path(self._directory.name)
        self.tables = pathlib.Path(tables) if tables else root / "tables"
        self.tables.mkdir(exist_ok=True)
        self.address = f"unix:{root / 'keepset.sock'}"
        self.log: list[str] = []
        self.metrics_url = ""
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [str(binary), "--listen", self.address, "--metrics-listen", "127.0.0.1:0",
             "--tables", str(self.tables), *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self._stderr = self._process.stderr
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self._ready.wait(timeout_seconds)
        if not self.metrics_url:
            self.stop()
            raise RuntimeError(f"{binary} did not become ready:\n" + "\n".join(self.log[-20:]))

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *unused) -> None:
        self.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, waits for the drain; returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        self._reader.join()
        self._stderr.close()
        self._directory.cleanup()
        return code

    def _read_log(self) -> None:
        for line in self._stderr:
            self.log.append(line.rstrip("\n"))
            if _READY.search(line):
                match = _METRICS.search(line)
                if match:
                    self.metrics_url = f"http://{match.group(1)}/metrics"
                    self._ready.set()
        self._ready.set()
