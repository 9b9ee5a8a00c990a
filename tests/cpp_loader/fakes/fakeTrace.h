#ifndef HSTU_FAKE_TRACE_H
#define HSTU_FAKE_TRACE_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace fake
{

//! One line of the file that HSTU_FAKE_TRACE names: what was enqueued, and where its tensors lie. Written when it ends.
class Trace
{
public:
    explicit Trace(std::string const& what)
        : mLine(what)
    {
    }

    ~Trace()
    {
        char const* const path = std::getenv("HSTU_FAKE_TRACE");
        std::FILE* const file = path != nullptr ? std::fopen(path, "a") : nullptr;
        if (file != nullptr)
        {
            std::fprintf(file, "%s\n", mLine.c_str());
            std::fclose(file);
        }
    }

    Trace(Trace const&) = delete;
    Trace& operator=(Trace const&) = delete;

    void add(std::string const& name, void const* address, int64_t rowStride = 0)
    {
        mLine += "\t" + name + "=" + std::to_string(reinterpret_cast<uintptr_t>(address)) + "/"
                 + std::to_string(rowStride);
    }

private:
    std::string mLine;
};

} // namespace fake

#endif // HSTU_FAKE_TRACE_H
