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
};

//! Value of every symbol of the contract, -1 where a dynamic extent leaves it open and 0 where its tensor is absent.
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

private:
    std::array<int64_t, kNbSymbols> mValues{};
};

//! \return whether the attributes make this input part of the node.
bool isInputPresent(HstuAttentionAttributes const& attributes, int32_t input) noexcept;

//! \return how many inputs the node has.
int32_t countInputs(HstuAttentionAttributes const& attributes) noexcept;

//! \param position index in the node's own input list, in [0, countInputs).
//! \return its index in kInputs.
int32_t inputAt(HstuAttentionAttributes const& attributes, int32_t position) noexcept;

//! Checks ranks, types and extents against the contract and solves for its symbols.
//!
//! \param requireStatic every extent must be known (enqueue); otherwise only the head count, the head dims and the
//!     tables' widths must be.
//! \return the symbols. Throws PluginError naming the tensor, the value seen and the values allowed.
NodeSizes resolveSizes(HstuAttentionAttributes const& attributes, NodeTensors const& tensors, bool requireStatic);

} // namespace hstu

#endif // HSTU_ATTENTION_SHAPES_H
