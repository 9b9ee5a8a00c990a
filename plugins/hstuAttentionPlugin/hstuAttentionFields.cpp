#include "hstuAttentionFields.h"

namespace hstu
{

void validateAttributes(char const* nodeName, HstuAttentionAttributes const& attributes)
{
    checkAttributes(kIdentity, kAttributes, nodeName, attributes);
}

HstuAttentionAttributes readAttributes(
    char const* nodeName, std::vector<FieldView> const& fields, EngineSignature* signature)
{
    return readFields<HstuAttentionAttributes>(
        kIdentity, kAttributes, kSignatureFields, nodeName, fields, signature);
}

std::string describeAttributes(HstuAttentionAttributes const& attributes)
{
    return describeFields(kAttributes, attributes);
}

} // namespace hstu
