#ifndef HSTU_ELEMENT_TYPE_H
#define HSTU_ELEMENT_TYPE_H

#include <cstdint>

namespace hstu
{

//! Element types the operator knows, independent of any framework. The first three values are the dtype codes of
//! HstuKernelImage and are written into engines: never renumber.
enum class ElementType : int32_t
{
    kFloat32 = 0,
    kFloat16 = 1,
    kBfloat16 = 2,
    kInt32 = 3,
    kInt64 = 4,
    kOther = 5, //!< anything the contract does not mention
};

//! \return the contract's name of the type ("float16").
constexpr char const* elementTypeName(ElementType type) noexcept
{
    switch (type)
    {
    case ElementType::kFloat32: return "float32";
    case ElementType::kFloat16: return "float16";
    case ElementType::kBfloat16: return "bfloat16";
    case ElementType::kInt32: return "int32";
    case ElementType::kInt64: return "int64";
    case ElementType::kOther: break;
    }
    return "another type";
}

} // namespace hstu

#endif // HSTU_ELEMENT_TYPE_H
