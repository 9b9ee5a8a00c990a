// Enough of CUDA C++ to compile the Hopper kernel's arithmetic for the machine that runs the tests.
#ifndef HSTU_TESTS_DEVICE_H
#define HSTU_TESTS_DEVICE_H

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct Index
{
    int x;
};
inline thread_local Index threadIdx{0};
inline thread_local Index blockDim{1};

inline int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
inline int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

inline int32_t __float_as_int(float value)
{
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float __int_as_float(int32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float __int2float_rz(int32_t value)
{
    int const mode = std::fegetround();
    std::fesetround(FE_TOWARDZERO);
    volatile float const result = static_cast<float>(value);
    std::fesetround(mode);
    return result;
}

#endif // HSTU_TESTS_DEVICE_H
