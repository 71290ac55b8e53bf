// Small records in this user's cache folder, which the Python package shares: what was hashed already, which plans are
// trusted.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace glance_trt {

/// The SHA-256 of large files, by their identity.
constexpr const char *hashed_record = "hashed.json";
/// The SHA-256 of plans that were built here.
constexpr const char *trusted_record = "trusted.json";

/// A file of the cache folder, which is by default the user's; empty where there is none, or where another user could
/// have written it.
std::string read_cached(const std::optional<std::string> &folder, const std::string &name);
/// What cannot be written is left: it saves time, no more. An empty folder keeps nothing.
void write_cached(const std::optional<std::string> &folder, const std::string &name, const std::string &content);

class Record {
  public:
    /// folder: as above.
    Record(std::optional<std::string> folder, std::string name) : folder_(std::move(folder)), name_(std::move(name)) {}

    bool contains(const std::string &key) const;
    /// The SHA-256 of a file of this identity; empty where it is not known.
    std::string find(const std::string &identity) const;
    void add(const std::string &identity, const std::string &sha256) const;

  private:
    std::optional<std::string> folder_;
    std::string name_;
};

} // namespace glance_trt
