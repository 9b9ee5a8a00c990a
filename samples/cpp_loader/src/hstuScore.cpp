//! hstu_score: runs a bundle, compares it with its reference, measures it. See README.md for options and exit codes.

#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hstu_bundle.hpp"

#include "lanes.hpp"
#include "measure.hpp"
#include "options.hpp"
#include "report.hpp"

namespace hstu::score
{
namespace
{

using loader::Error;
using loader::Failure;

//! Cases, and what is known of their answers.
struct Workload
{
    std::vector<Case> cases;
    std::vector<loader::ReferenceFeed> reference; //!< of each case, where the bundle has one
};

std::size_t sequencesOf(loader::Tensors const& feeds)
{
    for (char const* const name : {"seq_offsets", "candidate_offsets"})
    {
        auto const found = feeds.find(name);
        if (found != feeds.end() && found->second.elements() > 0)
        {
            return found->second.elements() - 1;
        }
    }
    return 1;
}

std::size_t candidatesOf(loader::Tensors const& feeds)
{
    auto const found = feeds.find("candidate_offsets");
    return found == feeds.end() || found->second.elements() == 0
               ? 0
               : static_cast<std::size_t>(found->second.integerAt(found->second.elements() - 1));
}

//! \return why an engine of this TensorRT cannot be asked, or an empty text: TensorRT 8 has no int64.
std::string beyondInt32(loader::Tensors const& feeds)
{
    if (loader::Engine::kIS_SHARED)
    {
        return "";
    }
    for (auto const& [name, tensor] : feeds)
    {
        loader::HostTensor narrow;
        if (tensor.type == loader::ElementType::kINT64
            && !loader::convertTensor(tensor, loader::ElementType::kINT32, narrow).empty())
        {
            return name + " holds times beyond int32, which TensorRT 8 engines take";
        }
    }
    return "";
}

Case caseOf(std::string name, loader::Tensors feeds)
{
    Case made;
    made.name = std::move(name);
    made.sequences = sequencesOf(feeds);
    made.candidates = candidatesOf(feeds);
    made.feeds = std::move(feeds);
    return made;
}

//! The request that the command line gives, or the bundle's reference feeds.
Workload workloadOf(
    Options const& options, loader::Bundle const& bundle, loader::GraphEntry const& graph, Report& report)
{
    Workload work;
    loader::Tensors given;
    if (!options.inputs.empty())
    {
        given = loader::readNpz(options.inputs);
    }
    for (auto const& [name, file] : options.raw)
    {
        bool known = false;
        for (loader::TensorSpec const& spec : graph.inputs)
        {
            if (spec.name == name)
            {
                given[name] = loader::tensorFromRaw(spec, loader::readFile(file, 0xFFFFFFFFULL, Failure::kREQUEST));
                known = true;
            }
        }
        if (!known)
        {
            throw Error(Failure::kREQUEST, "--raw names no input of the graph " + graph.name,
                "there is no input " + name, "`hstu_score BUNDLE --inspect` lists the inputs");
        }
    }
    if (!options.inputs.empty() || !options.raw.empty())
    {
        work.cases.push_back(caseOf("given", loader::checkedFeeds(bundle.manifest(), graph, given)));
        return work;
    }
    for (loader::ReferenceFeed& feed : loader::readReference(bundle, graph))
    {
        loader::Tensors feeds = loader::checkedFeeds(bundle.manifest(), graph, feed.inputs);
        std::string const why = beyondInt32(feeds);
        if (!why.empty())
        {
            report.notRun.push_back(feed.name + ": " + why);
            continue;
        }
        work.cases.push_back(caseOf(feed.name, std::move(feeds)));
        work.reference.push_back(std::move(feed));
    }
    if (work.cases.empty())
    {
        throw Error(
            Failure::kREQUEST, "no reference feed can be run", report.notRun.front(), "give feeds with --inputs");
    }
    return work;
}

//! Cuts packed feeds into ranking requests, one case each.
std::vector<Case> rankingCases(loader::RankingSpec const& spec, std::vector<Case> const& packed)
{
    std::vector<Case> cases;
    for (Case const& feed : packed)
    {
        for (loader::RankingRequest& request : loader::requestsOf(spec, feed.feeds, feed.name))
        {
            Case made;
            made.name = request.user;
            made.sequences = 1;
            made.candidates = static_cast<std::size_t>(request.numCandidates);
            made.request = std::move(request);
            cases.push_back(std::move(made));
        }
    }
    return cases;
}

void loadPlugin(Options const& options, loader::Bundle const& bundle, loader::TensorRt& tensorRt, Report& report)
{
    auto const& files = bundle.manifest().files;
    auto const recorded = files.find(loader::kPLUGIN_FILE);
    report.plugin = !options.plugin.empty()   ? options.plugin
                    : recorded != files.end() ? bundle.pathOf(loader::kPLUGIN_FILE)
                                              : "";
    if (report.plugin.empty())
    {
        return;
    }
    if (!options.plugin.empty() && recorded != files.end())
    {
        std::string const found = loader::sha256OfFile(options.plugin, Failure::kENGINE);
        if (found != recorded->second.sha256)
        {
            throw Error(Failure::kENGINE, options.plugin + " is not the plugin library that the bundle was built with",
                "its sha256 is " + found + ", and the manifest records " + recorded->second.sha256,
                "leave --plugin out to load the bundle's own");
        }
    }
    tensorRt.loadPlugin(report.plugin, bundle.manifest());
}

//! Answers of every case, as the first lane gives them; with the replays of a graph they are the same to the bit.
std::vector<loader::Tensors> firstAnswers(Lane& lane, std::vector<Case> const& cases, Way way, Report& report)
{
    std::vector<loader::Tensors> answers;
    for (Case const& each : cases)
    {
        answers.push_back(lane.answer(each, way == Way::kCACHED ? Way::kCOLD : way));
    }
    // The second time a graph is recorded, the third time it is launched and compared, the fourth it runs alone.
    for (int round = 2; round <= 4; ++round)
    {
        for (std::size_t i = 0; i < cases.size(); ++i)
        {
            if (!isSame(lane.answer(cases[i], way), answers[i]))
            {
                report.problems.push_back(loader::textOf("'", cases[i].name, "' has another answer in run ", round,
                    " than in the first, not the same bits"));
            }
        }
    }
    return answers;
}

void compareWithReference(loader::Bundle const& bundle, loader::GraphEntry const& graph, Workload const& work,
    std::vector<loader::Tensors> const& answers, Report& report)
{
    for (std::size_t i = 0; i < work.reference.size(); ++i)
    {
        for (loader::Comparison& row :
            loader::compareOutputs(graph, bundle.manifest().precision, work.reference[i], answers[i]))
        {
            report.comparisons.push_back(std::move(row));
            report.isCompared = true;
        }
    }
}

//! Cached answers against the packed forward of the same request: both may lie a bound away from float64.
void compareWithPacked(loader::Bundle const& bundle, Lane& lane, std::vector<Case> const& cases,
    std::vector<loader::Tensors> const& answers, Report& report)
{
    loader::Manifest const& manifest = bundle.manifest();
    double bound = 0;
    for (char const* const name : {"packed", "score"})
    {
        auto const& errors = bundle.graph(name).eagerError;
        auto const found = errors.find("logits");
        bound += loader::errorBound(found == errors.end() ? 0 : found->second, manifest.precision);
    }
    for (std::size_t i = 0; i < cases.size(); ++i)
    {
        loader::Tensors const packed = lane.answer(cases[i], Way::kPACKED);
        for (char const* const name : {"preds", "logits"})
        {
            loader::RowError const error = loader::rowErrorOf(name, answers[i].at(name), packed.at(name));
            report.comparisons.push_back(
                {std::string(name) + " cached against packed", cases[i].name, error.error, bound, error.row});
        }
    }
    report.isCompared = true;
}

void saveAnswers(Options const& options, std::vector<loader::Tensors> const& answers)
{
    if (options.outputs.empty())
    {
        return;
    }
    bool const isOne = !options.isRanking && (!options.inputs.empty() || !options.raw.empty());
    for (std::size_t i = 0; i < answers.size(); ++i)
    {
        loader::writeNpz(isOne ? options.outputs : options.outputs + "/" + std::to_string(i) + ".npz", answers[i]);
    }
}

void measure(Options const& options, loader::Driver const& driver, Lanes const& lanes, std::vector<Case> const& cases,
    uint64_t bytesAtStart, Report& report)
{
    std::vector<Way> const ways =
        options.isRanking ? std::vector<Way>{Way::kPACKED, Way::kCOLD, Way::kCACHED} : std::vector<Way>{Way::kGRAPH};
    for (Case const& each : cases)
    {
        for (Way const way : ways)
        {
            if (options.iterations == 0 || (options.isRanking && each.candidates == 0))
            {
                continue;
            }
            Measurement row = measured(lanes, each, way, static_cast<std::size_t>(options.warmup),
                static_cast<std::size_t>(options.iterations));
            row.deviceBytes = growth(bytesAtStart, driver.usedBytes());
            for (loader::Comparison const& compared : report.comparisons)
            {
                // The one nearest to its bound, or farthest beyond it.
                if (compared.feed == each.name
                    && (row.bound == 0 || compared.error * row.bound > row.error * compared.bound))
                {
                    row.error = compared.error;
                    row.bound = compared.bound;
                }
            }
            report.measurements.push_back(std::move(row));
        }
    }
}

void addStats(Lanes const& lanes, Report& report)
{
    for (std::unique_ptr<Lane> const& lane : lanes)
    {
        loader::GraphStats const graphs = lane->graphStats();
        report.graphs.captures += graphs.captures;
        report.graphs.replays += graphs.replays;
        report.graphs.evictions += graphs.evictions;
        report.graphs.failures += graphs.failures;
        if (loader::RankingScorer const* const ranking = lane->ranking())
        {
            loader::KvStats const cache = ranking->cacheStats();
            report.cache.hits += cache.hits;
            report.cache.misses += cache.misses;
            report.cache.stale += cache.stale;
            report.cache.evictions += cache.evictions;
            report.cache.entries += cache.entries;
            report.cache.usedBytes += cache.usedBytes;
            report.passes.prefillPasses += ranking->stats.prefillPasses;
            report.passes.scorePasses += ranking->stats.scorePasses;
            report.passes.packedPasses += ranking->stats.packedPasses;
        }
    }
}

Report runBundle(Options const& options, loader::Bundle const& bundle)
{
    Report report;
    loader::Manifest const& manifest = bundle.manifest();
    if (manifest.status == "FAIL" && !options.acceptsFailed)
    {
        throw Error(Failure::kBUNDLE, bundle.folder() + " failed its own verification", "its status is FAIL",
            "see report.html in it and build it again; --accept-failed runs it all the same");
    }
    if (options.isRanking)
    {
        if (!manifest.ranking)
        {
            throw Error(Failure::kUSAGE, bundle.folder() + " holds no ranking model",
                "its manifest has no ranking entry", "leave --ranking out");
        }
        bundle.graph("prefill");
        bundle.graph("score");
    }
    loader::GraphEntry const& graph = bundle.graph(options.isRanking ? "packed" : options.graph);
    // Before a driver or a TensorRT is asked for: a bundle for another one is no reason to install this one.
    loader::Compatibility::checkBackend(bundle, graph);
    loader::Driver const driver(static_cast<int>(options.device));
    uint64_t const bytesAtStart = driver.usedBytes();
    loader::TensorRt tensorRt(options.tensorRtLibrary);
    std::size_t const slash = bundle.folder().find_last_not_of('/');
    std::string const trimmed = bundle.folder().substr(0, slash == std::string::npos ? 0 : slash + 1);
    report.bundle = trimmed.substr(trimmed.rfind('/') == std::string::npos ? 0 : trimmed.rfind('/') + 1);
    report.graph = options.isRanking ? "ranking" : graph.name;
    report.device = driver.deviceName();
    report.backend = loader::kBACKEND_NAME;
    report.tensorRt = tensorRt.version();
    report.streams = static_cast<std::size_t>(options.streams);
    report.cudaGraphs = static_cast<std::size_t>(options.cudaGraphs);
    report.isRanking = options.isRanking;
    report.maxGrowthBytes = static_cast<uint64_t>(options.maxGrowthMib) << 20;
    if (!graph.scheduleFile.empty())
    {
        report.kernels = manifest.kernelsFile;
    }
    loadPlugin(options, bundle, tensorRt, report);
    Workload const work = workloadOf(options, bundle, graph, report);
    std::vector<Case> const cases = options.isRanking ? rankingCases(*manifest.ranking, work.cases) : work.cases;
    for (Case const& each : cases)
    {
        report.caseNames.push_back(each.name);
    }
    Engines engines(tensorRt, driver, bundle);
    LaneOptions laneOptions;
    laneOptions.graph = graph.name;
    laneOptions.isRanking = options.isRanking;
    laneOptions.cudaGraphs = report.cudaGraphs;
    laneOptions.kvBudgetBytes = static_cast<std::size_t>(options.kvBudgetKib) << 10;
    laneOptions.microBatch = options.microBatch;
    Lanes lanes;
    for (std::size_t i = 0; i < report.streams; ++i)
    {
        lanes.push_back(std::make_unique<Lane>(driver, bundle, engines, laneOptions));
    }
    Way const way = options.isRanking ? Way::kCACHED : Way::kGRAPH;
    std::vector<loader::Tensors> const answers = firstAnswers(*lanes.front(), cases, way, report);
    if (options.isRanking)
    {
        compareWithPacked(bundle, *lanes.front(), cases, answers, report);
    }
    else
    {
        compareWithReference(bundle, graph, work, answers, report);
    }
    saveAnswers(options, answers);
    if (report.exitCode() == 0)
    {
        // A wrong answer gets no time.
        measure(options, driver, lanes, cases, bytesAtStart, report);
        if (options.soak > 0)
        {
            report.soak = soaked(driver, lanes, cases, way, answers, static_cast<std::size_t>(options.soak));
            report.isSoaked = true;
        }
    }
    addStats(lanes, report);
    return report;
}

int run(Options const& options)
{
    loader::Bundle const bundle = loader::Bundle::open(options.bundle);
    if (options.isInspection)
    {
        printBundle(bundle, options.isJson);
        return 0;
    }
    Report const report = runBundle(options, bundle);
    if (!options.csv.empty() && !report.measurements.empty())
    {
        appendCsv(options.csv, report);
    }
    if (options.isJson)
    {
        std::printf("%s\n", jsonOf(report).c_str());
    }
    else
    {
        printLines(report);
    }
    return report.exitCode();
}

} // namespace
} // namespace hstu::score

int main(int argc, char** argv)
{
    using namespace hstu;
    bool isJson = false;
    for (int i = 1; i < argc; ++i)
    {
        isJson = isJson || std::string(argv[i]) == "--json";
    }
    try
    {
        return loader::typed("running hstu_score",
            [&]
            {
                score::Options const options = score::optionsOf(argc, argv);
                if (options.wantsHelp)
                {
                    std::fputs(score::usageText(), stdout);
                    return 0;
                }
                return score::run(options);
            });
    }
    catch (loader::Error const& error)
    {
        std::fprintf(stderr, "%s\n", error.what());
        if (isJson)
        {
            std::printf("%s\n", score::jsonOf(error).c_str());
        }
        return static_cast<int>(error.failure());
    }
}
