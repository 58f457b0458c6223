"""Measures candidate tables on a model and compiles a table from what was measured.

Every prompt is read once; compilerkv then runs in process (libkeepset) once per candidate table on what
it reads of that prompt, and the model's loss is taken under what was kept. Heads and gate alternate until
the chosen actions stop changing. An interrupted run goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

from keepset import table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.alternation import Outcome, Say, alternate, steps_of
from keepset.calibrate.compiler import Compiler
from keepset.calibrate.grids import GATE_GRID, HEAD_GRID, PAPER_GRIDS, Grid, Grids
from keepset.calibrate.prompts import Adapter, ConstructedAdapter, SmallModelAdapter
from keepset.calibrate.rollouts import Rollouts, Weights
from keepset.calibrate.stratify import stratified_seeds
from keepset.eval import constructed, vocabulary
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine


# Nats of mean reward, see convergence.py.
TOLERANCE = 0.02
_HF = "hf:"


@dataclasses.dataclass(frozen=True)
class Build:
    """Where the programs of a build directory lie."""

    root: pathlib.Path

    @property
    def keepset(self) -> pathlib.Path:
        return self.root / "clients" / "cli" / "keepset"

    @property
    def keepsetd(self) -> pathlib.Path:
        return self.root / "service" / "keepsetd"

    @property
    def library(self) -> pathlib.Path:
        return self.root / "engine" / "libkeepset.so"


def calibrate(build: Build, adapter: Adapter, out: pathlib.Path, *, seeds: range,
              budgets: list[int], alpha_scope: str, max_rounds: int, name: str, version: str, say: Say,
              actions: int | None = None, grids: Grids = PAPER_GRIDS,
              bins: tuple[int, int] = (20, 4), protect_window: int = 0,
              parameters: Mapping[str, object] | None = None, num_prompts: int | None = None,
              tolerance: float = TOLERANCE, action_step: int = 1, workers: int = 0,
              ray_address: str | None = None) -> Outcome:
    """From prompts of `seeds` to records in `out` and a table; bins of entropy and of perplexity.

    parameters: of the policy, beside alpha_scope.
    num_prompts: so many of the prompts are chosen, stratified over the risk cells; all when None.
    tolerance: see convergence.py.
    actions: so many are measured per prompt and state; all when None.
    action_step: every so many-th action of the grids is measured.
    workers: Ray workers that measure, on this machine or on the cluster at `ray_address`; 0 measures
    in this process. The records are the same, in another order.
    """
    model = adapter.fingerprint()
    budgets = sorted(set(budgets))
    chosen: Sequence[int] = seeds
    coverage = None
    if num_prompts is not None and num_prompts != len(seeds):
        stratified = stratified_seeds(adapter, seeds, num_prompts, bins, steps_of(out) / "pool.json",
                                      say)
        chosen, coverage = stratified.seeds, stratified.coverage()
    with contextlib.ExitStack() as stack:
        measuring = {"seed": seeds.start, "actions_per_state": actions, "action_step": action_step,
                     "grids": grids, "protect_window": protect_window,
                     "parameters": {"alpha_scope": alpha_scope, **(parameters or {})}}
        if workers:
            # Ray is an optional extra.
            from keepset.calibrate.ray_rollouts import RayRollouts

            rollouts = stack.enter_context(RayRollouts(
                build.library, adapter, chosen, budgets, num_workers=workers, address=ray_address,
                **measuring))
        else:
            engine = stack.enter_context(Engine(build.library))
            rollouts = Rollouts(engine, model, list(adapter.prompts(chosen)), budgets, **measuring)
        headers = rollouts.headers()
        settings = {
            "model": model.to_json(), "adapter": adapter.name, "pool": [seeds.start, seeds.stop],
            "seeds": list(chosen), "prompts": [prompt_id for prompt_id, _ in headers],
            "sequence_lengths": [seq_len for _, seq_len in headers], "budgets": budgets,
            "parameters": measuring["parameters"], "actions_per_state": actions,
            "action_step": action_step, "grids": grids.to_json(), "bins": list(bins),
            "protect_window": protect_window,
            "library": hashlib.sha256(build.library.read_bytes()).hexdigest(),
        }  # fmt: skip
        outcome = alternate(rollouts, Compiler(build.keepset, model, *bins, grids), out,
                            Weights.neutral(model, len(budgets), grids), name=name, version=version,
                            max_rounds=max_rounds, tolerance=tolerance, budgets=budgets,
                            settings=settings, say=say)
        return dataclasses.replace(outcome, coverage=coverage)


def model_name(text: str) -> str:
    if text in ("constructed", "small") or text.startswith(_HF):
        return text
    raise argparse.ArgumentTypeError(f"{text}, want constructed, small or hf:DIRECTORY")


def adapter_of(options: argparse.Namespace) -> Adapter:
    if options.model == "small":
        return SmallModelAdapter(SmallModel.load(), seq_len=options.seq_len or 1024)
    if options.model.startswith(_HF):
        try:
            from keepset.calibrate.hf_prompts import HfTextAdapter
        except ImportError as error:
            raise CalibrationError(f"--model {options.model}: {error}; install keepset[hf]") from error
        return HfTextAdapter(
            pathlib.Path(options.model.removeprefix(_HF)),
            tuple(options.text or [vocabulary.COMMON_LICENSES / "GPL-3"]),
            seq_len=options.seq_len or 1024, continuation=options.continuation,
            window=options.window, device=options.device)
    model = constructed.marker_model(
        options.contrast, num_layers=options.layers, group_size=options.group_size,
        noise=options.noise, permute_heads=options.permute_heads)
    return ConstructedAdapter(model, seq_len=options.seq_len or 2048)


def parameters_of(listed: Sequence[str]) -> dict[str, str]:
    """Of NAME=VALUE texts; the engine refuses what it does not know."""
    for one in listed:
        if "=" not in one:
            raise CalibrationError(f"--param {one}, want NAME=VALUE")
    return dict(one.split("=", 1) for one in listed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keepset.calibrate", description=__doc__)
    parser.add_argument("--model", type=model_name, required=True,
                        help="constructed, small or hf:DIRECTORY, a Hugging Face model (extra `hf`)")
    parser.add_argument("--out", type=pathlib.Path, required=True,
                        help="records (JSON lines) of the last round; every step is in OUT.steps")
    parser.add_argument("--table", type=pathlib.Path, help="where the compiled table goes")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--prompts", type=int, default=8, help="calibration prompts")
    parser.add_argument("--pool", type=int,
                        help="prompts read to choose --prompts of them, so that the cells of entropy x "
                             "perplexity are covered; default 3 * --prompts")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seq-len", type=int, help="default 2048 constructed, 1024 otherwise")
    parser.add_argument("--budgets", type=int, nargs="+", default=[96])
    parser.add_argument("--alpha-scope", choices=("global", "layer", "head"), default="global")
    parser.add_argument("--param", action="append", default=[], metavar="NAME=VALUE",
                        help="parameter of the policy, such as pool_kernel=3")
    parser.add_argument("--protect-window", type=int, default=0,
                        help="last positions that stay, inside the budget")
    parser.add_argument("--head-actions", metavar="FIRST:STEP:COUNT", default=str(HEAD_GRID),
                        help=f"head weights to measure, default {HEAD_GRID}")
    parser.add_argument("--gate-actions", metavar="FIRST:STEP:COUNT", default=str(GATE_GRID),
                        help=f"gates to measure, default {GATE_GRID}; the first stands while none is "
                             "compiled")
    parser.add_argument("--actions", type=int,
                        help="actions measured per prompt and state; all by default")
    parser.add_argument("--action-step", type=int, default=1,
                        help="measure every so many-th action of the grids; 1 all, 4 of the "
                             "default head weights is 0.8 0.9 .. 1.5")
    parser.add_argument("--rounds", type=int, default=5, help="at most so many")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE,
                        help="nats of mean reward that a changed state may gain or lose while the run "
                             f"counts as settled, default {TOLERANCE}")
    parser.add_argument("--name", help="of the table; default: the model's")
    parser.add_argument("--version", default="1", help="of the table")
    parser.add_argument("--entropy-bins", type=int, default=20)
    parser.add_argument("--ppl-bins", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0,
                        help="Ray workers that measure (extra `ray`); 0: in this process")
    parser.add_argument("--ray-address", help="of a running Ray cluster; default: this machine")
    group = parser.add_argument_group("constructed model")
    group.add_argument("--contrast", choices=("norm", "mass"), default="norm")
    group.add_argument("--layers", type=int, default=1)
    group.add_argument("--group-size", type=int, default=1, help="query heads per KV head")
    group.add_argument("--noise", type=float, default=0.3, help="of the attention logits")
    group.add_argument("--permute-heads", action="store_true")
    group = parser.add_argument_group("Hugging Face model")
    group.add_argument("--text", type=pathlib.Path, action="append",
                       help="prompts are passages of it; may be given again")
    group.add_argument("--continuation", type=int, default=128, help="tokens whose loss is measured")
    group.add_argument("--window", type=int, default=64, help="observed rows")
    group.add_argument("--device", default="cpu")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    pool = 3 * options.prompts if options.pool is None else options.pool
    if not 1 <= options.prompts <= pool:
        say(f"keepset.calibrate: --prompts {options.prompts} of --pool {pool}, want 1..{pool}")
        return 2
    seeds = range(options.first_seed, options.first_seed + pool)
    build = Build(options.build)
    for path in (build.library, build.keepset):
        if not path.exists():
            say(f"keepset.calibrate: {path} is missing: run `make build` or name --build")
            return 2
    try:
        grids = Grids(Grid.parse("--head-actions", options.head_actions),
                      Grid.parse("--gate-actions", options.gate_actions))
        adapter = adapter_of(options)
        outcome = calibrate(
            build, adapter, options.out, seeds=seeds, budgets=options.budgets,
            alpha_scope=options.alpha_scope, actions=options.actions, grids=grids, max_rounds=options.rounds,
            name=options.name or adapter.name, version=options.version, say=say,
            bins=(options.entropy_bins, options.ppl_bins), protect_window=options.protect_window,
            num_prompts=options.prompts, tolerance=options.tolerance,
            action_step=options.action_step, workers=options.workers,
            ray_address=options.ray_address, parameters=parameters_of(options.param))
    except CalibrationError as error:
        say(f"keepset.calibrate: {error}")
        return 3
    except KeyboardInterrupt:
        say(f"\nkeepset.calibrate: interrupted; the same command goes on from {options.out}.steps")
        return 130
    if options.table:
        table_file.write_atomically(options.table, outcome.table)
    settled = f"{'settled' if outcome.settled else 'not settled'} within {outcome.tolerance} nats"
    say(f"{outcome.num_records} records, {outcome.rounds} rounds, {settled}; "
        f"table {table_file.digest(outcome.table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
