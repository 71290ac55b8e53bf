// Any bytes are a tokenizer.json with a prompt before it, up to a zero: they become tokens, or are refused.
#include "error.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

#include <cstdlib>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const std::string_view all(reinterpret_cast<const char *>(data), size);
    const std::string_view prompt = all.substr(0, all.find('\0'));
    const std::string_view json = all.substr(std::min(prompt.size() + 1, size));
    if (glance_trt::valid_utf8(prompt) != prompt.size()) {
        return 0; // which is refused before it comes here
    }
    try {
        const auto tokenizer = glance_trt::make_tokenizer(json, {"tokenizer.json", 16, 0, "{}"}, "tokenizer.json");
        const glance_trt::Encoded encoded = tokenizer->encode(prompt);
        if (encoded.ids.size() != 16 || encoded.mask.size() != 16 || encoded.dropped.size() > prompt.size()) {
            std::abort();
        }
    } catch (const glance_trt::Error &error) {
        if (error.kind() != glance_trt::Kind::bundle && error.kind() != glance_trt::Kind::unsupported) {
            std::abort();
        }
    }
    return 0;
}
