#include "creators.h"
#include "hstuNormOperator.h"
#include "pluginV2.h"

namespace hstu
{

template class PluginV2<norm::NormOperator>;
template class PluginCreatorV2<norm::NormOperator>;

#if NV_TENSORRT_MAJOR < 10
CreatorInterface& normCreator() noexcept
{
    static PluginCreatorV2<norm::NormOperator> creator;
    return creator;
}
#endif

} // namespace hstu
