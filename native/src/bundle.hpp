// The bundle: a directory that its manifest describes, and that is vouched for by hashes.
#pragma once

#include "files.hpp"
#include "manifest.hpp"
#include "progress.hpp"
#include "records.hpp"

#include <string>
#include <utility>
#include <vector>

namespace glance_trt {

/// Files whose content was checked, and by what they were known then.
using Checked = std::vector<std::pair<std::string, Identity>>;

/// An opened bundle. It does not change, so that any number of threads may use it. All errors are of the kind bundle.
class Bundle {
  public:
    /// Read the manifest, and check that the directory holds exactly the listed files, with their sizes.
    explicit Bundle(const std::string &directory);

    const std::string &directory() const { return directory_; }
    const Manifest &manifest() const { return manifest_; }
    const std::string &text() const { return text_; }
    /// Of the manifest, which lists every other file's.
    const std::string &sha256() const { return sha256_; }
    std::string path(const std::string &name) const { return directory_ + "/" + name; }

    /// Compare files with their listed SHA-256. A large one that a record knows unchanged is not read again.
    Checked check(const std::vector<std::string> &names, const Record *record, const Progress &progress) const;
    /// Refuse files that are not any more what they were when they were checked.
    void confirm(const Checked &files) const;
    /// The content of a listed file, which has the listed SHA-256.
    std::string read(const std::string &name) const;

  private:
    void check_listing() const;
    [[noreturn]] void altered(const std::string &name) const;
    File open(const std::string &name) const;

    std::string directory_, text_, sha256_;
    Manifest manifest_;
};

} // namespace glance_trt
