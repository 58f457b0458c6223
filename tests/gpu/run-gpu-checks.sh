#!/usr/bin/env bash
# Runs the GPU tests and the benchmark of this bundle, and writes OUTDIR/gpu-report.json and
# OUTDIR/gpu-report.txt (the table), with the logs beside them.
#
#   ./run-gpu-checks.sh OUTDIR [--quick]
#
# Exit codes: 0 every test passed, 1 a test or the benchmark failed, 2 usage, 3 no device: nothing was
# checked, and the report says so. KEEPSET_TEST_SEED: the seed of the tests' and benchmarks' data, else
# a fresh one, which the report names.
set -uo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# -eq 2 ] && [ "$2" != --quick ]; }; then
  echo "usage: $0 OUTDIR [--quick]" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1
quick=${2:-}
mkdir -p "$out" || exit 2
report=$out/gpu-report.json
built_from=$(cat "$here/COMMIT")

# The bundle's own libraries; where the system's C library is older than ours, that one too.
export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
launch=()
"$here/bin/keepsetd" --version >/dev/null 2>&1 ||
  launch=("$here/lib/libc/ld-linux.so" --library-path "$here/lib/libc:$LD_LIBRARY_PATH")
run() {
  local program=$1
  shift
  ${launch[@]+"${launch[@]}"} "$here/bin/$program" "$@"
}

quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g')"; }
json_lines() { if [ -s "$1" ]; then paste -sd, "$1"; fi; }

# What an earlier run left must not be taken for this one's figures.
rm -f "$out"/{bench,service,peers,checks,targets}.jsonl "$out"/{bench,service,peers,targets}.log
targets() { run gpu_bench targets "$out" >"$out/targets.jsonl" 2>"$out/targets.log"; }

device=$(run gpu_bench --probe 2>"$out/probe.log")
probe=$?
if [ $probe -ne 0 ]; then
  reason=$(tail -n 1 "$out/probe.log")
  # The other programs must say the same, so that a bundle that cannot start is not taken for a host
  # without a device.
  programs=()
  for program in cuda_device_test gpu_ipc_test 'gpu_bench service'; do
    log=$out/${program%% *}.log
    run $program >"$log" 2>&1
    code=$?
    if grep -q 'no device' "$log"; then
      programs+=("\"$program\": \"no device\"")
    else
      programs+=("\"$program\": \"did not run, exit $code\"")
      reason="$reason; $program did not run"
    fi
  done
  printf '{"built_from": %s, "device": null, "reason": %s, "programs": {%s}, ' \
    "$(quoted "$built_from")" "$(quoted "$reason")" "$(IFS=,; echo "${programs[*]}")" >"$report"
  printf '"tests": "not yet measured", "ipc": "not yet measured", "sanitizer": "not yet measured", ' >>"$report"
  printf '"exporter": "not yet measured", ' >>"$report"
  printf '"bench": "not yet measured", "service": "not yet measured", "peers": "not yet measured", ' >>"$report"
  targets
  printf '"targets": [%s]}\n' "$(json_lines "$out/targets.jsonl")" >>"$report"
  {
    echo "not yet measured: $reason"
    cat "$out/targets.log"
  } | tee "$out/gpu-report.txt"
  exit 3
fi
echo "$device"
export KEEPSET_TEST_SEED=${KEEPSET_TEST_SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
echo "KEEPSET_TEST_SEED=$KEEPSET_TEST_SEED"
failed=0

echo "== tests"
run cuda_device_test --gtest_output="json:$out/tests.json" >"$out/tests.log" 2>&1
tests=$?
tail -n 3 "$out/tests.log"
[ $tests -eq 0 ] || failed=1

# Where the tool is installed and takes the device; the largest shapes take it too long.
sanitizer='null'
if command -v compute-sanitizer >/dev/null; then
  results=()
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== compute-sanitizer $tool"
    # Poisoned memory would count as written.
    unpoisoned=()
    if [ "$tool" = initcheck ]; then unpoisoned=(env KEEPSET_UNPOISONED=1); fi
    ${unpoisoned[@]+"${unpoisoned[@]}"} timeout 600 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      ${launch[@]+"${launch[@]}"} "$here/bin/cuda_device_test" \
      --gtest_filter='-*Large*:*LongRows*:CudaFixture.NewMemoryIsPoisoned' >"$out/sanitizer-$tool.log" 2>&1
    code=$?
    tail -n 2 "$out/sanitizer-$tool.log"
    case $code in
      0) results+=("\"$tool\": \"clean\"") ;;
      9) results+=("\"$tool\": \"errors\"") && failed=1 ;;
      124) results+=("\"$tool\": \"timed out\"") ;;
      *) results+=("\"$tool\": \"did not run, exit $code\"") ;;
    esac
  done
  sanitizer="{$(IFS=,; echo "${results[*]}")}"
