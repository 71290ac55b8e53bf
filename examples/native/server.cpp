// Images over HTTP, without Python: server BUNDLE [--port 8080] [--threads 1] [--queue 8]
//
//   curl --json '{"prompt": "a large red circle on a white background", "seed": 7}' localhost:8080/generate > image.png
//
// POST /generate answers 200 with a PNG; 400 with what is wrong with the input; 503 while --threads images are being
// made and --queue requests wait; 500 with any other error. GET /health answers 200. SIGTERM and SIGINT let images that
// are being made be finished. It listens on 127.0.0.1: leave TLS, and who may ask, to a proxy.
//
// The status is sent when the input has been checked, and the image when it is made: cpp-httplib 0.11 lets only what
// streams an answer know whether the client is still there. An error in between ends the connection within the answer.
#include "../png.hpp"
#include "queue.hpp"

#include <glance.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include <httplib.h>
#include <nlohmann/json.hpp>

namespace {

using nlohmann::json;

/// The making of an image in a thread of its own. It is given up where this object ends first.
class Work {
  public:
    Work(Queue::Turn turn, glance::Session session) : turn_(std::move(turn)), session_(std::move(session)) {
        session_.set_progress([this](const std::string &, std::uint64_t, std::uint64_t) { return checked_ = true; });
        png_ = std::async(std::launch::async, [this] {
            const glance::Images images = session_.run();
            return encode_png(images.pixels(0), images.height(), images.width());
        });
    }
    ~Work() { session_.cancel(); }

    /// Whether the input has been checked: the library reports progress only then.
    bool checked() const { return checked_; }
    /// Whether it has ended, well or not; waits a moment for that.
    bool ended() const { return png_.wait_for(std::chrono::milliseconds(10)) == std::future_status::ready; }
    /// The image, or what was thrown; once.
    std::string png() { return png_.get(); }

  private:
    Queue::Turn turn_;
    glance::Session session_;
    std::atomic<bool> checked_ = false;
    std::future<std::string> png_; // the last member: it waits for the thread, which uses the others
};

bool is_text(const json &value) {
    return value.is_string() && value.get_ref<const std::string &>().find('\0') == std::string::npos;
}

bool is_size(const json &value) {
    return value.is_array() && value.size() == 2 && std::all_of(value.begin(), value.end(), [](const json &side) {
               return side.is_number_unsigned() && side <= INT32_MAX;
           });
}

constexpr const char *expected = "a request is an object with prompt and negative_prompt (text), seed (whole, not "
                                 "negative), guidance_scale (a number) and size ([height, width])";

/// What a request asks for.
glance::Session session_of(const glance::Bundle &bundle, const std::string &body) {
    const json request = json::parse(body);
    glance::Session session(bundle);
    for (const auto &[name, value] : request.items()) {
        if (name == "prompt" && is_text(value)) {
            session.set_prompt(value.get<std::string>());
        } else if (name == "negative_prompt" && is_text(value)) {
            session.set_negative_prompt(value.get<std::string>());
        } else if (name == "seed" && value.is_number_unsigned()) {
            session.set_seed(value.get<std::uint64_t>());
        } else if (name == "guidance_scale" && value.is_number()) {
            session.set_guidance_scale(value.get<double>());
        } else if (name == "size" && is_size(value)) {
            session.set_size(value[0].get<std::int32_t>(), value[1].get<std::int32_t>());
        } else {
            const std::string given = (name.empty() ? "" : name + ": ") + value.dump();
            const std::string text = given + " is not taken; " + expected;
            throw glance::Error(GLANCE_ERROR_INPUT, text.c_str());
        }
    }
    return session;
}

void answer(httplib::Response &response, int status, const std::string &text) {
    response.status = status;
    response.set_content(text + "\n", "text/plain; charset=utf-8");
}

void generate(const glance::Bundle &bundle, Queue &queue, const std::string &body, httplib::Response &response) {
    glance::Session session = session_of(bundle, body);
    Queue::Turn turn = queue.enter();
    if (!turn) {
        response.set_header("Retry-After", "1");
        return answer(response, 503, "busy; try again later");
    }
    const auto work = std::make_shared<Work>(std::move(turn), std::move(session));
    while (!work->checked() && !work->ended()) {
    }
    if (work->ended()) {
        return response.set_content(work->png(), "image/png");
    }
    response.set_chunked_content_provider("image/png", [work](std::size_t, httplib::DataSink &sink) {
        while (!work->ended()) {
            if (!sink.is_writable()) {
                std::fputs("a client has gone; its image is given up\n", stderr);
                return false;
            }
        }
        try {
            const std::string png = work->png();
            sink.write(png.data(), png.size());
            sink.done();
            return true;
        } catch (const std::exception &error) {
            std::fprintf(stderr, "error: %s\n", error.what());
            return false;
        }
    });
}

/// The answer to a request whose handling has thrown.
void refuse(httplib::Response &response, const std::exception_ptr &thrown) {
    try {
        std::rethrow_exception(thrown);
    } catch (const json::exception &error) {
        answer(response, 400, error.what());
    } catch (const glance::Error &error) {
        answer(response, error.kind() == GLANCE_ERROR_INPUT ? 400 : 500, error.what());
    } catch (const std::exception &error) {
        answer(response, 500, error.what());
    }
}

void serve(const char *folder, int port, std::size_t working, std::size_t waiting) {
    sigset_t ends; // blocked in every thread, for sigwait to take
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &ends, nullptr);

