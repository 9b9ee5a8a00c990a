#ifndef HSTU_FAKE_MODEL_H
#define HSTU_FAKE_MODEL_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

//! A model small enough to be written down twice (here and in fake_model.py), with what a real one has: rows that
//! depend on the history and on the query, predictions that read them, a divisor of the batch.
namespace fake
{

struct Io
{
    std::string name;
    std::string type; //!< float32, int32 or int64
    bool isInput{true};
    std::vector<int64_t> least;
    std::vector<int64_t> most;
};

//! What an engine file says.
struct Engine
{
    int64_t version{0};
    std::string model;                        //!< retrieval, packed, prefill or score
    std::string stage;                        //!< first, middle or last segment of it; empty: all of it
    std::vector<std::string> plugin;          //!< name, version, namespace
    std::map<std::string, std::string> names; //!< role to input
    std::map<std::string, int64_t> sizes;
    std::vector<Io> io;

    //! \return the number of the segment, 0 for an engine of the whole model.
    int64_t segment() const
    {
        auto const found = sizes.find("segment");
        return found == sizes.end() ? 0 : found->second;
    }

    //! \return whether a segment makes this for kernels, not for the caller.
    bool isCrossing(std::string const& name) const
    {
        return !stage.empty() && name == nameOf("wide");
    }

    std::string nameOf(std::string const& role) const
    {
        auto const found = names.find(role);
        return found == names.end() ? "" : found->second;
    }
};

//! A tensor of a pass: device memory, which is host memory here.
struct Tensor
{
    std::vector<int64_t> shape;
    std::string type;
    void* data{nullptr};

    double at(size_t index) const
    {
        return type == "int64"   ? static_cast<double>(static_cast<int64_t*>(data)[index])
               : type == "int32" ? static_cast<double>(static_cast<int32_t*>(data)[index])
                                 : static_cast<double>(static_cast<float*>(data)[index]);
    }

    int64_t integer(size_t index) const
    {
        return type == "int64" ? static_cast<int64_t*>(data)[index] : static_cast<int32_t*>(data)[index];
    }
};

using Tensors = std::map<std::string, Tensor>;

//! \return a number in [-1, 1] that looks random.
inline double mixed(int64_t value, int64_t salt)
{
    auto const word =
        static_cast<uint32_t>(static_cast<uint64_t>(value) * 2654435761ULL + static_cast<uint64_t>(salt) * 40503ULL);
    return static_cast<double>((word >> 8) % 2001U) / 1000.0 - 1.0;
}

class Pass
{
public:
    Pass(Engine const& engine, Tensors const& tensors)
        : mEngine(engine)
        , mTensors(tensors)
    {
    }

    void run() const
    {
        mEngine.model == "retrieval" ? retrieve() : mEngine.model == "prefill" ? prefill() : score();
    }

private:
    Tensor const& tensor(std::string const& name) const
    {
        return mTensors.at(name);
    }

    int64_t size(char const* name) const
    {
        return mEngine.sizes.at(name);
    }

    float* output(char const* name) const
    {
        return static_cast<float*>(tensor(name).data);
    }

    void retrieve() const
    {
        Tensor const& offsets = tensor("seq_offsets");
        int64_t const width = size("width");
        for (int64_t b = 0; b + 1 < offsets.shape[0]; ++b)
        {
            for (int64_t d = 0; d < width; ++d)
            {
                double sum = 0;
                for (int64_t i = offsets.integer(b); i < offsets.integer(b + 1); ++i)
                {
                    int64_t const age =
                        (tensor("request_timestamps").integer(b) - tensor("timestamps").integer(i)) % 97;
                    sum += mixed(tensor("item_ids").integer(i), d) + 0.001 * static_cast<double>(age);
                }
                output("user_embeddings")[b * width + d] = static_cast<float>(sum);
            }
        }
    }

    //! Key (value: side 1) of one row.
    float cached(int64_t token, int64_t age, int64_t layer, int64_t head, int64_t element, int64_t side) const
    {
        return static_cast<float>(
            0.5 * mixed(token, 1000 * layer + 10 * head + element + 500 * side) + 0.001 * static_cast<double>(age));
    }

    //! Calls each(row, token, age) for every row of a user: contextual tokens, then events.
    template <typename Each>
    void forRows(int64_t user, int64_t asked, Each const& each) const
    {
        int64_t row = 0;
        int64_t const context = size("context");
        for (int64_t c = 0; c < context; ++c)
        {
            each(row++, tensor(mEngine.nameOf("context")).integer(user * context + c), 0);
        }
        Tensor const& offsets = tensor("seq_offsets");
        for (int64_t i = offsets.integer(user); i < offsets.integer(user + 1); ++i)
        {
            int64_t const action = tensor(mEngine.nameOf("history_action")).integer(i);
            int64_t const age = (asked - tensor(mEngine.nameOf("history_time")).integer(i)) % 97;
            each(row++, tensor(mEngine.nameOf("history_id")).integer(i) + 7 * action, age);
        }
    }

