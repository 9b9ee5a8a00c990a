#ifndef HSTU_LOADER_DRIVER_HPP
#define HSTU_LOADER_DRIVER_HPP

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include <cuda.h>

#include "error.hpp"

//! The CUDA driver, found at run time. Not cudart: the driver library is wherever a GPU is and serves every CUDA
//! version from 11 on, so one binary runs beside TensorRT 8.5 (CUDA 11) and TensorRT 10 (CUDA 12 and 13) without being
//! linked to either. TensorRT itself uses the device's primary context; so does this.
namespace hstu::loader
{

class Driver
{
public:
    CUresult (*getErrorName)(CUresult, char const**){};
    CUresult (*getErrorString)(CUresult, char const**){};
    CUresult (*deviceGetName)(char*, int, CUdevice){};
    CUresult (*deviceGetAttribute)(int*, CUdevice_attribute, CUdevice){};
    CUresult (*ctxSetCurrent)(CUcontext){};
    CUresult (*memAlloc)(CUdeviceptr*, size_t){};
    CUresult (*memFree)(CUdeviceptr){};
    CUresult (*memAllocHost)(void**, size_t){};
    CUresult (*memFreeHost)(void*){};
    CUresult (*memcpyHtoDAsync)(CUdeviceptr, void const*, size_t, CUstream){};
    CUresult (*memcpyDtoHAsync)(void*, CUdeviceptr, size_t, CUstream){};
    CUresult (*memcpyDtoDAsync)(CUdeviceptr, CUdeviceptr, size_t, CUstream){};
    CUresult (*memsetD8Async)(CUdeviceptr, unsigned char, size_t, CUstream){};
    CUresult (*memGetInfo)(size_t*, size_t*){};
    CUresult (*pointerGetAttribute)(void*, CUpointer_attribute, CUdeviceptr){};
    CUresult (*streamCreate)(CUstream*, unsigned){};
    CUresult (*streamDestroy)(CUstream){};
    CUresult (*streamSynchronize)(CUstream){};
    CUresult (*streamBeginCapture)(CUstream, CUstreamCaptureMode){};
    CUresult (*streamEndCapture)(CUstream, CUgraph*){};
    CUresult (*eventCreate)(CUevent*, unsigned){};
    CUresult (*eventDestroy)(CUevent){};
    CUresult (*eventRecord)(CUevent, CUstream){};
    CUresult (*eventElapsedTime)(float*, CUevent, CUevent){};
    CUresult (*graphGetNodes)(CUgraph, CUgraphNode*, size_t*){};
    CUresult (*graphNodeGetType)(CUgraphNode, CUgraphNodeType*){};
    CUresult (*graphMemcpyNodeGetParams)(CUgraphNode, CUDA_MEMCPY3D*){};
    CUresult (*graphMemcpyNodeSetParams)(CUgraphNode, CUDA_MEMCPY3D const*){};
    CUresult (*graphInstantiate)(CUgraphExec*, CUgraph, unsigned long long){};
    CUresult (*graphLaunch)(CUgraphExec, CUstream){};
    CUresult (*graphExecDestroy)(CUgraphExec){};
    CUresult (*graphDestroy)(CUgraph){};

    //! Loads the driver and retains a device's primary context.
    //! \param ordinal among the visible devices.
    explicit Driver(int ordinal)
    {
        typed("opening the CUDA driver", [&] { open(ordinal); });
    }

    ~Driver()
    {
        if (mContext != nullptr)
        {
            mDevicePrimaryCtxRelease(mDevice);
        }
        // The library stays loaded: TensorRT and the plugin may still call it while the process ends.
    }

    Driver(Driver const&) = delete;
    Driver& operator=(Driver const&) = delete;

    //! Makes the context current on this thread; every call of TensorRT and of this class needs it.
    void makeCurrent() const
    {
        check(ctxSetCurrent(mContext), "cuCtxSetCurrent");
    }

    //! The same in destructors, where nothing can be done about a failure.
    void tryMakeCurrent() const noexcept
    {
        ctxSetCurrent(mContext);
    }

    //! Throws unless the result is CUDA_SUCCESS.
    void check(CUresult result, char const* call) const
    {
        if (result != CUDA_SUCCESS)
        {
            throw Error(Failure::kENGINE, textOf("the CUDA call ", call, " failed"), textOfResult(result),
                "free GPU memory (a smaller batch, another process), or check the driver with nvidia-smi");
        }
    }

    //! \return name and text of a result.
    std::string textOfResult(CUresult result) const
    {
        char const* name = nullptr;
        char const* text = nullptr;
        getErrorName(result, &name);
        getErrorString(result, &text);
        return textOf(name != nullptr ? name : "unknown CUDA error", " (", static_cast<int>(result),
            "): ", text != nullptr ? text : "no text");
    }

