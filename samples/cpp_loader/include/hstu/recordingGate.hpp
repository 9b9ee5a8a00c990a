#ifndef HSTU_LOADER_RECORDING_GATE_HPP
#define HSTU_LOADER_RECORDING_GATE_HPP

#include <condition_variable>
#include <cstddef>
#include <mutex>

//! Keeps the recording of a CUDA graph apart from passes of other sessions.
namespace hstu::loader
{

//! While one thread instantiated a graph and another let an engine of TensorRT-RTX 1.6.1 enqueue a pass, on streams of
//! their own, the driver (580.159.04) ended processes of the Python runtime with a segmentation fault; in none in which
//! the two were kept apart. Several threads may enqueue at a time; whoever records is alone. Neither may be begun
//! inside the other. Who waits to record goes first: passes would keep a busy service from ever recording.
class RecordingGate
{
public:
    //! \return the gate of the process, as the driver is one for all.
    static RecordingGate& process()
    {
        static RecordingGate only;
        return only;
    }

    //! Lives while an engine puts work on a stream.
    class Enqueueing
    {
    public:
        explicit Enqueueing(RecordingGate& gate)
            : mGate(gate)
        {
            std::unique_lock<std::mutex> lock(mGate.mMutex);
            mGate.mChanged.wait(lock, [this] { return !mGate.mIsRecording && mGate.mWaiting == 0; });
            ++mGate.mEnqueueing;
        }

        ~Enqueueing()
        {
            std::lock_guard<std::mutex> const lock(mGate.mMutex);
            --mGate.mEnqueueing;
            mGate.mChanged.notify_all();
        }

        Enqueueing(Enqueueing const&) = delete;
        Enqueueing& operator=(Enqueueing const&) = delete;

    private:
        RecordingGate& mGate;
    };

    //! Lives while a graph is recorded and made, or is freed.
    class Recording
    {
    public:
        explicit Recording(RecordingGate& gate)
            : mGate(gate)
        {
            std::unique_lock<std::mutex> lock(mGate.mMutex);
            ++mGate.mWaiting;
            mGate.mChanged.wait(lock, [this] { return !mGate.mIsRecording && mGate.mEnqueueing == 0; });
            --mGate.mWaiting;
            mGate.mIsRecording = true;
        }

        ~Recording()
        {
            std::lock_guard<std::mutex> const lock(mGate.mMutex);
            mGate.mIsRecording = false;
            mGate.mChanged.notify_all();
        }

        Recording(Recording const&) = delete;
        Recording& operator=(Recording const&) = delete;

    private:
        RecordingGate& mGate;
    };

private:
    std::mutex mMutex;
    std::condition_variable mChanged;
    std::size_t mEnqueueing{0};
    std::size_t mWaiting{0};
    bool mIsRecording{false};
};

} // namespace hstu::loader

#endif // HSTU_LOADER_RECORDING_GATE_HPP
