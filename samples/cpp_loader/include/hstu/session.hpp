#ifndef HSTU_LOADER_SESSION_HPP
#define HSTU_LOADER_SESSION_HPP

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bufferPlan.hpp"
#include "cudaGraph.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "feeds.hpp"
#include "loadedGraph.hpp"
#include "recordingGate.hpp"
#include "tensor.hpp"
#include "tensorRt.hpp"

//! Requests to answers on one stream, over a graph in one engine or in segments.
namespace hstu::loader
{

//! A tensor in device memory that outlives a pass.
struct DeviceTensor
{
    CUdeviceptr address{};
    Shape shape;
    ElementType type{ElementType::kFLOAT32};
    std::size_t bytes{0};
};

using DeviceTensors = std::map<std::string, DeviceTensor>;

//! A copy within device memory.
struct DeviceCopy
{
    CUdeviceptr source{};
    CUdeviceptr target{};
    std::size_t bytes{0};
};

//! What a pass reads and writes beside the feeds.
struct Residents
{
    DeviceTensors reads;            //!< inputs that lie in device memory
    DeviceTensors writes;           //!< outputs that stay there
    std::vector<DeviceCopy> before; //!< made before the pass, on its stream
    std::vector<DeviceCopy> after;  //!< made after it
};

//! One runner of a graph, one stream, staging buffers whose addresses stay, and CUDA graphs per shape bucket.
//!
//! One thread at a time may use a session. Profiles start at 1 row, because builders refuse empty tensors: an input of
//! 0 rows is fed one row of zeros, which the offsets give to no sequence, and the outputs lose the rows that it added.
class Session
{
public:
    //! \param graphs most CUDA graphs that are kept; 0 records none.
    Session(TensorRt& tensorRt, Driver const& driver, std::shared_ptr<LoadedGraph const> graph, std::size_t graphs)
        : mTensorRt(tensorRt)
        , mDriver(driver)
        , mGraph(std::move(graph))
        , mStream(driver)
        , mTimer(driver)
        , mGraphs(graphs)
    {
        typed("creating an execution context", [&] { mRunner = mGraph->runner(mTensorRt, mDriver); });
    }

    ~Session()
    {
        // What it holds is freed on the thread that ends it, which may have used no CUDA before.
        mDriver.tryMakeCurrent();
    }

    Session(Session const&) = delete;
    Session& operator=(Session const&) = delete;

    //! Answers one request batch. Feeds were checked by `checkedFeeds`.
    Tensors run(Tensors const& feeds)
    {
        return run(feeds, Residents{});
    }

    //! The same with tensors that stay on the device. The stream is waited for before it returns.
    Tensors run(Tensors const& feeds, Residents const& residents)
    {
        return typed("running an engine", [&] { return runChecked(feeds, residents); });
    }

    //! \return milliseconds of the last pass on the device, without the copies from and to the host.
    double deviceMilliseconds() const
    {
        return mTimer.milliseconds();
    }

    GraphStats const& graphStats() const noexcept
    {
        return mGraphs.stats;
    }

    bool hasGraphs() const noexcept
    {
        return mGraphs.isEnabled();
    }

private:
    //! Device memory with a page-locked twin. It grows in powers of two, so it seldom moves.
    struct Staging
    {
        std::unique_ptr<DeviceMemory> device;
        std::unique_ptr<PinnedMemory> host;

        //! \return what is taken where so much is asked for.
        static std::size_t grown(std::size_t bytes)
        {
            std::size_t size = 4096;
            while (size < bytes)
            {
                size *= 2;
            }
            return size;
        }

        bool holds(std::size_t bytes) const
        {
            return device && bytes <= device->bytes();
        }

        void reserve(Driver const& driver, std::size_t bytes)
        {
            if (holds(bytes))
            {
                return;
            }
            std::size_t const size = grown(bytes);
            device.reset();
            host.reset();
            // Both or neither: after a failure, half a pair would pass for a whole one.
            auto twin = std::make_unique<PinnedMemory>(driver, size);
            device = std::make_unique<DeviceMemory>(driver, size);
            host = std::move(twin);
        }
    };

    struct Output
    {
        Shape written; //!< what the engine writes
        Shape asked;   //!< its leading part that the caller asked for
        ElementType type{ElementType::kFLOAT32};
        bool isFetched{true}; //!< goes to the host
        bool isDirect{false}; //!< written straight to its resident target
    };

