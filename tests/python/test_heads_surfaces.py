"""observation_heads in process, from a server and from the command line: the same answers, and the same typed
errors for bad tables and requests."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
import safetensors.numpy

import keepset
from keepset import table_file
from keepset.calibrate.head_prompts import KEY_NOVELTY, LAST_ROW, MAX_ROWS, MEAN_ROWS, PROBE_MAX
from keepset.calibrate.observation_heads import heads_table, with_curve
from keepset.in_process import EngineError
from keepset.registry import TableRegistry
from keepset.server_process import ServerProcess

from conftest import MODEL, SEQ_LEN, WINDOW, binary, random_layers, spec

PROBE = ("recall", "What was said?")
REFUSED = 3  # exit code of the command line

BAD_TABLES = {
    "a layer out of range": ([(3, 0, LAST_ROW, 1.0)], "element[0]=3, want a layer in 0..2"),
    "a negative layer": ([(-1, 0, LAST_ROW, 1.0)], "element[0]=-1, want a layer in 0..2"),
    "a head out of range": ([(0, 4, LAST_ROW, 1.0)], "element[1]=4, want a query head in 0..3"),
    "a KV head out of range": ([(0, 2, KEY_NOVELTY, 1.0)], "element[1]=2, want a KV head in 0..1"),
    "an observation twice": ([(1, 2, MAX_ROWS, 1.0), (1, 2, MAX_ROWS, 0.5)],
                             "layer 1 head 2 max_rows is listed twice"),
    "a negative weight": ([(0, 0, LAST_ROW, 1.0), (1, 0, LAST_ROW, -0.5)],
                          "element[1]=-0.5, want at least 0"),
    "no weight": ([(0, 0, LAST_ROW, 0.0), (1, 0, LAST_ROW, 0.0)], "want at least one above 0"),
    "rows of an absent probe": ([(0, 0, PROBE_MAX, 1.0)], "observation_heads.probe=(missing)"),
    "unknown rows": ([(0, 0, 6, 1.0)], "element[0]=6, want 0..5"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """Of a prompt of SEQ_LEN tokens; WINDOW rows are sent, `first_row` and those after it."""

    observations: list
    message: str
    code: str = "INVALID_ARGUMENT"
    parameters: dict = dataclasses.field(default_factory=dict)
    probe: tuple[str, str] | None = None
    left_out: int | None = None
    model: keepset.ModelFingerprint = MODEL  # of the table
    first_row: int = SEQ_LEN - WINDOW
    of_capture: str = ""  # message where the capture itself is refused: it has rows of the prompt alone

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.first_row, self.first_row + WINDOW)


BAD_REQUESTS = {
    "rows behind the prompt": Request(
        [(0, 0, MEAN_ROWS, 1.0)], "inside the prompt of 96 positions",
        parameters={"observe": f"{SEQ_LEN - 2}:{SEQ_LEN + 2}"}),
    "a row behind the prompt of a table without a probe": Request(
        [(0, 0, LAST_ROW, 1.0)], "names no probe", first_row=SEQ_LEN - 2,
        of_capture="row_positions: element[2]=96, want"),
    "no row of the prompt": Request(
        [(0, 0, PROBE_MAX, 1.0), (0, 1, LAST_ROW, 1.0)], "want at least one observed row of the prompt",
        parameters={"probe": "recall"}, probe=PROBE, first_row=SEQ_LEN,
        of_capture="row_positions: element[0]=96, want"),
    "a row that is not sent": Request(
        [(0, 0, MAX_ROWS, 1.0)], "position 0 is not among row_positions",
        parameters={"observe": "0:4"}),
    "no row of the probe": Request(
        [(0, 0, PROBE_MAX, 1.0)], "want rows of the probe", parameters={"probe": "recall"},
        probe=PROBE),
    "another probe": Request(
        [(0, 0, PROBE_MAX, 1.0)], "wants probe recall", "FAILED_PRECONDITION",
        parameters={"probe": "other"}, probe=PROBE),
    "a probe that the table does not name": Request(
        [(0, 0, LAST_ROW, 1.0)], "names no probe", "FAILED_PRECONDITION",
        parameters={"probe": "recall"}),
    "a layer that is not sent": Request(
        [(2, 0, LAST_ROW, 1.0)], "layer 2: not observed", "FAILED_PRECONDITION", left_out=2),
    "another model's table": Request(
        [(0, 0, LAST_ROW, 1.0)], "num_kv_heads", "FAILED_PRECONDITION",
        model=dataclasses.replace(MODEL, num_kv_heads=4)),
}
_NAMES = {one: f"table-{number}" for number, one in enumerate(BAD_REQUESTS)}


def _table(name: str, request: Request) -> bytes:
    return heads_table(request.model, name, request.observations, probe=request.probe)


def _run(build, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(build.keepset), *map(str, words)], capture_output=True, text=True,
                          check=False)


@pytest.fixture(scope="module")
def layers():
    return random_layers(3)


@pytest.fixture(scope="module")
def capture(tmp_path_factory, layers):
    path = tmp_path_factory.mktemp("capture") / "capture.safetensors"
    document = {"format": "keepset.capture", "model": MODEL.to_json(), "seq_len": SEQ_LEN,
                "window": WINDOW, "num_layers": MODEL.num_layers,
                "num_qo_heads": MODEL.num_qo_heads, "num_kv_heads": MODEL.num_kv_heads,
                "head_dim": MODEL.head_dim, "softmax_scale": MODEL.head_dim**-0.5,
                "spans": [{"name": "question", "begin": SEQ_LEN - 6, "end": SEQ_LEN - 2}]}
    tensors = {f"layers.{index}.{name}": getattr(layer, name)
               for index, layer in enumerate(layers) for name in ("q_window", "k", "v")}
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)}))
    return path


@pytest.fixture(scope="module")
def heads_server(tmp_path_factory):
    """With the tables of the bad requests, each under a name of its own."""
    tables = tmp_path_factory.mktemp("tables")
    for title, request in BAD_REQUESTS.items():
        table_file.write_atomically(tables / f"{_NAMES[title]}.safetensors",
                                    _table(_NAMES[title], request))
    with ServerProcess(binary(), tables=tables, arguments=["--table-writes"]) as running:
        yield running


@pytest.mark.parametrize("title", BAD_TABLES)
def test_a_bad_table_is_refused_in_process(engine, title):
    observations, message = BAD_TABLES[title]
    with pytest.raises(EngineError) as error:
        engine.input_needs(model=MODEL, policy="observation_heads",
                           table=heads_table(MODEL, "bad", observations))
    assert error.value.code == "INVALID_ARGUMENT" and message in error.value.message


@pytest.mark.parametrize("title", BAD_TABLES)
def test_a_bad_table_is_refused_by_a_server(heads_server, title):
    observations, message = BAD_TABLES[title]
    bad = heads_table(MODEL, "bad", observations)
    with TableRegistry.connect(heads_server.address) as tables:
        with pytest.raises(keepset.InvalidInput) as error:
            tables.load(bad)
        found = tables.validate(bad)
    assert message in error.value.message
    assert not found.valid and any(message in one.message for one in found.findings)


@pytest.mark.parametrize("title", BAD_TABLES)
def test_a_bad_table_is_refused_by_the_command_line(build, capture, tmp_path, title):
    observations, message = BAD_TABLES[title]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(heads_table(MODEL, "bad", observations))
    for words in (("tables", "validate", path), ("tables", "inspect", path),
                  ("compress", capture, "--policy", "observation_heads", "--table", path, "--budget",
                   24, "--out", tmp_path / "result")):
        done = _run(build, *words)
        assert done.returncode == REFUSED and message in done.stderr + done.stdout, done
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("title", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_process(engine, layers, title):
    request = BAD_REQUESTS[title]
    sent = {index: layer for index, layer in enumerate(layers) if index != request.left_out}
    with pytest.raises(EngineError) as error:
        engine.keep(model=MODEL, policy="observation_heads", layers=sent, seq_len=SEQ_LEN,
                    budget_tokens=24, softmax_scale=MODEL.head_dim**-0.5,
                    row_positions=request.rows, table=_table("heads", request),
                    parameters=request.parameters)
    assert error.value.code == request.code and request.message in error.value.message


@pytest.mark.parametrize("title", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_a_server(heads_server, layers, title):
    request = BAD_REQUESTS[title]
    sent = {index: layer for index, layer in enumerate(layers) if index != request.left_out}
    with keepset.Client.connect(heads_server.address) as client, pytest.raises(
            keepset.KeepsetError) as error:
        client.compress(layers=sent, **spec(
            policy="observation_heads", parameters=request.parameters, row_positions=request.rows.tolist(),
            table=keepset.TablePin(_NAMES[title])))
    assert error.value.code == request.code and request.message in error.value.message


@pytest.mark.parametrize("title", [one for one, request in BAD_REQUESTS.items()
                                   if request.left_out is None])
def test_a_bad_request_is_refused_by_the_command_line(build, capture, tmp_path, title):
    request = BAD_REQUESTS[title]
    path = tmp_path / "heads.safetensors"
    path.write_bytes(_table("heads", request))
    with safetensors.safe_open(capture, "numpy") as file:
        document, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    capture = tmp_path / "capture.safetensors"
    capture.write_bytes(safetensors.numpy.save(tensors | {"row_positions": request.rows}, metadata=document))
    parameters = [word for one in request.parameters.items() for word in ("--param", "=".join(one))]
    done = _run(build, "compress", capture, "--policy", "observation_heads", "--table", path,
                "--budget", 24, "--out", tmp_path / "result", *parameters)
    assert done.returncode == REFUSED and (request.of_capture or request.message) in done.stderr, done
    assert not (tmp_path / "result").exists()


def test_a_capture_without_a_layer_is_refused_by_the_command_line(build, capture, tmp_path):
    with safetensors.safe_open(capture, "numpy") as file:
        document = file.metadata()
        left = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("layers.2.")}
    path = tmp_path / "capture.safetensors"
    path.write_bytes(safetensors.numpy.save(left, metadata=document))
    table = tmp_path / "heads.safetensors"
    table.write_bytes(heads_table(MODEL, "heads", [(2, 0, LAST_ROW, 1.0)]))
    done = _run(build, "compress", path, "--policy", "observation_heads", "--table", table, "--budget", 24,
                "--out", tmp_path / "result")
    assert done.returncode == REFUSED and "layers.2." in done.stderr, done


def test_a_named_span_of_the_capture_observes(build, engine, capture, layers, heads_server, tmp_path):
    """By name on the command line, by positions everywhere else: the same set."""
    table = heads_table(MODEL, "spans", [(1, 2, MAX_ROWS, 1.0), (2, 3, MEAN_ROWS, 0.5)])
    path = tmp_path / "spans.safetensors"
    path.write_bytes(table)
    span = {"observe": f"{SEQ_LEN - 6}:{SEQ_LEN - 2}"}
    sent = dict(enumerate(layers))
    asked = {"model": MODEL, "policy": "observation_heads", "layers": sent, "seq_len": SEQ_LEN,
             "budget_tokens": 24, "softmax_scale": MODEL.head_dim**-0.5, "table": table,
             "row_positions": np.arange(SEQ_LEN - WINDOW, SEQ_LEN)}
    want = engine.keep(**asked, parameters=span).sets()[0]
    assert not np.array_equal(want, engine.keep(**asked).sets()[0])

    words = ("compress", capture, "--policy", "observation_heads", "--budget", 24, "--observe-span",
             "question", "--table", path)
    in_process = _run(build, *words, "--out", tmp_path / "result")
    assert in_process.returncode == 0, in_process
    with TableRegistry.connect(heads_server.address) as tables:
        tables.load(table)
        tables.activate("spans@1")
    served = _run(build, *words, "--server", heads_server.address, "--out", tmp_path / "served")
    assert served.returncode == 0, served
    for name in ("result", "served"):
        found = safetensors.numpy.load_file(tmp_path / name)["layers.0.keep_indices"]
        assert np.array_equal(found, want)
    with keepset.Client.connect(heads_server.address) as client:
        answer = client.compress(layers=layers, **spec(
            policy="observation_heads", parameters=span, table=keepset.TablePin("spans")))
    assert np.array_equal(answer.layers[0].keep_indices, want)


def test_the_risk_gate_answers_alike_everywhere(build, engine, capture, layers, heads_server, tmp_path):
    """More than the budget where the target needs it; the set and what is predicted of it, on every surface."""
    table = with_curve(heads_table(MODEL, "risky", [(1, 2, MEAN_ROWS, 1.0)]), [[0.0, 0.0], [1.0, 0.5]])[0]
    path = tmp_path / "risky.safetensors"
    path.write_bytes(table)
    gate = {"risk_target": "0.1", "risk_max_tokens": "80"}
    kept = engine.keep(
        model=MODEL, policy="observation_heads", seq_len=SEQ_LEN, budget_tokens=24, table=table,
        layers=dict(enumerate(layers)),
        softmax_scale=MODEL.head_dim**-0.5, row_positions=np.arange(SEQ_LEN - WINDOW, SEQ_LEN),
        parameters=gate)
    want = kept.sets()[0]
    assert 24 < len(want) < 80
    assert kept.predicted_miss_rate == pytest.approx(kept.outside_mass / 2) and kept.predicted_miss_rate <= 0.1

    with TableRegistry.connect(heads_server.address) as tables:
        tables.load(table)
        tables.activate("risky@1")
    with keepset.Client.connect(heads_server.address) as client:
        answer = client.compress(layers=layers, **spec(
            policy="observation_heads", parameters=gate, table=keepset.TablePin("risky")))
    assert np.array_equal(answer.layers[0].keep_indices, want)
    assert answer.outside_mass == kept.outside_mass
    assert answer.predicted_miss_rate == kept.predicted_miss_rate

    words = ("compress", capture, "--policy", "observation_heads", "--budget", 24, "--table", path, "--json",
             *(word for one in gate.items() for word in ("--param", "=".join(one))))
    # The command line is the C++ client's where it asks a server.
    for name, server in (("result", ()), ("served", ("--server", heads_server.address))):
        done = _run(build, *words, *server, "--out", tmp_path / name)
        assert done.returncode == 0, done
        told = json.loads(done.stdout)
        assert told["outside_mass"] == kept.outside_mass
        assert told["predicted_miss_rate"] == kept.predicted_miss_rate
        assert np.array_equal(safetensors.numpy.load_file(tmp_path / name)["layers.0.keep_indices"], want)


def test_the_command_line_inspects_and_compares_tables(build, tmp_path):
    paths = []
    for number, weight in enumerate((1.0, 0.25)):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(heads_table(
            MODEL, "heads", [(1, 2, MAX_ROWS, 1.0), (0, 1, KEY_NOVELTY, weight)], dilate=12))
    shown = json.loads(_run(build, "tables", "inspect", "--json", paths[0]).stdout)
    assert shown["kind"] == "observation_heads" and shown["observation_heads"]["dilate"] == 12
    assert shown["observations"] == [
        {"layer": 1, "head": 2, "rows": "max_rows", "weight": 1.0},
        {"layer": 0, "head": 1, "rows": "key_novelty", "weight": 1.0}]
    done = _run(build, "tables", "diff", *paths)
    assert "weight of layer 0 head 1 key_novelty: 1 -> 0.25" in done.stdout, done


def test_a_server_says_what_its_table_reads(heads_server):
    """TableService.Get and GetRequirements: layers, heads, rows, tensors, and the probe's text."""
    name = _NAMES["no row of the probe"]
    with TableRegistry.connect(heads_server.address) as tables:
        told = tables.get(f"{name}@1").requirements
    with keepset.Client.connect(heads_server.address) as client:
        needs = client.input_needs(model=MODEL, policy="observation_heads",
                                   table=keepset.TablePin(name))
    assert [one.layer for one in told.layers] == [one.layer for one in needs.layers] == [0]
    assert list(told.layers[0].qo_heads) == [0] and told.layers[0].queries and told.layers[0].keys
    assert not told.layers[0].values and told.probe_rows and not told.last_row
    assert (told.probe_name, told.probe_text) == needs.probe == PROBE
