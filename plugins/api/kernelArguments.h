#ifndef HSTU_KERNEL_ARGUMENTS_H
#define HSTU_KERNEL_ARGUMENTS_H

#include <cstdint>

#include "hstuAttentionKernel.h"
#include "hstuAttentionKernels.h"

namespace hstu
{

//! What callers of hstuAttentionKernels.h name, in the contract's positions.
struct NamedTensors
{
    NodeTensors tensors;
    DevicePointers pointers;
};

//! Reads and validates the attributes of one node.
//!
//! \param nodeName for messages; may be null.
//! \return the attributes; those that have a default may be missing. Throws PluginError listing every missing,
//!     duplicate and unknown attribute, every one out of range, and every integer with a fraction, with what was seen
//!     and what is allowed.
HstuAttentionAttributes attributesByName(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes);

//! Finds the inputs that the attributes make present. Their ranks and extents are not checked, which resolveSizes does.
//! Throws PluginError when the names are not exactly those, or a type is no HstuElementType.
NamedTensors inputsByName(
    char const* nodeName, HstuAttentionAttributes const& attributes, HstuTensor const* inputs, int32_t nbInputs);

//! Sets the output. Throws PluginError when it has another name than the contract's, or no known type.
void setOutput(char const* nodeName, HstuTensor const* output, NamedTensors& named);

//! Throws PluginError when a tensor that is not empty has no address. Extents must all be known.
void checkAddresses(char const* nodeName, HstuAttentionAttributes const& attributes, NamedTensors const& named);

} // namespace hstu

#endif // HSTU_KERNEL_ARGUMENTS_H
