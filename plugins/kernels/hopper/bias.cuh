// Position and time bias of the scores, looked up while they are in registers.
//
// The bucket of a time difference is the number of thresholds that it reaches. Float bits of a positive integer sort like the
// integer, so their upper ones, exponent and three bits of mantissa, name a cell of a small table; where no cell holds more
// than one threshold, one comparison with it decides between the cell's two values. Thresholds are integers, and so is the
// comparison: no logarithm near a boundary. Thresholds that lie closer, and times that differ by more than 2^30 seconds
// from the sequence's first, are searched for one by one. The table counts from one: a `distance` is a difference plus one,
// so that none is zero, which would be a case of its own for every score.
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
//! What the upper bits of distance 1 are.
constexpr int32_t kFirstCell = 127 << kMantissaBits;
//! Distances below 2^31.
constexpr int32_t kCells = 31 << kMantissaBits;
//! Heads with a time table of their own; models with more take the portable kernel.
constexpr int32_t kMostTimeHeads = 8;
constexpr int32_t kNever = INT32_MAX;
//! The table serves times that are less far than this from the sequence's first: no distance is kNever.
constexpr int64_t kFarthest = (int64_t{1} << 30) - 1;
//! Thresholds that the table is made of, more than there are cells. With others below 2^31 it counts as crowded.
constexpr int32_t kTableThresholds = 256;

//! Empty in a kernel without a time bias.
template <bool kIsUsed>
struct TimeTable
{
    static constexpr int32_t kSize = kIsUsed ? kCells : 1;

    int32_t thresholds[kSize]; //!< the one inside the cell, or kNever; as distances, like all here
    int32_t previous[kSize];   //!< the last one at or before the cell's start, if there is one
    int32_t buckets[kSize];    //!< of the cell's smallest distance
    float values[kIsUsed ? kMostTimeHeads : 1][2][kSize]; //!< half the bias below the threshold, and from it on
    int32_t sorted[kIsUsed ? kTableThresholds : 1]; //!< what the table is made of
    int32_t isCrowded; //!< a cell holds two thresholds: the table is of no use
};

//! How many of some thresholds a difference reaches.
template <typename Threshold>
__device__ __forceinline__ int32_t countThresholds(Threshold const* thresholds, int32_t count, int64_t difference)
{
    int32_t low = 0;
    int32_t high = count;
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

//! Smallest distance of a cell.
__device__ __forceinline__ int64_t cellStart(int32_t cell)
{
    return static_cast<int64_t>(ceilf(__int_as_float((kFirstCell + cell) << kCellShift)));
}

__device__ __forceinline__ int32_t cellOf(int32_t distance)
{
    // Towards zero: rounding up could enter the next cell.
    return (__float_as_int(__int2float_rz(distance)) >> kCellShift) - kFirstCell;
}

//! Reads what the table is made of: in one go, where a search in memory would wait for every one that it looks at. For all
//! threads of the block; a __syncthreads must follow.
template <typename Timestamp, typename Table>
__device__ __forceinline__ void readThresholds(AttentionParameters const& p, Table& table)
{
    auto const* const thresholds = static_cast<Timestamp const*>(p.tsThresholds);
    constexpr int64_t kNone = kNever - 1;
    int32_t const count = min(p.numBuckets, kTableThresholds);
    for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += static_cast<int32_t>(blockDim.x))
    {
        int64_t const threshold = thresholds[i];
        table.sorted[i] = static_cast<int32_t>(max(min(threshold, kNone), int64_t{0})) + 1;
    }
    if (threadIdx.x == 0)
    {
        bool const hasMore = p.numBuckets > kTableThresholds && int64_t{thresholds[kTableThresholds]} < kNone;
        table.isCrowded = hasMore ? 1 : 0;
    }
}

//! Fills the table. For `numThreads` threads, each with its number. A barrier must follow, and one must lie between
//! readThresholds and this.
template <typename Table>
__device__ __forceinline__ void buildTimeTable(
    AttentionParameters const& p, Table& table, int32_t thread, int32_t numThreads)
{
    int32_t const count = min(p.numBuckets, kTableThresholds);
    for (int32_t cell = thread; cell < kCells; cell += numThreads)
    {
        int32_t const below = countThresholds(table.sorted, count, cellStart(cell));
        // What is at kNever stands for thresholds that no distance reaches; the last cell ends behind it.
        int64_t const end = min(cellStart(cell + 1), int64_t{kNever});
        bool const isOneInside = below < count && table.sorted[below] < end;
        bool const areTwoInside = below + 1 < count && table.sorted[below + 1] < end;
        table.thresholds[cell] = isOneInside ? table.sorted[below] : kNever;
        table.previous[cell] = below > 0 ? table.sorted[below - 1] : 0;
        table.buckets[cell] = below;
        for (int32_t head = 0; head < p.tsHeads; ++head)
        {
            float const* const biases = p.tsTable + int64_t{head} * (p.numBuckets + 1);
            table.values[head][0][cell] = 0.5F * biases[below];
            table.values[head][1][cell] = 0.5F * biases[min(below + 1, p.numBuckets)];
        }
        if (areTwoInside)
        {
            table.isCrowded = 1;
        }
    }
}

//! Half the bias of a distance that the table serves. `values` are the table's of a head.
template <int32_t kSize>
__device__ __forceinline__ float timeBias(int32_t const* thresholds, float const (&values)[2][kSize], int32_t distance)
{
    int32_t const cell = cellOf(distance);
    return values[0][cell + (distance >= thresholds[cell] ? kSize : 0)];
}

//! What all distances of a range add.
struct TimeBiasRange
{
    int32_t crossed;   //!< thresholds in the range: with more than one, the other members do not say all
    int32_t threshold; //!< the one, if there is one
    float below;       //!< half the bias below it
    float above;       //!< and from it on
};

//! Looks the range [least, most] of distances up. `values` are the table's of a head.
template <typename Table, int32_t kSize>
__device__ __forceinline__ TimeBiasRange timeBiasRange(
    Table const& table, float const (&values)[2][kSize], int32_t least, int32_t most)
{
    int32_t const first = cellOf(least);
    int32_t const last = cellOf(most);
    int32_t const isFirstPast = least >= table.thresholds[first] ? 1 : 0;
    int32_t const isLastPast = most >= table.thresholds[last] ? 1 : 0;
    TimeBiasRange range;
    range.crossed = table.buckets[last] + isLastPast - table.buckets[first] - isFirstPast;
    range.threshold = isLastPast != 0 ? table.thresholds[last] : table.previous[last];
    range.below = values[isFirstPast][first];
    range.above = values[isLastPast][last];
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
    auto const* const thresholds = static_cast<Timestamp const*>(p.tsThresholds);
    int32_t const bucket =
        countThresholds(thresholds, p.numBuckets, static_cast<int64_t>(distance < kMost ? distance : kMost));
    return 0.5F * p.tsTable[int64_t{p.tsHeads > 1 ? head : 0} * (p.numBuckets + 1) + bucket];
}

} // namespace hstu

#endif // HSTU_HOPPER_BIAS_CUH
