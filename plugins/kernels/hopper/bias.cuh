// Position and time bias of the scores, looked up while they are in registers.
//
// The bucket of a time difference is the number of thresholds that it reaches. Float bits of an integer sort like the
// integer, so their upper ones, exponent and three bits of mantissa, name a cell of a small table; where no cell holds more
// than one threshold, one comparison with it decides between the cell's two values. Thresholds are integers, and so is the
// comparison: no logarithm near a boundary. Thresholds that lie closer, and times that differ by more than 2^30 seconds
// from the sequence's first, are searched for one by one.
//
// Buckets are wider the farther in the past they lie, and near columns have near times: most pieces of a score tile lie in
// one bucket or two, which are looked up once for all of the piece (timeBiasRange).
#ifndef HSTU_HOPPER_BIAS_CUH
#define HSTU_HOPPER_BIAS_CUH

#include <cstdint>

#include "parameters.cuh"
#include "tile.cuh"

namespace hstu
{

constexpr int32_t kMantissaBits = 3;
constexpr int32_t kCellShift = 23 - kMantissaBits;
//! Cell of difference 1, minus one: cell 0 is for differences of 0.
constexpr int32_t kFirstCell = (127 << kMantissaBits) - 1;
//! Differences below 2^31.
constexpr int32_t kCells = 1 + (31 << kMantissaBits);
//! Heads with a time table of their own; models with more take the portable kernel.
constexpr int32_t kMostTimeHeads = 8;
constexpr int32_t kNever = INT32_MAX;
//! Farthest from the sequence's first time that the table serves.
constexpr int64_t kFarthest = int64_t{1} << 30;

//! Empty in a kernel without a time bias.
template <bool kIsUsed>
struct TimeTable
{
    static constexpr int32_t kSize = kIsUsed ? kCells : 1;

    int32_t thresholds[kSize]; //!< the one inside the cell, or kNever
    int32_t previous[kSize];   //!< the last one at or before the cell's start, if there is one
    int32_t buckets[kSize];    //!< of the cell's smallest difference
    float values[kIsUsed ? kMostTimeHeads : 1][kSize][2]; //!< half the bias below and from the threshold on
    int32_t isCrowded; //!< a cell holds two thresholds: the table is of no use
};

template <typename Timestamp>
__device__ __forceinline__ int32_t countThresholds(AttentionParameters const& p, int64_t difference)
{
    auto const* const thresholds = static_cast<Timestamp const*>(p.tsThresholds);
    int32_t low = 0;
    int32_t high = p.numBuckets;
    while (low < high)
    {
        int32_t const middle = (low + high) / 2;
        if (int64_t{thresholds[middle]} <= difference)
        {
            low = middle + 1;
        }
        else
        {
            high = middle;
        }
    }
    return low;
}

//! Smallest difference of a cell.
__device__ __forceinline__ int64_t cellStart(int32_t cell)
{
    return cell == 0 ? 0 : static_cast<int64_t>(ceilf(__int_as_float((kFirstCell + cell) << kCellShift)));
}

__device__ __forceinline__ int32_t cellOf(int32_t difference)
{
    // Towards zero: rounding up could enter the next cell.
    return max((__float_as_int(__int2float_rz(difference)) >> kCellShift) - kFirstCell, 0);
}

//! Fills the table. For all threads of the block; a __syncthreads must follow, and one must lie before.
template <typename Timestamp, typename Table>
__device__ __forceinline__ void buildTimeTable(AttentionParameters const& p, Table& table)
{
    for (int32_t cell = threadIdx.x; cell < kCells; cell += blockDim.x)
    {
        int32_t const below = countThresholds<Timestamp>(p, cellStart(cell));
        int32_t const inside = countThresholds<Timestamp>(p, cellStart(cell + 1) - 1) - below;
        auto const* const thresholds = static_cast<Timestamp const*>(p.tsThresholds);
        table.thresholds[cell] = inside > 0 ? static_cast<int32_t>(thresholds[below]) : kNever;
        table.previous[cell] = below > 0 ? static_cast<int32_t>(thresholds[below - 1]) : 0;
        table.buckets[cell] = below;
        for (int32_t head = 0; head < p.tsHeads; ++head)
        {
            float const* const biases = p.tsTable + int64_t{head} * (p.numBuckets + 1);
            table.values[head][cell][0] = 0.5F * biases[below];
            table.values[head][cell][1] = 0.5F * biases[min(below + 1, p.numBuckets)];
        }
        if (inside > 1)
        {
            table.isCrowded = 1;
        }
    }
}

//! Half the bias of a difference that the table serves.
__device__ __forceinline__ float timeBias(int32_t const* thresholds, float const (*values)[2], int32_t difference)
{
    int32_t const cell = cellOf(difference);
    return values[cell][difference >= thresholds[cell] ? 1 : 0];
}

//! What all differences of a range add.
struct TimeBiasRange
{
    int32_t crossed;   //!< thresholds in the range: with more than one, the other members do not say all
    int32_t threshold; //!< the one, if there is one
    float below;       //!< half the bias below it
    float above;       //!< and from it on
};

//! Looks the range [least, most] of differences up. `values` is the table's of a head.
template <typename Table>
__device__ __forceinline__ TimeBiasRange timeBiasRange(
    Table const& table, float const (*values)[2], int32_t least, int32_t most)
{
    int32_t const first = cellOf(least);
    int32_t const last = cellOf(most);
    int32_t const isFirstPast = least >= table.thresholds[first] ? 1 : 0;
    int32_t const isLastPast = most >= table.thresholds[last] ? 1 : 0;
    TimeBiasRange range;
    range.crossed = table.buckets[last] + isLastPast - table.buckets[first] - isFirstPast;
    range.threshold = isLastPast != 0 ? table.thresholds[last] : table.previous[last];
    range.below = values[first][isFirstPast];
    range.above = values[last][isLastPast];
    return range;
}

//! Half the bias of any difference.
template <typename Timestamp>
__device__ __forceinline__ float searchedTimeBias(AttentionParameters const& p, int32_t head, int64_t row, int64_t column)
{
    // Differences of 2^63 and more saturate, as in the portable kernel.
    uint64_t const distance = row > column ? static_cast<uint64_t>(row) - static_cast<uint64_t>(column)
                                           : static_cast<uint64_t>(column) - static_cast<uint64_t>(row);
    constexpr uint64_t kMost = sizeof(Timestamp) == 8 ? INT64_MAX : INT32_MAX;
    int32_t const bucket = countThresholds<Timestamp>(p, static_cast<int64_t>(distance < kMost ? distance : kMost));
    return 0.5F * p.tsTable[int64_t{p.tsHeads > 1 ? head : 0} * (p.numBuckets + 1) + bucket];
}

} // namespace hstu

#endif // HSTU_HOPPER_BIAS_CUH
