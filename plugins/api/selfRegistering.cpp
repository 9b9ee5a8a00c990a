//! Entry of libhstu_trt_plugin.so: registers the creator when the library is loaded and takes it back when it is
//! unloaded. REGISTER_TENSORRT_PLUGIN does neither: it registers under the empty namespace, where getCreator never
//! finds a creator that has one, and leaves a dangling pointer in the registry after dlclose.

#include "creators.h"
#include "hostLogger.h"
#include "hostVersion.h"

#include "hstuAttentionContract.h"

namespace hstu
{
namespace
{

class Registrar
{
public:
    Registrar() noexcept
    {
        if (!isHostCompatible(getInferLibVersion()))
        {
            return;
        }
        nvinfer1::IPluginRegistry* const registry = getPluginRegistry();
        mRegistered = registry != nullptr && registry->registerCreator(attentionCreator(), kPluginNamespace);
        if (!mRegistered)
        {
            logMessage(
                nvinfer1::ILogger::Severity::kWARNING, "[hstu] the registry did not take HstuAttention version 1, "
                                                       "namespace hstu: another library has registered it already");
        }
    }

    ~Registrar()
    {
        if (mRegistered)
        {
            getPluginRegistry()->deregisterCreator(attentionCreator());
        }
    }

    Registrar(Registrar const&) = delete;
    Registrar& operator=(Registrar const&) = delete;

private:
    bool mRegistered{false};
};

Registrar const registrar;

} // namespace

nvinfer1::ILogger* findHostLogger() noexcept
{
    return getLogger();
}

} // namespace hstu
