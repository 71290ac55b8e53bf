// glance.hpp - glance.h for C++17: objects that free themselves, and exceptions.
//
//   glance::Bundle bundle("shapes.bundle");
//   glance::Session session(bundle);
//   session.set_prompt("a large red circle on a white background");
//   glance::Images images = session.run();
//
// All of it is compiled into the program that includes it; between that program and the library there is only glance.h,
// which says what holds of threads and lifetimes. Functions throw `glance::Error`, and what a callback throws is thrown
// by the function that called it.
#ifndef GLANCE_HPP
#define GLANCE_HPP

#include <glance.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace glance {

/// What a function of the library could not do.
class Error : public std::runtime_error {
  public:
    Error(std::int32_t kind, const char *message) : std::runtime_error(message), kind_(kind) {}

    /// One of GLANCE_ERROR_...
    std::int32_t kind() const noexcept { return kind_; }

  private:
    std::int32_t kind_;
};

/// Called with a stage, how much of it is done, and of how much; returns whether to go on.
using Progress = std::function<bool(const std::string &stage, std::uint64_t done, std::uint64_t total)>;
/// Called with GLANCE_LOG_... and a message, from several threads at once. What it throws is lost.
using Log = std::function<void(std::int32_t level, const std::string &message)>;

namespace detail {

inline void check(glance_error *error) {
    if (error) {
        const std::unique_ptr<glance_error, decltype(&glance_error_free)> owned(error, glance_error_free);
        throw Error(glance_error_kind(error), glance_error_message(error));
    }
}

/// Of a text that goes through C, which would cut it at a zero byte. Throws `Error`.
inline const char *whole(const std::string &text) {
    if (text.find('\0') != std::string::npos) {
        throw Error(GLANCE_ERROR_INPUT, "prompt: holds a zero byte; a prompt is text");
    }
    return text.c_str();
}

/// A callback, and what it threw: nothing may be thrown through the library.
struct Watcher {
    Progress progress;
    std::exception_ptr thrown;

    static std::int32_t call(void *user, const char *stage, std::uint64_t done, std::uint64_t total) noexcept {
        auto &self = *static_cast<Watcher *>(user);
        try {
            return self.progress(stage, done, total) ? 0 : 1;
        } catch (...) {
            self.thrown = std::current_exception();
            return 1;
        }
    }

    /// As `check`, but for what the callback threw.
    void check(glance_error *error) {
        if (const std::exception_ptr found = std::exchange(thrown, nullptr)) {
            glance_error_free(error);
            std::rethrow_exception(found);
        }
        detail::check(error);
    }
};

inline void forward(void *user, std::int32_t level, const char *message) noexcept {
    try {
        (*static_cast<const Log *>(user))(level, message);
    } catch (...) { // nobody to tell
    }
}

template <class T>
using Handle = std::unique_ptr<T, void (*)(T *)>;

} // namespace detail

class Options;
void verify(const std::string &folder, const Options &options);

/// What a bundle is opened with.
class Options {
  public:
    Options() : handle_(nullptr, glance_options_free), log_(std::make_shared<Log>()), watcher_(new detail::Watcher) {
        glance_options *options = nullptr;
        detail::check(glance_options_create(&options));
        handle_.reset(options);
    }

    void set_target(const std::string &name) { detail::check(glance_options_set_target(get(), name.c_str())); }
    void set_threads(std::int32_t threads) { detail::check(glance_options_set_threads(get(), threads)); }
    void set_device(std::int32_t device) { detail::check(glance_options_set_device(get(), device)); }
    void set_trust(bool trust) { detail::check(glance_options_set_trust(get(), trust)); }
    void set_onnxruntime(const std::string &path) {
        detail::check(glance_options_set_onnxruntime(get(), path.c_str()));
    }
    void set_cache(const std::string &folder) { detail::check(glance_options_set_cache(get(), folder.c_str())); }
    void set_log(Log log) {
        *log_ = std::move(log);
        detail::check(glance_options_set_log(get(), *log_ ? detail::forward : nullptr, log_.get()));
    }
    void set_progress(Progress progress) {
        watcher_->progress = std::move(progress);
        detail::check(
            glance_options_set_progress(get(), watcher_->progress ? detail::Watcher::call : nullptr, watcher_.get()));
    }

    glance_options *get() const noexcept { return handle_.get(); }

  private:
    friend class Bundle;
    friend void verify(const std::string &folder, const Options &options);

    detail::Handle<glance_options> handle_;
    std::shared_ptr<Log> log_; // which bundles that were opened with it keep
    std::unique_ptr<detail::Watcher> watcher_;
};

