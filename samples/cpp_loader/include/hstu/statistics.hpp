#ifndef HSTU_LOADER_STATISTICS_HPP
#define HSTU_LOADER_STATISTICS_HPP

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace hstu::loader
{

//! Latencies of many requests.
struct LatencyStats
{
    std::size_t count{0};
    double p50{0};
    double p90{0};
    double p99{0};
    double cv{0}; //!< standard deviation over mean
};

//! \return nearest-rank percentiles in the unit of the samples; zeros without samples.
inline LatencyStats latencyStatsOf(std::vector<double> samples)
{
    LatencyStats stats;
    stats.count = samples.size();
    if (samples.empty())
    {
        return stats;
    }
    std::sort(samples.begin(), samples.end());
    auto const at = [&samples](double share)
    {
        auto const rank = static_cast<std::size_t>(std::ceil(share * static_cast<double>(samples.size())));
        return samples[std::min(std::max(rank, std::size_t{1}), samples.size()) - 1];
    };
    stats.p50 = at(0.50);
    stats.p90 = at(0.90);
    stats.p99 = at(0.99);
    double sum = 0;
    for (double const sample : samples)
    {
        sum += sample;
    }
    double const mean = sum / static_cast<double>(samples.size());
    double squares = 0;
    for (double const sample : samples)
    {
        squares += (sample - mean) * (sample - mean);
    }
    stats.cv = mean > 0 ? std::sqrt(squares / static_cast<double>(samples.size())) / mean : 0;
    return stats;
}

//! \return bytes of host memory that the process occupies; 0 where /proc does not say.
inline uint64_t residentBytes() noexcept
{
    std::FILE* const file = std::fopen("/proc/self/statm", "r");
    if (file == nullptr)
    {
        return 0;
    }
    unsigned long long total = 0;
    unsigned long long resident = 0;
    int const found = std::fscanf(file, "%llu %llu", &total, &resident);
    std::fclose(file);
    return found == 2 ? resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) : 0;
}

} // namespace hstu::loader

#endif // HSTU_LOADER_STATISTICS_HPP
