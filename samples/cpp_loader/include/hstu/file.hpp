#ifndef HSTU_LOADER_FILE_HPP
#define HSTU_LOADER_FILE_HPP

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "error.hpp"
#include "sha256.hpp"

namespace hstu::loader
{

using Bytes = std::vector<uint8_t>;

//! A regular file that is open for reading. Anything else (a folder, a pipe that would block) is refused.
class InputFile
{
public:
    //! \param failure kind of the error if it cannot be opened.
    InputFile(std::string const& path, Failure failure)
        : mPath(path)
        , mFailure(failure)
        , mHandle(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK))
    {
        if (mHandle < 0)
        {
            refuse(std::strerror(errno));
        }
        struct stat facts{};
        if (::fstat(mHandle, &facts) != 0 || !S_ISREG(facts.st_mode))
        {
            ::close(mHandle);
            refuse("it is not a regular file");
        }
        mSize = static_cast<uint64_t>(facts.st_size);
    }

    ~InputFile()
    {
        ::close(mHandle);
    }

    InputFile(InputFile const&) = delete;
    InputFile& operator=(InputFile const&) = delete;

    uint64_t size() const noexcept
    {
        return mSize;
    }

    //! \return bytes read, 0 at the end.
    std::size_t read(void* target, std::size_t size)
    {
        ssize_t count = 0;
        do
        {
            count = ::read(mHandle, target, size);
        } while (count < 0 && errno == EINTR);
        if (count < 0)
        {
            refuse(std::strerror(errno));
        }
        return static_cast<std::size_t>(count);
    }

private:
    [[noreturn]] void refuse(char const* why) const
    {
        throw Error(mFailure, mPath + " cannot be read", why, "check the path and its permissions");
    }

    std::string mPath;
    Failure mFailure;
    int mHandle;
    uint64_t mSize{0};
};

//! Reads a whole file.
//! \param most bytes; a larger file is refused before it is read.
inline Bytes readFile(std::string const& path, uint64_t most, Failure failure)
{
    return typed("reading a file",
        [&]
        {
            InputFile file(path, failure);
            if (file.size() > most)
            {
                throw Error(failure, path + " is too large", textOf(file.size(), " bytes; at most ", most, " are read"),
                    "check that it is the file that was meant");
            }
            Bytes content(static_cast<std::size_t>(file.size()));
            std::size_t used = 0;
            while (used < content.size())
            {
                std::size_t const count = file.read(content.data() + used, content.size() - used);
                if (count == 0)
                {
                    break;
                }
                used += count;
            }
            content.resize(used);
            return content;
        });
}

//! \return sha256 of a file in hexadecimal, read in blocks.
inline std::string sha256OfFile(std::string const& path, Failure failure)
{
    return typed("hashing a file",
        [&]
        {
            InputFile file(path, failure);
            Sha256 digest;
            Bytes block(1U << 20);
            while (std::size_t const count = file.read(block.data(), block.size()))
            {
                digest.update(block.data(), count);
            }
            return digest.hex();
        });
}

inline bool isFile(std::string const& path) noexcept
{
    struct stat facts{};
    return ::stat(path.c_str(), &facts) == 0 && S_ISREG(facts.st_mode);
}

//! Writes a file whole or not at all: aside, then renamed. A file that was there stays until then.
inline void writeFile(std::string const& path, void const* data, std::size_t size)
{
    typed("writing a file",
        [&]
        {
            std::string const aside = path + "." + std::to_string(::getpid()) + ".partial";
            std::FILE* const file = std::fopen(aside.c_str(), "wb");
            bool const opened = file != nullptr;
            bool const written = opened && (size == 0 || std::fwrite(data, 1, size, file) == size);
            bool const closed = opened && std::fclose(file) == 0;
            if (!written || !closed || std::rename(aside.c_str(), path.c_str()) != 0)
            {
                std::string const why = std::strerror(errno);
                std::remove(aside.c_str());
                throw Error(
                    Failure::kBUNDLE, path + " cannot be written", why, "choose a folder that exists and is writable");
            }
        });
}

} // namespace hstu::loader

#endif // HSTU_LOADER_FILE_HPP
