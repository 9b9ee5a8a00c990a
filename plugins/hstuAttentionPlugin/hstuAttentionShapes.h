#ifndef HSTU_ATTENTION_SHAPES_H
#define HSTU_ATTENTION_SHAPES_H

#include <array>
#include <cstddef>
#include <cstdint>

#include "hstuAttentionContract.h"
#include "tensorView.h"

namespace hstu
{

//! Inputs and output of one node in the contract's positions; absent inputs stay default.
struct NodeTensors
{
    std::array<TensorView, kNbInputs> inputs{};
    TensorView output{};
    //! Elements from a row of q, k or v to the next; 0: contiguous. Every other input is contiguous, and so is the output.
    std::array<int64_t, kNbInputs> rowStrides{};
};

//! Value of every symbol of the contract, -1 where a dynamic extent leaves it open and 0 where its tensor is absent; and
//! how far apart the rows of q, k and v are.
class NodeSizes
{
public:
    int64_t operator[](Symbol symbol) const noexcept
    {
        return mValues[static_cast<size_t>(symbol)];
    }

    int64_t& operator[](Symbol symbol) noexcept
    {
        return mValues[static_cast<size_t>(symbol)];
    }

    //! \return elements from a row of an input to the next, where its other extents are known.
    int64_t rowStride(Input input) const noexcept;

    //! \param stride 0: that of a contiguous tensor.
    void setRowStride(Input input, int64_t stride) noexcept
    {
        mRowStrides[static_cast<size_t>(input)] = stride;
    }

private:
    std::array<int64_t, kNbSymbols> mValues{};
    std::array<int64_t, kNbInputs> mRowStrides{};
};

//! \return whether the attributes make this input part of the node.
bool isInputPresent(HstuAttentionAttributes const& attributes, int32_t input) noexcept;

//! \return how many inputs the node has.
int32_t countInputs(HstuAttentionAttributes const& attributes) noexcept;

//! \param position index in the node's own input list, in [0, countInputs).
//! \return its index in kInputs.
int32_t inputAt(HstuAttentionAttributes const& attributes, int32_t position) noexcept;

//! Checks ranks, types, extents and row strides against the contract and solves for its symbols.
//!
//! \param requireStatic every extent must be known (enqueue); otherwise only the head count, the head dims and the
//!     tables' widths must be.
//! \return the symbols. Throws PluginError naming the tensor, the value seen and the values allowed.
NodeSizes resolveSizes(HstuAttentionAttributes const& attributes, NodeTensors const& tensors, bool requireStatic);

} // namespace hstu

#endif // HSTU_ATTENTION_SHAPES_H
