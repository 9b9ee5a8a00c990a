#ifndef HSTU_LOADER_ENGINE_HPP
#define HSTU_LOADER_ENGINE_HPP

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

#include "driver.hpp"
#include "error.hpp"
#include "manifest.hpp"
#include "tensor.hpp"
#include "tensorRt.hpp"

//! A deserialised engine, and an execution context of it.
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
#if HSTU_LOADER_HAS_TENSORRT10
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

using Shapes = std::map<std::string, Shape>;
using Addresses = std::map<std::string, CUdeviceptr>;

//! An input or output of an engine, or of engines with kernels between them.
struct EngineTensor
{
    std::string name;
    ElementType type{ElementType::kFLOAT32};
    Shape least; //!< inputs: smallest shape of profile 0
    Shape most;  //!< inputs: largest shape of profile 0
};

//! Refuses a bundle whose engines this program, this TensorRT or this GPU cannot run, saying which of them.
class Compatibility
{
public:
    //! Needs neither TensorRT nor a GPU.
    static void checkBackend(Bundle const& bundle, GraphEntry const& graph)
    {
        std::string const& backend = bundle.manifest().backend;
        bool const isInSegments = !graph.scheduleFile.empty();
        if ((backend == "tensorrt" || backend == "tensorrt-rtx") && backend != kBACKEND)
        {
            throw Error(Failure::kENGINE, textOf(bundle.folder(), " is for another TensorRT than this program"),
                textOf("its engines are for the backend ", backend, isInSegments ? ", in segments" : "",
                    ", and this program was compiled with headers of ", kBACKEND_NAME, " ", NV_TENSORRT_MAJOR, ".",
                    NV_TENSORRT_MINOR, ", which loads none of those"),
                textOf("compile hstu_score with HSTU_TENSORRT_INCLUDE_DIR of ",
                    kIS_RTX ? "TensorRT" : "TensorRT-RTX (its SDK has them, its Python wheel has not)"));
        }
        if (backend != kBACKEND || (graph.engineFile.empty() && !isInSegments))
        {
            throw Error(Failure::kBUNDLE,
                textOf(bundle.folder(), " has no ", kBACKEND_NAME, " engine of the graph ", graph.name),
                "it was built with the backend " + backend,
                kIS_RTX ? "build it with engines: `hstu-compile build CKPT --attention fused`"
                        : "build it where TensorRT is installed: `hstu-compile build CKPT --backend tensorrt`");
        }
        if (isInSegments && !kIS_RTX)
        {
            throw Error(Failure::kBUNDLE, textOf("the graph ", graph.name, " of ", bundle.folder(), " is in segments"),
                "segments are for TensorRT-RTX, and the manifest names the backend " + backend,
                "build the bundle again");
        }
    }

    static void check(TensorRt const& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
    {
        checkBackend(bundle, graph);
        std::string const& file = graph.engineFile.empty() ? graph.scheduleFile : graph.engineFile;
        bundle.fileEntry(file);
        Manifest const& manifest = bundle.manifest();
        // An engine loads in the version that built it, to the patch; a fourth number says which build of that.
        std::string const& built = manifest.backendVersion;
        std::string const& found = tensorRt.version();
        if (built != found && built.rfind(found + ".", 0) != 0)
        {
            throw Error(Failure::kENGINE, textOf("the engine ", file, " is for another ", kBACKEND_NAME),
                "it was built by " + (built.empty() ? "an unknown version" : built) + ", and " + found + " is loaded",
                textOf("install ", kBACKEND_NAME, " ", built, ", or rebuild the engine with ", found));
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
            throw Error(Failure::kENGINE, "the engine " + file + " is for another GPU",
                "it was built for compute capability " + list + ", and " + driver.deviceName() + " has " + here,
                "rebuild it on this GPU, or run it on one of those");
        }
    }
};

//! An engine as TensorRT deserialised it. Contexts of several streams share it from TensorRT 10 on; in TensorRT 8 a
//! profile belongs to one context.
class LoadedEngine
{
public:
    //! Reads and loads an engine that the bundle vouches for. The plugin library is loaded.
    LoadedEngine(TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, std::string const& file)
        : mFile(file)
    {
        Bytes const plan = bundle.readVouched(file, kMOST_ENGINE_BYTES);
        driver.makeCurrent();
        tensorRt.logger().clear();
        mEngine.reset(tensorRt.runtime().deserializeCudaEngine(plan.data(), plan.size()));
        if (!mEngine)
        {
            throw Error(Failure::kENGINE, tensorRt.name() + " cannot load " + file, tensorRt.logger().tail(),
                kIS_RTX ? "rebuild the engines on this machine: `hstu-compile engine model.onnx --attention fused`"
                        : "if a plugin is missing, pass --plugin; else rebuild the engine on this machine: "
                          "`hstu-compile engine model.onnx`");
        }
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
    }

    LoadedEngine(LoadedEngine const&) = delete;
    LoadedEngine& operator=(LoadedEngine const&) = delete;

    nvinfer1::ICudaEngine& get() const noexcept
    {
        return *mEngine;
    }

    std::string const& file() const noexcept
    {
        return mFile;
    }

