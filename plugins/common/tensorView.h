#ifndef HSTU_TENSOR_VIEW_H
#define HSTU_TENSOR_VIEW_H

#include <array>
#include <cstdint>

#include "elementType.h"

namespace hstu
{

//! Type and extents of one tensor. An extent of -1 is not known yet.
struct TensorView
{
    ElementType type{ElementType::kOther};
    int32_t rank{0};
    std::array<int64_t, 8> dims{};
};

} // namespace hstu

#endif // HSTU_TENSOR_VIEW_H
