// SiLU of a score x from h = x / 2, by one of two formulas, and how far each is from the exact value. What approximates
// tanh, powers of two and reciprocals is a parameter: the GPU's instructions, or a model of their documented errors on the
// machine that runs the tests.
#ifndef HSTU_HOPPER_SILU_CUH
#define HSTU_HOPPER_SILU_CUH

namespace hstu
{

//! silu(x) = h + h tanh h: one special-function instruction.
//!
//! With a tanh of relative error 2^-11, |error| <= 2^-12 silu(|x|) + 2^-24 |silu(x)|: tanh adds |h tanh h| 2^-11, where
//! |tanh h| <= (1 + |tanh h|) / 2, and the sum is rounded once. For a positive score that is half of what fp16 rounds the
//! weight by (2^-11) and a sixteenth of what bf16 does (2^-8). For a negative one it is as large while the weight vanishes.
template <typename Approximations>
__device__ __forceinline__ float fastSilu(float h)
{
    return fmaf(h, Approximations::tanh(h), h);
}

//! silu(x) = h / (1/2 + 2^(-x log2 e) / 2): two special-function instructions.
//!
//! With a power of relative error 2^-22 and a reciprocal of 2^-23 that flush what is below 2^-126 to zero,
//! |error| <= (4 + max(-x, 0)) 2^-23 |silu(x)| + 2^-119. The exponent, rounded twice, is wrong by |x| 2^-23 of the natural
//! logarithm and the power by 2 * 2^-23 more, of which e / (1 + e) arrives, e = exp(-x): at most 0.28 + 1 for x >= 0 and
//! |x| + 2 for x < 0. The denominator's rounding adds 0.5, the reciprocal 1 and the product 0.5. Below x = -87 the
//! denominator leaves float32's range and the weight is zero: no more than 88.8 * 2^-126 is lost, and nothing overflows.
//! Like PyTorch's, it is NaN of NaN and of minus infinity.
template <typename Approximations>
__device__ __forceinline__ float accurateSilu(float h)
{
    constexpr float kMinusTwoLog2E = -2.885390081777927F;
    float const denominator = fmaf(0.5F, Approximations::powerOfTwo(h * kMinusTwoLog2E), 0.5F);
    return h * Approximations::reciprocal(denominator);
}

} // namespace hstu

#endif // HSTU_HOPPER_SILU_CUH
