#ifndef HSTU_FAKE_DRIVER_H
#define HSTU_FAKE_DRIVER_H

#include <functional>

#include <cuda.h>

//! Puts work on a stream of the fake driver, as a kernel launch does: it runs when the stream is waited for, or belongs
//! to the graph that is being recorded. \return false if the stream is unknown.
extern "C" bool hstuFakeLaunch(CUstream stream, std::function<void()> const* work);

//! \return whether the stream is being recorded.
extern "C" bool hstuFakeIsCapturing(CUstream stream);

#endif // HSTU_FAKE_DRIVER_H
