#include "tiling.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace glance_trt {
namespace {

/// A tile along one axis: where it starts, in latents, and what its pixels are multiplied with.
struct Span {
    std::int64_t start, length;
    std::vector<float> weights;
};

/// Tiles that cover an axis: as few as may be, all of one size, evenly spread. All numbers are of latents.
std::vector<std::pair<std::int64_t, std::int64_t>> cut(std::int64_t length, std::int64_t side, std::int64_t overlap) {
    if (length <= side) {
        return {{0, length}};
    }
    const std::int64_t rest = length - side, step = side - overlap;
    const std::int64_t last = (rest + step - 1) / step;
    std::vector<std::pair<std::int64_t, std::int64_t>> tiles;
    for (std::int64_t i = 0; i <= last; ++i) {
        const std::int64_t start = (2 * i * rest + last) / (2 * last); // rounded
        tiles.emplace_back(start, start + side);
    }
    return tiles;
}

/// Linear over an overlap, and 1 in all at each pixel.
std::vector<Span> weighed(std::int64_t length, std::int64_t side, std::int64_t overlap, std::int64_t scale) {
    const auto tiles = cut(length, side, overlap);
    std::vector<double> total(static_cast<std::size_t>(length * scale));
    std::vector<std::vector<double>> ramps;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
        const std::int64_t start = tiles[i].first * scale, end = tiles[i].second * scale;
        const auto before = static_cast<double>(i ? tiles[i - 1].second * scale - start : 0);
        const auto after = static_cast<double>(i + 1 < tiles.size() ? end - tiles[i + 1].first * scale : 0);
        std::vector<double> ramp;
        for (std::int64_t pixel = start; pixel < end; ++pixel) {
            const double place = static_cast<double>(pixel) + 0.5;
            double weight = 1;
            if (before > 0) {
                weight = std::min(weight, (place - static_cast<double>(start)) / before);
            }
            if (after > 0) {
                weight = std::min(weight, (static_cast<double>(end) - place) / after);
            }
            ramp.push_back(weight);
            total[static_cast<std::size_t>(pixel)] += weight;
        }
        ramps.push_back(std::move(ramp));
    }
    std::vector<Span> spans;
    for (std::size_t i = 0; i < tiles.size(); ++i) {
        Span span = {tiles[i].first, tiles[i].second - tiles[i].first, {}};
        for (std::size_t k = 0; k < ramps[i].size(); ++k) {
            // Two tiles make 1 already; where a third reaches the place, they do not.
            const double sum = total[static_cast<std::size_t>(tiles[i].first * scale) + k];
            span.weights.push_back(static_cast<float>(ramps[i][k] / sum));
        }
        spans.push_back(std::move(span));
    }
    return spans;
}

/// The latents of one tile, [1, C, rows, columns].
Tensor crop(const float *latents, const Shape &shape, const Span &rows, const Span &columns) {
    std::vector<float> content;
    for (std::int64_t channel = 0; channel < shape[0]; ++channel) {
        for (std::int64_t row = rows.start; row < rows.start + rows.length; ++row) {
            const float *first = latents + (channel * shape[1] + row) * shape[2] + columns.start;
            content.insert(content.end(), first, first + columns.length);
        }
    }
    return {"float32", {1, shape[0], rows.length, columns.length}, content};
}

/// Add a tile's weighed pixels to an image of this width.
void add(const Tensor &tile, const Span &rows, const Span &columns, std::int64_t scale, std::int64_t width,
         std::vector<float> &image) {
    const auto *pixel = tile.data<std::uint8_t>();
    for (std::size_t y = 0; y < rows.weights.size(); ++y) {
        const auto row = static_cast<std::size_t>(rows.start * scale) + y;
        float *place = image.data() +
                       (row * static_cast<std::size_t>(width) + static_cast<std::size_t>(columns.start * scale)) * 3;
        for (const float across : columns.weights) {
            const float weight = rows.weights[y] * across;
            for (int channel = 0; channel < 3; ++channel) {
                *place++ += static_cast<float>(*pixel++) * weight;
            }
        }
    }
}

} // namespace

bool is_tiled(const Image &image, const Size &size) {
    return image.tile && std::max(size.height, size.width) > image.tile->side;
}

std::vector<std::uint8_t> decode_in_tiles(const Image &image, const Size &size, const float *latents,
                                          const DecodeTile &decode) {
    const std::int64_t scale = image.latent_scale, side = image.tile->side / scale,
                       overlap = image.tile->overlap / scale;
    const Shape shape = image.latents_of(size);
    std::vector<float> blended(static_cast<std::size_t>(size.height * size.width * 3));
    const std::vector<Span> columns = weighed(shape[2], side, overlap, scale);
    for (const Span &down : weighed(shape[1], side, overlap, scale)) {
        for (const Span &across : columns) {
            const Size part = {down.length * scale, across.length * scale};
            add(decode(crop(latents, shape, down, across), part), down, across, scale, size.width, blended);
        }
    }
    std::vector<std::uint8_t> pixels(blended.size());
    std::transform(blended.begin(), blended.end(), pixels.begin(),
                   [](float value) { return static_cast<std::uint8_t>(std::nearbyint(value)); });
    return pixels;
}

} // namespace glance_trt
