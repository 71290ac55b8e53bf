#include "tokenizing/pattern.hpp"

#include "error.hpp"
#include "text.hpp"
#include "tokenizing/icu.hpp"
#include "tokenizing/read.hpp"

#include <unicode/regex.h>

namespace glance_trt {
namespace {

constexpr std::int32_t time_limit = 10000; // steps of the matcher, of about a millisecond each

/// An expression for ICU. Both read alike what is allowed here; \s alone differs, by two control characters.
std::string translated(const std::string &expression, const std::string &path) {
    const auto refuse = [&](const std::string &what) {
        throw Error(Kind::unsupported, path + ": the regular expression has " + what + ", which is not supported; "
                                              "give token ids in place of prompts");
    };
    std::string result;
    bool in_class = false;
    for (std::size_t i = 0; i < expression.size(); ++i) {
        const char c = expression[i];
        const char next = i + 1 < expression.size() ? expression[i + 1] : '\0';
        if (c == '\\') {
            ++i;
            if (next == 's' || next == 'S') {
                result += next == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
            } else if (std::string_view("pPrnt").find(next) != std::string_view::npos || std::ispunct(next)) {
                result += {c, next};
            } else {
                refuse(shown(std::string{c, next}));
            }
            continue;
        }
        if (in_class && (c == '[' || c == '&')) {
            refuse("a set within a set");
        }
        if (!in_class && c == '(' && next == '?') {
            const std::string_view rest = std::string_view(expression).substr(i + 2);
            const auto begins = [rest](std::string_view kind) { return rest.substr(0, kind.size()) == kind; };
            if (!begins(":") && !begins("i:") && !begins("!") && !begins("=")) {
                refuse(shown(expression.substr(i, 4)));
            }
        }
        in_class = c == '[' || (in_class && c != ']');
        result += c;
    }
    return result;
}

} // namespace

struct Pattern::Compiled {
    std::unique_ptr<icu::RegexPattern> regex;

    Compiled(const std::string &expression, std::uint32_t flags, const std::string &path) {
        UErrorCode status = U_ZERO_ERROR;
        UParseError place;
        regex.reset(icu::RegexPattern::compile(icu::UnicodeString::fromUTF8(expression), flags, place, status));
        if (U_FAILURE(status)) {
            throw Mismatch(path + ": not a regular expression (" + u_errorName(status) + ")");
        }
    }
};

Pattern Pattern::regex(const std::string &expression, const std::string &path) {
    Pattern result;
    result.compiled_ = std::make_shared<Compiled>(translated(expression, path), 0, path);
    return result;
}

Pattern Pattern::literal(const std::string &text) {
    Pattern result;
    result.compiled_ = std::make_shared<Compiled>(text, UREGEX_LITERAL, "pattern");
    return result;
}

Pattern Pattern::read(const Node &node) {
    if (const auto text = member(node, "String")) {
        return literal(text->text());
    }
    const Node expression = required(node, "Regex");
    return regex(expression.text(), expression.path());
}

std::vector<Pattern::Match> Pattern::matches(std::u32string_view text) const {
    const icu::UnicodeString units = to_icu(text);
    std::vector<std::size_t> place(static_cast<std::size_t>(units.length()) + 1, text.size()); // by UTF-16 unit
    for (std::size_t i = 0, unit = 0; i < text.size(); ++i) {
        place[unit] = i;
        unit += text[i] > 0xFFFF ? 2 : 1;
    }
    UErrorCode status = U_ZERO_ERROR;
    const std::unique_ptr<icu::RegexMatcher> matcher(compiled_->regex->matcher(units, status));
    std::vector<Match> result;
    if (U_SUCCESS(status)) {
        matcher->setTimeLimit(time_limit, status);
    }
    while (U_SUCCESS(status) && matcher->find(status)) {
        const auto begin = static_cast<std::size_t>(matcher->start(status));
        const auto end = static_cast<std::size_t>(matcher->end(status));
        if (begin < end) {
            result.push_back({place[begin], place[end]});
        }
    }
    if (U_FAILURE(status)) {
        throw Mismatch(std::string("a regular expression fails on a prompt (") + u_errorName(status) + ")");
    }
    return result;
}

} // namespace glance_trt
