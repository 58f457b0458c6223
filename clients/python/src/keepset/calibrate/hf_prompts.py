"""Prompts from text files for a Hugging Face model directory; needs the extra `hf`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from keepset import ModelFingerprint
from keepset.adapters.hf import HfModel
from keepset.adapters.hf.model import directory_fingerprint
from keepset.calibrate import CalibrationError
from keepset.calibrate.prompts import KeepSets, Prompt, answer_loss, sufficient_layer


@dataclasses.dataclass(frozen=True)
class HfTextAdapter:
    """Passages of text files; the loss is that of the `continuation` tokens after a prompt.

    The first of them follows from the prefill, before anything is dropped, and is left out. A copy that
    goes to another process brings no weights: it reads the directory there.
    """

    directory: pathlib.Path
    texts: tuple[pathlib.Path, ...]
    seq_len: int = 1024
    continuation: int = 128
    window: int = 64
    device: str = "cpu"

    @functools.cached_property
    def name(self) -> str:
        """The directory's name and eight hex digits of what prompts and losses are made from, so that a
        run on other texts is not mistaken for the rest of this one."""
        digest = hashlib.sha256(f"{self.seq_len} {self.continuation} {self.window}".encode())
        for path in self.texts:
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise _refused("text", error) from error
        return f"hf-{self.directory.resolve().name}-{digest.hexdigest()[:8]}"

    def fingerprint(self) -> ModelFingerprint:
        return self._fingerprint

    def prompts(self, seeds: Sequence[int]) -> Iterator[Prompt]:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            prefix, text = self._tokens
            length = self.seq_len - len(prefix) + self.continuation
            if len(text) < length:
                raise CalibrationError(f"{', '.join(map(str, self.texts))}: {len(text)} tokens, want "
                                       f"at least {length} for one prompt and its continuation")
            begin = int(rng.integers(len(text) - length + 1))
            ids = np.concatenate([prefix, text[begin : begin + length]])
            yield self._prompt(seed, begin, ids[: self.seq_len], ids[self.seq_len :])

    def _prompt(self, seed: int, begin: int, ids: npt.NDArray[np.int32],
                follows: npt.NDArray[np.int32]) -> Prompt:
        model = self._model
        prefill = model.prefill(ids, self.window)
        layers = tuple(
            sufficient_layer(one.q_window, one.k, one.v, prefill.softmax_scale, prefill.row_positions)
            for one in prefill.layers)

        def loss(keep: KeepSets) -> float:
            logits = model.score(prefill.compact(keep), follows[:-1], len(ids))
            return answer_loss(logits[None], follows[None, 1:])

        everything = [np.arange(len(ids))] * len(layers)
        return Prompt(f"{self.name}-{seed}-at-{begin}", seed, len(ids),
                      prefill.perplexity(min(self.window, len(ids) - 1)), layers, loss(everything), loss)

    @functools.cached_property
    def _model(self) -> HfModel:
        try:
            return HfModel.load(self.directory, device=self.device)
        except (OSError, ValueError) as error:
            raise _refused(self.directory, error) from error

    @functools.cached_property
    def _fingerprint(self) -> ModelFingerprint:
        try:
            return ModelFingerprint(**directory_fingerprint(self.directory))
        except (OSError, ValueError) as error:
            raise _refused(self.directory, error) from error

    @functools.cached_property
    def _tokens(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """What the tokenizer puts before a prompt, and the texts one after the other."""
        if self.seq_len < 2 or self.continuation < 2 or self.window < 1:
            raise CalibrationError(f"seq_len={self.seq_len}, continuation={self.continuation}, "
                                   f"window={self.window}, want at least 2, 2 and 1")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise _refused(f"{self.directory}: no tokenizer", error) from error
        try:
            text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in self.texts)
        except OSError as error:
            raise _refused("text", error) from error
        begin = tokenizer.bos_token_id
        prefix = [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(prefix, np.int32), np.asarray(ids, np.int32)

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _refused(where: object, error: Exception) -> CalibrationError:
    """One line; transformers explains at length."""
    lines = str(error).strip().splitlines()
    return CalibrationError(f"{where}: {lines[0] if lines else type(error).__name__}")
