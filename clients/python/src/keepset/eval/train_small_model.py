"""Trains the small model: a two-layer Llama that answers `ask NAME` from facts in real text.

Runs on one thread with torch (Debian: python3-torch and libopenblas0-pthread) in some minutes:

    PYTHONPATH=clients/python/src /usr/bin/python3 -m keepset.eval.train_small_model --out FILE

Three stages. Copying random blocks of random period makes the induction head appear; facts in text
of growing length turn it into retrieval; a last stage with falling learning rate polishes it around
2,000 tokens. The text is what the machine carries in /usr/share/common-licenses, less the held-out
texts; only its word list enters the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from keepset.eval import facts, vocabulary

HELD_OUT_TEXTS = ("MPL-2.0", "Apache-2.0")
METADATA_KEY = "keepset_small_model"
REVISION = "words-1"


@dataclasses.dataclass(frozen=True)
class Config:
    num_layers: int = 2
    hidden_size: int = 128
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    vocab_size: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4


@dataclasses.dataclass(frozen=True)
class Stage:
    """Facts of one length; left when training answers exceed `advance_at`, or at the end."""

    seq_len: int
    num_facts: int
    batch: int
    learning_rate: float
    max_steps: int
    advance_at: float


STAGES = (
    Stage(64, 6, 32, 3e-3, 600, .95),
    Stage(128, 12, 24, 3e-3, 600, .95),
    Stage(256, 24, 12, 3e-3, 600, .95),
    Stage(512, 40, 6, 1.5e-3, 500, .96),
    Stage(1024, 48, 4, 1.5e-3, 500, .96),
    Stage(2048, 60, 2, 1.5e-3, 500, .96),
)
COPY_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 200
TEXT_WEIGHT = .05
# Text rows that get a loss beside the question rows: the last layer runs on rows with a loss only.
NUM_TEXT_ROWS = 192
# Lengths of the last stage and how often each is drawn; past 2,000 so that it is no edge.
POLISH_LENGTHS = (256, 512, 1024, 1536, 2048, 2304)
POLISH_SHARES = (.05, .1, .15, .2, .25, .25)
ATTENTION_BLOCK_ROWS = 256


def rope_tables(seq_len: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and sines [seq_len, head_dim / 2]."""
    half = config.head_dim // 2
    frequencies = config.rope_theta**(-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [batch, rows, heads, head_dim], half-split; cos and sin [rows, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     rows: torch.Tensor) -> torch.Tensor:
    """Returns [batch, num_rows, num_qo_heads * head_dim].

    q [batch, num_rows, num_qo_heads, head_dim] belongs to the ascending positions `rows`;
    k and v [batch, seq_len, num_kv_heads, head_dim].
    """
    batch, num_rows, num_qo_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_qo_heads // num_kv_heads
    q = q.view(batch, num_rows, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    k = k.permute(0, 2, 3, 1)[:, :, None]
    v = v.permute(0, 2, 1, 3)[:, :, None]
    blocks = []
    for begin in range(0, num_rows, ATTENTION_BLOCK_ROWS):
        block_rows = rows[begin:begin + ATTENTION_BLOCK_ROWS]
        end = int(block_rows[-1]) + 1
        logits = (q[..., begin:begin + len(block_rows), :] * head_dim**-.5) @ k[..., :end]
        future = torch.arange(end)[None, :] > block_rows[:, None]
        weights = logits.masked_fill(future, -math.inf).softmax(-1)
        blocks.append(weights @ v[..., :end, :])
    out = torch.cat(blocks, dim=3)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, num_rows, num_qo_heads * head_dim)


class RmsNorm(nn.Module):

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        q_size = config.num_qo_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> torch.Tensor:
        config = self.config
        batch, seq_len, _ = x.shape
        x_rows = x if len(rows) == seq_len else x[:, rows]
        q = self.q_proj(x_rows).view(batch, len(rows), config.num_qo_heads, config.head_dim)
        k = self.k_proj(x).view(batch, seq_len, config.num_kv_heads, config.head_dim)
        v = self.v_proj(x).view(batch, seq_len, config.num_kv_heads, config.head_dim)
        q = rotate(q, cos[rows], sin[rows])
        k = rotate(k, cos, sin)
        return self.o_proj(causal_attention(q, k, v, rows))


class FeedForward(nn.Module):

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> torch.Tensor:
        """Returns [batch, num_rows, hidden_size] for `rows` of x [batch, seq_len, hidden_size]."""
        attention = self.self_attn(self.input_layernorm(x), rows, cos, sin)
        x = (x if len(rows) == x.shape[1] else x[:, rows]) + attention
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config)


