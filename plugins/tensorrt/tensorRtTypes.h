#ifndef HSTU_TENSOR_RT_TYPES_H
#define HSTU_TENSOR_RT_TYPES_H

#include <vector>

#include <NvInferRuntime.h>

#include "fieldReader.h"
#include "pluginError.h"
#include "tensorView.h"

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

//! \return views of a field collection; a null or empty collection gives none. Throws PluginError for a negative count.
inline std::vector<FieldView> viewsOf(nvinfer1::PluginFieldCollection const* collection, char const* pluginName)
{
    std::vector<FieldView> views;
    if (collection != nullptr)
    {
        HSTU_CHECK(collection->nbFields >= 0 && (collection->nbFields == 0 || collection->fields != nullptr),
            pluginName, ": the field collection has ", collection->nbFields, " fields and ",
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
inline nvinfer1::PluginField announcedField(AttributeRange const& range) noexcept
{
    return {range.name, nullptr,
        range.isFloat ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1};
}

} // namespace hstu

#endif // HSTU_TENSOR_RT_TYPES_H
