#ifndef HSTU_LOADER_SHA256_HPP
#define HSTU_LOADER_SHA256_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace hstu::loader
{

//! SHA-256 (FIPS 180-4) of bytes that arrive in pieces.
class Sha256
{
public:
    //! \param data may be null when `size` is 0.
    void update(void const* data, std::size_t size)
    {
        auto const* bytes = static_cast<uint8_t const*>(data);
        mTotal += size;
        while (size > 0)
        {
            std::size_t const taken = std::min(size, mBlock.size() - mUsed);
            std::memcpy(mBlock.data() + mUsed, bytes, taken);
            mUsed += taken;
            bytes += taken;
            size -= taken;
            if (mUsed == mBlock.size())
            {
                compress();
                mUsed = 0;
            }
        }
    }

    //! \return the 32 bytes in lower-case hexadecimal. The object is spent afterwards.
    std::string hex()
    {
        uint64_t const bits = mTotal * 8;
        uint8_t const end = 0x80;
        update(&end, 1);
        uint8_t const zero = 0;
        while (mUsed != mBlock.size() - sizeof(bits))
        {
            update(&zero, 1);
        }
        std::array<uint8_t, sizeof(bits)> length{};
        for (std::size_t i = 0; i < length.size(); ++i)
        {
            length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
        }
        update(length.data(), length.size());
        static char const* const kDIGITS = "0123456789abcdef";
        std::string text;
        for (uint32_t const word : mState)
        {
            for (int shift = 28; shift >= 0; shift -= 4)
            {
                text += kDIGITS[(word >> shift) & 15U];
            }
        }
        return text;
    }

private:
    static uint32_t rotated(uint32_t value, int by)
    {
        return (value >> by) | (value << (32 - by));
    }

    void compress()
    {
        static constexpr std::array<uint32_t, 64> kROUND{0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b,
            0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
            0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc,
            0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1,
            0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
            0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814,
            0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        std::array<uint32_t, 64> w{};
        for (std::size_t i = 0; i < 16; ++i)
        {
            w[i] = static_cast<uint32_t>(mBlock[4 * i]) << 24 | static_cast<uint32_t>(mBlock[4 * i + 1]) << 16
                   | static_cast<uint32_t>(mBlock[4 * i + 2]) << 8 | static_cast<uint32_t>(mBlock[4 * i + 3]);
        }
        for (std::size_t i = 16; i < 64; ++i)
        {
            uint32_t const a = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ (w[i - 15] >> 3);
            uint32_t const b = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + a + w[i - 7] + b;
        }
        std::array<uint32_t, 8> s = mState;
        for (std::size_t i = 0; i < 64; ++i)
        {
            uint32_t const e1 = rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25);
            uint32_t const chosen = (s[4] & s[5]) ^ (~s[4] & s[6]);
            uint32_t const t1 = s[7] + e1 + chosen + kROUND[i] + w[i];
            uint32_t const a0 = rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22);
            uint32_t const t2 = a0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
        }
        for (std::size_t i = 0; i < s.size(); ++i)
        {
            mState[i] += s[i];
        }
    }

    std::array<uint32_t, 8> mState{
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> mBlock{};
    std::size_t mUsed{0};
    uint64_t mTotal{0};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_SHA256_HPP
