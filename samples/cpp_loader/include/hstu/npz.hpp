#ifndef HSTU_LOADER_NPZ_HPP
#define HSTU_LOADER_NPZ_HPP

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "error.hpp"
#include "file.hpp"
#include "npy.hpp"
#include "tensor.hpp"

namespace hstu::loader
{

//! CRC-32 as zip archives use it.
inline uint32_t crc32Of(uint8_t const* data, std::size_t size)
{
    static std::array<uint32_t, 256> const kTABLE = []
    {
        std::array<uint32_t, 256> table{};
        for (uint32_t i = 0; i < table.size(); ++i)
        {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit)
            {
                value = (value & 1U) != 0 ? value >> 1 ^ 0xEDB88320U : value >> 1;
            }
            table[i] = value;
        }
        return table;
    }();
    uint32_t crc = 0xFFFFFFFFU;
    for (std::size_t i = 0; i < size; ++i)
    {
        crc = kTABLE[(crc ^ data[i]) & 0xFFU] ^ crc >> 8;
    }
    return crc ^ 0xFFFFFFFFU;
}

//! Reads the archives that numpy.savez writes: stored entries named NAME.npy. What numpy.savez_compressed writes is
//! refused: nothing here can grow when it is read, so no file can be a zip bomb. Private to `tensorsFromNpz`.
class NpzReader
{
public:
    NpzReader(uint8_t const* data, std::size_t size, std::string const& name)
        : mData(data)
        , mSize(size)
        , mName(name)
    {
    }

    Tensors read() const
    {
        std::size_t const end = endRecord();
        std::size_t const count = number(end + 10, 2);
        std::size_t const directoryBytes = number(end + 12, 4);
        std::size_t const directory = number(end + 16, 4);
        if (number(end + 4, 2) != 0 || number(end + 6, 2) != 0 || number(end + 8, 2) != count)
        {
            refuse("it is spread over several files");
        }
        if (count == 0xFFFF || directory == 0xFFFFFFFF || directoryBytes == 0xFFFFFFFF)
        {
            refuse("it is a zip64 archive, which is for more than 4 GiB");
        }
        if (directory > end || directoryBytes > end - directory)
        {
            refuse("its directory lies outside the file");
        }
        Tensors tensors;
        std::size_t at = directory;
        std::size_t held = 0;
        for (std::size_t i = 0; i < count; ++i)
        {
            at = readEntry(at, directory + directoryBytes, directory, held, tensors);
        }
        return tensors;
    }

private:
    static constexpr uint32_t kLOCAL = 0x04034B50;
    static constexpr uint32_t kCENTRAL = 0x02014B50;
    static constexpr uint32_t kEND = 0x06054B50;

    [[noreturn]] void refuse(
        std::string const& why, char const* fix = "write it with numpy.savez(path, name=array, ...)") const
    {
        throw Error(Failure::kREQUEST, mName + " cannot be read as feeds", why, fix);
    }

    std::size_t number(std::size_t at, int bytes) const
    {
        std::size_t value = 0;
        for (int i = bytes - 1; i >= 0; --i)
        {
            value = value << 8 | mData[at + static_cast<std::size_t>(i)];
        }
        return value;
    }

    //! \return where the end record begins: 22 bytes before the end, or more with a comment.
    std::size_t endRecord() const
    {
        static constexpr std::size_t kLEAST = 22;
        for (std::size_t back = kLEAST; back <= mSize && back <= kLEAST + 0xFFFF; ++back)
        {
            std::size_t const at = mSize - back;
            if (number(at, 4) == kEND && number(at + 20, 2) == back - kLEAST)
            {
                return at;
            }
        }
        refuse("it is not an .npz archive, or it is cut off");
    }

