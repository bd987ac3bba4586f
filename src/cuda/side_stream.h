// A second stream for work beside that of a stream.
#pragma once
#include "params/common.h"

namespace fsattn {

// Returns a stream of the current device whose work starts behind what `stream` has been given so far;
// `stream` itself where there is none to be had. Until join_stream(), the caller
// gives both streams work that does not depend on each other's. May be captured.
Stream fork_stream(Stream stream);

// What `stream` is given from here on starts behind the work of `side`.
void join_stream(Stream side, Stream stream);

}  // namespace fsattn
