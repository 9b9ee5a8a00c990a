#ifndef HSTU_LOADER_SESSION_HPP
#define HSTU_LOADER_SESSION_HPP

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

#include "cudaGraph.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "feeds.hpp"
#include "manifest.hpp"
#include "tensor.hpp"
#include "tensorRt.hpp"

//! A deserialised engine, and one execution context with a stream of its own.
namespace hstu::loader
{

namespace detail
{

struct DeleteObject
{
    template <typename Object>
    void operator()(Object* object) const
    {
        delete object;
    }
};

inline Shape shapeOf(nvinfer1::Dims const& dims)
{
    Shape shape;
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        shape.push_back(dims.d[i]);
    }
    return shape;
}

inline nvinfer1::Dims dimsOf(Shape const& shape)
{
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i)
    {
        // The type of a size changed between TensorRT 8 and 10. Sizes were checked against the profile.
        dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[i]);
    }
    return dims;
}

inline ElementType elementTypeOf(nvinfer1::DataType type, std::string const& name)
{
    switch (type)
    {
    case nvinfer1::DataType::kFLOAT: return ElementType::kFLOAT32;
    case nvinfer1::DataType::kHALF: return ElementType::kFLOAT16;
    case nvinfer1::DataType::kINT32: return ElementType::kINT32;
    case nvinfer1::DataType::kINT8: return ElementType::kINT8;
    case nvinfer1::DataType::kUINT8: return ElementType::kUINT8;
    case nvinfer1::DataType::kBOOL: return ElementType::kBOOL;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kINT64: return ElementType::kINT64;
    case nvinfer1::DataType::kBF16: return ElementType::kBFLOAT16;
#endif
    default: break;
    }
    throw Error(Failure::kENGINE, "the engine has a tensor of an element type that is not supported",
        textOf(name, " has type ", static_cast<int>(type), " of nvinfer1::DataType"),
        "build the engine with hstu-compile");
}

} // namespace detail

//! An input or output of an engine.
struct EngineTensor
{
    std::string name;
    ElementType type{ElementType::kFLOAT32};
    Shape least; //!< inputs: smallest shape of profile 0
    Shape most;  //!< inputs: largest shape of profile 0
};

//! A deserialised engine whose inputs and outputs are those of the manifest. Contexts of several streams share it from
//! TensorRT 10 on; in TensorRT 8 a profile belongs to one context, so there each stream deserialises its own.
class Engine
{
public:
    //! Whether contexts may share an engine.
    static constexpr bool kIS_SHARED = NV_TENSORRT_MAJOR >= 10;

    //! Checks what the bundle says of the engine, then deserialises it. The plugin library is loaded.
    static std::shared_ptr<Engine> open(
        TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        return typed("opening an engine",
            [&]
            {
                checkFits(tensorRt, driver, bundle, graph);
                Bytes const plan = bundle.readVouched(graph.engineFile, kMOST_ENGINE_BYTES);
                driver.makeCurrent();
                tensorRt.logger().clear();
                std::shared_ptr<Engine> engine(new Engine);
                engine->mEngine.reset(tensorRt.runtime().deserializeCudaEngine(plan.data(), plan.size()));
                if (!engine->mEngine)
                {
                    throw Error(Failure::kENGINE, "TensorRT " + tensorRt.version() + " cannot load " + graph.engineFile,
                        tensorRt.logger().tail(),
                        "if a plugin is missing, pass --plugin; else rebuild the engine on this machine: `hstu-compile "
                        "engine model.onnx`");
                }
                engine->describe(graph);
                return engine;
            });
    }

    nvinfer1::ICudaEngine& get() const noexcept
    {
        return *mEngine;
    }

    std::vector<EngineTensor> inputs;
    std::vector<EngineTensor> outputs;

private:
    static constexpr uint64_t kMOST_ENGINE_BYTES = 64ULL << 30;

    Engine() = default;

