// Engines of ONNX Runtime: on a CPU, those that it has optimised for it; on a GPU, the portable graphs.
#pragma once

#include "engine.hpp"
#include "options.hpp"

#include <memory>
#include <string>

namespace glance_trt {

std::unique_ptr<Backend> make_onnxruntime(const Options &options);

/// The family of this machine's CPU, such as x86_64-avx512.
std::string cpu_family();

} // namespace glance_trt
