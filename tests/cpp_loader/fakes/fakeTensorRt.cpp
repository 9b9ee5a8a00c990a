//! A libnvinfer without a GPU: it loads engine files that fake_bundle.py writes and computes fakeModel.h on the fake
//! driver's streams. Built against the headers of TensorRT 8.5 and of 10, whose virtual functions it really implements;
//! what the loader has no business to call ends the process (stubs.inc, made from the headers).
//!
//! What it copies from the real one: profiles, one context per profile in TensorRT 8, a copy of host memory in every
//! pass (the shapes), which a recorded graph must not read once the context has other shapes.
//!
//! Of TensorRT-RTX it has more: a context computes in memory that its caller brings after the shapes are set, with the
//! settings that keep its answers, and an engine may be a segment of a model (fakeSegments.h).
//!
//! Environment: HSTU_FAKE_TENSORRT_VERSION=8601 another version; HSTU_FAKE_LEAK=N bytes per pass stay allocated;
//! HSTU_FAKE_FLIP=N every Nth pass computes one wrong bit; HSTU_FAKE_NO_CAPTURE=1 enqueueing fails while recording;
//! HSTU_FAKE_UNCAPTURABLE=1 TensorRT-RTX says so before; HSTU_FAKE_TRACE=FILE a line for every engine that is enqueued.

#include <atomic>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string>

#include <NvInferRuntime.h>

#include "fakeDriver.h"
#include "fakeModel.h"
#include "fakeSegments.h"
#include "fakeTrace.h"

//! TensorRT-RTX counts from 1.
#define HSTU_FAKE_RTX (NV_TENSORRT_MAJOR < 8)
#define HSTU_FAKE_TENSORRT10 (HSTU_FAKE_RTX || NV_TENSORRT_MAJOR >= 10)

#include "stubs.inc"

namespace
{

using nvinfer1::apiv::ContextStub;
using nvinfer1::apiv::EngineStub;
using nvinfer1::apiv::RuntimeStub;

std::set<std::vector<std::string>> gPlugins;
std::atomic<int64_t> gPasses{0};

int64_t numberIn(char const* variable, int64_t otherwise)
{
    char const* const text = std::getenv(variable);
    return text != nullptr ? std::atoll(text) : otherwise;
}

bool isTf32Off()
{
    char const* const text = std::getenv("NVIDIA_TF32_OVERRIDE");
    return text != nullptr && std::string(text) == "0";
}

nvinfer1::Dims dimsOf(std::vector<int64_t> const& shape)
{
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i)
    {
        dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[i]);
    }
    return dims;
}

#if HSTU_FAKE_RTX
class RuntimeConfig final : public nvinfer1::IRuntimeConfig, public nvinfer1::apiv::RuntimeConfigStub
{
public:
    RuntimeConfig()
    {
        mImpl = this;
    }

    void setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override
    {
        hasUsersMemory = strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
    }

    void setDynamicShapesKernelSpecializationStrategy(
        nvinfer1::DynamicShapesKernelSpecializationStrategy strategy) noexcept override
    {
        isEager = strategy == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER;
    }

    bool setCudaGraphStrategy(nvinfer1::CudaGraphStrategy strategy) noexcept override
    {
        hasNoGraphs = strategy == nvinfer1::CudaGraphStrategy::kDISABLED;
        return true;
    }

    bool hasUsersMemory{false};
    bool isEager{false};
    bool hasNoGraphs{false};
};
#endif

class Context;

class Engine final : public nvinfer1::ICudaEngine, public EngineStub
{
public:
    explicit Engine(fake::Engine content)
        : content(std::move(content))
    {
        mImpl = this;
    }

#if HSTU_FAKE_TENSORRT10
    nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy) noexcept override;
#else
    nvinfer1::IExecutionContext* createExecutionContext() noexcept override;
#endif
#if HSTU_FAKE_RTX
    nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override
    {
        return new RuntimeConfig;
    }

    nvinfer1::IExecutionContext* createExecutionContextWithRuntimeConfig(
        nvinfer1::IRuntimeConfig* config) noexcept override;

    int64_t getDeviceMemorySizeV2() const noexcept override
    {
        // Segments differ, and what they share has to be enough for the largest.
        return 1000 + 3000 * (content.sizes.count("segment") > 0 ? content.sizes.at("segment") % 2 : 0);
    }
