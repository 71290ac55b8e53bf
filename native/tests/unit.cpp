// Parts of the library that Python does not reach.
#include "check.hpp"
#include "fake.hpp"
#include "files.hpp"
#include "json.hpp"
#include "noise.hpp"
#include "onnxruntime/shapes.hpp"
#include "prompting.hpp"
#include "records.hpp"
#include "text.hpp"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include <sys/stat.h>
#include <unistd.h>

using namespace glance_trt;

namespace {

void test_text_is_shown_as_python_shows_it() {
    CHECK(shown("a'b") == "\"a'b\"");
    CHECK(shown("a'\"b") == "'a\\'\"b'");
    CHECK(shown("\n\t\\\x1b") == "'\\n\\t\\\\\\x1b'");
    CHECK(shown("\xC3\xA9\xE2\x80\xAE\xF0\x9F\x98\x80") == "'\\xe9\\u202e\\U0001f600'");
    CHECK(shown("\xff") == "'\\udcff'");
    CHECK(shown(std::string(41, 'x')) == "'" + std::string(36, 'x') + "...");
    CHECK(shown(1.0) == "1.0" && shown(-0.5) == "-0.5" && shown(1e39) == "1e+39");
    CHECK(shown_briefly(1.0) == "1" && shown_briefly(0.25) == "0.25");
    CHECK(closest("dtpye", {"name", "dtype", "shape"}) == "dtype");
    CHECK(closest("x", {"name", "dtype"}).empty());
    CHECK(valid_utf8("a\xC0\x80") == 1 && valid_utf8("\xED\xA0\x80") == 0 && valid_utf8("\xC3\xA9") == 2);
    CHECK(stripped(" \n a b\t") == "a b" && stripped(" \n").empty());
}

void test_json_keeps_numbers_as_they_are_written() {
    const json::Value value = json::parse("[18446744073709551616, -1, 1.0, 1e2]");
    const auto &list = *value.as<json::List>();
    CHECK(list[0].as<json::Whole>()->digits == "18446744073709551616" && !list[0].as<json::Whole>()->value());
    CHECK(list[1].as<json::Whole>()->value() == -1);
    CHECK(list[2].as<double>() && list[3].as<double>());
    CHECK_THROWS(json::Malformed, json::parse("[1] 2"));
    CHECK_THROWS(json::Malformed, json::parse("{\"a\": 1, \"\\u0061\": 2}"));
    CHECK_THROWS(json::Malformed, json::parse(std::string(100000, '[')));
    CHECK_THROWS(json::Malformed, json::parse("[1,]"));
}

void test_draws_of_one_generator_follow_each_other() {
    // torch.randn(3), then torch.randn(2), with torch.Generator("cpu").manual_seed(0)
    Generator generator(0);
    float values[5];
    generator.draw(values, 3);
    generator.draw(values + 3, 2);
    const float expected[5] = {1.5409960747F, -0.2934288979F, -2.1787893772F, 0.5684312582F, -1.0845223665F};
    for (int i = 0; i < 5; ++i) {
        CHECK(std::abs(values[i] - expected[i]) < 1e-6F);
    }
}

Tensors of_bytes(std::size_t count) {
    return {{"embeds", Tensor("uint8", {static_cast<std::int64_t>(count)}, std::vector<std::uint8_t>(count))}};
}

void test_a_cache_keeps_the_prompts_that_were_asked_for_last() {
    PromptCache cache;
    for (int i = 0; i < 64; ++i) {
        cache.add(std::to_string(i), of_bytes(8));
    }
    CHECK(cache.find("0"));
    cache.add("64", of_bytes(8));
    CHECK(cache.find("0") && !cache.find("1") && cache.find("2") && cache.find("64"));
    CHECK(cache.find("64")->at("embeds").bytes() == 8);
}

void test_a_record_is_kept_by_its_user_alone(const std::string &folder) {
    const std::string sha256(64, 'a'), path = folder + "/cache/hashed.json";
    const Record record(folder + "/cache", hashed_record);
    CHECK(record.find("1:2").empty());
    record.add("1:2", sha256);
    CHECK(record.find("1:2") == sha256 && record.find("1:3").empty());
    std::string full = "{\"1:2\": \"" + sha256 + "\"";
    for (int i = 1; i < 1000; ++i) {
        full += ", \"" + std::to_string(i) + "\": \"" + sha256 + "\"";
    }
    std::ofstream(path) << full << "}";
    CHECK(record.find("1:2") == sha256 && record.find("999") == sha256);
    record.add("1000", sha256);
    CHECK(record.find("1:2").empty() && record.find("1") == sha256 && record.find("1000") == sha256);
    struct stat status {};
    CHECK(stat(path.c_str(), &status) == 0 && (status.st_mode & 0777) == 0600);
    CHECK(chmod(path.c_str(), 0666) == 0 && record.find("999").empty());
    CHECK(chmod(path.c_str(), 0600) == 0 && record.find("999") == sha256);
    std::ofstream(path) << "{\"999\": ";
    CHECK(record.find("999").empty());
    CHECK(Record("", hashed_record).find("999").empty());
    CHECK(!Record(folder + "/cache", trusted_record).contains(sha256));
    std::ofstream(folder + "/cache/trusted.json") << "{\"" << sha256 << "\": \"\"}"; // as Python writes it
    CHECK(Record(folder + "/cache", trusted_record).contains(sha256));
}

void test_shapes_of_inputs_are_left_out_of_a_model_in_place() {
    // graph: {input: {name: "x", type: {tensor_type: {elem_type: 1, shape: {dim: {dim_value: 4}}}}}, output: {name:
    // "y"}}
    const std::string shape = "\x12\x04\x0A\x02\x08\x04", input = "\x0A\x01x\x12\x0A\x0A\x08\x08\x01" + shape;
    const std::string graph = "\x5A\x0F" + input + "\x62\x03\x0A\x01y";
    const std::string model = std::string("\x08\x0A\x3A") + static_cast<char>(graph.size()) + graph;
    std::string edited = model;
    onnxruntime::forget_input_shapes(edited);
    std::string expected = model;
    expected[model.find(shape)] = '\x7A';
    CHECK(edited == expected);
    for (std::size_t length = 0; length < model.size(); ++length) {
        std::string cut = model.substr(0, length);
        onnxruntime::forget_input_shapes(cut);
        CHECK(cut.size() == length);
    }
}

void test_a_text_encoder_runs_once_for_a_prompt() {
    struct Counting : fake::FakeRunner {
        Tensors run(const std::string &graph, const Tensors &inputs) const override {
            encoded += graph == "text_encoder";
            return FakeRunner::run(graph, inputs);
        }
        mutable int encoded = 0;
    };
    auto runner = std::make_unique<Counting>();
    const Counting &counting = *runner;
    Pipeline pipeline(fake::manifest(), std::move(runner), {}, {});
    const std::atomic<bool> cancelled{false};
    Wishes wishes;
    wishes.prompt.ids["words"] = {100};
    wishes.negative = Prompt{std::nullopt, {{"words", {101}}}};
    wishes.count = 5;
    pipeline.generate(wishes, {{}, cancelled});
    pipeline.generate(wishes, {{}, cancelled});
    CHECK(counting.encoded == 2);
}

} // namespace

int main() {
    std::string folder = "/tmp/glance-unit-XXXXXX";
    CHECK(mkdtemp(folder.data()));
    test_text_is_shown_as_python_shows_it();
    test_json_keeps_numbers_as_they_are_written();
    test_draws_of_one_generator_follow_each_other();
    test_a_cache_keeps_the_prompts_that_were_asked_for_last();
    test_a_record_is_kept_by_its_user_alone(folder);
    test_shapes_of_inputs_are_left_out_of_a_model_in_place();
    test_a_text_encoder_runs_once_for_a_prompt();
    unlink((folder + "/cache/hashed.json").c_str());
    rmdir((folder + "/cache").c_str());
    rmdir(folder.c_str());
    return 0;
}
