#include "strict.hpp"

#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace glance_trt {
namespace {

std::string join(const std::string &path, const std::string &key) {
    return path.empty() ? shown_key(key) : path + "." + shown_key(key);
}

std::string say(const std::string &path, const std::string &what) {
    return path.empty() ? what : path + ": " + what;
}

struct Described {
    std::string operator()(std::nullptr_t) const { return "nothing"; }
    std::string operator()(bool value) const { return value ? "true or false (True)" : "true or false (False)"; }
    std::string operator()(const json::Whole &value) const { return "a whole number (" + value.digits + ")"; }
    std::string operator()(double value) const { return "a number (" + shown(value) + ")"; }
    std::string operator()(const std::string &value) const { return "text (" + shown(value) + ")"; }
    std::string operator()(const json::List &) const { return "a list"; }
    std::string operator()(const json::Object &) const { return "keys and values"; }
};

/// What a value is, and what it holds.
std::string described(const json::Value &value) {
    return std::visit(Described{}, value.content);
}

} // namespace

void Node::fail(const std::string &what) const {
    throw Mismatch(say(path_, what));
}

const std::string &Node::text() const {
    if (const auto *text = value_->as<std::string>()) {
        return *text;
    }
    fail("expected text, got " + described(*value_));
}

json::Whole Node::whole() const {
    if (const auto *whole = value_->as<json::Whole>()) {
        return *whole;
    }
    fail("expected a whole number, got " + described(*value_));
}

double Node::number() const {
    if (const auto *number = value_->as<double>()) {
        return *number;
    }
    if (const auto *whole = value_->as<json::Whole>()) {
        return std::stod(whole->digits);
    }
    fail("expected a number, got " + described(*value_));
}

std::variant<json::Whole, std::string> Node::whole_or_text() const {
    if (const auto *whole = value_->as<json::Whole>()) {
        return *whole;
    }
    if (const auto *text = value_->as<std::string>()) {
        return *text;
    }
    fail("expected a whole number or text, got " + described(*value_));
}

const std::string &Node::choice(const std::vector<std::string> &choices) const {
    const auto *text = value_->as<std::string>();
    if (text && std::find(choices.begin(), choices.end(), *text) != choices.end()) {
        return *text;
    }
    const std::string close = text ? closest(*text, choices) : "";
    fail("expected one of " + joined(choices) + "; got " + described(*value_) +
         (close.empty() ? "" : "; did you mean " + shown(close) + "?"));
}

std::vector<Node> Node::list() const {
    const auto *items = value_->as<json::List>();
    if (!items) {
        fail("expected a list, got " + described(*value_));
    }
    std::vector<Node> result;
    for (const json::Value &item : *items) {
        result.emplace_back(item, path_ + "[" + std::to_string(result.size()) + "]");
    }
    return result;
}

std::vector<std::pair<std::string, Node>> Node::object() const {
    const auto *items = value_->as<json::Object>();
    if (!items) {
        fail("expected keys and values, got " + described(*value_));
    }
    std::vector<std::pair<std::string, Node>> result;
    for (const auto &[key, value] : *items) {
        result.emplace_back(key, Node(value, join(path_, key)));
    }
    return result;
}

Fields::Fields(const Node &node, std::vector<std::string> names) : node_(node) {
    for (const auto &[key, item] : node.object()) {
        if (std::find(names.begin(), names.end(), key) == names.end()) {
            const std::string close = closest(shown_key(key), names);
            item.fail("unknown key; " +
                      (close.empty() ? "known: " + joined(names) : "did you mean " + shown(close) + "?"));
        }
    }
}

Node Fields::operator[](const std::string &name) const {
    const json::Value *value = find(name);
    if (!value) {
        throw Mismatch(path(name) + ": missing");
    }
    return {*value, path(name)};
}

std::string Fields::path(const std::string &name) const {
    return join(node_.path(), name);
}

const json::Value *Fields::find(const std::string &name) const {
    for (const auto &[key, value] : *node_.value().as<json::Object>()) {
        if (key == name) {
            return &value;
        }
    }
    return nullptr;
}

} // namespace glance_trt
