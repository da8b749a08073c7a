// Attention on random records against plain loops in double precision that follow docs/format.md. Every buffer is a
// piece of the heap of exactly its size, so that the sanitizer sees a read or a write beyond it.
#include "checks.h"

#include "inputs.h"

namespace {

const Shape shapes[] = {
    {2, 2, false, 32, 32, 32, 16, 0, 128, 4, 1, 1, OKV_F32, false, 0},
    {2, 2, false, 32, 32, 32, 8, 16, 64, 3, 1, 3, OKV_BF16, false, 1},
    {3, 4, false, 64, 64, 64, 8, 32, 80, 1, 8, 1, OKV_F16, true, 40},
    {4, 3, false, 128, 128, 128, 16, 16, 256, 5, 7, 2, OKV_F32, true, 128},
    {4, 4, true, 128, 32, 32, 16, 0, 256, 16, 3, 1, OKV_BF16, false, 16},
    {3, 2, true, 32, 256, 32, 8, 0, 208, 2, 2, 3, OKV_F32, true, 0},
    {2, 3, true, 256, 64, 32, 8, 32, 144, 1, 1, 1, OKV_F16, false, 17},
    {2, 4, true, 64, 48, 32, 16, 16, 48, 2, 1, 1, OKV_F32, false, 24},
    {4, 2, false, 32, 16, 32, 16, 32, 16, 1, 3, 1, OKV_BF16, true, 8},
    {3, 3, false, 128, 96, 128, 8, 0, 96, 9, 1, 3, OKV_F32, false, 0},
    {2, 2, true, 32, 32, 32, 16, 0, 32, 1, 5, 1, OKV_F32, true, 3},
    {4, 4, true, 64, 128, 32, 8, 16, 224, 4, 1, 2, OKV_F16, false, 112},
};

constexpr int BATCH = 2, RESIDUAL = 21;
constexpr int PAGES[BATCH] = {9, 1};  // of the first sequence enough for several shares
constexpr int PINS = 3;
// Numbers of the packed tokens behind pins: in two pages of the first sequence, and behind all of the second.
constexpr int64_t SKIPS[BATCH][PINS] = {{130, 130, 700}, {INT64_MAX, INT64_MAX, INT64_MAX}};

double from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3, mantissa = bits & 7;
  return exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
}

// One page in a slab of its own.
struct Page {
  Page(Random &random, const okv_layout &layout)
      : records(static_cast<size_t>(KV_HEADS) * per_head(layout) * layout.record_bytes),
        norms(static_cast<size_t>(OKV_PAGE_TOKENS) * layout.norm_bits / 8),
        supers(layout.metadata_bits == 8 ? static_cast<size_t>(KV_HEADS) * per_head(layout) * 2 : 0) {
    for (size_t i = 0; i < records.size; i++) records[i] = static_cast<uint8_t>(random.below(256));
    for (size_t at = 0; at < records.size; at += layout.record_bytes) {
      const int starts[] = {layout.k_scale, layout.k_minimum, layout.v_scale, layout.v_minimum};
      const int ends[] = {layout.k_minimum, layout.v_codes, layout.v_minimum, layout.record_bytes};
      for (int section = 0; section < 4; section++)
        for (int i = starts[section]; i < ends[section]; i += layout.metadata_bits / 8) {
          if (layout.metadata_bits == 8) {
            if (section % 2 == 0) records[at + i] = static_cast<uint8_t>(random.below(0x78));
            continue;
          }
          const uint16_t half = static_cast<uint16_t>(random.half() | (section % 2 ? random.below(2) << 15 : 0));
          memcpy(&records[at + i], &half, 2);
        }
    }
    for (size_t i = 0; i < norms.size; i += layout.norm_bits / 8) {
      const uint16_t half = random.half();
      const float wide = static_cast<float>(from_half(half));
      memcpy(&norms[i], layout.norm_bits == 16 ? static_cast<const void *>(&half) : &wide, layout.norm_bits / 8);
    }
    for (size_t i = 0; i < supers.size; i++) supers[i] = static_cast<uint16_t>((6 + random.below(3)) << 10);
  }
  static int per_head(const okv_layout &layout) { return OKV_PAGE_TOKENS / layout.record_tokens; }
  Exact<uint8_t> records, norms;
  Exact<uint16_t> supers;
};

