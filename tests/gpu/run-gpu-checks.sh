#!/usr/bin/env bash
# Runs the GPU tests and the benchmark of this bundle, and writes OUTDIR/gpu-report.json and
# OUTDIR/gpu-report.txt (the table), with the logs beside them. Both are written again after each
# phase, so that a run that is cut off leaves what it has.
#
#   ./run-gpu-checks.sh OUTDIR [--quick] [--phases NAME,...] [--limit SECONDS] [--filter TESTS]
#                       [--seed fixed|fresh|NUMBER]
#
#   --quick    short prompts for the benchmarks and the peers
#   --phases   only these of: tests, ipc, sizes, exporter, bench, service, peers, memcheck,
#              racecheck, synccheck, initcheck. Files of other phases stay, and the report is of all
#              that are there, unless they are of another bundle or another device. Without: all,
#              but for sizes, which is a part of ipc; nothing of an earlier run stays.
#   --limit    seconds for each program (540); one that is stopped has exit code 124
#   --filter   which tests run under compute-sanitizer (gtest's syntax), in one run each tool.
#              Without: all small ones in two, those of Hopper's kernels in the second
#   --seed     of the tests' and benchmarks' data: fixed, as in CI; fresh, which the report names; or
#              a number. Without: KEEPSET_TEST_SEED, else fixed
#
# Needs an NVIDIA driver, bash, coreutils, grep and sed. Python, PyTorch, cuBLAS (of the system or of
# Python packages) and compute-sanitizer are used where they are. Exit codes: 0 every test passed, 1
# a test or the benchmark failed, or no test passed though there is a device, 2 usage, 3 no device:
# nothing was checked, and the report says so. Of compute-sanitizer memcheck alone decides: the
# others take copies of memory that nobody reads, and orders they cannot see, for errors.
set -uo pipefail
every=(tests ipc exporter bench service peers memcheck racecheck synccheck initcheck)
usage() {
  sed -n '/^#   .*run-gpu-checks/,/^#  *\[--seed/s/^# *//p' "${BASH_SOURCE[0]}" >&2
  if [ $# -gt 0 ]; then echo "$0: $1" >&2; fi
  exit 2
}
to='' phases=("${every[@]}") is_part='' quick=() most=540 filter='' seed=${KEEPSET_TEST_SEED:-fixed}
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=(--quick) ;;
    --phases | --limit | --filter | --seed)
      [ $# -gt 1 ] || usage "$1 wants a value"
      case $1 in
        --phases) IFS=, read -ra phases <<<"$2" && is_part=yes ;;
        --limit) most=$2 ;;
        --filter) filter=$2 ;;
        --seed) seed=$2 ;;
      esac
      shift
      ;;
    -*) usage "$1 is no option" ;;
    *)
      [ -z "$to" ] || usage "two directories"
      to=$1
      ;;
  esac
  shift
