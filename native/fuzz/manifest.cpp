// Any bytes are a manifest that holds what it must, or are refused in a short and printable text.
#include "manifest.hpp"
#include "error.hpp"

#include <algorithm>
#include <cstdlib>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    try {
        glance_trt::load_manifest({reinterpret_cast<const char *>(data), size}, "bundle.json");
    } catch (const glance_trt::Error &error) {
        const std::string_view text = error.what();
        const auto printable = [](char c) { return c >= 0x20 && c < 0x7F; };
        if (error.kind() != glance_trt::Kind::bundle || !std::all_of(text.begin(), text.end(), printable)) {
            std::abort();
        }
    }
    return 0;
}
