"""Prints what the service does to one real prompt: quality by policy and budget, one decision explained,
a table swapped under load, and the service's own metrics."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import threading
import time
import urllib.request

import numpy as np

import keepset
from keepset import table_file
from keepset.demo import job
from keepset.eval import facts, vocabulary
from keepset.eval.small_model import CHECKPOINT, SmallModel
from keepset.server_process import ServerProcess

# Compiled by `make demo-table` for the shipped model, for the parameters and the budgets below.
COMPILED_TABLE = CHECKPOINT.with_name("small_model_table.safetensors")
COMPILERKV_PARAMETERS = {"pool_kernel": 3}
BUDGETS = (32, 64, 128, 256)
TABLE_NAME = "small-model"
UNIFORM_NAME = "small-model-uniform"
HELD_OUT_TEXT = "MPL-2.0"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the quality table."""

    label: str
    policy: str
    spec: dict = dataclasses.field(default_factory=dict)


def compilerkv(table: str) -> dict:
    """Of a request; one of the two tables of the server."""
    return {"parameters": COMPILERKV_PARAMETERS, "table": keepset.TablePin(name=table)}


METHODS = (
    *(Method(policy, policy)
      for policy in ("full", "streaming_llm", "random", "knorm", "tova", "snapkv")),
    Method("compilerkv", "compilerkv", compilerkv(TABLE_NAME)),
    Method("  uniform", "compilerkv", compilerkv(UNIFORM_NAME)),
)
METRIC_LINES = (
    "keepset_compress_operations_total",
    "keepset_policy_operations_total",
    "keepset_input_tokens_total",
    "keepset_retained_tokens_total",
    "keepset_table_info",
    "keepset_table_reloads_total",
    "keepset_kv_input_bytes_total",
    "keepset_kv_retained_bytes_total",
    "keepset_sessions ",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m keepset.demo", description=__doc__)
    parser.add_argument("--keepsetd", required=True, help="path of the keepsetd binary")
    parser.add_argument("--seq-len", type=int, default=2000, help="tokens of the context")
    parser.add_argument("--facts", type=int, default=32, help="facts hidden in it")
    parser.add_argument("--questions", type=int, default=16, help="of them asked, each its own prompt")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()

    model = SmallModel.load()
    words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / HELD_OUT_TEXT)
    rng = np.random.default_rng(options.seed)
    sample = facts.make_sample(rng, words, options.seq_len, options.facts)
    asked = [sample.facts[i] for i in rng.permutation(len(sample.facts))[: options.questions]]
    show_prompt(model, sample, asked)

    with ServerProcess(options.keepsetd) as server:
        compiled = COMPILED_TABLE.read_bytes()
        publish(server, TABLE_NAME, compiled)
        publish(server, UNIFORM_NAME, table_file.uniform_table(
            job.fingerprint(model), name=UNIFORM_NAME, version="1"))
        with keepset.Client.connect(server.address) as client:
            wait_for_version(client, "1")
            info = client.server_info()
            print(f"\nkeepsetd {info.version} on {server.address}: backend {info.backend}; "
                  f"K, V and queries travel by {client.transport}")
            context, prompts = prefill(client, model, sample, asked)
            show_table(client, model, compiled, context, prompts, asked)
            show_explanation(client, model, prompts[0])
            show_reload(client, server, model, compiled, prompts[0])
        show_metrics(server)


def show_prompt(model: SmallModel, sample: facts.Sample, asked) -> None:
    first = asked[0]
    begin = max(1, first.position - 12)
    excerpt = " ".join(sample.context[begin : first.position + 16])
    print(f"Model: {model.revision}, {model.config.num_layers} layers, "
          f"{model.config.num_qo_heads} query heads, {model.config.num_kv_heads} KV heads.")
    print(f"Prompt: {len(sample.context)} words of {HELD_OUT_TEXT} (not trained on), "
          f"{len(sample.facts)} facts hidden in it, for example:")
    print(f"  ... {excerpt} ...")
    print(f"Question: '{' '.join(first.question)}' -> '{' '.join(first.answer)}'")


