#!/usr/bin/env bash
# Checks the models of this repository and starts tritonserver with them. Further arguments are passed on to it.
#
# tritonserver only logs that a plugin cannot be loaded, and then fails on the engine that needs it; this says so first.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

refuse() { # code, what, why, fix, exit code
	printf 'error[%s] launch: %s\n  Why: %s\n  Fix: %s\n  See: hstu-compile explain %s\n' "$1" "$2" "$3" "$4" "$1" >&2
	exit "$5"
}

plugins=""
declare -A seen
for model in "$here"/*/; do
	model="${model%/}"
	[ -f "$model/SHA256SUMS" ] || continue
	if ! problems="$(cd "$model" && sha256sum --check --quiet SHA256SUMS 2>&1)"; then
		refuse HSTU-E803 "$model is damaged" "$problems" "write the model again with hstu-compile triton" 8
	fi
	for step in $(sed -n 's/^ *model_name: "\(.*\)"$/\1/p' "$model/config.pbtxt"); do
		[ -f "$here/$step/config.pbtxt" ] || refuse HSTU-E803 "$model is not whole" "it asks $step, which is missing" \
			"write the model again with hstu-compile triton, and copy the whole repository" 8
	done
	grep -q '^backend: "tensorrt"' "$model/config.pbtxt" || continue
	if [ ! -f "$model/1/model.plan" ]; then
		refuse HSTU-E404 "$model has no engine" "$model/1/model.plan is missing" \
			"hstu-compile engine $model/model.onnx -o $model/1/model.plan" 5
	fi
	library="$model/libhstu_trt_plugin.so"
	[ -f "$library" ] || continue
	case "$library" in
	*[\ :\;,]*)
		refuse HSTU-E504 "$library cannot be given to tritonserver" \
			"its path has a space, colon, semicolon or comma, which separate libraries" "move the repository" 5
		;;
	esac
	# The loader reports a library that it cannot preload and goes on; with LD_BIND_NOW it also misses no symbol.
	if ! said="$(LD_BIND_NOW=1 LD_PRELOAD="$library" /bin/true 2>&1)" || [ -n "$said" ]; then
		refuse HSTU-E504 "$library cannot be loaded" "$said" \
			"build it for this machine's TensorRT: hstu-compile plugin build --onnx $model/model.onnx -o $model" 5
	fi
	hash="$(sha256sum "$library" | cut -d ' ' -f 1)"
	# Two models may carry the same library, which registers its plugin once.
	[ -z "${seen[$hash]:-}" ] || continue
	seen[$hash]=1
	plugins="${plugins:+$plugins;}$library"
done

if ! command -v tritonserver >/dev/null; then
	refuse HSTU-E401 "there is no tritonserver" "it is not on PATH" \
		"start this inside a Triton Inference Server container, or put tritonserver on PATH" 5
fi
arguments=("--model-repository=$here")
if [ -n "$plugins" ]; then
	arguments+=("--backend-config=tensorrt,plugins=$plugins")
fi
echo "launch: tritonserver ${arguments[*]} $*" >&2
exec tritonserver "${arguments[@]}" "$@"
