// An image from a bundle, without Python: generate BUNDLE PROMPT SEED OUTPUT.png
#include <glance.hpp>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include <png.h>

namespace {

void save_png(const std::string &path, const glance::Images &images) {
    png_image png;
    std::memset(&png, 0, sizeof png);
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(images.width());
    png.height = static_cast<png_uint_32>(images.height());
    png.format = PNG_FORMAT_RGB;
    if (!png_image_write_to_file(&png, path.c_str(), 0, images.pixels(0), 0, nullptr)) {
        throw std::runtime_error(path + ": " + png.message);
    }
}

} // namespace

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
        save_png(arguments[4], session.run());
        std::fprintf(stderr, "\n%s\n", arguments[4]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
