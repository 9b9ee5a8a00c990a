#ifndef HSTU_CONFORMANCE_CASE_FILE_H
#define HSTU_CONFORMANCE_CASE_FILE_H

#include <cstdint>
#include <string>
#include <vector>

//! One tensor of a case: its bytes lie in the data file.
struct CaseTensor
{
    std::string name;
    std::string type; //!< float32, float16, bfloat16, int32 or int64
    std::vector<int64_t> dims;
    std::vector<unsigned char> bytes;
};

//! One attribute; `isFloat` tells which value counts.
struct CaseAttribute
{
    std::string name;
    bool isFloat;
    float floatValue;
    int32_t intValue;
};

//! One call of the operator with what the float64 oracle says about it.
struct Case
{
    std::string name;
    std::string op;         //!< HstuAttention or HstuNorm
    std::string type;       //!< of q, k and v, or of x and gate
    std::string outputType; //!< of out
    std::vector<CaseAttribute> attributes;
    std::vector<CaseTensor> inputs;  //!< present ones, in the contract's order
    std::vector<int64_t> outputDims; //!< [Lq, H, Dv], or [R, C]
    std::vector<double> reference;   //!< the oracle's output
    std::vector<double> divisor;     //!< componentwise scale of the error; 0 where the output must be exactly 0
    double componentwiseBound;
    double rmsBound;
    double subnormalStep; //!< absolute error that the type itself forces
};

//! Reads cases.txt and cases.bin, which prepare_conformance.py writes, from a folder. Throws std::runtime_error.
std::vector<Case> readCases(std::string const& folder);

#endif // HSTU_CONFORMANCE_CASE_FILE_H
