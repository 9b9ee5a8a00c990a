//! A second translation unit with the whole loader in it: a definition that is not inline would be there twice.

#include <string>

#include "hstu_bundle.hpp"

namespace other
{

std::string digestOf(std::string const& path);

std::string digestOf(std::string const& path)
{
    return hstu::loader::sha256OfFile(path, hstu::loader::Failure::kBUNDLE);
}

} // namespace other
