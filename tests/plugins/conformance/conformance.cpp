//! Plays TensorRT's part for libhstu_trt_plugin_vc.so: calls every method of the IPluginV3 interfaces in the documented
//! order, then runs the kernels on a GPU and compares with the float64 oracle.
//!
//! Usage: conformance LIBRARY CASES_DIR [--host-only] [--filter SUBSTRING] [--repeat N] [--require-tactic ID]...
//! A required tactic must have passed at least once, so that a library without it does not pass by having nothing to run.
//! Prints one JSON object a line per check and "N passed, N failed"; exit code 0 if all passed, 1 if not, 2 on bad
//! usage.

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "caseFile.h"
#include "compare.h"
#include "device.h"
#include "tensorRtHost.h"

namespace
{

using nvinfer1::DataType;

struct Options
{
    std::string library;
    std::string cases;
    std::string filter;
    bool hostOnly{false};
    int repeat{20};
    std::set<int32_t> requiredTactics;
};

//! The tactic of the Hopper kernel, and behind it those of its fixed splits, which the library takes but does not offer.
constexpr int32_t kHopperTactic = 64;
constexpr int32_t kSplits[] = {1, 2, 4, 8};

//! Counts and prints results.
class Report
{
public:
    void add(std::string const& name, std::string const& type, std::string const& mode, bool passed,
        std::string const& facts)
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        (passed ? mPassed : mFailed) += 1;
        std::printf("{\"case\": \"%s\", \"dtype\": \"%s\", \"mode\": \"%s\", \"status\": \"%s\"%s%s}\n", name.c_str(),
            type.c_str(), mode.c_str(), passed ? "pass" : "FAIL", facts.empty() ? "" : ", ", facts.c_str());
        std::fflush(stdout);
    }

    int finish() const
    {
        std::printf("%d passed, %d failed\n", mPassed, mFailed);
        return mFailed == 0 && mPassed > 0 ? 0 : 1;
    }

private:
    std::mutex mMutex;
    int mPassed{0};
    int mFailed{0};
};

std::string quoted(std::string const& text)
{
    std::string out = "\"";
    for (char const c : text)
    {
        out += c == '"' || c == '\\' ? std::string("\\") + c : c == '\n' ? std::string("\\n") : std::string(1, c);
    }
    return out + "\"";
}

//! A JSON list.
std::string listed(std::vector<int32_t> const& numbers)
{
    std::string text;
    for (int32_t const number : numbers)
    {
        text += (text.empty() ? "" : ", ") + std::to_string(number);
    }
    return "[" + text + "]";
}

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        throw std::runtime_error(what);
    }
}

DataType dataTypeOf(std::string const& type)
{
    return type == "float16"    ? DataType::kHALF
           : type == "bfloat16" ? DataType::kBF16
           : type == "int32"    ? DataType::kINT32
           : type == "int64"    ? DataType::kINT64
                                : DataType::kFLOAT;
}

size_t bytesOf(std::string const& type)
{
    return type == "int64" ? 8 : type == "float16" || type == "bfloat16" ? 2 : 4;
}

nvinfer1::PluginTensorDesc descOf(std::string const& type, std::vector<int64_t> const& dims)
{
    nvinfer1::PluginTensorDesc desc{};
    desc.type = dataTypeOf(type);
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.dims.nbDims = static_cast<int32_t>(dims.size());
    for (size_t i = 0; i < dims.size(); ++i)
    {
        desc.dims.d[i] = dims[i];
    }
    return desc;
}

constexpr char const* kNorm = "HstuNorm";

//! Whether the first axis is one that varies between calls: tokens or sequences.
bool isRagged(std::string const& name)
{
    static std::set<std::string> const fixed{"pos_table", "ts_table", "ts_thresholds", "shift", "scale", "bias"};
    return fixed.count(name) == 0;
}

