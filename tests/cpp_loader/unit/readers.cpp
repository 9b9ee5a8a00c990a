//! The loader's readers, one call per subcommand, so that a test can give them good and hostile files.
//!
//!   readers sha256 FILE                 prints the digest
//!   readers json-lines FILE             per line: "ok <the value written again>" or "refused"
//!   readers npz FILE OUT                reads an archive and writes it again
//!   readers manifest FILE | schedule FILE | feeds FILE | outputs FILE
//!   readers buffer-plans FILE           per line of BYTES FIRST LAST ...: the places of the tensors and the block's size
//!   readers cache-rules BUNDLE          what a cached history may be reused for; prints what does not hold
//!   readers session-rules BUNDLE        what a session does after failures; alters the bundle
//!   readers fuzz KIND FILE COUNT SEED   reads COUNT mutations of the file; prints how many were taken and refused
//! Exit 0; 3 for a refusal, whose text goes to stderr. Anything else is a failure.

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <locale>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "hstu_bundle.hpp"

//! Of cacheRules.cpp.
int checkCacheRules(std::string const& path);
//! Of sessionRules.cpp.
int checkSessionRules(std::string const& path);

namespace
{

using namespace hstu::loader;

std::string written(Json const& value)
{
    std::string text;
    switch (value.type())
    {
    case Json::Type::kNULL: return "null";
    case Json::Type::kBOOL: return value.boolean("") ? "true" : "false";
    case Json::Type::kSTRING: return jsonQuoted(value.string(""));
    case Json::Type::kNUMBER:
    {
        // In every locale with a point.
        std::ostringstream number;
        number.imbue(std::locale::classic());
        number.precision(17);
        number << value.number("");
        return number.str() == "nan" ? "NaN" : number.str();
    }
    case Json::Type::kARRAY:
        for (Json const& each : value.array(""))
        {
            text += (text.empty() ? "" : ",") + written(each);
        }
        return "[" + text + "]";
    case Json::Type::kOBJECT:
        for (auto const& [key, each] : value.object(""))
        {
            text += (text.empty() ? "" : ",") + jsonQuoted(key) + ":" + written(each);
        }
        return "{" + text + "}";
    }
    return "";
}

void readAs(std::string const& kind, Bytes const& content)
{
    if (kind == "manifest")
    {
        manifestFromJson(reinterpret_cast<char const*>(content.data()), content.size(), "fuzzed");
    }
    else if (kind == "schedule")
    {
        scheduleFromJson(reinterpret_cast<char const*>(content.data()), content.size(), "fuzzed");
    }
    else if (kind == "npz")
    {
        tensorsFromNpz(content, "fuzzed");
    }
    else
    {
        kind == "feeds" ? void(polygraphyFeedsOf(content, "fuzzed")) : void(polygraphyOutputsOf(content, "fuzzed"));
    }
}

//! Changes, drops, repeats or inserts a few bytes.
Bytes mutated(Bytes content, std::mt19937& random)
{
    auto const below = [&random](std::size_t size) { return size == 0 ? 0 : random() % size; };
    static std::string const kTOKENS = "{}[]\",:0123456789-eE.\\u/tfn";
    for (std::size_t change = below(4) + 1; change > 0; --change)
    {
        std::size_t const at = below(content.size());
        auto const place = content.begin() + static_cast<std::ptrdiff_t>(at);
        std::size_t const run = below(std::min<std::size_t>(content.size() - at, 40)) + (content.size() > at ? 1 : 0);
        auto const end = place + static_cast<std::ptrdiff_t>(run);
        Bytes const repeated(place, end);
        switch (below(6))
        {
        case 0: content.resize(at); break;
        case 1: content.erase(place, end); break;
        case 2: content.insert(place, repeated.begin(), repeated.end()); break;
        case 3: content.insert(place, static_cast<uint8_t>(kTOKENS[below(kTOKENS.size())])); break;
        default:
            if (at < content.size())
            {
                content[at] = static_cast<uint8_t>(below(3) == 0 ? 0xFF : below(256));
            }
        }
    }
    return content;
}

int fuzz(std::string const& kind, std::string const& file, long count, unsigned seed)
{
    Bytes const content = readFile(file, 1U << 30, Failure::kBUNDLE);
    readAs(kind, content);
    std::mt19937 random(seed);
    long taken = 0;
    for (long i = 0; i < count; ++i)
    {
        try
        {
            readAs(kind, mutated(content, random));
            ++taken;
        }
        catch (Error const& error)
        {
            if (error.failure() == Failure::kINTERNAL)
            {
                throw;
            }
        }
    }
    std::printf("%ld taken, %ld refused\n", taken, count - taken);
    return 0;
}

int printPlans(std::string const& text)
{
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
    {
        std::istringstream numbers(line);
        std::vector<Lifetime> tensors;
        for (Lifetime each; numbers >> each.bytes >> each.first >> each.last;)
        {
            each.name = std::to_string(tensors.size());
            tensors.push_back(each);
        }
        Layout const plan = plannedBuffers(tensors);
        for (Lifetime const& each : tensors)
        {
            std::printf("%zu ", plan.offsets.at(each.name));
        }
        std::printf("%zu\n", plan.bytes);
    }
    return 0;
}

int run(std::vector<std::string> const& words)
{
    std::string const& kind = words.at(0);
    if (kind == "sha256")
    {
        std::printf("%s\n", sha256OfFile(words.at(1), Failure::kBUNDLE).c_str());
        return 0;
    }
    if (kind == "cache-rules")
    {
        return checkCacheRules(words.at(1));
    }
    if (kind == "session-rules")
    {
        return checkSessionRules(words.at(1));
    }
    if (kind == "fuzz")
    {
        return fuzz(words.at(1), words.at(2), std::stol(words.at(3)), static_cast<unsigned>(std::stoul(words.at(4))));
    }
    if (kind == "npz")
    {
        writeNpz(words.at(2), readNpz(words.at(1)));
        return 0;
    }
    Bytes const content = readFile(words.at(1), 1U << 30, Failure::kBUNDLE);
    if (kind == "buffer-plans")
    {
        return printPlans({content.begin(), content.end()});
    }
    if (kind != "json-lines")
    {
        readAs(kind, content);
        return 0;
    }
    std::string const text(content.begin(), content.end());
    for (std::size_t start = 0; start < text.size();)
    {
        std::size_t const end = text.find('\n', start);
        try
        {
            std::printf("ok %s\n", written(Json::parse(text.data() + start, end - start, "line")).c_str());
        }
        catch (Error const&)
        {
            std::printf("refused\n");
        }
        start = end + 1;
    }
    return 0;
}

} // namespace

int main(int argc, char** argv)
{
    // As many programs do that the loader may be a part of.
    std::setlocale(LC_ALL, "");
    try
    {
        return run({argv + 1, argv + argc});
    }
    catch (Error const& error)
    {
        std::fprintf(stderr, "%s\n", error.what());
        return error.failure() == Failure::kINTERNAL ? 70 : 3;
    }
}
