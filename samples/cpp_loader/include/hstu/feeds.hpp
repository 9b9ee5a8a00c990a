#ifndef HSTU_LOADER_FEEDS_HPP
#define HSTU_LOADER_FEEDS_HPP

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>

#include "error.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

//! Feeds: what a graph takes, and the proof that a request is that. An engine trusts its offsets, so they are checked
//! here.
namespace hstu::loader
{

//! Gives a tensor another element type where no value changes.
//! \return why not, or an empty text.
inline std::string convertTensor(HostTensor const& from, ElementType type, HostTensor& into)
{
    if (from.type == type)
    {
        into = from;
        return "";
    }
    std::string const refusal =
        textOf("is ", factsOf(from.type).name, ", and ", factsOf(type).name, " cannot hold it unchanged");
    into = HostTensor(type, from.shape);
    if (type == ElementType::kBFLOAT16 && from.type == ElementType::kFLOAT32)
    {
        for (std::size_t i = 0; i < from.elements(); ++i)
        {
            uint32_t bits = 0;
            std::memcpy(&bits, from.bytes.data() + 4 * i, sizeof(bits));
            if ((bits & 0xFFFFU) != 0)
            {
                return refusal;
            }
            auto const high = static_cast<uint16_t>(bits >> 16);
            std::memcpy(into.bytes.data() + 2 * i, &high, sizeof(high));
        }
        return "";
    }
    bool const isTaken = type == ElementType::kINT32 || type == ElementType::kINT64;
    if (!from.isInteger() || !isTaken)
    {
        return refusal;
    }
    for (std::size_t i = 0; i < from.elements(); ++i)
    {
        int64_t const value = from.integerAt(i);
        if (type == ElementType::kINT64)
        {
            std::memcpy(into.bytes.data() + 8 * i, &value, sizeof(value));
            continue;
        }
        if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
        {
            return refusal + textOf(": element ", i, " is ", value);
        }
        auto const narrow = static_cast<int32_t>(value);
        std::memcpy(into.bytes.data() + 4 * i, &narrow, sizeof(narrow));
    }
    return "";
}

namespace detail
{

//! Collects everything that is wrong with a request.
class Problems
{
public:
    template <typename... Parts>
    void add(Parts const&... parts)
    {
        mText += (mText.empty() ? "" : "; ") + textOf(parts...);
    }