#endif

    int32_t getNbIOTensors() const noexcept override
    {
        return static_cast<int32_t>(content.io.size());
    }

    char const* getIOTensorName(int32_t index) const noexcept override
    {
        return content.io[static_cast<size_t>(index)].name.c_str();
    }

    nvinfer1::DataType getTensorDataType(char const* name) const noexcept override
    {
        std::string const& type = find(name).type;
#if HSTU_FAKE_TENSORRT10
        if (type == "int64")
        {
            return nvinfer1::DataType::kINT64;
        }
#endif
        return type == "float32" ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kINT32;
    }

    nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        return find(name).isInput ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    }

    nvinfer1::Dims getProfileShape(
        char const* name, int32_t, nvinfer1::OptProfileSelector select) const noexcept override
    {
        return dimsOf(select == nvinfer1::OptProfileSelector::kMIN ? find(name).least : find(name).most);
    }

    fake::Io const& find(std::string const& name) const
    {
        for (fake::Io const& each : content.io)
        {
            if (each.name == name)
            {
                return each;
            }
        }
        nvinfer1::apiv::unexpected(name.c_str());
    }

    fake::Engine content;
    int numContexts{0};
};

class Context final : public nvinfer1::IExecutionContext, public ContextStub
{
public:
    Context(Engine& engine, int32_t profile)
        : mEngine(engine)
        , mProfile(profile)
    {
        mImpl = this;
        cuMemAlloc(&mShapeOnDevice, sizeof(int64_t));
        cuMemAlloc(&mScratch, 1 << 20);
    }

    ~Context() override
    {
        cuMemFree(mShapeOnDevice);
        cuMemFree(mScratch);
        --mEngine.numContexts;
    }

    int32_t getOptimizationProfile() const noexcept override
    {
        return mProfile;
    }

    bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override
    {
        std::vector<int64_t> const shape(dims.d, dims.d + dims.nbDims);
        fake::Io const& io = mEngine.find(name);
        for (size_t i = 0; i < shape.size(); ++i)
        {
            if (shape.size() != io.least.size() || shape[i] < io.least[i] || shape[i] > io.most[i])
            {
                return false;
            }
        }
        if (mShapes[name] != shape)
        {
            mActivations = nullptr;
        }
        mShapes[name] = shape;
        mShapeOnHost = checksum();
        return true;
    }

#if HSTU_FAKE_RTX
    size_t updateDeviceMemorySizeForShapes() noexcept override
    {
        mActivations = nullptr;
        return static_cast<size_t>(mEngine.getDeviceMemorySizeV2());
    }

    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override
    {
        mActivations = size >= mEngine.getDeviceMemorySizeV2() ? memory : nullptr;
    }

    bool isStreamCapturable(cudaStream_t) const noexcept override
    {
        return numberIn("HSTU_FAKE_UNCAPTURABLE", 0) == 0;
    }
#endif

    nvinfer1::Dims getTensorShape(char const* name) const noexcept override
    {
        return dimsOf(shapeOf(name));
    }

