#ifndef HSTU_LOADER_TENSOR_RT_HPP
#define HSTU_LOADER_TENSOR_RT_HPP

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include <NvInferRuntime.h>

#include "error.hpp"
#include "file.hpp"
#include "manifest.hpp"

//! Which TensorRT the headers are of. TensorRT-RTX counts its versions from 1. Its interface is TensorRT 10's by name, but
//! not by the order of its virtual functions: headers of the one and a library of the other call functions of other
//! names. So a program serves one of the two, the one whose headers it is compiled with.
#if NV_TENSORRT_MAJOR < 8
#define HSTU_LOADER_IS_RTX 1
#if NV_TENSORRT_MAJOR == 1 && NV_TENSORRT_MINOR < 3
#error "TensorRT-RTX 1.3 or newer is needed: older ones cannot be told to leave CUDA graphs to their caller"
#endif
#else
#define HSTU_LOADER_IS_RTX 0
#endif
//! Interfaces of TensorRT 10: int64 and bfloat16, engines that contexts share.
#define HSTU_LOADER_HAS_TENSORRT10 (HSTU_LOADER_IS_RTX || NV_TENSORRT_MAJOR >= 10)

//! TensorRT's runtime library, found at run time by its soname, and plugin libraries.
namespace hstu::loader
{

//! What the headers are of.
static constexpr bool kIS_RTX = HSTU_LOADER_IS_RTX != 0;
//! In manifests.
static constexpr char const* kBACKEND = kIS_RTX ? "tensorrt-rtx" : "tensorrt";
//! For people.
static constexpr char const* kBACKEND_NAME = kIS_RTX ? "TensorRT-RTX" : "TensorRT";

//! Keeps the last messages of TensorRT, which say why a call failed. Thread-safe.
class Logger final : public nvinfer1::ILogger
{
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override
    {
        if (severity > Severity::kWARNING)
        {
            return;
        }
        try
        {
            std::lock_guard<std::mutex> const lock(mMutex);
            mLines.push_back(std::string(severity <= Severity::kERROR ? "[ERROR] " : "[WARNING] ")
                             + (message != nullptr ? message : ""));
            if (mLines.size() > kMOST_LINES)
            {
                mLines.pop_front();
            }
        }
        catch (...)
        {
            // A message that cannot be kept is no reason to end the process.
            return;
        }
    }

    //! \return the messages so far, errors or else warnings.
    std::string tail() const
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        for (char const* const kind : {"[ERROR]", "[WARNING]"})
        {
            std::string text;
            for (std::string const& line : mLines)
            {
                text += line.rfind(kind, 0) == 0 ? (text.empty() ? "" : "\n    ") + line : "";
            }
            if (!text.empty())
            {
                return text;
            }
        }
        return "(TensorRT logged nothing)";
    }

    //! Forgets the messages so far, so that `tail` speaks of what comes next.
    void clear()
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        mLines.clear();
    }

private:
    static constexpr std::size_t kMOST_LINES = 40;

    mutable std::mutex mMutex;
    std::deque<std::string> mLines;
};

//! Holds NVIDIA_TF32_OVERRIDE at 0 while an engine without TF32 is loaded. TensorRT-RTX 1.6.1 heeds this variable alone,
//! and refuses an engine that is loaded under another value than it was built with. The environment belongs to the
//! process: nobody else may read or write it meanwhile.
class Tf32Override
{
public:
    //! \param isOff of a float32 engine; false leaves the environment alone.
    explicit Tf32Override(bool isOff)
        : mLock(mutex())
        , mIsOff(isOff)
    {
        char const* const before = std::getenv(kVARIABLE);
        mHadValue = before != nullptr;
        mBefore = mHadValue ? before : "";
        if (mIsOff)
        {
            setenv(kVARIABLE, "0", 1);
        }
    }

    ~Tf32Override()
    {
        if (!mIsOff)
        {
            return;
        }
        mHadValue ? setenv(kVARIABLE, mBefore.c_str(), 1) : unsetenv(kVARIABLE);
    }

    Tf32Override(Tf32Override const&) = delete;
    Tf32Override& operator=(Tf32Override const&) = delete;

private:
    static constexpr char const* kVARIABLE = "NVIDIA_TF32_OVERRIDE";

    static std::mutex& mutex()
    {
        static std::mutex only;
        return only;
    }

    std::lock_guard<std::mutex> const mLock;
    bool mIsOff;
    bool mHadValue{false};
    std::string mBefore;
};

//! A TensorRT runtime. Headers and library must be of one major version: their interfaces differ.
class TensorRt
{
public:
    //! \param library path or name; empty takes the soname of the headers' major version.
    explicit TensorRt(std::string const& library)
    {
        typed("loading TensorRT", [&] { open(library); });
    }

    TensorRt(TensorRt const&) = delete;
    TensorRt& operator=(TensorRt const&) = delete;

    //! \return version of the library, "8.5.3".
    std::string const& version() const noexcept
    {
        return mVersion;
    }

    //! \return "TensorRT-RTX 1.6.1".
    std::string name() const
    {
        return kBACKEND_NAME + (" " + mVersion);
    }

    nvinfer1::IRuntime& runtime() noexcept
    {
        return *mRuntime;
    }

    Logger& logger() noexcept
    {
        return *mLogger;
    }

