"""Fused jagged HSTU attention, one Triton source for every GPU, dtype, mask and bias of ``hstu::HstuAttention``.

For sequence b with Lq_b query rows, Lk_b key rows, T candidates at its tail, h = Lk_b - T history rows, contextual
prefix C and absolute row i = (Lk_b - Lq_b) + r::

    out_i = sum_j allowed(i, j) * SiLU(alpha * <q_i, k_j> + bias(i, j)) * v_j / scaling_seq_len

``allowed`` and ``bias`` are those of HstuAttention_PluginConfig.yaml.  Level: kernels, below everything; imports triton
only.

With a cache (HAS_CACHE) the keys of a sequence are its rows of k_cached, then its rows of k: two segments in memory,
one range of columns j.  Whole key tiles that lie in the cache are loaded as without one, from the other tensor; every
other tile goes through the loop for cut tiles, where each column picks its segment's address.

Memory: q [Lq, H, Dqk], k [Lk, H, Dqk], v [Lk, H, Dv], k_cached [Lc, H, Dqk], v_cached [Lc, H, Dv], out [Lq, H, Dv],
contiguous but for the rows of q, k and v, which may lie in a wider tensor: they are q_stride, k_stride and v_stride
elements apart, multiples of 16 in kernels for aligned tensors.  Offsets int32 [B + 1] on the device.
Nothing is padded in memory and no workspace is used.  Row pointers are 64-bit: Lk * H * D passes 2^31 at 4.2 M tokens
of 512.

Grid: (Lq // BLOCK_M + B + 1, H).  The tiles of sequence b start at slot q_offsets[b] // BLOCK_M + b.  These starts are
strictly increasing and leave room for ceil(Lq_b / BLOCK_M) tiles, so the host needs no maximum length and reads no
device data. Each program finds its sequence by counting starts <= slot in the same pass that validates all offset
vectors.

Masking, per row: ``allowed(i, j) = j < history_end(i) or own_begin(i) <= j <= i`` and, under a window,
``position(j) >= window_begin(i)``.  history_end is exclusive, own_begin inclusive.  Key tiles that every row of the
query tile sees whole take a loop without mask arithmetic; the window's left edge, the diagonal and the row's own
candidate group take the other.  Columns of other candidates' groups are never loaded when a whole tile lies between the
history and the group.

Numerics: scores, SiLU and sums in float32 (float32 inputs multiply in IEEE float32, never TF32); the SiLU weight is
rounded to the input dtype before it meets v, and the divisor is applied to the float32 sum.  A row without an allowed
key writes 0.  Rows of other sequences and behind the sequence's end are never loaded, so their NaN or Inf cannot reach
the output; a non-finite v row inside a sequence may also reach rows of the same query tile that do not see it (0 * NaN
in the tile product).
"""

# Triton types kernel parameters at compile time and ships no type information.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

#: Offsets read per step of the scan; one per thread of the smallest block.
_SCAN_CHUNK = tl.constexpr(128)
#: Thresholds read per step when a tile's range of time buckets is counted.
_THRESHOLD_CHUNK = tl.constexpr(128)
_LOG2_E = tl.constexpr(1.4426950408889634)
#: Below every position, so that a row without a window passes its comparison.
_NO_WINDOW = tl.constexpr(-(2**30))


