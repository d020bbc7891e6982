// Draws one token per row; reference/sampling.py spells it out, and this gives the same token for the same bits.
//
// Nothing is sorted and noise is computed where it can matter only. With top_k, top_p or min_p that is the few tokens
// they keep; without them, the tokens whose uniform number could carry them over the best sum so far, found by a cheap
// test that errs on the safe side. Rows do not see each other.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "interface.h"
#include "noise.h"
#include "pool.h"
#include "simd.h"

// Mirrors kernels/cpu/library.py. Greedy where temperature is 0.
struct BatonSampling {
  uint64_t seed;
  int64_t top_k;       // 0: off
  double temperature;  // the fp32 that scores are divided by
  double top_p;        // 1: off
  double log_min_p;    // -inf: off
};

namespace baton {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kElementsPerPiece = 1 << 14;
constexpr int64_t kSpan = 512;
constexpr int kNumBuckets = 1024;
constexpr double kWeightlessBelow = -28.0;  // exp(-28) * 2^40 < 1
constexpr int64_t kNotANumber = -1;

struct Candidate {
  float score;
  int32_t token;
  int64_t weight;
};

bool comes_first(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// The largest of a row, NaN where there is one.
float top_of(const float* x, int64_t n) {
  vf lanes = splat(-kInf);
  vi bad = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vf v = load(x + i);
    lanes = max(v, lanes);
    bad |= v != v;
  }
  float top = max_lanes(lanes);
  bool is_bad = false;
  for (int lane = 0; lane < kWidth; ++lane) is_bad |= bad[lane] != 0;
  for (; i < n; ++i) {
    is_bad |= x[i] != x[i];
    top = x[i] > top ? x[i] : top;
  }
  return is_bad ? std::numeric_limits<float>::quiet_NaN() : top;
}

// Bit i: v[i] >= least.
inline uint32_t lanes_from(vf v, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(least), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(least), _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= (uint32_t)(v[lane] >= least) << lane;
  return bits;
#endif
}

// Calls visit(i) for all i with x[i] >= least(), in order, until it returns false; least() may rise meanwhile.
template <class Least, class Visit>
void visit_from(const float* x, int64_t n, Least least, Visit visit) {
  constexpr int64_t kStride = 4 * kWidth;
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) {
    const vf v0 = load(x + i), v1 = load(x + i + kWidth), v2 = load(x + i + 2 * kWidth), v3 = load(x + i + 3 * kWidth);
    if (lanes_from(max(max(v0, v1), max(v2, v3)), least()) == 0) continue;
    for (int64_t j = i; j < i + kStride; j += kWidth)
      for (uint32_t bits = lanes_from(load(x + j), least()); bits != 0; bits &= bits - 1) {
        const int64_t at = j + __builtin_ctz(bits);
        if (x[at] >= least() && !visit(at)) return;
      }
  }
  for (; i < n; ++i)
    if (x[i] >= least() && !visit(i)) return;
}

int64_t first_from(const float* x, int64_t n, float least) {
  int64_t found = n - 1;
  visit_from(
      x, n, [least]() { return least; }, [&](int64_t i) { return found = i, false; });
  return found;
}

// The k-th largest of a row; 0 < k < n.
float kth_largest(const float* x, int64_t n, int64_t k, std::vector<float>& kept) {
  kept.clear();
  const size_t room = (size_t)(2 * k + 64);
  float least = -kInf;
  const auto shrink = [&]() {
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), [](float a, float b) { return a > b; });
    kept.resize((size_t)k);
    least = kept.back();
  };
  visit_from(
      x, n, [&]() { return least; },
      [&](int64_t i) {
        if (x[i] == least && kept.size() >= (size_t)k) return true;  // as good as the k-th, which is there already
        kept.push_back(x[i]);
        if (kept.size() >= room) shrink();
        return true;
      });
  shrink();
  return least;
}

