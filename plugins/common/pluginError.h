#ifndef HSTU_PLUGIN_ERROR_H
#define HSTU_PLUGIN_ERROR_H

#include <sstream>
#include <stdexcept>
#include <string>

namespace hstu
{

//! Thrown inside the library and caught at every entry point; no exception crosses the library's boundary.
class PluginError : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

//! Throws a PluginError whose message is its arguments streamed one after the other.
template <typename... Args>
[[noreturn]] void fail(Args const&... args)
{
    std::ostringstream message;
    (message << ... << args);
    throw PluginError(message.str());
}

//! Throws a PluginError with the streamed message unless the condition holds. Messages are only built on failure.
#define HSTU_CHECK(condition, ...)                                                                                     \
    do                                                                                                                 \
    {                                                                                                                  \
        if (!(condition))                                                                                              \
        {                                                                                                              \
            ::hstu::fail(__VA_ARGS__);                                                                                 \
        }                                                                                                              \
    } while (false)

} // namespace hstu

#endif // HSTU_PLUGIN_ERROR_H
