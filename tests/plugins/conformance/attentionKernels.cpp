//! Checks the functions of hstuAttentionKernels.h with fakeDriver.cpp as libcuda.so.1 and a table of images of its own:
//! they launch what the core launches for the same node, and refuse by name what no node has. Prints one line per
//! failed check; exit code 0 if there is none.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "fakeDriver.h"
#include "hstuAttentionCore.h"
#include "hstuAttentionKernels.h"
#include "normKernels.h"

namespace
{

constexpr int32_t kBfloat16 = 2;
unsigned char const kCode[] = {0, 1, 2, 3, 4, 5};

constexpr HstuKernelImage hopperImage(int32_t split, int32_t hasBias, int32_t hasCache, unsigned char const* code)
{
    HstuKernelImage image{90, 0, kHstuKernelHopper, kBfloat16, 64 * hasBias, 64, 64, 1, hasBias, hasBias, 1, 64, 128,
        128, 384, split, 1000 + split, 12000, hasCache != 0 ? "hopperCache" : "hopper", code, 1};
    image.hasCache = hasCache;
    return image;
}

} // namespace

HstuKernelImage const kHstuKernelImages[] = {
    {90, 0, kHstuKernelPortable, kBfloat16, 0, 64, 64, 0, 0, 0, 1, 1, 64, 0, 128, 1, 0, 0, "portable", kCode, 1},
    hopperImage(1, 0, 0, kCode + 1),
    hopperImage(8, 0, 0, kCode + 2),
    hopperImage(1, 1, 0, kCode + 3),
    hopperImage(8, 0, 1, kCode + 4),
};
size_t const kHstuNbKernelImages = sizeof(kHstuKernelImages) / sizeof(kHstuKernelImages[0]);

namespace
{

int failures = 0;

void expect(bool condition, std::string const& what)
{
    if (!condition)
    {
        std::printf("FAIL %s\n", what.c_str());
        ++failures;
    }
}

//! What a host passes, from the names of the contract: every tensor at 0x1000 times its position plus one.
struct Call
{
    std::vector<HstuAttribute> attributes;
    std::vector<HstuTensor> inputs;
    HstuTensor output{};

    HstuAttribute& attribute(std::string const& name)
    {
        return *std::find_if(attributes.begin(), attributes.end(), [&](auto const& each) { return each.name == name; });
    }

