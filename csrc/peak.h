// The integer roofline: int8 multiply-adds from registers, as fast as the widest instructions go.
#pragma once
#include "kernels.h"

namespace lowbit {

// Runs `steps` turns and returns the multiply-adds done; the sums are stored so that no compiler drops them.
using PeakFn = int64_t (*)(int64_t steps, int32_t* sink);
extern const Table<PeakFn> kInt8Peak;

// The same on n_threads threads at once; all of them together.
int64_t int8_peak(int64_t steps, int n_threads, const std::string& force);

}  // namespace lowbit