    //! How a pass of certain shapes lies in memory.
    struct Plan
    {
        Shapes shapes;
        std::map<std::string, Output> outputs;
        Layout incoming;
        Layout outgoing;
        std::size_t fetchedBytes{0};
        std::size_t scratchBytes{0}; //!< for what lies between inputs and outputs
    };

    //! A recorded pass.
    struct Replay
    {
        std::unique_ptr<CudaGraph> graph;
        Plan plan;
        //! Whether the graph was compared with TensorRT's own enqueueing: while the context was at the graph's shapes,
        //! and after it had served others.
        bool isProven[2]{false, false};
    };

    Tensors runChecked(Tensors const& given, Residents const& residents)
    {
        Tensors feeds = typedFeeds(given, residents);
        Shapes shapes;
        std::vector<std::string> empty;
        DeviceTensors reads = residents.reads;
        for (EngineTensor const& input : mGraph->inputs)
        {
            auto const resident = reads.find(input.name);
            Shape shape = resident != reads.end() ? resident->second.shape : feeds.at(input.name).shape;
            if (!shape.empty() && shape[0] == 0 && input.least[0] == 1)
            {
                shape[0] = 1;
                feeds[input.name] = HostTensor(input.type, shape);
                reads.erase(input.name);
                empty.push_back(input.name);
            }
            shapes[input.name] = std::move(shape);
        }
        requireProfile(shapes);
        GraphKey const key = keyOf(shapes, empty, reads, residents.writes);
        mDriver.makeCurrent();
        Replay* const replay = replayable(key, shapes);
        Plan fresh;
        if (replay == nullptr)
        {
            fresh = planned(feeds, shapes, empty, reads, residents.writes);
            reserve(fresh);
        }
        Plan const& plan = replay != nullptr ? replay->plan : fresh;
        try
        {
            enqueue(plan, feeds, reads, residents, replay);
            mStream.synchronize();
        }
        catch (...)
        {
            mIsRefused = false;
            // Work that was enqueued still uses the caller's memory; the error on its way out says more than a second.
            mDriver.streamSynchronize(mStream.get());
            throw;
        }
        Tensors results;
        for (auto const& [name, output] : plan.outputs)
        {
            if (output.isFetched)
            {
                HostTensor tensor(output.type, output.asked);
                if (!tensor.bytes.empty())
                {
                    std::memcpy(tensor.bytes.data(), mOutgoing.host->get() + plan.outgoing.offsets.at(name),
                        tensor.bytes.size());
                }
                results[name] = std::move(tensor);
            }
        }
        if (mIsRefused)
        {
            // Not before: the plan that was just read belongs to the graph.
            mIsRefused = false;
            mGraphs.refuse(key);
        }
        else if (replay == nullptr && mGraphs.isDue(key))
        {
            capture(key, std::move(fresh));
        }
        return results;
    }

    //! \return the feeds in the engine's types; refuses names that do not match.
    Tensors typedFeeds(Tensors const& given, Residents const& residents) const
    {
        Tensors feeds;
        std::string problems;
        for (EngineTensor const& input : mGraph->inputs)
        {
            if (residents.reads.count(input.name) > 0)
            {
                continue;
            }
            auto const found = given.find(input.name);
            if (found == given.end())
            {
                problems += input.name + " is missing; ";
                continue;
            }
            if (found->second.shape.size() != input.least.size())
            {
                problems += textOf(input.name, " has shape ", textOfShape(found->second.shape), ", not rank ",
                    input.least.size(), "; ");
                continue;
            }
            std::string const problem = convertTensor(found->second, input.type, feeds[input.name]);
            problems += problem.empty() ? "" : input.name + " " + problem + "; ";
        }
        for (auto const& each : given)
        {
            bool const known = std::any_of(mGraph->inputs.begin(), mGraph->inputs.end(),
                [&](EngineTensor const& input) { return input.name == each.first; });
            problems += known ? "" : each.first + " is not an input; ";
        }
        if (!problems.empty())
        {
            throw Error(Failure::kREQUEST, "the feeds do not match the engine's inputs",
                problems.substr(0, problems.size() - 2), "`hstu_score BUNDLE --inspect` lists names, types and shapes");
        }
        return feeds;
    }

