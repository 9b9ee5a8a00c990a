#ifndef HSTU_ATTENTION_FIELDS_H
#define HSTU_ATTENTION_FIELDS_H

#include <cstdint>
#include <string>
#include <vector>

#include "fieldReader.h"
#include "hstuAttentionContract.h"

namespace hstu
{

//! What an engine stores beside the attributes: the element types and widths that were fixed when it was built, so
//! that kernels can be loaded when an execution context is made, before any shape is known.
struct EngineSignature
{
    int32_t elementType{-1};  //!< ElementType of q, k, v and out; -1: not known yet
    int32_t timestampBits{0}; //!< 32 or 64 with a time bias, 0 without
    int32_t numHeads{0};
    int32_t attentionDim{0};
    int32_t linearDim{0};
};

using SignatureField = BasicSignatureField<EngineSignature>;

inline constexpr SignatureField kSignatureFields[] = {
    {"engine_element_type", &EngineSignature::elementType},
    {"engine_timestamp_bits", &EngineSignature::timestampBits},
    {"engine_num_heads", &EngineSignature::numHeads},
    {"engine_attention_dim", &EngineSignature::attentionDim},
    {"engine_linear_dim", &EngineSignature::linearDim},
};

//! Reads and validates the attributes of one node; see readFields.
HstuAttentionAttributes readAttributes(
    char const* nodeName, std::vector<FieldView> const& fields, EngineSignature* signature);

//! Checks every attribute against the contract's ranges. Throws PluginError listing all violations.
void validateAttributes(char const* nodeName, HstuAttentionAttributes const& attributes);

//! \return "alpha=1 scaling_seq_len=211 ...", in the contract's order.
std::string describeAttributes(HstuAttentionAttributes const& attributes);

} // namespace hstu

#endif // HSTU_ATTENTION_FIELDS_H
