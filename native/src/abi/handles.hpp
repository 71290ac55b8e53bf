// What the handles of glance.h are, and how its functions answer.
#pragma once

#include "error.hpp"
#include "options.hpp"
#include "pipeline.hpp"

#include <glance.h>

#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <utility>

namespace glance_trt {

/// A bundle that was opened; its sessions share it.
struct Loaded {
    std::string target, manifest, sha256;
    Pipeline pipeline;
};

/// An error for the caller, who frees it. Never null: where there is no memory for it, one that says so.
glance_error *make_error(Kind kind, const char *text) noexcept;

/// Do what a function is for, and make an error of what it throws.
template <class Body>
glance_error *answer(const Body &body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Error &error) {
        return make_error(error.kind(), error.what());
    } catch (const std::bad_alloc &) {
        return make_error(Kind::other, "no memory");
    } catch (const std::exception &error) {
        return make_error(Kind::other, error.what());
    } catch (...) {
        return make_error(Kind::other, "a callback threw what is no std::exception");
    }
}

/// What a pointer that was passed in leads to. Throws `Error` where it is null.
template <class T>
T &given(T *pointer, const char *name) {
    if (!pointer) {
        throw Error(Kind::input, std::string(name) + ": NULL");
    }
    return *pointer;
}

inline std::string text_of(const char *text, const char *name) {
    return &given(text, name);
}

/// The callback for progress, as the library calls it; empty for NULL.
inline Progress progress_of(glance_progress_callback callback, void *user) {
    if (!callback) {
        return {};
    }
    return [callback, user](const char *stage, std::uint64_t done, std::uint64_t total) {
        return callback(user, stage, done, total) == 0;
    };
}

} // namespace glance_trt

struct glance_options {
    glance_trt::Options options;
};

struct glance_bundle {
    std::shared_ptr<glance_trt::Loaded> loaded;
};

struct glance_session {
    std::shared_ptr<glance_trt::Loaded> loaded;
    glance_trt::Wishes wishes;
    glance_trt::Progress progress;
    std::atomic<bool> cancelled{false};
};

struct glance_images {
    glance_trt::Pictures pictures;
};
