#ifndef HSTU_NORM_IMAGES_H
#define HSTU_NORM_IMAGES_H

#include <cstddef>
#include <cstdint>

//! One ahead-of-time compiled kernel of kernels/hstu_norm.py with everything its launch needs.
//! kernelImages.cpp, which defines the table below, is written by hstu_compile.plugins.kernels.aot.write_cpp_source.
struct HstuNormImage
{
    int32_t sm;          //!< 10 * major + minor of the compute capability: the cubin's, or the lowest a PTX JITs on
    int32_t isPtx;       //!< 1: NUL-terminated PTX text, compiled by the driver; 0: cubin
    int32_t inputType;   //!< of x and gate: 0 float32, 1 float16, 2 bfloat16
    int32_t outputType;  //!< of out, likewise
    int32_t block;       //!< padded width of a segment: next power of two >= max(16, D / num_groups)
    int32_t aligned;     //!< 1: needs 16-byte-aligned pointers and D / num_groups a multiple of 16
    int32_t activation;  //!< of the contract, as are the next two
    int32_t gateSilu;
    int32_t concat;
    int32_t segments;    //!< of one block: groups of a row
    int32_t threads;     //!< of one block
    int32_t sharedBytes; //!< dynamic shared memory of one block
    char const* name;    //!< of the function inside the image
    unsigned char const* data;
    size_t size; //!< bytes of data, the NUL of a PTX included
};

extern HstuNormImage const* const kHstuNormImages; //!< null where there are none
extern size_t const kHstuNbNormImages;

#endif // HSTU_NORM_IMAGES_H
