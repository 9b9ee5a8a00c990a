//! Entry of libhstu_trt_plugin.so: registers the creators when the library is loaded and takes them back when it
//! is unloaded. REGISTER_TENSORRT_PLUGIN does neither: it registers under the empty namespace, where getCreator never
//! finds a creator that has one, and leaves a dangling pointer in the registry after dlclose.

#include <array>
#include <string>

#include "creators.h"
#include "hostLogger.h"
#include "hostVersion.h"

#include "hstuAttentionContract.h"
#include "hstuNormContract.h"

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
        std::array<CreatorInterface*, 2> const creators = allCreators();
        for (size_t i = 0; i < creators.size(); ++i)
        {
            mRegistered[i] = registry != nullptr && registry->registerCreator(*creators[i], kPluginNamespace);
            if (!mRegistered[i])
            {
                logMessage(nvinfer1::ILogger::Severity::kWARNING,
                    std::string("[hstu] the registry did not take ") + kOperators[i]
                        + " version 1, namespace hstu: another library has registered it already");
            }
        }
    }

    ~Registrar()
    {
        std::array<CreatorInterface*, 2> const creators = allCreators();
        for (size_t i = 0; i < creators.size(); ++i)
        {
            if (mRegistered[i])
            {
                getPluginRegistry()->deregisterCreator(*creators[i]);
            }
        }
    }

    Registrar(Registrar const&) = delete;
    Registrar& operator=(Registrar const&) = delete;

private:
    static constexpr char const* kOperators[] = {kPluginName, norm::kPluginName}; //!< as allCreators has them

    std::array<bool, 2> mRegistered{};
};

Registrar const registrar;

} // namespace

nvinfer1::ILogger* findHostLogger() noexcept
{
    return getLogger();
}

} // namespace hstu
