//! Entry of libhstu_attention_kernels.so: HstuAttentionCore behind the functions of hstuAttentionKernels.h. Linked to
//! no TensorRT and no CUDA library.

#include "hstuAttentionKernels.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "hstuAttentionCore.h"
#include "kernelArguments.h"
#include "pluginError.h"

//! Everything else in the library is hidden; the version script says the same to the linker.
#define HSTU_EXPORT extern "C" __attribute__((visibility("default")))

struct HstuAttention
{
    hstu::HstuAttentionCore core;
};

namespace hstu
{
namespace
{

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;

//! Where a caller wants to read what went wrong.
struct ErrorText
{
    char* text;
    size_t capacity;

    void set(char const* message) const noexcept
    {
        if (text != nullptr && capacity > 0)
        {
            size_t const length = std::min(std::strlen(message), capacity - 1);
            std::memcpy(text, message, length);
            text[length] = '\0';
        }
    }
};

//! Runs the body of a function of the interface; tells the caller what it throws.
template <typename Body>
int32_t guarded(ErrorText const& error, Body const& body) noexcept
{
    try
    {
        body();
        return kSuccess;
    }
    catch (std::exception const& thrown)
    {
        error.set(thrown.what());
    }
    catch (...)
    {
        error.set("unknown exception");
    }
    return kFailure;
}

HstuAttentionCore const& coreOf(HstuAttention const* attention)
{
    HSTU_CHECK(attention != nullptr, kPluginName, ": the attention is null; allowed: one of hstuAttentionCreate");
    return attention->core;
}

//! The core would take device 0's context where there is none; a host with contexts of its own did not mean that.
void requireContext(char const* nodeName)
{
    CUcontext context = nullptr;
    checkCuda(cudaDriver().ctxGetCurrent(&context), "cuCtxGetCurrent");
    HSTU_CHECK(context != nullptr, kPluginName, " node '", nodeName != nullptr ? nodeName : "",
        "': no CUDA context is current on this thread. Fix: cuCtxSetCurrent the one that will run the attention");
}

} // namespace
} // namespace hstu

HSTU_EXPORT int32_t hstuAttentionKernelsApiVersion(void)
{
    return HSTU_ATTENTION_KERNELS_API_VERSION;
}

HSTU_EXPORT char const* hstuAttentionKernelsBuildId(void)
{
    return hstu::kernelBuildId();
}

HSTU_EXPORT int32_t hstuAttentionCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuAttention** attention, char* error,
    size_t errorCapacity)
{
    return hstu::guarded({error, errorCapacity},
        [&]
        {
            HSTU_CHECK(attention != nullptr, hstu::kPluginName, ": there is nowhere to put the attention");
            *attention = nullptr;
            auto const read = hstu::attributesByName(nodeName, attributes, nbAttributes);
            hstu::NamedTensors named = hstu::inputsByName(nodeName, read, inputs, nbInputs);
            hstu::setOutput(nodeName, output, named);
            hstu::requireContext(nodeName);
            auto made = std::make_unique<HstuAttention>(HstuAttention{
                hstu::HstuAttentionCore(nodeName != nullptr ? nodeName : "", read, hstu::EngineSignature{})});
            made->core.configure(named.tensors);
            made->core.load();
            *attention = made.release();
        });
}

HSTU_EXPORT int32_t hstuAttentionWorkspace(HstuAttention const* attention, HstuTensor const* inputs, int32_t nbInputs,
    size_t* bytes, char* error, size_t errorCapacity)
{
    return hstu::guarded({error, errorCapacity},
        [&]
        {
            HSTU_CHECK(bytes != nullptr, hstu::kPluginName, ": there is nowhere to put the bytes");
            hstu::HstuAttentionCore const& core = hstu::coreOf(attention);
            hstu::NamedTensors named = hstu::inputsByName(core.nodeName().c_str(), core.attributes(), inputs, nbInputs);
            // The output that goes with the inputs, so that an enqueue of them has nothing left to refuse.
            hstu::TensorView const& v = named.tensors.inputs[static_cast<size_t>(hstu::Input::kV)];
            named.tensors.output = named.tensors.inputs[static_cast<size_t>(hstu::Input::kQ)];
            named.tensors.output.dims[2] = v.dims[2];
            hstu::resolveSizes(core.attributes(), named.tensors, /* requireStatic = */ true);
            *bytes = 0; // partial results of a shared tile stay in shared memory
        });
}

HSTU_EXPORT int32_t hstuAttentionEnqueue(HstuAttention* attention, HstuTensor const* inputs, int32_t nbInputs,
    HstuTensor const* output, void* /* workspace */, size_t /* workspaceBytes */, void* stream, char* error,
    size_t errorCapacity)
{
    return hstu::guarded({error, errorCapacity},
        [&]
        {
            hstu::HstuAttentionCore const& core = hstu::coreOf(attention);
            char const* const nodeName = core.nodeName().c_str();
            hstu::NamedTensors named = hstu::inputsByName(nodeName, core.attributes(), inputs, nbInputs);
            hstu::setOutput(nodeName, output, named);
            // Ranks before extents, which the addresses are judged by.
            hstu::resolveSizes(core.attributes(), named.tensors, /* requireStatic = */ true);
            hstu::checkAddresses(nodeName, core.attributes(), named);
            core.enqueue(named.tensors, named.pointers, static_cast<CUstream>(stream));
        });
}

HSTU_EXPORT void hstuAttentionDestroy(HstuAttention* attention)
{
    delete attention;
}
