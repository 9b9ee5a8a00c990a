//! A CUDA driver without a GPU: device memory is host memory, and a stream's work runs when it is waited for, not
//! before. So a program that reads an answer too early, or reuses a staging buffer too early, gets a wrong answer here.
//!
//! Environment: HSTU_FAKE_NO_DEVICE=1 cuInit fails; HSTU_FAKE_SM=80 compute capability (default 90);
//! HSTU_FAKE_MEMORY_MIB=N device memory (default 65536); HSTU_FAKE_NO_PINNED=1 no page-locked memory.

#include "fakeDriver.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#undef cuEventElapsedTime

namespace
{

using Work = std::function<void()>;

struct Node
{
    CUgraphNodeType type{CU_GRAPH_NODE_TYPE_KERNEL};
    Work work;
    CUDA_MEMCPY3D copy{};
};

struct Graph
{
    std::vector<std::unique_ptr<Node>> nodes;
};

struct Stream
{
    std::deque<Work> waiting;
    std::unique_ptr<Graph> recording;
};

struct Event
{
    std::chrono::steady_clock::time_point time;
};

std::mutex gMutex;
std::map<CUdeviceptr, size_t> gDevice;
std::map<void*, size_t> gPinned;
size_t gUsed = 0;

size_t totalBytes()
{
    char const* const mib = std::getenv("HSTU_FAKE_MEMORY_MIB");
    return static_cast<size_t>(mib != nullptr ? std::atoll(mib) : 65536) << 20;
}

Stream* streamOf(CUstream stream)
{
    return reinterpret_cast<Stream*>(stream);
}

void runCopy(CUDA_MEMCPY3D const& copy)
{
    auto const end = [](CUmemorytype type, void const* host, CUdeviceptr device)
    { return type == CU_MEMORYTYPE_HOST ? const_cast<void*>(host) : reinterpret_cast<void*>(device); };
    std::memcpy(end(copy.dstMemoryType, copy.dstHost, copy.dstDevice),
        static_cast<char const*>(end(copy.srcMemoryType, copy.srcHost, copy.srcDevice)) + copy.srcXInBytes,
        copy.WidthInBytes);
}

CUresult addCopy(CUstream stream, CUDA_MEMCPY3D const& copy)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    Stream* const s = streamOf(stream);
    if (s->recording)
    {
        auto node = std::make_unique<Node>();
        node->type = CU_GRAPH_NODE_TYPE_MEMCPY;
        node->copy = copy;
        s->recording->nodes.push_back(std::move(node));
        return CUDA_SUCCESS;
    }
    s->waiting.push_back([copy] { runCopy(copy); });
    return CUDA_SUCCESS;
}

CUDA_MEMCPY3D plainCopy(CUmemorytype from, CUmemorytype into, size_t bytes)
{
    CUDA_MEMCPY3D copy{};
    copy.srcMemoryType = from;
    copy.dstMemoryType = into;
    copy.WidthInBytes = bytes;
    copy.Height = 1;
    copy.Depth = 1;
    return copy;
}

} // namespace

