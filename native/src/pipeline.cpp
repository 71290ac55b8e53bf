#include "pipeline.hpp"

#include "calls.hpp"
#include "error.hpp"
#include "text.hpp"
#include "tiling.hpp"

#include <algorithm>
#include <utility>

namespace glance_trt {
namespace {

std::size_t elements_of(const Shape &shape) {
    std::size_t elements = 1;
    for (const std::int64_t size : shape) {
        elements *= static_cast<std::size_t>(size);
    }
    return elements;
}

/// The shape of a batch.
Shape batched(Shape shape, std::size_t count) {
    shape.insert(shape.begin(), static_cast<std::int64_t>(count));
    return shape;
}

/// What a graph gave is what the manifest says of it.
void check_output(const std::string &graph, const Tensor &output, const char *dtype, const Shape &shape) {
    if (output.dtype() != dtype || output.shape() != shape) {
        throw Error(Kind::bundle, graph + ": gave " + shown(output.shape()) + " " + output.dtype() + " where " +
                                      shown(shape) + " " + dtype + " was expected; build the bundle again");
    }
}

/// Counts the steps of all images, tells of them, and ends the run where that is wanted.
class Counter {
  public:
    Counter(const Observer &observer, std::uint64_t total) : observer_(observer), total_(total) { report(); }

    void add(std::uint64_t steps) {
        done_ += steps;
        report();
    }

  private:
    void report() const {
        const bool wanted = !observer_.progress || observer_.progress("generate", done_, total_);
        if (!wanted || observer_.cancelled) {
            throw Error(Kind::cancelled,
                        "cancelled after " + std::to_string(done_) + " of " + std::to_string(total_) + " steps");
        }
    }

    const Observer &observer_;
    std::uint64_t total_, done_ = 0;
};

} // namespace

Pipeline::Pipeline(Manifest manifest, std::unique_ptr<const Runner> runner, ReadFile read, Log log)
    : manifest_(std::move(manifest)), runner_(std::move(runner)), text_(manifest_, std::move(read), std::move(log)) {}

Pictures Pipeline::generate(const Wishes &wishes, const Observer &observer) {
    const Settings settings = settle(manifest_, wishes);
    if (wishes.prompt.text && stripped(*wishes.prompt.text).empty()) {
        throw Error(Kind::input, "prompt: empty; say what the image should show");
    }
    check_latents(settings, wishes);
    const Tokens prompt = text_.tokenize(wishes.prompt, "prompt");
    const std::optional<Tokens> other =
        settings.negative ? std::optional(text_.tokenize(*settings.negative, "negative prompt")) : std::nullopt;
    std::vector<Call> calls = calls_of(manifest_, settings);
    const auto count = static_cast<std::size_t>(wishes.count), most = static_cast<std::size_t>(wishes.batch_size);
    Counter counter(observer, std::uint64_t{calls.size()} * count);
    const bool tiled = is_tiled(manifest_.image, settings.size);
    if (!tiled) {
        calls.push_back(call_of(manifest_, "decoder", pixels_value));
    }
    const Tensors conditions = text_.encode(prompt, *runner_);
    const Tensors negative = other ? text_.encode(*other, *runner_) : Tensors();

    const Shape shape = manifest_.image.latents_of(settings.size);
    Pictures pictures = {settings.size, {}};
    for (std::size_t first = 0; first < count; first += most) {
        const std::size_t size = std::min(count - first, most), each = elements_of(shape);
        std::vector<float> latents(size * each);
        for (std::size_t i = 0; i < size; ++i) {
            start(settings, wishes, first + i, latents.data() + i * each);
        }
        Tensors values = values_of(settings, conditions, negative, size);
        values[latents_value] = Tensor("float32", batched(shape, size), latents);
        const auto watch = [&](const Call &call) {
            if (call.value == latents_value) {
                counter.add(size);
            }
        };
        const Tensor last = runner_->chain(calls, std::move(values), watch);
        tiled ? add_tiled(last, size, pictures) : add(last, size, pictures);
    }
    return pictures;
}

void Pipeline::check_latents(const Settings &settings, const Wishes &wishes) const {
    if (!wishes.latents) {
        return;
    }
    const Shape shape = batched(manifest_.image.latents_of(settings.size), static_cast<std::size_t>(wishes.count));
    if (const std::size_t expected = elements_of(shape); wishes.latents->size() != expected) {
        throw Error(Kind::input, "latents: expected " + shown(shape) + ", which is " + std::to_string(expected) +
                                     " numbers, got " + std::to_string(wishes.latents->size()));
    }
}

void Pipeline::start(const Settings &settings, const Wishes &wishes, std::size_t index, float *latents) const {
    const Shape shape = manifest_.image.latents_of(settings.size);
    const std::size_t count = elements_of(shape);
    if (wishes.latents) {
        std::copy_n(wishes.latents->data() + index * count, count, latents);
        return;
    }
    Generator generator(wishes.seed + index);
    if (!wishes.image) {
        generator.draw(latents, count);
        std::transform(latents, latents + count, latents,
                       [&settings](float noise) { return settings.schedule->initial_noise_scale * noise; });
        return;
    }
    const Tensor image = encoded(wishes, settings.size, generator);
    std::vector<float> noise(count);
    generator.draw(noise.data(), count);
    const std::vector<float> &mix = settings.schedule->steps[settings.first_step].mix;
    std::transform(noise.begin(), noise.end(), image.data<float>(), latents,
                   [&mix](float value, float signal) { return mix[0] * signal + mix[1] * value; });
}

Tensor Pipeline::encoded(const Wishes &wishes, const Size &size, Generator &generator) const {
    const Shape shape = batched(manifest_.image.latents_of(size), 1);
    Tensors inputs;
    for (const Port &port : manifest_.graphs["encoder"].inputs) {
        if (port.source == "image") {
            inputs[port.name] = Tensor("uint8", {1, size.height, size.width, 3}, wishes.image->pixels);
            continue;
        }
        std::vector<float> noise(elements_of(shape));
        generator.draw(noise.data(), noise.size());
        inputs[port.name] = Tensor("float32", shape, noise);
    }
    const Tensor latents = runner_->run("encoder", inputs).at(manifest_.graphs["encoder"].outputs[0].name);
    check_output("encoder", latents, "float32", shape);
    return latents;
}

void Pipeline::add(const Tensor &images, std::size_t count, Pictures &into) const {
    check_output("decoder", images, "uint8", batched({into.size.height, into.size.width, 3}, count));
    const std::size_t each = images.bytes() / count;
    for (std::size_t i = 0; i < count; ++i) {
        const auto *first = images.data<std::uint8_t>() + i * each;
        into.pixels.emplace_back(first, first + each);
    }
}

void Pipeline::add_tiled(const Tensor &latents, std::size_t count, Pictures &into) const {
    const Shape shape = manifest_.image.latents_of(into.size);
    check_output("the last step", latents, "float32", batched(shape, count));
    const Call call = call_of(manifest_, "decoder", pixels_value);
    const auto decode = [&](const Tensor &tile, const Size &size) {
        Tensors inputs;
        for (const auto &[port, value] : call.inputs) {
            inputs[port] = tile;
        }
        const Tensor pixels = runner_->run(call.graph, inputs).at(call.port);
        check_output(call.graph, pixels, "uint8", {1, size.height, size.width, 3});
        return pixels;
    };
    for (std::size_t i = 0; i < count; ++i) {
        const float *first = latents.data<float>() + i * elements_of(shape);
        into.pixels.push_back(decode_in_tiles(manifest_.image, into.size, first, decode));
    }
}

} // namespace glance_trt
