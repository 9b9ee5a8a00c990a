#ifndef HSTU_HOST_LOGGER_H
#define HSTU_HOST_LOGGER_H

#include <exception>
#include <string>

#include <NvInferRuntime.h>

namespace hstu
{

//! \return the logger of the TensorRT that uses this library, or nullptr when it has none yet. Defined once per
//! library: the self-registering one asks libnvinfer, the other one the finder it was given.
nvinfer1::ILogger* findHostLogger() noexcept;

//! Writes one message to TensorRT's logger, or to standard error while there is none.
void logMessage(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

//! Runs the body of an entry point; logs whatever it throws and returns the fallback instead.
template <typename Result, typename Body>
Result guarded(char const* entryPoint, Result fallback, Body const& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        logMessage(nvinfer1::ILogger::Severity::kERROR, std::string("[hstu] ") + entryPoint + ": " + error.what());
    }
    catch (...)
    {
        logMessage(nvinfer1::ILogger::Severity::kERROR, std::string("[hstu] ") + entryPoint + ": unknown exception");
    }
    return fallback;
}

} // namespace hstu

#endif // HSTU_HOST_LOGGER_H
