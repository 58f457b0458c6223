#!/usr/bin/env bash
# Runs the GPU tests and the benchmark of this bundle, and writes OUTDIR/gpu-report.json and
# OUTDIR/gpu-report.txt (the table), with the logs beside them. Both are written again after each
# phase, so that a run that is cut off leaves what it has.
#
#   ./run-gpu-checks.sh OUTDIR [--quick]
#
# Needs an NVIDIA driver, bash and coreutils. PyTorch, cuBLAS (of the system or of Python packages) and
# compute-sanitizer are used where they are. Exit codes: 0 every test passed, 1 a test or the benchmark
# failed, 2 usage, 3 no device: nothing was checked, and the report says so. KEEPSET_TEST_SEED: the seed
# of the tests' and benchmarks' data, else a fresh one, which the report names.
set -uo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ $# -eq 2 ] && [ "$2" != --quick ]; }; then
  echo "usage: $0 OUTDIR [--quick]" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! { mkdir -p "$1" && out=$(cd "$1" && pwd) && [ -w "$out" ]; }; then
  echo "$0: cannot write to $1" >&2
  exit 2
fi
quick=(${2:+"$2"})
report=$out/gpu-report.json
built_from=$(cat "$here/COMMIT")
unmeasured='"not yet measured"'

# What an earlier run left must not be taken for this one's.
rm -f "$out"/{bench,service,peers,checks,exporter,targets}.jsonl "$out"/sanitizer-{mem,race,sync,init}check.log \
  "$out"/{probe,tests,ipc,exporter,bench,service,peers,targets,cuda_device_test,gpu_ipc_test,gpu_bench}.log \
  "$out/tests.json" "$report" "$out/gpu-report.txt"
# Copies over some media lose it.
chmod +x "$here"/bin/* "$here/lib/libc/ld-linux.so" 2>/dev/null

# Sockets lie in there, whose names have at most 107 characters.
if ! { [ -d "${TMPDIR:-/tmp}" ] && [ -w "${TMPDIR:-/tmp}" ]; }; then
  export TMPDIR=$out
fi

# The bundle's own libraries, for its own programs only: a Python or a tool of the system wants the
# system's. Where the system's C library is older than ours, that one too.
libraries=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
launch=()
LD_LIBRARY_PATH=$libraries "$here/bin/keepsetd" --version >/dev/null 2>&1 ||
  launch=("$here/lib/libc/ld-linux.so" --library-path "$here/lib/libc:$libraries")
# cuBLAS as a Python package brings it; the system's is found without.
cublas=$(python3 -c 'import glob, site, sys
for path in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
    for found in sorted(glob.glob(path + "/nvidia/*/lib/libcublas.so.1[23]")):
        print(found.rsplit("/", 1)[0])
        sys.exit()' 2>/dev/null)
limit=()
command -v timeout >/dev/null && limit=(timeout 1800)
run() {
  local program=$1
  shift
  LD_LIBRARY_PATH=$libraries${cublas:+:$cublas} KEEPSET_LAUNCHER="${launch[*]:-}" \
    ${limit[@]+"${limit[@]}"} ${launch[@]+"${launch[@]}"} "$here/bin/$program" "$@"
}

quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g')"; }
# Whole lines only: a program may end in the middle of one.
json_lines() { if [ -s "$1" ]; then grep -x '{.*}' "$1" | paste -sd, -; fi; }
# The lines of a phase, or that it has not run.
lines_of() { if [ -n "$1" ]; then printf '[%s]' "$(json_lines "$2")"; else printf '%s' "$unmeasured"; fi; }
number() { if [ -n "$1" ]; then printf '%d' "$1"; else printf '%s' "$unmeasured"; fi; }

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$driver" ] || driver=$(grep -oE '[0-9]{3}\.[0-9.]+' /proc/driver/nvidia/version 2>/dev/null | head -n 1)
device=null
reason=
programs=()
tests='' ipc='' exporter='' bench='' service='' peers=''
sanitizer=$unmeasured
write_report() {
  run gpu_bench targets "$out" >"$out/targets.jsonl" 2>"$out/targets.log"
  {
    printf '{"built_from": %s, "device": %s, ' "$(quoted "$built_from")" "$device"
    if [ -n "$reason" ]; then
      printf '"reason": %s, "programs": {%s}, ' "$(quoted "$reason")" "$(IFS=,; echo "${programs[*]}")"
    fi
    printf '"driver": %s, "kernel": %s, "date": %s, ' "$(quoted "$driver")" \
      "$(quoted "$(uname -r)")" "$(quoted "$(date -u +%Y-%m-%dT%H:%M:%SZ)")"
    printf '"seed": %s, ' "$(quoted "${KEEPSET_TEST_SEED:-}")"
    printf '"tests_exit": %s, "ipc_exit": %s, ' "$(number "$tests")" "$(number "$ipc")"
    printf '"exporter_exit": %s, "exporter": %s, ' "$(number "$exporter")" \
      "$(lines_of "$exporter" "$out/exporter.jsonl")"
    printf '"bench_exit": %s, "bench": %s, ' "$(number "$bench")" "$(lines_of "$bench" "$out/bench.jsonl")"
    printf '"service_exit": %s, "service": %s, ' "$(number "$service")" \
      "$(lines_of "$service" "$out/service.jsonl")"
    printf '"peers_exit": %s, "peers": %s, ' "$(number "$peers")" "$(lines_of "$peers" "$out/peers.jsonl")"
    printf '"sanitizer": %s, "targets": [%s]}\n' "$sanitizer" "$(json_lines "$out/targets.jsonl")"
  } >"$report"
  {
    echo "built from $built_from"
    if [ -n "$reason" ]; then echo "not yet measured: $reason"; fi
    echo "exit codes: tests ${tests:--}, two processes ${ipc:--}, Python's exporter ${exporter:--}, benchmark ${bench:--}," \
      "service ${service:--}, peers ${peers:--}; compute-sanitizer: $sanitizer;" \
      "KEEPSET_TEST_SEED=${KEEPSET_TEST_SEED:--}"
    cat "$out/bench.log" "$out/service.log" "$out/peers.jsonl" "$out/peers.log" 2>/dev/null
    cat "$out/targets.log"
  } >"$out/gpu-report.txt"
}

