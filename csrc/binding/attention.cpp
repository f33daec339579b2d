#include "binding/attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "common/cpu_kernels.h"

namespace vlmops::attention {
namespace {

// The jobs of each segment, of at most `most` queries each. empty: segments without queries have
// one as well.
class Jobs {
 public:
  Jobs(const Params& p, int64_t most, bool empty) : p_(p), most_(most), empty_(empty) {
    if (p.padding != nullptr) sort_rows();
    for (int64_t s = 0; s < p.segments; ++s) {
      first_.push_back(static_cast<int64_t>(jobs_.size()));
      add_segment(s);
    }
    first_.push_back(static_cast<int64_t>(jobs_.size()));
  }

  const std::vector<Job>& all() const { return jobs_; }
  // The jobs of segment s are [first(s), first(s + 1)).
  int64_t first(int64_t segment) const { return first_[static_cast<size_t>(segment)]; }

 private:
  // order_: of each segment the rows that are not padding, then those that are, from its first on.
  void sort_rows() {
    order_.resize(static_cast<size_t>(p_.rows));
    for (int64_t s = 0; s < p_.segments; ++s) {
      const Range range = range_of(p_.q_starts, p_.rows, s);
      const bool* const hidden = p_.padding + range.first;
      int32_t* at = order_.data() + range.first;
      for (const bool wanted : {false, true}) {
        for (int32_t i = 0; i < range.count; ++i) {
          if (hidden[i] == wanted) *at++ = i;
        }
      }
    }
  }

  void add_segment(int64_t s) {
    const Range q = range_of(p_.q_starts, p_.rows, s);
    const Range k = range_of(p_.k_starts, p_.keys, s);
    if (p_.blocks != nullptr) return add_by_blocks(s, q, k);
    if (p_.padding == nullptr) return add(s, q, k, 0, q.count, nullptr, nullptr);
    const int32_t* const order = order_.data() + q.first;
    const bool* const hidden = p_.padding + q.first;
    int64_t valid = 0;
    while (valid < q.count && !hidden[order[valid]]) ++valid;
    add(s, q, k, 0, valid, order, nullptr);
    Range seen = k;
    seen.count = valid;
    add(s, q, seen, valid, q.count, order, order);
  }

  // Queries that see the same blocks together, wherever they stand.
  void add_by_blocks(int64_t s, const Range& q, const Range& k) {
    if (q.count == 0) return add(s, q, k, 0, 0, nullptr, nullptr);
    std::map<std::string, std::vector<int32_t>> alike;
    const auto count = static_cast<size_t>(p_.block_count);
    for (int32_t i = 0; i < q.count; ++i) {
      const auto* of = reinterpret_cast<const char*>(p_.blocks + (q.first + i) * p_.block_count);
      alike[std::string(of, count)].push_back(i);
    }
    for (auto& [mask, rows] : alike) {
      const bool* const blocks = p_.blocks + (q.first + rows[0]) * p_.block_count;
      if (std::all_of(blocks, blocks + count, [](bool seen) { return seen; })) {
        add_rows(s, q, k, std::move(rows), nullptr, nullptr);
        continue;
      }
      lists_.emplace_back();
      std::vector<int32_t>& keys = lists_.back();
      for (int32_t key = 0; key < k.count; ++key) {
        if (blocks[key / p_.block]) keys.push_back(key);
      }
      add_rows(s, q, {k.first, static_cast<int64_t>(keys.size())}, std::move(rows), keys.data(),
               blocks);
    }
  }

  void add_rows(int64_t s, const Range& q, const Range& k, std::vector<int32_t> rows,
                const int32_t* k_rows, const bool* blocks) {
    const auto count = static_cast<int64_t>(rows.size());
    const bool adjacent = rows.back() - rows.front() == count - 1;
    const auto before = jobs_.size();
    if (adjacent) {
      add(s, q, k, rows.front(), rows.front() + count, nullptr, k_rows);
    } else {
      lists_.push_back(std::move(rows));
      add(s, q, k, 0, count, lists_.back().data(), k_rows);
    }
    for (auto i = before; i < jobs_.size(); ++i) jobs_[i].blocks = blocks;
  }

  void add(int64_t segment, const Range& q, const Range& k, int64_t begin, int64_t end,
           const int32_t* q_rows, const int32_t* k_rows) {
    bool wanted = empty_;
    for (int64_t at = begin; at < end || wanted; at += most_, wanted = false) {
      Job job{segment, q,      k, at, k.count - q.count, q_rows == nullptr ? nullptr : q_rows + at,
              k_rows,  nullptr};
      job.q.count = std::min(most_, end - at);
      jobs_.push_back(job);
    }
  }