done
[ -n "$to" ] || usage
[ ${#phases[@]} -gt 0 ] || usage "--phases names none"
for phase in "${phases[@]}"; do
  [[ " ${every[*]} sizes " == *" $phase "* ]] || usage "phase '$phase', want some of: ${every[*]} sizes"
done
[[ $most =~ ^[1-9][0-9]*$ ]] || usage "--limit '$most', want seconds"
[[ $seed =~ ^(fixed|fresh|[0-9]+)$ ]] || usage "--seed '$seed', want fixed, fresh or a number"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! { mkdir -p "$to" && out=$(cd "$to" && pwd) && [ -w "$out" ]; }; then
  echo "$0: cannot write to $to" >&2
  exit 2
fi
report=$out/gpu-report.json
built_from=$(cat "$here/COMMIT")
unmeasured='"not yet measured"'
if [ "$seed" = fresh ]; then seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); fi
unset KEEPSET_TEST_SEED
if [ "$seed" != fixed ]; then export KEEPSET_TEST_SEED=$seed; fi
# Of a server: its CUDA comes up with every device of the host.
export KEEPSET_TEST_DEADLINE_SECONDS=${KEEPSET_TEST_DEADLINE_SECONDS:-90}

# What an earlier run left of a phase must not be taken for this one's.
forget() {
  local phase
  for phase in "$@"; do
    rm -f "$out/$phase".{jsonl,log} "$out/sanitizer-$phase.log"
    if [ -e "$out/checks.jsonl" ]; then
      sed -i "/^{\"check\": \"$phase\"/d" "$out/checks.jsonl"
    fi
  done
}
forget_all() {
  forget "${every[@]}" sizes
  rm -f "$out"/{checks,targets}.jsonl "$out"/{probe,targets,cuda_device_test,gpu_ipc_test,gpu_bench}.log \
    "$report" "$out/gpu-report.txt"
}
[ -n "$is_part" ] || forget_all
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
# A program that does not end when it is asked to is killed.
limit=(timeout --kill-after=10 "$most")
run() {
  local program=$1
  shift
  LD_LIBRARY_PATH=$libraries${cublas:+:$cublas} KEEPSET_LAUNCHER="${launch[*]:-}" \
    "${limit[@]}" ${launch[@]+"${launch[@]}"} "$here/bin/$program" "$@"
}

quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g')"; }
# Whole lines only: a program may end in the middle of one.
json_lines() { if [ -s "$1" ]; then grep -x '{.*}' "$1" | paste -sd, -; fi; }
# What the line of a phase says, or that it has not run.
check_of() { grep -s "^{\"check\": \"$1\"" "$out/checks.jsonl"; }
exit_of() {
  local code
  code=$(check_of "$1" | sed -n 's/.*"exit": \([0-9]*\).*/\1/p')
  printf '%s' "${code:-$unmeasured}"
}
lines_of() { if [ -n "$(check_of "$1")" ]; then printf '[%s]' "$(json_lines "$out/$1.jsonl")"; else printf '%s' "$unmeasured"; fi; }
sanitizer_of() {
  local tool said results=()
  for tool in memcheck racecheck synccheck initcheck; do
    said=$(check_of "$tool" | sed -n 's/.*"said": \("[^"]*"\).*/\1/p')
    if [ -n "$said" ]; then results+=("\"$tool\": $said"); fi
  done
  if [ ${#results[@]} -gt 0 ]; then printf '{%s}' "$(IFS=,; echo "${results[*]}")"; else printf '%s' "$unmeasured"; fi
}

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$driver" ] || driver=$(grep -oE '[0-9]{3}\.[0-9.]+' /proc/driver/nvidia/version 2>/dev/null | head -n 1)
device=null
reason=
programs=()
whose() { printf '{"built_from": %s, "device": %s, ' "$(quoted "$built_from")" "$device"; }
write_report() {
  local targets table
  table=$(mktemp "$out/table.XXXXXX")
  targets=$(run gpu_bench targets "$out" 2>"$table" | grep -x '{.*}' | paste -sd, -)
  {
    whose
    if [ -n "$reason" ]; then
      printf '"reason": %s, "programs": {%s}, ' "$(quoted "$reason")" "$(IFS=,; echo "${programs[*]}")"
    fi
    printf '"driver": %s, "kernel": %s, "date": %s, ' "$(quoted "$driver")" \
      "$(quoted "$(uname -r)")" "$(quoted "$(date -u +%Y-%m-%dT%H:%M:%SZ)")"
    printf '"seed": %s, "phases": [%s], ' "$(quoted "$seed")" "$(json_lines "$out/checks.jsonl")"
    printf '"tests_exit": %s, "ipc_exit": %s, "sizes_exit": %s, ' "$(exit_of tests)" "$(exit_of ipc)" "$(exit_of sizes)"
    for phase in exporter bench service peers; do
      printf '"%s_exit": %s, "%s": %s, ' $phase "$(exit_of $phase)" $phase "$(lines_of $phase)"
    done
    printf '"sanitizer": %s, "targets": [%s]}\n' "$(sanitizer_of)" "$targets"
  } >"$report"
  {
    echo "built from $built_from"
    if [ -n "$reason" ]; then echo "not yet measured: $reason"; fi
    cat "$out"/checks.jsonl "$out"/{bench,service}.log "$out"/peers.{jsonl,log} 2>/dev/null
    cat "$table"
  } >"$out/gpu-report.txt"
  rm -f "$table"
}

found=$(run gpu_bench --probe 2>"$out/probe.log")
probe=$?
if [ $probe -ne 0 ]; then
  reason=$(tail -n 1 "$out/probe.log")
  if [ -n "$is_part" ] && [ -e "$report" ]; then
    echo "$0: nothing was run, the report is as it was: ${reason:-gpu_bench --probe ends with $probe}" >&2
    if [ $probe -eq 3 ]; then exit 3; else exit 1; fi
  fi
  if [ $probe -ne 3 ]; then reason="gpu_bench --probe ends with $probe: $reason"; fi
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
  if [ $probe -eq 3 ]; then exit 3; else exit 1; fi
fi
device=$found
if [ -n "$is_part" ]; then
  if [ -e "$report" ] && [[ $(head -n 1 "$report") != "$(whose)"* ]]; then
    echo "what $out holds is of another bundle or another device, and goes" >&2
    forget_all
  fi
  forget "${phases[@]}"
fi
echo "$device"
echo "KEEPSET_TEST_SEED=$seed"
failed=0
write_report

# What a phase came to, as a line for the report. note NAME EXIT [MEMBERS]
note() { printf '{"check": "%s", "exit": %d, "seed": "%s"%s}\n' "$1" "$2" "$seed" "${3:+, $3}" >>"$out/checks.jsonl"; }
# Why tests were skipped, and how often, as gtest says it.
skips_of() {
  local count why list=()
  while read -r count why; do
    list+=("{\"count\": $count, \"reason\": $(quoted "$why")}")
  done < <(sed -n '/: Skipped$/{n;p}' "$1" | LC_ALL=C sort | uniq -c)
  printf '[%s]' "$(IFS=,; echo "${list[*]-}")"
}
# A phase of tests: tests that were all skipped have shown nothing, where there is a device.
test_phase() {
  local name=$1 log=$out/$1.log code=0 members
  shift
  echo "== $name"
  KEEPSET_IPC_TEST=$here/bin/gpu_ipc_test KEEPSET_KEEPSETD=$here/bin/keepsetd run "$@" >"$log" 2>&1 || code=$?
  tail -n 3 "$log"
  members="\"passed\": $(grep -c '^\[       OK \]' "$log"), \"skips\": $(skips_of "$log")"
  if ! grep -qE '^\[  PASSED  \] [1-9]' "$log"; then
    members+=', "skipped": "no test passed"'
  elif [ "$name" = tests ] && [[ $device =~ \"cuda/sm_90 ]] && ! grep -qE '^\[       OK \] .*Hopper' "$log"; then
    members+=', "skipped": "no test of Hopper kernels passed on an sm_90 device"'
  fi
  if [[ $code -eq 0 && $members == *'"skipped"'* ]]; then code=1; fi
  if [ $code -ne 0 ]; then failed=1; fi
  note "$name" $code "$members"
}
bench_phase() {
  local name=$1 code=0
  shift
  echo "== $name"
  run gpu_bench "$@" ${quick[@]+"${quick[@]}"} >"$out/$name.jsonl" 2>"$out/$name.log" || code=$?
  if [ $code -ne 0 ]; then failed=1; fi
  note "$name" $code
}
# compute-sanitizer TOOL over tests of a filter; its exit code.
sanitize() {
  local unpoisoned=()
  # Poisoned memory would count as written.
  if [ "$1" = initcheck ]; then unpoisoned=(KEEPSET_UNPOISONED=1); fi
  env "LD_LIBRARY_PATH=$libraries${cublas:+:$cublas}" ${unpoisoned[@]+"${unpoisoned[@]}"} "${limit[@]}" \
    compute-sanitizer --tool "$1" --error-exitcode 9 ${launch[@]+"${launch[@]}"} \
    "$here/bin/cuda_device_test" --gtest_filter="$2" >>"$out/sanitizer-$1.log" 2>&1
}
sanitizer_phase() {
  local tool=$1 tests code worst=0 said
  # The largest shapes take too long; cuBLAS is not ours to judge.
  local omitted='*Large*:*LongRows*:*Cublas*:CudaFixture.NewMemoryIsPoisoned'
  local filters=("-*Hopper*:$omitted" "*Hopper*-$omitted")
  if [ -n "$filter" ]; then filters=("$filter"); fi
  echo "== compute-sanitizer $tool"
  if ! command -v compute-sanitizer >/dev/null; then
    note "$tool" 127 '"said": "no compute-sanitizer"'
    return
  fi
  for tests in "${filters[@]}"; do
    code=0
    sanitize "$tool" "$tests" || code=$?
    # Errors that were found are more to say than that a run took too long.
    if [ $code -eq 9 ] || [ $worst -eq 0 ]; then worst=$code; fi
  done
  tail -n 2 "$out/sanitizer-$tool.log"
  case $worst in
    0) said=clean ;;
    9) said=errors ;;
    124 | 137) said='timed out' ;;
    *) said="did not run, exit $worst" ;;
  esac
  if [ "$tool" = memcheck ] && [ $worst -eq 9 ]; then failed=1; fi
  note "$tool" $worst "\"said\": \"$said\""
}

for phase in "${phases[@]}"; do
  code=0
  case $phase in
    tests) test_phase tests cuda_device_test ;;
    ipc) test_phase ipc gpu_ipc_test ;;
    sizes) test_phase sizes gpu_ipc_test --gtest_filter='Sizes/*' ;;
    exporter)
      echo "== exporter of the Python package"
      "${limit[@]}" python3 "$here/exporter_check.py" >"$out/exporter.jsonl" 2>"$out/exporter.log" || code=$?
      grep -v '"passed": true' "$out/exporter.jsonl"
      tail -n 1 "$out/exporter.log"
      # Without Python there is nothing to check.
      [ $code -eq 0 ] || ! command -v python3 >/dev/null || failed=1
      note exporter $code
      ;;
    bench) bench_phase bench ;;
    service) bench_phase service service --keepsetd "$here/bin/keepsetd" ;;
    peers)
      echo "== peers"
      "${limit[@]}" python3 "$here/peers.py" ${quick[@]+"${quick[@]}"} >"$out/peers.jsonl" 2>"$out/peers.log" || code=$?
      note peers $code
      ;;
    *) sanitizer_phase "$phase" ;;
  esac
  write_report
done
# Empty ones say nothing.
for log in "$out"/*.log; do [ -s "$log" ] || rm -f "$log"; done
cat "$out/gpu-report.txt"
exit $failed
