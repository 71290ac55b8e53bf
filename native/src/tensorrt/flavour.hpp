// TensorRT and TensorRT-RTX have one C++ interface under the same names, in headers and libraries of their own. What
// is compiled against such a header, in engine.cpp, is reached through this.
#pragma once

#include "device/cuda.hpp"
#include "schema.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace glance_trt::tensorrt {

/// A plan that may be opened. Opening one runs native code.
struct Plan {
    std::string name; // the graph's, for errors
    const Graph &graph;
    std::string content, sha256;
    bool version_compatible;                             // it then carries a runtime of its own version
    std::optional<std::int64_t> weight_streaming_budget; // MiB
    std::optional<std::string> cache;                    // as in Options
};

struct Flavour {
    const char *backend, *title, *module; // module: as requirements call it
    /// Of the library, such as "10.13.3.9". Throws `Error` of the kind target where it cannot be loaded.
    std::string (*version)();
    /// For a device that is the calling thread's, and outlives the engine. Throws `Error` of the kind target for a plan
    /// that this machine cannot open, and of the kind bundle for one of another graph.
    std::unique_ptr<DeviceEngine> (*open)(const Plan &plan, CudaDevice &device);
};

/// Each is there where CMake has found its header.
extern const Flavour tensorrt, tensorrt_rtx;

} // namespace glance_trt::tensorrt
