// Turns untrusted JSON into values of known types, and says exactly where it is wrong.
#pragma once

#include "json.hpp"

#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace glance_trt {

/// A value that does not fit its type; the text starts with the key path, such as graphs.decoder.inputs[0].
class Mismatch : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// Values by name, in the order of the manifest.
template <class T>
class Named {
  public:
    void add(std::string name, T value) {
        places_.emplace(name, items_.size());
        items_.emplace_back(std::move(name), std::move(value));
    }
    const T *find(const std::string &name) const {
        const auto place = places_.find(name);
        return place == places_.end() ? nullptr : &items_[place->second].second;
    }
    /// Of a name that is known to be there.
    const T &operator[](const std::string &name) const { return items_[places_.at(name)].second; }
    std::vector<std::string> names() const {
        std::vector<std::string> result;
        for (const auto &item : items_) {
            result.push_back(item.first);
        }
        return result;
    }
    auto begin() const { return items_.begin(); }
    auto end() const { return items_.end(); }
    bool empty() const { return items_.empty(); }

  private:
    std::vector<std::pair<std::string, T>> items_;
    std::unordered_map<std::string, std::size_t> places_;
};

/// A value, and the path of keys to it. Every function throws `Mismatch` where the value is of another type.
class Node {
  public:
    Node(const json::Value &value, std::string path) : value_(&value), path_(std::move(path)) {}

    const json::Value &value() const { return *value_; }
    const std::string &path() const { return path_; }
    [[noreturn]] void fail(const std::string &what) const;

    bool is_null() const { return value_->as<std::nullptr_t>() != nullptr; }
    const std::string &text() const;
    json::Whole whole() const;
    double number() const;
    std::variant<json::Whole, std::string> whole_or_text() const;
    /// One of these texts.
    const std::string &choice(const std::vector<std::string> &choices) const;
    std::vector<Node> list() const;
    std::vector<std::pair<std::string, Node>> object() const;

    template <class Read>
    auto list_of(const Read &read) const {
        std::vector<decltype(read(std::declval<Node>()))> result;
        for (const Node &item : list()) {
            result.push_back(read(item));
        }
        return result;
    }

    template <class Read>
    auto named(const Read &read) const {
        Named<decltype(read(std::declval<Node>()))> result;
        for (const auto &[name, item] : object()) {
            result.add(name, read(item));
        }
        return result;
    }

  private:
    const json::Value *value_;
    std::string path_;
};

/// An object whose keys are known; another key is refused at once.
class Fields {
  public:
    Fields(const Node &node, std::vector<std::string> names);

    /// A value that must be there.
    Node operator[](const std::string &name) const;
    /// One that may be: what `read` makes of it, or else `otherwise`.
    template <class T, class Read>
    T get(const std::string &name, T otherwise, const Read &read) const {
        const json::Value *value = find(name);
        return value ? static_cast<T>(read(Node(*value, path(name)))) : otherwise;
    }
    std::string path(const std::string &name) const;

  private:
    const json::Value *find(const std::string &name) const;

    Node node_;
};

// Ways to read the parts of parts.
inline std::string as_text(const Node &node) {
    return node.text();
}
inline json::Whole as_whole(const Node &node) {
    return node.whole();
}
inline double as_number(const Node &node) {
    return node.number();
}
inline std::vector<std::string> as_texts(const Node &node) {
    return node.list_of(as_text);
}
inline std::vector<json::Whole> as_wholes(const Node &node) {
    return node.list_of(as_whole);
}
inline std::vector<double> as_numbers(const Node &node) {
    return node.list_of(as_number);
}
inline Named<std::string> as_named_texts(const Node &node) {
    return node.named(as_text);
}

} // namespace glance_trt