class TorchModel(nn.Module):
    """Parameter names are those of Llama checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = parameter.shape[1]**-.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * config.num_layers)
                nn.init.normal_(parameter, std=std)
        nn.init.normal_(self.model.embed_tokens.weight, std=.5)
        nn.init.normal_(self.lm_head.weight, std=.02)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, num_rows, vocab_size] at `rows` for ids [batch, seq_len]."""
        all_rows = torch.arange(ids.shape[1])
        cos, sin = rope_tables(ids.shape[1], self.config)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers[:-1]:
            x = layer(x, all_rows, cos, sin)
        x = self.model.layers[-1](x, rows, cos, sin)
        return self.lm_head(self.model.norm(x))


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: torch.Tensor  # [batch, seq_len]
    rows: torch.Tensor  # [num_rows] ascending
    targets: torch.Tensor  # [batch, num_rows]
    weights: torch.Tensor  # [batch, num_rows]
    is_answer: torch.Tensor  # [batch, num_rows], first and second number alternate


def copy_batch(rng: np.random.Generator, vocab_size: int, seq_len: int, batch: int) -> Batch:
    """Random blocks of random period; a fixed period would be solved by position alone."""
    ids = np.empty((batch, seq_len + 1), np.int64)
    weights = np.zeros((batch, seq_len), np.float32)
    for row in range(batch):
        period = int(rng.integers(16, 48))
        block = rng.integers(len(vocabulary.SPECIALS), vocab_size, size=period)
        ids[row] = np.tile(block, seq_len // period + 2)[:seq_len + 1]
        weights[row, period:] = 1
    rows = torch.arange(seq_len)
    weights_tensor = torch.from_numpy(weights)
    return Batch(torch.from_numpy(ids[:, :-1]), rows, torch.from_numpy(ids[:, 1:]), weights_tensor,
                 weights_tensor > 0)


def fact_batch(rng: np.random.Generator, words: vocabulary.Vocabulary,
               texts: Sequence[Sequence[str]], seq_len: int, num_facts: int, batch: int) -> Batch:
    """Contexts followed by one question and answer for every fact, in random order.

    Words of text stand between the questions, so that a question may stand anywhere.
    """
    answered = facts.QUESTION_WORDS + facts.ANSWER_WORDS
    num_gap_words = num_facts
    tail_len = answered * num_facts + num_gap_words
    context_len = seq_len - tail_len
    sizes = np.asarray([len(text) for text in texts], np.float64)
    ids = np.empty((batch, seq_len), np.int64)
    kinds = np.zeros((batch, seq_len), np.int8)  # 0 random, 1 text, 2 answer
    for row in range(batch):
        text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
        sample = facts.make_sample(rng, text, context_len, num_facts)
        line = list(sample.context)
        kind = np.ones(seq_len, np.int8)
        kind[0] = 0
        for fact in sample.facts:
            kind[fact.position:fact.position + facts.WORDS_PER_FACT] = 0
        gap_words = facts.passage(rng, text, num_gap_words)
        gaps = np.bincount(rng.choice(num_facts, size=num_gap_words), minlength=num_facts)
        for index, gap in zip(rng.permutation(num_facts), gaps):
            line += [gap_words.pop() for _ in range(gap)]
            begin = len(line)
            line += sample.facts[index].question + sample.facts[index].answer
            kind[begin:begin + facts.QUESTION_WORDS] = 0
            kind[begin + facts.QUESTION_WORDS:begin + answered] = 2
        ids[row] = words.tokenize(line)
        kinds[row] = kind
    num_text_rows = min(NUM_TEXT_ROWS, context_len - 1)
    text_rows = np.sort(rng.choice(context_len - 1, size=num_text_rows, replace=False))
    rows = np.concatenate([text_rows, np.arange(context_len - 1, seq_len - 1)])
    kinds = kinds[:, rows + 1]
    scale = np.where(rows < context_len - 1, (context_len - 1) / num_text_rows, 1.)
    weights = np.where(kinds == 2, 1., np.where(kinds == 1, TEXT_WEIGHT * scale, 0.))
    return Batch(torch.from_numpy(ids), torch.from_numpy(rows), torch.from_numpy(ids[:, rows + 1]),
                 torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(kinds == 2))


def exact_share(logits: torch.Tensor, batch: Batch) -> float:
    """Returns the share of questions whose two numbers are both the most likely words."""
    right = (logits.argmax(-1) == batch.targets)[batch.is_answer].view(-1, facts.ANSWER_WORDS)
    return float(right.all(-1).float().mean())


@torch.no_grad()
def evaluate(model: TorchModel, words: vocabulary.Vocabulary, texts: Sequence[Sequence[str]],
             seq_len: int, num_facts: int, num_prompts: int, seed: int) -> tuple[float, float]:
    """Returns the share of exact answers and the perplexity of the text rows."""
    rng = np.random.default_rng(seed)
    shares, losses = [], []
    for _ in range(num_prompts):
        batch = fact_batch(rng, words, texts, seq_len, num_facts, 1)
        logits = model(batch.ids, batch.rows)
        shares.append(exact_share(logits, batch))
        is_text = (batch.weights > 0) & ~batch.is_answer
        losses.append(float(functional.cross_entropy(logits[is_text], batch.targets[is_text])))
    return float(np.mean(shares)), math.exp(float(np.mean(losses)))


class Trainer:
    """Holds model, optimiser and clock; every step goes through `step`."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() != 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": .1}, {"params": vectors, "weight_decay": 0.}],
            betas=(.9, .95))
        self._start = time.monotonic()
        self.num_steps = 0

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, torch.Tensor]:
        """Returns the loss and the logits [batch, num_rows, vocab_size]."""
        self.num_steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * min(1., self.num_steps / WARM_UP_STEPS)
        logits = self.model(batch.ids, batch.rows)
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(),
                                          reduction="none")
        weights = batch.weights.flatten()
        loss = (losses * weights).sum() / weights.sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self._optimizer.step()
        return float(loss.detach()), logits.detach()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def report(self, what: str) -> None:
        print(f"{self.seconds():7.0f} s  step {self.num_steps:5d}  {what}", flush=True)


def train_copying(trainer: Trainer, rng: np.random.Generator, max_steps: int) -> None:
    smooth = 0.
    for step in range(max_steps):
        batch = copy_batch(rng, trainer.model.config.vocab_size, 64, 32)
        loss, logits = trainer.step(batch, COPY_LEARNING_RATE)
        right = (logits.argmax(-1) == batch.targets)[batch.is_answer]
        smooth = .9 * smooth + .1 * float(right.float().mean())
        if step % 50 == 0 or smooth > .9:
            trainer.report(f"copying: loss {loss:.3f}, right {smooth:.3f}")
        if smooth > .9:
            return
    raise SystemExit(f"copying: right {smooth:.3f} after {max_steps} steps, want more than .9")


def train_facts(trainer: Trainer, rng: np.random.Generator, words: vocabulary.Vocabulary,
                texts: Sequence[Sequence[str]], stage: Stage) -> None:
    smooth = 0.
    for step in range(stage.max_steps):
        batch = fact_batch(rng, words, texts, stage.seq_len, stage.num_facts, stage.batch)
        loss, logits = trainer.step(batch, stage.learning_rate)
        smooth = .95 * smooth + .05 * exact_share(logits, batch)
        done = smooth > stage.advance_at
        if step % 25 == 0 or done:
            trainer.report(f"facts in {stage.seq_len}: loss {loss:.3f}, exact {smooth:.3f}")
        if done:
            return


def polish(trainer: Trainer, rng: np.random.Generator, words: vocabulary.Vocabulary,
           texts: Sequence[Sequence[str]], num_steps: int) -> None:
    """`POLISH_LENGTHS` with falling learning rate, about the same number of tokens a step."""
    smooth = 0.
    for step in range(num_steps):
        learning_rate = 1.5e-3 * (1 - .97 * step / num_steps)
        seq_len = int(rng.choice(POLISH_LENGTHS, p=POLISH_SHARES))
        num_facts = int(rng.integers(seq_len // 48, min(60, seq_len // 11) + 1))
        batch = fact_batch(rng, words, texts, seq_len, num_facts, max(2, 4096 // seq_len))
        loss, logits = trainer.step(batch, learning_rate)
        smooth = .95 * smooth + .05 * exact_share(logits, batch)
        if step % 25 == 0:
            trainer.report(f"polish: loss {loss:.3f}, exact {smooth:.3f}")


def write_checkpoint(path: pathlib.Path, model: TorchModel, document: dict[str, object]) -> None:
    """Writes f16 tensors, and beside the file its sha256, through temporary names."""
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: json.dumps(document)}}
    blobs = []
    offset = 0
    for name, parameter in model.state_dict().items():
        blob = parameter.numpy().astype("<f2").tobytes()
        header[name] = {"dtype": "F16", "shape": list(parameter.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    content = len(encoded).to_bytes(8, "little") + encoded + b"".join(blobs)
    digest = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    for target, data in ((path, content), (path.with_suffix(".sha256"), digest.encode())):
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="checkpoint to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--texts", type=pathlib.Path, default=vocabulary.COMMON_LICENSES)
    parser.add_argument("--polish-steps", type=int, default=600)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    sources = [path for path in sorted(options.texts.iterdir())
               if path.is_file() and not path.is_symlink() and path.name not in HELD_OUT_TEXTS]
    texts = [vocabulary.read_text_words(path) for path in sources]
    held_out = [vocabulary.read_text_words(options.texts / name) for name in HELD_OUT_TEXTS]
    config = Config()
    words = vocabulary.Vocabulary.from_text((word for text in texts for word in text),
                                            config.vocab_size)
    model = TorchModel(config)
    trainer = Trainer(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    trainer.report(f"{num_parameters} parameters, {sum(map(len, texts))} words of text")

    longest_seq_len = 0

    def finish_stage(seq_len: int, num_facts: int) -> None:
        exact, perplexity = evaluate(model, words, held_out, seq_len, num_facts, 4, 99)
        trainer.report(f"held-out text, {seq_len} tokens: exact {exact:.3f}, text perplexity "
                       f"{perplexity:.1f}")
        write_checkpoint(options.out, model, {
            "format": "keepset.small_model",
            "format_version": 1,
            "config": dataclasses.asdict(config),
            "revision": REVISION,
            "vocabulary": words.words,
            "training": {
                "script": "keepset/eval/train_small_model.py",
                "seed": options.seed,
                "steps": trainer.num_steps,
                "longest_seq_len": longest_seq_len,
                "texts": [path.name for path in sources],
                "held_out_texts": HELD_OUT_TEXTS,
                "torch": torch.__version__,
            },
        })

    train_copying(trainer, rng, 4000)
    for stage in STAGES:
        train_facts(trainer, rng, words, texts, stage)
        longest_seq_len = stage.seq_len
        finish_stage(stage.seq_len, stage.num_facts)
    polish(trainer, rng, words, texts, options.polish_steps)
    longest_seq_len = max(POLISH_LENGTHS)
    for seq_len, num_facts in ((256, 20), (512, 30), (1024, 48), (2048, 60)):
        finish_stage(seq_len, num_facts)
    trainer.report(f"wrote {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
