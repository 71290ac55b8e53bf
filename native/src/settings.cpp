#include "settings.hpp"

#include "error.hpp"
#include "limits.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>

namespace glance_trt {
namespace {

constexpr double usual_strength = 0.8;

[[noreturn]] void refuse(const std::string &text) {
    throw Error(Kind::input, text);
}

std::string described(const Size &size) {
    return std::to_string(size.height) + " x " + std::to_string(size.width);
}

/// Of a manifest's image, all sizes that are listed, the usual one first.
std::vector<Size> listed_sizes(const Image &image) {
    std::vector<Size> sizes = {image.usual};
    for (const Size &size : image.sizes) {
        if (std::find(sizes.begin(), sizes.end(), size) == sizes.end()) {
            sizes.push_back(size);
        }
    }
    return sizes;
}

std::string described_sizes(const Image &image) {
    std::vector<std::string> texts;
    for (const Size &size : listed_sizes(image)) {
        texts.push_back(described(size));
    }
    const std::string listed = joined(texts);
    return !image.sides ? listed
                        : listed + ", and any sides from " + std::to_string(image.sides->lowest) + " to " +
                              std::to_string(image.sides->highest) + " that are multiples of " +
                              std::to_string(image.sides->multiple);
}

Size nearest(const Image &image, const Size &size) {
    std::vector<Size> candidates = listed_sizes(image);
    if (const auto &sides = image.sides) {
        const auto snapped = [&sides](std::int64_t side) {
            const double multiples = std::nearbyint(static_cast<double>(side) / static_cast<double>(sides->multiple));
            return std::clamp(static_cast<std::int64_t>(multiples) * sides->multiple, sides->lowest, sides->highest);
        };
        candidates.push_back({snapped(size.height), snapped(size.width)});
    }
    // By ratios, so that it is about of the same shape.
    const auto distance = [&size](const Size &other) {
        const auto ratio = [](std::int64_t a, std::int64_t b) {
            return std::abs(std::log(static_cast<double>(std::max<std::int64_t>(a, 1)) / static_cast<double>(b)));
        };
        return ratio(size.height, other.height) + ratio(size.width, other.width);
    };
    return *std::min_element(candidates.begin(), candidates.end(),
                             [&](const Size &a, const Size &b) { return distance(a) < distance(b); });
}

/// The picture's size, rounded down as diffusers does, where it can be made, or else the bundle's usual one.
Size usual_size(const Image &image, const std::optional<Picture> &picture) {
    if (picture) {
        for (const std::int64_t multiple : {image.latent_scale, image.sides ? image.sides->multiple : 1}) {
            const Size &size = picture->size;
            const Size near = {size.height - size.height % multiple, size.width - size.width % multiple};
            if (image.takes(near)) {
                return near;
            }
        }
    }
    return image.usual;
}

Size size_of(const Image &image, const Wishes &wishes) {
    const Size usual = usual_size(image, wishes.image);
    const Size size = {wishes.height ? wishes.height : usual.height, wishes.width ? wishes.width : usual.width};
    if (!image.takes(size)) {
        refuse("size: " + described(size) + " (height x width); this bundle makes " + described_sizes(image) +
               ". The nearest is " + described(nearest(image, size)));
    }
    return size;
}

const Schedule &schedule_of(const Named<Schedule> &schedules, const std::optional<std::string> &name,
                            const Size &size) {
    std::vector<std::string> fitting;
    for (const auto &[other, schedule] : schedules) {
        if (schedule.fits(size)) {
            fitting.push_back(other);
        }
    }
    if (!name) {
        return schedules[fitting.front()]; // every size has one
    }
    const Schedule *schedule = schedules.find(*name);
    if (!schedule) {
        refuse("schedule " + shown(*name) + ": this bundle has " + joined(schedules.names()));
    }
    if (!schedule->fits(size)) {
        std::vector<std::string> theirs;
        for (const Size &other : schedule->sizes) {
            theirs.push_back(described(other));
        }
        refuse("schedule " + shown(*name) + ": is for " + joined(theirs) + " (height x width), and the size is " +
               described(size) + "; for that there is " + joined(fitting));
    }
    return *schedule;
}

/// What the graphs of a schedule are fed: the kinds of their inputs' sources.
std::set<std::string> source_kinds(const Manifest &manifest, const Schedule &schedule) {
    std::set<std::string> kinds;
    for (const Step &step : schedule.steps) {
        for (const Port &port : manifest.graphs["denoiser." + step.phase].inputs) {
            kinds.insert(port.source_parts().first);
        }
    }
    return kinds;
}

float scale_of(const Guidance &guidance, const std::optional<double> &wanted) {
    const double scale = wanted.value_or(guidance.scale);
    if (!limits::is_float32(scale)) {
        refuse("guidance scale: expected a finite number, got " + shown(scale));
    }
    const auto &range = guidance.range;
    if (!range.empty() && !(range[0] <= scale && scale <= range[1])) {
        refuse("guidance scale: " + shown_briefly(scale) + " is outside " + shown_briefly(range[0]) + " to " +
               shown_briefly(range[1]) + ", which the guide in this bundle was trained for");
    }
    return static_cast<float>(scale);
}

/// How many steps of a schedule run from an image, the last ones: in double precision, as diffusers rounds.
std::size_t steps_of(const Schedule &schedule, double strength) {
    if (!(strength >= 0 && strength <= 1)) {
        refuse("strength: expected a number above 0, at most 1, got " + shown(strength));
    }
    const auto steps = static_cast<double>(schedule.steps.size());
    const double product = std::min(steps * strength, steps);
    const double count =
        schedule.strength_rounded_up ? steps - std::trunc(std::max(steps - product, 0.0)) : std::trunc(product);
    if (count < 1) {
        const std::string least = schedule.strength_rounded_up
                                      ? "anything above 0"
                                      : shown_briefly(std::ceil(1000 / steps) / 1000) + " or more";
        refuse("strength: " + shown_briefly(strength) + " runs none of the " + std::to_string(schedule.steps.size()) +
               " steps; give " + least);
    }
    return static_cast<std::size_t>(count);
}

void check_image(const Manifest &manifest, const Wishes &wishes, const Size &size) {
    if (!manifest.graphs.find("encoder")) {
        refuse("image: this bundle makes images from text alone; build it from a recipe that says 'from_image: true'");
    }
    if (wishes.latents) {
        refuse("latents: to start from, and an image as well; give one of them");
    }
    if (wishes.image->size != size) {
        throw Error(Kind::unsupported, "image: " + described(wishes.image->size) +
                                           " (height x width), and the size is " + described(size) +
                                           "; this library does not resize, give one of that size");
    }
}

void check_at_least_one(const std::string &name, std::int64_t value) {
    if (value < 1) {
        refuse(name + ": expected a whole number, at least 1, got " + std::to_string(value));
    }
}

} // namespace

Settings settle(const Manifest &manifest, const Wishes &wishes) {
    check_at_least_one("batch_size", wishes.batch_size);
    check_at_least_one("count", wishes.count);
    const Size size = size_of(manifest.image, wishes);
    const Schedule &schedule = schedule_of(manifest.schedules, wishes.schedule, size);
    const std::set<std::string> kinds = source_kinds(manifest, schedule);
    Settings settings = {&schedule, size, 1, std::nullopt, 0};
    if (kinds.count("guidance_scale")) {
        settings.guidance_scale = scale_of(manifest.guidance, wishes.guidance_scale);
    } else if (wishes.guidance_scale) {
        refuse("guidance scale: this bundle was built without guidance; leave it out");
    }
    if (kinds.count("negative")) {
        settings.negative = wishes.negative.value_or(Prompt{manifest.guidance.negative_prompt, {}});
    } else if (wishes.negative) {
        refuse("negative prompt: this bundle takes none, it evaluates no second prompt; leave it out");
    }
    if (wishes.image) {
        check_image(manifest, wishes, size);
        settings.first_step = schedule.steps.size() - steps_of(schedule, wishes.strength.value_or(usual_strength));
    } else if (wishes.strength) {
        refuse("strength: says how far to go from an image, and there is none; give one, or leave it out");
    }
    return settings;
}

} // namespace glance_trt
