"""Stage 1: a .pt file or a folder of shards to a `CheckpointSpec`. Level 3.

Input: a path, an optional configuration, an optional dialect. Output: configuration and weights under our names.
The files are untrusted: tensors are read with weights_only, an index as data, and nothing in them is executed.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_compile.artifacts import CheckpointSpec
from hstu_compile.checkpoint_source import CheckpointSource, open_checkpoint
from hstu_compile.errors import CheckpointError, HstuCompileError, UnsupportedModelError
from hstu_compile.model.dialects import DIALECTS, NATIVE, NATIVE_FORMAT, Dialect, DialectError
from hstu_compile.model.families import HstuModel, ModelConfig, model_from_config, model_from_state

_MAX_LISTED = 40
# Whatever the version behind it.
_OUR_FORMATS = NATIVE_FORMAT.partition("/")[0] + "/"
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
        CheckpointError: if it is not a JSON object, or one of its objects has a key twice (HSTU-E109).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise CheckpointError(
                "HSTU-E109",
                f"{path} is ambiguous",
                f"one object has {', '.join(map(repr, twice))} more than once",
                "leave one of them",
            )
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
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


def _check_format(path: Path, source: CheckpointSource) -> None:
    """Refuse a file of ours that says to be in a format of another version; one that does not say is read."""
    is_native = NATIVE.matches(source.shapes)
    # Of a folder it would have to be read, and in another family's it may be anything.
    found = source.format() if is_native else source.file_format
    is_ours = is_native or (isinstance(found, str) and found.startswith(_OUR_FORMATS))
    if is_ours and found is not None and (not isinstance(found, str) or found != NATIVE_FORMAT):
        raise CheckpointError(
            "HSTU-E104",
            f"{path} is in an unknown format",
            f"its 'format' is {reprlib.repr(found)}; known: {NATIVE_FORMAT!r}",
            "read it with the version of hstu-compile that wrote it, or a newer one; a file that you wrote yourself as "
            f"docs/native-checkpoints.md says has {NATIVE_FORMAT!r} there",
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


def _renamed(path: Path, dialect: Dialect, config: ModelConfig, source: CheckpointSource) -> dict[str, Tensor]:
    shapes, sources = source.shapes, dialect.sources(config)
    wanted = {each.key for each in sources.values()}
    missing = sorted(wanted - set(shapes))
    unexpected = sorted(key for key in set(shapes) - wanted if not dialect.is_ignored(key))
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
    constants = dialect.constants(config)
    _check_constants(path, source.read(sorted(set(constants) & set(shapes))), constants)
    # Shapes alone: a table of a hundred million rows is not drawn at random to be thrown away.
    with torch.device("meta"):
        expected = model_from_config(config).state_dict()
    wrong = []
    for name, each in sources.items():
        seen, needed = shapes[each.key], each.source_shape(tuple(expected[name].shape))
        if seen != needed:
            wrong.append(f"{each.key} is {list(seen)}, the configuration needs {list(needed)}")
    if wrong:
        raise CheckpointError(
            "HSTU-E106",
            f"{len(wrong)} parameters of {path} contradict the configuration",
            "; ".join(wrong),
            "pass the configuration of this checkpoint with --config",
        )
    tensors = source.read(sorted(wanted))
    _check_storage(path, sorted(tensors.items()))
    # What is float32 already is no copy: a table of gigabytes would be in memory twice.
    state = {name: each.convert(tensors[each.key].detach()).to(torch.float32) for name, each in sources.items()}
    bad = [f"{sources[name].key} ({_bad_values(t)})" for name, t in state.items() if not _is_finite(t)]
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
        f"{key} is {_shown(tensors[key])}, expected {expected.tolist()}"
        for key, expected in constants.items()
        if key in tensors and not _equal(tensors[key], expected)
    ]
    if wrong:
        raise CheckpointError(
            "HSTU-E106",
            f"{len(wrong)} buffers of {path} contradict the configuration",
            "; ".join(wrong),
            "pass the configuration of this checkpoint with --config",
        )


def _equal(tensor: Tensor, expected: Tensor) -> bool:
    # The shape first: a buffer that claims a billion elements is not converted.
    return tensor.shape == expected.shape and torch.equal(tensor.to(expected.dtype), expected)


def _shown(tensor: Tensor) -> str:
    return str(tensor.tolist()) if tensor.numel() <= _MAX_LISTED else f"of shape {list(tensor.shape)}"


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
        path: file that torch.save wrote: a state_dict, or a dict holding one; or a folder that
            torch.distributed.checkpoint or Meta's DLRMv3 training wrote.
        config: the training configuration, in the family's own names; needed where shapes do not tell.
        dialect: family name; None detects it from the parameter names.
        external_embeddings: leave the tables out of the model; its inputs are embedding rows. The tables of a folder
            are then not read.

    Returns:
        Configuration and float32 weights under our names.

    Raises:
        CheckpointError: HSTU-E101 to E109, by what is wrong.
        UnsupportedModelError: HSTU-E110, for a model of a kind that is not compiled.
    """
    source = open_checkpoint(path, external_embeddings=external_embeddings)
    shapes = source.shapes
    _check_format(path, source)
    family = _dialect(path, list(shapes), dialect)
    if config is None:
        config = source.config()
    try:
        if external_embeddings:
            config = family.with_external_embeddings(config)
        parsed = family.config(shapes, config)
    except DialectError as error:
        raise _refusal(path, error) from error
    state = _renamed(path, family, parsed, source)
    return CheckpointSpec(
        path=path if path.name else path.absolute(),
        sha256=source.sha256(),
        dialect=family.name,
        config=parsed,
        state_dict=state,
        ignored_keys=tuple(sorted(set(shapes) - {each.key for each in family.sources(parsed).values()})),
    )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, without a mask as large as the tensor."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def model_from_spec(spec: CheckpointSpec, dtype: torch.dtype = torch.float32) -> HstuModel:
    """The eager model in evaluation mode, cast to `dtype`.

    A weight that keeps its type is shared with `spec`: neither is to be changed in place.

    Raises:
        CheckpointError: if a weight is finite in the checkpoint and infinite in `dtype` (HSTU-E111).
    """
    model = model_from_state(spec.config, spec.state_dict, dtype)
    overflown = [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]
    if overflown:
        raise CheckpointError(
            "HSTU-E111",
            f"{len(overflown)} parameters overflow {str(dtype).removeprefix('torch.')}",
            ", ".join(overflown),
            "build with --bf16 or --fp32",
        )
    return model
