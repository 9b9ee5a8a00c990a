// What the Hopper kernel computes per tile, callable from Python (tests/plugins/test_hopper_arithmetic.py).
#include "device.h"

#include "bias.cuh"
#include "silu.cuh"
#include "tile.cuh"

namespace
{

template <bool kPlainCausal, bool kHasCache>
bool isAllowed(hstu::Tile const& tile, hstu::RowBounds const& bounds, int32_t start, int32_t offset)
{
    using hstu::Mask;
    if (kHasCache && !hstu::isInSequence(start, offset))
    {
        return false;
    }
    if (kPlainCausal || tile.mask == Mask::kDiagonal)
    {
        return hstu::isAllowed<Mask::kDiagonal>(tile, bounds, start, offset);
    }
    return tile.mask == Mask::kGroups ? hstu::isAllowed<Mask::kGroups>(tile, bounds, start, offset)
                                      : hstu::isAllowed<Mask::kWindow>(tile, bounds, start, offset);
}

template <bool kPlainCausal, bool kHasCache>
int32_t tileMask(hstu::AttentionParameters const& p, hstu::Tile& tile, int32_t rows, int32_t blockM, int32_t blockN,
    uint8_t* seen, int32_t* counts)
{
    hstu::findKeyTiles<kPlainCausal, kHasCache>(p, tile, blockM, blockN);
    counts[0] = tile.tiles;
    counts[1] = tile.maskedTiles;
    for (int32_t t = 0; t < tile.tiles; ++t)
    {
        int32_t const start = tile.keyStart(t, blockN);
        bool const isCached = start < tile.numCached;
        if (start >= tile.numKeys || start + blockN <= 0 || (start < 0 && !isCached))
        {
            return 1;
        }
        if (isCached && start + blockN > tile.numCached)
        {
            return 3;
        }
        for (int32_t row = 0; row < rows; ++row)
        {
            hstu::RowBounds const bounds = hstu::rowBounds(p, tile, tile.firstRow + row);
            for (int32_t offset = max(-start, 0); offset < blockN && start + offset < tile.numKeys; ++offset)
            {
                bool const isWhole = t >= tile.maskedTiles;
                seen[row * tile.numKeys + start + offset] +=
                    isWhole || isAllowed<kPlainCausal, kHasCache>(tile, bounds, start, offset) ? 1 : 0;
            }
            // Nobody may attend to what lies behind the sequence or in front of it, and a whole tile asks nobody.
            for (int32_t offset = 0; offset < blockN; ++offset)
            {
                bool const isOutside = start + offset < 0 || start + offset >= tile.numKeys;
                if (isOutside
                    && (t >= tile.maskedTiles || isAllowed<kPlainCausal, kHasCache>(tile, bounds, start, offset)))
                {
                    return 2;
                }
            }
        }
    }
    return 0;
}

//! Approximations that are off by what is documented for the GPU's, each in a direction of the caller's choice.
struct Documented
{
    static inline double tanhError = 0.0;       //!< relative, as are the others
    static inline double powerError = 0.0;
    static inline double reciprocalError = 0.0;

    static float tanh(float x)
    {
        return static_cast<float>(std::tanh(static_cast<double>(x)) * (1.0 + tanhError));
    }

    static float powerOfTwo(float x)
    {
        return flushed(std::exp2(static_cast<double>(x)) * (1.0 + powerError));
    }

    static float reciprocal(float x)
    {
        return flushed(1.0 / static_cast<double>(x) * (1.0 + reciprocalError));
    }

    static float flushed(double value)
    {
        return std::fabs(value) < 0x1p-126 ? 0.0F : static_cast<float>(value);
    }
};

} // namespace

