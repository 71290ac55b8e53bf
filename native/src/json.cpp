#include "json.hpp"

#include "text.hpp"

#include <algorithm>
#include <charconv>
#include <unordered_set>

#include <nlohmann/json.hpp>

namespace glance_trt::json {
namespace {

constexpr std::size_t most_digits = 20; // no field takes more
constexpr std::size_t most_nested = 64; // a manifest nests 8 deep
constexpr std::size_t most_reason = 200;
constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";

/// Builds a `Value` from the events of nlohmann's parser, whose own values lose the second of two keys.
class Builder : public nlohmann::json_sax<nlohmann::json> {
  public:
    Value take() { return std::move(root_); }
    const std::string &reason() const { return reason_; }

    bool null() override { return scalar(nullptr); }
    bool boolean(bool value) override { return scalar(value); }
    bool number_integer(number_integer_t value) override { return scalar(Whole{std::to_string(value)}); }
    bool number_unsigned(number_unsigned_t value) override { return scalar(Whole{std::to_string(value)}); }
    bool number_float(number_float_t value, const string_t &text) override {
        if (!is_whole(text)) {
            return scalar(value);
        }
        return text.size() <= most_digits ? scalar(Whole{text}) : refuse_digits(text);
    }
    bool string(string_t &value) override { return scalar(std::move(value)); }
    bool binary(binary_t & /*value*/) override { return false; } // JSON has none

    bool start_object(std::size_t /*size*/) override { return open(Object{}); }
    bool end_object() override { return close(); }
    bool start_array(std::size_t /*size*/) override { return open(List{}); }
    bool end_array() override { return close(); }
    bool key(string_t &name) override {
        if (!open_.back().keys.insert(name).second) {
            return refuse("key " + shown(name) + " stands twice");
        }
        std::get<Object>(open_.back().value->content).emplace_back().first = std::move(name);
        return true;
    }
    bool parse_error(std::size_t /*position*/, const std::string &token,
                     const nlohmann::detail::exception &error) override {
        // A whole number beyond any floating-point one arrives here.
        return is_whole(token) && token.size() > most_digits ? refuse_digits(token) : refuse(error.what());
    }

  private:
    struct Open {
        Value *value; // stays in place: what holds it grows only when it is closed
        std::unordered_set<std::string> keys;
    };

    static bool is_whole(const std::string &text) {
        return !text.empty() && text.find_first_not_of("-0123456789") == std::string::npos;
    }

    /// The place of the next value.
    Value &next() {
        if (open_.empty()) {
            return root_;
        }
        Value &parent = *open_.back().value;
        if (auto *list = std::get_if<List>(&parent.content)) {
            return list->emplace_back();
        }
        return std::get<Object>(parent.content).back().second;
    }

    template <class T>
    bool scalar(T &&content) {
        next().content = std::forward<T>(content);
        return true;
    }

    template <class T>
    bool open(T &&content) {
        if (open_.size() == most_nested) {
            return refuse("nested more than " + std::to_string(most_nested) + " deep");
        }
        Value &value = next();
        value.content = std::forward<T>(content);
        open_.push_back({&value, {}});
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    bool refuse_digits(const std::string &text) {
        return refuse("a whole number of " + std::to_string(text.size()) + " digits");
    }

    bool refuse(std::string reason) {
        if (reason_.empty()) {
            if (const std::size_t end = reason.find("] "); reason.front() == '[' && end != std::string::npos) {
                reason.erase(0, end + 2); // nlohmann's name of the exception
            }
            for (char &c : reason) {
                c = c >= 0x20 && c < 0x7F ? c : '?'; // it quotes what it read
            }
            reason_ = reason.substr(0, most_reason);
        }
        return false;
    }

    Value root_;
    std::vector<Open> open_;
    std::string reason_;
};

} // namespace

std::optional<std::int64_t> Whole::value() const {
    std::int64_t result = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), result);
    return error == std::errc() ? std::optional(result) : std::nullopt;
}

Value parse(std::string_view text) {
    if (text.substr(0, byte_order_mark.size()) == byte_order_mark) {
        throw Malformed("begins with a byte order mark (BOM)"); // which nlohmann's parser would skip
    }
    Builder builder;
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) {
        throw Malformed(builder.reason());
    }
    return builder.take();
}

std::string quoted(const std::string &text) {
    return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

} // namespace glance_trt::json
