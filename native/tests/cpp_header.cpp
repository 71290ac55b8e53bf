// glance.hpp turns errors into exceptions, and lets those of callbacks through.
#include "check.hpp"
#include "fake_manifest.hpp"

#include <glance.hpp>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

int main() {
    try {
        glance::verify("no-such-folder");
        CHECK(!"reached");
    } catch (const glance::Error &error) {
        CHECK(error.kind() == GLANCE_ERROR_BUNDLE);
        CHECK(std::string(error.what()).find("no-such-folder: no such folder") == 0);
    }

    glance::Options options;
    options.set_threads(1);
    CHECK_THROWS(glance::Error, options.set_threads(-1));
    options.set_log([](std::int32_t, const std::string &) {});
    options.set_progress([](const std::string &, std::uint64_t, std::uint64_t) { return true; });
    CHECK_THROWS(glance::Error, glance::Bundle("no-such-folder", options));
    options.set_log(nullptr);
    options.set_progress(nullptr);
    glance::Options moved = std::move(options);
    CHECK_THROWS(glance::Error, glance::Bundle("no-such-folder", moved));

    std::string folder = (std::filesystem::temp_directory_path() / "glance-XXXXXX").string();
    CHECK(mkdtemp(folder.data()));
    std::ofstream(folder + "/bundle.json") << fake_manifest;
    std::ofstream(folder + "/tokenizer.json").flush();
    int calls = 0;
    moved.set_progress([&calls](const std::string &stage, std::uint64_t, std::uint64_t) {
        CHECK(stage == "check");
        return ++calls > 0;
    });
    glance::verify(folder, moved);
    CHECK(calls == 2);
    moved.set_progress([](const std::string &, std::uint64_t, std::uint64_t) -> bool { throw std::range_error("x"); });
    CHECK_THROWS(std::range_error, glance::verify(folder, moved));
    moved.set_progress([](const std::string &, std::uint64_t, std::uint64_t) { return false; });
    try {
        glance::verify(folder, moved);
        CHECK(!"reached");
    } catch (const glance::Error &error) {
        CHECK(error.kind() == GLANCE_ERROR_CANCELLED);
    }
    std::filesystem::remove_all(folder);

    const std::string text = "a star";
    CHECK(glance::detail::whole(text) == text.c_str());
    CHECK_THROWS(glance::Error, glance::detail::whole(std::string("a\0b", 3)));
    return 0;
}
