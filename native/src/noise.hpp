// Gaussian noise as PyTorch's CPU generator draws it: a seed means the same noise as in diffusers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>

namespace glance_trt {

/// Draws as torch.Generator("cpu").manual_seed(seed) does, one draw after the other.
///
/// The bits are those of MT19937 seeded with the low 32 bits of the seed, as in PyTorch. What is left is the rounding
/// of log, sine and cosine, which stays below 1e-6. Draws of fewer than 16 values are equal to the bit.
class Generator {
  public:
    explicit Generator(std::uint64_t seed) : words_(static_cast<std::uint32_t>(seed)) {}

    /// The next draw: what torch.randn gives for `count` values.
    void draw(float *values, std::size_t count);

  private:
    void draw_block(float *values);
    void draw_few(float *values, std::size_t count);
    double uniform53();

    std::mt19937 words_;
    std::optional<double> left_; // of an odd number of values, drawn one by one
};

} // namespace glance_trt
