#ifndef HSTU_KERNEL_IMAGES_H
#define HSTU_KERNEL_IMAGES_H

#include <cstddef>
#include <cstdint>

//! Which source an image is compiled from, and so what its launch passes; see kernels/README.md.
enum HstuKernelKind : int32_t
{
    kHstuKernelPortable = 0, //!< kernels/hstu_attention.py: every node and GPU
    kHstuKernelHopper = 1    //!< kernels/hopper: compute capability 9.0, half precision
};

//! One ahead-of-time compiled kernel with everything its launch needs.
//! kernelImages.cpp, which defines the table below, is written by hstu_compile.plugins.kernels.aot.write_cpp_source.
struct HstuKernelImage
{
    int32_t sm;            //!< 10 * major + minor of the compute capability: the cubin's, or the lowest a PTX JITs on
    int32_t isPtx;         //!< 1: NUL-terminated PTX text, compiled by the driver; 0: cubin
    int32_t kind;          //!< HstuKernelKind
    int32_t dtype;         //!< of q, k, v and out: 0 float32, 1 float16, 2 bfloat16
    int32_t timestampBits; //!< 32 or 64 with a time bias, 0 without
    int32_t blockDqk;      //!< padded q/k head dim. Portable: next power of two >= max(16, Dqk); Hopper: at least Dqk
    int32_t blockDv;       //!< the same for v
    int32_t aligned;       //!< 1: needs 16-byte-aligned pointers, and head dims that are multiples of 16 (Hopper: 8)
    int32_t posBias;       //!< 1: adds the position bias
    int32_t timeBias;      //!< 1: adds the time bias
    int32_t maskKind;      //!< 0: plain causal only; 1: every mask of the contract
    int32_t tactic;        //!< id of the tile configuration, from 1; all Hopper images share one
    int32_t blockM;        //!< query rows of one block
    int32_t blockN;        //!< Hopper: key rows of one tensor copy; portable: 0, its launch does not need it
    int32_t threads;       //!< of one block
    int32_t split;         //!< most blocks that may share a tile of query rows, a cluster; 1 where none do
    int32_t sharedBytes;   //!< dynamic shared memory of one block
    int32_t leastDriver;   //!< CUDA version, 1000 * major + 10 * minor, that a driver must have; 0: any
    char const* name;      //!< of the function inside the image
    unsigned char const* data;
    size_t size; //!< bytes of data, the NUL of a PTX included
    int32_t silu{0}; //!< Hopper: value of the attribute that a node must have; portable: 0, and serves every node
    int32_t hasCache{0}; //!< 1: reads keys in two segments, for nodes with a cache alone
};

extern HstuKernelImage const kHstuKernelImages[];
extern size_t const kHstuNbKernelImages;

#endif // HSTU_KERNEL_IMAGES_H
