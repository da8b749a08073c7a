// Records of every kind of format, made and read in buffers without a byte to spare: values come back near what they
// were, and every instruction set makes the same bytes.
#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "api.h"

namespace {

constexpr int GROUPS = 2, HEADS = 2;

int groups_of(int head_dim, int group) { return (head_dim + group - 1) / group; }

// As `layout_of` in structs.py.
okv_layout layout(int head_dim, int k_bits, int v_bits, bool per_token, int k_group, int v_group, int metadata_bits,
                  int norm_bits) {
  okv_layout f = {};
  f.kv_heads = HEADS;
  f.head_dim = head_dim;
  f.width = (head_dim + 31) / 32 * 32;
  f.k_bits = k_bits;
  f.v_bits = v_bits;
  f.k_per_token = per_token;
  f.record_tokens = per_token ? 32 : k_group;
  f.k_group = per_token ? std::min(k_group, head_dim) : 0;
  f.v_group = std::min(v_group, head_dim);
  f.metadata_bits = metadata_bits;
  f.norm_bits = norm_bits;
  const int meta = metadata_bits / 8, tokens = f.record_tokens;
  const int k_groups = per_token ? tokens * groups_of(head_dim, f.k_group) : f.width;
  const int v_groups = tokens * groups_of(head_dim, f.v_group);
  f.k_scale = tokens * f.width * k_bits / 8;
  f.k_minimum = f.k_scale + k_groups * meta;
  f.v_codes = f.k_minimum + k_groups * meta;
  f.v_scale = f.v_codes + tokens * f.width * v_bits / 8;
  f.v_minimum = f.v_scale + v_groups * meta;
  f.record_bytes = f.v_minimum + v_groups * meta;
  return f;
}

// K or V [groups, heads, tokens, head_dim] in any dtype; values that all three dtypes hold.
struct Values {
  std::vector<float> exact;
  std::vector<uint8_t> stored;
  okv_tensor view = {};

  Values(const okv_layout &f, int32_t dtype, uint32_t seed) : exact(GROUPS * HEADS * f.record_tokens * f.head_dim) {
    const int size = dtype == OKV_F32 ? 4 : 2;
    stored.resize(exact.size() * size);
    for (size_t i = 0; i < exact.size(); ++i) {
      seed = seed * 1664525u + 1013904223u;
      exact[i] = static_cast<float>(static_cast<int>(seed >> 26) - 32) / 16;
      uint32_t bits;
      memcpy(&bits, &exact[i], 4);
      const uint32_t magnitude = bits & 0x7fffffffu;
      const uint32_t small = magnitude ? (magnitude - (112u << 23)) >> 13 : 0u;
      const uint16_t half = static_cast<uint16_t>((bits >> 16 & 0x8000u) | small);
      const uint16_t brain = static_cast<uint16_t>(bits >> 16);
      const void *number = &exact[i];
      if (dtype == OKV_BF16) number = &brain;
      if (dtype == OKV_F16) number = &half;
      memcpy(&stored[i * size], number, size);
    }
    view = {stored.data(), HEADS * f.record_tokens * f.head_dim, f.record_tokens * f.head_dim, f.head_dim, dtype, 0};
  }
};

double relative_error(const std::vector<float> &exact, const uint8_t *read, int32_t dtype) {
  double wrong = 0, whole = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<uint8_t *>(&bits) + (dtype == OKV_F32 ? 0 : 2), read + i * (dtype == OKV_F32 ? 4 : 2),
           dtype == OKV_F32 ? 4 : 2);
    float value;
    memcpy(&value, &bits, 4);
    wrong += (value - exact[i]) * (value - exact[i]);
    whole += exact[i] * exact[i];
  }
  return std::sqrt(wrong / whole);
}

std::map<std::string, std::vector<uint8_t>> made_before;  // by case, on the instruction set that came first

