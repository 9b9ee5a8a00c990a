#include "kernelArguments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>

#include "pluginError.h"

namespace hstu
{
namespace
{

static_assert(static_cast<int32_t>(ElementType::kFloat32) == kHSTU_FLOAT32
                  && static_cast<int32_t>(ElementType::kFloat16) == kHSTU_FLOAT16
                  && static_cast<int32_t>(ElementType::kBfloat16) == kHSTU_BFLOAT16
                  && static_cast<int32_t>(ElementType::kInt32) == kHSTU_INT32
                  && static_cast<int32_t>(ElementType::kInt64) == kHSTU_INT64,
    "the C interface's types are the library's");
static_assert(std::tuple_size<decltype(TensorView::dims)>::value == HSTU_MAX_RANK,
    "a tensor of the C interface fits a TensorView");

constexpr ElementType kElementTypesByCode[] = {
    ElementType::kFloat32, ElementType::kFloat16, ElementType::kBfloat16, ElementType::kInt32, ElementType::kInt64};

std::string nodeOf(char const* nodeName)
{
    return std::string(kPluginName) + " node '" + (nodeName != nullptr ? nodeName : "") + "'";
}

void checkArray(char const* nodeName, char const* what, void const* array, int32_t count)
{
    HSTU_CHECK(count >= 0 && (array != nullptr || count == 0), nodeOf(nodeName), ": ", count, " ", what, " at ",
        array != nullptr ? "an address" : "null", "; allowed: 0 or more at an address");
}

//! Assigns an attribute unless its value is not of the attribute's type or range.
void assign(AttributeSpec const& spec, double value, HstuAttentionAttributes& attributes, FieldProblems& problems)
{
    using Float = std::numeric_limits<float>;
    using Int = std::numeric_limits<int32_t>;
    // Also false for what is not a number.
    bool const fits = spec.isFloat ? std::abs(value) <= static_cast<double>(Float::max())
                                   : std::trunc(value) == value && value >= Int::min() && value <= Int::max();
    if (!fits)
    {
        problems.add("field '", spec.name, "' is ", value, "; allowed: ", allowedRange(spec));
    }
    else if (spec.isFloat)
    {
        attributes.*spec.floatMember = static_cast<float>(value);
        checkRange(spec, attributes.*spec.floatMember, problems); // of what the kernel gets
    }
    else
    {
        attributes.*spec.intMember = static_cast<int32_t>(value);
        checkRange(spec, value, problems);
    }
}

TensorView viewOf(char const* nodeName, HstuTensor const& tensor)
{
    constexpr auto kNbTypes = static_cast<int32_t>(std::size(kElementTypesByCode));
    if (tensor.type < 0 || tensor.type >= kNbTypes)
    {
        std::string allowed;
        for (ElementType const type : kElementTypesByCode)
        {
            allowed += (allowed.empty() ? "" : ", ") + std::to_string(static_cast<int32_t>(type)) + " ("
                       + elementTypeName(type) + ")";
        }
        fail(nodeOf(nodeName), ": ", tensor.name, " has type ", tensor.type, "; allowed: ", allowed);
    }
    TensorView view;
    view.type = kElementTypesByCode[tensor.type];
    view.rank = tensor.rank;
    std::copy(std::begin(tensor.dims), std::end(tensor.dims), view.dims.begin());
    return view;
}

//! \return the index in kInputs, or kNbInputs where the node has no input of this name.
int32_t findInput(HstuAttentionAttributes const& attributes, char const* name)
{
    int32_t input = 0;
    while (input < kNbInputs && (!isInputPresent(attributes, input) || std::strcmp(kInputs[input].name, name) != 0))
    {
        ++input;
    }
    return input;
}

std::string inputNames(HstuAttentionAttributes const& attributes)
{
    std::string names;
    for (int32_t position = 0; position < countInputs(attributes); ++position)
    {
        names += (names.empty() ? "" : ", ") + std::string(kInputs[inputAt(attributes, position)].name);
    }
    return names;
}

void checkAddress(char const* nodeName, char const* name, TensorView const& tensor, void const* address)
{
    auto const* const end = tensor.dims.begin() + tensor.rank;
    bool const isEmpty = std::find(tensor.dims.begin(), end, 0) != end;
    HSTU_CHECK(isEmpty || address != nullptr, nodeOf(nodeName), ": ", name,
        " has no address; allowed: null for an empty tensor alone");
}

} // namespace

HstuAttentionAttributes attributesByName(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes)
{
    checkArray(nodeName, "attributes", attributes, nbAttributes);
    FieldProblems problems;
    HstuAttentionAttributes read;
    std::array<bool, std::size(kAttributes)> isGiven{};
    for (int32_t i = 0; i < nbAttributes; ++i)
    {
        HstuAttribute const& attribute = attributes[i];
        if (attribute.name == nullptr)
        {
            problems.add("field number ", i, " has no name");
            continue;
        }
        AttributeSpec const* const spec = findSpec(kAttributes, attribute.name);
        if (spec == nullptr)
        {
            std::string names;
            for (AttributeSpec const& known : kAttributes)
            {
                names += (names.empty() ? "" : ", ") + std::string(known.name);
            }
            problems.add("field '", attribute.name, "' is unknown; allowed: ", names);
            continue;
        }
        bool& isThisGiven = isGiven[static_cast<size_t>(spec - kAttributes)];
        if (isThisGiven)
        {
            problems.add("field '", attribute.name, "' is given more than once");
            continue;
        }
        isThisGiven = true;
        assign(*spec, attribute.value, read, problems);
    }
    for (size_t i = 0; i < isGiven.size(); ++i)
    {
        if (!isGiven[i] && !kAttributes[i].hasDefault)
        {
            problems.add("field '", kAttributes[i].name, "' is missing; allowed: ", allowedRange(kAttributes[i]));
        }
    }
    problems.raise(kIdentity, nodeName);
    return read;
}

NamedTensors inputsByName(
    char const* nodeName, HstuAttentionAttributes const& attributes, HstuTensor const* inputs, int32_t nbInputs)
{
    checkArray(nodeName, "inputs", inputs, nbInputs);
    NamedTensors named;
    std::array<bool, kNbInputs> isGiven{};
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        HstuTensor const& tensor = inputs[i];
        HSTU_CHECK(tensor.name != nullptr, nodeOf(nodeName), ": input number ", i,
            " has no name; allowed: ", inputNames(attributes));
        auto const index = static_cast<size_t>(findInput(attributes, tensor.name));
        HSTU_CHECK(index < isGiven.size(), nodeOf(nodeName), ": input '", tensor.name,
            "' is not one of this node; its attributes ask for ", inputNames(attributes));
        HSTU_CHECK(!isGiven[index], nodeOf(nodeName), ": input '", tensor.name, "' is given more than once");
        isGiven[index] = true;
        named.tensors.inputs[index] = viewOf(nodeName, tensor);
        named.tensors.rowStrides[index] = tensor.rowStride;
        named.pointers.inputs[index] = tensor.data;
    }
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        HSTU_CHECK(isGiven[static_cast<size_t>(input)] || !isInputPresent(attributes, input), nodeOf(nodeName),
            ": input '", kInputs[input].name, "' is missing; its attributes ask for ", inputNames(attributes));
    }
    return named;
}

void setOutput(char const* nodeName, HstuTensor const* output, NamedTensors& named)
{
    HSTU_CHECK(output != nullptr, nodeOf(nodeName), ": the output is null");
    char const* const wanted = kOutputs[0].name;
    HSTU_CHECK(output->name != nullptr && std::strcmp(output->name, wanted) == 0, nodeOf(nodeName), ": the output is '",
        output->name != nullptr ? output->name : "", "'; allowed: ", wanted);
    HSTU_CHECK(output->rowStride == 0, nodeOf(nodeName), ": the rows of ", wanted, " are ", output->rowStride,
        " elements apart; allowed: 0, a contiguous tensor");
    named.tensors.output = viewOf(nodeName, *output);
    named.pointers.output = output->data;
}

void checkAddresses(char const* nodeName, HstuAttentionAttributes const& attributes, NamedTensors const& named)
{
    for (int32_t position = 0; position < countInputs(attributes); ++position)
    {
        auto const input = static_cast<size_t>(inputAt(attributes, position));
        checkAddress(nodeName, kInputs[input].name, named.tensors.inputs[input], named.pointers.inputs[input]);
    }
    checkAddress(nodeName, kOutputs[0].name, named.tensors.output, named.pointers.output);
}

} // namespace hstu
