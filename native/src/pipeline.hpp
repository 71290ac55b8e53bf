// Prompts to images by a bundle: conditions, a start, a loop over the schedule's table, and the decoder.
#pragma once

#include "engine.hpp"
#include "manifest.hpp"
#include "noise.hpp"
#include "progress.hpp"
#include "prompting.hpp"
#include "settings.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace glance_trt {

/// Images of one size: RGB, rows from the top.
struct Pictures {
    Size size;
    std::vector<std::vector<std::uint8_t>> pixels;
};

/// How a run is watched, and ended.
struct Observer {
    Progress progress; // may be empty
    const std::atomic<bool> &cancelled;
};

/// A bundle's graphs, opened for one target. May be used from several threads at once.
class Pipeline {
  public:
    Pipeline(Manifest manifest, std::unique_ptr<const Runner> runner, ReadFile read, Log log);

    /// Throws `Error`.
    Pictures generate(const Wishes &wishes, const Observer &observer);

  private:
    void check_latents(const Settings &settings, const Wishes &wishes) const;
    /// An image's latents before the first step that runs.
    void start(const Settings &settings, const Wishes &wishes, std::size_t index, float *latents) const;
    /// The latents of the image to start from, sampled with the generator's next draw where the encoder takes noise.
    Tensor encoded(const Wishes &wishes, const Size &size, Generator &generator) const;
    void add(const Tensor &images, std::size_t count, Pictures &into) const;
    void add_tiled(const Tensor &latents, std::size_t count, Pictures &into) const;

    const Manifest manifest_;
    const std::unique_ptr<const Runner> runner_;
    TextEncoders text_;
};

} // namespace glance_trt
