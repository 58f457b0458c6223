"""run-gpu-checks.sh over programs that only say what those of a bundle say."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "run-gpu-checks.sh"

BENCH = """#!/bin/sh
case "$1" in
  --probe) echo '{"bench": "device", "name": "a card"}' ;;
  targets)
    for file in bench service peers checks; do
      if [ -e "$2/$file.jsonl" ]; then echo "{\\"target\\": \\"$file\\"}"; fi
    done
    echo "the table" >&2
    ;;
  service) echo '{"bench": "service"}' ;;
  *)
    echo '{"bench": "select"}'
    printf '{"bench": "torn'
    exit 139
    ;;
esac
"""
NO_DEVICE = """#!/bin/sh
echo "cuda: no device: no driver" >&2
if [ "$1" = targets ]; then exit 0; fi
exit 3
"""
PASSES = """#!/bin/sh
echo '[       OK ] WindowParity.A (1 ms)'
echo '[       OK ] HopperParity.A (1 ms)'
echo "seed ${KEEPSET_TEST_SEED-fixed} deadline ${KEEPSET_TEST_DEADLINE_SECONDS-} filter $*"
echo '[  PASSED  ] 2 tests.'
"""
SKIPS = """#!/bin/sh
for name in A B; do
  echo "[ RUN      ] DeviceIpc.$name"
  echo 'tests/gpu/device_ipc_fixture.h:26: Skipped'
  echo 'no device: no "libcuda.so.1"'
