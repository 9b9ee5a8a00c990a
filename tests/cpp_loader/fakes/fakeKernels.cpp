//! A library of the kernels that run between segments, without a GPU: it implements hstuAttentionKernels.h on the fake
//! driver's streams. An attention computes q + (k - v), times pos_table[1], and fills its workspace; a norm computes
//! x * scale + gate. Everything that a host has to set is checked.
//!
//! Environment: HSTU_FAKE_KERNELS_VERSION=N another version of the interface; HSTU_FAKE_NO_KERNEL=1 none fits;
//! HSTU_FAKE_SKIP_RECORDED=1 a recorded kernel does nothing; HSTU_FAKE_TRACE=FILE a line for every kernel.

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "fakeDriver.h"
#include "fakeTrace.h"
#include "hstuAttentionKernels.h"

struct HstuAttention
{
    std::string name;
};

struct HstuNorm
{
    std::string name;
    bool hasGate{false};
};

namespace
{

using Inputs = std::map<std::string, HstuTensor>;

int32_t refused(char* error, size_t capacity, std::string const& why)
{
    std::strncpy(error, why.c_str(), capacity - 1);
    error[capacity - 1] = '\0';
    return 1;
}

Inputs byName(HstuTensor const* inputs, int32_t count)
{
    Inputs found;
    for (int32_t i = 0; i < count; ++i)
    {
        found[inputs[i].name] = inputs[i];
    }
    return found;
}

int64_t width(HstuTensor const& tensor)
{
    int64_t product = 1;
    for (int32_t i = 1; i < tensor.rank; ++i)
    {
        product *= tensor.dims[i];
    }
    return product;
}

double attribute(HstuAttribute const* attributes, int32_t count, char const* name)
{
    for (int32_t i = 0; i < count; ++i)
    {
        if (std::strcmp(attributes[i].name, name) == 0)
        {
            return attributes[i].value;
        }
    }
    return -1;
}

//! \return why the tensors of a launch are none, or an empty text.
std::string problemOf(Inputs const& inputs, HstuTensor const& output)
{
    for (auto const& [name, tensor] : inputs)
    {
        bool const isAligned = tensor.rowStride != 0 || reinterpret_cast<uintptr_t>(tensor.data) % 256 == 0;
        bool const isKnown = tensor.dims[0] >= 0 && (tensor.rowStride == 0 || tensor.rowStride >= width(tensor));
        if (tensor.data == nullptr || !isAligned || !isKnown)
        {
            return name + " has no place";
        }
    }
    return output.data == nullptr || output.rowStride != 0 ? "out has no place" : "";
}

float const* rowOf(HstuTensor const& tensor, int64_t row)
{
    return static_cast<float const*>(tensor.data) + row * (tensor.rowStride != 0 ? tensor.rowStride : width(tensor));
}

bool isSkipped(void* stream)
{
    return std::getenv("HSTU_FAKE_SKIP_RECORDED") != nullptr && hstuFakeIsCapturing(static_cast<CUstream>(stream));
}

int32_t launched(void* stream, std::function<void()> const& work, char* error, size_t capacity)
{
    std::function<void()> const nothing = [] {};
    return hstuFakeLaunch(static_cast<CUstream>(stream), isSkipped(stream) ? &nothing : &work)
               ? 0
               : refused(error, capacity, "the stream is none");
}

void trace(std::string const& name, Inputs const& inputs, HstuTensor const& output, void* workspace)
{
    fake::Trace line("kernel " + name);
    for (auto const& [input, tensor] : inputs)
    {
        line.add(input, tensor.data, tensor.rowStride);
    }
    line.add("out", output.data);
    if (workspace != nullptr)
    {
        line.add("workspace", workspace);
    }
}

} // namespace

