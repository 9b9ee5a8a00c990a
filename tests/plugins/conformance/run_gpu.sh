#!/usr/bin/env bash
# Runs the conformance grid on this machine's GPU and then a small subset under compute-sanitizer. Builds nothing.
#
# Usage: run_gpu.sh RESULTS_DIR          (beside the files that prepare_conformance.py wrote)
# Writes conformance.jsonl, columns.jsonl (the kernels' library), conformance_v2.jsonl (the TensorRT 8 library, where it was prepared), memcheck.txt, racecheck.txt, initcheck.txt and summary.txt into RESULTS_DIR.
# Exit code 0: everything passed; 1: a check failed; 3: the grid passed but compute-sanitizer cannot run here.
set -uo pipefail

results=${1:?usage: run_gpu.sh RESULTS_DIR}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$results"
summary=$results/summary.txt
: >"$summary"
chmod +x "$here/conformance" 2>/dev/null
status=0

note() { echo "$*" | tee -a "$summary"; }

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null | sed 's/^/gpu: /' | tee -a "$summary"

required=()
for tactic in $(cat "$here/required_tactics"); do required+=(--require-tactic "$tactic"); done
"$here/conformance" "$here/libhstu_trt_plugin_vc.so" "$here" "${required[@]}" >"$results/conformance.jsonl" 2>"$results/conformance.err"
code=$?
note "grid: exit $code, $(tail -n 1 "$results/conformance.jsonl")"
[ $code -eq 0 ] || status=1

chmod +x "$here/columns" 2>/dev/null
"$here/columns" "$here/libhstu_attention_kernels.so" "$here" >"$results/columns.jsonl" 2>>"$results/conformance.err"
code=$?
note "columns of wider tensors: exit $code, $(tail -n 1 "$results/columns.jsonl")"
[ $code -eq 0 ] || status=1

if [ -f "$here/v2/conformanceV2" ]; then
    chmod +x "$here/v2/conformanceV2" 2>/dev/null
    # The folder's stand-in for libnvinfer.so.8 is for this one program only.
    LD_LIBRARY_PATH=$here/v2${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$here/v2/conformanceV2" "$here/tensorrt85/libhstu_trt_plugin.so" "$here" --filter large- \
        >"$results/conformance_v2.jsonl" 2>>"$results/conformance.err"
    code=$?
    note "TensorRT 8 library: exit $code, $(tail -n 1 "$results/conformance_v2.jsonl")"
    [ $code -eq 0 ] || status=1
fi

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)}
if [ -z "$sanitizer" ]; then
    note "sanitizer: compute-sanitizer was not found; set COMPUTE_SANITIZER to its path"
    [ $status -ne 0 ] || status=3
    exit $status
fi

# One case of each kind: every tool slows a kernel down by one to two orders of magnitude.
subset=(causal targets-hostile delta-all research large-window large-many-tiles garbage-tail q-offsets k-offsets no-sequences norm-concat-rows norm-swish large-norm-layer large-norm-width-8192)
for tool in memcheck racecheck initcheck; do
    log=$results/$tool.txt
    : >"$log"
    verdict=clean
    for filter in "${subset[@]}"; do
        echo "== $tool --filter $filter" >>"$log"
        timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 99 \
            "$here/conformance" "$here/libhstu_trt_plugin_vc.so" "$here" --filter "$filter" --repeat 2 >>"$log" 2>&1
        code=$?
        if ! grep -q "SUMMARY" <(sed -n "/== $tool --filter $filter/,\$p" "$log"); then
            verdict="did not run (exit $code)"
            break
        elif [ $code -ne 0 ]; then
            verdict="findings (exit $code at $filter)"
        fi
    done
    note "$tool: $verdict, $(grep -c 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$log") of ${#subset[@]} filters clean"
    case $verdict in
        clean) ;;
        did*) [ $status -ne 0 ] || status=3 ;;
        *) status=1 ;;
    esac
done
exit $status
