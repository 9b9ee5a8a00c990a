#include "creators.h"
#include "hstuAttentionOperator.h"
#include "pluginV2.h"

namespace hstu
{

template class PluginV2<AttentionOperator>;
template class PluginCreatorV2<AttentionOperator>;

#if NV_TENSORRT_MAJOR < 10
CreatorInterface& attentionCreator() noexcept
{
    static PluginCreatorV2<AttentionOperator> creator;
    return creator;
}
#endif

} // namespace hstu
