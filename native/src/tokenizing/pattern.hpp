// What tokenizer.json calls a pattern: a text, or a regular expression of Oniguruma's, for which ICU's stands in.
#pragma once

#include "strict.hpp"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

/// May be used from several threads at once.
class Pattern {
  public:
    /// Throws `Error` of the kind unsupported for an expression that the two might read differently.
    static Pattern regex(const std::string &expression, const std::string &path);
    static Pattern literal(const std::string &text);
    /// {"Regex": "..."} or {"String": "..."}. Throws `Mismatch`, and `Error` as above.
    static Pattern read(const Node &node);

    struct Match {
        std::size_t begin, end;
    };
    /// In order; empty matches are left out. Throws `Mismatch` where the search takes too long.
    std::vector<Match> matches(std::u32string_view text) const;

  private:
    struct Compiled;
    std::shared_ptr<const Compiled> compiled_;
};

} // namespace glance_trt