    HstuTensor& input(std::string const& name)
    {
        return *std::find_if(inputs.begin(), inputs.end(), [&](auto const& each) { return each.name == name; });
    }
};

struct Shape
{
    int64_t batch;
    int64_t lq;
    int64_t lk;
    int64_t lc{-1}; //!< negative: without a cache
    bool hasBias{false};
};

constexpr int64_t kHeads = 4;
constexpr int64_t kDqk = 56;
constexpr int64_t kDv = 40;

HstuTensor tensor(char const* name, int32_t type, std::vector<int64_t> const& dims, uintptr_t address)
{
    HstuTensor result{name, type, static_cast<int32_t>(dims.size()), {}, reinterpret_cast<void*>(address), 0};
    std::copy(dims.begin(), dims.end(), result.dims);
    return result;
}

//! \param lengths extents of Lq, Lk, Lc and B are those of the shape; otherwise they may vary.
Call callOf(Shape const& shape, bool lengths = true)
{
    double const bias = shape.hasBias ? 1 : 0;
    Call call;
    call.attributes = {{"has_num_targets", 1}, {"alpha", 0.25}, {"scaling_seq_len", 200.5}, {"max_query_len", 4096},
        {"max_seq_len", 65536}, {"target_group_size", 3}, {"contextual_seq_len", 2}, {"max_attn_len", 5},
        {"min_full_attn_seq_len", 7}, {"silu", 0}, {"has_contextual_seq_lens", 0}, {"has_scaling_seq_lens", 0},
        {"pos_bias", bias}, {"time_bias", bias}};
    auto const extent = [&](int64_t length) { return lengths ? length : -1; };
    int64_t const b = extent(shape.batch), bPlus1 = extent(shape.batch + 1), lq = extent(shape.lq),
                  lk = extent(shape.lk);
    uintptr_t next = 0;
    auto const add = [&](char const* name, int32_t type, std::vector<int64_t> const& dims)
    { call.inputs.push_back(tensor(name, type, dims, next += 0x1000)); };
    add("q", kHSTU_BFLOAT16, {lq, kHeads, kDqk});
    add("k", kHSTU_BFLOAT16, {lk, kHeads, kDqk});
    add("v", kHSTU_BFLOAT16, {lk, kHeads, kDv});
    add("q_offsets", kHSTU_INT32, {bPlus1});
    add("k_offsets", kHSTU_INT32, {bPlus1});
    add("num_targets", kHSTU_INT32, {b});
    if (shape.hasBias)
    {
        add("row_timestamps", kHSTU_INT64, {lq});
        add("col_timestamps", kHSTU_INT64, {lk});
        add("pos_table", kHSTU_FLOAT32, {1, 99});
        add("ts_table", kHSTU_FLOAT32, {kHeads, 17});
        add("ts_thresholds", kHSTU_INT64, {16});
    }
    if (shape.lc >= 0)
    {
        call.attributes.push_back({"has_cache", 1});
        add("k_cached", kHSTU_BFLOAT16, {extent(shape.lc), kHeads, kDqk});
        add("v_cached", kHSTU_BFLOAT16, {extent(shape.lc), kHeads, kDv});
        add("cache_offsets", kHSTU_INT32, {bPlus1});
    }
    // In another order than the contract's.
    std::reverse(call.inputs.begin(), call.inputs.end());
    call.output = tensor("out", kHSTU_BFLOAT16, {lq, kHeads, kDv}, 0x100000);
    return call;
}

struct Answer
{
    int32_t status{};
    std::string error;
};

//! Runs a function of the interface with room for a message that is as long as it likes.
template <typename Function>
Answer answerOf(Function const& function)
{
    std::vector<char> error(65536, '?');
    Answer answer;
    answer.status = function(error.data(), error.size());
    answer.error = answer.status != 0 ? std::string(error.data()) : std::string();
    return answer;
}

HstuAttention* const kGarbage = reinterpret_cast<HstuAttention*>(1);

Answer create(Call const& call, HstuAttention*& attention)
{
    attention = kGarbage;
    return answerOf(
        [&](char* error, size_t capacity)
        {
            return hstuAttentionCreate("layer 3", call.attributes.data(), static_cast<int32_t>(call.attributes.size()),
                call.inputs.data(), static_cast<int32_t>(call.inputs.size()), &call.output, &attention, error,
                capacity);
        });
}

Answer workspaceOf(HstuAttention const* attention, Call const& call, size_t& bytes)
{
    return answerOf(
        [&](char* error, size_t capacity)
        {
            return hstuAttentionWorkspace(
                attention, call.inputs.data(), static_cast<int32_t>(call.inputs.size()), &bytes, error, capacity);
        });
}

CUstream const kStream = reinterpret_cast<CUstream>(0x77);

Answer enqueue(HstuAttention* attention, Call const& call)
{
    return answerOf(
        [&](char* error, size_t capacity)
        {
            return hstuAttentionEnqueue(attention, call.inputs.data(), static_cast<int32_t>(call.inputs.size()),
                &call.output, nullptr, 0, kStream, error, capacity);
        });
}

//! An attention of a node whose extents may vary.
HstuAttention* made(Shape const& shape)
{
    HstuAttention* attention = nullptr;
    Answer const answer = create(callOf(shape, false), attention);
    expect(answer.status == 0, "create: " + answer.error);
    return attention;
}

//! The core's own launch of a call: what the plugin does.
void enqueueCore(Call const& call)
{
    std::vector<hstu::FieldView> fields;
    std::vector<float> floats(call.attributes.size());
    std::vector<int32_t> ints(call.attributes.size());
    for (size_t i = 0; i < call.attributes.size(); ++i)
    {
        HstuAttribute const& each = call.attributes[i];
        bool const isFloat = std::string(each.name) == "alpha" || std::string(each.name) == "scaling_seq_len";
        floats[i] = static_cast<float>(each.value);
        ints[i] = isFloat ? 0 : static_cast<int32_t>(each.value);
        fields.push_back({each.name, isFloat ? 1 : 5, 1, isFloat ? static_cast<void*>(&floats[i]) : &ints[i]});
    }
    hstu::NodeTensors tensors;
    hstu::DevicePointers pointers;
    auto const view = [](HstuTensor const& given)
    {
        hstu::TensorView result;
        result.type = static_cast<hstu::ElementType>(given.type);
        result.rank = given.rank;
        std::copy(given.dims, given.dims + HSTU_MAX_RANK, result.dims.begin());
        return result;
    };
    for (HstuTensor const& each : call.inputs)
    {
        for (size_t i = 0; i < static_cast<size_t>(hstu::kNbInputs); ++i)
        {
            if (std::string(hstu::kInputs[i].name) == each.name)
            {
                tensors.inputs[i] = view(each);
                pointers.inputs[i] = each.data;
                tensors.rowStrides[i] = each.rowStride;
            }
        }
    }
    tensors.output = view(call.output);
    pointers.output = call.output.data;
    hstu::HstuAttentionCore core("layer 3", hstu::readAttributes("layer 3", fields, nullptr), hstu::EngineSignature{});
    core.configure(tensors);
    core.load();
    core.enqueue(tensors, pointers, kStream);
}

bool isSame(fake::MapCall const& a, fake::MapCall const& b)
{
    return a.type == b.type && a.address == b.address && a.dims == b.dims && a.strides == b.strides && a.box == b.box
           && a.steps == b.steps && a.modes == b.modes;
}

//! Whether two launches are alike but for the counters, which every attention has of its own.
bool isSame(fake::Launch a, fake::Launch b)
{
    bool const haveCounters = (a.parameters.progress != nullptr) == (b.parameters.progress != nullptr);
    a.parameters.progress = b.parameters.progress = nullptr;
    return haveCounters && a.kernel == b.kernel && a.image == b.image && std::equal(a.grid, a.grid + 3, b.grid)
           && std::equal(a.block, a.block + 3, b.block) && a.cluster == b.cluster && a.sharedBytes == b.sharedBytes
           && a.stream == b.stream && a.rowStrides == b.rowStrides
           && std::equal(a.maps.begin(), a.maps.end(), b.maps.begin(), b.maps.end(),
               [](auto const& x, auto const& y) { return isSame(x, y); })
           && std::memcmp(&a.parameters, &b.parameters, sizeof(a.parameters)) == 0;
}

class Checks
{
public:
    explicit Checks(fake::Calls& calls)
        : mCalls(calls)
    {
    }

