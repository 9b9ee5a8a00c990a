#ifndef HSTU_LOADER_SCHEDULE_HPP
#define HSTU_LOADER_SCHEDULE_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "tensor.hpp"

//! The schedule of a graph that was cut at its attentions: segments and kernels' calls in the order in which they run,
//! and the tensors that cross from one step to a later one. What `hstu-compile` writes as model.schedule.json.
namespace hstu::loader
{

static constexpr int64_t kSCHEDULE_FORMAT = 2;

//! What the loader has to know of an operator; the rest of its contract is checked by the kernels' library.
struct OperatorFacts
{
    std::string name;
    std::string version;
    std::string rows; //!< the input that has a row for each row of the output
    std::vector<std::string> strided; //!< inputs that may be columns of a wider tensor
};

//! Every operator that the kernels' library computes.
inline std::vector<OperatorFacts> const& kernelOperators()
{
    static std::vector<OperatorFacts> const kOPERATORS{
        {"HstuAttention", "1", "q", {"q", "k", "v"}}, {"HstuNorm", "1", "x", {"x", "gate"}}};
    return kOPERATORS;
}

//! Columns of a tensor that a kernel reads where they lie.
struct ColumnView
{
    int64_t column{0};    //!< the first, where a row of the tensor is one list of numbers
    int64_t rowStride{0}; //!< elements from a row to the next: the numbers of the tensor's row
    Shape dims;           //!< of the input behind its rows
};

//! One node that a kernel computes between two segments.
struct KernelCall
{
    OperatorFacts const* facts{nullptr};
    std::string name;
    std::map<std::string, double> attributes;
    std::map<std::string, std::string> inputs; //!< the contract's name to the tensor's
    std::string output;
    std::map<std::string, ColumnView> views; //!< of the inputs that are columns, by the contract's name
};

struct ScheduleStep
{
    bool isKernel{false};
    std::size_t index{0}; //!< of the segment or of the call
};

//! A tensor that one step makes and a later one reads, or that leaves the graph.
struct CrossingTensor
{
    TensorSpec spec;
    std::size_t first{0}; //!< the step that makes it
    std::size_t last{0};  //!< the last step that reads it
};

//! See the file's comment. What `scheduleFromJson` returned is in itself consistent.
struct Schedule
{
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::vector<KernelCall> calls;
    std::vector<ScheduleStep> steps;
    std::vector<CrossingTensor> crossing;
    Tensors constants;
    std::size_t numSegments{0};

    CrossingTensor const* findCrossing(std::string const& name) const
    {
        auto const found = std::find_if(
            crossing.begin(), crossing.end(), [&](CrossingTensor const& each) { return each.spec.name == name; });
        return found == crossing.end() ? nullptr : &*found;
    }

    //! \return type and shape of an input of the graph, a crossing tensor or a constant; null for any other name.
    TensorSpec const* findSpec(std::string const& name) const
    {
        auto const found = mSpecs.find(name);
        return found == mSpecs.end() ? nullptr : &found->second;
    }

    bool isOutput(std::string const& name) const
    {
        return std::any_of(outputs.begin(), outputs.end(), [&](TensorSpec const& each) { return each.name == name; });
    }

private:
    friend class ScheduleReader;
    std::map<std::string, TensorSpec> mSpecs;
};

//! \return a size that is a number in a schedule, or -1 where the requests decide.
inline int64_t fixedSize(std::string const& dim)
{
    bool const isNumber = !dim.empty() && dim.find_first_not_of("0123456789") == std::string::npos;
    return isNumber ? std::strtoll(dim.c_str(), nullptr, 10) : -1;
}

//! \return sizes, -1 where the requests decide.
inline Shape fixedShape(std::vector<std::string> const& dims)
{
    Shape shape;
    for (std::string const& dim : dims)
    {
        shape.push_back(fixedSize(dim));
    }
    return shape;
}

//! \return the shape of what a call reads as `input`, of a tensor of this shape.
inline Shape viewedShape(KernelCall const& call, std::string const& input, Shape const& tensor)
{
    auto const view = call.views.find(input);
    if (view == call.views.end())
    {
        return tensor;
    }
    Shape shape{tensor.at(0)};
    shape.insert(shape.end(), view->second.dims.begin(), view->second.dims.end());
    return shape;
}

//! One reading of a schedule. Private to `scheduleFromJson`.
class ScheduleReader
{
public:
    ScheduleReader(Json const& root, std::string const& name)
        : mRoot(root)
        , mName(name)
    {
    }

