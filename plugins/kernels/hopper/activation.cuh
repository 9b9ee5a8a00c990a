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

//! How silu(x) = h (1 + tanh h), h = x / 2, is computed.
enum class Silu
{
    kFloat, //!< in float32; tanh.approx.f32 has a relative error of 2^-11
    kPair,  //!< tanh.approx.f16x2 of h rounded to fp16, error up to 2^-10.987; the rest in float32
    kMixed, //!< kFloat and kPair in turns: special-function unit and the other pipes are busy alike
    kHalf,  //!< all in fp16 pairs, where the weights are fp16; |x| up to 65504
};

//! a, b: h on entry, silu(2 h) on return. With Silu::kHalf, a holds both weights, packed.
template <Silu kSilu>
__device__ __forceinline__ void activate(float& a, float& b)
{
    if constexpr (kSilu == Silu::kFloat)
    {
        float ta;
        float tb;
        asm("tanh.approx.f32 %0, %1;" : "=f"(ta) : "f"(a));
        asm("tanh.approx.f32 %0, %1;" : "=f"(tb) : "f"(b));
        a = fmaf(a, ta, a);
        b = fmaf(b, tb, b);
    }
    else
    {
        // In kPair, h beyond fp16's range becomes infinite, whose tanh is 1 or -1 like that of 65504.
        uint32_t h = packPair<__half>(a, b);
        uint32_t t;
        asm("tanh.approx.f16x2 %0, %1;" : "=r"(t) : "r"(h));
        if constexpr (kSilu == Silu::kHalf)
        {
            asm("fma.rn.f16x2 %0, %0, %1, %0;" : "+r"(h) : "r"(t));
            a = __uint_as_float(h);
        }
        else
        {
            float2 const pair = __half22float2(*reinterpret_cast<__half2 const*>(&t));
            a = fmaf(a, pair.x, a);
            b = fmaf(b, pair.y, b);
        }
    }
}

} // namespace hstu

#endif // HSTU_HOPPER_ACTIVATION_CUH
