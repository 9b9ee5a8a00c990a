"""Stage 1: a .pt file to a `CheckpointSpec`. Level 3.

Input: a path, an optional configuration, an optional dialect. Output: configuration and weights under our names.
The file is untrusted: it is read with weights_only, and nothing in it is executed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.errors import CheckpointError, HstuCompileError, UnsupportedModelError
from hstu_compile.model.dialects import DIALECTS, Dialect, DialectError
from hstu_compile.model.families import HstuModel, ModelConfig, model_from_config

NATIVE_FORMAT = "hstu-compile/1"
_STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model")
_MAX_LISTED = 40
_PICKLE_PROTOCOL = b"\x80"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PROBLEM_CODES = {
    "config": "HSTU-E109",
    "heads": "HSTU-E107",
    "shape": "HSTU-E106",
    "keys": "HSTU-E105",
    "unsupported": "HSTU-E110",
}


def config_from_file(path: Path) -> dict[str, Any]:
    """Parse a configuration file.

    Raises:
        CheckpointError: if it is not a JSON object (HSTU-E109).
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            "HSTU-E109", f"cannot read the configuration {path}", str(error), "pass an existing JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "HSTU-E109", f"{path} is not JSON", str(error), "pass the JSON configuration of the training run"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            "HSTU-E109",
            f"{path} is not a configuration",
            f"the top level is a {type(values).__name__}, it must be an object",
            'write it as {"num_heads": 1, ...}',
        )
    return values


def _load(path: Path) -> Any:
    if path.is_dir():
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "it is a folder", "pass the .pt file inside it")
    if not path.is_file():
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "there is no such file", "check the path")
    if path.stat().st_size == 0:
        raise CheckpointError("HSTU-E101", f"cannot read {path}", "the file is empty (0 bytes)", "copy it again")
    try:
        with warnings.catch_warnings():
            # What torch notes about pickle protocols is part of the refusal or of no interest.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(
            "HSTU-E101", f"cannot read {path}", error.strerror or str(error), "check the file's permissions"
        ) from error
    except Exception as error:  # A damaged file makes the unpickler fail in whatever operation the damage leads to.
        text = str(error)
        if (refused := _REFUSED_GLOBAL.search(text)) and (_is_pickle_or_zip(path) or "is blocked" in text):
            raise CheckpointError(
                "HSTU-E102",
                f"{path} is refused: loading it could run code",
                f"the file names {refused[1]}; only tensors and plain containers are read",
                "save tensors only: torch.save({'model_state_dict': model.state_dict()}, path)",
            ) from error
        raise CheckpointError(
            "HSTU-E101",
            f"{path} is truncated or not a PyTorch checkpoint",
            _reason(error),
            "copy the file again, and check that torch.load(path, weights_only=True) reads it",
        ) from error


def _is_pickle_or_zip(path: Path) -> bool:
    """Whether torch.save can have written the file: a text file may hold what reads as the name of a function."""
    with path.open("rb") as file:
        return file.read(1) == _PICKLE_PROTOCOL or zipfile.is_zipfile(path)


