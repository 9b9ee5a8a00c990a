#ifndef HSTU_CONTRACT_TABLES_H
#define HSTU_CONTRACT_TABLES_H

#include <cstdint>

namespace hstu
{

//! By what a framework finds an operator.
struct OperatorIdentity
{
    char const* space; //!< ONNX domain and plugin namespace
    char const* name;
    char const* version;
};

//! What a contract says about the values of one attribute.
struct AttributeRange
{
    char const* name;
    bool isFloat;
    bool hasDefault; //!< a node may lack it and then has the value that Attributes starts with
    bool minExclusive;
    double min;
    double max;
};

//! The same with the member that holds it. Exactly one of the two is set.
template <typename Attributes>
struct BasicAttributeSpec : AttributeRange
{
    float Attributes::* floatMember;
    int32_t Attributes::* intMember;
};

//! A field of what an engine stores beside the attributes.
template <typename Signature>
struct BasicSignatureField
{
    char const* name;
    int32_t Signature::* member;
};

} // namespace hstu

#endif // HSTU_CONTRACT_TABLES_H
