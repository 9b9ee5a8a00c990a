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

template <typename Operator>
std::string nodeOf(char const* nodeName)
{
    return std::string(Operator::kIdentity.name) + " node '" + (nodeName != nullptr ? nodeName : "") + "'";
}

template <typename Operator>
void checkArray(char const* nodeName, char const* what, void const* array, int32_t count)
{
    HSTU_CHECK(count >= 0 && (array != nullptr || count == 0), nodeOf<Operator>(nodeName), ": ", count, " ", what, " at ",
        array != nullptr ? "an address" : "null", "; allowed: 0 or more at an address");
}

//! Assigns an attribute unless its value is not of the attribute's type or range.
template <typename Attributes>
void assign(
    BasicAttributeSpec<Attributes> const& spec, double value, Attributes& attributes, FieldProblems& problems)
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

template <typename Operator>
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
        fail(nodeOf<Operator>(nodeName), ": ", tensor.name, " has type ", tensor.type, "; allowed: ", allowed);
    }
    TensorView view;
    view.type = kElementTypesByCode[tensor.type];
    view.rank = tensor.rank;
    std::copy(std::begin(tensor.dims), std::end(tensor.dims), view.dims.begin());
    return view;
}

//! \return the index in the operator's kInputs, or kNbInputs where the node has no input of this name.
template <typename Operator>
int32_t findInput(typename Operator::Attributes const& attributes, char const* name)
{
    int32_t input = 0;
    while (input < Operator::kNbInputs
           && (!isInputPresent(attributes, input) || std::strcmp(Operator::kInputs[input].name, name) != 0))
    {
        ++input;
    }
    return input;
}

template <typename Operator>
std::string inputNames(typename Operator::Attributes const& attributes)
{
    std::string names;
    for (int32_t position = 0; position < countInputs(attributes); ++position)
    {
        names += (names.empty() ? "" : ", ") + std::string(Operator::kInputs[inputAt(attributes, position)].name);
    }
    return names;
}

template <typename Operator>
void checkAddress(char const* nodeName, char const* name, TensorView const& tensor, void const* address)
{
    auto const* const end = tensor.dims.begin() + tensor.rank;
    bool const isEmpty = std::find(tensor.dims.begin(), end, 0) != end;
    HSTU_CHECK(isEmpty || address != nullptr, nodeOf<Operator>(nodeName), ": ", name,
        " has no address; allowed: null for an empty tensor alone");
}

} // namespace

template <typename Operator>
typename Operator::Attributes attributesByName(
    char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes)
{
    checkArray<Operator>(nodeName, "attributes", attributes, nbAttributes);
    FieldProblems problems;
    typename Operator::Attributes read;
    std::array<bool, std::size(Operator::kAttributes)> isGiven{};
    for (int32_t i = 0; i < nbAttributes; ++i)
    {
        HstuAttribute const& attribute = attributes[i];
        if (attribute.name == nullptr)
        {
            problems.add("field number ", i, " has no name");
            continue;
        }
        auto const* const spec = findSpec(Operator::kAttributes, attribute.name);
        if (spec == nullptr)
        {
            std::string names;
            for (auto const& known : Operator::kAttributes)
            {
                names += (names.empty() ? "" : ", ") + std::string(known.name);
            }
            problems.add("field '", attribute.name, "' is unknown; allowed: ", names);
            continue;
        }
        bool& isThisGiven = isGiven[static_cast<size_t>(spec - std::begin(Operator::kAttributes))];
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
        if (!isGiven[i] && !Operator::kAttributes[i].hasDefault)
        {
            problems.add("field '", Operator::kAttributes[i].name, "' is missing; allowed: ", allowedRange(Operator::kAttributes[i]));
        }
    }
    problems.raise(Operator::kIdentity, nodeName);
    return read;
}

template <typename Operator>
NamedTensors<Operator> inputsByName(char const* nodeName, typename Operator::Attributes const& attributes,
    HstuTensor const* inputs, int32_t nbInputs)
{
    checkArray<Operator>(nodeName, "inputs", inputs, nbInputs);
    NamedTensors<Operator> named;
    std::array<bool, static_cast<size_t>(Operator::kNbInputs)> isGiven{};
    for (int32_t i = 0; i < nbInputs; ++i)
    {
        HstuTensor const& tensor = inputs[i];
        HSTU_CHECK(tensor.name != nullptr, nodeOf<Operator>(nodeName), ": input number ", i,
            " has no name; allowed: ", inputNames<Operator>(attributes));
        auto const index = static_cast<size_t>(findInput<Operator>(attributes, tensor.name));
        HSTU_CHECK(index < isGiven.size(), nodeOf<Operator>(nodeName), ": input '", tensor.name,
            "' is not one of this node; its attributes ask for ", inputNames<Operator>(attributes));
        HSTU_CHECK(!isGiven[index], nodeOf<Operator>(nodeName), ": input '", tensor.name, "' is given more than once");
        isGiven[index] = true;
        named.tensors.inputs[index] = viewOf<Operator>(nodeName, tensor);
        named.tensors.rowStrides[index] = tensor.rowStride;
        named.pointers.inputs[index] = tensor.data;
    }
    for (int32_t input = 0; input < Operator::kNbInputs; ++input)
    {
        HSTU_CHECK(isGiven[static_cast<size_t>(input)] || !isInputPresent(attributes, input), nodeOf<Operator>(nodeName),
            ": input '", Operator::kInputs[input].name, "' is missing; its attributes ask for ", inputNames<Operator>(attributes));
    }
    return named;
}

template <typename Operator>
void setOutput(char const* nodeName, HstuTensor const* output, NamedTensors<Operator>& named)
{
    HSTU_CHECK(output != nullptr, nodeOf<Operator>(nodeName), ": the output is null");
    char const* const wanted = Operator::kOutputs[0].name;
    HSTU_CHECK(output->name != nullptr && std::strcmp(output->name, wanted) == 0, nodeOf<Operator>(nodeName), ": the output is '",
        output->name != nullptr ? output->name : "", "'; allowed: ", wanted);
    HSTU_CHECK(output->rowStride == 0, nodeOf<Operator>(nodeName), ": the rows of ", wanted, " are ", output->rowStride,
        " elements apart; allowed: 0, a contiguous tensor");
    named.tensors.output = viewOf<Operator>(nodeName, *output);
    named.pointers.output = output->data;
}

template <typename Operator>
void checkAddresses(
    char const* nodeName, typename Operator::Attributes const& attributes, NamedTensors<Operator> const& named)
{
    for (int32_t position = 0; position < countInputs(attributes); ++position)
    {
        auto const input = static_cast<size_t>(inputAt(attributes, position));
        checkAddress<Operator>(nodeName, Operator::kInputs[input].name, named.tensors.inputs[input], named.pointers.inputs[input]);
    }
    checkAddress<Operator>(nodeName, Operator::kOutputs[0].name, named.tensors.output, named.pointers.output);
}

#define HSTU_INSTANTIATE(Operator)                                                                                     \
    template Operator::Attributes attributesByName<Operator>(char const*, HstuAttribute const*, int32_t);              \
    template NamedTensors<Operator> inputsByName<Operator>(                                                            \
        char const*, Operator::Attributes const&, HstuTensor const*, int32_t);                                         \
    template void setOutput<Operator>(char const*, HstuTensor const*, NamedTensors<Operator>&);                        \
    template void checkAddresses<Operator>(char const*, Operator::Attributes const&, NamedTensors<Operator> const&)

HSTU_INSTANTIATE(AttentionArguments);
HSTU_INSTANTIATE(NormArguments);

#undef HSTU_INSTANTIATE

} // namespace hstu
