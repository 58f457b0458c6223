"""Measures observation_heads against every other policy and writes observation_heads.{json,md} and its
picture.

Constructed models, the shipped small model and, when its directory is given, a Hugging Face model. Tables
are compiled on one text, tested on another; every prompt's raw outcome is kept in the work folder, so an
interrupted run goes on there. What a run does not measure (no model directory, some tasks alone) stays in the
report as it was, with the command that measured it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import pathlib
import platform
import sys
import time

import numpy as np

from keepset import table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import MEAN_ROWS, ConstructedTasks, RememberedTasks
from keepset.calibrate.observation_heads import Mixture, Say, compile_heads
from keepset.calibrate.small_head_tasks import SmallModelTasks
from keepset.eval import constructed, vocabulary
from keepset.eval.small_model import SmallModel
from keepset.evidence import head_baselines
from keepset.evidence.earlier_run import keep_earlier, read_results, write_results
from keepset.evidence.head_compilerkv import CompilerKvSettings
from keepset.evidence.head_measure import measure, summarize
from keepset.evidence.head_methods import OURS, SHUFFLED, HeadsRun, all_heads, engine_run, shuffled
from keepset.evidence.head_part import AGNOSTIC, HeadPart, Settings, describe
from keepset.evidence.observation_heads_report import markdown
from keepset.in_process import Engine

CALIBRATION_TEXT, TEST_TEXT = "Apache-2.0", "MPL-2.0"
# 32 is below the range: there the small model's tasks are not yet all answered.
BUDGETS = (32, 64, 128, 256, 512)
FIT_BUDGETS = (64, 128)
LENGTHS = (512, 1024, 2048)
_CONSTRUCTED_LEN = 2048
_NEEDLES = ("number", "code", "quotation")


def small_model_part(build: Build, engine: Engine, work: pathlib.Path, prompts: int, say: Say) -> dict:
    model = SmallModel.load()
    tasks = {"inside": SmallModelTasks.INSIDE, AGNOSTIC: SmallModelTasks.AGNOSTIC}
    part = HeadPart(build, engine, work, RememberedTasks(SmallModelTasks(model, text=CALIBRATION_TEXT)),
                    RememberedTasks(SmallModelTasks(model, text=TEST_TEXT)), SmallModelTasks.PROBE,
                    Settings(tasks, LENGTHS, BUDGETS, FIT_BUDGETS, (prompts,) * len(LENGTHS),
                             min(8, prompts), min(8, prompts), LENGTHS), say)
    return part.run() | {"calibration_text": CALIBRATION_TEXT, "test_text": TEST_TEXT,
                         "trained": list(SmallModelTasks.TRAINED)}


def hf_part(build: Build, engine: Engine, options: argparse.Namespace, say: Say) -> dict:
    """The same for a model directory; needs the extra `hf`."""
    import torch
    import transformers

    from keepset.calibrate.hf_head_tasks import HfTasks

    torch.set_num_threads(options.hf_threads)
    learned = HfTasks.load(options.hf_model, options.hf_text, options.hf_window, options.hf_device,
                           options.hf_dtype)
    tested = learned.on(options.hf_test_text)
    columns = {"needles": _NEEDLES, "inside": tuple(one for one in HfTasks.INSIDE if one not in _NEEDLES),
               AGNOSTIC: HfTasks.AGNOSTIC}
    chosen = {column: tuple(one for one in tasks if one in options.hf_tasks)
              for column, tasks in columns.items()}
    lengths = tuple(options.hf_lengths)
    counts = tuple(options.hf_prompts)
    counts += counts[-1:] * (len(lengths) - len(counts))
    settings = Settings({column: tasks for column, tasks in chosen.items() if tasks}, lengths,
                        tuple(options.hf_budgets), tuple(options.hf_fit_budgets), counts[: len(lengths)],
                        max(4, counts[0] // 2), options.hf_gate_prompts,
                        tuple(options.hf_fit_lengths or lengths), options.hf_floor,
                        options.hf_calibration_prompts, options.hf_risk_prompts, options.hf_max_heads,
                        options.hf_folds,
                        {"needles": options.hf_fixed_heads} if options.hf_fixed_heads else {},
                        compilerkv=CompilerKvSettings(
                            tuple(options.hf_compilerkv_tasks), lengths[0],
                            tuple(options.hf_fit_budgets), options.hf_compilerkv_prompts)
                        if options.hf_compilerkv_prompts else None,
                        untaught=tuple(options.hf_untaught), novelty_heads=options.hf_novelty_heads)
    until = time.monotonic() + 60 * options.hf_minutes
    part = HeadPart(build, engine, options.work / f"hf-{learned.fingerprint.revision}",
                    RememberedTasks(learned, until), RememberedTasks(tested, until), HfTasks.PROBE,
                    settings, say, f"{learned.fingerprint.revision} {learned.name}")
    model = learned.model.model
    return part.run() | {
        "calibration_text": learned.name, "test_text": tested.name,
        "model": {"name": getattr(model.config, "_model_name_or_path", None) or model.config.model_type,
                  "parameters": sum(one.numel() for one in model.parameters()),
                  "dtype": str(model.dtype).removeprefix("torch."),
                  "heads": [learned.fingerprint.num_layers, learned.fingerprint.num_qo_heads,
                            learned.fingerprint.num_kv_heads, learned.fingerprint.head_dim],
                  "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                            for path in sorted(options.hf_model.iterdir())
                            if path.suffix in (".safetensors", ".json", ".jinja")}},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "threads": options.hf_threads}}


def constructed_part(build: Build, engine: Engine, work: pathlib.Path, prompts: int, say: Say
                     ) -> list[dict]:
    """Models whose needed positions are known."""
    out = []
    for title, model in (
            ("mass contrast", constructed.marker_model("mass", permute_heads=True, seed=5)),
            ("mass contrast, 4 query heads per KV head, 3 layers",
             constructed.marker_model("mass", num_layers=3, group_size=4, permute_heads=True, seed=6)),
            ("norm contrast", constructed.marker_model("norm", permute_heads=True, seed=1))):
        tasks = ConstructedTasks(model)
        folder = work / title.replace(" ", "-").replace(",", "")
        found = compile_heads(build, engine, tasks, Mixture(("facts",), (_CONSTRUCTED_LEN,), range(6)),
                              folder / "records", name="constructed", version="1", budgets=(96,),
                              say=say)
        methods = {policy: engine_run(engine, policy) for policy in ("random", "snapkv")}
        methods["compilerkv uniform"] = engine_run(
            engine, "compilerkv", None,
            table_file.uniform_table(tasks.fingerprint, name="uniform", version="1"),
            {"alpha_scope": "head"})
        methods["all heads, mean"] = HeadsRun(engine, all_heads(tasks, (MEAN_ROWS,), "all-mean"))
        methods["keydiff, per head"] = head_baselines.keydiff
        methods[OURS] = HeadsRun(engine, found.table)
        methods[SHUFFLED] = HeadsRun(engine, shuffled(found.table))
        budget = 96 * model.num_layers
        outcomes = [measure(folder / "outcomes", tasks, "facts", seed, _CONSTRUCTED_LEN, methods,
                            (budget,)) for seed in range(1000, 1000 + prompts)]
        say(f"constructed: {title}")
        out.append({"title": title, "budget": budget, "table": describe(found),
                    "roles": [list(one) for one in model.roles],
                    "rows": summarize(outcomes, (budget,))})
    return out


def _options() -> argparse.Namespace:
    licences = vocabulary.COMMON_LICENSES
    parser = argparse.ArgumentParser(prog="python -m keepset.evidence.observation_heads",
                                     description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the files")
    parser.add_argument("--work", type=pathlib.Path, required=True,
                        help="records, tables and raw outcomes; an interrupted run goes on there")
    parser.add_argument("--prompts", type=int, default=12, help="test prompts of every task and length")
    parser.add_argument("--parts", nargs="*", choices=("constructed", "small"),
                        default=["constructed", "small"])
    hf = parser.add_argument_group("a Hugging Face model")
    hf.add_argument("--hf-model", type=pathlib.Path, help="directory; nothing is downloaded")
    hf.add_argument("--hf-text", type=pathlib.Path, nargs="+",
                    default=[licences / one for one in ("Apache-2.0", "GPL-2", "GFDL-1.2")])
    hf.add_argument("--hf-test-text", type=pathlib.Path, nargs="+",
                    default=[licences / one for one in ("MPL-2.0", "GPL-3", "MPL-1.1")])
    hf.add_argument("--hf-tasks", nargs="+", default=[
        "number", "code", "quotation", "multi", "tracking", "few_shot", "summary", "later_number",
        "later_code", "later_quotation", "later_summary"])
    hf.add_argument("--hf-untaught", nargs="*", default=[],
                    help="of these tasks, those that no table learns from: they are tested alone")
    hf.add_argument("--hf-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    hf.add_argument("--hf-budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    hf.add_argument("--hf-fit-budgets", type=int, nargs="+", default=[128, 256])
    hf.add_argument("--hf-fit-lengths", type=int, nargs="+",
                    help="of the calibration prompts, some of --hf-lengths; default: all")
    hf.add_argument("--hf-prompts", type=int, nargs="+", default=[8],
                    help="test prompts of every task: for each length, the last for the lengths after it")
    hf.add_argument("--hf-gate-prompts", type=int, default=6,
                    help="calibration prompts that tell whether the full cache answers a task")
    hf.add_argument("--hf-floor", type=float, default=0.4,
                    help="share of them that it must answer")
    hf.add_argument("--hf-compilerkv-tasks", nargs="+",
                    default=["number", "quotation", "multi", "few_shot"],
                    help="that a compilerkv table is calibrated on, at the first of --hf-lengths")
    hf.add_argument("--hf-compilerkv-prompts", type=int, default=0,
                    help="of each of them; 0: no such table. Every prompt costs 480 runs of a model of "
                    "48 KV heads")
    hf.add_argument("--hf-minutes", type=float, default=math.inf,
                    help="start no prompt after so long; the report says what is missing and the same "
                    "command goes on")
    hf.add_argument("--hf-calibration-prompts", type=int, default=4)
    hf.add_argument("--hf-risk-prompts", type=int, default=2)
    hf.add_argument("--hf-max-heads", type=int, default=16)
    hf.add_argument("--hf-fixed-heads", type=int, default=16,
                    help="observations of a further table of the other needles; 0: none")
    hf.add_argument("--hf-novelty-heads", type=int, default=4,
                    help="KV heads of a further table of the other tasks that are asked after compression, "
                    "by key novelty alone; 0: none")
    hf.add_argument("--hf-folds", type=int, default=2, help="of the validation; time grows with them")
    hf.add_argument("--hf-window", type=int, default=32, help="rows that window methods observe")
    hf.add_argument("--hf-device", default="cpu")
    hf.add_argument("--hf-dtype", default="auto", help="auto: the checkpoint's; CPUs without bf16 units "
                    "are much faster with float32")
    hf.add_argument("--hf-threads", type=int, default=1, help="of torch; more than there are idle cores "
                    "make it many times slower")
    return parser.parse_args()


def main() -> int:
    options = _options()
    started, cpu_before = time.monotonic(), _cpu_seconds()
    resumed = options.work.is_dir() and any(options.work.iterdir())

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    build = Build(options.build)
    try:
        with Engine(build.library) as engine:
            found: dict = {
                "command": _command(options),
                "policies": list(engine.policies),
                "versions": {"keepset": engine.version, "backend": engine.backend,
                             "numpy": np.__version__, "python": platform.python_version()},
            }
            if "constructed" in options.parts:
                found["constructed"] = constructed_part(
                    build, engine, options.work / "constructed", min(12, options.prompts), say)
            if "small" in options.parts:
                found["small_model"] = small_model_part(build, engine, options.work / "small",
                                                        options.prompts, say)
            if options.hf_model is not None:
                found["hf_model"] = hf_part(build, engine, options, say)
    except CalibrationError as error:
        say(f"keepset.evidence.observation_heads: {error}")
        return 3
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {options.work}")
        return 130
    found["run"] = {"wall_seconds": round(time.monotonic() - started, 1),
                    "cpu_seconds": round(_cpu_seconds() - cpu_before, 1),
                    "cores": len(os.sched_getaffinity(0)), "resumed": resumed}
    options.out.mkdir(parents=True, exist_ok=True)
    if (earlier := read_results(options.out)) is not None:
        found = keep_earlier(found, earlier)
        for name in found.get("kept", {}):
            say(f"{name}: not measured by this run, kept from {options.out}")
    files = write_results(options.out, found)
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        from keepset.evidence.head_plots import draw

        pictures = draw(found, options.out)
    (options.out / "observation_heads.md").write_text(markdown(found, pictures))
    say(f"wrote {', '.join([*files, 'observation_heads.md', *pictures])} in {options.out}")
    return 0


def _cpu_seconds() -> float:
    """Of this process and of the tools it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _command(options: argparse.Namespace) -> str:
    command = f"python -m keepset.evidence.observation_heads --prompts {options.prompts}"
    if options.hf_model is None:
        return command
    told = {name: " ".join(map(str, getattr(options, name))) for name in (
        "hf_tasks", "hf_compilerkv_tasks", "hf_lengths", "hf_budgets", "hf_fit_budgets", "hf_prompts")}
    if options.hf_untaught:
        told["hf_untaught"] = " ".join(options.hf_untaught)
    if options.hf_fit_lengths:
        told["hf_fit_lengths"] = " ".join(map(str, options.hf_fit_lengths))
    told |= {name: str(getattr(options, name)) for name in (
        "hf_calibration_prompts", "hf_risk_prompts", "hf_gate_prompts", "hf_floor", "hf_max_heads",
        "hf_fixed_heads", "hf_novelty_heads", "hf_compilerkv_prompts", "hf_folds", "hf_window", "hf_dtype",
        "hf_threads")}
    return " ".join([command, "--hf-model DIRECTORY",
                     *(f"--{name.replace('_', '-')} {value}" for name, value in told.items())])


if __name__ == "__main__":
    sys.exit(main())
