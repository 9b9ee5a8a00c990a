//! What a session does after a failure, and what it loads of a bundle that changes under it, on the fakes of TensorRT
//! and CUDA.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "expect.hpp"
#include "hstu_bundle.hpp"

//! Prints what does not hold. The bundle is altered. \return 0 if everything does.
int checkSessionRules(std::string const& path);

namespace
{

using namespace hstu::loader;

template <typename Action>
bool isRefused(Failure failure, Action&& action)
{
    try
    {
        action();
    }
    catch (Error const& error)
    {
        return error.failure() == failure;
    }
    return false;
}

void expectAnswer(Session& session, Bundle const& bundle, GraphEntry const& graph, std::string const& what)
{
    for (ReferenceFeed const& feed : readReference(bundle, graph))
    {
        Tensors const answer = session.run(checkedFeeds(bundle.manifest(), graph, feed.inputs));
        std::vector<Comparison> const rows = compareOutputs(graph, bundle.manifest().precision, feed, answer);
        expect(!rows.empty(), what + ": something is compared");
        for (Comparison const& row : rows)
        {
            expect(row.passed(), what + ": " + row.tensor + " of " + row.feed);
        }
    }
}

void checkExhaustion(TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
{
    Session session(tensorRt, driver, Engine::open(tensorRt, driver, bundle, graph), 0);
    Tensors const feeds = checkedFeeds(bundle.manifest(), graph, readReference(bundle, graph).front().inputs);
    ::setenv("HSTU_FAKE_NO_PINNED", "1", 1);
    for (int attempt = 0; attempt < 2; ++attempt)
    {
        expect(isRefused(Failure::kENGINE, [&] { session.run(feeds); }), "no page-locked memory is an error each time");
    }
    ::unsetenv("HSTU_FAKE_NO_PINNED");
    expectAnswer(session, bundle, graph, "a session answers once there is memory again");
}

//! Threads that enqueue and threads that record, and nobody beside one who records.
void checkRecordingGate()
{
    RecordingGate gate;
    std::atomic<int> enqueueing{0};
    std::atomic<int> recording{0};
    std::atomic<bool> isAlone{true};
    auto const lane = [&](int number)
    {
        for (int turn = 0; turn < 400; ++turn)
        {
            if ((turn + number) % 5 == 0)
            {
                RecordingGate::Recording const alone(gate);
                if (++recording != 1 || enqueueing != 0)
                {
                    isAlone = false;
                }
                std::this_thread::yield();
                --recording;
            }
            else
            {
                RecordingGate::Enqueueing const besideOthers(gate);
                ++enqueueing;
                if (recording != 0)
                {
                    isAlone = false;
                }
                std::this_thread::yield();
                --enqueueing;
            }
        }
    };
    std::vector<std::thread> threads;
    for (int number = 0; number < 4; ++number)
    {
        threads.emplace_back(lane, number);
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    expect(isAlone, "who records is alone");
}

//! What ended processes on an H100: a graph that is made while another session lets its engine enqueue.
void checkRecordingsApart(TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
{
    Tensors const feeds = checkedFeeds(bundle.manifest(), graph, readReference(bundle, graph).front().inputs);
    Session session(tensorRt, driver, Engine::open(tensorRt, driver, bundle, graph), 2);
    std::atomic<bool> isAnswered{false};
    auto const asked = [&]
    {
        session.run(feeds);
        isAnswered = true;
    };
    auto const isAnsweredSoon = [&]
    {
        std::this_thread::sleep_for(std::chrono::milliseconds(150));
        return isAnswered.load();
    };
    std::thread passing;
    {
        RecordingGate::Recording const alone(RecordingGate::process());
        passing = std::thread(asked);
        expect(!isAnsweredSoon(), "a pass waits while another session records");
    }
    passing.join();
    expect(isAnswered, "it is enqueued afterwards");
    isAnswered = false;
    std::thread recording;
    {
        RecordingGate::Enqueueing const besideOthers(RecordingGate::process());
        recording = std::thread(asked);
        expect(!isAnsweredSoon(), "a recording waits while another session enqueues");
    }
    recording.join();
    expect(session.graphStats().captures == 1, "it is recorded afterwards");
}

void alter(std::string const& path)
{
    Bytes content = readFile(path, 1U << 30, Failure::kBUNDLE);
    content.push_back('\n');
    writeFile(path, content.data(), content.size());
}

void checkAlteredFiles(TensorRt& tensorRt, Driver const& driver, Bundle const& bundle, GraphEntry const& graph)
{
    alter(bundle.pathOf("reference_outputs.json"));
    expect(isRefused(Failure::kBUNDLE, [&] { readReference(bundle, graph); }), "an altered reference is refused");
    alter(bundle.pathOf(graph.engineFile));
    expect(isRefused(Failure::kBUNDLE, [&] { Engine::open(tensorRt, driver, bundle, graph); }),
        "an engine that was altered after the bundle was opened is refused");
}

} // namespace

int checkSessionRules(std::string const& path)
{
    Bundle const bundle = Bundle::open(path);
    Driver const driver(0);
    TensorRt tensorRt("");
    tensorRt.loadPlugin(bundle.pathOf(kPLUGIN_FILE), bundle.manifest());
    GraphEntry const& graph = bundle.graph("");
    checkExhaustion(tensorRt, driver, bundle, graph);
    checkRecordingGate();
    checkRecordingsApart(tensorRt, driver, bundle, graph);
    checkAlteredFiles(tensorRt, driver, bundle, graph);
    return gFailures == 0 ? 0 : 1;
}
