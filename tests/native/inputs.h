// Random numbers, tensors and key biases in pieces of the heap of exactly their size, and what they stand for.
#pragma once
#include <cmath>
#include <memory>
#include <random>
#include <string.h>
#include <vector>

#include "api.h"

constexpr int KV_HEADS = 2;

struct Shape {
  int k_bits, v_bits;
  bool k_per_token;
  int k_group, v_group, record_tokens, metadata_bits, norm_bits, head_dim;
  int heads_per_kv, queries, threads, dtype;
  bool masked;
  int pairs;  // of a key bias; with any, pins stand between the packed tokens and the residual leans
};

template <typename T>
struct Exact {  // an array with nothing behind it
  explicit Exact(size_t count) : size(count), data(new T[count]) {}
  T &operator[](size_t i) { return data[i]; }
  size_t size;
  std::unique_ptr<T[]> data;
};

inline double from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

inline double from_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Random {
  std::mt19937 engine{1};
  uint32_t below(uint32_t n) { return engine() % n; }
  float normal() { return std::normal_distribution<float>()(engine); }
  uint16_t half() { return static_cast<uint16_t>(0x2800 + below(0x1400)); }  // from 2^-5 to 1
};

// Numbers of a tensor in one of the dtypes, and what they are.
struct Numbers {
  Numbers(Random &random, size_t count, int dtype) : bytes(count * (dtype == OKV_F32 ? 4 : 2)), values(count) {
    for (size_t i = 0; i < count; i++) {
      const float x = random.normal();
      uint32_t bits;
      memcpy(&bits, &x, 4);
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == OKV_F16) half = static_cast<uint16_t>(random.half() | (random.below(2) << 15));
      values[i] = dtype == OKV_F32 ? x : dtype == OKV_BF16 ? from_float(bits & 0xffff0000u) : from_half(half);
      memcpy(&bytes[i * (dtype == OKV_F32 ? 4 : 2)], dtype == OKV_F32 ? static_cast<void *>(&bits) : &half,
             dtype == OKV_F32 ? 4 : 2);
    }
  }
  Exact<uint8_t> bytes;
  std::vector<double> values;
};

inline okv_layout layout_of(const Shape &s) {
  okv_layout l = {KV_HEADS, s.head_dim, (s.head_dim + 31) / 32 * 32, s.k_bits, s.v_bits, s.k_per_token, s.k_group,
                  s.v_group, s.record_tokens, s.metadata_bits, s.norm_bits, 0, 0, 0, 0, 0, 0};
  if (l.k_group > l.head_dim) l.k_group = l.head_dim;
  if (l.v_group > l.head_dim) l.v_group = l.head_dim;
  const int meta = l.metadata_bits / 8, of_token = (l.head_dim + l.k_group - 1) / l.k_group;
  const int k_metadata = (l.k_per_token ? l.record_tokens * of_token : l.width) * meta;
  const int v_metadata = l.record_tokens * ((l.head_dim + l.v_group - 1) / l.v_group) * meta;
  l.k_scale = l.record_tokens * l.width * l.k_bits / 8;
  l.k_minimum = l.k_scale + k_metadata;
  l.v_codes = l.k_minimum + k_metadata;
  l.v_scale = l.v_codes + l.record_tokens * l.width * l.v_bits / 8;
  l.v_minimum = l.v_scale + v_metadata;
  l.record_bytes = l.v_minimum + v_metadata;
  return l;
}

inline okv_tensor view(const void *data, int heads, int tokens, int head_dim, int dtype) {
  const int64_t of_head = static_cast<int64_t>(tokens) * head_dim;
  return {const_cast<void *>(data), heads * of_head, of_head, head_dim, dtype, 0};
}

// A key bias in the first and the last channels of a head, with tables for `pages` pages.
struct KeyBias {
  KeyBias(Random &random, int pairs, int head_dim, int pages)
      : lanes((pairs + 15) / 16 * 16), frequencies(pairs), first(pairs), second(pairs),
        vector(static_cast<size_t>(KV_HEADS) * 2 * lanes), coarse(static_cast<size_t>(pages) * 2 * lanes),
        fine(static_cast<size_t>(OKV_PAGE_TOKENS) * 2 * lanes),
        columns(static_cast<size_t>(OKV_PAGE_TOKENS) * 2 * pairs) {
    for (size_t i = 0; i < vector.size; i++) vector[i] = i % lanes < first.size ? random.normal() : 0;
    for (int p = 0; p < pairs; p++) {
      frequencies[p] = std::pow(1e4, -static_cast<double>(p) / pairs);
      first[p] = p;
      second[p] = head_dim - 1 - p;
    }
    fill(coarse, pages, OKV_PAGE_TOKENS);
    fill(fine, OKV_PAGE_TOKENS, 1);
    for (int half = 0; half < 2; half++)
      for (int p = 0; p < pairs; p++)
        for (int t = 0; t < OKV_PAGE_TOKENS; t++)
          columns[(half * pairs + p) * OKV_PAGE_TOKENS + t] = fine[(t * 2 + half) * lanes + p];
    view = {pairs, lanes, static_cast<int64_t>(pages) * OKV_PAGE_TOKENS, frequencies.data.get(), first.data.get(),
            second.data.get(), vector.data.get(), coarse.data.get(), fine.data.get(), columns.data.get()};
  }
  void fill(Exact<float> &table, int count, int step) {
    for (int i = 0; i < count; i++)
      for (int p = 0; p < lanes; p++) {
        const double angle = static_cast<double>(i) * step * (p < static_cast<int>(first.size) ? frequencies[p] : 0);
        table[(2 * i) * lanes + p] = static_cast<float>(std::cos(angle));
        table[(2 * i + 1) * lanes + p] = static_cast<float>(std::sin(angle));
      }
  }
  // What K of a head holds of it at a position.
  std::vector<double> row(int head, int64_t position, int head_dim) {
    std::vector<double> out(head_dim);
    for (size_t p = 0; p < first.size; p++) {
      const double c = std::cos(position * frequencies[p]), s = std::sin(position * frequencies[p]);
      const double a = vector[head * 2 * lanes + p], b = vector[(head * 2 + 1) * lanes + p];
      out[first[p]] = a * c - b * s;
      out[second[p]] = b * c + a * s;
    }
    return out;
  }
  int lanes;
  Exact<double> frequencies;
  Exact<int64_t> first, second;
  Exact<float> vector, coarse, fine, columns;
  okv_key_bias view;
};
