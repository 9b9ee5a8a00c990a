#include "hstuAttentionFields.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "pluginError.h"

namespace hstu
{
namespace
{

constexpr char const* kFieldTypeNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "CHAR", "DIMS",
    "UNKNOWN", "BF16", "INT64", "FP8", "INT4", "FP4"};

std::string fieldTypeName(int32_t type)
{
    constexpr int32_t kNbNames = sizeof(kFieldTypeNames) / sizeof(kFieldTypeNames[0]);
    return type >= 0 && type < kNbNames ? kFieldTypeNames[type] : "type code " + std::to_string(type);
}

//! Collects every problem, so that a user repairs a node once.
class Problems
{
public:
    template <typename... Args>
    void add(Args const&... args)
    {
        mText << "\n  - ";
        (mText << ... << args);
        ++mCount;
    }

    void raise(char const* nodeName) const
    {
        HSTU_CHECK(mCount == 0, kPluginNamespace, "::", kPluginName, " node '", nodeName != nullptr ? nodeName : "",
            "': ", mCount, " bad field(s):", mText.str());
    }

private:
    std::ostringstream mText;
    int32_t mCount{0};
};

std::string allowedRange(AttributeSpec const& spec)
{
    std::ostringstream text;
    text << (spec.isFloat ? "a finite float" : "an int");
    if (!std::isinf(spec.min))
    {
        text << (spec.minExclusive ? " > " : " >= ") << static_cast<int64_t>(spec.min);
    }
    if (!std::isinf(spec.max))
    {
        text << " and <= " << static_cast<int64_t>(spec.max);
    }
    return text.str();
}

void checkRange(AttributeSpec const& spec, double value, Problems& problems)
{
    bool const aboveMin = spec.minExclusive ? value > spec.min : value >= spec.min;
    if (!std::isfinite(value) || !aboveMin || value > spec.max)
    {
        std::ostringstream seen;
        seen.precision(spec.isFloat ? 9 : 10); // every float, every int32
        seen << value;
        problems.add("field '", spec.name, "' is ", seen.str(), "; allowed: ", allowedRange(spec));
    }
}

//! \return whether the field carries exactly one value of the wanted type; otherwise says so.
bool hasShape(FieldView const& field, FieldType type, Problems& problems)
{
    if (field.type != static_cast<int32_t>(type) || field.length != 1)
    {
        problems.add("field '", field.name, "' is ", fieldTypeName(field.type), " of length ", field.length,
            "; allowed: ", fieldTypeName(static_cast<int32_t>(type)), " of length 1");
        return false;
    }
    if (field.data == nullptr)
    {
        problems.add("field '", field.name, "' has no data");
        return false;
    }
    return true;
}

template <typename Value>
Value loadValue(FieldView const& field)
{
    Value value;
    std::memcpy(&value, field.data, sizeof(value)); // the framework promises no alignment
    return value;
}

//! The parser may or may not hand over the two strings by which it found the creator.
void checkIdentity(FieldView const& field, char const* expected, Problems& problems)
{
    bool const isText =
        field.type == static_cast<int32_t>(FieldType::kChar) && field.data != nullptr && field.length >= 0;
    if (!isText)
    {
        problems.add("field '", field.name, "' is ", fieldTypeName(field.type), "; allowed: CHAR \"", expected, "\"");
        return;
    }
    std::string value(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
    value.resize(std::strlen(value.c_str())); // the length counts a terminating NUL when the parser writes one
    if (value != expected)
    {
        problems.add("field '", field.name, "' is \"", value, "\"; allowed: \"", expected, "\"");
    }
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

bool isDuplicate(std::vector<FieldView> const& fields, size_t index)
{
    for (size_t i = 0; i < index; ++i)
    {
        if (fields[i].name != nullptr && std::strcmp(fields[i].name, fields[index].name) == 0)
        {
            return true;
        }
    }
    return false;
}

bool isPresent(std::vector<FieldView> const& fields, char const* name)
{
    for (FieldView const& field : fields)
    {
        if (field.name != nullptr && std::strcmp(field.name, name) == 0)
        {
            return true;
        }
    }
    return false;
}

std::string knownNames()
{
    std::string names;
    for (AttributeSpec const& spec : kAttributes)
    {
        names += names.empty() ? "" : ", ";
        names += spec.name;
    }
    return names;
}

} // namespace

void validateAttributes(char const* nodeName, HstuAttentionAttributes const& attributes)
{
    Problems problems;
    for (AttributeSpec const& spec : kAttributes)
    {
        checkRange(spec,
            spec.isFloat ? static_cast<double>(attributes.*spec.floatMember)
                         : static_cast<double>(attributes.*spec.intMember),
            problems);
    }
    problems.raise(nodeName);
}

HstuAttentionAttributes readAttributes(
    char const* nodeName, std::vector<FieldView> const& fields, EngineSignature* signature)
{
    Problems problems;
    HstuAttentionAttributes attributes;
    for (size_t i = 0; i < fields.size(); ++i)
    {
        FieldView const& field = fields[i];
        if (field.name == nullptr)
        {
            problems.add("field number ", i, " has no name");
            continue;
        }
        if (isDuplicate(fields, i))
        {
            problems.add("field '", field.name, "' is given more than once");
            continue;
        }
        if (std::strcmp(field.name, "plugin_version") == 0)
        {
            checkIdentity(field, kPluginVersion, problems);
            continue;
        }
        if (std::strcmp(field.name, "plugin_namespace") == 0)
        {
            checkIdentity(field, kPluginNamespace, problems);
            continue;
        }
        SignatureField const* const engineField =
            signature != nullptr ? findSpec(kSignatureFields, field.name) : nullptr;
        if (engineField != nullptr)
        {
            if (hasShape(field, FieldType::kInt32, problems))
            {
                signature->*engineField->member = loadValue<int32_t>(field);
            }
            continue;
        }
        AttributeSpec const* const spec = findSpec(kAttributes, field.name);
        if (spec == nullptr)
        {
            problems.add("field '", field.name, "' is unknown; allowed: ", knownNames());
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
    for (AttributeSpec const& spec : kAttributes)
    {
        if (!isPresent(fields, spec.name))
        {
            problems.add("field '", spec.name, "' is missing; allowed: ", allowedRange(spec));
        }
    }
    if (signature != nullptr)
    {
        for (SignatureField const& field : kSignatureFields)
        {
            if (!isPresent(fields, field.name))
            {
                problems.add("field '", field.name, "' is missing from the engine");
            }
        }
    }
    problems.raise(nodeName);
    return attributes;
}

std::string describeAttributes(HstuAttentionAttributes const& attributes)
{
    std::ostringstream text;
    text.precision(9); // distinguishes every float
    for (AttributeSpec const& spec : kAttributes)
    {
        text << (&spec == &kAttributes[0] ? "" : " ") << spec.name << "=";
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
