#!/usr/bin/env bash
# Every check and measurement that needs a GPU, as steps that run unattended. None stops at another's failure.
#
# Usage: job.sh JOB OUT STEP...      (JOB: what prepare_job.py made; results: one OUT/STEP.tar.gz per step, summary.txt)
# Ended by SIGTERM (timeout -k 15 LIMIT job.sh ...), it ends the step that runs, packs what that has left, and stops.
# Steps: kernels conformance trt85 rtx        correctness; `checks` runs these four at the same time
#        ranking                              packed, prefill and score engines, M-FALCON and the KV cache over them
#        fused                                bundles in segments: their RTX engines with our kernels between them
#        ranking-soak                         20,000 requests on the engines that ranking left in WORK
#        cpp-loader                           the C++ loader on the engines that trt85 and ranking left in WORK
#        cpp-loader-fused                     the C++ loader on bundles in segments, in TensorRT-RTX
#        triton                               a real tritonserver on the engines that these steps left in WORK
#        bench-m-falcon-peers                 the M-FALCON benchmark's references and its PyTorch peers
#        bench-m-falcon-engines               tests/bench/bench_m_falcon.py on the engines that ranking left in WORK
#        trt85-accuracy                       where float32 engines of TensorRT 8.5 lose accuracy, layer by layer
#        timing                               device times of the engines that trt85 and rtx left in WORK
#        bench-plugin bench-rtx bench-torch bench-native    tests/bench/bench_plugin.py; each alone on the GPU
#        bench-attention                      tests/bench/bench_attention.py; alone on the GPU
#        bench-end-to-end                     tests/bench/bench_end_to_end.py in both Pythons; alone on the GPU
#        profile-end-to-end                   its timelines, on what bench-end-to-end left in WORK
#        bench-products                       tests/bench/bench_rtx_products.py; alone on the GPU
#        quantised-rtx quantised-trt85        int8 and fp8 engines against their references
#        bench-calibration                    tests/bench/bench_calibration.py; alone on the GPU
# Environment:
#   TENSORRT85, RTX16  folders with an env.sh that puts TensorRT 8.5 (python3.10) or TensorRT-RTX on the paths
#   WORK               scratch folder that later calls find again (default JOB/work)
#   PYTHON             Python with torch and triton (default python3)
#   TORCH_BACKENDS     of bench-torch (default "triton eager")
#   HSTU_COMMIT        what the results are results of (default: the commit that the job folder was made from)
#   PEERS_BUDGET, ENGINES_BUDGET    seconds of the M-FALCON benchmark's two steps
#   M_FALCON_CASES     of bench-m-falcon-engines, such as "--n 4096 --m 256 1024"
#   KERNELS_OPTIONS    of run_kernels.py, such as --only-hopper
#   RANKING_OPTIONS    of run_ranking.py, such as "--bundles m_falcon-fp16 --parallel 3"
#   FUSED_OPTIONS      of run_fused.py, such as "--bundles dlrm-fp16-fused"
#   CPP_LOADER_OPTIONS of run_cpp_loader.py, such as "--bundles research-fp16 --soak-requests 1000"
#   CPP_FUSED_OPTIONS  of run_cpp_fused.py, likewise
#   TRITON_OPTIONS     of run_triton.py, such as "--bundles research-fp16 --load-requests 1000"
#   PEERS              folder with libmeta_hstu.so and libnvidia_hstu.so, attention kernels of others, if there are any
#   ATTENTION_OPTIONS  of bench_attention.py, such as "--cases bf16_* --backends ours meta_cutlass"
#   ATTENTION_BUDGET   its seconds
#   END_TO_END_CASES   of bench-end-to-end, such as "bf16_*" (default: all of the ranking model) or, which have to be named,
#                      "fp16_retrieval_*_pruned" and "fp16_grow_*"; of profile-end-to-end, one or several
#   END_TO_END_FAMILIES    what it measures, in this order (default below); END_TO_END_OPTIONS: more options of it
#   END_TO_END_BUDGET  seconds of the whole step, of which END_TO_END_AHEAD at most are for compiling ahead; default
#                      540 and 200. END_TO_END_BUILD: of building engines of TensorRT 8.5, 200. END_TO_END_TRITON=1 takes Meta's Triton attention from JOB/meta as well
#   ATTENTION_COMPILE  cases whose kernels of Meta's are compiled first, in parallel (default "bf16_*")
#   QUANTISED_OPTIONS  of run_quantised.py, such as "--bundles research-int8"
#   CALIBRATION_BACKENDS    of bench-calibration (default tensorrt-rtx; tensorrt is 8.5, which has no fp8)
#   CALIBRATION_OPTIONS     of bench_calibration.py, such as "--kinds fp16 int8"
#   CALIBRATION_BUDGET      seconds of each backend
#   BENCH_N, BENCH_DIMS, BENCH_BUDGET, NATIVE_N, NATIVE_DIMS, NATIVE_BUDGET    sizes of the benchmark; seconds
set -uo pipefail

