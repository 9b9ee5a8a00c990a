//! Checks how the plugin picks kernel images, with a table of its own in place of the compiled kernels. Needs no GPU.
//!
//! Usage: selection                     prints one line per failed check; exit code 0 if there is none
//!        selection split LQ LK B HEADS BLOCK_DIM BLOCK_M BLOCK_N SMS   prints the split that is chosen for a launch

#include <cstdio>
#include <string>

#include "hstuAttentionHopper.h"

namespace
{

unsigned char const kCode[] = {0};

//! float16, 64 x 64, no bias; the fields that the checks vary are arguments.
constexpr HstuKernelImage image(int32_t sm, int32_t isPtx, int32_t aligned, int32_t maskKind, int32_t tactic)
{
    return {sm, isPtx, kHstuKernelPortable, 1, 0, 64, 64, aligned, 0, 0, maskKind, tactic, 64, 0, 128, 1, 0, 0, "kernel",
        kCode, sizeof(kCode)};
}

constexpr HstuKernelImage timeImage(int32_t timestampBits)
{
    return {90, 0, kHstuKernelPortable, 1, timestampBits, 64, 64, 0, 1, 1, 1, 1, 64, 0, 128, 1, 0, 0, "kernel", kCode,
        sizeof(kCode)};
}

constexpr int32_t kHopperTactic = 64;

//! bfloat16, made by nvcc 12.
constexpr HstuKernelImage hopperImage(int32_t blockDim, int32_t maskKind, int32_t split)
{
    return {90, 0, kHstuKernelHopper, 2, 0, blockDim, blockDim, 1, 0, 0, maskKind, kHopperTactic, 192, 128, 512, split, 0,
        12000, "hopper", kCode, sizeof(kCode)};
}

constexpr HstuKernelImage accurateImage(int32_t blockDim, int32_t maskKind, int32_t split)
{
    HstuKernelImage accurate = hopperImage(blockDim, maskKind, split);
    accurate.silu = 1;
    return accurate;
}

//! bfloat16, for any pointers.
constexpr HstuKernelImage bfloatImage(int32_t blockDim, int32_t tactic)
{
    return {90, 0, kHstuKernelPortable, 2, 0, blockDim, blockDim, 0, 0, 0, 1, tactic, 64, 0, 128, 1, 0, 0, "kernel",
        kCode, sizeof(kCode)};
}

//! bfloat16, for nodes with a cache.
constexpr HstuKernelImage cachedImage(int32_t blockDim)
{
    HstuKernelImage cached = bfloatImage(blockDim, 1);
    cached.hasCache = 1;
    return cached;
}

} // namespace

HstuKernelImage const kHstuKernelImages[] = {
    image(80, 0, 1, 1, 1), // 0
    image(86, 0, 1, 1, 1), // 1
    image(90, 0, 1, 1, 1), // 2
    image(90, 0, 1, 1, 2), // 3
    image(90, 0, 0, 1, 1), // 4
    image(90, 0, 1, 0, 1), // 5
    image(80, 1, 1, 1, 1), // 6: PTX
    timeImage(64),         // 7
    timeImage(32),         // 8
    bfloatImage(64, 2),    // 9
    bfloatImage(64, 1),    // 10
    hopperImage(64, 1, 8), // 11
    hopperImage(64, 1, 1), // 12
    hopperImage(128, 0, 1), // 13
    hopperImage(64, 0, 1), // 14
    bfloatImage(128, 1),   // 15
    accurateImage(64, 1, 1), // 16
    cachedImage(64),         // 17
};
size_t const kHstuNbKernelImages = sizeof(kHstuKernelImages) / sizeof(kHstuKernelImages[0]);

