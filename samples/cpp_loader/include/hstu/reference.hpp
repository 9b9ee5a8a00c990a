#ifndef HSTU_LOADER_REFERENCE_HPP
#define HSTU_LOADER_REFERENCE_HPP

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "error.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "npy.hpp"
#include "tensor.hpp"

//! What the bundle's graphs must answer, and how far an answer may be from it.
namespace hstu::loader
{

//! One stored request and what the eager model answers in float64.
struct ReferenceFeed
{
    std::string name;
    Tensors inputs;
    Tensors exact;
};

namespace detail
{

static constexpr uint64_t kMOST_REFERENCE_BYTES = 2ULL << 30;

inline Json jsonOf(Bytes const& text, std::string const& name)
{
    return Json::parse(reinterpret_cast<char const*>(text.data()), text.size(), name);
}

inline HostTensor tensorFromPolygraphy(Json const& entry, std::string const& where)
{
    Bytes const npy = bytesFromBase64(entry.at("array", where).string(where), where);
    return tensorFromNpy(npy.data(), npy.size(), where);
}

} // namespace detail

//! Reads Polygraphy's list of feeds (`--load-inputs`).
//! \param path of the file, for messages.
inline std::vector<Tensors> polygraphyFeedsOf(Bytes const& text, std::string const& path)
{
    return typed("reading feeds",
        [&]
        {
            Json const root = detail::jsonOf(text, path);
            std::vector<Tensors> feeds;
            for (Json const& entry : root.array(path))
            {
                Tensors feed;
                for (auto const& [name, array] : entry.object(path))
                {
                    feed[name] = detail::tensorFromPolygraphy(array, path + ": " + name);
                }
                feeds.push_back(std::move(feed));
            }
            return feeds;
        });
}

//! Reads Polygraphy's outputs of one runner (`--load-outputs`), one entry per feed.
//! \param path of the file, for messages.
inline std::vector<Tensors> polygraphyOutputsOf(Bytes const& text, std::string const& path)
{
    return typed("reading reference outputs",
        [&]
        {
            Json const root = detail::jsonOf(text, path);
            Json::Array const& runners = root.at("lst", path).array(path);
            if (runners.size() != 1 || runners[0].array(path).size() != 2)
            {
                Json::refuse(path, "it does not hold the outputs of one runner");
            }
            std::vector<Tensors> results;
            for (Json const& iteration : runners[0].array(path)[1].array(path))
            {
                Tensors outputs;
                for (auto const& [name, lazy] : iteration.at("outputs", path).object(path))
                {
                    outputs[name] = detail::tensorFromPolygraphy(lazy.at("values", path), path + ": " + name);
                }
                results.push_back(std::move(outputs));
            }
            return results;
        });
}

//! Reads what a bundle holds to compare one graph with.
inline std::vector<ReferenceFeed> readReference(Bundle const& bundle, GraphEntry const& graph)
{
    if (!graph.isVerified)
    {
        throw Error(Failure::kBUNDLE, bundle.folder() + " holds no reference of the graph " + graph.name,
            "it was built with --no-verify", "build it without --no-verify, or give feeds with --inputs");
    }
    bool const isMain = graph.name == "retrieval" || graph.name == "packed";
    std::string const prefix = isMain ? "" : graph.name + "_";
    std::string const feedsFile = prefix + "feeds.json";
    std::string const exactFile = prefix + "reference_outputs.json";
    uint64_t const most = detail::kMOST_REFERENCE_BYTES;
    std::vector<Tensors> feeds = polygraphyFeedsOf(bundle.readVouched(feedsFile, most), bundle.pathOf(feedsFile));
    std::vector<Tensors> exact = polygraphyOutputsOf(bundle.readVouched(exactFile, most), bundle.pathOf(exactFile));
    if (feeds.size() != exact.size() || feeds.size() != graph.feedNames.size() || feeds.empty())
    {
        throw Error(Failure::kBUNDLE, "the references of the graph " + graph.name + " do not go together",
            textOf(graph.feedNames.size(), " names, ", feeds.size(), " feeds and ", exact.size(), " outputs"),
            "build the bundle again");
    }
    std::vector<ReferenceFeed> reference;
    for (std::size_t i = 0; i < feeds.size(); ++i)
    {
        reference.push_back({graph.feedNames[i], std::move(feeds[i]), std::move(exact[i])});
    }
    return reference;
}

//! How far one tensor is from its reference.
struct RowError
{
    double error{0};    //!< largest over the rows: max |actual - reference| over the row's root mean square
    std::size_t row{0}; //!< where it is largest
};

//! \return the largest row error; infinite where shapes differ, a value is not finite, or a zero row is not zero.
//! A tensor named preds or logits has one number per row, which has no scale of its own: there a row is a task's
//! column.
inline RowError rowErrorOf(std::string const& name, HostTensor const& actual, HostTensor const& reference)
{
    double const infinity = std::numeric_limits<double>::infinity();
    if (actual.shape != reference.shape || actual.shape.empty())
    {
        return {infinity, 0};
    }
    bool const byColumn = (name == "preds" || name == "logits") && actual.shape.size() == 2;
    std::size_t const leading = actual.rows();
    std::size_t const width = leading == 0 ? 0 : actual.elements() / leading;
    std::size_t const rows = byColumn ? width : leading;
    std::size_t const columns = byColumn ? leading : width;
    RowError worst;
    for (std::size_t row = 0; row < rows; ++row)
    {
        double largest = 0;
        double squares = 0;
        for (std::size_t column = 0; column < columns; ++column)
        {
            std::size_t const index = byColumn ? column * width + row : row * width + column;
            double const expected = reference.numberAt(index);
            double const difference = std::abs(actual.numberAt(index) - expected);
            largest = std::isfinite(difference) ? std::max(largest, difference) : infinity;
            squares += expected * expected;
        }
        double const scale = columns == 0 ? 0 : std::sqrt(squares / static_cast<double>(columns));
        // Before it is divided by: infinity over infinity would compare as no error.
        bool const isFinite = std::isfinite(largest) && std::isfinite(scale);
        double const error = !isFinite ? infinity : scale > 0 ? largest / scale : largest > 0 ? infinity : 0;
        if (error > worst.error)
        {
            worst = {error, row};
        }
    }
    return worst;
}

//! \return largest error allowed: twice that of the eager model in the same precision, which rounds in the same places
//! in another order; at least what roundoff alone makes of a few operations. Zero where the eager error is not finite: a
//! model that overflows says nothing about how far an answer may be off.
inline double errorBound(double eagerError, std::string const& precision)
{
    double const floor = precision == "fp32" ? 5e-6 : precision == "fp16" ? 4.0 / 2048.0 : 4.0 / 256.0;
    return std::isfinite(eagerError) ? 2.0 * std::max(eagerError, floor) : 0.0;
}

//! One output of one feed, compared.
struct Comparison
{
    std::string tensor;
    std::string feed;
    double error{0};
    double bound{0};
    std::size_t row{0};

    bool passed() const noexcept
    {
        return error <= bound;
    }
};

//! Compares every output that the bundle has a float64 reference and an eager error of. top_items and top_scores have
//! none: near ties may change places; `hstu-compile verify` checks them.
inline std::vector<Comparison> compareOutputs(
    GraphEntry const& graph, std::string const& precision, ReferenceFeed const& feed, Tensors const& actual)
{
    std::vector<Comparison> rows;
    for (auto const& [name, eager] : graph.eagerError)
    {
        auto const expected = feed.exact.find(name);
        auto const found = actual.find(name);
        if (expected == feed.exact.end())
        {
            continue;
        }
        RowError const error = found == actual.end() ? RowError{std::numeric_limits<double>::infinity(), 0}
                                                     : rowErrorOf(name, found->second, expected->second);
        rows.push_back({name, feed.name, error.error, errorBound(eager, precision), error.row});
    }
    return rows;
}

} // namespace hstu::loader

#endif // HSTU_LOADER_REFERENCE_HPP
