//! Checks what the plugin's core passes to the driver for a Hopper launch, with fakeDriver.cpp as libcuda.so.1 and a
//! table of images of its own. Prints one line per failed check; exit code 0 if there is none.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "fakeDriver.h"
#include "hstuAttentionCore.h"

namespace
{

constexpr int32_t kBfloat16 = 2;
unsigned char const kCode[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};

constexpr HstuKernelImage hopperImage(
    int32_t split, int32_t blockM, int32_t threads, int32_t timestampBits, unsigned char const* code)
{
    int32_t const bias = timestampBits > 0 ? 1 : 0;
    return {90, 0, kHstuKernelHopper, kBfloat16, timestampBits, 64, 64, 1, bias, bias, 1, 64, blockM, 128, threads, split,
        1000 + split, 12000, "hopper", code, 1};
}

constexpr HstuKernelImage portableImage(int32_t timestampBits, unsigned char const* code)
{
    int32_t const bias = timestampBits > 0 ? 1 : 0;
    return {90, 0, kHstuKernelPortable, kBfloat16, timestampBits, 64, 64, 0, bias, bias, 1, 1, 64, 0, 128, 1, 0, 0,
        "portable", code, 1};
}

//! For tensors that are read in vectors, without a bias.
constexpr HstuKernelImage alignedImage(unsigned char const* code)
{
    HstuKernelImage image = portableImage(0, code);
    image.aligned = 1;
    return image;
}

//! For nodes with a cache, and aligned pointers alone.
constexpr HstuKernelImage cachedImage(int32_t timestampBits, unsigned char const* code)
{
    HstuKernelImage image = portableImage(timestampBits, code);
    image.hasCache = image.aligned = 1;
    return image;
}

constexpr HstuKernelImage cachedHopperImage(int32_t split, int32_t blockM, int32_t threads, unsigned char const* code)
{
    HstuKernelImage image = hopperImage(split, blockM, threads, 0, code);
    image.hasCache = 1;
    image.name = "hopperCache";
    return image;
}

} // namespace

HstuKernelImage const kHstuKernelImages[] = {
    portableImage(0, kCode),
    hopperImage(1, 192, 512, 0, kCode + 1),
    hopperImage(8, 128, 384, 0, kCode + 2),
    portableImage(64, kCode + 3),
    hopperImage(1, 128, 384, 64, kCode + 4),
    cachedImage(64, kCode + 5),
    cachedHopperImage(8, 128, 384, kCode + 6),
    cachedImage(0, kCode + 7),
    alignedImage(kCode + 8),
};
size_t const kHstuNbKernelImages = sizeof(kHstuKernelImages) / sizeof(kHstuKernelImages[0]);

