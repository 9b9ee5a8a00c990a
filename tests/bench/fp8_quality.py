"""What attention with e4m3 operands does to ranking quality on MovieLens-100K, simulated in eager models; not a test.

The three trained models of quantisation_quality.py. Attention alone is computed in a form of fp8_forms.py, everything
else in float32. Each layer has one scale for each of q, k, v and the weights, from the requests of the same 943 users
before the labelled ones; quality is that of the labelled ones. attention_rms: root mean square of what the form changes
of a layer's attention over that of the attention, with the inputs that the layer has in that form; of the worst layer.

Run: python tests/bench/fp8_quality.py [--models demo research dlrm] [--output FILE]     (ten minutes on one core)
Files of requests and the demo's checkpoint are made as for quantisation_quality.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from bench_plugin import commit_of, today, write_rows  # noqa: E402
from fp8_forms import FORMS, Form, Rule, rounded, scale_of  # noqa: E402
from quantisation_quality import METRICS, MODELS, REQUESTS  # noqa: E402

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint  # noqa: E402
from hstu_compile.labelled_requests import labelled_requests  # noqa: E402
from hstu_compile.model import layer as layer_module  # noqa: E402
from hstu_compile.model.attention import hstu_attention  # noqa: E402
from hstu_compile.quality import (  # noqa: E402
    Answers,
    Quality,
    answers_of,
    changes,
    quality_of,
    score_difference,
    worst_change,
)

RESULTS = Path(__file__).resolve().parent / "results" / "fp8_quality.csv"
#: Values of a tensor that the search for a scale takes of each call.
_VALUES_OF_A_CALL = 50_000
OPERANDS = ("q", "k", "v", "p")
#: As it is outside the blocks that put another in its place.
_SILU = torch.nn.functional.silu
COLUMNS = (
    *("model", "form", *METRICS, *(f"change_{name}" for name in METRICS), "worst", "gained", "lost", "scores"),
    *("attention_rms", "requests", "checkpoint_sha256", "data_sha256", "torch", "commit", "date", "command"),
)


class Seen:
    """The values of one operand of one layer: the largest magnitude, and a sample."""

    def __init__(self) -> None:
        self.largest, self._samples = 0.0, list[Tensor]()
        self._generator = torch.Generator().manual_seed(0)

    def add(self, values: Tensor) -> None:
        """Take part in a call's values."""
        flat = values.reshape(-1)
        self.largest = max(self.largest, float(flat.abs().max()))
        chosen = torch.randint(len(flat), (min(len(flat), _VALUES_OF_A_CALL),), generator=self._generator)
        self._samples.append(flat[chosen])

    def scale(self, rule: Rule) -> float:
        """Of all that was seen."""
        return scale_of(torch.cat(self._samples), rule, self.largest)


#: What was seen of each layer, by operand.
Statistics = list[dict[str, Seen]]


class Observing:
    """In the place of the model's attention: shows its operands to the statistics of the layer that calls."""

    def __init__(self, statistics: Statistics) -> None:
        self._layers = itertools.cycle(statistics)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> Tensor:
        layer = next(self._layers)
        for name, values in zip("qkv", (q, k, v), strict=True):
            layer[name].add(values)

        def silu(scores: Tensor) -> Tensor:
            weights = _SILU(scores)
            layer["p"].add(weights)
            return weights

        with mock.patch("torch.nn.functional.silu", silu):
            return hstu_attention(q, k, v, *arguments, **named)


class Rounding:
    """In the place of the model's attention: computes it in a form, and measures what that changes.

    Args:
        form: how.
        statistics: of each layer, for its scales.
    """

    def __init__(self, form: Form, statistics: Statistics) -> None:
        self._form = form
        rules: dict[str, Rule] = {**dict.fromkeys("qkv", form.rule), "p": form.weight_rule}
        self._scales = [{name: layer[name].scale(rule) for name, rule in rules.items()} for layer in statistics]
        self._changed, self._size = [0.0] * len(statistics), [0.0] * len(statistics)
        self._layers = itertools.cycle(range(len(statistics)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> Tensor:
        layer, form = next(self._layers), self._form
        scales = self._scales[layer]
        exact = hstu_attention(q, k, v, *arguments, **named)
        operands = [
            rounded(values, number, scales[name])
            for name, values, number in zip("qkv", (q, k, v), (form.q, form.k, form.v), strict=True)
        ]
        with mock.patch("torch.nn.functional.silu", lambda scores: rounded(_SILU(scores), form.p, scales["p"])):
            out = rounded(hstu_attention(*operands, *arguments, **named), form.out, 1.0)
        self._changed[layer] += float((out - exact).double().square().sum())
        self._size[layer] += float(exact.double().square().sum())
        return out

    @property
    def worst_rms(self) -> float:
        """Of the layers, relative to the attention's own."""
        return max(math.sqrt(changed / size) for changed, size in zip(self._changed, self._size, strict=True))


def attention_is(replacement: Observing | Rounding) -> contextlib.AbstractContextManager[object]:
    """Every layer calls it while the block runs."""
    return mock.patch.object(layer_module, "hstu_attention", replacement)


def rows(name: str) -> Iterator[dict[str, Any]]:
    """All forms of one model, the exact one first."""
    checkpoint, config_file, data, _ = MODELS[name]
    spec = spec_from_checkpoint(checkpoint, config_from_file(config_file) if config_file is not None else None)
    model = model_from_spec(spec)
    num_layers = sum(isinstance(module, layer_module.HstuLayer) for module in model.modules())
    statistics = [{operand: Seen() for operand in OPERANDS} for _ in range(num_layers)]
    with attention_is(Observing(statistics)):
        answers_of(model, labelled_requests(REQUESTS / f"{data}-earlier.npz", spec.config))
    requests = labelled_requests(REQUESTS / f"{data}.npz", spec.config)
    exact = answers_of(model, requests)
    reference = quality_of(model, exact, requests)
    facts = {
        **{"model": name, "requests": requests.num_requests, "checkpoint_sha256": spec.sha256},
        **{"data_sha256": requests.sha256, "torch": torch.__version__, "commit": commit_of(), "date": today()},
        "command": f"fp8_quality.py --models {name}",
    }
    yield {"form": "float32", **measured(reference, reference, exact, exact), "attention_rms": 0.0, **facts}
    for form in FORMS:
        if form.sum_bits is not None:
            continue  # The eager model's products add exactly.
        rounding = Rounding(form, statistics)
        with attention_is(rounding):
            answers = answers_of(model, requests)
        found = measured(reference, quality_of(model, answers, requests), exact, answers)
        yield {"form": form.name, **found, "attention_rms": rounding.worst_rms, **facts}


def measured(reference: Quality, quality: Quality, exact: Answers, answers: Answers) -> dict[str, Any]:
    """Metrics of a form and their change."""
    row: dict[str, Any] = {"worst": worst_change(reference, quality), "scores": score_difference(exact, answers)}
    change = changes(reference, quality)
    for column, (metric,) in METRICS.items():
        if metric in quality.values:
            row |= {column: quality.values[metric], f"change_{column}": change[metric]}
    if quality.ranks is not None and reference.ranks is not None:
        now, before = quality.ranks <= 10, reference.ranks <= 10
        row |= {"gained": int((now & ~before).sum()), "lost": int((before & ~now).sum())}
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    found = []
    for name in arguments.models:
        for row in rows(name):
            found.append(row)
            numbers = (f"{key}={row[key]:.3g}" for key in ("worst", "scores", "attention_rms"))
            print(name, row["form"], *numbers, flush=True)
    write_rows(arguments.output, COLUMNS, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
