"""How accurate float32 can be: eight layers against float64 with errors put in on purpose; not a test.

Every row of results/fp32_accuracy.csv is a model of tests/gpu (`deep`: random weights, `cycled`: trained ones), a way
to compute it, and a value: the first layer's attention or the user embeddings of a feed that `hstu-compile build`
verifies with. Errors are those of `hstu_compile.compare`: largest difference in a row over the row's rms; median and
worst over rows and seeds. The ways:

- eager: float32 PyTorch on this CPU.
- stored xK: float64, every value that a layer stores multiplied by 1 + K * 2**-24 * r, r uniform in -1..1.
- silu by tanh D: float32 with SiLU = x * (0.5 + 0.5 * tanh(0.5 * x)), tanh multiplied by 1 + D * n, n normal.
- silu by exp: float32 with SiLU = x / (1 + exp(-x)), exp multiplied by 1 + 2**-22 * r, as a GPU's fast one is.

Run: python tests/bench/fp32_accuracy.py [--seeds 4] [--output FILE]          (a minute on one core)
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from hstu_compile.calibration.batches import RequestBatch, retrieval_batches  # noqa: E402
from hstu_compile.checkpoint import model_from_spec, spec_from_checkpoint  # noqa: E402
from hstu_compile.compare import row_errors  # noqa: E402
from hstu_compile.model.layer import UVQK, HstuLayer, JaggedBatch  # noqa: E402
from hstu_compile.model.retrieval import RetrievalModel  # noqa: E402
from tests.gpu.prepare_job import save_cycled_checkpoint, save_deep_checkpoint  # noqa: E402

FIXTURE = REPOSITORY.parent / "shared" / "fixtures" / "meta_research_ml100k"
RESULTS = Path(__file__).resolve().parent / "results" / "fp32_accuracy.csv"
SAVERS = {"deep": save_deep_checkpoint, "cycled": save_cycled_checkpoint}
#: As `hstu-compile build` has them by default.
MAX_BATCH, OPT_BATCH, MAX_SCORES = 64, 8, 1 << 24
UNIT_ROUNDOFF = 2.0**-24
STORED = (1, 2, 4, 8, 16)
TANH_ERRORS = (0.0, 6e-7, 5e-6, 4e-4)

Silu = Callable[[Tensor], Tensor]
#: A value that a layer stores, as it is stored.
Store = Callable[[Tensor], Tensor]
Way = tuple[str, torch.dtype, Callable[[torch.Generator], tuple[Silu, Store]]]


def same(value: Tensor) -> Tensor:
    """Store a value as it is."""
    return value


def silu_by_tanh(error: float, generator: torch.Generator) -> Silu:
    """TensorRT 8's spelling, with a tanh that errs by `error` of its value."""

    def silu(x: Tensor) -> Tensor:
        exact = torch.tanh(0.5 * x.double())
        tanh = exact * (1 + error * torch.randn(x.shape, generator=generator, dtype=torch.float64))
        return x * (0.5 + 0.5 * tanh.to(x.dtype))

    return silu


def silu_by_exp(generator: torch.Generator) -> Silu:
    """The spelling of the SpellOutSigmoid pass, with an exponential of 22 bits."""

    def silu(x: Tensor) -> Tensor:
        noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
        return x / (1 + (torch.exp(-x) * (1 + 2.0**-22 * noise)).to(x.dtype))

    return silu


def rounding(units: int, generator: torch.Generator) -> Store:
    """Store with a relative error of up to `units` roundings of float32."""

    def store(x: Tensor) -> Tensor:
        return x * (1 + units * UNIT_ROUNDOFF * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))

    return store


def ways() -> Iterator[Way]:
    """Label, dtype, and what makes SiLU and storing from a generator."""
    yield "eager", torch.float32, lambda _: (F.silu, same)
    for units in STORED:
        yield f"stored x{units}", torch.float64, lambda g, units=units: (F.silu, rounding(units, g))
    for error in TANH_ERRORS:
        yield f"silu by tanh {error:g}", torch.float32, lambda g, error=error: (silu_by_tanh(error, g), same)
    yield "silu by exp", torch.float32, lambda g: (silu_by_exp(g), same)


def layer_values(layer: HstuLayer, x: Tensor, batch: JaggedBatch, silu: Silu, store: Store) -> tuple[Tensor, Tensor]:
    """Attention and result of one layer, everything stored between its steps by `store`."""
    config, attention = layer.config, layer.config.attention
    if (config.silu_scope, config.output_concat, config.uvqk_bias) != ("uvqk", "gated", False) or not layer.input_norm:
        raise ValueError("this script knows the research family's layer only")
    projection = store(store(layer.input_norm(x)) @ layer.uvqk_weight)
    inner, qk = attention.num_heads * attention.linear_dim, attention.num_heads * attention.attention_dim
    uvqk = UVQK(*torch.split(store(silu(projection)), [inner, inner, qk, qk], dim=1))
    attended = store(layer.attend(uvqk, batch))
    gated = store(uvqk.u * store(layer.output_norm(attended)))
    return attended, store(gated @ layer.output_weight + layer.output_bias + x)


def model_values(model: RetrievalModel, feed: RequestBatch, silu: Silu, store: Store) -> dict[str, NDArray[Any]]:
    """The first layer's attention [L, D] and the user embeddings [B, D]."""
    arguments = {name: torch.from_numpy(values) for name, values in feed.arrays.items()}
    offsets = arguments["seq_offsets"]
    batch, position = model.batch(arguments["timestamps"], offsets, arguments["request_timestamps"])
    x = store(model.embed(arguments["item_ids"], arguments["timestamps"], position, None))
    attention = []
    for layer in model.layers:
        attended, x = layer_values(layer, x, batch, silu, store)
        attention.append(attended)
    return {"first attention": attention[0].numpy(), "user embeddings": model.user_embeddings(x, offsets).numpy()}


def rows_of(name: str, checkpoint: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """Results of one model."""
    spec = spec_from_checkpoint(checkpoint)
    models = {dtype: model_from_spec(spec, dtype) for dtype in (torch.float32, torch.float64)}
    feeds = retrieval_batches(spec.config, MAX_BATCH, OPT_BATCH, MAX_SCORES)
    exact = [model_values(models[torch.float64], feed, F.silu, same) for feed in feeds]
    for label, dtype, make in ways():
        for feed, reference in zip(feeds, exact, strict=True):
            runs = []
            for seed in range(1 if label == "eager" else seeds):
                silu, store = make(torch.Generator().manual_seed(seed))
                runs.append(model_values(models[dtype], feed, silu, store))
            for value, expected in reference.items():
                errors = np.stack([row_errors(run[value], expected) for run in runs])
                yield {
                    "model": name,
                    "way": label,
                    "value": value,
                    "feed": feed.name,
                    "median": f"{np.median(errors):.2e}",
                    "worst": f"{errors.max():.2e}",
                    "worst_row": int(errors.max(axis=0).argmax()),
                    "rows": errors.shape[1],
                    "seeds": len(runs),
                }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixture", type=Path, default=FIXTURE, help="folder of ckpt.pt and config.json")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, save in SAVERS.items():
            checkpoint = Path(folder) / f"{name}.pt"
            save(checkpoint, arguments.fixture)
            rows += list(rows_of(name, checkpoint, arguments.seeds))
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
