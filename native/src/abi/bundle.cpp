#include "bundle.hpp"
#include "abi/handles.hpp"
#include "engine.hpp"
#include "text.hpp"

#include <optional>

using namespace glance_trt;

namespace {

constexpr std::int32_t most_threads = 512;

std::optional<std::string> optional_text(const char *text) {
    return text ? std::optional<std::string>(text) : std::nullopt;
}

/// The options that were given, or the defaults.
Options options_of(const glance_options *options) {
    return options ? options->options : Options();
}

std::shared_ptr<Loaded> load(const std::string &folder, const Options &options) {
    const auto bundle = std::make_shared<const Bundle>(folder);
    Opened opened = open_target(*bundle, options);
    const auto read = [bundle](const std::string &name) { return bundle->read(name); };
    return std::shared_ptr<Loaded>(new Loaded{std::move(opened.target),
                                              bundle->text(),
                                              bundle->sha256(),
                                              {bundle->manifest(), std::move(opened.runner), read, options.log}});
}

} // namespace

extern "C" {

glance_error *glance_options_create(glance_options **out) {
    return answer([&] { given(out, "out") = nullptr, *out = new glance_options; });
}

void glance_options_free(glance_options *options) {
    delete options;
}

glance_error *glance_options_set_target(glance_options *options, const char *name) {
    return answer([&] { given(options, "options").options.target = optional_text(name); });
}

glance_error *glance_options_set_threads(glance_options *options, int32_t threads) {
    return answer([&] {
        if (threads < 0 || threads > most_threads) {
            throw Error(Kind::input,
                        "threads: expected 1 to " + std::to_string(most_threads) + ", got " + std::to_string(threads));
        }
        given(options, "options").options.threads = threads;
    });
}

glance_error *glance_options_set_device(glance_options *options, int32_t device) {
    return answer([&] {
        if (device < 0) {
            throw Error(Kind::input, "device: expected a whole number, at least 0, got " + std::to_string(device));
        }
        given(options, "options").options.device = device;
    });
}

glance_error *glance_options_set_trust(glance_options *options, int32_t trust) {
    return answer([&] { given(options, "options").options.trust = trust != 0; });
}

glance_error *glance_options_set_onnxruntime(glance_options *options, const char *path) {
    return answer([&] { given(options, "options").options.onnxruntime = path ? path : ""; });
}

glance_error *glance_options_set_cache(glance_options *options, const char *folder) {
    return answer([&] { given(options, "options").options.cache = optional_text(folder); });
}

glance_error *glance_options_set_log(glance_options *options, glance_log_callback callback, void *user) {
    return answer([&] {
        Log &log = given(options, "options").options.log = nullptr;
        if (callback) {
            log = [callback, user](Level level, const std::string &message) {
                callback(user, static_cast<int32_t>(level), message.c_str());
            };
        }
    });
}

glance_error *glance_options_set_progress(glance_options *options, glance_progress_callback callback, void *user) {
    return answer([&] { given(options, "options").options.progress = progress_of(callback, user); });
}

glance_error *glance_bundle_open(const char *folder, const glance_options *options, glance_bundle **out) {
    return answer([&] {
        given(out, "out") = nullptr;
        *out = new glance_bundle{load(text_of(folder, "folder"), options_of(options))};
    });
}

glance_error *glance_bundle_verify(const char *folder, const glance_options *options) {
    return answer([&] {
        const Bundle bundle(text_of(folder, "folder"));
        bundle.check(bundle.manifest().files.names(), nullptr, options_of(options).progress);
    });
}

void glance_bundle_free(glance_bundle *bundle) {
    delete bundle;
}

const char *glance_bundle_target(const glance_bundle *bundle) {
    return bundle->loaded->target.c_str();
}

const char *glance_bundle_manifest(const glance_bundle *bundle) {
    return bundle->loaded->manifest.c_str();
}

const char *glance_bundle_sha256(const glance_bundle *bundle) {
    return bundle->loaded->sha256.c_str();
}
}