//! Whether a kernel reads the input in vectors.
bool isVector(std::string const& name)
{
    static std::set<std::string> const vectors{"q", "k", "v", "k_cached", "v_cached", "x", "gate"};
    return vectors.count(name) > 0;
}

//! Descriptions of a case's tensors, inputs first, as TensorRT passes them.
struct Descs
{
    explicit Descs(Case const& testCase)
    {
        for (CaseTensor const& input : testCase.inputs)
        {
            add(input.type, input.dims, isRagged(input.name));
        }
        add(testCase.outputType, testCase.outputDims, true);
    }

    int32_t nbInputs() const
    {
        return static_cast<int32_t>(fixed.size()) - 1;
    }

    std::vector<nvinfer1::PluginTensorDesc> fixed;
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic;

private:
    void add(std::string const& type, std::vector<int64_t> const& dims, bool ragged)
    {
        nvinfer1::PluginTensorDesc const desc = descOf(type, dims);
        fixed.push_back(desc);
        nvinfer1::DynamicPluginTensorDesc range{};
        range.desc = desc;
        range.min = range.opt = range.max = desc.dims;
        if (ragged)
        {
            range.desc.dims.d[0] = -1;
            range.min.d[0] = 0;
            range.max.d[0] = 4 * desc.dims.d[0] + 1;
        }
        dynamic.push_back(range);
    }
};

host::FieldStore fieldsOf(Case const& testCase)
{
    host::FieldStore store;
    for (CaseAttribute const& attribute : testCase.attributes)
    {
        void const* const data =
            attribute.isFloat ? static_cast<void const*>(&attribute.floatValue) : &attribute.intValue;
        auto const type = attribute.isFloat ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
        store.add(attribute.name, type, data, 1, 4);
    }
    return store;
}

class Library
{
public:
    Library(std::string const& path, host::LoggerFinder& finder)
    {
        mHandle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        require(mHandle != nullptr, std::string("dlopen: ") + (mHandle == nullptr ? dlerror() : ""));
        auto const setFinder = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(mHandle, "setLoggerFinder"));
        auto const getCreators =
            reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(mHandle, "getCreators"));
        require(setFinder != nullptr && getCreators != nullptr,
            "the library does not export setLoggerFinder and getCreators");
        setFinder(&finder);
        int32_t count = 0;
        nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
        require(count == 2, "getCreators gave " + std::to_string(count) + " creators");
        for (int32_t i = 0; i < count; ++i)
        {
            nvinfer1::InterfaceInfo const info = creators[i]->getInterfaceInfo();
            require(std::string(info.kind) == "PLUGIN CREATOR_V3ONE", std::string("creator interface is ") + info.kind);
            auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
            mCreators[creator->getPluginName()] = creator;
        }
    }

    //! \return the creator of an operator, by its name.
    nvinfer1::IPluginCreatorV3One& creator(std::string const& op) const
    {
        auto const found = mCreators.find(op);
        require(found != mCreators.end(), "the library has no creator of " + op);
        return *found->second;
    }

private:
    void* mHandle{};
    std::map<std::string, nvinfer1::IPluginCreatorV3One*> mCreators;
};

