"""Small retrieval models with random weights of ordinary size, and what the compiler makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import torch

from hstu_compile.artifacts import TAP_PREFIX, OnnxGraph, Precision
from hstu_compile.export import TORCH_DTYPES, exported_from_model
from hstu_compile.model import RetrievalModel
from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
from hstu_compile.rewrite import apply_passes, export_passes


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


def rewritten(graph: OnnxGraph, num_layers: int) -> OnnxGraph:
    """The graph that ships."""
    taps = tuple(f"{TAP_PREFIX}{i}" for i in range(num_layers + 1))
    *_, last = apply_passes(graph, export_passes(num_layers, taps))
    return last


def shipped(config: RetrievalConfig, precision: Precision = "fp32", top_k: int = 0) -> tuple[RetrievalModel, OnnxGraph]:
    """A small model and its final graph."""
    model = small_model(config, precision)
    return model, rewritten(exported_from_model(model, precision, top_k), config.num_layers)


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
