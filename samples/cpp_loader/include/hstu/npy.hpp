#ifndef HSTU_LOADER_NPY_HPP
#define HSTU_LOADER_NPY_HPP

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "error.hpp"
#include "tensor.hpp"

namespace hstu::loader
{

//! Reads the literal that a .npy header is: {'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }. Private to
//! `tensorFromNpy`.
class NpyHeader
{
public:
    NpyHeader(std::string text, std::string const& name)
        : mText(std::move(text))
        , mName(name)
    {
        bool seen[3] = {false, false, false};
        expect('{');
        while (peek() != '}')
        {
            std::string const key = quoted();
            expect(':');
            int const which = key == "descr" ? 0 : key == "fortran_order" ? 1 : key == "shape" ? 2 : -1;
            if (which < 0 || seen[which])
            {
                refuse("its header has an unexpected key '" + key + "'");
            }
            seen[which] = true;
            which == 0 ? void(descr = quoted()) : which == 1 ? readOrder() : readShape();
            if (peek() != '}')
            {
                expect(',');
            }
        }
        ++mAt;
        while (mAt < mText.size())
        {
            if (mText[mAt] != ' ' && mText[mAt] != '\n')
            {
                refuse("there is more after its header");
            }
            ++mAt;
        }
        if (!seen[0] || !seen[1] || !seen[2])
        {
            refuse("its header lacks descr, fortran_order or shape");
        }
    }

    std::string descr;
    bool isFortran{false};
    Shape shape;

private:
    [[noreturn]] void refuse(std::string const& why) const
    {
        throw Error(Failure::kREQUEST, mName + " is not a .npy array", why, "write it with numpy.save or numpy.savez");
    }

    int peek()
    {
        while (mAt < mText.size() && mText[mAt] == ' ')
        {
            ++mAt;
        }
        return mAt < mText.size() ? static_cast<unsigned char>(mText[mAt]) : -1;
    }

    void expect(char wanted)
    {
        if (peek() != wanted)
        {
            refuse(textOf("its header has no '", wanted, "' at byte ", mAt));
        }
        ++mAt;
    }

    std::string quoted()
    {
        expect('\'');
        std::size_t const end = mText.find('\'', mAt);
        if (end == std::string::npos)
        {
            refuse("its header has an open quote");
        }
        std::string text = mText.substr(mAt, end - mAt);
        mAt = end + 1;
        return text;
    }

    void readOrder()
    {
        peek();
        isFortran = mText.compare(mAt, 4, "True") == 0;
        if (!isFortran && mText.compare(mAt, 5, "False") != 0)
        {
            refuse("fortran_order is neither True nor False");
        }
        mAt += isFortran ? 4 : 5;
    }

    void readShape()
    {
        static constexpr std::size_t kMOST_DIMS = 8;
        expect('(');
        while (peek() != ')')
        {
            int64_t size = 0;
            int digits = 0;
            for (; peek() >= '0' && peek() <= '9' && digits < 18; ++digits, ++mAt)
            {
                size = size * 10 + (mText[mAt] - '0');
            }
            if (digits == 0 || shape.size() == kMOST_DIMS)
            {
                refuse("its shape is not a tuple of at most 8 sizes");
            }
            shape.push_back(size);
            if (peek() != ')')
            {
                expect(',');
            }
        }
        ++mAt;
    }

