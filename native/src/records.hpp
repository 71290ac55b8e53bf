// The record of large files that were hashed already, in this user's cache folder; the Python package shares it.
#pragma once

#include <optional>
#include <string>

namespace glance_trt {

class Record {
  public:
    /// folder: by default the user's; an empty one keeps no record.
    explicit Record(const std::optional<std::string> &folder);

    /// The SHA-256 of a file of this identity; empty where it is not known.
    std::string find(const std::string &identity) const;
    /// What cannot be written is left: a record saves time, no more.
    void add(const std::string &identity, const std::string &sha256) const;

  private:
    std::string path_; // empty where there is none
};

} // namespace glance_trt