/// Check the content of every file of a bundle.
inline void verify(const std::string &folder, const Options &options = {}) {
    options.watcher_->check(glance_bundle_verify(folder.c_str(), options.get()));
}

/// An opened bundle. May be used from any threads at once.
class Bundle {
  public:
    explicit Bundle(const std::string &folder, const Options &options = {})
        : log_(options.log_), handle_(nullptr, glance_bundle_free) {
        glance_bundle *bundle = nullptr;
        options.watcher_->check(glance_bundle_open(folder.c_str(), options.get(), &bundle));
        handle_.reset(bundle);
    }

    std::string target() const { return glance_bundle_target(get()); }
    std::string manifest() const { return glance_bundle_manifest(get()); }
    std::string sha256() const { return glance_bundle_sha256(get()); }

    const glance_bundle *get() const noexcept { return handle_.get(); }

  private:
    friend class Session;

    std::shared_ptr<Log> log_; // outlives the bundle
    detail::Handle<glance_bundle> handle_;
};

/// Images: RGB, 8 bits each, rows from the top, without padding.
class Images {
  public:
    explicit Images(glance_images *images) : handle_(images, glance_images_free) {}

    std::size_t count() const noexcept { return glance_images_count(get()); }
    std::size_t height() const noexcept { return glance_images_height(get()); }
    std::size_t width() const noexcept { return glance_images_width(get()); }
    /// height * width * 3 bytes, which live as long as this object; null where there is no such image.
    const std::uint8_t *pixels(std::size_t index) const noexcept { return glance_images_pixels(get(), index); }

    const glance_images *get() const noexcept { return handle_.get(); }

  private:
    detail::Handle<glance_images> handle_;
};

/// What is to be made. For one thread at a time, but for `cancel`.
class Session {
  public:
    explicit Session(const Bundle &bundle)
        : log_(bundle.log_), watcher_(new detail::Watcher), handle_(nullptr, glance_session_free) {
        glance_session *session = nullptr;
        detail::check(glance_session_create(bundle.get(), &session));
        handle_.reset(session);
    }

    void set_prompt(const std::string &prompt) {
        detail::check(glance_session_set_prompt(get(), detail::whole(prompt)));
    }
    void set_negative_prompt(const std::string &prompt) {
        detail::check(glance_session_set_negative_prompt(get(), detail::whole(prompt)));
    }
    void set_tokens(const std::string &tokenizer, const std::vector<std::int64_t> &ids) {
        detail::check(glance_session_set_tokens(get(), tokenizer.c_str(), ids.data(), ids.size()));
    }
    void set_negative_tokens(const std::string &tokenizer, const std::vector<std::int64_t> &ids) {
        detail::check(glance_session_set_negative_tokens(get(), tokenizer.c_str(), ids.data(), ids.size()));
    }
    void set_guidance_scale(double scale) { detail::check(glance_session_set_guidance_scale(get(), scale)); }
    void set_schedule(const std::string &name) { detail::check(glance_session_set_schedule(get(), name.c_str())); }
    void set_size(std::int32_t height, std::int32_t width) {
        detail::check(glance_session_set_size(get(), height, width));
    }
    void set_seed(std::uint64_t seed) { detail::check(glance_session_set_seed(get(), seed)); }
    void set_count(std::int32_t count) { detail::check(glance_session_set_count(get(), count)); }
    void set_batch_size(std::int32_t size) { detail::check(glance_session_set_batch_size(get(), size)); }
    void set_latents(const std::vector<float> &latents) {
        detail::check(glance_session_set_latents(get(), latents.data(), latents.size()));
    }
    void set_image(const std::uint8_t *pixels, std::int32_t height, std::int32_t width) {
        detail::check(glance_session_set_image(get(), pixels, height, width));
    }
    void set_strength(double strength) { detail::check(glance_session_set_strength(get(), strength)); }
    void set_progress(Progress progress) {
        watcher_->progress = std::move(progress);
        detail::check(
            glance_session_set_progress(get(), watcher_->progress ? detail::Watcher::call : nullptr, watcher_.get()));
    }

    Images run() {
        glance_images *images = nullptr;
        watcher_->check(glance_session_run(get(), &images));
        return Images(images);
    }
    void cancel() noexcept { glance_session_cancel(get()); }

    glance_session *get() const noexcept { return handle_.get(); }

  private:
    std::shared_ptr<Log> log_; // outlives the session
    std::unique_ptr<detail::Watcher> watcher_;
    detail::Handle<glance_session> handle_;
};

} // namespace glance

#endif
