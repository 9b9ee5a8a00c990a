from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.compare import error_bound, row_error
from hstu_compile.model.ranking import RankingModel
from tests import tolerances
from tests.dlrm_reference import (
    DlrmForm,
    Trap,
    dlrm_state_dict,
    draw_requests,
    packed_inputs,
    reference_answers,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "fixtures" / "meta_dlrm_ml100k"
# (events, candidates): below and above the least history of 20, with and without its candidates; nothing; only one.
SIZES = [(2, 20), (40, 3), (0, 4), (7, 0), (19, 1), (0, 0), (20, 0), (11, 5)]

CATEGORY, SHOP = "movie_category", "item_shop"
TWO_TASKS = (("like", "BINARY_CLASSIFICATION"), ("minutes", "REGRESSION"))
FORMS = {
    "plain": DlrmForm(),
    "one-head-one-layer": DlrmForm(num_heads=1, num_layers=1),
    "four-heads-three-layers": DlrmForm(num_heads=4, attention_dim=4, linear_dim=4, num_layers=3),
    "group-norm": DlrmForm(group_norm=True),
    "group-norm-dqk-above-dv": DlrmForm(group_norm=True, num_heads=3, attention_dim=9, linear_dim=4),
    "dqk-equals-dv": DlrmForm(attention_dim=8, linear_dim=8),
    "no-context": DlrmForm(contextual=()),
    "context-without-least-history": DlrmForm(contextual=(("user_id", 1, 0),)),
    "several-contexts": DlrmForm(contextual=(("user_id", 1, 20), ("genres", 3, 0), ("towns", 2, 20))),
    "least-history-without-candidates": DlrmForm(min_history_counts="history"),
    "category": DlrmForm(additional=(CATEGORY,)),
    "two-additional-and-a-shop": DlrmForm(additional=(CATEGORY, "movie_year"), item_only=(SHOP,)),
    "two-tasks": DlrmForm(tasks=TWO_TASKS),
    "five-tasks-by-number": DlrmForm(tasks=(("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1))),
    "regression-alone": DlrmForm(tasks=(("minutes", 1),)),
    "no-actions": DlrmForm(action_weights=()),
    "actions-of-several-bits": DlrmForm(action_weights=(3, 6, 1, 1 << 20, 5)),
    "l2-norm": DlrmForm(postprocessor="l2_norm"),
    "layer-norm": DlrmForm(postprocessor="layer_norm"),
    "clamp-at-table": DlrmForm(time_bucket_clamp="table"),
    "wider-than-the-time-table": DlrmForm(num_time_buckets=6),
    "log-buckets": DlrmForm(time_bucket_fn="log", time_bucket_clamp="table"),
    "fixed-divisor": DlrmForm(scaling_seq_len=57.0),
    "exact-hours": DlrmForm(time_feature_precision="exact"),
}


def save(form: DlrmForm, folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    path = folder / "ckpt.pt"
    torch.save(dlrm_state_dict(form) if state is None else state, path)
    return path


def model_of(form: DlrmForm, folder: Path, dtype: torch.dtype = torch.float64) -> RankingModel:
    model = model_from_spec(spec_from_checkpoint(save(form, folder), form.user_config()), dtype)
    assert isinstance(model, RankingModel)
    return model


def measured_errors(
    form: DlrmForm, model: RankingModel, trap: Trap | None = None, sizes: list[tuple[int, int]] = SIZES
) -> dict[str, float]:
    """Error of the activations of every layer, of both embeddings, of logits and predictions."""
    requests = draw_requests(form, sizes)
    expected = reference_answers(form, dlrm_state_dict(form), requests, trap).tensors()
    output = model.packed(packed_inputs(form, requests))
    actual = {f"activations {index}": rows for index, rows in enumerate(output.activations)}
    actual |= {
        "users": output.user_embeddings,
        "items": output.item_embeddings,
        "logits": output.logits,
        "preds": output.preds,
    }
    assert list(actual) == list(expected)
    return {name: row_error(tensor.numpy(), expected[name]).error for name, tensor in actual.items()}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_eager_model_equals_the_family_written_down_once_more(form: DlrmForm, tmp_path: Path) -> None:
    errors = measured_errors(form, model_of(form, tmp_path))
    assert max(errors.values()) <= tolerances.FLOAT64 * 1e3, errors


# Where a detail can be seen; most in the plain form.
TRAP_FORMS: dict[Trap, DlrmForm] = {
    "joint-norm": FORMS["group-norm"],
    "log10-buckets": FORMS["log-buckets"],
    "action-equality": FORMS["actions-of-several-bits"],
    "additional-in-content": FORMS["category"],
    "sigmoid-everywhere": FORMS["two-tasks"],
    "float32-times": FORMS["clamp-at-table"],
    "positions-without-context": FORMS["several-contexts"],
}
# An epsilon is small beside O(1) rows, and pi is not far from 3.14: still a hundred times what the agreement is held to.
SMALL_TRAPS = ("layer-eps-1e-5", "mlp-eps-1e-6", "postprocessor-eps-1e-6", "pi")


@pytest.mark.parametrize("trap", get_args(Trap))
def test_each_trap_of_the_family_would_be_seen(trap: Trap, tmp_path: Path) -> None:
    form = TRAP_FORMS.get(trap, FORMS["plain"])
    errors = measured_errors(form, model_of(form, tmp_path), trap)
    assert max(errors.values()) > (1e-7 if trap in SMALL_TRAPS else 1e-2), errors
