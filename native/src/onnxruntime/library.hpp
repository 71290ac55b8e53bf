// ONNX Runtime's C API, loaded at run time, with its objects as C++ has them.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

namespace glance_trt::onnxruntime {

/// The shared library. It is never unloaded: it has threads of its own.
class Library {
  public:
    /// path: of the shared library; where it is empty, the usual places. Throws `Error` of the kind target.
    static std::shared_ptr<const Library> load(const std::string &path);
    ~Library();
    Library(const Library &) = delete;
    Library &operator=(const Library &) = delete;

    const OrtApi &api() const { return *api_; }
    OrtEnv *environment() const { return environment_; }
    const std::string &version() const { return version_; }
    std::vector<std::string> providers() const;
    /// Throws `Failure` where a call of the API has failed.
    void check(OrtStatus *status) const;

  private:
    explicit Library(const OrtApiBase &base);

    const OrtApi *api_;
    OrtEnv *environment_ = nullptr;
    std::string version_;
};

/// What ONNX Runtime says that went wrong; the first line of it.
class Failure : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// An object of the API, which is released by one of its functions.
template <class T>
class Owned {
  public:
    using Release = void(ORT_API_CALL *)(T *);

    explicit Owned(Release release) noexcept : release_(release) {}
    Owned(Owned &&other) noexcept : release_(other.release_), object_(other.object_) { other.object_ = nullptr; }
    Owned &operator=(Owned &&) = delete;
    ~Owned() { release_(object_); }

    T *get() const noexcept { return object_; }
    /// Where the API is to put a new object; it holds none before.
    T **out() noexcept { return &object_; }

  private:
    Release release_;
    T *object_ = nullptr;
};

} // namespace glance_trt::onnxruntime
