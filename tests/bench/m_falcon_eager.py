"""The benchmark's model in plain PyTorch operators, for one user: the 'torch eager' peer, and the reference in float32.

Written from the formulas, on Meta's parameter names, and sharing no code with model/: what the peers and the engines
are compared with. Attention is dense, in chunks of rows. In a half type every operator works in that type, as in a
straight port to PyTorch, but for norms, whose sums PyTorch keeps in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from m_falcon_workload import Request, Sizes
from torch import Tensor
from torch.nn import functional as F

_LAYER_EPS, _MLP_EPS = 1e-6, 1e-5
#: Rows of attention at a time: 4 heads x 1024 x 10,241 scores are 80 MiB in float16.
_CHUNK = 1024
_PI = 3.14  # the original's
_MEASURED_IN = ((3600, 24), (86400, 7))  # hour of the day, day of the week


class EagerModel:
    """DLRM-HSTU of one user on dense tensors.

    Args:
        state: parameters under Meta's keys.
        sizes: dimensions.
        device: where it runs.
        dtype: of parameters and activations.
        largest_bucket: last time bucket: that of the table, or D - 1, which is what Meta's PyTorch path clamps to.
    """

    name = "torch_eager"

    def __init__(
        self, state: Mapping[str, Tensor], sizes: Sizes, device: torch.device, dtype: torch.dtype, largest_bucket: int
    ) -> None:
        self.sizes, self.device, self.dtype, self.largest_bucket = sizes, device, dtype, largest_bucket
        self._state = {
            key: tensor.to(device, dtype if tensor.is_floating_point() else None) for key, tensor in state.items()
        }

    def upload(self, request: Request) -> dict[str, Tensor]:
        """Features as tensors on the device."""
        return {name: torch.from_numpy(values).to(self.device) for name, values in request.features.items()}

    def _mlp(self, key: str, x: Tensor, *, last_norm: bool = True) -> Tensor:
        state = self._state
        hidden = F.linear(x, state[f"{key}.0.weight"], state[f"{key}.0.bias"])
        gate = F.layer_norm(hidden, hidden.shape[1:], state[f"{key}.1.weight"], state[f"{key}.1.bias"], _MLP_EPS)
        out = F.linear(hidden * torch.sigmoid(gate), state[f"{key}.2.weight"], state[f"{key}.2.bias"])
        if last_norm:
            out = F.layer_norm(out, out.shape[1:], state[f"{key}.3.weight"], state[f"{key}.3.bias"], _MLP_EPS)
        return out

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._state[f"_embedding_collection.embeddings.{table}.weight"])

    def _tokens(self, features: Mapping[str, Tensor], items: Tensor, categories: Tensor, num_history: int) -> Tensor:
        """[C + U + T, D]: contextual token, history, candidates, before positions."""
        state, key = self._state, "_hstu_transducer._input_preprocessor."
        num_candidates = items.shape[0] - num_history
        tokens = self._mlp(key + "_content_embedding_mlp", items)
        tokens = tokens + self._mlp(key + "_additional_embedding_mlp", categories)
        weights = state[key + "_action_encoder._combined_action_weights"]
        seen = (features["item_weights"][:, None].long() & weights) > 0
        table = state[key + "_action_encoder._action_embedding_table"]
        actions = (seen[:, :, None] * table).view(num_history, -1)
        unknown = state[key + "_action_encoder._target_action_embedding_table"].expand(num_candidates, -1)
        tokens = tokens + self._mlp(key + "_action_embedding_mlp", torch.cat([actions, unknown]))
        user = self._rows("user_id", features["user_id"])
        if num_history + num_candidates < self.sizes.min_history_len:
            user = torch.zeros_like(user)
        context = torch.addmm(
            state[key + "_batched_contextual_linear_bias"],
            user,
            state[key + "_batched_contextual_linear_weights"][0],
        )
        return torch.cat([context, tokens])

    def _encode(self, tokens: Tensor, times: Tensor, num_history: int) -> Tensor:
        """Add positions counted backwards from the candidates, and time before the last candidate's query."""
        key = "_hstu_transducer._positional_encoder."
        rows = torch.arange(len(tokens), device=self.device)
        # Row 0 is the contextual token; history rows are 1 to U, so the last of them is at 2 and candidates are at 1.
        positions = torch.where(rows == 0, 0, num_history + 2 - rows.clamp(max=num_history + 1))
        positions = positions.clamp(max=self._state[key + "_position_embeddings_weight"].shape[0] - 1)
        minutes = (times[-1] - times).float().clamp(min=1e-6) / 60.0
        buckets = minutes.sqrt().to(torch.int64).clamp(max=self.largest_bucket)
        added = F.embedding(positions, self._state[key + "_position_embeddings_weight"])
        added = added + F.embedding(buckets, self._state[key + "_timestamp_embeddings_weight"])
        return tokens * math.sqrt(self.sizes.width) + added

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, num_candidates: int) -> Tensor:
        """[L, H, d] each -> [L, H * dv]: history is causal, a candidate sees history and itself."""
        length, keys = q.shape[0], torch.arange(q.shape[0], device=self.device)
        history = length - num_candidates
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        # Half of the divisor before the product and half behind it, the first a power of two: undivided, sums of
        # thousands of rows overflow float16; all of it before, small weights lose their bits.
        before = 2.0 ** (round(math.log2(length)) // 2)
        chunks = []
        for first in range(0, length, _CHUNK):
            rows = keys[first : first + _CHUNK, None]
            valid = ((keys <= rows) & (keys < history)) | (keys == rows)
            scores = q[:, first : first + _CHUNK] @ k.transpose(1, 2) * (self.sizes.attention_dim**-0.5)
            weights = (F.silu(scores) / before).masked_fill_(~valid, 0.0)
            chunks.append(weights @ v * (before / length))
        return torch.cat(chunks, dim=1).transpose(0, 1).reshape(length, -1)

    def _layer(self, index: int, x: Tensor, num_candidates: int) -> Tensor:
        state, key, sizes = self._state, f"_hstu_transducer._stu_module._stu_layers.{index}.", self.sizes
        inner, query = sizes.num_heads * sizes.linear_dim, sizes.num_heads * sizes.attention_dim
        normed = F.layer_norm(
            x, x.shape[1:], state[key + "_input_norm_weight"], state[key + "_input_norm_bias"], _LAYER_EPS
        )
        packed = torch.addmm(state[key + "_uvqk_beta"], normed, state[key + "_uvqk_weight"])
        u, v, q, k = torch.split(packed, [inner, inner, query, query], dim=1)
        u = F.silu(u)
        v, q, k = (part.view(len(x), sizes.num_heads, -1) for part in (v, q, k))
        attended = self._attention(q, k, v, num_candidates)
        gated = u * F.layer_norm(
            attended, (inner,), state[key + "_output_norm_weight"], state[key + "_output_norm_bias"], _LAYER_EPS
        )
        return torch.addmm(x, torch.cat([u, attended, gated], dim=1), state[key + "_output_weight"])

    def _user(self, rows: Tensor, times: Tensor) -> Tensor:
        key = "_hstu_transducer._output_postprocessor."
        circles = []
        for period, units in _MEASURED_IN:
            elapsed = torch.div(times, period, rounding_mode="floor") % units
            angle = elapsed.float() / units * 2 * _PI
            circles += [angle.cos(), angle.sin()]
        features = torch.cat([rows, torch.stack(circles, dim=1).to(self.dtype)], dim=1)
        combiner = key + "_time_feature_combiner"
        combined = F.linear(features, self._state[combiner + ".weight"], self._state[combiner + ".bias"])
        norm = key + "_layer_norm"
        return F.layer_norm(
            combined, combined.shape[1:], self._state[norm + ".weight"], self._state[norm + ".bias"], _MLP_EPS
        )

    def packed(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits [T] of one user's candidates, T > 0."""
        num_history = features["item_id"].shape[0]
        query_times = features["item_query_time"]
        num_candidates = query_times.shape[0]
        items = self._rows("item_id", features["item_candidate_id"])
        kinds = self._rows("item_category_id", features["item_candidate_category_id"])
        history_items = self._rows("item_id", features["item_id"])
        history_kinds = self._rows("item_category_id", features["item_category_id"])
        tokens = self._tokens(
            features, torch.cat([history_items, items]), torch.cat([history_kinds, kinds]), num_history
        )
        times = torch.cat([query_times.new_zeros(1), features["action_timestamp"], query_times])
        x = self._encode(tokens, times, num_history)
        for index in range(self.sizes.num_layers):
            x = self._layer(index, x, num_candidates)
        users = self._user(x[1 + num_history :], query_times)
        towers = self._mlp("_item_embedding_mlp", torch.cat([items, kinds], dim=1))
        logits = self._mlp("_multitask_module._prediction_module", users * towers, last_norm=False)
        return logits[:, 0]
