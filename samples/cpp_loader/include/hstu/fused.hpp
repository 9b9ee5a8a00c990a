#ifndef HSTU_LOADER_FUSED_HPP
#define HSTU_LOADER_FUSED_HPP

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bufferPlan.hpp"
#include "driver.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "kernelLibrary.hpp"
#include "loadedGraph.hpp"
#include "manifest.hpp"
#include "schedule.hpp"
#include "tensor.hpp"
#include "tensorRt.hpp"

//! A graph that was cut at its attentions: engine, kernels, engine, ... on one stream. For TensorRT-RTX, which takes no
//! plugins; `hstu-compile build --attention fused` makes such bundles.
namespace hstu::loader
{

//! Engines, kernels and constants of a graph in segments.
class FusedGraph final : public LoadedGraph
{
public:
    //! Checks what the bundle says of the graph, then loads schedule, engines and the kernels' library.
    static std::shared_ptr<FusedGraph> open(
        TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        return typed("opening a graph in segments",
            [&]
            {
                Compatibility::check(tensorRt, driver, bundle, graph);
                std::shared_ptr<FusedGraph> fused(new FusedGraph);
                fused->load(tensorRt, driver, bundle, graph);
                return fused;
            });
    }

    std::unique_ptr<GraphRunner> runner(TensorRt& tensorRt, Driver const& driver) const override;

    Schedule const& schedule() const noexcept
    {
        return mSchedule;
    }

    KernelLibrary const& kernels() const noexcept
    {
        return *mKernels;
    }

private:
    friend class FusedRunner;

    static constexpr uint64_t kMOST_SCHEDULE_BYTES = 1ULL << 30;
    static constexpr uint64_t kMOST_LIBRARY_BYTES = 4ULL << 30;

    FusedGraph() = default;

    void load(TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        Bytes const text = bundle.readVouched(graph.scheduleFile, kMOST_SCHEDULE_BYTES);
        mSchedule = scheduleFromJson(reinterpret_cast<char const*>(text.data()), text.size(), graph.scheduleFile);
        if (mSchedule.numSegments != graph.segmentFiles.size())
        {
            throw mismatch(graph,
                textOf("it has ", mSchedule.numSegments, " segments, and the manifest names ",
                    graph.segmentFiles.size(), " engines"));
        }
        mHasTf32 = bundle.manifest().precision != "fp32";
        Tf32Override const tf32(kIS_RTX && !mHasTf32);
        for (std::string const& file : graph.segmentFiles)
        {
            mEngines.push_back(std::make_unique<LoadedEngine>(tensorRt, driver, bundle, file));
        }
        checkEngines(graph);
        describe(graph);
        // Read again right before it is loaded: what runs is what was hashed.
        std::string const& library = bundle.manifest().kernelsFile;
        bundle.readVouched(library, kMOST_LIBRARY_BYTES);
        mKernels = std::make_shared<KernelLibrary const>(bundle.pathOf(library));
        uploadConstants(driver);
    }

    static Error mismatch(GraphEntry const& graph, std::string const& why)
    {
        return Error(Failure::kBUNDLE, "the engines of the graph " + graph.name + " are not those of its schedule", why,
            "use the engines and the schedule of one bundle, or build it again");
    }

    //! Refuses engines of another schedule before one of them writes where it should not.
    void checkEngines(GraphEntry const& graph) const
    {
        std::string problems;
        std::set<std::string> present;
        for (TensorSpec const& input : mSchedule.inputs)
        {
            present.insert(input.name);
        }
        for (std::size_t number = 0; number < mSchedule.steps.size(); ++number)
        {
            ScheduleStep const& step = mSchedule.steps[number];
            if (step.isKernel)
            {
                present.insert(mSchedule.calls[step.index].output);
                continue;
            }
            LoadedEngine const& engine = *mEngines[step.index];
            for (EngineTensor const& input : engine.inputs)
            {
                CrossingTensor const* const crossing = mSchedule.findCrossing(input.name);
                bool const isAlive = crossing == nullptr || (crossing->first < number && number <= crossing->last);
                problems += present.count(input.name) > 0 && isAlive
                                ? typeProblem(engine, input)
                                : engine.file() + " reads " + input.name + ", which is not there then; ";
            }
            for (EngineTensor const& output : engine.outputs)
            {
                CrossingTensor const* const crossing = mSchedule.findCrossing(output.name);
                problems += crossing != nullptr && crossing->first == number
                                ? typeProblem(engine, output)
                                : engine.file() + " makes " + output.name + ", which nothing waits for there; ";
                present.insert(output.name);
            }
        }
        for (CrossingTensor const& each : mSchedule.crossing)
        {
            problems += present.count(each.spec.name) > 0 ? "" : "nothing makes " + each.spec.name + "; ";
        }
        if (!problems.empty())
        {
            throw mismatch(graph, problems.substr(0, problems.size() - 2));
        }
    }