namespace
{

int failures = 0;

void expect(bool condition, char const* what)
{
    if (!condition)
    {
        std::printf("FAIL %s\n", what);
        ++failures;
    }
}

hstu::EngineSignature signatureOf(int32_t dim, int32_t timestampBits = 0)
{
    hstu::EngineSignature signature;
    signature.elementType = static_cast<int32_t>(hstu::ElementType::kFloat16);
    signature.timestampBits = timestampBits;
    signature.numHeads = 1;
    signature.attentionDim = dim;
    signature.linearDim = dim;
    return signature;
}

hstu::HstuAttentionAttributes causal()
{
    hstu::HstuAttentionAttributes attributes;
    attributes.targetGroupSize = 1;
    return attributes;
}

hstu::HstuAttentionAttributes general()
{
    hstu::HstuAttentionAttributes attributes = causal();
    attributes.hasNumTargets = 1;
    return attributes;
}

//! A GPU with a driver that knows everything.
hstu::GpuTraits gpuOf(int32_t sm)
{
    hstu::GpuTraits gpu;
    gpu.sm = sm;
    gpu.driverVersion = 13000;
    gpu.numSms = 132;
    gpu.hasTensorMaps = true;
    return gpu;
}

HstuKernelImage const* at(int32_t index)
{
    return &kHstuKernelImages[index];
}

void checkArchitectures()
{
    auto const alignedOn = [](int32_t sm)
    {
        auto const tactics = hstu::findTactics(general(), signatureOf(64), gpuOf(sm));
        return tactics.empty() ? nullptr : tactics[0].aligned;
    };
    expect(alignedOn(80) == at(0), "sm_80 takes its own cubin");
    expect(alignedOn(87) == at(1), "sm_87 takes the newest 8.x cubin below it");
    expect(alignedOn(90) == at(2), "sm_90 takes its own cubin");
    expect(alignedOn(100) == at(6), "sm_100 takes the PTX: a 9.0 cubin is architecture-specific");
    expect(alignedOn(75) == nullptr, "sm_75 has nothing: neither cubin nor PTX of 8.0 runs there");
    expect(!hstu::runsOn(kHstuKernelImages[2], gpuOf(91)), "a 9.0 cubin does not run on 9.1");
    expect(!hstu::runsOn(kHstuKernelImages[1], gpuOf(80)), "an 8.6 cubin does not run on 8.0");
}

void checkTactics()
{
    auto const tactics = hstu::findTactics(general(), signatureOf(64), gpuOf(90));
    expect(tactics.size() == 2 && tactics[0].tactic == 1 && tactics[1].tactic == 2, "both tactics of sm_90, ascending");
    expect(tactics[0].unaligned == at(4) && tactics[1].unaligned == nullptr, "unaligned image where there is one");
    expect(hstu::findTactics(general(), signatureOf(64), hstu::GpuTraits{}).size() == 2, "without a GPU every tactic is offered");
}

void checkMasks()
{
    expect(
        hstu::findTactics(causal(), signatureOf(64), gpuOf(90))[0].aligned == at(5), "a causal node takes the causal kernel");
    expect(hstu::findTactics(causal(), signatureOf(64), gpuOf(80))[0].aligned == at(0),
        "and the general one where there is no other");
    hstu::HstuAttentionAttributes window = causal();
    window.maxAttnLen = 1;
    expect(hstu::findTactics(window, signatureOf(64), gpuOf(90))[0].aligned == at(2), "a window needs the general kernel");
    hstu::HstuAttentionAttributes context = causal();
    context.contextualSeqLen = 1;
    expect(hstu::findTactics(context, signatureOf(64), gpuOf(90))[0].aligned == at(2), "a context needs the general kernel");
}

hstu::NodeSizes sizesOf(int64_t lq, int64_t lk, int64_t batch, int64_t heads)
{
    hstu::NodeSizes sizes;
    sizes[hstu::Symbol::kLq] = lq;
    sizes[hstu::Symbol::kLk] = lk;
    sizes[hstu::Symbol::kB] = batch;
    sizes[hstu::Symbol::kH] = heads;
    return sizes;
}

void checkAlignment()
{
    auto const tactics = hstu::findTactics(general(), signatureOf(50), gpuOf(90));
    expect(tactics.size() == 1 && tactics[0].aligned == nullptr && tactics[0].unaligned == at(4),
        "head dim 50 takes only kernels that promise no alignment");
    hstu::NodeSizes sizes = sizesOf(10, 10, 1, 2);
    hstu::DevicePointers pointers;
    pointers.output = reinterpret_cast<void*>(0x100);
    pointers.inputs[0] = reinterpret_cast<void const*>(0x200);
    expect(hstu::isAligned(sizes, pointers), "256 and 512 are aligned, absent inputs do not matter");
    pointers.inputs[1] = reinterpret_cast<void const*>(0x208);
    expect(!hstu::isAligned(sizes, pointers), "8 bytes off is not aligned");
    pointers.inputs[1] = nullptr;
    for (hstu::Input const input : {hstu::Input::kQ, hstu::Input::kK, hstu::Input::kV})
    {
        sizes.setRowStride(input, 160);
        expect(hstu::isAligned(sizes, pointers), "rows that are 160 elements apart");
        sizes.setRowStride(input, 168);
        expect(!hstu::isAligned(sizes, pointers), "rows that are no multiple of 16 elements apart");
        sizes.setRowStride(input, 0);
    }
}

void checkTimestamps()
{
    hstu::HstuAttentionAttributes biased = general();
    biased.posBias = 1;
    biased.timeBias = 1;
    expect(hstu::findTactics(biased, signatureOf(64, 64), gpuOf(90))[0].unaligned == at(7), "64-bit timestamps");
    expect(hstu::findTactics(biased, signatureOf(64, 32), gpuOf(90))[0].unaligned == at(8), "32-bit timestamps");
    biased.posBias = 0;
    expect(hstu::findTactics(biased, signatureOf(64, 64), gpuOf(90)).empty(),
        "a kernel with a bias that the node lacks does not fit");
}

void checkMessage()
{
    std::string const otherDim = hstu::describeMissingKernel(general(), signatureOf(128), gpuOf(90));
    expect(otherDim.find("q/k head dim 128") != std::string::npos, "the message names what is needed");
    expect(otherDim.find("[float16 64x64 general aligned]") != std::string::npos, "the message lists what is there");
    expect(
        otherDim.find("`hstu-compile plugin build --onnx MODEL.onnx --arch 9.0`") != std::string::npos, "the message says how to get it");
    std::string const otherSm = hstu::describeMissingKernel(general(), signatureOf(64), gpuOf(75));
    expect(otherSm.find("fits this node on sm_80, sm_86, sm_90 only") != std::string::npos,
        "the message names fitting GPUs");
}

hstu::EngineSignature bfloatSignature(int32_t attentionDim, int32_t linearDim)
{
    hstu::EngineSignature signature = signatureOf(attentionDim);
    signature.elementType = static_cast<int32_t>(hstu::ElementType::kBfloat16);
    signature.linearDim = linearDim;
    return signature;
}

void checkHopperTactics()
{
    auto const tactics = hstu::findTactics(general(), bfloatSignature(64, 64), gpuOf(90));
    expect(tactics.size() == 3 && tactics[0].tactic == kHopperTactic && tactics[1].tactic == 1 && tactics[2].tactic == 2,
        "the Hopper tactic comes first, the portable ones follow ascending");
    expect(tactics[0].hopper[0] == at(12) && tactics[0].hopper[1] == at(11), "with tiles of its own and with shared ones");
    expect(tactics[0].unaligned == at(10) && tactics[0].aligned == nullptr,
        "the first portable tactic is what a call falls back to");
    expect(!hstu::isHopper(tactics[1]) && tactics[1].unaligned == at(10), "a portable tactic has no Hopper image");
    auto const plain = hstu::findTactics(causal(), bfloatSignature(64, 64), gpuOf(90));
    expect(plain[0].hopper[0] == at(14) && plain[0].hopper[1] == at(11), "the causal kernel where there is one");
    auto const narrow = hstu::findTactics(general(), bfloatSignature(56, 40), gpuOf(90));
    expect(narrow.size() == 3 && narrow[0].hopper[0] == at(12), "head dims are padded to the next that is compiled");
    auto const wide = hstu::findTactics(causal(), bfloatSignature(128, 72), gpuOf(90));
    expect(wide.size() == 2 && wide[0].hopper[0] == at(13) && wide[0].hopper[1] == nullptr, "128 has no shared tiles here");
    expect(hstu::findTactics(general(), bfloatSignature(128, 72), gpuOf(90)).size() == 1,
        "a general mask does not take the causal kernel");
    expect(hstu::findTactics(general(), bfloatSignature(60, 64), gpuOf(90)).size() == 2,
        "a head dim that is no multiple of 8 takes portable kernels");
    expect(hstu::findTactics(general(), bfloatSignature(64, 64), gpuOf(100)).empty(), "Hopper's code is Hopper's only");
    expect(hstu::findTactics(general(), bfloatSignature(64, 64), hstu::GpuTraits{}).size() == 3,
        "without a GPU the Hopper tactic is offered");
    hstu::GpuTraits old = gpuOf(90);
    old.driverVersion = 11080;
    expect(hstu::findTactics(general(), bfloatSignature(64, 64), old).size() == 2, "a driver older than the compiler");
    hstu::GpuTraits blind = gpuOf(90);
    blind.hasTensorMaps = false;
    expect(hstu::findTactics(general(), bfloatSignature(64, 64), blind).size() == 2, "a driver without tensor maps");
}

void checkSilu()
{
    hstu::HstuAttentionAttributes accurate = general();
    accurate.silu = 1;
    auto const tactics = hstu::findTactics(accurate, bfloatSignature(64, 64), gpuOf(90));
    expect(tactics.size() == 3 && tactics[0].tactic == kHopperTactic && tactics[0].hopper[0] == at(16),
        "an accurate node takes the accurate Hopper kernel");
    expect(tactics[0].hopper[1] == nullptr, "and no fast one in the place of a split that is not there");
    expect(tactics[0].unaligned == at(10) && tactics[1].unaligned == at(10), "the portable kernel serves both");
    auto const fast = hstu::findTactics(general(), bfloatSignature(64, 64), gpuOf(90));
    expect(fast[0].hopper[0] == at(12) && fast[0].hopper[1] == at(11), "a fast node takes no accurate one");
    accurate.hasNumTargets = 0;
    auto const wide = hstu::findTactics(accurate, bfloatSignature(128, 128), gpuOf(90));
    expect(wide.size() == 1 && wide[0].unaligned == at(15), "without its Hopper kernel an accurate node runs the portable one");
    expect(hstu::describeMissingKernel(accurate, bfloatSignature(256, 256), gpuOf(90)).find(
               "[bfloat16 64x64 general aligned hopper accurate]")
               != std::string::npos,
        "the message says which kernels are accurate");
}

void checkCache()
{
    hstu::HstuAttentionAttributes cached = general();
    cached.hasCache = 1;
    auto const tactics = hstu::findTactics(cached, bfloatSignature(64, 64), gpuOf(90));
    expect(tactics.size() == 1 && tactics[0].unaligned == at(17), "a node with a cache takes the kernel that reads one");
    expect(!hstu::isHopper(tactics[0]), "and no Hopper kernel, which reads none");
    auto const plain = hstu::findTactics(general(), bfloatSignature(64, 64), gpuOf(90));
    expect(plain.size() == 3 && plain[1].unaligned == at(10), "a node without a cache takes none that reads one");
    std::string const missing = hstu::describeMissingKernel(cached, bfloatSignature(128, 128), gpuOf(90));
    expect(missing.find("general mask, with a cache. It was built for") != std::string::npos
               || missing.find("general mask, with a cache on sm_90") != std::string::npos,
        "the message says that a cache is needed");
    expect(missing.find("[bfloat16 64x64 general cache]") != std::string::npos, "and which kernels read one");
}

void checkHopperCalls()
{
    hstu::DevicePointers pointers;
    pointers.output = reinterpret_cast<void*>(0x1000);
    for (hstu::Input const input : {hstu::Input::kQ, hstu::Input::kK, hstu::Input::kV})
    {
        pointers.inputs[static_cast<size_t>(input)] = reinterpret_cast<void const*>(0x2000);
    }
    pointers.inputs[static_cast<size_t>(hstu::Input::kQOffsets)] = reinterpret_cast<void const*>(0x3004);
    hstu::NodeSizes const sizes = sizesOf(1000, 1000, 4, 2);
    expect(hstu::takesHopper(sizes, pointers), "offsets need no alignment");
    hstu::DevicePointers shifted = pointers;
    shifted.inputs[static_cast<size_t>(hstu::Input::kV)] = reinterpret_cast<void const*>(0x2008);
    expect(!hstu::takesHopper(sizes, shifted), "values 8 bytes off");
    expect(hstu::takesHopper(sizesOf(1000, 0, 4, 2), shifted), "without keys their address does not matter");
    shifted = pointers;
    shifted.output = reinterpret_cast<void*>(0x1002);
    expect(!hstu::takesHopper(sizes, shifted), "output 2 bytes off");
    hstu::NodeSizes timed = sizes;
    timed[hstu::Symbol::kHt] = 8;
    expect(hstu::takesHopper(timed, pointers), "time tables of eight heads");
    timed[hstu::Symbol::kHt] = 9;
    expect(!hstu::takesHopper(timed, pointers), "time tables of more heads than there is room for");
    hstu::NodeSizes strided = sizes;
    for (hstu::Input const input : {hstu::Input::kQ, hstu::Input::kK, hstu::Input::kV})
    {
        strided.setRowStride(input, 264);
        expect(hstu::takesHopper(strided, pointers), "rows 16 bytes off those of a contiguous tensor");
        strided.setRowStride(input, 260);
        expect(!hstu::takesHopper(strided, pointers), "rows that are 8 bytes off");
        strided.setRowStride(input, 0);
    }
    strided = sizesOf(1000, 0, 4, 2);
    strided.setRowStride(hstu::Input::kV, 260);
    expect(hstu::takesHopper(strided, pointers), "without keys their rows do not matter");
    expect(!hstu::takesHopper(sizesOf(1000, int64_t{1} << 30, 4, 2), pointers), "too many keys to count");
    expect(!hstu::takesHopper(sizesOf(1 << 24, 1000, 4, 65535), pointers), "too many tiles to count");
}

void checkHopperGrid()
{
    HstuKernelImage const& whole = kHstuKernelImages[12];
    HstuKernelImage const& shared = kHstuKernelImages[11];
    expect(hstu::hopperGrid(whole, 1, sizesOf(100000, 100000, 8, 4), 132) == 132, "one block an SM");
    expect(hstu::hopperGrid(whole, 1, sizesOf(400, 400, 1, 4), 132) == 12, "no more blocks than tiles can be");
    expect(hstu::hopperGrid(shared, 2, sizesOf(400, 400, 1, 4), 132) == 24, "two for a tile");
    expect(hstu::hopperGrid(shared, 8, sizesOf(400, 400, 1, 4), 132) == 96, "eight for a tile");
    expect(hstu::hopperGrid(shared, 2, sizesOf(100000, 100000, 8, 4), 131) == 130, "whole pairs");
    expect(hstu::hopperGrid(shared, 4, sizesOf(100000, 100000, 8, 4), 132) == 112, "clusters of four that run at once");
    expect(hstu::hopperGrid(shared, 8, sizesOf(100000, 100000, 8, 4), 132) == 112, "and of eight");
    expect(hstu::hopperGrid(whole, 1, sizesOf(100, 0, 0, 4), 132) == 1, "one block clears the rows of no sequence");
    expect(hstu::hopperGrid(shared, 8, sizesOf(100, 0, 0, 4), 132) == 8, "and one cluster");
}

} // namespace

int main(int argc, char** argv)
{
    if (argc == 11 && std::string(argv[1]) == "split")
    {
        hstu::NodeSizes const sizes =
            sizesOf(std::stoll(argv[2]), std::stoll(argv[3]), std::stoll(argv[4]), std::stoll(argv[5]));
        HstuKernelImage image = hopperImage(std::stoi(argv[6]), 1, 8);
        image.blockM = std::stoi(argv[7]);
        image.blockN = std::stoi(argv[8]);
        std::printf("%d\n", hstu::chooseSplit(image, sizes, std::stoi(argv[10]), std::stoi(argv[9])));
        return 0;
    }
    checkArchitectures();
    checkTactics();
    checkMasks();
    checkAlignment();
    checkTimestamps();
    checkMessage();
    checkCache();
    checkSilu();
    checkHopperTactics();
    checkHopperCalls();
    checkHopperGrid();
    return failures == 0 ? 0 : 1;
}