namespace
{

using hstu::Input;

int failures = 0;

void expect(bool condition, std::string const& what)
{
    if (!condition)
    {
        std::printf("FAIL %s\n", what.c_str());
        ++failures;
    }
}

struct Shape
{
    int64_t batch;
    int64_t lq;
    int64_t lk;
    int64_t heads;
    int64_t dqk;
    int64_t dv;
    int64_t lc{-1}; //!< negative: without a cache
};

hstu::HstuAttentionAttributes attributesOf(bool hasBias)
{
    hstu::HstuAttentionAttributes attributes;
    attributes.alpha = 0.25F;
    attributes.scalingSeqLen = 200.0F;
    attributes.maxQueryLen = attributes.maxSeqLen = 4096;
    attributes.targetGroupSize = 3;
    attributes.contextualSeqLen = 2;
    attributes.maxAttnLen = 5;
    attributes.minFullAttnSeqLen = 7;
    attributes.hasNumTargets = 1;
    attributes.posBias = attributes.timeBias = hasBias ? 1 : 0;
    return attributes;
}

hstu::TensorView view(hstu::ElementType type, std::initializer_list<int64_t> dims)
{
    hstu::TensorView tensor;
    tensor.type = type;
    for (int64_t const dim : dims)
    {
        tensor.dims[static_cast<size_t>(tensor.rank++)] = dim;
    }
    return tensor;
}

hstu::NodeTensors tensorsOf(Shape const& shape, int64_t timeHeads)
{
    using hstu::ElementType;
    hstu::NodeTensors tensors;
    auto const set = [&tensors](Input input, hstu::TensorView const& tensor)
    { tensors.inputs[static_cast<size_t>(input)] = tensor; };
    set(Input::kQ, view(ElementType::kBfloat16, {shape.lq, shape.heads, shape.dqk}));
    set(Input::kK, view(ElementType::kBfloat16, {shape.lk, shape.heads, shape.dqk}));
    set(Input::kV, view(ElementType::kBfloat16, {shape.lk, shape.heads, shape.dv}));
    set(Input::kQOffsets, view(ElementType::kInt32, {shape.batch + 1}));
    set(Input::kKOffsets, view(ElementType::kInt32, {shape.batch + 1}));
    set(Input::kNumTargets, view(ElementType::kInt32, {shape.batch}));
    if (timeHeads > 0)
    {
        set(Input::kRowTimestamps, view(ElementType::kInt64, {shape.lq}));
        set(Input::kColTimestamps, view(ElementType::kInt64, {shape.lk}));
        set(Input::kPosTable, view(ElementType::kFloat32, {1, 99}));
        set(Input::kTsTable, view(ElementType::kFloat32, {timeHeads, 17}));
        set(Input::kTsThresholds, view(ElementType::kInt64, {16}));
    }
    if (shape.lc >= 0)
    {
        set(Input::kKCached, view(ElementType::kBfloat16, {shape.lc, shape.heads, shape.dqk}));
        set(Input::kVCached, view(ElementType::kBfloat16, {shape.lc, shape.heads, shape.dv}));
        set(Input::kCacheOffsets, view(ElementType::kInt32, {shape.batch + 1}));
    }
    tensors.output = view(ElementType::kBfloat16, {shape.lq, shape.heads, shape.dv});
    return tensors;
}

//! Every tensor at an address of its own, 0x1000 times its position plus one.
hstu::DevicePointers pointersOf(hstu::HstuAttentionAttributes const& attributes)
{
    hstu::DevicePointers pointers;
    for (int32_t input = 0; input < hstu::kNbInputs; ++input)
    {
        if (hstu::isInputPresent(attributes, input))
        {
            pointers.inputs[static_cast<size_t>(input)] = reinterpret_cast<void const*>(uintptr_t{0x1000} * (input + 1U));
        }
    }
    pointers.output = reinterpret_cast<void*>(0x100000);
    return pointers;
}

hstu::HstuAttentionCore coreOf(Shape const& shape, int64_t timeHeads = 0)
{
    hstu::HstuAttentionAttributes attributes = attributesOf(timeHeads > 0);
    attributes.hasCache = shape.lc >= 0 ? 1 : 0;
    hstu::HstuAttentionCore core("node", attributes, hstu::EngineSignature{});
    core.configure(tensorsOf(shape, timeHeads));
    core.load();
    return core;
}

class Checks
{
public:
    explicit Checks(fake::Calls& calls)
        : mCalls(calls)
    {
    }

    void run()
    {
        checkWholeTiles();
        checkSharedTiles();
        checkFixedSplits();
        checkFallbacks();
        checkNoKeys();
        checkRowStrides();
        checkBias();
        checkCounters();
        checkCache();
        checkHopperCache();
        expect(mCalls.allocations == 0, "every counter is freed");
    }

private:
    //! Enqueues and hands back the one launch, which neither waited nor allocated.
    fake::Launch launchOf(hstu::HstuAttentionCore const& core, Shape const& shape, hstu::DevicePointers const& pointers,
        int64_t timeHeads = 0)
    {
        size_t const before = mCalls.launches.size();
        int const waits = mCalls.waits;
        core.enqueue(tensorsOf(shape, timeHeads), pointers, reinterpret_cast<CUstream>(0x77));
        expect(mCalls.waits == waits, "enqueue neither allocates nor waits");
        expect(mCalls.launches.size() == before + 1, "one launch");
        return mCalls.launches.back();
    }

