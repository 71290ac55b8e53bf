// Any bytes are edited within their bounds, and keep their length.
#include "onnxruntime/shapes.hpp"

#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    std::string model(reinterpret_cast<const char *>(data), size);
    glance_trt::onnxruntime::forget_input_shapes(model);
    if (model.size() != size) {
        std::abort();
    }
    return 0;
}
