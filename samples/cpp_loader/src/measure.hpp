#ifndef HSTU_SCORE_MEASURE_HPP
#define HSTU_SCORE_MEASURE_HPP

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "hstu_bundle.hpp"
#include "lanes.hpp"

//! Times requests over all lanes, and soaks them.
namespace hstu::score
{

using Lanes = std::vector<std::unique_ptr<Lane>>;
using Clock = std::chrono::steady_clock;

inline double millisecondsSince(Clock::time_point start)
{
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

//! Runs work(lane, number) for numbers 0 .. count - 1, each lane on its own thread. The first failure ends all lanes,
//! and is thrown here.
inline void runOverLanes(
    Lanes const& lanes, std::size_t count, std::function<void(std::size_t, std::size_t)> const& work)
{
    std::atomic<std::size_t> next{0};
    std::atomic<bool> isStopped{false};
    std::exception_ptr failure;
    std::mutex mutex;
    std::vector<std::thread> threads;
    auto const body = [&](std::size_t lane)
    {
        try
        {
            for (std::size_t number = next++; number < count && !isStopped; number = next++)
            {
                work(lane, number);
            }
        }
        catch (...)
        {
            std::lock_guard<std::mutex> const lock(mutex);
            failure = failure ? failure : std::current_exception();
            isStopped = true;
        }
    };
    for (std::size_t lane = 1; lane < lanes.size(); ++lane)
    {
        threads.emplace_back(body, lane);
    }
    body(0);
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    if (failure)
    {
        std::rethrow_exception(failure);
    }
}

//! What was measured of one case.
struct Measurement
{
    std::string name;
    Way way{Way::kGRAPH};
    std::size_t sequences{0};
    std::size_t candidates{0};
    loader::LatencyStats call;   //!< ms, from feeds in host memory to answers in host memory
    loader::LatencyStats device; //!< ms of the engine on the device
    double requestsPerSecond{0};
    uint64_t deviceBytes{0}; //!< device memory that the program takes
    double error{0};
    double bound{0};
};

//! Warms up, then times one case over all lanes.
inline Measurement measured(Lanes const& lanes, Case const& asked, Way way, std::size_t warmup, std::size_t iterations)
{
    for (std::unique_ptr<Lane> const& lane : lanes)
    {
        // A graph is recorded on the second pass and proven on the third.
        for (std::size_t i = 0; i < std::max(warmup, std::size_t{4}); ++i)
        {
            lane->answer(asked, way);
        }
    }
    std::vector<std::vector<double>> calls(lanes.size());
    std::vector<std::vector<double>> devices(lanes.size());
    Clock::time_point const start = Clock::now();
    runOverLanes(lanes, iterations,
        [&](std::size_t lane, std::size_t)
        {
            Clock::time_point const called = Clock::now();
            lanes[lane]->answer(asked, way);
            calls[lane].push_back(millisecondsSince(called));
            devices[lane].push_back(lanes[lane]->deviceMilliseconds());
        });
    double const seconds = millisecondsSince(start) / 1e3;
    std::vector<double> allCalls;
    std::vector<double> allDevices;
    for (std::size_t lane = 0; lane < lanes.size(); ++lane)
    {
        allCalls.insert(allCalls.end(), calls[lane].begin(), calls[lane].end());
        allDevices.insert(allDevices.end(), devices[lane].begin(), devices[lane].end());
    }
    Measurement result;
    result.name = asked.name;
    result.way = way;
    result.sequences = asked.sequences;
    result.candidates = asked.candidates;
    result.requestsPerSecond = seconds > 0 ? static_cast<double>(allCalls.size()) / seconds : 0;
    result.call = loader::latencyStatsOf(std::move(allCalls));
    result.device = loader::latencyStatsOf(std::move(allDevices));
    return result;
}

struct SoakResult
{
    std::size_t requests{0};
    std::size_t different{0};      //!< answers that are not those of the first run, to the bit
    std::string firstDifferent;    //!< a case of those
    uint64_t deviceBytesBefore{0}; //!< in use once every lane was warm
    uint64_t deviceBytesAfter{0};
    uint64_t hostBytesBefore{0};
    uint64_t hostBytesAfter{0};
    loader::LatencyStats call;
    double requestsPerSecond{0};
};

//! Sends requests in a mixed order over all lanes and compares every answer. Memory is read after the first tenth, when
//! every buffer has grown to the largest request, and at the end; nothing runs at these moments.
inline SoakResult soaked(loader::Driver const& driver, Lanes const& lanes, std::vector<Case> const& cases, Way way,
    std::vector<loader::Tensors> const& expected, std::size_t requests)
{
    SoakResult result;
    result.requests = requests;
    std::vector<std::vector<double>> calls(lanes.size());
    std::mutex mutex;
    auto const send = [&](std::size_t first, std::size_t count)
    {
        runOverLanes(lanes, count,
            [&](std::size_t lane, std::size_t number)
            {
                // A fixed scramble: neighbours differ in shape, and every run sends the same requests.
                std::size_t const which = ((first + number) * 2654435761ULL >> 7) % cases.size();
                Clock::time_point const called = Clock::now();
                loader::Tensors const answer = lanes[lane]->answer(cases[which], way);
                calls[lane].push_back(millisecondsSince(called));
                if (!isSame(answer, expected[which]))
                {
                    std::lock_guard<std::mutex> const lock(mutex);
                    ++result.different;
                    result.firstDifferent = result.firstDifferent.empty() ? cases[which].name : result.firstDifferent;
                }
            });
    };
    for (std::vector<double>& samples : calls)
    {
        // Room for the worst share, so that the samples themselves are no growth.
        samples.reserve(requests);
        samples.assign(requests, 0);
        samples.clear();
    }
    std::size_t const warm = requests / 10;
    Clock::time_point const start = Clock::now();
    send(0, warm);
    result.deviceBytesBefore = driver.usedBytes();
    result.hostBytesBefore = loader::residentBytes();
    send(warm, requests - warm);
    result.deviceBytesAfter = driver.usedBytes();
    result.hostBytesAfter = loader::residentBytes();
    double const seconds = millisecondsSince(start) / 1e3;
    result.requestsPerSecond = seconds > 0 ? static_cast<double>(requests) / seconds : 0;
    std::vector<double> all;
    for (std::vector<double> const& samples : calls)
    {
        all.insert(all.end(), samples.begin(), samples.end());
    }
    result.call = loader::latencyStatsOf(std::move(all));
    return result;
}

//! \return bytes that came between the two, 0 if they shrank.
inline uint64_t growth(uint64_t before, uint64_t after)
{
    return after > before ? after - before : 0;
}

} // namespace hstu::score

#endif // HSTU_SCORE_MEASURE_HPP
