//! Plays TensorRT 8's part for libhstu_trt_plugin.so: a registry, the builder's calls in their order, serialisation,
//! and on a GPU enqueue against the float64 oracle. The program itself answers to libnvinfer's names, so no TensorRT is
//! needed; a stand-in libnvinfer.so.8 only satisfies the loader.
//!
//! Usage: conformanceV2 LIBRARY CASES_DIR [--host-only] [--filter SUBSTRING]
//! Prints one JSON object a line per check and "N passed, N failed"; exit code 0 if all passed, 1 if not, 2 on bad
//! usage.

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "caseFile.h"
#include "compare.h"
#include "device.h"

namespace
{

using nvinfer1::DataType;

class Logger final : public nvinfer1::ILogger
{
public:
    void log(Severity, nvinfer1::AsciiChar const* message) noexcept override
    {
        text += std::string(message) + "\n";
    }

    std::string text;
};

class Registry final : public nvinfer1::IPluginRegistry
{
public:
    bool registerCreator(
        nvinfer1::IPluginCreator& creator, nvinfer1::AsciiChar const* const pluginNamespace) noexcept override
    {
        registered.push_back(&creator);
        space = pluginNamespace;
        creator.setPluginNamespace(pluginNamespace);
        return true;
    }

    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* const count) const noexcept override
    {
        *count = static_cast<int32_t>(registered.size());
        return registered.data();
    }

    nvinfer1::IPluginCreator* getPluginCreator(nvinfer1::AsciiChar const* const name, nvinfer1::AsciiChar const* const,
        nvinfer1::AsciiChar const* const) noexcept override
    {
        for (nvinfer1::IPluginCreator* const creator : registered)
        {
            if (std::strcmp(creator->getPluginName(), name) == 0)
            {
                return creator;
            }
        }
        return nullptr;
    }

    void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override {}

    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }

    bool deregisterCreator(nvinfer1::IPluginCreator const& creator) noexcept override
    {
        auto const found = std::find(registered.begin(), registered.end(), &creator);
        bool const known = found != registered.end();
        if (known)
        {
            registered.erase(found);
        }
        return known;
    }

    std::vector<nvinfer1::IPluginCreator*> registered;
    std::string space;
};

Logger& logger()
{
    static Logger instance;
    return instance;
}

Registry& registry()
{
    static Registry instance;
    return instance;
}

nvinfer1::IPluginCreator& creatorOf(std::string const& op)
{
    nvinfer1::IPluginCreator* const creator = registry().getPluginCreator(op.c_str(), "1", "hstu");
    if (creator == nullptr)
    {
        throw std::runtime_error("no creator of " + op);
    }
    return *creator;
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
    return type == "float16" ? DataType::kHALF : type == "int32" ? DataType::kINT32 : DataType::kFLOAT;
}

//! TensorRT 8 has neither bfloat16 nor int64 tensors.
bool fitsTensorRt8(Case const& testCase)
{
    bool fits = testCase.type != "bfloat16" && testCase.outputType != "bfloat16";
    for (CaseTensor const& input : testCase.inputs)
    {
        fits = fits && input.type != "int64";
    }
    return fits;
}

struct Descs
{
    explicit Descs(Case const& testCase)
    {
        for (CaseTensor const& input : testCase.inputs)
        {
            add(input.type, input.dims);
        }
        add(testCase.outputType, testCase.outputDims);
        nbInputs = static_cast<int32_t>(testCase.inputs.size());
    }

    void add(std::string const& type, std::vector<int64_t> const& dims)
    {
        nvinfer1::DynamicPluginTensorDesc range{};
        range.desc.type = dataTypeOf(type);
        range.desc.format = nvinfer1::TensorFormat::kLINEAR;
        range.desc.dims.nbDims = static_cast<int32_t>(dims.size());
        for (size_t i = 0; i < dims.size(); ++i)
        {
            range.desc.dims.d[i] = static_cast<int32_t>(dims[i]);
        }
        range.min = range.max = range.desc.dims;
        fixed.push_back(range.desc);
        dynamic.push_back(range);
    }

    int32_t nbInputs{};
    std::vector<nvinfer1::PluginTensorDesc> fixed;
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic;
};

//! Owns a plugin as TensorRT 8 does.
struct Destroy
{
    void operator()(nvinfer1::IPluginV2DynamicExt* plugin) const
    {
        plugin->destroy();
    }
};

using Plugin = std::unique_ptr<nvinfer1::IPluginV2DynamicExt, Destroy>;

Plugin own(nvinfer1::IPluginV2* plugin)
{
    require(plugin != nullptr, "no plugin was made");
    return Plugin(static_cast<nvinfer1::IPluginV2DynamicExt*>(plugin));
}