    std::string typeProblem(LoadedEngine const& engine, EngineTensor const& tensor) const
    {
        ElementType const wanted = mSchedule.findSpec(tensor.name)->type;
        return wanted == tensor.type ? ""
                                     : textOf(engine.file(), " has ", tensor.name, " as ", factsOf(tensor.type).name,
                                           ", not ", factsOf(wanted).name, "; ");
    }

    void describe(GraphEntry const& graph)
    {
        for (TensorSpec const& spec : mSchedule.inputs)
        {
            EngineTensor tensor;
            tensor.name = spec.name;
            tensor.type = spec.type;
            // What kernels alone read has no profile.
            for (int64_t const size : fixedShape(spec.dims))
            {
                tensor.least.push_back(size < 0 ? 1 : size);
                tensor.most.push_back(size < 0 ? INT32_MAX : size);
            }
            for (std::unique_ptr<LoadedEngine> const& engine : mEngines)
            {
                narrow(tensor, *engine);
            }
            inputs.push_back(std::move(tensor));
        }
        for (TensorSpec const& spec : mSchedule.outputs)
        {
            EngineTensor tensor;
            tensor.name = spec.name;
            tensor.type = spec.type;
            outputs.push_back(std::move(tensor));
        }
        checkEnds(graph, graph.scheduleFile);
    }

    //! An input takes what every engine that reads it takes.
    static void narrow(EngineTensor& tensor, LoadedEngine const& engine)
    {
        EngineTensor const* const own = engine.find(tensor.name);
        if (own == nullptr)
        {
            return;
        }
        if (own->least.size() != tensor.least.size())
        {
            throw Error(Failure::kBUNDLE, engine.file() + " is not of its schedule",
                textOf(tensor.name, " has rank ", own->least.size(), " there, not ", tensor.least.size()),
                "build the bundle again");
        }
        for (std::size_t i = 0; i < tensor.least.size(); ++i)
        {
            tensor.least[i] = std::max(tensor.least[i], own->least[i]);
            tensor.most[i] = std::min(tensor.most[i], own->most[i]);
        }
    }

    void uploadConstants(Driver const& driver)
    {
        for (auto const& [name, tensor] : mSchedule.constants)
        {
            mConstantPlaces.add(name, tensor.bytes.size());
        }
        if (mConstantPlaces.bytes == 0)
        {
            return;
        }
        mConstants = std::make_unique<DeviceMemory>(driver, mConstantPlaces.bytes);
        Stream const stream(driver);
        for (auto const& [name, tensor] : mSchedule.constants)
        {
            if (!tensor.bytes.empty())
            {
                driver.check(driver.memcpyHtoDAsync(mConstants->address() + mConstantPlaces.offsets.at(name),
                                 tensor.bytes.data(), tensor.bytes.size(), stream.get()),
                    "cuMemcpyHtoDAsync");
            }
        }
        stream.synchronize();
    }

