#ifndef HSTU_CONFORMANCE_NORM_KERNELS_H
#define HSTU_CONFORMANCE_NORM_KERNELS_H

#include "fakeDriver.h"

//! Checks hstuNormCreate, hstuNormEnqueue and hstuNormDestroy as attentionKernels.cpp does the attention's functions.
//! Prints one line per failed check. \return their number.
int checkNorms(fake::Calls& calls);

#endif // HSTU_CONFORMANCE_NORM_KERNELS_H
