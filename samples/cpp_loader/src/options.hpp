#ifndef HSTU_SCORE_OPTIONS_HPP
#define HSTU_SCORE_OPTIONS_HPP

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "hstu/error.hpp"

namespace hstu::score
{

//! The command line.
struct Options
{
    std::string bundle;
    std::string graph;
    std::string inputs;
    std::vector<std::pair<std::string, std::string>> raw; //!< (input, file)
    std::string outputs;
    std::string plugin;
    std::string tensorRtLibrary;
    std::string csv;
    int64_t device{0};
    int64_t cudaGraphs{16};
    int64_t streams{1};
    int64_t warmup{10};
    int64_t iterations{100};
    int64_t soak{0};
    int64_t kvBudgetKib{65536};
    int64_t microBatch{0};
    int64_t maxGrowthMib{16};
    bool isRanking{false};
    bool isInspection{false};
    bool acceptsFailed{false};
    bool isJson{false};
    bool wantsHelp{false};
};

inline char const* usageText()
{
    return "usage: hstu_score BUNDLE [options]\n"
           "Runs a bundle of hstu-compile on a GPU, compares it with the bundle's reference, and measures it.\n"
           "\n"
           "  --inspect                 files, hashes, graphs, inputs and outputs; needs no GPU\n"
           "  --graph NAME              graph to run (default: the one that answers a request by itself)\n"
           "  --ranking                 prefill and score with a KV cache, compared with packed\n"
           "  --inputs FILE.npz         run this request batch instead of the bundle's reference feeds\n"
           "  --raw INPUT=FILE          an input from raw bytes; repeat it for every input\n"
           "  --outputs PATH            answers: an .npz file with --inputs or --raw, else a folder for INDEX.npz\n"
           "  --plugin LIB              plugin library (default: the bundle's own)\n"
           "  --tensorrt-library LIB    libnvinfer.so or libtensorrt_rtx.so to load (default: by its soname)\n"
           "  --device N                CUDA device (default 0)\n"
           "  --cuda-graphs N           CUDA graphs that each context keeps, 0 for none (default 16)\n"
           "  --streams N               contexts, each with a stream and a thread (default 1)\n"
           "  --warmup N --iterations N requests before and while measuring, per case (default 10, 100)\n"
           "  --kv-budget-kib N         KV cache of each stream (default 65536)\n"
           "  --micro-batch N           most candidates of a score pass (default: the model's)\n"
           "  --soak N                  N requests over all streams, each answer checked bit for bit\n"
           "  --max-growth-mib N        memory of device or host that a soak may add (default 16)\n"
           "  --accept-failed           run a bundle whose own verification failed\n"
           "  --csv FILE                append one row per measured case\n"
           "  --json                    one JSON object on stdout\n"
           "\n"
           "exit codes: 0 success, 2 options, 5 TensorRT, engine or plugin, 6 answers differ, 7 request data,\n"
           "            8 bundle or output, 9 no CUDA driver or GPU, 10 memory grew, 70 a bug of this program\n";
}

namespace detail
{

[[noreturn]] inline void refuse(std::string const& what, std::string const& why)
{
    throw loader::Error(loader::Failure::kUSAGE, what, why, "see hstu_score --help");
}

inline int64_t numberOf(std::string const& option, std::string const& text, int64_t least, int64_t most)
{
    bool const isNumber =
        !text.empty() && text.size() < 11 && text.find_first_not_of("0123456789") == std::string::npos;
    int64_t const value = isNumber ? std::strtoll(text.c_str(), nullptr, 10) : -1;
    if (!isNumber || value < least || value > most)
    {
        refuse(option + " cannot be " + text, loader::textOf("it is a number from ", least, " to ", most));
    }
    return value;
}

inline void checkTogether(Options const& options)
{
    if (options.bundle.empty())
    {
        refuse("no bundle was named", "the first argument is the folder that `hstu-compile build` wrote");
    }
    bool const hasFeeds = !options.inputs.empty() || !options.raw.empty();
    if (!options.inputs.empty() && !options.raw.empty())
    {
        refuse("--inputs and --raw do not go together", "both give the request");
    }
    if (options.isRanking && (!options.graph.empty() || !options.raw.empty()))
    {
        refuse("--ranking runs three graphs on the feeds of `packed`", "--graph or --raw was given");
    }
    if (!hasFeeds && !options.outputs.empty() && options.outputs.size() > 4
        && options.outputs.compare(options.outputs.size() - 4, 4, ".npz") == 0)
    {
        refuse("--outputs names a file, and there are several reference feeds", options.outputs + " ends in .npz");
    }
}

} // namespace detail

inline Options optionsOf(int argc, char const* const* argv)
{
    Options options;
    std::vector<std::string> const words(argv + 1, argv + argc);
    struct Number
    {
        char const* name;
        int64_t* value;
        int64_t least;
        int64_t most;
    };
    std::vector<Number> const numbers{{"--device", &options.device, 0, 1024},
        {"--cuda-graphs", &options.cudaGraphs, 0, 4096}, {"--streams", &options.streams, 1, 64},
        {"--warmup", &options.warmup, 0, 1000000}, {"--iterations", &options.iterations, 0, 100000000},
        {"--soak", &options.soak, 0, 100000000}, {"--kv-budget-kib", &options.kvBudgetKib, 1, 1000000000},
        {"--micro-batch", &options.microBatch, 1, 1000000}, {"--max-growth-mib", &options.maxGrowthMib, 0, 1000000}};
    std::vector<std::pair<char const*, std::string*>> const texts{{"--graph", &options.graph},
        {"--inputs", &options.inputs}, {"--outputs", &options.outputs}, {"--plugin", &options.plugin},
        {"--tensorrt-library", &options.tensorRtLibrary}, {"--csv", &options.csv}};
    std::vector<std::pair<char const*, bool*>> const switches{{"--ranking", &options.isRanking},
        {"--inspect", &options.isInspection}, {"--accept-failed", &options.acceptsFailed}, {"--json", &options.isJson},
        {"--help", &options.wantsHelp}};
    for (std::size_t i = 0; i < words.size(); ++i)
    {
        std::string const& word = words[i];
        bool known = false;
        auto const value = [&]() -> std::string const&
        {
            if (i + 1 == words.size())
            {
                detail::refuse(word + " needs a value", "it is the last word");
            }
            known = true;
            return words[++i];
        };
        for (auto const& each : numbers)
        {
            if (!known && word == each.name)
            {
                *each.value = detail::numberOf(each.name, value(), each.least, each.most);
            }
        }
        for (auto const& [name, target] : texts)
        {
            if (!known && word == name)
            {
                *target = value();
            }
        }
        for (auto const& [name, target] : switches)
        {
            if (word == name)
            {
                *target = true;
                known = true;
            }
        }
        if (!known && word == "--raw")
        {
            std::string const& pair = value();
            std::size_t const equals = pair.find('=');
            if (equals == std::string::npos || equals == 0)
            {
                detail::refuse("--raw cannot be " + pair, "it is INPUT=FILE");
            }
            options.raw.emplace_back(pair.substr(0, equals), pair.substr(equals + 1));
        }
        if (!known && word.rfind("--", 0) == 0)
        {
            detail::refuse("there is no option " + word, "it is none of those that --help lists");
        }
        if (!known && !options.bundle.empty())
        {
            detail::refuse("two bundles were named", options.bundle + " and " + word);
        }
        if (!known)
        {
            options.bundle = word;
        }
    }
    if (!options.wantsHelp)
    {
        detail::checkTogether(options);
    }
    return options;
}

} // namespace hstu::score

#endif // HSTU_SCORE_OPTIONS_HPP