int code(const uint8_t *planes, int bits, int values, int i) {
  const int low = planes[i / 4] >> (2 * (i % 4)) & 3;
  if (bits == 2) return low;
  const uint8_t *second = planes + values / 4;
  return low + 4 * (bits == 3 ? second[i / 8] >> (i % 8) & 1 : second[i / 4] >> (2 * (i % 4)) & 3);
}

// What one channel of one packed token stands for.
double meaning(const okv_layout &l, Page &page, int head, int token, int channel, bool of_v) {
  const int record = token / l.record_tokens, t = token % l.record_tokens;
  const size_t index = static_cast<size_t>(head) * Page::per_head(l) + record;
  const uint8_t *bytes = &page.records[index * l.record_bytes];
  const int group = of_v ? l.v_group : l.k_group, groups = (l.head_dim + group - 1) / group;
  const int at = of_v || l.k_per_token ? t * groups + channel / group : channel;
  const uint8_t *scales = bytes + (of_v ? l.v_scale : l.k_scale), *lows = bytes + (of_v ? l.v_minimum : l.k_minimum);
  double scale, low;
  if (l.metadata_bits == 8) {
    scale = from_e4m3(scales[at]) * from_half(page.supers[2 * index + of_v]);
    low = static_cast<int8_t>(lows[at]) * scale / 16;
  } else {
    uint16_t halves[2];
    memcpy(&halves[0], scales + 2 * at, 2);
    memcpy(&halves[1], lows + 2 * at, 2);
    scale = from_half(halves[0]);
    low = from_half(halves[1]);
  }
  const uint8_t *planes = bytes + (of_v ? l.v_codes : 0);
  const int number = code(planes, of_v ? l.v_bits : l.k_bits, l.record_tokens * l.width, t * l.width + channel);
  const double value = low + scale * number;
  if (of_v || l.norm_bits == 0) return value;
  uint32_t norm = 0;
  memcpy(&norm, &page.norms[static_cast<size_t>(token) * l.norm_bits / 8], l.norm_bits / 8);
  return value * (l.norm_bits == 16 ? from_half(static_cast<uint16_t>(norm)) : from_float(norm));
}

struct Token {
  int64_t position;
  bool packed;
  std::vector<double> k, v;
};

// Where token `number` of a sequence stands, if there are pins.
int64_t position_of(const Shape &s, int batch, int64_t number) {
  int64_t position = number;
  for (int i = 0; i < PINS && s.pairs; i++) position += SKIPS[batch][i] <= number;
  return position;
}

// All tokens of a sequence and KV head.
std::vector<Token> tokens_of(const Shape &s, const okv_layout &l, std::vector<Page> &pages, const Numbers &k,
                             const Numbers &v, KeyBias &bias, int batch, int head) {
  std::vector<Token> tokens;
  const int first = batch ? PAGES[0] : 0;
  for (int t = 0; t < PAGES[batch] * OKV_PAGE_TOKENS; t++) {
    tokens.push_back({position_of(s, batch, t), true, {}, {}});
    for (int c = 0; c < l.head_dim; c++) {
      Page &page = pages[first + t / OKV_PAGE_TOKENS];
      tokens.back().k.push_back(meaning(l, page, head, t % OKV_PAGE_TOKENS, c, false));
      tokens.back().v.push_back(meaning(l, page, head, t % OKV_PAGE_TOKENS, c, true));
    }
  }
  for (int t = 0; t < RESIDUAL; t++) {
    const size_t from = ((static_cast<size_t>(batch) * KV_HEADS + head) * RESIDUAL + t) * l.head_dim;
    tokens.push_back({position_of(s, batch, PAGES[batch] * OKV_PAGE_TOKENS + t), false, {}, {}});
    tokens.back().k.assign(&k.values[from], &k.values[from] + l.head_dim);
    tokens.back().v.assign(&v.values[from], &v.values[from] + l.head_dim);
  }
  for (Token &token : tokens) {
    const std::vector<double> added = bias.row(head, token.position, l.head_dim);
    for (int c = 0; c < l.head_dim; c++) token.k[c] += added[c];
  }
  return tokens;
}

