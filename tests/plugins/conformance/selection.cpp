//! Checks how the plugin picks kernel images, with a table of its own in place of the compiled kernels. Needs no GPU.
//! Prints one line per failed check; exit code 0 if there is none.

#include <cstdio>
#include <string>

#include "hstuAttentionKernel.h"

namespace
{

unsigned char const kCode[] = {0};

//! float16, 64 x 64, no bias; the fields that the checks vary are arguments.
constexpr HstuKernelImage image(int32_t sm, int32_t isPtx, int32_t aligned, int32_t maskKind, int32_t tactic)
{
    return {sm, isPtx, 1, 0, 64, 64, aligned, 0, 0, maskKind, tactic, 64, 4, 0, "kernel", kCode, sizeof(kCode)};
}

constexpr HstuKernelImage timeImage(int32_t timestampBits)
{
    return {90, 0, 1, timestampBits, 64, 64, 0, 1, 1, 1, 1, 64, 4, 0, "kernel", kCode, sizeof(kCode)};
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

HstuKernelImage const* at(int32_t index)
{
    return &kHstuKernelImages[index];
}

void checkArchitectures()
{
    auto const alignedOn = [](int32_t sm)
    {
        auto const tactics = hstu::findTactics(general(), signatureOf(64), sm);
        return tactics.empty() ? nullptr : tactics[0].aligned;
    };
    expect(alignedOn(80) == at(0), "sm_80 takes its own cubin");
    expect(alignedOn(87) == at(1), "sm_87 takes the newest 8.x cubin below it");
    expect(alignedOn(90) == at(2), "sm_90 takes its own cubin");
    expect(alignedOn(100) == at(6), "sm_100 takes the PTX: a 9.0 cubin is architecture-specific");
    expect(alignedOn(75) == nullptr, "sm_75 has nothing: neither cubin nor PTX of 8.0 runs there");
    expect(!hstu::runsOn(kHstuKernelImages[2], 91), "a 9.0 cubin does not run on 9.1");
    expect(!hstu::runsOn(kHstuKernelImages[1], 80), "an 8.6 cubin does not run on 8.0");
}

void checkTactics()
{
    auto const tactics = hstu::findTactics(general(), signatureOf(64), 90);
    expect(tactics.size() == 2 && tactics[0].tactic == 1 && tactics[1].tactic == 2, "both tactics of sm_90, ascending");
    expect(tactics[0].unaligned == at(4) && tactics[1].unaligned == nullptr, "unaligned image where there is one");
    expect(hstu::findTactics(general(), signatureOf(64), 0).size() == 2, "without a GPU every tactic is offered");
}

void checkMasks()
{
    expect(
        hstu::findTactics(causal(), signatureOf(64), 90)[0].aligned == at(5), "a causal node takes the causal kernel");
    expect(hstu::findTactics(causal(), signatureOf(64), 80)[0].aligned == at(0),
        "and the general one where there is no other");
    hstu::HstuAttentionAttributes window = causal();
    window.maxAttnLen = 1;
    expect(hstu::findTactics(window, signatureOf(64), 90)[0].aligned == at(2), "a window needs the general kernel");
    hstu::HstuAttentionAttributes context = causal();
    context.contextualSeqLen = 1;
    expect(hstu::findTactics(context, signatureOf(64), 90)[0].aligned == at(2), "a context needs the general kernel");
}

void checkAlignment()
{
    auto const tactics = hstu::findTactics(general(), signatureOf(50), 90);
    expect(tactics.size() == 1 && tactics[0].aligned == nullptr && tactics[0].unaligned == at(4),
        "head dim 50 takes only kernels that promise no alignment");
    hstu::DevicePointers pointers;
    pointers.output = reinterpret_cast<void*>(0x100);
    pointers.inputs[0] = reinterpret_cast<void const*>(0x200);
    expect(hstu::isAligned(pointers), "256 and 512 are aligned, absent inputs do not matter");
    pointers.inputs[1] = reinterpret_cast<void const*>(0x208);
    expect(!hstu::isAligned(pointers), "8 bytes off is not aligned");
}

void checkTimestamps()
{
    hstu::HstuAttentionAttributes biased = general();
    biased.posBias = 1;
    biased.timeBias = 1;
    expect(hstu::findTactics(biased, signatureOf(64, 64), 90)[0].unaligned == at(7), "64-bit timestamps");
    expect(hstu::findTactics(biased, signatureOf(64, 32), 90)[0].unaligned == at(8), "32-bit timestamps");
    biased.posBias = 0;
    expect(hstu::findTactics(biased, signatureOf(64, 64), 90).empty(),
        "a kernel with a bias that the node lacks does not fit");
}

void checkMessage()
{
    std::string const otherDim = hstu::describeMissingKernel(general(), signatureOf(128), 90);
    expect(otherDim.find("q/k head dim 128") != std::string::npos, "the message names what is needed");
    expect(otherDim.find("[float16 64x64 general aligned]") != std::string::npos, "the message lists what is there");
    expect(
        otherDim.find("`hstu-compile plugin build --onnx MODEL.onnx --arch 9.0`") != std::string::npos, "the message says how to get it");
    std::string const otherSm = hstu::describeMissingKernel(general(), signatureOf(64), 75);
    expect(otherSm.find("fits this node on sm_80, sm_86, sm_90 only") != std::string::npos,
        "the message names fitting GPUs");
}

} // namespace

int main()
{
    checkArchitectures();
    checkTactics();
    checkMasks();
    checkAlignment();
    checkTimestamps();
    checkMessage();
    return failures == 0 ? 0 : 1;
}