    void prefill() const
    {
        Tensor const& offsets = tensor("seq_offsets");
        int64_t start = 0;
        for (int64_t user = 0; user + 1 < offsets.shape[0]; ++user)
        {
            int64_t rows = 0;
            forRows(user, tensor("request_timestamps").integer(user),
                [&](int64_t row, int64_t token, int64_t age)
                {
                    rows = row + 1;
                    for (int64_t layer = 0; layer < size("layers"); ++layer)
                    {
                        for (int64_t side = 0; side < 2; ++side)
                        {
                            int64_t const width = size(side == 0 ? "attention_dim" : "linear_dim");
                            std::string const name = (side == 0 ? "k_" : "v_") + std::to_string(layer);
                            float* const target = output(name.c_str()) + (start + row) * size("heads") * width;
                            for (int64_t head = 0; head < size("heads"); ++head)
                            {
                                for (int64_t e = 0; e < width; ++e)
                                {
                                    target[head * width + e] = cached(token, age, layer, head, e, side);
                                }
                            }
                        }
                    }
                });
            start += rows;
        }
    }

    //! Sum of all keys and values of a user: read from the cache, or computed.
    double sumOf(int64_t user, int64_t asked) const
    {
        double sum = 0;
        for (int64_t layer = 0; layer < size("layers"); ++layer)
        {
            for (int64_t side = 0; side < 2; ++side)
            {
                int64_t const width = size(side == 0 ? "attention_dim" : "linear_dim");
                if (mEngine.model == "score")
                {
                    Tensor const& offsets = tensor("cache_offsets");
                    Tensor const& rows = tensor((side == 0 ? "k_" : "v_") + std::to_string(layer));
                    int64_t const line = size("heads") * width;
                    for (int64_t i = offsets.integer(user) * line; i < offsets.integer(user + 1) * line; ++i)
                    {
                        sum += rows.at(static_cast<size_t>(i));
                    }
                    continue;
                }
                forRows(user, asked,
                    [&](int64_t, int64_t token, int64_t age)
                    {
                        for (int64_t i = 0; i < size("heads") * width; ++i)
                        {
                            sum += static_cast<double>(cached(token, age, layer, i / width, i % width, side));
                        }
                    });
            }
        }
        return sum;
    }

    //! The divisor of a packed pass: longest user and most candidates of the batch.
    double batchScaling() const
    {
        int64_t longest = 0;
        int64_t most = 0;
        Tensor const& offsets = tensor("seq_offsets");
        Tensor const& asked = tensor("candidate_offsets");
        for (int64_t user = 0; user + 1 < offsets.shape[0]; ++user)
        {
            longest = std::max(longest, size("context") + offsets.integer(user + 1) - offsets.integer(user));
            most = std::max(most, asked.integer(user + 1) - asked.integer(user));
        }
        return static_cast<double>(longest + most);
    }

    void score() const
    {
        Tensor const& offsets = tensor("candidate_offsets");
        int64_t const tasks = size("tasks");
        for (int64_t user = 0; user + 1 < offsets.shape[0]; ++user)
        {
            int64_t const first = offsets.integer(user);
            int64_t const last = offsets.integer(user + 1);
            if (first == last)
            {
                continue;
            }
            bool const isCached = mEngine.model == "score";
            int64_t const asked = isCached ? tensor("request_timestamps").integer(user)
                                           : tensor(mEngine.nameOf("candidate_time")).integer(last - 1);
            double const scaling = isCached ? tensor("scaling_seq_lens").at(user) : batchScaling();
            double const sum = sumOf(user, asked);
            for (int64_t t = first; t < last; ++t)
            {
                for (int64_t task = 0; task < tasks; ++task)
                {
                    double const own = mixed(tensor(mEngine.nameOf("candidate_id")).integer(t), 31 + task);
                    double const logit = own + static_cast<double>(1 + task) * sum / scaling;
                    output("logits")[t * tasks + task] = static_cast<float>(logit);
                    output("preds")[t * tasks + task] = static_cast<float>(1.0 / (1.0 + std::exp(-logit)));
                }
            }
        }
    }

    Engine const& mEngine;
    Tensors const& mTensors;
};

} // namespace fake

#endif // HSTU_FAKE_MODEL_H
