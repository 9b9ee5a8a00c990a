"""Small models with random weights of ordinary size, what the compiler makes of them, and their requests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from hstu_compile.artifacts import TAP_PREFIX, OnnxGraph, Precision, Profile, TensorSpec
from hstu_compile.export import TORCH_DTYPES, exported_from_served
from hstu_compile.model import RetrievalModel
from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
from hstu_compile.model.dialects import DLRM_V3
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.profiles import ProfileSizes, graph_profiles
from hstu_compile.rewrite import apply_passes, export_passes
from hstu_compile.served import ServedGraph, retrieval_graph, served_graphs
from tests.dlrm_reference import DlrmForm, dlrm_state_dict

# Of `research_model`.
NUM_ITEMS, NUM_RATINGS, MAX_SEQ_LEN, NUM_LAYERS, WIDTH = 100, 6, 24, 2, 32
LAST_TIMESTAMP = 2**30
TAPS = tuple(f"{TAP_PREFIX}{i}" for i in range(NUM_LAYERS + 1))

# Of every graph below. Tracing takes seconds: tests that ask for the same graph in one process pay once.
TOP_K, MICRO_BATCH, MAX_APPEND = 5, 4, 4


def small_config(num_layers: int = 2, attention: dict[str, Any] | None = None, **changes: Any) -> RetrievalConfig:
    """A research-like model: two heads of width 25, position and time bias, next timestamps, 20 events at most."""
    attention_config = AttentionConfig(
        **{
            "num_heads": 2,
            "attention_dim": 25,
            "linear_dim": 25,
            "alpha": 1.0,
            "scaling_seq_len": 24.0,
            "max_seq_len": 20,
            "pos_table_len": 24,
            "time_bias": "next",
            "num_time_buckets": 16,
            "time_bucket_divisor": 0.301,
            **(attention or {}),
        }
    )
    layer = LayerConfig(
        embedding_dim=changes.pop("embedding_dim", 32),
        attention=attention_config,
        silu_scope="uvqk",
        uvqk_bias=False,
        input_norm=True,
        input_norm_affine=False,
        output_norm="layer",
        output_norm_affine=False,
        norm_eps=1e-6,
        output_concat="gated",
        output_projection=True,
        output_bias=True,
    )
    values: dict[str, Any] = {
        "dialect": "native",
        "num_items": 40,
        "num_layers": num_layers,
        "layer": layer,
        "preprocessor": "positional",
        "item_embedding_dim": layer.embedding_dim,
        "num_ratings": 0,
        "num_positions": 24,
        "hour_encoding": "none",
        "postprocessor": "l2_norm",
        "postprocessor_eps": 1e-6,
        "item_l2_norm": True,
        **changes,
    }
    return RetrievalConfig(**values)


def small_model(config: RetrievalConfig, precision: Precision = "fp32", seed: int = 0) -> RetrievalModel:
    """Weights drawn so that activations and biases are O(1), not the near-zero of an untrained model."""
    torch.manual_seed(seed)
    model = RetrievalModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[0] if name.endswith(("uvqk_weight", "output_weight")) else 4
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return model.eval().requires_grad_(False).cast(TORCH_DTYPES[precision])


def research_model(precision: Precision, *, rated: bool = False) -> RetrievalModel:
    """Two heads of width 16 (which kernels have tiles for), all biases; the same weights for the same arguments."""
    attention = {
        "attention_dim": 16,
        "linear_dim": 16,
        "scaling_seq_len": float(MAX_SEQ_LEN),
        "max_seq_len": MAX_SEQ_LEN,
        "pos_table_len": 32,
        "num_time_buckets": 128,
    }
    config = small_config(
        NUM_LAYERS,
        attention,
        embedding_dim=WIDTH,
        dialect="research",
        num_items=NUM_ITEMS,
        preprocessor="rated" if rated else "positional",
        item_embedding_dim=24 if rated else WIDTH,
        num_ratings=NUM_RATINGS if rated else 0,
        num_positions=32,
    )
    torch.manual_seed(0)
    model = RetrievalModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # otherwise attention hardly moves the residual stream, and an error in it hides
    return model.cast(TORCH_DTYPES[precision])


def ranking_config(form: DlrmForm, **changes: Any) -> RankingConfig:
    """The configuration of a small checkpoint of the DLRM-HSTU family; the changes are entries of the user's."""
    shapes = {key: tuple(tensor.shape) for key, tensor in dlrm_state_dict(form).items()}
    config = DLRM_V3.config(shapes, {**form.user_config(), **changes})
    assert isinstance(config, RankingConfig)
    return config


def ranking_model(form: DlrmForm, dtype: torch.dtype = torch.float32, **changes: Any) -> RankingModel:
    """A small checkpoint of the DLRM-HSTU family; the changes are entries of the user's configuration."""
    config, state = ranking_config(form, **changes), dlrm_state_dict(form)
    model = RankingModel(config)
    sources = DLRM_V3.sources(config)
    model.load_state_dict({name: source.convert(state[source.key]) for name, source in sources.items()})
    return model.eval().requires_grad_(False).cast(dtype)


