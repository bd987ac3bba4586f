// Copies between packed tensors and the pages of a cache. Contracts: params/paged.h. The validation has
// read every length and page id that these functions use.
#pragma once
#include "params/paged.h"

namespace fsattn::cpu {

void paged_write(int row, const PagedWriteParams& params, Stream stream);
void paged_scatter(int row, const PagedScatterParams& params, Stream stream);
void paged_gather(int row, const PagedGatherParams& params, Stream stream);

}  // namespace fsattn::cpu