//! Everything the builder asks of a plugin object. \return the tactics it offers.
std::vector<int32_t> checkBuildPhase(host::Plugin& plugin, nvinfer1::IPluginCreatorV3One& creator, Case const& testCase)
{
    using nvinfer1::PluginCapabilityType;
    require(plugin.core != nullptr && plugin.build != nullptr && plugin.runtime != nullptr, "a capability is missing");
    require(plugin.object->getCapabilityInterface(static_cast<PluginCapabilityType>(99)) == nullptr,
        "an unknown capability is not null");
    require(std::string(plugin.core->getPluginName()) == creator.getPluginName(), "name differs from the creator's");
    require(std::string(plugin.core->getPluginVersion()) == creator.getPluginVersion(),
        "version differs from the creator's");
    require(std::string(plugin.core->getPluginNamespace()) == creator.getPluginNamespace(),
        "namespace differs from the creator's");
    require(plugin.build->getNbOutputs() == 1, "one output expected");

    Descs const descs(testCase);
    int32_t const nbInputs = descs.nbInputs();
    std::vector<DataType> inputTypes;
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        inputTypes.push_back(descs.fixed[static_cast<size_t>(i)].type);
    }
    DataType outputType = DataType::kBOOL;
    require(plugin.build->getOutputDataTypes(&outputType, 1, inputTypes.data(), nbInputs) == 0,
        "getOutputDataTypes failed");
    require(outputType == dataTypeOf(testCase.outputType), "output type is not the one of the case");
    require(plugin.build->getOutputDataTypes(&outputType, 1, inputTypes.data(), nbInputs - 1) != 0,
        "a missing input is not refused");

    host::ExprBuilder expressions;
    std::vector<nvinfer1::DimsExprs> inputDims(static_cast<size_t>(nbInputs));
    for (size_t i = 0; i < inputDims.size(); ++i)
    {
        inputDims[i].nbDims = descs.dynamic[i].desc.dims.nbDims;
        for (int32_t axis = 0; axis < inputDims[i].nbDims; ++axis)
        {
            inputDims[i].d[axis] = expressions.constant(descs.dynamic[i].desc.dims.d[axis]);
        }
    }
    nvinfer1::DimsExprs outputDims{};
    require(plugin.build->getOutputShapes(inputDims.data(), nbInputs, nullptr, 0, &outputDims, 1, expressions) == 0,
        "getOutputShapes failed");
    require(outputDims.nbDims == static_cast<int32_t>(testCase.outputDims.size()) && outputDims.d[0] == inputDims[0].d[0],
        "output shape has another rank or other rows");
    if (testCase.op == kNorm)
    {
        require(outputDims.d[1]->getConstantValue() == testCase.outputDims[1], "output has other columns");
    }
    else
    {
        require(outputDims.d[1] == inputDims[0].d[1] && outputDims.d[2] == inputDims[2].d[2],
            "output shape is not [Lq, H, Dv]");
    }

    require(plugin.build->getFormatCombinationLimit() > 0, "format combination limit");
    std::vector<nvinfer1::DynamicPluginTensorDesc> inOut = descs.dynamic;
    for (int32_t pos = 0; pos <= nbInputs; ++pos)
    {
        size_t const index = static_cast<size_t>(pos);
        require(plugin.build->supportsFormatCombination(pos, inOut.data(), nbInputs, 1),
            "the case's types are refused at position " + std::to_string(pos));
        nvinfer1::DynamicPluginTensorDesc const original = inOut[index];
        inOut[index].desc.format = nvinfer1::TensorFormat::kCHW32;
        require(!plugin.build->supportsFormatCombination(pos, inOut.data(), nbInputs, 1),
            "a vectorised format is accepted");
        inOut[index] = original;
        inOut[index].desc.type = DataType::kINT8;
        require(!plugin.build->supportsFormatCombination(pos, inOut.data(), nbInputs, 1),
            "int8 is accepted at position " + std::to_string(pos));
        inOut[index] = original;
    }
    require(plugin.build->configurePlugin(descs.dynamic.data(), nbInputs, &descs.dynamic.back(), 1) == 0,
        "configurePlugin failed");
    require(plugin.build->getWorkspaceSize(descs.dynamic.data(), nbInputs, &descs.dynamic.back(), 1) == 0,
        "workspace is not 0");
    std::vector<int32_t> tactics(static_cast<size_t>(plugin.build->getNbTactics()));
    require(!tactics.empty(), "no tactics");
    require(plugin.build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) == 0,
        "getValidTactics failed");
    require(std::set<int32_t>(tactics.begin(), tactics.end()).size() == tactics.size(), "tactics repeat");
    for (int32_t const tactic : tactics)
    {
        require(tactic > 0, "tactic 0 is reserved");
    }
    char const* const timingId = plugin.build->getTimingCacheID();
    require(timingId != nullptr && std::string(timingId).find("kernels=") != std::string::npos,
        "timing cache id lacks the kernels' id");
    char const* const metadata = plugin.build->getMetadataString();
    require(metadata != nullptr && std::string(metadata).find(testCase.attributes[0].name) != std::string::npos,
        "metadata lacks the attributes");
    require(plugin.build->getAliasedInput(0) == -1, "out claims to alias an input");
    return tactics;
}

