#include "hostLogger.h"

#include <cstdio>

namespace hstu
{

void logMessage(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept
{
    nvinfer1::ILogger* const logger = findHostLogger();
    if (logger != nullptr)
    {
        logger->log(severity, message.c_str());
    }
    else if (severity <= nvinfer1::ILogger::Severity::kWARNING)
    {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

} // namespace hstu