    Schedule read()
    {
        checkVersions();
        mSchedule.inputs = detail::readSpecs(at("inputs"), mName + ".inputs");
        mSchedule.outputs = detail::readSpecs(at("outputs"), mName + ".outputs");
        for (TensorSpec const& input : mSchedule.inputs)
        {
            addSpec(input);
        }
        readCrossing();
        readConstants();
        for (Json const& call : at("calls").array(mName + ".calls"))
        {
            readCall(call);
        }
        readSteps();
        checkCalls();
        for (TensorSpec const& output : mSchedule.outputs)
        {
            if (mSchedule.findCrossing(output.name) == nullptr)
            {
                problem("no step makes the output ", output.name);
            }
        }
        if (!mProblems.empty())
        {
            Json::refuse(mName, mProblems);
        }
        return std::move(mSchedule);
    }

private:
    static constexpr int64_t kMOST_STEPS = 100000;

    Json const& at(char const* key) const
    {
        return mRoot.at(key, mName);
    }

    template <typename... Parts>
    void problem(Parts const&... parts)
    {
        mProblems += (mProblems.empty() ? "" : "; ") + textOf(parts...);
    }

    void checkVersions() const
    {
        int64_t const format = at("format_version").integer(mName + ".format_version");
        if (format != kSCHEDULE_FORMAT)
        {
            throw Error(Failure::kBUNDLE, textOf(mName, " has schedule format ", format),
                textOf("this loader reads format ", kSCHEDULE_FORMAT),
                "build the bundle again, or use the loader of its hstu-compile");
        }
        for (auto const& [op, version] : at("operators").object(mName + ".operators"))
        {
            OperatorFacts const* const known = findOperator(op);
            std::string const& found = version.string(mName + ".operators");
            if (known == nullptr || known->version != found)
            {
                throw Error(Failure::kBUNDLE, mName + " calls " + op + " of version " + found,
                    known == nullptr ? "this loader knows no operator of that name"
                                     : "this loader knows version " + known->version,
                    "build the bundle again, or use the loader of its hstu-compile");
            }
        }
    }

    static OperatorFacts const* findOperator(std::string const& name)
    {
        for (OperatorFacts const& each : kernelOperators())
        {
            if (each.name == name)
            {
                return &each;
            }
        }
        return nullptr;
    }

    void addSpec(TensorSpec const& spec)
    {
        if (!mSchedule.mSpecs.emplace(spec.name, spec).second)
        {
            problem(spec.name, " comes twice");
        }
    }

    void readCrossing()
    {
        std::string const where = mName + ".crossing";
        std::vector<TensorSpec> const specs = detail::readSpecs(at("crossing"), where);
        Json::Array const& entries = at("crossing").array(where);
        for (std::size_t i = 0; i < specs.size(); ++i)
        {
            CrossingTensor tensor;
            tensor.spec = specs[i];
            tensor.first = static_cast<std::size_t>(entries[i].at("first", where).integer(where, 0, kMOST_STEPS));
            tensor.last = static_cast<std::size_t>(entries[i].at("last", where).integer(where, 0, kMOST_STEPS));
            addSpec(tensor.spec);
            mSchedule.crossing.push_back(std::move(tensor));
        }
    }

