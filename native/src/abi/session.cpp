#include "abi/handles.hpp"
#include "limits.hpp"
#include "noise.hpp"

#include <optional>
#include <vector>

using namespace glance_trt;

namespace {

template <class T>
std::vector<T> numbers_of(const T *first, std::size_t count, const char *name) {
    if (count == 0) {
        return {};
    }
    return {&given(first, name), first + count};
}

/// Ids are in place of a text.
void set_ids(Prompt &prompt, const char *tokenizer, const int64_t *ids, size_t count) {
    std::vector<std::int64_t> numbers = numbers_of(ids, count, "ids");
    prompt.ids[text_of(tokenizer, "tokenizer")] = std::move(numbers);
    prompt.text.reset();
}

Wishes &wishes_of(glance_session *session) {
    return given(session, "session").wishes;
}

} // namespace

extern "C" {

glance_error *glance_session_create(const glance_bundle *bundle, glance_session **out) {
    return answer([&] {
        given(out, "out") = nullptr;
        auto session = std::make_unique<glance_session>();
        session->loaded = given(bundle, "bundle").loaded;
        *out = session.release();
    });
}

void glance_session_free(glance_session *session) {
    delete session;
}

glance_error *glance_session_set_prompt(glance_session *session, const char *prompt) {
    return answer([&] { wishes_of(session).prompt = {text_of(prompt, "prompt"), {}}; });
}

glance_error *glance_session_set_negative_prompt(glance_session *session, const char *prompt) {
    return answer([&] { wishes_of(session).negative = Prompt{text_of(prompt, "prompt"), {}}; });
}

glance_error *glance_session_set_tokens(glance_session *session, const char *tokenizer, const int64_t *ids,
                                        size_t count) {
    return answer([&] { set_ids(wishes_of(session).prompt, tokenizer, ids, count); });
}

glance_error *glance_session_set_negative_tokens(glance_session *session, const char *tokenizer, const int64_t *ids,
                                                 size_t count) {
    return answer([&] {
        Prompt prompt = wishes_of(session).negative.value_or(Prompt());
        set_ids(prompt, tokenizer, ids, count);
        session->wishes.negative = std::move(prompt);
    });
}

glance_error *glance_session_set_guidance_scale(glance_session *session, double scale) {
    return answer([&] { wishes_of(session).guidance_scale = scale; });
}

glance_error *glance_session_set_schedule(glance_session *session, const char *name) {
    return answer([&] { wishes_of(session).schedule = name ? std::optional<std::string>(name) : std::nullopt; });
}

glance_error *glance_session_set_size(glance_session *session, int32_t height, int32_t width) {
    return answer([&] {
        wishes_of(session).height = height;
        session->wishes.width = width;
    });
}

glance_error *glance_session_set_seed(glance_session *session, uint64_t seed) {
    return answer([&] { wishes_of(session).seed = seed; });
}

glance_error *glance_session_set_count(glance_session *session, int32_t count) {
    return answer([&] { wishes_of(session).count = count; });
}

glance_error *glance_session_set_batch_size(glance_session *session, int32_t batch_size) {
    return answer([&] { wishes_of(session).batch_size = batch_size; });
}

glance_error *glance_session_set_latents(glance_session *session, const float *latents, size_t count) {
    return answer([&] {
        auto &place = wishes_of(session).latents;
        place = latents ? std::optional(numbers_of(latents, count, "latents")) : std::nullopt;
    });
}

glance_error *glance_session_set_image(glance_session *session, const uint8_t *pixels, int32_t height, int32_t width) {
    return answer([&] {
        auto &place = wishes_of(session).image;
        if (!pixels) {
            place.reset();
            return;
        }
        if (height < 1 || width < 1 || height > limits::image_side || width > limits::image_side) {
            throw Error(Kind::input, "image: expected sides from 1 to " + std::to_string(limits::image_side) +
                                         ", got " + std::to_string(height) + " x " + std::to_string(width) +
                                         " (height x width)");
        }
        const std::size_t bytes = static_cast<std::size_t>(height) * static_cast<std::size_t>(width) * 3;
        place = Picture{{height, width}, {pixels, pixels + bytes}};
    });
}

glance_error *glance_session_set_strength(glance_session *session, double strength) {
    return answer([&] { wishes_of(session).strength = strength; });
}

glance_error *glance_session_set_progress(glance_session *session, glance_progress_callback callback, void *user) {
    return answer([&] { given(session, "session").progress = progress_of(callback, user); });
}

glance_error *glance_session_run(glance_session *session, glance_images **out) {
    return answer([&] {
        given(out, "out") = nullptr;
        given(session, "session").cancelled = false;
        const Observer observer = {session->progress, session->cancelled};
        *out = new glance_images{session->loaded->pipeline.generate(session->wishes, observer)};
    });
}

void glance_session_cancel(glance_session *session) {
    session->cancelled = true;
}

size_t glance_images_count(const glance_images *images) {
    return images->pictures.pixels.size();
}

size_t glance_images_height(const glance_images *images) {
    return static_cast<size_t>(images->pictures.size.height);
}

size_t glance_images_width(const glance_images *images) {
    return static_cast<size_t>(images->pictures.size.width);
}

const uint8_t *glance_images_pixels(const glance_images *images, size_t index) {
    const auto &all = images->pictures.pixels;
    return index < all.size() ? all[index].data() : nullptr;
}

void glance_images_free(glance_images *images) {
    delete images;
}

void glance_noise(uint64_t seed, float *values, size_t count) {
    Generator(seed).draw(values, count);
}
}
