#include "error.hpp"

#include <system_error>

namespace glance_trt {

Error system_error(Kind kind, const std::string &path, int number) {
    return Error(kind, path + ": " + std::generic_category().message(number));
}

} // namespace glance_trt
