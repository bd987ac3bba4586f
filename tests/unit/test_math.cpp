#include "base/math.h"
#include "support/test.h"

namespace fsattn {

TEST(ceil_div_and_round_up) {
  EXPECT_EQ(ceil_div(0, 16), 0);
  EXPECT_EQ(ceil_div(1, 16), 1);
  EXPECT_EQ(ceil_div(16, 16), 1);
  EXPECT_EQ(ceil_div(17, 16), 2);
  EXPECT_EQ(round_up(0, 256), 0);
  EXPECT_EQ(round_up(257, 256), 512);
}

// l = 32, d = 16: the lengths around every edge (the first window, the second, a block).
TEST(num_windows_counts_complete_windows) {
  const int64_t table[][2] = {
      {0,    0  },
      {1,    0  },
      {31,   0  },
      {32,   1  },
      {47,   1  },
      {48,   2  },
      {63,   2  },
      {64,   3  },
      {65,   3  },
      {95,   4  },
      {1000, 61 },
      {4096, 255}
  };
  for (const auto& [length, windows] : table) EXPECT_EQ(num_windows(length, 32, 16), windows);
  EXPECT_EQ(num_windows(65536, 32, 16), 4095);
  EXPECT_EQ(num_windows(16, 16, 16), 1);
  EXPECT_EQ(num_windows(5, 4, 1), 2);
}

TEST(num_windows_equals_counting_them) {
  for (int64_t stride = 1; stride <= 8; ++stride) {
    for (int64_t size = stride; size <= 32; size += stride) {
      for (int64_t length = 0; length <= 70; ++length) {
        int64_t count = 0;
        while (count * stride + size <= length) ++count;
        EXPECT_EQ(num_windows(length, size, stride), count);
      }
    }
  }
}

TEST(num_visible_windows_ends_at_or_before_the_query) {
  for (int64_t position = -1; position < 200; ++position) {
    int64_t count = 0;
    while (position >= count * 16 + 32 - 1) ++count;
    EXPECT_EQ(num_visible_windows(position, 32, 16), count);
  }
}

TEST(block_slots_of_neighbours_do_not_overlap) {
  for (int64_t start = 0; start < 200; ++start) {
    for (int64_t length = 0; length < 200; ++length) {
      const int64_t end = first_block_slot(start, 3, 32) + ceil_div(length, int64_t{32});
      EXPECT_TRUE(end <= first_block_slot(start + length, 4, 32));
    }
  }
}

}  // namespace fsattn

FSATTN_TEST_MAIN()