    void run()
    {
        expect(hstuAttentionKernelsApiVersion() == HSTU_ATTENTION_KERNELS_API_VERSION, "the version of the interface");
        expect(std::strlen(hstuAttentionKernelsBuildId()) == 16
                   && hstuAttentionKernelsBuildId() == hstuAttentionKernelsBuildId(),
            "the identifier of the kernels");
        checkLaunches();
        checkEmpty();
        checkCounters();
        checkRefusedAttributes();
        checkRefusedTensors();
        checkRefusedCalls();
        checkDriver();
        checkMessages();
        hstuAttentionDestroy(nullptr);
        expect(mCalls.allocations == 0, "everything is freed");
    }

private:
    void checkLaunches()
    {
        Shape const longBatch{4, 60000, 60001}, fewTiles{1, 256, 4352}, biased{2, 300, 300, -1, true},
            cached{1, 256, 256, 4096}, noKeys{2, 300, 0}, noSequence{0, 300, 300};
        for (auto const& [shape, image] :
            {std::pair{longBatch, 1}, {fewTiles, 2}, {biased, 3}, {cached, 4}, {noKeys, 1}, {noSequence, 1}})
        {
            HstuAttention* const attention = made(shape);
            checkLaunch(attention, callOf(shape), kCode + image);
            hstuAttentionDestroy(attention);
        }
        HstuAttention* const attention = made(fewTiles);
        Call shifted = callOf(fewTiles);
        shifted.input("k").data = reinterpret_cast<void*>(0x2002);
        checkLaunch(attention, shifted, kCode);
        checkLaunch(attention, callOf(longBatch), kCode + 1);
        Call columns = callOf(longBatch);
        columns.input("q").rowStride = columns.input("k").rowStride = 1024;
        checkLaunch(attention, columns, kCode + 1);
        expect(mCalls.launches.back().maps.at(1).strides.at(1) == 2048, "keys that are columns of a wider tensor");
        columns.input("v").rowStride = 1025;
        checkLaunch(attention, columns, kCode);
        hstuAttentionDestroy(attention);
    }

