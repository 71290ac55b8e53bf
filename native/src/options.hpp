// What a bundle is opened with; glance.h explains each.
#pragma once

#include "progress.hpp"

#include <optional>
#include <string>

namespace glance_trt {

struct Options {
    std::optional<std::string> target;
    int threads = 0;
    int device = 0;
    bool trust = false;
    std::string onnxruntime;
    std::optional<std::string> cache;
    Log log;
    Progress progress;
};

} // namespace glance_trt
