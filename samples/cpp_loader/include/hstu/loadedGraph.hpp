#ifndef HSTU_LOADER_LOADED_GRAPH_HPP
#define HSTU_LOADER_LOADED_GRAPH_HPP

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "driver.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "manifest.hpp"
#include "tensor.hpp"
#include "tensorRt.hpp"

//! A graph of a bundle, loaded: what sessions share of it, and what each session runs by itself.
namespace hstu::loader
{

//! What enqueues the passes of one session. The CUDA context is current in every function, on one thread at a time.
class GraphRunner
{
public:
    GraphRunner() = default;
    virtual ~GraphRunner() = default;
    GraphRunner(GraphRunner const&) = delete;
    GraphRunner& operator=(GraphRunner const&) = delete;

    //! Sets the shape of every input. \return the shape of every output.
    virtual Shapes inferred(Shapes const& shapes) = 0;

    //! \return device memory that a pass of these shapes needs between its inputs and its outputs.
    virtual std::size_t scratchBytes() const = 0;

    //! Sets where inputs, outputs and what lies between them are, for the shapes that are set.
    //! \param scratch of at least `scratchBytes`.
    virtual void bind(Addresses const& addresses, CUdeviceptr scratch) = 0;

    //! Puts a pass on a stream: nothing is allocated, decided or waited for.
    virtual void enqueue(CUstream stream) = 0;

    //! \return why a pass of these shapes cannot be recorded; empty if TensorRT sees no reason.
    virtual std::string unrecordable(CUstream stream) const = 0;
};

//! A graph whose inputs and outputs are those of the manifest. What sessions share; it outlives their runners.
class LoadedGraph
{
public:
    LoadedGraph() = default;
    virtual ~LoadedGraph() = default;
    LoadedGraph(LoadedGraph const&) = delete;
    LoadedGraph& operator=(LoadedGraph const&) = delete;

    //! \return what one session runs.
    virtual std::unique_ptr<GraphRunner> runner(TensorRt& tensorRt, Driver const& driver) const = 0;

    std::vector<EngineTensor> inputs;
    std::vector<EngineTensor> outputs;

protected:
    //! Refuses a graph whose inputs or outputs are not those of the manifest.
    //! \param file that they were found in.
    void checkEnds(GraphEntry const& graph, std::string const& file) const
    {
        checkNames(inputs, graph.inputs, file, "inputs");
        checkNames(outputs, graph.outputs, file, "outputs");
    }

private:
    static void checkNames(std::vector<EngineTensor> const& found, std::vector<TensorSpec> const& wanted,
        std::string const& file, char const* kind)
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
            throw Error(Failure::kBUNDLE, "the " + std::string(kind) + " of " + file + " are not the manifest's",
                problems.substr(0, problems.size() - 2), "build the bundle again");
        }
    }
};

//! A graph in one engine.
class Engine final : public LoadedGraph
{
public:
    //! Whether contexts may share an engine.
    static constexpr bool kIS_SHARED = HSTU_LOADER_HAS_TENSORRT10 != 0;

    //! Checks what the bundle says of the engine, then deserialises it. The plugin library is loaded.
    static std::shared_ptr<Engine> open(
        TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        return typed("opening an engine",
            [&]
            {
                Compatibility::check(tensorRt, driver, bundle, graph);
                std::shared_ptr<Engine> engine(new Engine);
                engine->mHasTf32 = bundle.manifest().precision != "fp32";
                Tf32Override const tf32(kIS_RTX && !engine->mHasTf32);
                engine->mEngine = std::make_unique<LoadedEngine>(tensorRt, driver, bundle, graph.engineFile);
                engine->inputs = engine->mEngine->inputs;
                engine->outputs = engine->mEngine->outputs;
                engine->checkEnds(graph, graph.engineFile);
                return engine;
            });
    }

    std::unique_ptr<GraphRunner> runner(TensorRt& tensorRt, Driver const& driver) const override;

private:
    Engine() = default;

    std::unique_ptr<LoadedEngine> mEngine;
    bool mHasTf32{true};
};

//! One execution context of an engine, with memory of its own where the caller has to bring it.
class EngineRunner final : public GraphRunner
{
public:
    EngineRunner(TensorRt& tensorRt, Driver const& driver, LoadedEngine const& engine)
        : mContext(tensorRt, engine)
    {
        if (std::size_t const bytes = engine.activationBytes())
        {
            mActivations = std::make_unique<DeviceMemory>(driver, bytes);
            mContext.computeIn(mActivations->address(), bytes);
        }
    }

    Shapes inferred(Shapes const& shapes) override
    {
        return mContext.inferred(shapes);
    }

    std::size_t scratchBytes() const override
    {
        return 0;
    }

    void bind(Addresses const& addresses, CUdeviceptr) override
    {
        mContext.bind(addresses);
    }

    void enqueue(CUstream stream) override
    {
        mContext.enqueue(stream);
    }

    std::string unrecordable(CUstream stream) const override
    {
        return mContext.isCapturable(stream) ? "" : "TensorRT says that the engine cannot be recorded on a stream";
    }

private:
    // In this order, so that the context goes before the memory that it computes in.
    std::unique_ptr<DeviceMemory> mActivations;
    EngineContext mContext;
};

inline std::unique_ptr<GraphRunner> Engine::runner(TensorRt& tensorRt, Driver const& driver) const
{
    Tf32Override const tf32(kIS_RTX && !mHasTf32);
    return std::make_unique<EngineRunner>(tensorRt, driver, *mEngine);
}

} // namespace hstu::loader

#endif // HSTU_LOADER_LOADED_GRAPH_HPP
