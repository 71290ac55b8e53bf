// Engines of ONNX Runtime: on a CPU, those that it has optimised for it; on a GPU, the portable graphs.
#pragma once

#include "engine.hpp"
#include "options.hpp"

#include <memory>

namespace glance_trt {

std::unique_ptr<Backend> make_onnxruntime(const Options &options);

} // namespace glance_trt
