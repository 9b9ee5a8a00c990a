#!/usr/bin/env bash
# Puts what a GPU run brought back into the repository: results/*.json here, ../bench/results/plugin.csv, and both
# tables of plugins/README.md. What the run lacks stays as it is.
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
if [ -n "$(find "$unpacked" -path '*/parts/*.json' -print -quit)" ]; then
    "$python" "$repository/tests/bench/bench_plugin.py" --merge "$unpacked"
    "$python" "$repository/tests/bench/bench_plugin.py" --table --into "$readme" >/dev/null
fi
steps=(conformance.jsonl kernels.json tensorrt85.json tensorrt85-accuracy.json rtx.json)
for file in "${steps[@]}"; do
    if [ -n "$(find "$unpacked" -name "$file" -print -quit)" ]; then
        "$python" "$repository/tests/gpu/collect.py" "$unpacked" --into "$readme"
        break
    fi
done
git -C "$repository" status --short -- tests/gpu/results tests/bench/results plugins/README.md