    //! Reads one entry of the directory.
    //! \param held bytes of the entries before, so that entries which share bytes are found.
    //! \return where the next begins.
    std::size_t readEntry(std::size_t at, std::size_t end, std::size_t most, std::size_t& held, Tensors& tensors) const
    {
        if (end - at < 46 || number(at, 4) != kCENTRAL)
        {
            refuse("its directory is damaged");
        }
        std::size_t const flags = number(at + 8, 2);
        std::size_t const method = number(at + 10, 2);
        std::size_t const packed = number(at + 20, 4);
        std::size_t const size = number(at + 24, 4);
        std::size_t const nameBytes = number(at + 28, 2);
        std::size_t const next = at + 46 + nameBytes + number(at + 30, 2) + number(at + 32, 2);
        std::size_t const local = number(at + 42, 4);
        if (next > end)
        {
            refuse("its directory is damaged");
        }
        std::string const file(reinterpret_cast<char const*>(mData) + at + 46, nameBytes);
        if ((flags & 1U) != 0)
        {
            refuse("'" + file + "' is encrypted");
        }
        if (method != 0)
        {
            refuse(textOf("'", file, "' is compressed (method ", method, "); only stored arrays are read"),
                "write it with numpy.savez instead of numpy.savez_compressed");
        }
        if (packed != size || local > most || most - local < 30 || number(local, 4) != kLOCAL)
        {
            refuse("'" + file + "' is damaged");
        }
        std::size_t const data = local + 30 + number(local + 26, 2) + number(local + 28, 2);
        if (data > most || size > most - data || size > mSize - held)
        {
            refuse("'" + file + "' lies outside the file, or over another array");
        }
        held += size;
        if (crc32Of(mData + data, size) != number(at + 16, 4))
        {
            refuse("'" + file + "' has another checksum than the archive records", "copy the file again");
        }
        static std::string const kSUFFIX = ".npy";
        if (file.size() <= kSUFFIX.size() || file.compare(file.size() - kSUFFIX.size(), kSUFFIX.size(), kSUFFIX) != 0)
        {
            refuse("'" + file + "' is not a .npy array");
        }
        std::string const name = file.substr(0, file.size() - kSUFFIX.size());
        if (!tensors.emplace(name, tensorFromNpy(mData + data, size, mName + ": " + name)).second)
        {
            refuse("'" + name + "' appears twice");
        }
        return next;
    }

    uint8_t const* mData;
    std::size_t mSize;
    std::string const& mName;
};

//! Reads an .npz archive from memory.
//! \param name of the archive, for messages.
inline Tensors tensorsFromNpz(Bytes const& content, std::string const& name)
{
    return typed("reading an .npz archive", [&] { return NpzReader(content.data(), content.size(), name).read(); });
}

//! Reads an .npz file of at most 4 GiB.
inline Tensors readNpz(std::string const& path)
{
    return tensorsFromNpz(readFile(path, 0xFFFFFFFFULL, Failure::kREQUEST), path);
}

//! Writes arrays by name as numpy.savez does, whole or not at all.
inline void writeNpz(std::string const& path, Tensors const& tensors)
{
    typed("writing an .npz archive",
        [&]
        {
            Bytes archive;
            Bytes directory;
            auto const add = [](Bytes& target, std::size_t value, int bytes)
            {
                for (int i = 0; i < bytes; ++i)
                {
                    target.push_back(static_cast<uint8_t>(value >> (8 * i)));
                }
            };
            for (auto const& [name, tensor] : tensors)
            {
                std::string const file = name + ".npy";
                Bytes const content = npyFromTensor(tensor);
                if (archive.size() + content.size() > 0xF0000000ULL)
                {
                    throw Error(Failure::kBUNDLE, path + " cannot be written", "the arrays take more than 3.7 GiB",
                        "write fewer or smaller answers");
                }
                std::size_t const offset = archive.size();
                Bytes common;
                add(common, 20, 2);   // version that extracts it
                add(common, 0, 2);    // flags
                add(common, 0, 2);    // stored
                add(common, 0, 2);    // time
                add(common, 0x21, 2); // 1980-01-01: equal arrays make equal files
                add(common, crc32Of(content.data(), content.size()), 4);
                add(common, content.size(), 4);
                add(common, content.size(), 4);
                add(common, file.size(), 2);
                add(common, 0, 2); // no extra field
                add(archive, 0x04034B50, 4);
                archive.insert(archive.end(), common.begin(), common.end());
                archive.insert(archive.end(), file.begin(), file.end());
                archive.insert(archive.end(), content.begin(), content.end());
                add(directory, 0x02014B50, 4);
                add(directory, 20, 2);
                directory.insert(directory.end(), common.begin(), common.end());
                add(directory, 0, 2); // comment
                add(directory, 0, 2); // disk
                add(directory, 0, 2); // internal attributes
                add(directory, 0, 4); // external attributes
                add(directory, offset, 4);
                directory.insert(directory.end(), file.begin(), file.end());
            }
            std::size_t const start = archive.size();
            archive.insert(archive.end(), directory.begin(), directory.end());
            add(archive, 0x06054B50, 4);
            add(archive, 0, 4);
            add(archive, tensors.size(), 2);
            add(archive, tensors.size(), 2);
            add(archive, directory.size(), 4);
            add(archive, start, 4);
            add(archive, 0, 2);
            writeFile(path, archive.data(), archive.size());
        });
}

} // namespace hstu::loader

#endif // HSTU_LOADER_NPZ_HPP