usage="usage: job.sh JOB OUT STEP..."
job=$(realpath "${1:?$usage}") && mkdir -p "${2:?$usage}" && out=$(realpath "$2") || exit 2
shift 2
[ $# -gt 0 ] || { echo "$usage" >&2; exit 2; }
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${WORK:-$job/work}
python=${PYTHON:-python3}
TENSORRT85=${TENSORRT85:-} RTX16=${RTX16:-}
HSTU_COMMIT=${HSTU_COMMIT:-$(sed -n 's/.*"commit": "\(.*\)".*/\1/p' "$job/job.json")}
export HSTU_COMMIT
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 | sed 's/, /, driver /')
mkdir -p "$work"
summary=$work/summary.txt
: >"$summary"

# The packages as an installation lays them out, without pip. tests gets an __init__.py: a namespace package would lose
# to any other package of that name.
library=$work/library
rm -rf "$library"
mkdir -p "$library"
cp -r "$repository/hstu_compile" "$repository/tests" "$library/"
for package in model calibration plugins; do cp -r "$repository/$package" "$library/hstu_compile/"; done
for folder in tests tests/plugins tests/plugins/conformance; do : >"$library/$folder/__init__.py"; done
# The carried pure-Python packages come last, so that an interpreter's own win.
with_paths() { PYTHONPATH="$library${PYTHONPATH:+:$PYTHONPATH}:$job/site" "$@"; }

in_tensorrt85() (
    # shellcheck disable=SC1091
    source "${TENSORRT85:?set it to the folder of env.sh for TensorRT 8.5}/env.sh" && with_paths "$@"
)
in_rtx() (
    # shellcheck disable=SC1091
    source "${RTX16:?set it to the folder of env.sh for TensorRT-RTX}/env.sh" && with_paths "$@"
)