void one(const okv_layout &f, int32_t dtype, int32_t grid, bool feedback) {
  Values k(f, dtype, 1), v(f, dtype, 2);
  std::vector<uint8_t> records(GROUPS * HEADS * f.record_bytes), norms(GROUPS * f.record_tokens * f.norm_bits / 8);
  std::vector<uint16_t> supers(f.metadata_bits == 8 ? GROUPS * HEADS * 2 : 0);
  std::vector<float> balance(HEADS * f.head_dim, 1.f), passed(HEADS * f.head_dim * f.head_dim, 0.f);
  okv_encode call = {};
  call.layout = f;
  call.k = k.view;
  call.v = v.view;
  call.groups = GROUPS;
  call.grid = grid;
  call.k_clip = call.v_clip = grid == OKV_UNBIASED ? 0.9f : 1.f;
  call.balance = balance.data();
  call.feedback = feedback ? passed.data() : nullptr;
  call.records = records.data();
  call.norms = norms.empty() ? nullptr : norms.data();
  call.super_scales = supers.empty() ? nullptr : supers.data();
  call.threads = 2;
  EXPECT(okv_encode_run(&call) == 0);

  const int32_t read_as = dtype == OKV_F32 ? OKV_F32 : OKV_BF16;
  std::vector<uint8_t> read_k(k.exact.size() * (read_as == OKV_F32 ? 4 : 2)), read_v(read_k.size());
  okv_decode back = {};
  back.layout = f;
  back.records = records.data();
  back.head_stride = f.record_bytes;
  back.group_stride = HEADS * f.record_bytes;
  back.norms = call.norms;
  back.super_scales = call.super_scales;
  back.super_group_stride = 2 * HEADS;
  back.super_head_stride = 2;
  back.groups = GROUPS;
  back.k = k.view;
  back.v = v.view;
  back.k.data = read_k.data();
  back.v.data = read_v.data();
  back.k.dtype = back.v.dtype = read_as;
  back.threads = 2;
  EXPECT(okv_decode_run(&back) == 0);
  EXPECT(relative_error(k.exact, read_k.data(), read_as) < 0.6 / (1 << (f.k_bits - 2)));
  EXPECT(relative_error(v.exact, read_v.data(), read_as) < 0.6 / (1 << (f.v_bits - 2)));

  const std::string name = std::to_string(f.head_dim) + "," + std::to_string(f.k_bits) + std::to_string(f.v_bits) +
                           std::to_string(f.k_per_token) + "," + std::to_string(f.k_group) + "," +
                           std::to_string(f.record_tokens) + "," + std::to_string(f.metadata_bits) +
                           std::to_string(f.norm_bits) + std::to_string(dtype) + std::to_string(grid) +
                           std::to_string(feedback);
  std::vector<uint8_t> made = records;
  made.insert(made.end(), norms.begin(), norms.end());
  EXPECT(made_before.emplace(name, made).first->second == made);

  // A number that is not finite is refused.
  const uint32_t endless = 0x7f807f80u | (dtype == OKV_F16 ? 0x7c007c00u : 0);
  memcpy(k.stored.data(), &endless, dtype == OKV_F32 ? 4 : 2);
  EXPECT(okv_encode_run(&call) == 1);
  EXPECT(strstr(okv_error(), "does not fit") != nullptr);
}

}  // namespace

void check_encode() {
  int count = 0;
  for (int head_dim : {8, 24, 64, 72, 80, 128, 200, 256}) {
    for (int k_group : {32, 64, 128, 256}) {
      for (bool per_token : {false, true}) {
        if (k_group == 256 && !per_token) continue;
        const int turn = count++;
        const okv_layout f = layout(head_dim, 2 + turn % 3, 2 + turn / 2 % 3, per_token, k_group, k_group,
                                    turn % 2 ? 8 : 16, turn % 3 * 16);
        one(f, turn % 3, turn / 3 % 3, turn % 4 == 1);
      }
    }
  }
}
