"""What a build with --attention fused makes of a model, known before anything is traced. Level 4."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hstu_compile.config import AttentionSilu, BuildConfig, Precision
from hstu_compile.errors import UsageError
from hstu_compile.model.config import LayerConfig
from hstu_compile.model.families import ModelConfig
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.plugins.kernels.hopper.variants import HopperVariant, hopper_variants_for
from hstu_compile.plugins.kernels.norm_variants import MAX_WIDTH, NormVariant, norm_variant
from hstu_compile.plugins.kernels.variants import KernelVariant, variants_for
from hstu_compile.runtime.open_fused import FUSED_BACKEND
from hstu_compile.table_files import TABLE_BYTES

# Graphs whose attentions read cached keys, and whose candidates do not see one another.
_CACHED = ("score", "append")
_CANDIDATES = ("packed", "score")
# The contract's `concat` of a layer's norm.
_CONCATS = {"gated": 0, "u_attn_gated": 1, "u_norm_gated": 2}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class FusedPlan:
    """Segments, attentions and kernels of a build.

    Attributes:
        attentions: number of them in each graph. A graph has an engine before each of them and one after the last.
        tower_cuts: of each graph, the places in front of its layers where norms of its towers, and the one of their
            sum, run between two engines.
        kernels: portable kernels that its attentions need.
        norm_kernels: kernels of the norms behind its attentions, in its towers and of their sum.
        hopper_kernels: kernels that a Hopper GPU runs in their place, if the build has nvcc.
    """

    attentions: dict[str, int]
    tower_cuts: dict[str, int]
    kernels: tuple[KernelVariant, ...]
    norm_kernels: tuple[NormVariant, ...]
    hopper_kernels: tuple[HopperVariant, ...]

    @property
    def segments(self) -> dict[str, int]:
        """Segments, and so engines, of each graph."""
        return {graph: count + self.tower_cuts[graph] + 1 for graph, count in self.attentions.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "attentions": self.attentions,
            "segments": self.segments,
            "engines": sum(self.segments.values()),
            "kernels": [dataclasses.asdict(variant) for variant in self.kernels],
            "norm_kernels": [dataclasses.asdict(variant) for variant in self.norm_kernels],
            "hopper_kernels": [dataclasses.asdict(variant) for variant in self.hopper_kernels],
        }


def check_attention(config: BuildConfig) -> None:
    """Refuse --attention fused for a backend that does not run it.

    Raises:
        UsageError: HSTU-E901.
    """
    if config.attention != "fused" or config.backend in ("auto", FUSED_BACKEND):
        return
    why = {
        "tensorrt": "TensorRT takes our plugin, which runs the same kernels inside one engine",
        "onnx": "that backend builds no engine, and the kernels run between engines",
    }
    raise UsageError(
        "HSTU-E901",
        f"--attention fused and --backend {config.backend} exclude each other",
        why[config.backend],
        f"leave --attention out, or pass --backend {FUSED_BACKEND}",
        {"attention": config.attention, "backend": config.backend},
    )


def requested_backend(config: BuildConfig) -> str:
    """The engine builder that a build asks for: --attention fused leaves no choice."""
    return FUSED_BACKEND if config.attention == "fused" else config.backend


def fused_plan(
    model: ModelConfig,
    graphs: Sequence[str],
    precision: Precision,
    silu: AttentionSilu,
    *,
    fuse_norms: bool = True,
    tabulate_towers: bool = False,
) -> FusedPlan:
    """Count segments and attentions, and name the kernels.

    Args:
        model: configuration.
        graphs: names of the graphs that are built.
        precision: of the graphs.
        silu: error that the attention's SiLU may have.
        fuse_norms: whether norms are operators, which kernels between the engines compute.
        tabulate_towers: whether what towers make of embeddings is looked up, where it can be.
    """
    attention, layers = model.layer.attention, model.num_layers
    # Nobody reads what the last layer of a ranking model's prefill attends to.
    is_ranking = isinstance(model, RankingConfig)
    attentions = {graph: layers - (graph == "prefill" and is_ranking) for graph in graphs}
    kernels: dict[KernelVariant, None] = {}
    hopper: dict[HopperVariant, None] = {}
    for graph in (graph for graph, count in attentions.items() if count):
        plain = graph not in _CANDIDATES and not attention.contextual_seq_len and not attention.max_attn_len
        dims = (_DTYPES[precision], attention.attention_dim, attention.linear_dim)
        pos_bias, time_bias = attention.pos_table_len > 0, attention.time_bias != "none"
        cached = graph in _CACHED
        kernels |= dict.fromkeys(
            variants_for(
                *dims, pos_bias=pos_bias, time_bias=time_bias, mask_kinds=(0,) if plain else (1,), has_cache=cached
            )
        )
        hopper |= dict.fromkeys(
            hopper_variants_for(
                *dims, plain_causal=plain, pos_bias=pos_bias, time_bias=time_bias, silu=silu, has_cache=cached
            )
        )
    norms = _norms(model.layer, _DTYPES[precision]) if kernels and fuse_norms else ()
    towers: tuple[NormVariant, ...] = ()
    if fuse_norms and isinstance(model, RankingConfig) and _computes_a_tower(model, precision, tabulate_towers):
        towers = _tower_norms(model, _DTYPES[precision])
    # The norm in front of the first layer has the kernel of those at the towers' ends, and a cut of its own.
    in_front = len(towers) + (model.layer.embedding_dim <= MAX_WIDTH) if towers else 0
    cuts = {graph: in_front if count and graph not in _CACHED else 0 for graph, count in attentions.items()}
    norms += towers if any(cuts.values()) else ()
    return FusedPlan(attentions, cuts, tuple(kernels), norms, tuple(hopper))


def _computes_a_tower(model: RankingConfig, precision: Precision, tabulate_towers: bool) -> bool:
    """Whether a tower of events is left in the graph: of actions, of several tables, or of one that is too large."""
    rows = {table.name: table.num_rows for table in model.tables}
    most_rows = max(rows[feature.table] for feature in model.sequence_features)
    row_bytes = max(model.table_dim, model.layer.embedding_dim) * (4 if precision == "fp32" else 2)
    is_small = most_rows * row_bytes < TABLE_BYTES
    return not tabulate_towers or bool(model.action_feature) or len(model.sequence_features) > 2 or not is_small


def _tower_norms(model: RankingConfig, dtype: str) -> tuple[NormVariant, ...]:
    """The kernels of the norms between a tower's products and of those at its end, as far as an HstuNorm takes them."""
    widths = {2: model.hidden_dim, 0: model.layer.embedding_dim}
    return tuple(
        norm_variant(dtype, dtype, width, activation=activation)
        for activation, width in widths.items()
        if width <= MAX_WIDTH
    )


def _norms(layer: LayerConfig, dtype: str) -> tuple[NormVariant, ...]:
    """The kernel of a layer's norm behind its attention; none where the norm is one that no HstuNorm takes in."""
    attention = layer.attention
    width = attention.num_heads * attention.linear_dim
    groups = attention.num_heads if layer.output_norm == "group" else 1
    if width > MAX_WIDTH or (groups > 1 and not layer.output_norm_affine):
        return ()
    return (
        norm_variant(
            dtype,
            dtype,
            width,
            num_groups=groups,
            activation=1,
            gate_silu=layer.silu_scope == "u",
            concat=_CONCATS[layer.output_concat],
        ),
    )
