"""What a checkpoint holds, before it is known what model it is: a .pt file, or a folder in shards. Level 3.

Names and shapes are known when it is opened; tensors of a folder are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hstu_compile.distributed_checkpoint import ShardFolder
from hstu_compile.errors import CheckpointError
from hstu_compile.files import file_sha256
from hstu_compile.saved_tensors import load_saved
from hstu_compile.shard_index import INDEX, NON_SPARSE, SPARSE, is_checkpoint_folder

STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model")
# In the files of Meta's DLRMv3 training.
_DENSE_KEY, _SPARSE_NAMES_KEY, _SPARSE_KEY = "dense_dict", "sparse_tensor_keys", "sparse_dict"
_CONFIG_KEY, _FORMAT_KEY = "config", "format"
# "optimizer", "optim", "optimizer_state_dict": what lies under them has the model's names as well.
_OPTIMIZER = "optim"
_MAX_DEPTH = 32
_MAX_LISTED = 10

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint, its tensors under their names without the prefixes of wrappers.

    Attributes:
        path: as the user gave it.
        file: the file that was read whole, if there is one.
        held: tensors that were read with that file.
        folder: the folder of shards, if there is one.
        sharded: names of the tensors in shards, to the folder's keys.
        file_config: the configuration in the file, if there is one.
        file_format: what the file says of its own format, if it does.
    """

    path: Path
    file: Path | None
    held: dict[str, Tensor] = dataclasses.field(repr=False)
    folder: ShardFolder | None = None
    sharded: dict[str, str] = dataclasses.field(default_factory=dict)
    file_config: Mapping[str, Any] | None = None
    file_format: Any = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor, read or not."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.held.items()}
        if self.folder is not None:
            shapes |= {name: self.folder.index.tensors[key].shape for name, key in self.sharded.items()}
        return shapes

    def config(self) -> Mapping[str, Any] | None:
        """The configuration that the checkpoint carries under "config", or None.

        Raises:
            CheckpointError: HSTU-E101, E102 if it cannot be read.
        """
        found = self.file_config if self.folder is None else _config_in(self.folder)
        return found if isinstance(found, Mapping) else None

    def format(self) -> Any:
        """What the checkpoint carries under "format", which may be anything; None without it.

        Raises:
            CheckpointError: HSTU-E101, E102 if it cannot be read.
        """
        if self.folder is None or self.folder.index.objects.get(_FORMAT_KEY) is None:
            return self.file_format
        return self.folder.object(_FORMAT_KEY)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors by name, in their own types.

        Raises:
            CheckpointError: see `ShardFolder.tensors`.
        """
        found = {name: self.held[name] for name in names if name in self.held}
        if self.folder is not None:
            keys = {name: self.sharded[name] for name in names if name in self.sharded}
            tensors = self.folder.tensors(keys.values())
            found |= {name: tensors[key] for name, key in keys.items()}
        return found

    def sha256(self) -> str:
        """Of what was read so far; see `CheckpointSpec.sha256`."""
        lines = []
        if self.file is not None:
            digest = file_sha256(self.file)
            if self.folder is None or not self.folder.digests:
                return digest
            lines.append(f"{self.file.name} {digest}")
        if self.folder is not None:
            lines += [f"{name} {digest}" for name, digest in self.folder.digests.items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def open_checkpoint(path: Path, *, external_embeddings: bool = False) -> CheckpointSource:
    """Open a checkpoint of any of the forms that are read.

    Args:
        path: a file of torch.save; a folder of torch.distributed.checkpoint; a folder of Meta's DLRMv3 training, or the
            file non_sparse.ckpt in it.
        external_embeddings: whether the tables may be absent.

    Raises:
        CheckpointError: HSTU-E101 if something cannot be read, E102 if it wants to run code, E103 if there is no
            state_dict, E105 if tables are missing or are there twice.
    """
    try:
        return _folder_source(path, external_embeddings) if path.is_dir() else _file_source(path, external_embeddings)
    except OSError as error:
        raise CheckpointError(
            "HSTU-E101", f"cannot read {path}", error.strerror or str(error), "check the permissions and the disk"
        ) from error


def _file_source(path: Path, external_embeddings: bool) -> CheckpointSource:
    loaded = _load(path)
    config = loaded.get(_CONFIG_KEY) if isinstance(loaded, Mapping) else None
    if isinstance(loaded, Mapping) and _DENSE_KEY in loaded:
        dense = _dense_tensors(path, loaded)
        if not external_embeddings and (lacking := sorted((_sparse_names(path, loaded) or set()) - set(dense))):
            raise CheckpointError(
                "HSTU-E105",
                f"{path} lacks {len(lacking)} tensors of its model",
                f"{_listed(lacking)} are in the folder {SPARSE} beside it",
                f"pass the folder, {path.parent}; with --embeddings external the file is enough",
                {"missing": lacking, "unexpected": []},
            )
        return CheckpointSource(path, path, dense, file_config=config)
    file_format = loaded.get(_FORMAT_KEY) if isinstance(loaded, Mapping) else None
    return CheckpointSource(path, path, _state_dict_of(path, loaded), file_config=config, file_format=file_format)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "there is no such file", "check the path")
    if path.stat().st_size == 0:
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "the file is empty (0 bytes)", "copy it again")
    return load_saved(path, str(path))


def _state_dict_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)]
    for candidate in reversed(candidates):
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return _by_name(path, candidate.items())
    seen = ", ".join(map(repr, list(loaded)[:10])) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise CheckpointError(
        "HSTU-E103",
        f"{path} holds no state_dict",
        f"found {seen or 'an empty dict'}; looked for tensors at the top and under {', '.join(STATE_DICT_KEYS)}",
        "save it as torch.save({'model_state_dict': model.state_dict()}, path)",
    )


def _by_name(path: Path, items: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """What the keys stand for, under their names without the prefixes of wrappers."""
    named: dict[str, Any] = {}
    for key, value in items:
        name = _without_wrappers(str(key))
        if name in named:
            raise CheckpointError(
                "HSTU-E105",
                f"{path} holds {name} twice",
                f"{key} is the same parameter once the prefixes of wrappers are removed",
                "save the state_dict of one model",
            )
        named[name] = value
    return named


def _without_wrappers(key: str) -> str:
    """Strip what DistributedDataParallel and torch.compile put before every name."""
    while (stripped := key.removeprefix("module.").removeprefix("_orig_mod.")) != key:
        key = stripped
    return key


def _listed(names: list[str]) -> str:
    more = f", ... and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


# --- Folders ----------------------------------------------------------------------------------------------------------


def _folder_source(path: Path, external_embeddings: bool) -> CheckpointSource:
    if (path / NON_SPARSE).exists():
        return _meta_source(path, external_embeddings)
    if (path / SPARSE).is_dir() and not (path / INDEX).exists():
        raise CheckpointError(
            "HSTU-E101",
            f"cannot read {path}",
            f"it has a folder {SPARSE}, of tables, and no {NON_SPARSE}, which holds all other weights",
            f"copy {NON_SPARSE} of the same step into it",
        )
    if is_checkpoint_folder(path):
        folder = ShardFolder(path)
        return CheckpointSource(path, None, {}, folder, _by_name(path, _sharded_keys(folder)))
    inside = sorted(each.name for each in path.iterdir() if is_checkpoint_folder(each))
    raise CheckpointError(
        "HSTU-E101",
        f"cannot read {path}",
        f"it is a folder without {NON_SPARSE} or {INDEX}, which a checkpoint in shards has",
        f"pass one of the checkpoints in it: {_listed(inside)}" if inside else "pass the .pt file inside it",
    )


def _meta_source(path: Path, external_embeddings: bool) -> CheckpointSource:
    file, sparse = path / NON_SPARSE, path / SPARSE
    loaded = _load(file)
    if not isinstance(loaded, Mapping) or _DENSE_KEY not in loaded:
        raise CheckpointError(
            "HSTU-E103", f"{file} holds no state_dict", f"it has no {_DENSE_KEY}", "pass the file of Meta's training"
        )
    dense, expected = _dense_tensors(file, loaded), _sparse_names(file, loaded)
    folder, sharded = None, {}
    if (sparse / INDEX).exists():
        folder = ShardFolder(sparse)
        keys = [(path[-1], key) for key, path in _paths(folder).items() if path[0] == _SPARSE_KEY and len(path) > 1]
        sharded = _by_name(sparse, keys)
    if twice := sorted(set(dense) & set(sharded)):
        raise CheckpointError(
            "HSTU-E105",
            f"{path} holds {len(twice)} tensors twice",
            f"{_listed(twice)}: in {NON_SPARSE} and in {SPARSE}",
            "pass the folder of one step of the training",
        )
    if not external_embeddings and expected is not None:
        _check_sparse(path, expected, set(dense), set(sharded), has_index=folder is not None)
    return CheckpointSource(path, file, dense, folder, sharded)


def _check_sparse(path: Path, expected: set[str], dense: set[str], sharded: set[str], *, has_index: bool) -> None:
    """Refuse a folder whose two halves are not of one training."""
    missing, unexpected = sorted(expected - dense - sharded), sorted(sharded - expected)
    if missing and not has_index:
        state = f"has no {INDEX}" if (path / SPARSE).is_dir() else "is not there"
        raise CheckpointError(
            "HSTU-E101",
            f"{path} lacks its tables",
            f"{NON_SPARSE} says that {_listed(missing)} are in the folder {SPARSE}, which {state}",
            f"copy {SPARSE} whole, or build with --embeddings external",
        )
    if missing or unexpected:
        why = [f"missing {len(missing)}: {_listed(missing)}"] if missing else []
        why += [f"unexpected {len(unexpected)}: {_listed(unexpected)}"] if unexpected else []
        raise CheckpointError(
            "HSTU-E105",
            f"{path / SPARSE} does not hold the tensors that {NON_SPARSE} says",
            "; ".join(why),
            "pass the folder of one step of the training, whole",
            {"missing": missing, "unexpected": unexpected},
        )


def _dense_tensors(path: Path, loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    dense = loaded[_DENSE_KEY]
    if not isinstance(dense, Mapping) or not all(isinstance(value, Tensor) for value in dense.values()):
        raise CheckpointError(
            "HSTU-E103",
            f"{path} holds no state_dict",
            f"its {_DENSE_KEY} is a {type(dense).__name__}, and not tensors by name",
            "use the file that Meta's training wrote",
        )
    return _by_name(path, dense.items())


def _sparse_names(path: Path, loaded: Mapping[Any, Any]) -> set[str] | None:
    """Names of what was sharded; None in a file that does not say."""
    names = loaded.get(_SPARSE_NAMES_KEY)
    if names is None:
        return None
    if not isinstance(names, (set, list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "HSTU-E103",
            f"{path} does not say which tensors are in {SPARSE}",
            f"its {_SPARSE_NAMES_KEY} is a {type(names).__name__}, and not names",
            "use the file that Meta's training wrote",
        )
    return {_without_wrappers(name) for name in names}


def _paths(folder: ShardFolder) -> dict[str, tuple[str, ...]]:
    """Tensors' keys to where they were in the dict that was saved."""
    return {key: tuple(map(str, folder.index.path_of(key))) for key in folder.index.tensors}


