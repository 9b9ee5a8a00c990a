#ifndef HSTU_LOADER_RANKING_HPP
#define HSTU_LOADER_RANKING_HPP

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "error.hpp"
#include "kvCache.hpp"
#include "manifest.hpp"
#include "session.hpp"
#include "sha256.hpp"
#include "tensor.hpp"

//! M-FALCON on one stream: encode a user's history once (`prefill`), keep it, score candidates in micro-batches
//! (`score`).
namespace hstu::loader
{

//! One user's history, context and candidates, in the manifest's types.
struct RankingRequest
{
    std::string user;
    Tensors history;
    Tensors context;
    Tensors candidates;
    int64_t numEvents{0};
    int64_t numCandidates{0};
    int64_t timestamp{0}; //!< query time of the last candidate; 0 without candidates
};

struct RankingAnswer
{
    HostTensor preds;  //!< [candidates, tasks] float32
    HostTensor logits; //!< [candidates, tasks] float32
    CacheUse cache{CacheUse::kOFF};
};

struct RankingStats
{
    uint64_t prefillPasses{0};
    uint64_t scorePasses{0};
    uint64_t packedPasses{0};
};

//! Cuts the users of a `packed` feed apart. Every request is its own batch from then on.
//! \param feed what `checkedFeeds` returned.
//! \param label begins the users' names.
inline std::vector<RankingRequest> requestsOf(RankingSpec const& spec, Tensors const& feed, std::string const& label)
{
    return typed("cutting requests",
        [&]
        {
            HostTensor const& events = feed.at("seq_offsets");
            HostTensor const& asked = feed.at("candidate_offsets");
            std::vector<RankingRequest> requests;
            auto const part = [&feed](std::string const& name, int64_t first, int64_t last)
            { return feed.at(name).slice(static_cast<std::size_t>(first), static_cast<std::size_t>(last)); };
            for (std::size_t user = 0; user + 1 < events.elements(); ++user)
            {
                RankingRequest request;
                request.user = textOf(label, "/", user);
                int64_t const firstEvent = events.integerAt(user);
                int64_t const firstAsked = asked.integerAt(user);
                request.numEvents = events.integerAt(user + 1) - firstEvent;
                request.numCandidates = asked.integerAt(user + 1) - firstAsked;
                for (std::string const& name : spec.historyNames())
                {
                    request.history[name] = part(name, firstEvent, firstEvent + request.numEvents);
                }
                for (std::string const& name : spec.candidateNames())
                {
                    request.candidates[name] = part(name, firstAsked, firstAsked + request.numCandidates);
                }
                for (RankingFeature const& feature : spec.contextual)
                {
                    auto const index = static_cast<int64_t>(user);
                    request.context[feature.name] =
                        part(feature.name, index * feature.maxLength, (index + 1) * feature.maxLength);
                }
                if (request.numCandidates > 0)
                {
                    request.timestamp = request.candidates.at(spec.candidateTime)
                                            .integerAt(static_cast<std::size_t>(request.numCandidates - 1));
                }
                requests.push_back(std::move(request));
            }
            return requests;
        });
}

//! Refuses what would give another answer than the model's: ids outside their tables, times that go back.
inline void checkRequest(RankingSpec const& spec, RankingRequest const& request)
{
    typed("checking a request",
        [&]
        {
            detail::Problems problems;
            auto const checkIds = [&](RankingFeature const& feature, HostTensor const& ids, bool mayBeAbsent)
            {
                for (std::size_t i = 0; !feature.isExternal && i < ids.elements(); ++i)
                {
                    int64_t const id = ids.integerAt(i);
                    if (id >= feature.tableSize || (id < 0 && !mayBeAbsent))
                    {
                        problems.add(feature.name, "[", i, "] is ", id, "; ids are 0..", feature.tableSize - 1);
                        return;
                    }
                }
            };
            for (RankingFeature const& feature : spec.historyIds)
            {
                checkIds(feature, request.history.at(feature.name), false);
            }
            for (RankingFeature const& feature : spec.candidateIds)
            {
                checkIds(feature, request.candidates.at(feature.name), false);
            }
            for (RankingFeature const& feature : spec.contextual)
            {
                checkIds(feature, request.context.at(feature.name), true);
            }
            if (request.numEvents > spec.maxHistoryLen)
            {
                problems.add(request.numEvents, " events; at most ", spec.maxHistoryLen, " fit");
            }
            HostTensor const& times = request.history.at(spec.historyTime);
            HostTensor const& queries = request.candidates.at(spec.candidateTime);
            for (std::size_t i = 1; i < times.elements(); ++i)
            {
                if (times.integerAt(i) < times.integerAt(i - 1))
                {
                    problems.add("time goes back at event ", i);
                    break;
                }
            }
            for (std::size_t i = 0; times.elements() > 0 && i < queries.elements(); ++i)
            {
                if (queries.integerAt(i) < times.integerAt(times.elements() - 1))
                {
                    problems.add("candidate ", i, " is asked for before the last event");
                    break;
                }
            }
            problems.raise("the request of user '" + request.user + "' is not one that the model takes");
        });
}

//! Scores one request after the other on one stream. Passes hold one user; a session of hstu_compile in Python also
//! puts several users into a pass. One thread at a time may use it.
class RankingScorer
{
public:
    //! \param packed, prefill, score sessions of the three graphs, which outlive this.
    //! \param microBatch most candidates of a score pass; 0 takes the model's.
    RankingScorer(Driver const& driver, RankingSpec const& spec, Session& packed, Session& prefill, Session& score,
        std::size_t budgetBytes, int64_t microBatch)
        : mSpec(spec)
        , mLayout(spec)
        , mPacked(packed)
        , mPrefill(prefill)
        , mScore(score)
        , mCache(driver, mLayout, budgetBytes)
        , mMicroBatch(microBatch == 0 ? spec.microBatch : microBatch)
    {
        if (mMicroBatch < 1 || mMicroBatch > spec.microBatch)
        {
            throw Error(Failure::kUSAGE, "the micro-batch does not fit the model",
                textOf("it is ", mMicroBatch, "; the score graph takes 1 to ", spec.microBatch),
                "choose another --micro-batch, or build with a larger --m-falcon micro-batch");
        }
        if (mScore.hasGraphs())
        {
            // A graph knows the addresses that it was recorded with, and every user lies elsewhere in the cache: passes
            // of equal lengths replay because they read and write one place, from and to which rows are copied.
            mStaging =
                std::make_unique<DeviceMemory>(driver, mLayout.entryBytes(spec.contextualLen() + spec.maxHistoryLen));
        }
    }

