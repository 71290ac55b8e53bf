#include "limits.hpp"

#include "strict.hpp"
#include "text.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <unordered_map>
#include <unordered_set>

namespace glance_trt::limits {
namespace {

// Not those of <cctype>, which ask the locale.
bool is_digit(char c) {
    return c >= '0' && c <= '9';
}
char lower(char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](char c) { return lower(c); });
    return text;
}

bool is_name_character(char c) {
    return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z') || c == '.' || c == '_' || c == '-';
}

/// What Windows does not take for a device, nor cuts short, in any folder.
bool is_portable(const std::string &name) {
    const std::string stem = lower(name.substr(0, name.find('.')));
    const std::string device = stem.substr(0, 3);
    const bool numbered = stem.size() == 4 && (device == "com" || device == "lpt") && is_digit(stem[3]);
    return !numbered && stem != "con" && stem != "prn" && stem != "aux" && stem != "nul" && name.back() != '.';
}

} // namespace

bool is_name(const std::string &name) {
    return !name.empty() && name.size() <= 64 && name != "." && name != ".." &&
           std::all_of(name.begin(), name.end(), is_name_character);
}

bool is_float32(double value) {
    return std::abs(value) <= static_cast<double>(FLT_MAX);
}

void check_name(const std::string &path, const std::string &name) {
    if (!is_name(name)) {
        throw Mismatch(path + ": " + shown(name) +
                       " is no valid name; names are 1 to 64 of A-Z a-z 0-9 . _ -, not . or ..");
    }
}

void check_file_names(const std::string &path, const std::vector<std::string> &names, const std::string &reserved) {
    std::unordered_map<std::string, std::string> seen = {{lower(reserved), reserved}};
    for (const std::string &name : names) {
        check_name(path, name);
        if (!is_portable(name)) {
            throw Mismatch(path + ": '" + name + "' cannot be a file's name on Windows; rename it");
        }
        const auto [place, fresh] = seen.emplace(lower(name), name);
        if (!fresh) {
            throw Mismatch(path + ": '" + name + "' and '" + place->second +
                           "' are one file where case does not count");
        }
    }
}

void check_distinct(const std::string &path, const std::vector<std::string> &names) {
    std::unordered_set<std::string> seen;
    for (const std::string &name : names) {
        if (!seen.insert(name).second) {
            throw Mismatch(path + ": '" + name + "' stands twice");
        }
    }
}

std::int64_t check_range(const std::string &path, const json::Whole &value, std::int64_t low, std::int64_t high) {
    const auto number = value.value();
    if (!number || *number < low || *number > high) {
        throw Mismatch(path + ": expected a whole number from " + std::to_string(low) + " to " + std::to_string(high) +
                       ", got " + value.digits);
    }
    return *number;
}

void check_float32(const std::string &path, double value) {
    if (!is_float32(value)) {
        throw Mismatch(path + ": expected a number that float32 can hold, got " + shown(value));
    }
}

void check_elements(const std::string &path, const std::vector<std::int64_t> &shape) {
    std::int64_t elements = 1;
    for (const std::int64_t size : shape) {
        if (__builtin_mul_overflow(elements, size, &elements)) {
            throw Mismatch(path + ": expected at most " + std::to_string(tensor_elements) + " elements, got more");
        }
    }
    if (elements > tensor_elements) {
        throw Mismatch(path + ": expected at most " + std::to_string(tensor_elements) + " elements, got " +
                       std::to_string(elements));
    }
}

void check_sha256(const std::string &path, const std::string &digest) {
    const auto hexadecimal = [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); };
    if (digest.size() != 64 || !std::all_of(digest.begin(), digest.end(), hexadecimal)) {
        throw Mismatch(path + ": expected 64 hexadecimal digits in lower case, got " + shown(digest));
    }
}

} // namespace glance_trt::limits
