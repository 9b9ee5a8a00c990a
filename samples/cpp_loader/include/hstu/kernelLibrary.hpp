#ifndef HSTU_LOADER_KERNEL_LIBRARY_HPP
#define HSTU_LOADER_KERNEL_LIBRARY_HPP

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <cuda.h>

#include "error.hpp"
#include "hstuAttentionKernels.h"
#include "schedule.hpp"
#include "tensor.hpp"

//! The kernels that run between the engines of a graph in segments, through the C interface of their library.
namespace hstu::loader
{

//! Where a tensor of a launch lies.
struct PlacedTensor
{
    CUdeviceptr address{};
    Shape shape;
    int64_t rowStride{0}; //!< elements from a row to the next; 0: contiguous
};

//! libhstu_attention_kernels.so of a bundle. It is never unloaded: kernels that it loaded may still be known to the
//! driver.
class KernelLibrary
{
public:
    //! \param path of the library.
    explicit KernelLibrary(std::string const& path)
    {
        typed("loading the kernels' library", [&] { open(path); });
    }

    KernelLibrary(KernelLibrary const&) = delete;
    KernelLibrary& operator=(KernelLibrary const&) = delete;

    //! \return identifier of the kernels in the library.
    std::string const& buildId() const noexcept
    {
        return mBuildId;
    }

    decltype(&hstuAttentionCreate) attentionCreate{};
    decltype(&hstuAttentionWorkspace) attentionWorkspace{};
    decltype(&hstuAttentionEnqueue) attentionEnqueue{};
    decltype(&hstuAttentionDestroy) attentionDestroy{};
    decltype(&hstuNormCreate) normCreate{};
    decltype(&hstuNormEnqueue) normEnqueue{};
    decltype(&hstuNormDestroy) normDestroy{};

private:
    static constexpr char const* kFIX = "copy the bundle again, or build it again with the hstu-compile of this loader";

    void open(std::string const& path)
    {
        // A name without a slash would be looked up in the system's folders.
        std::string const name = path.find('/') == std::string::npos ? "./" + path : path;
        void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr)
        {
            char const* const why = dlerror();
            throw Error(Failure::kENGINE, "the kernels' library " + path + " cannot be loaded",
                why != nullptr ? why : "dlopen failed", kFIX);
        }
        decltype(&hstuAttentionKernelsApiVersion) getVersion{};
        decltype(&hstuAttentionKernelsBuildId) getBuildId{};
        find(handle, path, "hstuAttentionKernelsApiVersion", getVersion);
        // Before the rest: a library of another version may lack it, or mean something else by it.
        int32_t const version = getVersion();
        if (version != HSTU_ATTENTION_KERNELS_API_VERSION)
        {
            throw Error(Failure::kENGINE, textOf(path, " has version ", version, " of the kernels' interface"),
                textOf("this loader speaks version ", HSTU_ATTENTION_KERNELS_API_VERSION), kFIX);
        }
        find(handle, path, "hstuAttentionKernelsBuildId", getBuildId);
        find(handle, path, "hstuAttentionCreate", attentionCreate);
        find(handle, path, "hstuAttentionWorkspace", attentionWorkspace);
        find(handle, path, "hstuAttentionEnqueue", attentionEnqueue);
        find(handle, path, "hstuAttentionDestroy", attentionDestroy);
        find(handle, path, "hstuNormCreate", normCreate);
        find(handle, path, "hstuNormEnqueue", normEnqueue);
        find(handle, path, "hstuNormDestroy", normDestroy);
        mBuildId = getBuildId();
    }

    template <typename Function>
    static void find(void* handle, std::string const& path, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(handle, name));
        if (function == nullptr)
        {
            throw Error(Failure::kENGINE, path + " is no library of the kernels",
                std::string("it has no function ") + name, kFIX);
        }
    }

    std::string mBuildId;
};

//! One call of a graph with its kernels loaded, and the launch that was last bound. The CUDA context is current in every
//! function. Launches of one object follow one another on one stream.
class PreparedCall
{
public:
    //! \param library, call which outlive this.
    //! \param specs of the tensors that the call reads and makes, by their names.
    PreparedCall(
        std::shared_ptr<KernelLibrary const> library, KernelCall const& call, Schedule const& schedule)
        : mLibrary(std::move(library))
        , mCall(call)
        , mIsNorm(call.facts->name == "HstuNorm")
    {
        for (auto const& [name, tensor] : call.inputs)
        {
            TensorSpec const& spec = *schedule.findSpec(tensor);
            mInputs.push_back(described(name.c_str(), spec.type, viewedShape(call, name, fixedShape(spec.dims))));
        }
        TensorSpec const& made = *schedule.findSpec(call.output);
        mOutput = described("out", made.type, fixedShape(made.dims));
        std::vector<HstuAttribute> attributes;
        for (auto const& [name, value] : call.attributes)
        {
            attributes.push_back({name.c_str(), value});
        }
        auto const count = static_cast<int32_t>(attributes.size());
        if (mIsNorm)
        {
            check("hstuNormCreate", [&](char* error) {
                return mLibrary->normCreate(mCall.name.c_str(), attributes.data(), count, mInputs.data(), inputCount(),
                    &mOutput, &mNorm, error, kERROR_BYTES);
            });
        }
        else
        {
            check("hstuAttentionCreate", [&](char* error) {
                return mLibrary->attentionCreate(mCall.name.c_str(), attributes.data(), count, mInputs.data(),
                    inputCount(), &mOutput, &mAttention, error, kERROR_BYTES);
            });
        }
    }

