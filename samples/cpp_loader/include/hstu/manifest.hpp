#ifndef HSTU_LOADER_MANIFEST_HPP
#define HSTU_LOADER_MANIFEST_HPP

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "error.hpp"
#include "file.hpp"
#include "json.hpp"
#include "tensor.hpp"

//! A bundle as `hstu-compile build` wrote it: its manifest, and the proof that no file was altered since.
namespace hstu::loader
{

//! An input or output of a graph.
struct TensorSpec
{
    std::string name;
    ElementType type{ElementType::kFLOAT32};
    std::vector<std::string> dims; //!< a number, or the name of a size: "L", "B_plus_1", "L + B"
};

//! One graph of a model.
struct GraphEntry
{
    std::string name;
    std::string engineFile;                //!< empty: none was built
    std::string scheduleFile;              //!< of a graph in segments; empty for any other
    std::vector<std::string> segmentFiles; //!< engines of its segments, in order
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    bool isVerified{false};                   //!< whether the bundle holds references of it
    std::vector<std::string> feedNames;       //!< of its references
    std::map<std::string, double> eagerError; //!< by output: largest row error of the eager model
};

//! A feature of a ranking model.
struct RankingFeature
{
    std::string name;
    int64_t tableSize{0};
    bool isExternal{false}; //!< the input holds embedding rows, not ids
    int64_t maxLength{1};   //!< contextual features: values of one user
    int64_t minHistoryLen{0};
};

//! What a ranking model takes.
struct RankingSpec
{
    std::vector<RankingFeature> historyIds;
    std::vector<RankingFeature> contextual;
    std::vector<RankingFeature> candidateIds;
    std::string historyTime;
    std::string historyAction; //!< empty: none
    std::string candidateTime;
    int64_t numTasks{0};
    int64_t maxHistoryLen{0};
    int64_t maxCandidates{0};
    int64_t microBatch{0};
    double scaling{0}; //!< the divisor; 0: that of the batch
    bool countsCandidates{false};
    int64_t numLayers{0};
    int64_t numHeads{0};
    int64_t attentionDim{0};
    int64_t linearDim{0};
    ElementType kvType{ElementType::kFLOAT32};
    bool dependsOnQuery{true}; //!< cache rule "request"

    std::vector<std::string> historyNames() const
    {
        std::vector<std::string> names;
        for (RankingFeature const& feature : historyIds)
        {
            names.push_back(feature.name);
        }
        names.push_back(historyTime);
        if (!historyAction.empty())
        {
            names.push_back(historyAction);
        }
        return names;
    }

    std::vector<std::string> candidateNames() const
    {
        std::vector<std::string> names;
        for (RankingFeature const& feature : candidateIds)
        {
            names.push_back(feature.name);
        }
        names.push_back(candidateTime);
        return names;
    }

    //! \return C: tokens in front of every history.
    int64_t contextualLen() const
    {
        int64_t total = 0;
        for (RankingFeature const& feature : contextual)
        {
            total += feature.maxLength;
        }
        return total;
    }

    //! \return whether `prefill` must be told the number of candidates.
    bool hasMinimum() const
    {
        bool any = false;
        for (RankingFeature const& feature : contextual)
        {
            any = any || feature.minHistoryLen > 0;
        }
        return countsCandidates && any;
    }
};

struct FileEntry
{
    uint64_t bytes{0};
    std::string sha256;
};

//! manifest.json, as far as a loader needs it.
struct Manifest
{
    std::string status;
    std::string precision;
    std::string backend;
    std::string backendVersion;
    std::vector<std::string> computeCapabilities; //!< "9.0"; empty: that of the machine that built it
    std::string operatorName;
    std::string operatorNamespace;
    std::string operatorVersion;
    int64_t maxSeqLen{0};
    int64_t numItems{0}; //!< of retrieval models; 0 otherwise
    std::vector<GraphEntry> graphs;
    std::optional<RankingSpec> ranking;
    std::string kernelsFile; //!< library of what runs between segments; empty where no graph has any
    std::map<std::string, FileEntry> files;

