// From scores to the weights that values are multiplied with: SiLU by this GPU's instructions, and rounding.
#ifndef HSTU_HOPPER_ACTIVATION_CUH
#define HSTU_HOPPER_ACTIVATION_CUH

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "silu.cuh"

namespace hstu
{

template <typename T>
__device__ __forceinline__ uint32_t packPair(float low, float high);

template <>
__device__ __forceinline__ uint32_t packPair<__half>(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
__device__ __forceinline__ uint32_t packPair<__nv_bfloat16>(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

//! Instructions of the special-function unit, with the errors that the PTX ISA documents for them.
struct SpecialFunctions
{
    //! Relative error up to 2^-11. Its half-precision pair would save nothing: this GPU computes that as two instructions.
    static __device__ __forceinline__ float tanh(float x)
    {
        float result;
        asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }

    //! Up to 2 ulps, 2^-22. Results below 2^-126 are zero: keeping them would take a comparison and two products.
    static __device__ __forceinline__ float powerOfTwo(float x)
    {
        float result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }

    //! Up to 1 ulp, 2^-23; zero where the result is below 2^-126.
    static __device__ __forceinline__ float reciprocal(float x)
    {
        float result;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }
};

//! x: h on entry, silu(2 h) on return.
template <bool kIsAccurate>
__device__ __forceinline__ void activate(float& x)
{
    x = kIsAccurate ? accurateSilu<SpecialFunctions>(x) : fastSilu<SpecialFunctions>(x);
}

} // namespace hstu

#endif // HSTU_HOPPER_ACTIVATION_CUH
