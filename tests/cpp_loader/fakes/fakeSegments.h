#ifndef HSTU_FAKE_SEGMENTS_H
#define HSTU_FAKE_SEGMENTS_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fakeModel.h"

//! Segments of the fake model. The first computes the model and spreads its main output y, W numbers a row, over a
//! tensor of rows of 4W: 2y | y | y | y. The kernels between two segments (fakeKernels.cpp) make y / 2 of it, in steps
//! that multiply by powers of two alone: nothing is rounded, and whatever is read elsewhere or too late is another
//! number. A middle segment spreads again, and the last gives y.
namespace fake
{

inline void spread(float* wide, int64_t rows, int64_t width, float const* values, float factor)
{
    for (int64_t r = 0; r < rows; ++r)
    {
        for (int64_t c = 0; c < 4 * width; ++c)
        {
            wide[r * 4 * width + c] = values[r * width + c % width] * factor * (c < width ? 2.0F : 1.0F);
        }
    }
}

inline void runSegment(Engine const& engine, Tensors const& tensors)
{
    if (engine.stage.empty())
    {
        Pass(engine, tensors).run();
        return;
    }
    int64_t const width = engine.sizes.at("main_width");
    if (engine.stage == "first")
    {
        Tensor const& wide = tensors.at(engine.nameOf("wide"));
        std::vector<float> values(static_cast<std::size_t>(wide.shape[0] * width), -77.0F);
        Tensors all = tensors;
        all[engine.nameOf("main")] = {{wide.shape[0], width}, "float32", values.data()};
        Pass(engine, all).run();
        spread(static_cast<float*>(wide.data), wide.shape[0], width, values.data(), 1.0F);
        return;
    }
    Tensor const& normed = tensors.at(engine.nameOf("normed"));
    auto const* const values = static_cast<float const*>(normed.data);
    if (engine.stage == "middle")
    {
        spread(static_cast<float*>(tensors.at(engine.nameOf("wide")).data), normed.shape[0], width, values, 2.0F);
        return;
    }
    auto* const target = static_cast<float*>(tensors.at(engine.nameOf("main")).data);
    for (int64_t i = 0; i < normed.shape[0] * width; ++i)
    {
        target[i] = 2.0F * values[i];
    }
}

} // namespace fake

#endif // HSTU_FAKE_SEGMENTS_H