    void requireProfile(Shapes const& shapes) const
    {
        std::string problems;
        for (EngineTensor const& input : mGraph->inputs)
        {
            Shape const& shape = shapes.at(input.name);
            bool fits = shape.size() == input.least.size();
            for (std::size_t i = 0; fits && i < shape.size(); ++i)
            {
                fits = input.least[i] <= shape[i] && shape[i] <= input.most[i];
            }
            if (!fits)
            {
                problems += input.name + " is " + textOfShape(shape) + ", and the engine takes "
                            + textOfShape(input.least) + " to " + textOfShape(input.most) + "; ";
            }
        }
        if (!problems.empty())
        {
            throw Error(Failure::kREQUEST, "the request is outside the engine's profile",
                problems.substr(0, problems.size() - 2),
                "split the request, or rebuild with a larger --max-batch or --max-seq-len");
        }
    }

    GraphKey keyOf(Shapes const& shapes, std::vector<std::string> const& empty,
        DeviceTensors const& reads, DeviceTensors const& writes) const
    {
        GraphKey key;
        for (EngineTensor const& input : mGraph->inputs)
        {
            Shape const& shape = shapes.at(input.name);
            key.insert(key.end(), shape.begin(), shape.end());
            key.push_back(std::count(empty.begin(), empty.end(), input.name));
            auto const resident = reads.find(input.name);
            key.push_back(resident == reads.end() ? 0 : static_cast<int64_t>(resident->second.address));
        }
        for (auto const& each : writes)
        {
            key.push_back(static_cast<int64_t>(each.second.address));
            key.insert(key.end(), each.second.shape.begin(), each.second.shape.end());
        }
        return key;
    }

    //! \return the graph of a pass, unless it may only be launched while the context is at its shapes, and it is not.
    Replay* replayable(GraphKey const& key, Shapes const& shapes)
    {
        Replay* const replay = mGraphs.find(key);
        bool const isBound = replay != nullptr && (mIsEveryGraphBound || !replay->graph->boundBy().empty());
        return isBound && shapes != mContextShapes ? nullptr : replay;
    }

    Plan planned(Tensors const& feeds, Shapes const& shapes,
        std::vector<std::string> const& empty, DeviceTensors const& reads, DeviceTensors const& writes)
    {
        // From here to the end of the enqueueing, nobody knows what the context is set to.
        mContextShapes.clear();
        Plan plan;
        plan.shapes = shapes;
        Shapes fewer;
        if (!empty.empty())
        {
            Shapes two = shapes;
            for (std::string const& name : empty)
            {
                two[name][0] = 2;
            }
            requireProfile(two);
            fewer = mRunner->inferred(two);
        }
        for (auto const& [name, written] : mRunner->inferred(shapes))
        {
            Output output;
            output.type = outputType(name);
            output.written = written;
            output.asked = written;
            if (!empty.empty() && !written.empty())
            {
                // With every row of an empty input an output grows by the same number of rows, the last ones.
                output.asked[0] = 2 * written[0] - fewer.at(name)[0];
                if (output.asked[0] < 0)
                {
                    throw failed(name + " does not grow with the rows of the inputs");
                }
            }
            auto const target = writes.find(name);
            if (target != writes.end())
            {
                if (target->second.shape != output.asked)
                {
                    throw Error(Failure::kINTERNAL, "a resident output has another shape than the engine writes",
                        name + " is " + textOfShape(output.asked) + ", its target " + textOfShape(target->second.shape),
                        "this is a bug of the caller");
                }
                output.isFetched = false;
                output.isDirect = output.written == output.asked && target->second.bytes > 0;
            }
            plan.outputs[name] = std::move(output);
        }
        plan.scratchBytes = mRunner->scratchBytes();
        for (EngineTensor const& input : mGraph->inputs)
        {
            if (reads.count(input.name) == 0)
            {
                plan.incoming.add(input.name, feeds.at(input.name).bytes.size());
            }
        }
        // What goes to the host comes first, so that one copy brings it.
        for (bool const isFetched : {true, false})
        {
            for (auto const& [name, output] : plan.outputs)
            {
                if (output.isFetched == isFetched && !output.isDirect)
                {
                    plan.outgoing.add(name, bytesOf(output.written, output.type));
                }
            }
            plan.fetchedBytes = isFetched ? plan.outgoing.bytes : plan.fetchedBytes;
        }
        return plan;
    }

    ElementType outputType(std::string const& name) const
    {
        return std::find_if(mGraph->outputs.begin(), mGraph->outputs.end(),
            [&](EngineTensor const& each) { return each.name == name; })
            ->type;
    }