def publish(server: ServerProcess, name: str, table: bytes) -> None:
    table_file.write_atomically(server.tables / f"{name}.safetensors", table)


def stricter(compiled: bytes, model: SmallModel) -> bytes:
    """Version 2 of the table for the swap: the same head weights behind gates of 0.9."""
    table = table_file.read_table(compiled)
    return table_file.compilerkv_table(
        job.fingerprint(model), name=TABLE_NAME, version="2", head_weights=table.head_weights,
        gate_thresholds=np.full_like(table.gate_thresholds, 0.9), budgets=table.budgets,
        entropy_edges=table.entropy_edges, ppl_edges=table.ppl_edges, source="hand-written",
        algorithm={"name": "derived", "of": table_file.digest(compiled)})


def wait_for_version(client: keepset.Client, version: str, timeout_seconds: float = 10.0) -> None:
    """Until the server lists the version as active."""
    deadline = time.monotonic() + timeout_seconds
    while not any(t.name == TABLE_NAME and t.version == version for t in client.server_info().tables):
        if time.monotonic() > deadline:
            raise TimeoutError(f"table {TABLE_NAME} version {version} was not published")
        time.sleep(0.01)


def prefill(client, model: SmallModel, sample: facts.Sample, asked):
    """The context alone, and once per question with the question at its end."""
    started = time.monotonic()
    context = job.share(client, model.prefill(model.tokenize(sample.context), job.WINDOW))
    prompts = [
        job.share(client, model.prefill(model.tokenize(sample.prompt_with_question(fact)), job.WINDOW))
        for fact in asked
    ]
    print(f"Prefilled {1 + len(prompts)} prompts in numpy in {time.monotonic() - started:.1f} s.")
    return context, prompts


def show_table(client, model, compiled: bytes, context, prompts, asked) -> None:
    document = table_file.read_table(compiled).document
    counts = document["provenance"]["records_per_state"]
    print(f"\nExact two-word answers of {len(asked)} questions. 'inside': the question stands in the "
          "compressed prompt; 'later': it is asked of the compacted cache.")
    print(f"compilerkv decides by the table {document['name']} version {document['version']}, "
          f"{document['provenance']['source']}, compiled by `make demo-table` from rollouts on another "
          f"text\n(records per state: {counts}; {table_file.digest(compiled)}), with "
          f"{COMPILERKV_PARAMETERS}; 'uniform' below it is the same\npolicy on a table that has learned "
          f"nothing. Every policy keeps the last {job.WINDOW} positions, inside the budget.")
    header = f"{'policy':14s} {'budget':>6s} {'inside':>8s} {'later':>8s} {'KV before':>10s} " \
             f"{'KV after':>10s} {'service':>9s}"
    print(header + "\n" + "-" * len(header))
    exact: dict[tuple[str, int | None], tuple[int, int]] = {}
    for method in METHODS:
        for budget in BUDGETS if method.policy != "full" else (None,):
            asked_budget = keepset.Budget.tokens(budget or context.prefill.seq_len)
            inside = job.run_inside(client, model, prompts, asked, method.policy, asked_budget,
                                    **method.spec)
            later = job.run_later(client, model, context, asked, method.policy, asked_budget,
                                  **method.spec)
            exact[method.label, budget] = (inside.exact, later.exact)
            count = inside.operations
            print(f"{method.label:14s} {budget or 'all':>6} {inside.exact / inside.questions:8.2f} "
                  f"{later.exact / later.questions:8.2f} {inside.bytes_before / count / 1024:7.0f} KiB "
                  f"{inside.bytes_after / count / 1024:7.0f} KiB "
                  f"{1e3 * inside.service_seconds / count:6.2f} ms")
    gains = [tuple(a - b for a, b in zip(exact["compilerkv", budget], exact["  uniform", budget]))
             for budget in BUDGETS]
    print(f"The compiled table against the uniform one, right answers of {len(asked)} more or fewer at "
          f"budgets {', '.join(map(str, BUDGETS))}: inside "
          f"{', '.join(f'{inside:+d}' for inside, _ in gains)}; later "
          f"{', '.join(f'{later:+d}' for _, later in gains)}.")
    if not any(any(gain) for gain in gains):
        print("It gains nothing in this run.")
    print("So few questions prove nothing; docs/results/evidence.md has the intervals, and where a table "
          "can gain and where it cannot.")