if ! found=$(run gpu_bench --probe 2>"$out/probe.log"); then
  reason=$(tail -n 1 "$out/probe.log")
  # The other programs must say the same, so that a bundle that cannot start is not taken for a host
  # without a device.
  for program in cuda_device_test gpu_ipc_test 'gpu_bench service'; do
    log=$out/${program%% *}.log
    # Two words are a program and its argument.
    # shellcheck disable=SC2086
    run $program >"$log" 2>&1
    code=$?
    if grep -q 'no device' "$log"; then
      programs+=("\"$program\": \"no device\"")
    else
      programs+=("\"$program\": \"did not run, exit $code\"")
      reason="$reason; $program did not run"
    fi
  done
  write_report
  cat "$out/gpu-report.txt"
  exit 3
fi
device=$found
echo "$device"
export KEEPSET_TEST_SEED=${KEEPSET_TEST_SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
echo "KEEPSET_TEST_SEED=$KEEPSET_TEST_SEED"
failed=0
write_report

# Tests that were all skipped have shown nothing.
check() {
  if grep -qE '^\[  PASSED  \] [1-9]' "$3" || [ "$2" -ne 0 ]; then
    printf '{"check": "%s", "exit": %d}\n' "$1" "$2"
  else
    printf '{"check": "%s", "skipped": "no test passed"}\n' "$1"
  fi >>"$out/checks.jsonl"
}

echo "== tests"
run cuda_device_test --gtest_output="json:$out/tests.json" >"$out/tests.log" 2>&1
tests=$?
tail -n 3 "$out/tests.log"
[ $tests -eq 0 ] || failed=1
check tests $tests "$out/tests.log"
write_report

echo "== two processes and keepsetd"
KEEPSET_IPC_TEST=$here/bin/gpu_ipc_test KEEPSET_KEEPSETD=$here/bin/keepsetd \
  run gpu_ipc_test >"$out/ipc.log" 2>&1
ipc=$?
tail -n 3 "$out/ipc.log"
[ $ipc -eq 0 ] || failed=1
check ipc $ipc "$out/ipc.log"
write_report

echo "== exporter of the Python package"
python3 "$here/exporter_check.py" >"$out/exporter.jsonl" 2>"$out/exporter.log"
exporter=$?
grep -v '"passed": true' "$out/exporter.jsonl"
tail -n 1 "$out/exporter.log"
# Without Python there is nothing to check.
[ $exporter -eq 0 ] || ! command -v python3 >/dev/null || failed=1
write_report

echo "== benchmark"
run gpu_bench ${quick[@]+"${quick[@]}"} >"$out/bench.jsonl" 2>"$out/bench.log"
bench=$?
[ $bench -eq 0 ] || failed=1
write_report

echo "== service and interference"
run gpu_bench service --keepsetd "$here/bin/keepsetd" ${quick[@]+"${quick[@]}"} \
  >"$out/service.jsonl" 2>"$out/service.log"
service=$?
[ $service -eq 0 ] || failed=1
write_report

echo "== peers"
python3 "$here/peers.py" ${quick[@]+"${quick[@]}"} >"$out/peers.jsonl" 2>"$out/peers.log"
peers=$?
write_report

# Last, because it takes long; the largest shapes take it too long.
if command -v compute-sanitizer >/dev/null; then
  results=()
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== compute-sanitizer $tool"
    # Poisoned memory would count as written.
    unpoisoned=()
    if [ "$tool" = initcheck ]; then unpoisoned=(KEEPSET_UNPOISONED=1); fi
    env "LD_LIBRARY_PATH=$libraries${cublas:+:$cublas}" ${unpoisoned[@]+"${unpoisoned[@]}"} ${limit[@]+timeout 600} \
      compute-sanitizer --tool "$tool" --error-exitcode 9 \
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
    sanitizer="{$(IFS=,; echo "${results[*]}")}"
    write_report
  done
fi
cat "$out/gpu-report.txt"
exit $failed
