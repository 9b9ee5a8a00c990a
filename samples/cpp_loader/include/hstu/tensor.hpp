#ifndef HSTU_LOADER_TENSOR_HPP
#define HSTU_LOADER_TENSOR_HPP

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "file.hpp"

namespace hstu::loader
{

enum class ElementType
{
    kFLOAT64,
    kFLOAT32,
    kFLOAT16,
    kBFLOAT16,
    kINT64,
    kINT32,
    kINT8,
    kUINT8,
    kBOOL
};

struct ElementFacts
{
    ElementType type;
    char const* name;  //!< in manifests
    char const* descr; //!< in .npy headers; bfloat16 is held as its bits
    std::size_t bytes;
};

//! Every element type that the loader knows.
inline std::vector<ElementFacts> const& elementTypes()
{
    static std::vector<ElementFacts> const kTYPES{{ElementType::kFLOAT64, "float64", "<f8", 8},
        {ElementType::kFLOAT32, "float32", "<f4", 4}, {ElementType::kFLOAT16, "float16", "<f2", 2},
        {ElementType::kBFLOAT16, "bfloat16", "<u2", 2}, {ElementType::kINT64, "int64", "<i8", 8},
        {ElementType::kINT32, "int32", "<i4", 4}, {ElementType::kINT8, "int8", "|i1", 1},
        {ElementType::kUINT8, "uint8", "|u1", 1}, {ElementType::kBOOL, "bool", "|b1", 1}};
    return kTYPES;
}

inline ElementFacts const& factsOf(ElementType type)
{
    return elementTypes()[static_cast<std::size_t>(type)];
}

using Shape = std::vector<int64_t>;

inline std::string textOfShape(Shape const& shape)
{
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i)
    {
        text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return text + "]";
}

//! Multiplies sizes that came from a file.
//! \return false if one is negative or the product does not fit.
inline bool checkedProduct(Shape const& sizes, std::size_t factor, std::size_t& product)
{
    product = factor;
    for (int64_t const size : sizes)
    {
        if (size < 0
            || (size > 0 && product > std::numeric_limits<std::size_t>::max() / 4 / static_cast<std::size_t>(size)))
        {
            return false;
        }
        product *= static_cast<std::size_t>(size);
    }
    return true;
}

//! \return bytes of a dense tensor. Refuses what does not fit the address space.
inline std::size_t bytesOf(Shape const& shape, ElementType type)
{
    std::size_t bytes = 0;
    if (!checkedProduct(shape, factsOf(type).bytes, bytes))
    {
        throw Error(Failure::kREQUEST, "a tensor is impossible", textOf("its shape is ", textOfShape(shape)),
            "give sizes that are not negative and fit into memory");
    }
    return bytes;
}

//! A dense tensor in host memory, last dimension fastest.
struct HostTensor
{
    ElementType type{ElementType::kFLOAT32};
    Shape shape;
    Bytes bytes;

    HostTensor() = default;

    HostTensor(ElementType itsType, Shape itsShape)
        : type(itsType)
        , shape(std::move(itsShape))
        , bytes(bytesOf(shape, type))
    {
    }

    //! \return a tensor of rank 1. The values are of the element type.
    template <typename Value>
    static HostTensor ofValues(ElementType type, std::vector<Value> const& values)
    {
        HostTensor tensor(type, Shape{static_cast<int64_t>(values.size())});
        if (!values.empty())
        {
            std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
        }
        return tensor;
    }

    std::size_t rows() const noexcept
    {
        return shape.empty() ? 1 : static_cast<std::size_t>(shape[0]);
    }

    std::size_t rowBytes() const
    {
        std::size_t const count = rows();
        return count == 0 ? 0 : bytes.size() / count;
    }

    std::size_t elements() const
    {
        return bytes.size() / factsOf(type).bytes;
    }

    //! \return element `index` of an integer tensor.
    int64_t integerAt(std::size_t index) const
    {
        if (type == ElementType::kINT64)
        {
            int64_t value = 0;
            std::memcpy(&value, bytes.data() + 8 * index, sizeof(value));
            return value;
        }
        if (type == ElementType::kINT32)
        {
            int32_t value = 0;
            std::memcpy(&value, bytes.data() + 4 * index, sizeof(value));
            return value;
        }
        return type == ElementType::kINT8 ? static_cast<int8_t>(bytes[index]) : bytes[index];
    }

    bool isInteger() const noexcept
    {
        return type == ElementType::kINT64 || type == ElementType::kINT32 || type == ElementType::kINT8
               || type == ElementType::kUINT8;
    }

    //! \return element `index` of any tensor.
    double numberAt(std::size_t index) const
    {
        switch (type)
        {
        case ElementType::kFLOAT64: return loaded<double>(index);
        case ElementType::kFLOAT32: return static_cast<double>(loaded<float>(index));
        case ElementType::kFLOAT16: return fromHalf(loaded<uint16_t>(index));
        case ElementType::kBFLOAT16: return fromBits(static_cast<uint32_t>(loaded<uint16_t>(index)) << 16);
        case ElementType::kINT64:
        case ElementType::kINT32:
        case ElementType::kINT8:
        case ElementType::kUINT8:
        case ElementType::kBOOL: break;
        }
        return static_cast<double>(integerAt(index));
    }

    //! \return rows [first, last).
    HostTensor slice(std::size_t first, std::size_t last) const
    {
        HostTensor part;
        part.type = type;
        part.shape = shape;
        part.shape[0] = static_cast<int64_t>(last - first);
        std::size_t const width = rowBytes();
        part.bytes.assign(bytes.begin() + static_cast<std::ptrdiff_t>(first * width),
            bytes.begin() + static_cast<std::ptrdiff_t>(last * width));
        return part;
    }

private:
    template <typename Value>
    Value loaded(std::size_t index) const
    {
        Value value{};
        std::memcpy(&value, bytes.data() + sizeof(Value) * index, sizeof(Value));
        return value;
    }

    static double fromBits(uint32_t bits)
    {
        float value = 0;
        std::memcpy(&value, &bits, sizeof(value));
        return static_cast<double>(value);
    }

    static double fromHalf(uint16_t half)
    {
        uint32_t const sign = static_cast<uint32_t>(half & 0x8000U) << 16;
        uint32_t const exponent = (half >> 10) & 31U;
        uint32_t const fraction = half & 0x3FFU;
        if (exponent == 0)
        {
            double const size = static_cast<double>(fraction) / 16777216.0; // 2**-24, the smallest half
            return sign != 0 ? -size : size;
        }
        uint32_t const wide = exponent == 31 ? 255U : exponent + 112U;
        return fromBits(sign | wide << 23 | fraction << 13);
    }
};

using Tensors = std::map<std::string, HostTensor>;

} // namespace hstu::loader

#endif // HSTU_LOADER_TENSOR_HPP