    const glance::Bundle bundle(folder);
    Queue queue(working, waiting);
    httplib::Server server;
    // A request waits in a thread; four more are for those that are refused, and for /health.
    server.new_task_queue = [&] { return new httplib::ThreadPool(working + waiting + 4); };
    server.set_keep_alive_max_count(1); // an idle connection would keep a thread
    server.set_payload_max_length(1 << 16);
    server.set_socket_options([](int socket) { // the default would let two servers share a port
        const int yes = 1;
        setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    server.set_exception_handler(
        [](const auto &, httplib::Response &response, const std::exception_ptr &thrown) { refuse(response, thrown); });
    server.Get("/health", [](const auto &, httplib::Response &response) { answer(response, 200, "ok"); });
    server.Post("/generate", [&](const httplib::Request &request, httplib::Response &response) {
        generate(bundle, queue, request.body, response);
    });

    const char *host = "127.0.0.1";
    const int bound = port == 0 ? server.bind_to_any_port(host) : server.bind_to_port(host, port) ? port : -1;
    if (bound < 0) {
        throw std::runtime_error("port " + std::to_string(port) + ": cannot be listened on");
    }
    std::thread listener([&] { server.listen_after_bind(); });
    std::fprintf(stderr, "http://%s:%d\n", host, bound);
    int signal = 0;
    sigwait(&ends, &signal);
    queue.close();
    server.stop();
    listener.join();
}

} // namespace

int main(int count, char **arguments) {
    std::map<std::string, long> options = {{"--port", 8080}, {"--threads", 1}, {"--queue", 8}};
    bool good = count >= 2 && count % 2 == 0;
    for (int i = 2; good && i < count; i += 2) {
        const auto option = options.find(arguments[i]);
        char *end = nullptr;
        const long value = std::strtol(arguments[i + 1], &end, 10);
        good = option != options.end() && *end == '\0' && value >= (option->first == "--threads") && value <= 65535;
        if (good) {
            option->second = value;
        }
    }
    if (!good) {
        std::fputs("usage: server BUNDLE [--port N] [--threads N] [--queue N]\n"
                   "  --port     to listen on; 0: any that is free (default 8080)\n"
                   "  --threads  images that are made at once (default 1)\n"
                   "  --queue    requests that may wait for that (default 8)\n",
                   stderr);
        return 2;
    }
    try {
        serve(arguments[1], static_cast<int>(options["--port"]), static_cast<std::size_t>(options["--threads"]),
              static_cast<std::size_t>(options["--queue"]));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