    void readConstants()
    {
        std::string const where = mName + ".constants";
        for (auto const& [name, entry] : at("constants").object(where))
        {
            TensorSpec spec;
            spec.name = name;
            spec.type = detail::elementTypeNamed(entry.at("dtype", where).string(where + ".dtype"), where);
            Shape shape;
            for (Json const& dim : entry.at("shape", where).array(where + ".shape"))
            {
                shape.push_back(dim.integer(where + ".shape", 0, INT32_MAX));
                spec.dims.push_back(std::to_string(shape.back()));
            }
            HostTensor tensor;
            tensor.type = spec.type;
            tensor.shape = shape;
            tensor.bytes = bytesOfBase64(entry.at("data", where).string(where + ".data"), where + "." + name);
            std::size_t wanted = 0;
            if (!checkedProduct(shape, factsOf(spec.type).bytes, wanted) || tensor.bytes.size() != wanted)
            {
                problem("the constant ", name, " has ", tensor.bytes.size(), " bytes, and its shape is ",
                    textOfShape(shape));
            }
            addSpec(spec);
            mSchedule.constants[name] = std::move(tensor);
        }
    }

    static Bytes bytesOfBase64(std::string const& text, std::string const& where)
    {
        static std::string const kALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        std::size_t const padding = text.size() - std::min(text.size(), text.find_last_not_of('=') + 1);
        if (text.size() % 4 != 0 || padding > 2)
        {
            Json::refuse(where, "its data is not base64");
        }
        Bytes bytes;
        bytes.reserve(text.size() / 4 * 3);
        uint32_t held = 0;
        int bits = 0;
        for (std::size_t i = 0; i + padding < text.size(); ++i)
        {
            std::size_t const value = kALPHABET.find(text[i]);
            if (value == std::string::npos)
            {
                Json::refuse(where, "its data is not base64");
            }
            held = (held << 6 | static_cast<uint32_t>(value)) & 0xFFFFFFU;
            bits += 6;
            if (bits >= 8)
            {
                bits -= 8;
                bytes.push_back(static_cast<uint8_t>(held >> bits & 0xFFU));
            }
        }
        return bytes;
    }

    void readCall(Json const& entry)
    {
        std::string const where = mName + ".calls";
        KernelCall call;
        call.name = entry.at("name", where).string(where + ".name");
        std::string const& op = entry.at("operator", where).string(where + ".operator");
        call.facts = findOperator(op);
        if (call.facts == nullptr)
        {
            Json::refuse(where, call.name + " is of the operator " + op + ", which this loader does not know");
        }
        for (auto const& [name, value] : entry.at("attributes", where).object(where + ".attributes"))
        {
            call.attributes[name] = value.number(where + ".attributes");
        }
        for (auto const& [name, tensor] : entry.at("inputs", where).object(where + ".inputs"))
        {
            call.inputs[name] = tensor.string(where + ".inputs");
        }
        call.output = entry.at("output", where).string(where + ".output");
        for (auto const& [name, view] : entry.at("views", where).object(where + ".views"))
        {
            ColumnView read;
            read.column = view.at("column", where).integer(where + ".column", 0, INT32_MAX);
            read.rowStride = view.at("row_stride", where).integer(where + ".row_stride", 1, INT32_MAX);
            for (Json const& dim : view.at("dims", where).array(where + ".dims"))
            {
                read.dims.push_back(dim.integer(where + ".dims", 1, INT32_MAX));
            }
            call.views[name] = std::move(read);
        }
        mSchedule.calls.push_back(std::move(call));
    }

    void readSteps()
    {
        std::string const where = mName + ".steps";
        std::size_t calls = 0;
        for (Json const& entry : at("steps").array(where))
        {
            std::string const& kind = entry.at("kind", where).string(where + ".kind");
            if (kind != "segment" && kind != "kernel")
            {
                Json::refuse(where, "a step is a " + kind + ", neither a segment nor a kernel");
            }
            ScheduleStep step;
            step.isKernel = kind == "kernel";
            step.index = static_cast<std::size_t>(entry.at("index", where).integer(where + ".index", 0, kMOST_STEPS));
            std::size_t& next = step.isKernel ? calls : mSchedule.numSegments;
            if (step.index != next++)
            {
                problem("the ", kind, " ", step.index, " runs where ", next - 1, " is due");
            }
            mSchedule.steps.push_back(step);
        }
        if (calls != mSchedule.calls.size())
        {
            problem(calls, " steps run ", mSchedule.calls.size(), " calls");
        }
        for (CrossingTensor const& each : mSchedule.crossing)
        {
            if (each.first > each.last || each.last >= mSchedule.steps.size())
            {
                problem(each.spec.name, " lives from step ", each.first, " to ", each.last, " of ",
                    mSchedule.steps.size());
            }
        }
    }