    std::string mText;
    std::string const& mName;
    std::size_t mAt{0};
};

//! Reads a .npy array of format 1 to 3, little-endian and C order (Fortran order where there is no difference).
//! \param name of the array, for messages.
inline HostTensor tensorFromNpy(uint8_t const* data, std::size_t size, std::string const& name)
{
    return typed("reading a .npy array",
        [&]
        {
            auto const refuse = [&name](std::string const& why, char const* fix)
            { throw Error(Failure::kREQUEST, name + " is not a .npy array that can be read", why, fix); };
            static char const* const kWRITE_AGAIN = "write it with numpy.save or numpy.savez";
            static uint8_t const kMAGIC[] = {0x93, 'N', 'U', 'M', 'P', 'Y'};
            if (size < 10 || std::memcmp(data, kMAGIC, sizeof(kMAGIC)) != 0)
            {
                refuse("it does not begin as one", kWRITE_AGAIN);
            }
            bool const isFirst = data[6] == 1;
            std::size_t const start = isFirst ? 10 : 12;
            if (data[6] < 1 || data[6] > 3 || size < start)
            {
                refuse(textOf("its format is ", int{data[6]}, "; 1 to 3 are read"), kWRITE_AGAIN);
            }
            std::size_t length = static_cast<std::size_t>(data[8]) | static_cast<std::size_t>(data[9]) << 8;
            if (!isFirst)
            {
                length |= static_cast<std::size_t>(data[10]) << 16 | static_cast<std::size_t>(data[11]) << 24;
            }
            if (length > size - start)
            {
                refuse("its header is cut off", kWRITE_AGAIN);
            }
            NpyHeader const header(std::string(reinterpret_cast<char const*>(data) + start, length), name);
            HostTensor tensor;
            bool known = false;
            for (ElementFacts const& facts : elementTypes())
            {
                if (header.descr == facts.descr)
                {
                    tensor.type = facts.type;
                    known = true;
                    break;
                }
            }
            if (!known)
            {
                refuse("its type is '" + header.descr + "'; <f8 <f4 <f2 <u2 (bfloat16) <i8 <i4 |i1 |u1 |b1 are read",
                    "convert it with numpy.astype, little-endian");
            }
            if (header.isFortran && header.shape.size() > 1)
            {
                refuse("it is in Fortran order", "write numpy.ascontiguousarray(array)");
            }
            tensor.shape = header.shape;
            std::size_t bytes = 0;
            if (!checkedProduct(tensor.shape, factsOf(tensor.type).bytes, bytes) || bytes != size - start - length)
            {
                refuse(textOf("its shape is ", textOfShape(tensor.shape), " of ", header.descr, ", and it holds ",
                           size - start - length, " bytes"),
                    kWRITE_AGAIN);
            }
            tensor.bytes.assign(data + start + length, data + size);
            return tensor;
        });
}

//! \return a tensor as .npy, format 1.
inline Bytes npyFromTensor(HostTensor const& tensor)
{
    std::string shape = "(";
    for (int64_t const size : tensor.shape)
    {
        shape += std::to_string(size) + ",";
    }
    std::string header = std::string("{'descr': '") + factsOf(tensor.type).descr
                         + "', 'fortran_order': False, 'shape': " + shape + "), }";
    // Numpy wants the data at a multiple of 64.
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    uint8_t const start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<uint8_t>(header.size() & 0xFF),
        static_cast<uint8_t>(header.size() >> 8)};
    Bytes content(sizeof(start) + header.size() + tensor.bytes.size());
    std::memcpy(content.data(), start, sizeof(start));
    std::memcpy(content.data() + sizeof(start), header.data(), header.size());
    if (!tensor.bytes.empty())
    {
        std::memcpy(content.data() + sizeof(start) + header.size(), tensor.bytes.data(), tensor.bytes.size());
    }
    return content;
}

//! Decodes base64 (RFC 4648, padded, no line breaks).
//! \param name for messages.
inline Bytes bytesFromBase64(std::string const& text, std::string const& name)
{
    return typed("decoding base64",
        [&]
        {
            static std::string const kLETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            std::array<int, 256> values{};
            values.fill(-1);
            for (std::size_t i = 0; i < kLETTERS.size(); ++i)
            {
                values[static_cast<unsigned char>(kLETTERS[i])] = static_cast<int>(i);
            }
            auto const refuse = [&name](std::string const& why)
            { throw Error(Failure::kBUNDLE, name + " is not base64", why, "build the bundle again"); };
            if (text.size() % 4 != 0)
            {
                refuse(textOf("its length is ", text.size(), ", not a multiple of 4"));
            }
            std::size_t padding = 0;
            while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=')
            {
                ++padding;
            }
            Bytes bytes;
            bytes.reserve(text.size() / 4 * 3);
            for (std::size_t i = 0; i < text.size(); i += 4)
            {
                uint32_t word = 0;
                for (std::size_t j = i; j < i + 4; ++j)
                {
                    int const value = j >= text.size() - padding ? 0 : values[static_cast<unsigned char>(text[j])];
                    if (value < 0)
                    {
                        refuse(textOf("byte ", j, " is none of its letters"));
                    }
                    word = word << 6 | static_cast<uint32_t>(value);
                }
                bytes.push_back(static_cast<uint8_t>(word >> 16));
                bytes.push_back(static_cast<uint8_t>(word >> 8));
                bytes.push_back(static_cast<uint8_t>(word));
            }
            bytes.resize(bytes.size() - padding);
            return bytes;
        });
}

} // namespace hstu::loader

#endif // HSTU_LOADER_NPY_HPP