@triton.jit
def _locate_sequence(
    q_offsets, k_offsets, cache_offsets, slot, B, Lq, Lk, Lc, BLOCK_M: tl.constexpr, HAS_CACHE: tl.constexpr
):
    """Find the sequence that owns ``slot`` and check all offset vectors in one pass.

    Returns ``(sequence, is_valid)``: the last sequence whose first slot is <= slot (-1 when there is none) and whether
    0 == offsets[0] <= ... <= offsets[B] <= L holds for queries, keys and cached keys.
    """
    lanes = tl.arange(0, _SCAN_CHUNK)
    starts = tl.zeros([_SCAN_CHUNK], dtype=tl.int32)
    faults = tl.zeros([_SCAN_CHUNK], dtype=tl.int32)
    for chunk in range(0, B, _SCAN_CHUNK):
        index = chunk + lanes
        is_sequence = index < B
        q_begin = tl.load(q_offsets + index, mask=is_sequence, other=0)
        q_end = tl.load(q_offsets + index + 1, mask=is_sequence, other=0)
        k_begin = tl.load(k_offsets + index, mask=is_sequence, other=0)
        k_end = tl.load(k_offsets + index + 1, mask=is_sequence, other=0)
        # 64 bits: a hostile offset near 2^31 plus index must not wrap.
        first_slot = (q_begin // BLOCK_M).to(tl.int64) + index
        starts += (is_sequence & (first_slot <= slot)).to(tl.int32)
        faults += ((q_end < q_begin) | (k_end < k_begin)).to(tl.int32)
        if HAS_CACHE:
            c_begin = tl.load(cache_offsets + index, mask=is_sequence, other=0)
            c_end = tl.load(cache_offsets + index + 1, mask=is_sequence, other=0)
            faults += (c_end < c_begin).to(tl.int32)
    is_valid = (
        (tl.sum(faults, 0) == 0)
        & (tl.load(q_offsets) == 0)
        & (tl.load(k_offsets) == 0)
        & (tl.load(q_offsets + B) <= Lq)
        & (tl.load(k_offsets + B) <= Lk)
    )
    if HAS_CACHE:
        is_valid = is_valid & (tl.load(cache_offsets) == 0) & (tl.load(cache_offsets + B) <= Lc)
    return tl.sum(starts, 0) - 1, is_valid


@triton.jit
def _distance(a, b, MAX: tl.constexpr):
    """Return |a - b| of signed integers, saturated at MAX, exact below it and free of overflow."""
    difference = tl.maximum(a, b) - tl.minimum(a, b)
    return tl.where(difference < 0, MAX, difference)


@triton.jit
def _gap(a, b, MAX: tl.constexpr):
    """Return max(a - b, 0) of signed integers, saturated at MAX."""
    return tl.where(a > b, _distance(a, b, MAX), 0)


@triton.jit
def _time_bias(row_time, col_time, ts_table, ts_thresholds, num_buckets, MAX: tl.constexpr):
    """Return ts_table[#{m : ts_thresholds[m] <= |row_time - col_time|}] as [BLOCK_M, BLOCK_N] float32.

    The extreme distances of the tile bound its buckets.  Sessions put most tiles far from the diagonal into one bucket,
    which needs no work per element; the others search only between the bounds.
    """
    row_min = tl.min(row_time, 0)
    row_max = tl.max(row_time, 0)
    col_min = tl.min(col_time, 0)
    col_max = tl.max(col_time, 0)
    shortest = tl.maximum(_gap(row_min, col_max, MAX), _gap(col_min, row_max, MAX))
    longest = tl.maximum(_gap(row_max, col_min, MAX), _gap(col_max, row_min, MAX))

    # Both counts in one reduction: num_buckets <= 4096, so each fits 16 bits.
    lanes = tl.arange(0, _THRESHOLD_CHUNK)
    counts = tl.zeros([_THRESHOLD_CHUNK], dtype=tl.int32)
    for chunk in range(0, num_buckets, _THRESHOLD_CHUNK):
        index = chunk + lanes
        threshold = tl.load(ts_thresholds + index, mask=index < num_buckets, other=MAX)
        is_bucket = index < num_buckets
        counts += (is_bucket & (threshold <= shortest)).to(tl.int32)
        counts += (is_bucket & (threshold <= longest)).to(tl.int32) << 16
    total = tl.sum(counts, 0)
    first = total & 0xFFFF
    last = tl.maximum(total >> 16, first)

    bucket = tl.zeros([row_time.shape[0], col_time.shape[0]], dtype=tl.int32) + first
    if last > first:
        distance = _distance(row_time[:, None], col_time[None, :], MAX)  # [BLOCK_M, BLOCK_N]
        step = 1
        while step * 2 <= last - first:
            step = step * 2
        while step > 0:
            candidate = tl.minimum(bucket + step, last)
            threshold = tl.load(ts_thresholds + tl.maximum(candidate - 1, 0))
            bucket = tl.where(threshold <= distance, candidate, bucket)
            step = step // 2
    return tl.load(ts_table + bucket)


@triton.jit
def _is_allowed(cols, rows, history_end, own_begin, window_begin, history, context, MASK_KIND: tl.constexpr):
    """Return the mask [BLOCK_M, BLOCK_N] of a key tile; True where the row may attend to the column."""
    if MASK_KIND == 0:
        return cols[None, :] <= rows[:, None]
    else:
        is_own = (cols[None, :] >= own_begin[:, None]) & (cols[None, :] <= rows[:, None])
        is_allowed = (cols[None, :] < history_end[:, None]) | is_own
        position = tl.where(cols < context, 0, tl.minimum(cols, history) - tl.maximum(context - 1, 0))
        return is_allowed & (position[None, :] >= window_begin[:, None])


@triton.jit
def _accumulate(
    acc,
    q,
    k_head,
    v_head,
    k_cached_head,
    v_cached_head,
    start,
    is_edge,
    rows,
    history_end,
    own_begin,
    window_begin,
    row_time,
    pos_row,
    col_timestamps,
    pos_table,
    ts_table,
    ts_thresholds,
    alpha,
    num_keys,
    num_cached,
    history,
    context,
    k_stride,
    v_stride,
    k_cached_stride,
    v_cached_stride,
    Dqk,
    Dv,
    pos_last,
    num_buckets,
    BLOCK_N: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    POS_BIAS: tl.constexpr,
    TIME_BIAS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    CHECK_COLS: tl.constexpr,
    TWO_SEGMENTS: tl.constexpr,
    TIME_MAX: tl.constexpr,
):
    """Add the key tile [start, start + BLOCK_N) to ``acc`` [BLOCK_M, BLOCK_DV] and return it.

    ``is_edge`` says whether the mask cuts the tile; a compile-time False or True leaves the other path out of the code.
    CHECK_COLS is needed where the tile may reach past the last key.  With TWO_SEGMENTS the first ``num_cached`` columns
    are rows of the cached heads, the others rows of the heads; otherwise all are rows of the heads.
    """
    cols = start + tl.arange(0, BLOCK_N)
    dims_qk = tl.arange(0, BLOCK_DQK)
    dims_v = tl.arange(0, BLOCK_DV)
    if TWO_SEGMENTS:
        is_cached = cols < num_cached
        key_rows = tl.where(is_cached, cols, cols - num_cached).to(tl.int64)
        k_rows = tl.where(is_cached, k_cached_head, k_head)  # [BLOCK_N]
        v_rows = tl.where(is_cached, v_cached_head, v_head)
        k_rows += key_rows * tl.where(is_cached, k_cached_stride, k_stride)
        v_rows += key_rows * tl.where(is_cached, v_cached_stride, v_stride)
        k_pointers = k_rows[:, None] + dims_qk[None, :]  # [BLOCK_N, BLOCK_DQK]
        v_pointers = v_rows[:, None] + dims_v[None, :]  # [BLOCK_N, BLOCK_DV]
    else:
        k_pointers = k_head + cols.to(tl.int64)[:, None] * k_stride + dims_qk[None, :]  # [BLOCK_N, BLOCK_DQK]
        v_pointers = v_head + cols.to(tl.int64)[:, None] * v_stride + dims_v[None, :]  # [BLOCK_N, BLOCK_DV]
    if CHECK_COLS:
        k = tl.load(k_pointers, mask=(cols < num_keys)[:, None] & (dims_qk < Dqk)[None, :], other=0.0)
        v = tl.load(v_pointers, mask=(cols < num_keys)[:, None] & (dims_v < Dv)[None, :], other=0.0)
    else:
        k = tl.load(k_pointers, mask=(dims_qk < Dqk)[None, :], other=0.0)
        v = tl.load(v_pointers, mask=(dims_v < Dv)[None, :], other=0.0)

    # The bias first: it hides the latency of k and v, which the loop with a time bias cannot load ahead.
    bias = tl.zeros([rows.shape[0], BLOCK_N], dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
    if TIME_BIAS:
        col_time = tl.load(col_timestamps + tl.minimum(cols, num_keys - 1))
        bias += _time_bias(row_time, col_time, ts_table, ts_thresholds, num_buckets, TIME_MAX)
    if POS_BIAS:
        index = tl.minimum(cols, history)[None, :] + pos_row[:, None]
        # Sequences longer than the table share its outermost entries.
        bias += tl.load(pos_table + tl.minimum(tl.maximum(index, 0), pos_last))
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * alpha + bias  # [BLOCK_M, BLOCK_N]
    weight = score / (1.0 + tl.exp2(score * -_LOG2_E))  # SiLU; exp2 -> inf gives -0, never NaN, for finite scores
    if is_edge:
        is_allowed = _is_allowed(cols, rows, history_end, own_begin, window_begin, history, context, MASK_KIND)
        weight = tl.where(is_allowed, weight, 0.0)
    return tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "Lq",
        "Lk",
        "Lc",
        "B",
        "H",
        "pos_table_len",
        "pos_heads",
        "ts_heads",
        "num_buckets",
        "target_group_size",
        "contextual_seq_len",
        "max_attn_len",
        "min_full_attn_seq_len",
    ]
)
def hstu_attention(
    q,
    k,
    v,
    out,
    q_offsets,
    k_offsets,
    num_targets,
    contextual_seq_lens,
    scaling_seq_lens,
    row_timestamps,
    col_timestamps,
    pos_table,
    ts_table,
    ts_thresholds,
    k_cached,
    v_cached,
    cache_offsets,
    alpha,
    scaling_seq_len,
    Lq,
    Lk,
    Lc,
    B,
    H,
    Dqk,
    Dv,
    q_stride,
    k_stride,
    v_stride,
    pos_table_len,
    pos_heads,
    ts_heads,
    num_buckets,
    target_group_size,
    contextual_seq_len,
    max_attn_len,
    min_full_attn_seq_len,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    POS_BIAS: tl.constexpr,
    TIME_BIAS: tl.constexpr,
    MASK_KIND: tl.constexpr,
    HAS_CACHE: tl.constexpr,
):
    """Compute one [BLOCK_M, Dv] tile of one head; the ABI is in kernels/README.md.

    ``num_targets``, ``contextual_seq_lens`` and ``scaling_seq_lens`` may be null: one predicated scalar load per
    program costs less than eight times the compiled variants.  MASK_KIND 0 is plain causal (no targets, context or
    window), 1 is everything.  Without HAS_CACHE ``k_cached``, ``v_cached`` and ``cache_offsets`` are not read.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    dims_qk = tl.arange(0, BLOCK_DQK)
    dims_v = tl.arange(0, BLOCK_DV)
    lanes = tl.arange(0, BLOCK_M)
    out_stride = H.to(tl.int64) * Dv
    out_head = out + head.to(tl.int64) * Dv

    sequence, is_valid = _locate_sequence(q_offsets, k_offsets, cache_offsets, slot, B, Lq, Lk, Lc, BLOCK_M, HAS_CACHE)

    # Rows outside all sequences are zero: program t clears those of [t * BLOCK_M, (t + 1) * BLOCK_M).
    zero_begin = tl.where(is_valid, tl.load(q_offsets + B), 0)
    zero_rows = slot.to(tl.int64) * BLOCK_M + lanes
    if (slot.to(tl.int64) + 1) * BLOCK_M > zero_begin:
        is_tail = (zero_rows >= zero_begin) & (zero_rows < Lq)
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], dtype=out.dtype.element_ty)
        pointers = out_head + zero_rows[:, None] * out_stride + dims_v[None, :]
        tl.store(pointers, zeros, mask=is_tail[:, None] & (dims_v < Dv)[None, :])
    if (sequence < 0) | (is_valid == 0):
        return

    q_begin = tl.load(q_offsets + sequence)
    k_begin = tl.load(k_offsets + sequence)
    num_queries = tl.load(q_offsets + sequence + 1) - q_begin
    num_keys = tl.load(k_offsets + sequence + 1) - k_begin
    num_cached = 0
    if HAS_CACHE:
        c_begin = tl.load(cache_offsets + sequence)
        num_cached = tl.load(cache_offsets + sequence + 1) - c_begin
        num_keys += num_cached
    num_tiles = (num_queries + BLOCK_M - 1) // BLOCK_M
    tile = slot - (q_begin // BLOCK_M + sequence)
    if tile >= num_tiles:
        return
    # Under a causal mask the last tile has most keys: start it first, so that the grid does not end on a long tile.
    tile = num_tiles - 1 - tile

    has_targets = num_targets.to(tl.int64) != 0
    targets = tl.load(num_targets + sequence, mask=has_targets, other=0)
    history = num_keys - tl.minimum(tl.maximum(targets, 0), num_keys)
    has_contexts = contextual_seq_lens.to(tl.int64) != 0
    context = tl.load(contextual_seq_lens + sequence, mask=has_contexts, other=contextual_seq_len)
    # No row beyond num_keys exists, so the clamp changes no result; it keeps context - 1 and the sums below in range.
    context = tl.minimum(tl.maximum(context, 0), num_keys)
    has_scales = scaling_seq_lens.to(tl.int64) != 0
    scale = tl.load(scaling_seq_lens + sequence, mask=has_scales, other=scaling_seq_len)

    # Rows as positions among the keys: queries are the suffix.  A query before the first key (more queries than keys)
    # sees nothing.
    local_rows = tile * BLOCK_M + lanes
    rows = num_keys - num_queries + local_rows
    first_row = num_keys - num_queries + tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_keys) - 1
    is_query = local_rows < num_queries
    token_rows = q_begin.to(tl.int64) + local_rows

    if MASK_KIND == 0:
        history_end = rows + 1
        own_begin = rows
        window_begin = rows
        left_begin = 0
        full_begin = 0
        full_end = first_row + 1
        masked_end = last_row + 1
        own_first = masked_end
        own_end = masked_end
    else:
        context_rank = tl.maximum(context - 1, 0)
        is_context_row = rows < context
        history_end = tl.where(is_context_row, history, tl.minimum(rows + 1, history))
        history_end = tl.where(rows < 0, 0, history_end)
        group_begin = history + (rows - history) // target_group_size * target_group_size
        own_begin = tl.where(is_context_row | (rows < history), rows, group_begin)
        own_begin = tl.maximum(own_begin, 0)
        # Window: positions count the contextual prefix as one, candidates as the position after the history.
        position = tl.minimum(rows, history) - context_rank
        first_exempt = tl.where(min_full_attn_seq_len > 0, history - context_rank - min_full_attn_seq_len, 2**30)
        is_windowed = (max_attn_len > 0) & (rows >= context) & (position < first_exempt)
        window_begin = tl.where(is_windowed, position - max_attn_len, _NO_WINDOW)

        # Scalar bounds of the tile.  Every row sees [full_begin, full_end); no row sees a history column outside
        # [left_begin, masked_end) or a candidate column outside [own_first, own_end).
        first_any = tl.maximum(first_row, 0)
        full_end = tl.minimum(tl.maximum(first_row, tl.where(last_row < context, num_keys, context)) + 1, history)
        full_end = tl.where(first_row < 0, 0, full_end)
        masked_end = tl.where(first_any < context, history, tl.minimum(last_row + 1, history))
        masked_end = tl.maximum(masked_end, 0)
        last_position = tl.minimum(last_row, history) - context_rank
        first_position = tl.minimum(first_any, history) - context_rank
        full_begin = last_position - max_attn_len
        full_begin = tl.where((max_attn_len > 0) & (full_begin > 0), full_begin + context_rank, 0)
        left_begin = first_position - max_attn_len
        is_cut = (max_attn_len > 0) & (first_any >= context) & (last_position < first_exempt) & (left_begin > 0)
        left_begin = tl.where(is_cut, left_begin + context_rank, 0)
        first_target = tl.maximum(first_any, history)
        own_first = history + (first_target - history) // target_group_size * target_group_size
        own_end = tl.where(last_row >= history, last_row + 1, 0)

    # [left, full_left) masked, [full_left, full_right) whole, [full_right, right) masked, [own_left, own_end) masked.
    left = left_begin // BLOCK_N * BLOCK_N
    full_left = (full_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_right = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_left)
    right = tl.maximum((masked_end + BLOCK_N - 1) // BLOCK_N * BLOCK_N, full_right)
    left_tiles = (full_left - left) // BLOCK_N
    edge_tiles = left_tiles + (right - full_right) // BLOCK_N
    own_left = tl.maximum(own_first // BLOCK_N * BLOCK_N, right)
    masked_tiles = edge_tiles + tl.maximum(own_end - own_left + BLOCK_N - 1, 0) // BLOCK_N

    q_pointers = q + head.to(tl.int64) * Dqk + token_rows[:, None] * q_stride + dims_qk[None, :]
    q_tile = tl.load(q_pointers, mask=is_query[:, None] & (dims_qk < Dqk)[None, :], other=0.0)  # [BLOCK_M, BLOCK_DQK]
    k_head = k + k_begin.to(tl.int64) * k_stride + head.to(tl.int64) * Dqk
    v_head = v + k_begin.to(tl.int64) * v_stride + head.to(tl.int64) * Dv
    k_cached_head = k_head
    v_cached_head = v_head
    k_cached_stride = k_stride
    v_cached_stride = v_stride
    if HAS_CACHE:
        k_cached_stride = H.to(tl.int64) * Dqk
        v_cached_stride = out_stride
        k_cached_head = k_cached + c_begin.to(tl.int64) * k_cached_stride + head.to(tl.int64) * Dqk
        v_cached_head = v_cached + c_begin.to(tl.int64) * v_cached_stride + head.to(tl.int64) * Dv
    pos_head = pos_table
    pos_last = 0
    pos_row = rows
    if POS_BIAS:
        pos_last = 2 * pos_table_len - 2
        pos_head += tl.where(pos_heads > 1, head, 0).to(tl.int64) * (pos_last + 1)
        pos_row = pos_table_len - 1 - tl.minimum(rows, history)
    row_time = rows
    col_times = col_timestamps
    ts_head = ts_table
    TIME_MAX: tl.constexpr = 2**63 - 1 if row_timestamps.dtype.element_ty == tl.int64 else 2**31 - 1
    if TIME_BIAS:
        # Rows past the end repeat the last query's time: they are not stored and must not widen the tile's range.
        row_time = tl.load(row_timestamps + q_begin.to(tl.int64) + tl.minimum(local_rows, num_queries - 1))
        col_times += k_begin.to(tl.int64)
        if HAS_CACHE:
            col_times += c_begin.to(tl.int64)
        ts_head += tl.where(ts_heads > 1, head, 0).to(tl.int64) * (num_buckets + 1)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    # The cut tiles come last in one loop over their three ranges.  The search for time buckets is a loop of its own,
    # which keeps Triton from pipelining the loop around it; then a second copy of the body gains nothing and doubles
    # the code.
    whole_tiles = (full_right - full_left) // BLOCK_N
    cut_begin = whole_tiles
    whole_right = full_right
    if HAS_CACHE:
        # Whole tiles behind the cache join the cut ones, whose mask says of each column what it says of the tile.
        whole_right = tl.maximum(tl.minimum(full_right, num_cached // BLOCK_N * BLOCK_N), full_left)
        cut_begin = (whole_right - full_left) // BLOCK_N
    if TIME_BIAS:
        cut_begin = 0
    else:
        for start in range(full_left, whole_right, BLOCK_N):
            acc = _accumulate(
                acc,
                q_tile,
                k_cached_head,
                v_cached_head,
                k_cached_head,
                v_cached_head,
                start,
                False,
                rows,
                history_end,
                own_begin,
                window_begin,
                row_time,
                pos_row,
                col_times,
                pos_head,
                ts_head,
                ts_thresholds,
                alpha,
                num_keys,
                num_cached,
                history,
                context,
                k_cached_stride,
                v_cached_stride,
                k_cached_stride,
                v_cached_stride,
                Dqk,
                Dv,
                pos_last,
                num_buckets,
                BLOCK_N,
                BLOCK_DQK,
                BLOCK_DV,
                POS_BIAS,
                TIME_BIAS,
                MASK_KIND,
                False,
                False,
                TIME_MAX,
            )
    for index in range(cut_begin, whole_tiles + masked_tiles):
        cut = index - whole_tiles
        start = tl.where(cut < left_tiles, left + cut * BLOCK_N, full_right + (cut - left_tiles) * BLOCK_N)
        start = tl.where(cut < edge_tiles, start, own_left + (cut - edge_tiles) * BLOCK_N)
        start = tl.where(cut < 0, full_left + index * BLOCK_N, start)
        acc = _accumulate(
            acc,
            q_tile,
            k_head,
            v_head,
            k_cached_head,
            v_cached_head,
            start,
            (cut >= 0) if TIME_BIAS else True,
            rows,
            history_end,
            own_begin,
            window_begin,
            row_time,
            pos_row,
            col_times,
            pos_head,
            ts_head,
            ts_thresholds,
            alpha,
            num_keys,
            num_cached,
            history,
            context,
            k_stride,
            v_stride,
            k_cached_stride,
            v_cached_stride,
            Dqk,
            Dv,
            pos_last,
            num_buckets,
            BLOCK_N,
            BLOCK_DQK,
            BLOCK_DV,
            POS_BIAS,
            TIME_BIAS,
            MASK_KIND,
            True,
            HAS_CACHE,
            TIME_MAX,
        )

    acc = acc * (1.0 / scale)
    out_pointers = out_head + token_rows[:, None] * out_stride + dims_v[None, :]
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=is_query[:, None] & (dims_v < Dv)[None, :])
