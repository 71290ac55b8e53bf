/* glance.h - images from a bundle of glance-trt, in C: no Python, no PyTorch.
 *
 *   glance_bundle *bundle = NULL;
 *   glance_session *session = NULL;
 *   glance_images *images = NULL;
 *   glance_error *error = glance_bundle_open("shapes.bundle", NULL, &bundle);
 *   if (!error) error = glance_session_create(bundle, &session);
 *   if (!error) error = glance_session_set_prompt(session, "a large red circle on a white background");
 *   if (!error) error = glance_session_run(session, &images);
 *   if (error) fprintf(stderr, "%s\n", glance_error_message(error));
 *
 * Errors. A function that can fail returns NULL when it did what it says, else an error, which the caller frees. What
 * it would have given through `out` is then NULL. No C++ exception leaves the library, and it ends no process.
 *
 * Lifetime. What a function gives through `out` belongs to the caller, who frees it with the function for it; NULL may
 * be freed. They may be freed in any order: a session keeps what it needs of its bundle. Text and arrays that are
 * passed in are copied before the function returns. Text and arrays that are returned belong to the object that was
 * asked, and live as long as it does. What `user` points to must outlive the object that the callback was given to, and
 * for a bundle's callbacks the bundle's sessions as well.
 *
 * Threads. The functions of a glance_bundle may be called from any threads at once. A glance_options or a
 * glance_session is for one thread at a time, but for glance_session_cancel, which may be called from any while the
 * session lives. Many sessions of one bundle may run at once. No object may be freed while a call on it is in progress.
 *
 * Text is UTF-8 that ends in a zero byte. The library writes nothing to stdout or stderr: what it has to say goes to a
 * log callback, if there is one. Callbacks must not throw.
 *
 * Versions. Every function here has the symbol version GLANCE_1, and keeps its meaning under it; later versions of the
 * library add functions, under versions of their own.
 */
#ifndef GLANCE_H
#define GLANCE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GLANCE_API __attribute__((visibility("default")))
#else
#define GLANCE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct glance_error glance_error;
typedef struct glance_options glance_options;
typedef struct glance_bundle glance_bundle;
typedef struct glance_session glance_session;
typedef struct glance_images glance_images;

/* The library's version, such as "0.1.0". */
GLANCE_API const char *glance_version(void);

/* Errors. The kinds have the numbers of the exit codes of the command glance-trt. */

enum {
    GLANCE_ERROR_OTHER = 1,        /* no memory, or a fault of the library */
    GLANCE_ERROR_BUNDLE = 6,       /* a bundle is damaged, altered, malformed, or of a newer format */
    GLANCE_ERROR_TARGET = 7,       /* this machine cannot run what was asked */
    GLANCE_ERROR_INPUT = 8,        /* a value that was given is not usable: a prompt, a size, a schedule's name */
    GLANCE_ERROR_UNSUPPORTED = 12, /* it takes what this library cannot do, and the Python package can */
    GLANCE_ERROR_CANCELLED = 130   /* a callback or glance_session_cancel asked for the end */
};

GLANCE_API int32_t glance_error_kind(const glance_error *error);
/* What, where, what was expected, and what to do. */
GLANCE_API const char *glance_error_message(const glance_error *error);
GLANCE_API void glance_error_free(glance_error *error);

/* Callbacks. */

enum { GLANCE_LOG_INFO = 1, GLANCE_LOG_WARNING = 2, GLANCE_LOG_ERROR = 3 };

/* May be called from several threads at once. */
typedef void (*glance_log_callback)(void *user, int32_t level, const char *message);

/* How much of a stage is done, and of how much, in the stage's own unit: "check", the bytes of files whose content is
 * checked; "generate", the steps of all images. Called in the thread of the call that it reports on, the first time of
 * a stage with done == 0, and of "generate" when all that was set has been checked. Returns 0 to go on; anything else ends the call with GLANCE_ERROR_CANCELLED. */
typedef int32_t (*glance_progress_callback)(void *user, const char *stage, uint64_t done, uint64_t total);

/* Options, for opening a bundle. A NULL in their place means the defaults. */

GLANCE_API glance_error *glance_options_create(glance_options **out);
GLANCE_API void glance_options_free(glance_options *options);
/* One of the bundle's targets; NULL, the default: the first that runs here. */
GLANCE_API glance_error *glance_options_set_target(glance_options *options, const char *name);
/* Threads that compute one graph on the CPU, 1 to 512; 0, the default: as many as there are cores. */
GLANCE_API glance_error *glance_options_set_threads(glance_options *options, int32_t threads);
/* The GPU, as CUDA counts those that it sees; by default 0. */
GLANCE_API glance_error *glance_options_set_device(glance_options *options, int32_t device);
/* Whether to open engines that are native code and that this user did not build here; by default 0, not. */
GLANCE_API glance_error *glance_options_set_trust(glance_options *options, int32_t trust);
/* The path of ONNX Runtime's shared library; NULL, the default: that of the environment variable GLANCE_ONNXRUNTIME,
 * else the one that the library was built for, else the system's libonnxruntime.so.1. */
