//! Counts and prints what does not hold, for all rules of one translation unit.

#pragma once

#include <cstdio>
#include <string>

namespace
{

int gFailures = 0;

void expect(bool holds, std::string const& what)
{
    if (!holds)
    {
        std::printf("does not hold: %s\n", what.c_str());
        ++gFailures;
    }
}

} // namespace
