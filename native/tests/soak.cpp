// Many sessions of one bundle in many threads for a while, through the C ABI, over engines that are made up: images are
// always the same, runs that are cancelled or fail say so, and memory does not grow.
//
//   glance_soak SECONDS THREADS [IMAGES], the last at least
#include "abi/handles.hpp"
#include "check.hpp"
#include "fake.hpp"

#include <glance.hpp>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kept = 100; // prompts, more than are cached
constexpr long most_growth = 32 << 10;

struct Counts {
    std::atomic<long> images{0}, cancelled{0}, failed{0}, exhausted{0};
};

std::vector<std::uint8_t> image_of(const glance_bundle *bundle, std::int64_t prompt, bool large) {
    glance_session *made = nullptr;
    glance::detail::check(glance_session_create(bundle, &made));
    const std::unique_ptr<glance_session, decltype(&glance_session_free)> session(made, glance_session_free);
    const std::array<std::int64_t, 2> ids = {100 + prompt, 7};
    glance::detail::check(glance_session_set_tokens(made, "words", ids.data(), ids.size()));
    glance::detail::check(glance_session_set_negative_tokens(made, "words", ids.data() + 1, 1));
    glance::detail::check(glance_session_set_seed(made, static_cast<std::uint64_t>(prompt)));
    if (large) {
        glance::detail::check(glance_session_set_size(made, 16, 32));
    }
    glance_images *images = nullptr;
    glance::detail::check(glance_session_run(made, &images));
    const glance::Images owned(images);
    return {owned.pixels(0), owned.pixels(0) + owned.height() * owned.width() * 3};
}

/// A run that is cancelled by its callback, or by another thread, or that its engine lets down.
void disturb(const glance_bundle *bundle, std::mt19937 &random, Counts &counts) {
    glance_session *made = nullptr;
    glance::detail::check(glance_session_create(bundle, &made));
    const std::unique_ptr<glance_session, decltype(&glance_session_free)> session(made, glance_session_free);
    const std::array<std::int64_t, 3> choices = {fake::failing_token, fake::exhausting_token, 200};
    const std::int64_t id = choices[random() % choices.size()];
    glance::detail::check(glance_session_set_tokens(made, "words", &id, 1));
    glance::detail::check(glance_session_set_negative_tokens(made, "words", choices.data() + 2, 1));
    glance::detail::check(glance_session_set_count(made, 1000));
    std::thread other;
    if (random() % 2) {
        const auto stop = [](void *, const char *, std::uint64_t done, std::uint64_t) { return done > 20 ? 1 : 0; };
        glance::detail::check(glance_session_set_progress(made, stop, nullptr));
    } else {
        const auto begin = [](void *user, const char *, std::uint64_t, std::uint64_t) {
            *static_cast<std::atomic<bool> *>(user) = true;
            return 0;
        };
        static thread_local std::atomic<bool> begun;
        begun = false;
        glance::detail::check(glance_session_set_progress(made, begin, &begun));
        other = std::thread([made, &running = begun] {
            while (!running) {
                std::this_thread::yield();
            }
            glance_session_cancel(made);
        });
    }
    glance_images *images = nullptr;
    glance_error *error = glance_session_run(made, &images);
    if (other.joinable()) {
        other.join();
    }
    CHECK(error && !images);
    const std::int32_t kind = glance_error_kind(error);
    CHECK(kind == GLANCE_ERROR_CANCELLED || (id != 200 && (kind == GLANCE_ERROR_TARGET || kind == GLANCE_ERROR_OTHER)));
    ++(kind == GLANCE_ERROR_CANCELLED ? counts.cancelled
       : kind == GLANCE_ERROR_TARGET  ? counts.failed
                                      : counts.exhausted);
    glance_error_free(error);
}

/// Resident memory, KiB; 0 where the system does not say.
long resident() {
    std::ifstream status("/proc/self/status");
    std::string word;
    long size = 0;
    while (status >> word) {
        if (word == "VmRSS:") {
            status >> size;
        }
    }
    return size;
}

} // namespace

int main(int count, char **arguments) {
    const int seconds = count > 1 ? std::stoi(arguments[1]) : 2, threads = count > 2 ? std::stoi(arguments[2]) : 8;
    const long least = count > 3 ? std::stol(arguments[3]) : 1;
    const glance_bundle bundle = {
        std::shared_ptr<glance_trt::Loaded>(new glance_trt::Loaded{"fake", "{}", "", fake::pipeline()})};
    std::vector<std::vector<std::uint8_t>> expected;
    for (std::size_t i = 0; i < 2 * kept; ++i) {
        expected.push_back(image_of(&bundle, static_cast<std::int64_t>(i / 2), i % 2));
    }
    Counts counts;
    const auto end = Clock::now() + std::chrono::seconds(seconds);
    const auto work = [&](unsigned seed) {
        std::mt19937 random(seed);
        while (Clock::now() < end) {
            const std::size_t i = random() % expected.size();
            CHECK(image_of(&bundle, static_cast<std::int64_t>(i / 2), i % 2) == expected[i]);
            ++counts.images;
            if (random() % 4 == 0) {
                disturb(&bundle, random, counts);
            }
        }
    };
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
        running.emplace_back(work, static_cast<unsigned>(i));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(500 * seconds));
    const long halfway = resident();
    for (std::thread &thread : running) {
        thread.join();
    }
    const long growth = resident() - halfway;
    std::printf(
        "%ld images, %ld runs cancelled, %ld failed, %ld out of memory; memory grew by %ld KiB in the second half\n",
        counts.images.load(), counts.cancelled.load(), counts.failed.load(), counts.exhausted.load(), growth);
    CHECK(counts.images >= least && counts.cancelled > 0 && counts.failed > 0 && counts.exhausted > 0);
    CHECK(growth < most_growth);
    return 0;
}
