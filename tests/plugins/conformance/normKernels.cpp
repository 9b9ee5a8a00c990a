#include "normKernels.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "hstuAttentionKernels.h"
#include "hstuNormCore.h"

namespace
{

constexpr int32_t kFloat16 = 1;
constexpr int64_t kWidth = 48;
constexpr int64_t kRows = 301;
unsigned char const kCode[] = {0, 1, 2};

constexpr HstuNormImage image(int32_t aligned, unsigned char const* code)
{
    return {90, 0, kFloat16, kFloat16, 64, aligned, 1, 1, 1, 16, 128, 0, "norm", code, 1};
}

HstuNormImage const kImages[] = {image(0, kCode), image(1, kCode + 1),
    {90, 0, kFloat16, kFloat16, 64, 1, 2, 0, 0, 16, 128, 0, "norm", kCode + 2, 1}};

} // namespace

HstuNormImage const* const kHstuNormImages = kImages;
size_t const kHstuNbNormImages = sizeof(kImages) / sizeof(kImages[0]);

namespace
{

struct Call
{
    std::vector<HstuAttribute> attributes;
    std::vector<HstuTensor> inputs;
    HstuTensor output{};

    HstuTensor& input(std::string const& name)
    {
        return *std::find_if(inputs.begin(), inputs.end(), [&](auto const& each) { return each.name == name; });
    }
};

HstuTensor tensor(char const* name, int32_t type, std::vector<int64_t> const& dims, uintptr_t address)
{
    HstuTensor result{name, type, static_cast<int32_t>(dims.size()), {}, reinterpret_cast<void*>(address), 0};
    std::copy(dims.begin(), dims.end(), result.dims);
    return result;
}

//! A layer's gated norm: gate | x | y, its gate columns of a tensor that is four times as wide.
Call callOf(int64_t rows)
{
    Call call;
    call.attributes = {{"epsilon", 1e-6}, {"num_groups", 1}, {"activation", 1}, {"gate_silu", 1}, {"concat", 1},
        {"input_type", 1}, {"output_type", 1}, {"has_shift", 0}, {"has_bias", 1}};
    // In another order than the contract's.
    call.inputs = {tensor("gate", kHSTU_FLOAT16, {rows, kWidth}, 0x4000), tensor("bias", kHSTU_FLOAT32, {kWidth}, 0x3000),
        tensor("scale", kHSTU_FLOAT32, {kWidth}, 0x2000), tensor("x", kHSTU_FLOAT16, {rows, kWidth}, 0x1000)};
    call.input("gate").rowStride = 4 * kWidth;
    call.output = tensor("out", kHSTU_FLOAT16, {rows, 3 * kWidth}, 0x100000);
    return call;
}

//! The norm between a tower's products: x + shift times the sigmoid of its norm, contiguous.
Call towerCallOf(int64_t rows)
{
    Call call;
    call.attributes = {{"epsilon", 1e-5}, {"num_groups", 1}, {"activation", 2}, {"gate_silu", 0}, {"concat", 0},
        {"input_type", 1}, {"output_type", 1}, {"has_shift", 1}, {"has_bias", 1}};
    call.inputs = {tensor("x", kHSTU_FLOAT16, {rows, kWidth}, 0x1000), tensor("shift", kHSTU_FLOAT32, {kWidth}, 0x5000),
        tensor("scale", kHSTU_FLOAT32, {kWidth}, 0x2000), tensor("bias", kHSTU_FLOAT32, {kWidth}, 0x3000)};
    call.output = tensor("out", kHSTU_FLOAT16, {rows, kWidth}, 0x100000);
    return call;
}

struct Answer
{
    int32_t status{};
    std::string error;
};

template <typename Function>
Answer answerOf(Function const& function)
{
    std::vector<char> error(65536, '?');
    Answer answer;
    answer.status = function(error.data(), error.size());
    answer.error = answer.status != 0 ? std::string(error.data()) : std::string();
    return answer;
}

Answer create(Call const& call, HstuNorm*& norm)
{
    norm = reinterpret_cast<HstuNorm*>(1);
    return answerOf(
        [&](char* error, size_t capacity)
        {
            return hstuNormCreate("layer 3", call.attributes.data(), static_cast<int32_t>(call.attributes.size()),
                call.inputs.data(), static_cast<int32_t>(call.inputs.size()), &call.output, &norm, error, capacity);
        });
}

CUstream const kStream = reinterpret_cast<CUstream>(0x77);

Answer enqueue(HstuNorm* norm, Call const& call)
{
    return answerOf(
        [&](char* error, size_t capacity)
        {
            return hstuNormEnqueue(norm, call.inputs.data(), static_cast<int32_t>(call.inputs.size()), &call.output,
                kStream, error, capacity);
        });
}

//! The core's own launch of a call: what the plugin does, which knows no strides.
void enqueueCore(Call const& call)
{
    namespace op = hstu::norm;
    op::HstuNormAttributes attributes;
    attributes.epsilon = 1e-6F;
    attributes.numGroups = attributes.activation = attributes.gateSilu = attributes.concat = 1;
    attributes.inputType = attributes.outputType = kFloat16;
    attributes.hasShift = 0;
    attributes.hasBias = 1;
    auto const view = [](HstuTensor const& given)
    {
        hstu::TensorView result;
        result.type = static_cast<hstu::ElementType>(given.type);
        result.rank = given.rank;
        std::copy(given.dims, given.dims + HSTU_MAX_RANK, result.dims.begin());
        return result;
    };
    op::NodeTensors tensors;
    op::DevicePointers pointers;
    for (HstuTensor const& each : call.inputs)
    {
        for (size_t i = 0; i < static_cast<size_t>(op::kNbInputs); ++i)
        {
            if (std::string(op::kInputs[i].name) == each.name)
            {
                tensors.inputs[i] = view(each);
                pointers.inputs[i] = each.data;
            }
        }
    }
    tensors.output = view(call.output);
    pointers.output = call.output.data;
    op::HstuNormCore core("layer 3", attributes, op::EngineSignature{});
    core.configure(tensors);
    core.load();
    core.enqueue(tensors, pointers, kStream);
}

class Checks
{
public:
    explicit Checks(fake::Calls& calls)
        : mCalls(calls)
    {
    }

