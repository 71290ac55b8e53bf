// Tokens that are looked for in the text itself, before anything else happens to it, such as <|endoftext|>.
#pragma once

#include "tokenizing/characters.hpp"
#include "tokenizing/model.hpp"
#include "tokenizing/normalizer.hpp"
#include "tokenizing/trie.hpp"

#include <functional>
#include <vector>

namespace glance_trt {

class AddedTokens {
  public:
    /// The list of a tokenizer.json. A token of the model's vocabulary has its id there. Throws `Mismatch`.
    AddedTokens(const Node &node, const TokenModel &model, const Normalizer *normalizer);

    /// Calls `token` for each that is found, and `between` for the text around them, normalized, in order.
    void split(const Characters &text, const Normalizer *normalizer, const std::function<void(Token)> &token,
               const std::function<void(const Characters &)> &between) const;

    bool has(std::uint32_t id) const;

  private:
    struct Added {
        std::uint32_t id;
        bool single_word, left, right; // whether it must be a word of its own, and takes the space before and after it
    };
    void search(const Characters &text, const Trie &words, const std::function<void(Token)> &token,
                const std::function<void(const Characters &)> &between) const;

    std::vector<Added> tokens_;
    Trie as_written_; // to places in tokens_
    Trie normalized_;
};

} // namespace glance_trt