def _reason(error: Exception) -> str:
    """The unpickler's own reason, without its advice to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is not a pickle of tensors and plain containers"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _state_dict_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)]
    for candidate in reversed(candidates):
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return _named_tensors(path, candidate)
    seen = ", ".join(map(repr, list(loaded)[:10])) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise CheckpointError(
        "HSTU-E103",
        f"{path} holds no state_dict",
        f"found {seen or 'an empty dict'}; looked for tensors at the top and under {', '.join(_STATE_DICT_KEYS)}",
        "save it as torch.save({'model_state_dict': model.state_dict()}, path)",
    )


def _named_tensors(path: Path, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _without_wrappers(str(key))
        if name in named:
            raise CheckpointError(
                "HSTU-E105",
                f"{path} holds {name} twice",
                f"{key} is the same parameter once the prefixes of wrappers are removed",
                "save the state_dict of one model",
            )
        named[name] = tensor
    return named


def _without_wrappers(key: str) -> str:
    """Strip what DistributedDataParallel and torch.compile put before every name."""
    while (stripped := key.removeprefix("module.").removeprefix("_orig_mod.")) != key:
        key = stripped
    return key


def _dialect(path: Path, keys: list[str], wanted: str | None) -> Dialect:
    names = ", ".join(dialect.name for dialect in DIALECTS)
    for dialect in DIALECTS:
        if dialect.name == wanted or (wanted is None and dialect.matches(keys)):
            if not dialect.matches(keys):
                raise CheckpointError(
                    "HSTU-E104",
                    f"{path} is not a checkpoint of dialect {wanted}",
                    f"its parameters are named {', '.join(sorted(keys)[:6])}, ...",
                    "leave --dialect out to detect the family",
                )
            return dialect
    if wanted is not None:
        raise CheckpointError("HSTU-E104", f"unknown dialect {wanted!r}", f"known: {names}", "pass one of them")
    raise CheckpointError(
        "HSTU-E104",
        f"{path} belongs to no known family",
        f"its parameters are named {', '.join(sorted(keys)[:6])}, ...; known families: {names}",
        "see the table of supported models in README",
    )


def _refusal(path: Path, error: DialectError) -> HstuCompileError:
    code = _PROBLEM_CODES[error.problem]
    cls = UnsupportedModelError if error.problem == "unsupported" else CheckpointError
    return cls(code, f"{path} cannot be read as an HSTU", str(error), error.fix)


def _listed(names: list[str], others: list[str]) -> str:
    lines = []
    for name in names[:_MAX_LISTED]:
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.75)
        lines.append(f"{name} (nearest: {near[0]})" if near else name)
    if len(names) > _MAX_LISTED:
        lines.append(f"... and {len(names) - _MAX_LISTED} more")
    return ", ".join(lines)


def _renamed(path: Path, dialect: Dialect, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    sources = dialect.sources(config)
    wanted = {source.key for source in sources.values()}
    missing = sorted(wanted - set(tensors))
    unexpected = sorted(key for key in set(tensors) - wanted if not dialect.is_ignored(key))
    if missing or unexpected:
        why = []
        if missing:
            why.append(f"missing {len(missing)}: {_listed(missing, unexpected)}")
        if unexpected:
            why.append(f"unexpected {len(unexpected)}: {_listed(unexpected, missing)}")
        raise CheckpointError(
            "HSTU-E105",
            f"{path} does not hold exactly the parameters of its model",
            "; ".join(why),
            "pass the whole model's state_dict and its configuration",
            {"missing": missing, "unexpected": unexpected},
        )
    _check_storage(path, [(key, tensors[key]) for key in sorted(wanted)])
    _check_constants(path, tensors, dialect.constants(config))
    # Shapes alone: a table of a hundred million rows is not drawn at random to be thrown away.
    with torch.device("meta"):
        expected = model_from_config(config).state_dict()
    wrong = []
    for name, source in sources.items():
        seen, needed = tuple(tensors[source.key].shape), source.source_shape(tuple(expected[name].shape))
        if seen != needed:
            wrong.append(f"{source.key} is {list(seen)}, the configuration needs {list(needed)}")
    if wrong:
        raise CheckpointError(
            "HSTU-E106",
            f"{len(wrong)} parameters of {path} contradict the configuration",
            "; ".join(wrong),
            "pass the configuration of this checkpoint with --config",
        )
    state = {
        name: source.convert(tensors[source.key].detach()).to(torch.float32, copy=True)
        for name, source in sources.items()
    }
    bad = [f"{sources[name].key} ({_bad_values(t)})" for name, t in state.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(
            "HSTU-E108",
            f"{len(bad)} parameters of {path} are not finite in float32",
            "; ".join(bad),
            "use an earlier checkpoint of the run",
        )
    return state


def _check_constants(path: Path, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    """Refuse a file whose buffers are not what the family's code has, or what the configuration says."""
    wrong = [
        f"{key} is {tensors[key].tolist()}, expected {expected.tolist()}"
        for key, expected in constants.items()
        if key in tensors and not torch.equal(tensors[key].to(expected.dtype), expected)
    ]
    if wrong:
        raise CheckpointError(
            "HSTU-E106",
            f"{len(wrong)} buffers of {path} contradict the configuration",
            "; ".join(wrong),
            "pass the configuration of this checkpoint with --config",
        )


