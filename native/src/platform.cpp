#include "platform.hpp"

#include <algorithm>
#include <cctype>

#include <sys/utsname.h>

namespace glance_trt {
namespace {

std::string architecture(const utsname &system) {
    const std::string machine = system.machine;
    return machine == "amd64" ? "x86_64" : machine == "arm64" ? "aarch64" : machine;
}

utsname asked() {
    utsname system{};
    uname(&system);
    return system;
}

} // namespace

std::string this_platform() {
    const utsname system = asked();
    std::string name = system.sysname;
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    return name + "-" + architecture(system);
}

std::string cpu_family() {
    std::string machine = architecture(asked());
#ifdef __x86_64__
    if (machine == "x86_64") {
        return __builtin_cpu_supports("avx512f") ? "x86_64-avx512"
               : __builtin_cpu_supports("avx2")  ? "x86_64-avx2"
                                                 : "x86_64";
    }
#endif
    return machine;
}

} // namespace glance_trt
