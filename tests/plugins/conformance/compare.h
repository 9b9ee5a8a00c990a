#ifndef HSTU_CONFORMANCE_COMPARE_H
#define HSTU_CONFORMANCE_COMPARE_H

#include <string>
#include <vector>

#include "caseFile.h"

//! Scale-free error of an output, by the rule of tests/oracle.py::attention_error and tests/norm_cases.py::norm_error.
struct OutputError
{
    double componentwise{0.0}; //!< infinite when an element is not finite, or not 0 where it must be
    double rms{0.0};
    std::string where; //!< the worst element
};

//! \param output raw bytes in the case's output type.
OutputError measureError(Case const& testCase, std::vector<unsigned char> const& output);

//! \return whether both errors are within the case's bounds.
bool isWithinBounds(Case const& testCase, OutputError const& error);

#endif // HSTU_CONFORMANCE_COMPARE_H
