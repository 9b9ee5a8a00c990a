#ifndef HSTU_LOADER_JSON_HPP
#define HSTU_LOADER_JSON_HPP

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <locale>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"

namespace hstu::loader
{

//! A JSON value. Strings are the bytes of the file (UTF-8 is passed through, escapes are decoded).
class Json
{
public:
    enum class Type
    {
        kNULL,
        kBOOL,
        kNUMBER,
        kSTRING,
        kARRAY,
        kOBJECT
    };

    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json>;

    Json() = default;

    //! Parses a whole document: RFC 8259, and NaN, Infinity and -Infinity, which Python's json module writes.
    //! Refused: anything after the value, duplicate keys, control characters in strings, lone surrogates, numbers that
    //! overflow, and values nested deeper than 64.
    //! \param name of the document, for messages.
    static Json parse(char const* text, std::size_t size, std::string const& name);

    Type type() const noexcept
    {
        return mType;
    }

    bool isNull() const noexcept
    {
        return mType == Type::kNULL;
    }

    bool isObject() const noexcept
    {
        return mType == Type::kOBJECT;
    }

    bool isString() const noexcept
    {
        return mType == Type::kSTRING;
    }

    bool isNumber() const noexcept
    {
        return mType == Type::kNUMBER;
    }

    //! The accessors below refuse a value of another type, naming it by `where`.
    bool boolean(std::string const& where) const
    {
        require(Type::kBOOL, where);
        return mBool;
    }

    double number(std::string const& where) const
    {
        require(Type::kNUMBER, where);
        return mNumber;
    }

    //! \return an integer within [least, most].
    int64_t integer(
        std::string const& where, int64_t least = 0, int64_t most = std::numeric_limits<int64_t>::max()) const
    {
        require(Type::kNUMBER, where);
        if (!mIsInteger || mInteger < least || mInteger > most)
        {
            refuse(where, textOf(mIsInteger ? std::to_string(mInteger) : std::to_string(mNumber),
                              " is not an integer in ", least, "..", most));
        }
        return mInteger;
    }

    std::string const& string(std::string const& where) const
    {
        require(Type::kSTRING, where);
        return mString;
    }

    Array const& array(std::string const& where) const
    {
        require(Type::kARRAY, where);
        return mArray;
    }

    Object const& object(std::string const& where) const
    {
        require(Type::kOBJECT, where);
        return mObject;
    }

    //! \return a member that must be there.
    Json const& at(std::string const& key, std::string const& where) const
    {
        Object const& members = object(where);
        auto const found = members.find(key);
        if (found == members.end())
        {
            refuse(where, "it lacks '" + key + "'");
        }
        return found->second;
    }

    //! \return a member, or null where it is absent or null.
    Json const* find(std::string const& key, std::string const& where) const
    {
        Object const& members = object(where);
        auto const found = members.find(key);
        return found == members.end() || found->second.isNull() ? nullptr : &found->second;
    }

    [[noreturn]] static void refuse(std::string const& where, std::string const& why)
    {
        throw Error(Failure::kBUNDLE, where + " cannot be used", why,
            "build the bundle again with a hstu-compile that writes bundle format 1");
    }

private:
    friend class JsonReader;

    void require(Type type, std::string const& where) const
    {
        static char const* const kNAMES[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
        if (mType != type)
        {
            refuse(where, textOf("it is ", kNAMES[static_cast<int>(mType)], ", not ", kNAMES[static_cast<int>(type)]));
        }
    }

    Type mType{Type::kNULL};
    bool mBool{false};
    bool mIsInteger{false};
    int64_t mInteger{0};
    double mNumber{0};
    std::string mString;
    Array mArray;
    Object mObject;
};

//! One pass over a document. Private to `Json::parse`.
class JsonReader
{
public:
    JsonReader(char const* text, std::size_t size, std::string const& name)
        : mText(text)
        , mSize(size)
        , mName(name)
    {
    }

    Json document()
    {
        Json value = read(0);
        skipSpace();
        if (mAt != mSize)
        {
            refuse("there is more after the value");
        }
        return value;
    }

private:
    static constexpr int kMOST_DEPTH = 64;
    static constexpr std::size_t kMOST_DIGITS = 400;

    [[noreturn]] void refuse(std::string const& why) const
    {
        Json::refuse(mName, textOf("it is not JSON: ", why, " at byte ", mAt));
    }

