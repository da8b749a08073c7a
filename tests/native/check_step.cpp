// Whole decode steps of two sequences of different lengths, from an empty ring until two records of each are packed:
// what lies in the ring, and attention over all tokens in double precision. Every buffer is a piece of the heap of
// exactly its size.
#include "checks.h"

#include "inputs.h"

namespace {

const Shape shapes[] = {
    {4, 4, false, 32, 32, 32, 16, 0, 64, 3, 1, 1, OKV_F32, false, 5},
    {4, 4, true, 32, 32, 32, 8, 16, 96, 1, 1, 2, OKV_BF16, false, 48},
    {4, 4, false, 64, 128, 64, 8, 32, 128, 7, 1, 1, OKV_F16, false, 0},
};

constexpr int BATCH = 2, SLOTS = 192, PINS = 2, PAGES = 2;
constexpr int FIRST[BATCH] = {PINS, 1};  // pins of a sequence; its other slot is empty
constexpr int HELD[BATCH] = {0, 17};     // steps that the second sequence is ahead, with a token of 0 in each slot

// One step after the other, with tokens in model space, whose K holds the bias.
class Layer {
 public:
  Layer(const Shape &shape, Random &random)
      : s(shape), l(layout_of(shape)), heads(KV_HEADS * s.heads_per_kv), d(s.head_dim),
        bias(random, s.pairs, d, 3),
        pin_k(random, BATCH * KV_HEADS * PINS * d, s.dtype), pin_v(random, BATCH * KV_HEADS * PINS * d, s.dtype),
        ring_k(BATCH * KV_HEADS * SLOTS * d * size()), ring_v(ring_k.size),
        records(PAGES * BATCH * KV_HEADS * per_head() * l.record_bytes),
        norms(PAGES * BATCH * OKV_PAGE_TOKENS * l.norm_bits / 8),
        supers(l.metadata_bits == 8 ? PAGES * BATCH * KV_HEADS * per_head() * 2 : 0), pins(BATCH * PINS),
        table(BATCH * PAGES), first(BATCH), packed(BATCH), residual(BATCH), due(BATCH), leans(heads),
        out(BATCH * heads * d) {
    memset(ring_k.data.get(), 0, ring_k.size);
    memset(ring_v.data.get(), 0, ring_v.size);
    for (int b = 0; b < BATCH; b++) {
      for (int i = 0; i < PAGES; i++) table[b * PAGES + i] = b * PAGES + i;
      for (int i = 0; i < PINS; i++) pins[b * PINS + i] = i < FIRST[b] ? i : -1;
      first[b] = FIRST[b];
      packed[b] = 0;
      residual[b] = HELD[b];
      for (int h = 0; h < KV_HEADS; h++) {
        for (int i = 0; i < FIRST[b]; i++) add(b, h, &pin_k.values[at(b, h, i)], &pin_v.values[at(b, h, i)], true);
        for (int i = 0; i < HELD[b]; i++) add(b, h, nullptr, nullptr, false);
      }
    }
    for (int h = 0; h < heads; h++) leans[h] = random.normal();
    slab = {records.data.get(), norms.data.get(), supers.data.get(), 0, PAGES * BATCH};
  }

  // The relative error of a step's output; infinity if it is refused.
  double step(Random &random, bool with_bias = true) {
    const Numbers q(random, BATCH * heads * d, s.dtype), v(random, BATCH * KV_HEADS * d, s.dtype);
    Numbers k(random, BATCH * KV_HEADS * d, s.dtype);
    for (int b = 0; b < BATCH; b++) {
      due[b] = residual[b] + 1 >= 128 ? l.record_tokens : 0;
      for (int h = 0; h < KV_HEADS; h++) {
        const size_t from = (static_cast<size_t>(b) * KV_HEADS + h) * d;
        std::vector<double> stored(&k.values[from], &k.values[from] + d);
        const std::vector<double> of_bias = bias.row(h, tokens[b][h].size(), d);
        for (int c = 0; c < d; c++) stored[c] -= of_bias[c];
        add(b, h, stored.data(), &v.values[from], false);
      }
    }
    okv_step call = {};
    call.attend.q = view(q.bytes.data.get(), heads, 1, d, s.dtype);
    call.attend.out = view(out.data.get(), heads, 1, d, OKV_F32);
    call.attend.batch = BATCH, call.attend.query_heads = heads, call.attend.kv_heads = KV_HEADS;
    call.attend.queries = 1, call.attend.head_dim = d;
    call.attend.key_bias = s.pairs && with_bias ? &bias.view : nullptr;
    call.attend.scale = 0.5f / std::sqrt(static_cast<float>(d));
    call.attend.window = int64_t{1} << 62;
    call.attend.threads = s.threads;
    call.packed = {l, 1, &slab, table.data.get(), PAGES, PAGES, nullptr, first.data.get(), nullptr, 0};
    call.k = view(k.bytes.data.get(), KV_HEADS, 1, d, s.dtype);
    call.v = view(v.bytes.data.get(), KV_HEADS, 1, d, s.dtype);
    call.ring_k = view(ring_k.data.get(), KV_HEADS, SLOTS, d, s.dtype);
    call.ring_v = view(ring_v.data.get(), KV_HEADS, SLOTS, d, s.dtype);
    call.pin_k = view(pin_k.bytes.data.get(), KV_HEADS, PINS, d, s.dtype);
    call.pin_v = view(pin_v.bytes.data.get(), KV_HEADS, PINS, d, s.dtype);
    call.ring_slots = SLOTS, call.pin_slots = PINS;
    call.pin_positions = pins.data.get();
    call.pin_logit_bias = leans.data.get();
    call.packed_tokens = packed.data.get(), call.residual = residual.data.get(), call.due = due.data.get();
    call.encode.layout = l;
    call.encode.k_clip = call.encode.v_clip = 1;
    for (size_t i = 0; i < out.size; i++) out[i] = NAN;
    if (okv_step_run(&call) != 0) return INFINITY;
    double wrong = 0, all = 0;
    for (int b = 0; b < BATCH; b++)
      for (int head = 0; head < heads; head++) {
        const size_t from = (static_cast<size_t>(b) * heads + head) * d;
        const std::vector<double> truth = expected(b, head, &q.values[from], call.attend.scale);
        for (int c = 0; c < d; c++) {
          wrong += (out[from + c] - truth[c]) * (out[from + c] - truth[c]);
          all += truth[c] * truth[c];
        }
      }
    return std::sqrt(wrong / all);
  }

