"""What a person asked for. Level 0: plain data, checked here, used by the pipeline alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]
Embeddings = Literal["inside", "external"]
AttentionSilu = Literal["fast", "accurate"]
Quantization = Literal["int8", "fp8"]
BackendRequest = Literal["auto", "tensorrt", "tensorrt-rtx", "onnx"]
#: Who computes attention in an engine: "auto" the plugin in TensorRT and the native body elsewhere; "fused" our kernels
#: between the engines of a graph that is cut there.
Attention = Literal["auto", "fused"]


class _PathField:
    """A path that is given as text or any os.PathLike, and kept as a Path."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Path:
        if instance is None:
            # Here dataclasses asks for the default, and there is none.
            raise AttributeError(self._name)
        path: Path = vars(instance)[self._name]
        return path

    def __set__(self, instance: object, value: str | os.PathLike[str]) -> None:
        vars(instance)[self._name] = Path(value)


class _OptionalPathField:
    """The same, or None, which is the default."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Path | None:
        path: Path | None = None if instance is None else vars(instance)[self._name]
        return path

    def __set__(self, instance: object, value: str | os.PathLike[str] | None) -> None:
        vars(instance)[self._name] = None if value is None else Path(value)


#: Of `--mixed auto` where nothing else is asked for.
DEFAULT_BUDGET = 0.002


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Options of one build. Paths are given as text or any os.PathLike, and are Paths then.

    Attributes:
        checkpoint: the .pt file, or a folder of shards.
        output: bundle folder; None puts `<checkpoint's stem>.hstu` in the working directory.
        precision: type of weights and activations in the graph.
        config_file: JSON configuration of the training run, where the checkpoint does not say.
        dialect: checkpoint family; None detects it.
        backend: engine builder; "onnx" builds none.
        max_batch: most sequences in a request batch.
        opt_batch: typical number; None is an eighth of max_batch, at least 1.
        max_seq_len: longest history in events; None is the model's own limit.
        opt_seq_len: typical history; None is half of max_seq_len.
        top_k: also output the K best unseen items; 0 leaves them out. Retrieval models only.
        max_candidates: most candidates of a user in one packed forward; None is the model's own limit. Ranking models
            only.
        micro_batch: candidates of one scoring pass; builds the graphs prefill and score. None builds packed alone.
            Ranking models only.
        max_append: most new events of one cached history in a pass; builds the graphs prefill and append. None builds
            retrieval alone. Retrieval models only.
        embeddings: inside, ids are inputs and tables are weights; external, inputs are embedding rows.
        attention: who computes it; "fused" needs the backend tensorrt-rtx, and "auto" takes that backend then.
        attention_silu: error that the attention kernels' SiLU may have; see the operator's contract.
        prune: compute the last layer only for the rows that are read; None does so except where the builder is known to
            crash on it (retrieval graphs in TensorRT 8).
        fuse_norms: one operator for each norm and what surrounds it, which TensorRT runs as one kernel of the plugin.
        tabulate_towers: compute what a ranking model's towers make of each row of an embedding table when the graph is
            built, and look that up. Not with external embeddings, whose tables nobody has then, and not quantised; None
            does so wherever it can be done, and True where it cannot is an error.
        quantization: eight-bit type of the products of activations with weights in a float16 graph; None leaves them in
            `precision`.
        calibration: table of activations that `hstu-compile calibrate` wrote; needed with a quantization.
        observer: rule for the bounds of activations; None is the table's.
        smooth_quant: share of the activations' range that moves into the weights, 0 to 1; None moves nothing.
        keep_fp16: products to leave in float16, by name.
        labelled_data: requests whose outcome is known, to measure ranking quality on; None measures none.
        mixed: "auto" leaves in float16 the products that cost most quality, until it is within the budget.
        budget: largest change of the quality against float32, absolute of HR@10 and NDCG@10, relative of AUC and NE;
            None is `DEFAULT_BUDGET` where `mixed` needs one, and no limit otherwise.
        plugin: build the TensorRT plugin of this model into the bundle; None does so when the backend is tensorrt.
        verify: compare every artifact with the eager model.
        keep_intermediates: folder for the artifact of every stage, or None.
        force: replace an existing bundle.
        seed: of the verification batches.
    """

    checkpoint: _PathField = _PathField()
    output: _OptionalPathField = _OptionalPathField()
    precision: Precision = "fp32"
    config_file: _OptionalPathField = _OptionalPathField()
    dialect: str | None = None
    backend: BackendRequest = "auto"
    max_batch: int = 64
    opt_batch: int | None = None
    max_seq_len: int | None = None
    opt_seq_len: int | None = None
    top_k: int = 0
    max_candidates: int | None = None
    micro_batch: int | None = None
    max_append: int | None = None
    embeddings: Embeddings = "inside"
    attention: Attention = "auto"
    attention_silu: AttentionSilu = "fast"
    prune: bool | None = None
    fuse_norms: bool = True
    tabulate_towers: bool | None = None
    quantization: Quantization | None = None
    calibration: _OptionalPathField = _OptionalPathField()
    observer: str | None = None
    smooth_quant: float | None = None
    keep_fp16: tuple[str, ...] = ()
    labelled_data: _OptionalPathField = _OptionalPathField()
    mixed: Literal["auto"] | None = None
    budget: float | None = None
    plugin: bool | None = None
    verify: bool = True
    keep_intermediates: _OptionalPathField = _OptionalPathField()
    force: bool = False
    seed: int = 0

    @property
    def bundle_path(self) -> Path:
        """Where the bundle goes."""
        return self.output if self.output is not None else Path(f"{self.checkpoint.absolute().stem}.hstu")

    @property
    def quality_budget(self) -> float | None:
        """The limit that the quality is held to, or None."""
        return DEFAULT_BUDGET if self.budget is None and self.mixed is not None else self.budget


@dataclasses.dataclass(frozen=True)
class Limits:
    """Shape limits of a build, resolved against the model.

    Attributes:
        max_batch: most sequences.
        opt_batch: typical number of sequences.
        max_seq_len: longest history in events.
        opt_seq_len: typical history in events.
        top_k: best items per sequence in the outputs; 0 for none.
        max_candidates: most candidates of one sequence in a packed forward; 0 in a retrieval model.
        micro_batch: most candidates of a scoring pass; None without the graphs prefill and score.
        contextual_len: rows in front of every history.
        max_append: most new events of one cached history in a pass; None without the graphs prefill and append.
    """

    max_batch: int
    opt_batch: int
    max_seq_len: int
    opt_seq_len: int
    top_k: int
    max_candidates: int = 0
    micro_batch: int | None = None
    contextual_len: int = 0
    max_append: int | None = None