    void checkLaunch(HstuAttention* attention, Call const& call, unsigned char const* image)
    {
        int const waits = mCalls.waits;
        size_t const before = mCalls.launches.size();
        size_t bytes = 99;
        expect(workspaceOf(attention, call, bytes).status == 0 && bytes == 0, "no workspace");
        Answer const answer = enqueue(attention, call);
        expect(answer.status == 0, "enqueue: " + answer.error);
        expect(mCalls.waits == waits, "enqueue neither loads, allocates nor waits");
        expect(mCalls.launches.size() == before + 1, "one launch");
        fake::Launch const launch = mCalls.launches.back();
        expect(launch.image == image, "the image " + std::to_string(image - kCode));
        enqueueCore(call);
        expect(isSame(launch, mCalls.launches.back()), "the plugin's launch of " + std::to_string(image - kCode));
    }

    void checkEmpty()
    {
        Shape const shape{2, 0, 0};
        HstuAttention* const attention = made(shape);
        size_t const before = mCalls.launches.size();
        Call call = callOf(shape);
        for (char const* const name : {"q", "k", "v"})
        {
            call.input(name).data = nullptr;
        }
        call.output.data = nullptr;
        expect(enqueue(attention, call).status == 0 && mCalls.launches.size() == before, "nothing to do without rows");
        hstuAttentionDestroy(attention);
    }

    void checkCounters()
    {
        Shape const shape{2, 300, 300};
        int const before = mCalls.allocations;
        HstuAttention* const attentions[] = {made(shape), made(shape)};
        expect(mCalls.allocations == before + 2, "counters for each attention, when it is made");
        int32_t const* counters[2] = {};
        for (size_t i = 0; i < 2; ++i)
        {
            enqueue(attentions[i], callOf(shape));
            counters[i] = mCalls.launches.back().parameters.progress;
            expect(counters[i] != nullptr && counters[i][0] == 0 && counters[i][1] == 0, "counters that are zero");
        }
        expect(counters[0] != counters[1], "of its own");
        hstuAttentionDestroy(attentions[0]);
        expect(mCalls.allocations == before + 1, "an attention's counters are freed with it");
        hstuAttentionDestroy(attentions[1]);
    }

    void expectRefused(Answer const& answer, std::string const& text)
    {
        expect(answer.status != 0, "refused: " + text);
        expect(answer.error.find(text) != std::string::npos, "'" + text + "' in '" + answer.error + "'");
    }