fi

echo "== two processes and keepsetd"
KEEPSET_LAUNCHER="${launch[*]:-}" KEEPSET_IPC_TEST=$here/bin/gpu_ipc_test \
  KEEPSET_KEEPSETD=$here/bin/keepsetd run gpu_ipc_test >"$out/ipc.log" 2>&1
ipc=$?
tail -n 3 "$out/ipc.log"
[ $ipc -eq 0 ] || failed=1

echo "== exporter of the Python package"
python3 "$here/exporter_check.py" >"$out/exporter.jsonl" 2>"$out/exporter.log"
exporter=$?
grep -v '"passed": true' "$out/exporter.jsonl"
tail -n 1 "$out/exporter.log"
[ $exporter -eq 0 ] || failed=1

echo "== benchmark"
run gpu_bench $quick >"$out/bench.jsonl" 2>"$out/bench.log"
bench=$?
[ $bench -eq 0 ] || failed=1

echo "== service and interference"
KEEPSET_LAUNCHER="${launch[*]:-}" run gpu_bench service --keepsetd "$here/bin/keepsetd" $quick \
  >"$out/service.jsonl" 2>"$out/service.log"
service=$?
cat "$out/service.log"
[ $service -eq 0 ] || failed=1

echo "== peers"
python3 "$here/peers.py" $quick >"$out/peers.jsonl" 2>"$out/peers.log"
peers=$?

# Tests that were all skipped have shown nothing.
check() {
  if grep -qE '^\[  PASSED  \] [1-9]' "$3" || [ "$2" -ne 0 ]; then
    printf '{"check": "%s", "exit": %d}\n' "$1" "$2"
  else
    printf '{"check": "%s", "skipped": "no test passed"}\n' "$1"
  fi
}
{
  check tests "$tests" "$out/tests.log"
  check ipc "$ipc" "$out/ipc.log"
} >"$out/checks.jsonl"
targets

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
{
  printf '{"built_from": %s, "device": %s, "driver": %s, "kernel": %s, "date": %s, ' \
    "$(quoted "$built_from")" "$device" "$(quoted "$driver")" "$(quoted "$(uname -r)")" \
    "$(quoted "$(date -u +%Y-%m-%dT%H:%M:%SZ)")"
  printf '"seed": %s, ' "$(quoted "$KEEPSET_TEST_SEED")"
  printf '"tests_exit": %d, "ipc_exit": %d, "sanitizer": %s, "bench_exit": %d, "bench": [%s], ' \
    "$tests" "$ipc" "$sanitizer" "$bench" "$(json_lines "$out/bench.jsonl")"
  printf '"exporter_exit": %d, "exporter": [%s], ' "$exporter" "$(json_lines "$out/exporter.jsonl")"
  printf '"service_exit": %d, "service": [%s], ' "$service" "$(json_lines "$out/service.jsonl")"
  printf '"peers_exit": %d, "peers": [%s], ' "$peers" "$(json_lines "$out/peers.jsonl")"
  printf '"targets": [%s]}\n' "$(json_lines "$out/targets.jsonl")"
} >"$report"
{
  echo "built from $built_from"
  echo "tests: exit $tests; two processes: exit $ipc; Python's exporter: exit $exporter"
  echo "compute-sanitizer: $sanitizer; KEEPSET_TEST_SEED=$KEEPSET_TEST_SEED"
  cat "$out/bench.log" "$out/service.log"
  echo "peers (exit $peers):"
  cat "$out/peers.jsonl"
  echo "targets:"
  cat "$out/targets.log"
} | tee "$out/gpu-report.txt"
exit $failed