    void checkWholeTiles()
    {
        Shape const shape{4, 60000, 60001, 4, 56, 40};
        hstu::HstuAttentionCore const core = coreOf(shape);
        fake::Launch const launch = launchOf(core, shape, pointersOf(attributesOf(false)));
        expect(launch.image == kCode + 1, "many tiles are not split");
        expect(launch.grid[0] == 132 && launch.grid[1] == 1 && launch.grid[2] == 1, "a block an SM");
        expect(launch.block[0] == 512 && launch.sharedBytes == 1001, "the image's threads and shared memory");
        expect(launch.cluster == 1, "without clusters");
        expect(launch.stream == reinterpret_cast<CUstream>(0x77), "on the stream");
        uint64_t const rows[] = {60000, 60001, 60001};
        uint64_t const columns[] = {56, 56, 40};
        uint32_t const boxRows[] = {192, 128, 128};
        for (size_t i = 0; i < 3; ++i)
        {
            fake::MapCall const& map = launch.maps[i];
            expect(map.type == 9 && map.modes == std::vector<int>{0, 3, 3, 0}, "bfloat16, swizzled, zeros outside");
            expect(map.address == reinterpret_cast<void*>(uintptr_t{0x1000} * (i + 1)), "q, k and v");
            expect(map.dims == std::vector<uint64_t>{columns[i], 4, rows[i]}, "columns, heads, rows");
            expect(map.strides == std::vector<uint64_t>{2 * columns[i], 8 * columns[i]}, "bytes of a head and a row");
            expect(map.box == std::vector<uint32_t>{64, 1, boxRows[i]}, "a slab of a tile");
            expect(map.steps == std::vector<uint32_t>{1, 1, 1}, "every element");
        }
        hstu::AttentionParameters const& p = launch.parameters;
        expect(p.out == reinterpret_cast<void*>(0x100000), "out");
        expect(p.qOffsets == reinterpret_cast<int32_t*>(0x4000) && p.kOffsets == reinterpret_cast<int32_t*>(0x5000)
                   && p.numTargets == reinterpret_cast<int32_t*>(0x6000),
            "offsets and targets");
        expect(p.contextualSeqLens == nullptr && p.scalingSeqLens == nullptr, "absent inputs are null");
        expect(p.alpha == 0.25F && p.scalingSeqLen == 200.0F, "alpha and divisor");
        expect(p.lq == 60000 && p.lk == 60001 && p.batch == 4 && p.heads == 4 && p.dv == 40, "sizes");
        expect(p.targetGroupSize == 3 && p.contextualSeqLen == 2 && p.maxAttnLen == 5 && p.minFullAttnSeqLen == 7,
            "attributes of the mask");
        expect(p.progress != nullptr && p.progress[0] == 0 && p.progress[1] == 0, "counters that are zero");
        expect(p.rowTimestamps == nullptr && p.tsTable == nullptr && p.posTable == nullptr && p.numBuckets == 0,
            "no bias");
    }

    void checkSharedTiles()
    {
        Shape const few{2, 300, 600, 4, 64, 64};
        expect(launchOf(coreOf(few), few, pointersOf(attributesOf(false))).image == kCode + 1, "few keys are not worth it");
        struct Expected
        {
            Shape shape;
            unsigned cluster;
            unsigned grid;
        };
        Expected const cases[] = {
            {{1, 256, 4352, 4, 64, 64}, 8, 8 * (256 / 128 + 1) * 4}, // a cluster for every tile that there may be
            {{4, 512, 8192, 4, 64, 64}, 4, 4 * 28},                   // as many clusters as run at once
            {{8, 2048, 34816, 4, 64, 64}, 2, 132},
        };
        for (Expected const& expected : cases)
        {
            fake::Launch const launch = launchOf(coreOf(expected.shape), expected.shape, pointersOf(attributesOf(false)));
            expect(launch.image == kCode + 2, "few tiles with many keys are shared");
            expect(launch.cluster == expected.cluster && launch.grid[0] == expected.grid, "by so many blocks");
            expect(launch.block[0] == 384 && launch.sharedBytes == 1008, "the image's threads and shared memory");
            expect(launch.maps[0].box[2] == 128, "and its tile");
        }
    }