    Schedule mSchedule;
    std::vector<std::unique_ptr<LoadedEngine>> mEngines;
    std::shared_ptr<KernelLibrary const> mKernels;
    Layout mConstantPlaces;
    std::unique_ptr<DeviceMemory> mConstants;
    bool mHasTf32{true};
};

//! Contexts and kernels of one session. The engines share the memory that they compute in, since one runs at a time;
//! what crosses lies in the session's scratch memory, by a plan for each set of shapes.
class FusedRunner final : public GraphRunner
{
public:
    //! \param graph outlives this.
    FusedRunner(TensorRt& tensorRt, Driver const& driver, FusedGraph const& graph)
        : mGraph(graph)
        , mSchedule(graph.mSchedule)
    {
        std::size_t activations = 0;
        for (std::unique_ptr<LoadedEngine> const& engine : mGraph.mEngines)
        {
            activations = std::max(activations, engine->activationBytes());
        }
        if (activations > 0)
        {
            mActivations = std::make_unique<DeviceMemory>(driver, activations);
        }
        for (std::unique_ptr<LoadedEngine> const& engine : mGraph.mEngines)
        {
            mContexts.push_back(std::make_unique<EngineContext>(tensorRt, *engine));
            if (mActivations)
            {
                mContexts.back()->computeIn(mActivations->address(), mActivations->bytes());
            }
        }
        for (KernelCall const& call : mSchedule.calls)
        {
            mCalls.push_back(std::make_unique<PreparedCall>(mGraph.mKernels, call, mSchedule));
            Shape row = fixedShape(mSchedule.findSpec(call.output)->dims);
            row.erase(row.begin());
            mRows.push_back(std::move(row));
        }
    }

    Shapes inferred(Shapes const& shapes) override
    {
        mShapes = shapes;
        for (auto const& [name, tensor] : mSchedule.constants)
        {
            mShapes[name] = tensor.shape;
        }
        for (ScheduleStep const& step : mSchedule.steps)
        {
            if (!step.isKernel)
            {
                for (auto& [name, shape] : mContexts[step.index]->inferred(mShapes))
                {
                    mShapes[name] = shape;
                }
                continue;
            }
            KernelCall const& call = mSchedule.calls[step.index];
            Shape made{mShapes.at(call.inputs.at(call.facts->rows)).at(0)};
            made.insert(made.end(), mRows[step.index].begin(), mRows[step.index].end());
            mShapes[call.output] = std::move(made);
        }
        mArena = plannedArena();
        Shapes found;
        for (EngineTensor const& output : mGraph.outputs)
        {
            found[output.name] = mShapes.at(output.name);
        }
        return found;
    }

    std::size_t scratchBytes() const override
    {
        return mArena.places.bytes;
    }

    void bind(Addresses const& addresses, CUdeviceptr scratch) override
    {
        Addresses places = addresses;
        for (auto const& [name, offset] : mGraph.mConstantPlaces.offsets)
        {
            places[name] = mGraph.mConstants->address() + offset;
        }
        for (auto const& [name, offset] : mArena.places.offsets)
        {
            places[name] = scratch + offset;
        }
        for (std::unique_ptr<EngineContext> const& context : mContexts)
        {
            context->bind(places);
        }
        for (std::size_t i = 0; i < mCalls.size(); ++i)
        {
            KernelCall const& call = mSchedule.calls[i];
            std::map<std::string, PlacedTensor> inputs;
            for (auto const& [name, tensor] : call.inputs)
            {
                inputs[name] = placed(call, name, tensor, places.at(tensor));
            }
            auto const workspace = places.find(workspaceName(i));
            mCalls[i]->bind(inputs, {places.at(call.output), mShapes.at(call.output), 0},
                workspace == places.end() ? 0 : workspace->second, mArena.workspaces[i]);
        }
    }

    void enqueue(CUstream stream) override
    {
        for (ScheduleStep const& step : mSchedule.steps)
        {
            step.isKernel ? mCalls[step.index]->enqueue(stream) : mContexts[step.index]->enqueue(stream);
        }
    }

    std::string unrecordable(CUstream stream) const override
    {
        std::string stuck;
        for (std::size_t i = 0; i < mContexts.size(); ++i)
        {
            stuck += mContexts[i]->isCapturable(stream) ? "" : (stuck.empty() ? "" : ", ") + std::to_string(i);
        }
        return stuck.empty() ? "" : "TensorRT says that segment " + stuck + " cannot be recorded on a stream";
    }

private:
    //! Plans that are remembered, the least recently used goes first.
    static constexpr std::size_t kREMEMBERED_PLANS = 256;

