// glance.hpp turns errors into exceptions, and lets those of callbacks through.
#include "check.hpp"

#include <glance.hpp>

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
    return 0;
}
