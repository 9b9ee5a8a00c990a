#ifndef HSTU_LOADER_KV_CACHE_HPP
#define HSTU_LOADER_KV_CACHE_HPP

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <list>
#include <map>
#include <string>

#include "driver.hpp"
#include "error.hpp"
#include "manifest.hpp"
#include "session.hpp"
#include "tensor.hpp"

//! Keys and values of users in one arena of device memory, the least recently used user goes first.
namespace hstu::loader
{

//! What one cached row holds.
struct KvLayout
{
    int64_t numLayers{0};
    int64_t numHeads{0};
    int64_t attentionDim{0};
    int64_t linearDim{0};
    ElementType type{ElementType::kFLOAT32};

    static constexpr std::size_t kALIGNMENT = 256;

    explicit KvLayout(RankingSpec const& spec)
        : numLayers(spec.numLayers)
        , numHeads(spec.numHeads)
        , attentionDim(spec.attentionDim)
        , linearDim(spec.linearDim)
        , type(spec.kvType)
    {
    }

    //! \return bytes of the budget that a user of so many rows takes: every block begins at a multiple of 256.
    std::size_t entryBytes(int64_t rows) const
    {
        return static_cast<std::size_t>(numLayers) * (blockBytes(rows, attentionDim) + blockBytes(rows, linearDim));
    }

    //! \return k_0, v_0, k_1, ... that begin at an address.
    DeviceTensors tensorsAt(CUdeviceptr address, int64_t rows) const
    {
        DeviceTensors tensors;
        for (int64_t layer = 0; layer < numLayers; ++layer)
        {
            for (bool const isKey : {true, false})
            {
                int64_t const width = isKey ? attentionDim : linearDim;
                DeviceTensor tensor;
                tensor.address = address;
                tensor.shape = {rows, numHeads, width};
                tensor.type = type;
                tensor.bytes = bytesOf(tensor.shape, type);
                tensors[(isKey ? "k_" : "v_") + std::to_string(layer)] = tensor;
                address += blockBytes(rows, width);
            }
        }
        return tensors;
    }

private:
    std::size_t blockBytes(int64_t rows, int64_t width) const
    {
        std::size_t const bytes = bytesOf({rows, numHeads, width}, type);
        return std::max((bytes + kALIGNMENT - 1) / kALIGNMENT, std::size_t{1}) * kALIGNMENT;
    }
};

//! Which bytes of an arena are free: first fit, neighbouring holes are merged. Blocks never move.
class FreeList
{
public:
    static constexpr std::size_t kNONE = ~std::size_t{0};

    explicit FreeList(std::size_t capacity)
    {
        if (capacity > 0)
        {
            mHoles[0] = capacity;
        }
    }

    //! \return offset of a block, or kNONE if no hole is large enough.
    std::size_t take(std::size_t size)
    {
        auto const hole =
            std::find_if(mHoles.begin(), mHoles.end(), [size](auto const& each) { return each.second >= size; });
        if (hole == mHoles.end())
        {
            return kNONE;
        }
        std::size_t const offset = hole->first;
        std::size_t const left = hole->second - size;
        mHoles.erase(hole);
        if (left > 0)
        {
            mHoles[offset + size] = left;
        }
        return offset;
    }

    void giveBack(std::size_t offset, std::size_t size)
    {
        auto next = mHoles.upper_bound(offset);
        if (next != mHoles.end() && offset + size == next->first)
        {
            size += next->second;
            next = mHoles.erase(next);
        }
        if (next != mHoles.begin())
        {
            auto const before = std::prev(next);
            if (before->first + before->second == offset)
            {
                before->second += size;
                return;
            }
        }
        mHoles[offset] = size;
    }

private:
    std::map<std::size_t, std::size_t> mHoles; //!< size by offset
};

enum class CacheUse
{
    kOFF,  //!< the cache was not asked
    kHIT,  //!< the user's rows were there, made from the same history
    kMISS, //!< they were not there
    kSTALE //!< they were there, made from something else
};

struct KvStats
{
    uint64_t hits{0};
    uint64_t misses{0};
    uint64_t stale{0};
    uint64_t evictions{0};
    std::size_t usedBytes{0};
    std::size_t entries{0};
};

//! Least-recently-used cache within a byte budget. One thread at a time may use it.
class KvCache
{
public:
    //! One user's rows.
    struct Entry
    {
        std::string user;
        std::string digest; //!< of everything that the rows depend on
        int64_t rows{0};
        std::size_t offset{0};
        std::size_t bytes{0};
        DeviceTensors tensors;
    };

    KvCache(Driver const& driver, KvLayout const& layout, std::size_t budgetBytes)
        : mLayout(layout)
        , mBudget(budgetBytes / KvLayout::kALIGNMENT * KvLayout::kALIGNMENT)
        , mArena(driver, std::max(mBudget, KvLayout::kALIGNMENT))
        , mFree(mBudget)
    {
    }

    //! Finds a user's rows, or makes room for them by evicting the least recently used users. After a miss the caller
    //! fills the entry's tensors; if that fails it calls `forget`. The entry stays in place until the next call.
    //! \return the entry and how it was found.
    std::pair<Entry const*, CacheUse> checkout(std::string const& user, std::string const& digest, int64_t rows)
    {
        std::size_t const size = mLayout.entryBytes(rows);
        if (size > mBudget)
        {
            throw Error(Failure::kREQUEST, "the KV cache is too small for user '" + user + "'",
                textOf(rows, " rows take ", size, " bytes with their padding; the budget is ", mBudget, " bytes"),
                "give it more with --kv-budget-kib, or keep fewer events of the history");
        }
        CacheUse use = CacheUse::kMISS;
        auto const known = mIndex.find(user);
        if (known != mIndex.end())
        {
            if (known->second->digest == digest && known->second->rows == rows)
            {
                mOrder.splice(mOrder.end(), mOrder, known->second);
                ++mStats.hits;
                return {&mOrder.back(), CacheUse::kHIT};
            }
            drop(known->second);
            use = CacheUse::kSTALE;
        }
        ++(use == CacheUse::kSTALE ? mStats.stale : mStats.misses);
        std::size_t offset = mFree.take(size);
        while (offset == FreeList::kNONE)
        {
            drop(mOrder.begin());
            ++mStats.evictions;
            offset = mFree.take(size);
        }
        mOrder.push_back({user, digest, rows, offset, size, mLayout.tensorsAt(mArena.address() + offset, rows)});
        mIndex[user] = std::prev(mOrder.end());
        return {&mOrder.back(), use};
    }

    //! Drops a user's rows. \return whether there were any.
    bool forget(std::string const& user)
    {
        auto const known = mIndex.find(user);
        if (known == mIndex.end())
        {
            return false;
        }
        drop(known->second);
        return true;
    }

    KvStats stats() const
    {
        KvStats stats = mStats;
        stats.entries = mOrder.size();
        for (Entry const& entry : mOrder)
        {
            stats.usedBytes += entry.bytes;
        }
        return stats;
    }

private:
    void drop(std::list<Entry>::iterator entry)
    {
        mFree.giveBack(entry->offset, entry->bytes);
        mIndex.erase(entry->user);
        mOrder.erase(entry);
    }

    KvLayout mLayout;
    std::size_t mBudget;
    DeviceMemory mArena;
    FreeList mFree;
    std::list<Entry> mOrder; //!< least recently used first
    std::map<std::string, std::list<Entry>::iterator> mIndex;
    KvStats mStats;
};

} // namespace hstu::loader

#endif // HSTU_LOADER_KV_CACHE_HPP
