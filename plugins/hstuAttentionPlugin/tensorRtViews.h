#ifndef HSTU_TENSOR_RT_VIEWS_H
#define HSTU_TENSOR_RT_VIEWS_H

#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "hstuAttentionFields.h"
#include "hstuAttentionKernel.h"
#include "hstuAttentionShapes.h"
#include "pluginError.h"

namespace hstu
{

//! \return the core's name of a TensorRT type; kOther for what the operator never takes.
inline ElementType elementTypeOf(nvinfer1::DataType type) noexcept
{
    switch (type)
    {
    case nvinfer1::DataType::kFLOAT: return ElementType::kFloat32;
    case nvinfer1::DataType::kHALF: return ElementType::kFloat16;
    case nvinfer1::DataType::kINT32: return ElementType::kInt32;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kBF16: return ElementType::kBfloat16;
    case nvinfer1::DataType::kINT64: return ElementType::kInt64;
#endif
    default: return ElementType::kOther;
    }
}

inline nvinfer1::PluginTensorDesc const& staticDesc(nvinfer1::PluginTensorDesc const& desc) noexcept
{
    return desc;
}

inline nvinfer1::PluginTensorDesc const& staticDesc(nvinfer1::DynamicPluginTensorDesc const& desc) noexcept
{
    return desc.desc;
}

inline TensorView viewOf(nvinfer1::PluginTensorDesc const& desc) noexcept
{
    TensorView view;
    view.type = elementTypeOf(desc.type);
    view.rank = desc.dims.nbDims;
    for (int32_t axis = 0; axis < desc.dims.nbDims && axis < nvinfer1::Dims::MAX_DIMS; ++axis)
    {
        view.dims[static_cast<size_t>(axis)] = desc.dims.d[axis];
    }
    return view;
}

//! Lays the node's inputs, of which absent ones are not in the list, out in the contract's positions.
//! Throws PluginError when their number is not what the attributes say.
template <typename Desc>
NodeTensors tensorsOf(
    HstuAttentionAttributes const& attributes, Desc const* in, int32_t nbInputs, Desc const* out, int32_t nbOutputs)
{
    HSTU_CHECK(nbInputs == countInputs(attributes), kPluginName, ": the node has ", nbInputs,
        " inputs; its attributes ask for ", countInputs(attributes));
    HSTU_CHECK(nbOutputs == kNbOutputs, kPluginName, ": the node has ", nbOutputs, " outputs; allowed: ", kNbOutputs);
    NodeTensors tensors;
    for (int32_t position = 0; position < nbInputs; ++position)
    {
        tensors.inputs[static_cast<size_t>(inputAt(attributes, position))] = viewOf(staticDesc(in[position]));
    }
    tensors.output = viewOf(staticDesc(out[0]));
    return tensors;
}

//! Whether the type of tensor `position` is legal, given only the tensors before it: inputs first, then the output.
template <typename Desc>
bool isFormatSupported(HstuAttentionAttributes const& attributes, int32_t position, Desc const* inOut, int32_t nbInputs)
{
    nvinfer1::PluginTensorDesc const& desc = staticDesc(inOut[position]);
    if (desc.format != nvinfer1::TensorFormat::kLINEAR || nbInputs != countInputs(attributes))
    {
        return false;
    }
    ElementType const type = elementTypeOf(desc.type);
    auto isOneOf = [type](auto const& allowed)
    {
        for (ElementType const candidate : allowed)
        {
            if (candidate == type)
            {
                return true;
            }
        }
        return false;
    };
    auto sameAs = [inOut, type](int32_t other) { return type == elementTypeOf(staticDesc(inOut[other]).type); };

    constexpr int32_t kQPosition = 0; // q is always present
    int32_t const input = position < nbInputs ? inputAt(attributes, position) : -1;
    TypeClass const typeClass = input >= 0 ? kInputs[input].type : kOutputs[0].type;
    switch (typeClass)
    {
    case TypeClass::kElement: return position == kQPosition ? isOneOf(kElementTypes) : sameAs(kQPosition);
    case TypeClass::kTimestamp:
        if (input == static_cast<int32_t>(Input::kRowTimestamps))
        {
            return isOneOf(kTimestampTypes);
        }
        for (int32_t other = 0; other < position; ++other)
        {
            if (inputAt(attributes, other) == static_cast<int32_t>(Input::kRowTimestamps))
            {
                return sameAs(other);
            }
        }
        return false;
    case TypeClass::kInt32: return type == ElementType::kInt32;
    case TypeClass::kFloat32: return type == ElementType::kFloat32;
    }
    return false;
}

//! \return the device pointers in the contract's positions.
inline DevicePointers pointersOf(
    HstuAttentionAttributes const& attributes, void const* const* inputs, void* const* outputs) noexcept
{
    DevicePointers pointers;
    int32_t const nbInputs = countInputs(attributes);
    for (int32_t position = 0; position < nbInputs; ++position)
    {
        pointers.inputs[static_cast<size_t>(inputAt(attributes, position))] = inputs[position];
    }
    pointers.output = outputs[0];
    return pointers;
}

//! \return views of a field collection; a null or empty collection gives none. Throws PluginError for a negative count.
inline std::vector<FieldView> viewsOf(nvinfer1::PluginFieldCollection const* collection)
{
    std::vector<FieldView> views;
    if (collection != nullptr)
    {
        HSTU_CHECK(collection->nbFields >= 0 && (collection->nbFields == 0 || collection->fields != nullptr),
            kPluginName, ": the field collection has ", collection->nbFields, " fields and ",
            collection->fields != nullptr ? "a" : "no", " table");
        for (int32_t i = 0; i < collection->nbFields; ++i)
        {
            nvinfer1::PluginField const& field = collection->fields[i];
            views.push_back({field.name, static_cast<int32_t>(field.type), field.length, field.data});
        }
    }
    return views;
}

//! \return the field that announces one attribute to the parser, without data.
inline nvinfer1::PluginField announcedField(AttributeSpec const& spec) noexcept
{
    return {
        spec.name, nullptr, spec.isFloat ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1};
}

} // namespace hstu

#endif // HSTU_TENSOR_RT_VIEWS_H