//! What one enqueue needs: the case's tensors on the device.
class Call
{
public:
    Call(Case const& testCase, size_t misalignment)
        : mCase(testCase)
        , mDescs(testCase)
        , mOutput(testCase.reference.size() * bytesOf(testCase.outputType), misalignment)
    {
        for (CaseTensor const& input : testCase.inputs)
        {
            mInputs.emplace_back(input.bytes, isVector(input.name) ? misalignment : 0);
        }
        device::synchronize();
        for (device::Buffer const& buffer : mInputs)
        {
            mPointers.push_back(buffer.data());
        }
    }

    void shapeChange(host::Plugin& plugin) const
    {
        require(plugin.runtime->onShapeChange(mDescs.fixed.data(), mDescs.nbInputs(), &mDescs.fixed.back(), 1) == 0,
            "onShapeChange failed");
    }

    int32_t enqueue(host::Plugin& plugin, device::Stream const& stream) const
    {
        void* outputs[] = {mOutput.data()};
        return plugin.runtime->enqueue(
            mDescs.fixed.data(), &mDescs.fixed.back(), mPointers.data(), outputs, nullptr, stream.get());
    }

    void poison()
    {
        mOutput.poison();
    }

    std::vector<unsigned char> output() const
    {
        return mOutput.download();
    }

    //! \return JSON facts; throws when the output or a guard zone is wrong.
    std::string check() const
    {
        OutputError const error = measureError(mCase, mOutput.download());
        std::ostringstream facts;
        facts << "\"componentwise\": " << (std::isfinite(error.componentwise) ? error.componentwise : -1.0)
              << ", \"bound\": " << mCase.componentwiseBound
              << ", \"rms\": " << (std::isfinite(error.rms) ? error.rms : -1.0);
        require(mOutput.areGuardsIntact(), "bytes beside the output were written");
        require(isWithinBounds(mCase, error), "differs from the oracle at " + error.where + " (" + facts.str() + ")");
        return facts.str();
    }

private:
    Case const& mCase;
    Descs mDescs;
    device::Buffer mOutput;
    std::vector<device::Buffer> mInputs;
    std::vector<void const*> mPointers;
};

//! Poisons, runs and checks. \return JSON facts.
std::string runOnce(host::Plugin& plugin, Call& call, device::Stream const& stream)
{
    call.poison();
    require(call.enqueue(plugin, stream) == 0, "enqueue failed");
    stream.synchronize();
    return call.check();
}

//! Runs again, several times in a row as well, and wants the same bits each time.
std::string runRepeatedly(host::Plugin& plugin, Call& call, device::Stream const& stream)
{
    std::string const facts = runOnce(plugin, call, stream);
    std::vector<unsigned char> const first = call.output();
    call.poison();
    constexpr int kLaunches = 3;
    for (int launch = 0; launch < kLaunches; ++launch)
    {
        require(call.enqueue(plugin, stream) == 0, "enqueue failed");
    }
    stream.synchronize();
    require(call.output() == first, "another run gives other bits");
    return facts;
}

