"""Folders of shards as several processes write them, made in one by torch.distributed.checkpoint's planner and writer.

A real ShardedTensor or DTensor needs a process group, which takes long to start; what the planner makes of it is the
same list of chunks. `tests/unit/test_distributed_processes.py` is the real thing.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

#: Where a value lies in the nested dict that is saved.
Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a tensor of shape `whole`, from `offsets` on."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor
    whole: tuple[int, ...]


def pieces(tensor: torch.Tensor, count: int, dim: int = 0) -> list[Piece]:
    """A tensor in `count` pieces along one dimension, of different sizes where it does not divide."""
    found, start = [], 0
    for part in tensor.tensor_split(count, dim):
        offsets = tuple(start if axis == dim else 0 for axis in range(tensor.dim()))
        found.append(Piece(offsets, part.contiguous(), tuple(tensor.shape)))
        start += part.shape[dim]
    return found


def row_wise(state: Mapping[Keys, torch.Tensor], ranks: int, dim: int = 0) -> list[dict[Keys, Piece]]:
    """Every tensor over all ranks; one without dimensions, or too small, is on the first."""
    shares: list[dict[Keys, Piece]] = [{} for _ in range(ranks)]
    for keys, tensor in state.items():
        if tensor.dim() <= dim or tensor.shape[dim] < ranks:
            shares[0][keys] = Piece((0,) * tensor.dim(), tensor, tuple(tensor.shape))
            continue
        for share, piece in zip(shares, pieces(tensor, ranks, dim), strict=True):
            share[keys] = piece
    return shares


def table_wise(state: Mapping[Keys, torch.Tensor], ranks: int) -> list[dict[Keys, Piece]]:
    """Every tensor whole, on one rank after another; the last rank first, so that the order is another one."""
    shares: list[dict[Keys, Piece]] = [{} for _ in range(ranks)]
    for index, (keys, tensor) in enumerate(state.items()):
        shares[-1 - index % ranks][keys] = Piece((0,) * tensor.dim(), tensor, tuple(tensor.shape))
    return shares


class _Planner(DefaultSavePlanner):
    """The planner of one rank, which has the pieces in place of sharded tensors."""

    def __init__(self, share: Mapping[Keys, Piece]) -> None:
        super().__init__()
        self._pieces = {".".join(keys): (keys, piece) for keys, piece in share.items()}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(key, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape),
                    properties=TensorProperties.create_from_tensor(piece.tensor),
                    size=torch.Size(piece.whole),
                ),
            )
            for key, (_, piece) in self._pieces.items()
        ]
        self.plan = SavePlan(items, planner_data={key: keys for key, (keys, _) in self._pieces.items()})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._pieces[write_item.index.fqn][1].tensor


def save_shares(folder: Path, shares: Sequence[Mapping[Keys, Piece]]) -> Path:
    """Write what each rank has; returns the folder."""
    writer = FileSystemWriter(folder, sync_files=False)
    writer.set_up_storage_writer(True)
    planners = [_Planner(share) for share in shares]
    for planner in planners:
        planner.set_up_planner({}, is_coordinator=True)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, planner).wait() for plan, planner in zip(plans, planners, strict=True)]
    writer.finish(metadata, results)
    return folder


def save_meta(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    sparse: Sequence[str],
    shares: Sequence[Mapping[Keys, Piece]] | None = None,
) -> Path:
    """What Meta's DLRMv3 training writes, with the tensors named `sparse` in shards.

    Args:
        folder: to be made.
        state: the model's state_dict.
        sparse: names of sharded tensors.
        shares: what each rank has of them; None spreads the rows over 2.
    """
    folder.mkdir(parents=True)
    dense = {key: torch.nn.Parameter(value, requires_grad=False) for key, value in state.items() if key not in sparse}
    optimizer = {"state": {key: {"exp_avg": value.clone()} for key, value in dense.items()}, "param_groups": [{}]}
    metrics: dict[str, list[Any]] = {"train": [{"ne": torch.zeros(1)}], "eval": []}
    content = {
        "dense_dict": dense,
        "optimizer_dict": optimizer,
        "class_metrics": metrics,
        "reg_metrics": {"train": [], "eval": []},
        "global_step": {"train": 7, "eval": 0},
        "sparse_tensor_keys": set(sparse),
    }
    torch.save(content, folder / "non_sparse.ckpt")
    (folder / "sparse").mkdir()
    if shares is None:
        shares = row_wise({("sparse_dict", key): state[key] for key in sparse}, 2)
    save_shares(folder / "sparse", shares)
    return folder


def read_metadata(folder: Path) -> Metadata:
    """The index as torch reads it: for files that a test made itself."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301, TID251
    assert isinstance(metadata, Metadata)
    return metadata


def write_metadata(folder: Path, metadata: Any) -> None:
    """Put an object in the place of the index."""
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
