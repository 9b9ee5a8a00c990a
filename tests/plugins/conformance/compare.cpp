#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

namespace
{

float halfToFloat(uint16_t bits)
{
    uint32_t const sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
    int32_t const exponent = (bits >> 10) & 0x1F;
    uint32_t const mantissa = bits & 0x3FFU;
    if (exponent == 0x1F)
    {
        return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : (sign != 0 ? -HUGE_VALF : HUGE_VALF);
    }
    float const magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024U), exponent - 25);
    return sign != 0 ? -magnitude : magnitude;
}

template <typename T>
T load(std::vector<unsigned char> const& bytes, size_t index)
{
    T value;
    std::memcpy(&value, bytes.data() + index * sizeof(T), sizeof(T));
    return value;
}

double element(std::string const& type, std::vector<unsigned char> const& bytes, size_t index)
{
    if (type == "float32")
    {
        return load<float>(bytes, index);
    }
    uint16_t const bits = load<uint16_t>(bytes, index);
    if (type == "float16")
    {
        return halfToFloat(bits);
    }
    uint32_t const wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

} // namespace

OutputError measureError(Case const& testCase, std::vector<unsigned char> const& output)
{
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    OutputError error;
    double sumOfSquares = 0.0;
    double worstDifference = 0.0;
    size_t counted = 0;
    double worst = -1.0;
    for (size_t i = 0; i < testCase.reference.size(); ++i)
    {
        double const given = element(testCase.outputType, output, i);
        double const expected = testCase.reference[i];
        double const difference = std::abs(given - expected);
        double ratio = kInfinity;
        if (std::isfinite(given))
        {
            worstDifference = std::max(worstDifference, difference);
            double const beyond = std::max(difference - testCase.subnormalStep, 0.0);
            ratio = testCase.divisor[i] > 0 ? beyond / testCase.divisor[i] : (given == 0.0 ? 0.0 : kInfinity);
        }
        if (testCase.divisor[i] > 0)
        {
            sumOfSquares += expected * expected;
            ++counted;
        }
        if (ratio > worst)
        {
            worst = ratio;
            std::ostringstream where;
            where << "index";
            size_t rest = i;
            size_t extent = testCase.reference.size();
            for (int64_t const dim : testCase.outputDims)
            {
                extent /= static_cast<size_t>(dim);
                where << " " << rest / extent;
                rest %= extent;
            }
            where << ": got " << given << ", expected " << expected;
            error.where = where.str();
        }
        error.componentwise = std::max(error.componentwise, ratio);
    }
    double const rms = counted > 0 ? std::sqrt(sumOfSquares / static_cast<double>(counted)) : 0.0;
    error.rms = std::isinf(error.componentwise) ? kInfinity : rms > 0 ? worstDifference / rms : 0.0;
    return error;
}

bool isWithinBounds(Case const& testCase, OutputError const& error)
{
    return error.componentwise <= testCase.componentwiseBound && error.rms <= testCase.rmsBound;
}
