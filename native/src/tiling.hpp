// Latents to pixels in overlapping tiles, for images that are too large to be decoded whole.
#pragma once

#include "image.hpp"
#include "tensor.hpp"

#include <cstdint>
#include <functional>
#include <vector>

namespace glance_trt {

/// Gives the pixels [1, height, width, 3] uint8 of latents [1, C, height / scale, width / scale] float32.
using DecodeTile = std::function<Tensor(const Tensor &latents, const Size &size)>;

/// Whether images of this size are decoded in tiles.
bool is_tiled(const Image &image, const Size &size);

/// Decode the latents [C, h, w] of an image of this size tile by tile, and blend the pixels linearly where tiles
/// overlap, as docs/bundle-format.md says. Beside the result, memory holds the image in float32, and one tile.
std::vector<std::uint8_t> decode_in_tiles(const Image &image, const Size &size, const float *latents,
                                          const DecodeTile &decode);

} // namespace glance_trt
