//! Entry of libhstu_attention_kernels.so: HstuAttentionCore and HstuNormCore behind the functions of
//! hstuAttentionKernels.h. Linked to no TensorRT and no CUDA library.

#include "hstuAttentionKernels.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "contentHash.h"
#include "hstuAttentionCore.h"
#include "hstuNormCore.h"
#include "kernelArguments.h"
#include "pluginError.h"

//! Everything else in the library is hidden; the version script says the same to the linker.
#define HSTU_EXPORT extern "C" __attribute__((visibility("default")))

struct HstuAttention
{
    hstu::HstuAttentionCore core;
};

struct HstuNorm
{
    hstu::norm::HstuNormCore core;
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

norm::HstuNormCore const& coreOf(HstuNorm const* norm)
{
    HSTU_CHECK(norm != nullptr, norm::kPluginName, ": the norm is null; allowed: one of hstuNormCreate");
    return norm->core;
}

//! The kernels of both operators: that of the attentions where there are no norms.
std::string buildId()
{
    if (kHstuNbNormImages == 0)
    {
        return kernelBuildId();
    }
    std::string const ids = std::string(kernelBuildId()) + norm::kernelBuildId();
    ContentHash hash;
    hash.add(ids.data(), ids.size());
    return hash.text();
}

//! The core would take device 0's context where there is none; a host with contexts of its own did not mean that.
void requireContext(char const* operatorName, char const* nodeName)
{
    CUcontext context = nullptr;
    checkCuda(cudaDriver().ctxGetCurrent(&context), "cuCtxGetCurrent");
    HSTU_CHECK(context != nullptr, operatorName, " node '", nodeName != nullptr ? nodeName : "",
        "': no CUDA context is current on this thread. Fix: cuCtxSetCurrent the one that will run the kernels");
}

} // namespace
} // namespace hstu

HSTU_EXPORT int32_t hstuAttentionKernelsApiVersion(void)
{
    return HSTU_ATTENTION_KERNELS_API_VERSION;
}

HSTU_EXPORT char const* hstuAttentionKernelsBuildId(void)
{
    try
    {
        static std::string const id = hstu::buildId();
        return id.c_str();
    }
    catch (...)
    {
        return "";
    }
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
            auto const read = hstu::attributesByName<hstu::AttentionArguments>(nodeName, attributes, nbAttributes);
            auto named = hstu::inputsByName<hstu::AttentionArguments>(nodeName, read, inputs, nbInputs);
            hstu::setOutput(nodeName, output, named);
            hstu::requireContext(hstu::kPluginName, nodeName);
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
            auto named = hstu::inputsByName<hstu::AttentionArguments>(core.nodeName().c_str(), core.attributes(), inputs, nbInputs);
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
            auto named = hstu::inputsByName<hstu::AttentionArguments>(nodeName, core.attributes(), inputs, nbInputs);
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

HSTU_EXPORT int32_t hstuNormCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuNorm** norm, char* error,
    size_t errorCapacity)
{
    return hstu::guarded({error, errorCapacity},
        [&]
        {
            HSTU_CHECK(norm != nullptr, hstu::norm::kPluginName, ": there is nowhere to put the norm");
            *norm = nullptr;
            auto const read = hstu::attributesByName<hstu::NormArguments>(nodeName, attributes, nbAttributes);
            auto named = hstu::inputsByName<hstu::NormArguments>(nodeName, read, inputs, nbInputs);
            hstu::setOutput(nodeName, output, named);
            hstu::requireContext(hstu::norm::kPluginName, nodeName);
            auto made = std::make_unique<HstuNorm>(HstuNorm{hstu::norm::HstuNormCore(
                nodeName != nullptr ? nodeName : "", read, hstu::norm::EngineSignature{})});
            made->core.configure(named.tensors);
            made->core.load();
            *norm = made.release();
        });
}

HSTU_EXPORT int32_t hstuNormEnqueue(HstuNorm* norm, HstuTensor const* inputs, int32_t nbInputs,
    HstuTensor const* output, void* stream, char* error, size_t errorCapacity)
{
    return hstu::guarded({error, errorCapacity},
        [&]
        {
            hstu::norm::HstuNormCore const& core = hstu::coreOf(norm);
            char const* const nodeName = core.nodeName().c_str();
            auto named = hstu::inputsByName<hstu::NormArguments>(nodeName, core.attributes(), inputs, nbInputs);
            hstu::setOutput(nodeName, output, named);
            // Ranks before extents, which the addresses are judged by.
            hstu::norm::resolveSizes(core.attributes(), named.tensors, /* requireStatic = */ true);
            hstu::checkAddresses(nodeName, core.attributes(), named);
            core.enqueue(named.tensors, named.pointers, static_cast<CUstream>(stream));
        });
}

HSTU_EXPORT void hstuNormDestroy(HstuNorm* norm)
{
    delete norm;
}
