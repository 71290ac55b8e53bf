/* glance.h is C, and what it says of errors and of NULL holds. */
#include <glance.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void check(int claim, const char *text) {
    if (!claim) {
        fprintf(stderr, "does not hold: %s\n", text);
        failures = 1;
    }
}

/* An error of the kind, whose message has the text in it; it is freed. */
static void check_error(glance_error *error, int32_t kind, const char *text) {
    check(error != NULL, text);
    if (error) {
        check(glance_error_kind(error) == kind, text);
        check(strstr(glance_error_message(error), text) != NULL, glance_error_message(error));
        glance_error_free(error);
    }
}

int main(void) {
    glance_options *options = NULL;
    glance_bundle *bundle = (glance_bundle *)&failures;
    glance_session *session = (glance_session *)&failures;
    float noise[16];

    check(strcmp(glance_version(), "0.1.0") == 0, "the version");
    check(glance_options_create(&options) == NULL, "options can be made");
    check(glance_options_set_threads(options, 512) == NULL, "512 threads");
    check_error(glance_options_set_threads(options, 513), GLANCE_ERROR_INPUT, "threads: expected 1 to 512, got 513");
    check_error(glance_options_set_device(options, -1), GLANCE_ERROR_INPUT, "device: expected a whole number");
    check_error(glance_options_set_target(NULL, "cpu"), GLANCE_ERROR_INPUT, "options: NULL");
    check_error(glance_bundle_open("no-such-folder", options, &bundle), GLANCE_ERROR_BUNDLE,
                "no-such-folder: no such folder; a bundle is made with: glance-trt build RECIPE -o no-such-folder");
    check(bundle == NULL, "what a failed function gives is NULL");
    check_error(glance_bundle_open(NULL, NULL, &bundle), GLANCE_ERROR_INPUT, "folder: NULL");
    check_error(glance_bundle_open("no-such-folder", NULL, NULL), GLANCE_ERROR_INPUT, "out: NULL");
    check_error(glance_session_create(NULL, &session), GLANCE_ERROR_INPUT, "bundle: NULL");
    check(session == NULL, "what a failed function gives is NULL");
    check_error(glance_session_set_prompt(NULL, "a star"), GLANCE_ERROR_INPUT, "session: NULL");
    check_error(glance_session_run(NULL, NULL), GLANCE_ERROR_INPUT, "out: NULL");

    glance_noise(0, noise, 16);
    check(fabsf(noise[0] + 1.12583983F) < 1e-6F, "torch.randn(16) of seed 0 starts with -1.1258398");

    glance_options_free(options);
    glance_options_free(NULL);
    glance_bundle_free(NULL);
    glance_session_free(NULL);
    glance_images_free(NULL);
    glance_error_free(NULL);
    return failures;
}