    //! Scores a request's candidates with the cache.
    RankingAnswer score(RankingRequest const& request)
    {
        return typed("scoring with the cache",
            [&]
            {
                checkRequest(mSpec, request);
                RankingAnswer answer = emptyAnswer(request);
                mDeviceMilliseconds = 0;
                if (request.numCandidates == 0)
                {
                    return answer;
                }
                int64_t const rows = rowsOf(request);
                auto const [entry, use] = mCache.checkout(request.user, digestOf(request), rows);
                answer.cache = use;
                DeviceTensors const& kept = entry->tensors;
                DeviceTensors const placed = mStaging ? mLayout.tensorsAt(mStaging->address(), rows) : kept;
                try
                {
                    if (use != CacheUse::kHIT && rows > 0)
                    {
                        Residents residents;
                        residents.writes = placed;
                        residents.after = copies(placed, kept);
                        mPrefill.run(prefillFeeds(request), residents);
                        mDeviceMilliseconds += mPrefill.deviceMilliseconds();
                        ++stats.prefillPasses;
                    }
                    std::vector<DeviceCopy> before = copies(kept, placed);
                    for (int64_t first = 0; first < request.numCandidates; first += mMicroBatch)
                    {
                        int64_t const last = std::min(first + mMicroBatch, request.numCandidates);
                        Residents residents;
                        residents.reads = placed;
                        residents.before = std::exchange(before, {});
                        put(answer, mScore.run(scoreFeeds(request, first, last), residents), first, last - first);
                        mDeviceMilliseconds += mScore.deviceMilliseconds();
                        ++stats.scorePasses;
                    }
                }
                catch (...)
                {
                    // What a failed pass left behind must not be found by the next request.
                    mCache.forget(request.user);
                    throw;
                }
                return answer;
            });
    }

    //! Scores history and candidates in one forward pass, without the cache.
    RankingAnswer scorePacked(RankingRequest const& request)
    {
        return typed("scoring without the cache",
            [&]
            {
                checkRequest(mSpec, request);
                RankingAnswer answer = emptyAnswer(request);
                mDeviceMilliseconds = 0;
                if (request.numCandidates == 0)
                {
                    return answer;
                }
                Tensors feeds = historyFeeds(request);
                for (auto const& [name, tensor] : request.candidates)
                {
                    feeds[name] = tensor;
                }
                feeds["candidate_offsets"] = offsets(request.numCandidates);
                put(answer, mPacked.run(feeds), 0, request.numCandidates);
                mDeviceMilliseconds = mPacked.deviceMilliseconds();
                ++stats.packedPasses;
                return answer;
            });
    }

    //! Drops a user's keys and values.
    void forget(std::string const& user)
    {
        mCache.forget(user);
    }

    //! \return milliseconds that the passes of the last request took on the device, without copies.
    double deviceMilliseconds() const noexcept
    {
        return mDeviceMilliseconds;
    }

    KvStats cacheStats() const
    {
        return mCache.stats();
    }

    RankingStats stats;

private:
    static HostTensor offsets(int64_t end)
    {
        return HostTensor::ofValues(ElementType::kINT32, std::vector<int32_t>{0, static_cast<int32_t>(end)});
    }

    RankingAnswer emptyAnswer(RankingRequest const& request) const
    {
        Shape const shape{request.numCandidates, mSpec.numTasks};
        return {HostTensor(ElementType::kFLOAT32, shape), HostTensor(ElementType::kFLOAT32, shape), CacheUse::kOFF};
    }

