#ifndef HSTU_CREATORS_H
#define HSTU_CREATORS_H

#include <NvInferRuntime.h>

namespace hstu
{

#if NV_TENSORRT_MAJOR >= 10
using CreatorInterface = nvinfer1::IPluginCreatorInterface;
#else
using CreatorInterface = nvinfer1::IPluginCreator;
#endif

//! \return the library's one creator. It lives as long as the library is loaded.
CreatorInterface& attentionCreator() noexcept;

} // namespace hstu

#endif // HSTU_CREATORS_H