extern "C"
{

    int32_t hstuAttentionKernelsApiVersion(void)
    {
        char const* const other = std::getenv("HSTU_FAKE_KERNELS_VERSION");
        return other != nullptr ? std::atoi(other) : HSTU_ATTENTION_KERNELS_API_VERSION;
    }

    char const* hstuAttentionKernelsBuildId(void)
    {
        return "fake kernels";
    }

    int32_t hstuAttentionCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
        HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuAttention** attention, char* error,
        size_t errorCapacity)
    {
        *attention = nullptr;
        Inputs const given = byName(inputs, nbInputs);
        if (std::getenv("HSTU_FAKE_NO_KERNEL") != nullptr)
        {
            return refused(error, errorCapacity, "no kernel of this library fits the device");
        }
        bool const isKnown = attribute(attributes, nbAttributes, "alpha") == 1.5 && given.count("pos_table") > 0
                             && given.at("q").rank == 3 && given.at("q").dims[0] == -1 && output->rank == 3
                             && given.at("q").type == kHSTU_FLOAT32 && given.at("q_offsets").type == kHSTU_INT32;
        if (!isKnown)
        {
            return refused(error, errorCapacity, "the attention is not described as its contract says");
        }
        *attention = new HstuAttention{nodeName};
        return 0;
    }

    int32_t hstuAttentionWorkspace(HstuAttention const*, HstuTensor const* inputs, int32_t nbInputs, size_t* bytes,
        char*, size_t)
    {
        *bytes = 40 * static_cast<size_t>(byName(inputs, nbInputs).at("q").dims[0]);
        return 0;
    }

    int32_t hstuAttentionEnqueue(HstuAttention* attention, HstuTensor const* inputs, int32_t nbInputs,
        HstuTensor const* output, void* workspace, size_t workspaceBytes, void* stream, char* error,
        size_t errorCapacity)
    {
        Inputs const given = byName(inputs, nbInputs);
        HstuTensor const out = *output;
        std::string const problem = problemOf(given, out);
        if (!problem.empty() || workspaceBytes != 40 * static_cast<size_t>(given.at("q").dims[0]))
        {
            return refused(error, errorCapacity, problem + " or no workspace");
        }
        trace(attention->name, given, out, workspace);
        return launched(
            stream,
            [given, out, workspace, workspaceBytes]
            {
                std::memset(workspace, 0xAB, workspaceBytes);
                auto* const target = static_cast<float*>(out.data);
                float const factor = static_cast<float const*>(given.at("pos_table").data)[1];
                for (int64_t r = 0; r < out.dims[0]; ++r)
                {
                    for (int64_t c = 0; c < width(out); ++c)
                    {
                        float const other = rowOf(given.at("k"), r)[c] - rowOf(given.at("v"), r)[c];
                        target[r * width(out) + c] = (rowOf(given.at("q"), r)[c] + other) * factor;
                    }
                }
            },
            error, errorCapacity);
    }

    void hstuAttentionDestroy(HstuAttention* attention)
    {
        delete attention;
    }

    int32_t hstuNormCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
        HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuNorm** norm, char* error,
        size_t errorCapacity)
    {
        *norm = nullptr;
        Inputs const given = byName(inputs, nbInputs);
        bool const hasGate = attribute(attributes, nbAttributes, "activation") == 1;
        if (given.at("x").rank != 2 || output->rank != 2 || (given.count("gate") > 0) != hasGate)
        {
            return refused(error, errorCapacity, "the norm is not described as its contract says");
        }
        *norm = new HstuNorm{nodeName, hasGate};
        return 0;
    }

    int32_t hstuNormEnqueue(HstuNorm* norm, HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output,
        void* stream, char* error, size_t errorCapacity)
    {
        Inputs const given = byName(inputs, nbInputs);
        HstuTensor const out = *output;
        std::string const problem = problemOf(given, out);
        if (!problem.empty())
        {
            return refused(error, errorCapacity, problem);
        }
        trace(norm->name, given, out, nullptr);
        bool const hasGate = norm->hasGate;
        return launched(
            stream,
            [given, out, hasGate]
            {
                auto* const target = static_cast<float*>(out.data);
                auto const* const scale = static_cast<float const*>(given.at("scale").data);
                for (int64_t r = 0; r < out.dims[0]; ++r)
                {
                    for (int64_t c = 0; c < width(out); ++c)
                    {
                        float const gate = hasGate ? rowOf(given.at("gate"), r)[c] : 0.0F;
                        target[r * width(out) + c] = rowOf(given.at("x"), r)[c] * scale[c] + gate;
                    }
                }
            },
            error, errorCapacity);
    }

    void hstuNormDestroy(HstuNorm* norm)
    {
        delete norm;
    }

} // extern "C"