    static void checkFits(TensorRt const& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        Manifest const& manifest = bundle.manifest();
        if (graph.engineFile.empty() || manifest.backend != "tensorrt")
        {
            throw Error(Failure::kBUNDLE, bundle.folder() + " has no TensorRT engine of the graph " + graph.name,
                "it was built with the backend " + manifest.backend,
                "build it where TensorRT is installed: `hstu-compile build CKPT --backend tensorrt`");
        }
        bundle.fileEntry(graph.engineFile);
        // An engine loads in the version that built it, to the patch; a fourth number says which build of that.
        std::string const& built = manifest.backendVersion;
        std::string const& found = tensorRt.version();
        if (built != found && built.rfind(found + ".", 0) != 0)
        {
            throw Error(Failure::kENGINE, "the engine " + graph.engineFile + " is for another TensorRT",
                "it was built by " + (built.empty() ? "an unknown version" : built) + ", and " + found + " is loaded",
                "install TensorRT " + built + ", or rebuild the engine with " + found);
        }
        std::vector<std::string> const& allowed = manifest.computeCapabilities;
        int const capability = driver.computeCapability();
        std::string const here = textOf(capability / 10, ".", capability % 10);
        if (!allowed.empty() && std::find(allowed.begin(), allowed.end(), here) == allowed.end())
        {
            std::string list;
            for (std::string const& each : allowed)
            {
                list += (list.empty() ? "" : ", ") + each;
            }
            throw Error(Failure::kENGINE, "the engine " + graph.engineFile + " is for another GPU",
                "it was built for compute capability " + list + ", and " + driver.deviceName() + " has " + here,
                "rebuild it on this GPU, or run it on one of those");
        }
    }

    void describe(GraphEntry const& graph)
    {
        for (int32_t i = 0; i < mEngine->getNbIOTensors(); ++i)
        {
            EngineTensor tensor;
            tensor.name = mEngine->getIOTensorName(i);
            char const* const name = tensor.name.c_str();
            tensor.type = detail::elementTypeOf(mEngine->getTensorDataType(name), tensor.name);
            bool const isInput = mEngine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            if (isInput)
            {
                tensor.least = detail::shapeOf(mEngine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMIN));
                tensor.most = detail::shapeOf(mEngine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMAX));
            }
            (isInput ? inputs : outputs).push_back(std::move(tensor));
        }
        checkNames(inputs, graph.inputs, graph, "inputs");
        checkNames(outputs, graph.outputs, graph, "outputs");
    }

    static void checkNames(std::vector<EngineTensor> const& found, std::vector<TensorSpec> const& wanted,
        GraphEntry const& graph, char const* kind)
    {
        std::string problems;
        for (TensorSpec const& spec : wanted)
        {
            auto const match = std::find_if(
                found.begin(), found.end(), [&](EngineTensor const& each) { return each.name == spec.name; });
            if (match == found.end())
            {
                problems += spec.name + " is missing; ";
            }
            // TensorRT 8 has no int64: its engines take timestamps as int32.
            else if (match->type != spec.type
                     && !(spec.type == ElementType::kINT64 && match->type == ElementType::kINT32))
            {
                problems +=
                    textOf(spec.name, " is ", factsOf(match->type).name, ", not ", factsOf(spec.type).name, "; ");
            }
            else if (!match->most.empty() && match->most.size() != spec.dims.size())
            {
                problems += textOf(spec.name, " has rank ", match->most.size(), ", not ", spec.dims.size(), "; ");
            }
        }
        if (found.size() != wanted.size())
        {
            problems += textOf("it has ", found.size(), " ", kind, ", not ", wanted.size(), "; ");
        }
        if (!problems.empty())
        {
            throw Error(Failure::kBUNDLE,
                "the " + std::string(kind) + " of " + graph.engineFile + " are not the manifest's",
                problems.substr(0, problems.size() - 2), "build the bundle again");
        }
    }

    std::unique_ptr<nvinfer1::ICudaEngine, detail::DeleteObject> mEngine;
};

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

