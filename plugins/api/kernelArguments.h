#ifndef HSTU_KERNEL_ARGUMENTS_H
#define HSTU_KERNEL_ARGUMENTS_H

#include <cstdint>

#include "hstuAttentionKernel.h"
#include "hstuAttentionKernels.h"
#include "hstuNormCore.h"

namespace hstu
{

//! What the functions below know of HstuAttention: its contract's tables.
struct AttentionArguments
{
    using Attributes = HstuAttentionAttributes;
    using Tensors = NodeTensors;
    using Pointers = DevicePointers;
    static constexpr OperatorIdentity kIdentity = hstu::kIdentity;
    static constexpr auto& kAttributes = hstu::kAttributes;
    static constexpr auto& kInputs = hstu::kInputs;
    static constexpr auto& kOutputs = hstu::kOutputs;
    static constexpr int32_t kNbInputs = hstu::kNbInputs;
};

//! The same of HstuNorm.
struct NormArguments
{
    using Attributes = norm::HstuNormAttributes;
    using Tensors = norm::NodeTensors;
    using Pointers = norm::DevicePointers;
    static constexpr OperatorIdentity kIdentity = norm::kIdentity;
    static constexpr auto& kAttributes = norm::kAttributes;
    static constexpr auto& kInputs = norm::kInputs;
    static constexpr auto& kOutputs = norm::kOutputs;
    static constexpr int32_t kNbInputs = norm::kNbInputs;
};

//! What callers of hstuAttentionKernels.h name, in the contract's positions.
template <typename Operator>
struct NamedTensors
{
    typename Operator::Tensors tensors;
    typename Operator::Pointers pointers;
};

// The templates are defined in kernelArguments.cpp, for the two operators above.

//! Reads and validates the attributes of one node.
//!
//! \param nodeName for messages; may be null.
//! \return the attributes; those that have a default may be missing. Throws PluginError listing every missing,
//!     duplicate and unknown attribute, every one out of range, and every integer with a fraction, with what was seen
//!     and what is allowed.
template <typename Operator>
typename Operator::Attributes attributesByName(
    char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes);

//! Finds the inputs that the attributes make present. Their ranks and extents are not checked, which resolveSizes does.
//! Throws PluginError when the names are not exactly those, or a type is no HstuElementType.
template <typename Operator>
NamedTensors<Operator> inputsByName(char const* nodeName, typename Operator::Attributes const& attributes,
    HstuTensor const* inputs, int32_t nbInputs);

//! Sets the output. Throws PluginError when it has another name than the contract's, or no known type.
template <typename Operator>
void setOutput(char const* nodeName, HstuTensor const* output, NamedTensors<Operator>& named);

//! Throws PluginError when a tensor that is not empty has no address. Extents must all be known.
template <typename Operator>
void checkAddresses(
    char const* nodeName, typename Operator::Attributes const& attributes, NamedTensors<Operator> const& named);

} // namespace hstu

#endif // HSTU_KERNEL_ARGUMENTS_H