    //! \return 10 * major + minor of the compute capability.
    int computeCapability() const noexcept
    {
        return mCapability;
    }

    std::string const& deviceName() const noexcept
    {
        return mName;
    }

    //! \return bytes of device memory that are in use, by this and every other process.
    uint64_t usedBytes() const
    {
        makeCurrent();
        size_t free = 0;
        size_t total = 0;
        check(memGetInfo(&free, &total), "cuMemGetInfo");
        return total - free;
    }

private:
    template <typename Function>
    void find(void* library, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr)
        {
            throw Error(Failure::kNO_GPU, "the CUDA driver is too old", textOf("libcuda.so.1 has no ", name),
                "install a driver of CUDA 11.4 or later");
        }
    }

    void open(int ordinal)
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (library == nullptr)
        {
            char const* const why = dlerror();
            throw Error(Failure::kNO_GPU, "no CUDA driver", why != nullptr ? why : "libcuda.so.1 cannot be loaded",
                "run on a machine with an NVIDIA GPU and driver; --inspect needs neither");
        }
        // dlsym sees no macros of cuda.h: the _v2 names are spelled out.
        CUresult (*init)(unsigned) = nullptr;
        CUresult (*getCount)(int*) = nullptr;
        CUresult (*getDevice)(CUdevice*, int) = nullptr;
        CUresult (*retain)(CUcontext*, CUdevice) = nullptr;
        find(library, "cuInit", init);
        find(library, "cuGetErrorName", getErrorName);
        find(library, "cuGetErrorString", getErrorString);
        find(library, "cuDeviceGetCount", getCount);
        find(library, "cuDeviceGet", getDevice);
        find(library, "cuDeviceGetName", deviceGetName);
        find(library, "cuDeviceGetAttribute", deviceGetAttribute);
        find(library, "cuDevicePrimaryCtxRetain", retain);
        find(library, "cuDevicePrimaryCtxRelease_v2", mDevicePrimaryCtxRelease);
        find(library, "cuCtxSetCurrent", ctxSetCurrent);
        find(library, "cuMemAlloc_v2", memAlloc);
        find(library, "cuMemFree_v2", memFree);
        find(library, "cuMemAllocHost_v2", memAllocHost);
        find(library, "cuMemFreeHost", memFreeHost);
        find(library, "cuMemcpyHtoDAsync_v2", memcpyHtoDAsync);
        find(library, "cuMemcpyDtoHAsync_v2", memcpyDtoHAsync);
        find(library, "cuMemcpyDtoDAsync_v2", memcpyDtoDAsync);
        find(library, "cuMemsetD8Async", memsetD8Async);
        find(library, "cuMemGetInfo_v2", memGetInfo);
        find(library, "cuPointerGetAttribute", pointerGetAttribute);
        find(library, "cuStreamCreate", streamCreate);
        find(library, "cuStreamDestroy_v2", streamDestroy);
        find(library, "cuStreamSynchronize", streamSynchronize);
        find(library, "cuStreamBeginCapture_v2", streamBeginCapture);
        find(library, "cuStreamEndCapture", streamEndCapture);
        find(library, "cuEventCreate", eventCreate);
        find(library, "cuEventDestroy_v2", eventDestroy);
        find(library, "cuEventRecord", eventRecord);
        find(library, "cuEventElapsedTime", eventElapsedTime);
        find(library, "cuGraphGetNodes", graphGetNodes);
        find(library, "cuGraphNodeGetType", graphNodeGetType);
        find(library, "cuGraphMemcpyNodeGetParams", graphMemcpyNodeGetParams);
        find(library, "cuGraphMemcpyNodeSetParams", graphMemcpyNodeSetParams);
        find(library, "cuGraphInstantiateWithFlags", graphInstantiate);
        find(library, "cuGraphLaunch", graphLaunch);
        find(library, "cuGraphExecDestroy", graphExecDestroy);
        find(library, "cuGraphDestroy", graphDestroy);
        requireGpu(init(0), "cuInit");
        int count = 0;
        requireGpu(getCount(&count), "cuDeviceGetCount");
        if (ordinal < 0 || ordinal >= count)
        {
            throw Error(Failure::kNO_GPU, textOf("there is no CUDA device ", ordinal),
                textOf(count, " devices are visible"), "choose --device 0 or another visible one");
        }
        requireGpu(getDevice(&mDevice, ordinal), "cuDeviceGet");
        requireGpu(retain(&mContext, mDevice), "cuDevicePrimaryCtxRetain");
        makeCurrent();
        char name[256] = {};
        check(deviceGetName(name, sizeof(name) - 1, mDevice), "cuDeviceGetName");
        mName = name;
        int major = 0;
        int minor = 0;
        check(
            deviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, mDevice), "cuDeviceGetAttribute");
        check(
            deviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, mDevice), "cuDeviceGetAttribute");
        mCapability = 10 * major + minor;
    }

    void requireGpu(CUresult result, char const* call) const
    {
        if (result != CUDA_SUCCESS)
        {
            throw Error(Failure::kNO_GPU, "no GPU can be used", textOf(call, ": ", textOfResult(result)),
                "run where a GPU is visible; nvidia-smi shows which are");
        }
    }

    CUresult (*mDevicePrimaryCtxRelease)(CUdevice){};
    CUcontext mContext{};
    CUdevice mDevice{};
    int mCapability{0};
    std::string mName;
};

