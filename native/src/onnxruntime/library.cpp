#include "onnxruntime/library.hpp"

#include "error.hpp"

#include <cstdlib>

#include <dlfcn.h>

namespace glance_trt::onnxruntime {
namespace {

constexpr const char *system_name =
#ifdef __APPLE__
    "libonnxruntime.dylib";
#else
    "libonnxruntime.so.1";
#endif

std::string place(const std::string &path) {
    if (!path.empty()) {
        return path;
    }
    if (const char *named = std::getenv("GLANCE_ONNXRUNTIME"); named && *named) {
        return named;
    }
    const std::string built_for = GLANCE_ONNXRUNTIME_LIBRARY; // CMake's, "" where it knows of none
    return built_for.empty() ? system_name : built_for;
}

/// 31 of 1.31.1; the number of the API that it has.
int minor_of(const std::string &version) {
    const std::size_t dot = version.find('.');
    return dot == std::string::npos ? 0 : std::atoi(version.c_str() + dot + 1);
}

/// The process has one environment of ONNX Runtime, whoever made it first, so that what it logs is no one bundle's.
void ORT_API_CALL discard(void * /*user*/, OrtLoggingLevel, const char * /*category*/, const char * /*id*/,
                          const char * /*location*/, const char * /*message*/) {}

} // namespace

std::shared_ptr<const Library> Library::load(const std::string &path) {
    // ONNX Runtime 1.31 for Linux writes a device id to the user's cache and reports to its makers as soon as there is
    // an environment, whatever DisableTelemetryEvents says afterwards. A program that wants it sets the variable to 0.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    const std::string name = place(path);
    const std::string again = "; name its shared library in the option onnxruntime or in GLANCE_ONNXRUNTIME";
    void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library) {
        throw Error(Kind::target, std::string("ONNX Runtime cannot be loaded: ") + dlerror() + again);
    }
    using GetBase = const OrtApiBase *(ORT_API_CALL *)();
    const auto get_base = reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"));
    if (!get_base) {
        throw Error(Kind::target, name + ": is not ONNX Runtime, it has no OrtGetApiBase" + again);
    }
    const OrtApiBase &base = *get_base();
    const std::string version = base.GetVersionString();
    if (minor_of(version) < ORT_API_VERSION) { // asked before GetApi, which would print
        throw Error(Kind::target, name + ": is ONNX Runtime " + version + ", which is older than 1." +
                                      std::to_string(ORT_API_VERSION) + again);
    }
    return std::shared_ptr<const Library>(new Library(base));
}

Library::Library(const OrtApiBase &base) : api_(base.GetApi(ORT_API_VERSION)), version_(base.GetVersionString()) {
    check(api_->CreateEnvWithCustomLogger(discard, nullptr, ORT_LOGGING_LEVEL_ERROR, "glance", &environment_));
}

Library::~Library() {
    api_->ReleaseEnv(environment_);
}

std::vector<std::string> Library::providers() const {
    char **names = nullptr;
    int count = 0;
    check(api_->GetAvailableProviders(&names, &count));
    const std::vector<std::string> result(names, names + count);
    check(api_->ReleaseAvailableProviders(names, count));
    return result;
}

void Library::check(OrtStatus *status) const {
    if (status) {
        std::string message = api_->GetErrorMessage(status);
        api_->ReleaseStatus(status);
        throw Failure(message.substr(0, message.find('\n')));
    }
}

} // namespace glance_trt::onnxruntime