def _check_storage(path: Path, tensors: list[tuple[str, Tensor]]) -> None:
    """Refuse tensors that are not plain arrays of floats, and shapes that claim more than the file holds."""
    odd = [
        f"{key} is {str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}"
        for key, tensor in tensors
        if tensor.dtype not in _FLOAT_TYPES or tensor.layout != torch.strided
    ]
    if odd:
        raise UnsupportedModelError(
            "HSTU-E110",
            f"{len(odd)} parameters of {path} are not plain float tensors",
            f"{'; '.join(odd)}; supported: dense float64, float32, float16, bfloat16",
            "save the weights before quantisation, as dense floats",
        )
    hollow = [
        key for key, tensor in tensors if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]
    if hollow:
        raise CheckpointError(
            "HSTU-E106",
            f"{len(hollow)} parameters of {path} claim more elements than the file stores",
            ", ".join(hollow),
            "save contiguous tensors, and use a file from a source that you trust",
        )


def _bad_values(tensor: Tensor) -> str:
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN, {inf} infinite of {tensor.numel()}"


def spec_from_checkpoint(
    path: Path,
    config: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    *,
    external_embeddings: bool = False,
) -> CheckpointSpec:
    """Read a checkpoint.

    Args:
        path: file that torch.save wrote: a state_dict, or a dict holding one.
        config: the training configuration, in the family's own names; needed where shapes do not tell.
        dialect: family name; None detects it from the parameter names.
        external_embeddings: leave the tables out of the model; its inputs are embedding rows.

    Returns:
        Configuration and float32 weights under our names.

    Raises:
        CheckpointError: HSTU-E101 to E109, by what is wrong.
        UnsupportedModelError: HSTU-E110, for a model of a kind that is not compiled.
    """
    loaded = _load(path)
    tensors = _state_dict_of(path, loaded)
    family = _dialect(path, list(tensors), dialect)
    if config is None and isinstance(loaded, Mapping) and isinstance(loaded.get("config"), Mapping):
        config = loaded["config"]
    try:
        if external_embeddings:
            config = family.with_external_embeddings(config)
        parsed = family.config({key: tuple(value.shape) for key, value in tensors.items()}, config)
    except DialectError as error:
        raise _refusal(path, error) from error
    state = _renamed(path, family, parsed, tensors)
    return CheckpointSpec(
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        dialect=family.name,
        config=parsed,
        state_dict=state,
        ignored_keys=tuple(sorted(set(tensors) - {source.key for source in family.sources(parsed).values()})),
    )


def model_from_spec(spec: CheckpointSpec, dtype: torch.dtype = torch.float32) -> HstuModel:
    """The eager model in evaluation mode, cast to `dtype`.

    Raises:
        CheckpointError: if a weight is finite in the checkpoint and infinite in `dtype` (HSTU-E111).
    """
    model = model_from_config(spec.config)
    model.load_state_dict(spec.state_dict)
    model.eval().requires_grad_(False)
    model.cast(dtype)
    overflown = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if overflown:
        raise CheckpointError(
            "HSTU-E111",
            f"{len(overflown)} parameters overflow {str(dtype).removeprefix('torch.')}",
            ", ".join(overflown),
            "build with --bf16 or --fp32",
        )
    return model