std::string runGraph(host::Plugin& plugin, Call& call, device::Stream const& stream)
{
    runOnce(plugin, call, stream); // TensorRT's deferred work comes before a capture
    std::vector<unsigned char> const first = call.output();
    call.poison();
    device::Graph const graph(stream, [&] { require(call.enqueue(plugin, stream) == 0, "enqueue failed in capture"); });
    std::string facts;
    for (int replay = 0; replay < 2; ++replay)
    {
        call.poison();
        graph.launch(stream);
        stream.synchronize();
        facts = call.check();
        require(call.output() == first, "a replay gives other bits");
    }
    return facts;
}

//! \return what the tactics offered for a case leave untested: the Hopper kernel's splits, of which wide heads with a bias
//! have one.
std::vector<int32_t> splitTactics(Case const& testCase, std::vector<int32_t> const& offered)
{
    std::vector<int32_t> tactics;
    if (std::find(offered.begin(), offered.end(), kHopperTactic) != offered.end())
    {
        constexpr int64_t kWidestBiased = 128;
        int64_t const widest = std::max(testCase.inputs[0].dims[2], testCase.outputDims[2]);
        bool const hasBias = std::any_of(testCase.inputs.begin(), testCase.inputs.end(),
            [](CaseTensor const& input) { return input.name == "pos_table" || input.name == "ts_table"; });
        for (int32_t const split : kSplits)
        {
            if (split == 1 || widest <= kWidestBiased || !hasBias)
            {
                tactics.push_back(kHopperTactic + split);
            }
        }
    }
    return tactics;
}

class Conformance
{
public:
    Conformance(Options const& options, std::vector<Case> const& cases)
        : mOptions(options)
        , mCases(cases)
        , mFinder(mLogger)
        , mLibrary(options.library, mFinder)
    {
    }

    int run()
    {
        std::set<std::string> seen;
        for (Case const& testCase : mCases)
        {
            if (seen.insert(testCase.op).second)
            {
                checkFieldNames(testCase);
            }
        }
        std::string reason;
        bool const hasGpu = !mOptions.hostOnly && device::open(reason);
        if (hasGpu)
        {
            std::printf("{\"device\": %s}\n", quoted(device::describe()).c_str());
        }
        else if (!mOptions.hostOnly)
        {
            mReport.add("device", "-", "open", false, "\"error\": " + quoted(reason));
        }
        std::vector<Case const*> selected;
        for (Case const& testCase : mCases)
        {
            if (testCase.name.find(mOptions.filter) != std::string::npos)
            {
                selected.push_back(&testCase);
            }
        }
        for (Case const* const testCase : selected)
        {
            runCase(*testCase, hasGpu);
        }
        for (size_t i = 0; hasGpu && i + 1 < selected.size(); i += 2)
        {
            attempt(*selected[i], "two-threads", [&] { return runTwoThreads(*selected[i], *selected[i + 1]); });
        }
        for (int32_t const tactic : mOptions.requiredTactics)
        {
            mReport.add("all", "-", "required-tactic" + std::to_string(tactic), mPassedTactics.count(tactic) > 0, "");
        }
        return mReport.finish();
    }

private:
    //! \return whether the body passed.
    template <typename Body>
    bool attempt(Case const& testCase, std::string const& mode, Body const& body)
    {
        mLogger.take();
        try
        {
            std::string const facts = body();
            mReport.add(testCase.name, testCase.type, mode, true, facts);
            return true;
        }
        catch (std::exception const& error)
        {
            mReport.add(testCase.name, testCase.type, mode, false,
                "\"error\": " + quoted(error.what()) + ", \"log\": " + quoted(mLogger.take()));
            return false;
        }
    }

    host::Plugin create(std::string const& op, host::FieldStore& fields, nvinfer1::TensorRTPhase phase)
    {
        host::Plugin plugin(mLibrary.creator(op).createPlugin("conformance", fields.collection(), phase));
        require(plugin.object != nullptr, "createPlugin gave nothing");
        return plugin;
    }