    int peek() const
    {
        return mAt < mSize ? static_cast<unsigned char>(mText[mAt]) : -1;
    }

    void skipSpace()
    {
        while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')
        {
            ++mAt;
        }
    }

    bool takeWord(char const* word)
    {
        std::string const wanted(word);
        if (mSize - mAt < wanted.size() || wanted.compare(0, wanted.size(), mText + mAt, wanted.size()) != 0)
        {
            return false;
        }
        mAt += wanted.size();
        return true;
    }

    void expect(char wanted)
    {
        if (peek() != wanted)
        {
            refuse(textOf("expected '", wanted, "'"));
        }
        ++mAt;
    }

    Json read(int depth)
    {
        if (depth > kMOST_DEPTH)
        {
            refuse(textOf("values are nested deeper than ", kMOST_DEPTH));
        }
        skipSpace();
        Json value;
        switch (peek())
        {
        case '{': readObject(value, depth); break;
        case '[': readArray(value, depth); break;
        case '"':
            value.mType = Json::Type::kSTRING;
            value.mString = readString();
            break;
        default: readScalar(value);
        }
        return value;
    }

    void readObject(Json& value, int depth)
    {
        value.mType = Json::Type::kOBJECT;
        expect('{');
        skipSpace();
        if (peek() == '}')
        {
            ++mAt;
            return;
        }
        while (true)
        {
            skipSpace();
            if (peek() != '"')
            {
                refuse("expected a key");
            }
            std::string key = readString();
            skipSpace();
            expect(':');
            Json member = read(depth + 1);
            if (!value.mObject.emplace(key, std::move(member)).second)
            {
                refuse("the key '" + key + "' appears twice");
            }
            skipSpace();
            if (peek() == '}')
            {
                ++mAt;
                return;
            }
            expect(',');
        }
    }

    void readArray(Json& value, int depth)
    {
        value.mType = Json::Type::kARRAY;
        expect('[');
        skipSpace();
        if (peek() == ']')
        {
            ++mAt;
            return;
        }
        while (true)
        {
            value.mArray.push_back(read(depth + 1));
            skipSpace();
            if (peek() == ']')
            {
                ++mAt;
                return;
            }
            expect(',');
        }
    }

    void readScalar(Json& value)
    {
        if (takeWord("null"))
        {
            return;
        }
        if (takeWord("true") || takeWord("false"))
        {
            value.mType = Json::Type::kBOOL;
            value.mBool = mText[mAt - 2] == 'u';
            return;
        }
        value.mType = Json::Type::kNUMBER;
        if (takeWord("NaN"))
        {
            value.mNumber = std::numeric_limits<double>::quiet_NaN();
            return;
        }
        if (takeWord("Infinity"))
        {
            value.mNumber = std::numeric_limits<double>::infinity();
            return;
        }
        if (takeWord("-Infinity"))
        {
            value.mNumber = -std::numeric_limits<double>::infinity();
            return;
        }
        readNumber(value);
    }

    std::size_t takeDigits()
    {
        std::size_t const start = mAt;
        while (peek() >= '0' && peek() <= '9')
        {
            ++mAt;
        }
        return mAt - start;
    }

    void readNumber(Json& value)
    {
        std::size_t const start = mAt;
        if (peek() == '-')
        {
            ++mAt;
        }
        bool const leadingZero = peek() == '0';
        std::size_t const digits = takeDigits();
        if (digits == 0 || (leadingZero && digits > 1))
        {
            refuse("expected a value");
        }
        bool whole = true;
        if (peek() == '.')
        {
            whole = false;
            ++mAt;
            if (takeDigits() == 0)
            {
                refuse("expected a digit");
            }
        }
        if (peek() == 'e' || peek() == 'E')
        {
            whole = false;
            ++mAt;
            if (peek() == '+' || peek() == '-')
            {
                ++mAt;
            }
            if (takeDigits() == 0)
            {
                refuse("expected a digit");
            }
        }
        if (mAt - start > kMOST_DIGITS)
        {
            refuse("a number is too long");
        }
        std::string const text(mText + start, mAt - start);
        value.mNumber = parsedNumber(text);
        if (!std::isfinite(value.mNumber))
        {
            refuse("the number " + text + " is too large");
        }
        if (whole)
        {
            errno = 0;
            long long const integer = std::strtoll(text.c_str(), nullptr, 10);
            value.mIsInteger = errno == 0;
            value.mInteger = value.mIsInteger ? integer : 0;
        }
    }

