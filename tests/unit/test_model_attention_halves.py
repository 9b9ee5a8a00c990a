"""A batch too large for memory is computed in halves; nobody may see the seam."""

import torch

from hstu_compile.model import attention


def test_large_batch_in_halves_equals_one_pass(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 5, 5, 17, 30], dtype=torch.int32)
    rows = 33  # three rows behind the last sequence
    q, k = (torch.randn(rows, 2, 8, generator=generator) for _ in range(2))
    v = torch.randn(rows, 2, 4, generator=generator)
    attrs = attention.AttentionAttrs(alpha=1.0, scaling_seq_len=10.0, max_query_len=64, max_seq_len=64)
    inputs = {
        "num_targets": torch.tensor([1, 0, 3, 2], dtype=torch.int32),
        "scaling_seq_lens": torch.tensor([3.0, 1.0, 7.0, 9.0]),
        "contextual_seq_lens": torch.tensor([1, 0, 2, 0], dtype=torch.int32),
        "pos_table": torch.randn(1, 127, generator=generator),
        "row_timestamps": torch.arange(rows),
        "col_timestamps": torch.arange(rows),
        "ts_table": torch.randn(2, 9, generator=generator),
        "ts_thresholds": torch.arange(1, 9),
    }
    whole = attention.hstu_attention(q, k, v, offsets, offsets, attrs, **inputs)
    monkeypatch.setattr(attention, "_MAX_SCORES", 10)
    halves = attention.hstu_attention(q, k, v, offsets, offsets, attrs, **inputs)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-6)
    assert not halves[30:].any()