    ~PreparedCall()
    {
        mLibrary->attentionDestroy(mAttention);
        mLibrary->normDestroy(mNorm);
    }

    PreparedCall(PreparedCall const&) = delete;
    PreparedCall& operator=(PreparedCall const&) = delete;

    KernelCall const& call() const noexcept
    {
        return mCall;
    }

    //! \param shapes of the tensors, by their names.
    //! \return device memory that a launch needs beside its tensors.
    std::size_t workspaceBytes(std::map<std::string, Shape> const& shapes)
    {
        if (mIsNorm)
        {
            return 0;
        }
        std::size_t at = 0;
        for (auto const& [name, tensor] : mCall.inputs)
        {
            place(mInputs[at++], {0, viewedShape(mCall, name, shapes.at(tensor)), 0});
        }
        std::size_t bytes = 0;
        check("hstuAttentionWorkspace", [&](char* error) {
            return mLibrary->attentionWorkspace(
                mAttention, mInputs.data(), inputCount(), &bytes, error, kERROR_BYTES);
        });
        return bytes;
    }

    //! Sets what the next launches read and write.
    //! \param inputs by the contract's name.
    void bind(std::map<std::string, PlacedTensor> const& inputs, PlacedTensor const& output, CUdeviceptr workspace,
        std::size_t workspaceBytes)
    {
        std::size_t at = 0;
        for (auto const& each : mCall.inputs)
        {
            place(mInputs[at++], inputs.at(each.first));
        }
        place(mOutput, output);
        mWorkspace = workspace;
        mWorkspaceBytes = workspaceBytes;
    }

    //! Queues the kernels on a stream, and nothing else.
    void enqueue(CUstream stream)
    {
        if (mIsNorm)
        {
            check("hstuNormEnqueue", [&](char* error) {
                return mLibrary->normEnqueue(
                    mNorm, mInputs.data(), inputCount(), &mOutput, stream, error, kERROR_BYTES);
            });
            return;
        }
        check("hstuAttentionEnqueue", [&](char* error) {
            return mLibrary->attentionEnqueue(mAttention, mInputs.data(), inputCount(), &mOutput,
                reinterpret_cast<void*>(mWorkspace), mWorkspaceBytes, stream, error, kERROR_BYTES);
        });
    }

private:
    static constexpr std::size_t kERROR_BYTES = 4096;

    int32_t inputCount() const
    {
        return static_cast<int32_t>(mInputs.size());
    }

    HstuTensor described(char const* name, ElementType type, Shape const& shape) const
    {
        static std::map<ElementType, HstuElementType> const kTYPES{{ElementType::kFLOAT32, kHSTU_FLOAT32},
            {ElementType::kFLOAT16, kHSTU_FLOAT16}, {ElementType::kBFLOAT16, kHSTU_BFLOAT16},
            {ElementType::kINT32, kHSTU_INT32}, {ElementType::kINT64, kHSTU_INT64}};
        auto const found = kTYPES.find(type);
        if (found == kTYPES.end() || shape.size() > HSTU_MAX_RANK)
        {
            throw Error(Failure::kBUNDLE, mCall.name + " cannot be called",
                textOf(name, " is ", factsOf(type).name, " of rank ", shape.size(), ", which no kernel takes"),
                "build the bundle again");
        }
        HstuTensor tensor{};
        tensor.name = name;
        tensor.type = found->second;
        place(tensor, {0, shape, 0});
        return tensor;
    }

    static void place(HstuTensor& tensor, PlacedTensor const& placed)
    {
        tensor.rank = static_cast<int32_t>(placed.shape.size());
        std::copy(placed.shape.begin(), placed.shape.end(), tensor.dims);
        tensor.data = reinterpret_cast<void*>(placed.address);
        tensor.rowStride = placed.rowStride;
    }

    template <typename Function>
    void check(char const* name, Function const& function) const
    {
        char error[kERROR_BYTES] = {};
        if (function(error) != 0)
        {
            error[kERROR_BYTES - 1] = '\0';
            throw Error(Failure::kENGINE,
                std::string("the ") + (mIsNorm ? "norm " : "attention ") + mCall.name + " could not run",
                std::string(name) + ": " + error, "build the bundle for this GPU and these shapes");
        }
    }

    std::shared_ptr<KernelLibrary const> mLibrary;
    KernelCall const& mCall;
    bool mIsNorm;
    std::vector<HstuTensor> mInputs; //!< in the order of mCall.inputs, whose names they point to
    HstuTensor mOutput{};
    HstuAttention* mAttention{nullptr};
    HstuNorm* mNorm{nullptr};
    CUdeviceptr mWorkspace{};
    std::size_t mWorkspaceBytes{0};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_KERNEL_LIBRARY_HPP
