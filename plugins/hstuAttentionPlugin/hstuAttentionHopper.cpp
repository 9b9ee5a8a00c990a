#include "hstuAttentionHopper.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <type_traits>

#include "parameters.cuh"
#include "pluginError.h"

namespace hstu
{
namespace
{

static_assert(std::is_standard_layout<AttentionParameters>::value
                  && std::is_trivially_copyable<AttentionParameters>::value,
    "the driver copies the kernel's parameters byte by byte");

// Enumerations of cuda.h, which CUDA 11's lacks.
constexpr int kFloat16 = 6;             // CU_TENSOR_MAP_DATA_TYPE_FLOAT16
constexpr int kBfloat16 = 9;            // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
constexpr int kInterleaveNone = 0;      // CU_TENSOR_MAP_INTERLEAVE_NONE
constexpr int kSwizzle128B = 3;         // CU_TENSOR_MAP_SWIZZLE_128B
constexpr int kL2Promotion256B = 3;     // CU_TENSOR_MAP_L2_PROMOTION_L2_256B
constexpr int kFillZero = 0;            // CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE

constexpr uint32_t kRank = 3;
constexpr uint32_t kSlab = 64; // columns of a box: a 128-byte swizzled row
constexpr uint64_t kElementBytes = 2;

//! Most tiles of a launch, whatever its offsets are: each sequence may end in a tile of its own.
int64_t mostTiles(NodeSizes const& sizes, int32_t blockM) noexcept
{
    return (sizes[Symbol::kLq] / blockM + sizes[Symbol::kB]) * sizes[Symbol::kH];
}

//! \return clusters of so many blocks that the device is sure to run at once: resident_clusters of variants.py.
int32_t residentClusters(int32_t split, int32_t numSms) noexcept
{
    int32_t const used = split <= 2 ? numSms : numSms * 7 / 8;
    return std::max(used / split, 1);
}

//! \return rows of the cached keys, none without a cache.
int64_t cachedRows(NodeSizes const& sizes) noexcept
{
    return std::max<int64_t>(sizes[Symbol::kLc], 0);
}

std::string describeCall(HstuKernelImage const& image, NodeSizes const& sizes)
{
    std::ostringstream text;
    text << kPluginName << ", " << image.name << " of head dim " << image.blockDqk
         << (image.split > 1 ? ", shared tiles" : "") << " (Lq " << sizes[Symbol::kLq] << ", Lk " << sizes[Symbol::kLk]
         << ", Lc " << sizes[Symbol::kLc] << ", B " << sizes[Symbol::kB] << ", H " << sizes[Symbol::kH] << ", Dqk "
         << sizes[Symbol::kDqk] << ", Dv " << sizes[Symbol::kDv] << ")";
    return text.str();
}

//! Describes one of [rows, heads, columns] tensors for copies of [boxRows, 1, 64] boxes. Rows and columns outside are
//! copied as zero.
//!
//! \param nothing what is described where the tensor has no rows: nothing is copied then, but a tensor map wants the
//!     address of something.
TensorMap tensorMap(HstuKernelImage const& image, NodeSizes const& sizes, DevicePointers const& pointers, Input input,
    void const* nothing, int32_t boxRows)
{
    auto const& spec = kInputs[static_cast<size_t>(input)];
    auto const extent = [&](size_t axis) { return static_cast<uint64_t>(sizes[spec.dims[axis].symbol]); };
    bool const isEmpty = extent(0) == 0;
    void const* const data = isEmpty ? nothing : pointers.inputs[static_cast<size_t>(input)];
    uint64_t const dims[kRank] = {extent(2), extent(1), isEmpty ? 1 : extent(0)};
    uint64_t const rowStride = isEmpty ? dims[0] * dims[1] : static_cast<uint64_t>(sizes.rowStride(input));
    uint64_t const strides[kRank - 1] = {kElementBytes * dims[0], kElementBytes * rowStride};
    uint32_t const box[kRank] = {kSlab, 1, static_cast<uint32_t>(boxRows)};
    uint32_t const steps[kRank] = {1, 1, 1};
    bool const isHalf = image.dtype == static_cast<int32_t>(ElementType::kFloat16);
    TensorMap map;
    CUresult const result = cudaDriver().tensorMapEncodeTiled(&map, isHalf ? kFloat16 : kBfloat16, kRank,
        const_cast<void*>(data), dims, strides, box, steps, kInterleaveNone, kSwizzle128B, kL2Promotion256B, kFillZero);
    if (result != CUDA_SUCCESS)
    {
        checkCuda(result, (describeCall(image, sizes) + ": cuTensorMapEncodeTiled").c_str());
    }
    return map;
}

} // namespace

bool takesHopper(NodeSizes const& sizes, DevicePointers const& pointers) noexcept
{
    constexpr uintptr_t kAlignment = 16;
    // Positions are compared with bounds of +-2^30; a tile has 64 rows or more, and the counter passes the last tile.
    constexpr int64_t kMostRows = 1 << 30;
    constexpr int32_t kLeastBlockM = 64;
    bool const isCountable = sizes[Symbol::kLq] < kMostRows && sizes[Symbol::kLk] + cachedRows(sizes) < kMostRows
                             && mostTiles(sizes, kLeastBlockM) < kMostRows;
    constexpr int64_t kMostTimeHeads = 8; // of bias.cuh
    uintptr_t bits = reinterpret_cast<uintptr_t>(pointers.output);
    auto const add = [&](Input input)
    {
        bits |= reinterpret_cast<uintptr_t>(pointers.inputs[static_cast<size_t>(input)]);
        bits |= kElementBytes * static_cast<uintptr_t>(sizes.rowStride(input));
    };
    add(Input::kQ);
    if (sizes[Symbol::kLk] > 0)
    {
        add(Input::kK);
        add(Input::kV);
    }
    if (cachedRows(sizes) > 0)
    {
        add(Input::kKCached);
        add(Input::kVCached);
    }
    return isCountable && sizes[Symbol::kHt] <= kMostTimeHeads && bits % kAlignment == 0;
}

int32_t chooseSplit(HstuKernelImage const& image, NodeSizes const& sizes, int32_t maxSeqLen, int32_t numSms) noexcept
{
    // The same rule as chosen_split of kernels/hopper/variants.py, which says why, and which a test compares it with.
    constexpr double kExchange[] = {0.0, 2.2, 2.6, 3.0};
    constexpr double kLeastGain = 1.0;
    auto const sequences = static_cast<double>(std::max<int64_t>(sizes[Symbol::kB], 1));
    int64_t const tiles = (sizes[Symbol::kLq] + image.blockM - 1) / image.blockM * sizes[Symbol::kH];
    double const meanKeys = static_cast<double>(sizes[Symbol::kLk] + cachedRows(sizes)) / sequences;
    double const longest = std::min(meanKeys, static_cast<double>(maxSeqLen)) / image.blockN;
    double const others = std::max(static_cast<double>(sizes[Symbol::kLq]) / sequences - image.blockM, 0.0);
    double const shortest = std::max(longest - others / image.blockN, 1.0);
    double const mean = (longest + shortest) / 2.0;
    double const further = sequences == 1.0 ? 4.0 : 8.0;
    double const sent = std::max(image.blockDqk / 128.0, 1.0);
    auto const cost = [&](size_t i)
    {
        int32_t const split = kSplits[i];
        int32_t const clusters = residentClusters(split, numSms);
        auto const rounds = static_cast<double>((tiles + clusters - 1) / clusters);
        double const work = static_cast<double>(tiles) * mean / (clusters * split);
        double const steps = std::max({std::ceil(longest / split), work, rounds * shortest / split});
        return i == 0 ? steps : steps + sent * (kExchange[i] + (rounds - 1.0) * further);
    };
    size_t best = 0;
    for (size_t i = 1; i < kSplits.size(); ++i)
    {
        if (cost(i) <= cost(best) - kLeastGain)
        {
            best = i;
        }
    }
    return kSplits[best];
}

int32_t hopperGrid(HstuKernelImage const& image, int32_t split, NodeSizes const& sizes, int32_t numSms) noexcept
{
    int64_t const clusters = std::min<int64_t>(residentClusters(split, numSms), mostTiles(sizes, image.blockM));
    // One at least: without a sequence, the rows of out still have to become zero.
    return split * static_cast<int32_t>(std::max<int64_t>(clusters, 1));
}

void launchHopper(LoadedKernel const& kernel, int32_t split, HstuAttentionAttributes const& attributes,
    NodeSizes const& sizes, DevicePointers const& pointers, int32_t* progress, int32_t numSms, CUstream stream)
{
    HstuKernelImage const& image = kernel.image();
    auto const input = [&pointers](Input which) { return pointers.inputs[static_cast<size_t>(which)]; };
    auto const size = [&sizes](Symbol symbol) { return static_cast<int32_t>(sizes[symbol]); };

    auto const map = [&](Input which, int32_t boxRows)
    { return tensorMap(image, sizes, pointers, which, input(Input::kQ), boxRows); };
    TensorMap queries = map(Input::kQ, image.blockM);
    TensorMap keys = map(Input::kK, image.blockN);
    TensorMap values = map(Input::kV, image.blockN);
    bool const hasCache = attributes.hasCache != 0;
    TensorMap cachedKeys = hasCache ? map(Input::kKCached, image.blockN) : TensorMap{};
    TensorMap cachedValues = hasCache ? map(Input::kVCached, image.blockN) : TensorMap{};

    AttentionParameters parameters{};
    parameters.out = pointers.output;
    parameters.qOffsets = static_cast<int32_t const*>(input(Input::kQOffsets));
    parameters.kOffsets = static_cast<int32_t const*>(input(Input::kKOffsets));
    parameters.numTargets = static_cast<int32_t const*>(input(Input::kNumTargets));
    parameters.contextualSeqLens = static_cast<int32_t const*>(input(Input::kContextualSeqLens));
    parameters.scalingSeqLens = static_cast<float const*>(input(Input::kScalingSeqLens));
    parameters.progress = progress;
    parameters.alpha = attributes.alpha;
    parameters.scalingSeqLen = attributes.scalingSeqLen;
    parameters.lq = size(Symbol::kLq);
    parameters.lk = size(Symbol::kLk);
    parameters.batch = size(Symbol::kB);
    parameters.heads = size(Symbol::kH);
    parameters.dv = size(Symbol::kDv);
    parameters.targetGroupSize = attributes.targetGroupSize;
    parameters.contextualSeqLen = attributes.contextualSeqLen;
    parameters.maxAttnLen = attributes.maxAttnLen;
    parameters.minFullAttnSeqLen = attributes.minFullAttnSeqLen;
    parameters.rowTimestamps = input(Input::kRowTimestamps);
    parameters.colTimestamps = input(Input::kColTimestamps);
    parameters.tsThresholds = input(Input::kTsThresholds);
    parameters.tsTable = static_cast<float const*>(input(Input::kTsTable));
    parameters.posTable = static_cast<float const*>(input(Input::kPosTable));
    parameters.numBuckets = size(Symbol::kNumBuckets);
    parameters.tsHeads = size(Symbol::kHt);
    parameters.posTableLen = size(Symbol::kPosTableLen);
    parameters.posHeads = size(Symbol::kHp);
    parameters.cacheOffsets = static_cast<int32_t const*>(input(Input::kCacheOffsets));
    parameters.lc = static_cast<int32_t>(cachedRows(sizes));

    // The driver reads as many as the kernel has: the last two where there is a cache.
    void* arguments[] = {&queries, &keys, &values, &parameters, &cachedKeys, &cachedValues};
    ClusterAttribute cluster;
    cluster.blocks[0] = static_cast<unsigned>(split);
    LaunchConfig config;
    config.grid[0] = static_cast<unsigned>(hopperGrid(image, split, sizes, numSms));
    config.block[0] = static_cast<unsigned>(image.threads);
    config.sharedBytes = static_cast<unsigned>(image.sharedBytes);
    config.stream = stream;
    config.attributes = &cluster;
    config.numAttributes = split > 1 ? 1 : 0;
    CUresult const result = cudaDriver().launchKernelEx(&config, kernel.function(), arguments, nullptr);
    if (result != CUDA_SUCCESS)
    {
        checkCuda(result, (describeCall(image, sizes) + ": launch").c_str());
    }
}

} // namespace hstu
