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

//! What the launch's tensors say of a sequence.
struct Sequence
{
    int32_t queryBegin;
    int32_t numQueries;
    int32_t keyBegin;
    int32_t cachedBegin;
    int32_t numCached;
    int32_t numKeys; //!< cached ones included
    int32_t history;
    int32_t context;
    float divisor;
};

//! In shared memory of every block, which makes it on its own: cheaper than a launch that makes it once.
struct Schedule
{
    SequenceCost costs[kOrderedSequences];
    int32_t firstTile[kOrderedSequences];  //!< of the sequence at each rank: query tiles of all ranks before it
    Sequence sequences[kOrderedSequences]; //!< at each rank
    int32_t numSlots;
};

template <bool kHasCache>
__device__ __forceinline__ Sequence readSequence(AttentionParameters const& p, int32_t index)
{
    Sequence sequence;
    sequence.queryBegin = p.qOffsets[index];
    sequence.numQueries = p.qOffsets[index + 1] - sequence.queryBegin;
    sequence.keyBegin = p.kOffsets[index];
    sequence.numKeys = p.kOffsets[index + 1] - sequence.keyBegin;
    if constexpr (kHasCache)
    {
        sequence.cachedBegin = p.cacheOffsets[index];
        sequence.numCached = p.cacheOffsets[index + 1] - sequence.cachedBegin;
        sequence.numKeys += sequence.numCached;
    }
    int32_t const targets = p.numTargets != nullptr ? p.numTargets[index] : 0;
    sequence.history = sequence.numKeys - min(max(targets, 0), sequence.numKeys);
    int32_t const context = p.contextualSeqLens != nullptr ? p.contextualSeqLens[index] : p.contextualSeqLen;
    sequence.context = min(max(context, 0), sequence.numKeys);
    sequence.divisor = p.scalingSeqLens != nullptr ? p.scalingSeqLens[index] : p.scalingSeqLen;
    return sequence;
}

//! Whether 0 == offsets[0] <= ... <= offsets[B] <= L holds for queries, keys and cached keys. For all threads of the block.
template <bool kHasCache>
__device__ __forceinline__ bool areOffsetsValid(AttentionParameters const& p)
{
    bool isFaulty = p.qOffsets[0] != 0 || p.kOffsets[0] != 0 || p.qOffsets[p.batch] > p.lq || p.kOffsets[p.batch] > p.lk;
    isFaulty |= kHasCache && (p.cacheOffsets[0] != 0 || p.cacheOffsets[p.batch] > p.lc);
    for (int32_t b = threadIdx.x; b < p.batch; b += blockDim.x)
    {
        isFaulty |= p.qOffsets[b + 1] < p.qOffsets[b] || p.kOffsets[b + 1] < p.kOffsets[b];
        isFaulty |= kHasCache && p.cacheOffsets[b + 1] < p.cacheOffsets[b];
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
template <bool kHasCache>
__device__ __forceinline__ void orderSequences(AttentionParameters const& p, Schedule& schedule, int32_t blockM)
{
    if (p.batch > kOrderedSequences)
    {
        // The tiles of sequence b start at slot qOffsets[b] / blockM + b, which leaves room for all of them.
        if (threadIdx.x == 0)
        {
            schedule.numSlots = p.lq / blockM + p.batch;
        }
        return;
    }
    int32_t const b = threadIdx.x;
    bool const isSequence = b < p.batch;
    Sequence sequence{};
    SequenceCost cost{};
    if (isSequence)
    {
        sequence = readSequence<kHasCache>(p, b);
        cost.numKeys = sequence.numKeys;
        cost.numTiles = (sequence.numQueries + blockM - 1) / blockM;
        schedule.costs[b] = cost;
    }
    __syncthreads();
    SequenceCost const first = schedule.costs[0];
    bool const isAlike = !isSequence || (cost.numKeys == first.numKeys && cost.numTiles == first.numTiles);
    int32_t rank = b;
    int32_t before = b * cost.numTiles;
    if (__syncthreads_and(isAlike) == 0)
    {
        rank = 0;
        before = 0;
#pragma unroll 4
        for (int32_t other = 0; other < p.batch; ++other)
        {
            SequenceCost const theirs = schedule.costs[other];
            bool const isFirst = theirs.numKeys > cost.numKeys || (theirs.numKeys == cost.numKeys && other < b);
            rank += isFirst ? 1 : 0;
            before += isFirst ? theirs.numTiles : 0;
        }
    }
    if (isSequence)
    {
        schedule.firstTile[rank] = before;
        schedule.sequences[rank] = sequence;
        if (rank == p.batch - 1)
        {
            schedule.numSlots = before + cost.numTiles;
        }
    }
    __syncthreads();
}

//! Describes tile `index` of all heads' tiles. Where its slot is empty or its rows see nothing it has no key tiles, and no
//! rows where the slot is empty.
template <bool kPlainCausal, bool kHasCache>
__device__ __forceinline__ void describeTile(AttentionParameters const& p, Schedule const& schedule, int32_t index,
    int32_t blockM, int32_t blockN, Tile& tile)
{
    bool const isOrdered = p.batch <= kOrderedSequences;
    auto firstSlot = [&](int32_t rank) { return isOrdered ? schedule.firstTile[rank] : p.qOffsets[rank] / blockM + rank; };
    int32_t const slot = index / p.heads;
    int32_t low = 0;
    int32_t high = p.batch;
    while (high - low > 1)
    {
        int32_t const middle = (low + high) / 2;
        (firstSlot(middle) <= slot ? low : high) = middle;
    }
    Sequence const sequence = isOrdered ? schedule.sequences[low] : readSequence<kHasCache>(p, low);
    // Last tile first.
    int32_t const block = (sequence.numQueries + blockM - 1) / blockM - 1 - (slot - firstSlot(low));
    tile.head = index - slot * p.heads;
    tile.keyRow = sequence.keyBegin;
    if constexpr (kHasCache)
    {
        tile.cachedRow = sequence.cachedBegin;
        tile.numCached = sequence.numCached;
    }
    tile.numKeys = sequence.numKeys;
    tile.history = sequence.history;
    tile.context = sequence.context;
    tile.divisor = sequence.divisor;
    tile.queryRow = sequence.queryBegin + block * blockM;
    tile.rows = block < 0 ? 0 : sequence.numQueries - block * blockM;
    tile.firstRow = sequence.numKeys - sequence.numQueries + block * blockM;
    if (block < 0)
    {
        tile.maskedTiles = 0;
        tile.tiles = 0;
        return;
    }
    findKeyTiles<kPlainCausal, kHasCache>(p, tile, blockM, blockN);
}

} // namespace hstu

#endif // HSTU_HOPPER_SCHEDULE_CUH
