// The order of tiles: sequences from long to short, of each its tiles from last to first, of each tile every head. Under a
// causal mask the last tile has most keys, so the work that ends the launch is small.
#ifndef HSTU_HOPPER_SCHEDULE_CUH
#define HSTU_HOPPER_SCHEDULE_CUH

#include <cstdint>

#include "parameters.cuh"
#include "tile.cuh"

namespace hstu
{

//! Sequences that are ordered; a larger batch is taken as it comes.
constexpr int32_t kOrderedSequences = 256;

struct SequenceCost
{
    int32_t numKeys;
    int32_t numTiles;
};

//! In shared memory of every block, which makes it on its own: cheaper than a launch that makes it once.
struct Schedule
{
    SequenceCost costs[kOrderedSequences];
    int32_t firstTile[kOrderedSequences]; //!< of the sequence at each rank: query tiles of all ranks before it
    int32_t sequence[kOrderedSequences];  //!< at each rank
};

//! Whether 0 == offsets[0] <= ... <= offsets[B] <= L holds for queries and keys. For all threads of the block.
__device__ __forceinline__ bool areOffsetsValid(AttentionParameters const& p)
{
    bool isFaulty = p.qOffsets[0] != 0 || p.kOffsets[0] != 0 || p.qOffsets[p.batch] > p.lq || p.kOffsets[p.batch] > p.lk;
    for (int32_t b = threadIdx.x; b < p.batch; b += blockDim.x)
    {
        isFaulty |= p.qOffsets[b + 1] < p.qOffsets[b] || p.kOffsets[b + 1] < p.kOffsets[b];
    }
    return __syncthreads_or(isFaulty) == 0;
}

//! Rows of out behind the last sequence, or all of them, become zero.
__device__ __forceinline__ void clearRows(AttentionParameters const& p, int32_t firstRow)
{
    int64_t const vectorsPerRow = int64_t{p.heads} * p.dv / 8;
    int64_t const end = p.lq * vectorsPerRow;
    int64_t const stride = int64_t{gridDim.x} * blockDim.x;
    auto* const out = static_cast<uint4*>(p.out);
    for (int64_t i = firstRow * vectorsPerRow + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < end; i += stride)
    {
        out[i] = make_uint4(0, 0, 0, 0);
    }
}

//! Ranks the sequences. For all threads of the block, of which there are at least kOrderedSequences.
__device__ __forceinline__ void orderSequences(AttentionParameters const& p, Schedule& schedule, int32_t blockM)
{
    if (p.batch > kOrderedSequences)
    {
        return;
    }
    int32_t const b = threadIdx.x;
    SequenceCost cost{};
    if (b < p.batch)
    {
        cost.numKeys = p.kOffsets[b + 1] - p.kOffsets[b];
        cost.numTiles = (p.qOffsets[b + 1] - p.qOffsets[b] + blockM - 1) / blockM;
        schedule.costs[b] = cost;
    }
    __syncthreads();
    SequenceCost const first = schedule.costs[0];
    bool const isAlike = b >= p.batch || (cost.numKeys == first.numKeys && cost.numTiles == first.numTiles);
    if (__syncthreads_and(isAlike) != 0)
    {
        if (b < p.batch)
        {
            schedule.firstTile[b] = b * cost.numTiles;
            schedule.sequence[b] = b;
        }
    }
    else if (b < p.batch)
    {
        int32_t rank = 0;
        int32_t before = 0;
#pragma unroll 4
        for (int32_t other = 0; other < p.batch; ++other)
        {
            SequenceCost const theirs = schedule.costs[other];
            bool const isFirst = theirs.numKeys > cost.numKeys || (theirs.numKeys == cost.numKeys && other < b);
            rank += isFirst ? 1 : 0;
            before += isFirst ? theirs.numTiles : 0;
        }
        schedule.firstTile[rank] = before;
        schedule.sequence[rank] = b;
    }
    __syncthreads();
}

//! Slots of query tiles of one head; some are empty where a batch is not ordered.
__device__ __forceinline__ int32_t numSlots(AttentionParameters const& p, Schedule const& schedule, int32_t blockM)
{
    if (p.batch > kOrderedSequences)
    {
        // The tiles of sequence b start at slot qOffsets[b] / blockM + b, which leaves room for all of them.
        return p.lq / blockM + p.batch;
    }
    int32_t const lastRank = p.batch - 1;
    return schedule.firstTile[lastRank] + schedule.costs[schedule.sequence[lastRank]].numTiles;
}

//! The sequence that owns a slot, and which of its slots it is.
__device__ __forceinline__ int2 locate(AttentionParameters const& p, Schedule const& schedule, int32_t slot, int32_t blockM)
{
    bool const isOrdered = p.batch <= kOrderedSequences;
    auto firstSlot = [&](int32_t rank) { return isOrdered ? schedule.firstTile[rank] : p.qOffsets[rank] / blockM + rank; };
    int32_t low = 0;
    int32_t high = p.batch;
    while (high - low > 1)
    {
        int32_t const middle = (low + high) / 2;
        (firstSlot(middle) <= slot ? low : high) = middle;
    }
    return make_int2(isOrdered ? schedule.sequence[low] : low, slot - firstSlot(low));
}

//! Describes tile `index` of all heads' tiles; `tiles` is 0 where a slot is empty or its rows see nothing, and `rows` is
//! not positive where it is empty.
template <bool kPlainCausal>
__device__ __forceinline__ void describeTile(AttentionParameters const& p, Schedule const& schedule, int32_t index,
    int32_t blockM, int32_t blockN, Tile& tile)
{
    tile.head = index % p.heads;
    int2 const found = locate(p, schedule, index / p.heads, blockM);
    int32_t const sequence = found.x;
    int32_t const queryBegin = p.qOffsets[sequence];
    int32_t const numQueries = p.qOffsets[sequence + 1] - queryBegin;
    tile.keyRow = p.kOffsets[sequence];
    tile.numKeys = p.kOffsets[sequence + 1] - tile.keyRow;
    int32_t const targets = p.numTargets != nullptr ? p.numTargets[sequence] : 0;
    tile.history = tile.numKeys - min(max(targets, 0), tile.numKeys);
    int32_t const context = p.contextualSeqLens != nullptr ? p.contextualSeqLens[sequence] : p.contextualSeqLen;
    tile.context = min(max(context, 0), tile.numKeys);
    tile.divisor = p.scalingSeqLens != nullptr ? p.scalingSeqLens[sequence] : p.scalingSeqLen;
    // Last tile first.
    int32_t const block = (numQueries + blockM - 1) / blockM - 1 - found.y;
    tile.queryRow = queryBegin + block * blockM;
    tile.rows = block < 0 ? 0 : numQueries - block * blockM;
    tile.firstRow = tile.numKeys - numQueries + block * blockM;
    if (block < 0)
    {
        tile.maskedTiles = 0;
        tile.tiles = 0;
        return;
    }
    findKeyTiles<kPlainCausal>(p, tile, blockM, blockN);
}

} // namespace hstu

#endif // HSTU_HOPPER_SCHEDULE_CUH
