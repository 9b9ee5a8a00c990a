#ifndef HSTU_LOADER_CUDA_GRAPH_HPP
#define HSTU_LOADER_CUDA_GRAPH_HPP

#include <cstdint>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "error.hpp"
#include "recordingGate.hpp"

//! CUDA graphs: work of a stream recorded once and launched as one, and which of them are kept.
namespace hstu::loader
{

//! TensorRT's rule is that a context must not change between the recording of a graph and its last launch. One context
//! serves every shape here (TensorRT 8.5 has no second one for the same profile), so a graph must not read what the
//! context keeps on the host: shapes that a layer uses as numbers are copied from there in every pass. Such copies are
//! made to read a snapshot instead; what cannot be is named in `boundBy`, and such a graph may only be launched while
//! the context is still at its shapes.
class CudaGraph
{
public:
    //! Records what `enqueue` puts on the stream. Nothing of it runs. The same work has run before, so nothing is
    //! loaded or allocated for the first time here. No session of the process enqueues a pass meanwhile, so this and the
    //! end of a graph have no place where one does.
    CudaGraph(Driver const& driver, CUstream stream, std::function<void()> const& enqueue)
        : mDriver(driver)
    {
        RecordingGate::Recording const alone(RecordingGate::process());
        CUgraph const graph = recorded(stream, enqueue);
        try
        {
            detachNodes(graph);
            mDriver.check(mDriver.graphInstantiate(&mExecutable, graph, 0), "cuGraphInstantiateWithFlags");
        }
        catch (...)
        {
            mDriver.graphDestroy(graph);
            throw;
        }
        // The executable keeps what it needs of it.
        mDriver.graphDestroy(graph);
    }

    ~CudaGraph()
    {
        RecordingGate::Recording const alone(RecordingGate::process());
        mDriver.graphExecDestroy(mExecutable);
    }

    CudaGraph(CudaGraph const&) = delete;
    CudaGraph& operator=(CudaGraph const&) = delete;

    void launch(CUstream stream) const
    {
        mDriver.check(mDriver.graphLaunch(mExecutable, stream), "cuGraphLaunch");
    }

    //! \return why the graph depends on memory of the host that may change; empty if it does not.
    std::string const& boundBy() const noexcept
    {
        return mBoundBy;
    }

private:
    CUgraph recorded(CUstream stream, std::function<void()> const& enqueue) const
    {
        CUgraph graph = nullptr;
        // Thread-local: other streams' threads may allocate meanwhile.
        mDriver.check(mDriver.streamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture");
        try
        {
            enqueue();
        }
        catch (...)
        {
            // Also a capture that was invalidated has to be ended, or the stream would stay unusable.
            mDriver.streamEndCapture(stream, &graph);
            if (graph != nullptr)
            {
                mDriver.graphDestroy(graph);
            }
            throw;
        }
        mDriver.check(mDriver.streamEndCapture(stream, &graph), "cuStreamEndCapture");
        return graph;
    }

    void detachNodes(CUgraph graph)
    {
        size_t count = 0;
        mDriver.check(mDriver.graphGetNodes(graph, nullptr, &count), "cuGraphGetNodes");
        if (count == 0)
        {
            throw Error(Failure::kENGINE, "nothing was recorded",
                "the engine put no work on the stream that it was given", "run without CUDA graphs: --cuda-graphs 0");
        }
        std::vector<CUgraphNode> nodes(count);
        mDriver.check(mDriver.graphGetNodes(graph, nodes.data(), &count), "cuGraphGetNodes");
        for (CUgraphNode const node : nodes)
        {
            std::string const why = detached(node);
            if (mBoundBy.empty())
            {
                mBoundBy = why;
            }
        }
    }

    //! \return why the node still depends on what the host changes, or an empty text.
    std::string detached(CUgraphNode node)
    {
        CUgraphNodeType type{};
        mDriver.check(mDriver.graphNodeGetType(node, &type), "cuGraphNodeGetType");
        switch (type)
        {
        case CU_GRAPH_NODE_TYPE_KERNEL:
        case CU_GRAPH_NODE_TYPE_MEMSET:
        case CU_GRAPH_NODE_TYPE_EMPTY:
        case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
        case CU_GRAPH_NODE_TYPE_EVENT_RECORD: return "";
        case CU_GRAPH_NODE_TYPE_MEMCPY: break;
        default: return textOf("a node of type ", static_cast<int>(type));
        }
        CUDA_MEMCPY3D copy{};
        mDriver.check(mDriver.graphMemcpyNodeGetParams(node, &copy), "cuGraphMemcpyNodeGetParams");
        if (isOnHost(copy.dstMemoryType, copy.dstDevice))
        {
            return "a copy to the host";
        }
        if (!isOnHost(copy.srcMemoryType, copy.srcDevice))
        {
            return "";
        }
        auto const* const start = copy.srcMemoryType == CU_MEMORYTYPE_HOST
                                      ? static_cast<uint8_t const*>(copy.srcHost)
                                      : reinterpret_cast<uint8_t const*>(copy.srcDevice);
        if (copy.Height > 1 || copy.Depth > 1 || start == nullptr || copy.WidthInBytes == 0)
        {
            return "a copy from the host that is no plain run of bytes";
        }
        mSnapshots.push_back(std::make_unique<PinnedMemory>(mDriver, copy.WidthInBytes));
        std::memcpy(mSnapshots.back()->get(), start + copy.srcXInBytes, copy.WidthInBytes);
        copy.srcMemoryType = CU_MEMORYTYPE_HOST;
        copy.srcHost = mSnapshots.back()->get();
        copy.srcDevice = 0;
        copy.srcXInBytes = 0;
        CUresult const result = mDriver.graphMemcpyNodeSetParams(node, &copy);
        return result == CUDA_SUCCESS ? "" : "a copy from the host that cannot be changed";
    }

    bool isOnHost(CUmemorytype type, CUdeviceptr address) const
    {
        if (type != CU_MEMORYTYPE_UNIFIED)
        {
            return type == CU_MEMORYTYPE_HOST;
        }
        unsigned found = 0;
        // The driver does not know memory that only the host has.
        return mDriver.pointerGetAttribute(&found, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) != CUDA_SUCCESS
               || found == CU_MEMORYTYPE_HOST;
    }

    Driver const& mDriver;
    CUgraphExec mExecutable{};
    std::string mBoundBy;
    std::vector<std::unique_ptr<PinnedMemory>> mSnapshots;
};

//! All that a recorded pass depends on: shapes of the inputs, and addresses of tensors that lie outside the session.
using GraphKey = std::vector<int64_t>;

struct GraphStats
{
    uint64_t captures{0};
    uint64_t replays{0};
    uint64_t evictions{0};
    uint64_t failures{0}; //!< passes that could not be recorded, or whose graph gave another answer
};

//! Graphs by shape bucket: the least recently replayed goes first. A pass is recorded when its shapes come a second
//! time: most never come again, and recording costs as much as several passes.
template <typename Kept>
class GraphBuckets
{
public:
    explicit GraphBuckets(std::size_t capacity)
        : mCapacity(capacity)
    {
    }

