#!/usr/bin/env bash
# Puts what a GPU run brought back into the repository: results/*.json here, ../bench/results/{plugin,m_falcon,attention,cpp_loader,calibration}.csv,
# the plots of M-FALCON and attention, both tables of plugins/README.md, the M-FALCON, attention and C++ loader tables where a document has
# their marks, and the few times that README shows. What the run lacks stays as it is.
#
# Usage: update_results.sh RUN        (RUN: folder with job.sh's STEP.tar.gz files, at any depth)
set -euo pipefail

run=$(realpath "${1:?usage: update_results.sh RUN}")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT

# Oldest first: a step that was run again replaces its earlier result.
while IFS= read -r archive; do tar xzf "$archive" -C "$unpacked"; done \
    < <(find "$run" -name '*.tar.gz' -printf '%T@ %p\n' | sort -n | cut -d' ' -f2-)
readme=$repository/plugins/README.md
bench=$repository/tests/bench
# Each benchmark from the steps of its own: the parts of one are no rows of the other.
measured=0
for step in bench-plugin bench-rtx bench-torch bench-native; do
    if [ -n "$(find "$unpacked/$step" -path '*/parts/*.json' -print -quit 2>/dev/null)" ]; then
        "$python" "$bench/bench_plugin.py" --merge "$unpacked/$step"
        measured=1
    fi
done
[ "$measured" -eq 0 ] || "$python" "$bench/bench_plugin.py" --table --into "$readme" >/dev/null
measured=0
for step in bench-m-falcon-peers bench-m-falcon-engines; do
    if [ -n "$(find "$unpacked/$step" -name '*-n*-m*-b*.json' -print -quit 2>/dev/null)" ]; then
        "$python" "$bench/bench_m_falcon.py" --merge "$unpacked/$step"
        measured=1
    fi
done
# NAME MARK: the plot of a benchmark, and its table wherever the documentation has a place for it.
show() {
    "$python" "$bench/$1_table.py" --svg "$bench/results/$1.svg" >/dev/null
    while IFS= read -r document; do
        "$python" "$bench/$1_table.py" --into "$repository/$document" >/dev/null
    done < <(git -C "$repository" grep -l "<!-- $2 benchmark: begin -->" -- '*.md')
}
[ "$measured" -eq 0 ] || show m_falcon m-falcon
if [ -n "$(find "$unpacked/bench-attention" -path '*/parts/*.json' -print -quit 2>/dev/null)" ]; then
    "$python" "$bench/bench_attention.py" --merge "$unpacked/bench-attention/parts"
    show attention attention
fi
measured=0
if [ -n "$(find "$unpacked/bench-end-to-end" -path '*/parts/*.json' -print -quit 2>/dev/null)" ]; then
    "$python" "$bench/bench_end_to_end.py" --merge "$unpacked/bench-end-to-end/parts"
    measured=1
fi
# Timelines are whole files, and may come alone; a run of other cases leaves those that are there.
if [ -n "$(find "$unpacked/profile-end-to-end" -name 'timeline_*.csv' -print -quit 2>/dev/null)" ]; then
    find "$unpacked/profile-end-to-end" -name 'timeline_*.csv' -exec cp {} "$bench/results/" \;
    measured=1
fi
[ "$measured" -eq 0 ] || show end_to_end end-to-end
products=$unpacked/bench-products/rtx_products.csv
if [ -e "$products" ]; then
    cp "$products" "$bench/results/"
    "$python" "$bench/bench_rtx_products.py" --table --into "$repository/docs/end-to-end.md" >/dev/null
fi
measured=0
for step in cpp-loader cpp-loader-fused; do
    if [ -n "$(find "$unpacked/$step" -name rows.csv -print -quit 2>/dev/null)" ]; then
        "$python" "$bench/cpp_loader_table.py" --merge "$unpacked/$step"
        measured=1
    fi
done
if [ "$measured" -ne 0 ]; then
    while IFS= read -r document; do
        "$python" "$bench/cpp_loader_table.py" --into "$repository/$document" >/dev/null
    done < <(git -C "$repository" grep -l "<!-- cpp-loader benchmark: begin -->" -- '*.md')
fi
if [ -n "$(find "$unpacked/bench-calibration" -name calibration.csv -print -quit 2>/dev/null)" ]; then
    "$python" "$bench/bench_calibration.py" --merge "$unpacked/bench-calibration/calibration.csv" --out "$bench/results/calibration.csv"
fi
steps=(conformance.jsonl kernels.json tensorrt85.json tensorrt85-accuracy.json rtx.json fused.json ranking.json ranking-soak.json cpp_loader.json cpp_loader_fused.json triton.json
    quantised-tensorrt-rtx.json quantised-tensorrt.json)
for file in "${steps[@]}"; do
    if [ -n "$(find "$unpacked" -name "$file" -print -quit)" ]; then
        "$python" "$repository/tests/gpu/collect.py" "$unpacked" --into "$readme"
        break
    fi
done
if grep -qs '<!-- headlines: begin -->' "$repository/README.md"; then
    "$python" "$bench/headline_table.py" --into "$repository/README.md" >/dev/null
fi
git -C "$repository" status --short -- tests/gpu/results tests/bench/results plugins/README.md README.md
