"""What a graph was exported for, kept inside the .onnx file: the engine stage has nothing else. Level 3; no torch."""

from __future__ import annotations

import dataclasses

import onnx

from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.profiles import ProfileSizes

_PREFIX = "hstu."


@dataclasses.dataclass(frozen=True)
class GraphLimits:
    """Shape limits of one graph.

    Attributes:
        graph: retrieval, packed, prefill, score or append.
        max_seq_len: longest history in events.
        max_candidates: packed: most candidates of one sequence; score: most candidates of a pass; otherwise 0.
        contextual_len: rows in front of every history.
        max_append: append: most new events of one sequence; otherwise 0.
    """

    graph: str
    max_seq_len: int
    max_candidates: int = 0
    contextual_len: int = 0
    max_append: int = 0

    def sizes(
        self, max_batch: int, opt_batch: int | None, max_seq_len: int | None, opt_seq_len: int | None
    ) -> ProfileSizes:
        """Numbers behind the profile of this graph for so many sequences; None takes the default."""
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