    GraphEntry const* findGraph(std::string const& name) const
    {
        for (GraphEntry const& graph : graphs)
        {
            if (graph.name == name)
            {
                return &graph;
            }
        }
        return nullptr;
    }
};

static constexpr char const* kMANIFEST_FILE = "manifest.json";
static constexpr char const* kPLUGIN_FILE = "libhstu_trt_plugin.so";

//! Whether a name leads to a file in the folder itself.
inline bool isPlainFileName(std::string const& name)
{
    return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos
           && name.find('\0') == std::string::npos;
}

namespace detail
{

inline ElementType elementTypeNamed(std::string const& name, std::string const& where)
{
    for (ElementFacts const& facts : elementTypes())
    {
        if (name == facts.name)
        {
            return facts.type;
        }
    }
    Json::refuse(where, "there is no element type '" + name + "'");
}

inline std::vector<TensorSpec> readSpecs(Json const& entries, std::string const& where)
{
    std::vector<TensorSpec> specs;
    for (Json const& entry : entries.array(where))
    {
        TensorSpec spec;
        spec.name = entry.at("name", where).string(where + ".name");
        spec.type = elementTypeNamed(entry.at("dtype", where).string(where + ".dtype"), where);
        for (Json const& dim : entry.at("shape", where).array(where + ".shape"))
        {
            spec.dims.push_back(
                dim.isString() ? dim.string(where) : std::to_string(dim.integer(where + ".shape", 0, INT32_MAX)));
        }
        if (spec.name.empty() || spec.dims.size() > 8)
        {
            Json::refuse(where, "a tensor has no name, or more than 8 dimensions");
        }
        specs.push_back(std::move(spec));
    }
    return specs;
}

inline std::string const& readFileName(Json const& entry, std::string const& where)
{
    std::string const& file = entry.string(where);
    if (!isPlainFileName(file))
    {
        Json::refuse(where, "'" + file + "' is not a plain file name");
    }
    return file;
}

inline GraphEntry readGraph(Json const& entry, std::string const& name)
{
    std::string const where = name + ".graphs";
    GraphEntry graph;
    graph.name = entry.at("name", where).string(where + ".name");
    if (Json const* engine = entry.find("engine", where))
    {
        graph.engineFile = readFileName(*engine, where + ".engine");
    }
    if (Json const* fused = entry.find("fused", where))
    {
        std::string const inside = where + ".fused";
        graph.scheduleFile = readFileName(fused->at("schedule", inside), inside + ".schedule");
        for (Json const& segment : fused->at("engines", inside).array(inside + ".engines"))
        {
            graph.segmentFiles.push_back(readFileName(segment, inside + ".engines"));
        }
    }
    graph.inputs = readSpecs(entry.at("inputs", where), where + ".inputs");
    graph.outputs = readSpecs(entry.at("outputs", where), where + ".outputs");
    if (Json const* verification = entry.find("verification", where))
    {
        graph.isVerified = true;
        for (Json const& feed : verification->at("feeds", where).array(where + ".feeds"))
        {
            graph.feedNames.push_back(feed.string(where + ".feeds"));
        }
        for (auto const& [output, error] : verification->at("eager_error", where).object(where + ".eager_error"))
        {
            graph.eagerError[output] = error.number(where + ".eager_error");
        }
    }
    return graph;
}

inline std::vector<RankingFeature> readFeatures(Json const& entries, std::string const& where)
{
    std::vector<RankingFeature> features;
    for (Json const& entry : entries.array(where))
    {
        RankingFeature feature;
        feature.name = entry.at("name", where).string(where);
        feature.tableSize = entry.at("table_size", where).integer(where + ".table_size", 1);
        feature.isExternal = entry.find("external_dim", where) != nullptr;
        if (Json const* length = entry.find("max_length", where))
        {
            feature.maxLength = length->integer(where + ".max_length", 1, INT32_MAX);
        }
        if (Json const* least = entry.find("min_history_len", where))
        {
            feature.minHistoryLen = least->integer(where + ".min_history_len");
        }
        features.push_back(std::move(feature));
    }
    return features;
}

inline RankingSpec readRanking(Json const& entry, std::string const& where)
{
    auto const size = [&](char const* key) { return entry.at(key, where).integer(where + "." + key, 1, INT32_MAX); };
    auto const text = [&](char const* key) { return entry.at(key, where).string(where + "." + key); };
    RankingSpec spec;
    spec.historyIds = readFeatures(entry.at("history_ids", where), where + ".history_ids");
    spec.contextual = readFeatures(entry.at("contextual", where), where + ".contextual");
    spec.candidateIds = readFeatures(entry.at("candidate_ids", where), where + ".candidate_ids");
    spec.historyTime = text("history_time");
    if (Json const* action = entry.find("history_action", where))
    {
        spec.historyAction = action->string(where + ".history_action");
    }
    spec.candidateTime = text("candidate_time");
    spec.numTasks = static_cast<int64_t>(entry.at("tasks", where).array(where + ".tasks").size());
    spec.maxHistoryLen = size("max_history_len");
    spec.maxCandidates = size("max_candidates");
    spec.microBatch = size("micro_batch");
    Json const& scaling = entry.at("scaling", where);
    if (scaling.isNumber())
    {
        spec.scaling = scaling.number(where);
    }
    if (scaling.isNumber() ? !(spec.scaling > 0) : scaling.string(where + ".scaling") != "batch")
    {
        Json::refuse(where + ".scaling", "it is neither 'batch' nor a positive number");
    }
    spec.countsCandidates = entry.at("counts_candidates", where).boolean(where + ".counts_candidates");
    spec.numLayers = size("num_layers");
    spec.numHeads = size("num_heads");
    spec.attentionDim = size("attention_dim");
    spec.linearDim = size("linear_dim");
    spec.kvType = elementTypeNamed(text("kv_dtype"), where + ".kv_dtype");
    std::string const rule = text("cache_rule");
    if (rule != "request" && rule != "prefix")
    {
        Json::refuse(where + ".cache_rule", "there is no rule '" + rule + "'; there are request and prefix");
    }
    spec.dependsOnQuery = rule == "request";
    if (spec.numTasks == 0 || spec.historyIds.empty() || spec.candidateIds.empty())
    {
        Json::refuse(where, "it names no task, no feature of the history or none of the candidates");
    }
    return spec;
}

} // namespace detail

//! Reads manifest.json. Everything the loader uses is checked; keys that it does not know are left alone.
//! \param name of the file, for messages.
inline Manifest manifestFromJson(char const* text, std::size_t size, std::string const& name)
{
    return typed("reading a manifest",
        [&]
        {
            Json const root = Json::parse(text, size, name);
            int64_t const version = root.at("format_version", name).integer(name + ".format_version");
            if (version != 1)
            {
                throw Error(Failure::kBUNDLE, textOf(name, " has bundle format ", version),
                    "this loader reads format 1", "build the bundle again, or use the loader of its hstu-compile");
            }
            Manifest manifest;
            manifest.status = root.at("status", name).string(name + ".status");
            manifest.precision = root.at("precision", name).at("requested", name).string(name + ".precision");
            if (manifest.precision != "fp32" && manifest.precision != "fp16" && manifest.precision != "bf16")
            {
                Json::refuse(name + ".precision", "'" + manifest.precision + "' is none of fp32, fp16, bf16");
            }
            Json const& backend = root.at("backend", name);
            manifest.backend = backend.at("name", name).string(name + ".backend.name");
            if (Json const* built = backend.find("version", name))
            {
                manifest.backendVersion = built->string(name + ".backend.version");
            }
            for (Json const& each : backend.at("compute_capabilities", name).array(name + ".compute_capabilities"))
            {
                manifest.computeCapabilities.push_back(each.string(name + ".compute_capabilities"));
            }
            Json const& op = root.at("operator", name);
            manifest.operatorName = op.at("name", name).string(name + ".operator.name");
            manifest.operatorNamespace = op.at("namespace", name).string(name + ".operator.namespace");
            manifest.operatorVersion = op.at("version", name).string(name + ".operator.version");
            Json const& limits = root.at("limits", name);
            manifest.maxSeqLen = limits.at("max_seq_len", name).integer(name + ".limits.max_seq_len", 1);
            if (Json const* items = limits.find("num_items", name))
            {
                manifest.numItems = items->integer(name + ".limits.num_items", 1);
            }
            for (Json const& graph : root.at("graphs", name).array(name + ".graphs"))
            {
                manifest.graphs.push_back(detail::readGraph(graph, name));
            }
            if (manifest.graphs.empty())
            {
                Json::refuse(name + ".graphs", "it names no graph");
            }
            if (Json const* ranking = root.find("ranking", name))
            {
                manifest.ranking = detail::readRanking(*ranking, name + ".ranking");
            }
            if (Json const* kernels = root.find("kernels", name))
            {
                manifest.kernelsFile =
                    detail::readFileName(kernels->at("file", name + ".kernels"), name + ".kernels.file");
            }
            for (GraphEntry const& graph : manifest.graphs)
            {
                if (!graph.scheduleFile.empty() && manifest.kernelsFile.empty())
                {
                    Json::refuse(name + ".kernels", "it is absent, and the graph " + graph.name + " is in segments");
                }
            }
            for (auto const& [file, facts] : root.at("files", name).object(name + ".files"))
            {
                FileEntry entry;
                entry.bytes = static_cast<uint64_t>(facts.at("bytes", name).integer(name + ".files.bytes"));
                entry.sha256 = facts.at("sha256", name).string(name + ".files.sha256");
                manifest.files[file] = entry;
            }
            return manifest;
        });
}

//! A bundle whose manifest was read and whose files are what the manifest says.
class Bundle
{
public:
    //! Reads manifest.json and compares the sha256 of every file with it. Every file that is missing or altered is
    //! named.
    static Bundle open(std::string const& folder)
    {
        return typed("opening a bundle",
            [&]
            {
                Bundle bundle;
                bundle.mFolder = folder;
                std::string const path = bundle.pathOf(kMANIFEST_FILE);
                if (!isFile(path))
                {
                    throw Error(Failure::kBUNDLE, folder + " is not a bundle",
                        std::string("it has no ") + kMANIFEST_FILE, "pass the folder that `hstu-compile build` wrote");
                }
                Bytes const text = readFile(path, kMOST_MANIFEST_BYTES, Failure::kBUNDLE);
                bundle.mManifest = manifestFromJson(reinterpret_cast<char const*>(text.data()), text.size(), path);
                bundle.checkFiles();
                return bundle;
            });
    }

