#ifndef HSTU_LOADER_ERROR_HPP
#define HSTU_LOADER_ERROR_HPP

#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <utility>

//! What went wrong, in the only exception type that leaves this loader.
namespace hstu::loader
{

//! Kinds of failure. The values are the exit codes of hstu_score; 2 to 8 and 70 mean what they mean to `hstu-compile`.
enum class Failure : int
{
    kUSAGE = 2,     //!< options or arguments that do not go together
    kENGINE = 5,    //!< TensorRT, an engine or a plugin library
    kDIFFERENT = 6, //!< answers differ from the reference, or from the first run
    kREQUEST = 7,   //!< feeds that the model does not take
    kBUNDLE = 8,    //!< a bundle, a reference or an output file
    kNO_GPU = 9,    //!< no CUDA driver or no usable GPU
    kGROWTH = 10,   //!< memory grew during a soak
    kINTERNAL = 70, //!< a bug of the loader
};

//! \return the name that --json prints.
inline char const* nameOf(Failure failure) noexcept
{
    switch (failure)
    {
    case Failure::kUSAGE: return "usage";
    case Failure::kENGINE: return "engine";
    case Failure::kDIFFERENT: return "different";
    case Failure::kREQUEST: return "request";
    case Failure::kBUNDLE: return "bundle";
    case Failure::kNO_GPU: return "no-gpu";
    case Failure::kGROWTH: return "growth";
    case Failure::kINTERNAL: return "internal";
    }
    return "unknown";
}

//! A failure in four parts: kind, what failed, why (the value seen and what is allowed), and how to fix it.
class Error : public std::exception
{
public:
    Error(Failure failure, std::string what, std::string why, std::string fix)
        : mFailure(failure)
        , mWhat(std::move(what))
        , mWhy(std::move(why))
        , mFix(std::move(fix))
        , mText("error[" + std::string(nameOf(failure)) + "] " + mWhat + "\n  Why: " + mWhy + "\n  Fix: " + mFix)
    {
    }

    char const* what() const noexcept override
    {
        return mText.c_str();
    }

    Failure failure() const noexcept
    {
        return mFailure;
    }

    std::string const& headline() const noexcept
    {
        return mWhat;
    }

    std::string const& why() const noexcept
    {
        return mWhy;
    }

    std::string const& fix() const noexcept
    {
        return mFix;
    }

private:
    Failure mFailure;
    std::string mWhat;
    std::string mWhy;
    std::string mFix;
    std::string mText;
};

//! \return all parts as one text.
template <typename... Parts>
std::string textOf(Parts const&... parts)
{
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

//! Runs `action`; whatever it throws leaves as an `Error`. Every public function that allocates or reads goes through
//! here, so a caller needs one catch clause.
template <typename Action>
auto typed(char const* doing, Action&& action) -> decltype(action())
{
    try
    {
        return std::forward<Action>(action)();
    }
    catch (Error const&)
    {
        throw;
    }
    catch (std::bad_alloc const&)
    {
        throw Error(Failure::kINTERNAL, textOf("no host memory left while ", doing), "an allocation failed",
            "free memory, or use smaller files and batches");
    }
    catch (std::exception const& error)
    {
        throw Error(Failure::kINTERNAL, textOf("an unexpected failure while ", doing), error.what(),
            "this is a bug of the loader; please report it with the bundle's manifest.json");
    }
}

} // namespace hstu::loader

#endif // HSTU_LOADER_ERROR_HPP
