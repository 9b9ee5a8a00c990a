"""The end-to-end benchmark's baseline: the whole ranking model in plain PyTorch, written to be fast.

The arithmetic is that of m_falcon_eager.py, for batches, with the attention of end_to_end_attention.py; everything runs
in the half type, norms with PyTorch's own float32 sums. Lengths are constants of a model, as a deployment with a graph
for each shape has them, so nothing waits for the GPU and torch.compile and CUDA graphs take it whole.

Two forms differ in the projection of a layer: `joint`, one product whose parts are then copied, as Meta's modules have
it, and `split`, four products with contiguous results. The faster one counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from end_to_end_attention import attention
from end_to_end_workload import CACHED, CONTEXT, Case
from m_falcon_workload import Sizes
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_compile.model.ranking_config import TimeBucketFn
from hstu_compile.model.time_features import distance_thresholds

JOINT, SPLIT = "joint", "split"
FORMS = (JOINT, SPLIT)
_LAYER_EPS, _MLP_EPS = 1e-6, 1e-5
_PI = 3.14  # the original's
_MEASURED_IN = ((3600, 24), (86400, 7))
_BUCKETS: TimeBucketFn = "sqrt"

Attend = Callable[..., Tensor]


class PlainModel(nn.Module):
    """Logits of one case.

    Args:
        state: float32 parameters under Meta's keys.
        sizes: dimensions.
        case: shapes, mode and pruning.
        dtype: of parameters and activations.
        full_provider: who computes attention of all rows.
        query_provider: who computes it where only candidates ask; None lets all rows ask, and drops what nobody reads.
        form: JOINT or SPLIT.
        attend: the attention, with the operator's arguments.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        sizes: Sizes,
        case: Case,
        dtype: torch.dtype,
        full_provider: str,
        query_provider: str | None,
        form: str = JOINT,
        attend: Attend = attention,
    ) -> None:
        super().__init__()
        self.sizes, self.case, self.form, self.attend = sizes, case, form, attend
        self.full_provider, self.query_provider = full_provider, query_provider
        for key, tensor in state.items():
            kind = dtype if tensor.is_floating_point() else None
            self.register_buffer(_name(key), tensor.to(dtype=kind).clone())
        if form == SPLIT:
            self._split_projections()
        last = self._at("_hstu_transducer._positional_encoder._timestamp_embeddings_weight").shape[0] - 1
        self.register_buffer("thresholds", distance_thresholds(last, _BUCKETS).clone())
        for name, (_, units) in zip(("hours", "weekdays"), _MEASURED_IN, strict=True):
            angle = torch.arange(units, dtype=torch.float32) / units * 2 * _PI
            self.register_buffer(name, torch.stack([angle.cos(), angle.sin()], dim=1).to(dtype))

    def _at(self, key: str) -> Tensor:
        return self.get_buffer(_name(key))

    def _split_projections(self) -> None:
        for index in range(self.sizes.num_layers):
            layer = _layer(index)
            weight, bias = self._at(layer + "_uvqk_weight"), self._at(layer + "_uvqk_beta")
            for part, columns in zip("uvqk", self._parts(), strict=True):
                self.register_buffer(_name(f"{layer}weight_{part}"), weight[:, columns].contiguous())
                self.register_buffer(_name(f"{layer}bias_{part}"), bias[columns].contiguous())
            delattr(self, _name(layer + "_uvqk_weight"))
            delattr(self, _name(layer + "_uvqk_beta"))

    def _parts(self) -> tuple[slice, slice, slice, slice]:
        inner = self.sizes.num_heads * self.sizes.linear_dim
        query = self.sizes.num_heads * self.sizes.attention_dim
        bounds = (0, inner, 2 * inner, 2 * inner + query, 2 * inner + 2 * query)
        first, second, third, fourth = (slice(*each) for each in itertools.pairwise(bounds))
        return first, second, third, fourth

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Inputs of `packed_arrays`, or of `score_arrays` with `keys_i` and `values_i`: logits [T].

        keys_i and values_i are [B, rows, H * d], history first, with room for the candidates' rows, which are written.
        """
        return self._cached(features) if self.case.mode == CACHED else self._packed(features)

    # Parts of both.

    def _norm(self, x: Tensor, weight: str, bias: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._at(weight), self._at(bias), eps)

    def _mlp(self, key: str, x: Tensor, *, last_norm: bool = True) -> Tensor:
        hidden = F.linear(x, self._at(f"{key}.0.weight"), self._at(f"{key}.0.bias"))
        gate = self._norm(hidden, f"{key}.1.weight", f"{key}.1.bias", _MLP_EPS)
        out = F.linear(hidden * torch.sigmoid(gate), self._at(f"{key}.2.weight"), self._at(f"{key}.2.bias"))
        return self._norm(out, f"{key}.3.weight", f"{key}.3.bias", _MLP_EPS) if last_norm else out

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return F.embedding(ids, self._at(f"_embedding_collection.embeddings.{table}.weight"))

    def _events(self, items: Tensor, kinds: Tensor) -> Tensor:
        """Rows of events and candidates without their actions: [L, D]."""
        key = "_hstu_transducer._input_preprocessor."
        return self._mlp(key + "_content_embedding_mlp", items) + self._mlp(key + "_additional_embedding_mlp", kinds)

    def _actions(self, bits: Tensor | None) -> Tensor:
        """Rows of the events' actions, and last that of every candidate: [E + 1, D]."""
        key = "_hstu_transducer._input_preprocessor._action_encoder."
        rows = self._at(key + "_target_action_embedding_table")
        if bits is not None:
            seen = (bits[:, None].long() & self._at(key + "_combined_action_weights")) > 0
            table = self._at(key + "_action_embedding_table")
            rows = torch.cat([(seen[:, :, None] * table).view(bits.shape[0], -1), rows])
        return self._mlp("_hstu_transducer._input_preprocessor._action_embedding_mlp", rows)

    def _encoded(self, rows: Tensor, positions: Tensor, distance: Tensor) -> Tensor:
        key = "_hstu_transducer._positional_encoder."
        table = self._at(key + "_position_embeddings_weight")
        buckets = torch.bucketize(distance.clamp(min=0), self.get_buffer("thresholds"), right=True) - 1
        added = F.embedding(positions.clamp(max=table.shape[0] - 1), table)
        added = added + F.embedding(buckets, self._at(key + "_timestamp_embeddings_weight"))
        return rows * math.sqrt(self.sizes.width) + added

    def _projected(self, layer: str, x: Tensor, parts: str) -> list[Tensor]:
        """Some of u, v, q, k [L, H * d], contiguous; u behind its SiLU."""
        places = ["uvqk".index(part) for part in parts]
        if self.form == SPLIT:
            outs = [
                torch.addmm(self._at(f"{layer}bias_{each}"), x, self._at(f"{layer}weight_{each}")) for each in parts
            ]
        else:
            slices = [self._parts()[place] for place in places]
            weight, bias = self._at(layer + "_uvqk_weight"), self._at(layer + "_uvqk_beta")
            if len(parts) < 4:
                weight, bias = (torch.cat([each[..., one] for one in slices], dim=-1) for each in (weight, bias))
            joint = torch.addmm(bias, x, weight)
            outs = [each.contiguous() for each in joint.split([one.stop - one.start for one in slices], dim=1)]
        return [F.silu(out) if part == "u" else out for part, out in zip(parts, outs, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.sizes.num_heads, -1)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: tuple[Tensor, Tensor], targets: Tensor, provider: str
    ) -> Tensor:
        """[Lq, H * dv] of queries [Lq, H * dqk] and keys [Lk, H * dqk]."""
        longest = self.case.max_rows
        asked = longest if q.shape[0] == k.shape[0] else self.case.candidates
        alpha = float(self.sizes.attention_dim) ** -0.5
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        return self.attend(q, k, v, *offsets, targets, asked, longest, alpha, provider).flatten(1)

    def _output(self, layer: str, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        normed = self._norm(attended, layer + "_output_norm_weight", layer + "_output_norm_bias", _LAYER_EPS)
        return torch.addmm(x, torch.cat([u, attended, u * normed], dim=1), self._at(layer + "_output_weight"))

    def _input_norm(self, layer: str, x: Tensor) -> Tensor:
        return self._norm(x, layer + "_input_norm_weight", layer + "_input_norm_bias", _LAYER_EPS)

    def _logits(self, x: Tensor, times: Tensor, items: Tensor, kinds: Tensor) -> Tensor:
        key = "_hstu_transducer._output_postprocessor."
        circles = []
        for name, (period, units) in zip(("hours", "weekdays"), _MEASURED_IN, strict=True):
            unit = torch.div(times % (period * units), period, rounding_mode="floor")
            circles.append(F.embedding(unit, self.get_buffer(name)))
        combiner = key + "_time_feature_combiner."
        joined = torch.cat([x, *circles], dim=1)
        users = F.linear(joined, self._at(combiner + "weight"), self._at(combiner + "bias"))
        users = self._norm(users, key + "_layer_norm.weight", key + "_layer_norm.bias", _MLP_EPS)
        towers = self._mlp("_item_embedding_mlp", torch.cat([items, kinds], dim=1))
        logits = self._mlp("_multitask_module._prediction_module", users * towers, last_norm=False)
        return logits[:, 0]

    # One forward of everything.

    def _packed(self, features: dict[str, Tensor]) -> Tensor:
        case, batch, device = self.case, self.case.batch, features["item_id"].device
        num_events, num_candidates = case.num_events, case.num_candidates
        starts, candidate_starts = features["seq_offsets"].long(), features["candidate_offsets"].long()
        steps = torch.arange(batch + 1, device=device)
        offsets = starts + candidate_starts + CONTEXT * steps
        # Rows lie context, events, candidates; of several users they are brought into the users' order.
        places = torch.arange(CONTEXT * batch + num_events + num_candidates, device=device)
        # Not a slice of the offsets: torch.compile takes no view for the boundaries.
        ends = starts[1:] + candidate_starts[1:] + CONTEXT * steps[1:]
        owner = torch.bucketize(places, ends, right=True)
        index = places - offsets[owner]
        history = (starts[1:] - starts[:-1])[owner] + CONTEXT

        items = self._rows("item_id", torch.cat([features["item_id"], features["item_candidate_id"]]))
        kinds = torch.cat([features["item_category_id"], features["item_candidate_category_id"]])
        kind_rows = self._rows("item_category_id", kinds)
        actions = self._actions(features["item_weights"])
        rows = self._events(items, kind_rows)
        rows = rows + torch.cat([actions[:num_events], actions[num_events:].expand(num_candidates, -1)])
        rows = torch.cat([self._context(features, starts, candidate_starts), rows])
        query_times = features["item_query_time"]
        times = torch.cat([query_times.new_zeros(batch), features["action_timestamp"], query_times])
        if batch > 1:
            candidate_place = batch + num_events + candidate_starts[owner] + index - history
            source = torch.where(index < history, batch + starts[owner] + index - CONTEXT, candidate_place)
            source = torch.where(index < CONTEXT, owner, source)
            rows, times = rows[source], times[source]
        position = torch.where(index < CONTEXT, index, history - torch.minimum(index, history) + CONTEXT)
        anchors = times[offsets[1:] - 1][owner]
        x = self._encoded(rows, position, anchors - times)

        # Candidates are the last rows of each user.
        own = torch.arange(num_candidates, device=device)
        asking = own + (starts[1:] + CONTEXT * steps[1:])[torch.div(own, case.candidates, rounding_mode="floor")]
        bounds = offsets.int()
        targets = torch.full((batch,), case.candidates, dtype=torch.int32, device=device)
        for number in range(self.sizes.num_layers):
            is_last = number + 1 == self.sizes.num_layers
            if is_last and case.is_pruned:
                x = self._pruned_layer(number, x, asking, (features["candidate_offsets"], bounds), targets)
            else:
                x = self._layer(number, x, bounds, targets)
        if not case.is_pruned:
            x = x[asking]
        return self._logits(x, query_times, items[num_events:], kind_rows[num_events:])

    def _context(self, features: dict[str, Tensor], starts: Tensor, candidate_starts: Tensor) -> Tensor:
        key = "_hstu_transducer._input_preprocessor."
        counted = (starts[1:] - starts[:-1]) + (candidate_starts[1:] - candidate_starts[:-1])
        user = self._rows("user_id", features["user_id"])
        user = user * (counted >= self.sizes.min_history_len)[:, None]
        bias = self._at(key + "_batched_contextual_linear_bias")
        return torch.addmm(bias, user, self._at(key + "_batched_contextual_linear_weights")[0])

    def _layer(self, number: int, x: Tensor, bounds: Tensor, targets: Tensor) -> Tensor:
        layer = _layer(number)
        u, v, q, k = self._projected(layer, self._input_norm(layer, x), "uvqk")
        attended = self._attention(q, k, v, (bounds, bounds), targets, self.full_provider)
        return self._output(layer, x, u, attended)

    def _pruned_layer(
        self, number: int, x: Tensor, asking: Tensor, offsets: tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        """[T, D]: keys and values of all rows, everything else of the candidates' alone."""
        layer = _layer(number)
        normed = self._input_norm(layer, x)
        if self.query_provider is None:
            v, q, k = self._projected(layer, normed, "vqk")
            attended = self._attention(q, k, v, (offsets[1], offsets[1]), targets, self.full_provider)[asking]
            (u,) = self._projected(layer, normed[asking], "u")
        else:
            v, k = self._projected(layer, normed, "vk")
            u, q = self._projected(layer, normed[asking], "uq")
            attended = self._attention(q, k, v, offsets, targets, self.query_provider)
        return self._output(layer, x[asking], u, attended)

    # Candidates against what is kept of the history.

    def _cached(self, features: dict[str, Tensor]) -> Tensor:
        case, device = self.case, features["item_candidate_id"].device
        if self.query_provider is None:
            raise ValueError("cached scoring needs an attention of fewer queries than keys")
        items = self._rows("item_id", features["item_candidate_id"])
        kinds = self._rows("item_category_id", features["item_candidate_category_id"])
        times = features["item_query_time"]
        anchors = features["request_timestamps"][:, None].expand(-1, case.candidates).reshape(-1)
        positions = torch.full((1,), CONTEXT, device=device)
        x = self._encoded(self._events(items, kinds) + self._actions(None), positions, anchors - times)
        room = slice(CONTEXT + case.lengths[0], case.max_rows)
        bounds = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.max_rows
        targets = torch.full((case.batch,), case.candidates, dtype=torch.int32, device=device)
        for number in range(self.sizes.num_layers):
            layer = _layer(number)
            u, v, q, k = self._projected(layer, self._input_norm(layer, x), "uvqk")
            keys, values = features[f"keys_{number}"], features[f"values_{number}"]
            keys[:, room] = k.view(case.batch, case.candidates, -1)
            values[:, room] = v.view(case.batch, case.candidates, -1)
            offsets = (features["candidate_offsets"], bounds)
            attended = self._attention(
                q, keys.flatten(0, 1), values.flatten(0, 1), offsets, targets, self.query_provider
            )
            x = self._output(layer, x, u, attended)
        return self._logits(x, times, items, kinds)

    @torch.no_grad()
    def history_keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """keys_i and values_i of a cached case from the inputs of its packed forward, with room behind them.

        All users have histories of one length. The rows of candidates are not part of the time that is measured.
        """
        case = self.case
        kept: dict[str, Tensor] = {}
        attend, self.attend = self.attend, self._keeping(self.attend, kept)
        try:
            self._packed(features)
        finally:
            self.attend = attend
        history = CONTEXT + case.lengths[0]
        for name in list(kept):
            # NaN where the candidates' rows go: a forward that does not write them shows.
            kept[name] = kept[name].view(case.batch, case.max_rows, -1).clone()
            kept[name][:, history:] = torch.nan
        return kept

    def _keeping(self, attend: Attend, kept: dict[str, Tensor]) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
            number = len(kept) // 2
            kept[f"keys_{number}"], kept[f"values_{number}"] = k.flatten(1), v.flatten(1)
            return attend(q, k, v, *rest)

        return run


def _name(key: str) -> str:
    return key.replace(".", "__")


def _layer(index: int) -> str:
    return f"_hstu_transducer._stu_module._stu_layers.{index}."


def cached_names(num_layers: int) -> Sequence[str]:
    """Names of the keys and values of every layer."""
    return [f"{part}_{index}" for index in range(num_layers) for part in ("keys", "values")]
