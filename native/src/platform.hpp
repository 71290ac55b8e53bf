// What engines are built for, but for libraries and GPUs. By the names that the Python package has for it.
#pragma once

#include <string>

namespace glance_trt {

/// Operating system and CPU architecture, such as linux-x86_64.
std::string this_platform();
/// The CPU's family of vector instructions, such as x86_64-avx512.
std::string cpu_family();

} // namespace glance_trt
