#ifndef HSTU_CONFORMANCE_FAKE_DRIVER_H
#define HSTU_CONFORMANCE_FAKE_DRIVER_H

#include <cstdint>
#include <string>
#include <vector>

#include <cuda.h>

#include "cudaDriver.h"
#include "parameters.cuh"

//! What fakeDriver.cpp, a libcuda.so.1 without a GPU, was asked to do.
namespace fake
{

struct MapCall
{
    int type;
    void* address;
    std::vector<uint64_t> dims;
    std::vector<uint64_t> strides;
    std::vector<uint32_t> box;
    std::vector<uint32_t> steps;
    std::vector<int> modes; //!< interleave, swizzle, L2 promotion, fill
};

struct Launch
{
    std::string kernel; //!< name of the function
    unsigned char const* image;
    unsigned grid[3];
    unsigned block[3];
    unsigned cluster; //!< blocks of one; 1 where the launch named none
    unsigned sharedBytes;
    CUstream stream;
    std::vector<MapCall> maps;            //!< of a kernel named "hopper", or "hopperCache" with two more
    hstu::AttentionParameters parameters; //!< of the same
    std::vector<int32_t> rowStrides;      //!< of q, k and v; of another kernel, whose parameters are those of kernels/README.md
                                          //!< or, where "norm" is in its name, of x and gate
    std::vector<uint64_t> addresses{};    //!< of x, shift, scale, bias, gate and out, of the latter
};

struct Calls
{
    std::vector<Launch> launches;
    std::vector<MapCall> maps;
    int allocations{0}; //!< that were not freed
    int waits{0};       //!< allocations, frees, module loads and synchronisations so far
    CUresult result{CUDA_SUCCESS}; //!< of Hopper launches, and of looking functions up
};

} // namespace fake

//! \return the record, which the library that is loaded as libcuda.so.1 keeps.
extern "C" fake::Calls* fakeCalls();

#endif // HSTU_CONFORMANCE_FAKE_DRIVER_H
