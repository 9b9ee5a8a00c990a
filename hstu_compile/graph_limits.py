"""What a graph was exported for, kept inside the .onnx file: the engine stage has nothing else. Level 3; no torch."""

from __future__ import annotations

import dataclasses

import onnx

from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.profiles import ProfileSizes

_PREFIX = "hstu."
#: Of a tensor of cached keys or values. TensorRT counts the elements of a tensor in 31 bits, and as many as these in
#: float16 have fewer than 2^31 bytes.
_MOST_CACHED_ELEMENTS = 2**30 - 1
#: Leaves the kernels, which count rows in 30 bits, as many new rows beside the cached ones.
_MOST_CACHED_ROWS = 2**29


def whole_cache_rows(num_heads: int, attention_dim: int, linear_dim: int) -> int:
    """Most rows of a KV cache whose keys, and whose values, an engine takes as one tensor per layer.

    >>> whole_cache_rows(4, 128, 128)
    2097151
    """
    return min(_MOST_CACHED_ELEMENTS // (num_heads * max(attention_dim, linear_dim)), _MOST_CACHED_ROWS)


@dataclasses.dataclass(frozen=True)
class GraphLimits:
    """Shape limits of one graph.

    Attributes:
        graph: retrieval, packed, prefill, score or append.
        max_seq_len: longest history in events.
        max_candidates: packed: most candidates of one sequence; score: most candidates of a pass; otherwise 0.
        contextual_len: rows in front of every history.
        max_append: append: most new events of one sequence; otherwise 0.
        cache_rows: score: most rows of a KV cache that an engine takes whole; otherwise 0.
    """

    graph: str
    max_seq_len: int
    max_candidates: int = 0
    contextual_len: int = 0
    max_append: int = 0
    cache_rows: int = 0

    def sizes(
        self,
        max_batch: int,
        opt_batch: int | None,
        max_seq_len: int | None,
        opt_seq_len: int | None,
        *,
        has_kernels: bool = False,
    ) -> ProfileSizes:
        """Numbers behind the profile of this graph for so many sequences; None takes the default.

        Args:
            max_batch: most sequences.
            opt_batch: typical number.
            max_seq_len: longest history.
            opt_seq_len: typical history.
            has_kernels: our kernels run the attentions. They read the rows of a cache that are asked for and no others;
                the native body copies all that it is given, so that its profile leaves out the whole cache.
        """
        # A scoring pass takes the candidates of several sequences together.
        per_sequence = self.graph == "packed"
        typical = opt_batch or max_batch
        return ProfileSizes(
            max_batch,
            self.max_seq_len if max_seq_len is None else max_seq_len,
            opt_batch,
            opt_seq_len,
            max_candidates=self.max_candidates * (max_batch if per_sequence else 1),
            opt_candidates=max(1, self.max_candidates * typical // 2) if per_sequence else None,
            contextual_len=self.contextual_len,
            max_append=self.max_append,
            cache_rows=self.cache_rows if has_kernels else 0,
        )


def write_limits(model: onnx.ModelProto, limits: GraphLimits) -> None:
    """Put the limits into the model's metadata, in place."""
    values = {f"{_PREFIX}{name}": str(value) for name, value in dataclasses.asdict(limits).items()}
    onnx.helper.set_model_props(model, values)


def read_limits(model: onnx.ModelProto) -> GraphLimits | None:
    """The limits in a model's metadata; those of its attention nodes where it has none of ours; None without either."""
    stored = {prop.key.removeprefix(_PREFIX): prop.value for prop in model.metadata_props}
    fields = dataclasses.fields(GraphLimits)
    if all(field.name in stored for field in fields if field.default is dataclasses.MISSING):
        sizes = {
            field.name: int(stored[field.name]) for field in fields if field.name in stored and field.type == "int"
        }
        return GraphLimits(stored["graph"], **sizes)
    lengths = [node_attributes(node)["max_seq_len"] for node in model.graph.node if is_attention(node)]
    return GraphLimits("retrieval", min(lengths)) if lengths else None
