#ifndef HSTU_LOADER_BUFFER_PLAN_HPP
#define HSTU_LOADER_BUFFER_PLAN_HPP

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

//! Where tensors of known size and lifetime lie in one block of memory. Arithmetic alone, and that of
//! `hstu_compile.runtime`: both give the same places.
namespace hstu::loader
{

static constexpr std::size_t kALIGNMENT = 256;

//! \return the bytes that a tensor takes: a multiple of 256, never 0, because TensorRT wants a real address also for a
//! tensor without elements.
inline std::size_t alignedBytes(std::size_t bytes)
{
    return std::max((bytes + kALIGNMENT - 1) / kALIGNMENT, std::size_t{1}) * kALIGNMENT;
}

//! Tensors side by side, each at a multiple of 256 bytes. Equal sizes in equal order lie at equal places.
struct Layout
{
    std::map<std::string, std::size_t> offsets;
    std::size_t bytes{0};

    void add(std::string const& name, std::size_t size)
    {
        offsets[name] = bytes;
        bytes += alignedBytes(size);
    }
};

//! A tensor that is alive from the step that makes it to the last step that reads it, both included: what a step writes
//! never lies where it still reads.
struct Lifetime
{
    std::string name;
    std::size_t bytes{0};
    std::size_t first{0};
    std::size_t last{0};

    bool meets(Lifetime const& other) const noexcept
    {
        return first <= other.last && other.first <= last;
    }
};

namespace detail
{

//! Each tensor at the lowest place that is free throughout its life, in this order.
inline Layout placed(std::vector<Lifetime const*> const& order)
{
    Layout layout;
    std::vector<std::pair<std::size_t, Lifetime const*>> taken; // by place, then in the order in which they came
    for (Lifetime const* const each : order)
    {
        std::size_t start = 0;
        std::size_t const size = alignedBytes(each->bytes);
        for (auto const& [offset, other] : taken)
        {
            if (!other->meets(*each))
            {
                continue;
            }
            if (start + size <= offset)
            {
                break;
            }
            start = std::max(start, offset + alignedBytes(other->bytes));
        }
        layout.offsets[each->name] = start;
        layout.bytes = std::max(layout.bytes, start + size);
        auto const place = std::upper_bound(taken.begin(), taken.end(), start,
            [](std::size_t offset, auto const& other) { return offset < other.first; });
        taken.insert(place, {start, each});
    }
    return layout;
}

} // namespace detail

//! Finds a place for every tensor: the smallest block of three orders, largest first, earliest first and longest-lived
//! first.
//! \param tensors each name once, first <= last.
inline Layout plannedBuffers(std::vector<Lifetime> const& tensors)
{
    using Key = std::pair<int64_t, int64_t>;
    auto const negative = [](std::size_t value) { return -static_cast<int64_t>(value); };
    auto const bySize = [&](Lifetime const& each) { return Key(negative(each.bytes), static_cast<int64_t>(each.first)); };
    auto const byStart = [&](Lifetime const& each)
    { return Key(static_cast<int64_t>(each.first), negative(each.bytes)); };
    auto const byLength = [&](Lifetime const& each)
    { return Key(negative(each.last - each.first), negative(each.bytes)); };
    auto const plan = [&](auto const& key)
    {
        std::vector<Lifetime const*> order;
        for (Lifetime const& each : tensors)
        {
            order.push_back(&each);
        }
        std::stable_sort(order.begin(), order.end(),
            [&](Lifetime const* one, Lifetime const* other) { return key(*one) < key(*other); });
        return detail::placed(order);
    };
    Layout best = plan(bySize);
    for (Layout& other : std::vector<Layout>{plan(byStart), plan(byLength)})
    {
        if (other.bytes < best.bytes)
        {
            best = std::move(other);
        }
    }
    return best;
}

} // namespace hstu::loader

#endif // HSTU_LOADER_BUFFER_PLAN_HPP
