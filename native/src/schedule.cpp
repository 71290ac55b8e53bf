#include "schedule.hpp"

#include "limits.hpp"
#include "text.hpp"

#include <algorithm>

namespace glance_trt {
namespace {

using json::Whole;

std::vector<float> as_float32s(const std::vector<double> &numbers) {
    return {numbers.begin(), numbers.end()};
}

Step read_step(const Node &node) {
    const Fields fields(node, {"phase", "timestep", "coefficients", "mix"});
    std::string phase = fields["phase"].text();
    const double timestep = fields["timestep"].number();
    const std::vector<double> coefficients = as_numbers(fields["coefficients"]);
    const std::vector<double> mix = fields.get("mix", std::vector<double>(), as_numbers);
    const auto check_each = [&](const std::string &key, const std::vector<double> &numbers) {
        for (std::size_t i = 0; i < numbers.size(); ++i) {
            limits::check_float32(fields.path(key) + "[" + std::to_string(i) + "]", numbers[i]);
        }
    };
    limits::check_float32(fields.path("timestep"), timestep);
    check_each("coefficients", coefficients);
    if (!mix.empty() && mix.size() != 2) {
        throw Mismatch(fields.path("mix") + ": expected two numbers, got " + std::to_string(mix.size()));
    }
    check_each("mix", mix);
    return {std::move(phase), static_cast<float>(timestep), as_float32s(coefficients), as_float32s(mix)};
}

} // namespace

bool Schedule::fits(const Size &size) const {
    return sizes.empty() || std::find(sizes.begin(), sizes.end(), size) != sizes.end();
}

Schedule read_schedule(const Node &node) {
    const Fields fields(node, {"steps", "coefficients", "initial_noise_scale", "sizes", "strength_rounding"});
    Schedule schedule;
    schedule.steps = fields["steps"].list_of(read_step);
    const auto names = fields.get("coefficients", std::vector<std::string>{"c_in", "a", "b"}, as_texts);
    const double noise_scale = fields.get("initial_noise_scale", 1.0, as_number);
    const auto sizes = fields.get("sizes", std::vector<std::vector<Whole>>(), as_lists_of_wholes);
    const auto rounding = fields.get("strength_rounding", std::string("down"), [](const Node &item) {
        return item.choice({"down", "up"});
    });
    const std::string path = fields.path("steps");
    if (schedule.steps.empty()) {
        throw Mismatch(path + ": a schedule needs at least one step");
    }
    limits::check_range(path + ": their number", {std::to_string(schedule.steps.size())}, 1, limits::schedule_steps);
    for (std::size_t i = 0; i < names.size(); ++i) {
        limits::check_name(fields.path("coefficients") + "[" + std::to_string(i) + "]", names[i]);
    }
    limits::check_distinct(fields.path("coefficients"), names);
    for (std::size_t i = 0; i < schedule.steps.size(); ++i) {
        if (schedule.steps[i].coefficients.size() != names.size()) {
            throw Mismatch(path + "[" + std::to_string(i) + "].coefficients: expected " + std::to_string(names.size()) +
                           " numbers (" + joined(names) + "), got " +
                           std::to_string(schedule.steps[i].coefficients.size()));
        }
    }
    limits::check_float32(fields.path("initial_noise_scale"), noise_scale);
    schedule.initial_noise_scale = static_cast<float>(noise_scale);
    schedule.sizes = read_sizes(fields.path("sizes"), sizes);
    schedule.strength_rounded_up = rounding == "up";
    return schedule;
}

Guidance read_guidance(const Node &node) {
    const Fields fields(node, {"scale", "negative_prompt", "range"});
    Guidance guidance;
    guidance.scale = fields.get("scale", 1.0, as_number);
    guidance.negative_prompt = fields.get("negative_prompt", std::string(), as_text);
    guidance.range = fields.get("range", std::vector<double>(), as_numbers);
    limits::check_float32(fields.path("scale"), guidance.scale);
    std::vector<std::string> bounds;
    for (const double bound : guidance.range) {
        limits::check_float32(fields.path("range") + "[" + std::to_string(bounds.size()) + "]", bound);
        bounds.push_back(shown(bound));
    }
    const auto &range = guidance.range;
    if (!range.empty() && !(range.size() == 2 && range[0] <= guidance.scale && guidance.scale <= range[1])) {
        throw Mismatch(fields.path("range") + ": expected a low and a high number around the scale, got [" +
                       joined(bounds) + "]");
    }
    return guidance;
}

} // namespace glance_trt
