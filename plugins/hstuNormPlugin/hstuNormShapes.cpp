#include <limits>

#include "hstuNormCore.h"
#include "pluginError.h"

namespace hstu::norm
{
namespace
{

constexpr int64_t kUnknown = -1;

void checkTensor(TensorSpec const& spec, TensorView const& tensor, ElementType type)
{
    HSTU_CHECK(tensor.type == type, kPluginName, ": ", spec.name, " is ", elementTypeName(tensor.type), "; allowed: ",
        elementTypeName(type), ", as the node's attributes say");
    HSTU_CHECK(
        tensor.rank == spec.rank, kPluginName, ": ", spec.name, " has rank ", tensor.rank, "; allowed: ", spec.rank);
}

void checkExtent(TensorSpec const& spec, size_t axis, int64_t extent, int64_t wanted, char const* what)
{
    HSTU_CHECK(extent == wanted || extent == kUnknown || wanted == kUnknown, kPluginName, ": axis ", axis, " of ",
        spec.name, " is ", extent, "; allowed: ", wanted, ", ", what);
}

//! \return elements from a row of an input to the next. Kernels count them in 32 bits.
int64_t strideOf(NodeTensors const& tensors, Input input, int64_t width)
{
    int64_t const stride = tensors.rowStrides[static_cast<size_t>(input)];
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    HSTU_CHECK(stride == 0 || (stride >= width && stride <= kMost), kPluginName, ": the rows of ",
        kInputs[static_cast<size_t>(input)].name, " are ", stride,
        " elements apart; allowed: 0, a contiguous tensor, or ", width, " to ", kMost);
    return stride == 0 ? width : stride;
}

} // namespace

bool isInputPresent(HstuNormAttributes const& attributes, int32_t input) noexcept
{
    auto const member = kInputs[input].presentWhen;
    return member == nullptr || attributes.*member == 1;
}

int32_t countInputs(HstuNormAttributes const& attributes) noexcept
{
    int32_t count = 0;
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        count += isInputPresent(attributes, input) ? 1 : 0;
    }
    return count;
}

int32_t inputAt(HstuNormAttributes const& attributes, int32_t position) noexcept
{
    int32_t input = 0;
    for (int32_t remaining = position; input < kNbInputs; ++input)
    {
        if (isInputPresent(attributes, input) && remaining-- == 0)
        {
            break;
        }
    }
    return input;
}

ElementType typeOf(HstuNormAttributes const& attributes, int32_t input) noexcept
{
    TypeClass const type = input < 0 ? kOutputs[0].type : kInputs[input].type;
    switch (type)
    {
    case TypeClass::kElement: return static_cast<ElementType>(attributes.inputType);
    case TypeClass::kOutput: return static_cast<ElementType>(attributes.outputType);
    case TypeClass::kFloat32: break;
    }
    return ElementType::kFloat32;
}

NodeSizes resolveSizes(HstuNormAttributes const& attributes, NodeTensors const& tensors, bool requireStatic)
{
    constexpr size_t kX = static_cast<size_t>(Input::kX);
    TensorView const& x = tensors.inputs[kX];
    checkTensor(kInputs[kX], x, typeOf(attributes, static_cast<int32_t>(kX)));
    NodeSizes sizes;
    sizes.rows = x.dims[0];
    sizes.width = x.dims[1];
    HSTU_CHECK(sizes.width != kUnknown, kPluginName,
        ": axis 1 of x is dynamic; allowed: an extent that is fixed when the engine is built");
    HSTU_CHECK(sizes.width >= kMinWidth && sizes.width <= kMaxWidth, kPluginName, ": axis 1 of x is ", sizes.width,
        "; allowed: ", kMinWidth, " to ", kMaxWidth);
    HSTU_CHECK(sizes.width % attributes.numGroups == 0, kPluginName, ": axis 1 of x is ", sizes.width,
        "; allowed: a multiple of num_groups, ", attributes.numGroups);
    HSTU_CHECK(!requireStatic || sizes.rows != kUnknown, kPluginName, ": axis 0 of x is unknown at run time");
    HSTU_CHECK(sizes.rows <= std::numeric_limits<int32_t>::max(), kPluginName, ": axis 0 of x is ", sizes.rows,
        "; allowed: at most ", std::numeric_limits<int32_t>::max());
    for (int32_t input = 1; input < kNbInputs; ++input)
    {
        if (!isInputPresent(attributes, input))
        {
            continue;
        }
        TensorSpec const& spec = kInputs[input];
        TensorView const& tensor = tensors.inputs[static_cast<size_t>(input)];
        checkTensor(spec, tensor, typeOf(attributes, input));
        size_t const columns = static_cast<size_t>(spec.rank) - 1;
        checkExtent(spec, columns, tensor.dims[columns], sizes.width, "the width of x");
        if (spec.rank > 1)
        {
            checkExtent(spec, 0, tensor.dims[0], sizes.rows, "the rows of x");
        }
    }
    checkTensor(kOutputs[0], tensors.output, typeOf(attributes, -1));
    checkExtent(kOutputs[0], 0, tensors.output.dims[0], sizes.rows, "the rows of x");
    checkExtent(kOutputs[0], 1, tensors.output.dims[1], outputWidth(attributes, sizes.width),
        attributes.concat != 0 ? "three times the width of x" : "the width of x");
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        bool const mayStride = input == static_cast<int32_t>(Input::kX) || input == static_cast<int32_t>(Input::kGate);
        HSTU_CHECK(mayStride || tensors.rowStrides[static_cast<size_t>(input)] == 0, kPluginName, ": the rows of ",
            kInputs[input].name, " are ", tensors.rowStrides[static_cast<size_t>(input)],
            " elements apart; allowed: 0, a contiguous tensor");
    }
    sizes.xStride = strideOf(tensors, Input::kX, sizes.width);
    sizes.gateStride = strideOf(tensors, Input::kGate, sizes.width);
    return sizes;
}

} // namespace hstu::norm
