#ifndef HSTU_CONFORMANCE_DEVICE_H
#define HSTU_CONFORMANCE_DEVICE_H

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <cuda.h>

//! The GPU through the driver API, found at run time: the program is linked to no CUDA library. Every function throws
//! std::runtime_error with the driver's error name.
namespace device
{

//! \return false when the machine has no driver or no GPU; `reason` then says which.
bool open(std::string& reason);

//! Makes the primary context of device 0 current on the calling thread.
void makeCurrent();

//! \return "NVIDIA H100 ..., sm_90, driver 13000".
std::string describe();

void synchronize();

//! Device memory that starts `misalignment` bytes after a 256-byte boundary.
//!
//! An input is allocated exactly and only its own bytes are ever written, so that compute-sanitizer sees a read past
//! its end (memcheck) and a read of what was never sent (initcheck). An output has a guard zone on both sides, so that
//! a stray write is seen without any tool.
class Buffer
{
public:
    //! An input with this content.
    Buffer(std::vector<unsigned char> const& content, size_t misalignment);

    //! A poisoned output.
    Buffer(size_t bytes, size_t misalignment);
    ~Buffer();
    Buffer(Buffer const&) = delete;
    Buffer& operator=(Buffer const&) = delete;
    Buffer(Buffer&& other) noexcept;

    void* data() const noexcept;

    //! Fills the payload with 0xFF, a NaN in every float type, and the guard zones with a pattern.
    void poison();
    std::vector<unsigned char> download() const;

    //! \return whether the guard zones still hold the pattern.
    bool areGuardsIntact() const;

private:
    CUdeviceptr mAllocation{};
    size_t mStart{};
    size_t mBytes{};
    size_t mTotal{};
};

class Stream
{
public:
    Stream();
    ~Stream();
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    CUstream get() const noexcept
    {
        return mStream;
    }

    void synchronize() const;

private:
    CUstream mStream{};
};

//! Captures what `work` queues on the stream, in the mode that forbids allocation and synchronisation, and replays it.
class Graph
{
public:
    Graph(Stream const& stream, std::function<void()> const& work);
    ~Graph();
    Graph(Graph const&) = delete;
    Graph& operator=(Graph const&) = delete;

    void launch(Stream const& stream) const;

private:
    CUgraph mGraph{};
    CUgraphExec mExecutable{};
};

} // namespace device

#endif // HSTU_CONFORMANCE_DEVICE_H
