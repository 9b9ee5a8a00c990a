#include "hstuAttentionShapes.h"

#include <limits>
#include <string>

#include "pluginError.h"

namespace hstu
{
namespace
{

constexpr int64_t kUnknown = -1;
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

//! Symbols that an engine fixes when it is built: kernels and tables are chosen by them.
constexpr Symbol kStaticSymbols[] = {
    Symbol::kH, Symbol::kDqk, Symbol::kDv, Symbol::kHp, Symbol::kPosTableLen, Symbol::kHt, Symbol::kNumBuckets};

template <size_t kNbTypes>
void checkType(TensorSpec const& spec, ElementType type, ElementType const (&allowed)[kNbTypes])
{
    std::string names;
    for (ElementType const candidate : allowed)
    {
        if (candidate == type)
        {
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(elementTypeName(candidate));
    }
    fail(kPluginName, ": ", spec.name, " is ", elementTypeName(type), "; allowed: ", names);
}

void checkSame(TensorSpec const& spec, ElementType type, TensorSpec const& first, ElementType firstType)
{
    HSTU_CHECK(type == firstType, kPluginName, ": ", spec.name, " is ", elementTypeName(type), " but ", first.name,
        " is ", elementTypeName(firstType), "; they must be the same");
}

void checkTensorType(TensorSpec const& spec, TensorView const& tensor, NodeTensors const& tensors)
{
    TensorSpec const& q = kInputs[static_cast<size_t>(Input::kQ)];
    TensorSpec const& rows = kInputs[static_cast<size_t>(Input::kRowTimestamps)];
    switch (spec.type)
    {
    case TypeClass::kElement:
        checkType(spec, tensor.type, kElementTypes);
        checkSame(spec, tensor.type, q, tensors.inputs[static_cast<size_t>(Input::kQ)].type);
        return;
    case TypeClass::kTimestamp:
        checkType(spec, tensor.type, kTimestampTypes);
        checkSame(spec, tensor.type, rows, tensors.inputs[static_cast<size_t>(Input::kRowTimestamps)].type);
        return;
    case TypeClass::kInt32: checkType(spec, tensor.type, {ElementType::kInt32}); return;
    case TypeClass::kFloat32: checkType(spec, tensor.type, {ElementType::kFloat32}); return;
    }
}

class SizeSolver
{
public:
    void add(TensorSpec const& spec, TensorView const& tensor)
    {
        HSTU_CHECK(tensor.rank == spec.rank, kPluginName, ": ", spec.name, " has rank ", tensor.rank,
            "; allowed: ", spec.rank);
        for (int32_t axis = 0; axis < spec.rank; ++axis)
        {
            addExtent(spec, axis, tensor.dims[static_cast<size_t>(axis)]);
        }
    }

    NodeSizes const& sizes() const noexcept
    {
        return mSizes;
    }

private:
    void addExtent(TensorSpec const& spec, int32_t axis, int64_t extent)
    {
        DimSpec const& dim = spec.dims[static_cast<size_t>(axis)];
        size_t const symbol = static_cast<size_t>(dim.symbol);
        char const* const name = kSymbolNames[symbol];
        char const*& owner = mOwners[symbol];
        if (extent == kUnknown)
        {
            if (owner == nullptr)
            {
                mSizes[dim.symbol] = kUnknown;
            }
            return;
        }
        int64_t const scaled = extent - dim.addend;
        HSTU_CHECK(scaled >= 0 && scaled % dim.factor == 0 && extent <= kMaxInt32, kPluginName, ": axis ", axis, " of ",
            spec.name, " is ", extent, "; allowed: ", dim.factor, " * ", name, dim.addend < 0 ? " - " : " + ",
            dim.addend < 0 ? -dim.addend : dim.addend, ", at most ", kMaxInt32);
        int64_t const value = scaled / dim.factor;
        HSTU_CHECK(owner == nullptr || mSizes[dim.symbol] == value, kPluginName, ": ", name, " is ", value, " in axis ",
            axis, " of ", spec.name, " but ", mSizes[dim.symbol], " in ", owner, "; they must be the same");
        mSizes[dim.symbol] = value;
        owner = spec.name;
    }

    NodeSizes mSizes;
    std::array<char const*, kNbSymbols> mOwners{};
};

void checkInRange(NodeSizes const& sizes, Symbol symbol, int64_t low, int64_t high)
{
    int64_t const value = sizes[symbol];
    HSTU_CHECK(value == kUnknown || (value >= low && value <= high), kPluginName, ": ",
        kSymbolNames[static_cast<size_t>(symbol)], " is ", value, "; allowed: ", low, " to ", high);
}

//! The timestamps of the keys are those of cached and new rows together, whose number the kernel counts in 32 bits.
void checkJoinedRows(HstuAttentionAttributes const& attributes, NodeSizes const& sizes)
{
    int64_t const cached = sizes[Symbol::kLc];
    int64_t const rows = sizes[Symbol::kLk];
    if (cached == kUnknown || rows == kUnknown)
    {
        return;
    }
    HSTU_CHECK(cached + rows <= kMaxInt32, kPluginName, ": Lc is ", cached, " and Lk ", rows,
        "; allowed: at most ", kMaxInt32, " together");
    int64_t const columns = sizes[Symbol::kLcol];
    HSTU_CHECK(attributes.timeBias == 0 || columns == kUnknown || columns == cached + rows, kPluginName, ": Lcol is ",
        columns, " in axis 0 of col_timestamps; allowed: Lc + Lk = ", cached + rows);
}

//! Rows of q, k and v may lie in a wider tensor; kernels count the elements between them in 32 bits.
void setRowStrides(NodeTensors const& tensors, NodeSizes& sizes)
{
    for (int32_t i = 0; i < kNbInputs; ++i)
    {
        int64_t const stride = tensors.rowStrides[static_cast<size_t>(i)];
        if (stride == 0)
        {
            continue;
        }
        auto const input = static_cast<Input>(i);
        HSTU_CHECK(input == Input::kQ || input == Input::kK || input == Input::kV, kPluginName, ": the rows of ",
            kInputs[i].name, " are ", stride, " elements apart; allowed: 0, a contiguous tensor");
        int64_t const width = sizes.rowStride(input);
        HSTU_CHECK(stride >= width && stride <= kMaxInt32, kPluginName, ": the rows of ", kInputs[i].name, " are ",
            stride, " elements apart; allowed: 0, a contiguous tensor, or ", width, " to ", kMaxInt32);
        sizes.setRowStride(input, stride);
    }
}

void checkTableHeads(NodeSizes const& sizes, Symbol symbol)
{
    int64_t const heads = sizes[symbol];
    int64_t const allHeads = sizes[Symbol::kH];
    HSTU_CHECK(heads == kUnknown || allHeads == kUnknown || heads == 1 || heads == allHeads, kPluginName, ": ",
        kSymbolNames[static_cast<size_t>(symbol)], " is ", heads, "; allowed: 1 (shared) or H = ", allHeads);
}

} // namespace

int64_t NodeSizes::rowStride(Input input) const noexcept
{
    int64_t stride = mRowStrides[static_cast<size_t>(input)];
    if (stride == 0)
    {
        TensorSpec const& spec = kInputs[static_cast<size_t>(input)];
        stride = 1;
        for (int32_t axis = 1; axis < spec.rank; ++axis)
        {
            stride *= (*this)[spec.dims[static_cast<size_t>(axis)].symbol];
        }
    }
    return stride;
}

bool isInputPresent(HstuAttentionAttributes const& attributes, int32_t input) noexcept
{
    auto const member = kInputs[input].presentWhen;
    return member == nullptr || attributes.*member != 0;
}

int32_t countInputs(HstuAttentionAttributes const& attributes) noexcept
{
    int32_t count = 0;
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        count += isInputPresent(attributes, input) ? 1 : 0;
    }
    return count;
}

int32_t inputAt(HstuAttentionAttributes const& attributes, int32_t position) noexcept
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

NodeSizes resolveSizes(HstuAttentionAttributes const& attributes, NodeTensors const& tensors, bool requireStatic)
{
    SizeSolver solver;
    for (int32_t input = 0; input < kNbInputs; ++input)
    {
        if (isInputPresent(attributes, input))
        {
            checkTensorType(kInputs[input], tensors.inputs[static_cast<size_t>(input)], tensors);
            solver.add(kInputs[input], tensors.inputs[static_cast<size_t>(input)]);
        }
    }
    checkTensorType(kOutputs[0], tensors.output, tensors);
    solver.add(kOutputs[0], tensors.output);

    NodeSizes sizes = solver.sizes();
    for (Symbol const symbol : kStaticSymbols)
    {
        HSTU_CHECK(sizes[symbol] != kUnknown, kPluginName, ": ", kSymbolNames[static_cast<size_t>(symbol)],
            " is dynamic; allowed: an extent that is fixed when the engine is built");
    }
    if (requireStatic)
    {
        for (int32_t symbol = 0; symbol < kNbSymbols; ++symbol)
        {
            HSTU_CHECK(sizes[static_cast<Symbol>(symbol)] != kUnknown, kPluginName, ": ", kSymbolNames[symbol],
                " is unknown at run time");
        }
    }
    checkInRange(sizes, Symbol::kH, 1, 65535); // heads are the y extent of the launch grid
    checkInRange(sizes, Symbol::kDqk, kMinHeadDim, kMaxHeadDim);
    checkInRange(sizes, Symbol::kDv, kMinHeadDim, kMaxHeadDim);
    checkJoinedRows(attributes, sizes);
    if (attributes.posBias != 0)
    {
        checkInRange(sizes, Symbol::kPosTableLen, 1, kMaxInt32);
        checkTableHeads(sizes, Symbol::kHp);
    }
    if (attributes.timeBias != 0)
    {
        checkInRange(sizes, Symbol::kNumBuckets, kMinNumBuckets, kMaxNumBuckets);
        checkTableHeads(sizes, Symbol::kHt);
    }
    setRowStrides(tensors, sizes);
    return sizes;
}

} // namespace hstu
