#include "caseFile.h"

#include <fstream>
#include <sstream>
#include <stdexcept>

namespace
{

class Blob
{
public:
    explicit Blob(std::string const& path)
        : mStream(path, std::ios::binary)
    {
        if (!mStream)
        {
            throw std::runtime_error("cannot open " + path);
        }
    }

    template <typename T>
    std::vector<T> read(uint64_t offset, uint64_t bytes)
    {
        std::vector<T> values(bytes / sizeof(T));
        mStream.seekg(static_cast<std::streamoff>(offset));
        mStream.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(bytes));
        if (!mStream)
        {
            throw std::runtime_error("cases.bin ends before byte " + std::to_string(offset + bytes));
        }
        return values;
    }

private:
    std::ifstream mStream;
};

std::vector<int64_t> readDims(std::istream& line)
{
    size_t rank = 0;
    line >> rank;
    std::vector<int64_t> dims(rank);
    for (int64_t& dim : dims)
    {
        line >> dim;
    }
    return dims;
}

CaseAttribute readAttribute(std::istream& line)
{
    CaseAttribute attribute{};
    std::string kind;
    line >> attribute.name >> kind;
    attribute.isFloat = kind == "float";
    if (attribute.isFloat)
    {
        line >> attribute.floatValue;
    }
    else
    {
        line >> attribute.intValue;
    }
    return attribute;
}

} // namespace

std::vector<Case> readCases(std::string const& folder)
{
    std::ifstream index(folder + "/cases.txt");
    if (!index)
    {
        throw std::runtime_error("cannot open " + folder + "/cases.txt");
    }
    Blob blob(folder + "/cases.bin");
    std::vector<Case> cases;
    std::string text;
    while (std::getline(index, text))
    {
        std::istringstream line(text);
        std::string word;
        line >> word;
        uint64_t offset = 0;
        uint64_t bytes = 0;
        if (word == "case")
        {
            Case& current = cases.emplace_back();
            line >> current.name >> current.op >> current.type >> current.outputType;
        }
        else if (word == "attribute")
        {
            cases.back().attributes.push_back(readAttribute(line));
        }
        else if (word == "input")
        {
            CaseTensor tensor;
            line >> tensor.name >> tensor.type;
            tensor.dims = readDims(line);
            line >> offset >> bytes;
            tensor.bytes = blob.read<unsigned char>(offset, bytes);
            cases.back().inputs.push_back(tensor);
        }
        else if (word == "output")
        {
            cases.back().outputDims = readDims(line);
            line >> offset >> bytes;
            cases.back().reference = blob.read<double>(offset, bytes);
            line >> offset >> bytes;
            std::vector<float> const divisor = blob.read<float>(offset, bytes);
            cases.back().divisor.assign(divisor.begin(), divisor.end());
        }
        else if (word == "bounds")
        {
            Case& current = cases.back();
            line >> current.componentwiseBound >> current.rmsBound >> current.subnormalStep;
        }
        if (line.fail())
        {
            throw std::runtime_error("cases.txt: malformed line: " + text);
        }
    }
    return cases;
}