// Causal attention of one query, which leans towards tokens in full precision; tokens with an odd position are hidden
// if there is a mask.
std::vector<double> expected(const std::vector<Token> &tokens, const double *q, int64_t at, double scale, bool masked,
                             double lean) {
  std::vector<double> logits, out(tokens[0].v.size());
  double most = -INFINITY, weight = 0;
  for (const Token &token : tokens) {
    double logit = token.packed ? 0 : lean;
    for (size_t c = 0; c < token.k.size(); c++) logit += q[c] * token.k[c] * scale;
    const bool seen = masked ? token.position % 2 == 0 : token.position <= at;
    logits.push_back(seen ? logit : -INFINITY);
    most = std::fmax(most, logits.back());
  }
  for (size_t t = 0; t < tokens.size(); t++) {
    const double p = std::exp(logits[t] - most);
    weight += p;
    for (size_t c = 0; c < out.size(); c++) out[c] += p * tokens[t].v[c];
  }
  for (double &x : out) x /= weight;
  return out;
}

// The relative error of a call; infinity if it is refused.
double run(const okv_attend &call, Exact<float> &out, const std::vector<double> &truth) {
  for (size_t i = 0; i < out.size; i++) out[i] = NAN;
  if (okv_attend_run(&call) != 0) return INFINITY;
  double wrong = 0, all = 0;
  for (size_t i = 0; i < out.size; i++) {
    wrong += (out[i] - truth[i]) * (out[i] - truth[i]);
    all += truth[i] * truth[i];
  }
  return std::sqrt(wrong / all);
}

