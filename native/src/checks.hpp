// What must hold between the parts of a manifest.
#pragma once

#include "manifest.hpp"

namespace glance_trt {

/// Throws `Mismatch`.
void check_parts(const Manifest &manifest);

} // namespace glance_trt