    Manifest const& manifest() const noexcept
    {
        return mManifest;
    }

    std::string const& folder() const noexcept
    {
        return mFolder;
    }

    std::string pathOf(std::string const& file) const
    {
        return mFolder + "/" + file;
    }

    //! \return the graph of a name, or the one that answers a request by itself for an empty name.
    GraphEntry const& graph(std::string const& name) const
    {
        if (name.empty())
        {
            return mManifest.graphs.front();
        }
        if (GraphEntry const* const found = mManifest.findGraph(name))
        {
            return *found;
        }
        std::string known;
        for (GraphEntry const& each : mManifest.graphs)
        {
            known += (known.empty() ? "" : ", ") + each.name;
        }
        throw Error(Failure::kUSAGE, mFolder + " has no graph '" + name + "'", "it has " + known, "name one of these");
    }

    //! \return a file's entry; refuses a file that the manifest does not vouch for.
    FileEntry const& fileEntry(std::string const& file) const
    {
        auto const found = mManifest.files.find(file);
        if (found == mManifest.files.end())
        {
            throw Error(Failure::kBUNDLE, pathOf(file) + " is not vouched for",
                std::string("the manifest's list of files lacks ") + file, "build the bundle again");
        }
        return found->second;
    }

    //! Reads a file that the manifest vouches for. What is returned is what was hashed: a file that was replaced since
    //! the bundle was opened is refused.
    //! \param most bytes; a larger file is refused before it is read.
    Bytes readVouched(std::string const& file, uint64_t most) const
    {
        FileEntry const& entry = fileEntry(file);
        Bytes content = readFile(pathOf(file), most, Failure::kBUNDLE);
        Sha256 digest;
        digest.update(content.data(), content.size());
        std::string const found = digest.hex();
        if (found != entry.sha256)
        {
            throw Error(Failure::kBUNDLE, pathOf(file) + " was altered after the bundle was opened",
                "its sha256 is " + found + ", and the manifest records " + entry.sha256,
                "write bundles into new folders, and open this one again");
        }
        return content;
    }

private:
    static constexpr uint64_t kMOST_MANIFEST_BYTES = 64ULL << 20;

    void checkFiles() const
    {
        std::string problems;
        for (auto const& [name, entry] : mManifest.files)
        {
            std::string problem;
            if (!isPlainFileName(name))
            {
                problem = "'" + name + "' is not a plain file name";
            }
            else if (!isFile(pathOf(name)))
            {
                problem = name + " is missing";
            }
            else if (std::string const found = sha256OfFile(pathOf(name), Failure::kBUNDLE); found != entry.sha256)
            {
                problem = name + " has sha256 " + found + ", and the manifest records " + entry.sha256;
            }
            if (!problem.empty())
            {
                problems += (problems.empty() ? "" : "; ") + problem;
            }
        }
        if (!problems.empty())
        {
            throw Error(Failure::kBUNDLE, mFolder + " is damaged", problems, "copy it again, or build it again");
        }
    }

    std::string mFolder;
    Manifest mManifest;
};

} // namespace hstu::loader

#endif // HSTU_LOADER_MANIFEST_HPP
