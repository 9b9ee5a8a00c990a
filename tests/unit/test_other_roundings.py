"""The eager model in other last bits, and that the verification's eager error knows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hstu_compile.artifacts import CheckpointSpec, Precision
from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.config import Limits
from hstu_compile.export import TORCH_DTYPES
from hstu_compile.model.families import model_from_state
from hstu_compile.model.other_roundings import other_roundings
from hstu_compile.model.product import product_sites
from hstu_compile.served import served_graphs
from hstu_compile.session_check import tensor_error
from hstu_compile.verify import references_from_spec
from tests.exported_models import MAX_SEQ_LEN, research_model

SITE = "layers.0.uvqk"


def product_of(dtype: torch.dtype, seed: int | None) -> torch.Tensor:
    """The first product of a model: as it is, or with other last bits."""
    model = research_model("fp32")
    model.cast(dtype)
    x = torch.randn(50, model.config.layer.embedding_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    site, weight = product_sites(model)[SITE].module, model.layers[0].uvqk_weight
    plain = site(x, weight)
    if seed is None:
        return plain
    with other_roundings(model, seed) as moved:
        assert moved is model
        result = site(x, weight)
    assert torch.equal(site(x, weight), plain), "the context left its hooks"
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_moves_to_a_neighbour_and_in_another_way_with_another_seed(dtype: torch.dtype) -> None:
    plain, one, other = (product_of(dtype, seed) for seed in (None, 0, 1))
    assert one.dtype == dtype
    steps = (one.double() - plain.double()).abs() / plain.double().abs()
    assert steps.max() <= torch.finfo(dtype).eps, "more than to the next number"
    assert 0.1 < (one != plain).double().mean() < 0.9
    assert not torch.equal(one, other)
    assert torch.equal(one, product_of(dtype, 0))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_eager_error_is_the_largest_of_four_runs(precision: Precision) -> None:
    model = research_model("fp32")
    spec = CheckpointSpec(Path("unread"), "0" * 64, "research", model.config, model.state_dict(), ())
    batches = retrieval_batches(model.config, max_batch=4, opt_batch=3, max_scores=1 << 20)
    limits = Limits(max_batch=4, opt_batch=3, max_seq_len=MAX_SEQ_LEN, opt_seq_len=8, top_k=5)
    [reference] = references_from_spec(spec, precision, batches, limits, lambda *done: None).graphs
    eager = model_from_state(spec.config, spec.state_dict, TORCH_DTYPES[precision])
    graph = served_graphs(eager, 5, None, None)[0]

    def error() -> float:
        answers = [graph.reference(feed.arrays, True)[reference.primary] for feed in reference.feeds]
        exact = [outputs[reference.primary] for outputs in reference.exact]
        return max(tensor_error("", low, high).error for low, high in zip(answers, exact, strict=True))

    errors = [error()]
    for seed in range(3):
        with other_roundings(eager, seed):
            errors.append(error())
    assert len(set(errors)) == 4
    assert reference.eager_error[reference.primary] == max(errors) > errors[0]
