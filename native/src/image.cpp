#include "image.hpp"

#include "limits.hpp"
#include "text.hpp"

#include <algorithm>

namespace glance_trt {
namespace {

using json::Whole;

/// As error texts show a list.
std::string shown_list(const std::vector<Whole> &numbers) {
    std::vector<std::string> texts;
    for (const Whole &number : numbers) {
        texts.push_back(number.digits);
    }
    const std::string text = joined(texts);
    return "[" + (text.size() <= 200 ? text : text.substr(0, 200) + "...") + "]";
}

/// Whether numbers are in order from `lowest` to the largest side.
bool rising(std::int64_t lowest, const std::vector<Whole> &numbers) {
    for (const Whole &number : numbers) {
        const auto value = number.value();
        if (!value || *value < lowest) {
            return false;
        }
        lowest = *value;
    }
    return lowest <= limits::image_side;
}

class Reader {
  public:
    explicit Reader(const Node &node)
        : fields_(node, {"height", "width", "latent_channels", "latent_scale", "sizes", "sides", "tile"}) {}

    Image read() {
        const Whole height = fields_["height"].whole(), width = fields_["width"].whole();
        const Whole channels = fields_["latent_channels"].whole(), scale = fields_["latent_scale"].whole();
        const auto sizes = fields_.get("sizes", std::vector<std::vector<Whole>>(), as_lists_of_wholes);
        const auto sides = fields_.get("sides", std::vector<Whole>(), as_wholes);
        const auto tile = fields_.get("tile", std::vector<Whole>(), as_wholes);
        image_.usual.height = side("height", height);
        image_.usual.width = side("width", width);
        image_.latent_channels = side("latent_channels", channels);
        image_.latent_scale = side("latent_scale", scale);
        check_multiple("height", image_.usual.height);
        check_multiple("width", image_.usual.width);
        image_.sizes = read_sizes(fields_.path("sizes"), sizes);
        for (std::size_t i = 0; i < image_.sizes.size(); ++i) {
            const std::string key = "sizes[" + std::to_string(i) + "]";
            check_multiple(key, image_.sizes[i].height);
            check_multiple(key, image_.sizes[i].width);
        }
        read_sides(sides);
        read_tile(tile);
        check_latents();
        return std::move(image_);
    }

  private:
    std::int64_t side(const std::string &key, const Whole &value) const {
        return limits::check_range(fields_.path(key), value, 1, limits::image_side);
    }

    [[noreturn]] void fail(const std::string &key, const std::string &what) const {
        throw Mismatch(fields_.path(key) + ": " + what);
    }

    void check_multiple(const std::string &key, std::int64_t pixels) const {
        if (pixels % image_.latent_scale != 0) {
            fail(key, "expected a multiple of latent_scale, " + std::to_string(image_.latent_scale) + "; got " +
                          std::to_string(pixels));
        }
    }

    void read_sides(const std::vector<Whole> &sides) {
        if (sides.empty()) {
            return;
        }
        if (sides.size() != 3 || !rising(1, {sides[0], sides[1]})) {
            fail("sides", "expected [lowest, highest, multiple], got " + shown_list(sides));
        }
        const std::int64_t low = *sides[0].value(), high = *sides[1].value();
        const std::int64_t multiple = sides[2].value().value_or(0);
        if (multiple < 1 || multiple % image_.latent_scale != 0 || low % multiple != 0 || high % multiple != 0) {
            fail("sides", sides[2].digits + " is not a multiple of latent_scale, " +
                              std::to_string(image_.latent_scale) + ", that divides the others");
        }
        image_.sides = {low, high, multiple};
    }

    void read_tile(const std::vector<Whole> &tile) {
        if (tile.empty()) {
            return;
        }
        if (tile.size() != 2 || !rising(0, {tile[1], tile[0]}) || tile[1].value() == tile[0].value()) {
            fail("tile", "expected [side, overlap], got " + shown_list(tile));
        }
        image_.tile = {*tile[0].value(), *tile[1].value()};
        check_multiple("tile", image_.tile->side);
        check_multiple("tile", image_.tile->overlap);
    }

    void check_latents() const {
        const std::int64_t largest = image_.sides ? image_.sides->highest : image_.latent_scale;
        std::vector<Size> sizes = {image_.usual, {largest, largest}};
        sizes.insert(sizes.end(), image_.sizes.begin(), image_.sizes.end());
        for (const Size &size : sizes) {
            limits::check_elements(fields_.path("latent_channels"), image_.latents_of(size));
        }
    }

    Fields fields_;
    Image image_;
};

} // namespace

bool Image::takes(const Size &size) const {
    if (size == usual || std::find(sizes.begin(), sizes.end(), size) != sizes.end()) {
        return true;
    }
    const auto fits = [this](std::int64_t side) {
        return sides->lowest <= side && side <= sides->highest && side % sides->multiple == 0;
    };
    return sides && fits(size.height) && fits(size.width);
}

std::vector<std::int64_t> Image::latents_of(const Size &size) const {
    return {latent_channels, size.height / latent_scale, size.width / latent_scale};
}

std::vector<std::vector<Whole>> as_lists_of_wholes(const Node &node) {
    return node.list_of(as_wholes);
}

std::vector<Size> read_sizes(const std::string &path, const std::vector<std::vector<Whole>> &sizes) {
    std::vector<Size> result;
    for (const auto &size : sizes) {
        const std::string place = path + "[" + std::to_string(result.size()) + "]";
        if (size.size() != 2) {
            throw Mismatch(place + ": expected [height, width], got " + shown_list(size));
        }
        const std::int64_t height = limits::check_range(place, size[0], 1, limits::image_side);
        const std::int64_t width = limits::check_range(place, size[1], 1, limits::image_side);
        result.push_back({height, width});
    }
    return result;
}

Image read_image(const Node &node) {
    return Reader(node).read();
}

} // namespace glance_trt