    //! \param change makes a call that is right wrong.
    void expectNotCreated(std::function<void(Call&)> const& change, std::string const& text)
    {
        Call call = callOf({2, 300, 300}, false);
        change(call);
        int const allocations = mCalls.allocations;
        HstuAttention* attention = nullptr;
        Answer const answer = create(call, attention);
        expectRefused(answer, text);
        expectRefused(answer, "HstuAttention");
        expect(attention == nullptr && mCalls.allocations == allocations, "nothing is left of " + text);
    }

    void checkRefusedAttributes()
    {
        using Limits = std::numeric_limits<double>;
        auto const value = [this](char const* name, double wrong, std::string const& text)
        {
            expectNotCreated([&](Call& call) { call.attribute(name).value = wrong; },
                "node 'layer 3': 1 bad field(s):\n  - field '" + std::string(name) + "' is " + text);
        };
        value("silu", 0.5, "0.5; allowed: an int >= 0 and <= 1");
        value("silu", 2, "2; allowed: an int >= 0 and <= 1");
        value("max_seq_len", 1e300, "1e+300; allowed: an int >= 1 and <= 1048576");
        value("max_seq_len", -Limits::infinity(), "-inf; allowed: an int >= 1 and <= 1048576");
        value("max_attn_len", std::nan(""), "nan; allowed: an int >= 0");
        value("alpha", 1e300, "1e+300; allowed: a finite float");
        value("alpha", std::nan(""), "nan; allowed: a finite float");
        value("scaling_seq_len", 0, "0; allowed: a finite float > 0");
        value("scaling_seq_len", 1e-60, "0; allowed: a finite float > 0");
        expectNotCreated([](Call& call) { call.attribute("silu").name = "gelu"; },
            "2 bad field(s):\n  - field 'gelu' is unknown; allowed: alpha, scaling_seq_len, ");
        expectNotCreated([](Call& call) { call.attribute("silu").name = "gelu"; },
            "\n  - field 'silu' is missing; allowed: an int >= 0 and <= 1");
        expectNotCreated([](Call& call) { call.attributes.push_back(call.attribute("alpha")); },
            "field 'alpha' is given more than once");
        expectNotCreated([](Call& call) { call.attribute("alpha").name = nullptr; }, "field number 1 has no name");
        expectNotCreated([](Call& call) { call.attributes.clear(); }, "14 bad field(s):");
    }

    void checkRefusedTensors()
    {
        char const* const all = "its attributes ask for q, k, v, q_offsets, k_offsets, num_targets";
        expectNotCreated([](Call& call) { call.input("k").name = "keys"; },
            "node 'layer 3': input 'keys' is not one of this node; " + std::string(all));
        expectNotCreated(
            [](Call& call) { call.input("k").name = "pos_table"; }, "input 'pos_table' is not one of this node");
        expectNotCreated([](Call& call) { call.input("k").name = "v"; }, "input 'v' is given more than once");
        expectNotCreated([](Call& call) { call.input("k").name = nullptr; }, "input number 4 has no name");
        expectNotCreated([](Call& call) { call.inputs.erase(call.inputs.begin()); },
            "input 'num_targets' is missing; " + std::string(all));
        expectNotCreated([](Call& call) { call.attribute("pos_bias").value = 1; }, "input 'pos_table' is missing");
        for (int32_t const type : {-1, 5, std::numeric_limits<int32_t>::max()})
        {
            expectNotCreated([&](Call& call) { call.input("k").type = type; },
                "k has type " + std::to_string(type)
                    + "; allowed: 0 (float32), 1 (float16), 2 (bfloat16), 3 (int32), 4 (int64)");
        }
        expectNotCreated([](Call& call) { call.input("k").type = kHSTU_FLOAT16; }, "k is float16 but q is bfloat16");
        expectNotCreated(
            [](Call& call) { call.input("q_offsets").type = kHSTU_INT64; }, "q_offsets is int64; allowed: int32");
        for (int32_t const rank : {-1, 0, 2, HSTU_MAX_RANK + 1, std::numeric_limits<int32_t>::max()})
        {
            expectNotCreated([&](Call& call) { call.input("k").rank = rank; },
                "k has rank " + std::to_string(rank) + "; allowed: 3");
        }
        expectNotCreated([](Call& call) { call.input("k").dims[0] = -2; }, "axis 0 of k is -2");
        expectNotCreated([](Call& call) { call.input("k").dims[2] = 48; }, "Dqk is 48 in axis 2 of k but 56 in q");
        expectNotCreated([](Call& call) { call.input("v").dims[2] = call.output.dims[2] = -1; }, "Dv is dynamic");
        expectNotCreated([](Call& call) { call.output.name = "output"; }, "the output is 'output'; allowed: out");
        expectNotCreated([](Call& call) { call.output.name = nullptr; }, "the output is ''; allowed: out");
        expectNotCreated([](Call& call) { call.output.type = 9; }, "out has type 9");
        expectNotCreated(
            [](Call& call)
            {
                for (char const* const name : {"q", "k", "v"})
                {
                    call.input(name).type = kHSTU_FLOAT32;
                }
                call.output.type = kHSTU_FLOAT32;
            },
            "no kernel for float32, q/k head dim 56, v head dim 40");
    }