// exp(d) in units of 2^-40, rounded down; d <= 0. The steps are those of reference/sampling.py, none of them fused.
inline int64_t weight_of(double d) {
  const double scaled = (d < kWeightlessBelow ? kWeightlessBelow : d) * 1.4426950408889634;
  const double shifted = scaled + 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer, halves to even
  const double whole = shifted - 6755399441055744.0;
  const double f = scaled - whole;
  double p = 4.4455382718708116e-10;
  p = p * f + 7.054911620801123e-09;
  p = p * f + 1.01780860092397e-07;
  p = p * f + 1.321548679014431e-06;
  p = p * f + 1.5252733804059841e-05;
  p = p * f + 0.0001540353039338161;
  p = p * f + 0.0013333558146428443;
  p = p * f + 0.009618129107628477;
  p = p * f + 0.05550410866482158;
  p = p * f + 0.2402265069591007;
  p = p * f + 0.6931471805599453;
  p = p * f + 1.0;
  const int64_t exponent = (int64_t)(as_bits(shifted) & 0xFFFFFFFFFFFFFu) - 0x8000000000000;
  return (int64_t)as_double(as_bits(p) + ((uint64_t)(exponent + 40) << 52));
}

// Sum of the weights of all scores from `least` on.
int64_t total_weight(const float* scores, int64_t n, float least, float best) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t weight = weight_of((double)scores[i] - (double)best);
    total += scores[i] >= least ? weight : 0;
  }
  return total;
}

int64_t weigh(std::vector<Candidate>& list, float best) {
  int64_t total = 0;
  for (Candidate& candidate : list) {
    candidate.weight = weight_of((double)candidate.score - (double)best);
    total += candidate.weight;
  }
  return total;
}

void gather(const float* scores, int64_t n, float least, std::vector<Candidate>& list) {
  list.clear();
  visit_from(
      scores, n, [least]() { return least; },
      [&](int64_t token) {
        list.push_back({scores[token], (int32_t)token, 0});
        return true;
      });
}

// How much weight must come before a token for top_p to drop it.
int64_t weight_limit(double top_p, int64_t total) {
  const double exact = std::ceil(top_p * (double)total);
  return exact < (double)total ? (int64_t)exact : total;
}

// Leaves in `list`, weighed, the most likely tokens that together reach `limit`, in any order; `best` is the largest.
void keep_nucleus(std::vector<Candidate>& list, float best, int64_t limit) {
  int64_t mass[kNumBuckets] = {};
  const auto bucket_of = [best](float score) {
    const float place = (best - score) * (float)(kNumBuckets / -kWeightlessBelow);
    return place < (float)(kNumBuckets - 1) ? (int)place : kNumBuckets - 1;
  };
  for (const Candidate& candidate : list) mass[bucket_of(candidate.score)] += candidate.weight;
  int64_t before = 0;
  int crossing = 0;
  while (crossing < kNumBuckets - 1 && before + mass[crossing] < limit) before += mass[crossing++];
  const auto settled = std::partition(list.begin(), list.end(),
                                      [&](const Candidate& c) { return bucket_of(c.score) < crossing; });
  const auto end =
      std::partition(settled, list.end(), [&](const Candidate& c) { return bucket_of(c.score) == crossing; });
  std::sort(settled, end, comes_first);
  auto last = settled;
  for (; last != end && before < limit; ++last) before += last->weight;
  list.erase(last, list.end());
}

// Argmax over `list` of score + noise, ties to the smallest token.
int64_t draw_among(const std::vector<Candidate>& list, uint64_t key) {
  float best = -kInf;
  int64_t token = list.front().token;
  for (const Candidate& candidate : list) {
    const float sum = noise_of_bits(noise_bits(key, candidate.token)) + candidate.score;
    if (sum > best || (sum == best && candidate.token < token)) best = sum, token = candidate.token;
  }
  return token;
}

