#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace device
{
namespace
{

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuardPattern = 0xA5;
constexpr unsigned char kPoison = 0xFF;

struct Driver
{
    void* library{};
    CUcontext context{};

    template <typename... Args>
    void call(char const* name, Args... args) const
    {
        auto const function = reinterpret_cast<CUresult (*)(Args...)>(dlsym(library, name));
        if (function == nullptr)
        {
            throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
        }
        CUresult const result = function(args...);
        if (result != CUDA_SUCCESS)
        {
            char const* text = nullptr;
            auto const getName =
                reinterpret_cast<CUresult (*)(CUresult, char const**)>(dlsym(library, "cuGetErrorName"));
            getName(result, &text);
            throw std::runtime_error(std::string(name) + ": " + (text != nullptr ? text : "unknown error"));
        }
    }
};

Driver& driver()
{
    static Driver instance;
    return instance;
}

} // namespace

bool open(std::string& reason)
{
    Driver& d = driver();
    d.library = dlopen("libcuda.so.1", RTLD_NOW);
    if (d.library == nullptr)
    {
        reason = dlerror();
        return false;
    }
    try
    {
        d.call("cuInit", 0U);
        d.call("cuDevicePrimaryCtxRetain", &d.context, CUdevice{0});
    }
    catch (std::exception const& error)
    {
        reason = error.what();
        return false;
    }
    makeCurrent();
    return true;
}

void makeCurrent()
{
    driver().call("cuCtxSetCurrent", driver().context);
}

std::string describe()
{
    char name[256] = {};
    int major = 0;
    int minor = 0;
    int version = 0;
    driver().call("cuDeviceGetName", static_cast<char*>(name), 255, CUdevice{0});
    driver().call("cuDeviceGetAttribute", &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CUdevice{0});
    driver().call("cuDeviceGetAttribute", &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, CUdevice{0});
    driver().call("cuDriverGetVersion", &version);
    return std::string(name) + ", sm_" + std::to_string(10 * major + minor) + ", driver " + std::to_string(version);
}

void synchronize()
{
    driver().call("cuCtxSynchronize");
}

Buffer::Buffer(std::vector<unsigned char> const& content, size_t misalignment)
    : mStart(misalignment)
    , mBytes(content.size())
    , mTotal(misalignment + content.size())
{
    driver().call("cuMemAlloc_v2", &mAllocation, std::max<size_t>(mTotal, 1));
    if (mBytes > 0)
    {
        driver().call("cuMemcpyHtoD_v2", mAllocation + mStart, static_cast<void const*>(content.data()), mBytes);
    }
}

Buffer::Buffer(size_t bytes, size_t misalignment)
    : mStart(kGuardBytes + misalignment)
    , mBytes(bytes)
    , mTotal(2 * kGuardBytes + misalignment + bytes)
{
    driver().call("cuMemAlloc_v2", &mAllocation, mTotal);
    poison();
}

Buffer::Buffer(Buffer&& other) noexcept
    : mAllocation(std::exchange(other.mAllocation, CUdeviceptr{}))
    , mStart(other.mStart)
    , mBytes(other.mBytes)
    , mTotal(other.mTotal)
{
}

Buffer::~Buffer()
{
    if (mAllocation != 0)
    {
        auto const release = reinterpret_cast<CUresult (*)(CUdeviceptr)>(dlsym(driver().library, "cuMemFree_v2"));
        release(mAllocation);
    }
}

void* Buffer::data() const noexcept
{
    return reinterpret_cast<void*>(mAllocation + mStart);
}

void Buffer::poison()
{
    driver().call("cuMemsetD8_v2", mAllocation, kGuardPattern, mTotal);
    if (mBytes > 0)
    {
        driver().call("cuMemsetD8_v2", mAllocation + mStart, kPoison, mBytes);
    }
    synchronize();
}

std::vector<unsigned char> Buffer::download() const
{
    std::vector<unsigned char> bytes(mBytes);
    if (mBytes > 0)
    {
        driver().call("cuMemcpyDtoH_v2", static_cast<void*>(bytes.data()), mAllocation + mStart, mBytes);
    }
    return bytes;
}

bool Buffer::areGuardsIntact() const
{
    std::vector<unsigned char> bytes(mTotal);
    driver().call("cuMemcpyDtoH_v2", static_cast<void*>(bytes.data()), mAllocation, mTotal);
    auto const isGuard = [](unsigned char byte) { return byte == kGuardPattern; };
    auto const payload = bytes.begin() + static_cast<std::ptrdiff_t>(mStart);
    return std::all_of(bytes.begin(), payload, isGuard)
           && std::all_of(payload + static_cast<std::ptrdiff_t>(mBytes), bytes.end(), isGuard);
}

Stream::Stream()
{
    driver().call("cuStreamCreate", &mStream, static_cast<unsigned>(CU_STREAM_NON_BLOCKING));
}

Stream::~Stream()
{
    auto const destroy = reinterpret_cast<CUresult (*)(CUstream)>(dlsym(driver().library, "cuStreamDestroy_v2"));
    destroy(mStream);
}

void Stream::synchronize() const
{
    driver().call("cuStreamSynchronize", mStream);
}

Graph::Graph(Stream const& stream, std::function<void()> const& work)
{
    driver().call("cuStreamBeginCapture_v2", stream.get(), CU_STREAM_CAPTURE_MODE_GLOBAL);
    try
    {
        work();
    }
    catch (...)
    {
        auto const end =
            reinterpret_cast<CUresult (*)(CUstream, CUgraph*)>(dlsym(driver().library, "cuStreamEndCapture"));
        end(stream.get(), &mGraph);
        throw;
    }
    driver().call("cuStreamEndCapture", stream.get(), &mGraph);
    driver().call("cuGraphInstantiateWithFlags", &mExecutable, mGraph, 0ULL);
}

Graph::~Graph()
{
    auto const destroyExecutable =
        reinterpret_cast<CUresult (*)(CUgraphExec)>(dlsym(driver().library, "cuGraphExecDestroy"));
    auto const destroyGraph = reinterpret_cast<CUresult (*)(CUgraph)>(dlsym(driver().library, "cuGraphDestroy"));
    destroyExecutable(mExecutable);
    destroyGraph(mGraph);
}

void Graph::launch(Stream const& stream) const
{
    driver().call("cuGraphLaunch", mExecutable, stream.get());
}

} // namespace device
