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

//! What every thread reads first: one sequence, and the ends of the offsets. All loads are independent, so that the launch
//! waits for memory once; nothing read is used as an address.
struct FirstReads
{
    Sequence sequence; //!< of the thread's number, if there is one
    int32_t queryEnd;  //!< of the last sequence
    bool isFaulty;     //!< as far as this thread sees
};

//! Reads a sequence a thread, and checks that 0 == offsets[0] <= ... <= offsets[B] <= L holds for queries, keys and cached
//! keys. For all threads of the block.
template <bool kHasCache>
__device__ __forceinline__ FirstReads readFirst(AttentionParameters const& p)
{
    FirstReads reads{};
    auto const b = static_cast<int32_t>(threadIdx.x);
    bool const isSequence = b < p.batch;
    if (isSequence)
    {
        reads.sequence = readSequence<kHasCache>(p, b);
    }
    int32_t const queryBegin = p.qOffsets[0];
    int32_t const keyBegin = p.kOffsets[0];
    reads.queryEnd = p.qOffsets[p.batch];
    int32_t const keyEnd = p.kOffsets[p.batch];
    int32_t const cachedBegin = kHasCache ? p.cacheOffsets[0] : 0;
    int32_t const cachedEnd = kHasCache ? p.cacheOffsets[p.batch] : 0;
    Sequence const& sequence = reads.sequence;
    // Not ||, which would read one after the other.
    reads.isFaulty = ((queryBegin | keyBegin | cachedBegin) != 0) | (reads.queryEnd > p.lq) | (keyEnd > p.lk)
                     | (kHasCache && cachedEnd > p.lc) | (sequence.numQueries < 0) | (sequence.numCached < 0)
                     | (sequence.numKeys < sequence.numCached);
    for (int32_t other = b + static_cast<int32_t>(blockDim.x); other < p.batch; other += static_cast<int32_t>(blockDim.x))
    {
        reads.isFaulty |= (p.qOffsets[other + 1] < p.qOffsets[other]) | (p.kOffsets[other + 1] < p.kOffsets[other]);
        reads.isFaulty |= kHasCache && p.cacheOffsets[other + 1] < p.cacheOffsets[other];
    }
    return reads;
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

//! Checks what the threads have read, and ranks the sequences. For all threads of the block, of which there are at least
//! kOrderedSequences.
//!
//! \return whether the offsets are valid; where not, the schedule is not to be used.
__device__ __forceinline__ bool orderSequences(
    AttentionParameters const& p, FirstReads const& reads, Schedule& schedule, int32_t blockM)
{
    auto const b = static_cast<int32_t>(threadIdx.x);
    bool const isOrdered = p.batch <= kOrderedSequences;
    bool const isSequence = isOrdered && b < p.batch;
    Sequence const& sequence = reads.sequence;
    SequenceCost const cost{sequence.numKeys, (sequence.numQueries + blockM - 1) / blockM};
    if (isSequence)
    {
        schedule.costs[b] = cost;
    }
    if (!isOrdered && b == 0)
    {
        // The tiles of sequence b start at slot qOffsets[b] / blockM + b, which leaves room for all of them.
        schedule.numSlots = p.lq / blockM + p.batch;
    }
    if (__syncthreads_or(reads.isFaulty ? 1 : 0) != 0)
    {
        return false;
    }
    if (!isOrdered)
    {
        return true;
    }
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
    return true;
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
