"""Stage 3: passes over the exported graph. Level 3.

`export_passes` is the order in which every export is rewritten; the passes that a target alone needs are applied by
the stage that drives it.
"""

from __future__ import annotations

from hstu_compile.plugins.kernels.hopper.variants import Silu
from hstu_compile.quantized import QuantizationPlan
from hstu_compile.rewrite._pass import Pass, PassResult, apply_passes
from hstu_compile.rewrite.annotate_attention import AnnotateAttention
from hstu_compile.rewrite.attach_native_body import AttachNativeBody
from hstu_compile.rewrite.bound_native_body import affordable
from hstu_compile.rewrite.check_operators import CheckOperators
from hstu_compile.rewrite.detach_taps import DetachTaps
from hstu_compile.rewrite.fuse_norms import FuseNorms
from hstu_compile.rewrite.name_dims import NameDims
from hstu_compile.rewrite.prune_last_layer import PruneLastLayer, RowSelection
from hstu_compile.rewrite.quantize_products import QuantizeProducts, quantized_sites
from hstu_compile.rewrite.strip_metadata import StripMetadata
from hstu_compile.rewrite.tabulate_towers import Evaluate, TabulateTowers


def export_passes(
    num_layers: int,
    tap_names: tuple[str, ...],
    selection: RowSelection | None = None,
    silu: Silu = "fast",
    *,
    fuse_norms: bool = True,
    quantization: QuantizationPlan | None = None,
    tabulate: Evaluate | None = None,
) -> tuple[Pass, ...]:
    """The passes that turn an exported graph into the one that ships, in order.

    Args:
        num_layers: attention layers that the model has; passes that find fewer refuse.
        tap_names: outputs of the export that become intermediate values.
        selection: rows of the last layer that the outputs need; None keeps the whole layer.
        silu: error that the attention's SiLU may have, "fast" or "accurate".
        fuse_norms: make one operator of each norm and what surrounds it.
        quantization: products to quantise; None leaves the graph as it is.
        tabulate: computes tables of what towers make of embeddings; None leaves the towers in the graph.
    """
    return (
        StripMetadata(),
        DetachTaps(tap_names),
        NameDims(),
        *((PruneLastLayer(num_layers, selection),) if selection is not None else ()),
        *((FuseNorms(tap_names),) if fuse_norms else ()),
        *((TabulateTowers(tabulate, tap_names),) if tabulate is not None else ()),
        *((QuantizeProducts(quantization),) if quantization is not None else ()),
        AnnotateAttention(num_layers, silu),
        AttachNativeBody(num_layers),
        CheckOperators(),
    )


__all__ = [
    "Pass",
    "PassResult",
    "PruneLastLayer",
    "RowSelection",
    "affordable",
    "apply_passes",
    "export_passes",
    "quantized_sites",
]
