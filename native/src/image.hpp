// The sizes of a bundle's images, as its manifest has them.
#pragma once

#include "strict.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace glance_trt {

struct Size {
    std::int64_t height, width; // pixels

    bool operator==(const Size &other) const { return height == other.height && width == other.width; }
    bool operator!=(const Size &other) const { return !(*this == other); }
};

struct Sides {
    std::int64_t lowest, highest, multiple;
};

struct Tile {
    std::int64_t side, overlap;
};

struct Image {
    Size usual;
    std::int64_t latent_channels, latent_scale;
    std::vector<Size> sizes;
    std::optional<Sides> sides;
    std::optional<Tile> tile;

    /// Whether images of this size can be made.
    bool takes(const Size &size) const;
    /// [C, H, W] of the latents of an image of this size.
    std::vector<std::int64_t> latents_of(const Size &size) const;
};

/// What `sizes` of an image or a schedule holds.
std::vector<Size> read_sizes(const std::string &path, const std::vector<std::vector<json::Whole>> &sizes);
std::vector<std::vector<json::Whole>> as_lists_of_wholes(const Node &node);
Image read_image(const Node &node);

} // namespace glance_trt
