// Plans of TensorRT and of TensorRT-RTX, on an NVIDIA GPU.
#pragma once

#include "engine.hpp"
#include "tensorrt/flavour.hpp"

#include <memory>

namespace glance_trt {

/// options: outlive the backend.
std::unique_ptr<Backend> make_tensorrt(const tensorrt::Flavour &flavour, const Options &options);

} // namespace glance_trt