    bool setTensorAddress(char const* name, void* data) noexcept override
    {
        mAddresses[name] = data;
        return reinterpret_cast<uintptr_t>(data) % 256 == 0;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override
    {
        auto const cuStream = reinterpret_cast<CUstream>(stream);
        if (hstuFakeIsCapturing(cuStream) && numberIn("HSTU_FAKE_NO_CAPTURE", 0) != 0)
        {
            return false;
        }
        size_t activationBytes = 0;
#if HSTU_FAKE_RTX
        activationBytes = static_cast<size_t>(mEngine.getDeviceMemorySizeV2());
        if (mActivations == nullptr || isTf32Off())
        {
            // A real one would compute in memory of other shapes. The variable is for loading alone.
            return false;
        }
#endif
        fake::Tensors tensors;
        fake::Trace trace("segment " + std::to_string(mEngine.content.segment()));
        for (fake::Io const& io : mEngine.content.io)
        {
            tensors[io.name] = {shapeOf(io.name), io.type, mAddresses.at(io.name)};
            trace.add(io.name, mAddresses.at(io.name));
        }
        CUdeviceptr leaked = 0;
        if (int64_t const bytes = numberIn("HSTU_FAKE_LEAK", 0))
        {
            cuMemAlloc(&leaked, static_cast<size_t>(bytes));
        }
        // As TensorRT does with shapes that layers use as numbers.
        cuMemcpyHtoDAsync(mShapeOnDevice, &mShapeOnHost, sizeof(mShapeOnHost), cuStream);
        fake::Engine const& engine = mEngine.content;
        auto const* const onDevice = reinterpret_cast<uint64_t const*>(mShapeOnDevice);
        uint64_t const expected = checksum();
        void* const activations = mActivations;
        std::function<void()> const work = [tensors, &engine, onDevice, expected, activations, activationBytes]
        {
            if (activationBytes > 0)
            {
                std::memset(activations, 0xAB, activationBytes);
            }
            fake::runSegment(engine, tensors);
            int64_t const flip = numberIn("HSTU_FAKE_FLIP", 0);
            bool const isFlipped = flip > 0 && ++gPasses % flip == 0;
            for (fake::Io const& io : engine.io)
            {
                if (!io.isInput && (*onDevice != expected || isFlipped))
                {
                    static_cast<unsigned char*>(tensors.at(io.name).data)[0] ^= 1U;
                }
            }
        };
        return hstuFakeLaunch(cuStream, &work);
    }

private:
    std::vector<int64_t> const& input(std::string const& name) const
    {
        return mShapes.at(name);
    }

    std::vector<int64_t> shapeOf(std::string const& name) const
    {
        fake::Engine const& engine = mEngine.content;
        bool const isMain = engine.stage == "first" && name == engine.nameOf("main");
        if (!isMain && mEngine.find(name).isInput)
        {
            return input(name);
        }
        static fake::Io const kNONE{};
        fake::Io const& io = isMain ? kNONE : mEngine.find(name);
        if (engine.isCrossing(name) || engine.stage == "last")
        {
            // What a segment makes has the rows of what came in, or of what the model would make.
            std::vector<int64_t> shape{engine.stage == "first" ? shapeOf(engine.nameOf("main"))[0]
                                                               : input(engine.nameOf("normed"))[0]};
            shape.insert(shape.end(), io.least.begin(), io.least.end());
            return shape;
        }
        if (engine.model == "retrieval")
        {
            return {input("seq_offsets")[0] - 1, engine.sizes.at("width")};
        }
        if (engine.model == "prefill")
        {
            int64_t const rows =
                input(engine.nameOf("history_time"))[0] + (input("seq_offsets")[0] - 1) * engine.sizes.at("context");
            return {rows, engine.sizes.at("heads"), engine.sizes.at(name[0] == 'k' ? "attention_dim" : "linear_dim")};
        }
        return {input(engine.nameOf("candidate_time"))[0], engine.sizes.at("tasks")};
    }

    uint64_t checksum() const
    {
        uint64_t sum = 17;
        for (auto const& [name, shape] : mShapes)
        {
            for (int64_t const size : shape)
            {
                sum = sum * 31 + static_cast<uint64_t>(size);
            }
        }
        return sum;
    }

    Engine& mEngine;
    int32_t mProfile;
    std::map<std::string, std::vector<int64_t>> mShapes;
    std::map<std::string, void*> mAddresses;
    uint64_t mShapeOnHost{0};
    void* mActivations{nullptr}; //!< null until they are set for the shapes
    CUdeviceptr mShapeOnDevice{};
    CUdeviceptr mScratch{};
};

#if HSTU_FAKE_RTX
nvinfer1::IExecutionContext* Engine::createExecutionContextWithRuntimeConfig(
    nvinfer1::IRuntimeConfig* config) noexcept
{
    auto const& given = *static_cast<RuntimeConfig*>(config);
    if (!given.isEager || !given.hasNoGraphs || !given.hasUsersMemory)
    {
        nvinfer1::apiv::unexpected("context whose answers change while it runs");
    }
    return new Context(*this, 0);
}
#endif

#if HSTU_FAKE_TENSORRT10
nvinfer1::IExecutionContext* Engine::createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy) noexcept
{
    return new Context(*this, numContexts++ * 0);
}
#else
nvinfer1::IExecutionContext* Engine::createExecutionContext() noexcept
{
    // The first context takes the profile; another has none until one is free.
    return new Context(*this, numContexts++ == 0 ? 0 : -1);
}
#endif

