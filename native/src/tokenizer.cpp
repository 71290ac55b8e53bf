#include "tokenizer.hpp"

#include "error.hpp"
#include "limits.hpp"

namespace glance_trt {

std::unique_ptr<const Tokenizer> make_tokenizer(std::string_view /*json*/, const TokenizerItem & /*item*/,
                                                const std::string &name) {
    throw Error(Kind::unsupported, name + ": this version of the library does not tokenize; give token ids in place of "
                                          "prompts");
}

Encoded padded(const std::vector<std::int64_t> &ids, const TokenizerItem &item, const std::string &what) {
    const auto length = static_cast<std::size_t>(item.max_length);
    if (ids.empty() || ids.size() > length) {
        throw Error(Kind::input, what + ": expected 1 to " + std::to_string(length) + " token ids, got " +
                                     std::to_string(ids.size()));
    }
    for (const std::int64_t id : ids) {
        if (id < 0 || id > limits::int32) {
            throw Error(Kind::input, what + ": expected token ids from 0 to " + std::to_string(limits::int32) +
                                         ", got " + std::to_string(id));
        }
    }
    Encoded encoded = {ids, std::vector<std::int64_t>(ids.size(), 1), ""};
    encoded.ids.resize(length, item.pad_token_id);
    encoded.mask.resize(length, 0);
    return encoded;
}

} // namespace glance_trt