// The relative error of one shape.
double error_of(const Shape &s, Random &random) {
  const okv_layout l = layout_of(s);
  const int heads = KV_HEADS * s.heads_per_kv, d = s.head_dim;
  std::vector<Page> pages;
  for (int i = 0; i < PAGES[0] + PAGES[1]; i++) pages.emplace_back(random, l);
  Exact<okv_slab> slabs(pages.size());
  for (size_t i = 0; i < pages.size(); i++)
    slabs[i] = {pages[i].records.data.get(), pages[i].norms.data.get(), pages[i].supers.data.get(),
                static_cast<int64_t>(3 * i), 1};
  Exact<int64_t> table(BATCH * PAGES[0]), lengths(BATCH), first(BATCH), at(static_cast<size_t>(BATCH) * s.queries);
  Exact<int64_t> positions(BATCH * RESIDUAL), skips(BATCH * PINS);
  const int wide = PAGES[0] * OKV_PAGE_TOKENS + RESIDUAL + PINS;
  Exact<uint8_t> shown(wide);
  for (int i = 0; i < wide; i++) shown[i] = i % 2 == 0;
  for (int b = 0; b < BATCH; b++) {
    for (int i = 0; i < PAGES[0]; i++) table[b * PAGES[0] + i] = 3 * ((b ? PAGES[0] : 0) + (i < PAGES[b] ? i : 0));
    lengths[b] = PAGES[b] * OKV_PAGE_TOKENS;
    first[b] = 0;
    for (int i = 0; i < PINS; i++) skips[b * PINS + i] = SKIPS[b][i];
    for (int t = 0; t < RESIDUAL; t++) positions[b * RESIDUAL + t] = position_of(s, b, lengths[b] + t);
    for (int t = 0; t < s.queries; t++)
      at[b * s.queries + t] = position_of(s, b, lengths[b] + RESIDUAL - s.queries + t);
  }
  KeyBias bias(random, s.pairs, d, PAGES[0] + 1);
  Exact<float> leans(heads);
  for (int h = 0; h < heads; h++) leans[h] = s.pairs ? random.normal() : 0;
  const Numbers q(random, static_cast<size_t>(BATCH) * heads * s.queries * d, s.dtype);
  const Numbers k(random, static_cast<size_t>(BATCH) * KV_HEADS * RESIDUAL * d, s.dtype);
  const Numbers v(random, static_cast<size_t>(BATCH) * KV_HEADS * RESIDUAL * d, s.dtype);
  Exact<float> out(q.values.size());
  const int64_t slab_count = static_cast<int64_t>(slabs.size);
  const okv_packed packed = {l, slab_count, slabs.data.get(), table.data.get(), PAGES[0], PAGES[0],
                             lengths.data.get(), first.data.get(), s.pairs ? skips.data.get() : nullptr,
                             s.pairs ? PINS : 0};
  const okv_full full = {view(k.bytes.data.get(), KV_HEADS, RESIDUAL, d, s.dtype),
                         view(v.bytes.data.get(), KV_HEADS, RESIDUAL, d, s.dtype), RESIDUAL, positions.data.get(),
                         s.pairs ? leans.data.get() : nullptr};
  const okv_mask mask = {shown.data.get(), 0, 0, 0, 1, wide, OKV_BOOL, 0};
  okv_attend call = {};
  call.q = view(q.bytes.data.get(), heads, s.queries, d, s.dtype);
  call.out = view(out.data.get(), heads, s.queries, d, OKV_F32);
  call.batch = BATCH, call.query_heads = heads, call.kv_heads = KV_HEADS, call.queries = s.queries, call.head_dim = d;
  call.q_positions = at.data.get();
  call.packed = &packed;
  call.full = &full, call.full_count = 1;
  call.key_bias = s.pairs ? &bias.view : nullptr;
  call.mask = s.masked ? &mask : nullptr;
  call.scale = 0.5f / std::sqrt(static_cast<float>(d));
  call.window = int64_t{1} << 62;
  call.threads = s.threads;
  std::vector<double> truth;
  for (int b = 0; b < BATCH; b++)
    for (int h = 0; h < KV_HEADS; h++) {
      const std::vector<Token> tokens = tokens_of(s, l, pages, k, v, bias, b, h);
      for (int row = 0; row < s.heads_per_kv * s.queries; row++) {
        const int64_t position = at[b * s.queries + row % s.queries];
        const double lean = leans[h * s.heads_per_kv + row / s.queries];
        const auto one = expected(tokens, &q.values[truth.size()], position, call.scale, s.masked, lean);
        truth.insert(truth.end(), one.begin(), one.end());
      }
    }
  const double error = run(call, out, truth);
  if (s.pairs) {
    bias.view.reach -= OKV_PAGE_TOKENS;
    EXPECT(okv_attend_run(&call) != 0 && strstr(okv_error(), "sequence 0 lies outside") != nullptr);
    bias.view.reach += OKV_PAGE_TOKENS;
    bias.vector[0] += 30;
    EXPECT(run(call, out, truth) > 1e-3);  // a twin: another bias is seen
    bias.vector[0] -= 30;
  }
  for (Page &page : pages)
    for (size_t record = 0; record < page.records.size; record += l.record_bytes)
      for (int i = l.v_codes; i < l.v_scale; i++) page.records[record + i] ^= 0xff;
  EXPECT(run(call, out, truth) > 1e-3);  // a twin: other codes are seen
  table[0] = 1;  // between two slabs
  EXPECT(okv_attend_run(&call) != 0 && strstr(okv_error(), "page 1 ") != nullptr);
  table[0] = 0;
  lengths[1] = -l.record_tokens;
  EXPECT(okv_attend_run(&call) != 0 && strstr(okv_error(), "sequence 1 ") != nullptr);
  return error;
}

}  // namespace

void check_attend() {
  Random random;
  for (const Shape &shape : shapes) {
    const double error = error_of(shape, random);
    if (!(error < 1e-3)) fprintf(stderr, "head_dim %d: relative error %g\n", shape.head_dim, error);
    EXPECT(error < 1e-3);
  }
}