    int run()
    {
        checkLaunches();
        checkTowers();
        checkRefusals();
        hstuNormDestroy(nullptr);
        expect(mCalls.allocations == 0, "everything is freed");
        return mFailures;
    }

private:
    void expect(bool condition, std::string const& what)
    {
        if (!condition)
        {
            std::printf("FAIL norm: %s\n", what.c_str());
            ++mFailures;
        }
    }

    void expectRefused(Answer const& answer, std::string const& text)
    {
        expect(answer.status != 0 && answer.error.find(text) != std::string::npos,
            "refused with '" + text + "', not '" + answer.error + "'");
    }

    HstuNorm* made(Call const& call = callOf(-1))
    {
        HstuNorm* norm = nullptr;
        Answer const answer = create(call, norm);
        expect(answer.status == 0, "create: " + answer.error);
        return norm;
    }

    fake::Launch launched(HstuNorm* norm, Call const& call, unsigned char const* code)
    {
        int const waits = mCalls.waits;
        size_t const before = mCalls.launches.size();
        Answer const answer = enqueue(norm, call);
        expect(answer.status == 0 && mCalls.launches.size() == before + 1, "one launch: " + answer.error);
        expect(mCalls.waits == waits, "enqueue neither loads, allocates nor waits");
        fake::Launch const launch = mCalls.launches.back();
        expect(launch.image == code, "the image " + std::to_string(code - kCode));
        return launch;
    }

