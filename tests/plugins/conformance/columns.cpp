//! Runs attentions and norms of libhstu_attention_kernels.so on a GPU with q, k and v, or x and gate, as columns of wider
//! tensors, and compares with the float64 oracle and with the bits of contiguous ones.
//!
//! Usage: columns LIBRARY CASES_DIR [FILTER]
//! The columns beside those that a kernel reads hold NaN. Prints one JSON object a check and "N passed, N failed";
//! exit code 0 if all passed, 1 if not, 2 on bad usage.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>

#include "caseFile.h"
#include "compare.h"
#include "device.h"
#include "hstuAttentionKernels.h"

namespace
{

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        throw std::runtime_error(what);
    }
}

class Library
{
public:
    explicit Library(char const* path)
        : mHandle(dlopen(path, RTLD_NOW | RTLD_LOCAL))
    {
        require(mHandle != nullptr, std::string("dlopen: ") + (mHandle == nullptr ? dlerror() : ""));
        load(create, "hstuAttentionCreate");
        load(enqueue, "hstuAttentionEnqueue");
        load(destroy, "hstuAttentionDestroy");
        load(createNorm, "hstuNormCreate");
        load(enqueueNorm, "hstuNormEnqueue");
        load(destroyNorm, "hstuNormDestroy");
    }

    decltype(&hstuAttentionCreate) create{};
    decltype(&hstuAttentionEnqueue) enqueue{};
    decltype(&hstuAttentionDestroy) destroy{};
    decltype(&hstuNormCreate) createNorm{};
    decltype(&hstuNormEnqueue) enqueueNorm{};
    decltype(&hstuNormDestroy) destroyNorm{};

private:
    template <typename Function>
    void load(Function& function, char const* name)
    {
        function = reinterpret_cast<Function>(dlsym(mHandle, name));
        require(function != nullptr, std::string("the library has no ") + name);
    }

    void* mHandle;
};

int32_t codeOf(std::string const& type)
{
    static std::map<std::string, int32_t> const codes{{"float32", kHSTU_FLOAT32}, {"float16", kHSTU_FLOAT16},
        {"bfloat16", kHSTU_BFLOAT16}, {"int32", kHSTU_INT32}, {"int64", kHSTU_INT64}};
    return codes.at(type);
}

size_t bytesOf(std::string const& type)
{
    return type == "int64" ? 8 : type == "float16" || type == "bfloat16" ? 2 : 4;
}

HstuTensor tensorOf(char const* name, std::string const& type, std::vector<int64_t> const& dims)
{
    HstuTensor tensor{};
    tensor.name = name;
    tensor.type = codeOf(type);
    tensor.rank = static_cast<int32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), tensor.dims);
    return tensor;
}

//! An input on the device. With a margin, its rows lie between so many columns of NaN on either side.
class Placed
{
public:
    Placed(CaseTensor const& input, size_t margin)
        : mTensor(tensorOf(input.name.c_str(), input.type, input.dims))
        , mBuffer(margin > 0 ? widened(input, margin) : input.bytes, 0)
    {
        mTensor.data = static_cast<unsigned char*>(mBuffer.data()) + margin * bytesOf(input.type);
        mTensor.rowStride = margin > 0 ? widthOf(input) + 2 * static_cast<int64_t>(margin) : 0;
    }

    HstuTensor const& tensor() const noexcept
    {
        return mTensor;
    }

private:
    //! Elements of a row, [H, D] or [D].
    static int64_t widthOf(CaseTensor const& input)
    {
        return std::accumulate(input.dims.begin() + 1, input.dims.end(), int64_t{1}, std::multiplies<>());
    }

    static std::vector<unsigned char> widened(CaseTensor const& input, size_t margin)
    {
        size_t const element = bytesOf(input.type);
        size_t const width = static_cast<size_t>(widthOf(input)) * element;
        size_t const stride = width + 2 * margin * element;
        std::vector<unsigned char> bytes(static_cast<size_t>(input.dims[0]) * stride, 0xFF);
        for (size_t row = 0; row < static_cast<size_t>(input.dims[0]); ++row)
        {
            std::memcpy(&bytes[row * stride + margin * element], &input.bytes[row * width], width);
        }
        return bytes;
    }

    HstuTensor mTensor;
    device::Buffer mBuffer;
};

//! One attention or norm of the library.
class Kernel
{
public:
    Kernel(Library const& library, Case const& testCase)
        : mLibrary(library)
        , mCase(testCase)
        , mIsNorm(testCase.op == "HstuNorm")
    {
        std::vector<HstuAttribute> attributes;
        for (CaseAttribute const& each : testCase.attributes)
        {
            attributes.push_back({each.name.c_str(), each.isFloat ? static_cast<double>(each.floatValue) : each.intValue});
        }
        std::vector<HstuTensor> inputs;
        for (CaseTensor const& input : testCase.inputs)
        {
            inputs.push_back(tensorOf(input.name.c_str(), input.type, input.dims));
        }
        HstuTensor const output = tensorOf("out", testCase.outputType, testCase.outputDims);
        auto const create = [&](auto const& function, auto** made)
        {
            char error[4096] = "";
            require(function(testCase.name.c_str(), attributes.data(), static_cast<int32_t>(attributes.size()),
                        inputs.data(), static_cast<int32_t>(inputs.size()), &output, made, error, sizeof(error))
                        == 0,
                error);
        };
        mIsNorm ? create(library.createNorm, &mNorm) : create(library.create, &mAttention);
    }

    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;

