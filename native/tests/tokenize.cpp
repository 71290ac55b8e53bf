// What a tokenizer makes of prompts: tokenize FILE MAX_LENGTH PAD_TOKEN_ID TEMPLATE takes them from stdin, each with a
// zero at its end, and prints a line for each: the ids, and after a tab the end that did not fit, quoted.
#include "error.hpp"
#include "json.hpp"
#include "tokenizer.hpp"

#include <fstream>
#include <iostream>
#include <sstream>

int main(int count, char **arguments) {
    if (count != 5) {
        return 2;
    }
    std::ifstream file(arguments[1], std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    try {
        const glance_trt::TokenizerItem item = {arguments[1], std::stoll(arguments[2]), std::stoll(arguments[3]),
                                                arguments[4]};
        const auto tokenizer = glance_trt::make_tokenizer(content.str(), item, "tokenizer.json");
        for (std::string prompt; std::getline(std::cin, prompt, '\0');) {
            const glance_trt::Encoded encoded = tokenizer->encode(prompt);
            for (std::size_t i = 0; i < encoded.ids.size(); ++i) {
                std::cout << (i > 0 ? " " : "") << (encoded.mask[i] ? "" : "-") << encoded.ids[i];
            }
            std::cout << '\t' << glance_trt::json::quoted(encoded.dropped) << '\n';
        }
    } catch (const glance_trt::Error &error) {
        std::cerr << static_cast<int>(error.kind()) << ' ' << error.what() << '\n';
        return 1;
    }
    return 0;
}