class Runtime final : public nvinfer1::IRuntime, public RuntimeStub
{
public:
    explicit Runtime(nvinfer1::ILogger* logger)
        : mLogger(logger)
    {
        mImpl = this;
    }

#if HSTU_FAKE_TENSORRT10
    nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
#else
    nvinfer1::ICudaEngine* deserializeCudaEngine(
        void const* blob, std::size_t size, nvinfer1::IPluginFactory*) noexcept override
#endif
    {
        std::istringstream lines(std::string(static_cast<char const*>(blob), size));
        std::string line;
        std::getline(lines, line);
        if (line != "hstu-fake-engine")
        {
            return refuse("the engine file is not one that this library serialized");
        }
        fake::Engine engine;
        while (std::getline(lines, line))
        {
            readLine(engine, line);
        }
        if (engine.version != getInferLibVersion())
        {
            return refuse("the engine was serialized by another version");
        }
        if (HSTU_FAKE_RTX && engine.sizes["tf32"] != (isTf32Off() ? 0 : 1))
        {
            return refuse("the engine was serialized with another value of NVIDIA_TF32_OVERRIDE");
        }
        if (!engine.plugin.empty() && gPlugins.count(engine.plugin) == 0)
        {
            return refuse("could not find plugin: HstuAttention version: 1");
        }
        return new Engine(std::move(engine));
    }

private:
    nvinfer1::ICudaEngine* refuse(char const* why)
    {
        mLogger->log(nvinfer1::ILogger::Severity::kERROR, why);
        return nullptr;
    }

    static void readLine(fake::Engine& engine, std::string const& line)
    {
        std::istringstream words(line);
        std::string kind;
        std::string first;
        words >> kind >> first;
        if (kind == "version")
        {
            engine.version = std::stoll(first);
        }
        else if (kind == "model")
        {
            engine.model = first;
        }
        else if (kind == "stage")
        {
            engine.stage = first;
        }
        else if (kind == "plugin")
        {
            engine.plugin = {first};
            for (std::string word; words >> word;)
            {
                engine.plugin.push_back(word);
            }
        }
        else if (kind == "name")
        {
            words >> engine.names[first];
        }
        else if (kind == "size")
        {
            words >> engine.sizes[first];
        }
        else if (kind == "in" || kind == "out")
        {
            fake::Io io;
            io.name = first;
            io.isInput = kind == "in";
            words >> io.type;
            for (int64_t least = 0, most = 0; words >> least >> most;)
            {
                io.least.push_back(least);
                io.most.push_back(most);
            }
            engine.io.push_back(io);
        }
    }

    nvinfer1::ILogger* mLogger;
};

class Registry final : public nvinfer1::RegistryStub
{
public:
#if HSTU_FAKE_TENSORRT10
    nvinfer1::IPluginCreatorInterface* getCreator(nvinfer1::AsciiChar const* name, nvinfer1::AsciiChar const* version,
        nvinfer1::AsciiChar const* space) noexcept override
    {
        return has(name, version, space) ? reinterpret_cast<nvinfer1::IPluginCreatorInterface*>(this) : nullptr;
    }
#else
    nvinfer1::IPluginCreator* getPluginCreator(nvinfer1::AsciiChar const* const name,
        nvinfer1::AsciiChar const* const version, nvinfer1::AsciiChar const* const space) noexcept override
    {
        return has(name, version, space) ? reinterpret_cast<nvinfer1::IPluginCreator*>(this) : nullptr;
    }
#endif

private:
    static bool has(char const* name, char const* version, char const* space)
    {
        return gPlugins.count({name, version, space}) > 0;
    }
};

} // namespace

extern "C"
{

    //! What the constructor of a plugin library calls here.
    void hstuFakeRegister(char const* name, char const* version, char const* space)
    {
        gPlugins.insert({name, version, space});
    }

    int32_t getInferLibVersion() noexcept
    {
        int32_t const step = HSTU_FAKE_TENSORRT10 ? 100 : 10;
        return static_cast<int32_t>(numberIn("HSTU_FAKE_TENSORRT_VERSION",
            NV_TENSORRT_MAJOR * (step == 100 ? 10000 : 1000) + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH));
    }

    void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept
    {
        return static_cast<nvinfer1::IRuntime*>(new Runtime(static_cast<nvinfer1::ILogger*>(logger)));
    }

    nvinfer1::IPluginRegistry* getPluginRegistry() noexcept
    {
        static Registry registry;
        return &registry;
    }

} // extern "C"
