// PNG files of images: RGB, 8 bits each, rows from the top.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>

#include <png.h>

/// The content of a PNG file. pixels: height * width * 3 bytes.
inline std::string encode_png(const std::uint8_t *pixels, std::size_t height, std::size_t width) {
    png_image image;
    std::memset(&image, 0, sizeof image);
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(width);
    image.height = static_cast<png_uint_32>(height);
    image.format = PNG_FORMAT_RGB;
    png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
    std::string file(size, '\0');
    if (!png_image_write_to_memory(&image, file.data(), &size, 0, pixels, 0, nullptr)) {
        throw std::runtime_error(std::string("PNG: ") + image.message);
    }
    file.resize(size);
    return file;
}

inline void save_png(const std::string &path, const std::uint8_t *pixels, std::size_t height, std::size_t width) {
    std::ofstream file(path, std::ios::binary);
    file << encode_png(pixels, height, width) << std::flush;
    if (!file) {
        throw std::runtime_error(path + ": cannot be written");
    }
}