    void checkFixedSplits()
    {
        Shape const shape{2, 300, 300, 4, 64, 64};
        hstu::HstuAttentionCore core = coreOf(shape);
        expect(core.tactics() == std::vector<int32_t>{64, 1}, "the splits are not offered");
        for (int32_t const split : hstu::kSplits)
        {
            core.setTactic(64 + split);
            fake::Launch const launch = launchOf(core, shape, pointersOf(attributesOf(false)));
            expect(launch.image == kCode + (split > 1 ? 2 : 1) && launch.cluster == static_cast<unsigned>(split),
                "a split that is fixed");
        }
        core.setTactic(1);
        expect(launchOf(core, shape, pointersOf(attributesOf(false))).kernel == "portable", "the portable tactic");
        for (int32_t const tactic : {67, 80})
        {
            bool isRefused = false;
            try
            {
                core.setTactic(tactic);
            }
            catch (std::exception const& error)
            {
                isRefused = std::string(error.what()).find("tactic " + std::to_string(tactic)) != std::string::npos;
            }
            expect(isRefused, "a split that there is not");
        }
    }

    void checkFallbacks()
    {
        Shape const shape{2, 300, 300, 4, 64, 64};
        hstu::HstuAttentionCore const core = coreOf(shape);
        hstu::DevicePointers shifted = pointersOf(attributesOf(false));
        shifted.inputs[static_cast<size_t>(Input::kK)] = reinterpret_cast<void const*>(0x2002);
        expect(launchOf(core, shape, shifted).image == kCode, "keys that are not aligned take the portable kernel");
        Shape const timed{2, 300, 300, 9, 64, 64};
        hstu::HstuAttentionCore const many = coreOf(timed, 9);
        expect(launchOf(many, timed, pointersOf(attributesOf(true)), 9).image == kCode + 3,
            "and so do time tables of nine heads");
    }

    //! q, k and v as columns of one tensor, where each has rows of its own width.
    void checkRowStrides()
    {
        Shape const shape{2, 300, 301, 4, 64, 48};
        hstu::HstuAttentionCore core = coreOf(shape);
        hstu::DevicePointers const pointers = pointersOf(attributesOf(false));
        auto const strided = [&](std::array<int64_t, 3> const& strides)
        {
            hstu::NodeTensors tensors = tensorsOf(shape, 0);
            std::copy(strides.begin(), strides.end(), tensors.rowStrides.begin());
            core.enqueue(tensors, pointers, nullptr);
            return mCalls.launches.back();
        };
        fake::Launch const hopper = strided({896, 904, 912});
        expect(hopper.image == kCode + 1, "rows that are 16-byte aligned take the Hopper kernel");
        uint64_t const columns[] = {64, 64, 48};
        uint64_t const rows[] = {300, 301, 301};
        for (size_t i = 0; i < 3; ++i)
        {
            expect(hopper.maps[i].strides == std::vector<uint64_t>{2 * columns[i], 2 * (896 + 8 * i)},
                "bytes of a head and of the wider tensor's row");
            expect(hopper.maps[i].dims == std::vector<uint64_t>{columns[i], 4, rows[i]}, "the tensor's own extents");
            expect(hopper.maps[i].address == pointers.inputs[i], "from its first column on");
        }
        for (size_t i = 0; i < 3; ++i)
        {
            std::array<int64_t, 3> odd{896, 896, 896};
            odd[i] = 900;
            fake::Launch const launch = strided(odd);
            expect(launch.image == kCode && launch.rowStrides == std::vector<int32_t>(odd.begin(), odd.end()),
                "rows 8 bytes off take the portable kernel for any tensors, which gets their strides");
        }
        core.setTactic(1);
        expect(strided({0, 0, 0}).rowStrides == std::vector<int32_t>{256, 256, 192}, "contiguous rows have their width");
        expect(strided({912, 912, 912}).image == kCode + 8, "multiples of 16 elements are read in vectors");
        expect(strided({912, 904, 912}).image == kCode, "others are not");
        auto const refused = [&](size_t input, int64_t stride, char const* why)
        {
            hstu::NodeTensors tensors = tensorsOf(shape, 0);
            tensors.rowStrides[input] = stride;
            try
            {
                core.enqueue(tensors, pointers, nullptr);
            }
            catch (std::exception const& error)
            {
                return std::string(error.what()).find(why) != std::string::npos;
            }
            return false;
        };
        expect(refused(0, 255, "the rows of q are 255 elements apart; allowed: 0, a contiguous tensor, or 256 to 2147483647"),
            "rows that overlap");
        expect(refused(2, int64_t{1} << 31, "the rows of v are 2147483648 elements apart"), "more than 32 bits count");
        expect(refused(3, 5, "the rows of q_offsets are 5 elements apart; allowed: 0, a contiguous tensor"),
            "rows of another input");
    }

