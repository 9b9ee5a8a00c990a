#include "creators.h"
#include "hstuNormOperator.h"
#include "pluginV3.h"

namespace hstu
{

template class PluginV3<norm::NormOperator>;
template class PluginCreatorV3<norm::NormOperator>;

CreatorInterface& normCreator() noexcept
{
    static PluginCreatorV3<norm::NormOperator> creator;
    return creator;
}

} // namespace hstu