//! How often each of the tile's rows attends to each key; 0, or which promise is broken. numCached is negative for a kernel
//! without a cache.
extern "C" int32_t hstu_tile_mask(int32_t isPlainCausal, int32_t numQueries, int32_t numKeys, int32_t targets,
    int32_t context, int32_t group, int32_t window, int32_t fullTail, int32_t numCached, int32_t block, int32_t blockM,
    int32_t blockN, uint8_t* seen, int32_t* counts)
{
    hstu::AttentionParameters p{};
    p.targetGroupSize = group;
    p.maxAttnLen = window;
    p.minFullAttnSeqLen = fullTail;
    hstu::Tile tile{};
    tile.numCached = max(numCached, 0);
    tile.numKeys = numKeys;
    tile.history = numKeys - min(max(targets, 0), numKeys);
    tile.context = min(max(context, 0), numKeys);
    tile.rows = numQueries - block * blockM;
    tile.firstRow = numKeys - numQueries + block * blockM;
    int32_t const rows = min(tile.rows, blockM);
    auto const run = isPlainCausal != 0 ? (numCached < 0 ? tileMask<true, false> : tileMask<true, true>)
                                        : (numCached < 0 ? tileMask<false, false> : tileMask<false, true>);
    return run(p, tile, rows, blockM, blockN, seen, counts);
}

//! Half the bias of each difference, by the table; 1 if a cell holds two thresholds.
extern "C" int32_t hstu_time_bias(int64_t const* thresholds, float const* biases, int32_t numBuckets,
    int32_t const* differences, int32_t count, float* out)
{
    hstu::AttentionParameters p{};
    p.tsThresholds = thresholds;
    p.tsTable = biases;
    p.numBuckets = numBuckets;
    p.tsHeads = 1;
    auto* const table = new hstu::TimeTable<true>{};
    hstu::readThresholds<int64_t>(p, *table);
    hstu::buildTimeTable(p, *table, 0, 1);
    for (int32_t i = 0; i < count; ++i)
    {
        out[i] = hstu::timeBias(table->thresholds, table->values[0], differences[i] + 1);
    }
    int32_t const isCrowded = table->isCrowded;
    delete table;
    return isCrowded;
}

//! Of each range of differences what all of it adds: `crossed`, `threshold`, and half the biases in `halves`, two each.
extern "C" void hstu_time_bias_range(int64_t const* thresholds, float const* biases, int32_t numBuckets,
    int32_t const* least, int32_t const* most, int32_t count, int32_t* crossed, int32_t* threshold, float* halves)
{
    hstu::AttentionParameters p{};
    p.tsThresholds = thresholds;
    p.tsTable = biases;
    p.numBuckets = numBuckets;
    p.tsHeads = 1;
    auto* const table = new hstu::TimeTable<true>{};
    hstu::readThresholds<int64_t>(p, *table);
    hstu::buildTimeTable(p, *table, 0, 1);
    for (int32_t i = 0; i < count; ++i)
    {
        hstu::TimeBiasRange const range = hstu::timeBiasRange(*table, table->values[0], least[i] + 1, most[i] + 1);
        crossed[i] = range.crossed;
        threshold[i] = range.threshold - 1;
        halves[2 * i] = range.below;
        halves[2 * i + 1] = range.above;
    }
    delete table;
}

//! Half the bias of one difference, searched for.
extern "C" float hstu_searched_time_bias(
    int64_t const* thresholds, float const* biases, int32_t numBuckets, int64_t row, int64_t column)
{
    hstu::AttentionParameters p{};
    p.tsThresholds = thresholds;
    p.tsTable = biases;
    p.numBuckets = numBuckets;
    p.tsHeads = 1;
    return hstu::searchedTimeBias<int64_t>(p, 0, row, column);
}

//! silu(2 h) of each h. The relative errors of the approximations are `errors`: tanh, power of two, reciprocal.
extern "C" void hstu_silu(int32_t isAccurate, float const* halves, int32_t count, double const* errors, float* out)
{
    Documented::tanhError = errors[0];
    Documented::powerError = errors[1];
    Documented::reciprocalError = errors[2];
    for (int32_t i = 0; i < count; ++i)
    {
        out[i] = isAccurate != 0 ? hstu::accurateSilu<Documented>(halves[i]) : hstu::fastSilu<Documented>(halves[i]);
    }
}