def exported_retrieval(model: RetrievalModel, precision: Precision, top_k: int = 0) -> OnnxGraph:
    """The graph of a retrieval model as it is traced."""
    return exported_from_served(retrieval_graph(model, top_k), precision)


def retrieval_profile(sizes: ProfileSizes, *, has_ratings: bool = False) -> tuple[Profile, ...]:
    """The profile of a retrieval graph."""
    inputs = [
        TensorSpec("item_ids", "int32", ("L",)),
        TensorSpec("timestamps", "int64", ("L",)),
        *([TensorSpec("ratings", "int32", ("L",))] if has_ratings else []),
        TensorSpec("seq_offsets", "int32", ("B_plus_1",)),
        TensorSpec("request_timestamps", "int64", ("B",)),
    ]
    return graph_profiles("retrieval", inputs, sizes)


def rewritten(graph: OnnxGraph, num_layers: int) -> OnnxGraph:
    """A retrieval graph after every pass but the pruning of its last layer: the tap behind that has every row."""
    taps = tuple(f"{TAP_PREFIX}{i}" for i in range(num_layers + 1))
    *_, last = apply_passes(graph, export_passes(num_layers, taps))
    return last


def traced_retrieval(
    config: RetrievalConfig, precision: Precision, name: str = "retrieval", *, top_k: int = TOP_K
) -> tuple[RetrievalModel, ServedGraph, OnnxGraph]:
    """A graph of `small_model` as it is traced, once per process: passes copy it, and nobody changes any of it."""
    return _traced_retrieval(config, precision, name, top_k)


def traced_research(precision: Precision, *, top_k: int = TOP_K) -> tuple[RetrievalModel, ServedGraph, OnnxGraph]:
    """The graph of `research_model` in the same way."""
    return _traced_research(precision, top_k)


@functools.cache
def traced_ranking(form: DlrmForm, precision: Precision, name: str) -> tuple[RankingModel, ServedGraph, OnnxGraph]:
    """A graph of `ranking_model` in the same way."""
    model = ranking_model(form, TORCH_DTYPES[precision])
    served = next(each for each in served_graphs(model, micro_batch=MICRO_BATCH) if each.name == name)
    return model, served, exported_from_served(served, precision)


# Apart from the defaults, so that a value that is given finds what was kept without it.
@functools.cache
def _traced_retrieval(
    config: RetrievalConfig, precision: Precision, name: str, top_k: int
) -> tuple[RetrievalModel, ServedGraph, OnnxGraph]:
    model = small_model(config, precision)
    served = next(each for each in served_graphs(model, top_k, max_append=MAX_APPEND) if each.name == name)
    return model, served, exported_from_served(served, precision)


@functools.cache
def _traced_research(precision: Precision, top_k: int) -> tuple[RetrievalModel, ServedGraph, OnnxGraph]:
    model = research_model(precision)
    served = retrieval_graph(model, top_k)
    return model, served, exported_from_served(served, precision)


def shipped(config: RetrievalConfig, precision: Precision = "fp32", top_k: int = 0) -> tuple[RetrievalModel, OnnxGraph]:
    """A small model and its rewritten graph, whose message is new each time."""
    model, _, graph = traced_retrieval(config, precision, top_k=top_k)
    return model, rewritten(graph, config.num_layers)


@functools.cache
def _exported(precision: Precision, top_k: int) -> bytes:
    _, _, graph = traced_research(precision, top_k=top_k)
    return bytes(rewritten(graph, NUM_LAYERS).model.SerializeToString())


def exported_graph(precision: Precision, *, top_k: int = 0) -> onnx.ModelProto:
    """The rewritten graph of `research_model`; exported once per process, a new copy each time."""
    return onnx.load_from_string(_exported(precision, top_k))


def request_batch(lengths: tuple[int, ...], *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """A legal batch of sequences with these lengths for `research_model`."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(offsets[-1])
    times = [np.sort(rng.integers(0, LAST_TIMESTAMP, length)) for length in lengths]
    batch: dict[str, NDArray[Any]] = {
        "item_ids": rng.integers(1, NUM_ITEMS + 1, total).astype(np.int32),
        "timestamps": np.concatenate([*times, np.zeros(0, np.int64)]).astype(np.int64),
        "seq_offsets": offsets,
        "request_timestamps": np.full(len(lengths), LAST_TIMESTAMP + 60, np.int64),
    }
    return batch


def with_layer(config: RetrievalConfig, **changes: Any) -> RetrievalConfig:
    """The configuration with other layer options."""
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, **changes))


def text_of(model: onnx.ModelProto) -> str:
    """The model as text, its tensors' contents left out: what remains is structure and names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.ClearField("raw_data")
    for node in (*copy.graph.node, *(node for function in copy.functions for node in function.node)):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.ClearField("raw_data")
    return str(copy)
