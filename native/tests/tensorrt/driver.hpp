// What the stand-ins for TensorRT and for the CUDA driver know of each other.
#pragma once

#include <functional>

/// Work for a stream of the stand-in for the driver.
extern "C" __attribute__((visibility("default"))) void standin_enqueue(void *stream, const std::function<void()> &work);
