#ifndef HSTU_HOST_VERSION_H
#define HSTU_HOST_VERSION_H

#include <cstdint>

#include <NvInferVersion.h>

namespace hstu
{

//! \param version as getInferLibVersion() returns it: 8503 in TensorRT 8, 101400 from TensorRT 10.
constexpr int32_t majorOfVersion(int32_t version) noexcept
{
    return version >= 10000 ? version / 10000 : version / 1000;
}

//! \return whether this library speaks the interfaces of that TensorRT. Says on standard error why not: the logger's
//! own interface is what changed between majors, so it must not be called then.
bool isHostCompatible(int32_t hostVersion) noexcept;

} // namespace hstu

#endif // HSTU_HOST_VERSION_H
