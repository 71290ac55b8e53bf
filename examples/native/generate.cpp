// An image from a bundle, without Python: generate BUNDLE PROMPT SEED OUTPUT.png
#include "../png.hpp"

#include <glance.hpp>

#include <cstdio>
#include <exception>
#include <string>

int main(int count, char **arguments) {
    if (count != 5) {
        std::fprintf(stderr, "usage: %s BUNDLE PROMPT SEED OUTPUT.png\n", arguments[0]);
        return 2;
    }
    try {
        const glance::Bundle bundle(arguments[1]);
        glance::Session session(bundle);
        session.set_prompt(arguments[2]);
        session.set_seed(std::stoull(arguments[3]));
        session.set_progress([](const std::string &, std::uint64_t done, std::uint64_t total) {
            std::fprintf(stderr, "\r%d of %d steps", static_cast<int>(done), static_cast<int>(total));
            return true; // go on
        });
        const glance::Images images = session.run();
        save_png(arguments[4], images.pixels(0), images.height(), images.width());
        std::fprintf(stderr, "\n%s\n", arguments[4]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