    //! What a deserialised engine makes of the built plugin: only the stored bytes pass.
    host::Plugin deserialised(std::string const& op, host::Plugin& built)
    {
        host::FieldStore stored(built.runtime->getFieldsToSerialize());
        host::Plugin loaded = create(op, stored, nvinfer1::TensorRTPhase::kRUNTIME);
        require(host::FieldStore(loaded.runtime->getFieldsToSerialize()) == stored, "fields change over serialisation");
        return loaded;
    }

    //! \param testCase the first of its operator.
    void checkFieldNames(Case const& testCase)
    {
        attempt(testCase, "field-names",
            [&]
            {
                nvinfer1::PluginFieldCollection const* const names = mLibrary.creator(testCase.op).getFieldNames();
                require(
                    static_cast<size_t>(names->nbFields) == testCase.attributes.size(), "number of announced fields");
                for (size_t i = 0; i < testCase.attributes.size(); ++i)
                {
                    require(names->fields[i].name == testCase.attributes[i].name,
                        "field " + testCase.attributes[i].name + " is not announced");
                }
                return std::string();
            });
        attempt(testCase, "refused-field",
            [&]
            {
                host::FieldStore fields = fieldsOf(testCase);
                int32_t const value = 1;
                fields.add("no_such_field", nvinfer1::PluginFieldType::kINT32, &value, 1, 4);
                require(mLibrary.creator(testCase.op).createPlugin(
                            "n", fields.collection(), nvinfer1::TensorRTPhase::kBUILD)
                            == nullptr,
                    "not refused");
                require(mLogger.take().find("no_such_field") != std::string::npos,
                    "the logger was not told the field's name");
                return std::string();
            });
    }

    void runCase(Case const& testCase, bool hasGpu)
    {
        host::FieldStore fields = fieldsOf(testCase);
        std::vector<int32_t> tactics;
        attempt(testCase, "build-phase",
            [&]
            {
                host::Plugin plugin = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
                tactics = checkBuildPhase(plugin, mLibrary.creator(testCase.op), testCase);
                host::Plugin copy(plugin.object->clone());
                require(copy.object != nullptr, "clone gave nothing");
                require(host::FieldStore(copy.runtime->getFieldsToSerialize())
                            == host::FieldStore(plugin.runtime->getFieldsToSerialize()),
                    "the clone's fields differ");
                deserialised(testCase.op, copy);
                return "\"tactics\": " + listed(tactics);
            });
        if (testCase.op == kNorm)
        {
            attempt(testCase, "refused-input", [&] { return refuseInputs(testCase, fields); });
        }
        if (!hasGpu || tactics.empty())
        {
            return;
        }
        // Held to the end of the case, so that its kernels are loaded once: under compute-sanitizer that takes seconds.
        std::optional<host::Plugin> held;
        attempt(testCase, "attach",
            [&]
            {
                held.emplace(attached(testCase, fields));
                return std::string();
            });
        attempt(testCase, "autotune", [&] { return runAutotune(testCase, fields, tactics); });
        std::vector<int32_t> every = tactics;
        for (int32_t const tactic : splitTactics(testCase, tactics))
        {
            every.push_back(tactic);
        }
        for (int32_t const tactic : every)
        {
            std::string const suffix = "-tactic" + std::to_string(tactic);
            bool const ran =
                attempt(testCase, "runtime" + suffix, [&] { return runRuntime(testCase, fields, tactic, false); });
            bool const replayed =
                attempt(testCase, "graph" + suffix, [&] { return runRuntime(testCase, fields, tactic, true); });
            if (ran && replayed)
            {
                mPassedTactics.insert(tactic);
            }
        }
        attempt(testCase, "misaligned", [&] { return runMisaligned(testCase, fields); });
    }

