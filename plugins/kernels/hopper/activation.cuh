// SiLU of the scores. silu(x) = h (1 + tanh h), h = x / 2: one special-function instruction where an exponential and a
// reciprocal would be two.
#ifndef HSTU_HOPPER_ACTIVATION_CUH
#define HSTU_HOPPER_ACTIVATION_CUH

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

//! x: h on entry, silu(2 h) on return. tanh.approx.f32 has a relative error of up to 2^-11, so silu one of |h| 2^-11: as
//! much as fp16 rounds the weight of a large score by. Its half-precision pair would save nothing here: this GPU computes
//! it as two instructions of the same unit.
__device__ __forceinline__ void activate(float& x)
{
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x));
    x = fmaf(x, t, x);
}

} // namespace hstu

#endif // HSTU_HOPPER_ACTIVATION_CUH
