// Files that nobody vouches for: opened without following links, waiting for pipes or touching devices, and hashed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace glance_trt {

/// A file descriptor, which it closes.
class Descriptor {
  public:
    explicit Descriptor(int number = -1) noexcept : number_(number) {}
    Descriptor(Descriptor &&other) noexcept;
    Descriptor &operator=(Descriptor &&other) noexcept;
    ~Descriptor();

    int number() const noexcept { return number_; }

  private:
    int number_;
};

/// What a file is known by, unless someone goes to great lengths.
struct Identity {
    std::uint64_t device, inode, size;
    std::int64_t modified, changed; // nanoseconds

    bool operator==(const Identity &other) const;
    /// A text to remember it by.
    std::string text() const;
    /// Whether a further change would change it too: it is older than the coarsest clock of file systems in use, FAT's.
    bool settled() const;
};

/// A regular file, open for reading.
class File {
  public:
    /// Throws `Error` of the kind bundle for anything but a regular file, and where it cannot be opened.
    explicit File(const std::string &path);

    const Identity &identity() const { return identity_; }
    /// Reads the file from its beginning, block by block. Throws `Error` where it cannot, or where the file has grown.
    void each_block(const std::function<void(std::string_view)> &use) const;
    std::string read() const;

  private:
    std::string path_;
    Descriptor descriptor_;
    Identity identity_{};
};

/// The identity of what a path leads to now, links not followed. Throws `Error` as `File` does.
Identity identity_of(const std::string &path);

/// Hexadecimal SHA-256.
std::string sha256_of(std::string_view data);
std::string sha256_of(const File &file);

} // namespace glance_trt