    //! \return tokens before the candidates, which are the rows that are cached.
    int64_t rowsOf(RankingRequest const& request) const
    {
        return mSpec.contextualLen() + request.numEvents;
    }

    //! \return the divisor. With that of the batch, the request is its own batch.
    float scalingOf(RankingRequest const& request) const
    {
        return mSpec.scaling > 0 ? static_cast<float>(mSpec.scaling)
                                 : static_cast<float>(rowsOf(request) + request.numCandidates);
    }

    //! \return digest of everything that the keys and values depend on, by the model's cache rule.
    std::string digestOf(RankingRequest const& request) const
    {
        Sha256 digest;
        auto const add = [&digest](int64_t value) { digest.update(&value, sizeof(value)); };
        auto const addTensor = [&](HostTensor const& tensor)
        {
            // The length keeps one feature's last value from passing as the next one's first.
            add(static_cast<int64_t>(tensor.bytes.size()));
            digest.update(tensor.bytes.data(), tensor.bytes.size());
        };
        for (std::string const& name : mSpec.historyNames())
        {
            addTensor(request.history.at(name));
        }
        int64_t const length = request.numEvents + (mSpec.countsCandidates ? request.numCandidates : 0);
        for (RankingFeature const& feature : mSpec.contextual)
        {
            addTensor(request.context.at(feature.name));
            add(length >= feature.minHistoryLen ? 1 : 0);
        }
        float const scaling = scalingOf(request);
        digest.update(&scaling, sizeof(scaling));
        if (mSpec.dependsOnQuery)
        {
            add(request.timestamp);
        }
        return digest.hex();
    }

    Tensors historyFeeds(RankingRequest const& request) const
    {
        Tensors feeds = request.history;
        for (auto const& [name, tensor] : request.context)
        {
            feeds[name] = tensor;
        }
        feeds["seq_offsets"] = offsets(request.numEvents);
        return feeds;
    }

    void addQuery(Tensors& feeds, RankingRequest const& request) const
    {
        feeds["request_timestamps"] =
            HostTensor::ofValues(ElementType::kINT64, std::vector<int64_t>{request.timestamp});
        if (!(mSpec.scaling > 0))
        {
            feeds["scaling_seq_lens"] =
                HostTensor::ofValues(ElementType::kFLOAT32, std::vector<float>{scalingOf(request)});
        }
    }

    Tensors prefillFeeds(RankingRequest const& request) const
    {
        Tensors feeds = historyFeeds(request);
        addQuery(feeds, request);
        if (mSpec.hasMinimum())
        {
            feeds["num_candidates"] = HostTensor::ofValues(
                ElementType::kINT32, std::vector<int32_t>{static_cast<int32_t>(request.numCandidates)});
        }
        return feeds;
    }

    Tensors scoreFeeds(RankingRequest const& request, int64_t first, int64_t last) const
    {
        Tensors feeds;
        for (auto const& [name, tensor] : request.candidates)
        {
            feeds[name] = tensor.slice(static_cast<std::size_t>(first), static_cast<std::size_t>(last));
        }
        feeds["candidate_offsets"] = offsets(last - first);
        feeds["cache_offsets"] = offsets(rowsOf(request));
        addQuery(feeds, request);
        return feeds;
    }

    //! \return copies of every block, none where both are one place.
    static std::vector<DeviceCopy> copies(DeviceTensors const& from, DeviceTensors const& into)
    {
        std::vector<DeviceCopy> all;
        for (auto const& [name, tensor] : from)
        {
            CUdeviceptr const target = into.at(name).address;
            if (target != tensor.address)
            {
                all.push_back({tensor.address, target, tensor.bytes});
            }
        }
        return all;
    }

    static void put(RankingAnswer& answer, Tensors const& outputs, int64_t first, int64_t count)
    {
        for (auto const& [name, target] :
            {std::pair<char const*, HostTensor*>{"preds", &answer.preds}, {"logits", &answer.logits}})
        {
            HostTensor const& part = outputs.at(name);
            if (part.shape != Shape{count, target->shape[1]} || part.type != ElementType::kFLOAT32)
            {
                throw Error(Failure::kENGINE, std::string("the engine gave no ") + name + " of every candidate",
                    textOf(factsOf(part.type).name, " ", textOfShape(part.shape), " for ", count, " candidates and ",
                        target->shape[1], " tasks"),
                    "build the bundle again");
            }
            std::size_t const row = static_cast<std::size_t>(target->shape[1]) * 4;
            std::memcpy(
                target->bytes.data() + static_cast<std::size_t>(first) * row, part.bytes.data(), part.bytes.size());
        }
    }

    RankingSpec mSpec;
    KvLayout mLayout;
    Session& mPacked;
    Session& mPrefill;
    Session& mScore;
    KvCache mCache;
    int64_t mMicroBatch;
    std::unique_ptr<DeviceMemory> mStaging;
    double mDeviceMilliseconds{0};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_RANKING_HPP