def show_explanation(client, model, shared) -> None:
    result = job.compress(client, model, shared, "compilerkv", keepset.Budget.tokens(256),
                          **compilerkv(TABLE_NAME))
    assert result.table is not None
    print("\nOne decision explained (compilerkv, budget 256):")
    print(f"  outcome {result.outcome}, reason {result.reason}, scope {result.scope}, "
          f"backend {result.backend}, transport {result.transport}")
    print(f"  entropy {result.entropy:.3f} nats -> bin {result.entropy_bin}; "
          f"perplexity {result.ppl:.2f} -> bin {result.ppl_bin}")
    for index, layer in enumerate(result.layers):
        one = layer.sets[0]
        print(f"  layer {index}: tau {layer.tau:.2f}, {one.candidates} candidates, "
              f"{len(one.indices)} kept, {one.filled} filled; first {one.indices[:6].tolist()}")
    print(f"  table {result.table.name} version {result.table.version} ({result.table.source})")
    print(f"        {result.table.digest}")
    print(f"  defaulted inputs: {result.defaulted_inputs or 'none'}; relaxed: {result.relaxed or 'none'}")
    print("  stages: " + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in result.stage_seconds.items()))
    result.release()


def version_of(result: keepset.Result) -> str:
    return result.table.version if result.table else ""


def wait_for_replies(seen: collections.Counter, version: str, timeout_seconds: float = 20.0) -> None:
    """Until 20 replies named the version, or the time is up."""
    deadline = time.monotonic() + timeout_seconds
    while seen[version] < 20 and time.monotonic() < deadline:
        time.sleep(0.005)


def show_reload(client, server, model, compiled: bytes, shared) -> None:
    """Swaps the table file while requests run; every reply must name exactly one of the versions."""
    seen: collections.Counter = collections.Counter()
    failures: list[str] = []
    stop = threading.Event()

    def load() -> None:
        with keepset.Client.connect(server.address) as own:
            mine = job.share(own, shared.prefill)
            while not stop.is_set():
                try:
                    result = job.compress(own, model, mine, "compilerkv", keepset.Budget.tokens(256),
                                          **compilerkv(TABLE_NAME))
                except keepset.KeepsetError as error:
                    failures.append(str(error))
                    continue
                seen[version_of(result)] += 1
                result.release()

    worker = threading.Thread(target=load)
    worker.start()
    wait_for_replies(seen, "1")
    publish(server, TABLE_NAME, stricter(compiled, model))
    wait_for_version(client, "2")
    result = job.compress(client, model, shared, "compilerkv", keepset.Budget.tokens(256),
                          **compilerkv(TABLE_NAME))
    wait_for_replies(seen, "2")
    stop.set()
    worker.join()
    print(f"\nTable swapped while requests ran: {dict(sorted(seen.items()))} replies by version, "
          f"{len(failures)} failed.")
    print(f"  the next reply: version {version_of(result)}, tau {result.layers[0].tau:.2f}, "
          f"{result.table.digest if result.table else ''}")
    result.release()


def show_metrics(server: ServerProcess) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    print(f"\nFrom {server.metrics_url}:")
    for line in lines:
        if line.startswith(METRIC_LINES) and not line.endswith(" 0"):
            print("  " + line)


if __name__ == "__main__":
    main()
