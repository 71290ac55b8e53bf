// Prompts to token ids, by the tokenizer.json of a bundle.
#pragma once

#include "schema.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

/// A prompt as a text encoder takes it.
struct Encoded {
    std::vector<std::int64_t> ids;  // max_length of them: the tokens, special ones included, and padding
    std::vector<std::int64_t> mask; // 1 for a token, 0 for padding
    std::string dropped;            // the end of the prompt that did not fit, as the user wrote it
};

/// May be used from several threads at once.
class Tokenizer {
  public:
    virtual ~Tokenizer() = default;

    /// Encode a prompt, which is valid UTF-8, in its template; one that is too long loses its end, as
    /// docs/bundle-format.md says.
    virtual Encoded encode(std::string_view prompt) const = 0;
};

/// A tokenizer over the bytes of a tokenizer.json. `name` is what errors call the file. Throws `Error`: of the kind
/// bundle where the file is damaged or does not fit the item, of the kind unsupported where it asks for what is not
/// here.
std::unique_ptr<const Tokenizer> make_tokenizer(std::string_view json, const TokenizerItem &item,
                                                const std::string &name);

/// What was encoded elsewhere: pads the ids, and makes their mask. Throws `Error` of the kind input, in which `what` is
/// what the ids are called.
Encoded padded(const std::vector<std::int64_t> &ids, const TokenizerItem &item, const std::string &what);

} // namespace glance_trt
