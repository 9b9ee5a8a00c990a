#ifndef HSTU_CREATORS_H
#define HSTU_CREATORS_H

#include <array>

#include <NvInferRuntime.h>

namespace hstu
{

#if NV_TENSORRT_MAJOR >= 10
using CreatorInterface = nvinfer1::IPluginCreatorInterface;
#else
using CreatorInterface = nvinfer1::IPluginCreator;
#endif

//! \return the creator of one operator. It lives as long as the library is loaded.
CreatorInterface& attentionCreator() noexcept;
CreatorInterface& normCreator() noexcept;

//! \return the creators of every operator in the library.
inline std::array<CreatorInterface*, 2> allCreators() noexcept
{
    return {&attentionCreator(), &normCreator()};
}

} // namespace hstu

#endif // HSTU_CREATORS_H
