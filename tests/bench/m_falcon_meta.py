"""Meta's DLRM-HSTU as a peer: its own modules and Triton kernels, imported from a checkout of Meta's repository.

Imported unmodified but for one switch, `without_tma`: DlrmHSTU with its transducer, preprocessor, positional encoder,
STU layers, postprocessor, item tower and head. Two packages that it imports are not needed to serve one user on one
GPU, and stand-ins take their place where they are absent, both listed below: torchrec (type annotations, and the
embedding collection, instead of which PyTorch lookups feed the model) and three jagged operators of fbgemm_gpu.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from m_falcon_workload import Request, Sizes, hstu_config
from torch import Tensor
from torch.nn import functional as F

#: Module and names that Meta's files import from torchrec; none is called here.
TORCHREC_NAMES = {
    "torchrec": ("KeyedJaggedTensor",),
    "torchrec.modules": (),
    "torchrec.modules.embedding_configs": ("EmbeddingConfig",),
    "torchrec.modules.embedding_modules": ("EmbeddingCollection",),
    "torchrec.modules.sorted_index_select": ("maybe_sorted_index_select",),
}
#: What the rows say about the switch.
TMA_NOTE = (
    "TMA off, as is hstu_mha's default: STULayer turns it on on Hopper, with descriptors of contiguous q, k and v, "
    "but passes slices of one matrix, and wrong rows are read, in every dtype"
)
_FUSED = "generative_recommenders.ops.triton.triton_hstu_preprocess_and_attention"
_EMBEDDING = "_embedding_collection.embeddings.{}.weight"


def _complete_cumsum(lengths: Tensor) -> Tensor:
    return F.pad(torch.cumsum(lengths, 0, dtype=lengths.dtype), (1, 0))


def _jagged_to_padded_dense(
    values: Tensor, offsets: Sequence[Tensor], max_lengths: Sequence[int], padding_value: float = 0.0
) -> Tensor:
    bounds, longest = offsets[0], max_lengths[0]
    if bounds.shape[0] == 2:
        # One sequence is dense already: a view where it is as long as asked for, else one copy, as in fbgemm.
        padding = [0, 0] * (values.dim() - 1) + [0, longest - values.shape[0]]
        return F.pad(values, padding, value=padding_value).unsqueeze(0)
    index = bounds[:-1, None] + torch.arange(longest, device=values.device)
    is_there = index < bounds[1:, None]
    padded = values.new_full((*index.shape, *values.shape[1:]), padding_value)
    padded[is_there] = values[index[is_there]]
    return padded


def _dense_to_jagged(
    dense: Tensor,
    x_offsets: Sequence[Tensor],
    total_L: int | None = None,  # noqa: N803 -- fbgemm's name, which callers use
) -> tuple[Tensor, Sequence[Tensor]]:
    bounds = x_offsets[0]
    if bounds.shape[0] == 2 and total_L is not None:
        return dense[0, :total_L], x_offsets
    is_there = torch.arange(dense.shape[1], device=dense.device) < (bounds[1:] - bounds[:-1])[:, None]
    return dense[is_there], x_offsets


#: Name to signature and implementation.
FBGEMM_OPERATORS: dict[str, tuple[str, Any]] = {
    "asynchronous_complete_cumsum": ("(Tensor t_in) -> Tensor", _complete_cumsum),
    "jagged_to_padded_dense": (
        "(Tensor values, Tensor[] offsets, SymInt[] max_lengths, float padding_value=0.0) -> Tensor",
        _jagged_to_padded_dense,
    ),
    "dense_to_jagged": (
        "(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) -> (Tensor, Tensor[])",
        _dense_to_jagged,
    ),
}
_libraries: list[Any] = []


def provide_fbgemm() -> tuple[str, ...]:
    """Define the operators above in PyTorch where fbgemm_gpu has not; returns the names that were."""
    library = torch.library.Library("fbgemm", "FRAGMENT")
    _libraries.append(library)  # they go when it goes
    defined = []
    for name, (signature, function) in FBGEMM_OPERATORS.items():
        if not hasattr(torch.ops.fbgemm, name):
            library.define(name + signature)
            # Traced through by torch.compile, down to PyTorch's own operators.
            library.impl(name, function, "CompositeImplicitAutograd")
            defined.append(name)
    return tuple(defined)


def provide_torchrec() -> tuple[str, ...]:
    """Put empty modules where torchrec is absent; returns the names of those."""
    try:
        importlib.import_module("torchrec")
        return ()
    except ImportError:
        for module_name, names in TORCHREC_NAMES.items():
            module = types.ModuleType(module_name)
            for name in names:
                setattr(module, name, type(name, (), {"__doc__": f"Stands in for torchrec's {name}; never used."}))
            sys.modules[module_name] = module
        return tuple(TORCHREC_NAMES)


def without_tma(fused: Any) -> None:
    """Let the fused layer-norm, projection and attention load q, k and v through pointers, never through TMA.

    It asks the GPU (compute capability 9) where its caller, STULayer, says nothing. q, k and v are column slices of
    [L, 2 * H * (dqk + dv)], so their rows lie that far apart, but the tensor descriptors say H * dqk and H * dv.

    Args:
        fused: Meta's module of that operator.

    Raises:
        AttributeError: if it does not ask that way: another version, whose TMA path has to be looked at.
    """
    if not hasattr(fused, "_should_enable_tma"):
        raise AttributeError(f"{_FUSED} has no _should_enable_tma: see whether its descriptors have the right strides")
    fused._should_enable_tma = lambda: False


def thin_autotuners(index: int, slices: int) -> None:
    """Leave every `slices`-th candidate, from `index` on, to each autotuner of the Triton modules that are imported.

    Processes with an index each fill Triton's cache together; the tuners of one compile one candidate at a time. The
    candidates are run once and not timed.
    """
    from triton.runtime.autotuner import Autotuner

    def run_once(kernel_call: Callable[[], Any], quantiles: Sequence[float] = (0.5,)) -> list[float]:
        kernel_call()
        return [1.0] * len(quantiles)

    for module in [each for name, each in sys.modules.items() if name.startswith("generative_recommenders.ops.triton")]:
        for tuner in vars(module).values():
            if isinstance(tuner, Autotuner):
                tuner.configs = tuner.configs[index::slices] or tuner.configs[:1]
                # In some versions a cached property, in others an attribute.
                vars(tuner)["do_bench"] = run_once


def import_meta(repository: Path) -> types.SimpleNamespace:
    """Meta's modules from a checkout.

    Args:
        repository: folder with generative_recommenders/.

    Returns:
        The modules `dlrm_hstu`, `common`, `multitask`, `jagged`, and `stand_ins`, what had to be provided.

    Raises:
        FileNotFoundError: if it is no such folder.
        AttributeError: from `without_tma`.
    """
    if not (repository / "generative_recommenders" / "modules" / "dlrm_hstu.py").is_file():
        raise FileNotFoundError(f"{repository} has no generative_recommenders/modules/dlrm_hstu.py")
    stand_ins = provide_torchrec() + provide_fbgemm()
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
    names = {"dlrm_hstu": "modules.dlrm_hstu", "multitask": "modules.multitask_module"}
    names |= {"common": "common", "jagged": "ops.jagged_tensors"}
    modules = {key: importlib.import_module(f"generative_recommenders.{name}") for key, name in names.items()}
    without_tma(importlib.import_module(_FUSED))
    return types.SimpleNamespace(**modules, stand_ins=stand_ins)


class MetaModel:
    """DlrmHSTU for one user, with the host knowing every length.

    What DlrmHSTU.main_forward does, in its order and by its own submodules, but for what would wait for the GPU (it
    counts candidates with .item()) and the supervision labels, which predictions do not read. That is to the peer's
    advantage, and lets it be captured in a CUDA graph.

    Args:
        meta: from `import_meta`.
        state: parameters under Meta's keys.
        sizes: dimensions.
        device: where it runs.
        dtype: of parameters, tables and activations. Buffers stay float32: 86,400 is no float16.
        kernel: name in Meta's HammerKernel: TRITON, or PYTORCH, which needs no GPU.
    """

    def __init__(
        self,
        meta: types.SimpleNamespace,
        state: Mapping[str, Tensor],
        sizes: Sizes,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str,
    ) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self._meta, self._kernel = meta, meta.common.HammerKernel[kernel]
        values = hstu_config(sizes)
        values["multitask_configs"] = [
            meta.multitask.TaskConfig(
                task["task_name"], task["task_weight"], meta.multitask.MultitaskTaskType[task["task_type"]]
            )
            for task in values["multitask_configs"]
        ]
        values["merge_uih_candidate_feature_mapping"] = [
            tuple(pair) for pair in values["merge_uih_candidate_feature_mapping"]
        ]
        config = meta.dlrm_hstu.DlrmHSTUConfig(**values)
        self.model = meta.dlrm_hstu.DlrmHSTU(config, {}, is_inference=True, is_dense=True)
        self.tables = {name: state[_EMBEDDING.format(name)].to(device, dtype) for name in sizes.tables}
        dense = {key: value for key, value in state.items() if not key.startswith("_embedding_collection.")}
        self.model.load_state_dict(dense)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.to(device).eval().requires_grad_(False)
        self.model.recursive_setattr("_hammer_kernel", self._kernel)
        self._transducer = self.model._hstu_transducer

    def upload(self, request: Request) -> dict[str, Tensor]:
        """Features on the device, with the lengths that Meta's preprocessing makes."""
        features = {name: torch.from_numpy(values).to(self.device) for name, values in request.features.items()}
        lengths = {"uih_lengths": request.num_history, "num_candidates": request.num_candidates}
        return features | {name: torch.tensor([value], device=self.device) for name, value in lengths.items()}

    def _embeddings(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tables = {"item_id": "item_id", "item_candidate_id": "item_id", "user_id": "user_id"}
        tables |= {"item_category_id": "item_category_id", "item_candidate_category_id": "item_category_id"}
        return {name: F.embedding(features[name], self.tables[table]) for name, table in tables.items()}

    def _transducer_inputs(self, features: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the transducer: history and candidates joined, as in main_forward and _user_forward."""
        meta, named = self._meta, self._meta.dlrm_hstu.SequenceEmbedding
        history, candidates = features["item_id"].shape[0], features["item_query_time"].shape[0]
        cumsum = torch.ops.fbgemm.asynchronous_complete_cumsum
        uih_offsets, candidate_offsets = cumsum(features["uih_lengths"]), cumsum(features["num_candidates"])

        def joined(left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = meta.jagged.concat_2D_jagged(
                max_seq_len=history + candidates,
                max_len_left=history,
                offsets_left=uih_offsets,
                values_left=left,
                max_len_right=candidates,
                offsets_right=candidate_offsets,
                values_right=right,
                kernel=self._kernel,
            )
            return result

        lengths = features["uih_lengths"] + features["num_candidates"]
        sequences = {
            "item_id": named(lengths, joined(rows["item_id"], rows["item_candidate_id"])),
            "item_category_id": named(lengths, joined(rows["item_category_id"], rows["item_candidate_category_id"])),
            "user_id": named(torch.ones_like(lengths), rows["user_id"]),
        }
        times = joined(features["action_timestamp"][:, None], features["item_query_time"][:, None]).squeeze(-1)
        return {
            "max_uih_len": history,
            "max_targets": candidates,
            "total_uih_len": history,
            "total_targets": candidates,
            "seq_embeddings": sequences["item_id"].embedding,
            "seq_lengths": lengths,
            "seq_timestamps": times,
            "seq_payloads": self.model._construct_payload({"item_weights": features["item_weights"]}, sequences),
            "num_targets": features["num_candidates"],
        }

    def _logits(self, users: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        named = self._meta.dlrm_hstu.SequenceEmbedding
        names = ("item_candidate_id", "item_candidate_category_id")
        items = self.model._item_forward({name: named(None, rows[name]) for name in names})
        logits: Tensor = self.model._multitask_module._prediction_module(users * items)
        return logits[:, 0]

    def packed(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits [T] of all candidates in one forward."""
        rows = self._embeddings(features)
        users, _ = self._transducer(**self._transducer_inputs(features, rows))
        return self._logits(users, rows)

    def _first_activations(self, features: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
        """[C + U + T, D] in front of the first layer."""
        activations: Tensor = self._transducer._preprocess(**self._transducer_inputs(features, rows))[6]
        return activations

    def prime(self, features: Mapping[str, Tensor]) -> None:
        """Encode the history once and keep each layer's keys and values in the layers (STULayer's own cache).

        The last candidate goes through preprocessing alone: Meta measures all times from it.
        """
        last = {name: features[name][-1:] for name in self._candidate_names}
        last["num_candidates"] = torch.ones_like(features["num_candidates"])
        one = {**features, **last}
        cached = 1 + features["item_id"].shape[0]
        activations = self._first_activations(one, self._embeddings(one))[:cached]
        lengths = features["uih_lengths"] + 1
        self._transducer._stu_module(
            x=activations,
            x_lengths=lengths,
            x_offsets=torch.ops.fbgemm.asynchronous_complete_cumsum(lengths),
            max_seq_len=cached + features["item_query_time"].shape[0],
            num_targets=torch.zeros_like(lengths),
            max_kv_caching_len=cached,
            kv_caching_lengths=lengths,
        )

    def forget(self) -> None:
        """Drop what `prime` kept."""
        for layer in self._transducer._stu_module._stu_layers:
            layer.reset_kv_cache()

    def score(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits [T] of all candidates against the primed history, by STULayer.cached_forward."""
        none = {name: features[name][:0] for name in self._history_names}
        only = {**features, **none, "uih_lengths": torch.zeros_like(features["uih_lengths"])}
        rows = self._embeddings(only)
        delta = self._first_activations(only, rows)[1:]
        encoded = self._transducer._stu_module.cached_forward(delta_x=delta, num_targets=features["num_candidates"])
        users = self._transducer._output_postprocessor(
            seq_embeddings=encoded, seq_timestamps=features["item_query_time"], seq_payloads={}
        )
        return self._logits(users, rows)

    _history_names = ("item_id", "item_category_id", "item_weights", "action_timestamp")
    _candidate_names = ("item_candidate_id", "item_candidate_category_id", "item_query_time")
