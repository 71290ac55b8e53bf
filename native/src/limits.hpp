// What a bundle may hold at most, and checks that say where it does not, by throwing `Mismatch`. docs/bundle-format.md
// gives the same figures.
#pragma once

#include "json.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace glance_trt::limits {

constexpr std::size_t manifest_bytes = 1 << 20;
constexpr std::int64_t image_side = 8192; // pixels
constexpr std::int64_t tensor_elements = 1 << 28;
constexpr std::int64_t tensor_rank = 8;
constexpr std::int64_t schedule_steps = 1000;
constexpr std::int64_t prompt_tokens = 1 << 16;
constexpr std::int64_t int32 = INT32_MAX;
constexpr std::int64_t int64 = INT64_MAX;

/// Whether a name may name something in a bundle.
bool is_name(const std::string &name);
bool is_float32(double value);

void check_name(const std::string &path, const std::string &name);
/// Names of files in one folder that also holds `reserved`: valid and distinct on every system.
void check_file_names(const std::string &path, const std::vector<std::string> &names, const std::string &reserved);
void check_distinct(const std::string &path, const std::vector<std::string> &names);
std::int64_t check_range(const std::string &path, const json::Whole &value, std::int64_t low, std::int64_t high);
void check_float32(const std::string &path, double value);
/// A tensor of that shape is of a size that one image can need.
void check_elements(const std::string &path, const std::vector<std::int64_t> &shape);
void check_sha256(const std::string &path, const std::string &digest);

} // namespace glance_trt::limits