    //! Where what crosses lies, and the workspace of every call.
    struct Arena
    {
        Layout places;
        std::vector<std::size_t> workspaces;
    };

    struct Remembered
    {
        Arena arena;
        std::list<Shapes>::iterator place;
    };

    //! No value of a graph has a newline in its name.
    static std::string workspaceName(std::size_t call)
    {
        return "\nworkspace " + std::to_string(call);
    }

    PlacedTensor placed(
        KernelCall const& call, std::string const& name, std::string const& tensor, CUdeviceptr address) const
    {
        PlacedTensor made{address, viewedShape(call, name, mShapes.at(tensor)), 0};
        auto const view = call.views.find(name);
        if (view != call.views.end())
        {
            std::size_t const width = factsOf(mSchedule.findSpec(tensor)->type).bytes;
            made.address += static_cast<std::size_t>(view->second.column) * width;
            made.rowStride = view->second.rowStride;
        }
        return made;
    }

    //! \return the plan of the shapes that are set, which was made when they first came.
    Arena plannedArena()
    {
        Shapes key;
        for (EngineTensor const& input : mGraph.inputs)
        {
            key[input.name] = mShapes.at(input.name);
        }
        auto const known = mRemembered.find(key);
        if (known != mRemembered.end())
        {
            mOrder.splice(mOrder.end(), mOrder, known->second.place);
            return known->second.arena;
        }
        std::vector<Lifetime> lives;
        for (CrossingTensor const& each : mSchedule.crossing)
        {
            if (!mSchedule.isOutput(each.spec.name))
            {
                std::size_t const bytes = bytesOf(mShapes.at(each.spec.name), each.spec.type);
                lives.push_back({each.spec.name, bytes, each.first, each.last});
            }
        }
        Arena arena;
        for (std::size_t number = 0; number < mSchedule.steps.size(); ++number)
        {
            ScheduleStep const& step = mSchedule.steps[number];
            if (step.isKernel)
            {
                arena.workspaces.push_back(mCalls[step.index]->workspaceBytes(mShapes));
                if (arena.workspaces.back() > 0)
                {
                    lives.push_back({workspaceName(step.index), arena.workspaces.back(), number, number});
                }
            }
        }
        arena.places = plannedBuffers(lives);
        while (mRemembered.size() >= kREMEMBERED_PLANS)
        {
            mRemembered.erase(mOrder.front());
            mOrder.pop_front();
        }
        mOrder.push_back(key);
        mRemembered[key] = {arena, std::prev(mOrder.end())};
        return arena;
    }

    FusedGraph const& mGraph;
    Schedule const& mSchedule;
    // In this order, so that the contexts go before the memory that they compute in.
    std::unique_ptr<DeviceMemory> mActivations;
    std::vector<std::unique_ptr<EngineContext>> mContexts;
    std::vector<std::unique_ptr<PreparedCall>> mCalls;
    std::vector<Shape> mRows; //!< sizes of a row of what each call makes
    Shapes mShapes;           //!< of every tensor, for the inputs that the contexts are set to
    Arena mArena;             //!< for the same
    std::map<Shapes, Remembered> mRemembered;
    std::list<Shapes> mOrder; //!< least recently used first
};

inline std::unique_ptr<GraphRunner> FusedGraph::runner(TensorRt& tensorRt, Driver const& driver) const
{
    return typed("loading kernels and contexts",
        [&]() -> std::unique_ptr<GraphRunner>
        {
            Tf32Override const tf32(kIS_RTX && !mHasTf32);
            driver.makeCurrent();
            return std::make_unique<FusedRunner>(tensorRt, driver, *this);
        });
}

//! Opens a graph of a bundle, in one engine or in segments, as its manifest says.
inline std::shared_ptr<LoadedGraph> openGraph(
    TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
{
    if (graph.scheduleFile.empty())
    {
        return Engine::open(tensorRt, driver, bundle, graph);
    }
    return FusedGraph::open(tensorRt, driver, bundle, graph);
}

} // namespace hstu::loader

#endif // HSTU_LOADER_FUSED_HPP