    void checkNoKeys()
    {
        Shape const shape{2, 300, 0, 4, 64, 32};
        hstu::DevicePointers pointers = pointersOf(attributesOf(false));
        pointers.inputs[static_cast<size_t>(Input::kK)] = pointers.inputs[static_cast<size_t>(Input::kV)] = nullptr;
        fake::Launch const launch = launchOf(coreOf(shape), shape, pointers);
        for (size_t i = 1; i < 3; ++i)
        {
            expect(launch.maps[i].address == reinterpret_cast<void*>(0x1000) && launch.maps[i].dims[2] == 1,
                "a map of something where there are no keys");
        }
        expect(launch.parameters.lk == 0, "and none are counted");
        size_t const before = mCalls.launches.size();
        Shape const empty{2, 0, 0, 4, 64, 32};
        coreOf(empty).enqueue(tensorsOf(empty, 0), hstu::DevicePointers{}, nullptr);
        expect(mCalls.launches.size() == before, "nothing to launch without queries");
    }

    void checkBias()
    {
        Shape const shape{2, 300, 300, 4, 64, 64};
        fake::Launch const launch = launchOf(coreOf(shape, 4), shape, pointersOf(attributesOf(true)), 4);
        expect(launch.image == kCode + 4, "the image with both biases");
        hstu::AttentionParameters const& p = launch.parameters;
        auto const at = [](Input input)
        { return reinterpret_cast<void const*>(uintptr_t{0x1000} * (static_cast<unsigned>(input) + 1U)); };
        expect(p.rowTimestamps == at(Input::kRowTimestamps) && p.colTimestamps == at(Input::kColTimestamps)
                   && p.tsThresholds == at(Input::kTsThresholds) && p.tsTable == at(Input::kTsTable)
                   && p.posTable == at(Input::kPosTable),
            "tables and times");
        expect(p.numBuckets == 16 && p.tsHeads == 4 && p.posTableLen == 50 && p.posHeads == 1, "their sizes");
    }

    void checkHopperCache()
    {
        Shape const shape{1, 256, 256, 4, 64, 64, 4096};
        hstu::HstuAttentionAttributes attributes = attributesOf(false);
        attributes.hasCache = 1;
        hstu::DevicePointers pointers = pointersOf(attributes);
        fake::Launch const launch = launchOf(coreOf(shape), shape, pointers);
        expect(launch.image == kCode + 6 && launch.cluster == 8, "cached keys count where a split is chosen");
        Input const inputs[] = {Input::kQ, Input::kK, Input::kV, Input::kKCached, Input::kVCached};
        uint64_t const rows[] = {256, 256, 256, 4096, 4096};
        for (size_t i = 0; i < 5; ++i)
        {
            expect(launch.maps.at(i).address == pointers.inputs[static_cast<size_t>(inputs[i])]
                       && launch.maps.at(i).dims[2] == rows[i],
                "a map of each tensor");
        }
        expect(launch.parameters.cacheOffsets == pointers.inputs[static_cast<size_t>(Input::kCacheOffsets)]
                   && launch.parameters.lc == 4096 && launch.parameters.lk == 256,
            "offsets and rows of the cache");
        Shape const empty{1, 256, 256, 4, 64, 64, 0};
        pointers.inputs[static_cast<size_t>(Input::kVCached)] = reinterpret_cast<void const*>(0x2008);
        fake::Launch const none = launchOf(coreOf(empty), empty, pointers);
        expect(none.image == kCode + 6 && none.maps.at(4).address == pointers.inputs[0] && none.maps.at(4).dims[2] == 1,
            "a map of something where nothing is cached");
        bool isRefused = false;
        try
        {
            launchOf(coreOf(shape), shape, pointers);
        }
        catch (std::exception const& error)
        {
            isRefused = std::string(error.what()).find("not 16-byte aligned") != std::string::npos;
        }
        expect(isRefused, "cached values that are not aligned take the portable kernel, of which there is only an aligned one");
    }

