#include "abi/handles.hpp"

struct glance_error {
    glance_trt::Kind kind;
    std::string text;
};

namespace glance_trt {
namespace {

/// Stands for an error that there is no memory for. Its text is short enough to lie in the object.
const glance_error no_memory = {Kind::other, "no memory"};

} // namespace

glance_error *make_error(Kind kind, const char *text) noexcept {
    try {
        return new glance_error{kind, text};
    } catch (...) {
        return const_cast<glance_error *>(&no_memory); // which glance.h offers no way to change
    }
}

} // namespace glance_trt

extern "C" {

const char *glance_version(void) {
    return GLANCE_VERSION;
}

int32_t glance_error_kind(const glance_error *error) {
    return static_cast<int32_t>(error->kind);
}

const char *glance_error_message(const glance_error *error) {
    return error->text.c_str();
}

void glance_error_free(glance_error *error) {
    if (error != &glance_trt::no_memory) {
        delete error;
    }
}
}
