#include "noise.hpp"

#include <array>
#include <cmath>

namespace glance_trt {
namespace {

constexpr std::size_t block = 16; // PyTorch's vectorised Box-Muller: 8 values for the radius, 8 for the angle
constexpr double two_pi = 6.283185307179586;

} // namespace

void Generator::draw(float *values, std::size_t count) {
    if (count < block) {
        draw_few(values, count);
        return;
    }
    // All uniforms of the whole blocks come first, then those of a last block, over the tail of the one before.
    for (std::size_t i = 0; i + block <= count; i += block) {
        draw_block(values + i);
    }
    if (const std::size_t tail = count % block) {
        // PyTorch draws a word for each value of the tail before it draws its block anew.
        words_.discard(tail);
        draw_block(values + count - block);
    }
}

/// One 24-bit uniform each, then Box-Muller. All in float32: float64 is nearer to the true values and further from
/// PyTorch's.
void Generator::draw_block(float *values) {
    std::array<float, block> uniform{};
    for (float &value : uniform) {
        value = static_cast<float>(words_() & 0xFFFFFF) * 0x1p-24F;
    }
    for (std::size_t i = 0; i < block / 2; ++i) {
        const float radius = std::sqrt(-2.0F * std::log(1.0F - uniform[i]));
        const float angle = static_cast<float>(two_pi) * uniform[i + block / 2];
        values[i] = radius * std::cos(angle);
        values[i + block / 2] = radius * std::sin(angle);
    }
}

/// Box-Muller in float64 on 53-bit uniforms, the cosine first, then the sine; a sine that was not asked for is kept for
/// the next such draw.
void Generator::draw_few(float *values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        if (left_) {
            values[i] = static_cast<float>(*left_);
            left_.reset();
            continue;
        }
        const double angle = two_pi * uniform53();
        const double radius = std::sqrt(-2 * std::log1p(-uniform53()));
        values[i] = static_cast<float>(radius * std::cos(angle));
        left_ = radius * std::sin(angle);
    }
}

double Generator::uniform53() {
    const std::uint64_t high = words_();
    return static_cast<double>((high << 32 | words_()) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
}

} // namespace glance_trt