gpu_tests=$library/tests/gpu
for archive in "$job"/*.tar.gz "$job"/*.tar.xz "$job"-m_falcon/*.tar.gz "$job"-{end_to_end,retrieval}/*.tar.xz; do
    [ -e "$archive" ] && bash "$repository/tests/gpu/unpack.sh" "$archive" "$work/models"
done
for archive in "$job"-calibration/*.tar.gz; do
    [ -e "$archive" ] && bash "$repository/tests/gpu/unpack.sh" "$archive" "$work"
done
bench=$library/tests/bench/bench_plugin.py

kernels() { with_paths timeout 420 "$python" "$gpu_tests/run_kernels.py" "$job" "$1" --workers "${WORKERS:-10}" ${KERNELS_OPTIONS:-}; }
conformance() { timeout 420 bash "$job/conformance/run_gpu.sh" "$1"; }
trt85() { in_tensorrt85 timeout 540 python3.10 "$gpu_tests/run_tensorrt85.py" "$job" "$1"; }
trt85-accuracy() {
    in_tensorrt85 timeout 540 python3.10 "$gpu_tests/run_tensorrt85.py" "$job" "$1" --only-accuracy --parallel 4
}
# What the carried archives held, and what the M-FALCON steps share.
models=$work/models
engines=$work/ranking/engines
m_falcon=m_falcon-fp16
export TRITON_CACHE_DIR=$work/triton-kernels
peers() { with_paths timeout 540 "$python" "$library/tests/bench/m_falcon_peers.py" --meta-repo "$job/meta" "$@"; }
ranking() {
    local status=0
    # Compiling Meta's kernels needs processor time and next to no GPU; the engines' builds are waited for anyway.
    (peers --compile-kernels) >"$1/compile.txt" 2>&1 &
    local compiling=$!
    (cd "$library" && with_paths timeout 60 "$python" -m pytest -q -p no:cacheprovider -k gpu \
        --junitxml "$1/resident.xml" tests/unit/test_resident.py)
    in_tensorrt85 timeout 475 python3.10 "$gpu_tests/run_ranking.py" "$job" "$1" --models "$models" \
        --resident "$1/resident.xml" ${RANKING_OPTIONS:-} || status=1
    # Not part of what is shown here: without it the peers' step compiles by itself.
    wait "$compiling" || echo "Meta's kernels were not compiled: compile.txt says why"
    return $status
}
ranking-soak() {
    in_tensorrt85 timeout 540 python3.10 "$gpu_tests/run_ranking.py" "$job" "$1" --models "$models" --only-soak \
        --engines "$engines"
}
cpp-loader() {
    # One run of at most four minutes: every command inside has a limit of its own, and all share a budget.
    # shellcheck disable=SC2086
    in_tensorrt85 timeout 238 python3.10 "$gpu_tests/run_cpp_loader.py" "$job" "$1" --scratch "$work/cpp-loader-bundles" \
        --engines "$work/trt85/engines" "$engines" ${CPP_LOADER_OPTIONS:-}
}
cpp-loader-fused() {
    # shellcheck disable=SC2086
    in_rtx timeout 298 "$python" "$gpu_tests/run_cpp_fused.py" "$job" "$1" --models "$models" ${CPP_FUSED_OPTIONS:-}
}
triton() {
    local server=$work/tritonserver
    command -v xz >/dev/null || { echo "xz is missing here; tritonserver.tar.xz cannot be unpacked"; return 1; }
    bash "$repository/tests/gpu/unpack.sh" "$job/triton/tritonserver.tar.xz" "$server" || return 1
    # The script has 132 seconds and writes down what it found after each part.
    # shellcheck disable=SC2086
    PYTHONPATH=$server${PYTHONPATH:+:$PYTHONPATH} in_tensorrt85 timeout -k 3 142 python3.10 "$gpu_tests/run_triton.py" "$job" "$1" \
        --scratch "$work/triton-served" --engines "$work/trt85/engines" "$engines" "$work/cpp-loader-bundles/engines" \
        ${TRITON_OPTIONS:-}
}
bench-m-falcon-peers() {
    local status=0
    peers --parts "$1/fp16" --budget "${PEERS_BUDGET:-500}" || status=1
    # Meta's modules are made for bfloat16: what float16 gets wrong is measured in that.
    if grep -l '"status": "wrong result"' "$1"/fp16/meta_*.json >/dev/null; then
        peers --parts "$1/bf16" --dtype bf16 --budget "$((${PEERS_BUDGET:-500} - SECONDS + started))" || status=1
    fi
    return $status
}
bench-m-falcon-engines() {
    local references=$work/bench-m-falcon-peers/fp16
    # A machine on which the peers did not run has no references yet.
    # shellcheck disable=SC2086
    peers --parts "$references" --backends reference --budget 150 ${M_FALCON_CASES:-} || return 1
    in_tensorrt85 python3.10 "$library/tests/bench/bench_m_falcon.py" --parts "$1/fp16" --references "$references" \
        --bundle "$models/$m_falcon" --engines "$engines/$m_falcon" \
        --plugin-library "$job/plugin/libhstu_trt_plugin.so" --budget "$((${ENGINES_BUDGET:-500} - SECONDS + started))" ${M_FALCON_CASES:-}
}
fused() {
    # shellcheck disable=SC2086
    in_rtx timeout 480 "$python" "$gpu_tests/run_fused.py" "$job" "$1" --models "$models" ${FUSED_OPTIONS:-}
}
rtx() { in_rtx timeout 420 "$python" "$gpu_tests/run_rtx.py" "$job" "$1"; }
timing() {
    local status=0
    in_tensorrt85 timeout 120 python3.10 "$gpu_tests/run_tensorrt85.py" "$job" "$work/trt85" --only-timing || status=1
    in_rtx timeout 120 "$python" "$gpu_tests/run_rtx.py" "$job" "$work/rtx" --only-timing || status=1
    cp "$work"/trt85/*-timing.json "$work"/rtx/*-timing.json "$1"/
    return $status
}
bench_common() {
    local folder=$1
    shift
    "$@" "$bench" --parts "$folder/parts" --dims ${BENCH_DIMS:-128 64} --n ${BENCH_N:-256 1024 2048 4096 8192} \
        --budget "${BENCH_BUDGET:-280}" "${backends[@]}"
}
bench-plugin() {
    local backends=(--backends plugin --plugin-library "$job/plugin/libhstu_trt_plugin.so")
    bench_common "$1" in_tensorrt85 python3.10
    [ -z "$(grep -L '"status": "ok"' "$1"/parts/plugin-*.json)" ]
}
bench-torch() {
    local backends=(--backends ${TORCH_BACKENDS:-triton eager})
    bench_common "$1" with_paths "$python"
    # Long sequences run out of memory in eager PyTorch; those are rows, not failures.
    [ -z "$(find "$1/parts" -name 'triton-*.json' -exec grep -L '"status": "ok"' {} +)" ]
}
bench-rtx() {
    local backends=(--backends native_rtx)
    bench_common "$1" in_rtx "$python"
    # Long sequences are expected to be refused or to run out of memory.
    [ -n "$(grep -l '"status": "ok"' "$1"/parts/native_rtx-*.json)" ]
}
bench-native() {
    local backends=(--backends native_padded --group-seconds 200)
    BENCH_DIMS=${NATIVE_DIMS:-${BENCH_DIMS:-128 64}} BENCH_N=${NATIVE_N:-${BENCH_N:-256 1024 2048 4096 8192}} \
        BENCH_BUDGET=${NATIVE_BUDGET:-480} bench_common "$1" in_tensorrt85 python3.10
    # Without cuBLAS every one is refused: a row, and a failed step.
    [ -n "$(grep -l '"status": "ok"' "$1"/parts/native_padded-*.json)" ]
}

bench-attention() {
    local options=(--parts "$1/parts" --budget "${ATTENTION_BUDGET:-280}") name
    for name in meta nvidia; do
        [ -e "${PEERS:-}/lib${name}_hstu.so" ] && options+=("--$name-library" "$PEERS/lib${name}_hstu.so")
    done
    [ -d "$job/meta" ] && options+=(--meta-repo "$job/meta")
    # One word per option.
    set -f
    # Else each of an autotuner's candidates is compiled after the other, while the GPU waits.
    case " ${ATTENTION_OPTIONS:-} " in *" meta_triton"*)
        with_paths timeout 280 "$python" "$library/tests/bench/bench_attention.py" --compile-kernels \
            --meta-repo "$job/meta" --cases ${ATTENTION_COMPILE:-bf16_*} ;;
    esac
    # shellcheck disable=SC2086
    with_paths timeout 590 "$python" "$library/tests/bench/bench_attention.py" "${options[@]}" ${ATTENTION_OPTIONS:-}
    set +f
    # What others cannot do is a row; ours has to be right, and something has to be measured.
    [ -z "$(find "$1/parts" -name '*-ours*.json' -exec grep -l '"status": "\(wrong\|error\)' {} +)" ] &&
        [ -n "$(grep -rl '"status": "ok"' "$1/parts")" ]
}

# FOLDER BACKEND COMMAND...
quantised() {
    local folder=$1 backend=$2
    shift 2
    # Patterns of bundles are for the script, not for the shell; what COMMAND sources may have its own.
    set -f
    # shellcheck disable=SC2206
    local options=(${QUANTISED_OPTIONS:-})
    set +f
    "$@" "$gpu_tests/run_quantised.py" "$job" "$folder" --backend "$backend" "${options[@]}"
}
quantised-rtx() { quantised "$1" tensorrt-rtx in_rtx timeout 420 "$python"; }
quantised-trt85() { quantised "$1" tensorrt in_tensorrt85 timeout 540 python3.10; }
bench-calibration() {
    local status=0 backend limit=${CALIBRATION_BUDGET:-280}
    local command=("$library/tests/bench/bench_calibration.py" --run "$work/calibration" --out "$1/calibration.csv")
    for backend in ${CALIBRATION_BACKENDS:-tensorrt-rtx}; do
        # shellcheck disable=SC2086
        case $backend in
            tensorrt-rtx) in_rtx timeout "$limit" "$python" "${command[@]}" --backend "$backend" ${CALIBRATION_OPTIONS:-} ;;
            tensorrt) in_tensorrt85 timeout "$limit" python3.10 "${command[@]}" --backend "$backend" \
                --plugin "$job/plugin/libhstu_trt_plugin.so" ${CALIBRATION_OPTIONS:-} ;;
            *) echo "bench-calibration: there is no backend $backend"; false ;;
        esac || status=1
    done
    return $status
}

# The families of the end-to-end benchmark, each in the Python that has its runtime; max-autotune last, as it never ends.
end_to_end_families=${END_TO_END_FAMILIES:-reference eager ours_rtx_fused compile aoti ours_trt85_plugin compile_max_autotune}
export TORCHINDUCTOR_CACHE_DIR=$work/inductor
end_to_end() {
    local python_of=(with_paths "$python")
    case " $* " in
        *" ours_trt85_plugin"*) python_of=(in_tensorrt85 python3.10) ;;
        *" ours_rtx"*) python_of=(in_rtx "$python") ;;
    esac
    "${python_of[@]}" "$library/tests/bench/bench_end_to_end.py" --scratch "$work/end-to-end" --bundles "$end_to_end_bundles" \
        --plugin-library "$job/plugin/libhstu_trt_plugin.so" "${end_to_end_options[@]}" "$@"
}
end_to_end_setup() {
    local name
    # As they were carried, or as prepare_job.py left them beside the job.
    end_to_end_bundles=$models
    end_to_end_options=()
    for name in "$job"/libhstu_attention_kernels.so "$job"-end_to_end/libhstu_attention_kernels.so; do
        [ -e "$name" ] && end_to_end_options+=(--kernels "$name") && break
    done
    for name in meta nvidia; do
        [ -e "${PEERS:-}/lib${name}_hstu.so" ] && end_to_end_options+=("--$name-library" "$PEERS/lib${name}_hstu.so")
    done
    [ -n "${END_TO_END_TRITON:-}" ] && end_to_end_options+=(--meta-repo "$job/meta")
    set -f
    # shellcheck disable=SC2206
    [ -n "${END_TO_END_CASES:-}" ] && end_to_end_options+=(--cases $END_TO_END_CASES)
    # shellcheck disable=SC2206
    end_to_end_options+=(${END_TO_END_OPTIONS:-})
    set +f
}
# Whether a family is among those that are asked for.
end_to_end_has() { case " $end_to_end_families " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
bench-end-to-end() {
    local parts=$1/parts family building=() budget=${END_TO_END_BUDGET:-540} ahead=()
    end_to_end_setup
    mkdir -p "$parts"
    # Building engines for TensorRT-RTX needs processors alone; the references need next to none meanwhile.
    for family in ours_rtx_fused ours_rtx_native; do
        end_to_end_has "$family" || continue
        end_to_end --build --budget 240 --backends "$family" --workers 6 >"$1/build-$family.txt" 2>&1 &
        building+=($!)
    done
    if end_to_end_has reference; then end_to_end --parts "$parts" --backends reference --resume --budget 150; fi
    for family in compile aoti; do end_to_end_has "$family" && ahead+=("$family"); done
    [ ${#ahead[@]} -eq 0 ] || end_to_end --parts "$parts" --compile-ahead --budget "${END_TO_END_AHEAD:-200}" --workers 8 \
        --backends "${ahead[@]}"
    # Its builder times kernels on the GPU: nothing else may be timed meanwhile, and nothing is.
    end_to_end_has ours_trt85_plugin && end_to_end --build --budget "${END_TO_END_BUILD:-200}" --backends ours_trt85_plugin --workers 3 \
        >"$1/build-ours_trt85_plugin.txt" 2>&1
    for family in "${building[@]}"; do wait "$family" || echo "not every engine was built: build-*.txt says why"; done
    for family in $end_to_end_families; do
        [ "$family" = reference ] || end_to_end --parts "$parts" --backends "$family" --budget "$((budget - SECONDS + started))"
    done
    # What others cannot do is a row; ours has to be right, and something has to be measured.
    [ -z "$(find "$parts" -name '*-ours*.json' -exec grep -l '"status": "\(wrong\|error\)' {} +)" ] &&
        [ -n "$(grep -l '"status": "ok"' "$parts"/*-*.json)" ]
}
profile-end-to-end() {
    local parts=$work/bench-end-to-end/parts family status=0 name cases=${END_TO_END_CASES:?name the cases whose timelines are wanted}
    for name in $cases; do
        for family in $end_to_end_families; do
            case $family in reference | ours_trt85_plugin) continue ;; esac
            END_TO_END_CASES=$name end_to_end_setup
            end_to_end --parts "$parts" --profile "$name" --backends "$family" --out "$1" || status=1
        done
    done
    return $status
}

bench-products() { in_rtx timeout 280 "$python" "$library/tests/bench/bench_rtx_products.py" --out "$1/rtx_products.csv"; }

run_step() {
    local step=$1 folder=$work/$1 started=$SECONDS code
    mkdir -p "$folder"
    # From the scratch folder: in the repository, its own folders would be imported instead of the library. In a process
    # group of its own: who ends this script ends the step, and what it has measured by then is packed all the same.
    set -m
    (cd "$folder" && "$step" "$folder") >"$folder/log.txt" 2>&1 &
    local group=$!
    set +m
    # shellcheck disable=SC2064
    trap "stopped=1; kill -TERM -- -$group" TERM INT
    wait "$group"
    code=$?
    [ -n "$stopped" ] && wait "$group" 2>/dev/null
    printf '{"step": "%s", "exit_code": %d, "commit": "%s", "gpu": "%s", "date": "%s"}\n' "$step" "$code" \
        "$HSTU_COMMIT" "$gpu" "$(date -u +%F)" >"$folder/run.json"
    # Engines stay for later steps, and are too large to bring back; so are the graphs that they were built from, and
    # the requests and references that Polygraphy read.
    tar czf "$out/$step.tar.gz" -C "$work" --exclude='*.engine' --exclude='*.onnx' --exclude='feeds.json' \
        --exclude='eager.json' --exclude='altered.json' "$step"
    {
        echo "== $step: exit $code, $((SECONDS - started)) s"
        if [ -f "$folder/summary.txt" ]; then cat "$folder/summary.txt"; else tail -n 25 "$folder/log.txt"; fi
    } | cut -c 1-400 >"$folder/step-summary.txt"
    cat "$folder/step-summary.txt" >>"$summary"
    return $code
}

failed=0
# Set when somebody has ended this script: no further step is begun.
stopped=
for step in "$@"; do
    [ -z "$stopped" ] || break
    case $step in
        checks)
            pids=()
            for each in kernels conformance trt85 rtx; do run_step "$each" & pids+=($!); done
            for pid in "${pids[@]}"; do wait "$pid" || failed=$((failed + 1)); done
            ;;
        kernels | conformance | trt85 | trt85-accuracy | rtx | fused | timing | ranking | ranking-soak | cpp-loader | cpp-loader-fused | triton | bench-plugin | \
            bench-rtx | bench-torch | bench-native | bench-attention | bench-m-falcon-peers | bench-m-falcon-engines | \
            bench-end-to-end | profile-end-to-end | bench-products | quantised-rtx | quantised-trt85 | bench-calibration) run_step "$step" || failed=$((failed + 1)) ;;
        *) echo "job.sh: there is no step $step" | tee -a "$summary"; failed=$((failed + 1)) ;;
    esac
done
echo "gpu: ${gpu:-unknown}" >>"$summary"
echo "commit $HSTU_COMMIT; $failed steps failed" >>"$summary"
cp "$summary" "$out/summary.txt"
cat "$summary"
[ "$failed" -eq 0 ]