//! A stream that does not wait for the default stream.
class Stream
{
public:
    explicit Stream(Driver const& driver)
        : mDriver(driver)
    {
        mDriver.makeCurrent();
        mDriver.check(mDriver.streamCreate(&mStream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    }

    ~Stream()
    {
        mDriver.streamSynchronize(mStream);
        mDriver.streamDestroy(mStream);
    }

    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    CUstream get() const noexcept
    {
        return mStream;
    }

    void synchronize() const
    {
        mDriver.check(mDriver.streamSynchronize(mStream), "cuStreamSynchronize");
    }

private:
    Driver const& mDriver;
    CUstream mStream{};
};

//! Device memory of a fixed size, aligned to at least 256 bytes.
class DeviceMemory
{
public:
    DeviceMemory(Driver const& driver, std::size_t bytes)
        : mDriver(driver)
        , mBytes(bytes)
    {
        mDriver.makeCurrent();
        mDriver.check(mDriver.memAlloc(&mAddress, bytes), textOf("cuMemAlloc of ", bytes, " bytes").c_str());
    }

    ~DeviceMemory()
    {
        mDriver.memFree(mAddress);
    }

    DeviceMemory(DeviceMemory const&) = delete;
    DeviceMemory& operator=(DeviceMemory const&) = delete;

    CUdeviceptr address() const noexcept
    {
        return mAddress;
    }

    std::size_t bytes() const noexcept
    {
        return mBytes;
    }

private:
    Driver const& mDriver;
    CUdeviceptr mAddress{};
    std::size_t mBytes;
};

//! Page-locked host memory, which the device reads while the host goes on.
class PinnedMemory
{
public:
    PinnedMemory(Driver const& driver, std::size_t bytes)
        : mDriver(driver)
    {
        mDriver.makeCurrent();
        mDriver.check(mDriver.memAllocHost(&mAddress, bytes), textOf("cuMemAllocHost of ", bytes, " bytes").c_str());
    }

    ~PinnedMemory()
    {
        mDriver.memFreeHost(mAddress);
    }

    PinnedMemory(PinnedMemory const&) = delete;
    PinnedMemory& operator=(PinnedMemory const&) = delete;

    uint8_t* get() const noexcept
    {
        return static_cast<uint8_t*>(mAddress);
    }

private:
    Driver const& mDriver;
    void* mAddress{};
};

//! Two events around work of a stream.
class DeviceTimer
{
public:
    explicit DeviceTimer(Driver const& driver)
        : mDriver(driver)
    {
        mDriver.check(mDriver.eventCreate(&mStart, CU_EVENT_DEFAULT), "cuEventCreate");
        CUresult const result = mDriver.eventCreate(&mStop, CU_EVENT_DEFAULT);
        if (result != CUDA_SUCCESS)
        {
            mDriver.eventDestroy(mStart);
        }
        mDriver.check(result, "cuEventCreate");
    }

    ~DeviceTimer()
    {
        mDriver.eventDestroy(mStart);
        mDriver.eventDestroy(mStop);
    }

    DeviceTimer(DeviceTimer const&) = delete;
    DeviceTimer& operator=(DeviceTimer const&) = delete;

    void start(CUstream stream)
    {
        mDriver.check(mDriver.eventRecord(mStart, stream), "cuEventRecord");
    }

    void stop(CUstream stream)
    {
        mDriver.check(mDriver.eventRecord(mStop, stream), "cuEventRecord");
    }

    //! \return milliseconds between the two, once the stream was waited for.
    double milliseconds() const
    {
        float elapsed = 0;
        mDriver.check(mDriver.eventElapsedTime(&elapsed, mStart, mStop), "cuEventElapsedTime");
        return static_cast<double>(elapsed);
    }

private:
    Driver const& mDriver;
    CUevent mStart{};
    CUevent mStop{};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_DRIVER_HPP
