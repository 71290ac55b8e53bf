#include "inputs.hpp"

#include "error.hpp"
#include "text.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace glance_trt {
namespace {

/// The number that a dimension is a multiple of: 8 of 8*h.
std::int64_t multiple_of(const std::string &dimension) {
    const std::size_t star = dimension.find('*');
    const bool numbered = star != 0 && star <= 9 && dimension.find_first_not_of("0123456789") == star;
    return numbered ? std::max(1LL, std::stoll(dimension)) : 1;
}

std::string shown(const std::vector<Dimension> &shape) {
    std::vector<std::string> texts;
    for (const Dimension &dimension : shape) {
        texts.push_back(dimension.size ? std::to_string(dimension.size) : dimension.name);
    }
    return "(" + joined(texts, ",") + ")";
}

bool fits(const std::vector<Dimension> &shape, const Shape &got) {
    if (shape.size() != got.size()) {
        return false;
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
        const bool same = shape[i].size ? shape[i].size == got[i] : got[i] % multiple_of(shape[i].name) == 0;
        if (!same || got[i] == 0) {
            return false;
        }
    }
    return true;
}

} // namespace

void check_inputs(const std::string &graph, const std::vector<Port> &ports, const Specs &values) {
    std::map<std::string, std::pair<std::int64_t, std::string>> sizes; // of dimensions that have a name, and whose
    for (const Port &port : ports) {
        const auto &[dtype, shape] = values.at(port.name);
        const std::string got = graph + ": got " + port.name + " " + shown(shape);
        if (dtype != port.dtype) {
            throw Error(Kind::input, got + " " + dtype + "; this engine takes " + port.dtype);
        }
        if (!fits(port.shape, shape)) {
            throw Error(Kind::input, got + "; this engine takes " + shown(port.shape));
        }
        for (std::size_t i = 0; i < shape.size(); ++i) {
            const std::string &name = port.shape[i].name;
            if (name.empty()) {
                continue;
            }
            const auto [known, fresh] = sizes.try_emplace(name, shape[i], port.name);
            if (known->second.first != shape[i]) {
                const std::string &other = known->second.second;
                throw Error(Kind::input,
                            got + " and " + other + " " + shown(values.at(other).shape) + "; they differ in " + name);
            }
        }
    }
}

} // namespace glance_trt
