#ifndef HSTU_CONTENT_HASH_H
#define HSTU_CONTENT_HASH_H

#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <sstream>
#include <string>

namespace hstu
{

//! 64-bit FNV-1a, over everything that decides what a launch executes.
class ContentHash
{
public:
    void add(void const* data, size_t size) noexcept
    {
        constexpr uint64_t kPrime = 1099511628211ULL;
        auto const* const bytes = static_cast<unsigned char const*>(data);
        for (size_t i = 0; i < size; ++i)
        {
            mValue = (mValue ^ bytes[i]) * kPrime;
        }
    }

    //! \return the hash as sixteen hexadecimal digits.
    std::string text() const
    {
        std::ostringstream stream;
        stream << std::hex << std::setw(16) << std::setfill('0') << mValue;
        return stream.str();
    }

private:
    uint64_t mValue{14695981039346656037ULL};
};

} // namespace hstu

#endif // HSTU_CONTENT_HASH_H
