#include "creators.h"
#include "hstuAttentionOperator.h"
#include "pluginV3.h"

namespace hstu
{

template class PluginV3<AttentionOperator>;
template class PluginCreatorV3<AttentionOperator>;

CreatorInterface& attentionCreator() noexcept
{
    static PluginCreatorV3<AttentionOperator> creator;
    return creator;
}

} // namespace hstu