// The same over a whole row, of which `token` has the largest score.
//
// With u uniform in (0, 1), noise g = -log(-log u) lifts a score s to T only if 1 - u <= -log u <= exp(s - T).
int64_t draw_among_all(const float* scores, int64_t n, int64_t token, uint64_t key) {
  float best = noise_of_bits(noise_bits(key, token)) + scores[token];
  float missing[kSpan];  // 1 - u, rounded down, in units of 2^-52
  float reach[kSpan];
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    const int64_t count = std::min(kSpan, n - begin);
    for (int64_t i = 0; i < count; ++i)
      missing[i] = (float)(int64_t)((~noise_bits(key, begin + i)) >> 12);
    // Far more than the rounding of sums and of noise, which is at most 37.
    const float slack = (std::fabs(best) + 64.0f) * 0x1p-20f;
    const vf target = splat(best - slack), unit = splat(0x1.0001p52f);
    vi any = {};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const vf lift = exp2_lanes((load(scores + begin + i) - target) * splat(kLog2e)) * unit;
      store(reach + i, lift);
      any |= lift >= load(missing + i);
    }
    bool found = false;
    for (int lane = 0; lane < kWidth; ++lane) found |= any[lane] != 0;
    for (; i < count; ++i) {
      reach[i] = kInf;
      found = true;
    }
    if (!found) continue;
    for (i = 0; i < count; ++i) {
      if (!(reach[i] >= missing[i]) || begin + i == token) continue;
      const float sum = noise_of_bits(noise_bits(key, begin + i)) + scores[begin + i];
      if (sum > best || (sum == best && begin + i < token)) best = sum, token = begin + i;
    }
  }
  return token;
}

struct Scratch {
  std::vector<float> scores, kept;
  std::vector<Candidate> list;
};

int64_t draw(const float* x, int64_t n, const BatonSampling& sampling, int64_t position) {
  const float top = top_of(x, n);
  if (!std::isfinite(top)) return kNotANumber;
  if (sampling.temperature == 0) return first_from(x, n, top);
  thread_local Scratch scratch;
  scratch.scores.resize((size_t)n);
  float* scores = scratch.scores.data();
  const vf temperature = splat((float)sampling.temperature);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(scores + i, load(x + i) / temperature);
  for (; i < n; ++i) scores[i] = x[i] / (float)sampling.temperature;
  const float best = top / (float)sampling.temperature;
  const int64_t first = first_from(scores, n, best);
  if (std::isinf(best)) return first;
  const uint64_t key = noise_key(sampling.seed, (uint64_t)position);
  const bool has_top_k = sampling.top_k > 0 && sampling.top_k < n;
  if (!has_top_k && sampling.top_p >= 1 && std::isinf(sampling.log_min_p)) return draw_among_all(scores, n, first, key);
  float least = std::numeric_limits<float>::lowest();
  if (!std::isinf(sampling.log_min_p)) {
    const double exact = (double)best + sampling.log_min_p;
    float rounded = (float)exact;
    if ((double)rounded < exact) rounded = std::nextafter(rounded, kInf);
    least = std::max(least, rounded);
  }
  if (has_top_k) least = std::max(least, kth_largest(scores, n, sampling.top_k, scratch.kept));
  if (sampling.top_p >= 1) {
    gather(scores, n, least, scratch.list);
  } else if (has_top_k) {
    gather(scores, n, least, scratch.list);
    keep_nucleus(scratch.list, best, weight_limit(sampling.top_p, weigh(scratch.list, best)));
  } else {
    const int64_t limit = weight_limit(sampling.top_p, total_weight(scores, n, least, best));
    // Usually a few likely tokens are enough; what is further than the last distance has no weight.
    for (const double distance : {-5.0, -12.0, kWeightlessBelow - 1.0}) {
      gather(scores, n, std::max(least, (float)((double)best + distance)), scratch.list);
      if (weigh(scratch.list, best) >= limit) break;
    }
    keep_nucleus(scratch.list, best, limit);
  }
  return draw_among(scratch.list, key);
}

}  // namespace
}  // namespace baton

// tokens[i]: of row row_ids[i], or -1 where that row's largest logit is no finite number, or one of them is NaN.
BATON_EXPORT int64_t baton_draw_tokens(int64_t rows, int64_t vocab, const float* logits, int64_t stride,
                                       const int64_t* row_ids, const BatonSampling* samplings, const int64_t* positions,
                                       int64_t* tokens) {
  using namespace baton;
  return guarded([&]() -> int64_t {
    parallel_rows(rows, std::max<int64_t>(1, kElementsPerPiece / vocab), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        tokens[i] = draw(logits + row_ids[i] * stride, vocab, samplings[i], positions[i]);
    });
    return 0;
  });
}