    bool isEnabled() const noexcept
    {
        return mCapacity > 0;
    }

    //! \return what is kept for a key, most recently used from now on; null if nothing is.
    Kept* find(GraphKey const& key)
    {
        auto const found = mKept.find(key);
        if (found == mKept.end())
        {
            return nullptr;
        }
        mOrder.splice(mOrder.end(), mOrder, found->second.place);
        return found->second.kept.get();
    }

    //! Notes that a pass ran without a graph.
    //! \return whether it should be recorded now.
    bool isDue(GraphKey const& key)
    {
        if (!isEnabled() || mKept.count(key) > 0)
        {
            return false;
        }
        auto const [seen, isNew] = mSeen.emplace(key, false);
        if (isNew && mSeen.size() > kSEEN_PER_GRAPH * mCapacity)
        {
            forgetOne(key);
        }
        return !isNew && !seen->second;
    }

    void keep(GraphKey const& key, std::unique_ptr<Kept> kept)
    {
        while (mKept.size() >= mCapacity)
        {
            mKept.erase(mOrder.front());
            mOrder.pop_front();
            ++stats.evictions;
        }
        mOrder.push_back(key);
        mKept[key] = {std::move(kept), std::prev(mOrder.end())};
        mSeen.erase(key);
        ++stats.captures;
    }

    //! Counts a failure, drops the key's graph, and never says again that the key is due.
    void refuse(GraphKey const& key)
    {
        ++stats.failures;
        auto const found = mKept.find(key);
        if (found != mKept.end())
        {
            mOrder.erase(found->second.place);
            mKept.erase(found);
        }
        mSeen[key] = true;
    }

    //! Drops every graph, because the addresses that they know are no longer the session's.
    void clear()
    {
        stats.evictions += mKept.size();
        mKept.clear();
        mOrder.clear();
    }

    GraphStats stats;

private:
    //! Keys that were seen once are remembered for this many graphs' worth of others.
    static constexpr std::size_t kSEEN_PER_GRAPH = 4;

    struct Entry
    {
        std::unique_ptr<Kept> kept;
        std::list<GraphKey>::iterator place;
    };

    //! Forgets some key but the given one; one that was refused last, because asking again would fail again.
    void forgetOne(GraphKey const& spared)
    {
        for (bool const refused : {false, true})
        {
            for (auto each = mSeen.begin(); each != mSeen.end(); ++each)
            {
                if (each->second == refused && each->first != spared)
                {
                    mSeen.erase(each);
                    return;
                }
            }
        }
    }

    std::size_t mCapacity;
    std::map<GraphKey, Entry> mKept;
    std::list<GraphKey> mOrder;     //!< least recently used first
    std::map<GraphKey, bool> mSeen; //!< whether it was refused
};

} // namespace hstu::loader

#endif // HSTU_LOADER_CUDA_GRAPH_HPP