done
echo '[  PASSED  ] 0 tests.'
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose programs find a device, in a folder with a space in its name."""
    root = tmp_path / "the bundle"
    (root / "bin").mkdir(parents=True)
    (root / "run-gpu-checks.sh").write_bytes(SCRIPT.read_bytes())
    (root / "COMMIT").write_text("abc\n")
    (root / "peers.py").write_text("print('{\"peer\": \"torch\"}')\n")
    (root / "exporter_check.py").write_text("import json\nprint(json.dumps({'passed': True}))\n")
    write(root, "keepsetd", "#!/bin/sh\nexit 0\n")
    write(root, "gpu_bench", BENCH)
    write(root, "cuda_device_test", PASSES)
    write(root, "gpu_ipc_test", SKIPS)
    return root


def write(root: Path, program: str, text: str) -> None:
    """A program without its executable bit, as some copies leave it."""
    (root / "bin" / program).write_text(text)


def run(root: Path, out: Path, *options: str, **environment: str) -> tuple[int, dict]:
    """Exit code and report."""
    tools = {"PATH": f"{root / 'tools'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(root / "run-gpu-checks.sh"), str(out), *options],
        env=os.environ | tools | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, json.loads((out / "gpu-report.json").read_text())


def test_program_that_dies_leaves_its_whole_lines(bundle: Path, tmp_path: Path) -> None:
    code, report = run(bundle, tmp_path / "out")
    assert code == 1
    assert report["bench_exit"] == 139
    assert report["bench"] == [{"bench": "select"}]
    assert report["service"] == [{"bench": "service"}]
    assert report["exporter"] == [{"passed": True}]
    assert report["peers"] == [{"peer": "torch"}]
    assert report["device"]["name"] == "a card"


def phases(report: dict) -> dict[str, dict]:
    return {line["check"]: line for line in report["phases"]}


def test_skipped_tests_are_a_failure_with_count_and_reason(bundle: Path, tmp_path: Path) -> None:
    code, report = run(bundle, tmp_path / "out", "--phases", "tests,ipc")
    assert code == 1
    assert report["tests_exit"] == 0
    assert report["ipc_exit"] == 1
    ipc = phases(report)["ipc"]
    assert ipc["skipped"] == "no test passed"
    assert ipc["skips"] == [{"count": 2, "reason": 'no device: no "libcuda.so.1"'}]
    assert phases(report)["tests"]["passed"] == 2


@pytest.mark.parametrize(("card", "code"), [("cuda/sm_90", 1), ("cuda/sm_86", 0)])
def test_hopper_without_a_test_of_its_kernels_has_failed(bundle: Path, tmp_path: Path, card: str, code: int) -> None:
    probe = f"echo '{{\"bench\":\"device\",\"backend\":\"{card}\"}}'"
    write(bundle, "gpu_bench", f"#!/bin/sh\nif [ \"$1\" = --probe ]; then {probe}; fi\n")
    write(bundle, "cuda_device_test", PASSES.replace("HopperParity", "SelectionParity"))
    ended, report = run(bundle, tmp_path / "out", "--phases", "tests")
    assert ended == code
    assert ("skipped" in phases(report)["tests"]) == bool(code)


def test_phases_of_several_calls_are_one_report(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(bundle, "gpu_ipc_test", PASSES)
    code, report = run(bundle, out, "--phases", "tests,ipc,exporter")
    assert (code, report["bench_exit"]) == (0, "not yet measured")
    code, report = run(bundle, out, "--phases", "bench,service")
    assert code == 1
    assert (report["tests_exit"], report["bench_exit"], report["service_exit"]) == (0, 139, 0)
    assert report["exporter"] == [{"passed": True}]
    code, report = run(bundle, out, "--phases", "sizes,peers", "--quick")
    assert code == 0
    assert (report["bench_exit"], report["sizes_exit"], report["peers_exit"]) == (139, 0, 0)
    assert [line["target"] for line in report["targets"]] == ["bench", "service", "peers", "checks"]
    assert "--gtest_filter=Sizes/*" in (out / "sizes.log").read_text()


def test_phase_that_runs_again_replaces_its_result(bundle: Path, tmp_path: Path) -> None:
    run(bundle, tmp_path / "out", "--phases", "tests,ipc")
    write(bundle, "gpu_ipc_test", PASSES)
    code, report = run(bundle, tmp_path / "out", "--phases", "ipc")
    assert code == 0
    assert [line["check"] for line in report["phases"]] == ["tests", "ipc"]
    assert report["ipc_exit"] == 0


def test_results_of_another_device_do_not_stay(bundle: Path, tmp_path: Path) -> None:
    run(bundle, tmp_path / "out", "--phases", "bench")
    write(bundle, "gpu_bench", BENCH.replace("a card", "another"))
    _, report = run(bundle, tmp_path / "out", "--phases", "tests")
    assert report["device"]["name"] == "another"
    assert report["bench"] == "not yet measured"


def test_phases_without_a_device_leave_the_report(bundle: Path, tmp_path: Path) -> None:
    _, before = run(bundle, tmp_path / "out", "--phases", "tests")
    write(bundle, "gpu_bench", NO_DEVICE)
    code, report = run(bundle, tmp_path / "out", "--phases", "bench")
    assert code == 3
    assert report == before


def test_device_that_does_not_start_is_a_failure(bundle: Path, tmp_path: Path) -> None:
    write(bundle, "gpu_bench", NO_DEVICE.replace("no device: no driver", "out of memory").replace("exit 3", "exit 1"))
    code, report = run(bundle, tmp_path / "out")
    assert code == 1
    assert "gpu_bench --probe ends with 1: cuda: out of memory" in report["reason"]


def test_program_that_does_not_end_is_stopped(bundle: Path, tmp_path: Path) -> None:
    (bundle / "peers.py").write_text("import signal\nsignal.pause()\n")
    code, report = run(bundle, tmp_path / "out", "--phases", "peers,exporter", "--limit", "1")
    assert code == 0
    assert report["peers_exit"] == 124
    assert report["exporter_exit"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "seed fixed"), (("--seed", "7"), "seed 7"), (("--seed", "fresh"), "seed ")],
)
def test_data_is_that_of_ci_unless_asked(bundle: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    _, report = run(bundle, tmp_path / "out", "--phases", "tests", *options)
    log = (tmp_path / "out" / "tests.log").read_text()
    assert said in log
    assert f"seed {report['seed']} " in log
    if "fresh" in options:
        assert int(report["seed"]) >= 0


def test_processes_are_waited_for_longer_than_in_ci(bundle: Path, tmp_path: Path) -> None:
    run(bundle, tmp_path / "out", "--phases", "tests")
    assert "deadline 90 " in (tmp_path / "out" / "tests.log").read_text()
    run(bundle, tmp_path / "out", "--phases", "tests", KEEPSET_TEST_DEADLINE_SECONDS="7")
    assert "deadline 7 " in (tmp_path / "out" / "tests.log").read_text()


@pytest.mark.parametrize(
    "options",
    [("--phases", "tests,none"), ("--phases",), ("--limit", "0"), ("--seed", "x"), ("--what",), ("second",)],
)
def test_words_that_mean_nothing_are_bad_usage(bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    command = ["bash", str(bundle / "run-gpu-checks.sh"), str(tmp_path / "out"), *options]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "OUTDIR [--quick]" in done.stderr


def test_host_without_a_device_has_measured_nothing(bundle: Path, tmp_path: Path) -> None:
    for program in ("gpu_bench", "cuda_device_test", "gpu_ipc_test"):
        write(bundle, program, NO_DEVICE)
    code, report = run(bundle, tmp_path / "out")
    assert code == 3
    assert report["device"] is None
    assert report["reason"] == "cuda: no device: no driver"
    assert set(report["programs"].values()) == {"no device"}
    for phase in ("tests_exit", "ipc_exit", "sizes_exit", "exporter", "bench", "bench_exit", "service", "peers", "sanitizer"):
        assert report[phase] == "not yet measured"


def test_bundle_that_cannot_start_is_not_taken_for_a_host_without_a_device(bundle: Path, tmp_path: Path) -> None:
    write(bundle, "gpu_bench", NO_DEVICE)
    write(bundle, "cuda_device_test", "#!/bin/sh\nexit 127\n")
    write(bundle, "gpu_ipc_test", NO_DEVICE)
    code, report = run(bundle, tmp_path / "out")
    assert code == 3
    assert report["programs"]["cuda_device_test"] == "did not run, exit 127"
    assert "cuda_device_test did not run" in report["reason"]


def test_results_of_an_earlier_run_are_gone_and_other_files_stay(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(bundle, out)
    (out / "notes.log").write_text("mine")
    for program in ("gpu_bench", "cuda_device_test", "gpu_ipc_test"):
        write(bundle, program, NO_DEVICE)
    _, report = run(bundle, out)
    assert report["targets"] == []
    assert not (out / "bench.jsonl").exists()
    assert (out / "notes.log").read_text() == "mine"


def test_tools_of_the_system_do_not_get_the_bundles_libraries(bundle: Path, tmp_path: Path) -> None:
    (bundle / "peers.py").write_text(
        "import json, os\nprint(json.dumps({'peer': os.environ.get('LD_LIBRARY_PATH', '')}))\n"
    )
    _, report = run(bundle, tmp_path / "out", LD_LIBRARY_PATH="")
    assert report["peers"] == [{"peer": ""}]


def test_peers_without_python_are_reported(bundle: Path, tmp_path: Path) -> None:
    tools = bundle / "tools"
    tools.mkdir()
    (tools / "python3").write_text("#!/bin/sh\nexit 127\n")
    (tools / "python3").chmod(0o755)
    _, report = run(bundle, tmp_path / "out")
    assert report["peers_exit"] == 127
    assert report["peers"] == []


def test_sanitizer_runs_where_it_is(bundle: Path, tmp_path: Path) -> None:
    tools = bundle / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(
        '#!/bin/sh\necho "$*"\ncase "$2$*" in racecheck*=-*) exit 9 ;; initcheck*) exit 1 ;; esac\n'
    )
    (tools / "compute-sanitizer").chmod(0o755)
    code, report = run(bundle, tmp_path / "out", "--phases", "memcheck,racecheck,synccheck,initcheck")
    # Only memcheck decides.
    assert code == 0
    assert report["sanitizer"] == {
        "memcheck": "clean",
        "racecheck": "errors",
        "synccheck": "clean",
        "initcheck": "did not run, exit 1",
    }


    log = (tmp_path / "out" / "sanitizer-initcheck.log").read_text()
    filters = [line.rsplit("=", 1)[1] for line in log.splitlines()]
    assert [one.split(":")[0] for one in filters] == ["-*Hopper*", "*Hopper*-*Large*"]
    assert all("*Cublas*" in one for one in filters)


def test_memory_errors_are_a_failure(bundle: Path, tmp_path: Path) -> None:
    tools = bundle / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text('#!/bin/sh\necho "$*"\nexit 9\n')
    (tools / "compute-sanitizer").chmod(0o755)
    code, report = run(bundle, tmp_path / "out", "--phases", "memcheck", "--filter", "Hopper*:WindowParity*")
    assert code == 1
    assert report["sanitizer"] == {"memcheck": "errors"}
    log = (tmp_path / "out" / "sanitizer-memcheck.log").read_text()
    assert log.count("--gtest_filter=Hopper*:WindowParity*") == log.count("--tool") == 1


def test_sanitizer_finds_the_cublas_of_a_python_package(bundle: Path, tmp_path: Path) -> None:
    library = tmp_path / "packages" / "nvidia" / "cublas" / "lib" / "libcublas.so.13"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    tools = bundle / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH"\n')
    (tools / "compute-sanitizer").chmod(0o755)
    run(bundle, tmp_path / "out", PYTHONPATH=str(tmp_path / "packages"), LD_LIBRARY_PATH="")
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        log = (tmp_path / "out" / f"sanitizer-{tool}.log").read_text()
        assert str(library.parent) in log.strip().split(":")


def test_folder_that_cannot_be_made_is_bad_usage(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(["bash", str(bundle / "run-gpu-checks.sh"), str(tmp_path / "file" / "out")], timeout=60)
    assert done.returncode == 2