def _sharded_keys(folder: ShardFolder) -> list[tuple[str, str]]:
    """Name and key of each tensor of the model: of the state_dict that lies least deep."""
    paths = _paths(folder)
    homes = {path[:-1] for path in paths.values() if not any(step.startswith(_OPTIMIZER) for step in path[:-1])}
    for depth in range(1, 1 + max(map(len, homes), default=0)):
        for name in reversed(STATE_DICT_KEYS):
            found = sorted(home for home in homes if len(home) == depth and home[-1] == name)
            if len(found) > 1:
                raise CheckpointError(
                    "HSTU-E103",
                    f"{folder.path} holds {len(found)} models",
                    _listed([".".join(home) for home in found]),
                    "save the state_dict of one model",
                )
            if found:
                return [(path[-1], key) for key, path in paths.items() if path[:-1] == found[0]]
    top = [(path[0], key) for key, path in paths.items() if len(path) == 1]
    if top:
        return top
    if homes and all(home[0] == _SPARSE_KEY for home in homes):
        why, fix = f"it holds tables alone, under {_SPARSE_KEY}", f"pass the folder above, which has {NON_SPARSE}"
    else:
        seen = _listed(sorted({home[0] for home in homes})) or "no tensors"
        why = f"found {seen}; looked for tensors at the top and under {', '.join(STATE_DICT_KEYS)}"
        fix = "save it as torch.distributed.checkpoint.save({'model': model.state_dict()}, checkpoint_id=folder)"
    raise CheckpointError("HSTU-E103", f"{folder.path} holds no state_dict", why, fix)


class _Branch(dict[Any, Any]):
    """A dict or list that was taken apart when it was saved."""

    def joined(self) -> Any:
        """The dict; a list, where the keys are 0, 1, ... as numbers."""
        values = {key: value.joined() if isinstance(value, _Branch) else value for key, value in self.items()}
        if set(values) == set(range(len(values))):
            return [values[index] for index in range(len(values))]
        return values


def _config_in(folder: ShardFolder) -> Any:
    """What was saved under "config": each value of it is a part of its own."""
    root = _Branch()
    for key in folder.index.objects:
        path = folder.index.path_of(key)
        if path[0] != _CONFIG_KEY:
            continue
        branch = root
        for step in path[:-1]:
            branch = branch.setdefault(step, _Branch())
            if not isinstance(branch, _Branch):
                break
        if not isinstance(branch, _Branch) or isinstance(branch.get(path[-1]), _Branch) or len(path) > _MAX_DEPTH:
            raise CheckpointError(
                "HSTU-E101",
                f"{folder.path / INDEX} is damaged",
                f"{key} is in the place of another value",
                "copy the folder again, or pass the configuration with --config",
            )
        branch[path[-1]] = folder.object(key)
    return root.joined().get(_CONFIG_KEY) if root else None