    //! A norm whose tensors do not fit each other is refused while the engine is built, with the tensor's name: a type
    //! that is legal elsewhere, another width, other rows, an output of another width.
    std::string refuseInputs(Case const& testCase, host::FieldStore& fields)
    {
        Descs const legal(testCase);
        int32_t const nbInputs = legal.nbInputs();
        std::string refused;
        host::Plugin undecided = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
        std::vector<nvinfer1::DynamicPluginTensorDesc> unknown = legal.dynamic;
        unknown[0].desc.dims.d[1] = -1;
        require(undecided.build->supportsFormatCombination(nbInputs, unknown.data(), nbInputs, 1),
            "types are refused while a width is not known");
        require(undecided.build->configurePlugin(unknown.data(), nbInputs, &unknown.back(), 1) != 0,
            "a width that is not fixed is accepted");
        for (int32_t pos = 0; pos <= nbInputs; ++pos)
        {
            size_t const index = static_cast<size_t>(pos);
            std::string const name = pos < nbInputs ? testCase.inputs[index].name : "out";
            host::Plugin plugin = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
            std::vector<nvinfer1::DynamicPluginTensorDesc> inOut = legal.dynamic;
            bool const isHalf = inOut[index].desc.type == DataType::kHALF;
            inOut[index].desc.type = isHalf ? DataType::kFLOAT : DataType::kHALF;
            require(!plugin.build->supportsFormatCombination(pos, inOut.data(), nbInputs, 1),
                "another float type is accepted of " + name);
            inOut = legal.dynamic;
            int32_t const last = inOut[index].desc.dims.nbDims - 1;
            inOut[index].desc.dims.d[last] += 1;
            mLogger.take();
            require(plugin.build->configurePlugin(inOut.data(), nbInputs, &inOut.back(), 1) != 0,
                "a width of its own is accepted of " + name);
            require(mLogger.take().find("HstuNorm") != std::string::npos, "the logger was not told of " + name);
            require(!plugin.build->supportsFormatCombination(nbInputs, inOut.data(), nbInputs, 1),
                "a width of its own is supported of " + name);
            refused += (refused.empty() ? "" : " ") + name;
        }
        return "\"refused\": " + quoted(refused);
    }

    //! The builder times a configured clone that was never attached, tactic by tactic.
    std::string runAutotune(Case const& testCase, host::FieldStore& fields, std::vector<int32_t> const& tactics)
    {
        host::Plugin plugin = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
        checkBuildPhase(plugin, mLibrary.creator(testCase.op), testCase);
        host::Plugin timed(plugin.object->clone());
        device::Stream const stream;
        Call call(testCase, 0);
        std::string facts;
        for (int32_t const tactic : tactics)
        {
            require(timed.runtime->setTactic(tactic) == 0, "setTactic failed");
            call.shapeChange(timed);
            facts = runOnce(timed, call, stream);
        }
        require(timed.runtime->setTactic(9999) != 0, "an unknown tactic is accepted");
        return facts;
    }

    //! An execution context of a deserialised engine.
    host::Plugin attached(Case const& testCase, host::FieldStore& fields)
    {
        host::Plugin built = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
        checkBuildPhase(built, mLibrary.creator(testCase.op), testCase);
        host::Plugin context(deserialised(testCase.op, built).runtime->attachToContext(nullptr));
        require(context.object != nullptr, "attachToContext gave nothing");
        return context;
    }

    //! An engine: deserialise, attach to a context, choose the tactic, run.
    std::string runRuntime(Case const& testCase, host::FieldStore& fields, int32_t tactic, bool captured)
    {
        host::Plugin context = attached(testCase, fields);
        require(context.runtime->setTactic(tactic) == 0, "setTactic failed");
        Call call(testCase, 0);
        call.shapeChange(context);
        device::Stream const stream;
        return captured ? runGraph(context, call, stream) : runRepeatedly(context, call, stream);
    }

