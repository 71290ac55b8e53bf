// The backend for TensorRT and TensorRT-RTX, compiled against stand-ins for their header, and run over stand-ins for
// their libraries and for the CUDA driver: glance_tensorrt FOLDER
#include "../check.hpp"
#include "../fake.hpp"
#include "files.hpp"
#include "platform.hpp"
#include "records.hpp"
#include "tensorrt/backend.hpp"

#include <atomic>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/stat.h>

using namespace glance_trt;

namespace {

const std::vector<std::string> graphs = {"text_encoder", "denoiser.slow", "decoder"};

std::string replaced(std::string text, const std::string &part, const std::string &by) {
    return text.replace(text.find(part), part.size(), by);
}

/// A bundle with plans. requires: of the target "gpu". plan: the content of the decoder's, by default a good one.
Bundle written(const std::string &folder, const tensorrt::Flavour &flavour, const std::string &requires = "",
               const std::string &plan = "plan of decoder") {
    mkdir(folder.c_str(), 0700);
    std::ofstream(folder + "/tokenizer.json").flush();
    std::string engines, files;
    for (const std::string &graph : graphs) {
        const std::string content = graph == "decoder" ? plan : "plan of " + graph, name = graph + ".plan";
        std::ofstream(folder + "/" + name) << content;
        engines += (engines.empty() ? "" : ", ") + ("\"" + graph) + "\": {\"file\": \"" + name + "\"}";
        files += ", \"" + name + "\": {\"size\": " + std::to_string(content.size()) + ", \"sha256\": \"" +
                 sha256_of(content) + "\"}";
    }
    const std::string set = std::string("{\"gpu\": {\"backend\": \"") + flavour.backend +
                            "\", \"dtype\": \"float32\", \"graphs\": {" + engines + "}, \"requires\": {" + requires +
                            "}}}";
    std::string manifest = replaced(fake_manifest, "\"engines\": {}", "\"engines\": " + set);
    manifest = replaced(manifest, "b855\"}}}", "b855\"}" + files + "}}");
    std::ofstream(folder + "/bundle.json") << manifest;
    return Bundle(folder);
}

Options trusting(const std::string &folder) {
    Options options;
    options.trust = true;
    options.cache = folder + "-cache";
    return options;
}

std::string refused(const tensorrt::Flavour &flavour, const Bundle &bundle, const Options &options) {
    return make_tensorrt(flavour, options)->unrunnable(bundle.manifest().engines["gpu"]).value_or("");
}

bool has(const std::string &text, const std::string &part) {
    return text.find(part) != std::string::npos;
}

template <class Act>
std::string error_of(Kind kind, const Act &act) {
    try {
        act();
    } catch (const Error &error) {
        if (error.kind() != kind) {
            std::fprintf(stderr, "%s\n", error.what());
        }
        CHECK(error.kind() == kind);
        return error.what();
    }
    return "";
}

Wishes wishes(std::int64_t count, std::int64_t batch_size, bool large, std::uint64_t seed = 3) {
    Wishes wishes;
    wishes.prompt.ids["words"] = {20, 30};
    wishes.negative.emplace();
    wishes.negative->ids["words"] = {40};
    wishes.count = count;
    wishes.batch_size = batch_size;
    wishes.seed = seed;
    if (large) {
        wishes.height = 16;
        wishes.width = 32;
    }
    return wishes;
}

Pipeline pipeline_of(const tensorrt::Flavour &flavour, const Bundle &bundle, const Options &options) {
    return {fake::manifest(),
            make_tensorrt(flavour, options)->open(bundle, "gpu"),
            [](const std::string &) { return std::string(); },
            {}};
}

const std::atomic<bool> never{false};

void test_images_are_those_of_the_same_engines_on_the_host(const tensorrt::Flavour &flavour,
                                                           const std::string &folder) {
    const Options options = trusting(folder);
    const Bundle bundle = written(folder, flavour);
    CHECK(refused(flavour, bundle, options).empty());
    Pipeline here = fake::pipeline(), there = pipeline_of(flavour, bundle, options);
    for (int round = 0; round < 2; ++round) {
        for (const auto &[count, batch] : {std::pair<int, int>{1, 1}, {2, 2}, {3, 3}, {7, 4}}) {
            for (const bool large : {false, true}) { // decoded in tiles
                const Wishes asked = wishes(count, batch, large);
                const Observer observer{{}, never};
                CHECK(here.generate(asked, observer).pixels == there.generate(asked, observer).pixels);
            }
        }
    }
    std::vector<std::thread> threads;
    const auto expected = here.generate(wishes(3, 2, false), {{}, never}).pixels;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (int k = 0; k < 20; ++k) {
                CHECK(there.generate(wishes(3, 2, false), {{}, never}).pixels == expected);
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
}

void test_a_run_ends_at_the_step_at_which_it_is_cancelled(const tensorrt::Flavour &flavour, const std::string &folder) {
    const Options options = trusting(folder);
    Pipeline pipeline = pipeline_of(flavour, written(folder, flavour), options);
    const Observer until_two{[](const std::string &, std::uint64_t done, std::uint64_t) { return done < 2; }, never};
    CHECK(error_of(Kind::cancelled, [&] { pipeline.generate(wishes(1, 1, false), until_two); }) ==
          "cancelled after 2 of 3 steps");
    const Observer observer{{}, never};
    CHECK(pipeline.generate(wishes(1, 1, false), observer).pixels ==
          fake::pipeline().generate(wishes(1, 1, false), observer).pixels);
}

void test_shapes_that_no_plan_takes_are_refused(const tensorrt::Flavour &flavour, const std::string &folder) {
    const Options options = trusting(folder);
    Pipeline pipeline = pipeline_of(flavour, written(folder, flavour), options);
    CHECK(error_of(Kind::input,
                   [&] {
                       pipeline.generate(wishes(5, 5, false), {{}, never});
                   }) ==
          "denoiser.slow: got embeds (5,4); this engine takes (1..2,4) or (3..4,4). Stay within, or build with the "
          "ranges that you need");
}

void test_what_a_plan_needs_is_asked_first(const tensorrt::Flavour &flavour, const std::string &folder) {
    const Options options = trusting(folder);
    const auto reason = [&](const std::string &requires) {
        return refused(flavour, written(folder, flavour, requires), options);
    };
    const std::string module = std::string("\"") + flavour.module + "\": ";
    const std::string here = "\"platform\": \"" + this_platform() + "\"";
    for (const std::string &fits :
         {module + "\"10.13.3.9\"", module + "\"10.9+\"", here, std::string("\"compute_capability\": \"8.6 8.9\""),
          std::string("\"compute_capability\": \"8.0+\"")}) {
        CHECK(reason(fits).empty());
    }
    const std::string built = std::string("built for ") + flavour.title;
    CHECK(has(reason(module + "\"10.13.3.8\""), built + " 10.13.3.8, and this is 10.13.3.9; load that version"));
    CHECK(has(reason(module + "\"10.14+\""), built + " 10.14+"));
    CHECK(has(reason(module + "\"9.1+\""), built + " 9.1+"));
    CHECK(has(reason("\"compute_capability\": \"7.5 8.90\""), "capability 7.5 8.90, and this one has 8.9"));
    CHECK(has(reason("\"compute_capability\": \"9.0+\""), "this one has 8.9"));
    CHECK(has(reason("\"platform\": \"plan9-vax\""), "built for plan9-vax, and this is "));
    Options other = options;
    other.device = 1;
    CHECK(refused(flavour, written(folder, flavour), other) ==
          "the NVIDIA driver here finds no GPU 1 that it can use (CUDA error 101)");
}

void test_a_plan_that_nobody_vouches_for_is_not_opened(const tensorrt::Flavour &flavour, const std::string &folder) {
    Options options = trusting(folder);
    options.trust = false;
    std::remove((*options.cache + "/" + trusted_record).c_str()); // of the last time
    const Bundle bundle = written(folder, flavour);
    const auto open = [&] { make_tensorrt(flavour, options)->open(bundle, "gpu"); };
    CHECK(has(error_of(Kind::target, open), "a plan is native code, and this one was not built here by you"));
    std::string trusted;
    for (const std::string &graph : graphs) {
        trusted += (trusted.empty() ? "{\"" : ", \"") + sha256_of("plan of " + graph) + "\": \"\"";
    }
    write_cached(options.cache, trusted_record, trusted + "}");
    open();
}

void test_a_damaged_plan_says_so(const tensorrt::Flavour &flavour, const std::string &folder) {
    const Options options = trusting(folder);
    const auto open = [&](const std::string &plan) {
        const Bundle bundle = written(folder, flavour, "", plan);
        make_tensorrt(flavour, options)->open(bundle, "gpu");
    };
    CHECK(error_of(Kind::target, [&] { open("noise"); }) ==
          std::string("decoder: ") + flavour.title + " 10.13.3.9 cannot open its plan: the magic tag is missing");
    CHECK(error_of(Kind::bundle, [&] { open("plan of text_encoder"); }) ==
          "decoder: its plan has no input x; build the bundle again");
    CHECK(error_of(Kind::bundle, [&] { open("plan of denoiser.slow"); }) ==
          "decoder: its plan has no output images; build the bundle again");
}

void test_compiled_kernels_are_kept_for_the_next_process(const std::string &folder) {
    const Options options = trusting(folder);
    const std::string name = "runtime-cache/" + sha256_of("plan of decoder") + ".bin";
    CHECK(read_cached(options.cache, name) == "kernels");
}

} // namespace

int main(int count, char **arguments) {
    CHECK(count == 2);
    for (const tensorrt::Flavour *flavour : {&tensorrt::tensorrt, &tensorrt::tensorrt_rtx}) {
        const std::string folder = arguments[1] + ("/" + std::string(flavour->module));
        test_images_are_those_of_the_same_engines_on_the_host(*flavour, folder);
        test_a_run_ends_at_the_step_at_which_it_is_cancelled(*flavour, folder);
        test_shapes_that_no_plan_takes_are_refused(*flavour, folder);
        test_what_a_plan_needs_is_asked_first(*flavour, folder);
        test_a_plan_that_nobody_vouches_for_is_not_opened(*flavour, folder);
        test_a_damaged_plan_says_so(*flavour, folder);
    }
    test_compiled_kernels_are_kept_for_the_next_process(arguments[1] + std::string("/tensorrt_rtx"));
}