  const Params& p_;
  const int64_t most_;
  const bool empty_;
  std::vector<int32_t> order_;
  std::list<std::vector<int32_t>> lists_;  // rows and keys of queries that see the same blocks
  std::vector<Job> jobs_;
  std::vector<int64_t> first_;
};

int64_t most_of(const Params& p) { return std::max<int64_t>(1, kJobRows / p.group()); }

// f(i, scratch) for i < count, by as many threads as torch has; who is free takes the next `batch`.
template <class F>
void share(int64_t count, int64_t batch, size_t floats, const F& f) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const auto run = [&](int64_t, int64_t) {
    // Kept by the thread: fresh memory costs more in page faults than short calls last.
    thread_local std::vector<float> scratch;
    if (scratch.size() < floats + 16) scratch.resize(floats + 16);
    auto at = reinterpret_cast<uintptr_t>(scratch.data());
    auto* const aligned = reinterpret_cast<float*>((at + 63) / 64 * 64);
    for (int64_t i; (i = next.fetch_add(batch)) < count;) f(i, std::min(i + batch, count), aligned);
  };
  if (threads == 1) return run(0, 1);
  torch::stable::parallel_for(0, threads, 1, run);
}

// Jobs of few rows and many keys: a unit is a part of one head's keys.
void forward_in_parts(const Params& p, const std::vector<const Job*>& jobs, size_t scratch_floats) {
  const CpuKernels& kernels = *cpu_kernels().attention;
  struct Unit {
    const Job* job;
    int head;
    int64_t part, parts;
    float* to;
  };
  std::vector<Unit> units;
  size_t floats = 0;
  for (const Job* job : jobs) {
    const int64_t parts = (job->k.count + kPartKeys - 1) / kPartKeys;
    for (int head = 0; head < p.kv_heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        units.push_back({job, head, part, parts, nullptr});
        floats += kernels.part_floats(p, job->q.count, 1);
      }
    }
  }
  std::vector<float> results(floats);
  float* to = results.data();
  for (Unit& unit : units) {
    unit.to = to;
    to += kernels.part_floats(p, unit.job->q.count, 1);
  }
  const auto count = static_cast<int64_t>(units.size());
  share(count, 1, scratch_floats, [&](int64_t i, int64_t end, float* scratch) {
    for (; i < end; ++i) {
      const Unit& unit = units[static_cast<size_t>(i)];
      const int64_t keys = unit.job->k.count, first = unit.part * kPartKeys;
      kernels.forward_part(p, *unit.job, unit.head, first, std::min(keys, first + kPartKeys),
                           scratch, unit.to);
    }
  });
  for (const Unit& unit : units) {
    if (unit.part == 0) kernels.join_parts(p, *unit.job, unit.head, unit.to, unit.parts);
  }
}

}  // namespace

void forward_on_cpu(const Params& p) {
  const CpuKernels& kernels = *cpu_kernels().attention;
  const int64_t most = most_of(p);
  const Jobs jobs(p, most, false);
  const size_t scratch_floats = kernels.scratch(p, most, 1);
  std::vector<const Job*> whole, cut;
  for (const Job& job : jobs.all())
    (few_rows_of(p, job) && job.k.count > kPartKeys ? cut : whole).push_back(&job);
  // A unit is one head of a job. Heads of one job lie side by side.
  const int64_t heads = p.kv_heads, units = static_cast<int64_t>(whole.size()) * heads;
  const int64_t batch =
      std::clamp<int64_t>(units / (8 * torch::stable::get_num_threads()), 1, heads);
  share(units, batch, scratch_floats, [&](int64_t i, int64_t end, float* scratch) {
    while (i < end) {
      const int64_t job = i / heads, stop = std::min(end, (job + 1) * heads);
      kernels.forward(p, *whole[static_cast<size_t>(job)], static_cast<int>(i - job * heads),
                      static_cast<int>(stop - job * heads), scratch);
      i = stop;
    }
  });
  if (!cut.empty()) forward_in_parts(p, cut, scratch_floats);
}

void backward_on_cpu(const Backward& b) {
  const CpuKernels& kernels = *cpu_kernels().attention;
  const Jobs jobs(b.p, most_of(b.p), true);  // as in forward: sums are cut alike
  int64_t longest = 0, most = 0;
  for (int64_t s = 0; s < b.p.segments; ++s) {
    longest = std::max(longest, range_of(b.p.q_starts, b.p.rows, s).count);
    most = std::max(most, jobs.first(s + 1) - jobs.first(s));
  }
  const int64_t heads = b.p.kv_heads, units = b.p.segments * heads;
  const size_t floats = kernels.backward_scratch(b.p, longest, most);
  share(units, 1, floats, [&](int64_t i, int64_t end, float* scratch) {
    for (; i < end; ++i) {
      const int64_t s = i / heads, first = jobs.first(s);
      kernels.backward(b, jobs.all().data() + first, jobs.first(s + 1) - first,
                       static_cast<int>(i % heads), scratch);
    }
  });
}

}  // namespace vlmops::attention