    //! Not with strtod: in a program whose locale has a decimal comma, it reads 0.5 as 0.
    //! \return infinity if the number overflows.
    static double parsedNumber(std::string const& text)
    {
        std::istringstream stream(text);
        stream.imbue(std::locale::classic());
        double number = 0;
        stream >> number;
        return stream.fail() ? std::numeric_limits<double>::infinity() : number;
    }

    unsigned readHex()
    {
        unsigned code = 0;
        for (int i = 0; i < 4; ++i)
        {
            int const c = peek();
            int const digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0)
            {
                refuse("expected four hexadecimal digits");
            }
            code = code * 16 + static_cast<unsigned>(digit);
            ++mAt;
        }
        return code;
    }

    static void appendUtf8(std::string& text, unsigned code)
    {
        auto const add = [&text](unsigned byte) { text += static_cast<char>(byte); };
        if (code < 0x80)
        {
            add(code);
        }
        else if (code < 0x800)
        {
            add(0xC0 | code >> 6);
            add(0x80 | (code & 0x3F));
        }
        else if (code < 0x10000)
        {
            add(0xE0 | code >> 12);
            add(0x80 | (code >> 6 & 0x3F));
            add(0x80 | (code & 0x3F));
        }
        else
        {
            add(0xF0 | code >> 18);
            add(0x80 | (code >> 12 & 0x3F));
            add(0x80 | (code >> 6 & 0x3F));
            add(0x80 | (code & 0x3F));
        }
    }

    unsigned readEscapedCode()
    {
        unsigned const code = readHex();
        if (code >= 0xDC00 && code < 0xE000)
        {
            refuse("a lone surrogate");
        }
        if (code < 0xD800 || code >= 0xDC00)
        {
            return code;
        }
        if (!takeWord("\\u"))
        {
            refuse("a lone surrogate");
        }
        unsigned const low = readHex();
        if (low < 0xDC00 || low >= 0xE000)
        {
            refuse("a lone surrogate");
        }
        return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }

    std::string readString()
    {
        expect('"');
        std::string text;
        while (true)
        {
            std::size_t const start = mAt;
            while (peek() >= 0x20 && peek() != '"' && peek() != '\\')
            {
                ++mAt;
            }
            text.append(mText + start, mAt - start);
            int const c = peek();
            if (c == '"')
            {
                ++mAt;
                return text;
            }
            if (c != '\\')
            {
                refuse(c < 0 ? "a string does not end" : "a control character in a string");
            }
            ++mAt;
            int const escaped = peek();
            ++mAt;
            switch (escaped)
            {
            case '"': text += '"'; break;
            case '\\': text += '\\'; break;
            case '/': text += '/'; break;
            case 'b': text += '\b'; break;
            case 'f': text += '\f'; break;
            case 'n': text += '\n'; break;
            case 'r': text += '\r'; break;
            case 't': text += '\t'; break;
            case 'u': appendUtf8(text, readEscapedCode()); break;
            default: --mAt; refuse("an unknown escape");
            }
        }
    }

    char const* mText;
    std::size_t mSize;
    std::string const& mName;
    std::size_t mAt{0};
};

inline Json Json::parse(char const* text, std::size_t size, std::string const& name)
{
    return typed("reading JSON", [&] { return JsonReader(text, size, name).document(); });
}

//! \return a text as a JSON string, quotes included.
inline std::string jsonQuoted(std::string const& text)
{
    std::string quoted = "\"";
    for (char const c : text)
    {
        if (c == '"' || c == '\\')
        {
            quoted += '\\';
            quoted += c;
        }
        else if (static_cast<unsigned char>(c) < 0x20)
        {
            char code[8];
            std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
            quoted += code;
        }
        else
        {
            quoted += c;
        }
    }
    return quoted + "\"";
}

//! \return a number as JSON; what is not finite is null, because JSON has no infinity.
inline std::string jsonNumber(double value)
{
    if (!std::isfinite(value))
    {
        return "null";
    }
    // Not with printf, which takes the decimal point of the program's locale.
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text.precision(9);
    text << value;
    return text.str();
}

} // namespace hstu::loader

#endif // HSTU_LOADER_JSON_HPP