    void raise(std::string const& what) const
    {
        if (!mText.empty())
        {
            throw Error(Failure::kREQUEST, what, mText,
                "correct the feeds; `hstu_score BUNDLE --inspect` lists names, types and shapes");
        }
    }

private:
    std::string mText;
};

//! Whether a size of the manifest is a number.
inline bool isNumber(std::string const& dim)
{
    return !dim.empty() && dim.find_first_not_of("0123456789") == std::string::npos;
}

//! Whether it is the name of one size, and not an expression such as "L + B".
inline bool isName(std::string const& dim)
{
    return !dim.empty() && dim.find_first_of(" +*-/()") == std::string::npos && !isNumber(dim);
}

//! Compares a tensor's sizes with what the manifest says, and learns the sizes that have a name.
inline void checkSizes(
    TensorSpec const& spec, HostTensor const& tensor, std::map<std::string, int64_t>& sizes, Problems& problems)
{
    if (tensor.shape.size() != spec.dims.size())
    {
        problems.add(spec.name, " has shape ", textOfShape(tensor.shape), ", not rank ", spec.dims.size());
        return;
    }
    for (std::size_t i = 0; i < spec.dims.size(); ++i)
    {
        std::string const& dim = spec.dims[i];
        int64_t const size = tensor.shape[i];
        if (isName(dim))
        {
            auto const known = sizes.emplace(dim, size).first;
            if (known->second != size)
            {
                problems.add(spec.name, " has ", size, " rows where another input has ", dim, " = ", known->second);
            }
        }
        else if (isNumber(dim) && dim != std::to_string(size))
        {
            problems.add(spec.name, " has shape ", textOfShape(tensor.shape), "; size ", i, " must be ", dim);
        }
    }
}

//! Offsets begin at 0, never fall, and end at the number of rows that they divide.
inline void checkOffsets(std::string const& name, HostTensor const& offsets,
    std::map<std::string, int64_t> const& sizes, int64_t maxLength, Problems& problems)
{
    static std::map<std::string, std::string> const kDIVIDED{
        {"seq_offsets", "L"}, {"candidate_offsets", "T"}, {"cache_offsets", "Lc"}};
    if (offsets.elements() < 2)
    {
        problems.add(name, " has ", offsets.elements(), " entries; a batch of one sequence has 2");
        return;
    }
    if (offsets.integerAt(0) != 0)
    {
        problems.add(name, " begins at ", offsets.integerAt(0), ", not at 0");
    }
    int64_t previous = offsets.integerAt(0);
    for (std::size_t i = 1; i < offsets.elements(); ++i)
    {
        int64_t const next = offsets.integerAt(i);
        if (next < previous || (maxLength > 0 && next - previous > maxLength))
        {
            problems.add(name, " gives sequence ", i - 1, " rows ", previous, " to ", next,
                maxLength > 0 ? textOf("; at most ", maxLength, " rows, and none before")
                              : std::string("; rows never go back"));
            return;
        }
        previous = next;
    }
    auto const divided = kDIVIDED.find(name);
    if (divided == kDIVIDED.end() || sizes.count(divided->second) == 0)
    {
        return;
    }
    int64_t const rows = sizes.at(divided->second);
    if (previous != rows)
    {
        problems.add(name, " ends at ", previous, ", and there are ", rows, " rows");
    }
}

//! Contextual features have several rows of each user, and a size's name does not say how many.
inline void checkContext(Manifest const& manifest, Tensors const& feeds, Problems& problems)
{
    auto const offsets = feeds.find("seq_offsets");
    if (!manifest.ranking || offsets == feeds.end())
    {
        return;
    }
    int64_t const users = static_cast<int64_t>(offsets->second.elements()) - 1;
    for (RankingFeature const& feature : manifest.ranking->contextual)
    {
        auto const found = feeds.find(feature.name);
        if (found != feeds.end() && static_cast<int64_t>(found->second.rows()) != users * feature.maxLength)
        {
            problems.add(feature.name, " has ", found->second.rows(), " rows; ", users, " sequences of ",
                feature.maxLength, " make ", users * feature.maxLength);
        }
    }
}

} // namespace detail

//! Checks a request against a graph of the manifest: names, types, sizes, offsets and item ids.
//! \return the feeds in the manifest's types.
inline Tensors checkedFeeds(Manifest const& manifest, GraphEntry const& graph, Tensors const& given)
{
    return typed("checking feeds",
        [&]
        {
            detail::Problems problems;
            Tensors feeds;
            std::map<std::string, int64_t> sizes;
            for (TensorSpec const& spec : graph.inputs)
            {
                auto const found = given.find(spec.name);
                if (found == given.end())
                {
                    problems.add(spec.name, " is missing");
                    continue;
                }
                std::string const problem = convertTensor(found->second, spec.type, feeds[spec.name]);
                if (!problem.empty())
                {
                    problems.add(spec.name, " ", problem);
                    continue;
                }
                detail::checkSizes(spec, feeds[spec.name], sizes, problems);
            }
            for (auto const& each : given)
            {
                if (feeds.count(each.first) == 0)
                {
                    bool known = false;
                    for (TensorSpec const& spec : graph.inputs)
                    {
                        known = known || spec.name == each.first;
                    }
                    if (!known)
                    {
                        problems.add(each.first, " is not an input of the graph ", graph.name);
                    }
                }
            }
            problems.raise("the feeds do not match the graph " + graph.name);
            if (sizes.count("B") > 0 && sizes.count("B_plus_1") > 0 && sizes["B_plus_1"] != sizes["B"] + 1)
            {
                problems.add(
                    "there are ", sizes["B"], " sequences and ", sizes["B_plus_1"], " offsets; one more is needed");
            }
            for (auto const& [name, tensor] : feeds)
            {
                static std::string const kSUFFIX = "_offsets";
                if (name.size() > kSUFFIX.size()
                    && name.compare(name.size() - kSUFFIX.size(), kSUFFIX.size(), kSUFFIX) == 0)
                {
                    detail::checkOffsets(name, tensor, sizes, name == "seq_offsets" ? manifest.maxSeqLen : 0, problems);
                }
            }
            detail::checkContext(manifest, feeds, problems);
            auto const items = feeds.find("item_ids");
            for (std::size_t i = 0; manifest.numItems > 0 && items != feeds.end() && i < items->second.elements(); ++i)
            {
                int64_t const id = items->second.integerAt(i);
                if (id < 0 || id > manifest.numItems)
                {
                    problems.add("item_ids[", i, "] is ", id, "; ids are 0..", manifest.numItems);
                    break;
                }
            }
            problems.raise("the request is not one that the graph " + graph.name + " takes");
            return feeds;
        });
}

//! Makes a tensor of raw bytes, little-endian and C order. The one size that the manifest leaves open follows from the
//! number of bytes.
inline HostTensor tensorFromRaw(TensorSpec const& spec, Bytes bytes)
{
    HostTensor tensor;
    tensor.type = spec.type;
    std::size_t row = factsOf(spec.type).bytes;
    std::size_t open = 0;
    for (std::string const& dim : spec.dims)
    {
        bool const isOpen = !detail::isNumber(dim);
        open += isOpen ? 1 : 0;
        tensor.shape.push_back(isOpen ? -1 : std::stoll(dim));
        row *= isOpen ? 1 : static_cast<std::size_t>(tensor.shape.back());
    }
    if (open != 1 || row == 0 || bytes.size() % row != 0)
    {
        throw Error(Failure::kREQUEST, "raw bytes do not make the input " + spec.name,
            textOf(bytes.size(), " bytes, ", open, " open sizes, rows of ", row, " bytes of ", factsOf(spec.type).name),
            "write whole rows, or give the tensor in an .npz file with --inputs");
    }
    for (int64_t& size : tensor.shape)
    {
        size = size < 0 ? static_cast<int64_t>(bytes.size() / row) : size;
    }
    tensor.bytes = std::move(bytes);
    return tensor;
}

} // namespace hstu::loader

#endif // HSTU_LOADER_FEEDS_HPP