Plugin create(Case const& testCase)
{
    std::vector<nvinfer1::PluginField> fields;
    for (CaseAttribute const& attribute : testCase.attributes)
    {
        void const* const data =
            attribute.isFloat ? static_cast<void const*>(&attribute.floatValue) : &attribute.intValue;
        auto const type = attribute.isFloat ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
        fields.emplace_back(attribute.name.c_str(), data, type, 1);
    }
    nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return own(creatorOf(testCase.op).createPlugin("conformance", &collection));
}

std::vector<char> serialised(nvinfer1::IPluginV2DynamicExt const& plugin)
{
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    return bytes;
}

//! What the builder asks of a node before it times it.
void checkBuilderCalls(
    nvinfer1::IPluginV2DynamicExt& plugin, Case const& testCase, Descs const& descs, bool hasGpu)
{
    require(plugin.getPluginType() == testCase.op, "plugin type");
    require(std::string(plugin.getPluginVersion()) == "1", "plugin version");
    require(std::string(plugin.getPluginNamespace()) == "hstu", "plugin namespace");
    require(plugin.getNbOutputs() == 1, "one output expected");
    std::vector<DataType> types;
    for (nvinfer1::PluginTensorDesc const& desc : descs.fixed)
    {
        types.push_back(desc.type);
    }
    require(plugin.getOutputDataType(0, types.data(), descs.nbInputs) == types.back(), "output type is not the case's");
    std::vector<nvinfer1::PluginTensorDesc> inOut = descs.fixed;
    for (int32_t pos = 0; pos <= descs.nbInputs; ++pos)
    {
        size_t const index = static_cast<size_t>(pos);
        require(plugin.supportsFormatCombination(pos, inOut.data(), descs.nbInputs, 1),
            "legal types refused at position " + std::to_string(pos));
        inOut[index].type = DataType::kINT8;
        require(!plugin.supportsFormatCombination(pos, inOut.data(), descs.nbInputs, 1),
            "int8 accepted at position " + std::to_string(pos));
        inOut[index].type = descs.fixed[index].type;
    }
    logger().text.clear();
    plugin.configurePlugin(descs.dynamic.data(), descs.nbInputs, &descs.dynamic.back(), 1);
    require(logger().text.empty(), "configurePlugin: " + logger().text);
    require(
        plugin.getWorkspaceSize(descs.fixed.data(), descs.nbInputs, &descs.fixed.back(), 1) == 0, "workspace is not 0");
    require((plugin.initialize() == 0) == hasGpu, "initialize: " + logger().text);
}

//! \return the error of one call on the GPU, as JSON facts.
std::string runOnGpu(nvinfer1::IPluginV2DynamicExt& plugin, Case const& testCase, Descs const& descs, bool captured)
{
    std::vector<device::Buffer> inputs;
    std::vector<void const*> pointers;
    for (CaseTensor const& input : testCase.inputs)
    {
        inputs.emplace_back(input.bytes, 0);
    }
    for (device::Buffer const& input : inputs)
    {
        pointers.push_back(input.data());
    }
    device::Buffer output(testCase.reference.size() * (testCase.outputType == "float16" ? 2 : 4), 0);
    void* outputs[] = {output.data()};
    device::synchronize();
    device::Stream const stream;
    auto const enqueue = [&]
    {
        int32_t const code =
            plugin.enqueue(descs.fixed.data(), &descs.fixed.back(), pointers.data(), outputs, nullptr, stream.get());
        require(code == 0, "enqueue: " + logger().text);
    };
    if (captured)
    {
        device::Graph const graph(stream, enqueue);
        graph.launch(stream);
    }
    else
    {
        enqueue();
    }
    stream.synchronize();
    OutputError const error = measureError(testCase, output.download());
    require(output.areGuardsIntact(), "bytes beside the output were written");
    require(isWithinBounds(testCase, error), "differs from the oracle at " + error.where);
    return ", \"componentwise\": " + std::to_string(error.componentwise);
}

//! An engine from before has_cache, the last attribute, lacks its 4 bytes in front of the signature of 5 numbers.
void checkOlderEngine(Case const& testCase, std::vector<char> const& bytes)
{
    constexpr size_t kSignatureBytes = 5 * sizeof(int32_t);
    std::vector<char> older = bytes;
    auto const end = older.end() - static_cast<std::ptrdiff_t>(kSignatureBytes);
    older.erase(end - static_cast<std::ptrdiff_t>(sizeof(int32_t)), end);
    require(creatorOf(testCase.op).deserializePlugin("n", older.data(), older.size()) == nullptr,
        "bytes of another length than they say are accepted");
    uint32_t const size = static_cast<uint32_t>(older.size());
    std::memcpy(older.data() + sizeof(uint32_t), &size, sizeof(size));
    Plugin const engine = own(creatorOf(testCase.op).deserializePlugin("conformance", older.data(), older.size()));
    require(serialised(*engine) == bytes, "an engine without has_cache is not one with has_cache 0");
}