    void checkCalls()
    {
        for (std::size_t number = 0; number < mSchedule.steps.size(); ++number)
        {
            ScheduleStep const& step = mSchedule.steps[number];
            if (step.isKernel && step.index < mSchedule.calls.size())
            {
                checkCall(mSchedule.calls[step.index], number);
            }
        }
    }

    void checkCall(KernelCall const& call, std::size_t number)
    {
        if (call.inputs.count(call.facts->rows) == 0)
        {
            problem(call.name, " has no input ", call.facts->rows);
        }
        for (auto const& [name, tensor] : call.inputs)
        {
            CrossingTensor const* const crossing = mSchedule.findCrossing(tensor);
            if (mSchedule.findSpec(tensor) == nullptr)
            {
                problem(call.name, " reads ", tensor, ", which there is not");
            }
            else if (crossing != nullptr && (crossing->first >= number || crossing->last < number))
            {
                problem(call.name, " reads ", tensor, " in step ", number, ", and it lives from step ",
                    crossing->first, " to ", crossing->last);
            }
        }
        CrossingTensor const* const made = mSchedule.findCrossing(call.output);
        Shape const shape = made == nullptr ? Shape{} : fixedShape(made->spec.dims);
        if (made == nullptr || made->first != number)
        {
            problem(call.name, " makes ", call.output, " in step ", number, ", which is not where it begins");
        }
        else if (shape.empty() || std::any_of(shape.begin() + 1, shape.end(), [](int64_t size) { return size < 0; }))
        {
            problem(call.name, " makes ", call.output, ", whose rows have no fixed size");
        }
        for (auto const& [name, view] : call.views)
        {
            checkView(call, name, view);
        }
    }

    //! Refuses what would make a kernel read outside of a tensor.
    void checkView(KernelCall const& call, std::string const& name, ColumnView const& view)
    {
        std::vector<std::string> const& allowed = call.facts->strided;
        auto const input = call.inputs.find(name);
        TensorSpec const* const spec = input == call.inputs.end() ? nullptr : mSchedule.findSpec(input->second);
        if (spec == nullptr || std::find(allowed.begin(), allowed.end(), name) == allowed.end())
        {
            problem(call.name, " has ", name, " as columns, which it may not");
            return;
        }
        Shape const shape = fixedShape(spec->dims);
        std::size_t row = 0;
        std::size_t width = 0;
        bool const isFixed = shape.size() >= 2 && checkedProduct(Shape(shape.begin() + 1, shape.end()), 1, row)
                             && checkedProduct(view.dims, 1, width);
        auto const stride = static_cast<std::size_t>(view.rowStride);
        if (!isFixed || view.dims.empty() || row != stride || static_cast<std::size_t>(view.column) + width > stride)
        {
            problem(call.name, " reads columns ", view.column, " to ", static_cast<std::size_t>(view.column) + width,
                " of rows of ", view.rowStride, " as ", name, ", and ", spec->name, " has rows of ", row);
        }
    }

    Json const& mRoot;
    std::string mName;
    Schedule mSchedule;
    std::string mProblems;
};

//! Reads a schedule. Everything that would make a session read or write where it must not is refused.
//! \param name of the file, for messages.
inline Schedule scheduleFromJson(char const* text, std::size_t size, std::string const& name)
{
    return typed("reading a schedule",
        [&]
        {
            Json const root = Json::parse(text, size, name);
            return ScheduleReader(root, name).read();
        });
}

} // namespace hstu::loader

#endif // HSTU_LOADER_SCHEDULE_HPP
