#include "hostVersion.h"

#include <cstdio>

namespace hstu
{

bool isHostCompatible(int32_t hostVersion) noexcept
{
    int32_t const hostMajor = majorOfVersion(hostVersion);
    if (hostMajor == NV_TENSORRT_MAJOR)
    {
        return true;
    }
    std::fprintf(stderr,
        "[hstu] plugin library not registered: it was built for TensorRT %d and this process runs TensorRT %d, whose "
        "C++ "
        "interfaces differ. Fix: `hstu-compile plugin build` with TENSORRT_INCLUDE_DIR pointing at TensorRT %d "
        "headers\n",
        NV_TENSORRT_MAJOR, hostMajor, hostMajor);
    return false;
}

} // namespace hstu