  // The largest difference between K of the newest token in the ring and K without its bias.
  double newest_error() {
    double most = 0;
    for (int b = 0; b < BATCH; b++)
      for (int h = 0; h < KV_HEADS; h++) {
        const int64_t slot = (packed[b] + residual[b] - 1) % SLOTS;
        const uint8_t *from = &ring_k[((static_cast<size_t>(b) * KV_HEADS + h) * SLOTS + slot) * d * size()];
        for (int c = 0; c < d; c++) {
          uint32_t bits = 0;
          memcpy(&bits, from + c * size(), size());
          const double x = s.dtype == OKV_F32    ? from_float(bits)
                           : s.dtype == OKV_BF16 ? from_float(bits << 16)
                                                 : from_half(static_cast<uint16_t>(bits));
          most = std::fmax(most, std::fabs(x - tokens[b][h].back().k[c]));
        }
      }
    return most;
  }

  const Shape &s;
  int64_t packed_tokens(int batch) { return packed[batch]; }

 private:
  struct Token {
    bool leans;
    std::vector<double> k, v;  // as they are stored, without the bias
  };

  size_t size() const { return s.dtype == OKV_F32 ? 4 : 2; }
  int per_head() const { return OKV_PAGE_TOKENS / l.record_tokens; }
  size_t at(int batch, int head, int pin) const {
    return ((static_cast<size_t>(batch) * KV_HEADS + head) * PINS + pin) * d;
  }

  void add(int batch, int head, const double *k, const double *v, bool pinned) {
    tokens[batch][head].push_back({pinned, std::vector<double>(d), std::vector<double>(d)});
    if (k) tokens[batch][head].back().k.assign(k, k + d), tokens[batch][head].back().v.assign(v, v + d);
  }

  std::vector<double> expected(int batch, int head, const double *q, double scale) {
    const std::vector<Token> &all = tokens[batch][head / s.heads_per_kv];
    std::vector<double> result(d), logits;
    double weight = 0;
    for (const Token &token : all) {
      const std::vector<double> added = bias.row(head / s.heads_per_kv, static_cast<int64_t>(logits.size()), d);
      double logit = token.leans ? leans[head] : 0;
      for (int c = 0; c < d; c++) logit += q[c] * (token.k[c] + added[c]) * scale;
      logits.push_back(logit);
    }
    for (size_t t = 0; t < all.size(); t++) {
      const double p = std::exp(logits[t]);
      weight += p;
      for (int c = 0; c < d; c++) result[c] += p * all[t].v[c];
    }
    for (double &x : result) x /= weight;
    return result;
  }

  okv_layout l;
  int heads, d;
  KeyBias bias;
  Numbers pin_k, pin_v;
  Exact<uint8_t> ring_k, ring_v, records, norms;
  Exact<uint16_t> supers;
  Exact<int64_t> pins, table, first, packed, residual, due;
  Exact<float> leans, out;
  okv_slab slab;
  std::vector<Token> tokens[BATCH][KV_HEADS];
};

}  // namespace

void check_step() {
  Random random;
  for (const Shape &shape : shapes) {
    Layer layer(shape, random);
    const double rounding = shape.dtype == OKV_F32 ? 1e-5 : shape.dtype == OKV_BF16 ? 0.03 : 4e-3;
    double before = 0, after = 0;  // the largest errors, before and after something was packed
    for (int i = 0; i < 200; i++) {
      const bool packed = layer.packed_tokens(0) || layer.packed_tokens(1);
      const double error = layer.step(random);
      (packed ? after : before) = std::fmax(packed ? after : before, error);
      EXPECT(layer.newest_error() <= rounding);
    }
    EXPECT(before <= rounding);
    EXPECT(after > 1e-4 && after < 0.2);  // four bits
    if (shape.pairs) {  // a twin: the bias matters
      EXPECT(layer.step(random, false) > 1.5 * after);
      EXPECT(layer.newest_error() > 0.1);
    }
    EXPECT(layer.packed_tokens(0) >= 64 && layer.packed_tokens(1) > layer.packed_tokens(0) - 64);
  }
}
