#include "bundle.hpp"

#include "error.hpp"
#include "limits.hpp"
#include "text.hpp"

#include <cerrno>
#include <memory>
#include <unordered_set>

#include <dirent.h>
#include <sys/stat.h>

namespace glance_trt {
namespace {

constexpr std::uint64_t always_hashed_below = 4 << 20; // bytes: it takes two milliseconds, and needs no record

/// Without slashes at its end.
std::string plain(std::string directory) {
    while (directory.size() > 1 && directory.back() == '/') {
        directory.pop_back();
    }
    return directory;
}

std::string read_manifest(const std::string &directory) {
    struct stat status {};
    if (stat(directory.c_str(), &status) != 0) {
        throw Error(Kind::bundle,
                    directory + ": no such folder; a bundle is made with: glance-trt build RECIPE -o " + directory);
    }
    if (!S_ISDIR(status.st_mode)) {
        throw Error(Kind::bundle, directory + ": a file; a bundle is a folder, which glance-trt build makes");
    }
    const std::string path = directory + "/" + manifest_name;
    if (lstat(path.c_str(), &status) != 0 && errno == ENOENT) {
        throw Error(Kind::bundle, directory + ": not a bundle, it has no " + manifest_name);
    }
    const File file(path);
    if (file.identity().size > limits::manifest_bytes) {
        throw Error(Kind::bundle, path + ": more than " + std::to_string(limits::manifest_bytes) +
                                      " bytes, which is the most that is read");
    }
    return file.read();
}

std::vector<std::string> entries_of(const std::string &directory) {
    const auto close = [](DIR *folder) { closedir(folder); };
    const std::unique_ptr<DIR, decltype(close)> folder(opendir(directory.c_str()), close);
    if (!folder) {
        throw system_error(Kind::bundle, directory, errno);
    }
    std::vector<std::string> names;
    errno = 0;
    while (const dirent *entry = readdir(folder.get())) {
        const std::string name = entry->d_name;
        if (name != "." && name != "..") {
            names.push_back(name);
        }
    }
    if (errno != 0) {
        throw system_error(Kind::bundle, directory, errno);
    }
    return names;
}

void check_size(const std::string &path, const Identity &found, const FileEntry &expected) {
    if (found.size != static_cast<std::uint64_t>(expected.size)) {
        throw Error(Kind::bundle, path + ": " + std::to_string(found.size) + " bytes, expected " +
                                      std::to_string(expected.size) + "; build the bundle again");
    }
}

} // namespace

Bundle::Bundle(const std::string &directory) : directory_(plain(directory)), text_(read_manifest(directory_)) {
    manifest_ = load_manifest(text_, path(manifest_name));
    sha256_ = sha256_of(text_);
    check_listing();
}

Checked Bundle::check(const std::vector<std::string> &names, const Record *record, const Progress &progress) const {
    std::uint64_t total = 0, done = 0;
    for (const std::string &name : names) {
        total += static_cast<std::uint64_t>(manifest_.files[name].size);
    }
    const auto report = [&] {
        if (progress && !progress("check", done, total)) {
            throw Error(Kind::cancelled, "cancelled while the bundle was checked");
        }
    };
    Checked checked;
    report();
    for (const std::string &name : names) {
        const File file = open(name);
        const Identity &identity = file.identity();
        const bool recorded = record && identity.size >= always_hashed_below;
        const bool settled = identity.settled(); // before it is read
        std::string found = recorded ? record->find(identity.text()) : "";
        if (found.empty()) {
            found = sha256_of(file);
            if (recorded && settled) {
                record->add(identity.text(), found);
            }
        }
        if (found != manifest_.files[name].sha256) {
            altered(name);
        }
        checked.emplace_back(name, identity);
        done += identity.size;
        report();
    }
    return checked;
}

void Bundle::confirm(const Checked &files) const {
    for (const auto &[name, identity] : files) {
        if (!(identity_of(path(name)) == identity)) {
            throw Error(Kind::bundle, path(name) + ": changed while the bundle was opened; open it again when nothing "
                                                   "writes to it");
        }
    }
}

std::string Bundle::read(const std::string &name) const {
    std::string content = open(name).read();
    if (sha256_of(content) != manifest_.files[name].sha256) {
        altered(name);
    }
    return content;
}

File Bundle::open(const std::string &name) const {
    File file(path(name));
    check_size(path(name), file.identity(), manifest_.files[name]);
    return file;
}

void Bundle::altered(const std::string &name) const {
    throw Error(Kind::bundle, path(name) + ": altered (its SHA-256 is not the listed one); build the bundle again");
}

void Bundle::check_listing() const {
    std::unordered_set<std::string> found;
    for (const std::string &name : entries_of(directory_)) {
        if (name == manifest_name) {
            continue;
        }
        const FileEntry *entry = manifest_.files.find(name);
        if (!entry) {
            throw Error(Kind::bundle, directory_ + ": " + shown(name) + " is not listed in " + manifest_name +
                                          "; remove it, or build the bundle again");
        }
        check_size(path(name), identity_of(path(name)), *entry);
        found.insert(name);
    }
    for (const std::string &name : manifest_.files.names()) {
        if (!found.count(name)) {
            throw Error(Kind::bundle, path(name) + ": missing; build the bundle again");
        }
    }
}

} // namespace glance_trt
