// What images are made with: a user's wishes, checked against what a bundle can do and filled in from it.
#pragma once

#include "manifest.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace glance_trt {

/// A prompt, as text or as the ids of tokenizers.
struct Prompt {
    std::optional<std::string> text;
    std::map<std::string, std::vector<std::int64_t>> ids; // by tokenizer
};

/// An image to start from: RGB, rows from the top.
struct Picture {
    Size size;
    std::vector<std::uint8_t> pixels;
};

/// What a user asks for; what is left out is taken from the bundle.
struct Wishes {
    Prompt prompt;
    std::optional<Prompt> negative;
    std::optional<double> guidance_scale;
    std::optional<std::string> schedule;
    std::int64_t height = 0, width = 0; // pixels; 0: the usual one
    std::uint64_t seed = 0;
    std::int64_t count = 1, batch_size = 4;
    std::optional<std::vector<float>> latents;
    std::optional<Picture> image;
    std::optional<double> strength;
};

/// What a bundle makes of wishes.
struct Settings {
    const Schedule *schedule;
    Size size;
    float guidance_scale;           // 1 where the schedule's graphs take none
    std::optional<Prompt> negative; // where they take one
    std::size_t first_step;         // the first that runs, counted from 0
};

/// Throws `Error`: of the kind unsupported for an image that would have to be resized, else of the kind input.
Settings settle(const Manifest &manifest, const Wishes &wishes);

} // namespace glance_trt
