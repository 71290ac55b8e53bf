// What an image asks of a runner: the calls of graphs, and the values that they take, by name.
//
// Values that are the same for every step are called as the graphs' inputs' sources are, such as guidance_scale and
// condition.prompt_embeds. Those of step i, counted from 0 in the schedule, are timestep.i and coefficients.i.
#pragma once

#include "engine.hpp"
#include "settings.hpp"
#include "tensor.hpp"

#include <string>
#include <vector>

namespace glance_trt {

/// What a step takes and puts out.
constexpr const char *latents_value = "latents";
/// What the decoder puts out.
constexpr const char *pixels_value = "pixels";

/// A graph, to the named value; `step` is that of the schedule's table.
Call call_of(const Manifest &manifest, const std::string &graph, const std::string &value, std::size_t step = 0);
/// The steps that run.
std::vector<Call> calls_of(const Manifest &manifest, const Settings &settings);
/// All that they take for a batch of images of one prompt, but the latents. conditions, negative: of one image.
Tensors values_of(const Settings &settings, const Tensors &conditions, const Tensors &negative, std::size_t count);

} // namespace glance_trt