    void checkCounters()
    {
        Shape const shape{2, 300, 300, 4, 64, 64};
        int const before = mCalls.allocations;
        hstu::HstuAttentionCore const core = coreOf(shape);
        hstu::HstuAttentionCore copy(core);
        hstu::HstuAttentionCore const attached = core.attached();
        expect(mCalls.allocations == before + 3, "counters for each copy");
        int32_t const* const own = launchOf(core, shape, pointersOf(attributesOf(false))).parameters.progress;
        hstu::HstuAttentionCore const* const cores[] = {&copy, &attached};
        for (hstu::HstuAttentionCore const* const other : cores)
        {
            int32_t const* const others = launchOf(*other, shape, pointersOf(attributesOf(false))).parameters.progress;
            expect(others != nullptr && others != own && others[0] == 0, "of its own");
        }
        hstu::HstuAttentionCore moved(std::move(copy));
        moved.unload();
        expect(mCalls.allocations == before + 2, "the others keep theirs");
    }

    //! Joined timestamps, and cached rows whose address counts only where there are any.
    void checkCache()
    {
        Shape const shape{2, 300, 300, 4, 64, 64};
        hstu::HstuAttentionAttributes attributes = attributesOf(true);
        attributes.hasCache = 1;
        auto const tensors = [&shape](int64_t cached, int64_t columns)
        {
            using hstu::ElementType;
            hstu::NodeTensors all = tensorsOf(shape, 4);
            auto const set = [&all](Input input, hstu::TensorView const& tensor)
            { all.inputs[static_cast<size_t>(input)] = tensor; };
            set(Input::kColTimestamps, view(ElementType::kInt64, {columns}));
            set(Input::kKCached, view(ElementType::kBfloat16, {cached, shape.heads, shape.dqk}));
            set(Input::kVCached, view(ElementType::kBfloat16, {cached, shape.heads, shape.dv}));
            set(Input::kCacheOffsets, view(ElementType::kInt32, {shape.batch + 1}));
            return all;
        };
        hstu::HstuAttentionCore core("node", attributes, hstu::EngineSignature{});
        auto const problem = [](auto const& call) -> std::string
        {
            try
            {
                call();
                return "";
            }
            catch (std::exception const& error)
            {
                return error.what();
            }
        };
        expect(problem([&] { core.configure(tensors(500, 300)); })
                       .find("Lcol is 300 in axis 0 of col_timestamps; allowed: Lc + Lk = 800")
                   != std::string::npos,
            "the timestamps of the keys are those of cached and new rows");
        expect(problem([&] { core.configure(tensors(INT32_MAX, -1)); }).find("allowed: at most 2147483647 together")
                   != std::string::npos,
            "more joined rows than 32 bits count");
        core.configure(tensors(500, 800));
        core.load();
        expect(core.tactics() == std::vector<int32_t>{1}, "the portable tactic");
        hstu::DevicePointers pointers = pointersOf(attributes);
        auto const enqueue = [&](int64_t cached)
        { core.enqueue(tensors(cached, cached + shape.lk), pointers, reinterpret_cast<CUstream>(0x77)); };
        enqueue(500);
        expect(mCalls.launches.back().image == kCode + 5, "the kernel that reads a cache");
        pointers.inputs[static_cast<size_t>(Input::kKCached)] = reinterpret_cast<void const*>(0x1002);
        expect(problem([&] { enqueue(500); }).find("not 16-byte aligned") != std::string::npos, "cached keys 2 bytes off");
        size_t const before = mCalls.launches.size();
        enqueue(0);
        expect(mCalls.launches.size() == before + 1, "the address of an empty cache does not matter");
    }

    fake::Calls& mCalls;
};

} // namespace

int main(int argc, char** argv)
{
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    auto const getCalls = library != nullptr
                              ? reinterpret_cast<fake::Calls* (*)()>(dlsym(library, "fakeCalls"))
                              : nullptr;
    if (getCalls == nullptr)
    {
        std::printf("libcuda.so.1 is not the fake driver\n");
        return 2;
    }
    try
    {
        if (argc == 2 && std::string(argv[1]) == "tactics")
        {
            for (int32_t const tactic : coreOf({2, 300, 300, 4, 64, 64}).tactics())
            {
                std::printf("%d\n", tactic);
            }
            return 0;
        }
        Checks(*getCalls()).run();
    }
    catch (std::exception const& error)
    {
        std::printf("FAIL %s\n", error.what());
        return 1;
    }
    return failures == 0 ? 0 : 1;
}
