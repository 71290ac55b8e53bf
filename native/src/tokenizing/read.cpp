#include "tokenizing/read.hpp"

#include "error.hpp"
#include "limits.hpp"
#include "text.hpp"

namespace glance_trt {

std::optional<Node> member(const Node &node, const std::string &key) {
    const auto *object = node.value().as<json::Object>();
    if (!object) {
        node.fail("expected keys and values");
    }
    for (const auto &[name, value] : *object) {
        if (name == key && !value.as<std::nullptr_t>()) {
            return Node(value, node.path().empty() ? key : node.path() + "." + key);
        }
    }
    return std::nullopt;
}

Node required(const Node &node, const std::string &key) {
    if (auto found = member(node, key)) {
        return *std::move(found);
    }
    node.fail(key + " is missing");
}

bool flag(const Node &node, const std::string &key, bool otherwise) {
    const auto found = member(node, key);
    if (!found) {
        return otherwise;
    }
    if (const bool *value = found->value().as<bool>()) {
        return *value;
    }
    found->fail("expected true or false");
}

std::uint32_t token_id(const Node &node) {
    const auto value = node.whole().value();
    if (!value || *value < 0 || *value > limits::int32) {
        node.fail("expected the id of a token");
    }
    return static_cast<std::uint32_t>(*value);
}

void unsupported(const Node &node, const std::string &what) {
    throw Error(Kind::unsupported, node.path() + ": " + shown(what) +
                                       " is not supported by this version of the library; give token ids in place of "
                                       "prompts");
}

} // namespace glance_trt