    //! Makes room for a pass. If a buffer moves, every graph goes, because it knows the old place.
    void reserve(Plan const& plan)
    {
        bool const hasScratch = plan.scratchBytes == 0 || (mScratch && plan.scratchBytes <= mScratch->bytes());
        if (mIncoming.holds(plan.incoming.bytes) && mOutgoing.holds(plan.outgoing.bytes) && hasScratch)
        {
            return;
        }
        mGraphs.clear();
        mIncoming.reserve(mDriver, plan.incoming.bytes);
        mOutgoing.reserve(mDriver, plan.outgoing.bytes);
        if (!hasScratch)
        {
            mScratch.reset();
            mScratch = std::make_unique<DeviceMemory>(mDriver, Staging::grown(plan.scratchBytes));
        }
    }

    //! Everything of one pass, on one stream and without a wait.
    void enqueue(
        Plan const& plan, Tensors const& feeds, DeviceTensors const& reads, Residents const& residents, Replay* replay)
    {
        for (auto const& [name, offset] : plan.incoming.offsets)
        {
            Bytes const& bytes = feeds.at(name).bytes;
            if (!bytes.empty())
            {
                std::memcpy(mIncoming.host->get() + offset, bytes.data(), bytes.size());
            }
        }
        CUstream const stream = mStream.get();
        if (plan.incoming.bytes > 0)
        {
            mDriver.check(mDriver.memcpyHtoDAsync(
                              mIncoming.device->address(), mIncoming.host->get(), plan.incoming.bytes, stream),
                "cuMemcpyHtoDAsync");
        }
        copy(residents.before);
        if (replay == nullptr)
        {
            mTimer.start(stream);
            runContext(plan, reads, residents.writes);
            mTimer.stop(stream);
        }
        else
        {
            bool& isProven = replay->isProven[plan.shapes == mContextShapes ? 0 : 1];
            if (isProven)
            {
                mTimer.start(stream);
                replay->graph->launch(stream);
                mTimer.stop(stream);
                ++mGraphs.stats.replays;
            }
            else
            {
                prove(*replay, isProven, reads, residents.writes);
            }
        }
        for (auto const& [name, target] : residents.writes)
        {
            auto const held = plan.outgoing.offsets.find(name);
            if (held != plan.outgoing.offsets.end() && target.bytes > 0)
            {
                copy({{mOutgoing.device->address() + held->second, target.address, target.bytes}});
            }
        }
        copy(residents.after);
        if (plan.fetchedBytes > 0)
        {
            mDriver.check(
                mDriver.memcpyDtoHAsync(mOutgoing.host->get(), mOutgoing.device->address(), plan.fetchedBytes, stream),
                "cuMemcpyDtoHAsync");
        }
    }

    void copy(std::vector<DeviceCopy> const& copies)
    {
        for (DeviceCopy const& each : copies)
        {
            if (each.bytes > 0)
            {
                mDriver.check(
                    mDriver.memcpyDtoDAsync(each.target, each.source, each.bytes, mStream.get()), "cuMemcpyDtoDAsync");
            }
        }
    }

    //! Binds every tensor and enqueues; the runner's shapes are set.
    void runContext(Plan const& plan, DeviceTensors const& reads, DeviceTensors const& writes)
    {
        Addresses addresses;
        for (auto const& [name, offset] : plan.incoming.offsets)
        {
            addresses[name] = mIncoming.device->address() + offset;
        }
        for (auto const& [name, tensor] : reads)
        {
            addresses[name] = tensor.address;
        }
        for (auto const& each : plan.outputs)
        {
            auto const held = plan.outgoing.offsets.find(each.first);
            addresses[each.first] = held == plan.outgoing.offsets.end() ? writes.at(each.first).address
                                                                        : mOutgoing.device->address() + held->second;
        }
        mRunner->bind(addresses, mScratch ? mScratch->address() : 0);
        enqueueApart();
        mContextShapes = plan.shapes;
    }

    //! Enqueues a pass while no other session records one.
    void enqueueApart()
    {
        RecordingGate::Enqueueing const besideOthers(RecordingGate::process());
        mRunner->enqueue(mStream.get());
    }