std::string runCase(Case const& testCase, bool hasGpu)
{
    Descs const descs(testCase);
    Plugin const built = create(testCase);
    checkBuilderCalls(*built, testCase, descs, hasGpu);
    Plugin const timed = own(built->clone());
    std::string facts = hasGpu ? runOnGpu(*timed, testCase, descs, false) : "";

    std::vector<char> bytes = serialised(*built);
    Plugin const engine = own(creatorOf(testCase.op).deserializePlugin("conformance", bytes.data(), bytes.size()));
    require(serialised(*engine) == bytes, "bytes change over serialisation");
    require(serialised(*own(engine->clone())) == bytes, "the clone's bytes differ");
    require(creatorOf(testCase.op).deserializePlugin("n", bytes.data(), bytes.size() - 1) == nullptr,
        "short bytes are accepted");
    CaseAttribute const& last = testCase.attributes.back();
    if (last.name == "has_cache" && last.intValue == 0)
    {
        checkOlderEngine(testCase, bytes);
    }
    bytes[0] = static_cast<char>(bytes[0] + 1);
    require(creatorOf(testCase.op).deserializePlugin("n", bytes.data(), bytes.size()) == nullptr,
        "foreign bytes are accepted");
    if (hasGpu)
    {
        require(engine->initialize() == 0, "initialize: " + logger().text);
        Plugin const context = own(engine->clone());
        context->attachToContext(nullptr, nullptr, nullptr);
        facts = runOnGpu(*context, testCase, descs, false);
        runOnGpu(*context, testCase, descs, true);
        context->detachFromContext();
        engine->terminate();
    }
    built->terminate();
    return facts;
}

int run(std::string const& library, std::string const& folder, bool hostOnly, std::string const& filter)
{
    std::vector<Case> const cases = readCases(folder);
    void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(handle != nullptr, std::string("dlopen: ") + (handle == nullptr ? dlerror() : ""));
    require(registry().registered.size() == 2 && registry().space == "hstu",
        "loading the library did not register two operators: " + logger().text);
    std::string reason;
    bool const hasGpu = !hostOnly && device::open(reason);
    require(hasGpu || hostOnly, "no GPU: " + reason);
    int passed = 0;
    int failed = 0;
    for (Case const& testCase : cases)
    {
        if (testCase.name.find(filter) == std::string::npos || !fitsTensorRt8(testCase))
        {
            continue;
        }
        std::string facts;
        bool ok = true;
        try
        {
            facts = runCase(testCase, hasGpu);
        }
        catch (std::exception const& error)
        {
            ok = false;
            facts = std::string(", \"error\": \"") + error.what() + "\"";
        }
        for (char& c : facts)
        {
            c = c == '\n' ? ' ' : c;
        }
        (ok ? passed : failed) += 1;
        std::printf("{\"case\": \"%s\", \"dtype\": \"%s\", \"mode\": \"v2\", \"status\": \"%s\"%s}\n",
            testCase.name.c_str(), testCase.type.c_str(), ok ? "pass" : "FAIL", facts.c_str());
    }
    dlclose(handle);
    bool const isGone = registry().registered.empty();
    (isGone ? passed : failed) += 1;
    std::printf("{\"case\": \"unload\", \"mode\": \"v2\", \"status\": \"%s\"}\n", isGone ? "pass" : "FAIL");
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 1 ? 0 : 1;
}

} // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept
{
    return &registry();
}

extern "C" nvinfer1::ILogger* getLogger() noexcept
{
    return &logger();
}

extern "C" int32_t getInferLibVersion() noexcept
{
    return NV_TENSORRT_VERSION;
}

int main(int argc, char** argv)
{
    try
    {
        require(argc >= 3, "two arguments are needed");
        bool hostOnly = false;
        std::string filter;
        for (int i = 3; i < argc; ++i)
        {
            std::string const word = argv[i];
            require(word == "--host-only" || (word == "--filter" && i + 1 < argc), "unknown argument " + word);
            hostOnly = hostOnly || word == "--host-only";
            filter = word == "--filter" ? argv[++i] : filter;
        }
        return run(argv[1], argv[2], hostOnly, filter);
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr,
            "conformanceV2: %s\nusage: conformanceV2 LIBRARY CASES_DIR [--host-only] [--filter SUBSTRING]\n",
            error.what());
        return 2;
    }
}