    //! \return device memory that a pass of any legal shapes computes in, where the caller has to bring it; else 0.
    std::size_t activationBytes() const
    {
#if HSTU_LOADER_IS_RTX
        return static_cast<std::size_t>(std::max(mEngine->getDeviceMemorySizeV2(), int64_t{0}));
#else
        return 0;
#endif
    }

    //! \return an input or output; null if there is none of that name.
    EngineTensor const* find(std::string const& name) const
    {
        for (std::vector<EngineTensor> const* side : {&inputs, &outputs})
        {
            for (EngineTensor const& each : *side)
            {
                if (each.name == name)
                {
                    return &each;
                }
            }
        }
        return nullptr;
    }

    std::vector<EngineTensor> inputs;
    std::vector<EngineTensor> outputs;

private:
    static constexpr uint64_t kMOST_ENGINE_BYTES = 64ULL << 30;

    std::string mFile;
    std::unique_ptr<nvinfer1::ICudaEngine, detail::DeleteObject> mEngine;
};

//! One execution context. The CUDA context is current in every function.
class EngineContext
{
public:
    //! \param engine outlives this.
    EngineContext(TensorRt& tensorRt, LoadedEngine const& engine)
        : mTensorRt(tensorRt)
        , mEngine(engine)
    {
        mTensorRt.logger().clear();
#if HSTU_LOADER_IS_RTX
        // Nothing changes once a shape has run: LAZY, the default, compiles kernels of new shapes on a thread of its own
        // and runs them in some later pass, while a recorded graph stays with the slower ones and answers change in
        // their last bits. The engine's own CUDA graphs are off, because whole passes are recorded.
        mConfig.reset(mEngine.get().createRuntimeConfig());
        if (mConfig)
        {
            mConfig->setDynamicShapesKernelSpecializationStrategy(
                nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
            mConfig->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED);
            mConfig->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
            mContext.reset(mEngine.get().createExecutionContext(mConfig.get()));
        }
#else
        mContext.reset(mEngine.get().createExecutionContext());
#endif
        if (!mContext || mContext->getOptimizationProfile() < 0)
        {
            throw Error(Failure::kENGINE, "TensorRT cannot create an execution context", mTensorRt.logger().tail(),
                "free GPU memory, use fewer --streams, or rebuild with a smaller --max-batch");
        }
    }

    EngineContext(EngineContext const&) = delete;
    EngineContext& operator=(EngineContext const&) = delete;

    //! Computes in this memory from now on, of at least the engine's `activationBytes`; other engines may use it while
    //! this one does not run.
    void computeIn(CUdeviceptr address, std::size_t bytes)
    {
        mActivations = address;
        mActivationBytes = bytes;
    }

    //! Sets the shape of every input. \return the shape of every output.
    Shapes inferred(Shapes const& shapes)
    {
        for (EngineTensor const& input : mEngine.inputs)
        {
            Shape const& shape = shapes.at(input.name);
            if (!mContext->setInputShape(input.name.c_str(), detail::dimsOf(shape)))
            {
                throw failed("it refused " + input.name + " of shape " + textOfShape(shape));
            }
        }
        Shapes found;
        for (EngineTensor const& output : mEngine.outputs)
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

    //! Sets the address of every input and output; the shapes are set. Other names are left alone.
    void bind(Addresses const& addresses)
    {
#if HSTU_LOADER_IS_RTX
        if (mActivations != 0)
        {
            // After the shapes: the context divides its memory anew for them.
            mContext->updateDeviceMemorySizeForShapes();
            mContext->setDeviceMemoryV2(reinterpret_cast<void*>(mActivations), static_cast<int64_t>(mActivationBytes));
        }
#endif
        for (std::vector<EngineTensor> const* side : {&mEngine.inputs, &mEngine.outputs})
        {
            for (EngineTensor const& each : *side)
            {
                CUdeviceptr const address = addresses.at(each.name);
                if (!mContext->setTensorAddress(each.name.c_str(), reinterpret_cast<void*>(address)))
                {
                    throw failed(textOf("it refused the address ", address, " of ", each.name));
                }
            }
        }
    }

    void enqueue(CUstream stream)
    {
        if (!mContext->enqueueV3(stream))
        {
            throw failed("enqueueing failed");
        }
    }

    //! \return whether TensorRT lets a pass of these shapes be recorded; it says so in TensorRT-RTX alone.
    bool isCapturable(CUstream stream) const
    {
#if HSTU_LOADER_IS_RTX
        return mContext->isStreamCapturable(stream);
#else
        static_cast<void>(stream);
        return true;
#endif
    }

private:
    Error failed(std::string const& what) const
    {
        return Error(Failure::kENGINE, mTensorRt.name() + " could not run the engine " + mEngine.file(),
            what + "\n    " + mTensorRt.logger().tail(), "rebuild the engine on this machine");
    }

    TensorRt& mTensorRt;
    LoadedEngine const& mEngine;
#if HSTU_LOADER_IS_RTX
    // In this order, so that the context goes before what it was made from.
    std::unique_ptr<nvinfer1::IRuntimeConfig, detail::DeleteObject> mConfig;
#endif
    std::unique_ptr<nvinfer1::IExecutionContext, detail::DeleteObject> mContext;
    CUdeviceptr mActivations{};
    std::size_t mActivationBytes{0};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_ENGINE_HPP