    void checkLaunches()
    {
        HstuNorm* const norm = made();
        Call call = callOf(kRows);
        fake::Launch const columns = launched(norm, call, kCode + 1);
        expect(columns.rowStrides == std::vector<int32_t>{kWidth, 4 * kWidth}, "x is contiguous, gate is columns");
        expect(columns.grid[0] == (kRows + 15) / 16 && columns.grid[1] == 1 && columns.stream == kStream, "the grid");
        std::vector<uint64_t> const addresses{0x1000, 0, 0x2000, 0x3000, 0x4000, 0x100000};
        expect(columns.addresses == addresses, "every tensor in its place");
        call.input("gate").rowStride = 4 * kWidth + 1;
        expect(launched(norm, call, kCode).rowStrides.at(1) == 4 * kWidth + 1, "rows that no vector can be read of");
        call.input("gate").rowStride = 0;
        call.input("x").rowStride = 2 * kWidth;
        expect(launched(norm, call, kCode + 1).rowStrides == std::vector<int32_t>{2 * kWidth, kWidth}, "columns of x");
        call.input("x").rowStride = kWidth;
        fake::Launch const contiguous = launched(norm, call, kCode + 1);
        enqueueCore(call);
        fake::Launch const cores = mCalls.launches.back();
        expect(contiguous.image == cores.image && std::equal(contiguous.grid, contiguous.grid + 3, cores.grid)
                   && std::equal(contiguous.block, contiguous.block + 3, cores.block)
                   && contiguous.addresses == cores.addresses && contiguous.rowStrides == cores.rowStrides,
            "what the plugin launches");
        size_t const before = mCalls.launches.size();
        Call empty = callOf(0);
        for (HstuTensor* const each : {&empty.input("x"), &empty.input("gate"), &empty.output})
        {
            each->data = nullptr;
        }
        expect(enqueue(norm, empty).status == 0 && mCalls.launches.size() == before, "no rows, no launch");
        hstuNormDestroy(norm);
    }

    void checkTowers()
    {
        HstuNorm* const norm = made(towerCallOf(-1));
        std::vector<uint64_t> const addresses{0x1000, 0x5000, 0x2000, 0x3000, 0, 0x100000};
        expect(launched(norm, towerCallOf(kRows), kCode + 2).addresses == addresses, "no gate");
        hstuNormDestroy(norm);
    }

    void checkRefusals()
    {
        HstuNorm* none = nullptr;
        auto const notCreated = [&](std::function<void(Call&)> const& change, std::string const& text)
        {
            Call call = callOf(-1);
            change(call);
            expectRefused(create(call, none), text);
            expect(none == nullptr, "nothing is made");
        };
        notCreated([](Call& call) { call.attributes.pop_back(); }, "field 'has_bias' is missing");
        notCreated([](Call& call) { call.attributes[4].value = 2.5; }, "field 'concat' is 2.5");
        notCreated([](Call& call) { call.attributes[4].value = 2; }, "no kernel for float16 to float16, gate by SiLU");
        notCreated([](Call& call) { call.inputs.pop_back(); }, "input 'x' is missing; its attributes ask for x, scale");
        HstuNorm* const norm = made();
        size_t const before = mCalls.launches.size();
        auto const refused = [&](std::function<void(Call&)> const& change, std::string const& text)
        {
            Call call = callOf(kRows);
            change(call);
            expectRefused(enqueue(norm, call), text);
        };
        refused([](Call& call) { call.input("x").data = nullptr; }, "HstuNorm node 'layer 3': x has no address");
        refused([](Call& call) { call.input("gate").dims[0] = 300; }, "axis 0 of gate is 300; allowed: 301");
        refused([](Call& call) { call.input("gate").rowStride = 47; }, "the rows of gate are 47 elements apart");
        refused([](Call& call) { call.input("x").rowStride = int64_t{1} << 31; }, "the rows of x are 2147483648");
        refused([](Call& call) { call.input("scale").rowStride = 48; }, "the rows of scale are 48 elements apart");
        refused([](Call& call) { call.output.rowStride = 144; }, "the rows of out are 144 elements apart");
        refused([](Call& call) { call.output.dims[1] = 48; }, "axis 1 of out is 48; allowed: 144");
        expectRefused(enqueue(nullptr, callOf(kRows)), "the norm is null");
        expect(mCalls.launches.size() == before, "what is refused launches nothing");
        hstuNormDestroy(norm);
    }

    fake::Calls& mCalls;
    int mFailures{0};
};

} // namespace

int checkNorms(fake::Calls& calls)
{
    return Checks(calls).run();
}
