//! What a cached history may be reused for, and who is evicted, on the fakes of TensorRT and CUDA. With sessionRules.cpp
//! a second translation unit of readers.cpp's program, with the whole loader in it: a definition that is not inline would
//! be there twice.

#include <cstdio>
#include <string>
#include <vector>

#include "expect.hpp"
#include "hstu_bundle.hpp"

//! Prints what does not hold. \return 0 if everything does.
int checkCacheRules(std::string const& path);

namespace
{

using namespace hstu::loader;

class Rules
{
public:
    explicit Rules(Bundle const& bundle)
        : mBundle(bundle)
        , mDriver(0)
        , mTensorRt("")
    {
        mTensorRt.loadPlugin(bundle.pathOf(kPLUGIN_FILE), bundle.manifest());
    }

    void check(std::size_t graphs)
    {
        Session packed(mTensorRt, mDriver, engine("packed"), graphs);
        Session prefill(mTensorRt, mDriver, engine("prefill"), graphs);
        Session score(mTensorRt, mDriver, engine("score"), graphs);
        RankingSpec const& spec = *mBundle.manifest().ranking;
        std::size_t const one = KvLayout(spec).entryBytes(spec.contextualLen() + 20);
        // Room for two users of 20 events, not for three.
        RankingScorer scorer(mDriver, spec, packed, prefill, score, 2 * one + one / 2, 0);
        mScorer = &scorer;
        checkReuse();
        checkEviction();
        checkFailure();
    }

private:
    std::shared_ptr<Engine> engine(char const* graph)
    {
        return Engine::open(mTensorRt, mDriver, mBundle, mBundle.graph(graph));
    }

    RankingRequest request(std::string const& user, std::vector<int64_t> const& queries) const
    {
        std::vector<int32_t> movies;
        std::vector<int64_t> times;
        for (int32_t i = 0; i < 20; ++i)
        {
            movies.push_back(i * 7 % 300);
            times.push_back(1700000000 + i);
        }
        RankingRequest made;
        made.user = user;
        made.history["movie"] = HostTensor::ofValues(ElementType::kINT32, movies);
        made.history["time"] = HostTensor::ofValues(ElementType::kINT64, times);
        made.history["action"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>(20, 3));
        made.context["user"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>{1, 2});
        std::vector<int32_t> items;
        for (std::size_t i = 0; i < queries.size(); ++i)
        {
            items.push_back(static_cast<int32_t>(11 * i + 5));
        }
        made.candidates["item"] = HostTensor::ofValues(ElementType::kINT32, items);
        made.candidates["query"] = HostTensor::ofValues(ElementType::kINT64, queries);
        made.numEvents = 20;
        made.numCandidates = static_cast<int64_t>(queries.size());
        made.timestamp = queries.back();
        return made;
    }

    void expectUse(RankingRequest const& asked, CacheUse use, std::string const& what)
    {
        RankingAnswer const answer = mScorer->score(asked);
        RankingAnswer const alone = mScorer->scorePacked(asked);
        expect(answer.cache == use, what);
        // The fake's sums are in another order than a packed pass takes them.
        expect(
            rowErrorOf("logits", answer.logits, alone.logits).error < 1e-5, what + ": its logits are those of packed");
        expect(alone.cache == CacheUse::kOFF, "packed asks no cache");
    }

    void checkReuse()
    {
        std::vector<int64_t> const early(5, 1700000100);
        std::vector<int64_t> const late(5, 1700000150);
        expectUse(request("a", early), CacheUse::kMISS, "a first request is a miss");
        expectUse(request("a", early), CacheUse::kHIT, "the same request is a hit");
        RankingRequest others = request("a", early);
        others.candidates["item"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>{9, 8, 7, 6, 5});
        expectUse(others, CacheUse::kHIT, "other candidates are a hit");
        expectUse(request("a", late), CacheUse::kSTALE, "another query time is stale");
        expectUse(request("a", std::vector<int64_t>(6, 1700000150)), CacheUse::kSTALE,
            "another number of candidates is stale where the divisor counts them");
        RankingRequest changed = request("a", late);
        changed.history["movie"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>(20, 4));
        expectUse(changed, CacheUse::kSTALE, "another history is stale");
        expectUse(changed, CacheUse::kHIT, "and a hit from then on");
        RankingRequest moved = changed;
        moved.context["user"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>{3, 2});
        expectUse(moved, CacheUse::kSTALE, "another context is stale");
    }

    void checkEviction()
    {
        std::vector<int64_t> const queries(3, 1700000100);
        for (char const* const user : {"a", "b", "c"})
        {
            mScorer->forget(user);
        }
        uint64_t const before = mScorer->cacheStats().evictions;
        expectUse(request("a", queries), CacheUse::kMISS, "a is new");
        expectUse(request("b", queries), CacheUse::kMISS, "b is new");
        expectUse(request("a", queries), CacheUse::kHIT, "both fit");
        expectUse(request("c", queries), CacheUse::kMISS, "c is new");
        expect(mScorer->cacheStats().evictions == before + 1, "one user made room for c");
        expectUse(request("a", queries), CacheUse::kHIT, "a, asked for after b, stayed");
        expectUse(request("b", queries), CacheUse::kMISS, "b went");
        expect(mScorer->cacheStats().entries == 2, "two users fit");
    }

    void checkFailure()
    {
        RankingRequest bad = request("d", std::vector<int64_t>(3, 1700000100));
        // Its own check does not see this: the feed is refused where the graph runs.
        bad.context["user"] = HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>{1, 2, 3});
        bad.history["unknown"] = bad.history["action"];
        bool isRefused = false;
        try
        {
            mScorer->score(bad);
        }
        catch (Error const& error)
        {
            isRefused = error.failure() == Failure::kREQUEST;
        }
        expect(isRefused, "a request that prefill refuses is an error of the request");
        expectUse(
            request("d", std::vector<int64_t>(3, 1700000100)), CacheUse::kMISS, "and leaves nothing in the cache");
    }

    Bundle const& mBundle;
    Driver mDriver;
    TensorRt mTensorRt;
    RankingScorer* mScorer{nullptr};
};

} // namespace

int checkCacheRules(std::string const& path)
{
    Bundle const bundle = Bundle::open(path);
    Rules rules(bundle);
    rules.check(0);
    rules.check(4);
    return gFailures == 0 ? 0 : 1;
}
