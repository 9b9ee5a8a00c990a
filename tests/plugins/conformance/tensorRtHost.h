#ifndef HSTU_CONFORMANCE_TENSOR_RT_HOST_H
#define HSTU_CONFORMANCE_TENSOR_RT_HOST_H

#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

//! TensorRT's side of the interfaces that a plugin library sees: logger, logger finder and symbolic dimensions.
namespace host
{

//! Keeps every message, so that a check can ask what a refusal said. Thread-safe.
class Logger final : public nvinfer1::ILogger
{
public:
    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        mLines.push_back(std::string(severity <= Severity::kERROR ? "E " : "W ") + message);
    }

    //! \return all messages since the last call.
    std::string take()
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        std::string text;
        for (std::string const& line : mLines)
        {
            text += line + "\n";
        }
        mLines.clear();
        return text;
    }

private:
    std::mutex mMutex;
    std::vector<std::string> mLines;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder
{
public:
    explicit LoggerFinder(Logger& logger)
        : mLogger(logger)
    {
    }

    nvinfer1::ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    Logger& mLogger;
};

//! A symbolic dimension. Only its identity matters here: the plugin hands dimensions on and does not compute.
class DimensionExpr final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr
{
public:
    explicit DimensionExpr(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }

    bool isConstant() const override
    {
        return mValue >= 0;
    }

    int64_t getConstantValue() const override
    {
        return mValue;
    }

    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue; //!< -1: known at run time only
};

class ExprBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder
{
public:
    ExprBuilder()
    {
        mImpl = this;
    }

    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        return &mExpressions.emplace_back(value);
    }

    nvinfer1::IDimensionExpr const* operation(
        nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return constant(-1);
    }

    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return constant(-1);
    }

private:
    std::deque<DimensionExpr> mExpressions; // a deque keeps addresses
};

//! The fields of a plugin as an engine file keeps them: bytes of its own, not the plugin's.
class FieldStore
{
public:
    void add(std::string const& name, nvinfer1::PluginFieldType type, void const* data, int32_t length, size_t bytes)
    {
        Entry& entry = mEntries.emplace_back();
        entry.name = name;
        entry.bytes.resize(bytes);
        std::memcpy(entry.bytes.data(), data, bytes);
        entry.type = type;
        entry.length = length;
    }

    //! Copies a collection of 4-byte fields.
    explicit FieldStore(nvinfer1::PluginFieldCollection const* collection = nullptr)
    {
        for (int32_t i = 0; collection != nullptr && i < collection->nbFields; ++i)
        {
            nvinfer1::PluginField const& field = collection->fields[i];
            add(field.name, field.type, field.data, field.length, static_cast<size_t>(field.length) * sizeof(int32_t));
        }
    }

    nvinfer1::PluginFieldCollection const* collection()
    {
        mFields.clear();
        for (Entry const& entry : mEntries)
        {
            mFields.emplace_back(entry.name.c_str(), entry.bytes.data(), entry.type, entry.length);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
        return &mCollection;
    }

    bool operator==(FieldStore const& other) const
    {
        if (mEntries.size() != other.mEntries.size())
        {
            return false;
        }
        for (size_t i = 0; i < mEntries.size(); ++i)
        {
            Entry const& a = mEntries[i];
            Entry const& b = other.mEntries[i];
            if (a.name != b.name || a.bytes != b.bytes || a.type != b.type || a.length != b.length)
            {
                return false;
            }
        }
        return true;
    }

private:
    struct Entry
    {
        std::string name;
        std::vector<unsigned char> bytes;
        nvinfer1::PluginFieldType type;
        int32_t length;
    };

    std::deque<Entry> mEntries;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

//! A plugin and its three capabilities; deleted like TensorRT deletes what it asked for.
struct Plugin
{
    explicit Plugin(nvinfer1::IPluginV3* created)
        : object(created)
    {
        if (object != nullptr)
        {
            using nvinfer1::PluginCapabilityType;
            core =
                static_cast<nvinfer1::IPluginV3OneCore*>(object->getCapabilityInterface(PluginCapabilityType::kCORE));
            build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(
                object->getCapabilityInterface(PluginCapabilityType::kBUILD));
            runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
                object->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        }
    }

    std::unique_ptr<nvinfer1::IPluginV3> object;
    nvinfer1::IPluginV3OneCore* core{};
    nvinfer1::IPluginV3OneBuildV2* build{};
    nvinfer1::IPluginV3OneRuntime* runtime{};
};

} // namespace host

#endif // HSTU_CONFORMANCE_TENSOR_RT_HOST_H