//! One execution context, one stream, staging buffers whose addresses stay, and CUDA graphs per shape bucket.
//!
//! One thread at a time may use a session. Profiles start at 1 row, because builders refuse empty tensors: an input of
//! 0 rows is fed one row of zeros, which the offsets give to no sequence, and the outputs lose the rows that it added.
class Session
{
public:
    //! \param graphs most CUDA graphs that are kept; 0 records none.
    Session(TensorRt& tensorRt, Driver const& driver, std::shared_ptr<Engine> engine, std::size_t graphs)
        : mTensorRt(tensorRt)
        , mDriver(driver)
        , mEngine(std::move(engine))
        , mStream(driver)
        , mTimer(driver)
        , mGraphs(graphs)
    {
        typed("creating an execution context",
            [&]
            {
                mTensorRt.logger().clear();
                mContext.reset(mEngine->get().createExecutionContext());
                if (!mContext || mContext->getOptimizationProfile() < 0)
                {
                    throw Error(Failure::kENGINE, "TensorRT cannot create an execution context",
                        mTensorRt.logger().tail(),
                        "free GPU memory, use fewer --streams, or rebuild with a smaller --max-batch");
                }
            });
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
    static constexpr std::size_t kALIGNMENT = 256;

    //! Tensors side by side, each at a multiple of 256 bytes. Equal sizes in equal order lie at equal places.
    struct Layout
    {
        std::map<std::string, std::size_t> offsets;
        std::size_t bytes{0};

        void add(std::string const& name, std::size_t size)
        {
            offsets[name] = bytes;
            // Never 0: TensorRT wants a real address also for a tensor without elements.
            bytes += std::max((size + kALIGNMENT - 1) / kALIGNMENT, std::size_t{1}) * kALIGNMENT;
        }
    };

    //! Device memory with a page-locked twin. It grows in powers of two, so it seldom moves.
    struct Staging
    {
        std::unique_ptr<DeviceMemory> device;
        std::unique_ptr<PinnedMemory> host;

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
            std::size_t size = 4096;
            while (size < bytes)
            {
                size *= 2;
            }
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
        std::map<std::string, Shape> shapes;
        std::map<std::string, Output> outputs;
        Layout incoming;
        Layout outgoing;
        std::size_t fetchedBytes{0};
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
        std::map<std::string, Shape> shapes;
        std::vector<std::string> empty;
        DeviceTensors reads = residents.reads;
        for (EngineTensor const& input : mEngine->inputs)
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
        for (EngineTensor const& input : mEngine->inputs)
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
            bool const known = std::any_of(mEngine->inputs.begin(), mEngine->inputs.end(),
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

    void requireProfile(std::map<std::string, Shape> const& shapes) const
    {
        std::string problems;
        for (EngineTensor const& input : mEngine->inputs)
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

    GraphKey keyOf(std::map<std::string, Shape> const& shapes, std::vector<std::string> const& empty,
        DeviceTensors const& reads, DeviceTensors const& writes) const
    {
        GraphKey key;
        for (EngineTensor const& input : mEngine->inputs)
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
    Replay* replayable(GraphKey const& key, std::map<std::string, Shape> const& shapes)
    {
        Replay* const replay = mGraphs.find(key);
        bool const isBound = replay != nullptr && (mIsEveryGraphBound || !replay->graph->boundBy().empty());
        return isBound && shapes != mContextShapes ? nullptr : replay;
    }

    Plan planned(Tensors const& feeds, std::map<std::string, Shape> const& shapes,
        std::vector<std::string> const& empty, DeviceTensors const& reads, DeviceTensors const& writes)
    {
        // From here to the end of the enqueueing, nobody knows what the context is set to.
        mContextShapes.clear();
        Plan plan;
        plan.shapes = shapes;
        std::map<std::string, Shape> fewer;
        if (!empty.empty())
        {
            std::map<std::string, Shape> two = shapes;
            for (std::string const& name : empty)
            {
                two[name][0] = 2;
            }
            requireProfile(two);
            fewer = inferred(two);
        }
        for (auto const& [name, written] : inferred(shapes))
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
        for (EngineTensor const& input : mEngine->inputs)
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
        return std::find_if(mEngine->outputs.begin(), mEngine->outputs.end(),
            [&](EngineTensor const& each) { return each.name == name; })
            ->type;
    }

    //! Tells the context the input shapes. \return the shape of every output.
    std::map<std::string, Shape> inferred(std::map<std::string, Shape> const& shapes)
    {
        setShapes(shapes);
        std::map<std::string, Shape> found;
        for (EngineTensor const& output : mEngine->outputs)
        {
            Shape const shape = detail::shapeOf(mContext->getTensorShape(output.name.c_str()));
            if (std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; }))
            {
                throw failed(
                    "the shape " + textOfShape(shape) + " of " + output.name + " does not follow from the inputs");
            }
            found[output.name] = shape;
        }
        return found;
    }

    void setShapes(std::map<std::string, Shape> const& shapes)
    {
        for (auto const& [name, shape] : shapes)
        {
            if (!mContext->setInputShape(name.c_str(), detail::dimsOf(shape)))
            {
                throw failed("it refused " + name + " of shape " + textOfShape(shape));
            }
        }
    }

    //! Makes room for a pass. If a buffer moves, every graph goes, because it knows the old place.
    void reserve(Plan const& plan)
    {
        if (mIncoming.holds(plan.incoming.bytes) && mOutgoing.holds(plan.outgoing.bytes))
        {
            return;
        }
        mGraphs.clear();
        mIncoming.reserve(mDriver, plan.incoming.bytes);
        mOutgoing.reserve(mDriver, plan.outgoing.bytes);
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

    //! Binds every tensor and lets TensorRT enqueue; the context's shapes are set.
    void runContext(Plan const& plan, DeviceTensors const& reads, DeviceTensors const& writes)
    {
        for (auto const& [name, offset] : plan.incoming.offsets)
        {
            bind(name, mIncoming.device->address() + offset);
        }
        for (auto const& [name, tensor] : reads)
        {
            bind(name, tensor.address);
        }
        for (auto const& each : plan.outputs)
        {
            auto const held = plan.outgoing.offsets.find(each.first);
            bind(each.first, held == plan.outgoing.offsets.end() ? writes.at(each.first).address
                                                                 : mOutgoing.device->address() + held->second);
        }
        execute();
        mContextShapes = plan.shapes;
    }

    void bind(std::string const& name, CUdeviceptr address)
    {
        if (!mContext->setTensorAddress(name.c_str(), reinterpret_cast<void*>(address)))
        {
            throw failed(textOf("it refused the address ", address, " of ", name));
        }
    }

    void execute()
    {
        if (!mContext->enqueueV3(mStream.get()))
        {
            throw failed("enqueueing failed");
        }
    }

    //! Records the pass that was just run, for the next one of its key. Its answer is already fetched. A pass that
    //! cannot be recorded stays without a graph, and is counted.
    void capture(GraphKey const& key, Plan plan)
    {
        auto replay = std::make_unique<Replay>();
        try
        {
            replay->graph = std::make_unique<CudaGraph>(mDriver, mStream.get(), [this] { execute(); });
        }
        catch (Error const&)
        {
            mGraphs.refuse(key);
            mDriver.streamSynchronize(mStream.get());
            return;
        }
        replay->plan = std::move(plan);
        mGraphs.keep(key, std::move(replay));
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
        setShapes(replay.plan.shapes);
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
        return Error(Failure::kENGINE, "TensorRT " + mTensorRt.version() + " could not run the engine",
            what + "\n    " + mTensorRt.logger().tail(), "rebuild the engine on this machine");
    }

    TensorRt& mTensorRt;
    Driver const& mDriver;
    std::shared_ptr<Engine> mEngine;
    Stream mStream;
    DeviceTimer mTimer;
    // In this order, so that the context goes before the engine.
    std::unique_ptr<nvinfer1::IExecutionContext, detail::DeleteObject> mContext;
    Staging mIncoming;
    Staging mOutgoing;
    GraphBuckets<Replay> mGraphs;
    //! Of the last pass that the context itself enqueued; empty while they are being changed.
    std::map<std::string, Shape> mContextShapes;
    bool mIsEveryGraphBound{false};
    bool mIsRefused{false}; //!< the graph of the pass that runs gave another answer
};

} // namespace hstu::loader

#endif // HSTU_LOADER_SESSION_HPP
