#ifndef HSTU_SCORE_REPORT_HPP
#define HSTU_SCORE_REPORT_HPP

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "hstu_bundle.hpp"
#include "measure.hpp"

//! What the program found, as lines, as JSON and as rows of a CSV file.
namespace hstu::score
{

struct Report
{
    std::string bundle;
    std::string graph;
    std::string device;
    std::string backend; //!< TensorRT or TensorRT-RTX
    std::string tensorRt;
    std::string plugin;
    std::string kernels; //!< library of what runs between segments; empty where there are none
    std::size_t streams{1};
    std::size_t cudaGraphs{0};
    bool isCompared{false};
    std::vector<std::string> caseNames;
    std::vector<std::string> notRun; //!< feeds with the reason
    std::vector<loader::Comparison> comparisons;
    std::vector<Measurement> measurements;
    std::vector<std::string> problems; //!< of the answers
    bool isSoaked{false};
    SoakResult soak;
    uint64_t maxGrowthBytes{0};
    loader::GraphStats graphs;
    bool isRanking{false};
    loader::KvStats cache;
    loader::RankingStats passes;

    //! \return 0, or why the run failed.
    int exitCode() const
    {
        bool const isDifferent =
            !problems.empty() || soak.different > 0
            || std::any_of(comparisons.begin(), comparisons.end(), [](auto const& each) { return !each.passed(); });
        bool const isGrown = isSoaked
                             && (growth(soak.deviceBytesBefore, soak.deviceBytesAfter) > maxGrowthBytes
                                 || growth(soak.hostBytesBefore, soak.hostBytesAfter) > maxGrowthBytes);
        return isDifferent ? static_cast<int>(loader::Failure::kDIFFERENT)
               : isGrown   ? static_cast<int>(loader::Failure::kGROWTH)
                           : 0;
    }
};

inline double mib(uint64_t bytes)
{
    return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

inline char const* verdictOf(int exitCode)
{
    return exitCode == 0                                            ? "PASS"
           : exitCode == static_cast<int>(loader::Failure::kGROWTH) ? "FAIL: memory grew"
                                                                    : "FAIL: answers differ";
}

//! Prints the report for people.
inline void printLines(Report const& report)
{
    std::printf("%s: graph %s on %s, %s %s%s, %zu streams, %zu CUDA graphs each\n", report.bundle.c_str(),
        report.graph.c_str(), report.device.c_str(), report.backend.c_str(), report.tensorRt.c_str(),
        report.kernels.empty() ? "" : " in segments", report.streams, report.cudaGraphs);
    for (std::string const& each : report.notRun)
    {
        std::printf("not run: %s\n", each.c_str());
    }
    for (loader::Comparison const& each : report.comparisons)
    {
        std::printf("%s  %s of '%s': error %.3g, allowed %.3g\n", each.passed() ? "ok  " : "FAIL", each.tensor.c_str(),
            each.feed.c_str(), each.error, each.bound);
    }
    if (!report.isCompared)
    {
        std::printf("not compared: there is no reference for these feeds\n");
    }
    for (std::string const& each : report.problems)
    {
        std::printf("FAIL  %s\n", each.c_str());
    }
    for (Measurement const& each : report.measurements)
    {
        std::printf(
            "%s '%s': p50 %.3f ms, p90 %.3f ms, p99 %.3f ms (device p50 %.3f ms, cv %.1f %%), %.0f requests/s\n",
            nameOf(each.way), each.name.c_str(), each.call.p50, each.call.p90, each.call.p99, each.device.p50,
            100 * each.call.cv, each.requestsPerSecond);
    }
    if (report.isSoaked)
    {
        SoakResult const& soak = report.soak;
        std::printf(
            "soak: %zu requests, %zu different%s%s, device %.1f -> %.1f MiB, host %.1f -> %.1f MiB, p50 %.3f ms, p99 "
            "%.3f ms, %.0f requests/s\n",
            soak.requests, soak.different, soak.different > 0 ? ", the first in " : "", soak.firstDifferent.c_str(),
            mib(soak.deviceBytesBefore), mib(soak.deviceBytesAfter), mib(soak.hostBytesBefore),
            mib(soak.hostBytesAfter), soak.call.p50, soak.call.p99, soak.requestsPerSecond);
    }
    std::printf("CUDA graphs: %llu recorded, %llu replays, %llu evicted, %llu refused\n",
        static_cast<unsigned long long>(report.graphs.captures), static_cast<unsigned long long>(report.graphs.replays),
        static_cast<unsigned long long>(report.graphs.evictions),
        static_cast<unsigned long long>(report.graphs.failures));
    if (report.isRanking)
    {
        std::printf("KV cache: %llu hits, %llu misses, %llu stale, %llu evictions\n",
            static_cast<unsigned long long>(report.cache.hits), static_cast<unsigned long long>(report.cache.misses),
            static_cast<unsigned long long>(report.cache.stale),
            static_cast<unsigned long long>(report.cache.evictions));
    }
    std::printf("%s\n", verdictOf(report.exitCode()));
}

//! Builds a JSON object member by member.
class JsonObject
{
public:
    JsonObject& add(char const* key, std::string const& rawJson)
    {
        mText += (mText.empty() ? "" : ", ") + loader::jsonQuoted(key) + ": " + rawJson;
        return *this;
    }

    JsonObject& text(char const* key, std::string const& value)
    {
        return add(key, loader::jsonQuoted(value));
    }

    JsonObject& number(char const* key, double value)
    {
        return add(key, loader::jsonNumber(value));
    }

    JsonObject& count(char const* key, uint64_t value)
    {
        return add(key, std::to_string(value));
    }

    std::string str() const
    {
        return "{" + mText + "}";
    }

private:
    std::string mText;
};

template <typename Items, typename Format>
std::string jsonList(Items const& items, Format const& format)
{
    std::string text;
    for (auto const& each : items)
    {
        text += (text.empty() ? "" : ", ") + format(each);
    }
    return "[" + text + "]";
}

inline std::string statusOf(Measurement const& each)
{
    // Above 5 % the median says little: the numbers are kept, and marked.
    return each.call.cv > 0.05 ? loader::textOf("unsteady: cv ", loader::jsonNumber(each.call.cv)) : "ok";
}

inline std::string jsonOf(Measurement const& each)
{
    return JsonObject()
        .text("case", each.name)
        .text("way", nameOf(each.way))
        .text("status", statusOf(each))
        .count("sequences", each.sequences)
        .count("candidates", each.candidates)
        .count("requests", each.call.count)
        .number("p50_ms", each.call.p50)
        .number("p90_ms", each.call.p90)
        .number("p99_ms", each.call.p99)
        .number("cv", each.call.cv)
        .number("device_p50_ms", each.device.p50)
        .number("device_cv", each.device.cv)
        .number("requests_per_s", each.requestsPerSecond)
        .number("peak_mib", mib(each.deviceBytes))
        .number("max_err", each.error)
        .number("err_bound", each.bound)
        .str();
}

//! \return the report as one JSON object.
inline std::string jsonOf(Report const& report)
{
    JsonObject object;
    object.text("status", verdictOf(report.exitCode()))
        .count("exit_code", static_cast<uint64_t>(report.exitCode()))
        .text("bundle", report.bundle)
        .text("graph", report.graph)
        .text("device", report.device)
        .text("backend", report.backend)
        .text("tensorrt", report.tensorRt)
        .text("plugin", report.plugin)
        .text("kernels", report.kernels)
        .count("streams", report.streams)
        .count("cuda_graphs", report.cudaGraphs)
        .add("compared", report.isCompared ? "true" : "false")
        .add("cases", jsonList(report.caseNames, loader::jsonQuoted))
        .add("not_run", jsonList(report.notRun, loader::jsonQuoted))
        .add("problems", jsonList(report.problems, loader::jsonQuoted))
        .add("comparisons", jsonList(report.comparisons,
                                [](loader::Comparison const& each)
                                {
                                    return JsonObject()
                                        .text("tensor", each.tensor)
                                        .text("feed", each.feed)
                                        .number("error", each.error)
                                        .number("bound", each.bound)
                                        .add("passed", each.passed() ? "true" : "false")
                                        .str();
                                }))
        .add("measurements", jsonList(report.measurements, [](Measurement const& each) { return jsonOf(each); }))
        .add("graphs", JsonObject()
                           .count("captures", report.graphs.captures)
                           .count("replays", report.graphs.replays)
                           .count("evictions", report.graphs.evictions)
                           .count("failures", report.graphs.failures)
                           .str());
    if (report.isRanking)
    {
        object.add("cache", JsonObject()
                                .count("hits", report.cache.hits)
                                .count("misses", report.cache.misses)
                                .count("stale", report.cache.stale)
                                .count("evictions", report.cache.evictions)
                                .count("entries", report.cache.entries)
                                .count("used_bytes", report.cache.usedBytes)
                                .count("prefill_passes", report.passes.prefillPasses)
                                .count("score_passes", report.passes.scorePasses)
                                .count("packed_passes", report.passes.packedPasses)
                                .str());
    }
    if (report.isSoaked)
    {
        SoakResult const& soak = report.soak;
        object.add("soak", JsonObject()
                               .count("requests", soak.requests)
                               .count("different", soak.different)
                               .number("device_mib_before", mib(soak.deviceBytesBefore))
                               .number("device_mib_after", mib(soak.deviceBytesAfter))
                               .number("host_mib_before", mib(soak.hostBytesBefore))
                               .number("host_mib_after", mib(soak.hostBytesAfter))
                               .number("p50_ms", soak.call.p50)
                               .number("p90_ms", soak.call.p90)
                               .number("p99_ms", soak.call.p99)
                               .number("requests_per_s", soak.requestsPerSecond)
                               .str());
    }
    return object.str();
}

//! \return an error as one JSON object.
inline std::string jsonOf(loader::Error const& error)
{
    return JsonObject()
        .text("status", "ERROR")
        .count("exit_code", static_cast<uint64_t>(error.failure()))
        .text("failure", loader::nameOf(error.failure()))
        .text("what", error.headline())
        .text("why", error.why())
        .text("fix", error.fix())
        .str();
}

inline std::string csvField(std::string const& text)
{
    if (text.find_first_of(",\"\n") == std::string::npos)
    {
        return text;
    }
    std::string quoted = "\"";
    for (char const c : text)
    {
        quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
    }
    return quoted + "\"";
}

//! Appends a row per measurement; a new file gets a header first.
inline void appendCsv(std::string const& path, Report const& report)
{
    std::FILE* const file = std::fopen(path.c_str(), "ae");
    if (file == nullptr)
    {
        throw loader::Error(loader::Failure::kBUNDLE, path + " cannot be written", std::strerror(errno),
            "choose a folder that exists and is writable");
    }
    std::fseek(file, 0, SEEK_END);
    std::string text =
        std::ftell(file) > 0
            ? ""
            : "case,backend,way,streams,cuda_graphs,status,requests,p50_ms,p90_ms,p99_ms,cv,device_p50_ms,device_cv,"
              "requests_per_s,sequences_per_s,candidates_per_s,peak_mib,max_err,err_bound\n";
    for (Measurement const& each : report.measurements)
    {
        std::vector<std::string> fields{csvField(report.bundle + " " + report.graph + ": " + each.name),
            report.backend + " " + report.tensorRt, nameOf(each.way), std::to_string(report.streams),
            std::to_string(report.cudaGraphs), csvField(statusOf(each)), std::to_string(each.call.count)};
        for (double const value : {each.call.p50, each.call.p90, each.call.p99, each.call.cv, each.device.p50,
                 each.device.cv, each.requestsPerSecond, each.requestsPerSecond * static_cast<double>(each.sequences),
                 each.requestsPerSecond * static_cast<double>(each.candidates), mib(each.deviceBytes)})
        {
            fields.push_back(loader::jsonNumber(value));
        }
        fields.push_back(report.isCompared ? loader::jsonNumber(each.error) : "");
        fields.push_back(report.isCompared ? loader::jsonNumber(each.bound) : "");
        for (std::size_t i = 0; i < fields.size(); ++i)
        {
            text += (i > 0 ? "," : "") + fields[i];
        }
        text += "\n";
    }
    bool const written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
    if (std::fclose(file) != 0 || !written)
    {
        throw loader::Error(
            loader::Failure::kBUNDLE, path + " cannot be written", std::strerror(errno), "free some space");
    }
}

//! Prints what a bundle holds.
inline void printBundle(loader::Bundle const& bundle, bool isJson)
{
    loader::Manifest const& manifest = bundle.manifest();
    auto const tensors = [](std::vector<loader::TensorSpec> const& specs)
    {
        return jsonList(specs,
            [](loader::TensorSpec const& spec)
            {
                return JsonObject()
                    .text("name", spec.name)
                    .text("dtype", loader::factsOf(spec.type).name)
                    .add("shape", jsonList(spec.dims, loader::jsonQuoted))
                    .str();
            });
    };
    if (isJson)
    {
        std::string const graphs = jsonList(manifest.graphs,
            [&](loader::GraphEntry const& graph)
            {
                return JsonObject()
                    .text("name", graph.name)
                    .text("engine", graph.engineFile)
                    .text("schedule", graph.scheduleFile)
                    .add("segments", jsonList(graph.segmentFiles, loader::jsonQuoted))
                    .add("inputs", tensors(graph.inputs))
                    .add("outputs", tensors(graph.outputs))
                    .add("feeds", jsonList(graph.feedNames, loader::jsonQuoted))
                    .str();
            });
        std::printf("%s\n", JsonObject()
                                .text("bundle", bundle.folder())
                                .text("status", manifest.status)
                                .text("precision", manifest.precision)
                                .text("backend", manifest.backend)
                                .text("backend_version", manifest.backendVersion)
                                .count("files", manifest.files.size())
                                .add("graphs", graphs)
                                .str()
                                .c_str());
        return;
    }
    std::printf("%s: %s, %s, backend %s %s, %zu files as the manifest records them\n", bundle.folder().c_str(),
        manifest.status.c_str(), manifest.precision.c_str(), manifest.backend.c_str(), manifest.backendVersion.c_str(),
        manifest.files.size());
    for (loader::GraphEntry const& graph : manifest.graphs)
    {
        std::string const runs = !graph.scheduleFile.empty()
                                     ? loader::textOf("schedule ", graph.scheduleFile, " of ",
                                           graph.segmentFiles.size(), " engines with kernels between them")
                                     : "engine " + (graph.engineFile.empty() ? "none" : graph.engineFile);
        std::printf(
            "graph %s, %s, %zu reference feeds\n", graph.name.c_str(), runs.c_str(), graph.feedNames.size());
        for (bool const isInput : {true, false})
        {
            for (loader::TensorSpec const& spec : isInput ? graph.inputs : graph.outputs)
            {
                std::string dims;
                for (std::string const& dim : spec.dims)
                {
                    dims += (dims.empty() ? "" : ", ") + dim;
                }
                std::printf("  %s %s %s [%s]\n", isInput ? "in " : "out", spec.name.c_str(),
                    loader::factsOf(spec.type).name, dims.c_str());
            }
        }
    }
}

} // namespace hstu::score

#endif // HSTU_SCORE_REPORT_HPP