    ~Kernel()
    {
        mLibrary.destroyNorm(mNorm);
        mLibrary.destroy(mAttention);
    }

    //! \return the output, within the case's bounds; throws where it is not.
    std::vector<unsigned char> run(size_t margin, device::Stream const& stream) const
    {
        std::vector<Placed> placed;
        placed.reserve(mCase.inputs.size());
        std::vector<HstuTensor> inputs;
        for (CaseTensor const& input : mCase.inputs)
        {
            inputs.push_back(placed.emplace_back(input, isStrided(input.name) ? margin : 0).tensor());
        }
        device::Buffer out(mCase.reference.size() * bytesOf(mCase.outputType), 0);
        out.poison();
        HstuTensor output = tensorOf("out", mCase.outputType, mCase.outputDims);
        output.data = out.data();
        device::synchronize();
        char error[4096] = "";
        int32_t const count = static_cast<int32_t>(inputs.size());
        int32_t const status = mIsNorm
            ? mLibrary.enqueueNorm(mNorm, inputs.data(), count, &output, stream.get(), error, sizeof(error))
            : mLibrary.enqueue(mAttention, inputs.data(), count, &output, nullptr, 0, stream.get(), error, sizeof(error));
        require(status == 0, error);
        stream.synchronize();
        require(out.areGuardsIntact(), "bytes beside the output were written");
        std::vector<unsigned char> const found = out.download();
        OutputError const measured = measureError(mCase, found);
        require(isWithinBounds(mCase, measured), "differs from the oracle at " + measured.where);
        return found;
    }

private:
    bool isStrided(std::string const& input) const
    {
        static std::vector<std::string> const ofNorms{"x", "gate"};
        static std::vector<std::string> const ofAttentions{"q", "k", "v"};
        auto const& names = mIsNorm ? ofNorms : ofAttentions;
        return std::find(names.begin(), names.end(), input) != names.end();
    }

    Library const& mLibrary;
    Case const& mCase;
    bool mIsNorm;
    HstuAttention* mAttention{};
    HstuNorm* mNorm{};
};

//! Columns of NaN on either side. With 16 the kernel is that of contiguous tensors, and so are the bits; with one it is
//! that for any tensors, which the library has where no vector can be read of contiguous ones either, and for two cases.
std::vector<size_t> marginsOf(Case const& testCase)
{
    bool const isWhole = testCase.inputs[0].dims.back() % 16 == 0 && testCase.outputDims.back() % 16 == 0;
    bool const hasBoth = testCase.name == "large-causal" || testCase.name == "large-norm-layer";
    return isWhole && !hasBoth ? std::vector<size_t>{16} : std::vector<size_t>{16, 1};
}

std::string quoted(std::string const& text)
{
    std::string out;
    for (char const c : text)
    {
        out += c == '"' || c == '\\' ? std::string("\\") + c : c == '\n' ? std::string(" ") : std::string(1, c);
    }
    return out;
}

int run(char const* path, std::string const& folder, std::string const& filter)
{
    Library const library(path);
    device::Stream const stream;
    int passed = 0;
    int failed = 0;
    for (Case const& testCase : readCases(folder))
    {
        if (testCase.reference.empty() || testCase.name.find(filter) == std::string::npos)
        {
            continue;
        }
        for (size_t const margin : marginsOf(testCase))
        {
            std::string why;
            try
            {
                Kernel const kernel(library, testCase);
                auto const contiguous = kernel.run(0, stream);
                auto const columns = kernel.run(margin, stream);
                require(margin != 16 || columns == contiguous, "columns give other bits than contiguous tensors");
                require(kernel.run(margin, stream) == columns, "another run gives other bits");
            }
            catch (std::exception const& error)
            {
                why = error.what();
            }
            (why.empty() ? passed : failed) += 1;
            std::printf("{\"case\": \"%s\", \"dtype\": \"%s\", \"mode\": \"columns-%zu\", \"status\": \"%s\", \"why\": \"%s\"}\n",
                testCase.name.c_str(), testCase.type.c_str(), margin, why.empty() ? "pass" : "FAIL", quoted(why).c_str());
        }
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}

} // namespace

int main(int argc, char** argv)
{
    if (argc < 3)
    {
        std::fprintf(stderr, "usage: columns LIBRARY CASES_DIR [FILTER]\n");
        return 2;
    }
    try
    {
        std::string reason;
        if (!device::open(reason))
        {
            std::printf("{\"case\": \"device\", \"mode\": \"columns\", \"status\": \"FAIL\", \"why\": \"%s\"}\n0 passed, 1 failed\n",
                quoted(reason).c_str());
            return 1;
        }
        device::makeCurrent();
        return run(argv[1], argv[2], argc > 3 ? argv[3] : "");
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "columns: %s\n", error.what());
        return 2;
    }
}
