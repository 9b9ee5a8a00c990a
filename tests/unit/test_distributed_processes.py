"""Checkpoints that two real processes wrote, as sharded training does: ShardedTensor and DTensor over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from hstu_compile.checkpoint import spec_from_checkpoint
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.research_reference import ResearchForm, research_state_dict

FORM, DLRM = ResearchForm(), DlrmForm()
TABLE = "_embedding_collection.embeddings."


def write_as_rank(rank: int, folder: str) -> None:
    """What one of two processes does: tables by rows and whole as ShardedTensor, a model by DTensor."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as OnRows
    from torch.distributed.tensor import distribute_tensor

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state = dlrm_state_dict(DLRM)
    sharded = {}
    for index, key in enumerate(key for key in state if key.startswith(TABLE)):
        table = state[key]
        # The first by rows, the others whole on the second rank.
        rows = [0, table.shape[0] // 3, table.shape[0]] if index == 0 else [0, 0, table.shape[0]]
        first, size = rows[rank], rows[rank + 1] - rows[rank]
        where = ShardMetadata([first, 0], [size, table.shape[1]], f"rank:{rank}/cpu")
        shards = [Shard(table[first : first + size].clone(), where)] if size else []
        sharded[key] = init_from_local_shards(shards, list(table.shape))
    writer = dcp.FileSystemWriter(f"{folder}/meta/sparse/")
    dcp.save({"sparse_dict": sharded}, storage_writer=writer)
    if rank == 0:
        dense = {key: torch.nn.Parameter(value, False) for key, value in state.items() if key not in sharded}
        content = {"dense_dict": dense, "sparse_tensor_keys": set(sharded), "global_step": {"train": 1, "eval": 0}}
        torch.save(content, f"{folder}/meta/non_sparse.ckpt")
    mesh = init_device_mesh("cpu", (2,))
    model = {
        key: distribute_tensor(value, mesh, [OnRows(0)]) if value.dim() else value
        for key, value in research_state_dict(FORM).items()
    }
    moments = {key: {"exp_avg": value, "step": torch.tensor(1.0)} for key, value in model.items()}
    dcp.save({"model": model, "optimizer": {"state": moments}}, checkpoint_id=f"{folder}/fsdp")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
@pytest.mark.timeout(600)
def test_folders_that_two_processes_wrote(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    torch.multiprocessing.spawn(write_as_rank, (str(tmp_path),), nprocs=2)
    for name, state, config in (
        ("fsdp", research_state_dict(FORM), FORM.user_config()),
        ("meta", dlrm_state_dict(DLRM), DLRM.user_config()),
    ):
        file = tmp_path / f"{name}.pt"
        torch.save(state, file)
        spec, reference = spec_from_checkpoint(tmp_path / name, config), spec_from_checkpoint(file, config)
        assert len(list((tmp_path / name).rglob("*.distcp"))) == 2
        assert (spec.config, list(spec.state_dict)) == (reference.config, list(reference.state_dict))
        assert all(torch.equal(spec.state_dict[key], value) for key, value in reference.state_dict.items())