GLANCE_API glance_error *glance_options_set_onnxruntime(glance_options *options, const char *path);
/* The folder with the record of large files that were hashed already; NULL, the default: the one that the command
 * glance-trt uses; "": no record, every file is hashed. */
GLANCE_API glance_error *glance_options_set_cache(glance_options *options, const char *folder);
/* NULL: none, the default. The callback stays with the bundle. */
GLANCE_API glance_error *glance_options_set_log(glance_options *options, glance_log_callback callback, void *user);
/* NULL: none, the default. Called while a bundle is opened or verified. */
GLANCE_API glance_error *glance_options_set_progress(glance_options *options, glance_progress_callback callback,
                                                     void *user);

/* Bundles. */

/* Check a bundle's manifest and the files that its target needs, and load their engines. */
GLANCE_API glance_error *glance_bundle_open(const char *folder, const glance_options *options, glance_bundle **out);
/* Check a bundle's manifest and the content of every file, whether it was hashed before or not. */
GLANCE_API glance_error *glance_bundle_verify(const char *folder, const glance_options *options);
GLANCE_API void glance_bundle_free(glance_bundle *bundle);
/* The target that runs. */
GLANCE_API const char *glance_bundle_target(const glance_bundle *bundle);
/* The manifest, bundle.json, as it was checked: sizes, schedules, tokenizers, defaults. */
GLANCE_API const char *glance_bundle_manifest(const glance_bundle *bundle);
/* The manifest's SHA-256, 64 hexadecimal digits, which identifies the bundle's whole content. */
GLANCE_API const char *glance_bundle_sha256(const glance_bundle *bundle);

/* Sessions: what is to be made. What is not set is the bundle's default. */

GLANCE_API glance_error *glance_session_create(const glance_bundle *bundle, glance_session **out);
GLANCE_API void glance_session_free(glance_session *session);
/* In place of a prompt or token ids that were set before. */
GLANCE_API glance_error *glance_session_set_prompt(glance_session *session, const char *prompt);
GLANCE_API glance_error *glance_session_set_negative_prompt(glance_session *session, const char *prompt);
/* The prompt as token ids, in place of a prompt: those of one of the bundle's tokenizers, special ones included,
 * without padding. A bundle with several tokenizers takes ids for each. */
GLANCE_API glance_error *glance_session_set_tokens(glance_session *session, const char *tokenizer, const int64_t *ids,
                                                   size_t count);
GLANCE_API glance_error *glance_session_set_negative_tokens(glance_session *session, const char *tokenizer,
                                                            const int64_t *ids, size_t count);
GLANCE_API glance_error *glance_session_set_guidance_scale(glance_session *session, double scale);
/* A schedule's name; NULL: the first that fits the size. */
GLANCE_API glance_error *glance_session_set_schedule(glance_session *session, const char *name);
/* Pixels; 0: the usual one. */
GLANCE_API glance_error *glance_session_set_size(glance_session *session, int32_t height, int32_t width);
/* Image i starts from the noise of seed + i (modulo 2^64), as torch.Generator("cpu") draws it; by default 0. */
GLANCE_API glance_error *glance_session_set_seed(glance_session *session, uint64_t seed);
/* Images, at least 1, the default. */
GLANCE_API glance_error *glance_session_set_count(glance_session *session, int32_t count);
/* Images that are computed together, at least 1; by default 4. */
GLANCE_API glance_error *glance_session_set_batch_size(glance_session *session, int32_t batch_size);
/* To start from, in place of the seeds' noise times the schedule's initial noise scale: [images, channels, height,
 * width], of `count` numbers in all. NULL: none. */
GLANCE_API glance_error *glance_session_set_latents(glance_session *session, const float *latents, size_t count);
/* An image to start from: height * width * 3 bytes, RGB, rows from the top, of the size that is to be made, which is by
 * default the image's own. NULL: none. */
GLANCE_API glance_error *glance_session_set_image(glance_session *session, const uint8_t *pixels, int32_t height,
                                                  int32_t width);
/* How much of the schedule runs from the image, above 0 and at most 1; by default 0.8. */
GLANCE_API glance_error *glance_session_set_strength(glance_session *session, double strength);
/* NULL: none, the default. */
GLANCE_API glance_error *glance_session_set_progress(glance_session *session, glance_progress_callback callback,
                                                     void *user);
/* Make the images. The same session may be run again. */
GLANCE_API glance_error *glance_session_run(glance_session *session, glance_images **out);
/* End the run that is in progress, if one is, before its next step. */
GLANCE_API void glance_session_cancel(glance_session *session);

/* Images: of one size, RGB, 8 bits each, rows from the top, without padding. */

GLANCE_API size_t glance_images_count(const glance_images *images);
GLANCE_API size_t glance_images_height(const glance_images *images);
GLANCE_API size_t glance_images_width(const glance_images *images);
/* height * width * 3 bytes; NULL where there is no such image. */
GLANCE_API const uint8_t *glance_images_pixels(const glance_images *images, size_t index);
GLANCE_API void glance_images_free(glance_images *images);

/* Noise: the first `count` numbers that torch.randn gives with torch.Generator("cpu").manual_seed(seed). */
GLANCE_API void glance_noise(uint64_t seed, float *values, size_t count);

#ifdef __cplusplus
}
#endif

#endif
