"""Turn the residual stream from graph outputs into named intermediate values."""

from __future__ import annotations

import onnx

from hstu_compile.rewrite._pass import Pass, PassResult


class DetachTaps(Pass):
    """Move the taps from the outputs to the value infos.

    They keep their names, so that a check can ask any runtime for `layer_3`, and a serving engine does not compute an
    output that nobody reads.
    """

    name = "detach_taps"

    def __init__(self, tap_names: tuple[str, ...]) -> None:
        self._tap_names = tap_names
        self._present = 0

    def requires(self, model: onnx.ModelProto) -> None:
        self._present = sum(output.name in self._tap_names for output in model.graph.output)

    def call(self, model: onnx.ModelProto) -> PassResult:
        taps = [output for output in model.graph.output if output.name in self._tap_names]
        for tap in taps:
            model.graph.output.remove(tap)
            if tap.name not in {info.name for info in model.graph.value_info}:
                model.graph.value_info.append(tap)
        return PassResult({"taps": len(taps)})

    def ensures(self, model: onnx.ModelProto, result: PassResult) -> None:
        produced = {name for node in model.graph.node for name in node.output}
        self.expect(PassResult({"taps": len(produced & set(self._tap_names))}), "taps", len(self._tap_names))
