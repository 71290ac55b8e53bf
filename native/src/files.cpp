#include "files.hpp"

#include "error.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

namespace glance_trt {
namespace {

constexpr std::size_t block_bytes = 1 << 20;
constexpr std::int64_t settled_nanoseconds = 2'000'000'000;

class Sha256 {
  public:
    Sha256() : context_(EVP_MD_CTX_new()) {
        if (!context_ || !EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr)) {
            throw std::bad_alloc(); // which is all that can go wrong with a digest of OpenSSL's own
        }
    }

    void add(std::string_view data) {
        if (!EVP_DigestUpdate(context_.get(), data.data(), data.size())) {
            throw std::bad_alloc();
        }
    }

    std::string hexadecimal() {
        std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
        unsigned length = 0;
        if (!EVP_DigestFinal_ex(context_.get(), digest.data(), &length)) {
            throw std::bad_alloc();
        }
        std::string result;
        for (unsigned i = 0; i < length; ++i) {
            result += {"0123456789abcdef"[digest[i] >> 4], "0123456789abcdef"[digest[i] & 15]};
        }
        return result;
    }

  private:
    struct Free {
        void operator()(EVP_MD_CTX *context) const { EVP_MD_CTX_free(context); }
    };
    std::unique_ptr<EVP_MD_CTX, Free> context_;
};

std::int64_t nanoseconds(const timespec &time) {
    return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

Identity checked(const std::string &path, const struct stat &status) {
    if (!S_ISREG(status.st_mode)) {
        throw Error(Kind::bundle, path + ": not a regular file; links and folders are not allowed in a bundle");
    }
#ifdef __APPLE__
    const timespec modified = status.st_mtimespec, changed = status.st_ctimespec;
#else
    const timespec modified = status.st_mtim, changed = status.st_ctim;
#endif
    return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino),
            static_cast<std::uint64_t>(status.st_size), nanoseconds(modified), nanoseconds(changed)};
}

} // namespace

Descriptor::Descriptor(Descriptor &&other) noexcept : number_(std::exchange(other.number_, -1)) {}

Descriptor &Descriptor::operator=(Descriptor &&other) noexcept {
    std::swap(number_, other.number_);
    return *this;
}

Descriptor::~Descriptor() {
    if (number_ >= 0) {
        close(number_);
    }
}

bool Identity::operator==(const Identity &other) const {
    return text() == other.text();
}

std::string Identity::text() const {
    return std::to_string(device) + ":" + std::to_string(inode) + ":" + std::to_string(size) + ":" +
           std::to_string(modified) + ":" + std::to_string(changed);
}

bool Identity::settled() const {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count() - std::max(modified, changed) >
           settled_nanoseconds;
}

File::File(const std::string &path) : path_(path) {
    // Once before opening, because opening a device can do things, and once after: the path may have changed hands.
    identity_of(path);
    descriptor_ = Descriptor(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    struct stat status {};
    if (descriptor_.number() < 0 || fstat(descriptor_.number(), &status) != 0) {
        throw system_error(Kind::bundle, path, errno);
    }
    identity_ = checked(path, status);
}

void File::each_block(const std::function<void(std::string_view)> &use) const {
    std::vector<char> buffer(std::min<std::uint64_t>(block_bytes, identity_.size + 1));
    std::uint64_t done = 0;
    for (;;) {
        const ssize_t count = pread(descriptor_.number(), buffer.data(), buffer.size(), static_cast<off_t>(done));
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count < 0) {
            throw system_error(Kind::bundle, path_, errno);
        }
        if (count == 0) {
            return;
        }
        done += static_cast<std::uint64_t>(count);
        if (done > identity_.size) {
            throw Error(Kind::bundle, path_ + ": grew while it was read; try again when nothing writes to it");
        }
        use({buffer.data(), static_cast<std::size_t>(count)});
    }
}

std::string File::read() const {
    std::string content;
    content.reserve(identity_.size);
    each_block([&content](std::string_view block) { content += block; });
    return content;
}

Identity identity_of(const std::string &path) {
    struct stat status {};
    if (lstat(path.c_str(), &status) != 0) {
        throw system_error(Kind::bundle, path, errno);
    }
    return checked(path, status);
}

std::string sha256_of(std::string_view data) {
    Sha256 hash;
    hash.add(data);
    return hash.hexadecimal();
}

std::string sha256_of(const File &file) {
    Sha256 hash;
    file.each_block([&hash](std::string_view block) { hash.add(block); });
    return hash.hexadecimal();
}

} // namespace glance_trt