    //! Loads a plugin library and sees that it registered what the model needs. A library that registers itself needs
    //! no more than dlopen. It is never unloaded: the registry points into it.
    void loadPlugin(std::string const& path, Manifest const& manifest)
    {
        typed("loading a plugin library",
            [&]
            {
                if (kIS_RTX)
                {
                    throw Error(Failure::kUSAGE, "TensorRT-RTX takes no plugins", path + " was given",
                        "leave the plugin out");
                }
                if (!hasCreator(manifest))
                {
                    // RTLD_LOCAL would do for this library; others look symbols of TensorRT up among the global ones.
                    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
                    {
                        char const* const why = dlerror();
                        throw Error(Failure::kENGINE, "the plugin library " + path + " cannot be loaded",
                            why != nullptr ? why : "dlopen failed",
                            "build it for TensorRT " + mVersion + " with `hstu-compile plugin build`");
                    }
                }
                if (!hasCreator(manifest))
                {
                    throw Error(Failure::kENGINE,
                        "the plugin library " + path + " did not register the model's operator",
                        "the registry of TensorRT " + mVersion + " has no creator of name '" + manifest.operatorName
                            + "', version '" + manifest.operatorVersion + "', namespace '" + manifest.operatorNamespace
                            + "'",
                        "build it for this TensorRT with `hstu-compile plugin build`, and pass the self-registering "
                        "library "
                            + std::string(kPLUGIN_FILE));
                }
            });
    }

private:
    struct DeleteRuntime
    {
        void operator()(nvinfer1::IRuntime* runtime) const
        {
            delete runtime;
        }
    };

    void open(std::string const& library)
    {
        std::string const soname =
            std::string(kIS_RTX ? "libtensorrt_rtx" : "libnvinfer") + ".so." + std::to_string(NV_TENSORRT_MAJOR);
        std::string const path = library.empty() ? soname : library;
        // Global, because a self-registering plugin takes getPluginRegistry from whoever has loaded it.
        void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (handle == nullptr)
        {
            char const* const why = dlerror();
            throw Error(Failure::kENGINE, std::string(kBACKEND_NAME) + " cannot be loaded",
                why != nullptr ? why : path + ": dlopen failed",
                textOf("install ", kBACKEND_NAME, " ", NV_TENSORRT_MAJOR, " and put its folder of ", soname,
                    " into LD_LIBRARY_PATH, or name the library with --tensorrt-library"));
        }
        auto const getVersion = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
        auto const create = reinterpret_cast<void* (*)(void*, int32_t)>(dlsym(handle, "createInferRuntime_INTERNAL"));
        mGetRegistry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(handle, "getPluginRegistry"));
        if (getVersion == nullptr || create == nullptr || mGetRegistry == nullptr)
        {
            throw Error(Failure::kENGINE, path + " is not TensorRT's runtime",
                "it lacks getInferLibVersion, createInferRuntime_INTERNAL or getPluginRegistry",
                textOf("name ", soname, " of ", kBACKEND_NAME, " ", NV_TENSORRT_MAJOR));
        }
        // 8503 is 8.5.3; from TensorRT 10 on, and in TensorRT-RTX, two digits per part: 101401 is 10.14.1.
        int32_t const number = getVersion();
        int32_t const major = number < 10000 ? number / 1000 : number / 10000;
        mVersion = textOf(major, ".", number / 100 % (number < 10000 ? 10 : 100), ".", number % 100);
        if (major != NV_TENSORRT_MAJOR)
        {
            throw Error(Failure::kENGINE, textOf(path, " is ", major < 8 ? "TensorRT-RTX " : "TensorRT ", mVersion),
                textOf("this program was compiled with headers of ", kBACKEND_NAME, " ", NV_TENSORRT_MAJOR,
                    ", whose interfaces differ"),
                textOf("compile it with HSTU_TENSORRT_INCLUDE_DIR of that version, or install ", kBACKEND_NAME, " ",
                    NV_TENSORRT_MAJOR));
        }
        mRuntime.reset(
            static_cast<nvinfer1::IRuntime*>(create(static_cast<nvinfer1::ILogger*>(mLogger), NV_TENSORRT_VERSION)));
        if (!mRuntime)
        {
            throw Error(Failure::kENGINE, name() + " does not start", mLogger->tail(),
                "check that the driver is new enough for this TensorRT");
        }
    }

    bool hasCreator(Manifest const& manifest) const
    {
        nvinfer1::IPluginRegistry* const registry = mGetRegistry();
        if (registry == nullptr)
        {
            return false;
        }
        char const* const name = manifest.operatorName.c_str();
        char const* const version = manifest.operatorVersion.c_str();
        char const* const space = manifest.operatorNamespace.c_str();
#if HSTU_LOADER_HAS_TENSORRT10
        return registry->getCreator(name, version, space) != nullptr;
#else
        return registry->getPluginCreator(name, version, space) != nullptr;
#endif
    }

    nvinfer1::IPluginRegistry* (*mGetRegistry)(){};
    std::string mVersion;
    Logger* mLogger{sharedLogger()};
    std::unique_ptr<nvinfer1::IRuntime, DeleteRuntime> mRuntime;

    //! TensorRT keeps the first logger that it is given for the life of the process; this one is never freed.
    static Logger* sharedLogger()
    {
        static Logger* const kLOGGER = new Logger;
        return kLOGGER;
    }
};

} // namespace hstu::loader

#endif // HSTU_LOADER_TENSOR_RT_HPP