    void checkRefusedCalls()
    {
        Shape const shape{2, 300, 300};
        HstuAttention* const attention = made(shape);
        size_t const before = mCalls.launches.size();
        auto const refused = [&](std::function<void(Call&)> const& change, std::string const& text)
        {
            Call call = callOf(shape);
            change(call);
            expectRefused(enqueue(attention, call), text);
        };
        refused([](Call& call) { call.input("q").data = nullptr; }, "node 'layer 3': q has no address");
        refused([](Call& call) { call.output.data = nullptr; }, "out has no address");
        refused([](Call& call) { call.input("num_targets").data = nullptr; }, "num_targets has no address");
        refused(
            [](Call& call) { call.input("k").dims[0] = call.input("v").dims[0] = -1; }, "Lk is unknown at run time");
        refused([](Call& call) { call.input("q_offsets").dims[0] = 0; }, "axis 0 of q_offsets is 0");
        refused([](Call& call) { call.output.dims[0] = 299; }, "Lq is 299 in axis 0 of out but 300 in q");
        refused([](Call& call) { call.output.rank = 9; }, "out has rank 9; allowed: 3");
        refused([](Call& call) { call.inputs.pop_back(); }, "input 'q' is missing");
        refused(
            [](Call& call) { call.input("q").rowStride = 223; }, "the rows of q are 223 elements apart; allowed: 0");
        refused([](Call& call) { call.input("k").rowStride = -1; }, "the rows of k are -1 elements apart; allowed: 0");
        refused(
            [](Call& call) { call.input("q_offsets").rowStride = 2; }, "the rows of q_offsets are 2 elements apart");
        refused([](Call& call) { call.output.rowStride = 160; }, "the rows of out are 160 elements apart; allowed: 0");
        refused([](Call& call) { call.input("q").dims[2] = call.input("k").dims[2] = 64; },
            "types or head dims differ from those the kernels were loaded for");
        size_t bytes = 0;
        Call unknown = callOf(shape, false);
        expectRefused(workspaceOf(attention, unknown, bytes), "is unknown at run time");
        expectRefused(workspaceOf(nullptr, callOf(shape), bytes), "the attention is null");
        expectRefused(enqueue(nullptr, callOf(shape)), "the attention is null");
        Call const call = callOf(shape);
        auto const count = static_cast<int32_t>(call.inputs.size());
        HstuTensor const* const inputs = call.inputs.data();
        auto const raw = [&](auto const& function, std::string const& text)
        { expectRefused(answerOf(function), text); };
        raw([&](char* error, size_t capacity)
            { return hstuAttentionWorkspace(attention, inputs, count, nullptr, error, capacity); },
            "nowhere to put the bytes");
        raw([&](char* error, size_t capacity)
            { return hstuAttentionEnqueue(attention, inputs, count, nullptr, nullptr, 0, kStream, error, capacity); },
            "the output is null");
        raw([&](char* error, size_t capacity)
            { return hstuAttentionEnqueue(attention, nullptr, 1, &call.output, nullptr, 0, kStream, error, capacity); },
            "1 inputs at null");
        raw([&](char* error, size_t capacity)
            { return hstuAttentionEnqueue(attention, inputs, -1, &call.output, nullptr, 0, kStream, error, capacity); },
            "-1 inputs at an address");
        raw([&](char* error, size_t capacity)
            { return hstuAttentionCreate("n", nullptr, 3, inputs, count, &call.output, nullptr, error, capacity); },
            "nowhere to put the attention");
        HstuAttention* none = nullptr;
        raw([&](char* error, size_t capacity)
            { return hstuAttentionCreate(nullptr, nullptr, 3, inputs, count, &call.output, &none, error, capacity); },
            "node '': 3 attributes at null");
        expect(mCalls.launches.size() == before, "what is refused launches nothing");
        hstuAttentionDestroy(attention);
    }