    //! Records the pass that was just run, for the next one of its key. Its answer is already fetched. A pass that
    //! cannot be recorded stays without a graph, and is counted.
    void capture(GraphKey const& key, Plan plan)
    {
        if (!mRunner->unrecordable(mStream.get()).empty())
        {
            mGraphs.refuse(key);
            return;
        }
        auto replay = std::make_unique<Replay>();
        try
        {
            replay->graph =
                std::make_unique<CudaGraph>(mDriver, mStream.get(), [this] { mRunner->enqueue(mStream.get()); });
        }
        catch (Error const&)
        {
            mGraphs.refuse(key);
            settle();
            return;
        }
        replay->plan = std::move(plan);
        mGraphs.keep(key, std::move(replay));
    }

    //! Runs the last pass once more: what a failed recording left behind in TensorRT must not fail the next request.
    void settle()
    {
        try
        {
            enqueueApart();
        }
        catch (Error const&)
        {
            // The request was answered; if TensorRT is broken, the next one says so.
        }
        mDriver.streamSynchronize(mStream.get());
    }

    //! Launches a graph, runs the pass without it, and compares all that they wrote; what the latter wrote stays. Done
    //! when a graph is first launched, and when it is first launched although the context has served other shapes since
    //! it was recorded, which TensorRT gives no promise for.
    void prove(Replay& replay, bool& isProven, DeviceTensors const& reads, DeviceTensors const& writes)
    {
        bool const isForeign = replay.plan.shapes != mContextShapes;
        CUstream const stream = mStream.get();
        std::vector<Bytes> const replayed = writtenBy(replay.plan, writes, [&] { replay.graph->launch(stream); });
        mContextShapes.clear();
        mRunner->inferred(replay.plan.shapes);
        std::vector<Bytes> const plain = writtenBy(replay.plan, writes,
            [&]
            {
                mTimer.start(stream);
                runContext(replay.plan, reads, writes);
                mTimer.stop(stream);
            });
        if (replayed == plain)
        {
            isProven = true;
            ++mGraphs.stats.replays;
        }
        else if (isForeign)
        {
            mIsEveryGraphBound = true;
            ++mGraphs.stats.failures;
        }
        else
        {
            mIsRefused = true;
        }
    }

    //! \return the bytes of every output after `action`; what it did not write is 0xFF.
    std::vector<Bytes> writtenBy(Plan const& plan, DeviceTensors const& writes, std::function<void()> const& action)
    {
        std::vector<std::pair<CUdeviceptr, std::size_t>> spans;
        if (plan.outgoing.bytes > 0)
        {
            spans.emplace_back(mOutgoing.device->address(), plan.outgoing.bytes);
        }
        for (auto const& [name, target] : writes)
        {
            if (plan.outgoing.offsets.count(name) == 0 && target.bytes > 0)
            {
                spans.emplace_back(target.address, target.bytes);
            }
        }
        for (auto const& [address, size] : spans)
        {
            mDriver.check(mDriver.memsetD8Async(address, 0xFF, size, mStream.get()), "cuMemsetD8Async");
        }
        if (plan.scratchBytes > 0)
        {
            // Also what an earlier pass left between the steps: a graph that skips one must not find it there.
            mDriver.check(mDriver.memsetD8Async(mScratch->address(), 0xFF, plan.scratchBytes, mStream.get()),
                "cuMemsetD8Async");
        }
        action();
        std::vector<Bytes> written;
        for (auto const& [address, size] : spans)
        {
            written.emplace_back(size);
            mDriver.check(
                mDriver.memcpyDtoHAsync(written.back().data(), address, size, mStream.get()), "cuMemcpyDtoHAsync");
        }
        mStream.synchronize();
        return written;
    }

    Error failed(std::string const& what) const
    {
        return Error(Failure::kENGINE, mTensorRt.name() + " could not run the engine",
            what + "\n    " + mTensorRt.logger().tail(), "rebuild the engine on this machine");
    }

    TensorRt& mTensorRt;
    Driver const& mDriver;
    std::shared_ptr<LoadedGraph const> mGraph;
    Stream mStream;
    DeviceTimer mTimer;
    // After the graph, so that it goes before what it was made of.
    std::unique_ptr<GraphRunner> mRunner;
    Staging mIncoming;
    Staging mOutgoing;
    std::unique_ptr<DeviceMemory> mScratch;
    GraphBuckets<Replay> mGraphs;
    //! Of the last pass that the context itself enqueued; empty while they are being changed.
    Shapes mContextShapes;
    bool mIsEveryGraphBound{false};
    bool mIsRefused{false}; //!< the graph of the pass that runs gave another answer
};

} // namespace hstu::loader

#endif // HSTU_LOADER_SESSION_HPP
