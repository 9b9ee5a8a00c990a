#ifndef HSTU_FIELD_READER_H
#define HSTU_FIELD_READER_H

#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "contractTables.h"

namespace hstu
{

//! Type codes of nvinfer1::PluginFieldType that the contracts use; they are the same from TensorRT 8.5 to 11.
enum class FieldType : int32_t
{
    kFloat32 = 1,
    kInt32 = 5,
    kChar = 6,
};

//! One field as the framework handed it over. Nothing is owned.
struct FieldView
{
    char const* name;
    int32_t type;
    int32_t length; //!< elements
    void const* data;
};

//! Collects every problem of a node's fields, so that a user repairs a node once.
class FieldProblems
{
public:
    template <typename... Args>
    void add(Args const&... args)
    {
        mText << "\n  - ";
        (mText << ... << args);
        ++mCount;
    }

    //! Throws PluginError with all of them, unless there is none. \param nodeName may be null.
    void raise(OperatorIdentity const& identity, char const* nodeName) const;

private:
    std::ostringstream mText;
    int32_t mCount{0};
};

//! \return "an int >= 1 and <= 8" and the like.
std::string allowedRange(AttributeRange const& range);

//! Adds a problem unless the value is within the range.
void checkRange(AttributeRange const& range, double value, FieldProblems& problems);

//! \return whether the field carries exactly one value of the wanted type; otherwise adds a problem.
bool hasShape(FieldView const& field, FieldType type, FieldProblems& problems);

//! Takes the fields that every node may have: plugin_version and plugin_namespace, which must agree with the contract,
//! and adds problems for those without a name or given twice. \return whether the field at the index is dealt with.
bool takeCommonField(
    OperatorIdentity const& identity, std::vector<FieldView> const& fields, size_t index, FieldProblems& problems);

bool isPresent(std::vector<FieldView> const& fields, char const* name);

template <typename Value>
Value loadValue(FieldView const& field)
{
    Value value;
    std::memcpy(&value, field.data, sizeof(value)); // the framework promises no alignment
    return value;
}

template <typename Specs>
auto const* findSpec(Specs const& specs, char const* name)
{
    for (auto const& spec : specs)
    {
        if (std::strcmp(spec.name, name) == 0)
        {
            return &spec;
        }
    }
    return static_cast<decltype(&specs[0])>(nullptr);
}

//! Checks every attribute against the contract's ranges. Throws PluginError listing all violations.
template <typename Specs, typename Attributes>
void checkAttributes(
    OperatorIdentity const& identity, Specs const& specs, char const* nodeName, Attributes const& attributes)
{
    FieldProblems problems;
    for (auto const& spec : specs)
    {
        checkRange(spec,
            spec.isFloat ? static_cast<double>(attributes.*spec.floatMember)
                         : static_cast<double>(attributes.*spec.intMember),
            problems);
    }
    problems.raise(identity, nodeName);
}

//! Reads and validates the attributes of one node.
//!
//! \param nodeName for messages; may be null.
//! \param fields the fields as passed. `plugin_version` and `plugin_namespace` may be among them and must then agree
//!     with the contract.
//! \param signature where to read the engine's fields to (they are then all required), or nullptr to refuse them.
//! \return the attributes; those that have a default may lack their field. Throws PluginError listing every missing, duplicate, unknown, mistyped and out-of-range
//!     field with the value seen and the values allowed.
template <typename Attributes, typename Specs, typename SignatureFields, typename Signature>
Attributes readFields(OperatorIdentity const& identity, Specs const& specs, SignatureFields const& signatureFields,
    char const* nodeName, std::vector<FieldView> const& fields, Signature* signature)
{
    FieldProblems problems;
    Attributes attributes;
    for (size_t i = 0; i < fields.size(); ++i)
    {
        FieldView const& field = fields[i];
        if (takeCommonField(identity, fields, i, problems))
        {
            continue;
        }
        auto const* const engineField = signature != nullptr ? findSpec(signatureFields, field.name) : nullptr;
        if (engineField != nullptr)
        {
            if (hasShape(field, FieldType::kInt32, problems))
            {
                signature->*engineField->member = loadValue<int32_t>(field);
            }
            continue;
        }
        auto const* const spec = findSpec(specs, field.name);
        if (spec == nullptr)
        {
            std::string names;
            for (auto const& known : specs)
            {
                names += (names.empty() ? "" : ", ") + std::string(known.name);
            }
            problems.add("field '", field.name, "' is unknown; allowed: ", names);
        }
        else if (hasShape(field, spec->isFloat ? FieldType::kFloat32 : FieldType::kInt32, problems))
        {
            if (spec->isFloat)
            {
                attributes.*spec->floatMember = loadValue<float>(field);
                checkRange(*spec, attributes.*spec->floatMember, problems);
            }
            else
            {
                attributes.*spec->intMember = loadValue<int32_t>(field);
                checkRange(*spec, attributes.*spec->intMember, problems);
            }
        }
    }
    for (auto const& spec : specs)
    {
        if (!spec.hasDefault && !isPresent(fields, spec.name))
        {
            problems.add("field '", spec.name, "' is missing; allowed: ", allowedRange(spec));
        }
    }
    if (signature != nullptr)
    {
        for (auto const& field : signatureFields)
        {
            if (!isPresent(fields, field.name))
            {
                problems.add("field '", field.name, "' is missing from the engine");
            }
        }
    }
    problems.raise(identity, nodeName);
    return attributes;
}

//! \return "alpha=1 scaling_seq_len=211 ...", in the contract's order.
template <typename Specs, typename Attributes>
std::string describeFields(Specs const& specs, Attributes const& attributes)
{
    std::ostringstream text;
    text.precision(9); // distinguishes every float
    char const* separator = "";
    for (auto const& spec : specs)
    {
        text << separator << spec.name << "=";
        separator = " ";
        if (spec.isFloat)
        {
            text << attributes.*spec.floatMember;
        }
        else
        {
            text << attributes.*spec.intMember;
        }
    }
    return text.str();
}

} // namespace hstu

#endif // HSTU_FIELD_READER_H
