#include "records.hpp"

#include "error.hpp"
#include "files.hpp"
#include "json.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

namespace glance_trt {
namespace {

constexpr std::size_t most_entries = 1000, most_bytes = 1 << 20; // of a record

std::string home_folder() {
    if (const char *home = std::getenv("HOME"); home && *home) {
        return home;
    }
    std::array<char, 4096> buffer{};
    passwd entry{}, *found = nullptr;
    getpwuid_r(geteuid(), &entry, buffer.data(), buffer.size(), &found);
    return found ? found->pw_dir : "";
}

/// Where the Python package keeps its records.
std::string user_folder() {
    const char *cache = std::getenv("XDG_CACHE_HOME");
    if (cache && *cache == '/') { // its specification has relative paths ignored
        return std::string(cache) + "/glance-trt";
    }
    const std::string home = home_folder();
#ifdef __APPLE__
    return home.empty() ? "" : home + "/Library/Caches/glance-trt";
#else
    return home.empty() ? "" : home + "/.cache/glance-trt";
#endif
}

/// Whether only this user can have written a file.
bool is_ours(const std::string &path) {
    struct stat status {};
    return lstat(path.c_str(), &status) == 0 && status.st_uid == geteuid() && !(status.st_mode & (S_IWGRP | S_IWOTH));
}

using Entries = std::vector<std::pair<std::string, std::string>>;

/// In order; none where the record is damaged.
Entries entries_of(const std::string &content) {
    Entries result;
    try {
        const json::Value value = json::parse(content.size() <= most_bytes ? content : "");
        if (const auto *object = value.as<json::Object>()) {
            for (const auto &[key, item] : *object) {
                if (const auto *text = item.as<std::string>()) {
                    result.emplace_back(key, *text);
                }
            }
        }
    } catch (const json::Malformed &) {
        result.clear();
    }
    return result;
}

void make_folders(const std::string &path) {
    for (std::size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1)) {
        mkdir(path.substr(0, end).c_str(), 0700);
    }
}

/// Under another name first, so that nobody reads half a record.
void write(const std::string &path, const std::string &content) {
    make_folders(path);
    std::string draft = path + ".XXXXXX";
    const Descriptor file(mkstemp(draft.data())); // of mode 0600
    if (file.number() < 0) {
        return;
    }
    const ssize_t written = ::write(file.number(), content.data(), content.size());
    if (written != static_cast<ssize_t>(content.size()) || std::rename(draft.c_str(), path.c_str()) != 0) {
        unlink(draft.c_str());
    }
}

/// Empty where there is no folder.
std::string place(const std::optional<std::string> &folder, const std::string &name) {
    const std::string found = folder.value_or(user_folder());
    return found.empty() ? "" : found + "/" + name;
}

} // namespace

std::string read_cached(const std::optional<std::string> &folder, const std::string &name) {
    const std::string path = place(folder, name);
    try {
        if (!path.empty() && is_ours(path)) {
            return File(path).read();
        }
    } catch (const Error &) { // not to be read, so not there
    }
    return "";
}

void write_cached(const std::optional<std::string> &folder, const std::string &name, const std::string &content) {
    if (const std::string path = place(folder, name); !path.empty()) {
        write(path, content);
    }
}

bool Record::contains(const std::string &key) const {
    const Entries entries = entries_of(read_cached(folder_, name_));
    return std::any_of(entries.begin(), entries.end(), [&key](const auto &entry) { return entry.first == key; });
}

std::string Record::find(const std::string &identity) const {
    for (const auto &[key, sha256] : entries_of(read_cached(folder_, name_))) {
        if (key == identity && sha256.size() == 64) {
            return sha256;
        }
    }
    return "";
}

void Record::add(const std::string &identity, const std::string &sha256) const {
    Entries all = entries_of(read_cached(folder_, name_));
    all.emplace_back(identity, sha256);
    std::string content;
    for (std::size_t i = all.size() > most_entries ? all.size() - most_entries : 0; i < all.size(); ++i) {
        content += (content.empty() ? "" : ", ") + json::quoted(all[i].first) + ": " + json::quoted(all[i].second);
    }
    write_cached(folder_, name_, "{" + content + "}");
}

} // namespace glance_trt
