// How a bundle's images are sampled, as its manifest has it: schedules, and guidance.
#pragma once

#include "image.hpp"
#include "strict.hpp"

#include <string>
#include <vector>

namespace glance_trt {

struct Step {
    std::string phase;
    float timestep;
    std::vector<float> coefficients;
    std::vector<float> mix; // empty, or of what an image's latents and noise are multiplied with
};

struct Schedule {
    std::vector<Step> steps;
    float initial_noise_scale;
    std::vector<Size> sizes; // empty: for all
    bool strength_rounded_up;

    bool fits(const Size &size) const;
};

struct Guidance {
    double scale;
    std::string negative_prompt;
    std::vector<double> range; // empty, or the lowest and the highest scale
};

Schedule read_schedule(const Node &node);
Guidance read_guidance(const Node &node);

} // namespace glance_trt
