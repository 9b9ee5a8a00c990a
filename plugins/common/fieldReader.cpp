#include "fieldReader.h"

#include <cmath>

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

//! The parser may or may not hand over the two strings by which it found the creator.
void checkIdentity(FieldView const& field, char const* expected, FieldProblems& problems)
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

} // namespace

void FieldProblems::raise(OperatorIdentity const& identity, char const* nodeName) const
{
    HSTU_CHECK(mCount == 0, identity.space, "::", identity.name, " node '", nodeName != nullptr ? nodeName : "",
        "': ", mCount, " bad field(s):", mText.str());
}

std::string allowedRange(AttributeRange const& range)
{
    std::ostringstream text;
    text << (range.isFloat ? "a finite float" : "an int");
    if (!std::isinf(range.min))
    {
        text << (range.minExclusive ? " > " : " >= ") << static_cast<int64_t>(range.min);
    }
    if (!std::isinf(range.max))
    {
        text << " and <= " << static_cast<int64_t>(range.max);
    }
    return text.str();
}

void checkRange(AttributeRange const& range, double value, FieldProblems& problems)
{
    bool const aboveMin = range.minExclusive ? value > range.min : value >= range.min;
    if (!std::isfinite(value) || !aboveMin || value > range.max)
    {
        std::ostringstream seen;
        seen.precision(range.isFloat ? 9 : 10); // every float, every int32
        seen << value;
        problems.add("field '", range.name, "' is ", seen.str(), "; allowed: ", allowedRange(range));
    }
}

bool hasShape(FieldView const& field, FieldType type, FieldProblems& problems)
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

bool takeCommonField(
    OperatorIdentity const& identity, std::vector<FieldView> const& fields, size_t index, FieldProblems& problems)
{
    FieldView const& field = fields[index];
    if (field.name == nullptr)
    {
        problems.add("field number ", index, " has no name");
        return true;
    }
    if (isDuplicate(fields, index))
    {
        problems.add("field '", field.name, "' is given more than once");
        return true;
    }
    bool const isVersion = std::strcmp(field.name, "plugin_version") == 0;
    bool const isNamespace = std::strcmp(field.name, "plugin_namespace") == 0;
    if (isVersion || isNamespace)
    {
        checkIdentity(field, isVersion ? identity.version : identity.space, problems);
    }
    return isVersion || isNamespace;
}

} // namespace hstu
