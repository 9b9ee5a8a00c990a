#ifndef HSTU_SCORE_LANES_HPP
#define HSTU_SCORE_LANES_HPP

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hstu_bundle.hpp"

//! Cases to answer, and lanes that answer them: a lane is one stream with its contexts, used by one thread.
namespace hstu::score
{

//! One request, answered again and again.
struct Case
{
    std::string name;
    loader::Tensors feeds;          //!< of a graph
    loader::RankingRequest request; //!< of a ranking session
    std::size_t sequences{0};
    std::size_t candidates{0};
};

//! How a ranking lane answers.
enum class Way
{
    kGRAPH,  //!< one graph, as it is
    kPACKED, //!< a ranking request in one forward pass
    kCOLD,   //!< with the cache, whose entry was dropped before
    kCACHED  //!< with the cache
};

inline char const* nameOf(Way way)
{
    switch (way)
    {
    case Way::kGRAPH: return "graph";
    case Way::kPACKED: return "packed";
    case Way::kCOLD: return "cold";
    case Way::kCACHED: return "cached";
    }
    return "unknown";
}

//! Graphs of a bundle, opened once, or once per lane in TensorRT 8.
class Engines
{
public:
    Engines(loader::TensorRt& tensorRt, loader::Driver const& driver, loader::Bundle const& bundle)
        : mTensorRt(tensorRt)
        , mDriver(driver)
        , mBundle(bundle)
    {
    }

    std::unique_ptr<loader::Session> session(std::string const& graph, std::size_t cudaGraphs)
    {
        std::shared_ptr<loader::LoadedGraph>& kept = mKept[graph];
        std::shared_ptr<loader::LoadedGraph> opened = kept;
        if (!opened)
        {
            opened = loader::openGraph(mTensorRt, mDriver, mBundle, mBundle.graph(graph));
            // In TensorRT 8 the next lane needs an engine of its own.
            kept = loader::Engine::kIS_SHARED ? opened : nullptr;
        }
        return std::make_unique<loader::Session>(mTensorRt, mDriver, opened, cudaGraphs);
    }

private:
    loader::TensorRt& mTensorRt;
    loader::Driver const& mDriver;
    loader::Bundle const& mBundle;
    std::map<std::string, std::shared_ptr<loader::LoadedGraph>> mKept;
};

struct LaneOptions
{
    std::string graph; //!< of lanes that run one graph
    bool isRanking{false};
    std::size_t cudaGraphs{0};
    std::size_t kvBudgetBytes{0};
    int64_t microBatch{0};
};

class Lane
{
public:
    Lane(loader::Driver const& driver, loader::Bundle const& bundle, Engines& engines, LaneOptions const& options)
    {
        if (!options.isRanking)
        {
            mGraph = engines.session(options.graph, options.cudaGraphs);
            return;
        }
        mGraph = engines.session("packed", options.cudaGraphs);
        mPrefill = engines.session("prefill", options.cudaGraphs);
        mScore = engines.session("score", options.cudaGraphs);
        mRanking = std::make_unique<loader::RankingScorer>(
            driver, *bundle.manifest().ranking, *mGraph, *mPrefill, *mScore, options.kvBudgetBytes, options.microBatch);
    }

    loader::Tensors answer(Case const& asked, Way way)
    {
        if (way == Way::kGRAPH)
        {
            return mGraph->run(asked.feeds);
        }
        if (way == Way::kCOLD)
        {
            mRanking->forget(asked.request.user);
        }
        loader::RankingAnswer answer =
            way == Way::kPACKED ? mRanking->scorePacked(asked.request) : mRanking->score(asked.request);
        lastUse = answer.cache;
        loader::Tensors outputs;
        outputs["preds"] = std::move(answer.preds);
        outputs["logits"] = std::move(answer.logits);
        return outputs;
    }

    //! \return milliseconds of the last answer on the device.
    double deviceMilliseconds() const
    {
        return mRanking ? mRanking->deviceMilliseconds() : mGraph->deviceMilliseconds();
    }

    loader::GraphStats graphStats() const
    {
        loader::GraphStats sum;
        for (loader::Session const* session : {mGraph.get(), mPrefill.get(), mScore.get()})
        {
            if (session != nullptr)
            {
                loader::GraphStats const& each = session->graphStats();
                sum.captures += each.captures;
                sum.replays += each.replays;
                sum.evictions += each.evictions;
                sum.failures += each.failures;
            }
        }
        return sum;
    }

    loader::RankingScorer const* ranking() const noexcept
    {
        return mRanking.get();
    }

    loader::CacheUse lastUse{loader::CacheUse::kOFF};

private:
    std::unique_ptr<loader::Session> mGraph;
    std::unique_ptr<loader::Session> mPrefill;
    std::unique_ptr<loader::Session> mScore;
    std::unique_ptr<loader::RankingScorer> mRanking;
};

//! Whether two answers are the same to the last bit.
inline bool isSame(loader::Tensors const& one, loader::Tensors const& other)
{
    if (one.size() != other.size())
    {
        return false;
    }
    for (auto const& [name, tensor] : one)
    {
        auto const found = other.find(name);
        if (found == other.end() || found->second.shape != tensor.shape || found->second.bytes != tensor.bytes)
        {
            return false;
        }
    }
    return true;
}

} // namespace hstu::score

#endif // HSTU_SCORE_LANES_HPP
