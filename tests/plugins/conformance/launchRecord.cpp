//! The record of fakeDriver.cpp for Python, linked into the same library.

#include "fakeDriver.h"

extern "C" int recordedLaunches()
{
    return static_cast<int>(fakeCalls()->launches.size());
}

//! \return how often the driver has allocated, freed, loaded or waited so far.
extern "C" int recordedWaits()
{
    return fakeCalls()->waits;
}

//! \return bytes that are allocated and not freed, in allocations.
extern "C" int recordedAllocations()
{
    return fakeCalls()->allocations;
}

extern "C" char const* recordedKernel(int launch)
{
    return fakeCalls()->launches.at(static_cast<size_t>(launch)).kernel.c_str();
}

extern "C" unsigned recordedGrid(int launch, int axis)
{
    return fakeCalls()->launches.at(static_cast<size_t>(launch)).grid[axis];
}

extern "C" void* recordedStream(int launch)
{
    return fakeCalls()->launches.at(static_cast<size_t>(launch)).stream;
}

//! \return the output's address, of a launch of a Hopper kernel.
extern "C" void* recordedOutput(int launch)
{
    return fakeCalls()->launches.at(static_cast<size_t>(launch)).parameters.out;
}