    void checkDriver()
    {
        Shape const shape{2, 300, 300};
        CUcontext context = nullptr;
        hstu::cudaDriver().ctxGetCurrent(&context);
        hstu::cudaDriver().ctxSetCurrent(nullptr);
        expectNotCreated([](Call&) {}, "node 'layer 3': no CUDA context is current on this thread");
        CUcontext seen = context;
        hstu::cudaDriver().ctxGetCurrent(&seen);
        expect(seen == nullptr, "and none is made current");
        hstu::cudaDriver().ctxSetCurrent(context);
        mCalls.result = CUDA_ERROR_NOT_FOUND;
        HstuAttention* none = nullptr;
        expectRefused(
            create(callOf(shape, false), none), "cuModuleGetFunction: FAKE_ERROR (500): an error of the fake driver");
        expect(none == nullptr && mCalls.allocations == 0, "nothing is left of an attention that could not be loaded");
        mCalls.result = CUDA_SUCCESS;
        HstuAttention* const attention = made(shape);
        mCalls.result = CUDA_ERROR_LAUNCH_FAILED;
        expectRefused(
            enqueue(attention, callOf(shape)), "(Lq 300, Lk 300, Lc 0, B 2, H 4, Dqk 56, Dv 40): launch: FAKE_ERROR");
        mCalls.result = CUDA_SUCCESS;
        hstuAttentionDestroy(attention);
    }

    void checkMessages()
    {
        Call const call = callOf({2, 300, 300});
        char error[16];
        std::memset(error, '?', sizeof(error));
        expect(hstuAttentionEnqueue(nullptr, nullptr, 0, nullptr, nullptr, 0, nullptr, error, 8) != 0
                   && std::string(error) == "HstuAtt" && error[8] == '?',
            "a message is cut to its room");
        std::memset(error, '?', sizeof(error));
        expect(hstuAttentionEnqueue(nullptr, nullptr, 0, nullptr, nullptr, 0, nullptr, error, 0) != 0 && error[0] == '?'
                   && hstuAttentionEnqueue(nullptr, nullptr, 0, nullptr, nullptr, 0, nullptr, nullptr, 9) != 0,
            "and dropped where there is none");
    }

    fake::Calls& mCalls;
};

} // namespace

int main()
{
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    auto const getCalls =
        library != nullptr ? reinterpret_cast<fake::Calls* (*)()>(dlsym(library, "fakeCalls")) : nullptr;
    if (getCalls == nullptr)
    {
        std::printf("libcuda.so.1 is not the fake driver\n");
        return 2;
    }
    try
    {
        Checks(*getCalls()).run();
        failures += checkNorms(*getCalls());
    }
    catch (std::exception const& error)
    {
        std::printf("FAIL %s\n", error.what());
        return 1;
    }
    return failures == 0 ? 0 : 1;
}
