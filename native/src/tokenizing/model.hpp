// The models of a tokenizer.json: they turn pieces of text into tokens.
#pragma once

#include "strict.hpp"
#include "tokenizing/characters.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace glance_trt {

/// A token, and the byte of the user's text at which it begins.
struct Token {
    std::uint32_t id;
    std::size_t origin;
};

/// May be used from several threads at once.
class TokenModel {
  public:
    virtual ~TokenModel() = default;
    virtual void tokenize(const Characters &piece, std::vector<Token> &tokens) const = 0;
    virtual std::optional<std::uint32_t> id_of(const std::string &token) const = 0;
    virtual bool has(std::uint32_t id) const = 0;
};

/// Throws `Mismatch`, and `Error` of the kind unsupported.
std::unique_ptr<const TokenModel> read_model(const Node &node);
std::unique_ptr<const TokenModel> read_bpe(const Node &node);
std::unique_ptr<const TokenModel> read_unigram(const Node &node);

} // namespace glance_trt