    //! Pointers that are only element-aligned: computed by an unaligned kernel, or refused by name.
    std::string runMisaligned(Case const& testCase, host::FieldStore& fields)
    {
        host::Plugin context = attached(testCase, fields);
        Call call(testCase, std::max(bytesOf(testCase.type), bytesOf(testCase.outputType)));
        call.shapeChange(context);
        device::Stream const stream;
        call.poison();
        if (call.enqueue(context, stream) != 0)
        {
            require(mLogger.take().find("not 16-byte aligned") != std::string::npos,
                "refused without naming the alignment");
            return "\"refused\": true";
        }
        stream.synchronize();
        return call.check() + ", \"refused\": false";
    }

    //! Two execution contexts on two threads, each with its own stream and its own node.
    std::string runTwoThreads(Case const& first, Case const& second)
    {
        Case const* const cases[] = {&first, &second};
        std::string errors[2];
        std::atomic<int> ready{0};
        auto const work = [&](int index)
        {
            try
            {
                device::makeCurrent();
                Case const& testCase = *cases[index];
                host::FieldStore fields = fieldsOf(testCase);
                host::Plugin built = create(testCase.op, fields, nvinfer1::TensorRTPhase::kBUILD);
                std::vector<int32_t> tactics = checkBuildPhase(built, mLibrary.creator(testCase.op), testCase);
                for (int32_t const tactic : splitTactics(testCase, tactics))
                {
                    tactics.push_back(tactic);
                }
                host::Plugin engine = deserialised(testCase.op, built);
                device::Stream const stream;
                Call call(testCase, 0);
                ready.fetch_add(1);
                while (ready.load() < 2)
                {
                    std::this_thread::yield();
                }
                for (int i = 0; i < mOptions.repeat; ++i)
                {
                    host::Plugin context(engine.runtime->attachToContext(nullptr));
                    require(context.object != nullptr, "attachToContext gave nothing");
                    require(context.runtime->setTactic(tactics[static_cast<size_t>(i) % tactics.size()]) == 0,
                        "setTactic failed");
                    call.shapeChange(context);
                    runOnce(context, call, stream);
                }
            }
            catch (std::exception const& error)
            {
                errors[index] = error.what();
                ready.fetch_add(2);
            }
        };
        std::thread other(work, 1);
        work(0);
        other.join();
        require(errors[0].empty() && errors[1].empty(),
            first.name + ": " + errors[0] + "; " + second.name + ": " + errors[1]);
        return "\"with\": " + quoted(second.name) + ", \"runs\": " + std::to_string(2 * mOptions.repeat);
    }

    Options const& mOptions;
    std::vector<Case> const& mCases;
    host::Logger mLogger;
    host::LoggerFinder mFinder;
    Library mLibrary;
    Report mReport;
    std::set<int32_t> mPassedTactics; //!< in at least one case
};

Options parse(int argc, char** argv)
{
    Options options;
    require(argc >= 3, "two arguments are needed");
    options.library = argv[1];
    options.cases = argv[2];
    for (int i = 3; i < argc; ++i)
    {
        std::string const word = argv[i];
        if (word == "--host-only")
        {
            options.hostOnly = true;
        }
        else if (word == "--filter" && i + 1 < argc)
        {
            options.filter = argv[++i];
        }
        else if (word == "--repeat" && i + 1 < argc)
        {
            options.repeat = std::stoi(argv[++i]);
        }
        else if (word == "--require-tactic" && i + 1 < argc)
        {
            options.requiredTactics.insert(std::stoi(argv[++i]));
        }
        else
        {
            throw std::runtime_error("unknown argument " + word);
        }
    }
    return options;
}

} // namespace

int main(int argc, char** argv)
{
    try
    {
        Options const options = parse(argc, argv);
        std::vector<Case> const cases = readCases(options.cases);
        require(!cases.empty(), "no cases");
        return Conformance(options, cases).run();
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr,
            "conformance: %s\nusage: conformance LIBRARY CASES_DIR [--host-only] [--filter SUBSTRING] [--repeat N] "
            "[--require-tactic ID]...\n",
            error.what());
        return 2;
    }
}