extern "C"
{

    bool hstuFakeIsCapturing(CUstream stream)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        return streamOf(stream)->recording != nullptr;
    }

    bool hstuFakeLaunch(CUstream stream, Work const* work)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        Stream* const s = streamOf(stream);
        if (s == nullptr)
        {
            return false;
        }
        if (s->recording)
        {
            auto node = std::make_unique<Node>();
            node->work = *work;
            s->recording->nodes.push_back(std::move(node));
            return true;
        }
        s->waiting.push_back(*work);
        return true;
    }

    CUresult cuInit(unsigned)
    {
        return std::getenv("HSTU_FAKE_NO_DEVICE") != nullptr ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
    }

    CUresult cuGetErrorName(CUresult result, char const** name)
    {
        *name = result == CUDA_ERROR_NO_DEVICE       ? "CUDA_ERROR_NO_DEVICE"
                : result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
                                                     : "CUDA_ERROR_FAKE";
        return CUDA_SUCCESS;
    }

    CUresult cuGetErrorString(CUresult, char const** text)
    {
        *text = "said by the fake driver";
        return CUDA_SUCCESS;
    }

    CUresult cuDeviceGetCount(int* count)
    {
        *count = 1;
        return CUDA_SUCCESS;
    }

    CUresult cuDeviceGet(CUdevice* device, int)
    {
        *device = 0;
        return CUDA_SUCCESS;
    }

    CUresult cuDeviceGetName(char* name, int size, CUdevice)
    {
        std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
        return CUDA_SUCCESS;
    }

    CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
    {
        char const* const text = std::getenv("HSTU_FAKE_SM");
        int const sm = text != nullptr ? std::atoi(text) : 90;
        *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
        return CUDA_SUCCESS;
    }

    CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice)
    {
        static int only = 0;
        *context = reinterpret_cast<CUcontext>(&only);
        return CUDA_SUCCESS;
    }

    CUresult cuDevicePrimaryCtxRelease(CUdevice)
    {
        return CUDA_SUCCESS;
    }

    CUresult cuCtxSetCurrent(CUcontext context)
    {
        return context != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }

    CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        if (bytes == 0 || gUsed + bytes > totalBytes())
        {
            return bytes == 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_OUT_OF_MEMORY;
        }
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, bytes) != 0)
        {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        // Fresh memory is not zero: what a program forgets to write must show.
        std::memset(memory, 0xCD, bytes);
        *address = reinterpret_cast<CUdeviceptr>(memory);
        gDevice[*address] = bytes;
        gUsed += bytes;
        return CUDA_SUCCESS;
    }

    CUresult cuMemFree(CUdeviceptr address)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        auto const found = gDevice.find(address);
        if (found == gDevice.end())
        {
            return CUDA_ERROR_INVALID_VALUE;
        }
        gUsed -= found->second;
        gDevice.erase(found);
        std::free(reinterpret_cast<void*>(address));
        return CUDA_SUCCESS;
    }

    CUresult cuMemAllocHost(void** address, size_t bytes)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        if (std::getenv("HSTU_FAKE_NO_PINNED") != nullptr)
        {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        *address = std::malloc(bytes);
        gPinned[*address] = bytes;
        return *address != nullptr ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    }

    CUresult cuMemFreeHost(void* address)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        if (gPinned.erase(address) == 0)
        {
            return CUDA_ERROR_INVALID_VALUE;
        }
        std::free(address);
        return CUDA_SUCCESS;
    }

    CUresult cuMemcpyHtoDAsync(CUdeviceptr target, void const* source, size_t bytes, CUstream stream)
    {
        CUDA_MEMCPY3D copy = plainCopy(CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE, bytes);
        copy.srcHost = source;
        copy.dstDevice = target;
        return addCopy(stream, copy);
    }

    CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes, CUstream stream)
    {
        CUDA_MEMCPY3D copy = plainCopy(CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST, bytes);
        copy.srcDevice = source;
        copy.dstHost = target;
        return addCopy(stream, copy);
    }

    CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream)
    {
        CUDA_MEMCPY3D copy = plainCopy(CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_DEVICE, bytes);
        copy.srcDevice = source;
        copy.dstDevice = target;
        return addCopy(stream, copy);
    }

    CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t bytes, CUstream stream)
    {
        Work const work = [target, value, bytes] { std::memset(reinterpret_cast<void*>(target), value, bytes); };
        return hstuFakeLaunch(stream, &work) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }

    CUresult cuMemGetInfo(size_t* free, size_t* total)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        *total = totalBytes();
        *free = *total - gUsed;
        return CUDA_SUCCESS;
    }

    CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        auto const after = gDevice.upper_bound(address);
        bool const isDevice = after != gDevice.begin() && address < std::prev(after)->first + std::prev(after)->second;
        *static_cast<unsigned*>(value) = isDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        return CUDA_SUCCESS;
    }

    CUresult cuStreamCreate(CUstream* stream, unsigned)
    {
        *stream = reinterpret_cast<CUstream>(new Stream);
        return CUDA_SUCCESS;
    }

    CUresult cuStreamDestroy(CUstream stream)
    {
        delete streamOf(stream);
        return CUDA_SUCCESS;
    }

    CUresult cuStreamSynchronize(CUstream stream)
    {
        std::deque<Work> work;
        {
            std::lock_guard<std::mutex> const lock(gMutex);
            if (streamOf(stream)->recording)
            {
                return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
            }
            work.swap(streamOf(stream)->waiting);
        }
        for (Work const& each : work)
        {
            each();
        }
        return CUDA_SUCCESS;
    }

    CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        streamOf(stream)->recording = std::make_unique<Graph>();
        return CUDA_SUCCESS;
    }

    CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph)
    {
        std::lock_guard<std::mutex> const lock(gMutex);
        *graph = reinterpret_cast<CUgraph>(streamOf(stream)->recording.release());
        return CUDA_SUCCESS;
    }

    CUresult cuEventCreate(CUevent* event, unsigned)
    {
        *event = reinterpret_cast<CUevent>(new Event);
        return CUDA_SUCCESS;
    }

    CUresult cuEventDestroy(CUevent event)
    {
        delete reinterpret_cast<Event*>(event);
        return CUDA_SUCCESS;
    }

    CUresult cuEventRecord(CUevent event, CUstream stream)
    {
        Work const work = [event] { reinterpret_cast<Event*>(event)->time = std::chrono::steady_clock::now(); };
        return hstuFakeLaunch(stream, &work) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }

    CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent stop)
    {
        auto const elapsed = reinterpret_cast<Event*>(stop)->time - reinterpret_cast<Event*>(start)->time;
        *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
        return CUDA_SUCCESS;
    }

    CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count)
    {
        auto const& all = reinterpret_cast<Graph*>(graph)->nodes;
        for (size_t i = 0; nodes != nullptr && i < all.size(); ++i)
        {
            nodes[i] = reinterpret_cast<CUgraphNode>(all[i].get());
        }
        *count = all.size();
        return CUDA_SUCCESS;
    }

    CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type)
    {
        *type = reinterpret_cast<Node*>(node)->type;
        return CUDA_SUCCESS;
    }

    CUresult cuGraphMemcpyNodeGetParams(CUgraphNode node, CUDA_MEMCPY3D* copy)
    {
        *copy = reinterpret_cast<Node*>(node)->copy;
        return CUDA_SUCCESS;
    }

    CUresult cuGraphMemcpyNodeSetParams(CUgraphNode node, CUDA_MEMCPY3D const* copy)
    {
        if (std::getenv("HSTU_FAKE_FIXED_COPIES") != nullptr)
        {
            return CUDA_ERROR_NOT_SUPPORTED;
        }
        reinterpret_cast<Node*>(node)->copy = *copy;
        return CUDA_SUCCESS;
    }

    CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long)
    {
        auto* const works = new std::vector<Work>;
        for (auto const& node : reinterpret_cast<Graph*>(graph)->nodes)
        {
            CUDA_MEMCPY3D const copy = node->copy;
            works->push_back(node->type == CU_GRAPH_NODE_TYPE_MEMCPY ? Work([copy] { runCopy(copy); }) : node->work);
        }
        *executable = reinterpret_cast<CUgraphExec>(works);
        return CUDA_SUCCESS;
    }

    CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream)
    {
        for (Work const& each : *reinterpret_cast<std::vector<Work>*>(executable))
        {
            if (!hstuFakeLaunch(stream, &each))
            {
                return CUDA_ERROR_INVALID_VALUE;
            }
        }
        return CUDA_SUCCESS;
    }

    CUresult cuGraphExecDestroy(CUgraphExec executable)
    {
        delete reinterpret_cast<std::vector<Work>*>(executable);
        return CUDA_SUCCESS;
    }

    CUresult cuGraphDestroy(CUgraph graph)
    {
        delete reinterpret_cast<Graph*>(graph);
        return CUDA_SUCCESS;
    }

} // extern "C"
